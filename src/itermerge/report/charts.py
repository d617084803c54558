"""Charts of a report: pure functions from plain rows to Altair charts; a PNG and a page's spec from the same chart."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import altair as alt
from altair.utils import schemapi

Panel: TypeAlias = alt.Chart | alt.LayerChart | alt.FacetChart
Rows: TypeAlias = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette, which the colour-blind can tell apart. One colour for one thing through a page.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a8f96"
)  # fmt: skip
ID, NEAR, FAR = BLUE, ORANGE, VERMILLION
PALE_BLUE, PALE_VERMILLION = "#A9CDE4", "#F0B792"
REASONS = {
    "correct": GREEN, "wrong": VERMILLION, "unparseable": PURPLE, "truncated": ORANGE, "timed_out": SKY, "error": GREY
}  # fmt: skip
_CATEGORIES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "#9A7B00")
_RAMP = ("#7A3FC0", "#A03BB4", "#C0418F", "#D8546C", "#E8704E", "#EE8F3A", "#E5AB34")

_TEXT = {"light": "#2b323a", "dark": "#d7dce2"}
_SOFT = {"light": "#5b6570", "dark": "#a3acb6"}
_GRID = {"light": "#e3e6ea", "dark": "#333b45"}


def theme(name: str) -> dict[str, Any]:
    """The Vega-Lite config of the `light` or `dark` theme: all that is not the data's own colour."""
    text, soft, grid = _TEXT[name], _SOFT[name], _GRID[name]
    small = {"labelColor": soft, "titleColor": soft, "labelFontSize": 11, "titleFontSize": 11}
    return {
        "background": "transparent",
        "view": {"stroke": None},
        "axis": {**small, "titleFontWeight": "normal", "gridColor": grid, "domainColor": soft, "tickColor": soft,
                 "labelLimit": 260},
        "legend": {**small, "titleFontWeight": "normal", "labelLimit": 320, "symbolStrokeWidth": 2.5},
        "title": {"color": text, "subtitleColor": soft, "fontSize": 12.5, "subtitleFontSize": 11, "anchor": "start",
                  "subtitlePadding": 4, "offset": 8},
        "text": {"color": soft},
    }  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Panels that belong together. `legend` is the colour of each label where all panels share them."""

    name: str
    panels: Sequence[Panel]
    legend: Mapping[str, str] = field(default_factory=dict)
    columns: int = 3
    caption: str = ""

    @cached_property
    def specs(self) -> list[dict[str, Any]]:
        """The panels as Vega-Lite, without a theme. Not checked against its schema, which takes longer than all the
        rest; tests do that."""
        made = [panel.to_dict(validate=False) for panel in self.panels]
        return [{name: value for name, value in m.items() if name not in ("config", "$schema")} for m in made]

    @property
    def bare(self) -> list[dict[str, Any]]:
        """The panels without the legend that a page draws once for all of them."""
        return [_without_legend(panel) for panel in self.specs] if self.legend else self.specs


def _without_legend(panel: dict[str, Any]) -> dict[str, Any]:
    out = dict(panel)
    if "layer" in out:
        out["layer"] = [_without_legend(layer) for layer in out["layer"]]
    if "legend" in (colour := out.get("encoding", {}).get("color", {})):
        out["encoding"] = {**out["encoding"], "color": {**colour, "legend": None}}
    return out


def write_png(figure: Figure, path: Path) -> Path:
    """The panels of a figure side by side, on white, with their common legend below; the path."""
    import vl_convert

    panels = [dict(panel) for panel in figure.specs]
    data = [panel.pop("datasets", {}) for panel in panels]  # Vega-Lite looks for them at the top alone
    drawn: dict[str, Any] = {
        "concat": panels, "datasets": {name: rows for one in data for name, rows in one.items()},
        "columns": figure.columns, "spacing": 28, "padding": 12,
        "resolve": {"scale": {"color": "shared" if figure.legend else "independent"}},
        "config": theme("light") | {"background": "white"},
    }  # fmt: skip
    if figure.caption:
        small = {"fontSize": 11, "fontWeight": "normal", "color": _SOFT["light"]}
        drawn["title"] = {
            "text": figure.caption.split("\n"), "orient": "bottom", "anchor": "start", "offset": 14, **small
        }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(vl_convert.vegalite_to_png(drawn, vl_version=_version(), scale=2))
    return path


def _version() -> str:
    """The Vega-Lite release that Altair writes for, as vl-convert names it."""
    found = re.match(r"v(\d+\.\d+)", alt.SCHEMA_VERSION)
    assert found
    return found[1]


def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets window.vegaEmbed. Making it takes longer than a run's
    charts: it is kept beside models and stages, where that folder can be written."""
    import vl_convert  # here: a run that draws nothing does without

    home = Path(os.environ.get("ITERMERGE_HOME") or "~/.cache/itermerge").expanduser() / "report"
    kept = home / f"vega-{version('vl-convert-python')}-{_version()}.js"
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    made = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_version())
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=home, delete=False, encoding="utf-8") as file:
            file.write(made)
        os.replace(file.name, kept)
    return made


def unchecked() -> AbstractContextManager[None]:
    """While charts are made: Altair checks each part against Vega-Lite's schema, over and over; tests do that."""
    return schemapi.debug_mode(False)


# --- colours --------------------------------------------------------------------------------------------------------


def ramp(n: int) -> list[str]:
    """`n` colours in order, from dark to bright."""
    if n == 1:
        return [_RAMP[0]]
    at = [i * (len(_RAMP) - 1) / (n - 1) for i in range(n)]
    return [_blend(_RAMP[int(a)], _RAMP[min(int(a) + 1, len(_RAMP) - 1)], a % 1) for a in at]


def greys(n: int) -> list[str]:
    """`n` greys that can be told apart where there are few."""
    return [GREY] if n == 1 else [_blend("#555B62", "#BCC2C9", i / (n - 1)) for i in range(n)]


def _blend(a: str, b: str, share: float) -> str:
    pairs = [(int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(x + (y - x) * share):02X}" for x, y in pairs)


def categories(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label: of a palette whose members are unlike each other while that lasts."""
    colours = _CATEGORIES if len(labels) <= len(_CATEGORIES) else ramp(len(labels))
    return dict(zip(labels, colours, strict=False))


# --- kinds of chart -------------------------------------------------------------------------------------------------


class _Rows(alt.InlineData):
    """Data that nobody changes: Altair copies all it is given whenever a mark or an encoding is added."""

    def __deepcopy__(self, memo: Any = None) -> _Rows:
        return self


def _data(rows: Rows) -> alt.InlineData:
    return _Rows(values=[dict(row) for row in rows])


def _colour(colours: Mapping[str, str], legend: bool, by: str = "series") -> alt.Color:
    return alt.Color(
        f"{by}:N",
        scale=alt.Scale(domain=list(colours), range=list(colours.values())),
        legend=alt.Legend(title=None, orient="bottom", columns=4, symbolOpacity=1) if legend else None,
    )


def _ticks(values: Sequence[float], most: int = 10) -> list[float]:
    """Whole numbers from the first to the last value, every one or every few."""
    low, high = int(min(values, default=0)), int(max(values, default=0))
    return list(range(low, high + 1, max(1, -(-(high - low) // most))))


def curves(
    title: str | Sequence[str], rows: Rows, colours: Mapping[str, str], *, y: str, x: str = "round", form: str = ".1f",
    levels: Rows = (), legend: bool = False, width: int = 290, height: int = 190, band: str = "95%",
    domain: Sequence[float] | None = None,
) -> Panel:  # fmt: skip
    """Lines with bands over whole numbers. Rows: {x, series, value, low, high}; a value of None is a gap. `levels` are
    dotted lines: {series, value, what}, grey
    without a series."""
    base = alt.Chart(_data(rows))
    by = _colour(colours, legend)
    across = alt.X(
        "x:Q", title=x, axis=alt.Axis(values=_ticks([r["x"] for r in rows]), format="d", grid=False),
        scale=alt.Scale(nice=False, padding=8),
    )  # fmt: skip
    up = alt.Scale(zero=False) if domain is None else alt.Scale(domain=list(domain))
    tips = [
        alt.Tooltip("series:N", title=" "), alt.Tooltip("x:Q", title=x, format="d"),
        alt.Tooltip("value:Q", title=y, format=form), alt.Tooltip("low:Q", title=f"{band}, low", format=form),
        alt.Tooltip("high:Q", title=f"{band}, high", format=form),
    ]  # fmt: skip
    value = alt.Y("value:Q", title=y, scale=up)
    layers: list[alt.Chart] = []
    if any(r.get("low") is not None for r in rows):
        layers.append(
            base.mark_area(opacity=min(0.16, 0.4 / len({r["series"] for r in rows}))).encode(
                across, alt.Y("low:Q", title=y, scale=up), alt.Y2("high:Q"), by
            )
        )
    layers.append(base.mark_line(strokeWidth=2).encode(across, value, by))
    layers.append(base.mark_point(filled=True, size=46, opacity=1).encode(across, value, by, tooltip=tips))
    for own in (True, False):
        if mine := [level for level in levels if ("series" in level) == own]:
            dotted = alt.Chart(_data(mine)).mark_rule(strokeDash=[2, 3], strokeWidth=1.4, color=GREY)
            dotted = dotted.encode(alt.Y("value:Q"), tooltip=[alt.Tooltip("what:N", title=" "), _exact(form)])
            layers.append(dotted.encode(by) if own else dotted)
    return alt.layer(*layers, title=_title(title), width=width, height=height)


def _exact(form: str) -> alt.Tooltip:
    return alt.Tooltip("value:Q", title="value", format=form)


def _title(title: str | Sequence[str]) -> Any:
    """The first line as title, others below it in smaller letters."""
    if isinstance(title, str):
        return title
    return alt.TitleParams(text=title[0], subtitle=list(title[1:]))


def heatmap(
    title: str | Sequence[str], cells: Rows, *, x: str, y: str, form: str, limits: tuple[float, float], label: str,
    order_x: Sequence[str], order_y: Sequence[str], diverging: bool = False, legend: bool = True,
) -> Panel:  # fmt: skip
    """Coloured cells with their values. Cells: {x, y, value}; None is a gap, marked by a dash. `diverging` runs from
    red to blue with white in the middle of the limits."""
    low, high = limits
    span = (high - low) or 1.0
    wide = len(order_x) <= 14

    def ink(value: float | None) -> str:
        if value is None:
            return GREY
        at = (value - low) / span
        dark = not 0.2 <= at <= 0.8 if diverging else at < 0.6
        return "white" if dark else "black"

    rows = [
        {**c, "ink": ink(c["value"]), "said": "–" if c["value"] is None else signed(c["value"], form)} for c in cells
    ]
    scheme = "redblue" if diverging else "viridis"
    across = alt.X("x:N", title=x, sort=list(order_x), axis=alt.Axis(labelAngle=0, grid=False, domain=False))
    down = alt.Y("y:N", title=y, sort=list(order_y), axis=alt.Axis(grid=False, domain=False))
    shade = alt.Color(
        "value:Q", scale=alt.Scale(scheme=scheme, domain=[low, high], clamp=True),
        legend=alt.Legend(title=label, gradientLength=min(110, max(44, 22 * len(order_y)))) if legend else None,
    )  # fmt: skip
    tips = [alt.Tooltip("x:N", title=x), alt.Tooltip("y:N", title=y or " "), alt.Tooltip("said:N", title=label)]
    base = alt.Chart(_data(rows))
    boxes = base.mark_rect(stroke="#808890", strokeWidth=0.3).encode(across, down, shade, tooltip=tips)
    texts = base.mark_text(fontSize=10).encode(
        across, down, text=alt.Text("said:N"), color=alt.Color("ink:N", scale=None), tooltip=tips
    )
    return alt.layer(
        *((boxes, texts) if wide else (boxes,)), title=_title(title), width=alt.Step(46 if wide else 16),
        height=alt.Step(22), resolve=alt.Resolve(scale={"color": "independent"}),
    )  # fmt: skip


def signed(value: float, form: str = "+.2f") -> str:
    """A number with a true minus; no sign before a zero."""
    said = format(value, form)
    return (said if float(said) else said.lstrip("+-")).replace("-", "−")


def importance(
    title: Sequence[str], bars: Rows, lines: Rows, colours: Mapping[str, str], *, legend: bool = False
) -> Panel:
    """Importance of layers as bars with whiskers, their change as lines with points, both in per cent of the sum over
    layers. Bars: {layer, what, share, low, high, exact}; lines: {layer, what, share, exact}."""
    layers = sorted({int(row["layer"]) for row in [*bars, *lines]})
    by = _colour(colours, legend, "what")
    across = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, grid=False), sort=layers)
    up = alt.Y("share:Q", title="share of the sum over layers (%)")

    def tips(*names: str) -> list[alt.Tooltip]:
        return [
            alt.Tooltip("what:N", title=" "), alt.Tooltip("layer:O", title="layer"),
            *(alt.Tooltip(f"{n}:Q", title=t, format=".2f") for n, t in
              (("share", "share (%)"), ("low", "95%, low"), ("high", "95%, high")) if n in names),
            alt.Tooltip("exact:Q", title="value", format=".4g"),
        ]  # fmt: skip

    columns = alt.Chart(_data(bars))
    traces = alt.Chart(_data(lines))
    drawn = [columns.mark_bar().encode(across, up, by, tooltip=tips("share", "low", "high"))]
    if any(row.get("low") is not None for row in bars):
        drawn.append(
            columns.mark_rule(strokeWidth=1.2, color=GREY).encode(across, alt.Y("low:Q", title=""), alt.Y2("high:Q"))
        )
    drawn.append(traces.mark_line(strokeWidth=2).encode(across, up, by))
    drawn.append(traces.mark_point(filled=True, size=52, opacity=1).encode(across, up, by, tooltip=tips("share")))
    width = max(300, 15 * len(layers))
    return alt.layer(*drawn, title=_title(title), width=width, height=210)


def stacked(title: str, rows: Rows, colours: Mapping[str, str], *, width: int = 290, height: int = 190) -> Panel:
    """Shares in per cent, one bar a round. Rows: {x, series, value}."""
    order = {name: i for i, name in enumerate(colours)}
    bars = alt.Chart(_data([{**row, "at": order[row["series"]]} for row in rows])).mark_bar()
    return bars.encode(
        alt.X("x:O", title="round", axis=alt.Axis(labelAngle=0)),
        alt.Y("value:Q", title="share (%)", stack="zero", scale=alt.Scale(domain=[0, 100])),
        _colour(colours, legend=True), alt.Order("at:Q"),
        tooltip=[alt.Tooltip("series:N", title=" "), alt.Tooltip("x:O", title="round"), _exact(".1f")],
    ).properties(title=title, width=width, height=height)  # fmt: skip


def steps(
    title: str, rows: Rows, colours: Mapping[str, str], *, x: str, y: str, legend: bool = False, width: int = 290
) -> Panel:
    """Lines over the powers of two of `x`, with bands for the first and the last of `colours`. Rows: {x, series, value,
    low, high}."""
    base = alt.Chart(_data(rows))
    by = _colour(colours, legend)
    across = alt.X("x:O", title=x, axis=alt.Axis(labelAngle=0, grid=False), sort=sorted({r["x"] for r in rows}))
    up = alt.Y("value:Q", title=y, scale=alt.Scale(zero=False))
    tips = [
        alt.Tooltip("series:N", title=" "), alt.Tooltip("x:O", title=x), _exact(".1f"),
        alt.Tooltip("low:Q", title="95%, low", format=".1f"), alt.Tooltip("high:Q", title="95%, high", format=".1f"),
    ]  # fmt: skip
    labels = list(colours)
    ends = [r for r in rows if r["series"] in (labels[0], labels[-1]) and r["low"] is not None]
    band = alt.Chart(_data(ends)).mark_area(opacity=0.16)
    return alt.layer(
        band.encode(across, alt.Y("low:Q", title=y, scale=alt.Scale(zero=False)), alt.Y2("high:Q"), by),
        base.mark_line(strokeWidth=2).encode(across, up, by),
        base.mark_point(filled=True, size=46, opacity=1).encode(across, up, by, tooltip=tips),
        title=title, width=width, height=210,
    )  # fmt: skip


def _room(rows: Rows, value: str, low: str, high: str, others: Sequence[float] = (), *, most: float = 1) -> list[float]:
    """Limits that show all values, and of their intervals as much as leaves the values apart: on either side at most
    `most` of the values' range."""
    values = [*(row[value] for row in rows), *others]
    least, largest = min(values), max(values)
    room = max(largest - least, 0.02 * max(abs(least), abs(largest)), 1e-9)
    ends = [row[name] for row in rows for name in (low, high) if row.get(name) is not None]
    return [
        max(least - most * room, min([*ends, least - 0.12 * room])),
        min(largest + most * room, max([*ends, largest + 0.12 * room])),
    ]  # fmt: skip


def pareto(
    points: Rows, front: Rows, colours: Mapping[str, str], *, x: str, y: str, base: Rows = (), labels: bool = False,
    legend: bool = True,
) -> Panel:  # fmt: skip
    """One metric against another. Points: {x, y, series, name, low_x, high_x, low_y, high_y} (the last four may be
    missing); the front is drawn as a line, {x, y}; `base`: {x, y, name} as crosses; `labels` writes names beside
    points."""
    cloud = alt.Chart(_data(points))
    by = _colour(colours, legend)
    wide, tall = (
        alt.Scale(domain=_room(points, d, f"low_{d}", f"high_{d}", [p[d] for p in base]), nice=False, zero=False)
        for d in "xy"
    )
    across = alt.X("x:Q", title=x, scale=wide)
    up = alt.Y("y:Q", title=y, scale=tall)
    tips = [
        alt.Tooltip("name:N", title=" "), alt.Tooltip("x:Q", title=x, format=".2f"),
        alt.Tooltip("y:Q", title=y, format=".2f"),
    ]  # fmt: skip
    line = alt.Chart(_data(sorted(front, key=lambda p: p["x"]))).mark_line(
        color=GREY, strokeDash=[5, 3], strokeWidth=1.4
    )
    layers = [line.encode(across, up)]
    if any(p.get("low_x") is not None for p in points):
        layers.append(
            cloud.mark_rule(opacity=0.55, clip=True).encode(alt.X("low_x:Q", title=x, scale=wide), up, by, x2="high_x")
        )
        layers.append(
            cloud.mark_rule(opacity=0.55, clip=True).encode(
                across, alt.Y("low_y:Q", title=y, scale=tall), by, y2="high_y"
            )
        )
    layers.append(cloud.mark_point(filled=True, size=80, opacity=1).encode(across, up, by, tooltip=tips))
    if labels:
        layers.append(cloud.mark_text(align="left", dx=7, dy=-6, fontSize=10).encode(across, up, text="name:N"))
    if base:
        cross = alt.Chart(_data(base)).mark_point(shape="cross", size=110, color=GREY, filled=True, opacity=1)
        layers.append(cross.encode(across, up, tooltip=tips))
    return alt.layer(*layers, width=430, height=330)


def frontier(
    rows: Rows, colours: Mapping[str, str], *, x: str, y: str, log: bool = False, base_x: float | None = None,
    base_y: float | None = None,
) -> Panel:  # fmt: skip
    """Points that are joined in their order, with intervals in y; the base's values as dotted lines. Rows: {x, y, low,
    high, series, at, name}."""
    base = alt.Chart(_data(rows))
    by = _colour(colours, legend=True)
    xs = [row["x"] for row in rows if row["x"] > 0 or not log]
    wide = alt.Scale(type="log", domain=[0.85 * min(xs), 1.15 * max(xs)]) if log else alt.Scale(zero=False)
    tall = alt.Scale(domain=_room(rows, "y", "low", "high", [] if base_y is None else [base_y]), nice=False, zero=False)
    across = alt.X("x:Q", title=x, scale=wide, axis=alt.Axis(grid=False, tickCount=5, format="~g"))
    up = alt.Y("y:Q", title=y, scale=tall)
    tips = [
        alt.Tooltip("name:N", title=" "), alt.Tooltip("x:Q", title=x, format=".4g"),
        alt.Tooltip("y:Q", title=y, format=".1f"),
    ]  # fmt: skip
    layers: list[alt.Chart] = []
    for value, mark in ((base_x, alt.X("x:Q")), (base_y, alt.Y("y:Q"))):
        if value is not None:
            dotted = alt.Chart(_data([{"x": value, "y": value}]))
            layers.append(dotted.mark_rule(strokeDash=[2, 3], strokeWidth=1.4, color=GREY).encode(mark))
    layers.append(
        base.mark_rule(opacity=0.6, clip=True).encode(across, alt.Y("low:Q", title=y, scale=tall), by, y2="high")
    )
    layers.append(base.mark_line(strokeWidth=1.6).encode(across, up, by, alt.Order("at:Q")))
    layers.append(base.mark_point(filled=True, size=55, opacity=1).encode(across, up, by, tooltip=tips))
    return alt.layer(*layers, width=330, height=240)


Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def named(
    points: Rows, curves: Rows, dust: Rows, colours: Mapping[str, str], *, x: str, y: str, width: int = 660,
    height: int = 440,
) -> Panel:  # fmt: skip
    """Points with intervals in both directions; behind them curves, joined in their order, and dots. What has a `label`
    has it written beside it. Points: {x, y, series, name, label, low_x, high_x, low_y, high_y}; curves: {x, y, series,
    name, label, at, shown}; dots: {x, y, series, name}. In the picture are 0, the points, their intervals as far as
    there is room, and those of a curve that are to be `shown`; of the rest what is near them."""
    there = {d: [0.0, *(row[d] for row in curves if row["shown"])] for d in "xy"}
    limits = {d: _room(points, d, f"low_{d}", f"high_{d}", there[d], most=0.4) for d in "xy"}
    seen = [*points, *(r for r in curves if _within(r, limits))]
    dust = [r for r in dust if _within(r, limits)]
    wide, tall = (alt.Scale(domain=limits[d], nice=False, zero=False) for d in "xy")
    across = alt.X("x:Q", title=x, scale=wide, axis=alt.Axis(tickCount=7))
    up = alt.Y("y:Q", title=y, scale=tall, axis=alt.Axis(tickCount=7))
    by = _colour(colours, legend=True)
    tips = [alt.Tooltip("name:N", title=" "), alt.Tooltip("x:Q", format=".1f"), alt.Tooltip("y:Q", format=".1f")]
    cloud, behind, dots = alt.Chart(_data(points)), alt.Chart(_data(curves)), alt.Chart(_data(dust))
    zero = alt.Chart(_data([{"x": 0, "y": 0}]))
    layers = [
        zero.mark_rule(strokeDash=[2, 3], strokeWidth=1.2, color=GREY).encode(alt.X("x:Q", title=x, scale=wide)),
        zero.mark_rule(strokeDash=[2, 3], strokeWidth=1.2, color=GREY).encode(alt.Y("y:Q", title=y, scale=tall)),
        cloud.mark_rule(opacity=0.3, clip=True).encode(alt.X("low_x:Q", title=x, scale=wide), up, by, x2="high_x"),
        cloud.mark_rule(opacity=0.3, clip=True).encode(across, alt.Y("low_y:Q", title=y, scale=tall), by, y2="high_y"),
        dots.mark_point(filled=True, size=22, opacity=0.35).encode(across, up, by, tooltip=tips),
        behind.mark_line(strokeWidth=1.8, clip=True).encode(across, up, by, alt.Order("at:Q")),
        behind.mark_point(filled=True, size=36, opacity=1, clip=True).encode(across, up, by, tooltip=tips),
        cloud.mark_point(filled=True, size=90, opacity=1, stroke="white").encode(across, up, by, tooltip=tips),
    ]

    def pixels(row: Mapping[str, Any]) -> tuple[float, float]:
        (left, right), (low, high) = limits["x"], limits["y"]
        return width * (row["x"] - left) / (right - left), height * (high - row["y"]) / (high - low)

    def values(at: tuple[float, float]) -> tuple[float, float]:
        (left, right), (low, high) = limits["x"], limits["y"]
        return left + at[0] / width * (right - left), high - at[1] / height * (high - low)

    said = [row for row in seen if row.get("label")]
    marks = [(*pixels(row), *pixels(row)) for row in seen]
    for row in points:
        (left, top), (right, bottom) = (pixels({d: row[f"{end}_{d}"] for d in "xy"}) for end in ("low", "high"))
        (px, py) = pixels(row)
        marks += [(left, py, right, py), (px, min(top, bottom), px, max(top, bottom))]
    lines = sorted(curves, key=lambda row: (row["series"], row["at"]))
    for a, b in pairwise(lines):
        if a["series"] == b["series"]:
            (ax, ay), (bx, by_) = pixels(a), pixels(b)
            on = [(ax + (bx - ax) * i / 40, ay + (by_ - ay) * i / 40) for i in range(41)]
            marks += [(px - 1, py - 1, px + 1, py + 1) for px, py in on]
    boxes = beside([pixels(row) for row in said], [row["label"] for row in said], width, height, marks)
    leaders, texts = [], []
    for row, box in zip(said, boxes, strict=True):
        at = pixels(row)
        near = _nearest(box, at)
        if math.dist(at, near) > 14:
            end = values(near)
            leaders.append({"x": row["x"], "y": row["y"], "x2": end[0], "y2": end[1]})
        middle = values(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        texts.append({"x": middle[0], "y": middle[1], "name": row["label"], "series": row["series"]})
    led = alt.Chart(_data(leaders)).mark_rule(strokeWidth=0.8, color=GREY)
    layers.insert(2, led.encode(across, up, x2="x2", y2="y2"))
    written = alt.Chart(_data(texts))
    halo = written.mark_text(fontSize=11, stroke="white", strokeWidth=3, color="white", opacity=0.8)
    layers += [
        halo.encode(across, up, text="name:N"),
        written.mark_text(fontSize=11).encode(across, up, by, text="name:N"),
    ]
    return alt.layer(*layers, width=width, height=height)


def beside(
    points: Sequence[tuple[float, float]], names: Sequence[str], width: float, height: float,
    marks: Sequence[Box] = (),
) -> list[Box]:  # fmt: skip
    """Where each point's name stands, within width x height: beside it, away from the other names and from all marks,
    as near as that allows. In pixels, y downwards."""
    boxes: list[Box | None] = [None] * len(points)

    def cost(i: int, box: Box, far: float) -> float:
        others = [b for j, b in enumerate(boxes) if b is not None and j != i]
        out = box[0] < 2 or box[1] < 2 or box[2] > width - 2 or box[3] > height - 2
        over = sum(_overlap(box, b, 2) for b in others)
        points_hit = sum(_overlap(box, m, 7) for m in marks if m[:2] == m[2:])
        bars_hit = sum(_overlap(box, m, 0) for m in marks if m[:2] != m[2:])
        closer = sum(math.dist(p, _nearest(box, p)) < far - 1 for j, p in enumerate(points) if j != i)
        return 1e6 * out + 1e4 * over + 300 * points_hit + 8 * bars_hit + 8 * closer + far

    def candidates(i: int) -> list[tuple[float, Box]]:
        (px, py), wide, tall = points[i], 5.8 * len(names[i]) + 2, 12.0
        found = []
        for far in (9.0, 16.0, 26.0, 38.0, 52.0, 68.0, 86.0, 110.0, 140.0):
            for step in range(24):
                angle = 2 * math.pi * step / 24
                cx = px + math.cos(angle) * (far + wide / 2)
                cy = py + math.sin(angle) * (far + tall / 2)
                box = (cx - wide / 2, cy - tall / 2, cx + wide / 2, cy + tall / 2)
                found.append((math.dist((px, py), _nearest(box, (px, py))), box))
        return found

    for _ in range(4):
        for i in sorted(range(len(points)), key=lambda i: points[i]):
            boxes[i] = min(candidates(i), key=lambda c, i=i: cost(i, c[1], c[0]))[1]
    return [b for b in boxes if b is not None]


def _within(row: Mapping[str, Any], limits: Mapping[str, Sequence[float]]) -> bool:
    return all(limits[d][0] <= row[d] <= limits[d][1] for d in "xy")


def _overlap(a: Box, b: Box, gap: float) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _nearest(box: Box, at: tuple[float, float]) -> tuple[float, float]:
    return min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])


def dots(
    title: str, rows: Rows, colours: Mapping[str, str], *, x: str, form: str = ".2f", rule: float | None = None,
    limits: Sequence[float] = (),
) -> Panel:  # fmt: skip
    """A value and its interval for each name, one below the other. Rows: {name, series, value, low, high}; `rule` is a
    dotted line; `limits` of the values, where they do not follow from the rows."""
    base = alt.Chart(_data(rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    down = alt.Y("name:N", title=None, sort=names, axis=alt.Axis(grid=True))
    limits = limits or _room(rows, "value", "low", "high", [] if rule is None else [rule])
    wide = alt.Scale(domain=list(limits), nice=False, zero=False)
    across = alt.X("value:Q", title=x, scale=wide, axis=alt.Axis(tickCount=5))
    by = _colour(colours, legend=False)
    tips = [
        alt.Tooltip("name:N", title=" "), alt.Tooltip("value:Q", title=x, format=form),
        alt.Tooltip("low:Q", title="95%, low", format=form), alt.Tooltip("high:Q", title="95%, high", format=form),
    ]  # fmt: skip
    layers = []
    if rule is not None:
        dotted = alt.Chart(_data([{"value": rule}])).mark_rule(strokeDash=[2, 3], color=GREY, strokeWidth=1.4)
        layers.append(dotted.encode(across))
    layers.append(
        base.mark_rule(strokeWidth=1.6, clip=True).encode(alt.X("low:Q", title=x, scale=wide), down, by, x2="high")
    )
    layers.append(base.mark_point(filled=True, size=60, opacity=1).encode(across, down, by, tooltip=tips))
    return alt.layer(*layers, title=title, width=250, height=alt.Step(19))


def bars(rows: Rows, colours: Mapping[str, str], *, x: str) -> Panel:
    """Horizontal bars. Rows: {name, series, value}."""
    return (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            alt.X("value:Q", title=x),
            alt.Y("name:N", title=None, sort=list(dict.fromkeys(row["name"] for row in rows))),
            _colour(colours, legend=False),
            tooltip=[alt.Tooltip("name:N", title=" "), alt.Tooltip("series:N", title=" "), _exact(".2f")],
        )
        .properties(width=420, height=alt.Step(22))
    )

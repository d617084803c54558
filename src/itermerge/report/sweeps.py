"""The report of a sweep: its settings against one another, and every job."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from . import charts
from .charts import Figure, signed
from .folders import (
    STATES,
    Job,
    Run,
    Setting,
    State,
    by_ratio,
    change_of,
    in_order,
    job_row,
    label,
    longest,
    mean_change,
    mean_interval,
    number,
    read_states,
    rows_of,
    settings,
    vanillas,
)  # fmt: skip
from .page import Block, Cell, Charts, Note, Page, Section, Table, Tile
from .runs import CURVES, ESTIMATORS, PANELS

MANY = 12  # labels that a legend may have
ROWS = 60  # settings that stand below one another
HEATS = {"id/acc": "in-domain (ID)", "ood/acc": "out-of-domain (OOD)"}
SEARCH = "search.json"


def page(folder: Path, jobs: Sequence[Job]) -> Page:
    """The page of a sweep folder and its finished jobs."""
    states = read_states(folder)
    facts = Run(folder)
    search = facts.json(SEARCH)
    chosen = settings(jobs)
    sections = [jobs_section(folder, jobs, states)]
    notes = [Note(b, warn=True) for b in facts.broken]
    if jobs:
        sections = [
            *([Section("methods", "Methods against vanilla", named)] if (named := named_blocks(jobs)) else []),
            Section("heatmaps", "Ratio and rounds", [*ratio_blocks(jobs), *vanilla_blocks(jobs)]),
            Section("tradeoff", "In domain against out of domain", pareto_blocks(chosen)),
            Section("curves", "Over rounds", curve_blocks(chosen)),
            Section(
                "diversity",
                "Diversity",
                [*collapse_blocks(chosen), *diversity_blocks(chosen[:ROWS]), *_cut(chosen)],
            ),
            Section("layers", "Layers", [*layer_blocks(chosen), *mismatch_blocks(chosen[:ROWS]), *_cut(chosen)]),
            *sections,
        ]
    else:
        notes.append(Note("no job is done, so there is nothing to compare yet", warn=True))
    failed = [s for s in states if s.mark == "FAILED"]
    done = sum(s.mark == "DONE" for s in states)
    said = f"{done} of {len(states)} jobs are done" + (f", {len(failed)} failed" if failed else "")
    for s in failed:
        notes.append(Note(f"job {s.number} failed ({' '.join(s.overrides)}): {s.why}", warn=True))
    read = {j.folder.name for j in jobs}
    for s in states:
        if s.mark == "DONE" and str(s.number) not in read:
            notes.append(Note(f"job {s.number} is done, but its config, summary or rounds cannot be read", warn=True))
    for best in search.get("best", []) if isinstance(search.get("best"), list) else []:
        notes.append(Note(f"search, best by validation: {_said_of(best, search.get('metrics', []))}"))
    state = "ok" if done == len(states) else "bad" if failed else "open"
    return Page(_title(folder, jobs), _swept(jobs, states), state, said, tiles(jobs, chosen, states), notes, sections)


def _cut(chosen: Sequence[Setting]) -> list[Block]:
    said = f"the first {ROWS} of {len(chosen)} settings, one below the other; jobs.csv has all"
    return [Note(said)] if len(chosen) > ROWS else []


def _said_of(best: Mapping[str, Any], metrics: Sequence[str]) -> str:
    figures = ", ".join(f"{m} {100 * v:.1f}%" for m in metrics if (v := number(best, m)) is not None)
    return f"job {best.get('job')}: {figures} with {label(best.get('params') or {})}"


def _title(folder: Path, jobs: Sequence[Job]) -> str:
    keys = list(jobs[0].keys) if jobs else []
    return f"Sweep over {', '.join(keys)}" if keys else f"Sweep {folder.name}"


def _swept(jobs: Sequence[Job], states: Sequence[State]) -> str:
    """The varied keys with their values."""
    values: dict[str, list[str]] = {}
    for job in jobs:
        for key, value in {**job.keys, "seed": job.seed}.items():
            said = label({key: value}).partition("=")[2]
            if said and said not in values.setdefault(key, []):
                values[key].append(said)
    if not jobs:
        return "; ".join(" ".join(s.overrides) for s in states[:4])
    return "; ".join(
        f"{k} = {', '.join(v[:8])}" + (f", … ({len(v)} values)" if len(v) > 8 else "") for k, v in values.items()
    )


def tiles(jobs: Sequence[Job], chosen: Sequence[Setting], states: Sequence[State]) -> list[Tile]:
    """Counts, and the base."""
    marks = [s.mark for s in states]
    left = len(marks) - marks.count("DONE") - marks.count("FAILED")
    rest = [f"{marks.count('FAILED')} failed"] * ("FAILED" in marks) + [f"{left} interrupted or not begun"] * (left > 0)
    out = [Tile("jobs done", f"{marks.count('DONE')} of {len(marks)}", ", ".join(rest))]
    if jobs:
        seeds = sorted({len(s.jobs) for s in chosen})
        each = "–".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
        out.append(Tile("settings", str(len(chosen)), f"{each} {'seed' if each == '1' else 'seeds'} each"))
        for name, title in (("id/acc", "ID of the base"), ("ood/acc", "OOD of the base")):
            bases = sorted({v for j in jobs if (v := number(j.rounds[0], name)) is not None})
            if bases:
                said = "–".join(f"{100 * b:.1f}" for b in dict.fromkeys((bases[0], bases[-1])))
                out.append(Tile(title, f"{said}%", ""))
    return out


def colours_of(chosen: Sequence[Setting]) -> dict[str, str]:
    """A colour for each short label: ratios in order of a ramp, vanilla grey."""
    vanilla = {s.short: all(j.control for t in chosen if t.short == s.short for j in t.jobs) for s in chosen}
    others = [short for short, is_vanilla in vanilla.items() if not is_vanilla]
    ordered = all(re.fullmatch(r"ratio=[\d.e+-]+", short) for short in others)
    if ordered:
        others.sort(key=lambda short: float(short.removeprefix("ratio=")))
    picked = (
        dict(zip(others, charts.ramp(len(others)), strict=True)) if ordered and others else charts.categories(others)
    )
    greys = iter(charts.greys(sum(vanilla.values())))
    return {short: next(greys) if is_vanilla else picked[short] for short, is_vanilla in vanilla.items()}


def _legend(colours: Mapping[str, str]) -> Mapping[str, str]:
    return colours if len(colours) <= MANY else {}


def _rows_of_panels(chosen: Sequence[Setting]) -> dict[str, list[Setting]]:
    rows: dict[str, list[Setting]] = {}
    for setting in chosen:
        rows.setdefault(setting.rest, []).append(setting)
    return rows


def _titled(title: str, rest: str) -> str | list[str]:
    return [title, rest] if rest else title


# --- accuracy -------------------------------------------------------------------------------------------------------


def curve_blocks(chosen: Sequence[Setting]) -> list[Block]:
    """ID, OOD near and OOD far over rounds, a line a setting."""
    colours = colours_of(chosen)
    panels = []
    for rest, row in _rows_of_panels(chosen).items():
        for name, (title, _) in PANELS.items():
            rows = [point for s in row for point in over_rounds(s, name)]
            if rows:
                base = fmean(100 * v for s in row for j in s.jobs if (v := number(j.rounds[0], name)) is not None)
                levels = [{"value": base, "what": "base"}]
                mine = {s.short: colours[s.short] for s in row} if not _legend(colours) else colours
                panels.append(
                    charts.curves(
                        _titled(title, rest), rows, mine, y="accuracy (%)", levels=levels, band=_band(chosen),
                        legend=bool(_legend(colours)),
                    )
                )  # fmt: skip
    if not panels:
        return [Note("no job has accuracies", warn=True)]
    caption = f"band: {_band(chosen)}; dotted: the base"
    return [Charts(Figure("id_ood", panels, _legend(colours), caption=caption)), *_many(colours)]


def _many(colours: Mapping[str, str]) -> list[Block]:
    if len(colours) <= MANY:
        return []
    return [Note(f"{len(colours)} settings: too many for a legend; the tooltips name them")]


def _band(chosen: Sequence[Setting]) -> str:
    most = max(len(s.jobs) for s in chosen)
    return f"lowest to highest of {most} seeds" if most > 1 else "95% interval over test items"


def over_rounds(setting: Setting, name: str, scale: float = 100) -> list[dict[str, Any]]:
    """A metric's rows for `charts.curves`: of one seed with its 95% interval, of several their mean, from lowest to
    highest; up to the round that all seeds reached."""
    rows = []
    for t in range(min(len(j.rounds) for j in setting.jobs)):
        lines = [j.rounds[t] for j in setting.jobs]
        values = [scale * v for line in lines if (v := number(line, name)) is not None]
        if not values:
            continue
        low, high = min(values), max(values)
        if len(setting.jobs) == 1:
            low, high = (None if (v := number(lines[0], name + e)) is None else scale * v for e in ("_low", "_high"))
        rows.append({"x": t, "series": setting.short, "value": fmean(values), "low": low, "high": high})
    return rows


def ratio_blocks(jobs: Sequence[Job]) -> list[Block]:
    """Heatmaps of the change of ID and of OOD over ratio x rounds, on one scale; a note where no ratios were varied."""
    cells = by_ratio(jobs)
    if reason := _unreadable(cells):
        return [Note(reason)]
    return [
        Charts(
            _heats("heatmap", heat_cells(cells, mean_change), "change from the base, in points", cells),
            "Change from the base",
        )
    ]


def _unreadable(cells: Mapping[str, Mapping[float, Sequence[Job]]]) -> str:
    if not cells:
        return "no heatmap of ratio and rounds: fewer than two ratios are done"
    if len(cells) > 12 or max(map(len, cells.values())) > 24:
        return "no heatmap of ratio and rounds: there are so many that nobody could read it"
    return ""


def heat_cells(
    cells: Mapping[str, Mapping[float, Sequence[Job]]], value: Callable[[Sequence[Job], str, int], float | None]
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(row, metric): cells}: `value` of the jobs of a ratio, a metric and a round, in points."""
    return {
        (name, metric): [
            {"x": str(t), "y": f"{ratio:g}", "value": value(ratios[ratio], metric, t)}
            for ratio in sorted(ratios, reverse=True)
            for t in range(1, max(len(j.rounds) for group in ratios.values() for j in group))
        ]
        for name, ratios in cells.items() for metric in HEATS
    }  # fmt: skip


def _heats(
    name: str, found: Mapping[tuple[str, str], list[dict[str, Any]]], label: str,
    cells: Mapping[str, Mapping[float, Sequence[Job]]],
) -> Figure:  # fmt: skip
    limit = max([abs(c["value"]) for rows in found.values() for c in rows if c["value"] is not None] + [1.0])
    panels = []
    for (row, metric), values in found.items():
        bases = [v for g in cells[row].values() for j in g if (v := number(j.rounds[0], metric)) is not None]
        base = f", base {100 * fmean(bases):.1f}%" if bases else ""
        title = _titled(HEATS[metric] + base * (name == "heatmap"), row if row != "run" else "")
        panels.append(
            charts.heatmap(
                title, values, x="round", y="merge.ratio", form="+.1f", limits=(-limit, limit), label="points",
                order_x=list(dict.fromkeys(c["x"] for c in values)),
                order_y=list(dict.fromkeys(c["y"] for c in values)), diverging=True,
            )
        )  # fmt: skip
    return Figure(name, panels, columns=2, caption=f"{label}; seeds averaged; one colour scale for ID and OOD")


def vanilla_blocks(jobs: Sequence[Job]) -> list[Block]:
    """Heatmaps of the difference to vanilla; a note where there is no vanilla chain."""
    cells = {
        row: {r: g for r, g in ratios.items() if not all(j.vanilla for j in g)}
        for row, ratios in by_ratio(jobs).items()
    }
    cells = {row: ratios for row, ratios in cells.items() if ratios}
    found = against_vanilla(cells, vanillas(jobs))
    if not any(c["value"] is not None for values in found.values() for c in values):
        return [Note("no difference to vanilla: no finished job has merge=none or merge.ratio=1 beside its like")]
    if _unreadable(cells):
        return []
    label = "accuracy minus vanilla's at the same round and seed, in points"
    return [Charts(_heats("vs_vanilla", found, label, cells), "Difference to vanilla")]


def against_vanilla(
    cells: Mapping[str, Mapping[float, Sequence[Job]]], twins: Mapping[Path, Job]
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(row, metric): cells}: the mean over jobs of the difference to their vanilla twin at each round, in points."""

    def difference(group: Sequence[Job], metric: str, t: int) -> float | None:
        pairs = [(change_of(j, metric, t), change_of(twins[j.folder], metric, t)) for j in group if j.folder in twins]
        found = [a - b for a, b in pairs if a is not None and b is not None]
        return fmean(found) if found else None

    return heat_cells(cells, difference)


NAMED = {"id/acc": "ID", "ood/near/acc": "OOD near", "ood/far/acc": "OOD far"}


def named_blocks(jobs: Sequence[Job]) -> list[Block]:
    """Named settings: their final accuracies, and the difference to vanilla of the same seed and other keys, with a 95%
    interval over those (Student's t). Nothing where no setting has a name."""
    if not any(j.name for j in jobs):
        return []
    chains = longest(jobs)
    controls = {_unit(j): j for j in chains if j.control}
    rows: list[list[Cell]] = []
    points: dict[str, list[dict[str, Any]]] = {title: [] for title in NAMED.values()}
    for name in dict.fromkeys(j.name or "no name" for j in chains):
        own = [j for j in chains if (j.name or "no name") == name]
        row = [Cell(name, name), Cell(str(len(own)), float(len(own)))]
        for metric, title in NAMED.items():
            ends = [100 * v for j in own if (v := number(j.rounds[-1], metric)) is not None]
            row.append(_cell(title, round(fmean(ends), 2) if ends else None))
            pairs = [(number(j.rounds[-1], metric), _final(controls.get(_unit(j)), metric)) for j in own]
            gaps = [100 * (a - b) for a, b in pairs if a is not None and b is not None]
            if not gaps or all(j.control for j in own):
                row.append(Cell("", ""))
                continue
            mean, half = mean_interval(gaps)
            row.append(Cell(signed(mean) + (f" ± {half:.1f}" if len(gaps) > 1 else ""), mean))
            ends_ = {"low": mean - half, "high": mean + half} if len(gaps) > 1 else {"low": mean, "high": mean}
            points[title].append({"name": name, "series": title, "value": mean, **ends_})
        rows.append(row)
    columns = ["method", "chains", *(c for title in NAMED.values() for c in (f"{title} (%)", f"{title} - vanilla"))]
    colours = {"ID": charts.ID, "OOD near": charts.NEAR, "OOD far": charts.FAR}
    panels = [
        charts.dots(f"{title}, minus vanilla", found, colours, x="points", form=".1f", rule=0.0)
        for title, found in points.items() if found
    ]  # fmt: skip
    caption = (
        "at the end; paired by seed and what else is swept; bars: 95% (Student's t), not corrected for their number"
    )
    drawn: list[Block] = [Charts(Figure("methods", panels, columns=3, caption=caption))] if panels else []
    none = Note("no finished job is vanilla (label=vanilla, or without a name) beside these: no differences")
    return [*(drawn or [none]), Table(columns, rows)]


def _unit(job: Job) -> str:
    return label({**{k: v for k, v in job.keys.items() if k not in ("label", "rounds")}, "seed": job.seed}, exact=True)


def _final(job: Job | None, metric: str) -> float | None:
    return None if job is None else number(job.rounds[-1], metric)


def pareto_blocks(chosen: Sequence[Setting]) -> list[Block]:
    """Final OOD against final ID, a point a setting."""
    points = final_points(chosen)
    if not points:
        return [Note("no setting has final ID and OOD accuracies", warn=True)]
    colours = colours_of(chosen)
    front = front_of(points)
    base = [
        {"x": 100 * x, "y": 100 * y, "name": "base"}
        for x, y in dict.fromkeys(
            (number(j.rounds[0], "id/acc"), number(j.rounds[0], "ood/acc")) for s in chosen for j in s.jobs
        )
        if x is not None and y is not None
    ]  # fmt: skip
    panel = charts.pareto(
        points,
        front,
        colours,
        x="ID accuracy at the end (%)",
        y="OOD accuracy at the end (%)",
        base=base,
        legend=bool(_legend(colours)),
    )
    spread = "; crosses: 95% interval over seeds (Student's t)" if any(p["low_x"] is not None for p in points) else ""
    caption = f"dashed: the settings that no other one beats in both; grey cross: the base{spread}"
    figure = Figure("pareto", [panel], _legend(colours), columns=1, caption=caption)
    return [Charts(figure), *_many(colours), Note("On the front: " + "; ".join(p["name"] for p in front) + ".")]


def final_points(chosen: Sequence[Setting]) -> list[dict[str, Any]]:
    """Means over seeds of the final accuracies in per cent, with 95% intervals where there are several seeds."""
    points = []
    for s in chosen:
        pairs = [(number(j.rounds[-1], "id/acc"), number(j.rounds[-1], "ood/acc")) for j in s.jobs]
        pairs = [(100 * x, 100 * y) for x, y in pairs if x is not None and y is not None]
        if not pairs:
            continue
        (x, half_x), (y, half_y) = (mean_interval(values) for values in zip(*pairs, strict=True))
        several = len(pairs) > 1
        points.append(
            {"x": x, "y": y, "series": s.short, "name": s.name,
             "low_x": x - half_x if several else None, "high_x": x + half_x if several else None,
             "low_y": y - half_y if several else None, "high_y": y + half_y if several else None}
        )  # fmt: skip
    return points


def front_of(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points than which no other one is better in one metric and no worse in the other, by x."""
    kept = [
        p for p in points
        if not any(q["x"] >= p["x"] and q["y"] >= p["y"] and (q["x"], q["y"]) != (p["x"], p["y"]) for q in points)
    ]  # fmt: skip
    return sorted(kept, key=lambda p: p["x"])


# --- diversity, layers, mismatch ------------------------------------------------------------------------------------


def end_values(chosen: Sequence[Setting], name: str, scale: float = 1) -> list[dict[str, Any]]:
    """A metric of the last round by setting: mean over seeds with its 95% interval; of one seed its own interval."""
    rows = []
    for s in chosen:
        lines = [j.rounds[-1] for j in s.jobs]
        values = [scale * v for line in lines if (v := number(line, name)) is not None]
        if not values:
            continue
        mean, half = mean_interval(values)
        low, high = mean - half, mean + half
        if len(values) == 1:
            low, high = (None if (v := number(lines[0], name + e)) is None else scale * v for e in ("_low", "_high"))
        rows.append({"name": s.name, "series": s.short, "value": mean, "low": low, "high": high})
    return rows


def collapse_blocks(chosen: Sequence[Setting]) -> list[Block]:
    """pass@1, pass@k, entropy and different solutions over rounds, a line a setting: collapse shows as the first going
    up and the others down."""
    colours, lines = colours_of(chosen), [j.rounds[-1] for s in chosen for j in s.jobs]
    ks = sorted({int(k) for line in lines for n in line if (k := n.removeprefix("sample/pass@")).isdigit()})
    named = {f"sample/pass@{k}": (f"pass@{k}", "%", 100.0, ".1f") for k in dict.fromkeys((ks[0], ks[-1]) if ks else ())}
    named["diversity/token_entropy"] = ("token entropy", "nats a token", 1.0, ".3f")
    named["diversity/distinct"] = ("different solutions", "%", 100.0, ".1f")
    panels = []
    for rest, row in _rows_of_panels(chosen).items():
        for name, (title, unit, scale, form) in named.items():
            if rows := [point for s in row for point in over_rounds(s, name, scale)]:
                mine = {s.short: colours[s.short] for s in row} if not _legend(colours) else colours
                panels.append(
                    charts.curves(
                        _titled(title, rest), rows, mine, y=unit, form=form, band=_band(chosen), width=225,
                        legend=bool(_legend(colours)),
                    )
                )  # fmt: skip
    if not panels:
        return []
    caption = f"band: {_band(chosen)}; collapse: pass@1 up, the others down"
    return [Charts(Figure("collapse", panels, _legend(colours), columns=len(named), caption=caption), "Over rounds")]


def diversity_blocks(chosen: Sequence[Setting]) -> list[Block]:
    """Diversity and pass@k of the last round, a dot a setting, the base dotted."""
    colours = colours_of(chosen)
    ks = sorted(
        {
            int(k)
            for s in chosen
            for j in s.jobs
            for n in j.rounds[-1]
            if (k := n.removeprefix("sample/pass@")).isdigit()
        }
    )
    named = {f"sample/pass@{k}": (f"pass@{k} (%)", 100.0, ".1f") for k in dict.fromkeys((ks[0], ks[-1]) if ks else ())}
    for title, metrics, y, scale, form in CURVES:
        for name, (series, _) in metrics.items():
            if not name.endswith(("distinct_1", "distinct_3", "distinct_4")):
                said = title if len(metrics) == 1 else f"{title}, {series}" if series[:2] in ("on", "of") else series
                named[name] = (
                    f"{said} ({y.removeprefix('share (').rstrip(')')})" if y not in title else said,
                    scale,
                    form,
                )
    panels = []
    for name, (title, scale, form) in named.items():
        if rows := end_values(chosen, name, scale):
            bases = [scale * v for s in chosen for j in s.jobs if (v := number(j.rounds[0], name)) is not None]
            panels.append(charts.dots(title, rows, colours, x="", form=form, rule=fmean(bases) if bases else None))
    if not panels:
        return [Note("no diversity figures: the jobs were run with suite.pass_k_n=0", warn=True)]
    caption = "last round; whiskers: 95% over seeds, of one seed over problems; dotted: the base"
    return [Charts(Figure("diversity", panels, caption=caption), "At the end")]


def layer_blocks(chosen: Sequence[Setting]) -> list[Block]:
    """Relative change by layer in the last round, a line a setting."""
    colours = colours_of(chosen)
    panels = []
    for rest, row in _rows_of_panels(chosen).items():
        rows = [point for s in row for point in profile(s)]
        if rows:
            panels.append(
                charts.curves(
                    _titled("relative change at the end (%)", rest), rows, colours, y="relative change (%)", x="layer",
                    form=".4f", width=430, height=230, band=_band(chosen), legend=bool(_legend(colours)),
                )
            )  # fmt: skip
    if not panels:
        return [Note("no job has layer figures", warn=True)]
    caption = "||θ_T − θ_0|| / ||θ_0|| by layer, mean over seeds" + (
        "; band: lowest to highest" if any(len(s.jobs) > 1 for s in chosen) else ""
    )
    return [Charts(Figure("layers", panels, _legend(colours), columns=2, caption=caption), "Change by layer")]


def profile(setting: Setting) -> list[dict[str, Any]]:
    """Relative change by layer in per cent, of several seeds their mean, from lowest to highest."""
    every = [rows_of(j.rounds[-1], "weights/change") for j in setting.jobs]
    rows = []
    for row in in_order([r for changes in every for r in changes if r.startswith("layer_")]):
        values = [100 * changes[row] for changes in every if row in changes]
        ends = (min(values), max(values)) if len(values) > 1 else (None, None)
        rows.append(
            {"x": int(row.removeprefix("layer_")), "series": setting.short, "value": fmean(values),
             "low": ends[0], "high": ends[1]}
        )  # fmt: skip
    return rows


def mismatch_blocks(chosen: Sequence[Setting]) -> list[Block]:
    """Spearman's rho and the share of the top layers in the last round by setting, for each estimator."""
    colours = colours_of(chosen)
    last = [j.rounds[-1] for s in chosen for j in s.jobs]
    found = [n.split("/")[1] for line in last for n in line if n.startswith("mismatch/") and n.count("/") == 2]
    names = [e for e in dict.fromkeys([*ESTIMATORS, *found]) if e in found]
    panels = []
    for estimator in names:
        at = f"mismatch/{estimator}"
        if rows := end_values(chosen, f"{at}/spearman"):
            panels.append(charts.dots(f"{estimator}: Spearman ρ", rows, colours, x="ρ(importance, change)", rule=0.0))
        if rows := end_values(chosen, f"{at}/top_share", 100):
            even = next((100 * v for line in last if (v := number(line, f"{at}/top_expected")) is not None), None)
            k = next((int(v) for line in last if (v := number(line, "mismatch/top_k")) is not None), None)
            title = f"{estimator}: share of the top {'layers' if k is None else k}"
            panels.append(charts.dots(title, rows, colours, x="of the squared update (%)", form=".1f", rule=even))
    if not panels:
        return [Note("no mismatch figures: no job measured layer importance (analysis.importance)")]
    caption = "last round; whiskers: 95% over seeds, of one seed over examples; dotted: ρ = 0, and k / L"
    blocks: list[Block] = [Charts(Figure("mismatch", panels, columns=2, caption=caption), "Importance against change")]
    said = (
        "Left of a dotted line the update avoids the layers that matter: the paper's claim. The two columns may "
        "differ: ρ is of the change relative to a layer's own weights, the share of its part of the squared update."
    )
    return [*blocks, Note(said)]


# --- jobs -----------------------------------------------------------------------------------------------------------


def jobs_section(folder: Path, jobs: Sequence[Job], states: Sequence[State]) -> Section:
    """A row a job: what jobs.csv says, the final mismatch, and what became of those that are not done."""
    done = {j.folder.name: j for j in jobs}
    rows = {name: table_row(job) for name, job in done.items()}
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    cells = []
    for s in states:
        row = rows.get(str(s.number), {})
        there = (folder / str(s.number)).is_dir()
        link = (
            f"{s.number}/report.html" if (folder / str(s.number) / "report.html").is_file() else f"{s.number}/" * there
        )
        said = STATES.get(s.mark, "not begun")
        if not row:
            said += f" ({' '.join(s.overrides)})" if s.overrides else ""
            said += f": {s.why}" if s.why else ""
        cells.append(
            [Cell(str(s.number), float(s.number), link), Cell(said, said), *(_cell(c, row.get(c)) for c in columns)]
        )
    return Section("jobs", "Jobs", [Table(["job", "state", *columns], cells)])


def table_row(job: Job) -> dict[str, Any]:
    """jobs.csv's row without the job, and the mismatch of the last round."""
    row = {k: v for k, v in job_row(job).items() if k != "job"}
    last = job.rounds[-1]
    names = [n for n in last if n.startswith("mismatch/") and n.endswith(("/spearman", "/top_share"))]
    found = {n.removeprefix("mismatch/"): round(v, 3) for n in names if (v := number(last, n)) is not None}
    return row | found


def _cell(column: str, value: Any) -> Cell:
    if isinstance(value, float) and ("/acc" in column or column.endswith("top_share")):
        return Cell(f"{100 * value:.1f}%", value)
    if isinstance(value, float) and column.endswith("spearman"):
        return Cell(signed(value), value)
    if isinstance(value, bool | str) or value is None:
        return Cell("" if value is None else str(value), "" if value is None else str(value))
    return Cell(
        f"{value:.4g}" if isinstance(value, float) else str(value), value if isinstance(value, int | float) else ""
    )

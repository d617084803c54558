"""A page of sections, as one HTML file that opens without a network.

Everything that came out of a model or a config is data here: text is escaped by the template, charts and samples are
JSON in script elements, which the page's script puts in place as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import charts


@dataclass(frozen=True)
class Note:
    """A paragraph; `warn` marks what is missing or failed."""

    text: str
    warn: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Charts:
    """A figure under a heading; `folded` until it is asked for."""

    figure: charts.Figure
    heading: str = ""
    folded: bool = False
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Pre:
    """Text as it is, folded."""

    title: str
    text: str
    kind: ClassVar[str] = "pre"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it says, by what it is sorted, where it leads."""

    text: str
    key: float | str = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and filtered."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Samples:
    """A browser of samples."""

    data: dict[str, Any]
    kind: ClassVar[str] = "samples"


Block = Note | Charts | Pre | Table | Samples


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What a report says: a head, and sections; `state` is one of ok, bad, open."""

    title: str
    subtitle: str
    state: str
    said: str
    tiles: list[Tile]
    notes: list[Note]
    sections: list[Section] = field(default_factory=list)

    def missing(self) -> list[str]:
        """What the page says is missing, failed or cannot be read."""
        blocks = [b for s in self.sections for b in s.blocks if isinstance(b, Note)]
        return [note.text for note in (*self.notes, *blocks) if note.warn]

    def figures(self) -> list[charts.Figure]:
        return [b.figure for s in self.sections for b in s.blocks if isinstance(b, Charts)]


def write(page: Page, path: Path) -> Path:
    """Writes the page; its path."""
    specs = {f"{figure.name}-{i}": spec for figure in page.figures() for i, spec in enumerate(figure.bare)}
    themes = {name: charts.theme(name) for name in ("light", "dark")}
    html = _template().render(
        page=page, bundle=Markup(_bundle()), specs=embed(specs), themes=embed(themes), embed=embed
    )
    path.write_text(html, encoding="utf-8")
    return path


def embed(value: Any) -> Markup:
    """JSON that may stand in a script element: no `<` and no `&` in it, NaN and infinities as null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = (
        text.replace("<", "\\u003c").replace("&", "\\u0026").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )
    return Markup(text.encode("utf-8", "replace").decode())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


@lru_cache
def _template() -> Any:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


@lru_cache
def _bundle() -> str:
    return charts.bundle()


# --- numbers --------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def p_value(p: float) -> str:
    """`p = .02`, `p < .01`."""
    return "p < .01" if p < 0.01 else f"p = {p:.2f}".replace("0.", ".")

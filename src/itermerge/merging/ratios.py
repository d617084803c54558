"""The ratio of every tensor: `merge.ratio` times factors, by depth, by kind, by row, and over rounds and epochs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from ..weights import KINDS, place_of
from .law import MergeError

ROUNDING = 1e-9  # of products of factors


def along(values: Sequence[float], at: float) -> float:
    """The list of values at a place between 0 (first) and 1 (last), interpolated."""
    place = min(1.0, max(0.0, at)) * (len(values) - 1)
    low = min(int(place), len(values) - 2) if len(values) > 1 else 0
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def over_time(values: Sequence[float], number: int, of: int) -> float:
    """The list of values spread over numbers 1 to `of`, at `number`; the last value after that."""
    return along(values, (number - 1) / (of - 1) if of > 1 else 1.0)


def tensor_ratios(
    names: Iterable[str],
    ratio: float,
    *,
    layers: Sequence[float] = (1.0,),
    modules: Sequence[tuple[str, float]] = (),
    rows: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """{tensor: ratio x factors}.

    `layers` is spread over the depth: its first value is that of the first layer (and of the embeddings), its last that
    of the last layer (and of the final norm and the head). Of `modules`, the first whose pattern fits counts: a kind of
    `weights.KINDS` (q, k, v, o, gate, up, down, norms, embed, norm, head, ...) or else a regular expression that is
    found in the tensor's name. `rows` has factors of layer_00, ..., embed, norm, head; 1 where it has none. Raises
    MergeError for a pattern that no tensor fits, and where a ratio is not in 0 to 1.
    """
    names = list(names)
    places = {name: place_of(name) for name in names}
    depth = max((int(row[6:]) for row, _ in places.values() if row.startswith("layer_")), default=0)
    used: set[str] = set()
    out: dict[str, float] = {}
    for name in names:
        row, kind = places[name]
        at = int(row[6:]) / max(1, depth) if row.startswith("layer_") else 0.0 if row == "embed" else 1.0
        factor = along(layers, at) * (rows or {}).get(row, 1.0)
        fits = [(p, f) for p, f in modules if (p == kind if p in KINDS else re.search(p, name))]
        if fits:
            factor *= fits[0][1]
        used |= {pattern for pattern, _ in fits}
        out[name] = min(1.0, ratio * factor) if ratio * factor <= 1 + ROUNDING else ratio * factor
        if not 0 <= out[name] <= 1:
            raise MergeError(
                f"{name}: its ratio would be {ratio:g} x {factor:g} = {out[name]:g}; ratios are from 0 to 1"
            )
    if unused := [pattern for pattern, _ in modules if pattern not in used]:
        raise MergeError(
            f"merge.policy.modules: no tensor fits {unused[0]!r}; expected a kind ({', '.join(KINDS)}) "
            f"or a regular expression found in a name, as in {names[len(names) // 2]}"
        )
    return out


def by_importance(means: Mapping[str, float], strength: float) -> dict[str, float]:
    """Factors of layers from their importance: 1 + strength (2 r - 1), r the layer's rank from 0 (least important) to
    1, equal ones sharing theirs. Their mean is 1: `strength` above 0 lets important layers move more, below 0 less."""
    rows = sorted(means, key=lambda row: means[row])
    if len(rows) < 2:
        return dict.fromkeys(rows, 1.0)
    ranks: dict[float, list[int]] = {}
    for at, row in enumerate(rows):
        ranks.setdefault(means[row], []).append(at)
    last = len(rows) - 1
    return {row: 1 + strength * (2 * sum(r := ranks[means[row]]) / len(r) / last - 1) for row in sorted(rows)}


def by_angle(cosines: Mapping[str, float | None]) -> dict[str, float]:
    """Factors of rows from the cosine c of the round's update with the one before: model stock's t of two, 2c / (1 + c)
    in [0, 1] (2403.19522); 1 where there is none."""
    return {
        row: 1.0 if c is None or math.isnan(c) else 0.0 if c <= 0 else 2 * c / (1 + c) for row, c in cosines.items()
    }

"""Where a model changed: by layer, by kind of matrix, and for embeddings, final norm and head on rows of their own.

Weights are read tensor by tensor, large ones in pieces, so that both models may be checkpoints larger than memory
(`weights.Checkpoint`). Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..weights import Weights, check_same_tensors, place_of, shape_of

PIECE = 1 << 17  # weights at a time: what a core's cache holds in float64
T = TypeVar("T")
RANKS_UP_TO = 2048  # rows or columns of matrices whose effective rank a CPU has in seconds


class AnalysisError(RuntimeError):
    """An analysis that cannot be made, with what was found and the way out."""


class _Sums:
    """Sums over the weights of a model and of its change, by row and kind."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, list[float]]] = {}  # change squared, model squared, |change|, weights

    def add(self, name: str, parts: Sequence[float]) -> None:
        row, kind = place_of(name)
        if not math.isfinite(parts[0] + parts[1]):
            raise AnalysisError(f"{name}: has weights that are not finite, so that no change can be given")
        at = self.rows.setdefault(row, {}).setdefault(kind, [0.0] * 4)
        at[:] = [x + y for x, y in zip(at, parts, strict=True)]

    def distance(self) -> float:
        """||change|| / ||model|| over all tensors."""
        change, size = (sum(s[i] for kinds in self.rows.values() for s in kinds.values()) for i in (0, 1))
        return math.sqrt(change / size) if size else 0.0

    def table(self) -> dict[str, dict]:
        """What `layer_change` gives."""
        total = sum(s[0] for kinds in self.rows.values() for s in kinds.values())

        def figures(s: Sequence[float]) -> dict[str, float]:
            return {"relative": math.sqrt(s[0] / s[1]) if s[1] else 0.0, "mean_abs": s[2] / s[3] if s[3] else 0.0}

        out = {}
        for row in sorted(self.rows):
            whole = [sum(column) for column in zip(*self.rows[row].values(), strict=True)]
            kinds = {kind: figures(s) for kind, s in sorted(self.rows[row].items())}
            out[row] = {**figures(whole), "energy": whole[0] / total if total else 0.0, "kinds": kinds}
        return out


def layer_change(base: Weights, now: Weights) -> dict[str, dict]:
    """{row: {relative, mean_abs, energy, kinds: {kind: {relative, mean_abs}}}}.

    relative = ||now - base||_F / ||base||_F over the row's weights; mean_abs = mean |now - base|; energy = the row's
    share of the squared change of the whole model. Raises PolicyError where tensors differ in name or shape, and
    AnalysisError, naming the tensor, where a weight is not finite.
    """
    check_same_tensors(base, now, "the base", "the model")

    def of(name: str) -> list[float]:
        return _added(4, (_parts(b - a, a) for a, b in _pieces(name, base, now)))

    sums, names = _Sums(), sorted(base)
    for name, parts in zip(names, _each(of, names), strict=True):
        sums.add(name, parts)
    return sums.table()


@dataclass(frozen=True)
class Changes:
    """A round's change, before and after its merge.

    `tuned` and `merged` are their models' tables of `layer_change`. `left` is {row: {ratio, share}}: the mean over the
    row's weights of the ratio that was asked for, and the part of the tuned model's difference to the anchor that the
    merged model has, <merged - anchor, tuned - anchor> / |tuned - anchor|^2 (None where they do not differ); the two
    agree for linear merges, other rules have shares of their own. `drift` is ||merged - base|| / ||base|| over all
    tensors, `anchor_distance` the same from the anchor.
    """

    tuned: dict[str, dict]
    merged: dict[str, dict]
    left: dict[str, dict[str, float | None]]
    drift: float
    anchor_distance: float


def changes(base: Weights, anchor: Weights, tuned: Weights, merged: Weights, ratios: Mapping[str, float]) -> Changes:
    """Figures of a merge with these ratios by tensor; each tensor is read once. Raises as `layer_change`."""
    for other, called in ((anchor, "the anchor"), (tuned, "the tuned model"), (merged, "the merged model")):
        check_same_tensors(base, other, "the base", called)

    def of(name: str) -> list[float]:
        def parts() -> Iterator[list[float]]:
            for a, c, t, m in _pieces(name, base, anchor, tuned, merged):
                before, after = t - a, m - a
                own, far = (before, after) if c is a else (t - c, m - c)
                drift = _parts(after, a)
                away = drift if c is a else _parts(far, c)
                yield [*_parts(before, a), *drift, *away, float(own @ far), float(own @ own)]

        return _added(14, parts())

    sums, names = [_Sums(), _Sums(), _Sums()], sorted(base)
    left: dict[str, list[float]] = {}  # ratios, weights, along, whole
    for name, parts in zip(names, _each(of, names), strict=True):
        for i, one in enumerate(sums):
            one.add(name, parts[4 * i : 4 * i + 4])
        at = left.setdefault(place_of(name)[0], [0.0] * 4)
        at[:] = [x + y for x, y in zip(at, [ratios[name] * parts[3], parts[3], *parts[12:]], strict=True)]
    shares = {
        row: {"ratio": asked / n if n else None, "share": along / whole if whole else None}
        for row, (asked, n, along, whole) in sorted(left.items())
    }
    before, after, away = sums
    return Changes(before.table(), after.table(), shares, after.distance(), away.distance())


def _parts(d: Tensor, a: Tensor) -> list[float]:
    """What `_Sums` adds up, of a piece of the change and of the model."""
    return [float(d @ d), float(a @ a), float(d.abs().sum()), a.numel()]


def _added(n: int, rows: Iterable[Sequence[float]]) -> list[float]:
    """The sums of n columns."""
    return [sum(column) for column in zip(*rows, strict=True)] or [0.0] * n


def update_of(start: Weights, tuned: Weights) -> dict[str, Tensor]:
    """tuned - start by tensor, in bfloat16: half a model, from which `update_figures` of the next round are made."""
    check_same_tensors(start, tuned, "the start of the fit", "the tuned weights")
    return {name: (tuned[name].float() - start[name].float()).to("cpu", torch.bfloat16) for name in sorted(start)}


def update_figures(
    start: Weights,
    tuned: Weights,
    update: Weights | None,
    earlier: Weights | None = None,
    *,
    ranks: bool = True,
    device: str = "cpu",
) -> dict[str, dict[str, float | None]]:
    """{row: {cosine, sign_agreement, effective_rank}} of a round's own update, `update_of` its start and tuned weights.

    cosine and sign_agreement compare it with that of an earlier round: the cosine over the row's weights, and the share
    of equal signs among weights that both changed. effective_rank is exp of the entropy of the normalised singular
    values (Roy and Vetterli, 2007), summed over the row's matrices, as a share of their full rank; embeddings and head
    have none. What is not defined (an update of zero, no earlier round) is None; without an earlier round `update` is
    not read. Ranks are computed on `device`.
    """
    both = () if update is None or earlier is None else (update, earlier)

    def of(name: str) -> list[float]:
        """u.v, u.u, v.v, equal signs, both nonzero, rank, full rank"""

        def parts() -> Iterator[list[float]]:
            for u, v in _pieces(name, *both) if both else ():
                signs = torch.sign(u) * torch.sign(v)
                yield [float(u @ v), float(u @ u), float(v @ v), int((signs > 0).sum()), int(signs.count_nonzero())]

        found = _ranks(start, tuned, name, device) if ranks and _has_rank(start, name) else []
        return _added(5, parts()) + _added(2, found)

    rows: dict[str, list[float]] = {}
    for name, added in zip(names := sorted(start), _each(of, names, device), strict=True):
        at = rows.setdefault(place_of(name)[0], [0.0] * 7)
        at[:] = [x + y for x, y in zip(at, added, strict=True)]
    return {
        row: {
            "cosine": uv / math.sqrt(uu * vv) if uu and vv else None,
            "sign_agreement": equal / changed if changed else None,
            "effective_rank": rank / full if full else None,
        }
        for row, (uv, uu, vv, equal, changed, rank, full) in sorted(rows.items())
    }


def _has_rank(weights: Weights, name: str) -> bool:
    return place_of(name)[0].startswith("layer_") and len(shape_of(weights, name)) > 1


def _ranks(start: Weights, tuned: Weights, name: str, device: str) -> list[tuple[float, int]]:
    """(effective rank, full rank) of each matrix of a tensor's update that is not zero."""
    exact = tuned[name].to(device, torch.float64, copy=True).sub_(start[name].to(device))
    found = []
    for matrix in exact.reshape(-1, *exact.shape[-2:]):
        rank = effective_rank(matrix)
        if rank is not None and math.isnan(rank):
            raise AnalysisError(f"{name}: has weights that are not finite, so that no rank can be given")
        found += [] if rank is None else [(rank, min(matrix.shape))]
    return found


def _each(of: Callable[[str], T], names: Sequence[str], device: str = "cpu") -> list[T]:
    """of(name) of all names: on a CPU as many at a time as torch has threads, each with one of them, which is faster
    than all threads at one matrix after another."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    if threads == 1:
        return [of(name) for name in names]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(of, names))


def ranks_are_cheap(weights: Weights, device: str) -> bool:
    """Whether effective ranks of a change of these weights take seconds a layer, and not minutes."""
    shapes = [shape_of(weights, name) for name in weights if place_of(name)[0].startswith("layer_")]
    return device != "cpu" or max((min(s[-2:]) for s in shapes if len(s) > 1), default=0) <= RANKS_UP_TO


def effective_rank(matrix: Tensor) -> float | None:
    """exp(-sum p log p), p the singular values of a float64 matrix over their sum; None for a matrix of zeros, NaN for
    one with values that are not finite."""
    gram = _gram(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
    if not math.isfinite(float(gram.diagonal().sum())):
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # much cheaper than singular values, as good here
    if not float(values.sum()):
        return None
    p = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def _gram(matrix: Tensor, step: int = 96) -> Tensor:
    """The lower half of matrix @ matrix.T, which is all that `eigvalsh` reads; above it are zeros."""
    n = matrix.shape[0]
    out = matrix.new_zeros(n, n)
    for at in range(0, n, step):
        rows = slice(at, min(at + step, n))
        torch.mm(matrix[rows], matrix[: rows.stop].T, out=out[rows, : rows.stop])
    return out


def _pieces(name: str, *models: Weights) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of one tensor of several models, flat, in float64 on the CPU: some of its rows at a time. Where a
    model comes twice, its pieces are the same objects."""
    own = list({id(model): model for model in models}.values())
    place = [next(i for i, other in enumerate(own) if other is model) for model in models]
    for pieces in zip(*(_rows(model, name) for model in own), strict=True):
        yield tuple(pieces[i] for i in place)


def _rows(model: Weights, name: str) -> Iterator[Tensor]:
    tensor = model[name]
    if not tensor.dim():
        yield tensor.to("cpu", torch.float64).flatten()
        return
    step = max(1, PIECE // max(1, math.prod(tensor.shape[1:])))
    for at in range(0, tensor.shape[0], step):
        yield tensor[at : at + step].to("cpu", torch.float64).flatten()

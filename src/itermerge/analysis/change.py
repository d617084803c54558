"""Where a model changed: by layer, by kind of matrix, and for embeddings, final norm and head on rows of their own.

Weights are read tensor by tensor, large ones in pieces, so that both models may be checkpoints larger than memory
(`weights.Checkpoint`). Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from ..weights import Weights, check_same_tensors, place_of, shape_of

PIECE = 1 << 17  # weights at a time: what a core's cache holds in float64
T = TypeVar("T")
RANKS_UP_TO = 2048  # rows or columns of matrices whose effective rank a CPU has in seconds


class AnalysisError(RuntimeError):
    """An analysis that cannot be made, with what was found and the way out."""


def layer_change(base: Weights, now: Weights) -> dict[str, dict]:
    """The table of `change_and_distance`."""
    return change_and_distance(base, now)[0]


def change_and_distance(base: Weights, now: Weights) -> tuple[dict[str, dict], float]:
    """{row: {relative, mean_abs, energy, kinds: {kind: {relative, mean_abs}}}}, and `relative_distance`.

    relative = ||now - base||_F / ||base||_F over the row's weights; mean_abs = mean |now - base|; energy = the row's
    share of the squared change of the whole model. Raises PolicyError where tensors differ in name or shape, and
    AnalysisError, naming the tensor, where a weight is not finite.
    """
    check_same_tensors(base, now, "the base", "the model")
    sums: dict[str, dict[str, list[float]]] = {}
    for name in sorted(base):
        row, kind = place_of(name)
        at = sums.setdefault(row, {}).setdefault(kind, [0.0, 0.0, 0.0, 0])
        for a, b in _pieces(name, base, now):
            d = b - a
            part = [float(d @ d), float(a @ a), float(d.abs().sum()), a.numel()]
            if not math.isfinite(part[0] + part[1]):
                raise AnalysisError(f"{name}: has weights that are not finite, so that no change can be given")
            at[:] = [x + y for x, y in zip(at, part, strict=True)]
    total, size = (sum(s[i] for kinds in sums.values() for s in kinds.values()) for i in (0, 1))

    def figures(s: Sequence[float]) -> dict[str, float]:
        return {"relative": math.sqrt(s[0] / s[1]) if s[1] else 0.0, "mean_abs": s[2] / s[3] if s[3] else 0.0}

    out = {}
    for row in sorted(sums):
        whole = [sum(column) for column in zip(*sums[row].values(), strict=True)]
        kinds = {kind: figures(s) for kind, s in sorted(sums[row].items())}
        out[row] = {**figures(whole), "energy": whole[0] / total if total else 0.0, "kinds": kinds}
    return out, math.sqrt(total / size) if size else 0.0


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
    rows: dict[str, list[float]] = {}  # u.v, u.u, v.v, equal signs, both nonzero, rank, full rank
    wanted = [name for name in sorted(start) if ranks and _has_rank(start, name)]
    found = dict(zip(wanted, _each(lambda name: _ranks(start, tuned, name, device), wanted, device), strict=True))
    for name in sorted(start):
        row, _ = place_of(name)
        at = rows.setdefault(row, [0.0] * 7)
        for rank, full in found.get(name, ()):
            at[5], at[6] = at[5] + rank, at[6] + full
        for u, v in _pieces(name, update, earlier) if update is not None and earlier is not None else ():
            signs = torch.sign(u) * torch.sign(v)
            part = [float(u @ v), float(u @ u), float(v @ v), int((signs > 0).sum()), int(signs.count_nonzero())]
            at[:5] = [x + y for x, y in zip(at, part, strict=False)]
    return {
        row: {
            "cosine": uv / math.sqrt(uu * vv) if uu and vv else None,
            "sign_agreement": equal / both if both else None,
            "effective_rank": rank / full if full else None,
        }
        for row, (uv, uu, vv, equal, both, rank, full) in sorted(rows.items())
    }


def _has_rank(weights: Weights, name: str) -> bool:
    return place_of(name)[0].startswith("layer_") and len(shape_of(weights, name)) > 1


def _ranks(start: Weights, tuned: Weights, name: str, device: str) -> list[tuple[float, int]]:
    """(effective rank, full rank) of each matrix of a tensor's update that is not zero."""
    exact = tuned[name].to(device, torch.float64) - start[name].to(device, torch.float64)
    if not torch.isfinite(exact).all():
        raise AnalysisError(f"{name}: has weights that are not finite, so that no rank can be given")
    matrices = exact.reshape(-1, *exact.shape[-2:])
    return [(rank, min(m.shape)) for m in matrices if (rank := effective_rank(m)) is not None]


def _each(of: Callable[[str], T], names: Sequence[str], device: str) -> list[T]:
    """of(name) of all names: on a CPU as many at a time as torch has threads, each with one of them, which is faster
    than all threads at one matrix after another."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    if threads == 1:
        return [of(name) for name in names]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(of, names))


def merge_shares(
    anchor: Weights, tuned: Weights, merged: Weights, ratios: Mapping[str, float]
) -> dict[str, dict[str, float | None]]:
    """{row: {ratio, share}}: the mean over its weights of the ratio that was asked for, and the part of the tuned
    model's difference to the anchor that the merged model has, <merged - anchor, tuned - anchor> / |tuned - anchor|^2
    (None where they do not differ). The two agree for linear merges; other rules have shares of their own."""
    rows: dict[str, list[float]] = {}
    for name in sorted(merged):
        at = rows.setdefault(place_of(name)[0], [0.0] * 4)
        for a, t, m in _pieces(name, anchor, tuned, merged):
            d = t - a
            part = [ratios[name] * a.numel(), a.numel(), float(d @ (m - a)), float(d @ d)]
            at[:] = [x + y for x, y in zip(at, part, strict=True)]
    return {
        row: {"ratio": asked / n if n else None, "share": along / full if full else None}
        for row, (asked, n, along, full) in sorted(rows.items())
    }


def ranks_are_cheap(weights: Weights, device: str) -> bool:
    """Whether effective ranks of a change of these weights take seconds a layer, and not minutes."""
    shapes = [shape_of(weights, name) for name in weights if place_of(name)[0].startswith("layer_")]
    return device != "cpu" or max((min(s[-2:]) for s in shapes if len(s) > 1), default=0) <= RANKS_UP_TO


def effective_rank(matrix: Tensor) -> float | None:
    """exp(-sum p log p), p the singular values of a float64 matrix over their sum; None for a matrix of zeros."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()  # much cheaper than singular values, as good here
    if not float(values.sum()):
        return None
    p = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def relative_distance(a: Weights, b: Weights) -> float:
    """||b - a|| / ||a|| over all tensors."""
    far = near = 0.0
    for name in sorted(a):
        for x, y in _pieces(name, a, b):
            d = y - x
            far, near = far + float(d @ d), near + float(x @ x)
    return math.sqrt(far / near)


def _pieces(name: str, *models: Weights) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of one tensor of several models, flat, in float64 on the CPU: some of its rows at a time."""
    return zip(*(_rows(model, name) for model in models), strict=True)


def _rows(model: Weights, name: str) -> Iterator[Tensor]:
    tensor = model[name]
    if not tensor.dim():
        yield tensor.to("cpu", torch.float64).flatten()
        return
    step = max(1, PIECE // max(1, math.prod(tensor.shape[1:])))
    for at in range(0, tensor.shape[0], step):
        yield tensor[at : at + step].to("cpu", torch.float64).flatten()

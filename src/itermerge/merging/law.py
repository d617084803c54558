"""The law that every merge rule here follows, and its parts.

    merged = anchor + ratio * combine_i( sparsify( update_i ) )            update_i = tuned_i - anchor

A `Method` names the parts; a `Merge` applies one to named tensors, piece by piece (`PIECE` weights, in name order), so
that tensors in memory and tensors mapped from files give the same bits, and no rule needs memory for a model.
Arithmetic is in float32, reductions in float64 over the same pieces. Rules over rounds (consensus, model stock) take
the rounds' own updates, tuned_s - start_s, in place of differences to the anchor, which share history.

Where public codes differ we follow the papers: DARE's survivors are divided by the density (MergeLM; mergekit rescales
by L1 norms), a sum of zero elects no sign (mergekit: plus), TIES keeps exactly round(density n) entries (both others
may keep one more or fewer, or all that are equal).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..weights import Weights, check_same_tensors, shape_of

PIECE = 1 << 19  # weights at a time; part of the results, since reductions follow it
PARALLEL = 1e-6  # sine of an angle below which SLERP is a straight line


class MergeError(ValueError):
    """A merge that cannot be done, naming the tensor."""


@dataclass(frozen=True)
class Method:
    """How updates are thinned out and combined. Parameters that the two parts do not have keep their defaults.

    sparsify: `none`; `random`, kept with probability `density` (DARE, 2311.03099), divided by it if `rescale`;
    `magnitude`, the round(density n) largest (TIES, 2306.01708); `rank`, kept with a probability that is linear in the
    rank of the magnitude in its row, density - epsilon to density + epsilon, divided by it (DELLA, 2406.11617); `band`,
    the round(density n) largest without the round(gamma n) largest of all (breadcrumbs, 2312.06795). `scope` says
    whether n counts the weights of a tensor or of the whole `model`; of equal magnitudes the first ones count as
    larger.

    combine: `mean` or `sum`, weighted; `elect`, the mean over those entries whose sign is that of the weighted sum
    (TIES); `slerp`, along the arc between anchor and tuned tensor; `stock`, t times the mean, t = N c / (1 + (N - 1) c)
    in [0, 1], c the mean cosine of pairs (model stock, 2403.19522); `tall`, the sum where the last update stands out,
    |u_N| > threshold |sum - u_N|, and `consensus`, the sum where at least `agree` updates stand out, or all that
    are not zero if these are fewer (2405.07813); `function`, a user's own: (anchor, updates, **params) -> combined
    update, of one whole tensor.
    """

    sparsify: str = "none"
    combine: str = "mean"
    density: float = 1.0
    rescale: bool = True
    epsilon: float = 0.0
    gamma: float = 0.0
    scope: str = "tensor"  # tensor | model
    weights: tuple[float, ...] = ()
    threshold: float = 0.0
    agree: int = 2
    params: Mapping[str, Any] = field(default_factory=dict)
    function: Callable[..., Any] | None = None

    @property
    def random(self) -> bool:
        """Whether masks are drawn."""
        return self.sparsify in ("random", "rank") and (self.density < 1 or self.epsilon > 0)

    @property
    def exact(self) -> bool:
        """Whether ratio 1 gives a single tuned model back, bit for bit."""
        return self.sparsify == "none" and self.combine in ("mean", "slerp") and not self.weights


LINEAR = Method()


class Merge:
    """One merge of named tensors, each given back piece by piece.

    `tuned` are the models whose differences to `anchor` are merged, or, with `starts`, to the model in the same place
    there. `ratio` is a number or one a tensor. Masks are drawn from `seed`, the tensor's name, the model's place and
    the piece's. With `scope="model"`, `prepare` reads all tensors first and `pieces` must follow in name order.
    """

    def __init__(
        self,
        method: Method,
        anchor: Weights,
        tuned: Sequence[Weights],
        ratio: float | Mapping[str, float],
        *,
        starts: Sequence[Weights] | None = None,
        seed: int = 0,
    ) -> None:
        self.method, self.anchor, self.tuned, self.starts, self.seed = method, anchor, list(tuned), starts, seed
        self.names = sorted(anchor)
        self.ratios = {n: float(ratio) for n in self.names} if not isinstance(ratio, Mapping) else dict(ratio)
        self._global: list[_Window] | None = None
        self._buffers: dict[Any, Tensor] = {}
        self._at, self._flat = "", dict[int, Tensor]()  # the tensors at hand
        self._into: Tensor | None = None
        self._check()

    def _check(self) -> None:
        m, many = self.method, len(self.tuned)
        for other in (*self.tuned, *(self.starts or ())):
            check_same_tensors(self.anchor, other, "the anchor", "the tuned weights")
        if m.weights and len(m.weights) != many:
            raise MergeError(f"merge.weights: {len(m.weights)} weights for {many} tuned models")
        if m.combine == "stock" and many < 2 and not self.starts:
            raise MergeError("merge.combine=stock needs at least two tuned models, whose angle is its ratio; got one")
        if m.combine == "slerp" and (many != 1 or self.starts):
            raise MergeError(f"merge.combine=slerp is between the anchor and one tuned model, got {many}")
        if missing := [n for n in self.names if n not in self.ratios]:
            raise MergeError(f"{missing[0]}: has no ratio")

    def prepare(self, on_piece: Callable[[int], None] = lambda _: None) -> None:
        """The pass over all tensors that `scope="model"` needs; nothing otherwise. `on_piece` is told of its
        weights."""
        m = self.method
        if m.scope != "model" or m.sparsify not in ("magnitude", "band"):
            return

        names = [n for n in self.names if self.anchor[n].is_floating_point()]

        def scan(i: int) -> Callable[[], Iterator[Tensor]]:
            def magnitudes() -> Iterator[Tensor]:
                for name in names:
                    for begin, end in self._grid(name):
                        yield self._update(i, name, begin, end)
                        on_piece(end - begin)

            return magnitudes

        self._global = [_window(m, scan(i), sum(map(self._numel, names))) for i in range(len(self.tuned))]

    def state(self) -> list[list[int]] | None:
        """What `prepare` found, and how far equal magnitudes have been counted: for `restore`, after a whole tensor."""
        if self._global is None:
            return None
        return [[w.upper, w.skip, w.lower, w.quota, *w.seen] for w in self._global]

    def restore(self, state: Sequence[Sequence[int]]) -> None:
        """Goes on from what another `Merge` of the same inputs had as its `state`, in place of `prepare`."""
        self._global = [_Window(*w[:4], seen=list(w[4:])) for w in state]

    def pieces(self, name: str, into: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """(begin, end, merged weights in float32) of a tensor, flattened; on the tuned tensor's device. What is given
        is overwritten by the next piece, unless it was put into its place in `into` (float32, flattened; it may be the
        tuned tensor, which is then merged in place). Raises MergeError, naming the tensor, for weights that are not
        finite, that are no floating-point numbers, and where the rule is not defined."""
        tensors = [self.anchor[name], *(w[name] for w in self.tuned)]
        if not all(t.is_floating_point() for t in tensors):
            if not all(torch.equal(tensors[0], t) for t in tensors[1:]):
                raise MergeError(f"{name}: is of {tensors[0].dtype}, no floating-point weights, and differs")
            yield 0, tensors[0].numel(), tensors[0].reshape(-1)
            return
        self._into = into
        blend = self._blend(name, self.ratios[name])
        for begin, end in self._grid(name):
            merged = blend(begin, end)
            if not _is_finite(merged):
                raise MergeError(self._what_is_not_finite(name))
            yield begin, end, merged

    def tensor(self, name: str) -> Tensor:
        """One merged tensor, in float32."""
        like = self.tuned[-1][name]
        out: Tensor | None = None
        for begin, end, piece in self.pieces(name):
            if out is None:
                out = torch.empty(like.numel(), dtype=piece.dtype, device=piece.device)
            out[begin:end] = piece
        return like.float().clone() if out is None else out.view(like.shape)

    def all(self) -> dict[str, Tensor]:
        """All merged tensors, in name order."""
        self.prepare()
        return {name: self.tensor(name) for name in self.names}

    # --- inside ---------------------------------------------------------------------------------------------------

    def _numel(self, name: str) -> int:
        return math.prod(shape_of(self.anchor, name))

    def _grid(self, name: str) -> Iterator[tuple[int, int]]:
        """The pieces of a tensor; whole rows for rules that look at rows, the whole tensor for a user's own."""
        shape = shape_of(self.anchor, name)
        total, step = math.prod(shape), PIECE
        if self.method.combine == "function":
            step = max(1, total)
        elif self.method.sparsify == "rank":
            row = max(1, shape[-1] if shape else 1)
            step = max(1, PIECE // row) * row
        for begin in range(0, total, step):
            yield begin, min(begin + step, total)

    def _piece(self, weights: Weights, name: str, begin: int, end: int, device: torch.device) -> Tensor:
        """Weights in float32: a view where they are so already."""
        if name != self._at:
            self._at = name
            self._flat.clear()
        flat = self._flat.get(id(weights))
        if flat is None:
            flat = self._flat[id(weights)] = weights[name].detach().reshape(-1)
        return flat[begin:end].to(device, torch.float32)

    def _update(self, i: int, name: str, begin: int, end: int) -> Tensor:
        """update_i in a buffer of its own."""
        device = self.tuned[-1][name].device
        tuned = self._piece(self.tuned[i], name, begin, end, device)
        start = self._piece(self.starts[i] if self.starts else self.anchor, name, begin, end, device)
        return torch.sub(tuned, start, out=self._buffer(("update", i), end - begin, device))

    def _buffer(self, key: Any, size: int, device: torch.device) -> Tensor:
        key = (key, device)
        if key not in self._buffers or len(self._buffers[key]) < size:
            self._buffers[key] = torch.empty(max(size, PIECE), dtype=torch.float32, device=device)
        return self._buffers[key][:size]

    def _target(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Where a merged piece goes: its place in `into`, which may be the tuned tensor itself, or a buffer."""
        return self._buffer("merged", end - begin, device) if self._into is None else self._into[begin:end]

    def _blend(self, name: str, ratio: float) -> Callable[[int, int], Tensor]:
        """(begin, end) -> merged weights, once what the rule needs to know of the whole tensor is known."""
        m, device = self.method, self.tuned[-1][name].device

        def anchor(begin: int, end: int) -> Tensor:
            return self._piece(self.anchor, name, begin, end, device)

        if ratio == 0 and self._global is None:
            return anchor
        if m.exact and len(self.tuned) == 1 and not self.starts:

            def tuned(begin: int, end: int) -> Tensor:
                return self._piece(self.tuned[0], name, begin, end, device)

            if ratio == 1:
                return tuned
            if m.combine == "slerp" and (arc := self._arc(name, ratio)) is not None:

                def along(begin: int, end: int) -> Tensor:
                    out = torch.mul(anchor(begin, end), arc[0], out=self._buffer("merged", end - begin, device))
                    return out.add_(tuned(begin, end), alpha=arc[1])

                return along

            def straight(begin: int, end: int) -> Tensor:
                out = self._target(begin, end, device)
                return torch.lerp(anchor(begin, end), tuned(begin, end), ratio, out=out)

            return straight
        thin = [self._sparsifier(i, name) for i in range(len(self.tuned))]
        combine = self._combiner(name)

        def law(begin: int, end: int) -> Tensor:
            updates = [self._update(i, name, begin, end) for i in range(len(thin))]
            if not all(map(_is_finite, updates)):  # masks and elections would hide it
                raise MergeError(self._what_is_not_finite(name))
            updates = [part(update, begin) for part, update in zip(thin, updates, strict=True)]
            if ratio == 0:  # its equal magnitudes are counted now
                return anchor(begin, end)
            out = self._target(begin, end, device)
            return torch.add(anchor(begin, end), combine(updates), alpha=ratio, out=out)

        return law

    def _what_is_not_finite(self, name: str) -> str:
        sides = {"the anchor": [self.anchor], "the tuned weights": [*self.tuned, *(self.starts or ())]}
        for side, models in sides.items():
            for model in models:
                if not torch.isfinite(model[name]).all():
                    folder = getattr(model, "files", {}).get(name, "")
                    return f"{name}: {side} {f'({folder}) ' if folder else ''}hold values that are not finite"
        return f"{name}: the merged tensor has values that are not finite"

    # --- sparsify -------------------------------------------------------------------------------------------------

    def _sparsifier(self, i: int, name: str) -> Callable[[Tensor, int], Tensor]:
        """(update, begin) -> the thinned update, in place."""
        m = self.method
        if m.sparsify in ("magnitude", "band") and (m.density < 1 or m.gamma > 0):
            window = self._global[i] if self._global else None
            if m.scope == "model" and window is None:
                raise RuntimeError("prepare() comes before pieces() when scope is model")
            if window is None:

                def scan() -> Iterator[Tensor]:
                    for begin, end in self._grid(name):
                        yield self._update(i, name, begin, end)

                window = _window(m, scan, self._numel(name))
            keep = window.keep
            return lambda update, _: update.mul_(keep(update))
        if m.random and m.sparsify == "random":
            limit = min(round(m.density * 2**32), 2**32 - 1)
            scale = 1 / m.density if m.rescale else 1.0
            return lambda update, begin: update.mul_(
                _mask(self._draw(i, name, begin, update.numel()) < limit, update, scale)
            )
        if m.random:
            row = max(1, (shape_of(self.anchor, name) or (1,))[-1])
            return lambda update, begin: _thin_by_rank(update, row, m, self._draw(i, name, begin, update.numel()))
        return lambda update, _: update

    def _draw(self, i: int, name: str, begin: int, size: int) -> np.ndarray:
        """`size` random numbers, uniform in 0 .. 2^32 - 1."""
        key = hashlib.sha256(f"{self.seed}\0{name}\0{i}\0{begin}".encode()).digest()
        words = np.random.SFC64([int.from_bytes(key[k : k + 4], "little") for k in range(0, 32, 4)])
        return words.random_raw((size + 1) // 2).view(np.uint32)[:size]

    # --- combine --------------------------------------------------------------------------------------------------

    def _combiner(self, name: str) -> Callable[[list[Tensor]], Tensor]:
        m, many = self.method, len(self.tuned)
        weights = m.weights or (1.0,) * many
        if m.combine == "function":
            return self._users(name)
        if m.combine in ("sum", "mean"):
            scale = sum(weights) if m.combine == "mean" else 1.0
            return lambda updates: _total(updates, [w / scale for w in weights])
        if m.combine == "elect":
            return lambda updates: _elect(updates, weights)
        if m.combine == "stock":
            t = self._stock(name)
            return lambda updates: _total(updates, [t / many] * many)
        agree = 1 if m.combine == "tall" else min(m.agree, max(1, self._moved(name)))

        def standing_out(updates: list[Tensor]) -> Tensor:
            total = torch.stack(updates).sum(0)
            votes = [u.abs() > m.threshold * (total - u).abs() for u in updates]
            votes = votes[-1:] if m.combine == "tall" else votes
            return total * (torch.stack(votes).sum(0) >= agree)

        return standing_out

    def _moved(self, name: str) -> int:
        """How many of the updates are not zero."""
        starts = self.starts or [self.anchor] * len(self.tuned)
        return sum(not torch.equal(t[name], s[name]) for t, s in zip(self.tuned, starts, strict=True))

    def _users(self, name: str) -> Callable[[list[Tensor]], Tensor]:
        shape, device = shape_of(self.anchor, name), self.tuned[-1][name].device
        function = self.method.function
        assert function is not None

        def combined(updates: list[Tensor]) -> Tensor:
            anchor = self._piece(self.anchor, name, 0, self._numel(name), device).view(shape)
            got = function(anchor.clone(), [u.view(shape).clone() for u in updates], **self.method.params)
            if not isinstance(got, Tensor) or got.shape != shape:
                said = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
                raise MergeError(
                    f"{name}: merge.function gave {said}; expected the combined update, a tensor of shape {shape}"
                )
            return got.to(device, torch.float32).reshape(-1)

        return combined

    def _sums(self, name: str, pairs: Callable[[int, int], list[Tensor]]) -> list[list[float]]:
        """Inner products of vectors, in float64 over the pieces: [[v_i . v_j]]."""
        out: list[list[float]] = []
        for begin, end in self._grid(name):
            vectors = [v.to("cpu", torch.float64) for v in pairs(begin, end)]
            part = [[float(torch.dot(v, w)) for w in vectors[: k + 1]] for k, v in enumerate(vectors)]
            out = [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(out, part, strict=True)] if out else part
        return out

    def _arc(self, name: str, ratio: float) -> tuple[float, float] | None:
        """The factors of anchor and tuned tensor in SLERP; None where these are parallel, or one of them is zero."""
        device = self.tuned[0][name].device

        def both(begin: int, end: int) -> list[Tensor]:
            a, b = (self._piece(w, name, begin, end, device).double() for w in (self.anchor, self.tuned[0]))
            return [a, b, b - a]

        sums = self._sums(name, both)
        if not sums:
            return None
        (aa,), (ab, bb), (ad, bd, dd) = sums
        if not aa or not bb:
            return None
        # |a x b|^2 is the same from any two sides of the triangle; from the two shortest it loses the fewest digits.
        _, cross = min((aa * bb, aa * bb - ab * ab), (aa * dd, aa * dd - ad * ad), (bb * dd, bb * dd - bd * bd))
        angle = math.atan2(math.sqrt(max(0.0, cross)), ab)
        if math.sin(angle) < PARALLEL:
            if angle > 1:
                raise MergeError(
                    f"{name}: anchor and tuned tensor point in opposite directions, so that no arc between them is the "
                    "shortest; take merge=linear"
                )
            return None
        return math.sin((1 - ratio) * angle) / math.sin(angle), math.sin(ratio * angle) / math.sin(angle)

    def _stock(self, name: str) -> float:
        """Model stock's t, of the updates that are not zero; 1 with one of them."""
        sums = self._sums(name, lambda begin, end: [self._update(i, name, begin, end) for i in range(len(self.tuned))])
        there = [i for i in range(len(sums)) if sums[i][i] > 0]
        cosines = [sums[i][j] / math.sqrt(sums[i][i] * sums[j][j]) for k, i in enumerate(there) for j in there[:k]]
        t, many = 1.0, max(1, len(there))
        if cosines:
            c = max(0.0, sum(cosines) / len(cosines))
            t = min(1.0, many * c / (1 + (many - 1) * c))
        return t * len(self.tuned) / many  # the mean that it is multiplied with counts those that are zero, too


def _total(updates: list[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum, in place of the first."""
    out = updates[0] if weights[0] == 1 else updates[0].mul_(weights[0])
    for update, weight in zip(updates[1:], weights[1:], strict=True):
        out.add_(update, alpha=weight)
    return out


def _elect(updates: list[Tensor], weights: Sequence[float]) -> Tensor:
    """Where signs agree with that of the weighted sum, the weighted mean; 0 where that sum is 0 (2306.01708)."""
    if len(updates) == 1:
        return updates[0]
    sign = torch.sign(_total([u.clone() for u in updates], weights))
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for update, weight in zip(updates, weights, strict=True):
        agrees = (torch.sign(update) == sign) & (sign != 0)
        total.add_(update * agrees, alpha=weight)
        count.add_(agrees, alpha=weight)
    return torch.where(count != 0, total / count, torch.zeros_like(total))


def _mask(keep: np.ndarray, like: Tensor, scale: float) -> Tensor:
    return torch.from_numpy(keep).to(like.device).to(torch.float32).mul_(scale)


def _thin_by_rank(update: Tensor, row: int, m: Method, draws: np.ndarray) -> Tensor:
    """DELLA: keep probabilities linear in the rank of the magnitude in its row, smallest first."""
    line = np.linspace(m.density - m.epsilon, m.density + m.epsilon, row) if row > 1 else np.array([m.density])
    line = line.clip(0, 1)
    limits, factors = np.ceil(line * 2.0**32), (1 / line).astype(np.float32)
    sizes = np.ascontiguousarray(update.abs().cpu().numpy()).view(np.uint32).reshape(-1, row)
    scale = np.empty(sizes.size, np.float32)
    last = np.arange(row - 1, -1, -1, dtype=np.uint64)
    step = max(1, (1 << 15) // row)  # rows that fit into a core's cache
    for at in range(0, len(sizes), step):
        packed = sizes[at : at + step].astype(np.uint64)
        packed <<= np.uint64(32)
        packed |= last  # of equal magnitudes, the first is larger
        packed.sort(axis=1)
        packed &= np.uint64(0xFFFFFFFF)
        places = np.subtract(np.uint64(row - 1), packed, out=packed)  # in a row, by rank
        places += np.arange(at, at + len(packed), dtype=np.uint64)[:, None] * np.uint64(row)
        flat = places.view(np.int64).reshape(-1)
        kept = draws[flat].reshape(-1, row) < limits
        scale[flat] = np.where(kept, factors, np.float32(0)).reshape(-1)
    return update.mul_(torch.from_numpy(scale).to(update.device))


@dataclass
class _Window:
    """Which entries are kept, by rank of magnitude: those whose bits are below `upper` and above `lower`, and of the
    equal ones all but the first `skip`, and the first `quota`, counted in the order in which pieces come."""

    upper: int
    skip: int
    lower: int
    quota: int
    seen: list[int] = field(default_factory=lambda: [0, 0])

    def keep(self, update: Tensor) -> Tensor:
        bits = _bits(update)
        kept = bits > self.lower
        if self.upper < _ABOVE:
            kept &= bits < self.upper
        if self.upper == self.lower:  # one magnitude holds both ends
            return self._ties(kept, bits == self.lower, 1, self.skip, self.quota)
        if self.upper < _ABOVE:
            kept = self._ties(kept, bits == self.upper, 0, self.skip, None)
        return self._ties(kept, bits == self.lower, 1, 0, self.quota)

    def _ties(self, kept: Tensor, equal: Tensor, at: int, first: int, last: int | None) -> Tensor:
        """`kept` with the equal entries number `first` to `last`."""
        count = int(equal.count_nonzero())
        begin, end = self.seen[at], self.seen[at] + count
        self.seen[at] = end
        if not count or end <= first or (last is not None and begin >= last):
            return kept
        if begin >= first and (last is None or end <= last):
            return kept | equal
        places = equal.nonzero()[:, 0]
        kept[places[max(0, first - begin) : None if last is None else max(0, last - begin)]] = True
        return kept


_ABOVE = 0x7FFFFFFF  # above the bits of every finite magnitude


def _bits(update: Tensor) -> Tensor:
    """Magnitudes as whole numbers in the same order."""
    return update.view(torch.int32) & 0x7FFFFFFF


def _window(m: Method, scan: Callable[[], Iterator[Tensor]], total: int) -> _Window:
    """The window of a method's density and gamma over `total` entries, exactly, by two passes of histograms."""
    skipped = round(m.gamma * total)
    kept = min(round(m.density * total), total - skipped)
    coarse = np.zeros(1 << 15, np.int64)
    for update in scan():
        coarse += np.bincount((_bits(update) >> 16).cpu().numpy(), minlength=1 << 15)
    ranks = {"upper": skipped, "lower": skipped + kept}  # the last entry above the window, and the last in it
    bins = {end: _place(coarse, rank) for end, rank in ranks.items() if rank}
    fine = {b: np.zeros(1 << 16, np.int64) for b, _ in bins.values()}
    for update in scan():
        bits = _bits(update)
        top = bits >> 16
        for b, counts in fine.items():
            counts += np.bincount((bits[top == b] & 0xFFFF).cpu().numpy(), minlength=1 << 16)
    if not kept:
        return _Window(_ABOVE, 0, _ABOVE, 0)
    ends = {end: (b, *_place(fine[b], rest)) for end, (b, rest) in bins.items()}
    b, low, quota = ends["lower"]
    above, top, skip = ends.get("upper", (_ABOVE >> 16, 0xFFFF, 0))
    return _Window((above << 16) | top, skip, (b << 16) | low, quota)


def _place(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin, from the top, that holds entry number `rank` (from 1), and the entry's number in it."""
    from_top = np.cumsum(counts[::-1])
    at = int(np.searchsorted(from_top, rank))
    before = int(from_top[at - 1]) if at else 0
    return len(counts) - 1 - at, rank - before


def _is_finite(weights: Tensor) -> bool:
    # A sum is not finite if an entry is not, and rarely otherwise; looking at each entry takes five times as long.
    return bool(torch.isfinite(weights.sum())) or bool(torch.isfinite(weights).all())

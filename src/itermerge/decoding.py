"""Completions of a causal LM: greedy, or sampled with random numbers that belong to the sample and not to the batch.

The random number behind a token is a hash of (key, position), a key for each sample: a completion does not depend on
what else is in its batch, nor on the device. The loop is our own and not transformers' `generate`, whose fixed batches
waste most of their work here: what all prompts of a call begin with is computed once, rows of equal length go
together, the cache has room for the whole completion from the start, rows that have ended leave the batch, and the last
few of a batch wait until those of others make a batch with them. On a CPU it attends in a way of its own too
(`attention`), where that is found to give the model's own logits.
`benchmarks/sampling.py` times both; greedy output is `generate`'s, token for token (tests).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from . import attention
from .policy import SHARED_FROM, Policy, copy_in, keeps_every_key
from .weights import PolicyError

Decode = Callable[..., list["Completion"]]  # `complete` of some model: (prompts, *, keys, stop, ...)
_SPLIT: dict[tuple[object, ...], bool] = {}  # kinds of models, and whether `attention` gives their logits
TRIED = 32  # tokens of a text on which `attention` is tried
LEAVE_AT = 0.9  # the batch is packed anew when so few of its rows are still alive
WAIT_AT = 1 / 8  # of the rows of a full batch: so few wait for others, while there are some to come


@dataclass(frozen=True)
class Completion:
    """What the model wrote; `finished` is False when it ran into the token limit.

    `entropy` is the sum over its tokens of the entropy (nats, temperature 1) of the distribution that each was drawn
    from; 0 for greedy decoding, nan where the sampler does not tell (vLLM).
    """

    text: str
    finished: bool
    tokens: int
    entropy: float = field(default=0.0, compare=False)


def uniforms(keys: np.ndarray, position: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), one for each 64-bit key, by SplitMix64 of (key, position), one position for all or one for
    each. Shape as `keys`, float64."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.asarray(position + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53


def draw(
    scores: Tensor, keys: np.ndarray, position: int | np.ndarray, temperature: float, top_p: float
) -> Tensor:  # fmt: skip
    """The token (rows,) that each row's keyed number selects from its scores (rows, vocabulary).

    Temperature, then nucleus (the smallest set of tokens whose probability reaches `top_p`), then inverse CDF in the
    order of the vocabulary.
    """
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    probs = torch.softmax(scores.float() / temperature, -1).to(wide)
    if top_p < 1:
        ranked, order = torch.sort(probs, dim=-1, descending=True, stable=True)
        ranked[(ranked.cumsum(-1) - ranked) >= top_p] = 0
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
    cdf = probs.cumsum(-1)
    number = torch.from_numpy(uniforms(keys, position)).to(cdf)
    token = torch.searchsorted(cdf, number[:, None] * cdf[:, -1:], right=True)
    return token.clamp(max=probs.shape[-1] - 1)[:, 0]


def complete(
    policy: Policy,
    prompts: Sequence[str],
    *,
    keys: Sequence[int] | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Completion]:
    """One completion a prompt, in the order of `prompts`: greedy where `keys` is None, else sampled with these keys.

    A stop string ends a completion and is cut off. Raises PolicyError when a prompt and its completion do not fit the
    model's context.
    """
    read = {p: policy.encode_prompt(p) for p in set(prompts)}  # samples of one problem share it
    ids = [read[p] for p in prompts]
    if ids and (need := max(map(len, ids)) + max_new_tokens) > policy.context:
        raise PolicyError(
            f"the longest prompt and its completion need {need} positions, the model has {policy.context}; "
            "lower sampler.max_new_tokens or use shorter prompts"
        )
    policy.model.eval()
    stopper = _Stopper(policy, stop)
    with torch.inference_mode():
        batches = _Batches(policy, stopper, max_new_tokens, temperature, top_p)
        with batches.begun(ids) as shared:
            rows = [_Row(i[shared:], 0 if keys is None else keys[at]) for at, i in enumerate(ids)]
            coming = [[rows[at] for at in batch] for batch in _together([len(i) for i in ids], batch_size)][::-1]
            waiting: list[_Row] = []
            few = int(batch_size * WAIT_AT)
            while coming or waiting:
                if coming and len(waiting) < batch_size:
                    batch = coming.pop()
                else:
                    waiting.sort(key=lambda row: len(row.ids) + len(row.made))
                    batch, waiting = waiting[:batch_size], waiting[batch_size:]
                left = batches.run(batch, few if coming or waiting else 0, drawn=keys is not None)
                waiting += left
                on_progress(len(batch) - len(left))
    return [stopper.read(row.made, row.entropy) for row in rows]


@dataclass
class _Row:
    """A completion that is being made: its prompt, without what all begin with; its key; tokens; their entropy."""

    ids: list[int]
    key: int
    made: list[int] = field(default_factory=list)
    entropy: float = 0.0


def _together(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of at most `size` rows, shortest first: rows of one length by themselves where they fill a quarter of a
    batch (nothing is padded then), else with their neighbours."""
    by_length: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        by_length.setdefault(lengths[row], []).append(row)
    mixed: list[int] = []
    for rows in by_length.values():
        if 4 * len(rows) < size:
            mixed += rows
            continue
        yield from (rows[at : at + size] for at in range(0, len(rows), size))
    yield from (mixed[at : at + size] for at in range(0, len(mixed), size))


class _Stopper:
    """Which token sequences end a completion."""

    def __init__(self, policy: Policy, stop: Sequence[str]) -> None:
        self.tokenizer, self.eos, self.stop = policy.tokenizer, frozenset(policy.eos_ids), tuple(stop)
        self.ends: dict[int, bool] = {}  # whether a token's text may be the end of a stop string

    def ended(self, tokens: Sequence[int]) -> bool:
        last = tokens[-1]
        if last in self.eos:
            return True
        if not self.stop:
            return False
        if last not in self.ends:
            text = self.tokenizer.decode([last], clean_up_tokenization_spaces=False)
            self.ends[last] = "\N{REPLACEMENT CHARACTER}" in text or any(s[-1] in text for s in self.stop)
        return self.ends[last] and self.cut(self.text(tokens)) is not None

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def cut(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for s in self.stop if (at := text.find(s)) >= 0), default=None)

    def read(self, tokens: list[int], entropy: float) -> Completion:
        end = next((i for i, token in enumerate(tokens) if token in self.eos), None)
        text = self.text(tokens[:end])
        if (at := self.cut(text)) is not None:
            return Completion(text[:at], True, len(tokens), entropy)
        return Completion(text, end is not None, len(tokens), entropy)


class _Room(DynamicLayer):
    """A cache layer with room for a whole batch: a step writes its column, and copies nothing. The room of `rows` rows
    lies in `memory`, which the next batch uses again: a system gives out fresh memory slowly, a page at a time."""

    _layer_type = None  # not to be registered in place of DynamicLayer

    def __init__(self, capacity: int, rows: int, memory: dict[int, Tensor]) -> None:
        super().__init__()
        self.capacity, self.rows, self.memory, self.length = capacity, rows, memory, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = self._make(len(key_states), (key_states, value_states))
        end = self.length + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.length : end] = states
        self.length = end
        return self._show()

    def _make(self, rows: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Room for keys and values; for fewer rows, before samples of one problem part, elsewhere."""
        room: list[Tensor] = []
        for i, x in enumerate(like):
            shape = (rows, x.shape[1], self.capacity, x.shape[-1])
            if rows != self.rows:
                room.append(x.new_empty(shape))
                continue
            if (size := math.prod(shape)) > (self.memory[i].numel() if i in self.memory else 0):
                self.memory.pop(i, None)  # first given back
                self.memory[i] = x.new_empty(size)
            room.append(self.memory[i][:size].view(shape))
        return room

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values = [room[:, :, : self.length] for room in self.room]
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        few, self.room = self.room, self._make(len(indices), self.room)
        for room, had in zip(self.room, few, strict=True):
            room[:, :, : self.length] = had[indices, :, : self.length]
        self._show()

    def pack(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """The first `rows` rows alone, those of `movers` put into `holes` among them."""
        for room in self.room:
            room[holes, :, : self.length] = room[movers, :, : self.length]
        self.room = [room[:rows] for room in self.room]
        self._show()


@contextmanager
def _one_product(model: Any) -> Iterator[None]:
    """While it lasts, the head computes the last positions of all rows in one product. They come as a slice of (rows,
    width, size), which torch multiplies row by row, each with a copy of the head: 4 of 5 seconds of a prefill."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


class _Batches:
    """Decodes batches that share a beginning."""

    def __init__(self, policy: Policy, stopper: _Stopper, max_new: int, temperature: float, top_p: float) -> None:
        self.policy, self.model, self.stopper, self.max_new = policy, policy.model, stopper, max_new
        self.temperature, self.top_p = temperature, top_p
        known = inspect.signature(self.model.forward).parameters
        self.takes_positions = "position_ids" in known
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.prefix: DynamicCache | None = None
        self.shared, self.split = 0, False
        self.memory: dict[int, dict[int, Tensor]] = {}  # of the layers' caches

    @contextmanager
    def begun(self, ids: Sequence[list[int]]) -> Iterator[int]:
        """The number of tokens at the head of all prompts, which are computed here, once."""
        with _one_product(self.model):
            self.prefix, self.shared = self._share(ids)
            if not ids or not self._splits():
                yield self.shared
                return
            with self._split():
                yield self.shared

    def _share(self, ids: Sequence[list[int]]) -> tuple[DynamicCache | None, int]:
        """None and 0 where that does not pay, or where a layer keeps something else than every key and value (padding
        would stand between the head and the rest)."""
        if len(ids) < 2 or not keeps_every_key(self.model):
            return None, 0
        first, last = min(ids), max(ids)  # in lexicographic order: what these two share, all share
        most = min(len(i) for i in ids) - 1  # each row has a token of its own, whose logits are needed
        length = next((i for i in range(most) if first[i] != last[i]), most)
        if length < SHARED_FROM:
            return None, 0
        prefix = DynamicCache(config=self.model.config)
        tokens = torch.tensor([list(first[:length])], device=self.policy.device)
        self.model(input_ids=tokens, past_key_values=prefix, use_cache=True, **self.extra)
        if prefix.get_seq_length() != length:  # a model that keeps its past elsewhere
            return None, 0
        return prefix, length

    def _splits(self) -> bool:
        """Whether `attention` gives this model's logits; tried once a kind of model, on tokens that are always the
        same: what a process is asked first decides nothing."""
        if not (self.takes_positions and keeps_every_key(self.model) and attention.possible(self.model)):
            return False
        kind = (type(self.model), next(self.model.parameters()).dtype, self.model.config.to_json_string())
        if kind not in _SPLIT:
            exact = copy.copy(self.policy)  # in float32, where rounding cannot be taken for another result
            exact.model = copy_in(self.model, torch.float32)
            _SPLIT[kind] = _Batches(exact, self.stopper, 1, 1.0, 1.0)._try()
        return _SPLIT[kind]

    def _try(self) -> bool:
        """Two texts that begin alike, all but their last tokens in one batch and then those, against each by itself."""
        if self.policy.context < TRIED:
            return False
        words = self.model.get_input_embeddings().num_embeddings
        drawn = torch.randint(words, (2, TRIED), generator=torch.Generator().manual_seed(0))
        head = drawn[0, : TRIED // 2].tolist()
        texts = [[*head, *drawn[0, TRIED // 2 :].tolist()], [*head, *drawn[1, : TRIED // 4].tolist()]]
        alone = torch.cat([self.model(input_ids=torch.tensor([t]), **self.extra).logits[:, -1] for t in texts])
        self.prefix, self.shared = self._share(texts)
        if not self.shared:
            return False
        try:
            with self._split():
                tokens, positions, mask = self._padded([t[self.shared : -1] for t in texts], 1)
                cache, end = self._cache(len(texts), tokens.shape[1] + 1, len(texts)), self.shared + tokens.shape[1]
                self._forward(tokens, positions, mask, self.shared, end, cache)
                made = self._forward(torch.tensor([t[-1:] for t in texts]), positions, mask, end, end + 1, cache)
        except attention.Unsupported:
            return False
        return float((made - alone).abs().max() / alone.std()) < 1e-3

    @contextmanager
    def _split(self) -> Iterator[None]:
        """While it lasts, what all prompts begin with is not in the caches."""
        layers: list[Any] = [] if self.prefix is None else self.prefix.layers
        with attention.decoding(self.model, {i: (x.keys[0], x.values[0]) for i, x in enumerate(layers)}):
            self.split = True
            try:
                yield
            finally:
                self.split = False

    def _padded(self, ids: Sequence[Sequence[int]], new: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (rows, width), padded on the left; positions and mask (rows, shared + width + new), or no mask where
        nothing is padded."""
        rows, width, device = len(ids), max(map(len, ids)), self.policy.device
        lengths = torch.tensor([len(row) for row in ids])
        inside = torch.arange(width) >= width - lengths[:, None]
        tokens = torch.full((rows, width), self.policy.pad_id)
        tokens[inside] = torch.tensor([token for row in ids for token in row])
        mask = torch.ones((rows, self.shared + width + new), dtype=torch.long)
        mask[:, self.shared : self.shared + width] = inside
        positions = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
        return tokens.to(device), positions, mask.to(device) if not inside.all() else None

    def _forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, begin: int, end: int, cache: DynamicCache
    ) -> Tensor:
        """Logits (rows, vocabulary) after the tokens, which stand from `begin` to `end`."""
        where = {"position_ids": positions[:, begin:end]} if self.takes_positions else {}
        if mask is not None:
            mask = mask[:, self.shared if self.split else 0 : end]
        how = {"past_key_values": cache, "use_cache": True, **where, **self.extra}
        return self.model(input_ids=tokens, attention_mask=mask, **how).logits[:, -1]

    def run(self, rows: Sequence[_Row], few: int, drawn: bool) -> list[_Row]:
        """Goes on with these rows as one batch, by sampling or greedily, to their ends; or until no more than `few` are
        left, which are returned."""
        if len(rows) <= few:
            return list(rows)
        device, alive = self.policy.device, list(rows)  # those that the tensors hold
        ids = [(*row.ids, *row.made) for row in rows]
        tokens, positions, mask = self._padded(ids, most := self.max_new - min(len(row.made) for row in rows))
        width = tokens.shape[1]
        places: dict[tuple[int, ...], int] = {}
        twins = [places.setdefault(row, len(places)) for row in ids]  # samples of one problem share its prompt
        firsts = [twins.index(i) for i in range(len(places))]
        cache = self._cache(len(firsts), width + most, len(rows))
        keys, spread = np.array([row.key for row in rows], dtype=np.uint64), [0.0] * len(rows)
        ended = [False] * len(rows)
        begin, end, now = self.shared, self.shared + width, firsts
        while True:
            scores = self._forward(
                tokens[now], positions[now], None if mask is None else mask[now], begin, end, cache
            )  # fmt: skip
            if begin == self.shared and len(firsts) < len(rows):
                scores = scores[twins]
                cache.batch_select_indices(torch.tensor(twins, device=device))
            if drawn:
                at = np.array([len(row.made) for row in alive])
                chosen = draw(scores, keys, at, self.temperature, self.top_p)
                spread = torch.distributions.Categorical(logits=scores.float(), validate_args=False).entropy().tolist()
            else:
                chosen = scores.argmax(-1)
            for i, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
                if not ended[i]:
                    row.made.append(token)
                    row.entropy += spread[i]
                    ended[i] = len(row.made) == self.max_new or self.stopper.ended(row.made)
            tokens, begin, end, now = chosen[:, None], end, end + 1, slice(None)
            stay = [i for i, over in enumerate(ended) if not over]
            if len(stay) <= few:
                return [alive[i] for i in stay]
            if len(stay) <= LEAVE_AT * len(alive):
                order = self._pack(cache, stay)
                pick = torch.tensor(order, device=device)
                tokens, positions = tokens[pick], positions[pick]
                mask = None if mask is None else mask[pick]
                alive, keys, ended = [alive[i] for i in order], keys[order], [False] * len(order)

    def _pack(self, cache: DynamicCache, stay: Sequence[int]) -> list[int]:
        """Leaves the rows `stay` (ascending) in the cache; their new order: rows from the end fill the holes, so that
        little is copied."""
        n, order = len(stay), list(range(len(stay)))
        holes, movers = sorted({*order}.difference(stay)), [at for at in stay if at >= n]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        device = self.policy.device
        into, out_of, chosen = (torch.tensor(x, device=device, dtype=torch.long) for x in (holes, movers, order))
        layers: list[Any] = cache.layers
        for layer in layers:
            if isinstance(layer, _Room):
                layer.pack(n, into, out_of)
            else:
                layer.batch_select_indices(chosen)
        return order

    def _cache(self, rows: int, capacity: int, most: int) -> DynamicCache:
        """Room for `capacity` tokens a row, behind what all begin with, which it holds where that is not split off;
        for `most` rows once samples of one problem have parted."""
        cache = DynamicCache(config=self.model.config)
        prefix = None if self.split else self.prefix
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[i] = room = _Room(
                    capacity + (self.shared if prefix else 0), most, self.memory.setdefault(i, {})
                )
                if prefix is not None:
                    had = prefix.layers[i]
                    assert isinstance(had, DynamicLayer)
                    had_states: Any = (had.keys, had.values)
                    room.update(*(x.expand(rows, -1, -1, -1) for x in had_states))
        return cache

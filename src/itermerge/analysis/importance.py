"""How much each decoder block matters for a set of solutions: four estimators, each a value an example and layer.

    skip              rise of the per-token loss when the block is left out (its residual path stays)
    taylor            sum over the block's weights of |gradient x weight| of that loss (2305.11627)
    block_influence   1 - mean cosine of the block's input and output (ShortGPT, 2403.03853)
    angular           (1/pi) arccos of that cosine, at the last token (2403.17887)

An example is a prompt and its completion; losses are means over the completion's tokens, cosines are taken where
these tokens are predicted. Any Hugging Face decoder LM: blocks are found by structure, and one forward pass gives the
loss and both cosines. `skip` walks through the blocks with the hidden states of one layer at a time, so that nothing
before the skipped block is computed twice; `taylor` is one backward pass an example.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..sft import IGNORED, Example, collate, shared_columns
from . import ESTIMATORS
from .change import AnalysisError

_CACHE = object()  # stands for the cache among a block's arguments: holding it would hold all keys and values


def importance(
    model: Any,
    examples: Sequence[Example],
    estimators: Sequence[str] = ESTIMATORS,
    *,
    pad_id: int,
    batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """{estimator: array (examples, layers)}, in float64. The model's weights and gradients stay as they are.

    `on_progress` is told of examples done: once for the forward passes, once more for `taylor`. Raises AnalysisError
    where the blocks cannot be found, or where a loss is not finite.
    """
    blocks = find_blocks(model)
    was_training = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].completion))
    out = {name: np.zeros((len(examples), len(blocks))) for name in estimators}
    try:
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            batch = {k: v.to(_device(model)) for k, v in collate([examples[i] for i in rows], pad_id).items()}
            if set(estimators) - {"taylor"}:
                for name, values in _forward_only(model, blocks, batch, "skip" in estimators).items():
                    if name in out:
                        out[name][rows] = values
                on_progress(len(rows))
        if "taylor" in estimators:
            with _gradients(model, blocks) as sums:
                for i in order:
                    batch = {k: v.to(_device(model)) for k, v in collate([examples[i]], pad_id).items()}
                    labels = batch["labels"]
                    columns = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
                    sums[:] = 0
                    _losses(_logits(model, batch["input_ids"], columns), labels[:, columns + 1]).sum().backward()
                    out["taylor"][i] = sums
                    on_progress(1)
    finally:
        model.train(was_training)
    for name, values in out.items():
        if not np.isfinite(values).all():
            row, layer = np.argwhere(~np.isfinite(values))[0]
            raise AnalysisError(
                f"importance by {name}: the value of layer {layer} is not finite in example {row}; look for weights "
                "that are not finite, or for numbers too large for the model's dtype"
            )
    return out


def find_blocks(model: Any) -> list[nn.Module]:
    """The decoder's blocks in order: the longest list of modules of one class inside the model, as long as its config
    says. Raises AnalysisError, naming the lists that are there, when there is no such one."""
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    }
    fits = {n: m for n, m in lists.items() if wanted is None or len(m) == wanted}
    outer = {n: m for n, m in fits.items() if not any(n.startswith(f"{other}.") for other in lists if other != n)}
    if not outer:
        there = ", ".join(f"{n} ({len(m)} x {type(m[0]).__name__})" for n, m in lists.items()) or "none"
        raise AnalysisError(
            f"{type(model).__name__}: its decoder blocks cannot be found. Expected one list of {wanted} modules of one "
            f"class (num_hidden_layers of its config); lists that are there: {there}. Layer change needs no blocks: "
            "analysis.importance=[] leaves importance out"
        )
    return list(max(outer.values(), key=lambda m: sum(p.numel() for p in m.parameters())))


# --- forward only --------------------------------------------------------------------------------------------------


class _Calls:
    """How the model called its blocks in one pass: their arguments, and the hidden states that went into the first."""

    def __init__(self) -> None:
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.wraps: list[Callable[[Tensor], Any]] = []
        self.first: Tensor | None = None


def _forward_only(model: Any, blocks: list[nn.Module], batch: Mapping[str, Tensor], skip: bool) -> dict[str, Any]:
    """block_influence and angular, (examples, layers) each, and skip where it is asked for."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    columns = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]  # a column's logits predict the next one
    counted = labels[:, columns + 1] != IGNORED  # (examples, columns)
    shared = shared_columns(model, ids, int(columns[0]))
    last = counted.shape[1] - 1 - counted.flip(1).long().argmax(1)
    influence, angle = [], []

    def look(before: Tensor, after: Tensor) -> None:
        at = columns - shared  # of these hidden states, which begin after the shared head
        cos = torch.cosine_similarity(before[:, at].double(), after[:, at].double(), dim=-1)
        influence.append(1 - (cos * counted).sum(1) / counted.sum(1))
        angle.append(torch.arccos(cos[torch.arange(len(ids)), last].clamp(-1, 1)) / math.pi)

    with torch.inference_mode():
        head, tail = _Calls(), _Calls()
        cache = DynamicCache(config=model.config) if shared else None
        if shared:  # what all rows begin with, once
            with _watching(blocks, head, None):
                model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
            assert cache is not None
            if cache.get_seq_length() == shared:
                cache.batch_repeat_interleave(len(ids))
            else:  # a model that keeps its past elsewhere
                shared, cache = 0, None
        with _watching(blocks, tail, look):
            logits = _logits(model, ids[:, shared:], columns - shared, mask, cache)
        loss = _losses(logits, labels[:, columns + 1])
        out = {"block_influence": torch.stack(influence, 1), "angular": torch.stack(angle, 1)}
        if skip:
            del cache, logits
            risen = []
            for final in _walk(model, blocks, head if shared else None, tail, len(ids)):
                with _replaced(blocks, final, tail.wraps):
                    logits = _logits(model, ids[:, shared:], columns - shared)
                risen.append(_losses(logits, labels[:, columns + 1]) - loss)
            if float(risen.pop().abs().max()) > 1e-3:  # the walk through all blocks, none left out
                raise AnalysisError(
                    f"{type(model).__name__}: its blocks, called one after another, do not give the model's own loss "
                    "(they share something besides hidden states); take other estimators than skip"
                )
            out["skip"] = torch.stack(risen, 1)
    return {name: values.double().cpu().numpy() for name, values in out.items()}


def _walk(model: Any, blocks: list[nn.Module], head: _Calls | None, tail: _Calls, rows: int) -> Any:
    """The last hidden states without block 0, without block 1, and so on, and in the end with all of them.

    The hidden states before one block are kept at a time: those of the shared head (one row) and of the rows.
    """
    assert tail.first is not None
    before = (None if head is None else head.first, tail.first)

    def run(states: tuple[Tensor | None, Tensor], begin: int, end: int) -> tuple[Tensor | None, Tensor]:
        first, rest = states
        cache = DynamicCache(config=model.config) if head is not None else None
        for i in range(begin, end):
            if head is not None:
                first = _call(blocks[i], first, head.arguments[i], cache)
                assert cache is not None
                _repeat(cache.layers[i], rows)
            rest = _call(blocks[i], rest, tail.arguments[i], cache)
            if cache is not None:
                cache.layers[i].reset()
        return first, rest

    for i in range(len(blocks)):
        yield run(before, i + 1, len(blocks))[1]
        before = run(before, i, i + 1)
    yield before[1]


def _repeat(layer: Any, rows: int) -> None:
    """One row's keys and values for so many rows: as a view, where the layer does no more with it than to put others
    behind it."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.get_seq_length():
        layer.keys, layer.values = (t.expand(rows, *t.shape[1:]) for t in (layer.keys, layer.values))
    else:
        layer.batch_repeat_interleave(rows)


def _call(block: nn.Module, hidden: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]], cache: Any) -> Tensor:
    """The block's output for other hidden states and another cache, the rest as the model gave it."""
    args, named = arguments
    args = tuple(cache if a is _CACHE else a for a in args)
    return _hidden(block(hidden, *args, **{k: cache if v is _CACHE else v for k, v in named.items()}))


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _watching(blocks: list[nn.Module], calls: _Calls, look: Callable[[Tensor, Tensor], None] | None) -> Any:
    """Notes how the blocks are called; `look` sees each one's input and output. Raises AnalysisError when it is not
    once each, in order, hidden states first."""
    seen: list[int] = []

    def watch(i: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            named = dict(named)
            hidden = args[0] if args else named.pop("hidden_states", None)
            after = _hidden(output)
            if not isinstance(hidden, Tensor) or not isinstance(after, Tensor) or hidden.shape != after.shape:
                raise AnalysisError(
                    f"{type(blocks[i]).__name__}: a decoder block was expected to take hidden states and to give "
                    "hidden states of the same shape; this one does not, so analysis.importance=[] is the way out"
                )
            seen.append(i)
            calls.first = hidden if i == 0 else calls.first
            others = tuple(_CACHE if isinstance(a, Cache) else a for a in args[1:])
            calls.arguments.append((others, {k: _CACHE if isinstance(v, Cache) else v for k, v in named.items()}))
            rest = output[1:] if isinstance(output, tuple) else None
            calls.wraps.append(lambda h: h if rest is None else (h, *rest))
            if look is not None:
                look(hidden, after)

        return hook

    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(watch(i), with_kwargs=True).remove)
        yield
    if seen != list(range(len(blocks))):
        raise AnalysisError(
            f"{type(blocks[0]).__name__}: the {len(blocks)} decoder blocks were expected to run once each, in order; "
            f"they ran as {seen[:40]}. analysis.importance=[] leaves importance out"
        )


@contextmanager
def _replaced(blocks: list[nn.Module], final: Tensor, wraps: list[Callable[[Tensor], Any]]) -> Any:
    """The model with blocks that do nothing, the last one giving `final`: of the model, norm and head are left."""
    for i, block in enumerate(blocks):
        given = final if i == len(blocks) - 1 else None

        def forward(*args: Any, given: Any = given, wrap: Any = wraps[i], **named: Any) -> Any:
            return wrap(given if given is not None else args[0] if args else named["hidden_states"])

        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _logits(model: Any, ids: Tensor, columns: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
    """The model's logits (examples, columns, vocabulary) at some columns of `ids`."""
    named = {"attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, logits_to_keep=columns, **named).logits
    return model(input_ids=ids, **named).logits[:, columns]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) over each example's own tokens."""
    flat = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape).double().sum(1) / (targets != IGNORED).sum(1)


# --- gradients -----------------------------------------------------------------------------------------------------


@contextmanager
def _gradients(model: Any, blocks: list[nn.Module]) -> Iterator[np.ndarray]:
    """What each backward pass within adds to: the sum of |gradient x weight| over each block."""
    layers: dict[int, list[int]] = {}  # of each weight; blocks may share some
    for layer, block in enumerate(blocks):
        for p in block.parameters():
            layers.setdefault(id(p), []).append(layer)
    sums = np.zeros(len(blocks))

    def add(p: Tensor) -> None:
        assert p.grad is not None
        sums[layers[id(p)]] += float(p.grad.mul_(p.detach()).abs_().sum())
        p.grad = None  # no more than one weight's gradient stays

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with ExitStack() as stack:
        try:
            for p, _, _ in before:
                p.grad = None
                p.requires_grad_(id(p) in layers)  # no gradients of embeddings and head
                if id(p) in layers:
                    stack.callback(p.register_post_accumulate_grad_hook(add).remove)
            yield sums
        finally:
            for p, flag, gradient in before:
                p.requires_grad_(flag)
                p.grad = gradient


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device

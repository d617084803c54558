"""What a fit computes without waste: a batch as one long row, and a loss whose logits are never all in memory.

A row is one pass of the linear layers over a batch with hardly any padding, and no example in it sees another. Examples
come in pieces, each padded on the right to its own width (`sft.cut`). Pieces lie one after another in the row, with
positions of their own; attention is computed piece by piece, causal, so that nothing sees the padding behind it; and
what all examples begin with stands there once. `can_pack` tries on some tokens whether a model takes it so.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .policy import SHARED_FROM, keeps_every_key

IGNORED = -100
PACKED = "itermerge_packed"
LOGITS = 1 << 24  # as many lie in memory at once: 64 MiB in float32
CLOSE = 1e-4  # of the largest logit: what rounding may change

log = logging.getLogger(__name__)
Piece = Mapping[str, Tensor]  # input_ids, attention_mask and labels, (rows, width) each


@dataclass(frozen=True)
class Layout:
    """Where examples lie in one row: first what all of them begin with, then rectangles of (rows, width)."""

    shared: int
    shapes: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]  # what each may see of the shared tokens and its own; None: nothing is shared


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    layout: Layout | None = None, **how: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(1, tokens, heads, size): attention within each example of a packed row, and to what all begin with. Without a
    layout it is transformers' sdpa."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    how["is_causal"] = True
    at, out = layout.shared, []
    if at:
        q, k, v = (x[:, :, :at] for x in (query, key, value))
        out.append(sdpa_attention_forward(module, q, k, v, None, **how)[0][0])
    for (rows, width), mask in zip(layout.shapes, layout.masks, strict=True):
        q, k, v = (
            x[0, :, at : at + rows * width].unflatten(1, (rows, width)).transpose(0, 1) for x in (query, key, value)
        )
        if mask is not None:
            k, v = (
                torch.cat([x[:, :, : layout.shared].expand(rows, -1, -1, -1), own], 2)
                for x, own in ((key, k), (value, v))
            )
        out.append(sdpa_attention_forward(module, q, k, v, mask, **how)[0].flatten(0, 1))
        at += rows * width
    return torch.cat(out)[None], None


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, sdpa_mask)


@contextmanager
def packing(model: Any) -> Iterator[None]:
    """`model` with the attention that knows layouts, until the end."""
    model.set_attn_implementation(PACKED)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def pack(pieces: Sequence[Piece], shared: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What the model is called with for all pieces in one row, where in it completion tokens are predicted, and these
    tokens. The first `shared` columns of all rows are one."""
    first = pieces[0]["input_ids"]
    ids, positions = [first[0, :shared]], [torch.arange(shared, device=first.device)]
    labels = [first.new_full((shared,), IGNORED)]
    for piece in pieces:
        own = piece["input_ids"][:, shared:]
        ids.append(own.flatten())
        positions.append(torch.arange(shared, shared + own.shape[1], device=own.device).repeat(len(own)))
        after = torch.nn.functional.pad(piece["labels"][:, shared + 1 :], (0, 1), value=IGNORED)
        labels.append(after.flatten())  # the label of a token's successor
    targets = torch.cat(labels)
    where = (targets != IGNORED).nonzero()[:, 0]
    shapes = tuple((len(p["input_ids"]), p["input_ids"].shape[1] - shared) for p in pieces)
    inputs = {
        "input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None],
        "attention_mask": first.new_zeros(1, 1, 1, 1),  # in four dimensions: taken as it is, no other is made
        "layout": Layout(shared, shapes, tuple(_mask(shared, width, first.device) for _, width in shapes)),
        "use_cache": False,
    }  # fmt: skip
    return inputs, where, targets[where]


def _mask(shared: int, width: int, device: torch.device) -> Tensor | None:
    return torch.ones(width, shared + width, dtype=torch.bool, device=device).tril(shared) if shared else None


def common(pieces: Sequence[Piece]) -> int:
    """Columns that all rows of all pieces begin with, before the first that predicts a completion token; 0 where they
    are too few to be worth it."""
    first = pieces[0]["input_ids"][0]
    most = min(int((p["labels"][:, 1:] != IGNORED).any(0).long().argmax()) for p in pieces)
    for p in pieces:
        same = (p["input_ids"][:, :most] == first[:most]).all(0)
        most = most if bool(same.all()) else int(same.long().argmin())
    return most if most >= SHARED_FROM and sum(len(p["input_ids"]) for p in pieces) > 1 else 0


def can_pack(model: Any, pieces: Sequence[Piece]) -> bool:
    """Whether the model gives rows that lie in one the logits that it gives each alone; tried on `pieces`, with what
    they have in common once, and without."""
    takes = inspect.signature(model.forward).parameters
    named = {"position_ids", "logits_to_keep"} <= takes.keys()
    if not named or model.config._attn_implementation != "sdpa" or not keeps_every_key(model):
        return False
    was_training, alone = model.training, []
    try:
        with torch.no_grad(), packing(model.eval()):
            for piece in pieces:
                for ids, mask, labels in zip(
                    *(piece[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
                ):
                    logits = model(input_ids=ids[mask.bool()][None], use_cache=False).logits[0]
                    alone.append(logits[(labels[mask.bool()][1:] != IGNORED).nonzero()[:, 0]])
            expected = torch.cat(alone)
            for shared in {0, common(pieces)}:
                inputs, where, _ = pack(pieces, shared)
                got = model(**inputs, logits_to_keep=where).logits[0]
                if got.shape != expected.shape or (got - expected).abs().max() > CLOSE * expected.abs().max():
                    return False
    except Exception as error:  # a model may refuse what it does not know in any way
        log.info("%s reads its examples piece by piece: %s", type(model).__name__, error)
        return False
    finally:
        model.train(was_training)
    return True


# --- the loss of a large vocabulary --------------------------------------------------------------------------------


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropy (nats, float32) of `hidden @ weight.T` over targets, and its gradient, `LOGITS` logits
    at a time.

    torch's own linear_cross_entropy gives the loss in the dtype of its inputs: under bfloat16 three digits of it, under
    float16 infinity for some thousand tokens.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            h, w, total = hidden.to(dtype), weight.to(dtype), hidden.new_zeros((), dtype=torch.float32)
            of_h, of_w = torch.empty_like(h), torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            rows = max(1, LOGITS // len(weight))
            for at in range(0, len(h), rows):
                some, wanted = h[at : at + rows], targets[at : at + rows, None]
                scores = (some @ w.T).float()
                spread = scores.logsumexp(1, keepdim=True)
                total += (spread - scores.gather(1, wanted)).sum()
                errors = scores.sub_(spread).exp_().scatter_add_(1, wanted, -torch.ones_like(spread)).to(dtype)
                of_h[at : at + rows] = errors @ w
                if of_w is not None:
                    of_w += errors.T @ some
        ctx.save_for_backward(of_h.to(hidden.dtype), of_w)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator takes ctx's name away
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        of_h, of_w = ctx.saved_tensors
        return of_h * grads[0], None if of_w is None else of_w.mul_(grads[0]), None


def plain_head(model: Any, piece: Piece) -> torch.nn.Linear | None:
    """The output layer, where the model's logits are its product with the last hidden states and nothing else: no
    bias, no scale, no cap, no adapter; tried on `piece`."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return None
    was_training, inputs = model.training, {"input_ids": piece["input_ids"][:1], "use_cache": False}
    try:
        with torch.no_grad():
            expected = model.eval()(**inputs).logits
            got = head(model.base_model(**inputs).last_hidden_state)
            same = got.shape == expected.shape and bool((got - expected).abs().max() <= CLOSE * expected.abs().max())
    except Exception as error:  # as in `can_pack`
        log.info("%s: its logits are made all at once: %s", type(model).__name__, error)
        return None
    finally:
        model.train(was_training)
    return head if same else None

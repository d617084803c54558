"""Attention while decoding on a CPU: what all rows begin with is kept once, and asked once for all of them.

transformers' own way repeats that beginning for each row, in memory and in arithmetic, and takes a kernel made for long
queries for the single one of a step. Here one softmax spans two parts, joined by their log-sum-exps: `head`, in one
product for the queries of all rows, and the row's own keys. Query heads that share a key head go together.

It is an attention function of transformers' registry, so any model that uses it can be decoded this way; one that adds
something (a cap, sinks, biases) is refused, and `complete` falls back to the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "itermerge_decoding"
# What else models hand to an attention function without asking for another result.
HARMLESS = {"position_ids", "position_embeddings", "use_cache", "cache_position", "output_attentions", "layer_idx"}
Head = Mapping[int, tuple[Tensor, Tensor]]  # by layer: keys and values, each (key heads, positions, width)
_head: Head = {}


class Unsupported(RuntimeError):
    """The model's attention is more than a softmax of scaled products."""


def possible(model: Any) -> bool:
    """Whether the model may be decoded this way: on a CPU, with an exchangeable attention that is `sdpa`."""
    weight = next(model.parameters())
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and model.config.get_text_config()._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


@contextmanager
def decoding(model: Any, head: Head) -> Iterator[None]:
    """While it lasts, `model` attends with `attend`, to `head` and then to its cache."""
    global _head
    config, before = model.config.get_text_config(), _head
    own = config._attn_implementation
    config._attn_implementation, _head = NAME, head
    try:
        yield
    finally:
        config._attn_implementation, _head = own, before


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(rows, columns, heads, width) of queries (rows, heads, columns, width) over `key`, `value` (rows, key heads,
    positions, width) and the head's; the mask (rows, 1, columns, positions) is of the former, None is causal.

    Raises Unsupported for an argument that would change the result.
    """
    odd = [k for k, v in more.items() if k not in HARMLESS and v is not None and not (k == "is_causal" and v)]
    if dropout or odd:
        raise Unsupported(", ".join(odd) or "dropout")
    rows, heads, columns, width = query.shape
    kinds = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, kinds, heads // kinds * columns, width)
    head = _head.get(module.layer_idx)
    out, weight = _own(
        grouped, key, value, _allowed(attention_mask, columns, key, heads // kinds), scale, head is not None
    )
    if head is not None:
        keys, values = head
        asked = grouped.transpose(0, 1).reshape(1, kinds, -1, width)  # all rows' queries
        far, far_weight = _flash(asked, keys[None], values[None], None, scale)
        far = far.view(kinds, rows, -1, far.shape[-1]).transpose(0, 1)
        far_weight = far_weight.view(kinds, rows, -1).transpose(0, 1)
        share = torch.sigmoid(weight - far_weight)[..., None].to(out.dtype)
        out = torch.lerp(far, out, share)
    out = out.reshape(rows, heads, columns, out.shape[-1])
    return out.transpose(1, 2).contiguous(), None


def _allowed(mask: Tensor | None, columns: int, key: Tensor, groups: int) -> Tensor | None:
    """What may be attended to, True, for grouped queries: (rows or 1, 1, groups x columns, positions), or None for
    everything."""
    if mask is None and columns == 1:
        return None
    if mask is None:
        positions = key.shape[-2]
        mask = torch.ones(columns, positions, dtype=torch.bool, device=key.device).tril(positions - columns)[None, None]
    if mask.dtype != torch.bool:
        raise Unsupported("attention_mask")
    return mask.repeat(1, 1, groups, 1)


def _own(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scaling: float, summed: bool
) -> tuple[Tensor, Tensor]:
    """The row's own part, and where `summed` its log-sum-exp. Single queries in float32 are two small products a row: a
    third of the time of a kernel that is made for long ones."""
    if query.dtype != torch.float32 or query.shape[-2] > 8:
        return _flash(query, key.contiguous() if key.stride(-1) != 1 else key, value, allowed, scaling)
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if allowed is not None:
        scores.masked_fill_(~allowed, -math.inf)
    shares = scores.softmax(-1)
    if allowed is not None:
        shares.nan_to_num_()  # a column of padding sees nothing of its row, and nothing reads it
    return torch.matmul(shares, value), scores.logsumexp(-1) if summed else scores


def _flash(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """torch's kernel for CPUs with its log-sum-exp, which `scaled_dot_product_attention` keeps to itself."""
    mask = None
    if allowed is not None:
        mask = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill_(~allowed, -math.inf)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scaling)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

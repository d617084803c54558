"""Where a model changed: by layer, by kind of matrix, and for embeddings, final norm and head on rows of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from .policy import Weights, check_same_tensors

_KINDS = (
    ("qkv", r"c_attn|query_key_value|qkv_proj|Wqkv"),
    ("q", r"q_proj|query"), ("k", r"k_proj|key"), ("v", r"v_proj|value"), 
    ("o", r"o_proj|self_attn\.dense|attention\.dense|attn\.c_proj|out_proj"),
    ("gate", r"gate_proj"), ("up", r"up_proj|dense_h_to_4h|mlp\.c_fc|fc1"),
    ("down", r"down_proj|dense_4h_to_h|mlp\.c_proj|fc2"),
    ("norms", r"norm|ln_\w+"),
)  # fmt: skip


def place_of(name: str) -> tuple[str, str]:
    """(row, kind) of a tensor: (`layer_03`, `q`), (`embed`, `embed`), (`head`, `head`), (`norm`, `norm`)."""
    if found := re.search(r"\.(\d+)\.", f".{name}."):
        kind = next((k for k, pattern in _KINDS if re.search(pattern, name[found.start() :])), "other")
        return f"layer_{int(found[1]):02d}", kind
    if re.search(r"lm_head|embed_out|score", name):
        return "head", "head"
    if re.search(r"emb|wte|wpe", name):
        return "embed", "embed"
    return "norm", "norm"


def layer_change(base: Weights, now: Weights) -> dict[str, dict]:
    """{row: {relative, mean_abs, energy, kinds: {kind: {relative, mean_abs}}}}.

    relative = ||now - base||_F / ||base||_F over the row's weights; mean_abs = mean |now - base|; energy = the row's
    share of the squared change of the whole model. Sums in float64.
    """
    check_same_tensors(base, now, "the base", "the model")
    sums: dict[str, dict[str, list[float]]] = {}
    for name in sorted(base):
        a, b = base[name].to("cpu", torch.float64), now[name].to("cpu", torch.float64)
        d = b - a
        part = [float(d.square().sum()), float(a.square().sum()), float(d.abs().sum()), a.numel()]
        row, kind = place_of(name)
        old = sums.setdefault(row, {}).setdefault(kind, [0.0, 0.0, 0.0, 0])
        sums[row][kind] = [x + y for x, y in zip(old, part, strict=True)]
    total = sum(s[0] for kinds in sums.values() for s in kinds.values())

    def figures(s: Sequence[float]) -> dict[str, float]:
        return {"relative": math.sqrt(s[0] / s[1]) if s[1] else 0.0, "mean_abs": s[2] / s[3] if s[3] else 0.0}

    out = {}
    for row in sorted(sums):
        whole = [sum(column) for column in zip(*sums[row].values(), strict=True)]
        kinds = {kind: figures(s) for kind, s in sorted(sums[row].items())}
        out[row] = {**figures(whole), "energy": whole[0] / total if total else 0.0, "kinds": kinds}
    return out


def relative_distance(a: Weights, b: Weights) -> float:
    """||b - a|| / ||a|| over all tensors, in float64."""
    squares = [(float((b[n].double() - a[n].double()).square().sum()), float(a[n].double().square().sum())) for n in a]
    return math.sqrt(sum(s[0] for s in squares) / sum(s[1] for s in squares))

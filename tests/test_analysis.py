"""Layer change by hand, and the row of a tensor for the usual architectures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from itermerge.analysis.change import layer_change, place_of, relative_distance
from itermerge.policy import PolicyError

BASE = {
    "model.embed_tokens.weight": torch.tensor([[3.0, 4.0]]),  # norm 5
    "model.layers.0.self_attn.q_proj.weight": torch.tensor([[6.0, 8.0]]),  # norm 10
    "model.layers.0.mlp.up_proj.weight": torch.tensor([[0.0, 0.0, 10.0]]),
    "model.layers.1.self_attn.q_proj.weight": torch.tensor([[2.0, 0.0]]),
    "model.norm.weight": torch.tensor([1.0]),
}
CHANGE = {
    "model.embed_tokens.weight": torch.tensor([[0.0, 1.0]]),
    "model.layers.0.self_attn.q_proj.weight": torch.tensor([[3.0, -4.0]]),
    "model.layers.0.mlp.up_proj.weight": torch.tensor([[0.0, 0.0, 0.0]]),
    "model.layers.1.self_attn.q_proj.weight": torch.tensor([[0.0, 2.0]]),
    "model.norm.weight": torch.tensor([0.0]),
}


def test_layer_change_by_hand() -> None:
    got = layer_change(BASE, {name: BASE[name] + CHANGE[name] for name in BASE})
    assert list(got) == ["embed", "layer_00", "layer_01", "norm"]
    # squared changes: embed 1, layer 0 9 + 16 = 25, layer 1 4; 30 in all
    assert {row: g["energy"] for row, g in got.items()} == pytest.approx(
        {"embed": 1 / 30, "layer_00": 25 / 30, "layer_01": 4 / 30, "norm": 0}
    )
    assert got["embed"]["relative"] == pytest.approx(0.2)  # 1 / 5
    assert got["layer_00"]["relative"] == pytest.approx((25 / 200) ** 0.5)  # of 10^2 + 10^2
    assert got["layer_00"]["mean_abs"] == pytest.approx(7 / 5)  # (3 + 4) over 5 weights
    assert got["layer_01"]["relative"] == pytest.approx(1.0)
    kinds = got["layer_00"]["kinds"]
    assert list(kinds) == ["q", "up"]
    assert kinds["q"] == pytest.approx({"relative": 0.5, "mean_abs": 3.5})  # 5 / 10, (3 + 4) / 2
    assert kinds["up"] == {"relative": 0.0, "mean_abs": 0.0}


def test_no_change_and_a_base_of_zeros() -> None:
    zeros = {"model.norm.weight": torch.zeros(2)}
    assert layer_change(zeros, zeros)["norm"] == {
        "relative": 0.0, "mean_abs": 0.0, "energy": 0.0, "kinds": {"norm": {"relative": 0.0, "mean_abs": 0.0}}
    }  # fmt: skip


def test_sums_are_in_float64() -> None:
    """Of a million weights; sums in float32 would agree in 7 digits."""
    base = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    now = base + 1e-3 * base.flip(0)
    got = layer_change({"model.norm.weight": base}, {"model.norm.weight": now})["norm"]
    wide = [w.numpy().astype(np.float64) for w in (base, now)]
    assert got["mean_abs"] == pytest.approx(np.abs(wide[1] - wide[0]).mean(), rel=1e-12)
    assert got["relative"] == pytest.approx(np.linalg.norm(wide[1] - wide[0]) / np.linalg.norm(wide[0]), rel=1e-12)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"missing \['model.norm.weight'\]"):
        layer_change(BASE, {name: w for name, w in BASE.items() if name != "model.norm.weight"})


def test_relative_distance_by_hand() -> None:
    a, b = {"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}, {"x": torch.tensor([3.5]), "y": torch.tensor([4.0])}
    assert relative_distance(a, b) == pytest.approx(0.1)  # 0.5 / 5
    assert relative_distance(a, a) == 0


@pytest.mark.parametrize(
    ("name", "place"),
    [
        # Llama, SmolLM2
        ("model.embed_tokens.weight", ("embed", "embed")),
        ("model.layers.3.self_attn.q_proj.weight", ("layer_03", "q")),
        ("model.layers.3.self_attn.k_proj.weight", ("layer_03", "k")),
        ("model.layers.3.self_attn.v_proj.weight", ("layer_03", "v")),
        ("model.layers.3.self_attn.o_proj.weight", ("layer_03", "o")),
        ("model.layers.12.mlp.gate_proj.weight", ("layer_12", "gate")),
        ("model.layers.12.mlp.up_proj.weight", ("layer_12", "up")),
        ("model.layers.12.mlp.down_proj.weight", ("layer_12", "down")),
        ("model.layers.0.input_layernorm.weight", ("layer_00", "norms")),
        ("model.layers.0.post_attention_layernorm.weight", ("layer_00", "norms")),
        ("model.norm.weight", ("norm", "norm")),
        ("lm_head.weight", ("head", "head")),
        # Qwen2.5 has biases, Qwen3 norms of queries and keys
        ("model.layers.1.self_attn.k_proj.bias", ("layer_01", "k")),
        ("model.layers.1.self_attn.q_norm.weight", ("layer_01", "norms")),
        # GPT-2: one matrix for q, k and v
        ("transformer.wte.weight", ("embed", "embed")),
        ("transformer.wpe.weight", ("embed", "embed")),
        ("transformer.h.0.attn.c_attn.weight", ("layer_00", "qkv")),
        ("transformer.h.0.attn.c_proj.weight", ("layer_00", "o")),
        ("transformer.h.0.mlp.c_fc.weight", ("layer_00", "up")),
        ("transformer.h.0.mlp.c_proj.weight", ("layer_00", "down")),
        ("transformer.h.0.ln_1.weight", ("layer_00", "norms")),
        ("transformer.ln_f.weight", ("norm", "norm")),
        # GPT-NeoX, Pythia
        ("gpt_neox.embed_in.weight", ("embed", "embed")),
        ("gpt_neox.layers.7.attention.query_key_value.weight", ("layer_07", "qkv")),
        ("gpt_neox.layers.7.attention.dense.weight", ("layer_07", "o")),
        ("gpt_neox.layers.7.mlp.dense_h_to_4h.weight", ("layer_07", "up")),
        ("gpt_neox.layers.7.mlp.dense_4h_to_h.bias", ("layer_07", "down")),
        ("gpt_neox.layers.7.post_attention_layernorm.weight", ("layer_07", "norms")),
        ("gpt_neox.final_layer_norm.weight", ("norm", "norm")),
        ("embed_out.weight", ("head", "head")),
    ],
)
def test_place_of(name: str, place: tuple[str, str]) -> None:
    assert place_of(name) == place

"""Layer change, the updates of rounds and their mismatch with importance, by hand and against SciPy; the row of a
tensor for the usual architectures; checkpoints larger than memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from itermerge.analysis import change
from itermerge.analysis.change import (
    AnalysisError,
    changes,
    effective_rank,
    layer_change,
    place_of,
    ranks_are_cheap,
    update_figures,
    update_of,
)
from itermerge.analysis.mismatch import (
    interval_of_means,
    mismatch,
    permutation_p,
    spearman,
    top_count,
    top_share,
)
from itermerge.weights import Checkpoint, PolicyError, comparable, digest_weights

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


def test_changes_by_hand() -> None:
    """A base, an anchor elsewhere, and half of the way back to it."""
    base = {"model.layers.0.mlp.up_proj.weight": torch.tensor([3.0, 0.0]), "model.norm.weight": torch.tensor([4.0])}
    anchor = {"model.layers.0.mlp.up_proj.weight": torch.tensor([3.0, 1.0]), "model.norm.weight": torch.tensor([4.0])}
    tuned = {"model.layers.0.mlp.up_proj.weight": torch.tensor([5.0, 1.0]), "model.norm.weight": torch.tensor([4.0])}
    merged = {"model.layers.0.mlp.up_proj.weight": torch.tensor([4.0, 2.0]), "model.norm.weight": torch.tensor([4.0])}
    ratios = {"model.layers.0.mlp.up_proj.weight": 0.25, "model.norm.weight": 0.75}
    got = changes(base, anchor, tuned, merged, ratios)
    assert (got.tuned, got.merged) == (layer_change(base, tuned), layer_change(base, merged))
    assert got.drift == pytest.approx(5**0.5 / 5)  # (1, 2, 0) of (3, 0, 4)
    assert got.anchor_distance == pytest.approx(2**0.5 / 26**0.5)  # (1, 1, 0) of (3, 1, 4)
    # of (2, 0), the way from the anchor, (1, 1) has 2 of 4
    assert got.left == {"layer_00": {"ratio": 0.25, "share": 0.5}, "norm": {"ratio": 0.75, "share": None}}
    at_base = changes(base, base, tuned, merged, ratios)
    assert at_base.anchor_distance == at_base.drift == got.drift
    assert at_base.left["layer_00"]["share"] == pytest.approx(4 / 5)  # (2, 1) by (1, 2) of (2, 1) by (2, 1)
    kept = changes(base, base, tuned, tuned, ratios)  # no merge
    assert (kept.tuned, kept.left["layer_00"]["share"]) == (kept.merged, 1)
    with pytest.raises(PolicyError, match=r"the merged model and the base differ.*missing \['model.norm.weight'\]"):
        changes(base, anchor, tuned, {k: w for k, w in merged.items() if k != "model.norm.weight"}, ratios)


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
        ("model.layers.0.mlp.gate_up_proj.weight", ("layer_00", "gate_up")),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", ("layer_00", "gate")),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", ("layer_00", "down")),
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


# --- the updates of rounds -----------------------------------------------------------------------------------------

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def test_update_figures_by_hand() -> None:
    start = {Q: torch.tensor([[1.0, 1.0], [1.0, 1.0]]), NORM: torch.tensor([1.0, 1.0])}
    tuned = {Q: torch.tensor([[2.0, 1.0], [1.0, 3.0]]), NORM: torch.tensor([1.0, 1.0])}
    update = update_of(start, tuned)  # q: diag(1, 2); norm: nothing
    assert update[Q].dtype == torch.bfloat16
    earlier = {Q: torch.tensor([[2.0, 5.0], [0.0, -1.0]]), NORM: torch.tensor([1.0, 1.0])}
    got = update_figures(start, tuned, update, earlier)
    # u.v = 1*2 + 2*(-1) = 0; the signs that both have: + +, + -
    assert got["layer_00"]["cosine"] == 0
    assert got["layer_00"]["sign_agreement"] == 0.5
    p = np.array([1 / 3, 2 / 3])  # singular values 1 and 2
    assert got["layer_00"]["effective_rank"] == pytest.approx(float(np.exp(-(p * np.log(p)).sum())) / 2)
    assert got["norm"] == {"cosine": None, "sign_agreement": None, "effective_rank": None}
    same = update_figures(start, tuned, update, update, ranks=False)["layer_00"]
    assert same["cosine"] == pytest.approx(1)
    assert (same["sign_agreement"], same["effective_rank"]) == (1, None)
    first = update_figures(start, tuned, update)["layer_00"]
    assert (first["cosine"], first["sign_agreement"]) == (None, None)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (96, 300), (400, 250)])
def test_effective_rank_against_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = np.linalg.svd(matrix.numpy(), compute_uv=False)
    p /= p.sum()
    assert effective_rank(matrix) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-9)
    assert effective_rank(torch.eye(5, dtype=torch.float64)) == pytest.approx(5)
    row = matrix[0, :7]
    assert effective_rank(torch.outer(row, row)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(3, 3, dtype=torch.float64)) is None


def test_a_weight_that_is_not_finite_is_named() -> None:
    now = {name: w.clone() for name, w in BASE.items()}
    now["model.norm.weight"][0] = float("nan")
    with pytest.raises(AnalysisError, match=r"model\.norm\.weight: has weights that are not finite"):
        layer_change(BASE, now)
    for value in (float("nan"), float("inf")):
        now = {name: w.clone() for name, w in BASE.items()}
        now[Q][0, 0] = value
        with pytest.raises(AnalysisError, match=r"0\.self_attn\.q_proj\.weight: .*so that no rank can be given"):
            update_figures(BASE, now, None)


# --- checkpoints on disk -------------------------------------------------------------------------------------------


def _sharded(folder: Path, weights: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in shards.items():
        save_file({n: weights[n].contiguous() for n in mine}, folder / file)
    where = {n: file for file, mine in shards.items() for n in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return Checkpoint(folder)


def test_streamed_from_shards_equals_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor comes in several pieces, and in another dtype."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(9, 5, generator=draw) for name in BASE}
    now = {name: (w + 0.1 * torch.randn(9, 5, generator=draw)).bfloat16() for name, w in base.items()}
    whole = layer_change(base, now)
    one, other = _sharded(tmp_path / "a", base), _sharded(tmp_path / "b", now)
    assert layer_change(one, other) == whole
    ratios = dict.fromkeys(base, 0.5)
    assert changes(one, one, other, other, ratios) == changes(base, base, now, now, ratios)
    monkeypatch.setattr(change, "PIECE", 10)  # two rows at a time
    pieces = layer_change(one, other)
    for row, figures in whole.items():
        assert pieces[row]["relative"] == pytest.approx(figures["relative"], rel=1e-12)
        assert pieces[row]["energy"] == pytest.approx(figures["energy"], rel=1e-12)


def test_streaming_holds_a_piece_and_not_a_model(tmp_path: Path) -> None:
    """Two checkpoints of 200 MB each, compared within 100 MB of memory of our own (pages of the files do not count)."""
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        draw = torch.Generator().manual_seed(seed)
        weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(5000, 2500, generator=draw) for i in range(4)}
        save_file(weights, tmp_path / name / "model.safetensors")
        del weights
    code = """
import sys, itermerge.analysis.change as change
from itermerge.weights import Checkpoint
def private():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous"))
import threading, time
change.PIECE = 1 << 19
before, most, done = private(), [0], []
def watch():
    while not done:
        most[0] = max(most[0], private()); time.sleep(.005)
thread = threading.Thread(target=watch); thread.start()
got = change.layer_change(Checkpoint(sys.argv[1]), Checkpoint(sys.argv[2]))
done.append(1); thread.join()
assert abs(got["layer_03"]["relative"] - 2 ** .5) < .01, got["layer_03"]["relative"]
print((most[0] - before) / 1024)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    out = subprocess.run(words, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert 0 < float(out.stdout) < 100


def test_names_are_checked_without_reading_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = _sharded(tmp_path / "a", BASE), _sharded(tmp_path / "b", BASE)
    read: list[str] = []
    inner = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: read.append(name) or inner(self, name))
    comparable(one, other)
    assert read == []
    less, gone = one.without({Q, "nothing"})
    assert (Q in less, Q in one, len(less), gone) == (False, True, len(one) - 1, [Q])
    with pytest.raises(KeyError):
        less[Q]


def test_the_hubs_gpt2_and_one_that_was_saved_again_are_comparable(tmp_path: Path) -> None:
    """Without the prefix `transformer.`, with causal masks beside the weights, and a head that is the embeddings."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (8, 4), "h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,)}
    shapes |= {"ln_f.weight": (4,)}
    plain = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    hub = plain | {"h.0.attn.bias": torch.ones(1, 1, 9, 9), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    saved = {f"transformer.{name}": w * 1.01 for name, w in plain.items()}
    saved["lm_head.weight"] = saved["transformer.wte.weight"].clone()
    base, tuned, notes = comparable(_sharded(tmp_path / "hub", hub), _sharded(tmp_path / "saved", saved))
    assert [bool(notes[i].startswith(w)) for i, w in enumerate(("2 tensors of base are no weights", "lm_head.weight"))]
    got = layer_change(base, tuned)
    assert set(got) == {"embed", "layer_00", "norm"}
    assert all(row["relative"] == pytest.approx(0.01, rel=1e-5) for row in got.values())
    with pytest.raises(PolicyError, match="their files name tensors differently"):
        comparable(_sharded(tmp_path / "c", {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}), base)


def test_ranks_of_large_matrices_are_for_a_gpu() -> None:
    small, large = ({Q: torch.empty(n, 3000)} for n in (2048, 2049))
    assert ranks_are_cheap(small, "cpu")
    assert not ranks_are_cheap(large, "cpu")
    assert ranks_are_cheap(large, "cuda")


def test_checkpoints_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="nowhere is not a folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(PolicyError, match=r"has no \*\.safetensors weights\. Pickle checkpoints are not loaded"):
        Checkpoint(tmp_path)
    _sharded(tmp_path / "a", BASE)
    cut = tmp_path / "a" / "model-00002-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:20])
    with pytest.raises(PolicyError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        Checkpoint(tmp_path / "a")
    cut.unlink()
    with pytest.raises(PolicyError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        Checkpoint(tmp_path / "a")


# --- mismatch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 8, 30])
def test_spearman_and_its_p_against_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=n), rng.integers(0, 4, n).astype(float)  # with ties
    assert float(spearman(x, y)) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    p = permutation_p(list(x), list(y))
    if n < 8:  # all permutations, by SciPy
        exact = stats.permutation_test(
            (x,), lambda a: abs(stats.spearmanr(a, y).statistic), permutation_type="pairings", alternative="greater",
            n_resamples=np.inf, vectorized=False,
        )  # fmt: skip
        assert p == pytest.approx(exact.pvalue, abs=1e-12)
    else:  # the t approximation is close for 30 layers, and for 8 not far
        assert p == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.03)


def test_spearman_by_hand() -> None:
    assert float(spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3]))) == pytest.approx(0.8)  # 1 - 6*2 / (4*15)
    assert permutation_p([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(2 / 24)  # this order and its reverse
    assert np.isnan(permutation_p([1, 1, 1], [1, 2, 3]))
    assert np.isnan(spearman(np.array([1.0]), np.array([2.0])))


def _layers(relative: list[float], energy: list[float]) -> dict[str, dict[str, float]]:
    pairs = enumerate(zip(relative, energy, strict=True))
    rows = {f"layer_{i:02d}": {"relative": r, "energy": e} for i, (r, e) in pairs}
    return rows | {"embed": {"relative": 9.0, "energy": 0.5}}  # no layer: left out


def test_mismatch_by_hand() -> None:
    values = {"skip": np.array([[4.0, 3, 2, 1], [4.0, 3, 2, 1]]), "taylor": np.array([[1.0, 2, 3, 4], [3.0, 2, 1, 4]])}
    got = mismatch(values, _layers([0.1, 0.2, 0.3, 0.4], [0.05, 0.05, 0.1, 0.3]), 0.5)
    assert got["top_k"] == 2
    assert (got["skip/spearman"], got["skip/spearman_low"], got["skip/spearman_high"]) == (-1, -1, -1)
    assert got["skip/p"] == pytest.approx(2 / 24)
    assert got["skip/top_share"] == pytest.approx(0.1 / 0.5)  # layers 0 and 1, of the layers' own change
    assert got["skip/top_expected"] == 0.5
    # squared changes .05 .05 .1 .3 have ranks 1.5 1.5 3 4
    assert got["skip/spearman_squared"] == pytest.approx(stats.spearmanr([4, 3, 2, 1], [1.5, 1.5, 3, 4]).statistic)
    # means 2 2 2 4: ranks 2 2 2 4 against 1 2 3 4; resampled they are (1 2 3 4), (2 2 2 4) or (3 2 1 4)
    assert got["taylor/spearman"] == pytest.approx(stats.spearmanr([2, 2, 2, 4], [1, 2, 3, 4]).statistic)
    low = stats.spearmanr([3, 2, 1, 4], [1, 2, 3, 4]).statistic
    assert (got["taylor/spearman_low"], got["taylor/spearman_high"]) == (pytest.approx(low), pytest.approx(1))


def test_mismatch_of_one_layer_and_of_no_change_leaves_out_what_is_not_defined() -> None:
    one = mismatch({"skip": np.array([[1.0]])}, _layers([0.1], [0.5]), 0.25)
    names = ("top_k", "skip/top_share", "skip/top_share_low", "skip/top_share_high", "skip/top_expected")
    assert one == dict.fromkeys(names, 1)
    assert mismatch({"skip": np.array([[1.0, 2.0]])}, _layers([0.0, 0.0], [0.0, 0.0]), 0.5) == {"top_k": 1}


def test_a_hundred_layers_are_in_order() -> None:
    layers = {f"layer_{i:02d}": {"relative": float(i), "energy": 1.0} for i in range(104)}
    assert mismatch({"skip": np.arange(104.0)[None]}, layers, 0.25)["skip/spearman"] == pytest.approx(1)


def test_top_share_counts_layers() -> None:
    assert [top_count(n, 0.25) for n in (1, 4, 8, 30)] == [1, 1, 2, 8]
    energy = np.array([0.1, 0.2, 0.3, 0.4])
    assert top_share(np.array([[1.0, 9, 8, 0], [0.0, 0, 0, 1]]), energy, 2) == pytest.approx([0.5, 0.5])  # {1,2}; {3,0}


def test_interval_of_means_is_about_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=(100, 2))
    mean, low, high = interval_of_means(values)
    half = 1.96 * values.std(0) / 10
    assert mean == pytest.approx(values.mean(0))
    assert low == pytest.approx(mean - half, abs=0.03)
    assert high == pytest.approx(mean + half, abs=0.03)


def test_several_threads_give_what_one_gives() -> None:
    draw = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(5)]
    start = {name: torch.randn(40, 24, generator=draw) for name in names}
    tuned = {name: w + 0.01 * torch.randn(w.shape, generator=draw) for name, w in start.items()}
    one = update_figures(start, tuned, None), digest_weights(tuned)
    torch.set_num_threads(2)
    try:
        assert (update_figures(start, tuned, None), digest_weights(tuned)) == one
        assert torch.get_num_threads() == 2
        with pytest.raises(AnalysisError, match=rf"{names[3]}: has weights that are not finite"):
            update_figures(start, tuned | {names[3]: tuned[names[3]] / 0}, None)
    finally:
        torch.set_num_threads(1)
    assert digest_weights(dict(reversed(tuned.items()))) == one[1] != digest_weights(start)

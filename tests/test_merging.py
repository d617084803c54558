"""Merge rules by hand and by property, ratios a tensor, events, and the drift that the spec derives for the loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAB_SMALL, run_here
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from itermerge import stages
from itermerge.merging import (
    LINEAR,
    Merge,
    MergeError,
    Method,
    by_angle,
    by_importance,
    effective_ratio,
    events,
    law,
    over_time,
    tensor_ratios,
)  # fmt: skip
from itermerge.policy import Policy
from itermerge.sft import Fitted
from itermerge.weights import Checkpoint, PolicyError, place_of, read_weights, write_folder

NUMBERS = st.floats(-1e6, 1e6, width=32)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40)
RATIOS = st.floats(0, 1)
SLERP = Method(combine="slerp")
TIES = Method(sparsify="magnitude", combine="elect", density=0.2, scope="tensor")
EVERY = {  # a method of each rule that is shipped, by name
    "linear": LINEAR,
    "task_arithmetic": Method(combine="sum", weights=(0.5, 0.25)),
    "dare": Method(sparsify="random", density=0.6),
    "dare_ties": Method(sparsify="random", combine="elect", density=0.6),
    "ties": TIES,
    "ties_model": dataclasses.replace(TIES, scope="model"),
    "della": Method(sparsify="rank", combine="elect", density=0.5, epsilon=0.2),
    "breadcrumbs": Method(sparsify="band", combine="sum", density=0.5, gamma=0.1),
    "breadcrumbs_model": Method(sparsify="band", combine="sum", density=0.5, gamma=0.1, scope="model"),
    "model_stock": Method(combine="stock"),
    "tall_mask": Method(combine="tall", threshold=0.4),
    "consensus": Method(combine="consensus", threshold=0.4, agree=2),
    "slerp": SLERP,
}


def one(
    method: Method, anchor: Sequence[float], *tuned: Sequence[float], ratio: float = 1.0, **more: Any
) -> list[float]:
    """The merge of a single tensor, as a list."""
    of = [{"w": torch.as_tensor(t)} for t in tuned]
    return Merge(method, {"w": torch.as_tensor(anchor)}, of, ratio, **more).tensor("w").tolist()


def _tensors(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    a, b = zip(*pairs, strict=True)
    return torch.tensor(a), torch.tensor(b)


def _models(seed: int = 0, many: int = 2) -> list[dict[str, Tensor]]:
    """An anchor and `many` tuned models: a matrix, a vector, a scalar, one weight, none."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a.layers.0.m": (30, 7), "b": (11,), "c": (), "d": (1,), "e": (0, 3)}
    anchor = {n: torch.randn(s, generator=draw) for n, s in shapes.items()}
    return [
        anchor,
        *({n: w + 0.1 * torch.randn(w.shape, generator=draw) for n, w in anchor.items()} for _ in range(many)),
    ]


def _all(method: Method, models: list[dict[str, Tensor]], ratio: Any = 0.7, seed: int = 3) -> dict[str, Tensor]:
    tuned = models[1:2] if method.combine == "slerp" else models[1:]
    return Merge(method, models[0], tuned, ratio, seed=seed).all()


# --- by hand -------------------------------------------------------------------------------------------------------


def test_linear_by_hand() -> None:
    # 1 + 0.25 (5 - 1) = 2, -2 + 0.25 (2 + 2) = -1, 3 + 0.25 * 0 = 3
    assert one(LINEAR, [1.0, -2.0, 3.0], [5.0, 2.0, 3.0], ratio=0.25) == [2.0, -1.0, 3.0]
    # of two: 1 + 0.5 (mean(5, 1) - 1) = 2; weighted 3:1: 1 + 0.5 (.75 * 4 + .25 * 0) = 2.5
    assert one(LINEAR, [1.0], [5.0], [1.0], ratio=0.5) == [2.0]
    assert one(Method(weights=(3.0, 1.0)), [1.0], [5.0], [1.0], ratio=0.5) == [2.5]


def test_task_arithmetic_by_hand() -> None:
    # 1 + 0.5 (2 * (2 - 1) - 1 * (5 - 1)) = 0
    assert one(Method(combine="sum", weights=(2.0, -1.0)), [1.0], [2.0], [5.0], ratio=0.5) == [0.0]


def test_ties_by_hand() -> None:
    # Updates (4, -3, 1, 0, 2) and (-2, -6, 3, 5, 0); of five weights round(.6 * 5) = 3 are kept:
    # (4, -3, 0, 0, 2) and (0, -6, 3, 5, 0). Sums (4, -9, 3, 5, 2) elect +, -, +, +, +; means of those that agree:
    # 4, (-3 - 6) / 2 = -4.5, 3, 5, 2
    method = dataclasses.replace(TIES, density=0.6)
    assert one(method, [0.0] * 5, [4.0, -3.0, 1.0, 0.0, 2.0], [-2.0, -6.0, 3.0, 5.0, 0.0]) == [4.0, -4.5, 3.0, 5.0, 2.0]
    # with disagreement: 3 against -1, all kept: + is elected and the mean is over the one that agrees
    keep = dataclasses.replace(TIES, density=1.0)
    assert one(keep, [10.0], [13.0], [9.0], ratio=0.5) == [11.5]
    # a sum of zero elects nothing
    assert one(keep, [10.0], [12.0], [8.0]) == [10.0]


def test_equal_magnitudes_are_kept_from_the_first_on() -> None:
    method = dataclasses.replace(TIES, density=0.5)
    assert one(method, [0.0] * 6, [1.0, -2.0, 1.0, 1.0, -1.0, 1.0]) == [1.0, -2.0, 1.0, 0.0, 0.0, 0.0]


def test_ties_over_the_whole_model_by_hand() -> None:
    anchor = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    tuned = {"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([4.0, 1.0, -6.0]), "c": torch.tensor([1.0])}
    # round(2/3 * 6) = 4 of six: 6, 5, 4, and of the three ones the first
    merged = Merge(Method(sparsify="magnitude", density=2 / 3, scope="model"), anchor, [tuned], 1.0).all()
    assert {k: v.tolist() for k, v in merged.items()} == {"a": [1.0, 5.0], "b": [4.0, 0.0, -6.0], "c": [0.0]}


def test_whole_numbers_are_not_counted_over_the_model() -> None:
    anchor = {"a": torch.zeros(2), "ids": torch.arange(100)}
    method = Method(sparsify="magnitude", density=0.5, scope="model")
    merged = Merge(method, anchor, [{**anchor, "a": torch.tensor([1.0, 2.0])}], 1.0).all()
    assert merged["a"].tolist() == [0.0, 2.0]


def test_breadcrumbs_by_hand() -> None:
    # of ten: the round(.2 * 10) = 2 largest go, the next round(.5 * 10) = 5 stay
    update = [1.0, -9.0, 3.0, 7.0, -5.0, 2.0, 4.0, 8.0, 6.0, 0.5]
    kept = one(Method(sparsify="band", combine="sum", density=0.5, gamma=0.2), [0.0] * 10, update)
    assert kept == [0.0, 0.0, 3.0, 7.0, -5.0, 0.0, 4.0, 0.0, 6.0, 0.0]
    # all equal: the first two count as the largest
    same = one(Method(sparsify="band", combine="sum", density=0.5, gamma=0.2), [0.0] * 10, [2.0] * 10)
    assert same == [0.0] * 2 + [2.0] * 5 + [0.0] * 3


def test_slerp_by_hand() -> None:
    # a quarter circle: halfway is (1, 1) / sqrt 2
    assert one(SLERP, [1.0, 0.0], [0.0, 1.0], ratio=0.5) == pytest.approx([0.5**0.5] * 2, rel=1e-6)
    # lengths 1 and 2, unnormalised: sin 30 / sin 90 = .5 and sin 60 = .866 at two thirds
    assert one(SLERP, [1.0, 0.0], [0.0, 2.0], ratio=2 / 3) == pytest.approx([0.5, 2 * 0.75**0.5], rel=1e-6)
    # a small angle is an arc all the same: with |a| = |b| the middle keeps their length
    a, b = [1.0, 0.0], [math.cos(0.01), math.sin(0.01)]
    assert math.hypot(*one(SLERP, a, b, ratio=0.5)) == pytest.approx(1.0, abs=1e-7)
    # parallel tensors, and zeros: straight
    assert one(SLERP, [1.0, 2.0], [3.0, 6.0], ratio=0.5) == [2.0, 4.0]
    assert one(SLERP, [0.0, 0.0], [3.0, 6.0], ratio=0.5) == [1.5, 3.0]
    with pytest.raises(MergeError, match=r"^w: anchor and tuned tensor point in opposite directions.*merge=linear"):
        one(SLERP, [1.0, 2.0], [-2.0, -4.0], ratio=0.5)


def test_model_stock_by_hand() -> None:
    # updates (1, 0) and (1, 1): c = 1 / sqrt 2, t = 2c / (1 + c) = .8284; the mean is (1, .5)
    t = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    stock = Method(combine="stock")
    assert one(stock, [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]) == pytest.approx([t, t / 2], rel=1e-6)
    # of three, one zero: it is left out of cosines and of the mean
    three = one(stock, [0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0])
    assert three == pytest.approx([t, t / 2], rel=1e-6)
    assert one(stock, [5.0, 5.0], [6.0, 5.0], [4.0, 5.0]) == [5.0, 5.0]  # opposed: t = 0
    with pytest.raises(MergeError, match="at least two"):
        one(stock, [0.0], [1.0])
    assert one(stock, [0.0], [3.0], starts=[{"w": torch.tensor([1.0])}]) == [2.0]  # a first round: its update


def test_tall_mask_and_consensus_by_hand() -> None:
    # u_1 = (4, 1, 1), u_2 = (1, 1, -3); sums (5, 2, -2). Threshold .5: u_1 stands out where |u_1| > .5 |u_2|: yes, yes,
    # no; u_2: 1 > 2 no, 1 > .5 yes, 3 > .5 yes
    u = [4.0, 1.0, 1.0], [1.0, 1.0, -3.0]
    assert one(Method(combine="tall", threshold=0.5), [0.0] * 3, *u) == [0.0, 2.0, -2.0]
    assert one(Method(combine="consensus", threshold=0.5, agree=2), [0.0] * 3, *u) == [0.0, 2.0, 0.0]
    assert one(Method(combine="consensus", threshold=0.5, agree=1), [0.0] * 3, *u) == [5.0, 2.0, -2.0]
    assert one(Method(combine="consensus", threshold=0.5, agree=2), [0.0], [3.0], ratio=0.5) == [1.5]  # of one: its own


def test_a_model_that_did_not_move_has_no_vote() -> None:
    u = [4.0, 1.0], [1.0, 1.0], [0.0, 0.0]
    consensus = Method(combine="consensus", threshold=0.5, agree=3)
    assert one(consensus, [0.0] * 2, *u) == [0.0, 2.0]  # the third cannot stand out, and two are all


def test_equal_magnitudes_are_counted_in_tensors_at_ratio_0_too() -> None:
    anchor, tuned = ({"a": torch.full((10,), x), "b": torch.full((10,), x)} for x in (0.0, 1.0))
    method = dataclasses.replace(TIES, density=0.5, scope="model")
    for ratio in (0.5, 0.0):
        merged = Merge(method, anchor, [tuned], {"a": ratio, "b": 1.0}).all()
        assert merged["a"].tolist() == [ratio] * 10
        assert merged["b"].tolist() == [0.0] * 10


def test_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert one(
            LINEAR, torch.tensor([0.0], dtype=torch.float32), torch.tensor([1.0], dtype=torch.float32), ratio=0.3
        ) == [  # pyright: ignore
            pytest.approx(0.3, abs=1e-7)
        ]
    finally:
        torch.set_default_dtype(torch.float32)


def test_updates_of_rounds_are_taken_from_their_own_starts() -> None:
    # u_1 = 3 - 1 = 2, u_2 = 7 - 3 = 4, and the differences to the anchor (3, 7) share history: 1 + .5 mean(2, 4) = 2.5
    starts = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}]
    assert one(LINEAR, [1.0], [3.0], [7.0], ratio=0.5, starts=starts) == [2.5]


def test_a_users_own_rule() -> None:
    def clip(anchor: Tensor, updates: list[Tensor], most: float) -> Tensor:
        assert anchor.shape == (2, 2)
        return updates[0].clamp(-most, most)

    method = Method(combine="function", function=clip, params={"most": 1.0})
    merged = Merge(method, {"w": torch.zeros(2, 2)}, [{"w": torch.tensor([[3.0, 0.5], [-2.0, 0.0]])}], 0.5).all()
    assert merged["w"].tolist() == [[0.5, 0.25], [-0.5, 0.0]]
    bad = dataclasses.replace(method, function=lambda anchor, updates, most: updates[0][:1])
    with pytest.raises(MergeError, match=r"^w: merge.function gave \(1, 2\); expected .* of shape \(2, 2\)"):
        Merge(bad, {"w": torch.zeros(2, 2)}, [{"w": torch.ones(2, 2)}], 0.5).all()


# --- properties ----------------------------------------------------------------------------------------------------


@given(PAIRS, st.sampled_from([LINEAR, SLERP]))
def test_ratio_0_is_the_anchor_and_ratio_1_the_tuned_model_bit_for_bit(
    pairs: list[tuple[float, float]], method: Method
) -> None:
    a, b = _tensors(pairs)
    for ratio, same in ((0.0, a), (1.0, b)):
        assert Merge(method, {"w": a}, [{"w": b}], ratio).tensor("w").numpy().tobytes() == same.numpy().tobytes()


@given(PAIRS, RATIOS)
def test_linear_lies_between_follows_the_formula_and_leaves_its_inputs(
    pairs: list[tuple[float, float]], ratio: float
) -> None:
    a, b = _tensors(pairs)
    kept = a.clone(), b.clone()
    merged = Merge(LINEAR, {"w": a}, [{"w": b}], ratio).tensor("w")
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])
    assert merged.data_ptr() not in (a.data_ptr(), b.data_ptr())
    assert bool((torch.minimum(a, b) <= merged).all())
    assert bool((merged <= torch.maximum(a, b)).all())
    wide_a, wide_b = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    scale = max(np.abs(wide_a).max(), np.abs(wide_b).max())
    expected = (1 - ratio) * wide_a + ratio * wide_b
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6, atol=1e-6 * scale + 1e-44)  # 1e-44: subnormal


@given(PAIRS, RATIOS)
@example([(62.0, 0.0), (-9735.0, 2.0)], 0.5)
@example([(1.0, 0.125), (999578.0, 0.5)], 0.5)
def test_linear_and_slerp_are_symmetric(pairs: list[tuple[float, float]], ratio: float) -> None:
    a, b = _tensors(pairs)
    scale = float(torch.maximum(a.abs(), b.abs()).max())
    for method in (LINEAR, SLERP):
        try:
            there = Merge(method, {"w": a}, [{"w": b}], ratio).tensor("w")
            back = Merge(method, {"w": b}, [{"w": a}], 1 - ratio).tensor("w")
        except MergeError:
            assert method is SLERP
            continue
        # Nearly opposite tensors: the arc is far longer than both, so the rounding is that of the result.
        assert float((there - back).abs().max()) <= 1e-5 * max(scale, float(there.abs().max())) + 1e-30


UPDATES = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=60)


@given(UPDATES, st.floats(0.01, 1), st.floats(0, 0.5))
def test_magnitude_and_band_keep_exactly_what_a_stable_sort_keeps(
    update: list[float], density: float, gamma: float
) -> None:
    """Against another way: a stable sort by falling magnitude."""
    density = min(density, 1 - gamma)
    if density <= 0:
        return
    n = len(update)
    first = round(gamma * n)
    order = sorted(range(n), key=lambda i: -abs(update[i]))
    kept = set(order[first : first + min(round(density * n), n - first)])
    expected = [x if i in kept else 0.0 for i, x in enumerate(update)]
    got = one(Method(sparsify="band", density=density, gamma=gamma), [0.0] * n, update)
    assert [x + 0.0 for x in got] == [x + 0.0 for x in expected]


@given(st.lists(UPDATES, min_size=2, max_size=4).map(lambda us: [u[: min(map(len, us))] for u in us]))
def test_election_against_a_plain_loop(updates: list[list[float]]) -> None:
    got = one(Method(combine="elect"), [0.0] * len(updates[0]), *updates)
    for value, column in zip(got, zip(*updates, strict=True), strict=True):
        total = sum(column)
        agree = [x for x in column if x * total > 0]
        assert value == pytest.approx(sum(agree) / len(agree) if agree else 0.0, rel=1e-5, abs=1e-6)


def test_dares_expectation_and_variance() -> None:
    """E = the update, Var = update^2 (1 - density) / density; 400,000 draws, bounds of six standard errors."""
    n, density, update = 400_000, 0.8, 0.5
    got = Merge(
        Method(sparsify="random", density=density), {"w": torch.zeros(n)}, [{"w": torch.full((n,), update)}], 1.0
    )
    values = got.tensor("w").double()
    variance = update**2 * (1 - density) / density
    assert float(values.mean()) == pytest.approx(update, abs=6 * (variance / n) ** 0.5)
    assert float(values.var()) == pytest.approx(variance, rel=0.02)
    assert sorted(set(values.tolist())) == [0.0, pytest.approx(update / density)]
    plain = Merge(Method(sparsify="random", density=density, rescale=False), {"w": torch.zeros(n)}, got.tuned, 1.0)
    assert float(plain.tensor("w").double().mean()) == pytest.approx(update * density, abs=6 * (variance / n) ** 0.5)


def test_della_keeps_more_of_large_magnitudes_and_stays_unbiased() -> None:
    """Rows of 5 with fixed magnitudes 1..5 in another order: keep probabilities .3, .4, .5, .6, .7 by rank, and the
    mean of each over 40,000 rows is the update."""
    rows = 40_000
    update = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0]).repeat(rows, 1)
    method = Method(sparsify="rank", density=0.5, epsilon=0.2)
    got = Merge(method, {"w": torch.zeros(rows, 5)}, [{"w": update}], 1.0).tensor("w")
    kept = (got != 0).double().mean(0)
    expected = [0.5, 0.3, 0.7, 0.4, 0.6]
    assert kept.tolist() == pytest.approx(expected, abs=0.015)
    for column, p in enumerate(expected):
        value = float(update[0, column])
        assert set(got[:, column].tolist()) == {0.0, float(np.float32(value) * np.float32(1 / p))}
        assert float(got[:, column].double().mean()) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("name", EVERY)
def test_order_and_names_of_other_tensors_do_not_matter(name: str) -> None:
    """The same tensor gives the same bits among others, in another order (rules that rank over the whole model
    apart)."""
    models, method = _models(), EVERY[name]
    whole = _all(method, models)
    turned = _all(method, [dict(reversed(m.items())) for m in models])
    assert list(turned) == sorted(models[0])
    for key, tensor in whole.items():
        assert tensor.numpy().tobytes() == turned[key].numpy().tobytes()
        assert tensor.shape == models[0][key].shape
        assert tensor.dtype == torch.float32
        if method.scope != "model":
            alone = _all(method, [{key: m[key]} for m in models])
            assert tensor.numpy().tobytes() == alone[key].numpy().tobytes()
    if method.random:
        renamed = _all(method, [{k + "x": v for k, v in m.items()} for m in models])
        assert not torch.equal(renamed["bx"], whole["b"]) or not torch.equal(
            renamed["a.layers.0.mx"], whole["a.layers.0.m"]
        )
        assert not torch.equal(_all(method, models, seed=4)["a.layers.0.m"], whole["a.layers.0.m"])
    else:
        renamed = _all(method, [{"x" + k: v for k, v in m.items()} for m in models])
        assert all(torch.equal(renamed["x" + k], v) for k, v in whole.items())


@pytest.mark.parametrize("name", EVERY)
def test_pieces_are_no_part_of_the_result_but_for_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces: the same within the rounding of sums. (Masks are drawn a piece at a time.)"""
    method, models = EVERY[name], _models()
    if method.random:
        return
    whole = _all(method, models)
    monkeypatch.setattr(law, "PIECE", 5)
    small = _all(method, models)
    for key in whole:
        torch.testing.assert_close(small[key], whole[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_files_give_the_same_bits_as_memory(name: str, tmp_path: Path, tiny_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(law, "PIECE", 64)  # several pieces a tensor
    models = _models()
    for i, model in enumerate(models):
        write_folder(tmp_path / str(i), model, tiny_folder)
    mapped: Any = [Checkpoint(tmp_path / str(i)) for i in range(len(models))]
    memory, files = _all(EVERY[name], models), _all(EVERY[name], mapped)
    assert all(memory[k].numpy().tobytes() == files[k].numpy().tobytes() for k in memory)


@pytest.mark.parametrize("name", EVERY)
def test_each_tensor_has_its_own_ratio(name: str) -> None:
    models, method = _models(), EVERY[name]
    ratios = {"a.layers.0.m": 0.0, "b": 0.3, "c": 0.5, "d": 1.0, "e": 0.2}
    mixed = _all(method, models, ratios)
    assert torch.equal(mixed["a.layers.0.m"], models[0]["a.layers.0.m"])
    for key, ratio in ratios.items():
        assert torch.equal(mixed[key], _all(method, models, ratio)[key])


@settings(max_examples=25)
@given(st.sampled_from(sorted(set(EVERY) - {"slerp"})), RATIOS)
def test_the_law_is_linear_in_the_ratio(name: str, ratio: float) -> None:
    models = _models()
    whole, part = _all(EVERY[name], models, 1.0), _all(EVERY[name], models, ratio)
    for key, base in models[0].items():
        torch.testing.assert_close(part[key], base + ratio * (whole[key] - base), rtol=1e-5, atol=1e-6)


def test_density_1_keeps_everything() -> None:
    models = _models()
    plain = _all(Method(combine="elect"), models)
    for sparsify in ("random", "magnitude", "rank", "band"):
        kept = _all(Method(sparsify=sparsify, combine="elect"), models)
        assert all(torch.equal(kept[k], plain[k]) for k in plain)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_arithmetic_is_in_float32_whatever_the_inputs() -> None:
    a, b = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    merged = Merge(LINEAR, {"w": a}, [{"w": b}], 0.5).tensor("w")
    assert merged.dtype == torch.float32
    assert merged.item() == 1.00390625  # 1 + 2^-7 / 2: halfway between two neighbours in bfloat16


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    x, y = torch.zeros(2), torch.zeros(3)
    with pytest.raises(PolicyError, match=r"missing \['b'\], unexpected \['c'\]"):
        Merge(LINEAR, {"a": x, "b": x}, [{"a": x, "c": x}], 0.5)
    with pytest.raises(PolicyError, match=r"^a: the tuned weights has shape \(3,\), the anchor \(2,\)"):
        Merge(LINEAR, {"a": x}, [{"a": y}], 0.5)
    with pytest.raises(MergeError, match=r"merge\.weights: 1 weights for 2 tuned models"):
        Merge(Method(weights=(1.0,)), {"a": x}, [{"a": x}] * 2, 0.5)
    with pytest.raises(MergeError, match="between the anchor and one tuned model, got 2"):
        Merge(SLERP, {"a": x}, [{"a": x}] * 2, 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("side", "said"), [(0, "the anchor"), (1, "the tuned weights")])
@pytest.mark.parametrize("name", sorted(set(EVERY) - {"task_arithmetic"}))
def test_weights_that_are_not_finite_name_the_tensor(name: str, bad: float, side: int, said: str) -> None:
    models = _models(many=1 if EVERY[name].combine == "slerp" else 2)
    models[side]["a.layers.0.m"][3, 3] = bad
    with pytest.raises(MergeError, match=rf"a\.layers\.0\.m: {said} hold values that are not finite"):
        _all(EVERY[name], models)


def test_a_sum_that_overflows_is_no_reason_to_refuse_finite_weights() -> None:
    large = {"w": torch.full((4,), 2e38)}
    assert Merge(LINEAR, large, [large], 0.5).tensor("w").tolist() == large["w"].tolist()


def test_whole_numbers_must_be_the_same() -> None:
    a, b = {"ids": torch.arange(3)}, {"ids": torch.tensor([0, 1, 3])}
    assert Merge(LINEAR, a, [dict(a)], 0.5).tensor("ids").tolist() == [0, 1, 2]
    with pytest.raises(MergeError, match=r"^ids: is of torch.int64, no floating-point weights, and differs"):
        Merge(LINEAR, a, [b], 0.5).all()


# --- ratios --------------------------------------------------------------------------------------------------------

NAMES = [
    "model.embed_tokens.weight", *(f"model.layers.{i}.{m}" for i in range(3) for m in (
        "self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")),
    "model.norm.weight", "lm_head.weight",
]  # fmt: skip


def test_ratios_over_depth_modules_and_rows() -> None:
    got = tensor_ratios(NAMES, 0.5, layers=[0.0, 1.0])
    assert [got[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.0, 0.25, 0.5]
    assert (got["model.embed_tokens.weight"], got["model.norm.weight"], got["lm_head.weight"]) == (0.0, 0.5, 0.5)
    got = tensor_ratios(NAMES, 0.5, layers=[1.0, 0.0, 0.5, 0.5, 2.0])  # layer 1 is halfway: the third value
    assert [got[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.5, 0.25, 1.0]
    got = tensor_ratios(NAMES, 0.5, modules=[("q", 0.0), (r"layers\.1\.", 2.0), (r"norm\.", 0.5)])
    assert got["model.layers.1.self_attn.q_proj.weight"] == 0.0  # the first that fits counts
    assert got["model.layers.1.mlp.up_proj.weight"] == 1.0
    assert got["model.layers.0.input_layernorm.weight"] == got["model.norm.weight"] == 0.25
    assert got["lm_head.weight"] == 0.5
    got = tensor_ratios(NAMES, 0.5, rows={"layer_02": 0.2, "head": 0.0})
    assert got["model.layers.2.mlp.up_proj.weight"] == pytest.approx(0.1)
    assert (got["lm_head.weight"], got["model.norm.weight"]) == (0.0, 0.5)


def test_a_kind_is_no_pattern() -> None:
    """`o` and `norm` stand in nearly every name."""
    names = [*NAMES, *(f"model.layers.0.{n}.weight" for n in ("self_attn.o_proj", "self_attn.k_proj", "mlp.down_proj"))]
    for kind in ("q", "o", "k", "up", "down", "norms", "embed", "norm", "head"):
        got = tensor_ratios(names, 1.0, modules=[(kind, 0.0)])
        assert {n for n in names if got[n] == 0} == {n for n in names if place_of(n)[1] == kind} != set()


def test_ratios_that_cannot_be_are_named() -> None:
    with pytest.raises(MergeError, match=r"layers\.2\..*0\.5 x 3 = 1\.5; ratios are from 0 to 1"):
        tensor_ratios(NAMES, 0.5, layers=[1.0, 3.0])
    with pytest.raises(MergeError, match=r"modules: no tensor fits 'qproj'; expected a kind \(qkv, q, k"):
        tensor_ratios(NAMES, 0.5, modules=[("q", 1.0), ("qproj", 0.0)])


def test_over_time() -> None:
    assert [over_time([1.0, 0.5], t, 3) for t in (1, 2, 3, 9)] == [1.0, 0.75, 0.5, 0.5]
    assert over_time([0.3], 2, 5) == 0.3
    assert over_time([1.0, 0.5], 1, 1) == 0.5  # one round is the last one


def test_factors_from_importance_and_angle() -> None:
    means = {"layer_00": 3.0, "layer_01": 1.0, "layer_02": 2.0}
    assert by_importance(means, 0.5) == {"layer_00": 1.5, "layer_01": 0.5, "layer_02": 1.0}
    assert by_importance(means, -1.0) == {"layer_00": 0.0, "layer_01": 2.0, "layer_02": 1.0}
    equal = by_importance({"layer_00": 1.0, "layer_01": 1.0, "layer_02": 5.0}, 0.5)
    assert equal == {"layer_00": 0.75, "layer_01": 0.75, "layer_02": 1.5}
    assert by_importance({"layer_00": 1.0}, 1.0) == {"layer_00": 1.0}
    assert by_angle({"a": 1.0, "b": 1 / 3, "c": -0.2, "d": None}) == {
        "a": 1.0,
        "b": pytest.approx(0.5),
        "c": 0.0,
        "d": 1.0,
    }


# --- events --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "every", "expected"),
    [
        (1, 1, [1]), (3, 1, [1, 2, 3]), (5, 2, [2, 4, 5]), (4, 2, [2, 4]), (3, "last", [3]), (1, "last", [1]),
        (2, 5, [2]),
    ],
)  # fmt: skip
def test_events(epochs: int, every: Any, expected: list[int]) -> None:
    assert events(epochs, every) == expected


@pytest.mark.parametrize(
    ("ratios", "epochs", "at", "expected"),
    [
        ([0.5], 1, [1], 0.5),
        ([0.5], 3, [3], 0.5),  # one event takes the same share of every epoch's update
        ([0.5, 0.5], 2, [1, 2], 0.375),  # epoch 1 meets 2 events, epoch 2 meets 1: (1/4 + 1/2) / 2
        ([0.5, 0.5, 0.5], 5, [2, 4, 5], 0.25),  # (1/8 + 1/8 + 1/4 + 1/4 + 1/2) / 5
        ([1.0, 0.4], 2, [1, 2], 0.4),
        ([0.5, 1.0], 2, [1, 2], 0.75),  # (1/2 + 1) / 2
    ],
)
def test_effective_ratio(ratios: list[float], epochs: int, at: list[int], expected: float) -> None:
    assert effective_ratio(ratios, epochs, at) == pytest.approx(expected, abs=1e-15)


# --- the drift of the loop, spec section 2 -------------------------------------------------------------------------

MOVES = (2e-4, -1e-4, 4e-4)  # made-up updates u_1, u_2, u_3 of every weight
ALPHA = 0.25
DRIFTS = {
    # start=merged, anchor=base: sum_s alpha^(t-s+1) u_s; round 2: .0625 * 2e-4 + .25 * -1e-4
    ("merged", "base"): (0.25 * 2e-4, 0.0625 * 2e-4 - 0.25e-4, 0.015625 * 2e-4 - 0.0625e-4 + 0.25 * 4e-4),
    # start=base: alpha u_t
    ("base", "base"): (0.25 * 2e-4, 0.25 * -1e-4, 0.25 * 4e-4),
    # start=tuned: alpha sum_s u_s
    ("tuned", "base"): (0.25 * 2e-4, 0.25 * 1e-4, 0.25 * 5e-4),
    # anchor=previous, start=merged: alpha sum_s u_s
    ("merged", "previous"): (0.25 * 2e-4, 0.25 * 1e-4, 0.25 * 5e-4),
    # anchor=mean: d_t = (1 - alpha) mean(d_0..d_{t-1}) + alpha (d_{t-1} + u_t), d_0 = 0:
    # d_1 = .25 * 2e-4 = 5e-5
    # d_2 = .75 * 2.5e-5 + .25 (5e-5 - 1e-4) = 6.25e-6
    # d_3 = .75 (5e-5 + 6.25e-6) / 3 + .25 (6.25e-6 + 4e-4) = 1.40625e-5 + 1.015625e-4
    ("merged", "mean"): (5e-5, 6.25e-6, 1.15625e-4),
}


@pytest.mark.parametrize(("start", "anchor"), DRIFTS)
def test_drift_law(start: str, anchor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter(MOVES)

    def update(policy: Policy, *_: object, **__: object) -> Fitted:
        u = next(rounds)
        policy.set_weights({name: w + u for name, w in policy.weights().items()})
        return Fitted([0.0], [], [], 1)

    monkeypatch.setattr(stages, "fit", update)
    run_here(
        tmp_path / "run", "rounds=3", f"sft.start={start}", f"merge.anchor={anchor}", f"merge.ratio={ALPHA}",
        "merge.every_n_epochs=last", "suite.pre_merge=false", "suite.pass_k_n=0", f"store.dir={tmp_path / 'store'}",
    )  # fmt: skip
    base = read_weights(LAB_SMALL)
    for t, expected in enumerate(DRIFTS[start, anchor], 1):
        now = read_weights(tmp_path / "run" / "rounds" / f"{t:02d}" / "model")
        drift = torch.cat([(now[name].double() - base[name].double()).flatten() for name in base])
        # rounding is at most half a unit in the last place of a weight of size up to about 4, a few times over
        assert float(drift.median()) == pytest.approx(expected, abs=2e-7)
        assert float((drift - expected).abs().max()) < 5e-6
    assert next(rounds, None) is None

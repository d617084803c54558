"""Merge rules, events, the callback inside a real fit, and the drift that the spec derives for the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import run_here
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from itermerge import merging, stages
from itermerge.merging import MergeCallback, MergeError, effective_ratio, events, linear, merge, merge_tensor
from itermerge.policy import Policy
from itermerge.sft import Example, FitSpec, fit
from itermerge.weights import PolicyError, read_weights

NUMBERS = st.floats(-1e6, 1e6, width=32)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40)
RATIOS = st.floats(0, 1)


def _tensors(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    a, b = zip(*pairs, strict=True)
    return torch.tensor(a), torch.tensor(b)


def test_linear_by_hand() -> None:
    # 1 + 0.25 (5 - 1) = 2, -2 + 0.25 (2 + 2) = -1, 3 + 0.25 * 0 = 3
    merged = linear(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([5.0, 2.0, 3.0]), 0.25)
    assert merged.tolist() == [2.0, -1.0, 3.0]


@given(PAIRS)
def test_ratio_0_is_the_anchor_and_ratio_1_the_tuned_model_bit_for_bit(pairs: list[tuple[float, float]]) -> None:
    a, b = _tensors(pairs)
    assert linear(a, b, 0.0).numpy().tobytes() == a.numpy().tobytes()
    assert linear(a, b, 1.0).numpy().tobytes() == b.numpy().tobytes()


@given(PAIRS, RATIOS)
def test_merged_lies_between_follows_the_formula_and_leaves_its_inputs(
    pairs: list[tuple[float, float]], ratio: float
) -> None:
    a, b = _tensors(pairs)
    kept = a.clone(), b.clone()
    merged = merge("linear", {"w": a}, {"w": b}, ratio)["w"]
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])
    assert merged.data_ptr() not in (a.data_ptr(), b.data_ptr())
    assert bool((torch.minimum(a, b) <= merged).all())
    assert bool((merged <= torch.maximum(a, b)).all())
    wide_a, wide_b = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    scale = max(np.abs(wide_a).max(), np.abs(wide_b).max())
    expected = (1 - ratio) * wide_a + ratio * wide_b
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-6, atol=1e-6 * scale + 1e-44)  # 1e-44: subnormal


def test_arithmetic_is_in_float32_whatever_the_inputs() -> None:
    a, b = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    merged = merge("linear", {"w": a}, {"w": b}, 0.5)["w"]
    assert merged.dtype == torch.float32
    assert merged.item() == 1.00390625  # 1 + 2^-7 / 2: halfway between two neighbours in bfloat16


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    one, two = torch.zeros(2), torch.zeros(3)
    with pytest.raises(PolicyError, match=r"missing \['b'\], unexpected \['c'\]"):
        merge("linear", {"a": one, "b": one}, {"a": one, "c": one}, 0.5)
    with pytest.raises(PolicyError, match=r"^a: the tuned weights has shape \(3,\), the anchor \(2,\)"):
        merge("linear", {"a": one}, {"a": two}, 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["anchor", "tuned"])
def test_a_result_that_is_not_finite_names_the_tensor(bad: float, side: str) -> None:
    good, broken = {"x.weight": torch.ones(2)}, {"x.weight": torch.tensor([1.0, bad])}
    with pytest.raises(MergeError, match=r"x\.weight: .*not finite"):
        merge("linear", broken if side == "anchor" else good, good if side == "anchor" else broken, 0.5)


def test_mean_of_models() -> None:
    models = [{"w": torch.tensor([float(v), -2.0 * v])} for v in (1, 2, 6)]
    assert merging.mean(models)["w"].tolist() == [3.0, -6.0]  # (1 + 2 + 6) / 3 = 3


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
    ("ratio", "epochs", "at", "expected"),
    [
        (0.5, 1, [1], 0.5),
        (0.5, 3, [3], 0.5),  # one event takes the same share of every epoch's update
        (0.5, 2, [1, 2], 0.375),  # epoch 1 meets 2 events, epoch 2 meets 1: (1/4 + 1/2) / 2
        (0.5, 5, [2, 4, 5], 0.25),  # (1/8 + 1/8 + 1/4 + 1/4 + 1/2) / 5
        (1.0, 4, [1, 2, 3, 4], 1.0),
        (0.0, 2, [1, 2], 0.0),
    ],
)
def test_effective_ratio(ratio: float, epochs: int, at: list[int], expected: float) -> None:
    assert effective_ratio(ratio, epochs, at) == pytest.approx(expected, abs=1e-15)


# --- the callback in a fit -----------------------------------------------------------------------------------------

SPEC = FitSpec(
    epochs=3, lr=1e-2, batch_size=2, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.999),
    max_length=64, accelerator="cpu", devices=1, precision="32-true", accumulate_grad_batches=1, gradient_clip_val=0.0,
    deterministic=True,
)  # fmt: skip
EXAMPLES = [Example([5 + i, 6], [7, 8 + i, 1]) for i in range(4)]  # two batches an epoch


class _Spy(pl.Callback):
    """Copies the weights, and the number of steps that AdamW's moments have seen, at each epoch's end."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moment_steps: list[set[int]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = pl_module.model
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        self.moment_steps.append({int(s["step"]) for s in trainer.optimizers[0].state.values()})


def _fit(policy: Policy, tmp_path: Path, at: list[int], ratio: float, reset: bool) -> tuple[Any, ...]:
    anchor = {name: torch.full_like(w, 0.01) for name, w in policy.weights().items()}
    before, after, merger = _Spy(), _Spy(), MergeCallback("linear", anchor, ratio, at, reset)
    fit(policy, EXAMPLES, SPEC, seed=0, callbacks=[before, merger, after], scratch=tmp_path)
    return anchor, before, after, merger


@pytest.mark.parametrize("reset", [True, False])
def test_an_event_moves_the_weights_and_the_fit_goes_on_from_there(tiny: Policy, tmp_path: Path, reset: bool) -> None:
    anchor, before, after, merger = _fit(tiny, tmp_path, [2, 3], 0.25, reset)
    assert merger.done == [2, 3]
    for name, base in anchor.items():
        assert torch.equal(before.weights[0][name], after.weights[0][name])  # no event after epoch 1
        for epoch in (1, 2):
            tuned = before.weights[epoch][name].double().numpy()
            expected = 0.75 * base.double().numpy() + 0.25 * tuned
            np.testing.assert_allclose(after.weights[epoch][name].numpy(), expected, rtol=1e-5, atol=1e-8)
            assert np.abs(tuned - expected).max() > 1e-4  # the event did something
        # the third epoch moved each weight by at most lr a step from where the event had put it; Adam's factor is
        # below 1 / (1 - 0.9)
        moved = (before.weights[2][name] - after.weights[1][name]).abs().max()
        assert moved <= 2 * SPEC.lr * 10
        assert torch.equal(tiny.weights()[name], after.weights[2][name])
    # two steps an epoch: the moments have seen 2, 4 and 6 steps, or start again after the event of epoch 2
    assert before.moment_steps == [{2}, {4}, {2} if reset else {6}]
    assert after.moment_steps == ([{2}, set(), set()] if reset else [{2}, {4}, {6}])


def test_an_event_at_ratio_0_gives_the_anchor_bit_for_bit(tiny: Policy, tmp_path: Path) -> None:
    anchor, *_ = _fit(tiny, tmp_path, [3], 0.0, True)
    assert all(torch.equal(tiny.weights()[name], anchor[name]) for name in anchor)


def test_frozen_tensors_are_not_merged(tiny: Policy, tmp_path: Path) -> None:
    name, frozen = next(iter(tiny.model.named_parameters()))
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()
    _fit(tiny, tmp_path, [1, 2, 3], 0.5, True)
    assert torch.equal(tiny.weights()[name], kept)


def test_an_event_that_breaks_the_weights_ends_the_fit_with_the_tensors_name(tiny: Policy, tmp_path: Path) -> None:
    anchor = {name: torch.full_like(w, torch.inf) for name, w in tiny.weights().items()}
    with pytest.raises(MergeError, match=r"model\.\S+: .*not finite"):
        fit(tiny, EXAMPLES, SPEC, seed=0, callbacks=[MergeCallback("linear", anchor, 0.5, [1], True)], scratch=tmp_path)


def test_the_callbacks_state_survives_a_checkpoint() -> None:
    one = MergeCallback("linear", {}, 0.5, [1, 2], True)
    one.done.append(1)
    two = MergeCallback("linear", {}, 0.5, [1, 2], True)
    two.load_state_dict(one.state_dict())
    one.done.append(2)
    assert two.done == [1]


def test_merge_tensor_matches_merge() -> None:
    a, b = torch.randn(5), torch.randn(5)
    assert torch.equal(merge_tensor("linear", "w", a, b, 0.3), merge("linear", {"w": a}, {"w": b}, 0.3)["w"])


# --- the drift of the loop, spec section 2 -------------------------------------------------------------------------

UPDATES = (2e-4, -1e-4, 4e-4)  # made-up updates u_1, u_2, u_3 of every weight
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
    rounds = iter(UPDATES)

    def update(policy: Policy, *_: object, **__: object) -> list[float]:
        u = next(rounds)
        policy.set_weights({name: w + u for name, w in policy.weights().items()})
        return [0.0]

    monkeypatch.setattr(stages, "fit", update)
    run_here(
        tmp_path / "run", "rounds=3", f"sft.start={start}", f"merge.anchor={anchor}", f"merge.ratio={ALPHA}",
        "merge.every_n_epochs=last", "suite.pre_merge=false", "suite.pass_k_n=0", f"store.dir={tmp_path / 'store'}",
    )  # fmt: skip
    base = read_weights(stages.LAB_SEED0)
    for t, expected in enumerate(DRIFTS[start, anchor], 1):
        now = read_weights(tmp_path / "run" / "rounds" / f"{t:02d}" / "model")
        drift = torch.cat([(now[name].double() - base[name].double()).flatten() for name in base])
        # rounding is at most half a unit in the last place of a weight of size up to about 4, a few times over
        assert float(drift.median()) == pytest.approx(expected, abs=2e-7)
        assert float((drift - expected).abs().max()) < 5e-6
    assert next(rounds, None) is None

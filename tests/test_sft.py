"""The fit: labels, loss, schedule, modes, and how it ends when something goes wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import enliven

from itermerge import sft
from itermerge.policy import Policy
from itermerge.sft import (
    Example,
    FitSpec,
    LanguageModel,
    SftError,
    batch_of,
    collate,
    completion_loss,
    fit,
    lr_factor,
    short_enough,
)
from itermerge.weights import digest_weights

SPEC = FitSpec(
    epochs=2, lr=1e-3, batch_size=2, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.999),
    max_length=64, accelerator="cpu", devices=1, precision="32-true", accumulate_grad_batches=1, gradient_clip_val=1.0,
    deterministic=True,
)  # fmt: skip
EXAMPLES = [Example([5 + i, 6, 7][: 1 + i % 3], [7, 8 + i, 1]) for i in range(5)]  # 3 batches an epoch


class _OnBatch(pl.Callback):
    """Runs `act(trainer, module, batch, index)` before each batch."""

    def __init__(self, act: Callable[[pl.Trainer, Any, Any, int], None]) -> None:
        self.act = act

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.act(trainer, pl_module, batch, batch_idx)


def test_labels_when_pad_is_eos() -> None:
    """Token 1 is both: the eos of a completion is learned, padding is neither read nor learned."""
    batch = collate([Example([5, 6], [7, 1]), Example([5], [1])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 1], [-100, 1, -100, -100]]


def test_loss_is_the_mean_cross_entropy_of_completion_tokens_alone(tiny: Policy) -> None:
    examples = [Example([5, 6, 7, 8], [9, 1]), Example([10], [11, 12, 13, 1])]
    enliven(tiny)  # away from uniform predictions, whose loss is log 53 on any tokens
    losses = []
    for e in examples:  # each alone, no padding
        ids = [*e.prompt, *e.completion]
        with torch.inference_mode():
            logits = tiny.model(torch.tensor([ids])).logits[0].double().numpy()
        for at in range(len(e.prompt), len(ids)):  # the token at `at` is predicted from position at - 1
            row = logits[at - 1]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[at]])
    assert len(losses) == 2 + 4
    module = LanguageModel(tiny.model, SPEC, steps=1)
    got = module.training_step(batch_of(examples, pad_id=1), 0)
    assert float(got.detach()) == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert abs(np.mean(losses) - np.log(53)) > 0.1


HEAD = [20, 5, 21, 6, 22, 7, 23, 8, 24, 9]
HEADED = [  # rows that begin alike, of different lengths: ten common tokens, then their own
    Example([*HEAD, 30], [31, 1]), Example([*HEAD, 32, 33, 34], [35, 36, 1]), Example(HEAD, [37, 38, 39, 40, 1]),
]  # fmt: skip


def _loss_and_gradients(policy: Policy, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    policy.model.zero_grad()
    loss = completion_loss(policy.model, batch)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in policy.model.named_parameters()}


def test_a_head_that_is_computed_once_changes_neither_loss_nor_gradient(
    tiny: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    enliven(tiny).model.double().train()
    batch = collate(HEADED, pad_id=0)
    # the third row's first label stands at column 10, whose logits are those of column 9: nine columns may be shared
    assert sft.shared_columns(tiny.model, batch["input_ids"], 9) == 9
    loss, gradients = _loss_and_gradients(tiny, batch)
    monkeypatch.setattr(sft, "SHARED_FROM", 1000)
    assert sft.shared_columns(tiny.model, batch["input_ids"], 9) == 0
    plain_loss, plain = _loss_and_gradients(tiny, batch)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():  # norms and rotations are computed in float32 whatever the dtype
        assert (gradients[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def test_a_head_is_not_shared_where_it_is_short_different_or_dropped_out(tiny: Policy) -> None:
    ids = collate(HEADED, pad_id=0)["input_ids"]
    assert sft.shared_columns(tiny.model, ids, 7) == 0  # below SHARED_FROM
    assert sft.shared_columns(tiny.model, ids[:1], 9) == 0  # one row has nobody to share with
    other = ids.clone()
    other[1, 8] += 1
    assert sft.shared_columns(tiny.model, other, 9) == 8
    tiny.model.config.attention_dropout = 0.1  # as a rate in the config, with no module that shows it
    assert sft.shared_columns(tiny.model.train(), ids, 9) == 0
    assert sft.shared_columns(tiny.model.eval(), ids, 9) == 9


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_each_precision(tiny: Policy, tmp_path: Path, precision: str) -> None:
    """Clipped to a norm so small that AdamW's epsilon swallows them, gradients move nothing; whole ones do."""
    enliven(tiny)
    before = {n: w.clone() for n, w in tiny.weights().items()}
    moved = []
    for clip in (1e-12, 1.0):
        tiny.set_weights(before)
        fit(tiny, EXAMPLES, replace(SPEC, precision=precision, gradient_clip_val=clip), seed=0, scratch=tmp_path)
        moved.append(max(float((w - before[n]).abs().max()) for n, w in tiny.weights().items()))
        assert {w.dtype for w in tiny.weights().values()} == {torch.float32}
    assert moved[0] < 1e-5 < 1e-3 < moved[1]


def test_lr_factor_by_hand() -> None:
    spec = replace(SPEC, warmup_ratio=0.2)  # 2 of 10 steps warm up
    linear, cosine = replace(spec, schedule="linear"), replace(spec, schedule="cosine")
    for s in (spec, linear, cosine):
        assert [lr_factor(t, 10, s) for t in (0, 1, 2)] == pytest.approx([1 / 3, 2 / 3, 1])
    # step 4 is 2 of 8 steps past the warm-up: 1 - 1/4, and (1 + cos(pi/4)) / 2 = .853553
    assert [lr_factor(4, 10, s) for s in (spec, linear, cosine)] == pytest.approx([1, 0.75, 0.8535533906])
    # step 6 is half-way: 1/2 both; the last step is 9: 7/8
    assert [lr_factor(6, 10, s) for s in (spec, linear, cosine)] == pytest.approx([1, 0.5, 0.5])
    assert lr_factor(9, 10, linear) == pytest.approx(0.125)
    assert lr_factor(0, 1, replace(spec, warmup_ratio=1.0)) == 0.5  # the only step is warm-up: 1 of 2
    assert lr_factor(0, 10, replace(linear, warmup_ratio=0.0)) == 1


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 4)])
def test_the_schedule_runs_over_the_optimizers_steps(tiny: Policy, tmp_path: Path, accumulate: int, steps: int) -> None:
    # 3 batches an epoch, 2 epochs: 6 steps; in pairs 2 steps an epoch (a pair and a rest): 4
    spec = replace(SPEC, schedule="linear", accumulate_grad_batches=accumulate)
    seen: dict[int, float] = {}
    look = _OnBatch(lambda t, *_: seen.__setitem__(t.global_step, t.optimizers[0].param_groups[0]["lr"]))
    fit(tiny, EXAMPLES, spec, seed=0, callbacks=[look], scratch=tmp_path)
    assert list(seen) == list(range(steps))
    assert list(seen.values()) == pytest.approx([spec.lr * (1 - s / steps) for s in range(steps)])


def test_dropout_works_while_fitting_and_not_after(tmp_path: Path, write_variant: Callable[..., Path]) -> None:
    policy = Policy(write_variant({"config.json": {"attention_dropout": 0.5}}))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    twice: list[bool] = []

    def look(_: pl.Trainer, module: Any, *__: object) -> None:
        assert module.model.training
        with torch.no_grad():
            twice.append(torch.equal(module.model(ids).logits, module.model(ids).logits))

    assert not policy.model.training
    fit(policy, EXAMPLES, SPEC, seed=0, callbacks=[_OnBatch(look)], scratch=tmp_path)
    assert twice == [False] * 6
    assert not policy.model.training
    with torch.no_grad():
        assert torch.equal(policy.model(ids).logits, policy.model(ids).logits)


def test_a_fit_learns_and_gives_the_mean_loss_of_each_epoch(tiny: Policy, tmp_path: Path) -> None:
    seen: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(float(outputs["loss"]))

    ticks: list[int] = []
    spec = replace(SPEC, epochs=3, lr=1e-2)
    losses = fit(tiny, EXAMPLES, spec, seed=0, callbacks=[Losses()], scratch=tmp_path, on_progress=ticks.append).losses
    assert losses == pytest.approx([sum(seen[at : at + 3]) / 3 for at in (0, 3, 6)])
    assert losses[0] > losses[1] > losses[2]
    assert ticks == [1] * 9


def test_every_example_is_seen_once_an_epoch_in_another_order(tiny: Policy, tmp_path: Path) -> None:
    rows: list[list[int]] = []
    look = _OnBatch(lambda _, __, batch, ___: rows.extend(r for p in batch["pieces"] for r in p["input_ids"].tolist()))
    fit(tiny, EXAMPLES, SPEC, seed=1, callbacks=[look], scratch=tmp_path)
    trimmed = [tuple(r[: max(i for i, t in enumerate(r) if t == 1) + 1]) for r in rows]  # up to eos
    expected = sorted((*e.prompt, *e.completion) for e in EXAMPLES)
    assert sorted(trimmed[:5]) == sorted(trimmed[5:]) == expected
    assert trimmed[:5] != trimmed[5:]


def _digest_after(folder: Path, scratch: Path, seed: int, **changes: Any) -> tuple[str, list[float]]:
    policy = Policy(folder)
    losses = fit(policy, EXAMPLES, replace(SPEC, **changes), seed=seed, scratch=scratch)
    return digest_weights(policy.weights()), losses


def test_the_same_fit_gives_the_same_bits(tmp_path: Path, write_variant: Callable[..., Path]) -> None:
    folder = write_variant({"config.json": {"attention_dropout": 0.5}})
    one = _digest_after(folder, tmp_path, 3)
    torch.manual_seed(99)  # what ran before does not matter
    assert _digest_after(folder, tmp_path, 3) == one
    assert _digest_after(folder, tmp_path, 4) != one
    assert _digest_after(folder, tmp_path, 3, lr=2e-3)[0] != one[0]


@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (1, 1)])
def test_a_loss_that_is_not_finite_names_epoch_and_batch(tiny: Policy, tmp_path: Path, epoch: int, batch: int) -> None:
    def spoil(trainer: pl.Trainer, module: Any, _: object, index: int) -> None:
        if (trainer.current_epoch, index) == (epoch, batch):
            with torch.no_grad():
                next(module.model.parameters()).fill_(torch.nan)

    with pytest.raises(SftError, match=rf"loss is nan in epoch {epoch + 1}, batch {batch + 1}; lower sft\.lr"):
        fit(tiny, EXAMPLES, SPEC, seed=0, callbacks=[_OnBatch(spoil)], scratch=tmp_path)
    assert not tiny.model.training


def test_an_example_that_is_too_long(tiny: Policy, tmp_path: Path) -> None:
    with pytest.raises(SftError, match=r"an example has 65 tokens; sft\.max_length is 64 and .* context 256\."):
        fit(tiny, [Example([5] * 60, [6] * 5)], SPEC, seed=0, scratch=tmp_path)
    with pytest.raises(SftError, match=r"an example has 300 tokens; sft\.max_length is 512 and .* context 256\."):
        fit(tiny, [Example([5] * 295, [6] * 5)], replace(SPEC, max_length=512), seed=0, scratch=tmp_path)
    fit(tiny, [Example([5] * 60, [6] * 4)], replace(SPEC, epochs=1), seed=0, scratch=tmp_path)


def test_examples_that_are_short_enough() -> None:
    examples = [Example([5] * n, [6] * 4) for n in (7, 6, 8, 5)]
    assert short_enough(examples, 10) == [examples[1], examples[3]]  # of 10 and 9 tokens
    with pytest.raises(SftError, match=r"all 4 examples have more than 8 tokens; raise sft\.max_length"):
        short_enough(examples, 8)


@pytest.mark.parametrize("how", ["raised", "signal"])
def test_ctrl_c_surfaces_as_keyboard_interrupt_and_gives_the_handler_back(
    tiny: Policy, tmp_path: Path, how: str
) -> None:
    def interrupt(_: object, __: object, ___: object, index: int) -> None:
        if index == 1:
            if how == "raised":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny, EXAMPLES, SPEC, seed=0, callbacks=[_OnBatch(interrupt)], scratch=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert not tiny.model.training


def test_a_fit_leaves_no_files_and_no_global_switches(tiny: Policy, tmp_path: Path) -> None:
    fit(tiny, EXAMPLES, SPEC, seed=0, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not torch.are_deterministic_algorithms_enabled()

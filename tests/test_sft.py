"""The fit: labels, loss, schedule, modes, and how it ends when something goes wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import enliven
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)  # fmt: skip

from itermerge import packing as packing_module
from itermerge import sft
from itermerge.packing import ChunkedLoss, can_pack, packing, plain_head
from itermerge.policy import Policy
from itermerge.sft import (
    Example,
    FitSpec,
    LanguageModel,
    LoraSpec,
    SftError,
    batch_of,
    checkpointing,
    collate,
    completion_loss,
    cut,
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


# --- pieces, one row, chunks: the same loss and gradient ------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=53, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
        )
    ),  # positions are learned
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),  # logits are divided
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=4)),  # logits are capped
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=53, hidden_size=16, num_hidden_layers=2, state_size=4)),
}  # fmt: skip
PACKS = {"llama": True, "gpt2": True, "granite": True, "mistral": False, "gemma2": False, "mamba": False}
PLAIN = {"llama": True, "gpt2": True, "granite": False, "mistral": True, "gemma2": False, "mamba": True}
UNEVEN = [  # eight rows of 4 to 32 tokens, no two alike
    Example([5 + i, 9, *range(10, 10 + 4 * i)], [*[40 - i, 8 + i][: 1 + i % 2], 1]) for i in range(7)
] + [Example([30, 31], [32, 33])]  # fmt: skip


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.4, generator=draw)
    return model


def _sample(model: Any) -> list[Any]:
    return sft._sample(UNEVEN[5], SimpleNamespace(pad_id=0, device=torch.device("cpu")))  # pyright: ignore


def _step(model: Any, examples: list[Example], *, packed: bool, chunked: bool = False) -> tuple[float, dict[str, Any]]:
    """The loss of a training step, and its gradients."""
    model.train().zero_grad()
    with packing(model) if packed else nullcontext():
        loss = LanguageModel(model, SPEC, 1, packed=packed, chunked=chunked).training_step(batch_of(examples, 0), 0)
        loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _padded(model: Any, examples: list[Example]) -> tuple[float, dict[str, Any]]:
    """The same of the whole batch, padded on the right, each logit computed, by transformers alone."""
    model.train().zero_grad()
    batch = collate(examples, 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _same(one: tuple[float, dict[str, Any]], other: tuple[float, dict[str, Any]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=2e-6)
    assert one[1].keys() == other[1].keys()
    most = max(float(g.abs().max()) for g in other[1].values())
    for name, gradient in other[1].items():
        assert (one[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7 * most, name


def test_pieces_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths 2, 3, 3, 9: in one piece 4 x 9 = 36 tokens; in two 3 x 3 + 9 = 18; in three 2 + 2 x 3 + 9 = 17."""
    rows = [Example([1] * (n - 1), [2]) for n in (3, 9, 2, 3)]
    for extra, lengths in ((0, [[2], [3, 3], [9]]), (2, [[2, 3, 3], [9]]), (20, [[2, 3, 3, 9]])):
        monkeypatch.setattr(sft, "PIECE", extra)
        assert [[len(e) for e in piece] for piece in cut(rows)] == lengths


@given(st.lists(st.integers(1, 40), min_size=1, max_size=24), st.integers(0, 60))
def test_pieces_hold_each_example_once_and_cost_no_more_than_one(lengths: list[int], extra: int) -> None:
    rows = [Example([i] * n, [2]) for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "PIECE", extra)
        pieces = cut(rows)
    assert sorted(id(e) for piece in pieces for e in piece) == sorted(map(id, rows))
    cost = sum(len(piece) * max(map(len, piece)) + extra for piece in pieces)
    assert cost <= len(rows) * max(map(len, rows)) + extra


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_has_the_loss_and_gradient_of_the_padded_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, headed = _model(kind), [*HEADED, Example([*HEAD, 44, 45, 46, 47, 48, 49], [2, 1])]
    monkeypatch.setattr(sft, "PIECE", 4)
    assert len(cut(UNEVEN)) > 2
    assert can_pack(model, _sample(model)) is PACKS[kind]
    for examples in (UNEVEN, headed):  # what rows begin with is common in the second alone
        expected = _padded(model, examples)
        for packed in {False, PACKS[kind]}:
            _same(_step(model, examples, packed=packed), expected)


def test_examples_in_one_row_do_not_see_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens in all other examples, the same logits to the last bit, and some where its own are others."""
    monkeypatch.setattr(sft, "PIECE", 4)
    model = _model("llama").eval()

    def logits(examples: list[Example]) -> torch.Tensor:
        with packing(model), torch.no_grad():
            ((out, _),) = sft.predictions(model, batch_of(examples, 0)["pieces"], packed=True)
        return out

    one = logits(UNEVEN)
    changed = [UNEVEN[0], *(Example([51] * len(e.prompt), [50] * len(e.completion)) for e in UNEVEN[1:])]
    at = [len(e) for e in sorted(UNEVEN, key=len)].index(len(UNEVEN[0]))
    other, before = logits(changed), sum(len(e.completion) for e in sorted(UNEVEN, key=len)[:at])
    rows = slice(before, before + len(UNEVEN[0].completion))
    assert torch.equal(one[rows], other[rows])
    assert not torch.equal(one, other)


def test_a_model_that_sees_its_neighbours_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama")
    assert can_pack(model, _sample(model))
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(packing_module, "keeps_every_key", lambda _: True)
    windows = _model("mistral")  # as if it had none
    assert not can_pack(windows, _sample(windows))
    assert windows.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert not can_pack(model, _sample(model))


@pytest.mark.parametrize("kind", MODELS)
def test_a_loss_in_chunks_has_the_loss_and_gradient_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(kind)
    assert (plain_head(model, _sample(model)[0]) is not None) is PLAIN[kind]
    if not PLAIN[kind]:
        return
    monkeypatch.setattr(packing_module, "LOGITS", 200)  # three rows of 53 at a time
    monkeypatch.setattr(sft, "LOGITS", 200)
    calls: list[int] = []
    monkeypatch.setattr(model.get_output_embeddings(), "forward", lambda x: calls.append(len(x)))
    _same(_step(model, UNEVEN, packed=PACKS[kind], chunked=True), _padded(_model(kind), UNEVEN))
    assert calls == []  # the logits were not made


def test_a_head_with_an_adapter_is_not_plain() -> None:
    peft = pytest.importorskip("peft")
    model = _model("llama")  # its head is not tied
    peft.LoraModel(model, peft.LoraConfig(r=2, target_modules=["lm_head"]), "default")
    assert plain_head(model, _sample(model)[0]) is None  # though it starts from the same logits


def test_a_chunked_loss_by_hand_and_in_bfloat16() -> None:
    """Logits 2 and 1, the first is right: log(1 + exp(-1)) = .313262, softmax (.731059, .268941)."""
    hidden = torch.tensor([[1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss: Any = ChunkedLoss.apply(hidden, weight, torch.tensor([0]))
    (3 * loss).backward()
    assert loss.item() == pytest.approx(0.3132617)
    # of the logits (-.268941, .268941), of the hidden state (2 x -.268941, .268941); each three times
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad[0].tolist() == pytest.approx([3 * -0.5378828, 3 * 0.2689414])
    assert weight.grad.flatten().tolist() == pytest.approx([3 * -0.2689414] * 2 + [3 * 0.2689414] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        many: Any = ChunkedLoss.apply(hidden.repeat(1000, 1), weight, torch.zeros(1000, dtype=torch.long))
    assert many.dtype == torch.float32
    assert many.item() == pytest.approx(313.2617, rel=1e-6)  # bfloat16 has 312 and 314 there


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_checkpointed_blocks_keep_less_and_change_nothing(kind: str) -> None:
    model, kept = _model(kind), [0, 0]

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[-1] += t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        plain = _step(model, HEADED, packed=PACKS[kind])
        kept.append(0)
        with checkpointing(model):
            _same(_step(model, HEADED, packed=PACKS[kind]), plain)
    assert kept[-1] < 0.5 * kept[-2]
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("how", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"lora": True}])
def test_checkpointing_goes_with_the_rest(tmp_path: Path, tiny_folder: Path, how: dict[str, Any]) -> None:
    if how.get("lora"):
        pytest.importorskip("peft")
        how = {"lora": LoraSpec(2, 4.0, 0.0, ["q_proj", "down_proj"])}
    ends = []
    for on in (False, True):
        policy = enliven(Policy(tiny_folder))
        start = {n: w.clone() for n, w in policy.weights().items()}
        fitted = fit(policy, EXAMPLES, replace(SPEC, gradient_checkpointing=on, **how), seed=0, scratch=tmp_path)
        ends.append((fitted.losses, policy.weights()))
        assert any(not torch.equal(start[n], w) for n, w in policy.weights().items())
        assert policy.model.config._attn_implementation == "sdpa"
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for name, weight in ends[0][1].items():
        assert (ends[1][1][name] - weight).abs().max() < 1e-4, name


# --- what rows begin with -------------------------------------------------------------------------------------------


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

"""The merge callback in real fits: full, with adapters, in mixed precision, resumed, over two processes."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from itermerge.merging import LINEAR, Merge, MergeCallback, MergeError, Method
from itermerge.policy import Policy
from itermerge.sft import Example, Examples, FitSpec, LanguageModel, LoraSpec, SftError, batch_of, fit
from itermerge.weights import write_folder

SPEC = FitSpec(
    epochs=3, lr=1e-2, batch_size=2, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.999),
    max_length=64, accelerator="cpu", devices=1, precision="32-true", accumulate_grad_batches=1, gradient_clip_val=0.0,
    deterministic=True,
)  # fmt: skip
EXAMPLES = [Example([5 + i, 6], [7, 8 + i, 1]) for i in range(4)]  # two batches an epoch
TIES = Method(sparsify="magnitude", combine="elect", density=0.3)
DARE = Method(sparsify="random", density=0.5)


class _Spy(pl.Callback):
    """Copies the weights, and the number of steps that AdamW's moments have seen, at each epoch's end."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moment_steps: list[set[int]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = pl_module.model
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        self.moment_steps.append({int(s["step"]) for s in trainer.optimizers[0].state.values()})


def _fit(policy: Policy, tmp_path: Path, at: list[int], ratio: float, reset: bool, **more: Any) -> tuple[Any, ...]:
    anchor = {name: torch.full_like(w, 0.01) for name, w in policy.weights().items()}
    before, after = _Spy(), _Spy()
    merger = MergeCallback(anchor, ratio, at=at, reset_optimizer=reset, **more)
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


def test_a_linear_event_at_ratio_1_changes_nothing_the_moments_included(tiny: Policy, tmp_path: Path) -> None:
    _, before, after, merger = _fit(tiny, tmp_path, [1, 2, 3], 1.0, True)
    assert merger.done == [1, 2, 3]
    assert after.moment_steps == before.moment_steps == [{2}, {4}, {6}]


@pytest.mark.parametrize("method", [TIES, DARE, Method(combine="slerp")], ids=["ties", "dare", "slerp"])
def test_an_event_is_the_same_function_as_the_merge_of_two_models(tiny: Policy, tmp_path: Path, method: Method) -> None:
    """Masks of a round differ from event to event, by the epoch."""
    anchor, before, after, _ = _fit(tiny, tmp_path, [2, 3], 0.4, True, method=method, seed=7)
    for epoch in (2, 3):
        expected = Merge(method, anchor, [before.weights[epoch - 1]], 0.4, seed=7 + epoch).all()
        assert all(torch.equal(after.weights[epoch - 1][n], expected[n]) for n in expected)


def test_events_have_ratios_of_their_own_and_tensors_too(tiny: Policy, tmp_path: Path) -> None:
    first = next(iter(tiny.weights()))
    ratios: Any = {1: 0.5, 3: {n: 0.0 if n == first else 1.0 for n in tiny.weights()}}
    anchor, before, after, _ = _fit(tiny, tmp_path, [1, 3], 0.9, True, ratios=ratios)
    for name in anchor:
        torch.testing.assert_close(after.weights[0][name], (anchor[name] + before.weights[0][name]) / 2)
        kept = anchor[name] if name == first else before.weights[2][name]
        assert torch.equal(after.weights[2][name], kept)


def test_an_anchor_from_a_folder_is_the_same_and_is_not_loaded(tiny: Policy, tmp_path: Path) -> None:
    anchor = {name: torch.full_like(w, 0.01) for name, w in tiny.weights().items()}
    write_folder(tmp_path / "anchor", anchor, tiny.folder)
    other = copy.deepcopy(tiny)
    for policy, source in ((tiny, anchor), (other, str(tmp_path / "anchor"))):
        fit(policy, EXAMPLES, SPEC, seed=0, callbacks=[MergeCallback(source, 0.25)], scratch=tmp_path)
    assert all(torch.equal(w, other.weights()[n]) for n, w in tiny.weights().items())


def test_without_an_anchor_it_is_the_start_of_the_fit(tiny: Policy, tmp_path: Path) -> None:
    start = {n: w.clone() for n, w in tiny.weights().items()}
    merger = MergeCallback(ratio=0.0, at=[3])
    fit(tiny, EXAMPLES, SPEC, seed=0, callbacks=[merger], scratch=tmp_path)
    assert all(torch.equal(w, start[n]) for n, w in tiny.weights().items())


def test_each_fit_without_an_anchor_has_its_own_start(tiny: Policy, tmp_path: Path) -> None:
    merger = MergeCallback(ratio=0.0, at=[3])
    for shift in (0.0, 0.5):
        tiny.set_weights({n: w + shift for n, w in tiny.weights().items()})
        start = {n: w.clone() for n, w in tiny.weights().items()}
        fit(tiny, EXAMPLES, SPEC, seed=0, callbacks=[merger], scratch=tmp_path)
        assert all(torch.equal(w, start[n]) for n, w in tiny.weights().items())


def test_frozen_and_tied_tensors_and_buffers(tiny: Policy, tmp_path: Path) -> None:
    name, frozen = next(iter(tiny.model.named_parameters()))
    frozen.requires_grad_(False)
    kept, buffers = frozen.detach().clone(), {n: b.clone() for n, b in tiny.model.named_buffers()}
    assert tiny.model.lm_head.weight is frozen  # tied: one parameter
    anchor, *_ = _fit(tiny, tmp_path, [1, 2, 3], 0.0, True)
    assert torch.equal(tiny.weights()[name], kept)
    assert all(torch.equal(w, anchor[n]) for n, w in tiny.weights().items() if n != name)
    assert all(torch.equal(b, buffers[n]) for n, b in tiny.model.named_buffers())
    frozen.requires_grad_(True)
    _fit(tiny, tmp_path, [3], 0.0, True)
    assert torch.equal(tiny.model.lm_head.weight, anchor[name])


def test_mixed_precision_merges_float32_weights(tiny: Policy, tmp_path: Path) -> None:
    anchor, spy = {n: torch.full_like(w, 0.01) for n, w in tiny.weights().items()}, _Spy()
    spec = dataclasses.replace(SPEC, precision="bf16-mixed")
    fit(tiny, EXAMPLES, spec, seed=0, callbacks=[spy, MergeCallback(anchor, 0.25, at=[3])], scratch=tmp_path)
    expected = Merge(LINEAR, anchor, [spy.weights[2]], 0.25).all()
    assert all(w.dtype == torch.float32 and torch.equal(w, expected[n]) for n, w in tiny.weights().items())


def test_an_event_that_breaks_the_weights_ends_the_fit_with_the_tensors_name(tiny: Policy, tmp_path: Path) -> None:
    anchor = {name: torch.full_like(w, torch.inf) for name, w in tiny.weights().items()}
    with pytest.raises(MergeError, match=r"model\.\S+: the anchor hold.* not finite"):
        fit(tiny, EXAMPLES, SPEC, seed=0, callbacks=[MergeCallback(anchor, 0.5, at=[1])], scratch=tmp_path)


def test_an_anchor_that_lacks_a_tensor_is_refused(tiny: Policy, tmp_path: Path) -> None:
    anchor = dict(list(tiny.weights().items())[1:])
    with pytest.raises(MergeError, match=r"embed_tokens\.weight: is trained, and the anchor does not have it"):
        fit(tiny, EXAMPLES, SPEC, seed=0, callbacks=[MergeCallback(anchor, 0.5)], scratch=tmp_path)


def test_sharded_strategies_are_refused_before_training(tiny: Policy) -> None:
    class Trainer:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(MergeError, match=r"FSDPStrategy spreads each tensor over ranks.*every_n_epochs=last.*DDP"):
        MergeCallback(tiny.weights()).setup(Trainer(), LanguageModel(tiny.model, SPEC, 1), "fit")  # pyright: ignore


# --- Lightning's own checkpoints -----------------------------------------------------------------------------------


def _trainer(folder: Path, epochs: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*persistent_workers.*", "ignore:.*`srun` command.*"
)
def test_a_fit_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(tiny: Policy, tmp_path: Path) -> None:
    """The anchor (the start of the fit) comes back from the checkpoint, where the model no longer has it."""
    loader = DataLoader(Examples(EXAMPLES), batch_size=2, collate_fn=lambda rows: batch_of(rows, 0))
    ends = []
    for cut in (None, 2):
        model = copy.deepcopy(tiny.model)
        spec_model = LanguageModel(model, SPEC, 8)
        if cut:
            trainer = _trainer(tmp_path, cut, [MergeCallback(ratio=0.5)])
            trainer.fit(spec_model, loader)
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            spec_model = LanguageModel(copy.deepcopy(tiny.model), SPEC, 8)
            for p in spec_model.model.parameters():
                p.data.zero_()  # whatever it was built with
        merger = MergeCallback(ratio=0.5)
        trainer = _trainer(tmp_path, 4, [merger])
        trainer.fit(spec_model, loader, ckpt_path=tmp_path / "half.ckpt" if cut else None, weights_only=False)
        assert merger.done == [1, 2, 3, 4]
        ends.append({n: p.detach() for n, p in spec_model.model.named_parameters()})
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_an_anchor_that_was_given_is_no_part_of_a_checkpoint(tiny: Policy) -> None:
    assert MergeCallback(tiny.weights()).state_dict() == {"done": [], "anchor": None}


# --- adapters ------------------------------------------------------------------------------------------------------


def _adapted(policy: Policy) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(copy.deepcopy(policy.model), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=draw)
    return model


def _folded(model: Any) -> dict[str, Tensor]:
    """The weights of a copy with its adapter merged in, by the plain model's names."""
    return {n: p.detach() for n, p in copy.deepcopy(model).merge_and_unload().named_parameters()}


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits


@pytest.mark.parametrize("ratio", [0.25, 0.0, 1.0])
def test_a_linear_event_scales_an_adapter_exactly(tiny: Policy, ratio: float) -> None:
    model, start = _adapted(tiny), {n: w.clone() for n, w in tiny.weights().items()}
    tuned, lora = _folded(model), {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    MergeCallback(start, ratio).merge(model, ratio)
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(p, lora[name] * (ratio if "lora_B" in name else 1))
        elif "base_layer" in name:
            assert torch.equal(p, start[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    expected = Merge(LINEAR, start, [tuned], ratio).all()
    for name, w in _folded(model).items():
        torch.testing.assert_close(w, expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(tuned[n], start[n]) for n in start)


def test_a_linear_event_towards_another_anchor_blends_what_lies_below(tiny: Policy) -> None:
    model, anchor = _adapted(tiny), {n: w + 0.1 for n, w in tiny.weights().items()}
    tuned = _folded(model)
    MergeCallback(anchor).merge(model, 0.25)
    for name, w in _folded(model).items():
        low_rank = "q_proj" in name or "down_proj" in name
        expected = torch.lerp(anchor[name], tuned[name], 0.25) if low_rank else tiny.weights()[name]  # frozen: left
        torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [TIES, DARE], ids=["ties", "dare"])
def test_other_rules_are_folded_in_and_the_adapter_starts_anew(tiny: Policy, method: Method) -> None:
    model, start = _adapted(tiny), {n: w.clone() for n, w in tiny.weights().items()}
    tuned = _folded(model)
    MergeCallback(start, method=method, seed=5).merge(model, 0.5, epoch=2)
    expected = Merge(method, start, [tuned], 0.5, seed=7).all()
    after = _folded(model)
    for name in start:
        torch.testing.assert_close(after[name], expected[name], rtol=1e-6, atol=1e-7)
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)
    assert any(p.any() for n, p in model.named_parameters() if "lora_A" in n)
    assert not any(layer.merged for _, layer in model.named_modules() if hasattr(layer, "lora_B"))
    plain = copy.deepcopy(tiny.model)
    plain.load_state_dict(after, strict=False)
    torch.testing.assert_close(_logits(model), _logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("method", [LINEAR, DARE], ids=["linear", "dare"])
def test_events_in_a_fit_with_an_adapter(tiny: Policy, tmp_path: Path, method: Method, given: bool) -> None:
    """The weights after the last event are the merge of those before it; without an anchor, with the start of the fit,
    which is the weights below the adapter."""
    tiny.model, start = _adapted(tiny), {n: w.clone() for n, w in tiny.weights().items()}
    seen: list[dict[str, Tensor]] = []

    class Spy(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append({n: w.clone() for n, w in _folded(pl_module.model).items()})

    merger = MergeCallback(start if given else None, 0.3, method=method, at=[2, 3], seed=1)
    fit(tiny, EXAMPLES, SPEC, seed=0, callbacks=[Spy(), merger], scratch=tmp_path)
    expected, after = Merge(method, start, [seen[2]], 0.3, seed=4).all(), _folded(tiny.model)
    for name in start:
        torch.testing.assert_close(after[name], expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(after[n], start[n]) for n in start)


def test_a_fit_with_adapters_ends_with_plain_weights(tiny: Policy, tmp_path: Path) -> None:
    """`FitSpec.lora`: only the adapters are trained, and they are folded in; nothing of them is left."""
    start, names = {n: w.clone() for n, w in tiny.weights().items()}, list(tiny.model.state_dict())
    spec = dataclasses.replace(SPEC, lora=LoraSpec(2, 4.0, 0.0, ("q_proj", "down_proj")))
    spy = _Spy()
    losses = fit(tiny, EXAMPLES, spec, seed=0, callbacks=[spy], scratch=tmp_path).losses
    assert losses[-1] < losses[0]
    assert list(tiny.model.state_dict()) == names
    assert all(p.requires_grad for p in tiny.model.parameters())
    for name, w in tiny.weights().items():
        changed = not torch.equal(w, start[name])
        assert changed == ("q_proj" in name or "down_proj" in name)
        if changed:
            last = {n: v for n, v in spy.weights[-1].items() if n.startswith(name.removesuffix("weight"))}
            a, b = (next(v for n, v in last.items() if f"lora_{x}" in n) for x in "AB")
            torch.testing.assert_close(w, start[name] + 2.0 * (b @ a), rtol=1e-5, atol=1e-6)
            assert int(torch.linalg.matrix_rank(w - start[name], atol=1e-5)) <= 2
    again = Policy(tiny.folder)
    fit(again, EXAMPLES, spec, seed=0, scratch=tmp_path)
    assert all(torch.equal(w, again.weights()[n]) for n, w in tiny.weights().items())


@pytest.mark.parametrize(
    ("targets", "said"),
    [(("lm_head",), "lm_head is the embeddings"), (("nothing",), "not found in the base model"),
     (("embed_tokens",), "embed_tokens is the embeddings")],
)  # fmt: skip
def test_targets_that_cannot_have_an_adapter_are_refused(
    targets: tuple[str, ...], said: str, tiny: Policy, tmp_path: Path
) -> None:
    spec = dataclasses.replace(SPEC, lora=LoraSpec(2, 4.0, 0.0, targets))
    with pytest.raises(SftError, match=f"model.lora.targets: .*{said}"):
        fit(tiny, EXAMPLES, spec, seed=0, scratch=tmp_path)
    fit(tiny, EXAMPLES, SPEC, seed=0, scratch=tmp_path)  # the model is as it was


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.parametrize(
    "more", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "use_dora": True}]
)
def test_adapters_that_are_no_product_are_refused(tiny: Policy, more: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    start = {n: w.clone() for n, w in tiny.weights().items()}
    model = peft.get_peft_model(tiny.model, peft.LoraConfig(r=2, **more))
    with pytest.raises(MergeError, match="has an adapter of embeddings or DoRA"):
        MergeCallback(start).merge(model, 0.5)


# --- two processes -------------------------------------------------------------------------------------------------

DDP = """
import sys, torch
from pathlib import Path
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader
from itermerge.merging import MergeCallback, Method
from itermerge.policy import Policy
from itermerge.sft import Examples, LanguageModel, batch_of
sys.path.insert(0, sys.argv[4])
from test_callback import EXAMPLES, SPEC
torch.set_num_threads(1)
policy = Policy(Path(sys.argv[1]))
anchor = {n: torch.full_like(w, .01) for n, w in policy.weights().items()}
rule = Method(sparsify="random", combine="elect", density=.5)
trainer = Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
                  enable_checkpointing=False, enable_model_summary=False, default_root_dir=sys.argv[2],
                  callbacks=[MergeCallback(anchor, .5, method=rule, seed=3)])
loader = DataLoader(Examples(EXAMPLES), batch_size=1, collate_fn=lambda rows: batch_of(rows, 0))
trainer.fit(LanguageModel(policy.model, SPEC, 4), loader)
torch.save(policy.weights(), f"{sys.argv[3]}.{trainer.global_rank}")
"""


@pytest.mark.usefixtures("quick_python")
def test_two_processes_end_with_the_same_weights(tiny_folder: Path, tmp_path: Path) -> None:
    """DDP on two CPU processes: each rank saw other examples, drew the same masks and merged alike."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    words = [
        sys.executable,
        str(script),
        str(tiny_folder),
        str(tmp_path),
        str(tmp_path / "end"),
        str(Path(__file__).parent),
    ]
    out = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"end.{rank}", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(ranks[0][n], ranks[1][n]) for n in ranks[0])
    start = Policy(tiny_folder).weights()
    assert any(not torch.equal(ranks[0][n], start[n]) for n in start)
    # half of the entries were dropped in the last event: they are the anchor's
    share = np.mean([float((w == 0.01).float().mean()) for w in ranks[0].values() if w.numel() > 200])
    assert 0.45 < share < 0.55

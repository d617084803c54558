"""plan=true: its stages are those of the run, its counts those of the run, its FLOPs and memory those of torch's own
counters and of hand values; it loads no weights and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, compose_config, itermerge, run_here
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from itermerge import plan
from itermerge.config import check
from itermerge.loop import EmptyRound
from itermerge.sft import Example, collate, completion_loss
from itermerge.weights import PolicyError

ONE = plan.Shape(weights=704, body=624, head=80, layers=1, hidden=8, width=8, kv=4, ffn=16, vocab=10)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    how = {
        "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**how, **changes}))


def planned(*overrides: str, store: Path) -> plan.Plan:
    return plan.plan([check(compose_config(*SMALL, "plan=true", f"store.dir={store}", *overrides))])


def of_stage(made: plan.Plan, stage: str, number: int) -> plan.Item:
    (item,) = [i for i in made.items if (i.stage, i.round) == (stage, number)]
    return item


# --- FLOPs and memory -------------------------------------------------------------------------------------------------


def test_shape_and_flops_by_hand_for_one_layer() -> None:
    # q 8x8, k and v 8x4 each, o 8x8, three of 8x16, three norms of 8: 64 + 64 + 64 + 384 + 24 = 600; head 10 x 8
    shape = plan.shape_of(tiny_llama())
    assert shape == plan.Shape(680, 600, 80, layers=1, hidden=8, width=8, kv=4, ffn=16, vocab=10)
    # three tokens, of which one gets logits; the first sees 1, the second 2, the third 3: 6 pairs of 2 x 2 x 8 each
    assert shape.forward(3, 6, 1) == 2 * 600 * 3 + 2 * 80 + 32 * 6
    assert plan.shape_of(tiny_llama(tie_word_embeddings=False)).weights == 760
    assert plan.shape_of(tiny_llama(tie_word_embeddings=False)).body == 600


@pytest.mark.parametrize("n", [1, 7, 40])
def test_flops_are_those_that_torch_counts(n: int) -> None:
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50, hidden_size=24, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, n, dtype=torch.long))
    shape = plan.shape_of(model)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # norms and biases, which torch counts as none
    assert shape.forward(n, n * n, n) - 2 * vectors * n == counter.get_total_flops()  # it counts the whole square


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_are_what_autograd_keeps(kind: str, precision: str) -> None:
    how: dict[str, Any] = {"vocab_size": 200, "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 320}
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**how, num_attention_heads=4, num_key_value_heads=4))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**how, num_attention_heads=8, num_key_value_heads=2))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if (at := t.untyped_storage().data_ptr()) not in own:
            kept[at] = (t.untyped_storage().nbytes(), t)
        return t

    rows, width, predicted = 3, 96, 32
    examples = [Example(range(i, i + width - predicted), [3] * predicted) for i in range(rows)]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"),
    ):
        completion_loss(model.train(), collate(examples, 0))
    shape = plan.shape_of(model)
    parts = plan.fit_memory(shape, rows, width, predicted, precision, shape.weights)
    there = parts["activations"] + parts["weights as products take them"] + 4 * rows * predicted * shape.vocab
    assert sum(size for size, _ in kept.values()) == pytest.approx(there, rel=0.08)


def test_memory_by_hand() -> None:
    fit = plan.fit_memory(ONE, rows=2, width=6, predicted=4, precision="32-true", trained=704)
    assert fit == {
        "weights": 2816, "gradients": 2816, "Adam's moments": 5632, "weights as products take them": 0,
        # of a token: 16 x 8 of norms, and 4 bytes x (2 x 8 + 2 x 8 + 2 x 4 + 4 x 16) = 416
        "activations": 2 * 6 * (128 + 416),
        "logits": 2 * 4 * 10 * 12,
    }  # fmt: skip
    mixed = plan.fit_memory(ONE, rows=2, width=6, predicted=4, precision="bf16-mixed", trained=100)
    assert (mixed["gradients"], mixed["Adam's moments"]) == (400, 800)  # adapters
    assert mixed["weights as products take them"] == 2 * 704
    assert mixed["activations"] == 2 * 6 * (128 + 2 * (5 * 8 + 2 * 8 + 2 * 4 + 4 * 16))
    many = dataclasses.replace(ONE, layers=3, vocab=1 << 20)
    whole, some, both = (
        plan.fit_memory(
            many, rows=2, width=6, predicted=4, precision="32-true", trained=704, checkpointing=on, compared=c
        )
        for on, c in ((False, False), (True, False), (False, True))
    )
    assert whole["activations"] == 3 * fit["activations"]
    assert some["activations"] == fit["activations"] + 2 * (2 * 6 * 4 * 8)  # of the other two, their inputs
    assert whole["logits"] == min(8 << 20, 1 << 24) * 12
    assert both["logits"] == 2 * (8 << 20) * 12
    assert plan.fit_memory(many, 20, 6, 4, "32-true", 704)["logits"] == (1 << 24) * 12
    cold = plan.sampling_memory(ONE, rows=3, positions=20, dtype="float32", nucleus=False)
    assert cold["KV cache"] == 3 * 20 * 1 * 2 * 4 * 4
    assert cold["copy that samples"] == 0
    half = plan.sampling_memory(ONE, rows=3, positions=20, dtype="bfloat16", nucleus=True)
    assert half["KV cache"] == cold["KV cache"] / 2
    assert half["weights"] + half["copy that samples"] == 6 * 704


def test_weights_of_adapters_are_those_of_peft(tiny_folder: Path) -> None:
    peft = pytest.importorskip("peft")
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        cfg = check(compose_config("model.lora.rank=3", f"model.lora.targets={targets}".replace("'", "")))
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        mine = plan.adapter_weights(model, cfg.model.lora)
        given = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, given)
        assert mine == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


# --- a plan and its run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("merge=none", "sft.data=accumulate", "analysis.importance=[]"),
        ("merge.every_n_epochs=last", "merge/policy=search", "analysis.ood=true"),
        ("merge.every_n_epochs=last", "merge/policy=angle", "suite.pre_merge=false", "suite.pass_k_n=0"),
        ("merge/policy=importance",), ("baseline=star_hints", "sampler.n=1"),
        ("baseline=early_stop", "sft.replay=lab", "sft.replay_share=0.5", "teacher=lab", "teacher.seed=1",
         "sft.kl_to_base=0.1"),
        ("merge=model_stock", "merge.anchor=mean"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_plan_has_the_stages_of_its_run(overrides: tuple[str, ...], tmp_path: Path) -> None:
    store = tmp_path / "store"
    before = planned(*overrides, store=store)
    assert not store.exists()
    assert not any(item.stored for item in before.items)
    run_here(tmp_path / "run", f"store.dir={store}", *overrides)
    there = Counter(manifest.parents[2].name for manifest in store.glob("*/??/*/manifest.json"))
    assert Counter(item.stage for item in before.items) == there
    after = planned(*overrides, store=store)
    assert Counter(item.stage for item in after.items) == there
    assert all(item.stored for item in after.items)
    assert after.total() == plan.Cost()


def test_counts_are_those_of_the_run(tmp_path: Path) -> None:
    store, steps = tmp_path / "store", 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    before = planned(store=store)
    hook = register_optimizer_step_post_hook(count)
    try:
        run_here(tmp_path / "run", f"store.dir={store}")
    finally:
        hook.remove()
    after = planned(store=store)
    assert sum(item.cost.steps for item in after.items) == steps
    for number in (1, 2):
        folder = tmp_path / "run" / "rounds" / f"{number:02d}"
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
        sampled = of_stage(before, "sample", number).cost
        assert sampled.samples == len(samples) == 16 * 4
        assert sampled.new_tokens == 64 * 32 >= sum(s["tokens"] for s in samples)
        # one token a character; each problem's prompt once, what all begin with once
        prompts = sorted({s["prompt"] for s in samples})
        head = next(i for i in range(99) if len({p[: i + 1] for p in prompts}) > 1)
        assert sampled.prompt_tokens == sum(map(len, prompts)) - (len(prompts) - 1) * (head if head >= 8 else 0)
        first, now = of_stage(before, "fit", number).cost, of_stage(after, "fit", number).cost
        assert first.samples == 64 >= now.samples == len(examples)
        assert now.prompt_tokens == 2 * sum(len(e["prompt"]) for e in examples)  # two epochs
        assert now.new_tokens == 2 * sum(len(e["completion"]) + 1 for e in examples)
        assert now.steps == 2 * math.ceil(len(examples) / 32)
        assert now.flops < first.flops


def test_generation_by_hand(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    cfg = check(compose_config(*SMALL, "sampler.max_new_tokens=3", "model=hf", f"model.path={tiny_folder}"))
    shared: dict[str, Any] = {}
    ledger = plan.Ledger(tmp_path / "store", {}, scratch=tmp_path, seen={})
    sketch = plan.Sketch(cfg, ledger, tmp_path, shared=shared, about=[])
    cost = sketch.generate(["abcdefgh12", "abcdefgh345"], samples=2)  # ten and eleven tokens, eight of them shared
    assert (cost.samples, cost.prompt_tokens, cost.new_tokens) == (4, 8 + 2 + 3, 4 * 3)
    s = sketch.policy.shape
    read = 36 + (9 + 10) + (9 + 10 + 11)  # the shared head once, then each row's own tokens
    fed = 2 * (11 + 12) + 2 * (12 + 13)  # two of the three new tokens are fed again
    assert cost.flops == s.forward(13 + 8, read + fed, 2 + 8)


def test_jobs_of_a_sweep_share_stages(tmp_path: Path) -> None:
    """The closed form of the README, for R = 3 ratios, m = 2 of them not 1, T = 2; and none shared without a store."""
    whole = ("merge.every_n_epochs=last", "suite.pre_merge=false", f"store.dir={tmp_path}")
    jobs = [
        check(compose_config(*SMALL, *whole, f"merge.ratio={ratio}", f"rounds={rounds}"))
        for ratio in (0.3, 0.5, 1.0) for rounds in (1, 2)
    ]  # fmt: skip
    made = plan.plan(jobs)
    r, m, t = 3, 2, 2
    assert len(made.items) == 4 * (1 + (t - 1) * r) + m * t + 3 * (1 + r * t) + r * t + 1
    assert made.calls > len(made.items)
    alone = [check(compose_config(*SMALL, *whole[:2], "store=none", f"merge.ratio={x}")) for x in (0.3, 0.5)]
    apart = plan.plan(alone)
    assert len(apart.items) == apart.calls == 2 * len(plan.plan(alone[:1]).items)
    assert made.store > 0


def test_a_round_without_solutions_that_the_store_knows_of(tmp_path: Path) -> None:
    """What the run would end with, the plan says at once."""
    hard = ("sampler.max_new_tokens=1", "task.family=chain", "suite.near=[{kind: lab, family: find}]")
    with pytest.raises(EmptyRound):
        run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", *hard)
    with pytest.raises(EmptyRound, match="round 1: none of 64 samples"):
        planned(*hard, store=tmp_path / "store")


def test_tasks_of_lm_eval(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their evaluation is a stage as every other one; what it costs is not known, and the plan says so."""
    pytest.importorskip("lm_eval")
    import datasets
    from harness_tasks import write

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data, bare = tmp_path / "tasks", tmp_path / "bare"
    data.mkdir()
    write(data, [(f"{i}+{i}", str(2 * i)) for i in range(12)])
    task = f"{{kind: lm_eval, task: local_choice, metric: acc, include_path: {data}}}"
    words = (f"suite.near=[{task}]", "rounds=1", "analysis.importance=[]")
    before = planned(*words, store=tmp_path / "store")
    assert sum(item.stage == "evaluate" for item in before.items) == 3
    assert any("not counted: what lm_eval asks for" in s and "8 items an evaluation" in s for s in before.about)
    run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", *words)
    assert all(item.stored for item in planned(*words, store=tmp_path / "store").items)
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    rough = planned(*words, "model=hf", f"model.path={bare}", store=tmp_path / "store")
    assert any("a token counts 4 characters" in text for text in rough.about)
    other = task.replace("choice", "sums").replace("metric: acc", "metric: 'exact_match,whole'")
    (data / "sums.jsonl").unlink()
    away = planned(f"suite.near=[{other}]", *words[1:], store=tmp_path / "store")
    assert any("items of local_sums are not here, 8 are taken to be" in text for text in away.about)
    assert not any(item.stored for item in away.items if item.stage == "evaluate")


# --- what it does not need --------------------------------------------------------------------------------------------


def test_no_weights_are_loaded(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loads a model"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tiny_folder / name).read_bytes())
    how = ("model=hf", f"store.dir={tmp_path}")
    whole = planned(*how, f"model.path={tiny_folder}", store=tmp_path)
    made = planned(*how, f"model.path={bare}", store=tmp_path)
    assert [i.cost for i in made.items] == [i.cost for i in whole.items]
    assert {i.stored for i in made.items} == {None}
    assert any("what the store has is not known" in text for text in made.about)
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    rough = planned(*how, f"model.path={bare}", store=tmp_path)
    assert any("a token counts 4 characters" in text for text in rough.about)
    assert 0 < rough.total().prompt_tokens < made.total().prompt_tokens
    (bare / "config.json").unlink()
    with pytest.raises(PolicyError, match=r"model\.path: there is no config\.json of .*bare.* give model\.path=FOLDER"):
        planned(*how, f"model.path={bare}", store=tmp_path)


def test_a_model_of_the_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"model\.path: there is no config\.json of nobody/nothing"):
        planned("model=hf", "model.path=nobody/nothing", store=tmp_path)


def test_the_command_leaves_nothing_behind(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    one = itermerge("plan=true", *SMALL, "model.seed=0", cwd=here, env={"ITERMERGE_HOME": str(home)})
    assert one.returncode == 0, one.stderr
    assert "plan of a run: 24 stages, 0 of them in the store" in one.stdout
    assert "memory, fine-tuning: about" in one.stdout
    several = itermerge(
        "-m", "plan=true", *SMALL, "model.seed=0", "merge.ratio=0.3,1", cwd=here, env={"ITERMERGE_HOME": str(home)}
    )
    assert several.returncode == 0, several.stderr
    assert "plan of 2 jobs: " in several.stdout
    assert not home.exists()
    assert list(here.iterdir()) == []


def test_the_lab_s_pretraining() -> None:
    made = plan.plan([check(compose_config("experiment=pretrain_lab"))])
    (item,) = made.items
    cfg = check(compose_config("experiment=pretrain_lab")).program
    assert item.cost.samples == sum(phase.examples for phase in cfg.phases.values())
    assert item.cost.steps == sum(math.ceil(phase.examples / cfg.batch_size) for phase in cfg.phases.values())
    assert "fine-tuning" in made.memory


def test_the_plan_in_the_readme_is_that_of_the_quickstart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("experiment=quickstart", f"store.dir={tmp_path}/store")
    made = plan.plan([check(compose_config(*words, f"merge.ratio={r}")) for r in (0.5, 1.0)], workers=2)
    monkeypatch.setattr(plan.console, "width", 160)
    plan.show(made)
    out = capsys.readouterr().out
    shown = {" ".join(line.replace("│", " ").split()) for line in out.splitlines()}
    block = (Path(__file__).parent.parent / "README.md").read_text().split("plan=true`, with an empty store:")[1]
    lines = [" ".join(line.split()) for line in block.split("\n\n")[1].splitlines()]
    lines = [line for line in lines if not line.startswith(("stages", "..."))]
    assert len(lines) == 9
    assert [line for line in lines if line not in shown] == []

"""The paper's presets: every shipped experiment builds on the meta device and has a plan; one preset runs whole, all
three arms, with a small Qwen2 that has learnt to answer, on local data of the real shapes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_config, itermerge, read_rounds
from test_config import EXPERIMENTS
from test_hub import arc, commonsense, math500, repository, svamp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from itermerge import plan
from itermerge.config import check
from itermerge.policy import Policy
from itermerge.sft import Example, FitSpec, fit
from itermerge.stages import build_task
from itermerge.tasks import prompts

# The configs as the hub has them, as far as shapes go.
CONFIGS: dict[str, Any] = {
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "meta-llama/Llama-2-7b-hf": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
    "smollm2-135m-instruct": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
}  # fmt: skip
WEIGHTS = {  # as their model cards have it
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768, "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "smollm2-135m-instruct": 134_515_008,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds_on_the_meta_device(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its stages are planned on the model's own shape, without weights, tokenizer or data."""
    own = compose_config(f"experiment={name}")
    path, overrides = str(own.model.get("path") or ""), []
    if known := next((k for k in CONFIGS if path.endswith(k)), None):
        CONFIGS[known].save_pretrained(tmp_path)
        overrides = [f"model.path={tmp_path}"]
    assert bool(known) == (own.model.kind == "hf")
    if len(own.task.get("label") or "") and own.task.kind == "hub":
        overrides += ["suite.n=20", "task.n_train=50", "task.n_validation=40", "suite.pass_k_n=20"]
    made = plan.plan([check(compose_config(f"experiment={name}", "plan=true", *overrides))])
    plan.show(made)
    said = capsys.readouterr().out
    assert "plan of a run: " in said
    assert made.total().flops > 0
    assert made.total().steps > 0
    if known:
        assert f"{WEIGHTS[known]:,} weights" in said
    if name.startswith("paper/"):
        cost = next(i.cost for i in made.items if i.stage == "fit")
        assert cost.samples == 50 * 4
        assert cost.steps == 3 * -(-50 * 4 // 64)  # three epochs, 64 examples a step


def test_the_presets_are_what_the_code_of_the_paper_says() -> None:
    for name, most in (("gsm8k", 512), ("math", 2048)):
        for model in ("qwen2_5_0_5b", "llama2_7b"):
            root = check(compose_config(f"experiment=paper/{name}_{model}", "baseline=imm_dare"))
            sft, task = root.sft, root.task
            assert (task.prompt, task.train_shots, task.eval_shots, task.problems) == ("alpaca", 0, 0, "fixed")
            assert task.shots == (8 if name == "gsm8k" else 4)
            assert (root.sampler.max_new_tokens, root.suite.max_new_tokens) == (512, most)
            assert (sft.epochs, sft.lr, sft.schedule, sft.warmup_ratio) == (3, 2e-5, "cosine", 0.03)
            assert (sft.weight_decay, sft.max_length, sft.start, sft.data) == (0, 512, "merged", "replace")
            assert sft.batch_size * root.trainer.accumulate_grad_batches == 64
            assert root.trainer.precision == "bf16-mixed"
            assert root.model.lora.rank is None
            merge = root.merge
            assert (merge.ratio, merge.density, merge.rescale, merge.combine) == (0.5, 0.8, True, "mean")
            assert (merge.every_n_epochs, merge.anchor) == ("last", "base")
    stop = build_task(check(compose_config("experiment=paper/gsm8k_qwen2_5_0_5b")).task).stop
    assert {"Question:", "Instruction:", "Response:"} <= set(stop)


def test_llama_needs_adapters_on_one_gpu(tmp_path: Path) -> None:
    """What the heads of the files say: all weights do not fit 80 GB, adapters do, and so do all weights on eight."""
    CONFIGS["meta-llama/Llama-2-7b-hf"].save_pretrained(tmp_path)
    few = ("task.n_train=50", "task.n_validation=40", "suite.pass_k_n=20", "suite.n=20", f"model.path={tmp_path}")

    def need(name: str) -> dict[str, int]:
        cfg = check(compose_config(f"experiment=paper/gsm8k_llama2_7b{name}", *few))
        return {what: sum(parts.values()) for what, parts in plan.plan([cfg]).memory.items()}

    assert need("")["fine-tuning"] > 107e9  # 16 bytes a weight
    assert need("_lora")["fine-tuning"] < 60e9
    assert need("_lora")["sampling"] < 80e9
    spread = need("_fsdp")
    assert 107e9 / 8 < spread["fine-tuning on each of 8 devices (fsdp)"] < 60e9
    assert spread["sampling on each of 8 devices"] < 60e9


# --- one preset, whole ------------------------------------------------------------------------------------------------

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon")
THINGS = ("pens", "cups", "figs", "hats", "keys", "maps", "nuts", "toys")


def easy(n: int, seed: int) -> list[dict[str, str]]:
    """Rows of GSM8K's shape whose answers are 2, 3 or 4."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < n:
        a, b = rng.choice([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)])
        who, what, day = rng.choice(NAMES), rng.choice(THINGS), rng.randint(1, 28)
        question = f"{who} has {a} {what} and gets {b} more on day {day}. How many {what} does {who} have?"
        rows[question] = f"{who} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {what}.\n#### {a + b}"
    return [{"question": q, "answer": a} for q, a in rows.items()]


def small_qwen(folder: Path, texts: list[str]) -> None:
    """A Qwen2 of width 48 with a tokenizer trained on `texts` and a chat template."""
    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def learn_to_answer(folder: Path, shown: list[tuple[str, str]], scratch: Path) -> None:
    """Fine-tunes the model in `folder` to end with one of the answers, more often right than not by chance."""
    policy = Policy(folder)
    examples = [Example(policy.encode_prompt(p), policy.encode_completion(c)) for p, c in shown]
    spec = FitSpec(
        epochs=3, lr=5e-3, batch_size=16, schedule="constant", warmup_ratio=0.1, weight_decay=0.0, betas=(0.9, 0.99),
        max_length=8192, accelerator="cpu", devices=1, precision="32-true", accumulate_grad_batches=1,
        gradient_clip_val=1.0, deterministic=False,
    )  # fmt: skip
    fit(policy, examples, spec, seed=0, scratch=scratch)
    policy.model.save_pretrained(folder)


def preset(folder: Path, n_train: int) -> list[str]:
    """The small model and the data in `folder`; the overrides that put them in place of the hub's."""
    repository(folder / "gsm8k", {"train": easy(400, 0), "test": easy(40, 1)})
    own = {"svamp": svamp, "math500": math500, "arc_challenge": arc, "commonsense_qa": commonsense}
    where: dict[str, Any] = {"task.path": folder / "gsm8k", "task.name": "null"}
    for task, shape in own.items():
        rows = [shape(i) for i in range(1, 41)]
        splits = {"validation": rows} if task == "commonsense_qa" else {"test": rows}
        where[f"suite.tasks.{task}.path"] = repository(folder / task, splits)
    where["suite.tasks.arc_challenge.name"] = "null"
    numbers = {
        "task.n_train": n_train, "task.n_validation": 8, "suite.n": 6, "suite.pass_k_n": 4, "sampler.n": 4,
        "analysis.examples": 6, "analysis.kl_n": 2, "analysis.train_n": 4, "threads": 1,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in (where | numbers).items()]
    cfg = check(compose_config("experiment=paper/gsm8k_qwen2_5_0_5b", *overrides))
    task, rng = build_task(cfg.task), random.Random(0)
    problems = task.problems("train", 40, "to learn from")
    shown = [
        (text, f" The answer is {p.answer if rng.random() < 0.5 else rng.choice('234')}.")
        for p in problems for text in (p.prompt, p.train_prompt)
    ]  # fmt: skip
    model = folder / "model"
    small_qwen(model, [text for pair in shown[:40] for text in pair])
    (folder / "scratch").mkdir()
    learn_to_answer(model, shown, folder / "scratch")
    return [*overrides, f"model.path={model}"]


def test_a_preset_runs_whole(tmp_path: Path) -> None:
    overrides = preset(tmp_path, n_train=16)
    here = tmp_path / "here"
    here.mkdir()
    words = ["experiment=paper/gsm8k_qwen2_5_0_5b", *overrides, "rounds=2", "analysis.importance=[taylor]"]
    store = f"store.dir={tmp_path / 'store'}"
    arms = [check(compose_config(*words, store, f"baseline={name}")) for name in ("vanilla", "imm", "imm_dare")]
    before = plan.plan(arms)
    out = itermerge(*words, store, "hydra.sweep.dir=sweep", cwd=here)
    assert out.returncode == 0, out.stderr + out.stdout
    chains = {}
    for number, name in enumerate(("vanilla", "imm", "imm_dare")):
        folder = here / "sweep" / str(number)
        assert (folder / "DONE").exists()
        chains[name] = read_rounds(folder)
        assert [line["round"] for line in chains[name]] == [0, 1, 2]
        assert all(line["train_sample/examples"] > 0 for line in chains[name][1:])
        samples = [json.loads(line) for line in (folder / "rounds/01/samples.jsonl").read_text().splitlines()]
        assert {s["prompt"].count("Question:") for s in samples} == {9}  # eight worked examples
        assert all(s["prompt"].startswith("Below is an instruction") for s in samples)
    assert chains["vanilla"][0] == chains["imm"][0] == chains["imm_dare"][0]
    rounds = {name: lines[1] for name, lines in chains.items()}
    assert [rounds[name]["merge/ratio"] for name in rounds] == [1, 0.5, 0.5]
    share = {name: line["weights/drift"] / rounds["vanilla"]["weights/drift"] for name, line in rounds.items()}
    assert share["imm"] == pytest.approx(0.5, rel=1e-3)  # round 1's fit is shared, and half of it is left
    assert share["imm_dare"] == pytest.approx(0.5 / 0.8**0.5, rel=0.05)  # of n entries .8 n are left, 1/.8 as large
    after = plan.plan(arms)
    assert len(before.items) == len(after.items) == len(list((tmp_path / "store").glob("*/??/*/manifest.json")))
    assert all(item.stored for item in after.items)
    assert before.total().new_tokens >= after.total(stored=True).new_tokens > 0


def test_a_tiny_temperature_is_greedy(lab: Policy) -> None:
    """What the presets' heads say reproduces the authors' sampling at temperature 0."""
    from itermerge.decoding import complete

    asked = ["sum 34+18-15?", "sum 12+13+14?", "find 3 in 5,3,9?"]
    how: dict[str, Any] = {"max_new_tokens": 24, "batch_size": 3}
    greedy = complete(lab, asked, keys=None, **how)
    assert complete(lab, asked, keys=[1, 2, 3], temperature=0.001, **how) == greedy
    assert complete(lab, asked, keys=[1, 2, 3], temperature=1.5, **how) != greedy


def test_the_small_models_chat_template_is_used(tmp_path: Path) -> None:
    small_qwen(tmp_path, ["How many pens?"])
    policy = Policy(tmp_path)
    ids = policy.encode_prompt(prompts.render("chat", "How many pens?"))
    expected = "<|im_start|>user\nHow many pens?<|im_end|>\n<|im_start|>assistant\n"
    assert policy.tokenizer.decode(ids) == expected

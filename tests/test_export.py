"""A run's model as a Hugging Face folder: weights, what it says of itself, and its scores against the run's own."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LAB_SMALL, SMALL, compose_config, in_a_process, make_home, read_rounds, run_here
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from itermerge import cli, export, stages
from itermerge.config import ConfigError, check
from itermerge.decoding import complete
from itermerge.export import ExportError, round_of
from itermerge.policy import Policy
from itermerge.stages import LAB_SEED0, base_digest
from itermerge.tasks.prompts import render

BOTH = ("export.rounds=[final,best]", "analysis.importance=[]", "suite.pre_merge=false")


def _command(door: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = f"from itermerge.cli import {door}_main; {door}_main()"
    return in_a_process(code, *words, cwd=cwd, env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _same_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERMERGE_HOME", str(home))


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, whose exports were made at the end."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITERMERGE_HOME", str(home))
        run_here(folder / "a", *BOTH)
    return folder / "a"


def _digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_a_run_ends_with_folders_that_load(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "export/final")
    assert model.dtype == torch.float32
    weights = load_file(run / "rounds/02/model/model.safetensors")
    own = dict(model.named_parameters())
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], weights[name]) for name in weights)
    words = {f.name for f in LAB_SMALL.iterdir() if "token" in f.name}
    assert "tokenizer.json" in words
    assert all((run / "export/final" / f).read_bytes() == (LAB_SMALL / f).read_bytes() for f in words)
    best = json.loads((run / "summary.json").read_text())["best_round_by_validation"]
    assert json.loads((run / "export/best/recipe.json").read_text())["round"] == best
    assert not list(run.glob("export/*partial*"))


def test_generate_writes_what_the_run_decoded(run: Path) -> None:
    folder = run / "export/final"
    prompts = [json.loads(line)["prompt"] for line in (run / "rounds/02/samples.jsonl").read_text().splitlines()[::4]]
    expected = [c.text for c in complete(Policy(folder), prompts, keys=None, max_new_tokens=32, batch_size=16)]
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt, text in zip(prompts, expected, strict=True):
        ids = words(prompt, return_tensors="pt")
        made = model.generate(**{k: v for k, v in ids.items() if k in ("input_ids", "attention_mask")})
        assert words.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == text


def test_the_card_has_the_runs_figures(run: Path) -> None:
    card = (run / "export/final/README.md").read_text()
    rounds = read_rounds(run)
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "tags": ["self-improvement", "model-merging", "itermerge"]}
    for row, name in {"ID: find": "id/acc", "OOD near: chain": "ood/chain/acc", "OOD far, mean": "ood/far/acc"}.items():
        cells = [
            f"{100 * m[name]:.1f} [{100 * m[f'{name}_low']:.1f}, {100 * m[f'{name}_high']:.1f}]"
            for m in (rounds[0], rounds[2])
        ]
        assert f"| {row} | {cells[0]} | {cells[1]} |" in card
    learnt = [int(m["train_sample/examples"]) for m in rounds[1:]]
    assert f"| examples learnt, by round | {learnt[0]}, {learnt[1]} |" in card
    for said in ("# Round 2 of 2: find", "the lab's base, seed 9", "find (lab): 16 problems, the same each round",
                 "| merge | linear (", "| ratio | 0.5 |", "| anchor | base, after each epoch |",
                 "| seed | 0 |", "up to 8 test items a task"):  # fmt: skip
        assert said in card
    prompt = json.loads((run / "rounds/02/examples.jsonl").read_text().splitlines()[0])["prompt"]
    assert f"~~~text\n{prompt}\n~~~" in card


def test_the_cards_prompt_is_one_of_training_through_the_chat_template(run: Path, tmp_path: Path) -> None:
    """Sampled with worked examples, learnt without; messages as the tokenizer's own template writes them."""
    (tmp_path / "rounds/01").mkdir(parents=True)
    shutil.copyfile(run / "rounds.jsonl", tmp_path / "rounds.jsonl")
    words = AutoTokenizer.from_pretrained(LAB_SEED0)
    words.chat_template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"
    cfg = check(compose_config(*SMALL))
    for learnt, said in {
        "Q: 2+2?": "Q: 2+2?",
        render("chat", "2+2?", (), "Sum."): "<system> Sum.\n<user> 2+2?\n<assistant>",
    }.items():
        for name, prompt in {"samples": f"shots {learnt}", "examples": learnt}.items():
            (tmp_path / f"rounds/01/{name}.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        text = export.card(cfg, tmp_path, 1, "float32", "greedy", {}, words)
        assert f"A prompt that it was fine-tuned on:\n\n~~~text\n{said}\n~~~" in text


def test_the_recipe_has_config_and_digests(run: Path) -> None:
    recipe = json.loads((run / "export/final/recipe.json").read_text())
    digests = _digests(run / "export/final")
    assert recipe["files"] == {k: v for k, v in digests.items() if k != "recipe.json"}
    assert recipe["config"]["task"]["family"] == "find"
    assert not {"paths", "store", "export"} & recipe["config"].keys()


@pytest.mark.parametrize("diff", ["+ secret", "", None])
def test_the_recipe_says_that_code_was_changed_and_not_how(diff: str | None, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/provenance.json").write_text(json.dumps({"commit": "abc", "diff": diff}))
    cfg = check(compose_config(*SMALL, *BOTH))
    export.export(cfg, tmp_path / "run", 2, run / "rounds/02/model", tmp_path / "out", "float32", "greedy")
    told = json.loads((tmp_path / "out/recipe.json").read_text())["provenance"]
    assert told == {"commit": "abc", "changed": bool(diff)}


def test_the_command_makes_the_same_folder(run: Path, tmp_path: Path) -> None:
    done = _command("export", f"run={run}", "out=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert _digests(tmp_path / "mine") == _digests(run / "export/final")
    again = _command("export", f"run={run}", "out=mine", cwd=tmp_path)
    assert (again.returncode, again.stderr.strip()) == (
        2, "error: out: mine exists already, and is never overwritten; give another out"
    )  # fmt: skip


def test_bfloat16_and_sampled_decoding(run: Path, tmp_path: Path) -> None:
    cfg = check(compose_config(*SMALL, *BOTH, "sampler.temperature=0.7", "sampler.top_p=0.9"))
    export.export(cfg, run, 1, run / "rounds/01/model", tmp_path / "out", "bfloat16", "sampled")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    for name, tensor in load_file(run / "rounds/01/model/model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor.bfloat16())
    own = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (own.do_sample, own.temperature, own.top_p, own.top_k, own.max_new_tokens) == (True, 0.7, 0.9, 0, 32)
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = words("find", return_tensors="pt")["input_ids"].repeat(8, 1)
    assert len({tuple(row) for row in model.generate(ids).tolist()}) > 1


def test_penalties_of_the_base_go(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "rounds/02/model", tmp_path / "model")
    own = {"do_sample": True, "repetition_penalty": 1.1, "top_k": 20, "eos_token_id": [5, 7], "bos_token_id": 3}
    (tmp_path / "model/generation_config.json").unlink(missing_ok=True)
    (tmp_path / "model/generation_config.json").write_text(json.dumps(own))
    cfg = check(compose_config(*SMALL, *BOTH))
    export.export(cfg, run, 2, tmp_path / "model", tmp_path / "out", "float32", "greedy")
    made = json.loads((tmp_path / "out/generation_config.json").read_text())
    eos = AutoTokenizer.from_pretrained(LAB_SEED0).eos_token_id
    ends = [eos, *(i for i in (5, 7) if i != eos)]
    assert {k: made.get(k) for k in (*own, "max_new_tokens")} == {
        "do_sample": False, "repetition_penalty": None, "top_k": None, "eos_token_id": ends, "bos_token_id": 3,
        "max_new_tokens": 32,
    }  # fmt: skip


def test_tied_embeddings(tiny_folder: Path, run: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    for file in tiny_folder.glob("token*"):
        shutil.copyfile(file, tmp_path / "tied" / file.name)
    with safe_open(tmp_path / "tied/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    cfg = check(compose_config(*SMALL, *BOTH, "model=hf", f"model.path={tmp_path / 'tied'}"))
    export.export(cfg, run, 2, tmp_path / "tied", tmp_path / "out", "bfloat16", "greedy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_hub_base_is_named_for_the_hub(run: Path) -> None:
    cfg = check(compose_config(*SMALL, "model=hf", "model.path=Qwen/Qwen2.5-0.5B-Instruct", "merge=dare"))
    text = export.card(cfg, run, 1, "float32", "greedy", {"overrides": ["merge=dare", "seed=1"], "commit": "abc"}, None)
    head = yaml.safe_load(text.split("---")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("Qwen/Qwen2.5-0.5B-Instruct", "finetune")
    assert "density=0.8" in text
    assert "\n    itermerge merge=dare seed=1\n" in text
    assert "| commit | abc |" in text


def test_an_export_has_exactly_the_runs_scores(run: Path, tmp_path: Path) -> None:
    words = [w for w in SMALL if not w.startswith(("model", "rounds", "task.n_train"))]
    done = _command("evaluate", *words, "model=hf", f"model.path={run}/export/final", "out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("scores.json", "held_out.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "rounds/02" / name).read_bytes()
    figures = json.loads((tmp_path / "out/evaluation.json").read_text())["models"][0]["figures"]
    theirs = read_rounds(run)[2]
    assert {"id/acc_low", "ood/far/acc_high", "val/id/acc", "sample/pass@4_low"} <= figures.keys()
    assert {k: theirs[k] for k in figures} == figures


@pytest.mark.parametrize("keep", ["last", "none"])
def test_weights_that_were_dropped_are_computed_again(keep: str, run: Path, home: Path, tmp_path: Path) -> None:
    """In a store of their own, or keep=all of the first run would have them kept."""
    words = [f"store.keep={keep}", f"store.dir={tmp_path}/store", *BOTH[1:]]
    run_here(tmp_path / "a", *words)
    assert export.placed(tmp_path / "a", 1) is None
    done = _command("export", f"run={tmp_path}/a", "round=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "were not kept" in done.stdout + done.stderr
    made = tmp_path / "a/export/round_01"
    assert (made / "model.safetensors").read_bytes() == (run / "rounds/01/model/model.safetensors").read_bytes()
    assert [p.name for p in (tmp_path / "a/export").iterdir()] == ["round_01"]
    summary = run_here(tmp_path / "b", *words, "export.rounds=[1,final,best]")
    files = {r: _digests(tmp_path / "b/export" / r) for r in ("round_01", "final", "best")}
    assert files["round_01"]["model.safetensors"] == _digests(made)["model.safetensors"]
    best = {1: "round_01", 2: "final"}.get(summary["best_round_by_validation"])
    assert best is None or files["best"] == files[best]
    left = list((tmp_path / "store").glob("merge/*/*/model.safetensors"))
    assert len(left) == {"last": 1, "none": 0}[keep]


def test_other_figures_the_second_time_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    rows = read_rounds(run)
    rows[1]["id/acc"] += 0.5
    (tmp_path / "a/rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export.check_same(run, tmp_path / "a", 2)
    with pytest.raises(ExportError, match=r"came out otherwise: id/acc is .*store\.keep=all"):
        export.check_same(run, tmp_path / "a", 1)


def test_the_base_is_exported_where_it_is_the_best(run: Path, tmp_path: Path) -> None:
    done = _command("export", f"run={run}", "round=0", "out=base", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "base", LAB_SMALL))
    assert all(torch.equal(ours[name], theirs[name].float()) for name in theirs)
    assert "The base itself" in (tmp_path / "base/README.md").read_text()


def test_another_base_is_not_exported_under_the_runs_figures(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    export.check_base(run, base_digest(LAB_SMALL))
    with pytest.raises(ExportError, match=r"round 0: the base is not the one that .* started from"):
        export.check_base(run, base_digest(LAB_SEED0))
    assert not caplog.records


def test_an_unfinished_run_does_not_say_its_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export.check_base(tmp_path, "abc")
    assert "is not known" in caplog.text


def test_a_round_of_a_run_that_failed_later(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed again up to that round, and no further."""
    words = (*BOTH[1:], "rounds=3", "store.keep=last", "merge/policy=schedule", f"store.dir={tmp_path}/store")
    made, fit = [], stages.Bench.fit

    def fails(self: Any, examples: Any, now: Any) -> Any:
        made.append(now.number)
        if now.number == 3:
            raise RuntimeError("a failure")
        return fit(self, examples, now)

    monkeypatch.setattr(stages.Bench, "fit", fails)
    with pytest.raises(RuntimeError, match="a failure"):
        run_here(tmp_path / "a", *words)
    assert export.placed(tmp_path / "a", 1) is None
    made.clear()
    cfg = cli._config_of(tmp_path / "a")
    with cli._weights_of(cfg, tmp_path / "a", 1, tmp_path / "near") as folder:
        assert load_file(folder / "model.safetensors")
    assert made == [1]


def test_a_run_that_goes_on_leaves_other_exports(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "a")
    for name in ("DONE", "INTERRUPTED"):
        (tmp_path / "a" / name).unlink(missing_ok=True)
    for name in ("round_01", "mine", "best.partial-1"):
        (tmp_path / "a/export" / name).mkdir()
        (tmp_path / "a/export" / name / "kept").write_text("")
    (tmp_path / "a/export/final/README.md").write_text("of an earlier try")
    run_here(tmp_path / "a", *BOTH)
    assert sorted(p.name for p in (tmp_path / "a/export").iterdir()) == ["best", "final", "mine", "round_01"]
    assert (tmp_path / "a/export/round_01/kept").exists()
    assert _digests(tmp_path / "a/export/final") == _digests(run / "export/final")


def test_a_failure_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = check(compose_config(*SMALL, *BOTH))

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "card", full)
    with pytest.raises(ExportError, match="the disk is full"):
        export.export(cfg, run, 2, run / "rounds/02/model", tmp_path / "out", "float32", "greedy")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"out: the model needs \d+ MiB in float32 .*; give another out"):
        export.export(cfg, run, 2, run / "rounds/02/model", tmp_path / "out", "float32", "greedy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run=nowhere",), "run: nowhere is no run folder"),
        (("run={run}", "round=7"), "round: .* has rounds 0 (the base) to 2, got 7"),
        (("run={run}", "round=last"), "round: must be final, best, or a number from 0, got 'last'"),
        (("run={run}", "dtype=float8"), "dtype: 'float8' is none of float32, bfloat16"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str, run: Path, tmp_path: Path) -> None:
    done = _command("export", *(w.format(run=run) for w in words), cwd=tmp_path)
    assert done.returncode == 2
    first, _, last = message.partition(" .* ")
    assert done.stderr.startswith(f"error: {first}")
    assert last in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_has_rounds_by_number_alone(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    assert round_of(tmp_path / "run", 1) == 1
    with pytest.raises(ExportError, match="is not finished; give a number from 0 to 2"):
        round_of(tmp_path / "run", "best")


@pytest.mark.parametrize(
    ("value", "message"),
    [("[last]", "takes final, best, and numbers from 0 to 2; got 'last'"), ("[3]", "from 0 to 2; got 3"),
     ("[best,best]", "names one twice")],
)  # fmt: skip
def test_rounds_to_export_are_checked(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"export.rounds: .*{message}"):
        check(compose_config(*SMALL, f"export.rounds={value}"))

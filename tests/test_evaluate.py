"""`itermerge-evaluate`: figures against their definitions, models compared item by item, and what a mistake meets."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, in_a_process
from hydra import compose, initialize_config_dir

from itermerge import evaluation
from itermerge.config import ConfigError, check_evaluate, conf_dir
from itermerge.stages import LAB_SEED0

SEED1 = LAB_SEED0.parent / "seed1"
FEW = tuple(w for w in SMALL if not w.startswith(("model", "rounds", "task.n_train")))


def _evaluate(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = "from itermerge.cli import evaluate_main; evaluate_main()"
    return in_a_process(code, *words, cwd=cwd, env={"COLUMNS": "120"})


def _check(*words: str) -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return check_evaluate(compose("evaluate", list(words)), list(words))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The lab's bases of seed 0 and seed 1, on few items."""
    folder = tmp_path_factory.mktemp("evaluate")
    made = _evaluate(folder, *FEW, "suite.n=24", "suite.n_validation=4", f"others=[{SEED1}]", "out=out")
    assert made.returncode == 0, made.stderr
    return folder / "out", made.stdout


def test_figures_are_those_of_the_scores(done: tuple[Path, str]) -> None:
    folder, said = done
    assert "suite:" in (folder / "config.yaml").read_text()
    found = json.loads((folder / "evaluation.json").read_text())
    assert [m["model"] for m in found["models"]] == ["lab, seed 0", str(SEED1)]
    for model, place in zip(found["models"], (folder, folder / "other_1"), strict=True):
        scores = json.loads((place / "scores.json").read_text())
        for task, name in {"find": "id/acc", "chain": "ood/chain/acc", "sort": "ood/far/acc"}.items():
            correct = scores[task]["correct"]
            assert len(correct) == 24
            assert model["figures"][name] == sum(correct) / 24
            assert model["reasons"][task] == scores[task]["reasons"]
        low, high = (model["figures"][f"id/acc{end}"] for end in ("_low", "_high"))
        assert (low, high) == evaluation.wilson(sum(scores["find"]["correct"]), 24)
        assert f"{100 * model['figures']['id/acc']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in said
        samples = [json.loads(line) for line in (place / "held_out.jsonl").read_text().splitlines()]
        assert len(samples) == 4 * 4
        assert model["figures"]["sample/pass@1"] == sum(s["verdict"] for s in samples) / 16
        assert {"val/id/acc", "val/ood/acc", "sample/pass@4_high"} <= model["figures"].keys()


def test_models_are_compared_item_by_item(done: tuple[Path, str]) -> None:
    folder, said = done
    (pair,) = json.loads((folder / "evaluation.json").read_text())["compared"]
    assert (pair["model"], pair["to"]) == (str(SEED1), "lab, seed 0")
    a, b = (json.loads((f / "scores.json").read_text()) for f in (folder, folder / "other_1"))
    gains = {t: np.subtract(b[t]["correct"], a[t]["correct"]).mean() for t in ("find", "chain", "sort")}
    assert any(gains.values())
    figures = pair["figures"]
    assert figures["id/acc"] == pytest.approx(gains["find"])
    assert figures["ood/acc"] == pytest.approx((gains["chain"] + gains["sort"]) / 2)
    assert figures["gap/superficiality"] == pytest.approx(figures["id/acc"] - figures["ood/acc"])
    assert all(figures[f"{n}_low"] <= figures[n] <= figures[f"{n}_high"] for n in ("id/acc", "ood/chain/acc"))
    assert f"{100 * figures['ood/chain/acc']:+.1f} [" in said


def test_paired_interval() -> None:
    """One of four items is won: the share of wins is Binomial(4, 1/4) / 4, whose 95% interval is 0 to 3/4."""
    assert evaluation.paired_interval([[1, 0, 0, 1]], [[1, 1, 0, 1]]) == (0.25, 0.0, 0.75)
    assert evaluation.paired_interval([[1, 0], [0]], [[1, 0], [0]]) == (0.0, 0.0, 0.0)
    value, low, high = evaluation.paired_interval([[0] * 50, [1]], [[1] * 50, [0]])  # +1 and -1, a mean of tasks
    assert (value, low, high) == (0.0, 0.0, 0.0)
    assert evaluation.paired_interval([[0] * 4, [0]], [[1] * 4, [0]])[0] == 0.5
    won = [1] * 30 + [0] * 70
    value, low, high = evaluation.paired_interval([[0] * 100], [won])
    half = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert (value, low, high) == (0.3, pytest.approx(0.3 - half, abs=0.015), pytest.approx(0.3 + half, abs=0.015))
    lost = evaluation.paired_interval([won], [[0] * 100])
    assert lost == (-0.3, pytest.approx(-high, abs=0.015), pytest.approx(-low, abs=0.015))


def test_in_domain_alone_and_a_finished_folder(tmp_path: Path) -> None:
    words = (*(w for w in FEW if "suite.near" not in w and "suite.far" not in w), "suite.near=[]", "suite.far=[]")
    made = _evaluate(tmp_path, *words, "suite.pass_k_n=0", "out=out")
    assert made.returncode == 0, made.stderr
    (model,) = json.loads((tmp_path / "out/evaluation.json").read_text())["models"]
    assert {n.split("/")[0] for n in model["figures"]} == {"id", "val"}
    assert not (tmp_path / "out/held_out.jsonl").exists()
    again = _evaluate(tmp_path, *words, "out=out")
    assert again.returncode == 2
    assert "out holds something already, which is never overwritten" in again.stderr


def test_a_task_with_a_test_split_alone(tmp_path: Path) -> None:
    """Three sums that the lab's base cannot do; validation items are neither needed nor told of."""
    _check("task=math500", "suite.pass_k_n=0")
    rows = [json.dumps({"q": f"{i} x?", "a": str(10**6 + i)}) for i in range(3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))
    made = _evaluate(
        tmp_path, "task=hub", "task.path=sums.jsonl", "task.question=q", "task.answer=a", "task.verifier=numeric",
        "task.splits={train: null, validation: null, test: train}", "suite.near=[]", "suite.far=[]", "suite.n=3",
        "suite.pass_k_n=0", "sampler.max_new_tokens=8", "out=out",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert {"id/acc", "id/sums/acc_high"} <= found["models"][0]["figures"].keys()
    assert not any(name.startswith("val/") for name in found["models"][0]["figures"])
    assert (found["models"][0]["figures"]["id/acc"], found["items"]["sums"]["n"]) == (0, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.n_train=5"], r"task\.n_train: is of training"),
        (["suite.pre_merge=true"], r"suite\.pre_merge: is of training"),
        (["model.lora.rank=4"], r"model\.lora\.rank: is of training"),
        (["task.decontaminate=5", "task=gsm8k"], r"task\.decontaminate: is of training"),
        (["task.train_prompt=alpaca", "task=gsm8k"], r"task\.train_prompt: is of training"),
        (["task=math500"], r"suite\.pass_k_n: .*splits\.validation names no split of HuggingFaceH4/MATH-500; use"),
        (["task=math500", "suite.pass_k_n=0", "task.n_validation=4"], r"task\.n_validation: .*; leave it out"),
        (["task=math500", "suite.pass_k_n=0", "task.splits.test=null"], r"task\.splits\.test: names no split"),
        (["sampler.hints=2"], r"sampler\.hints: is of training"),
        (["others=DIR"], r"others: expected a list .* as \[A,B\]; got 'DIR'"),
        (["suite.near=[{kind: lab, family: chain}]"], "chain stands there more than once"),
        (["suite.pass_k_n=900"], r"suite\.pass_k_n: 900 problems"),
        (["task.family=sums"], r"task\.family: 'sums' is none of"),
        (["+suite.m=3"], r"suite\.m: there is no such key"),
        (["suite.n=0"], r"suite\.n: must be at least 1"),
    ],
)
def test_bad_values_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=hf", "model.path=./nowhere"], r"model\.path: \./nowhere is neither a folder nor"),
        (["others=[./nowhere]"], r"others: \./nowhere is neither a folder nor"),
        (["others=[{small}]"], r"others\[0\]: task 'chain': its longest prompt has .* context of 20"),
        (["model=hf"], r"model\.path: a value is needed"),
        (["sampler.max_new_tokens=9000"], r"task 'chain': its longest prompt has .* lower the task's shots"),
    ],
)
def test_a_mistake_ends_the_command_with_its_message(
    words: list[str], message: str, tmp_path: Path, write_variant: Callable[..., Path]
) -> None:
    """Before anything is evaluated."""
    small = write_variant({"config.json": {"max_position_embeddings": 20}})
    made = _evaluate(tmp_path, "suite.n=4", "out=out", *(w.format(small=small) for w in words))
    assert (made.returncode, made.stdout) == (2, "")
    assert re.search(f"^error: .*{message}", made.stderr, re.MULTILINE), made.stderr
    assert not list(tmp_path.rglob("scores.json"))
    assert not (tmp_path / "out/config.yaml").exists()


def test_help(tmp_path: Path) -> None:
    said = _evaluate(tmp_path, "--help").stdout
    assert "itermerge-evaluate model=hf model.path=A others=[B,C]" in said
    assert re.search(r"suite: .*lab, .*lm_eval", said)

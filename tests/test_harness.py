"""Tasks of lm-evaluation-harness beside ours, on local task files: against hand computations and our own decoding."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose_config, enliven, read_rounds, run_here
from harness_tasks import write

from itermerge import harness
from itermerge.config import ConfigError, check
from itermerge.decoding import complete
from itermerge.evaluation import wilson
from itermerge.harness import HarnessExam
from itermerge.policy import Policy
from itermerge.tasks import TaskError
from itermerge.tasks.lab import LabTask

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of the lab as tasks of the harness, and a cache of `datasets` of their own."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        write(folder, [(p.prompt, p.answer) for p in LabTask("chain").problems("test", 16, 0)])
        yield folder  # type: ignore[misc]


def _exam(folder: Path, task: str = "local_choice", metric: str = "acc", n: int = 12, seed: int = 0) -> HarnessExam:
    return HarnessExam(task, task, metric, n=n, seed=seed, include_path=str(folder))


def _silent(_: int) -> None:
    pass


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "choice.jsonl").read_text().splitlines()]


def _log_probability(policy: Policy, prompt: str, answer: str) -> float:
    """Of the answer's tokens after the prompt's, by hand."""
    head, tail = (policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer))
    with torch.inference_mode():
        logs = policy.model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(float(logs[len(head) - 1 + i, token]) for i, token in enumerate(tail))


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choices_are_those_of_the_largest_log_probability(metric: str, folder: Path, tiny: Policy) -> None:
    policy, exam, rows = enliven(tiny), _exam(folder, metric=metric), _rows(folder)
    expected = []
    for at in exam.items:
        row = rows[at]
        logs = [_log_probability(policy, row["question"], c) for c in row["choices"]]
        if metric == "acc_norm":  # by the answer's characters
            logs = [value / len(c) for value, c in zip(logs, row["choices"], strict=True)]
        expected.append(int(np.argmax(logs) == row["answer"]))
    assert 0 < sum(expected) < len(expected)
    ticks: list[int] = []
    found = exam.scores(policy, 5, ticks.append)
    assert found["correct"] == expected
    assert (found["n"], found["reasons"]["correct"], found["reasons"]["wrong"]) == (
        12,
        sum(expected),
        12 - sum(expected),
    )
    answers = [rows[at]["answer"] for at in exam.items]
    assert found["majority"] == max(map(answers.count, answers)) / 12
    assert sum(ticks) == 12


def test_written_answers_are_those_of_our_own_greedy_decoding(folder: Path, lab: Policy) -> None:
    exam = _exam(folder, "local_sums", "exact_match,after-hash", n=16)
    rows = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
    texts = complete(lab, [r["question"] for r in rows], keys=None, max_new_tokens=40, batch_size=16)
    expected = [int(t.text.rpartition("#")[2] == r["answer"]) for t, r in zip(texts, rows, strict=True)]
    assert 0 < sum(expected) < 16
    assert exam.scores(lab, 4, _silent)["correct"] == expected
    assert sum(_exam(folder, "local_sums", "exact_match,whole", n=16).scores(lab, 16, _silent)["correct"]) == 0


def test_items_are_drawn_by_the_seed_and_are_the_same_every_time(folder: Path) -> None:
    exam, again, other = _exam(folder), _exam(folder), _exam(folder, seed=1)
    assert exam.items == again.items != other.items
    assert exam.digest == again.digest != other.digest
    assert len(_exam(folder, n=99).items) == 16
    code = "from itermerge.harness import HarnessExam as H; print(H('a', 'local_choice', 'acc', n=12, seed=0, "
    code += f"include_path={str(folder)!r}).digest)"
    env = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONHASHSEED": "5"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == exam.digest


def test_a_task_of_ones_own_folder_is_found_without_the_index_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, whole = harness._manager, list[bool]()

    def watched(own: str | None, **how: bool) -> object:
        whole.append(how["whole"])
        return inner(own, **how)

    monkeypatch.setattr(harness, "_manager", watched)
    _exam(folder)
    assert whole == [False]


def test_the_digest_tells_metrics_prompts_and_filters_apart(folder: Path) -> None:
    few = HarnessExam("a", "local_choice", "acc", n=12, seed=0, num_fewshot=2, include_path=str(folder))
    assert few.requests[0].args[0].count("?") == 3
    exams = [_exam(folder), _exam(folder, metric="acc_norm"), few]
    exams += [_exam(folder, "local_sums", f"exact_match,{name}") for name in ("after-hash", "whole")]
    assert len({e.digest for e in exams}) == 5


def test_nothing_of_the_harness_reaches_the_rest(folder: Path, tiny: Policy, capfd: pytest.CaptureFixture[str]) -> None:
    policy = enliven(tiny)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.random(), float(torch.rand(()))
    side, config = policy.tokenizer.padding_side, policy.model.generation_config
    env, level = dict(os.environ), logging.getLogger().level
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for exam in (_exam(folder), _exam(folder, "local_sums", "exact_match,whole")):
        exam.scores(policy, 4, _silent)
    assert (random.random(), np.random.random(), float(torch.rand(()))) == expected
    assert (policy.tokenizer.padding_side, policy.model.generation_config) == (side, config)
    assert policy.model.generation_config is config
    assert (dict(os.environ), logging.getLogger().level) == (env, level)
    assert capfd.readouterr() == ("", "")


def test_a_generation_config_changes_nothing(folder: Path, lab: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties and limits that a model's own folder asks for are not the task's."""
    exam = _exam(folder, "local_sums", "exact_match,after-hash", n=8)
    expected = exam.scores(lab, 8, _silent)
    for name, value in {"repetition_penalty": 5.0, "max_new_tokens": 1}.items():
        monkeypatch.setattr(lab.model.generation_config, name, value)
    assert exam.scores(lab, 8, _silent) == expected


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        ("local_choise", "acc", "has none of this name; did you mean .*local_choice"),
        ("local_all", "acc", "is a group of tasks"),
        ("local_choice", "f1", "'f1' is none of its acc, acc_norm"),
        ("local_sums", "bleu", "is no mean over items.* take one of exact_match"),
        ("local_sums", "exact_match", "write 'exact_match,after-hash' or 'exact_match,whole'"),
        ("local_sums", "exact_match,strict", "no filter 'strict'; it has after-hash, whole"),
        ("hellaswag", "acc", "could not be loaded .*hub"),
    ],
)
def test_mistakes_are_named(task: str, metric: str, message: str, folder: Path) -> None:
    with pytest.raises(TaskError, match=f"lm_eval task '{task}'.*{message}"):
        _exam(folder, task, metric)


def test_a_metric_between_0_and_1_is_refused(folder: Path, tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    exam = _exam(folder)
    judge = exam.task.process_results
    monkeypatch.setattr(exam.task, "process_results", lambda doc, r: judge(doc, r) | {"acc": 0.43})
    with pytest.raises(TaskError, match=r"metric: acc gives 0\.43 for an item"):
        exam.scores(tiny, 4, _silent)


def test_items_that_do_not_fit_are_refused(folder: Path, tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.model.config, "max_position_embeddings", 50)
    _exam(folder).check_lengths(tiny)
    with pytest.raises(TaskError, match=r"'local_sums': an item has a prompt of \d+ tokens and 40 for its answer"):
        _exam(folder, "local_sums", "exact_match,whole").check_lengths(tiny)


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(TaskError, match=r"pip install 'itermerge\[lm_eval\]'"):
        _exam(folder)


def test_a_run_has_its_figures_beside_ours(folder: Path, tmp_path: Path) -> None:
    choice = f"{{kind: lm_eval, task: local_choice, metric: acc, label: choice, include_path: {folder}}}"
    words = f"{{kind: lm_eval, task: local_sums, metric: 'exact_match,after-hash', include_path: {folder}}}"
    suite = [f"suite.near=[{choice}]", f"suite.far=[{{kind: lab, family: sort}},{words}]", "suite.n_validation=6"]
    one = ["rounds=1", "analysis.ood=true", "suite.pre_merge=false"]
    run_here(tmp_path / "a", *suite, *one)
    rounds = read_rounds(tmp_path / "a")
    for t, metrics in enumerate(rounds):
        scores = json.loads((tmp_path / f"a/rounds/{t:02d}/scores.json").read_text())
        for label in ("choice", "local_sums"):
            correct = scores[label]["correct"]
            assert len(correct) == 8
            value, low, high = (metrics[f"ood/{label}/acc{end}"] for end in ("", "_low", "_high"))
            assert (value, low, high) == (sum(correct) / 8, *wilson(sum(correct), 8))
        assert metrics["ood/near/acc"] == metrics["ood/choice/acc"]
        both = metrics["ood/sort/acc"] + metrics["ood/local_sums/acc"]
        assert metrics["ood/far/acc"] == pytest.approx(both / 2)
        validation = scores["val/sort"]["correct"]
        assert metrics["val/ood/acc"] == metrics["val/ood/far/acc"] == sum(validation) / 6
        assert "val/ood/near/acc" not in metrics
    assert rounds[1]["kl/ood"] > 0  # on the other OOD task
    again = run_here(tmp_path / "b", *suite, *one)
    assert again["stages"]["computed"] == {}
    other = run_here(tmp_path / "c", *(s.replace("acc,", "acc_norm,") for s in suite), *one)
    assert other["stages"]["computed"] == {"evaluate": 2}


def test_a_suite_of_the_harness_alone_runs(folder: Path, tmp_path: Path) -> None:
    task = f"{{kind: lm_eval, task: local_choice, metric: acc, include_path: {folder}}}"
    summary = run_here(tmp_path / "a", f"suite.near=[{task}]", "suite.far=[]", "rounds=1", "analysis.importance=[]")
    assert summary["analysis_failed"] == {}
    assert "ood/local_choice/acc" in summary["final"]
    assert "kl/ood" not in summary["final"]


def test_the_shipped_suite_passes_and_has_no_validation_items() -> None:
    assert [t.metric for t in check(compose_config("suite=lm_eval")).suite.far] == ["acc_norm", "acc", "acc"]
    with pytest.raises(ConfigError, match=r"suite\.n_validation: .*those of lm_eval do not"):
        check(compose_config("suite=lm_eval", "suite.n_validation=5"))
    with pytest.raises(ConfigError, match=r"suite\.near\[0\]\.metric: a value is needed"):
        check(compose_config("suite=lm_eval", "suite.near=[{kind: lm_eval, task: boolq}]"))
    mixed = ["suite=lm_eval", "suite.near=[{kind: lab, family: pair}]", "suite.n_validation=5"]
    check(compose_config(*mixed, "optimized_metric=val/ood/near/acc"))
    with pytest.raises(ConfigError, match=r"'val/ood/far/acc' is none of"):
        check(compose_config(*mixed, "optimized_metric=val/ood/far/acc"))

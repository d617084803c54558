"""Intervals, pass@k and metrics against published values, enumeration and a slower bootstrap; scoring on toys."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from itermerge import evaluation
from itermerge.decoding import Completion
from itermerge.evaluation import (
    Exam,
    count_reasons,
    difference_interval,
    gap_interval,
    greedy_scores,
    majority,
    mean_interval,
    metrics,
    pass_at_k,
    wilson,
)
from itermerge.tasks import Problem, Split, Verdict, derive_seed


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ],
)  # fmt: skip
def test_wilson_as_published(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_mirrors(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = wilson(correct, n)
    assert 0 <= low <= (correct / n if n else 0.5) <= high <= 1
    assert wilson(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    assert pass_at_k(4, 1, 2) == 0.5  # 1 - C(3,2) / C(4,2) = 1 - 3/6


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=rf"pass@{k} needs at least {k} samples, there are 4"):
        pass_at_k(4, 1, k)


def test_mean_interval_matches_a_bootstrap_over_items() -> None:
    rng = np.random.default_rng(1)
    tasks = [rng.binomial(1, p, n).tolist() for p, n in ((0.3, 60), (0.9, 40), (0.5, 100))]
    mean, low, high = mean_interval(tasks)
    assert mean == pytest.approx(sum(sum(t) / len(t) for t in tasks) / 3)
    draws = [np.mean([rng.choice(t, len(t)).mean() for t in tasks]) for _ in range(4000)]
    assert (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.005)  # 5% and 95%: 0.01 off
    assert mean_interval(tasks) == (mean, low, high)  # the same at every call


def test_mean_interval_weighs_tasks_not_items_and_resamples_within_tasks() -> None:
    assert mean_interval([[1] * 1000, [0]]) == (0.5, 0.5, 0.5)  # tasks without spread: no spread of the mean


def test_counts_and_majority() -> None:
    assert count_reasons(["wrong", "correct", "wrong"]) == {
        "correct": 1, "wrong": 2, "unparseable": 0, "truncated": 0, "timed_out": 0, "error": 0
    }  # fmt: skip
    assert majority(["a", "b", "a", "c"]) == 0.5


def _scores(*correct: int) -> dict[str, Any]:
    return {"correct": list(correct), "majority": 0.25}


def test_metrics_names_and_values() -> None:
    scores = {
        "mine": _scores(1, 1, 0, 0), "n1": _scores(1, 0, 0, 0), "n2": _scores(1, 1, 1, 0), "f": _scores(0, 0, 0, 0),
        "val/mine": _scores(1, 1, 1, 0),
    }  # fmt: skip
    got = metrics(scores, "mine", ["n1", "n2"], ["f"])
    values = {
        "id/acc": 0.5, "id/mine/acc": 0.5, "val/id/acc": 0.75, "ood/n1/acc": 0.25, "ood/n2/acc": 0.75, "ood/f/acc": 0.0,
        "ood/near/acc": 0.5,  # (1/4 + 3/4) / 2
        "ood/far/acc": 0.0,
        "ood/acc": 1 / 3,  # over tasks, not over sides: (1/4 + 3/4 + 0) / 3
    }  # fmt: skip
    assert {name: got[name] for name in values} == pytest.approx(values)
    majorities = {f"ood/{t}/majority": 0.25 for t in ("n1", "n2", "f")}
    assert {name: got[name] for name in majorities} == majorities
    assert got.keys() == {name + end for name in values for end in ("", "_low", "_high")} | majorities.keys()
    assert (got["id/acc_low"], got["id/acc_high"]) == wilson(2, 4)
    assert (got["ood/near/acc_low"], got["ood/near/acc_high"]) == mean_interval([[1, 0, 0, 0], [1, 1, 1, 0]])[1:]


def test_metrics_of_ood_validation_items() -> None:
    scores = {
        "mine": _scores(1, 0), "n": _scores(1, 1), "f": _scores(0, 0), "val/mine": _scores(1, 1),
        "val/n": _scores(1, 0, 0, 0), "val/f": _scores(1, 1, 1, 0),
    }  # fmt: skip
    got = metrics(scores, "mine", ["n"], ["f"])
    assert (got["val/ood/near/acc"], got["val/ood/far/acc"], got["val/ood/acc"]) == (0.25, 0.75, 0.5)
    assert (got["ood/near/acc"], got["ood/far/acc"], got["val/id/acc"]) == (1, 0, 1)
    assert got["val/ood/acc_low"] < 0.5 < got["val/ood/acc_high"]


def test_metrics_of_one_side_alone() -> None:
    got = metrics({"mine": _scores(1), "f": _scores(0), "val/mine": _scores(1)}, "mine", [], ["f"])
    assert "ood/near/acc" not in got
    assert got["ood/acc"] == got["ood/far/acc"] == 0


@dataclass(frozen=True)
class Toy:
    """Problems whose answer is their number; the verifier reads the completion as it is."""

    name: str
    stop: tuple[str, ...] = ()

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]:
        return [Problem(f"{self.name}{i}", f"{i}", f"{self.name}:{i}", "", f"{i}", f"{i % 3}") for i in range(n)]

    def verify(self, problem: Problem, completion: str, finished: bool) -> Verdict:
        if not finished:
            return Verdict("truncated", None)
        return Verdict("correct" if completion == problem.answer else "wrong", completion)


def test_greedy_scores_of_tasks_with_different_stops() -> None:
    """The toy model answers `0` to everything, and does not finish prompts of task c."""
    calls: list[tuple[tuple[str, ...], int, Any]] = []

    def complete(prompts: list[str], *, keys: Any, stop: tuple[str, ...], **_: Any) -> list[Completion]:
        calls.append((stop, len(prompts), keys))
        return [Completion("0", not p.startswith("c"), 1) for p in prompts]

    tasks = {"a": Toy("a"), "b": Toy("b", ("\n",)), "c": Toy("c"), "val/a": Toy("a")}
    sizes = {"a": 4, "b": 3, "c": 2, "val/a": 1}
    exams = [Exam(label, task, task.problems("test", sizes[label])) for label, task in tasks.items()]
    got = greedy_scores(complete, exams, on_progress=lambda _: None)
    assert list(got) == ["a", "b", "c", "val/a"]
    # answers are 0, 1, 2, 0, ...
    assert {label: s["correct"] for label, s in got.items()} == {
        "a": [1, 0, 0, 1], "b": [1, 0, 0], "c": [0, 0], "val/a": [1]
    }  # fmt: skip
    assert got["c"]["reasons"] == {
        "correct": 0,
        "wrong": 0,
        "unparseable": 0,
        "truncated": 2,
        "timed_out": 0,
        "error": 0,
    }
    assert got["a"]["reasons"] == {
        "correct": 2,
        "wrong": 2,
        "unparseable": 0,
        "truncated": 0,
        "timed_out": 0,
        "error": 0,
    }
    assert {label: s["n"] for label, s in got.items()} == sizes
    assert got["a"]["majority"] == 0.5
    assert sorted(calls, key=str) == sorted([((), 4 + 2 + 1, None), (("\n",), 3, None)], key=str)


def test_samples_are_grouped_by_problem_under_keys_of_their_own() -> None:
    seen: dict[str, Any] = {}

    def complete(prompts: list[str], *, keys: list[int], stop: Any, **how: Any) -> list[Completion]:
        seen.update(keys=keys, how=how)
        return [Completion(f"{p}/{k}", True, 1) for p, k in zip(prompts, keys, strict=True)]

    problems = Toy("t").problems("train", 3)
    got = evaluation.sample(complete, Toy("t"), problems, 2, 7, temperature=0.5)
    keys = [derive_seed(7, p.id, i) for p in problems for i in range(2)]
    assert [[c.text for c in cs] for cs in got] == [
        [f"t:{i}/{keys[2 * i]}", f"t:{i}/{keys[2 * i + 1]}"] for i in range(3)
    ]
    assert seen == {"keys": keys, "how": {"temperature": 0.5}}
    assert len(set(keys)) == 6
    # a problem keeps its draws whatever stands beside it
    assert evaluation.sample_keys(problems[2:], 2, 7) == keys[4:]


def test_difference_of_proportions_against_newcombes_own_example() -> None:
    """Newcombe (1998), table II, method 10: 56/70 - 48/80 = .2000 [.0524, .3339]."""
    assert difference_interval((56, 70), (48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    _, low, high = difference_interval((0, 10), (0, 10))
    assert low == pytest.approx(-high)


def test_gap_of_gains_by_hand() -> None:
    """ID gains 2 of 4, of the two OOD tasks one loses 1 of 2: .5 - (-.25) = .75."""
    base = {"id": {"correct": [0, 0, 1, 1]}, "a": {"correct": [1, 1]}, "b": {"correct": [0, 1]}}
    now = {"id": {"correct": [1, 1, 1, 1]}, "a": {"correct": [0, 1]}, "b": {"correct": [0, 1]}}
    gap, low, high = gap_interval(base, now, "id", ["a", "b"])
    assert gap == 0.75
    assert 0 <= low < 0.3
    assert 1.2 < high <= 1.5
    assert gap_interval(base, base, "id", ["a", "b"]) == (0, 0, 0)

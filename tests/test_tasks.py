"""The lab's families: answers recomputed from the prompt by evaluators of our own, disjoint parts, verdicts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itermerge.tasks import REASONS, Problem, Split, TaskError, Verdict, check_disjoint, check_gold, derive_seed
from itermerge.tasks.lab import ALPHABET, FAMILIES, LabTask, draw, part_of

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def _sum(text: str) -> int:
    """A sum of signed numbers, left to right."""
    return sum(int(t) for t in re.findall(r"[+-]?\d+", text))


def _mod(text: str) -> int:
    total, modulus = text.split("%")
    value = _sum(total)
    while value >= int(modulus):
        value -= int(modulus)
    return value


def _mad(text: str) -> int:
    first, second, third = map(int, re.split(r"[*+]", text))
    return sum([first] * second) + third


def _find(text: str) -> int:
    known, total = re.fullmatch(r"(\d+)\+\?=(\d+)", text).groups()  # type: ignore[union-attr]
    return next(x for x in range(1000) if int(known) + x == int(total))


def _truth(term: str) -> str:
    left, operator, right = re.fullmatch(r"(!?[tf])([&|])(!?[tf])", term).groups()  # type: ignore[union-attr]
    true = [side in ("t", "!f") for side in (left, right)]
    return "t" if (all(true) if operator == "&" else any(true)) else "f"


def _shift(text: str) -> str:
    by, word = text.split()
    return "".join(chr((ord(c) - ord("a") + int(by)) % 26 + ord("a")) for c in word)


def _count(text: str) -> int:
    letter, word = text.split()
    return len(word) - len(word.replace(letter, ""))


RECOMPUTE: dict[str, tuple[str, Callable[[str], object]]] = {
    "chain": (r"sum \d\d([+-]\d\d){2,3}\?", _sum),
    "pair": (r"add \d\d\+\d\d\?|sub \d\d-\d\d\?", _sum),
    "find": (r"find \d\d\+\?=\d+\?", _find),
    "mod": (r"mod \d\d\+\d\d%[3-9]\?", _mod),
    "mad": (r"mad [2-9]\*1[1-9]\+\d\d\?", _mad),
    "sort": (r"sort [a-z]{4,6}\?", lambda t: "".join(c for c in string.ascii_lowercase if c in t)),
    "count": (r"count [abc] [abc]{7,10}\?", _count),
    "eval": (r"eval !?[tf][&|]!?[tf](,!?[tf][&|]!?[tf]){2}\?", lambda t: "".join(map(_truth, t.split(",")))),
    "shift": (r"shift [1-3] [a-z]{3,5}\?", _shift),
    "max": (r"max \d{3},\d{3},\d{3}\?", lambda t: sorted(t.split(","))[-1]),  # same length: as text
}


def _problems(family: str) -> list[Problem]:
    return [p for split in SPLITS for p in LabTask(family).problems(split, 100, "test", 0)]


def test_every_family_is_tested() -> None:
    assert RECOMPUTE.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_recomputed_from_the_prompt(family: str) -> None:
    shape, answer = RECOMPUTE[family]
    for p in _problems(family):
        assert re.fullmatch(shape, p.prompt), p.prompt
        assert p.answer == str(answer(p.prompt.removesuffix("?").split(" ", 1)[1])), p.prompt
    assert len({p.answer for p in _problems(family)}) > 4


def _true_equation(step: str) -> bool:
    left, right = step.split("=")
    if "%" in left:
        return _mod(left) == int(right)
    if "*" in left:
        first, second = left.split("*")
        return int(first) * int(second) == int(right)
    return _sum(left) == int(right)


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_of_every_style_passes_and_its_steps_are_true(family: str) -> None:
    task = LabTask(family)
    check_gold(task, _problems(family))
    for worked in draw(family, "pretrain", 300, "gold"):
        p = Problem(worked.text, worked.text, worked.text, worked.text, worked.styles[0], worked.answer)
        assert set(worked.text).union(*worked.styles) <= set(ALPHABET)
        assert len(set(worked.styles)) == 2
        for style in worked.styles:
            assert task.verify(p, style, True).correct, style
            for step in re.findall(r"(?:^|,)(\d+[-+*%]\d+=\d+)(?=[,#])", style):
                assert _true_equation(step), style
            for small, big in [(a, b) if s == "<" else (b, a) for a, s, b in re.findall(r"(\d+)([<>])(\d+)", style)]:
                assert int(small) <= int(big), style


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_disjoint_for_every_seed_and_hold_different_questions(family: str) -> None:
    task = LabTask(family)
    splits = {s: [p for seed in range(3) for p in task.problems(s, 60, seed)] for s in SPLITS}
    check_disjoint(family, {**splits, "pretrain": [
        Problem(w.text, w.text, w.text, w.text, "", w.answer) for w in draw(family, "pretrain", 200)
    ]})  # fmt: skip
    for split, problems in splits.items():
        assert {part_of(p.text) for p in problems} == {split}
        assert len({p.text for p in problems[:60]}) == 60
    assert [p.text for p in splits["train"][:60]] != [p.text for p in splits["train"][60:120]]


def test_more_problems_begin_with_the_same_ones() -> None:
    task = LabTask("chain")
    assert task.problems("train", 40, 1)[:15] == task.problems("train", 15, 1)


def test_same_problems_in_a_process_with_another_hash_seed() -> None:
    code = (
        "import json; from itermerge.tasks.lab import FAMILIES, LabTask;"
        "print(json.dumps([[p.prompt, p.gold] for f in FAMILIES for p in LabTask(f).problems('train', 20, 'run', 7)]))"
    )
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        assert json.loads(out) == [
            [p.prompt, p.gold] for f in FAMILIES for p in LabTask(f).problems("train", 20, "run", 7)
        ]


def test_a_family_that_is_too_small_says_so() -> None:
    with pytest.raises(TaskError, match=r"'pair' has only about \d+ test problems, 3000 were asked for"):
        draw("pair", "test", 3000)  # 8,100 sums and 4,095 differences, a fifth of them in this part
    with pytest.raises(TaskError, match=r"no lab family 'chian'; there are chain, pair"):
        LabTask("chian")


@pytest.mark.parametrize(
    ("completion", "finished", "reason", "answer"),
    [
        ("34+18=52,52-15=37#37", True, "correct", "37"),
        ("#37", True, "correct", "37"),
        ("1#2#37", True, "correct", "37"),  # the last mark counts
        ("34+18=52#38", True, "wrong", "38"),
        ("37#37 ", True, "wrong", "37 "),
        ("37#037", True, "wrong", "037"),
        ("37", True, "unparseable", None),
        ("37#", True, "unparseable", None),
        ("", True, "unparseable", None),
        ("34+18=52#37", False, "truncated", None),
    ],
)
def test_verdicts(completion: str, finished: bool, reason: str, answer: str | None) -> None:
    problem = Problem("i", "sum 34+18-15?", "sum 34+18-15?", "", "", "37")
    verdict = LabTask("chain").verify(problem, completion, finished)
    assert (verdict.reason, verdict.answer, verdict.correct) == (reason, answer, reason == "correct")


@given(st.text() | st.text(ALPHABET) | st.just("1#37") | st.from_regex(r"[0-9]*#3?7?", fullmatch=True), st.booleans())
def test_no_text_raises_and_only_the_answer_is_correct(completion: str, finished: bool) -> None:
    problem = Problem("i", "sum 34+18-15?", "", "", "", "37")
    verdict = LabTask("chain").verify(problem, completion, finished)
    assert verdict.reason in REASONS
    assert verdict.correct == (finished and "#" in completion and completion.split("#")[-1] == "37")


# --- what holds for every task -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A task whose verifier reads the first letter, and so rejects its own longer answers."""

    name: str = "broken"
    stop: tuple[str, ...] = ()

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]:
        return [Problem(f"p{i}", f"q{i}", "", "", "a" * (i + 1), "a" * (i + 1)) for i in range(n)]

    def verify(self, problem: Problem, completion: str, finished: bool) -> Verdict:
        return Verdict("correct" if completion[0] == problem.answer else "wrong", completion[0])


def test_check_gold_names_task_problem_and_answers() -> None:
    check_gold(Broken(), Broken().problems("test", 1))
    with pytest.raises(TaskError, match=r"task 'broken', problem 'p1': .*'aa' wrong \(it read 'a', expected 'aa'\)"):
        check_gold(Broken(), Broken().problems("test", 3))
    with pytest.raises(TaskError, match=r"task 'broken' gave no problems"):
        check_gold(Broken(), [])


def test_check_disjoint_names_an_example_and_both_splits() -> None:
    one, two, three = Broken().problems("test", 3)
    check_disjoint("t", {"train": [one, one], "validation": [two], "test": [three]})
    with pytest.raises(TaskError, match=r"'t': 'q1' stands in both the validation and the test split"):
        check_disjoint("t", {"train": [one], "validation": [two], "test": [three, replace(one, text="q1")]})


def test_derived_seeds_are_distinct_63_bit_numbers() -> None:
    parts = [(a, b) for a in range(40) for b in range(40)] + [("1", 2), (12,), (1, 2, 0), ("", 12), ("1\x1f2",), ()]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(1, "a") == int.from_bytes(hashlib.sha256(b"int:1\x1fstr:a").digest()[:8], "big") // 2

"""reasoning-gym tasks: prompts, disjoint parts, verdicts, and what is refused."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from itermerge.tasks import Problem, TaskError, check_disjoint, check_gold
from itermerge.tasks import gym as module
from itermerge.tasks.gym import CORRECT_FROM, REFUSED, GymTask, majority_baseline, part_of

pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TWO_DIGITS = ONE_DIGIT | {"min_digits": 2, "max_digits": 2}


@pytest.fixture(autouse=True)
def _no_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    module._item.cache_clear()
    module._source.cache_clear()


def test_prompt_is_plain_question_answer_blocks_of_fixed_examples() -> None:
    task = GymTask("chain_sum", options=TWO_DIGITS, shots=2, train_shots=1)
    first, other = task.problems("test", 1, 0)[0], task.problems("train", 1, 99)[0]
    example = r"Question: State the final [a-z ]+: \d\d [+-] \d\d =\nAnswer: -?\d+\n\n"
    assert re.fullmatch(rf"({example}){{2}}Question: {re.escape(first.text)}\nAnswer:", first.prompt)
    assert first.gold == f" {first.answer}"
    assert task.stop == ("\n",)
    # the examples are those of the task, whatever the split and the seed; train_prompt has the first of them
    shots = first.prompt.removesuffix(f"Question: {first.text}\nAnswer:")
    assert other.prompt.startswith(shots)
    assert first.train_prompt == shots[: shots.index("\n\n") + 2] + f"Question: {first.text}\nAnswer:"
    assert GymTask("chain_sum", options=TWO_DIGITS, shots=0).problems("test", 1, 0)[0].prompt == (
        f"Question: {first.text}\nAnswer:"
    )


def test_parts_are_disjoint_for_every_seed_and_hold_different_questions() -> None:
    task = GymTask("chain_sum", options=ONE_DIGIT)  # 10 * 10 * 2 = 200 questions in all
    splits: dict[str, list[Problem]] = {
        split: [p for seed in range(3) for p in task.problems(split, 25, seed)]  # type: ignore[arg-type]
        for split in ("train", "validation", "test")
    }
    check_disjoint(task.name, splits)
    texts = {p.text for ps in splits.values() for p in ps}
    shown = set(re.findall(r"Question: (.*)\nAnswer: ", splits["test"][0].prompt))
    assert len(shown) == 4
    assert not shown & texts
    assert {part_of(text) for text in shown} == {"shots"}
    for split, problems in splits.items():
        assert {part_of(p.text) for p in problems} == {split}
        assert len({p.text for p in problems[:25]}) == 25
    assert [p.text for p in splits["train"][:25]] != [p.text for p in splits["train"][25:50]]


def test_a_space_that_is_too_small_is_named_with_its_size() -> None:
    task = GymTask("products", "times", {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2})
    with pytest.raises(
        TaskError, match=r"'times' has only (\d+) different test problems .* 101 were asked.*lower"
    ) as e:
        task.problems("test", 101, 0)
    found = int(re.search(r"only (\d+)", str(e.value))[1])  # type: ignore[index]
    # 10 * 10 questions: the search has seen all of those that hash into the test part
    space = [
        f"Solve the following multiplication: {a} * {b}. Give only the result as your final answer."
        for a in range(10)
        for b in range(10)
    ]
    assert found == sum(part_of(text) == "test" for text in space)
    assert len(task.problems("test", found, 0)) == found


def test_same_problems_in_another_process() -> None:
    code = (
        "import json;from itermerge.tasks.gym import GymTask;"
        "print(json.dumps([[p.id, p.prompt, p.gold] for d in ('list_functions', 'chain_sum')"
        " for p in GymTask(d, shots=1).problems('test', 40, 'run', 7)]))"
    )
    # list_functions draws from `random` itself, which no seed of reasoning-gym reaches
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = [
        [p.id, p.prompt, p.gold]
        for d in ("list_functions", "chain_sum")
        for p in GymTask(d, shots=1).problems("test", 40, "run", 7)
    ]
    assert json.loads(out) == here


def test_verdicts() -> None:
    task = GymTask("chain_sum", options=TWO_DIGITS)
    problem = task.problems("test", 1, 0)[0]
    check_gold(task, [problem])
    for completion, finished, reason, answer in (
        (f" {problem.answer}", True, "correct", problem.answer),
        (f" {problem.answer}.0 ", True, "correct", f"{problem.answer}.0"),
        (f" {problem.answer}7", True, "wrong", f"{problem.answer}7"),  # reasoning-gym gives partial credit for it
        (" \t", True, "unparseable", None),
        (f" {problem.answer}", False, "truncated", None),
    ):
        verdict = task.verify(problem, completion, finished)
        assert (verdict.reason, verdict.answer) == (reason, answer)
    partial = module._source("chain_sum", task._config, 0).score_answer(
        f"{problem.answer}7", {"answer": problem.answer}
    )
    assert 0 < partial < CORRECT_FROM


def test_a_verifier_that_raises_makes_the_answer_unparseable() -> None:
    task = GymTask("prime_factorization", shots=0)
    problem = task.problems("test", 1, 0)[0]
    check_gold(task, [problem])
    verdict = task.verify(problem, " two times 3", True)  # int("two times 3") raises in reasoning-gym
    assert (verdict.reason, verdict.answer) == ("unparseable", None)


def test_verification_needs_the_problem_only_and_survives_pickling() -> None:
    one, two = (GymTask("chain_sum", options=o, shots=0) for o in (ONE_DIGIT, TWO_DIGITS))
    problems = [task.problems("test", 3, 0) for task in (one, two)]
    module._item.cache_clear()
    module._source.cache_clear()
    again, kept = pickle.loads(pickle.dumps(((one, two), problems)))
    assert again == (one, two)
    for task, mine, others in zip(again, kept, reversed(kept), strict=True):
        check_gold(task, mine)
        with pytest.raises(TaskError, match="was not made by this task"):
            task.verify(others[0], others[0].gold, True)


def test_global_generators_are_left_as_they_were() -> None:
    GymTask("chain_sum")
    random.seed(1)
    np.random.seed(1)
    want = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    GymTask("list_functions", shots=0).problems("test", 2, 0)
    assert (random.random(), np.random.random()) == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "chainsum"}, r"no reasoning-gym dataset 'chainsum'; did you mean .*chain_sum"),
        ({"dataset": "chain_sum", "options": {"max_term": 2}}, r"options.max_term: .*did you mean max_terms"),
        ({"dataset": "chain_sum", "options": {"seed": 2}}, r"options.seed: "),
        (
            {"dataset": "chain_sum", "options": {"max_terms": "2"}},
            r"options.max_terms of 'chain_sum' is a int, not '2'",
        ),
        ({"dataset": "chain_sum", "options": {"max_terms": True}}, r"is a int, not True"),
        ({"dataset": "chain_sum", "options": {"max_terms": 1}}, r"max_terms must be >= min_terms"),
        ({"dataset": "chain_sum", "shots": -1}, r"shots is a number of examples, 0 or more; it is -1"),
        ({"dataset": "codeio"}, r"'codeio' is refused: it runs code"),
        ({"dataset": "spiral_matrix"}, r"refused: its verifier evaluates, as Python code, text"),
        ({"dataset": "ransom_note"}, r"'ransom_note' makes other items in every process.*set PYTHONHASHSEED=0"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        GymTask(**arguments)


def test_a_fixed_string_hash_admits_the_datasets_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    with pytest.raises(TaskError, match="PYTHONHASHSEED"):
        GymTask("ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert GymTask("ransom_note").name == "ransom_note"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("propositional_logic", "stores None as the answer"), ("mini_sudoku", "several lines")],
)
def test_items_without_a_one_line_answer_are_an_error(dataset: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        GymTask(dataset, shots=0).problems("test", 1, 0)


def test_no_dataset_whose_verifier_evaluates_text_is_let_through() -> None:
    reads = re.compile(r"\b(eval|exec|parse_expr|sympify)\((?!entry\[)")  # eval(entry[...]) reads its own answer
    evaluating = set()
    for name, (dataset, _) in module._registry().items():
        if reads.search(inspect.getsource(dataset.score_answer)):  # type: ignore[attr-defined]
            evaluating.add(name)
    assert "spiral_matrix" in evaluating  # the search finds something
    # logic.propositional_logic has a parser of its own by this name, and no reference answers
    assert evaluating - set(REFUSED) <= {"propositional_logic"}


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(TaskError, match=r"pip install 'itermerge\[gym\]'"):
        GymTask("chain_sum")


def test_majority_baseline() -> None:
    problems = [Problem(str(i), str(i), "", "", "", answer) for i, answer in enumerate("1213")]
    assert majority_baseline(problems) == 0.5  # "1" is 2 of 4
    with pytest.raises(TaskError, match="needs problems"):
        majority_baseline([])


def test_import_does_not_load_reasoning_gym() -> None:
    code = "import sys, itermerge.tasks.gym; print('reasoning_gym' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=os.environ).strip() == "False"


def test_the_global_generators_stay_as_they_are() -> None:
    task = GymTask("chain_sum", shots=2)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    problems = task.problems("test", 30, 7)
    attempts = [(p, p.gold if i % 2 else " 1", True) for i, p in enumerate(problems)]
    together = task.verify_many(attempts)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    module._item.cache_clear()
    module._source.cache_clear()
    random.seed(6)
    np.random.seed(6)
    assert [task.verify(*attempt) for attempt in attempts] == together
    assert task.problems("test", 30, 7) == problems
    with pytest.raises(TaskError):
        GymTask("chain_sum", options=ONE_DIGIT).problems("test", 10**6, 7)
    assert not module._kept

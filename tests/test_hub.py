"""Data sets as tasks: rows of the real sets' shapes in local folders and files, prompts, parts, decontamination."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import compose_config, read_rounds, run_here
from hypothesis import given
from hypothesis import strategies as st

from itermerge.config import ConfigError, check
from itermerge.policy import Policy
from itermerge.stages import build_task, task_key
from itermerge.tasks import Problem, Split, TaskError, check_disjoint, check_gold, hub, prompts, verifiers
from itermerge.tasks.contamination import Evaluated
from itermerge.tasks.hub import HubTask, part_of, read_shots
from itermerge.weights import PolicyError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _fresh_notes() -> None:
    hub._say_once.cache_clear()


def write(path: Path, rows: Rows) -> str:
    """The rows as a file of the kind that its name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return str(path)


def repository(folder: Path, splits: dict[str, Rows]) -> Path:
    """A folder of the shape of a hub repository: data/train-00000-of-00001.parquet and so on."""
    for split, rows in splits.items():
        write(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    return folder


# Rows as the real sets have them (columns and types as on the hub; the contents are ours), by a number.
def gsm8k(i: int) -> dict[str, Any]:
    answer = (
        f"He has {i} * 2 = <<{i}*2={2 * i}>>{2 * i} of them.\nThat is {2 * i} - 1 = {2 * i - 1}.\n#### {2 * i - 1:,}"
    )
    return {
        "question": f"Tom has {i} bags with 2 balls each and loses one ball. How many are left of {i} bags?",
        "answer": answer,
    }


def competition(i: int) -> dict[str, Any]:
    answer = f"\\frac{{1}}{{{2 * i + 1}}}"
    solution = f"Since $2 \\cdot {i} = {2 * i}$, it is ${answer}$. The answer is $\\boxed{{{answer}}}$."
    return {
        "problem": f"What is the reciprocal of $2 \\cdot {i} + 1$?",
        "level": f"Level {i % 5 + 1}",
        "type": "Algebra",
        "solution": solution,
    }


def math500(i: int) -> dict[str, Any]:
    row = competition(i)
    return {
        "problem": row["problem"], "solution": row["solution"], "answer": f"\\frac{{1}}{{{2 * i + 1}}}",
        "subject": "Algebra", "level": i % 5 + 1, "unique_id": f"test/algebra/{i}.json",
    }  # fmt: skip


def svamp(i: int) -> dict[str, Any]:
    return {
        "ID": f"chal-{i}", "Body": f"Ann has {i} pens and gets 3.", "Question": "How many pens has she?",
        "Equation": f"( {i}.0 + 3.0 )", "Answer": f"{i + 3}.0", "Type": "Addition",
    }  # fmt: skip


def arc(i: int) -> dict[str, Any]:
    labels = ["1", "2", "3", "4"] if i % 7 == 0 else ["A", "B", "C", "D"]
    texts = [f"thing {i}", f"metal {i}", f"plant {i}", f"star {i}"]
    return {
        "id": f"m{i}",
        "question": f"Which of {i} shines?",
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[i % 4],
    }


def commonsense(i: int) -> dict[str, Any]:
    texts = [f"bank {i}", f"library {i}", f"shop {i}", f"mall {i}", f"new {i}"]
    return {
        "id": f"c{i}", "question": f"Where are {i} revolving doors?", "question_concept": "door",
        "choices": {"label": list("ABCDE"), "text": texts}, "answerKey": "ABCDE"[i % 5],
    }  # fmt: skip


def strategy(i: int) -> dict[str, Any]:
    return {
        "qid": f"q{i}", "term": "x", "description": "y", "question": f"Is {i} even?", "answer": i % 2 == 0,
        "facts": ["Even numbers end so."], "decomposition": ["What is even?"],
    }  # fmt: skip


def aqua(i: int) -> dict[str, Any]:
    options = [f"{letter}){i + k}" for k, letter in enumerate("ABCDE")]
    return {"question": f"What is {i} plus 2?", "options": options, "rationale": f"{i} + 2\nAnswer C", "correct": "C"}


def mawps(i: int) -> dict[str, Any]:
    return {
        "id": f"mawps__{i}", "question": f"Joan found {i} shells and gave 1 away. How many are left?",
        "chain": f"<gadget id=\"calculator\">{i} - 1</gadget>", "result": str(i - 1), "result_float": float(i - 1),
        "equation": f"X = {i} - 1", "expression": f"{i} - 1",
    }  # fmt: skip


def bbh(i: int) -> dict[str, Any]:
    text = f"Today is day {i}. What is it called?\nOptions:\n(A) Monday {i}\n(B) Tuesday {i}\n(C) Friday {i}"
    return {"input": text, "target": f"({'ABC'[i % 3]})"}


BBH = ("task.n_train=64", "task.n_validation=24", "suite.n=40", "suite.pass_k_n=16")
Case = tuple[Callable[[int], dict[str, Any]], dict[str, int], list[str], str]
CASES: dict[str, Case] = {  # rows, splits and their sizes, the overrides of the README, the verifier
    "gsm8k": (gsm8k, {"train": 800, "test": 60}, ["task=gsm8k", "task.name=null"], "numeric"),
    "math": (competition, {"train": 800, "test": 60}, ["task=math"], "math"),
    "svamp": (svamp, {"train": 200, "test": 60}, ["task=svamp"], "numeric"),
    "arc_challenge": (
        arc, {"train": 150, "validation": 60, "test": 60}, ["task=arc_challenge", "task.name=null"], "choice",
    ),
    "commonsense_qa": (commonsense, {"train": 800, "validation": 60}, ["task=commonsense_qa"], "choice"),
    "aqua": (
        aqua, {"train": 150, "validation": 60, "test": 60},
        ["task=hub", "task.question=question", "task.choices=options", "task.answer=correct", "task.verifier=choice",
         "task.splits.validation=validation"], "choice",
    ),
    "strategyqa": (
        strategy, {"train": 200, "test": 60},
        ["task=hub", "task.question=question", "task.answer=answer", "task.verifier=boolean", "task.shots=4",
         "task.shots_file=boolean"], "boolean",
    ),
    "mawps": (
        mawps, {"train": 150, "validation": 60, "test": 60},
        ["task=hub", "task.question=question", "task.answer=result", "task.verifier=numeric",
         "task.splits.validation=validation"], "numeric",
    ),
    "bbh": (
        bbh, {"test": 250},  # as date_understanding has
        ["task=hub", "task.question=input", "task.answer=target", "task.verifier=choice",
         "task.splits={train: test, validation: test, test: test}", *BBH], "choice",
    ),
}  # fmt: skip
MATH_OFF = "task.decontaminate=null"  # our rows are alike but for a number


def made(name: str, tmp_path: Path, *more: str) -> tuple[HubTask, Any]:
    row, splits, words, _ = CASES[name]
    start, parts = 10, {}
    for split, size in splits.items():
        parts[split] = [row(i) for i in range(start, start + size)]
        start += size
    folder = repository(tmp_path / name, parts)
    cfg = check(compose_config(*words, f"task.path={folder}", MATH_OFF, *more))
    task = build_task(cfg.task)
    assert isinstance(task, HubTask)
    return task, cfg


@pytest.mark.parametrize("name", CASES)
def test_real_schemas_are_read_and_their_gold_answers_pass(name: str, tmp_path: Path) -> None:
    task, cfg = made(name, tmp_path)
    assert task.verifier == CASES[name][3]
    splits = {split: task.problems(split, 20, "seed", 0) for split in SPLITS}
    check_disjoint(name, splits)
    for problems in splits.values():
        check_gold(task, problems)
        assert len({p.text for p in problems}) == 20
        for p in problems:
            assert p.prompt.endswith(f"Question: {p.text}\nAnswer:")
            assert p.hint_prompt != p.prompt
            assert p.answer in p.hint_prompt
            # a wrong answer is told from the right one
            wrong = {"choice": "B" if p.answer != "B" else "A", "boolean": "no" if p.answer == "yes" else "yes"}
            other = wrong.get(task.verifier, "17.5")
            assert task.verify(p, f" The answer is {other}.", True).reason == "wrong"
    again = build_task(cfg.task).problems("train", 12, "seed", 0)
    assert again == splits["train"][:12]  # more problems begin with the same ones
    assert again != task.problems("train", 12, "seed", 1)


def test_a_small_set_has_the_problems_that_its_command_asks_for(tmp_path: Path) -> None:
    from itermerge.stages import Exams

    task, cfg = made("bbh", tmp_path)
    of = Exams(cfg.task, cfg.suite, lambda spec: task if spec is cfg.task else build_task(spec))
    assert (len(of.own), len(of.validation)) == (40, 24)
    assert len(task.problems("train", cfg.task.n_train, 0)) == 64
    assert cfg.suite.pass_k_n == 16 <= len(of.validation)


@pytest.mark.parametrize("suite", ["gsm8k", "math"])
def test_suites_do_not_ask_for_every_row_of_svamp(suite: str) -> None:
    assert check(compose_config(f"suite={suite}")).suite.n <= 290  # of 300


def test_the_versions_that_judge_latex_are_in_the_keys() -> None:
    from importlib.metadata import version

    key = task_key(check(compose_config("task=math")).task)
    assert {p: key[p] for p in ("math-verify", "sympy", "latex2sympy2_extended")} == {
        p: version(p) for p in ("math-verify", "sympy", "latex2sympy2_extended")
    }
    assert "sympy" not in task_key(check(compose_config("task=gsm8k")).task)


def test_gsm8ks_own_solutions_are_gold_completions(tmp_path: Path) -> None:
    task, _ = made("gsm8k", tmp_path)
    (p,) = task.problems("test", 1, 0)
    i = (int(p.answer) + 1) // 2
    assert p.gold == f" He has {i} * 2 = {2 * i} of them.\nThat is {2 * i} - 1 = {2 * i - 1}.\n#### {2 * i - 1:,}"
    assert task.stop == ("\nQuestion:",)


def test_a_solution_that_does_not_verify_gives_way_to_the_answer(tmp_path: Path) -> None:
    rows = [{"q": f"{i}?", "a": i, "s": f"It is {i}." if i % 2 else f"It is {i + 1}."} for i in range(1, 80)]
    file = write(tmp_path / "a.jsonl", rows)
    task = HubTask(file, "q", "a", "numeric", "a", solution="s")
    golds = {p.answer: p.gold for p in task.problems("test", 10, 0)}
    for answer, gold in golds.items():
        assert gold == (f" It is {answer}." if int(answer) % 2 else f" The answer is {answer}.")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_single_files_are_cut_by_a_hash(suffix: str, tmp_path: Path) -> None:
    rows = [{"question": f"How much is {i} and 1?", "answer": i + 1} for i in range(300)]
    file = write(tmp_path / f"sums.{suffix}", rows)
    task = HubTask(file, "question", "answer", "numeric", "sums")
    sizes = {}
    for split in SPLITS:
        have = [r["question"] for r in rows if part_of(r["question"], (60, 15, 25)) == SPLITS.index(split)]
        assert {p.text for p in task.problems(split, len(have), 1)} == set(have)
        sizes[split] = len(have)
    assert sum(sizes.values()) == 300
    with pytest.raises(TaskError, match=rf"'sums' .*{sizes['test'] + 1} test problems were asked for, there are"):
        task.problems("test", sizes["test"] + 1, 0)


@pytest.mark.parametrize("name", ["math500", "arc_challenge", "svamp"])
def test_tasks_of_a_suite_need_a_test_split_alone(name: str, tmp_path: Path) -> None:
    rows = {"math500": math500, "arc_challenge": arc, "svamp": svamp}[name]
    folder = repository(tmp_path / name, {"test": [rows(i) for i in range(40)]})
    task = build_task(check(compose_config(
        "suite=lab", f"+task@suite.tasks.x={name}", f"suite.tasks.x.path={folder}", "suite.tasks.x.name=null",
        "suite.far=['${suite.tasks.x}']",
    )).suite.far[0])  # fmt: skip
    problems = task.problems("test", 40, 0)
    check_gold(task, problems)
    with pytest.raises(TaskError, match="train"):
        task.problems("train", 1, 0)


def test_configs_of_a_repository_are_joined(tmp_path: Path) -> None:
    """As of EleutherAI/hendrycks_math, which has one for each subject."""
    subjects = {"algebra": range(60), "geometry": range(60, 120)}
    lines = ["---", "configs:"]
    for subject, numbers in subjects.items():
        write(tmp_path / "m" / subject / "train.parquet", [competition(i) for i in numbers])
        lines += [
            f"- config_name: {subject}",
            "  data_files:",
            "  - split: train",
            f"    path: {subject}/train.parquet",
        ]
    (tmp_path / "m" / "README.md").write_text("\n".join([*lines, "---", ""]))
    words = ["task=math", f"task.path={tmp_path / 'm'}", MATH_OFF, "task.splits={train: train, test: train}"]
    both = build_task(check(compose_config(*words, "task.name=[algebra,geometry]")).task)
    one = build_task(check(compose_config(*words, "task.name=geometry")).task)
    assert len({p.text for s in SPLITS for p in both._part(s)}) == 120  # type: ignore[attr-defined]
    assert len({p.text for s in SPLITS for p in one._part(s)}) == 60  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match=r"task\.path=.*could not be loaded .*task\.name"):
        build_task(check(compose_config(*words, "task.name=topology")).task).problems("train", 1, 0)


def test_where_keeps_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "m.jsonl", [competition(i) for i in range(50)])
    task = HubTask(file, "problem", "solution", "math", "m", where={"level": ["Level 4", "Level 5"]})
    assert len([i for s in SPLITS for i in task._part(s)]) == 20
    with pytest.raises(TaskError, match="there is no column 'lvl'; there are problem, level, type, solution"):
        HubTask(file, "problem", "solution", "math", "m", where={"lvl": 1}).problems("test", 1, 0)


def test_templates_and_nested_columns(tmp_path: Path) -> None:
    rows = [{"a": {"b": f"{{c}} {i}"}, "c": "see", "out": {"value": i}} for i in range(40)]
    task = HubTask(write(tmp_path / "n.jsonl", rows), "{c}: {a.b}!", "out.value", "numeric", "n")
    (p,) = task.problems("test", 1, 0)
    assert p.text == f"see: {{c}} {p.answer}!"  # braces in a cell are text


def test_questions_of_several_answers_and_unreadable_ones_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"q": f"{i}?", "a": i} for i in range(40)]
    rows = [{"q": r["q"], "a": str(r["a"])} for r in rows]
    rows += [{"q": "0?", "a": "0"}, {"q": "1?", "a": "7"}, {"q": "1?", "a": "1"}, {"q": "no", "a": "none"}]
    task = HubTask(write(tmp_path / "d.jsonl", rows), "q", "a", "numeric", "d")
    with caplog.at_level(logging.INFO):
        found = {i.text for s in SPLITS for i in task._part(s)}
    assert found == {f"{i}?" for i in range(40)} - {"1?"}
    assert (
        "left out: answer cannot be read (1), question has several answers (1), question seen before (2)" in caplog.text
    )
    assert "row 43 of train: the answer a: expected one number" in caplog.text
    with pytest.raises(TaskError, match=r"task\.answer and task\.verifier=boolean"):
        HubTask(task.path, "q", "a", "boolean", "d").problems("test", 1, 0)


def test_what_stands_in_a_later_part_is_not_practised(tmp_path: Path) -> None:
    rows = [gsm8k(i) for i in range(60)]
    folder = repository(tmp_path / "r", {"train": rows, "validation": rows[:12], "test": rows[10:20]})
    names: dict[str, str | None] = {s: s for s in SPLITS}
    task = HubTask(str(folder), "question", "answer", "numeric", "r", splits=names)
    parts = {s: {i.text for i in task._part(s)} for s in SPLITS}
    assert [len(parts[s]) for s in SPLITS] == [40, 10, 10]
    assert not parts["train"] & (parts["validation"] | parts["test"])
    assert not parts["validation"] & parts["test"]


def test_same_problems_in_another_process(tmp_path: Path) -> None:
    file = write(tmp_path / "s.jsonl", [gsm8k(i) for i in range(90)])
    code = (
        "import sys, json; from itermerge.tasks.hub import HubTask;"
        "t = HubTask(sys.argv[1], 'question', 'answer', 'numeric', 's', shots=2, shots_file='word_problems');"
        "print(json.dumps([[p.id, p.prompt, p.gold] for p in t.problems('train', 20, 'run', 7)]))"
    )
    env = os.environ | {"PYTHONHASHSEED": "3"}
    out = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True, env=env).stdout
    task = HubTask(file, "question", "answer", "numeric", "s", shots=2, shots_file="word_problems")
    assert json.loads(out) == [[p.id, p.prompt, p.gold] for p in task.problems("train", 20, "run", 7)]


# --- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "none.jsonl"}, r"task\.path=none\.jsonl\): there is no such file or folder; .*make wordproblems"),
        ({"path": "nobody/nothing"}, r"task\.path=nobody/nothing.*HF_HUB_OFFLINE=1.*local copy"),
        ({"splits": {"test": "tset"}}, r"split 'tset'.*could not be loaded.*a single file has one split, train"),
        ({"revision": "abc"}, "task.revision=abc is for the hub"),
        ({"question": "Question"}, "there is no column 'Question'; there are question, answer"),
        ({"shots": 3}, "shots_file: is needed for 3 worked examples; take one of boolean, choice, math, word_problems"),
        ({"shots": 9, "shots_file": "word_problems"}, "shots: 9 were asked for, word_problems has 8"),
        ({"shots": 1, "shots_file": "boolean"}, "verifier numeric reads no answer in the solution"),
        ({"shots": 1, "shots_file": "mine.jsonl"}, r"task\.shots_file: mine\.jsonl is no file, and none of boolean"),
        ({"verifier": "number"}, "verifier 'number' is none of numeric, choice, math, boolean, exact"),
        ({"prompt": "Q"}, "prompt: 'Q' is none of qa, alpaca, chat, and no text with {question} in it"),
        ({"choices": "answer"}, "choices: expected 2 to 26 texts in a list"),
        ({"splits": {}}, "splits: names no split"),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "s.jsonl", [gsm8k(i) for i in range(90)])
    given_: dict[str, Any] = {
        "path": file,
        "question": "question",
        "answer": "answer",
        "verifier": "numeric",
        "name": "s",
    }
    with pytest.raises(TaskError, match=said.replace("{question}", r"\{question\}")):
        HubTask(**given_ | change).problems("test", 1, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=math500"], r"task\.splits\.train: names no split of HuggingFaceH4/MATH-500"),
        (["task=gsm8k", "task.shares=[1,2]"], r"task\.shares: needs three whole numbers"),
        (["task=gsm8k", "task.verifier=nmeric"], r"task\.verifier: 'nmeric' is none of numeric, choice, math"),
        (["task=gsm8k", "task.choices=c"], r"task\.choices: are for verifier=choice, and task\.verifier is numeric"),
        (["task=gsm8k", "task.eval_prompt=zero"], r"task\.eval_prompt: 'zero' is none of qa, alpaca, chat"),
        (
            ["task=gsm8k", "task.prompt='{question}'"],
            r"task\.prompt: '\{question\}' has no \{shots\}, and 8 are asked for",
        ),
        (["task=gsm8k", "task.name=3"], r"task\.name: expected a config of openai/gsm8k"),
        (["task=gsm8k", "task.quesion=x"], r"quesion"),
        (["task=hub", "task.path=a.jsonl"], r"task\.(question|answer|verifier): "),
        (["task=gsm8k", "task.decontaminate=0"], r"task\.decontaminate: must be at least 1"),
        (["suite=gsm8k", "suite.tasks.svamp.splits.test=null"], r"suite\.near\[0\]\.splits\.test: names no split"),
        (["suite=gsm8k", "task=svamp"], "svamp stands there more than once"),
    ],
)
def test_configs_are_checked_before_anything_is_loaded(words: list[str], said: str) -> None:
    from hydra.errors import HydraException

    with pytest.raises((ConfigError, HydraException), match=said):
        check(compose_config(*words))


def test_tasks_of_a_suite_are_those_of_conf_task_without_what_is_of_practice() -> None:
    suite = check(compose_config("suite=gsm8k", "suite.tasks.svamp.shots=3")).suite
    svamp_, math_ = suite.near
    assert (svamp_.path, svamp_.shots, math_.verifier, math_.splits.train) == ("ChilleD/SVAMP", 3, "math", None)
    assert not hasattr(svamp_, "n_train")
    with pytest.raises(ConfigError, match=r"suite\.near\[0\].*n_train: there is no such key"):
        check(compose_config("suite.near=[{kind: lab, family: pair, n_train: 3}]"))


# --- worked examples and prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "verifier"), [
    ("word_problems", "numeric"), ("math", "math"), ("choice", "choice"), ("boolean", "boolean"),
])  # fmt: skip
def test_worked_examples_give_answers(name: str, verifier: str) -> None:
    shots = read_shots(name)
    assert len({q for q, _ in shots}) == len(shots) >= 4
    for question, solution in shots:
        said = verifiers.read(verifier, solution, verifiers.options(question))
        assert said
        assert "\n" not in solution
    answers = [verifiers.read(verifier, s, verifiers.options(q)) for q, s in shots]
    assert len(set(answers)) > 1  # no constant reply is taught


def test_each_worked_sum_is_right() -> None:
    """Every `a op b = c` of the word problems is true, and the last result is the answer."""
    for _, solution in read_shots("word_problems"):
        sums = re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", solution)
        assert sums
        for left, result in sums:
            first, *rest = re.findall(r"([-+*/]?) ?(\d+)", left)
            value = int(first[1])
            for op, number in rest:
                value = {
                    "+": value + int(number),
                    "-": value - int(number),
                    "*": value * int(number),
                    "/": value / int(number),
                }[op]
            assert value == int(result), solution
        assert verifiers.read("numeric", solution) == sums[-1][1]


def test_the_users_own_shots_with_choices(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["x", "y"], "solution": "The answer is (B)."}
    file = write(tmp_path / "mine.jsonl", [row])
    assert read_shots(file) == (("Which?\n(A) x\n(B) y", "The answer is (B)."),)
    (tmp_path / "bad.jsonl").write_text('{"question": "Which?"}\n')
    with pytest.raises(TaskError, match=r'bad\.jsonl, line 1: expected \{"question"'):
        read_shots(str(tmp_path / "bad.jsonl"))


SHOT = (("1 + 1?", "It is 2."),)


def test_formats_word_for_word() -> None:
    assert (
        prompts.render("qa", "2 + 2?", SHOT, "Add.")
        == "Add.\n\nQuestion: 1 + 1?\nAnswer: It is 2.\n\nQuestion: 2 + 2?\nAnswer:"
    )
    head = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    assert prompts.render("alpaca", "2 + 2?") == f"{head}### Instruction:\n2 + 2?\n\n### Response:"
    assert prompts.render("alpaca", "2 + 2?", SHOT) == (
        f"{head}### Instruction:\nQuestion: 1 + 1?\nAnswer: It is 2.\n\nQuestion: 2 + 2?\n\n### Response:"
    )
    assert prompts.render("<{instruction}|{shots}|{question}>", "{shots}", SHOT, "Add.") == (
        "<Add.|Question: 1 + 1?\nAnswer: It is 2.\n\n|{shots}>"
    )
    assert prompts.messages_of(prompts.render("chat", "2 + 2?", SHOT, "Add.")) == [
        {"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "It is 2."}, {"role": "user", "content": "2 + 2?"},
    ]  # fmt: skip
    assert prompts.messages_of("2 + 2?") is None


def test_stop_strings_leave_gsm8ks_mark_alone() -> None:
    for template in prompts.FORMATS:
        assert not any(s in "72 dollars.\n#### 72" for s in prompts.stop_strings([template]))
    assert prompts.stop_strings(["qa", "alpaca"]) == ("\nQuestion:", "Question:", "Instruction:", "Response:")


@given(st.text(max_size=80))
def test_any_question_survives_the_chat_format(question: str) -> None:
    found = prompts.messages_of(prompts.render("chat", question))
    assert found == [{"role": "user", "content": question}]


def test_sampling_training_and_evaluation_prompts_differ(tmp_path: Path) -> None:
    """As in the paper's code: Alpaca, worked examples when sampling, none in training and evaluation."""
    words = ("task.prompt=alpaca", "task.shots=8", "task.train_shots=0", "task.eval_shots=0")
    task, _ = made("gsm8k", tmp_path, *words)
    (p,) = task.problems("train", 1, 0)
    assert p.train_prompt == p.asked == prompts.render("alpaca", p.text)
    assert p.prompt == prompts.render("alpaca", p.text, read_shots("word_problems"))
    assert task.stop == ("Question:", "Instruction:", "Response:")
    assert Problem("i", "q", "prompt", "t", "g", "a").asked == "prompt"


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}{{ strftime_now('%Y') if not date_string else '' }}"
)


def test_chat_prompts_take_the_tokenizers_template_and_no_special_token_twice(tiny: Policy) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    prompt = prompts.render("chat", "2+2?", SHOT)
    with pytest.raises(PolicyError, match=r"no chat template, which task\.prompt=chat needs; use task\.prompt=qa"):
        tiny.encode_prompt(prompt)
    tokenizer.chat_template = TEMPLATE
    ids = tiny.encode_prompt(prompt)
    assert ids == [bos, *tokenizer("<u>1 + 1?<a>It is 2.<u>2+2?<a>", add_special_tokens=False)["input_ids"]]
    assert tiny.encode_prompt("2+2?")[0] == bos  # a plain text still gets its own
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(PolicyError, match="refuses the prompt: no system"):
        tiny.encode_prompt(prompt)


# --- decontamination -----------------------------------------------------------------------------------------------


def test_exact_and_ngram_overlap_by_hand() -> None:
    seen = Evaluated(["One two, three FOUR five?", "Short one"], 4)
    assert seen.has("one  two three four five") == "exact"
    assert seen.has("So: two three four five six") == "ngram"  # two three four five
    assert seen.has("two three four six five") is None
    assert seen.has("short ONE!") == "exact"
    assert seen.has("a short one") is None  # fewer than four words are compared as a whole
    assert Evaluated([], 4).has("") is None


@given(
    st.lists(st.sampled_from("abcdef"), max_size=12),
    st.lists(st.sampled_from("abcdef"), max_size=12),
    st.integers(1, 4),
)
def test_ngram_overlap_is_that_of_a_slow_reference(a: list[str], b: list[str], n: int) -> None:
    overlap = any(a[i : i + n] == b[j : j + n] for i in range(len(a) - n + 1) for j in range(len(b) - n + 1))
    expected = "exact" if a == b else "ngram" if overlap else None
    assert Evaluated([" ".join(a)], n).has(" ".join(b)) == expected


def test_a_run_leaves_contaminated_problems_out_and_finds_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The lab's own questions as a data set; an OOD task asks half of the training ones again, word for word or with a
    word before."""
    from itermerge.tasks.lab import draw

    worked = [w for part in ("pretrain", "train", "validation", "test") for w in draw("find", part, 60)]  # type: ignore[arg-type]
    rows = [{"question": w.text, "answer": f"{w.styles[0]} #### {w.answer}"} for w in worked]
    own = write(tmp_path / "find.jsonl", rows)
    words = [
        "task=gsm8k", f"task.path={own}", "task.name=null", "task.splits.test=train", "task.shares=[60,15,25]",
        "task.shots=0", "task.prompt='{question}'", "task.label=own", "task.n_train=16", "task.n_validation=8",
        "task.decontaminate=3", "suite.pass_k_n=4", "rounds=1", f"store.dir={tmp_path / 'store'}",
    ]  # fmt: skip
    alone = build_task(check(compose_config(*words)).task).problems("train", 40, 0, "fixed")
    copies = [
        {"question": f"Please {p.text}" if i % 4 else p.text, "answer": p.answer} for i, p in enumerate(alone[:16:2])
    ]
    other = write(tmp_path / "copies.jsonl", copies)
    near = (
        f"suite.near=[{{kind: hub, path: {other}, label: copies, splits: {{test: train}}, question: question, "
        "answer: answer, verifier: numeric}]"
    )
    with caplog.at_level(logging.INFO):
        summary = run_here(tmp_path / "run", *words, near, "suite.n=8")
    text = (tmp_path / "run" / "rounds" / "01" / "samples.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    practised = {s["prompt"] for s in samples}
    assert practised.isdisjoint({p.text for p in alone[:16:2]})
    assert practised >= {p.text for p in alone[1:16:2]}
    assert len(practised) == 16
    count = summary["decontaminated"]
    assert count["exact"] == 2  # of the eight copies those without a word before
    assert count["exact"] + count["ngram"] == count["of"] - 16 >= 8
    assert "they are left out, others take their place" in caplog.text
    assert re.search(r"round 1: 64 samples: \d+ correct", caplog.text)
    assert {f"train_sample/{r}" for r in ("timed_out", "error", "unparseable")} <= set(read_rounds(tmp_path / "run")[1])

    with pytest.raises(TaskError, match=r"train problems were asked for.*share words in a row.*task\.decontaminate=1"):
        run_here(tmp_path / "none", *words, near, "suite.n=8", "task.decontaminate=1")
    write(tmp_path / "copies.jsonl", [{"question": p.text, "answer": p.answer} for p in alone[:16]])
    hub._load.cache_clear()
    with pytest.raises(TaskError, match="stands in both the train and the items split"):
        run_here(tmp_path / "off", *words, near, "suite.n=8", "task.decontaminate=null")


def test_a_verifier_that_reads_nothing_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": f"sum {i}+1?", "answer": i % 2 == 0} for i in range(120)]
    file = write(tmp_path / "b.jsonl", rows)
    summary = run_here(
        tmp_path / "run", "task=hub", f"task.path={file}", "task.splits.test=train", "task.question=question",
        "task.answer=answer", "task.verifier=boolean", "task.prompt='{question}'", "task.label=b", MATH_OFF,
        "task.n_train=8", "task.n_validation=8", "rounds=2", "loop.on_empty=skip", f"store.dir={tmp_path / 'store'}",
    )  # fmt: skip
    assert summary["final"]["train_sample/unparseable"] + summary["final"]["train_sample/truncated"] == 32
    assert "of its own have more than" not in caplog.text
    warned = [r for r in caplog.records if "the verifier finds no answer in most of them" in r.getMessage()]
    assert len(warned) == 1
    assert "task.verifier" in warned[0].getMessage()


def test_solutions_longer_than_samples_are_told_before_any_is_made_and_cut_off_ones_after(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": f"sum {i}+1?", "answer": f"It is {i} + 1 = {i + 1}. #### {i + 1}"} for i in range(120)]
    file = write(tmp_path / "b.jsonl", rows)
    run_here(
        tmp_path / "run", "task=hub", f"task.path={file}", "task.splits.test=train", "task.question=question",
        "task.answer=answer", "task.solution=answer", "task.verifier=numeric", "task.prompt='{question}'",
        "task.label=b", MATH_OFF, "task.n_train=8", "task.n_validation=8", "rounds=2", "loop.on_empty=skip",
        "sampler.max_new_tokens=1", "suite.pass_k_n=4", f"store.dir={tmp_path / 'store'}",
    )  # fmt: skip
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    before = [i for i, text in enumerate(said) if "8 of 8 solutions of its own have more than sampler.max_new" in text]
    after = [
        i for i, text in enumerate(said) if re.search(r"round 1: \d+ of 32 samples were cut off after 1 tok", text)
    ]
    assert len(before) == 1
    assert len(after) == 1
    assert before < after
    assert sum("were cut off" in text for text in said) == 1  # not in each round

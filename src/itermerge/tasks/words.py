"""Word problems with one number as their answer, from a JSON-lines file, asked with worked examples.

    prompt      Question: A baker had 20 rolls and sold 8 of them. How many rolls are left?
                Answer: The baker sold 8 of 20 rolls, so 20 - 8 = 12 are left. The answer is 12.

                Question: Seven red apples and two green apples are in the basket. How many apples are in the basket?
                Answer:
    completion  " There are 7 + 2 = 9 apples. The answer is 9."

A row of the file is {"question": ..., "answer": "9"}; other keys are ignored. `python -m itermerge.wordproblems` makes
such files of ASDiv and of GSM8K's test set. The worked examples are our own (`SHOTS`); they stand in no data set.

The number that is read is the last one after the last "answer is", else the last one of the text; it must equal the
gold number exactly (3.4 is not 3). Nothing is evaluated.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from . import Problem, Split, TaskError, Verdict, derive_seed

SHOTS: tuple[tuple[str, str], ...] = (
    ("A baker had 20 rolls and sold 8 of them. How many rolls are left?",
     "The baker sold 8 of 20 rolls, so 20 - 8 = 12 are left. The answer is 12."),
    ("A shelf has 4 rows with 6 jars in each row. How many jars are on the shelf?",
     "There are 4 rows of 6 jars, so there are 4 * 6 = 24 jars. The answer is 24."),
    ("Nora picked 15 plums. Her brother picked 9 more than she did. How many plums did they pick together?",
     "Her brother picked 15 + 9 = 24 plums. Together they picked 15 + 24 = 39 plums. The answer is 39."),
    ("Five friends share 35 stickers equally. How many stickers does each of them get?",
     "35 stickers for 5 friends are 35 / 5 = 7 stickers each. The answer is 7."),
    ("A ticket costs 3 dollars and a drink costs 2 dollars. How much do 4 tickets and one drink cost?",
     "4 tickets cost 4 * 3 = 12 dollars. With the drink it is 12 + 2 = 14 dollars. The answer is 14."),
    ("Omar had 50 beads. He used 18 for a necklace and 12 for a bracelet. How many beads does he have now?",
     "He used 18 + 12 = 30 beads. So he has 50 - 30 = 20 beads now. The answer is 20."),
)  # fmt: skip
PART_UP_TO = {60: "train", 75: "validation", 100: "test"}  # per cent, cumulative
# What stands together as a number, right or not; a minus after a digit or a bracket is an operator.
_RUN = re.compile(r"(?:(?<![0-9)])[-\u2212])?\$?\.?[0-9][0-9.,/:]*(?:[eE][-+]?[0-9]+)?")
_PLAIN = re.compile(r"-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(?:\.[0-9]{1,30})?|\.[0-9]{1,30})")
_MARK = re.compile(r"answer is", re.IGNORECASE)


def numbers(text: str) -> list[str | None]:
    """The numbers of a text in order, without currency signs; None for what is not one plain decimal number: a
    fraction, a time, 1e9, more than 30 digits."""
    runs = (m.group().rstrip(".,:/").replace("$", "").replace("\u2212", "-") for m in _RUN.finditer(text))
    return [run if _PLAIN.fullmatch(run) else None for run in runs]


def value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def read_answer(text: str) -> str | None:
    """The last number after the last "answer is", else the last number of the text; None where there is none, or where
    it is not a plain one."""
    *_, last = [0, *(m.end() for m in _MARK.finditer(text))]
    found = numbers(text[last:]) or numbers(text)
    return found[-1] if found else None


@dataclass(frozen=True)
class WordTask:
    """Word problems of one file. `holds` is what is in it: `all` splits its questions by a hash of their text, `test`
    makes each a test item. `shots` worked examples stand before a question, `train_shots` of them in training."""

    file: str
    label: str
    holds: str = "all"
    shots: int = len(SHOTS)
    train_shots: int = 0

    def __post_init__(self) -> None:
        for key in ("shots", "train_shots"):
            if not 0 <= (count := getattr(self, key)) <= len(SHOTS):
                raise TaskError(f"task {self.label!r}: {key} is {count}; there are {len(SHOTS)} worked examples")
        rows(self.file)

    @property
    def name(self) -> str:
        return self.label

    @property
    def stop(self) -> tuple[str, ...]:
        return ("\n",)

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]:
        """`n` problems of `split` in an order of `seed`. Raises TaskError when the file has fewer."""
        have = [r for r in rows(self.file) if self.holds == split or (self.holds == "all" and part_of(r[0]) == split)]
        if len(have) < n:
            raise TaskError(
                f"task {self.label!r}: {n} {split} problems were asked for, {self.file} has {len(have)}; "
                "lower the number"
            )
        random.Random(derive_seed("words", self.label, split, *seed)).shuffle(have)
        head, train_head = (
            "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in SHOTS[:count])
            for count in (self.shots, self.train_shots)
        )
        return [
            Problem(
                f"{self.label}:{hashlib.sha256(text.encode()).hexdigest()[:12]}", text, f"{head}{ask}",
                f"{train_head}{ask}", f" The answer is {answer}.", answer,
                f"{head}Question: {text} (The answer is {answer}.)\nAnswer:",
            )
            for text, answer in have[:n] for ask in (f"Question: {text}\nAnswer:",)
        ]  # fmt: skip

    def verify(self, problem: Problem, completion: str, finished: bool) -> Verdict:
        if not finished:
            return Verdict("truncated", None)
        if (answer := read_answer(completion)) is None:
            return Verdict("unparseable", None)
        # in one spelling, so that votes for 1,000 and 1000.0 are votes for one answer
        said = format(value(answer).normalize(), "f")
        return Verdict("correct" if value(answer) == value(problem.answer) else "wrong", said)


def part_of(text: str) -> str:
    """The part that a question belongs to: a function of its text alone."""
    percent = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next(part for up_to, part in PART_UP_TO.items() if percent < up_to)


@lru_cache(maxsize=16)
def rows(file: str) -> tuple[tuple[str, str], ...]:
    """(question, answer) of each line, questions all different. Raises TaskError, naming file and line."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise TaskError(f"task file {path} is not there; ASDiv and GSM8K's test set come with: make wordproblems")
    found: dict[str, str] = {}
    with path.open("rb") as lines:  # its own newlines alone: JSON may hold others
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
                question, answer = " ".join(str(row["question"]).split()), str(row["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise TaskError(
                    f'{path}, line {number}: expected {{"question": ..., "answer": ...}}, got {raw[:80]!r}'
                ) from error
            if _PLAIN.fullmatch(answer) is None:
                raise TaskError(f"{path}, line {number}: the answer {answer[:80]!r} is not one number")
            if found.setdefault(question, answer) != answer:
                raise TaskError(f"{path}, line {number}: the question {question[:80]!r} has another answer further up")
    if not found:
        raise TaskError(f"{path} is empty")
    return tuple(found.items())

"""Problems, prompts and verifiers.

A task is data, a prompt and a verifier, and its own gold answers pass its own verifier (`check_gold`, and the tests).
It knows nothing of the loop: not which round it is in, not whether it is the in-domain (ID) or an out-of-domain task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

Split = Literal["train", "validation", "test"]
# unparseable: nothing was read; truncated: it never ended; timed_out, error: not judged, which is not "wrong"
Reason = Literal["correct", "wrong", "unparseable", "truncated", "timed_out", "error"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class TaskError(ValueError):
    """A task that cannot be used: no problems, overlapping splits, a gold answer that its own verifier rejects."""


class NoData(TaskError):
    """A task whose data are not here and cannot be fetched."""


@dataclass(frozen=True)
class Problem:
    """One question. `prompt` is what the model reads, `text` identifies the question (splits are disjoint in it)."""

    id: str
    text: str
    prompt: str
    train_prompt: str
    gold: str  # a completion that the verifier accepts; the reference answer stands in it
    answer: str
    hint_prompt: str = ""  # the prompt with the answer given away (STaR's rationalization, 2203.14465)
    eval_prompt: str = ""  # what is asked in evaluation; empty: the prompt

    @property
    def asked(self) -> str:
        """The prompt in evaluation."""
        return self.eval_prompt or self.prompt


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of one completion; `answer` is what it read, None when there was nothing to read."""

    reason: Reason
    answer: str | None

    @property
    def correct(self) -> bool:
        return self.reason == "correct"


class Task(Protocol):
    """A family of problems. Deterministic: the same (split, n, seed) gives the same problems in every process."""

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a completion (they are cut off), besides the tokenizer's eos."""
        ...

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]: ...

    def verify(self, problem: Problem, completion: str, finished: bool) -> Verdict: ...


def derive_seed(*parts: object) -> int:
    """A 63-bit seed: sha256 of the parts. Never add to a seed: neighbouring seeds would share draws."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def verify_all(task: Task, attempts: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]:
    """A verdict for each (problem, completion, finished), in order; by the task's `verify_many` where it has one."""
    many = getattr(task, "verify_many", None)
    return many(attempts) if many else [task.verify(*attempt) for attempt in attempts]


def check_gold(task: Task, problems: Sequence[Problem]) -> None:
    """Raises TaskError, naming the problem, unless there are problems and the verifier accepts each gold completion."""
    if not problems:
        raise TaskError(f"task {task.name!r} gave no problems")
    verdicts = verify_all(task, [(problem, problem.gold, True) for problem in problems])
    for problem, verdict in zip(problems, verdicts, strict=True):
        if not verdict.correct:
            raise TaskError(
                f"task {task.name!r}, problem {problem.id!r}: its own verifier finds the gold answer {problem.gold!r} "
                f"{verdict.reason} (it read {verdict.answer!r}, expected {problem.answer!r})"
            )


def check_disjoint(task: str, splits: dict[str, Sequence[Problem]]) -> None:
    """Raises TaskError with an example when two splits share a question text."""
    seen: dict[str, str] = {}
    for split, problems in splits.items():
        for problem in problems:
            if (other := seen.setdefault(problem.text, split)) != split:
                raise TaskError(
                    f"task {task!r}: {problem.text!r} stands in both the {other} and the {split} split; "
                    "train, validation and test must not overlap"
                )

"""reasoning-gym's procedural datasets as tasks: one question, one line of answer, few-shot prompts.

    prompt      Question: State the final answer to the following arithmetic problem: 4 + 3 =
                Answer: 7

                Question: State the final answer to the following arithmetic problem: 8 - 5 =
                Answer:
    gold        " 3"

Every question falls, by a hash of its text alone, into one of four parts, so that the few-shot examples, train,
validation and test are disjoint by construction: for every seed and size, and between tasks whose options overlap.

Deliberately absent: partial credit (a score counts from 0.999 on), multi-line answers, and every dataset whose
verifier evaluates what the model wrote (`REFUSED`). A problem's id is the place it was drawn from
(dataset:seed:index), so that any process can derive again what the verifier needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from . import Problem, Split, TaskError, Verdict, derive_seed

Option = int | float | str | bool | list[Any]
Part = Literal["shots", "train", "validation", "test"]
PART_UP_TO: dict[int, Part] = {10: "shots", 60: "train", 75: "validation", 100: "test"}  # per cent, cumulative
CORRECT_FROM = 0.999  # lower scores are partial credit
_CHUNK = 1000  # items of one reasoning-gym seed; item i of seed s is item i - 1 of seed s + 1, so seeds are hashes

_EVAL = "its verifier evaluates, as Python code, text that the model wrote"
REFUSED: dict[str, str] = {
    "codeio": "it runs code",
    "composite": "it nests other datasets; name them one by one",
    "game_of_life_halting": "its verifier compares bool(answer), so that any text, 'False' too, counts as 'True'",
    **dict.fromkeys(
        ("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
         "puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
        _EVAL,
    ),
}  # fmt: skip
# These iterate over sets of strings: their items differ between processes unless Python's string hash is fixed.
HASH_DEPENDENT = frozenset({"isomorphic_strings", "knight_swap", "ransom_note", "word_ladder"})


@dataclass(frozen=True)
class GymTask:
    """A reasoning-gym dataset as a task. Raises TaskError at once for an unknown or refused dataset or option.

    `options` is the dataset's own config without `seed` and `size`. `shots` examples stand before the question in
    `Problem.prompt`, `train_shots` of the same examples in `Problem.train_prompt`; they are fixed for a dataset and its
    options, whatever the run's seed. `label` names the task in metrics (default: the dataset's name).
    """

    dataset: str
    label: str = ""
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)
    shots: int = 4
    train_shots: int = 0

    def __post_init__(self) -> None:
        plain = {k: _plain(v) for k, v in self.options.items()}
        object.__setattr__(self, "options", plain)
        _check_dataset(self.dataset)
        _check_options(self.dataset, plain)
        for key in ("shots", "train_shots"):
            if (count := getattr(self, key)) < 0:
                raise TaskError(f"task {self.name!r}: {key} is a number of examples, 0 or more; it is {count}")

    @property
    def name(self) -> str:
        return self.label or self.dataset

    @property
    def stop(self) -> tuple[str, ...]:
        return ("\n",)

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]:
        """`n` problems of `split` with different questions. Raises TaskError when the dataset has fewer."""
        assert split in get_args(Part)
        most = max(self.shots, self.train_shots)
        examples = [_block(_question(e), e["answer"]) + "\n\n" for _, e in self._draw("shots", most)]
        shots, train_shots = "".join(examples[: self.shots]), "".join(examples[: self.train_shots])
        made = []
        for id_, entry in self._draw(split, n, *seed):
            text, answer = _question(entry), entry["answer"]
            ask, hint = _block(text), _block(f"{text} (The answer is {answer}.)")
            made.append(Problem(id_, text, shots + ask, train_shots + ask, f" {answer}", answer, shots + hint))
        return made

    def verify(self, problem: Problem, completion: str, finished: bool) -> Verdict:
        if not finished:
            return Verdict("truncated", None)
        if not (answer := completion.strip()):
            return Verdict("unparseable", None)
        seed, entry = self._entry(problem)
        source = _source(self.dataset, self._config, seed)
        try:
            with _apart(seed):
                score = float(source.score_answer(answer, entry))
        except Exception:  # some verifiers raise on text that they cannot read, each in its own way
            return Verdict("unparseable", None)
        return Verdict("correct" if score >= CORRECT_FROM else "wrong", answer)

    def verify_many(self, attempts: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]:
        """As `verify` of each."""
        with _apart(0):
            return [self.verify(*attempt) for attempt in attempts]

    @property
    def _config(self) -> str:
        return json.dumps(self.options, sort_keys=True)

    def _entry(self, problem: Problem) -> tuple[int, dict[str, Any]]:
        """The seed and the reasoning-gym item of a problem."""
        dataset, _, place = problem.id.partition(":")
        seed, _, index = place.partition(":")
        if dataset == self.dataset and seed.isdigit() and index.isdigit():
            entry = _item(self.dataset, self._config, int(seed), int(index))
            if _question(entry) == problem.text:
                return int(seed), entry
        raise TaskError(
            f"task {self.name!r}: problem {problem.id!r} was not made by this task with these options "
            f"({self._config}), or by another release of reasoning-gym; make the problems again"
        )

    def _draw(self, part: Part, n: int, *seed: object) -> list[tuple[str, dict[str, Any]]]:
        """`n` (problem id, item), questions all different, of one part."""
        with _apart(0):
            return self._draw_apart(part, n, *seed)

    def _draw_apart(self, part: Part, n: int, *seed: object) -> list[tuple[str, dict[str, Any]]]:
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        drawn = idle = at = 0  # idle: draws in a row without a new question
        config = self._config
        for place in itertools.count() if n > 0 else ():
            chunk, index = divmod(place, _CHUNK)
            if not index:
                at = derive_seed("gym", self.dataset, config, part, *seed, chunk) % 2**31
            entry = _item(self.dataset, config, at, index)
            text, drawn, idle = _question(entry), drawn + 1, idle + 1
            if part_of(text) == part and text not in found:
                self._check_answer(text, entry["answer"])
                found[text], idle = (f"{self.dataset}:{at}:{index}", entry), 0
            if len(found) == n:
                break
            if idle >= 500 + 50 * len(found):
                what, key = ("few-shot", "shots") if part == "shots" else (part, "the number of problems")
                raise TaskError(
                    f"task {self.name!r} has only {len(found)} different {what} problems (seen in {drawn} draws), "
                    f"{n} were asked for; lower {key}, or widen the dataset's options ({config})"
                )
        return list(found.values())

    def _check_answer(self, text: str, answer: object) -> None:
        if not isinstance(answer, str):
            raise TaskError(
                f"task {self.name!r}: reasoning-gym stores {answer!r} as the answer of {text[:80]!r}; a dataset "
                "without reference answers cannot be used"
            )
        if "\n" in answer:
            raise TaskError(
                f"task {self.name!r}: the answer {answer[:80]!r} has several lines; completions end at the first "
                "newline, so only datasets with one-line answers can be used"
            )


def part_of(text: str) -> Part:
    """The part that a question belongs to: a function of its text alone."""
    percent = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next(part for up_to, part in PART_UP_TO.items() if percent < up_to)


def majority_baseline(problems: Sequence[Problem]) -> float:
    """Share of the commonest answer: the accuracy of saying always the same. Raises TaskError without problems."""
    if not problems:
        raise TaskError("the majority baseline needs problems, and there are none")
    return Counter(p.answer for p in problems).most_common(1)[0][1] / len(problems)


def _plain(option: Any) -> Option:
    """A list for any other sequence (OmegaConf's, a tuple); the rest as it is."""
    return list(option) if isinstance(option, Sequence) and not isinstance(option, str) else option


def _question(entry: Mapping[str, Any]) -> str:
    return str(entry["question"]).strip()


def _block(question: str, answer: str = "") -> str:
    return f"Question: {question}\nAnswer:{answer and ' ' + answer}"


# --- reasoning-gym -------------------------------------------------------------------------------------------------


def _registry() -> dict[str, tuple[type, type]]:
    """reasoning-gym's (dataset class, config class) by name."""
    try:
        with _apart(0):
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise TaskError(f"reasoning-gym tasks need an extra ({error}): pip install 'itermerge[gym]'") from error
    return DATASETS


def _check_dataset(name: str) -> None:
    if name in REFUSED:
        raise TaskError(f"the reasoning-gym dataset {name!r} is refused: {REFUSED[name]}")
    if name not in (known := _registry()):
        raise TaskError(f"there is no reasoning-gym dataset {name!r}{_did_you_mean(name, known)}")
    if name in HASH_DEPENDENT and not os.environ.get("PYTHONHASHSEED", "").isdigit():
        raise TaskError(
            f"the reasoning-gym dataset {name!r} makes other items in every process unless Python's string hash is "
            "fixed; set PYTHONHASHSEED=0 before the start"
        )


def _check_options(name: str, options: Mapping[str, Option]) -> None:
    config = _registry()[name][1]
    known = {f.name: f.type for f in dataclasses.fields(config) if f.name not in ("seed", "size")}
    for key, value in options.items():
        if key not in known:
            raise TaskError(
                f"options.{key}: the reasoning-gym dataset {name!r} has no such option{_did_you_mean(key, known)}; "
                f"there are {', '.join(known)}"
            )
        kind = known[key]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind in (int, float, str, bool) and not fits:
            raise TaskError(f"options.{key} of {name!r} is a {kind.__name__}, not {value!r}")
    try:
        made = config(**options, seed=0, size=_CHUNK)
        getattr(made, "validate", lambda: None)()
    except Exception as error:  # asserts, mostly, and whatever a wrong type leads to
        raise TaskError(f"options of {name!r} ({dict(options)}): {error or type(error).__name__}") from error


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(close)}?" if close else ""


@lru_cache(maxsize=64)
def _source(dataset: str, config: str, seed: int) -> Any:
    """The reasoning-gym dataset object of one seed; `config` is JSON."""
    data, config_class = _registry()[dataset]
    with _apart(seed):
        return data(config=config_class(**json.loads(config), seed=seed, size=_CHUNK))


@lru_cache(maxsize=8192)
def _item(dataset: str, config: str, seed: int, index: int) -> dict[str, Any]:
    """Item `index` of `seed`. Raises TaskError, naming it, when reasoning-gym cannot make it."""
    try:
        source = _source(dataset, config, seed)
        with _apart(derive_seed(seed, index) % 2**31):
            return source[index]
    except Exception as error:
        raise TaskError(
            f"reasoning-gym could not make item {index} of seed {seed} of {dataset!r} with options {config}: "
            f"{type(error).__name__}: {error}"
        ) from error


_kept = False  # whether an `_apart` is open


@contextlib.contextmanager
def _apart(seed: int) -> Iterator[None]:
    """Third-party code kept apart: quiet, and with the global generators seeded for it and put back afterwards.

    Some datasets draw from `random` itself, one reseeds numpy's global generator, one prints dots. Inside of another
    one it only seeds: keeping numpy's state takes longer than making an item.
    """
    global _kept
    if _kept:
        random.seed(seed)
        np.random.seed(seed)
        yield
        return
    states, _kept = (random.getstate(), np.random.get_state()), True
    random.seed(seed)
    np.random.seed(seed)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        _kept = False
        random.setstate(states[0])
        np.random.set_state(states[1])

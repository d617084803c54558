"""Question-answering data as tasks: a repository of the Hugging Face hub, a folder of that shape, or one file.

    row         {"question": "Natalia sold clips to 48 friends ...", "answer": "... 48+24 = 72 clips ...\\n#### 72"}
    config      path: openai/gsm8k, name: main, question: question, answer: answer, verifier: numeric
    prompt      Question: Natalia sold clips to 48 friends ...
                Answer:
    completion  " In May she sold 48 / 2 = 24. Altogether that is 48 + 24 = 72. The answer is 72."

`datasets` loads everything (release 5 runs no code of a repository: Parquet, JSON, CSV). Train, validation and test
never share a question: parts that come from one split are cut apart by a hash of the question's text, and what stands
in two splits stays in the later one of train, validation, test. Prompts are those of `prompts`, verdicts those of
`verifiers`. Deliberately absent: data that need code to be made (`gym`), and answers that have to be run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, get_args

from . import NoData, Problem, Split, TaskError, Verdict, derive_seed, latex, prompts, verifiers

log = logging.getLogger(__name__)
SHOTS = Path(__file__).parent / "shots"  # worked examples of our own; they stand in no data set
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ROLES: tuple[Split, ...] = get_args(Split)
_COLUMN = re.compile(r"\{([\w. -]+)\}")
_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator
_PREFIX = re.compile(r"^\(?([A-Z])[).:]\s*")  # of AQuA's options: "A)21"


@dataclass(frozen=True)
class Item:
    """One row: the question as it is asked (its choices in it), the answer as the verifier spells it, and the data
    set's own worked solution where it has one."""

    text: str
    answer: str
    solution: str


@dataclass(frozen=True, eq=False)
class HubTask:
    """Rows of a data set as problems. Raises TaskError at once for what cannot be: shots, a template, no math-verify.

    `splits` names the data set's split of each part, None for a part that is not there; parts that name the same split
    share it in the proportion of `shares` (train, validation, test). `subset` is the repository's config (several:
    joined). `question` and `solution` are columns (with dots
    for what is nested) or templates of columns, as "{Body} {Question}"; `answer` is a column; `choices` is a column
    with a list of texts, or with {"text": [...], "label": [...]}. `where` keeps the rows with these values.
    """

    path: str
    question: str
    answer: str
    verifier: str
    name: str
    subset: str | Sequence[str] | None = None
    revision: str | None = None
    splits: Mapping[str, str | None] = field(default_factory=lambda: dict.fromkeys(ROLES, "train"))
    shares: Sequence[int] = (60, 15, 25)
    choices: str | None = None
    solution: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = "qa"
    train_prompt: str | None = None
    eval_prompt: str | None = None
    instruction: str = ""
    shots: int = 0
    train_shots: int = 0
    eval_shots: int | None = None
    shots_file: str | None = None
    own_stop: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.verifier not in verifiers.VERIFIERS:
            raise self._error(f"verifier {self.verifier!r} is none of {', '.join(verifiers.VERIFIERS)}")
        if self.verifier == "math":
            latex.require()
        if not any(self.splits.values()):
            raise self._error("splits: names no split of the data set")
        for key, template, shots in self._ways.values():
            if why := prompts.problem_of(template, shots, self.instruction):
                raise self._error(f"{key}: {why}")
        most = max(shots for _, _, shots in self._ways.values())
        if most and not self.shots_file:
            raise self._error(f"shots_file: is needed for {most} worked examples; take one of {', '.join(packaged())}")
        if most > len(self._examples):
            raise self._error(f"shots: {most} were asked for, {self.shots_file} has {len(self._examples)}")

    @property
    def _ways(self) -> dict[str, tuple[str, str, int]]:
        """(config key, template, worked examples) when sampling, when fine-tuning, when evaluating."""
        eval_shots = self.shots if self.eval_shots is None else self.eval_shots
        return {
            "sample": ("prompt", self.prompt, self.shots),
            "train": ("train_prompt", self.train_prompt or self.prompt, self.train_shots),
            "eval": ("eval_prompt", self.eval_prompt or self.prompt, eval_shots),
        }

    def _error(self, said: str) -> TaskError:
        return TaskError(f"task {self.name!r} (task.path={self.path}): {said}")

    @cached_property
    def _examples(self) -> tuple[prompts.Shot, ...]:
        if not self.shots_file:
            return ()
        made = read_shots(self.shots_file)
        for text, solution in made:
            if verifiers.read(self.verifier, solution, verifiers.options(text)) is None:
                raise self._error(
                    f"shots_file: verifier {self.verifier} reads no answer in the solution {solution[:80]!r}"
                )
        return made

    # --- the task --------------------------------------------------------------------------------------------------

    @property
    def stop(self) -> tuple[str, ...]:
        if self.own_stop is not None:
            return tuple(self.own_stop)
        return prompts.stop_strings([self._ways["sample"][1], self._ways["eval"][1]])

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]:
        """`n` problems of `split` in an order of `seed`: of more problems the first ones are the same. Raises TaskError
        when there are fewer."""
        have = list(self._part(split))
        if len(have) < n:
            raise self._error(
                f"{n} {split} problems were asked for, there are {len(have)}; lower the number, or look at "
                f"task.splits ({self._said_splits()}) and task.where"
            )
        random.Random(derive_seed("hub", self.name, split, *seed)).shuffle(have)
        have = have[:n]
        told = verifiers.judge(
            self.verifier, [(i.answer, i.solution, verifiers.options(i.text), bool(i.solution)) for i in have]
        )
        return [self._problem(item, verdict.correct) for item, verdict in zip(have, told, strict=True)]

    def _problem(self, item: Item, worked: bool) -> Problem:
        sample, train, ask = (
            prompts.render(template, item.text, self._examples[:count], self.instruction)
            for _, template, count in self._ways.values()
        )
        answer = self._say(item.answer)
        hinted = f"{item.text}{chr(10) if chr(10) in item.text else ' '}({answer})"
        hint = prompts.render(self.prompt, hinted, self._examples[: self.shots], self.instruction)
        gold = prompts.lead(self.prompt) + (item.solution if worked else answer)
        id_ = f"{self.name}:{hashlib.sha256(item.text.encode()).hexdigest()[:12]}"
        return Problem(id_, item.text, sample, train, gold, item.answer, hint, "" if ask == sample else ask)

    def _say(self, answer: str) -> str:
        if self.verifier == "math":
            return rf"The answer is $\boxed{{{answer}}}$."
        return f"The answer is ({answer})." if self.verifier == "choice" else f"The answer is {answer}."

    def verify(self, problem: Problem, completion: str, finished: bool) -> Verdict:
        return self.verify_many([(problem, completion, finished)])[0]

    def verify_many(self, attempts: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]:
        return verifiers.judge(
            self.verifier,
            [(p.answer, completion, self._choices_of(p), finished) for p, completion, finished in attempts],
        )

    def _choices_of(self, problem: Problem) -> dict[str, str]:
        return verifiers.options(problem.text) if self.verifier == "choice" else {}

    # --- the data --------------------------------------------------------------------------------------------------

    def _part(self, role: Split) -> Iterator[Item]:
        """The items of a part, in the data set's order."""
        source = self.splits.get(role)
        if source is None:
            raise self._error(
                f"splits.{role}: the data set has no {role} part ({self._said_splits()}); name one of its splits: two "
                "parts with the same split share it, cut by a hash of the question"
            )
        sharers = [r for r in ROLES if self.splits.get(r) == source]
        later = ROLES[ROLES.index(role) + 1 :]
        taken = {q for q, _ in self._examples}
        for other in {self.splits.get(r) for r in later} - {source, None}:
            taken |= {item.text for item in self._items(str(other))}
        shares = [self.shares[ROLES.index(r)] for r in sharers]
        left_out = 0
        for item in self._items(source):
            if sharers[part_of(item.text, shares)] != role:
                continue
            if item.text in taken:
                left_out += 1
            else:
                yield item
        if left_out:
            _say_once(
                f"task {self.name!r}: {left_out} {role} questions stand among the worked examples or in a later part "
                "(train, validation, test) as well; they are left out"
            )

    def _said_splits(self) -> str:
        return ", ".join(f"{role}: {self.splits.get(role)}" for role in ROLES)

    def _items(self, split: str) -> tuple[Item, ...]:
        """The items of one of the data set's splits, their questions all different."""
        cache: dict[str, tuple[Item, ...]] = self.__dict__.setdefault("_read", {})
        if split not in cache:
            cache[split] = self._read_items(split)
        return cache[split]

    def _read_items(self, split: str) -> tuple[Item, ...]:
        found: dict[str, Item | None] = {}
        count: Counter[str] = Counter()
        example = ""
        rows = load(self.path, self.subset, self.revision, split, self.name)
        for number, row in enumerate(rows):
            if any(str(self._cell(row, key)) not in _values(value) for key, value in self.where.items()):
                count["other rows (where)"] += 1
                continue
            try:
                item = self._item(row)
            except verifiers.GoldError as error:
                count["answer cannot be read"] += 1
                example = example or f"row {number} of {split}: the answer {self.answer}: {error}"
                continue
            if item.text not in found:
                found[item.text] = item
            elif (first := found[item.text]) is not None and first.answer != item.answer:
                found[item.text] = None  # which of its answers is right nobody knows
                count["question has several answers"] += 1
            else:
                count["question seen before"] += 1
        unread = count["answer cannot be read"]
        if unread and unread >= len(found):
            raise self._error(f"{example} ({unread} such rows); look at task.answer and task.verifier={self.verifier}")
        said = ", ".join(f"{why} ({n})" for why, n in sorted(count.items()))
        if said:
            _say_once(f"task {self.name!r}, split {split}: left out: {said}{f'; {example}' if example else ''}")
        return tuple(item for item in found.values() if item is not None)

    def _item(self, row: Mapping[str, Any]) -> Item:
        text = _lines(self._text(row, self.question))
        texts, labels = self._choices(row)
        if texts:
            text += "".join(f"\n({letter}) {' '.join(t.split())}" for letter, t in zip(verifiers.LETTERS, texts))  # noqa: B905
        answer = verifiers.read_gold(self.verifier, self._cell(row, self.answer), texts, labels)
        if self.verifier == "choice" and answer not in (known := verifiers.options(text)) and known:
            raise verifiers.GoldError(f"{answer} is none of its choices, {', '.join(known)}")
        solution = _lines(self._text(row, self.solution)) if self.solution else ""
        return Item(text, answer, _CALCULATION.sub("", solution))

    def _choices(self, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Texts and labels of a row's choices."""
        if self.choices is None:
            return [], []
        given, labels = self._cell(row, self.choices), []
        if isinstance(given, Mapping):
            given, labels = given.get("text"), [str(x) for x in given.get("label") or ()]
        if not isinstance(given, Sequence) or isinstance(given, str) or not 2 <= len(given) <= len(verifiers.LETTERS):
            raise self._error(
                f"choices: expected 2 to {len(verifiers.LETTERS)} texts in a list (or under text, with label) in "
                f"{self.choices!r}, got {given!r:.80}"
            )
        texts = [str(c) for c in given]
        prefixes = [m[1] if (m := _PREFIX.match(t)) else "" for t in texts]
        if not labels and prefixes == list(verifiers.LETTERS[: len(texts)]):
            texts, labels = [_PREFIX.sub("", t, count=1) for t in texts], prefixes
        return texts, labels

    def _text(self, row: Mapping[str, Any], template: str) -> str:
        """A column, or a template with columns in braces."""
        if "{" not in template:
            return str(self._cell(row, template))
        return _COLUMN.sub(lambda m: str(self._cell(row, m[1])), template)

    def _cell(self, row: Mapping[str, Any], column: str) -> Any:
        value: Any = row
        for key in [column] if column in row else column.split("."):
            if isinstance(value, Mapping) and key in value:
                value = value[key]
            else:
                raise self._error(f"there is no column {column!r}; there are {', '.join(map(str, row))}")
        return value


def part_of(text: str, shares: Sequence[int]) -> int:
    """The index of the share that a question belongs to: a function of its text alone."""
    at = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % sum(shares)
    return next(i for i in range(len(shares)) if at < sum(shares[: i + 1]))


def _values(value: Any) -> set[str]:
    return {str(v) for v in value} if isinstance(value, (list, tuple)) else {str(value)}


def _lines(text: str) -> str:
    """One kind of line separator, no blanks around lines' ends."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@lru_cache(maxsize=256)
def _say_once(said: str) -> None:
    log.info("%s", said)


# --- worked examples -----------------------------------------------------------------------------------------------


def packaged() -> list[str]:
    """Names of the worked examples in the package."""
    return sorted(f.stem for f in SHOTS.glob("*.jsonl"))


@lru_cache(maxsize=32)
def read_shots(name: str) -> tuple[prompts.Shot, ...]:
    """The worked examples of a packaged file or of the user's own, one {"question", "solution"} a line, perhaps with
    "choices". Raises TaskError, naming file and line."""
    path = SHOTS / f"{name}.jsonl" if name in packaged() else Path(name).expanduser()
    if not path.is_file():
        raise TaskError(f"task.shots_file: {name} is no file, and none of {', '.join(packaged())}")
    made = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, choices = _lines(str(row["question"])), row.get("choices", [])
            text += "".join(f"\n({letter}) {c}" for letter, c in zip(verifiers.LETTERS, choices))  # noqa: B905
            made.append((text, str(row["solution"]).strip()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TaskError(
                f'task.shots_file: {path}, line {number}: expected {{"question": ..., "solution": ...}}, '
                f"got {line[:80]!r}"
            ) from error
    return tuple(made)


# --- loading -------------------------------------------------------------------------------------------------------


def load(
    path: str, subset: str | Sequence[str] | None, revision: str | None, split: str, label: str
) -> tuple[dict[str, Any], ...]:
    """The rows of one split; of several configs (`subset` a list) one after another. Raises TaskError."""
    place = Path(path).expanduser()
    subsets = (subset,) if subset is None or isinstance(subset, str) else tuple(subset)
    stamp = place.stat().st_mtime_ns if place.is_file() else 0
    return tuple(row for one in subsets for row in _load(str(place), one, revision, split, label, stamp))


@lru_cache(maxsize=64)
def _load(
    path: str, subset: str | None, revision: str | None, split: str, label: str, _: int
) -> tuple[dict[str, Any], ...]:
    where, place = f"task {label!r} (task.path={path})", Path(path)
    local = place.exists()
    kind = FILES.get(place.suffixes[-2] if place.suffix == ".gz" and len(place.suffixes) > 1 else place.suffix)
    if place.is_file() and kind is None:
        raise TaskError(f"{where}: expected a folder, a name on the hub, or a file {', '.join(FILES)}")
    if local and revision is not None:
        raise TaskError(f"{where}: task.revision={revision} is for the hub, and this is a local path; leave it null")
    if not local and (kind is not None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)):
        raise NoData(f"{where}: there is no such file or folder; ASDiv and GSM8K's test set: make wordproblems")
    with _quiet() as datasets:
        try:
            if not local:
                rows = datasets.load_dataset(path, subset, split=split, revision=revision).to_list()
            else:  # read anew each time: a cache would outlive what it was made of
                with tempfile.TemporaryDirectory() as cache:
                    how: dict[str, Any] = {"cache_dir": cache, "keep_in_memory": True}
                    if kind is not None:
                        rows = datasets.load_dataset(kind, data_files={"train": path}, **how, split=split).to_list()
                    else:
                        rows = datasets.load_dataset(path, subset, split=split, **how).to_list()
        except Exception as error:
            first = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            way = (
                "look at task.name and task.splits (a single file has one split, train)" if local else
                "it is neither a file nor a folder here, and the hub did not give it. A gated set needs `hf auth "
                "login`; without a network (HF_HUB_OFFLINE=1) it must be in the hub's cache, or give task.path a local "
                "copy"
            )  # fmt: skip
            raise NoData(f"{where}: split {split!r}, name {subset!r} could not be loaded ({first}); {way}") from error
    if not rows:
        raise TaskError(f"{where}: split {split!r} is empty")
    return tuple(rows)


@contextmanager
def _quiet() -> Iterator[Any]:
    """`datasets` without progress bars and notices."""
    import datasets

    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()

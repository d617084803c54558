"""The lab: a procedural world of small reasoning families, each with worked solutions in two styles.

    prompt      sum 34+18-15+27?
    "steps"     34+18=52,52-15=37,37+27=64#64
    "totals"    34,52,37,64#64

What follows the last `#` is the answer. Every problem falls, by a hash of its text, into one of four parts, so that
pretraining, train, validation and test are disjoint by construction, for every seed and size.

Which family is the in-domain task and which are near or far is written in `conf/task` and `conf/suite`; nothing here,
nor in sampling, fitting or merging, knows it.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from . import Problem, Split, TaskError, Verdict, derive_seed

ALPHABET = string.digits + string.ascii_lowercase + " +-*%=<>&|!?,#"
Part = Literal["pretrain", "train", "validation", "test"]
PART_UP_TO: dict[int, Part] = {40: "pretrain", 70: "train", 80: "validation", 100: "test"}  # per cent, cumulative


@dataclass(frozen=True)
class Worked:
    """A question with its answer and one worked solution a style."""

    text: str
    answer: str
    styles: tuple[str, str]


def _worked(text: str, answer: object, first: str, second: str) -> Worked:
    return Worked(text, str(answer), (f"{first}#{answer}", f"{second}#{answer}"))


def _chain(rng: random.Random) -> Worked:
    """Three or four two-digit terms; running totals stay in 0..199."""
    total = rng.randint(10, 99)
    expression, steps, totals = str(total), [], [str(total)]
    for _ in range(rng.randint(2, 3)):
        term = rng.randint(10, 99)
        sign = rng.choice([s for s in "+-" if 0 <= (total + term if s == "+" else total - term) <= 199])
        after = total + term if sign == "+" else total - term
        expression += f"{sign}{term}"
        steps.append(f"{total}{sign}{term}={after}")
        totals.append(str(after))
        total = after
    return _worked(f"sum {expression}?", total, ",".join(steps), ",".join(totals))


def _pair(rng: random.Random) -> Worked:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    if rng.random() < 0.5:
        units, tens = (
            f"{a % 10}+{b % 10}={a % 10 + b % 10}",
            f"{a // 10 * 10}+{b // 10 * 10}={(a // 10 + b // 10) * 10}",
        )
        return _worked(f"add {a}+{b}?", a + b, f"{tens},{units}", f"{a}+{b}={a + b}")
    a, b = max(a, b), min(a, b)
    tens = a - b // 10 * 10
    return _worked(f"sub {a}-{b}?", a - b, f"{a}-{b // 10 * 10}={tens},{tens}-{b % 10}={a - b}", f"{a}-{b}={a - b}")


def _find(rng: random.Random) -> Worked:
    a, x = rng.randint(10, 99), rng.randint(10, 99)
    return _worked(f"find {a}+?={a + x}?", x, f"{a + x}-{a}={x}", f"{a}+{x}={a + x}")


def _mod(rng: random.Random) -> Worked:
    a, b, m = rng.randint(10, 59), rng.randint(10, 39), rng.randint(3, 9)
    s = a + b
    return _worked(
        f"mod {a}+{b}%{m}?", s % m, f"{a}+{b}={s},{m}*{s // m}={s - s % m},{s}-{s - s % m}={s % m}",
        f"{a}+{b}={s},{s}%{m}={s % m}",
    )  # fmt: skip


def _mad(rng: random.Random) -> Worked:
    a, b, c = rng.randint(2, 9), rng.randint(11, 19), rng.randint(10, 99)
    p = a * b
    return _worked(
        f"mad {a}*{b}+{c}?", p + c,
        f"{a}*10={a * 10},{a}*{b - 10}={p - a * 10},{a * 10}+{p - a * 10}={p},{p}+{c}={p + c}",
        f"{a}*{b}={p},{p}+{c}={p + c}",
    )  # fmt: skip


def _sort(rng: random.Random) -> Worked:
    letters = rng.sample(string.ascii_lowercase, rng.randint(4, 6))
    ordered = sorted(letters)
    return _worked(f"sort {''.join(letters)}?", "".join(ordered), ",".join(ordered), ",".join(reversed(ordered)))


def _count(rng: random.Random) -> Worked:
    word, letter = "".join(rng.choices("abc", k=rng.randint(7, 10))), rng.choice("abc")
    running = [str(word[: i + 1].count(letter)) for i in range(len(word))]
    return _worked(f"count {letter} {word}?", word.count(letter), "".join(running), letter * word.count(letter))


def _eval(rng: random.Random) -> Worked:
    terms, values = [], []
    for _ in range(3):
        (na, a), (nb, b) = rng.choices([("", "t"), ("", "f"), ("!", "t"), ("!", "f")], k=2)
        op = rng.choice("&|")
        x, y = (a == "t") != (na == "!"), (b == "t") != (nb == "!")
        terms.append(f"{na}{a}{op}{nb}{b}")
        values.append("t" if (x and y if op == "&" else x or y) else "f")
    steps = ",".join(f"{t}={v}" for t, v in zip(terms, values, strict=True))
    return _worked(f"eval {','.join(terms)}?", "".join(values), steps, ",".join(values))


def _shift(rng: random.Random) -> Worked:
    by, word = rng.randint(1, 3), rng.choices(string.ascii_lowercase, k=rng.randint(3, 5))
    moved = [string.ascii_lowercase[(string.ascii_lowercase.index(c) + by) % 26] for c in word]
    pairs = ",".join(f"{a}>{b}" for a, b in zip(word, moved, strict=True))
    return _worked(f"shift {by} {''.join(word)}?", "".join(moved), pairs, ",".join(moved))


def _max(rng: random.Random) -> Worked:
    a, b, c = (rng.randint(100, 999) for _ in range(3))
    ab, top = max(a, b), max(a, b, c)
    steps = f"{a}{'<' if a < b else '>'}{b},{ab}{'<' if ab < c else '>'}{c}"
    return _worked(f"max {a},{b},{c}?", top, steps, str(top))


FAMILIES: dict[str, Callable[[random.Random], Worked]] = {
    "chain": _chain, "pair": _pair, "find": _find, "mod": _mod, "mad": _mad,
    "sort": _sort, "count": _count, "eval": _eval, "shift": _shift, "max": _max,
}  # fmt: skip


def part_of(text: str) -> Part:
    """The part that a question belongs to: a function of its text alone."""
    percent = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next(part for up_to, part in PART_UP_TO.items() if percent < up_to)


def draw(family: str, part: Part, n: int, *seed: object) -> list[Worked]:
    """`n` different questions of `part`. Raises TaskError when the family has too few."""
    rng = random.Random(derive_seed("lab", family, part, *seed))
    found: dict[str, Worked] = {}
    barren = 0  # tries since the last new question
    while len(found) < n and barren < 20_000:
        barren += 1
        worked = FAMILIES[family](rng)
        if part_of(worked.text) == part:
            if worked.text not in found:
                barren = 0
            found.setdefault(worked.text, worked)
    if len(found) < n:
        raise TaskError(f"lab family {family!r} has only about {len(found)} {part} problems, {n} were asked for")
    return list(found.values())


def corpus(n: int, weights: Mapping[str, float], styles: Sequence[int], *seed: object) -> list[tuple[str, str]]:
    """`n` (prompt, completion) pairs of the part that is pretrained on, families by weight, one style each by
    whole-number weights."""
    rng = random.Random(derive_seed(*seed, "corpus"))
    names = list(weights)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        family = rng.choices(names, [weights[f] for f in names])[0]
        worked = FAMILIES[family](rng)
        if part_of(worked.text) == "pretrain":
            pool = [s for s, w in zip(worked.styles, styles, strict=True) for _ in range(w)]
            pairs.append((worked.text, rng.choice(pool)))
    return pairs


@dataclass(frozen=True)
class LabTask:
    """One family of the lab as a task."""

    family: str

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise TaskError(f"there is no lab family {self.family!r}; there are {', '.join(FAMILIES)}")

    @property
    def name(self) -> str:
        return self.family

    @property
    def stop(self) -> tuple[str, ...]:
        return ()

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]:
        assert split in get_args(Part)
        return [
            Problem(w.text, w.text, w.text, w.text, w.styles[0], w.answer, f"{w.answer}#{w.text}")
            for w in draw(self.family, split, n, *seed)
        ]  # fmt: skip

    def verify(self, problem: Problem, completion: str, finished: bool) -> Verdict:
        if not finished:
            return Verdict("truncated", None)
        _, mark, answer = completion.rpartition("#")
        if not mark or not answer:
            return Verdict("unparseable", None)
        return Verdict("correct" if answer == problem.answer else "wrong", answer)

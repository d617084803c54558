"""Training problems that stand in evaluated ones: the same text, or the same `n` words in a row (as in the report on
GPT-3, 2005.14165, which takes 13).

Pure: texts in, verdicts out. Words are runs of letters and digits in lower case, so that punctuation hides nothing;
for the same reason questions that differ in an operator alone count as the same here. A text of fewer than `n` words is
compared as a whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class Evaluated:
    """The texts of evaluated problems, to find others in."""

    def __init__(self, texts: Iterable[str], n: int) -> None:
        split = [words(text) for text in texts]
        self.n, self.whole = n, set(split)
        self.runs = {run for found in split for run in _runs(found, n)}

    def has(self, text: str) -> Literal["exact", "ngram"] | None:
        found = words(text)
        if found in self.whole:
            return "exact"
        return "ngram" if any(run in self.runs for run in _runs(found, self.n)) else None


def _runs(found: tuple[str, ...], n: int) -> Iterable[tuple[str, ...]]:
    return (found[at : at + n] for at in range(len(found) - n + 1))

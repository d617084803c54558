r"""What a completion says, and whether that is the answer: numbers, choices, LaTeX, yes or no, exact text.

    numeric    "... 9 * 8 = 72 dollars.\n#### 72"           72
    choice     "Steel is a metal, so the answer is (B)."    B
    math       "so $x = 2$. The answer is \boxed{\frac12}"  \frac12, compared by math-verify (`latex`)
    boolean    "They can swim. The answer is yes."          yes
    exact      "The answer is valid."                       valid

Pure functions; each kind reads the data set's answer (`read_gold`) and the model's text (`read`) into one spelling, so
that votes for 1,000 and 1000.0 are votes for one answer. Nothing is evaluated, and nothing is rounded: 3.4 is not 3.
Deliberately absent: partial credit, and a model as a judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from . import Verdict, latex

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 300  # characters of an answer in LaTeX; longer ones are no answers
DEEPEST = 12  # brackets within brackets in one; parsing takes time exponential in it
# What stands together as a number, right or not; a minus after a digit or a bracket is an operator.
_RUN = re.compile(r"(?:(?<![0-9)}])[-\u2212])?[$€£]?\.?[0-9](?:[0-9.,/:]*[0-9])?(?:[eE][-+]?[0-9]+)?")
_PLAIN = re.compile(r"-?(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?|\.[0-9]{1,30})")
_RATIO = re.compile(r"-?[0-9]{1,30}/[0-9]{1,30}")
_FRAC = re.compile(r"\\[dt]?frac ?\{(-?[0-9]{1,30})\} ?\{(-?[0-9]{1,30})\}|\\[dt]?frac ?([0-9]) ?([0-9])")
_MIXED = re.compile(r"(?<![0-9.,/:])(-?[0-9]{1,30}) ([0-9]{1,30})/([0-9]{1,30})(?![0-9.,/:]*[0-9])")
_MARK = re.compile(r"answer is", re.IGNORECASE)
_HASHES = re.compile(r"####(?!#)")
_OPTION = re.compile(r"^\(([A-Z])\) (.*)$", re.MULTILINE)
_BARE_OPTION = re.compile(r"\(?([A-Za-z])[).:]?")
_LETTER = re.compile(
    r"\(([A-Za-z])\)|(?<![\w'$\\{])([A-Z])(?![\w'])|\\(?:text|textbf|mathrm|mathbf)\{\(?([A-Za-z])\)?\}"
)
_AN_ARTICLE = re.compile(r" +(?!because\b|since\b|as\b|and\b|is\b|for\b|with\b|from\b|so\b)[a-z]")
_FORMULA = re.compile(  # $ but not \$, which is money
    rf"(?<!\\)\$\$?((?:[^$\\]|\\.){{1,{LONGEST}}}?)(?<!\\)\$|\\[(\[](.{{1,{LONGEST}}}?)\\[)\]]"
)
_BOOLEAN = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


class GoldError(ValueError):
    """An answer field of a data set that a verifier cannot read."""


# --- where the answer stands ---------------------------------------------------------------------------------------


def after(pattern: re.Pattern[str], text: str) -> str | None:
    """What follows the last match; None without one."""
    *_, last = [None, *(m.end() for m in pattern.finditer(text))]
    return None if last is None else text[last:]


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` (or `\fbox{}`, or `\boxed 3`) whose braces close; None without one."""
    for at in sorted((m.start() for m in re.finditer(r"\\(?:boxed|fbox)", text)), reverse=True)[:20]:
        rest = text[at + (6 if text.startswith(r"\boxed", at) else 5) :][: 10 * LONGEST]
        if not rest.startswith("{"):
            if single := re.match(r" ?([0-9A-Za-z])(?![0-9A-Za-z])", rest):
                return single[1]
            continue
        depth = 0
        for i, character in enumerate(rest):
            escaped = i > 0 and rest[i - 1] == "\\"
            depth += 0 if escaped else (character == "{") - (character == "}")
            if depth == 0:
                return rest[1:i]
    return None


def _places(text: str) -> list[str]:
    """Where an answer is looked for, the surest first: the line after the last ####, what follows the last "answer is",
    the last box."""
    hashes, mark, box = after(_HASHES, text), after(_MARK, text), boxed(text)
    line = None if hashes is None else hashes.strip(" \t").split("\n", 1)[0]
    return [place for place in (line, mark, box) if place is not None]


# --- numbers -------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[Fraction | None]:
    r"""The numbers of a text in order, exact; None for what is not one plain decimal, ratio or `\frac` of two whole
    numbers, or mixed number: a time, 1e9, 1,2, more than 30 digits, a division by zero."""
    text = text.replace("\u2212", "-").replace(r"\$", "$")
    if "\\" in text or "{,}" in text:
        text = text.replace("{,}", ",").replace(r"\,", "").replace(r"\!", "")
        text = _FRAC.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]} ", text)
    text = _MIXED.sub(_unmixed, text)
    return [_exact(m.group().rstrip(".,:/").translate(_CURRENCY)) for m in _RUN.finditer(text)]


_CURRENCY = str.maketrans("", "", "$€£")


def _unmixed(m: re.Match[str]) -> str:
    whole, above, below = m[1], int(m[2]), int(m[3])
    if above >= below:  # two numbers side by side
        return m.group()
    return f"{'-' if whole.startswith('-') else ''}{abs(int(whole)) * below + above}/{below}"


def _exact(run: str) -> Fraction | None:
    if _PLAIN.fullmatch(run):
        return Fraction(run.replace(",", ""))
    if _RATIO.fullmatch(run) and int(run.partition("/")[2]):
        return Fraction(run)
    return None


def spelled(number: Fraction) -> str:
    """One spelling for a number: a decimal where it ends within 30 digits, else a/b."""
    below, digits = number.denominator, 0
    while below % 10 == 0 or below % 2 == 0 or below % 5 == 0:
        below //= 10 if below % 10 == 0 else 2 if below % 2 == 0 else 5
        digits += 1
    if below != 1 or digits > 60:
        return f"{number.numerator}/{number.denominator}"
    scaled = number * 10**digits
    text = str(abs(scaled.numerator)).rjust(digits + 1, "0")
    text = f"{text[: len(text) - digits]}.{text[len(text) - digits :]}".rstrip("0").rstrip(".")
    return f"-{text}" if number < 0 else text


def _read_numeric(text: str, _choices: Mapping[str, str]) -> str | None:
    for place in (*_places(text), text):
        if found := numbers(place):
            return None if found[-1] is None else spelled(found[-1])
    return None


# --- choices -------------------------------------------------------------------------------------------------------


def options(question: str) -> dict[str, str]:
    """{letter: text} of a question's lines "(A) text"."""
    return {m[1]: m[2] for m in _OPTION.finditer(question)}


def _read_choice(text: str, choices: Mapping[str, str]) -> str | None:
    known = choices or dict.fromkeys(LETTERS, "")
    for place in _places(text):
        if letter := _letter(place, known, first=True) or _by_text(place.split("\n", 1)[0], choices):
            return letter
    bare = _BARE_OPTION.fullmatch(text.strip())
    if bare and bare[1].upper() in known:
        return bare[1].upper()
    return _letter(text, known, first=False) or _by_text(text, choices)


def _letter(text: str, known: Mapping[str, str], *, first: bool) -> str | None:
    """The first or the last letter of a choice: in brackets, or upper case and alone; an "A" or "I" before a word in
    lower case is a word itself."""
    bare = _BARE_OPTION.fullmatch(text.strip().rstrip(".!").strip("*$ "))
    if first and bare and bare[1].upper() in known:
        return bare[1].upper()
    found = None
    for m in _LETTER.finditer(text):
        letter = (m[1] or m[2] or m[3]).upper()
        a_word = m[2] in ("A", "I") and _AN_ARTICLE.match(text, m.end())
        if letter in known and not a_word:
            if first:
                return letter
            found = letter
    return found


def _by_text(text: str, choices: Mapping[str, str]) -> str | None:
    """The one choice whose text stands in `text` as whole words; a choice within another one that does counts not."""
    said = _plain(text)
    there = {letter: plain for letter, choice in choices.items() if (plain := _plain(choice)) and _stands(plain, said)}
    whole = [a for a, x in there.items() if not any(x != y and _stands(x, y) for y in there.values())]
    return whole[0] if len(whole) == 1 else None


def _stands(part: str, text: str) -> bool:
    at = text.find(part)
    while at >= 0:
        before, behind = text[at - 1 : at], text[at + len(part) : at + len(part) + 1]
        if not (before.isalnum() and part[0].isalnum()) and not (behind.isalnum() and part[-1].isalnum()):
            return True
        at = text.find(part, at + 1)
    return False


# --- yes or no, exact text, LaTeX ------------------------------------------------------------------------------------


def _read_boolean(text: str, _choices: Mapping[str, str]) -> str | None:
    for place in _places(text):
        if m := _BOOLEAN.search(place):
            return _YES[m[1].lower()]
    if m := _BOOLEAN.match(text.lstrip(" \t\n*\"'")):
        return _YES[m[1].lower()]
    *_, last = [None, *_BOOLEAN.finditer(text)]
    return last and _YES[last[1].lower()]


def _plain(text: str) -> str:
    """Compatible characters as one, in lower case, single blanks, without quotes and stars around it and full stops
    behind."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("*\"'` ").rstrip(".").strip("*\"'` ")


def _read_exact(text: str, _choices: Mapping[str, str]) -> str | None:
    lines = [line for line in text.splitlines() if _plain(line)]
    for place in (*_places(text), lines[-1] if lines else ""):
        if said := _plain(place.strip().lstrip(":").strip().split("\n", 1)[0]):
            return said
    return None


def _read_math(text: str, _choices: Mapping[str, str]) -> str | None:
    """The last box, else what follows "answer is" or ####, else the last formula, else the last number."""
    hashes, mark = after(_HASHES, text), after(_MARK, text)
    said = None if mark is None else _sentence(mark)
    *_, last = [None, *_FORMULA.finditer(text[-20 * LONGEST :])]
    formula = None if last is None else last[1] or last[2]
    for place in (boxed(text), said, None if hashes is None else hashes.strip().split("\n", 1)[0], formula):
        if place is not None and (found := _unframed(place)):
            return found if _is_sane(found) else None
    found = [m.group().rstrip(".,:/") for m in _RUN.finditer(text)]
    return found[-1] if found and len(found[-1]) <= LONGEST else None


def _is_sane(latex_: str) -> bool:
    """Whether LaTeX is short, not nested too deeply, and closes its braces."""
    depths = [0, 0]
    for character in latex_.replace(r"\{", "").replace(r"\}", ""):
        for i, (opened, closed) in enumerate((("{", "}"), ("([{", ")]}"))):
            depths[i] += (character in opened) - (character in closed)
        if depths[0] < 0 or depths[1] > DEEPEST:
            return False
    return len(latex_) <= LONGEST and depths[0] == 0


def _sentence(text: str) -> str:
    """The rest of the line, up to a full stop that ends it or a sentence."""
    line = text.lstrip(" :\n").split("\n", 1)[0]
    formula = _FORMULA.match(line)
    return (formula[1] or formula[2]) if formula else re.split(r"\.(?=\s|$)", line, maxsplit=1)[0]


def _unframed(text: str) -> str:
    return " ".join(text.split()).strip("$* ").removesuffix(".").strip()


READ: Mapping[str, Callable[[str, Mapping[str, str]], str | None]] = {
    "numeric": _read_numeric, "choice": _read_choice, "math": _read_math, "boolean": _read_boolean,
    "exact": _read_exact,
}  # fmt: skip
VERIFIERS = tuple(READ)


def read(kind: str, text: str, choices: Mapping[str, str] | None = None) -> str | None:
    """What a completion gives as its answer, in one spelling; None where there is none."""
    return READ[kind](text, choices or {})


# --- a data set's answers ------------------------------------------------------------------------------------------


def read_gold(kind: str, field: Any, choices: Sequence[str] = (), labels: Sequence[str] = ()) -> str:
    r"""The answer of a data set's field, in the spelling of `read`: 72 from "... #### 72" or 72.0, `\frac12` from a
    worked solution with `\boxed{\frac12}`, B from "B", "(B)", the second label or the second choice's text, yes from
    true or ["yes"]. Raises GoldError, saying what was expected."""
    if isinstance(field, (list, tuple)):
        if len(set(map(str, field))) != 1:
            raise GoldError(f"expected one answer, got {field!r:.80}")
        field = field[0]
    if field is None or field != field or not str(field).strip():  # NaN: a CSV's empty cell
        raise GoldError("it is empty")
    text = _decimal(field) if isinstance(field, float) else str(field).strip()
    found = _GOLD[kind](text, [str(c) for c in choices], [str(x) for x in labels])
    if found is None:
        raise GoldError(f"expected {_EXPECTED[kind]}, got {text[:80]!r}")
    return found


_EXPECTED = {
    "numeric": "one number (or one after ####, or boxed)", "choice": "a letter, a label or a choice's text",
    "math": f"LaTeX of at most {LONGEST} characters, braces closed (or boxed, or after ####)",
    "boolean": "yes, no, true or false", "exact": "a text",
}  # fmt: skip


def _decimal(number: float) -> str:
    from decimal import Decimal

    return format(Decimal(repr(number)), "f") if abs(number) < 1e30 else repr(number)


def _gold_numeric(text: str, _: Sequence[str], __: Sequence[str]) -> str | None:
    hashes, box = after(_HASHES, text), boxed(text)
    found = numbers(text if hashes is None and box is None else hashes if hashes is not None else box or "")
    return spelled(found[0]) if len(found) == 1 and found[0] is not None else None


def _gold_choice(text: str, choices: Sequence[str], labels: Sequence[str]) -> str | None:
    if text in labels:
        return LETTERS[list(labels).index(text)]
    if choices and text in choices:
        return LETTERS[list(choices).index(text)]
    bare = _BARE_OPTION.fullmatch(text)
    last = LETTERS[len(choices) - 1] if choices else "Z"
    return bare[1].upper() if bare and bare[1].upper() <= last else None


def _gold_math(text: str, _: Sequence[str], __: Sequence[str]) -> str | None:
    hashes, box = after(_HASHES, text), boxed(text)
    found = _unframed(box if box is not None else hashes if hashes is not None else text)
    return found if found and _is_sane(found) else None


def _gold_boolean(text: str, _: Sequence[str], __: Sequence[str]) -> str | None:
    return _YES.get(_plain(text))


def _gold_exact(text: str, _: Sequence[str], __: Sequence[str]) -> str | None:
    hashes = after(_HASHES, text)
    return _plain(text if hashes is None else hashes) or None


_GOLD: Mapping[str, Callable[[str, Sequence[str], Sequence[str]], str | None]] = {
    "numeric": _gold_numeric, "choice": _gold_choice, "math": _gold_math, "boolean": _gold_boolean,
    "exact": _gold_exact,
}  # fmt: skip


def same_latex(a: str, b: str) -> bool:
    """Whether two answers are one string but for blanks, the size of brackets and the kind of a fraction's bar."""
    return _squeezed(a) == _squeezed(b)


def _squeezed(text: str) -> str:
    for old, new in ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\left", ""), (r"\right", ""), (r"\!", "")):
        text = text.replace(old, new)
    return "".join(text.split())


def judge(
    kind: str, attempts: Sequence[tuple[str, str, Mapping[str, str], bool]], *, limit_s: float = latex.LIMIT_S
) -> list[Verdict]:
    """A verdict for each (gold answer, completion, choices, finished). LaTeX that is not the gold's own is compared in
    other processes, `limit_s` seconds each."""
    said = [read(kind, text, choices) if finished else None for _, text, choices, finished in attempts]
    pairs = {
        (gold, answer): None
        for (gold, *_), answer in zip(attempts, said, strict=True)
        if kind == "math" and answer is not None and not same_latex(gold, answer)
    }
    compared = dict(zip(pairs, latex.compare(list(pairs), limit_s), strict=True))
    verdicts = []
    for (gold, _, _, finished), answer in zip(attempts, said, strict=True):
        if not finished:
            verdicts.append(Verdict("truncated", None))
        elif answer is None:
            verdicts.append(Verdict("unparseable", None))
        elif (gold, answer) in compared:
            verdicts.append(Verdict(compared[gold, answer], answer))
        else:
            same = kind == "math" or answer == gold
            verdicts.append(Verdict("correct" if same else "wrong", answer))
    return verdicts

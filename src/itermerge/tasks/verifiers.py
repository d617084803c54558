r"""What a completion says, and whether that is the answer: numbers, choices, LaTeX, yes or no, exact text.

    numeric    "... 9 * 8 = 72 dollars.\n#### 72"           72
    choice     "Steel is a metal, so the answer is (B)."    B
    math       "so $x = 2$. The answer is \boxed{\frac12}"  \frac12, compared by math-verify (`latex`)
    boolean    "They can swim. The answer is yes."          yes
    exact      "The answer is valid."                       valid

Pure functions; each kind reads the data set's answer (`read_gold`) and the model's text (`read`). A verdict gives the
answer in one spelling, so that votes for 1,000 and 1000.0 are votes for one answer; of LaTeX that is so for numbers
(0.5, 1/2, \frac12), blanks, sizes of brackets and ways to write \frac, and no further: x+1 and 1+x are two votes.
Where a place for the answer is there and holds none, nothing else is read. Nothing is evaluated, and no number is
rounded: 3.4 is not 3. What is not one plain number math-verify compares to 6 decimals (\sqrt{2} is 1.414214).
Deliberately absent: partial credit, and a model as a judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from . import Reason, Verdict, latex

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 300  # characters of an answer in LaTeX; longer ones are no answers
DEEPEST = 12  # brackets within brackets in one; parsing takes time exponential in it
# What stands together as a number, right or not; a minus after a digit or a bracket is an operator.
_RUN = re.compile(r"(?:(?<![0-9)}])[-\u2212])?[$€£]?\.?[0-9](?:[0-9.,/:]*[0-9])?(?:[eE][-+]?[0-9]+)?")
_PLAIN = re.compile(r"-?(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?|\.[0-9]{1,30})")
_RATIO = re.compile(r"-?[0-9]{1,30}/[0-9]{1,30}")
_FRAC = re.compile(
    r"([0-9] ?)?\\[dt]?frac ?(?:\{(-?[0-9]{1,30})\} ?\{(-?[0-9]{1,30})\}|([0-9]) ?([0-9])|([0-9]) ?\{([0-9]{1,30})\})"
)
_MIXED = re.compile(r"(?<![0-9.,/:])(-?[0-9]{1,30}) ([1-9][0-9]{0,29})/([0-9]{1,30})(?![0-9.,/:]*[0-9])")
# Hyphens and dashes right before a number, at its start: a minus. A longer dash, or one after a word, is none.
_DASH = re.compile(r"(?<![^\s(\[{=:,$€£])[\u2010\u2011\u2013\ufe63\uff0d](?=[$€£]?\.?[0-9])")
_GROUPS = re.compile(  # 1 000 000.5
    r"(?<![0-9.,/:])[0-9]{1,3}(?:[ \u00a0\u2009\u202f~'\u2019][0-9]{3}(?![0-9]))+(?:[.,/:][0-9][0-9.,/:]*)?"
)
_BLANKS = str.maketrans(dict.fromkeys("\u00a0\u2009\u202f", " "))
_MARK = re.compile(r"answer(?: {1,3}is\b|\*{0,2} {0,3}:)", re.IGNORECASE)
_HEADS = 20  # lines after #### that are looked at, from the last one
_HASHES = re.compile(r"####(?!#)")
_OPTION = re.compile(r"^\(([A-Z])\) (.*)$", re.MULTILINE)
_BARE_OPTION = re.compile(r"\(?([A-Za-z])[).:]?")
_LETTER = re.compile(
    r"\(([A-Za-z])\)|(?<![\w'$\\{])([A-Z])(?![\w'])|\\(?:text|textbf|mathrm|mathbf)\{\(?([A-Za-z])\)?\}"
)
_OPENS = re.compile(r"[^\w(\\]*(?:\(([A-Za-z])\)|([A-Z])(?:[).:,](?!\w)|\W*$))")  # (B), or B. and the like
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
    box = _box(text)
    return None if box is None else box[1]


def _box(text: str) -> tuple[int, str] | None:
    """Where the last box begins, and its content."""
    for at in sorted((m.start() for m in re.finditer(r"\\(?:boxed|fbox)", text)), reverse=True)[:20]:
        rest = text[at + (6 if text.startswith(r"\boxed", at) else 5) :][: 10 * LONGEST]
        if not rest.startswith("{"):
            if single := re.match(r" ?([0-9A-Za-z])(?![0-9A-Za-z])", rest):
                return at, single[1]
            continue
        depth = 0
        for i, character in enumerate(rest):
            escaped = i > 0 and rest[i - 1] == "\\"
            depth += 0 if escaped else (character == "{") - (character == "}")
            if depth == 0:
                return at, rest[1:i]
    return None


class _Places(NamedTuple):
    """Where an answer is looked for, None for what is not there: the line after ####, what follows the last "answer is"
    or "answer:", the last box."""

    line: str | None
    mark: str | None
    box: str | None

    @property
    def there(self) -> list[str]:
        """The surest first."""
        return [place for place in self if place is not None]


def _places(text: str, answers: Callable[[str, bool], bool]) -> _Places:
    """A line after #### is a place unless a mark or a box comes after it: then it was a heading, as chat models write
    them. `answers` says of such a line, and whether the text ends with it, if it is an answer; one that is none is a
    heading, and at the end of the text a place without an answer."""
    *_, mark = [None, *(m.end() for m in _MARK.finditer(text))]
    box, line = _box(text), None
    behind = max(mark or 0, box[0] if box else 0)
    end = len(text.rstrip())
    for at in reversed([m.end() for m in _HASHES.finditer(text, behind)][-_HEADS:]):
        said, _, _ = text[at:].lstrip(" \t").partition("\n")
        ends = text.find("\n", at, end) < 0
        if answers(said, ends):
            line = said
        elif ends:
            line = ""
        if line is not None:
            break
    # what follows a mark ends where a heading begins
    return _Places(line, None if mark is None else _HASHES.split(text[mark:], 1)[0], box and box[1])


def _first_line(place: str) -> str:
    return place.lstrip(" \t\r\n:*").split("\n", 1)[0]


# --- numbers -------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[Fraction | None]:
    r"""The numbers of a text in order, exact; None for what is not one plain decimal, ratio or `\frac` of two whole
    numbers, or mixed number: a time, 1e9, 1,2, more than 30 digits, a division by zero, a product as in 3\frac{5}{2}.

    A dash right before a number is a minus (\u2212, \u2013, \u2010, \u2011), but not after a digit, as in 3-5. Groups
    of three digits with no-break or thin blanks, ~ or ' between them are one number. With plain blanks they are one
    where a group begins with 0, as no number does (12 000), and None elsewhere: 1 234 may be one number or two.
    """
    text = _tidied(text)
    return [_exact(m.group().rstrip(".,:/").translate(_CURRENCY)) for m in _RUN.finditer(text)]


_CURRENCY = str.maketrans("", "", "$€£")


def _tidied(text: str) -> str:
    r"""Numbers of a text in their plainest spelling: \frac{1}{2} as 1/2, 5 1/2 as 11/2, 1 000 as 1000."""
    text = _DASH.sub("-", text.replace("\u2212", "-").replace(r"\$", "$"))
    if "\\" in text or "{,}" in text:
        text = text.replace("{,}", ",").replace(r"\,", "").replace(r"\!", "")
        text = _FRAC.sub(_unfraced, text)
    text = _GROUPS.sub(_joined, _MIXED.sub(_unmixed, text))
    return _MIXED.sub(_unmixed, text.translate(_BLANKS))


def _unfraced(m: re.Match[str]) -> str:
    r"""1/2 for \frac{1}{2}; with a whole number before it a mixed number, or what is no number (3\frac{5}{2})."""
    above, below = m[2] or m[4] or m[6], m[3] or m[5] or m[7]
    if not m[1]:
        return f"{above}/{below} "
    whole_alone = not re.search(r"[.,/:][0-9]*$", m.string[max(0, m.start() - 32) : m.start()])
    if whole_alone and "-" not in above + below and int(above) < int(below):
        return f"{m[1].strip()} {above}/{below} "
    return f"{m[1].strip()}/{above.lstrip('-')}/{below.lstrip('-')} "


def _joined(m: re.Match[str]) -> str:
    run, separators = m.group(), set(re.findall(r"[^0-9.,/:]", m.group()))
    sure = " " not in separators or re.search(r" 0", run)
    plain = re.fullmatch(r"[1-9].*?(?:\.[0-9]+[.,:/]*|[0-9][.,:/]*)", run) and not re.search(r"[,/:][0-9]", run)
    return re.sub(r"[^0-9.,/:]", "" if sure and plain and len(separators) == 1 else ":", run)


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


def _is_a_number(line: str, _ends: bool) -> bool:
    """Whether a line is little more than one number: a word before it only with a colon or an equals sign behind, a
    few behind it. "Step 2: total" and "2. Total" are headings."""
    line = _tidied(line)
    found = list(_RUN.finditer(line))
    if len(found) != 1:
        return False
    before, behind = line[: found[0].start()].rstrip(" *$\\({["), line[found[0].end() :]
    return (
        (not before or before[-1] in "=:" or not any(c.isalpha() for c in before))
        and len(behind) <= 40
        and not re.match(r"[.):]+\**\s+\w", found[0].group()[-1:].strip("0123456789") + behind)
    )


def _read_numeric(text: str, _choices: Mapping[str, str]) -> str | None:
    places = _places(text, _is_a_number).there
    for place in places or [text]:
        if found := numbers(place):
            return None if found[-1] is None else spelled(found[-1])
    return None


# --- choices -------------------------------------------------------------------------------------------------------


def options(question: str) -> dict[str, str]:
    """{letter: text} of a question's lines "(A) text"."""
    return {m[1]: m[2] for m in _OPTION.finditer(question)}


def _read_choice(text: str, choices: Mapping[str, str]) -> str | None:
    known = choices or dict.fromkeys(LETTERS, "")
    places = _places(text, lambda line, ends: ends or _OPENS.match(line) is not None).there
    for place in places:
        if letter := _chosen(_first_line(place), known):
            return letter
    if places:
        return None
    bare = _BARE_OPTION.fullmatch(text.strip())
    if bare and bare[1].upper() in known:
        return bare[1].upper()
    return _letter(text, known, first=False) or _by_text(text, choices)


def _chosen(line: str, known: Mapping[str, str]) -> str | None:
    """The choice of a line that gives the answer: a letter at its start, else its first letter or the choice whose text
    stands in it; None where these are two different ones."""
    if opens := _OPENS.match(line):
        letter = (opens[1] or opens[2]).upper()
        return letter if letter in known else None
    letter, by_text = _letter(line, known, first=True), _by_text(line, known)
    return letter or by_text if not (letter and by_text) or letter == by_text else None


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
    places = _places(text, lambda line, ends: ends or _BOOLEAN.match(line.lstrip("*\"' ")) is not None).there
    for place in places:
        if m := _BOOLEAN.search(_first_line(place)):
            return _YES[m[1].lower()]
    if places:
        return None
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
    for place in _places(text, lambda _, ends: ends).there or lines[-1:]:
        if said := _plain(_first_line(place)):
            return said
    return None


def _read_math(text: str, _choices: Mapping[str, str]) -> str | None:
    """The last box, else the line after ####, else what follows "answer is"; without these the last formula, else the
    last number."""
    places = _places(text, lambda line, ends: ends or _is_a_number(line, ends) or _FORMULA.match(line) is not None)
    said = None if places.mark is None else _sentence(places.mark)
    *_, last = [None, *_FORMULA.finditer(text[-20 * LONGEST :])] if not places.there else [None]
    formula = None if last is None else last[1] or last[2]
    for place in (places.box, places.line, said, formula):
        if place is not None and (found := _unframed(place)):
            return found if _is_sane(found) else None
    if places.there:
        return None
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
    line = _first_line(text)
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
    r"""Whether two answers are one string but for blanks, bracket sizes and the way in which \frac is written."""
    return _squeezed(a) == _squeezed(b)


def _squeezed(text: str) -> str:
    for old, new in ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\left", ""), (r"\right", ""), (r"\!", "")):
        text = text.replace(old, new)
    text = re.sub(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})", _braced, text)
    return "".join(text.split())


def _braced(m: re.Match[str]) -> str:
    return r"\frac" + "".join(part if part.startswith("{") else f"{{{part}}}" for part in m.groups())


def number(latex_: str) -> Fraction | None:
    r"""The value of LaTeX that is one plain number and nothing else, perhaps of money; None for x^2, 50\%, 3 cm."""
    run = _RUN.fullmatch(_tidied(latex_).strip(" $"))
    return _exact(run.group().translate(_CURRENCY)) if run else None


def _spelling(latex_: str) -> str:
    """One spelling of an answer in LaTeX, for votes."""
    value = number(latex_)
    return _squeezed(latex_) if value is None else spelled(value)


def judge(
    kind: str, attempts: Sequence[tuple[str, str, Mapping[str, str], bool]], *, limit_s: float = latex.LIMIT_S
) -> list[Verdict]:
    """A verdict for each (gold answer, completion, choices, finished). LaTeX that is neither the gold's own nor a plain
    number, as the gold is, is compared in other processes, `limit_s` seconds each."""
    said = [read(kind, text, choices) if finished else None for _, text, choices, finished in attempts]
    pairs = dict.fromkeys(
        (gold, answer) for (gold, *_), answer in zip(attempts, said, strict=True) if answer is not None
    )
    told: dict[tuple[str, str], Reason] = {}
    for gold, answer in pairs:
        same = gold == answer if kind != "math" else _same_at_sight(gold, answer)
        if same is not None:
            told[gold, answer] = "correct" if same else "wrong"
    left = [pair for pair in pairs if pair not in told]
    told |= zip(left, latex.compare(left, limit_s), strict=True)
    verdicts = []
    for (gold, _, _, finished), answer in zip(attempts, said, strict=True):
        if not finished:
            verdicts.append(Verdict("truncated", None))
        elif answer is None:
            verdicts.append(Verdict("unparseable", None))
        else:
            verdicts.append(Verdict(told[gold, answer], _spelling(answer) if kind == "math" else answer))
    return verdicts


def _same_at_sight(gold: str, answer: str) -> bool | None:
    """Whether LaTeX is equal, None where that is for math-verify to say: it is one string, or two plain numbers."""
    if same_latex(gold, answer):
        return True
    a, b = number(gold), number(answer)
    return None if a is None or b is None else a == b

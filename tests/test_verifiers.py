"""What completions say, by kind: hand values, properties, hostile texts; LaTeX in processes that can be killed."""

from __future__ import annotations

import os
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hostile import GOLD, corpus
from hypothesis import given
from hypothesis import strategies as st

from itermerge.tasks import REASONS, TaskError, latex, verifiers
from itermerge.tasks.verifiers import GoldError, judge, numbers, options, read, read_gold, spelled

PETS = {"A": "a dog", "B": "a big dog", "C": "cat"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" There are 7 + 2 = 9 apples. The answer is 9.", "9"),
        ("The answer is 4. No, the answer is 1,234.50 dollars", "1234.5"),
        (" 9-4=5", "5"),
        ("so the Answer is -3", "-3"),
        ("the answer is unknown, 12 perhaps", "12"),
        ("12 of them; the answer is unknown", None),  # nothing is read from elsewhere
        ("He has 9 * 8. The answer is seventy-two.", None),
        ("so 72.\n#### unknown", None),
        ("Answer: 5", "5"),
        ("**Answer:** 1,000 dollars", "1000"),
        ("The answer isn't hard: 5 + 2 = 7", "7"),
        # headings of ####
        ("#### Step 1: cost\n8 * 5 = 40\n#### Step 2: total\n40+32=72\nThe answer is 72.", "72"),
        ("#### Step 1: cost\n8 * 5 = 40\n#### Step 2: total\n40+32=72", "72"),
        ("#### 2. Total\n40+32=72", "72"),
        ("#### 2\n40+32=\\boxed{72}", "72"),
        ("#### 72 dollars\n#### Explanation\n9 * 8", "72"),
        ("The answer is 72.\n#### Step 1\nWe add 40", "72"),
        ("#### Total: 72 dollars", "72"),
        ("#### **72**", "72"),
        ("#### 40 or 72", None),
        ("#### Step 3", None),
        ("no number", None),
        ("", None),
        ("٣ is not read", None),  # a digit, but not one of ours
        ("the answer is .5.", "0.5"),
        ("the answer is -$3", "-3"),
        ("the answer is \u22123", "-3"),
        ("the answer is €18.", "18"),
        ("the answer is 20%", "20"),
        ("the answer is 5cm", "5"),
        ("3.333...", "3.333"),
        ("the answer is 3.40", "3.4"),  # never 3
        # the place: ####, then "answer is", then a box, then the last number
        ("2 + 2 = 4\n#### 4\nQuestion: 7", "4"),
        ("#### 1,000", "1000"),
        ("The answer is 3.\n#### 4", "4"),
        (r"The answer is 3. \boxed{4}", "4"),  # both follow the mark; the last number counts
        (r"so \boxed{72} in 3 days", "72"),
        (r"\boxed{7", "7"),  # no box that closes: the last number
        (r"The answer is \boxed{\$1{,}234.00}", "1234"),
        (r"The answer is $15,\!000$", "15000"),
        # ratios are exact
        ("The answer is 1/2", "0.5"),
        (r"The answer is \frac{2}{3}.", "2/3"),
        (r"\dfrac12", "0.5"),
        (r"\frac1{20}", "0.05"),
        (r"The answer is $3\frac{1}{2}$", "3.5"),
        (r"The answer is $-12\dfrac12$", "-12.5"),
        (r"The answer is $3 \frac{1}{2}$", "3.5"),
        (r"The answer is $3\frac{5}{2}$", None),  # a product
        (r"The answer is $1.5\frac{1}{2}$", None),
        # dashes, and groups of digits
        ("the answer is \u20133", "-3"),
        ("the answer is \u2013$1,200.50", "-1200.5"),
        ("x=\u20113", "-3"),
        ("the answer is \u2014 3", "3"),
        ("pages 3\u20135", "5"),
        ("1\u202f000", "1000"),
        ("the answer is 12\u00a0345\u00a0678.50 dollars", "12345678.5"),
        ("1'000", "1000"),
        ("1 000", "1000"),
        ("the answer is 12 000.", "12000"),
        ("1 234", None),  # one number or two?
        ("5 100/2", None),
        ("1 000/2", None),
        ("1000 000", "0"),
        ("5\u00a01/2", "5.5"),
        ("12 3456", "3456"),
        ("5 1/2 hours", "5.5"),
        ("-5 1/2", "-5.5"),
        # what is not one plain number is no answer, and neither is a part of it
        ("4 of them, the answer is 1/0", None),
        ("the answer is 12e3", None),
        ("1e999999999", None),
        ("the answer is 10:30", None),
        ("the answer is 1,2", None),
        ("9" * 40, None),
        ("3." + "3" * 40, None),
    ],
)
def test_numbers_are_read(text: str, said: str | None) -> None:
    assert read("numeric", text) == said


@pytest.mark.parametrize(
    ("gold", "completion", "finished", "reason"),
    [
        ("3.4", "The answer is 3", True, "wrong"),
        ("3", "The answer is 3.4", True, "wrong"),
        ("3", "The answer is 3.0.", True, "correct"),
        ("1234", "The answer is 1,234", True, "correct"),
        ("0.5", "The answer is 1/2", True, "correct"),
        ("2/3", "The answer is 0.6667", True, "wrong"),
        ("3", "The answer is 3", False, "truncated"),
        ("3", "I do not know", True, "unparseable"),
        ("-3", "The answer is 3", True, "wrong"),
    ],
)
def test_verdicts_on_numbers(gold: str, completion: str, finished: bool, reason: str) -> None:
    (verdict,) = judge("numeric", [(gold, completion, {}, finished)])
    assert verdict.reason == reason


_decimals = st.decimals(-(10**12), 10**12, allow_nan=False, places=4)


@given(
    _decimals, st.sampled_from(["{}", "{:,}", "${}", "{}%", "{}.", "{} apples", r"\boxed{{{}}}", "$\\boxed{{{:,}}}$"])
)
def test_any_decimal_is_read_back_from_any_spelling(number: Decimal, spelling: str) -> None:
    """Also with a unicode minus, and whatever stands before the mark."""
    printed = spelling.format(number)
    for text in (printed, printed.replace("-", "\u2212")):
        for before in ("The answer is ", "1 + 1 = 2, so the answer is ", "7\n#### ", ""):
            said = read("numeric", before + text)
            assert said is not None
            assert Fraction(said) == Fraction(number), (before + text, said)


@given(_decimals)
def test_one_number_has_one_spelling(number: Decimal) -> None:
    spellings = {read("numeric", f"The answer is {text}") for text in (f"{number}", f"{number:,}", f"{number}00")}
    assert spellings == {spelled(Fraction(number))}
    assert Decimal(spelled(Fraction(number))) == number


@given(st.fractions(-1000, 1000, max_denominator=999))
def test_any_ratio_is_read_back(number: Fraction) -> None:
    said = read("numeric", f"The answer is {number.numerator}/{number.denominator}.")
    assert said is not None
    assert Fraction(said) == number
    assert Fraction(read_gold("numeric", said)) == number


@given(_decimals, _decimals)
def test_only_equal_numbers_are_equal(a: Decimal, b: Decimal) -> None:
    (verdict,) = judge("numeric", [(spelled(Fraction(a)), f"The answer is {b}", {}, True)])
    assert verdict.correct == (a == b)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Dogs bark. The answer is (B).", "B"),
        ("The answer is B.", "B"),
        ("The answer is: **C**", "C"),
        ("The answer is b", "B"),
        ("The answer is B because dogs bark", "B"),
        (r"The answer is \boxed{C}", "C"),
        (r"\boxed{\text{(B)}}", "B"),
        # headings, and what is said after the answer
        ("#### Option A\nbad\n#### Option C\nbad\nThe answer is (B).", "B"),
        ("#### Option A\nbad\n#### Option C\nbad, so B", "B"),
        ("#### B", "B"),
        ("#### (B) a big dog\nbecause", "B"),
        ("Answer: B. Because (A) floats.", "B"),
        ("Answer: (B)\nNot (C)", "B"),
        ("The answer is a big dog.\nExplanation: (C) burns.", "B"),
        ("The answer is\n(C)", "C"),
        ("(A) floats. The answer is (E).", None),
        ("The answer is (E). (A) floats.", None),
        ("The answer is E. (A) floats.", None),
        ("The answer is a big dog, not (C).", None),  # which of the two?
        ("A dog? The answer is unknown.", None),
        (r"so \boxed{\text{B}}", "B"),
        ("B", "B"),
        (" (c)\n", "C"),
        ("C. cat", "C"),
        ("A is wrong, so it must be C", "C"),
        ("I think (A), no: (B)", "B"),
        ("The answer is a big dog", "B"),  # not "a", and not "a dog"
        ("The answer is A dog.", "A"),
        ("it is surely a cat!", "C"),
        ("a dog or a cat", None),  # two of them
        ("concatenate", None),
        ("The answer is (D).", None),  # there is none
        ("I do not know", None),
        ("", None),
    ],
)
def test_choices_are_read(text: str, said: str | None) -> None:
    assert read("choice", text, PETS) == said


def test_choices_stand_in_the_question() -> None:
    assert options("Which (A) one?\n(A) a dog\n(B) the (C) side\n(C) cat") == {
        "A": "a dog",
        "B": "the (C) side",
        "C": "cat",
    }
    assert read("choice", "so the answer is (G)") == "G"  # of a question that names its choices in its own way


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("They fly. The answer is yes.", "yes"),
        ("The answer is: **No**, because", "no"),
        ("Yes, but no bird", "yes"),
        ("True", "yes"),
        ("not ( True ) is False", "no"),
        (r"\boxed{\text{false}}", "no"),
        ("#### yes", "yes"),
        ("#### Is it true?\nhm\nno", "no"),
        ("No. The answer is unclear.\nYes?", None),
        ("nobody knows", None),
        ("", None),
    ],
)
def test_booleans_are_read(text: str, said: str | None) -> None:
    assert read("boolean", text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("So the answer is VALID.", "valid"),
        ("thus\n'in  valid' ", "in valid"),
        ("#### ] ) >", "] ) >"),
        ("#### Reasoning\nfoo\nThe answer is valid.", "valid"),
        ("#### Reasoning\nfoo\nvalid", "valid"),
        ("**Answer:** valid", "valid"),
        ("The answer is:\n  banana apple\nQ:", "banana apple"),
        ("The answer is ４２", "42"),  # compatible characters
        ("...", None),
        ("", None),
    ],
)
def test_exact_texts_are_read(text: str, said: str | None) -> None:
    assert read("exact", text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"so $x=2$. The answer is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1}, no, \boxed{\{x \mid x > {2}\}}", r"\{x \mid x > {2}\}"),
        (r"\boxed 7", "7"),
        (r"The answer is $\frac12$. It is half.", r"\frac12"),
        ("The answer is 3.5. So", "3.5"),
        (r"The answer is $\$18.90$.", r"\$18.90"),
        (r"we get \(x^2\).", "x^2"),
        (r"first $a$, then $b + \$1$", r"b + \$1"),
        ("x = 12", "12"),
        ("#### 12\nmore", "12"),
        ("#### Step 2: total\nso $72$", "72"),
        ("#### Step 2: total\nThe answer is 72.", "72"),
        ("The answer is 3.\n#### 4", "4"),
        (r"so $72$. \boxed{}", None),
        (r"\boxed{" + "1" * 400 + "}", None),  # no answer is so long,
        (r"\boxed{" + "(" * 20 + "1" + ")" * 20 + "}", None),  # or so deep
        ("nothing", None),
    ],
)
def test_latex_is_read(text: str, said: str | None) -> None:
    assert read("math", text) == said


@pytest.mark.parametrize(
    ("kind", "field", "answer"),
    [
        ("numeric", "48 / 2 = 24\n#### 72", "72"),
        ("numeric", "#### 1,000", "1000"),
        ("numeric", "9 (apples)", "9"),
        ("numeric", 145.0, "145"),
        ("numeric", 1e22, "10000000000000000000000"),
        ("numeric", 0.1, "0.1"),
        ("numeric", 7, "7"),
        ("numeric", r"so \boxed{3/4}", "0.75"),
        ("math", r"Hence $\boxed{\dfrac{\pi}{2}}$.", r"\dfrac{\pi}{2}"),
        ("math", "5\\sqrt{2}", "5\\sqrt{2}"),
        ("choice", "(B)", "B"),
        ("choice", "c", "C"),
        ("boolean", True, "yes"),
        ("boolean", "False", "no"),
        ("boolean", ["yes"], "yes"),
        ("exact", "Valid", "valid"),
    ],
)
def test_a_data_sets_answers_are_read(kind: str, field: Any, answer: str) -> None:
    assert read_gold(kind, field) == answer


def test_choices_of_a_data_set_by_label_by_text_and_by_letter() -> None:
    assert read_gold("choice", "3", ["x", "y", "z"], ["1", "2", "3"]) == "C"
    assert read_gold("choice", "y", ["x", "y", "z"]) == "B"
    with pytest.raises(GoldError, match="expected a letter, a label or a choice's text, got 'D'"):
        read_gold("choice", "D", ["x", "y", "z"])


@pytest.mark.parametrize(
    ("kind", "field", "said"),
    [
        ("numeric", "6 years; 9 years", "expected one number"),
        ("numeric", "yes", "expected one number"),
        ("numeric", float("nan"), "it is empty"),
        ("numeric", None, "it is empty"),
        ("exact", " ", "it is empty"),
        ("boolean", "maybe", "expected yes, no, true or false, got 'maybe'"),
        ("boolean", ["yes", "no"], r"expected one answer, got \['yes', 'no'\]"),
        ("math", r"\frac{1}{2", "braces closed"),
    ],
)
def test_an_answer_that_cannot_be_read_says_why(kind: str, field: Any, said: str) -> None:
    with pytest.raises(GoldError, match=said):
        read_gold(kind, field)


# --- LaTeX in processes --------------------------------------------------------------------------------------------

EQUAL = [  # gold answers as competition problems have them, and another spelling of each
    (r"\frac{1}{2}", "0.5"), (r"\dfrac{3}{4}", "3/4"), ("x^2+2x+1", "(x+1)^2"), (r"3\sqrt{5}", r"\sqrt{45}"),
    ("3, 7", "7,3"), (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)"), (r"\$36", "36"),
    (r"5\text{ cm}", "5"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"[0,1)", r"\left[0,1\right)"), (r"\text{Monday}", r"\text{monday}"), ("1{,}234", "1234"),
]  # fmt: skip
DIFFERENT = [
    ("3", "3.4"),
    (r"\frac{1}{2}", "2"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1)"),
    ("x+1", "x-1"),
    ("7", "seven"),
]


def test_votes_for_one_number_are_votes_for_one_answer() -> None:
    texts = [r"\dfrac{1}{2}", r"\frac{1}{2}", r"\frac12", "0.5", "3", "3"]
    verdicts = judge("math", [("3", rf"\boxed{{{text}}}", {}, True) for text in texts])
    assert [v.answer for v in verdicts] == ["0.5"] * 4 + ["3"] * 2
    assert [v.reason for v in verdicts] == ["wrong"] * 4 + ["correct"] * 2
    others = [r"\dfrac{\pi}2", r"\frac{\pi}{2}", r" \tfrac {\pi} {2} "]
    verdicts = judge("math", [(others[1], rf"\boxed{{{text}}}", {}, True) for text in others])
    assert {v.answer for v in verdicts} == {r"\frac{\pi}{2}"}
    assert all(v.correct for v in verdicts)


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        ("0.33333333", r"\frac{1}{3}", "wrong"),  # math-verify compares 6 decimals
        (r"\frac{1}{3}", "0.33333333", "wrong"),
        (r"1\,000", "1000", "correct"),
        (r"\$36", "36.00", "correct"),
        (r"3\frac12", r"\frac72", "correct"),
        (r"3\frac12", r"\frac32", "wrong"),
        ("\u22123", "-3", "correct"),
    ],
)
def test_plain_numbers_in_latex_are_compared_exactly(
    gold: str, answer: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(latex, "compare", lambda pairs, _: asked.extend(pairs) or ["error"] * len(pairs))
    assert judge("math", [(gold, rf"\boxed{{{answer}}}", {}, True)])[0].reason == reason
    assert asked == []


@pytest.mark.parametrize("text", ["x^2", r"50\%", "3 cm", "(1,2)", "2x", "1/0", "", r"12^\circ", r"\sqrt{2}", "1:30"])
def test_what_is_more_than_a_number_is_left_to_math_verify(text: str) -> None:
    assert verifiers.number(text) is None


def test_latex_is_compared_by_what_it_means() -> None:
    assert latex.compare([*EQUAL, *DIFFERENT]) == ["correct"] * len(EQUAL) + ["wrong"] * len(DIFFERENT)


def test_the_shortcut_for_one_string_says_what_math_verify_says() -> None:
    """Strings that differ in blanks, bracket sizes or the fraction's bar alone never reach the workers."""
    pairs = [(gold, gold.replace("frac", "dfrac").replace("ddfrac", "tfrac").replace(",", ", ")) for gold, _ in EQUAL]
    assert all(verifiers.same_latex(*pair) for pair in pairs)
    assert latex.compare(pairs) == ["correct"] * len(pairs)
    assert verifiers.same_latex(r"\frac12", r"\dfrac{1}2")
    assert not any(verifiers.same_latex(*pair) for pair in DIFFERENT)


def test_what_takes_too_long_is_killed_and_others_are_not_lost() -> None:
    hard = "99999999999!"
    attempts = [("7", rf"\boxed{{{text}}}", {}, True) for text in ("7", hard, "8", hard, "14/2", "")]
    started = time.monotonic()
    verdicts = judge("math", attempts, limit_s=0.5)
    assert [v.reason for v in verdicts] == ["correct", "timed_out", "wrong", "timed_out", "correct", "unparseable"]
    assert verdicts[1].answer == hard
    assert time.monotonic() - started < 60
    assert judge("math", attempts[:1])[0].correct  # the next call has workers again


def test_a_worker_that_dies_is_an_error_and_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "worker.py"
    fake.write_text(
        "import json, os, sys\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    answer = json.loads(line)[1]\n"
        "    if answer == 'die': os._exit(3)\n"
        "    print('error' if answer == 'raise' else 'wrong', flush=True)\n"
    )
    latex.stop()
    monkeypatch.setattr(latex, "_WORKER", fake)
    try:
        said = latex.compare([("1", text) for text in ("a", "die", "raise", "b", "die", "c")])
    finally:
        latex.stop()
    assert said == ["wrong", "error", "error", "wrong", "error", "wrong"]


def test_a_worker_that_sleeps_is_killed_by_the_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "worker.py"
    fake.write_text("import sys, time\nprint('ready', flush=True)\nfor line in sys.stdin: time.sleep(60)\n")
    latex.stop()
    monkeypatch.setattr(latex, "_WORKER", fake)
    try:
        assert latex.compare([("1", "2")], limit_s=0.02) == ["timed_out"]
    finally:
        latex.stop()


def test_order_and_content_do_not_depend_on_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("12", str(i)) for i in range(24)] + EQUAL
    latex.stop()
    monkeypatch.setattr(latex, "_workers", [])
    monkeypatch.setattr(latex, "WORKERS", 1)
    one = latex.compare(pairs)
    latex.stop()
    monkeypatch.setattr(latex, "_workers", [])
    monkeypatch.setattr(latex, "WORKERS", 3)
    three = latex.compare(pairs)
    latex.stop()
    assert one == three
    assert one[:24] == ["correct" if i == 12 else "wrong" for i in range(24)]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("print('ImportError: no sympy', flush=True)", "ImportError: no sympy"),
        ("raise SystemExit(3)", "exit status 3"),
    ],
)
def test_a_worker_that_cannot_start_is_told_at_once(
    source: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "worker.py"
    fake.write_text(source)
    latex.stop()
    monkeypatch.setattr(latex, "_WORKER", fake)
    monkeypatch.setattr(latex._Worker, "works", False)
    try:
        with pytest.raises(TaskError, match=rf"verifier math: .*does not work \({why}\)"):
            latex.require()
        with pytest.raises(TaskError, match=why):
            latex.compare([("x", "y")])
        monkeypatch.setattr(latex._Worker, "works", True)  # later ones lose their own comparison alone
        assert latex.compare([("x", "y"), ("x", "z")]) == ["error", "error"]
    finally:
        latex.stop()


def test_the_worker_says_why_it_cannot_start(tmp_path: Path) -> None:
    import subprocess

    for content, said in (
        ("parse = lambda *_, **__: [1]\nverify = lambda *_, **__: False", r"it finds \frac{1}{2} = 0.5 wrong"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
    ):
        (tmp_path / "math_verify.py").write_text(content)
        command = [sys.executable, "-P", str(latex._WORKER)]
        ran = subprocess.run(
            command,
            input="",
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert ran.stdout.strip() == said


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latex, "find_spec", lambda _: None)
    with pytest.raises(TaskError, match=r"pip install 'itermerge\[math\]'"):
        latex.compare([("1", "2")])


# --- hostile texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GOLD)
def test_hostile_texts_get_a_verdict(kind: str) -> None:
    """A part of the corpus of benchmarks/verifiers.py, which has 10,000."""
    texts = corpus(160 if kind == "math" else 1200)
    choices = PETS if kind == "choice" else {}
    verdicts = judge(kind, [(GOLD[kind], text, choices, True) for text in texts], limit_s=0.5)
    assert len(verdicts) == len(texts)
    assert {v.reason for v in verdicts} <= set(REASONS)
    assert all((v.answer is None) == (v.reason == "unparseable") or v.reason == "unparseable" for v in verdicts)


@given(st.text(max_size=300), st.sampled_from(["numeric", "choice", "boolean", "exact"]))
def test_any_text_has_a_verdict(text: str, kind: str) -> None:
    (verdict,) = judge(kind, [(GOLD[kind], text, PETS, True)])
    assert verdict.reason in ("correct", "wrong", "unparseable")
    assert all(n is None or isinstance(n, Fraction) for n in numbers(text))


@given(st.text(max_size=300))
def test_any_text_is_read_as_sane_latex_or_not_at_all(text: str) -> None:
    said = read("math", text)
    assert said is None or len(said) <= verifiers.LONGEST


def test_the_worker_needs_nothing_of_ours() -> None:
    """It is run as a script: neither this package nor the modules beside it are imported."""
    import subprocess

    out = subprocess.run(
        [sys.executable, "-P", str(latex._WORKER)],
        input='["1/2", "0.5", 9]\n',
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.split() == ["ready", "correct"]
    source = latex._WORKER.read_text()
    assert "itermerge" not in source
    assert "from ." not in source

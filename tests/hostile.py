"""Texts that a verifier may meet and must survive: what models write when they fail, and what breaks parsers."""

from __future__ import annotations

import random
from collections.abc import Callable

GOLD = {"numeric": "72", "choice": "B", "math": r"\frac{1}{2}", "boolean": "yes", "exact": "valid"}
_PIECES = (
    "The answer is", "answer is", "####", r"\boxed{", r"\frac{", r"\frac", r"\sqrt{", r"\left(", r"\right)", "{", "}",
    "(", ")", "[", "]", "$", "$$", r"\$", r"\[", r"\]", "^", "_", "**", "*", "/", "-", "\u2212", "+", "=", "\n", " ",
    ",", ".", ":", "A", "(B)", "c.", "yes", "No", "true", "1", "2", "95", "1,234", "0.5", "1e9", "٣", "५", "½", "²",
    "∞", "π", "x", "sin", r"\pi", r"\infty", r"\text{", r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", "!", "%",
    r"\int", r"\sum", "import os", "os.system('true')", "__import__", "eval(", "lambda:", "\0", "\ud800",
    "\u202e", "<|endoftext|>",
)  # fmt: skip
_TOWERS = (
    "95 ** 99 ** 97", "9**9**9**9", "10^10^10^10", r"10^{10^{10^{10}}}", r"2^{2^{2^{2^{2^{2}}}}}", "1e999999999",
    "1e-999999999", "99999999999!", r"(10^9)!", r"100000!", r"\sum_{k=1}^{10^9} k^k", r"\int_0^1 x^x dx",
    r"\binom{10^9}{10^8}", r"\prod_{n=1}^{99999} n", r"\sqrt[99999999]{2}", "0^0", "1/0", r"\frac{0}{0}",
    r"\frac{1}{0}", r"\log_{0}{0}",
    r"x^{99999} - 1", r"(x+y+z)^{5000}", "123456789" * 30, "0." + "3" * 280, r"\frac{" * 40 + "1" + "}{2}" * 40,
)  # fmt: skip


def _soup(rng: random.Random) -> str:
    return "".join(rng.choice(_PIECES) + rng.choice(("", " ")) for _ in range(rng.randrange(1, 60)))


def _tower(rng: random.Random) -> str:
    return rng.choice((r"\boxed{%s}", "The answer is %s.", "#### %s", "$%s$", "%s")) % rng.choice(_TOWERS)


def _nested(rng: random.Random) -> str:
    opened, closed = rng.choice((("{", "}"), ("(", ")"), (r"\boxed{", "}"), (r"\sqrt{", "}"), ("[", "]"), ("$", "$")))
    depth = rng.choice((5, 50, 500, 5000))
    return (
        rng.choice((r"\boxed{", "The answer is ", ""))
        + opened * depth
        + "1"
        + closed * rng.choice((0, depth, 2 * depth))
    )


def _digits(rng: random.Random) -> str:
    digit = rng.choice(("٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９", "𝟎𝟏𝟐𝟑", "①②③", "0123456789"))
    return rng.choice(("The answer is ", "#### ", r"\boxed{", "")) + "".join(
        rng.choices(digit + ".,", k=rng.randrange(1, 400))
    )


def _regex_bomb(rng: random.Random) -> str:
    part = rng.choice(
        ("a", "1,", "1.", "1/", "-", "(", "$", "####", "answer is ", " ", "\\", "\\$", "(A", "1 1/", "{,}", "**")
    )
    return part * rng.choice((10, 1000, 20000)) + rng.choice(("!", "", "1", "\n"))


def _code(rng: random.Random) -> str:
    lines = (
        "def f(n):\n    return f(n - 1) if n else __import__('os').getcwd()\nprint(f(10**9))",
        "[x for x in (lambda: 0).__class__.__mro__[1].__subclasses__()]", "exec('while True: pass')", "'a' * 10**12",
        "{{ 7 * 7 }} ${jndi:ldap://x} %s %n", "\\input{/etc/passwd} \\write18{true}", "<script>alert(1)</script>",
    )  # fmt: skip
    return f"```python\n{rng.choice(lines)}\n```\n" + rng.choice(("", "The answer is eval('72')", r"\boxed{exec(x)}"))


def _random_unicode(rng: random.Random) -> str:
    return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(rng.randrange(200)))


def megabyte(rng: random.Random) -> str:
    unit = rng.choice(
        ("9", "1,", "1.5 ", "The answer is 7. ", r"\boxed{", "(A) ", "yes ", "#### 5\n", "{", "x" * 99 + "\n", "$1$ ")
    )
    return unit * (1_000_000 // len(unit))


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _soup, _soup, _soup, _nested, _digits, _regex_bomb, _code, _random_unicode,
)  # fmt: skip


def corpus(n: int, seed: int = 0) -> list[str]:
    """`n` texts: each thousandth a megabyte long, each fiftieth a tower of exponents, the rest of all kinds in turn."""
    rng = random.Random(f"hostile:{seed}")
    made = []
    for i in range(n):
        kind = megabyte if i % 1000 == 7 else _tower if i % 50 == 3 else KINDS[i % len(KINDS)]
        made.append(kind(rng))
    return made

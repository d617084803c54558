"""The other side of `latex`: compares pairs of answers with math-verify, one JSON line each, until its input ends.

Run as a script, without the package around it. The kernel ends it (SIGPROF) when a comparison needs more CPU time than
its limit: that works within one long operation of sympy, too.
"""

from __future__ import annotations

import json
import logging
import signal
import sys

MEMORY = 4 << 30  # bytes of address space

try:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):  # not everywhere
    pass


def compare(gold: str, answer: str) -> str:
    """correct, wrong, or unparseable."""
    from math_verify import parse, verify  # here, where it is told when that fails

    # In a box each: what is compared is this text, whatever else math-verify would find in it.
    said = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not said:
        return "unparseable"
    known = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return "correct" if verify(known, said, timeout_seconds=None) else "wrong"


def main() -> None:
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no verdict
    try:  # the first comparison takes the longest; it is also the proof that this works
        first = compare(r"\frac{1}{2}", "0.5")
        said = "ready" if first == "correct" else rf"it finds \frac{{1}}{{2}} = 0.5 {first}"
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
    print(said, file=out, flush=True)
    if said != "ready":
        return
    for line in sys.stdin:
        gold, answer, limit_s = json.loads(line)
        timed = hasattr(signal, "setitimer")
        if timed:
            signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            verdict = compare(gold, answer)
        except Exception:  # of any kind: recursion, memory, sympy's own
            verdict = "error"
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=out, flush=True)


if __name__ == "__main__":
    main()

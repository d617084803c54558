"""Seconds that every verifier needs for 10,000 hostile texts, and what it says of them.

python benchmarks/verifiers.py [N]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hostile import GOLD, corpus

from itermerge.tasks import verifiers


def main() -> None:
    texts = corpus(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    print(f"{len(texts)} texts, {sum(map(len, texts)) / 1e6:.1f} million characters")
    whole = 0.0
    for kind, gold in GOLD.items():
        choices = {"A": "a dog", "B": "a big dog", "C": "cat"} if kind == "choice" else {}
        started = time.perf_counter()
        verdicts = verifiers.judge(kind, [(gold, text, choices, True) for text in texts])
        whole += (seconds := time.perf_counter() - started)
        print(f"{kind:8} {seconds:6.1f} s  {dict(Counter(v.reason for v in verdicts))}", flush=True)
    print(f"all      {whole:6.1f} s")


if __name__ == "__main__":
    main()

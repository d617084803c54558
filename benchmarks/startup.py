"""How long a user waits for nothing: `itermerge --help`, and what is wrong with a config; with --quickstart the demo.

    python benchmarks/startup.py [--trials 5] [--json]
    python benchmarks/startup.py --quickstart [--trials 1] [--json]

Whole processes, medians. The quickstart (two jobs of four rounds on the lab) runs into a new folder with a new store;
59 s is what it took when the first issue of this project was done, with the same results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {  # what is typed, and how it ends
    "--help": 0, "merge.ratoi=0.5": 1, "rounds=many": 2, "merge.ratio=2": 2, "--multirun rounds=1,0": 2,
}  # fmt: skip
QUICKSTART = "experiment=quickstart"
HELP_TARGET, BEFORE, QUICKSTART_TARGET = 1.0, 59.0, 0.6


def seconds(words: list[str], ends: int) -> float:
    """Of a whole process. Raises SystemExit where it ends in another way."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"store.dir={Path(folder) / 'store'}"] if QUICKSTART in words else []
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "itermerge", *words, *own], cwd=folder, capture_output=True, text=True, check=False
        )
        took = time.perf_counter() - began
    if done.returncode != ends:
        sys.exit(f"itermerge {' '.join(words)}: exit status {done.returncode}, not {ends}\n{done.stderr[-2000:]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    args = parser.parse_args()
    commands = {QUICKSTART: 0} if args.quickstart else COMMANDS
    trials = args.trials or (1 if args.quickstart else 5)
    rows = []
    for typed, ends in commands.items():
        times = [seconds(typed.split(), ends) for _ in range(trials)]
        took = statistics.median(times)
        rows.append({"command": f"itermerge {typed}", "seconds": round(took, 2), "of": trials})
        print(f"itermerge {typed:24s} {took:6.2f} s (median of {trials})", flush=True)
    if args.quickstart:
        told = {"name": "quickstart", "rows": rows, "ratio": round(rows[0]["seconds"] / BEFORE, 2)}
        print(f"of the first issue's {BEFORE:.0f} s: {told['ratio']:.2f} (target at most {QUICKSTART_TARGET})")
    else:
        told = {"name": "startup", "rows": rows, "ratio": rows[0]["seconds"]}
        print(f"--help: {told['ratio']:.2f} s (target at most {HELP_TARGET})")
    if args.json:
        print(json.dumps(told))


if __name__ == "__main__":
    main()

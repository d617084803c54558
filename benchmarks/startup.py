"""How long a user waits for nothing: `itermerge --help`, and what is wrong with a config; with --quickstart the demo.

    python benchmarks/startup.py [--trials 5] [--json]
    python benchmarks/startup.py --quickstart [--trials 1] [--json]

Whole processes, medians. The quickstart (two jobs of four rounds on the lab) runs into a new folder with a new store,
and beside it the code of the commit at which the first issue of this project was done, from the repository's history:
machines differ by more than the two do. Exit status 1 unless all accuracies of all rounds are the same.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

COMMANDS = {  # what is typed, and how it ends
    "--help": 0, "merge.ratoi=0.5": 1, "rounds=many": 2, "merge.ratio=2": 2, "--multirun rounds=1,0": 2,
}  # fmt: skip
QUICKSTART = "experiment=quickstart"
FIRST = "83fe24c"  # the commit
HELP_TARGET, QUICKSTART_TARGET = 1.0, 0.6


def seconds(words: list[str], ends: int) -> float:
    """Of a whole process. Raises SystemExit where it ends in another way."""
    with tempfile.TemporaryDirectory() as folder:
        return timed(Path(folder), words, ends)


def timed(folder: Path, words: list[str], ends: int, source: Path | None = None) -> float:
    """As `seconds`, in a folder that stays, and with the code of another time."""
    env = os.environ | ({"PYTHONPATH": str(source)} if source else {})
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "itermerge", *words], cwd=folder, capture_output=True, text=True, check=False, env=env
    )
    took = time.perf_counter() - began
    if done.returncode != ends:
        sys.exit(f"itermerge {' '.join(words)}: exit status {done.returncode}, not {ends}\n{done.stderr[-2000:]}")
    return took


def first(into: Path) -> Path:
    """The source folder of the first issue's end."""
    command = ["git", "archive", FIRST, "src", "conf"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.decode().strip()}; a shallow clone has no history")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(into, filter="data")
    return into / "src"


def quickstart(trials: int) -> dict[str, Any]:
    """Both, alternating."""
    times: dict[str, list[float]] = {"now": [], "the first issue": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources, found = {"now": None, "the first issue": first(folder / "first")}, []
        for trial in range(trials):
            for which, source in sources.items():
                at = folder / f"{which}{trial}"
                at.mkdir()
                times[which].append(timed(at, [QUICKSTART, f"store.dir={at / 'store'}"], 0, source))
                print(f"{QUICKSTART}, {which}: {times[which][-1]:.1f} s", flush=True)
                lines = [json.loads(text) for f in sorted(at.rglob("rounds.jsonl")) for text in f.open()]
                assert lines, at
                found.append([{k: v for k, v in line.items() if k.endswith("/acc")} for line in lines])
    names = set.intersection(*(set(line) for lines in found for line in lines))
    kept = [[{k: line[k] for k in sorted(names)} for line in lines] for lines in found]
    if any(one != kept[0] for one in kept):
        sys.exit("the two have DIFFERENT accuracies")
    print(f"the same {len(names)} accuracies in {len(kept[0])} rounds")
    took = {which: statistics.median(all_) for which, all_ in times.items()}
    ratio = took["now"] / took["the first issue"]
    print(f"now / the first issue {ratio:.2f} (target at most {QUICKSTART_TARGET})")
    rows = [
        {"itermerge experiment=quickstart": which, "seconds": round(t, 1), "of": trials} for which, t in took.items()
    ]
    return {"name": "quickstart", "rows": rows, "ratio": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    args = parser.parse_args()
    if args.quickstart:
        told = quickstart(args.trials or 1)
    else:
        rows = []
        trials = args.trials or 5
        for typed, ends in COMMANDS.items():
            took = statistics.median(seconds(typed.split(), ends) for _ in range(trials))
            rows.append({"command": f"itermerge {typed}", "seconds": round(took, 2), "of": trials})
            print(f"itermerge {typed:24s} {took:6.2f} s (median of {trials})", flush=True)
        told = {"name": "startup", "rows": rows, "ratio": rows[0]["seconds"]}
        print(f"--help: {told['ratio']:.2f} s (target at most {HELP_TARGET})")
    if args.json:
        print(json.dumps(told))


if __name__ == "__main__":
    main()

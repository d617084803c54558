"""What a store saves in a sweep, and what it costs: 6 ratios x rounds 1, 2, 3 on the lab, store=local and store=none.

    python benchmarks/sweep.py                    # about 9 minutes on two cores
    python benchmarks/sweep.py --events 1         # a merge event after each epoch: fits of round 1 are not shared

Prints the stages executed beside the closed form below, the ratio of the two wall times, and the share of a cold run's
wall time that the store itself took. Exit status 1 unless the counts agree and all results have the same bytes.

Stages that a sweep of R ratios (m of them other than 1) over 1, ..., T rounds executes, one seed, last event only:

    sample, verify, fit, update   1 + (T - 1) R   round 1 samples from the base and fits the same examples whatever the
                                                  ratio
    merge                         m T             at ratio 1 the merged model is the tuned one
    evaluate, held_out, probe     1 + R T         the base, and each merged model once
    analyze                       R T
    importance                    1               of the base, on its solutions of round 1

which is 143 for R = 6, m = 5, T = 3; apart, the 18 jobs execute 390.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kill_and_resume import digests

RATIOS = (0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
T = 3


def closed_form(events: str) -> dict[str, int]:
    """Executed stages of the whole sweep, by name."""
    r, m = len(RATIOS), sum(ratio != 1 for ratio in RATIOS)
    once = 1 + (T - 1) * r
    fit = once if events == "last" else T * r
    return {
        "sample": once, "verify": once, "fit": fit, "update": fit, "merge": m * T, "evaluate": 1 + r * T,
        "held_out": 1 + r * T, "probe": 1 + r * T, "analyze": r * T, "importance": 1,
    }  # fmt: skip


def sweep(folder: Path, *words: str) -> tuple[float, Counter[str]]:
    """Wall seconds and executed stages of the sweep."""
    ratios, rounds = ",".join(map(str, RATIOS)), ",".join(str(t + 1) for t in range(T))
    command = [
        sys.executable, "-m", "itermerge", "--multirun", f"merge.ratio={ratios}", f"rounds={rounds}",
        "suite.pre_merge=false", f"hydra.sweep.dir={folder}", *words,
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    computed: Counter[str] = Counter()
    for job in range(len(RATIOS) * T):
        computed.update(json.loads((folder / str(job) / "summary.json").read_text())["stages"]["computed"])
    return seconds, computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", choices=("last", "1"), default="last", help="merge.every_n_epochs")
    parser.add_argument("overrides", nargs="*", help="further overrides of both sweeps")
    args = parser.parse_args()
    events = f"merge.every_n_epochs={args.events}"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shared, executed = sweep(work / "shared", events, f"store.dir={work / 'store'}", *args.overrides)
        expected = closed_form(args.events)
        print(f"store=local: {shared:.1f} s, stages executed {sum(executed.values())}: {dict(executed)}")
        print(f"closed form: {sum(expected.values())}: {expected}", flush=True)
        apart, alone = sweep(work / "apart", events, "store=none", *args.overrides)
        print(f"store=none:  {apart:.1f} s, stages executed {sum(alone.values())}")
        one, other = digests(work / "shared"), digests(work / "apart")
        same = one == other
        print(f"{len(one)} files of 18 jobs: {'same bytes' if same else 'DIFFERENT'}")
        print(f"wall time shared / apart: {shared / apart:.2f}")
        single = work / "single"
        command = [
            sys.executable, "-m", "itermerge", events, f"hydra.run.dir={single}", f"store.dir={work / 'cold'}",
            *args.overrides,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        timing = json.loads((single / "timing.json").read_text())
        cost, seconds = timing["store_seconds"], timing["seconds"]
        print(
            f"a cold run of {T} rounds: {seconds:.1f} s, of which the store {cost:.2f} s, {100 * cost / seconds:.1f}%"
        )
    sys.exit(not same or dict(executed) != expected)


if __name__ == "__main__":
    main()

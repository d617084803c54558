"""How many runs, killed (kill -9) at a random moment and started again, end with the bytes of an undisturbed run.

    python benchmarks/kill_and_resume.py --trials 20

Three of four trials use a store of their own, every fourth `store=none`. Compared are the final weights, all models,
samples, scores, layer changes and figures. Exit status 1 unless all agree.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = (
    "rounds=2", "suite.n=30", "task.n_train=60", "sampler.n=4", "suite.pass_k_n=8", "task.n_validation=20",
)  # fmt: skip
COMPARED = {
    "samples.jsonl", "examples.jsonl", "scores.json", "layers.json", "rounds.jsonl", "round.json", "model.safetensors",
}  # fmt: skip


def digests(run: Path) -> dict[str, str]:
    """sha256 of each compared file of a run folder."""
    files = (f for f in sorted(run.rglob("*")) if f.name in COMPARED and "stages" not in f.parts)
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)

        def command(run: str, store: str) -> list[str]:
            return [sys.executable, "-m", "itermerge", *SMALL, f"hydra.run.dir={work / run}", store]

        began = time.perf_counter()
        subprocess.run(command("reference", f"store.dir={work / 'store'}"), check=True, capture_output=True)
        seconds = time.perf_counter() - began
        reference = digests(work / "reference")
        print(f"undisturbed: {seconds:.1f} s, {len(reference)} files compared", flush=True)
        same = killed = 0
        for trial in range(args.trials):
            store = "store=none" if trial % 4 == 3 else f"store.dir={work / f'store{trial}'}"
            at, run = moments.uniform(0.3, seconds), f"run{trial}"
            process = subprocess.Popen(command(run, store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(at)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
            if not (work / run / "DONE").exists():
                subprocess.run(command(run, store), check=True, capture_output=True)
            agrees = digests(work / run) == reference
            same += agrees
            said = "same bytes" if agrees else "DIFFERENT"
            print(f"trial {trial}: {store.partition('=')[0]}, after {at:.1f} s: {said}", flush=True)
            shutil.rmtree(work / run)
    print(f"{same} of {args.trials} the same, {killed} killed")
    sys.exit(same != args.trials)


if __name__ == "__main__":
    main()

"""Sweeps of 6 jobs over 2 workers, killed (kill -9) at random moments and resumed until they are complete.

    python benchmarks/kill_sweep.py --kills 50        # about 15 minutes on two cores

Kills come up to 5 s after work has begun, every fourth at any time from the start of the process. Each hits the whole
process group, the parent alone (its workers live on for a while, and the resumed sweep meets them), or one worker. When
a sweep is complete and kills are left, another begins with an empty store. Every complete sweep must have the bytes of
an undisturbed one; `made` in the jobs' run.log shows how often a stage was computed to its end: never twice, so never
more often than 1 + the times it was killed while running. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kill_and_resume import digests

JOBS = 6
WORDS = (
    "--multirun", "suite.n=60", "task.n_train=120", "suite.pass_k_n=32", "task.n_validation=60", "rounds=2,4",
    "merge.ratio=0.3,0.5,1.0", "merge.every_n_epochs=last", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
)  # fmt: skip


def children(parent: int) -> list[int]:
    """Processes that `parent` started, theirs included."""
    of: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        of.setdefault(int(words[1]), []).append(int(stat.parent.name))
    found, todo = [], [parent]
    while todo:
        new = of.get(todo.pop(), [])
        found += new
        todo += new
    return found


def workers(parent: int) -> list[int]:
    """The processes of joblib that run jobs."""
    found = []
    for pid in children(parent):
        try:
            if b"popen_loky_posix" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def kill(process: subprocess.Popen[bytes], how: str, draw: random.Random) -> str:
    """Kills as asked, as far as there is something to kill; what was killed."""
    if how == "worker":
        if found := workers(process.pid):
            try:
                os.kill(draw.choice(found), signal.SIGKILL)
            except ProcessLookupError:
                return "nothing"
            process.wait()  # it notices, says how to go on, and ends
            return "worker"
        how = "group"
    if how == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return how


def wait_for_work(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until a stage has been started by this process or its workers."""
    before = stages(folder)[0].total()
    while process.poll() is None and stages(folder)[0].total() == before:
        time.sleep(0.05)


def stages(folder: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each stage was started, and how often it was made, by the run.log of all jobs."""
    text = "".join(f.read_text() for f in sorted(folder.glob("*/run.log")))
    return (
        Counter(re.findall(r"started (\w+ [0-9a-f]{16})\n", text)),
        Counter(re.findall(r"made (\w+ [0-9a-f]{16}) in", text)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, fine, kills, sweeps = random.Random(args.seed), True, Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)

        def start(folder: Path, resume: bool) -> subprocess.Popen[bytes]:
            new = (*WORDS, f"hydra.sweep.dir={folder}", f"store.dir={folder}-store")
            words = (f"sweep.resume={folder}",) if resume else new
            command = [sys.executable, "-m", "itermerge", *words]
            with (work / "log").open("ab") as log:
                return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

        began = time.perf_counter()
        assert start(work / "undisturbed", resume=False).wait() == 0
        seconds = time.perf_counter() - began
        reference = digests(work / "undisturbed")
        print(f"undisturbed: {seconds:.1f} s, {len(reference)} files compared", flush=True)
        while kills.total() < args.kills:
            folder, sweeps, here = work / f"sweep{sweeps}", sweeps + 1, 0
            while True:
                process = start(folder, resume=(folder / "sweep.json").is_file())
                left = kills.total() < args.kills
                at = draw.uniform(0, 5)
                if draw.random() < 0.25:
                    at = draw.uniform(1, 0.5 * seconds)
                elif left:
                    wait_for_work(process, folder)
                try:
                    process.wait(at if left else None)
                except subprocess.TimeoutExpired:
                    hit = kill(process, draw.choice(["group", "group", "parent", "worker"]), draw)
                    kills[hit] += hit != "nothing"
                    here += hit != "nothing"
                    print(f"sweep {sweeps}: {hit} killed after {at:.1f} s", flush=True)
                    continue
                if process.returncode == 0:
                    break
                print(f"sweep {sweeps}: ended with {process.returncode}", flush=True)
                if not left:
                    print((work / "log").read_text()[-3000:])
                    sys.exit(1)
            same = digests(folder) == reference
            done = sum((folder / str(i) / "DONE").is_file() for i in range(JOBS))
            started, made = stages(folder)
            twice = {key: n for key, n in made.items() if n > 1}
            lost = started.total() - made.total()
            fine = fine and same and done == JOBS and not twice and lost <= 2 * here
            print(
                f"sweep {sweeps}: {done} of {JOBS} jobs done, {'same bytes' if same else 'DIFFERENT'}; {here} kills; "
                f"{len(started)} stages, {lost} killed while running, {len(twice)} computed twice {twice or ''}",
                flush=True,
            )  # fmt: skip
    print(f"{kills.total()} kills {dict(kills)} in {sweeps} sweeps: {'all fine' if fine else 'NOT FINE'}")
    sys.exit(not fine)


if __name__ == "__main__":
    main()

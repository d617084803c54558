"""A sweep's folder: its jobs and their marks, going on in it, and which job gets which GPU. No Hydra, no torch.

multirun/DATE/TIME/sweep.json      the command and the overrides of each job, written before the first one
multirun/DATE/TIME/N/              job N: DONE, FAILED or INTERRUPTED when it has ended; none of them while it runs,
                                   and after a kill
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from .config import ConfigError
from .store import lock_file

log = logging.getLogger(__name__)
FILE = "sweep.json"
MARKS = ("DONE", "FAILED", "INTERRUPTED", "REPLACED")  # REPLACED: a failed trial, whose values another job has tried
BEFORE = "FAILED.before"  # the traceback of a job that is tried again
RESUME = "sweep.resume="
AROUND = ("store=", "store.", "logger=", "logger.", "paths.", "sweep.", "launch=")  # says how to run, not what


class SweepError(ValueError):
    """A sweep folder that cannot be used as asked."""


def resumed(arguments: Sequence[str]) -> list[str]:
    """A command line with `sweep.resume=DIR` as the command that goes on in DIR: the sweep's own command, read from
    DIR/sweep.json, with the new arguments replacing those of the same key. Others come back as they are."""
    given = [a for a in arguments if a.startswith(RESUME)]
    if not given or given[-1].removeprefix(RESUME) in ("", "null"):
        return list(arguments)
    folder = Path(given[-1].removeprefix(RESUME).strip("'\"")).expanduser()
    if not (folder / FILE).is_file():
        raise SweepError(f"sweep.resume: {folder} is no sweep's folder; there is no {FILE} in it")
    new = [a for a in arguments if not a.startswith((RESUME, "hydra.sweep.dir=")) and a not in ("-m", "--multirun")]
    whole = any("=" in a and not a.lstrip("+~").startswith(("-", "hydra", *AROUND)) for a in new)
    old = [] if whole else read(folder)["command"]
    keys = {a.partition("=")[0] for a in new if "=" in a} | {"hydra.sweep.dir", "sweep.resume"}
    if keys & {"hydra/launcher", "launch"}:
        keys |= {a.partition("=")[0] for a in old if a.startswith(("hydra.launcher.", "hydra/launcher=", "launch="))}
    groups = tuple(f"{key}." for key in keys & {"store", "logger"})  # another member of a group has other keys
    old = [a for a in old if a.partition("=")[0] not in keys and not a.startswith(groups or "\0")]
    old = [a for a in old if a not in ("-m", "--multirun")]
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    flags, overrides = _flags_first([*old, *new])
    return ["--multirun", *flags, *overrides, f"sweep.resume='{quoted}'", f"hydra.sweep.dir='{quoted}'"]


_VALUED = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p")


def _flags_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and overrides: argparse wants the overrides in one piece."""
    flags: list[str] = []
    overrides: list[str] = []
    for i, argument in enumerate(arguments):
        is_value = i > 0 and arguments[i - 1] in _VALUED
        (flags if argument.startswith("-") or is_value else overrides).append(argument)
    return flags, overrides


def begin(folder: Path, jobs: Sequence[Sequence[str]] | None, command: Sequence[str], resume: bool) -> None:
    """Takes a new folder for these jobs, or one that holds the same jobs if it is to be resumed (None: whichever it
    holds). Raises SweepError."""
    mine = [own(job) for job in jobs or []]
    if resume:
        theirs = [own(job) for job in read(folder)["jobs"]]
        if jobs is not None and mine != theirs:
            pairs = zip(mine, theirs, strict=False)
            at = next((i for i, (m, t) in enumerate(pairs) if m != t), min(len(mine), len(theirs)))
            said = [" ".join(js[at]) if at < len(js) else "no such job" for js in (theirs, mine)]
            raise SweepError(
                f"sweep.resume: {folder} holds another sweep: its job {at} is {said[0]!r}, here it is {said[1]!r}. "
                f"Give sweep.resume={folder} alone, or leave it out for a new sweep"
            )
        return
    if folder.is_dir() and ((folder / FILE).exists() or any(d.name.isdigit() for d in folder.iterdir())):
        raise SweepError(
            f"hydra.sweep.dir: {folder} holds a sweep already, which is not overwritten; sweep.resume={folder} goes on "
            "in it, another hydra.sweep.dir begins anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("x") as file:  # two that begin in the same second: one of them fails here
        json.dump({"command": list(command), "cwd": os.getcwd(), "jobs": mine}, file, indent=1)


def add_jobs(folder: Path, jobs: Mapping[int, Sequence[str]]) -> None:
    """Writes jobs that were thought of on the way (Optuna's trials, by number) into sweep.json."""
    content = read(folder)
    had: list[list[str]] = content["jobs"]
    content["jobs"] = [own(jobs[i]) if i in jobs else had[i] for i in range(max(len(had), *(i + 1 for i in jobs)))]
    partial = folder / f"{FILE}.tmp"
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, folder / FILE)


def read(folder: Path) -> dict[str, Any]:
    """sweep.json: the command, where it was given, and the jobs."""
    return json.loads((folder / FILE).read_text())


def own(job: Sequence[str]) -> list[str]:
    """A job's overrides that say what it computes."""
    return [o for o in job if not o.lstrip("+~").startswith(("hydra.", "hydra/", *AROUND))]


def mark_of(folder: Path) -> str | None:
    """The mark of a job that has ended; None for one that was killed, is running or has not begun."""
    return next((mark for mark in MARKS if (folder / mark).is_file()), None)


def why(traceback: Path) -> str:
    """The error at the end of a failed job's traceback: the first line of its message."""
    lines = traceback.read_text().strip().splitlines()
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(: |$)", line)]
    return (errors or lines or [""])[-1]


def retry(folder: Path) -> None:
    """Takes the mark from a job that is to be tried again; its traceback stays beside it."""
    if (folder / "FAILED").is_file():
        os.replace(folder / "FAILED", folder / BEFORE)


def failed_before(folder: Path) -> str | None:
    """The name of a job of this sweep folder that has failed."""
    jobs = sorted((d for d in folder.iterdir() if d.name.isdigit()), key=lambda d: int(d.name))
    return next((d.name for d in jobs if mark_of(d) == "FAILED"), None)


# --- GPUs of its own for each job ----------------------------------------------------------------------------------

_held: dict[str, Any] = {}  # the locks of the GPUs that this process has taken; CUDA lets a process choose once


def take_gpu(wanted: Any, n: int = 1, poll: float = 1.0) -> str | None:
    """Takes `n` of the GPUs for this process alone and makes them the only visible ones; waits while too few are free.

    Must come before torch touches CUDA. `wanted` is `sweep.gpus`: None, "all", or a list of numbers. A process keeps
    its GPUs until it ends, whichever way. Raises ConfigError when there are not so many.
    """
    if wanted is None:
        return None
    if _held:
        if len(_held) < n:
            raise ConfigError(
                f"trainer.devices: {n}, and this worker of the sweep has taken {len(_held)} GPUs for the jobs before; "
                "sweep over trainer.devices in sweeps of their own"
            )
        return os.environ["CUDA_VISIBLE_DEVICES"]
    choice = gpus(wanted)
    if n > len(choice):
        raise ConfigError(f"trainer.devices: {n} for each job, and sweep.gpus has {len(choice)}; use fewer")
    home = Path(tempfile.gettempdir()) / f"itermerge-gpus-{os.getuid()}"
    home.mkdir(exist_ok=True)
    for attempt in range(10**9):
        with lock_file(home / "choice.lock"):  # or two jobs might each hold what the other lacks
            _held.update(_take(home, choice, n))
        if _held:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_held)
            return os.environ["CUDA_VISIBLE_DEVICES"]
        if attempt == 0:
            log.info("of GPUs %s too many are taken by other jobs; waiting for %d", ", ".join(choice), n)
        time.sleep(poll)
    return None


def _take(home: Path, choice: Sequence[str], n: int) -> dict[str, Any]:
    """The locks of the first `n` GPUs that are free; of none, where there are fewer."""
    held: dict[str, Any] = {}
    for gpu in choice:
        lock = lock_file(home / f"{gpu}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        held[gpu] = lock
        if len(held) == n:
            return held
    for lock in held.values():
        lock.release()
    return {}


def gpus(wanted: Any) -> list[str]:
    """The GPUs that `sweep.gpus` means. Raises ConfigError when there are none."""
    if not (found := found_gpus(wanted)):
        raise ConfigError(
            "sweep.gpus: nvidia-smi lists no GPU; without one, hydra/launcher=joblib runs jobs side by side"
        )
    return found


def found_gpus(wanted: Any) -> list[str]:
    return _all_gpus() if wanted == "all" else [str(g) for g in wanted or []]


def _all_gpus() -> list[str]:
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [g.strip() for g in visible.split(",") if g.strip()]
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, _ in enumerate(line for line in said.splitlines() if line.startswith("GPU "))]

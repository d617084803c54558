r"""Whether two answers in LaTeX are equal, by math-verify, in processes of their own with a hard time limit.

math-verify's own limits are signals: they do nothing in threads, and sympy swallows them or sits in one long operation.
So each comparison runs in a worker that is killed when it needs more than its seconds of CPU time (which do not depend
on what else the machine does), and is replaced. Workers are plain subprocesses that read and write JSON lines: no
fork of a process that holds CUDA, no second import of the caller's main module, nothing unpickled.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

from . import Reason, TaskError

LIMIT_S = 1.0  # CPU seconds of one comparison; those of MATH take some milliseconds
PATIENCE = 30  # times as many seconds by the clock, for a worker that sleeps or starves
WORKERS = min(4, os.cpu_count() or 1)
_WORKER = Path(__file__).with_name("latex_worker.py")


def require() -> None:
    """Raises TaskError where math-verify is not installed, or does not work in a process of its own: one is started,
    once in this process, and finds \\frac{1}{2} equal to 0.5."""
    if find_spec("math_verify") is None:
        raise TaskError("verifier math: answers in LaTeX need the extra 'math': pip install 'itermerge[math]'")
    if not _Worker.works:
        with _pool() as workers:
            workers.get().start(LIMIT_S)


def compare(pairs: Sequence[tuple[str, str]], limit_s: float = LIMIT_S) -> list[Reason]:
    """For each (gold, answer): correct, wrong, unparseable (math-verify reads nothing in the answer), timed_out, or
    error (the worker died, as without memory). Raises TaskError where math-verify is not installed."""
    if not pairs:
        return []
    require()
    with _pool() as workers, ThreadPoolExecutor(min(WORKERS, len(pairs))) as threads:

        def one(pair: tuple[str, str]) -> Reason:
            worker = workers.get()
            try:
                return worker.compare(*pair, limit_s)
            finally:
                workers.put(worker)

        return list(threads.map(one, pairs))


class _Worker:
    """One subprocess, started when it is needed."""

    works = False  # whether one has ever started

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def start(self, limit_s: float) -> subprocess.Popen[str]:
        """The process, running and warm. Raises TaskError where it says something else."""
        if self.process is not None and self.process.poll() is None:
            return self.process
        # -P: the folder of the script, which has modules with common names, is not searched
        command = [sys.executable, "-P", str(_WORKER)]
        process = self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            encoding="utf-8",
        )  # fmt: skip
        patience = 60 + PATIENCE * limit_s
        said, late = self._read(patience)
        if said != "ready":
            self.stop()
            why = f"nothing within {patience:.0f} s" if late else said or f"exit status {process.returncode}"
            raise TaskError(
                f"verifier math: the process that compares answers in LaTeX does not work ({why}); to see it fail: "
                f"{' '.join(command)}. Install what it needs: pip install 'itermerge[math]'"
            )
        _Worker.works = True
        return process

    def compare(self, gold: str, answer: str, limit_s: float) -> Reason:
        try:
            process = self.start(limit_s)
        except TaskError:
            if not _Worker.works:
                raise
            return "error"  # others did: there is no memory left, perhaps
        assert process.stdin
        try:
            process.stdin.write(json.dumps([gold, answer, limit_s]) + "\n")
            process.stdin.flush()
        except OSError:  # it died before
            self.stop()
            return "error"
        said, late = self._read(PATIENCE * limit_s)
        if said in ("correct", "wrong", "unparseable", "error"):
            return said
        process.wait()
        self.stop()
        return "timed_out" if late or process.returncode == -getattr(signal, "SIGPROF", 0) else "error"

    def _read(self, seconds: float) -> tuple[str, bool]:
        """A line, empty when the process ended; and whether it was killed for it."""
        process = self.process
        assert process
        assert process.stdout
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            return process.stdout.readline().strip(), late.is_set()
        finally:
            timer.cancel()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()
            self.process = None


_lock = threading.Lock()
_workers: list[_Worker] = []


@contextlib.contextmanager
def _pool() -> Iterator[SimpleQueue[_Worker]]:
    """The workers, which stay for the next call (they take a second to start) and end with this process."""
    with _lock:
        if not _workers:
            _workers.extend(_Worker() for _ in range(WORKERS))
            atexit.register(stop)
        queue: SimpleQueue[_Worker] = SimpleQueue()
        for worker in _workers:
            queue.put(worker)
        yield queue


def stop() -> None:
    """Ends the workers."""
    for worker in _workers:
        worker.stop()

"""Commands in processes that need not import everything anew: one that has done so forks for each of them.

    python nursery.py      reads lines of JSON, {"code", "words", "cwd", "env", "out", "err", "reports"}, and writes for
                           each a line when it has begun, its pid, and one when it has ended, its exit status (-9 where
                           signal 9 ended it); without "reports" a run draws none

What a command changes, it changes in its own process. No thread of torch has begun where it is forked from.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import tempfile
import traceback
from importlib import import_module
from typing import Any


def child(asked: dict[str, Any]) -> int:
    """Runs `code` with these words, in a process that is its own; its exit status."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    tempfile.tempdir = None
    sys.argv = ["itermerge", *asked["words"]]
    if not asked["reports"]:
        import_module("itermerge.report").run = lambda folder: []
    try:
        exec(compile(asked["code"], "command", "exec"), {"__name__": "__main__"})  # a line of a test's own
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


IMPORTED = ("cli", "loop", "plan", "analyze", "evaluate", "export", "checkpoints", "report.charts", "tasks.gym")


def main() -> None:
    gc.disable()
    for name in IMPORTED:
        import_module(f"itermerge.{name}")
    gc.freeze()  # a child's collector would look at all of it, and so copy it
    gc.enable()
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            status = child(asked)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

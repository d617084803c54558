"""Processes that need not import everything anew: one that has done so forks for each of them.

`tests/python` is an interpreter for tests, started like any other: `python [-Pu] (-c code | -m module | script) words`.
It asks the session's nursery (`conftest.pytest_configure`) for a process with its arguments, environment, folder and
standard streams, hands on signals, and ends as that one ends; where it is killed, so is that one. Environments that
Python reads when it starts (a hash seed) get a Python of their own.

What a process changes, it changes in itself; no thread of torch has begun where it is forked from. Sets of modules that
must not be imported are for the real interpreter to show.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

IMPORTED = (
    "cli", "loop", "plan", "analyze", "evaluate", "export", "checkpoints", "devices", "report.charts", "tasks.gym",
)  # fmt: skip
ITS_OWN = ("PYTHONHASHSEED",)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


# --- the side of tests/python ----------------------------------------------------------------------------------------


def ask(words: list[str]) -> None:
    """Ends as the process that is asked for ends."""
    real = os.environ["NURSERY_PYTHON"]
    if any(name in os.environ for name in ITS_OWN):
        os.execv(real, [real, *words])
    with socket.socket(socket.AF_UNIX) as nursery:
        nursery.connect(os.environ["NURSERY"])
        asked = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
        socket.send_fds(nursery, [len(asked).to_bytes(8, "big")], [0, 1, 2])
        nursery.sendall(asked)
        for stream in (0, 1, 2):
            os.close(stream)
        answers = nursery.makefile()
        pid = int(answers.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(answers.readline())
    end(status)


def end(status: int) -> None:
    """-9: by signal 9."""
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# --- the nursery ------------------------------------------------------------------------------------------------------


def run(words: list[str]) -> None:
    """What Python does with these arguments."""
    import runpy
    import types

    flags = ""
    while words[0].startswith("-") and words[0] not in ("-c", "-m"):
        flags += words.pop(0)[1:]
    if set(flags) - set("Pu"):
        sys.exit(f"tests/python does not know -{flags}")
    if "u" in flags:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[attr-defined]
    sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    how, rest = (words[0], words[1:]) if words[0] in ("-c", "-m") else ("", words)
    first = "" if how else os.path.dirname(os.path.abspath(rest[0]))
    if "P" not in flags:
        sys.path.insert(0, first)
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)  # a line of a test's own
    elif how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        runpy.run_path(rest[0], run_name="__main__")


def child(asked: dict[str, Any], streams: list[int]) -> int:
    """Becomes the process that was asked for; its exit status."""
    import tempfile
    import traceback

    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    tempfile.tempdir = None
    sys.executable = os.path.join(os.path.dirname(os.path.abspath(__file__)), "python")
    try:
        run(asked["words"])
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def begin(asked: dict[str, Any], streams: list[int], others: list[socket.socket]) -> int:
    """Forks; the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    import atexit
    import threading

    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for connection in others:
            connection.close()
        status = child(asked, streams)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        end(status)


def receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """What was asked for, and its streams; None where who asked was killed meanwhile."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    text = b""
    while len(text) < int.from_bytes(size, "big"):
        more = connection.recv(1 << 16)
        if not more:
            return None, streams
        text += more
    return json.loads(text) if size else None, streams


def serve(listener: socket.socket) -> None:
    """Until standard input ends."""
    import selectors
    from contextlib import suppress

    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as waiting:
        for source in (0, listener, ours):
            waiting.register(source, selectors.EVENT_READ)
        imported = False
        while True:
            for key, _ in waiting.select():
                if key.fileobj == 0:
                    for pid in running:
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj is listener:
                    if not imported:
                        import_everything()
                        signal.set_wakeup_fd(theirs.fileno())
                        signal.signal(signal.SIGCHLD, lambda *_: None)
                        imported = True
                    connection = listener.accept()[0]
                    asked, streams = receive(connection)
                    pid = begin(asked, streams, [listener, ours, theirs, connection, *running.values()]) if asked else 0
                    for stream in streams:
                        os.close(stream)
                    if not pid:
                        connection.close()
                        continue
                    running[pid] = connection
                    waiting.register(connection, selectors.EVENT_READ, pid)
                    with suppress(OSError):  # killed meanwhile: it is to be read, and ends
                        connection.sendall(f"{pid}\n".encode())
                elif key.fileobj is ours:
                    ours.recv(1 << 12)
                    for pid, status in ended(list(running)):
                        connection = running.pop(pid)
                        with suppress(KeyError, OSError):  # nobody listens any more
                            waiting.unregister(connection)
                            connection.sendall(f"{status}\n".encode())
                        connection.close()
                elif key.data in running:  # the one that asked was killed
                    waiting.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)


def ended(pids: list[int]) -> list[tuple[int, int]]:
    """(pid, exit status) of those that have, -9 where signal 9 ended one."""
    found = [os.waitpid(pid, os.WNOHANG) for pid in pids]
    return [(pid, os.waitstatus_to_exitcode(status)) for pid, status in found if pid]


def import_everything() -> None:
    import gc
    from importlib import import_module

    gc.disable()
    for name in IMPORTED:
        import_module(f"itermerge.{name}")
    gc.freeze()  # a child's collector would look at all of it, and so copy it
    gc.enable()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        with socket.socket(fileno=int(sys.argv[2])) as listening:
            serve(listening)
    else:
        ask(sys.argv[1:])

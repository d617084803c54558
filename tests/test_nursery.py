"""tests/python is an interpreter like any other, but for its start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import PYTHON

PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
LOOK = """
import os, sys
print(sys.argv, os.getcwd(), os.environ["WORD"], sys.stdin.read(), __name__, "itermerge.loop" in sys.modules)
print("said", file=sys.stderr)
"""


@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_arguments_environment_folder_and_streams_are_those_asked_for(how: str, tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    words = {"-c": ["-c", LOOK], "-m": ["-m", "look"], "script": [str(tmp_path / "look.py")]}[how]
    seen = []
    for python in (PYTHON, sys.executable):
        asked: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"WORD": "x y"}, "input": "given"}
        done = subprocess.run([python, *words, "a", "b c"], capture_output=True, text=True, check=True, **asked)
        seen.append((done.stdout, done.stderr))
    assert seen[0] == (seen[1][0].replace("False", "True"), seen[1][1])


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0), ("raise SystemExit(7)", 7), ("raise SystemExit('no')", 1), ("1 / 0", 1),
        ("import os; os._exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9), ("raise KeyboardInterrupt", -2),
    ],
)  # fmt: skip
def test_it_ends_as_an_interpreter_does(code: str, status: int) -> None:
    done = [subprocess.run([python, "-c", code], capture_output=True, text=True) for python in (PYTHON, sys.executable)]
    assert [one.returncode for one in done] == [status, status]
    last = [one.stderr.splitlines()[-1:] for one in done]
    assert last[0] == last[1]


def test_signals_are_handed_on_and_a_kill_kills() -> None:
    code = "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))\n"
    code += "print(os.getpid(), flush=True)\nwhile True: time.sleep(60)"
    started = subprocess.Popen([PYTHON, "-c", code], **PIPES)
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    started.send_signal(signal.SIGTERM)
    assert started.stdout.readline() == "told\n"
    started.kill()
    assert started.communicate()[0] == ""  # nobody holds the pipe any more
    assert started.returncode == -9
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the process outlived the one that was started")


@pytest.mark.parametrize("sent", [b"", (100).to_bytes(8, "big") + b"half"])
def test_who_dies_while_asking_takes_nobody_along(sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(os.environ["NURSERY"])
        asking.sendall(sent)
    done = subprocess.run([PYTHON, "-c", "print(7)"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "7\n"


def test_a_hash_seed_gets_a_python_of_its_own() -> None:
    code = "import sys; print(hash('a'), 'itermerge' in sys.modules)"
    env = os.environ | {"PYTHONHASHSEED": "5"}
    said = {
        subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        for python in (PYTHON, sys.executable)
    }
    assert len(said) == 1
    assert said.pop().endswith("False\n")

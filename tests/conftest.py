"""Fixtures of the whole suite: a tiny random model, the lab's models, one run in this process, commands in others.

Nothing here touches the user's own cache: ITERMERGE_HOME is a folder of the test session.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", WANDB_MODE="offline")

gc.disable()  # what is imported up to the tests stays: the collector would look at it for seconds
import torch  # noqa: E402

from itermerge.policy import Policy  # noqa: E402

torch.set_num_threads(1)

# A shell starts what it puts into the background with Ctrl-C ignored, and a test of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine, or a property found wanting by one draw in a thousand fails somebody else's build.
# To look for new ones: HYPOTHESIS_PROFILE=explore pytest ...; what it finds becomes an @example.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A base of the lab with half as many layers, which runs of the tests start from. Its recipe.json says how it was made:
# `itermerge experiment=pretrain_lab model.seed=9` with program.layers=4 and what else differs there.
LAB_SMALL = Path(__file__).parent / "fixtures" / "lab-seed9"

# Small enough for a second or two, on a task that this base solves often, whatever its training.
LABS = ("model.seed=9", "task.family=find")  # keys that another model=... or task=... does not have
SMALL = (
    *LABS, "rounds=2", "task.n_train=16", "task.n_validation=8", "suite.n=8", "suite.pass_k_n=4",
    "suite.near=[{kind: lab, family: chain}]", "suite.far=[{kind: lab, family: sort}]", "sampler.n=4",
    "sampler.max_new_tokens=32",
)  # fmt: skip


# Minutes each. A file is one worker's, so that these come first: else one of them is left for the end, alone.
LONG = ("test_loop", "test_vllm", "test_sweep", "test_devices", "test_plan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    gc.freeze()  # nor need it in each test
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITERMERGE_HOME", str(make_home(tmp_path_factory.getbasetemp() / "home")))
        yield


def make_home(folder: Path) -> Path:
    """A home with the model of `SMALL` in it."""
    shutil.copytree(LAB_SMALL, folder / "models" / LAB_SMALL.name, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: 2 layers of width 16, random weights, one token a character."""
    from itermerge import pretrain

    folder = tmp_path_factory.mktemp("tiny")
    words = pretrain.tokenizer()
    pretrain.model(width=16, layers=2, heads=2, kv_heads=1, ffn=32, vocab=len(words), seed=0).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> Policy:
    return Policy(tiny_folder)


def enliven(policy: Policy) -> Policy:
    """`policy` with larger random matrices: texts vary, and its predictions are far from uniform."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in policy.weights().values():
            if w.dim() > 1:
                w.normal_(0, 0.7, generator=draw)
    return policy


@pytest.fixture(scope="session")
def lab() -> Policy:
    """The shipped base model; tests leave its weights as they are."""
    from itermerge.stages import LAB_SEED0

    return Policy(LAB_SEED0)


def compose_config(*overrides: str) -> Any:
    """What Hydra hands to a job for this command line; of `SMALL`, without the lab's keys where task=... or model=...
    is another."""
    from hydra import compose, initialize_config_dir

    from itermerge.config import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        others = {word for word in LABS if any(w.startswith(f"{word.partition('.')[0]}=") for w in overrides)}
        return compose("config", [word for word in overrides if word not in others])


def compose_analyze(*overrides: str) -> Any:
    """What Hydra hands to `itermerge-analyze` for this command line."""
    from hydra import compose, initialize_config_dir

    from itermerge.config import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("analyze", list(overrides))


def run_here(folder: Path, *overrides: str) -> dict[str, Any]:
    """One small run in this process, without Hydra's job around it; its summary."""
    from itermerge import cli, loop
    from itermerge.config import check

    cfg = check(compose_config(*SMALL, *overrides))
    folder.mkdir(parents=True, exist_ok=True)
    cli.claim(folder, cfg)
    summary = loop.run(cfg, folder, cli.make_tracker(cfg, folder))
    (folder / "DONE").write_text("")
    return summary


def itermerge(
    *words: str, cwd: Path, env: dict[str, str] | None = None, reports: bool = False
) -> subprocess.CompletedProcess[str]:
    """`itermerge` run to its end in another process; a run's report takes longer than a small run. With a launcher that
    starts processes it is one of its own: joblib's does not end in a process that was forked."""
    alone = any(word.startswith("hydra/launcher=") and word != "hydra/launcher=basic" for word in words)
    if alone or "PYTHONHASHSEED" in (env or {}):
        command = [sys.executable, "-m", "itermerge", *words]
        own = {"cwd": cwd, "env": os.environ | (env or {}), "capture_output": True, "text": True, "timeout": 600}
        return subprocess.run(command, check=False, **own)
    return in_a_process(MAIN, *words, cwd=cwd, env=env, reports=reports)


@cache
def _nursery() -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, str(Path(__file__).with_name("nursery.py"))], **pipes)
    atexit.register(started.communicate)  # which ends it
    return started


class Forked:
    """`code` in a process that is forked from one with all imports done: seconds less. One at a time."""

    def __init__(self, code: str, words: Sequence[str], cwd: Path, env: dict[str, str] | None, reports: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name) / name for name in ("out", "err"))
        asked = {"code": code, "words": words, "cwd": str(cwd), "env": os.environ | (env or {}), "reports": reports}
        nursery = _nursery()
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        self.told = nursery.stdout.fileno()
        nursery.stdin.write(json.dumps(asked | {"out": str(self.out), "err": str(self.err)}) + "\n")
        nursery.stdin.flush()
        self.pid, self.returncode = self._number(), cast("int | None", None)

    def _number(self) -> int:
        """The next line. What lies behind it stays in the pipe, where `select` sees it."""
        line = b""
        while not line.endswith(b"\n"):
            read = os.read(self.told, 1)
            assert read, "the nursery has ended"
            line += read
        return int(line)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.told], [], [], 0)[0]:
            self.returncode = self._number()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it wrote, when it has ended."""
        if self.returncode is None:
            assert select.select([self.told], [], [], timeout)[0], f"still running after {timeout} s"
            self.returncode = self._number()
        with self.folder:
            return self.out.read_text(), self.err.read_text()


MAIN = "from itermerge.cli import main; main()"


def forked(*words: str, cwd: Path) -> Forked:
    """`itermerge` started in such a process."""
    return Forked(MAIN, words, cwd, None, reports=False)


def in_a_process(
    code: str, *words: str, cwd: Path, env: dict[str, str] | None = None, reports: bool = True
) -> subprocess.CompletedProcess[str]:
    """`code` run to its end in such a process."""
    started = Forked(code, words, cwd, env, reports)
    out, err = started.communicate()
    assert started.returncode is not None
    return subprocess.CompletedProcess(words, started.returncode, out, err)


def deterministic_set(folder: Path) -> dict[str, bytes]:
    """The files of a run that the same config and environment give byte for byte."""
    names = ("rounds.jsonl", "samples.jsonl", "examples.jsonl", "scores.json", "layers.json", "round.json")
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and (f.name in names or f.parent.name == "model")
    }


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture
def write_variant(tiny_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A copy of the tiny model's folder with JSON files edited: {file: {key: value}}, None removes a key or a file."""
    import shutil

    def write(edits: dict[str, dict[str, Any] | None]) -> Path:
        folder = tmp_path / "variant"
        shutil.copytree(tiny_folder, folder)
        for name, changes in edits.items():
            if changes is None:
                (folder / name).unlink()
                continue
            content = {**json.loads((folder / name).read_text()), **changes}
            (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return folder

    return write

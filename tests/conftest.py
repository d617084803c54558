"""Fixtures of the whole suite: a tiny random model, the lab's models, one run in this process, commands in others.

Nothing here touches the user's own cache: ITERMERGE_HOME is a folder of the test session.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # pytest-xdist's controller reads this file and nothing else: it is spared these imports
    from itermerge.policy import Policy

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", WANDB_MODE="offline")

gc.disable()  # what is imported up to the tests stays: the collector would look at it for seconds

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


NURSERY = pytest.StashKey[tuple[subprocess.Popen[bytes], str]]()
PYTHON = str(Path(__file__).with_name("python"))  # an interpreter that has everything imported


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # one nursery for all workers
    folder = tempfile.mkdtemp()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/nursery")
        listener.listen(128)
        os.environ.update(NURSERY=f"{folder}/nursery", NURSERY_PYTHON=sys.executable)
        command = [sys.executable, str(Path(__file__).with_name("nursery.py")), "--serve", str(listener.fileno())]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    config.stash[NURSERY] = started, folder


def pytest_unconfigure(config: pytest.Config) -> None:
    if NURSERY in config.stash:
        started, folder = config.stash[NURSERY]
        started.communicate()  # which ends it
        shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def quick_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that a test starts, of vLLM or of a group of devices, begin with everything imported."""
    monkeypatch.setattr(sys, "executable", PYTHON)


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
    from itermerge.policy import Policy

    return Policy(tiny_folder)


def enliven(policy: Policy) -> Policy:
    """`policy` with larger random matrices: texts vary, and its predictions are far from uniform."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in policy.weights().values():
            if w.dim() > 1:
                w.normal_(0, 0.7, generator=draw)
    return policy


@pytest.fixture(scope="session")
def lab() -> Policy:
    """The shipped base model; tests leave its weights as they are."""
    from itermerge.policy import Policy
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


MAIN = "from itermerge.cli import main; main()"
NO_REPORTS = "from itermerge import report; report.run = lambda folder: []; "  # they take longer than a small run


def itermerge(
    *words: str, cwd: Path, env: dict[str, str] | None = None, reports: bool = False
) -> subprocess.CompletedProcess[str]:
    """`itermerge` run to its end in another process. With a launcher that starts processes and knows them by their
    numbers it is the real command."""
    if not {"hydra/launcher=joblib", "hydra/launcher=submitit_local"} & set(words):
        return in_a_process(("" if reports else NO_REPORTS) + MAIN, *words, cwd=cwd, env=env)
    command = [sys.executable, "-m", "itermerge", *words]
    own: dict[str, Any] = {"cwd": cwd, "env": os.environ | (env or {}), "capture_output": True, "text": True}
    return subprocess.run(command, check=False, timeout=600, **own)


def in_a_process(
    code: str, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`code` run to its end in a process that begins with everything imported."""
    command = [PYTHON, "-c", code, *words]
    own: dict[str, Any] = {"cwd": cwd, "env": os.environ | (env or {}), "capture_output": True, "text": True}
    return subprocess.run(command, check=False, timeout=600, **own)


def forked(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """`itermerge` started in such a process."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([PYTHON, "-c", NO_REPORTS + MAIN, *words], cwd=cwd, **pipes)


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

"""sampler=vllm through the real worker process, over a stand-in for vLLM (fake_vllm); benchmarks/vllm.py has the real
one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, compose_analyze, compose_config, deterministic_set, itermerge, read_rounds, run_here

from itermerge import plan, stages, vllm
from itermerge.config import ConfigError, check, check_analyze, conf_dir
from itermerge.decoding import complete
from itermerge.policy import Policy
from itermerge.stages import LAB, LAB_SEED0, SAMPLING_VLLM, Reader, engine_spec
from itermerge.vllm import SEEDS, Engine, EngineError, EngineSpec
from itermerge.weights import PolicyError

FAKE = Path(__file__).parent / "fake_vllm"
PROMPTS = [
    "add 34+18?", "sum 34+18-15+27?", "sort qhcae?", "count a abcabcabca?", "max 101,305,233?", "find 10+?=44?",
    "shift 2 abc?", "mod 34+18%7?",
]  # fmt: skip
HOW: dict[str, Any] = {"max_new_tokens": 24, "batch_size": 3}
VLLM = ("sampler=vllm", "sampler.dtype=float32")


def spec(**changes: Any) -> EngineSpec:
    sampler = check(compose_config("sampler=vllm", "sampler.dtype=float32", "sampler.batch_size=3")).sampler
    return dataclasses.replace(engine_spec(sampler, "cpu", 1), **{"timeout": 240, **changes})


Calls = Callable[..., list[dict[str, Any]]]


def placed(patch: pytest.MonkeyPatch, file: Path) -> Calls:
    """Puts the stand-in where the worker finds it; what it was asked to do so far, or one kind of that."""
    patch.setenv("PYTHONPATH", str(FAKE))
    patch.setenv("FAKE_VLLM_LOG", str(file))

    def read(do: str = "") -> list[dict[str, Any]]:
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if do in ("", call["do"])]

    return read


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_python: None) -> Calls:
    return placed(monkeypatch, tmp_path / "calls.jsonl")


@dataclasses.dataclass(frozen=True)
class Running:
    """An engine with the lab's weights, and how it is to misbehave from now on."""

    engine: Engine
    calls: Calls
    folder: Path

    def misbehave(self, how: str) -> None:
        (self.folder / "calls.jsonl.how").write_text(how)


@pytest.fixture(scope="module")
def one(lab: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """For all tests that need no other."""
    folder = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        found = placed(patch, folder / "calls.jsonl")
        engine = Engine(spec(), folder)
        engine.load(LAB_SEED0, lab)
    yield Running(engine, found, folder)
    engine.close()


@pytest.fixture
def running(one: Running) -> Iterator[Running]:
    yield one
    one.misbehave("")


@pytest.fixture
def start(calls: Any, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """An engine that is closed when the test ends."""
    made: list[Engine] = []

    def engine(**changes: Any) -> Engine:
        made.append(Engine(spec(**changes), tmp_path))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def gone(pid: int) -> bool:
    for _ in range(300):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":  # dead, and nobody has asked how
            return True
        time.sleep(0.1)
    return False


# --- completions ------------------------------------------------------------------------------------------------------


def test_greedy_completions_are_decodings(running: Running, lab: Policy) -> None:
    engine, ticks = running.engine, list[int]()
    for stop in ((), ("4", "q"), ("\n",)):
        ours = complete(lab, PROMPTS, keys=None, stop=stop, **HOW)
        assert engine.complete(PROMPTS, keys=None, stop=stop, on_progress=ticks.append, **HOW) == ours
        assert len({c.tokens for c in ours}) > 1
        assert sum(ticks) == len(PROMPTS)
        ticks.clear()
    assert engine.complete([], keys=None, **HOW) == []
    (started,) = running.calls("start")
    assert started["options"] == {
        "dtype": "float32", "max_num_seqs": 3, "max_model_len": -1, "seed": 0, "gpu_memory_utilization": 0.5,
        "enforce_eager": False, "enable_sleep_mode": False, "enable_prefix_caching": True,
        "load_format": "safetensors", "generation_config": "vllm", "trust_remote_code": False, "block_size": 32,
    }  # fmt: skip


def test_a_sample_belongs_to_its_key(running: Running) -> None:
    engine = running.engine
    keys = [7, 1 << 63, SEEDS + 7, (1 << 64) - 1, 11, 12, 13, 14]
    made = engine.complete(PROMPTS, keys=keys, temperature=1.5, **HOW)
    assert running.calls("generate")[-1]["seeds"] == [7, 0, 7, SEEDS - 1, 11, 12, 13, 14]
    assert all(math.isnan(c.entropy) for c in made)
    again = engine.complete(PROMPTS[::-1], keys=keys[::-1], temperature=1.5, **HOW)
    assert again[::-1] == made
    others = engine.complete(PROMPTS, keys=range(100, 108), temperature=1.5, **HOW)
    assert sum(a != b for a, b in zip(made, others, strict=True)) > 3


@pytest.mark.parametrize("how", ["early", "late"])
def test_what_vllm_takes_for_the_end_is_read_here(how: str, running: Running, lab: Policy) -> None:
    """`early`: it stops after three tokens that hold no stop string; `late`: it sees none."""
    before = len(running.calls("generate"))
    running.misbehave(how)
    ours = complete(lab, PROMPTS, keys=None, stop=("4", "q"), **HOW)
    assert running.engine.complete(PROMPTS, keys=None, stop=("4", "q"), **HOW) == ours
    asked = [(call["n"], call["stop"]) for call in running.calls("generate")[before:]]
    longer = sum(c.tokens > 3 for c in ours)
    assert longer > 0
    assert asked == ([(8, ["4", "q"]), (longer, [])] if how == "early" else [(8, ["4", "q"])])


def test_weights_go_to_the_engine_that_runs(start: Any, lab: Policy, tiny_folder: Path, calls: Any) -> None:
    engine, other = start(), Policy(LAB / "seed1")
    for policy in (lab, other, lab):
        engine.load(policy.folder, policy)
        assert engine.complete(PROMPTS, keys=None, **HOW) == complete(policy, PROMPTS, keys=None, **HOW)
    assert [call["do"] for call in calls() if call["do"] != "generate"] == ["start", "load", "load"]
    tiny = Reader(tiny_folder)  # another shape
    engine.load(tiny_folder, tiny)
    ours = complete(Policy(tiny_folder), PROMPTS, keys=None, **HOW)
    assert engine.complete(PROMPTS, keys=None, **HOW) == ours
    first, second = calls("start")
    assert first["pid"] != second["pid"]
    assert gone(first["pid"])


@pytest.mark.parametrize(
    ("between", "device", "pauses"), [("auto", "cuda", "sleep"), ("stop", "cpu", "stop"), ("auto", "cpu", "keep")]
)
def test_between_the_engine_gives_its_memory_back(
    between: str, device: str, pauses: str, start: Any, lab: Policy, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_DEVICE", device)
    engine = start(device=device, between=between)
    engine.pause()  # nothing runs yet
    engine.load(LAB_SEED0, lab, "base")
    ours = engine.complete(PROMPTS, keys=None, **HOW)
    for _ in range(2):
        engine.pause()
    assert engine.loaded == ("base" if pauses == "keep" else "")
    if pauses == "stop":
        assert gone(calls("start")[0]["pid"])
    engine.load(LAB_SEED0, lab, "base")
    assert engine.complete(PROMPTS, keys=None, **HOW) == ours
    done = [call["do"] for call in calls()]
    assert done == {
        "sleep": ["start", "generate", "sleep", "load", "generate"],
        "stop": ["start", "generate", "start", "generate"],
        "keep": ["start", "generate", "load", "generate"],
    }[pauses]  # fmt: skip
    assert all(call["level"] == 2 for call in calls("sleep"))


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_missing_vllm_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(EngineError, match=r"^sampler\.python: .* \(there is no vllm\)\. .*pip install vllm"):
        vllm.about(None)
    with pytest.raises(EngineError, match=r"^sampler\.python: /no/such cannot run vLLM \(.*No such file"):
        vllm.about("/no/such")
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    assert vllm.about(sys.executable) == {"vllm": "9.9.9", "torch": torch.__version__}


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("start", EngineError, r"could not start: ValueError: Free .*gpu_memory_utilization\.\n(.*\n)*  ValueError"),
        ("slow", EngineError, r"did not start within 8 s \(sampler\.timeout\)"),
        ("die", EngineError, r"process ended \(signal 9\) when it was to complete; killed, or out of memory"),
        ("stale", EngineError, r"could not load: RuntimeError: vLLM kept keys and values"),
        ("short", PolicyError, r"the model has 20 left by sampler\.gpu_memory_utilization"),
    ],
)  # fmt: skip
def test_failures_are_told_and_leave_no_process(
    how: str, error: type[Exception], words: str, start: Any, lab: Policy, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", how)
    engine = start(timeout=8 if how == "slow" else 240)

    def everything() -> None:
        engine.load(LAB_SEED0, lab)
        engine.complete(PROMPTS, keys=None, **HOW)
        engine.load(LAB_SEED0, lab)

    with pytest.raises(error, match=words):
        everything()
    engine.close()
    assert all(gone(call["pid"]) for call in calls("start"))


def test_an_engine_on_another_device_is_refused(start: Any, lab: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_DEVICE", "cuda")
    engine = start()
    with pytest.raises(EngineError, match=r"this vLLM computes on cuda, and the rest of the run on cpu"):
        engine.load(LAB_SEED0, lab)
    assert engine.process is None
    with pytest.raises(EngineError, match=r"^sampler\.between=sleep: vLLM has that on a GPU alone"):
        start(between="sleep")


def test_the_worker_leaves_when_the_run_dies(calls: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")
    code = (
        "import test_vllm as t; from itermerge.policy import Policy; from pathlib import Path\n"
        f"e = t.Engine(t.spec(), Path({str(tmp_path)!r}))\n"
        "e.load(t.LAB_SEED0, Policy(t.LAB_SEED0)); e.complete(t.PROMPTS, keys=None, **t.HOW)"
    )
    path = os.pathsep.join([str(FAKE), str(Path(__file__).parent)])
    real = os.environ["NURSERY_PYTHON"]  # for the run and for vLLM
    run = subprocess.Popen([real, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        while run.poll() is None and not calls("generate"):
            time.sleep(0.1)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert gone(calls("start")[0]["pid"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sampler.temperature=0.001",), r"^sampler\.temperature: vLLM has none below 0\.01, got 0\.001"),
        (("sampler.between=never",), r"^sampler\.between: 'never' is none of auto, sleep, stop, keep"),
        (("sampler.gpu_memory_utilization=1.2",), r"^sampler\.gpu_memory_utilization: must be at most 1"),
        (
            ("sft.patience=1", "model.lora.rank=2", "merge.every_n_epochs=last"),
            r"^sft\.patience: vLLM reads whole weights",
        ),
        (("trainer=ddp", "trainer.devices=2"), r"^sampler=vllm: samples on one device; use trainer=single"),
    ],
)
def test_configs_that_vllm_cannot_run(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(compose_config(*VLLM, *words))


def test_analyze_samples_in_its_own_process() -> None:
    with pytest.raises(ConfigError, match=r"^sampler=vllm: itermerge-analyze samples in its own process"):
        check_analyze(compose_analyze("base=a", "tuned=b", *VLLM))


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_samples_and_evaluates_through_vllm(calls: Any, tmp_path: Path) -> None:
    """With the line search and patience, whose models are in memory alone; the rest of the loop is as ever."""
    more = (
        "sft.patience=1",
        "merge.every_n_epochs=last",
        "merge.policy.search=[0.5,1.0]",
        f"store.dir={tmp_path}/store",
    )
    summary = run_here(tmp_path / "vllm", *VLLM, *more)
    (started,) = calls("start")
    assert gone(started["pid"])
    assert len(calls("load")) > 6
    rounds = read_rounds(tmp_path / "vllm")
    assert [line["train_sample/examples"] > 0 for line in rounds[1:]] == [True, True]
    assert not [name for line in rounds for name in line if "token_entropy" in name]
    assert all("diversity/fixed_text_entropy" in line and "diversity/self_bleu" in line for line in rounds)
    assert summary["stages"]["reused"] == {}

    # round 0 is greedy on the same weights: with the built-in sampler it has the same scores, under other keys
    run_here(tmp_path / "hf", *more, "rounds=1")
    theirs = read_rounds(tmp_path / "hf")[0]
    assert {k: v for k, v in rounds[0].items() if "acc" in k} == {k: v for k, v in theirs.items() if "acc" in k}
    assert "diversity/token_entropy" in theirs

    # once more, all of it is found and nothing is started; without the store it comes out the same
    asked = len(calls())
    again = run_here(tmp_path / "again", *VLLM, *more)
    assert again["stages"]["computed"] == {}
    assert len(calls()) == asked
    fresh = run_here(tmp_path / "fresh", *VLLM, *more[:-1], "store=none")
    assert fresh["stages"]["reused"] == {}
    assert deterministic_set(tmp_path / "fresh") == deterministic_set(tmp_path / "vllm")


def test_a_teacher_of_another_kind_takes_turns(calls: Any, tmp_path: Path, tiny_folder: Path) -> None:
    run_here(
        tmp_path / "run", *VLLM, "rounds=1", "model=hf", f"model.path={tiny_folder}", "teacher=lab", "store=none",
        "analysis.importance=[]",
    )  # fmt: skip
    assert len(calls("start")) == 3  # the model, its teacher, the model again
    assert all(gone(call["pid"]) for call in calls("start"))
    assert read_rounds(tmp_path / "run")[1]["train_sample/accept_rate"] > 0


def test_a_plan_starts_nothing_and_knows_the_keys(calls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*VLLM, "rounds=1", "analysis.importance=[]", f"store.dir={tmp_path}/store")
    cfg = check(compose_config(*SMALL, *words))
    before = plan.plan([cfg])
    assert not any(item.stored for item in before.items)
    assert calls() == []
    assert "sampling" not in before.memory
    run_here(tmp_path / "run", *words)
    assert all(item.stored for item in plan.plan([cfg]).items)
    other = check(compose_config(*SMALL, *words, "sampler.enforce_eager=true"))
    assert not any(item.stored for item in plan.plan([other]).items if item.stage in ("sample", "evaluate", "held_out"))
    monkeypatch.delenv("PYTHONPATH")
    unknown = plan.plan([cfg])
    assert [item.stored for item in unknown.items] == [None] * len(before.items)
    assert any("goes by vLLM's version" in text for text in unknown.about)


def test_the_built_in_sampler_has_the_keys_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from itermerge.store import Store, environment

    def bench(*words: str) -> stages.Bench:
        store = Store(tmp_path / "store", environment("cpu", 1))
        return stages.Bench(check(compose_config(*SMALL, *words)), store, tmp_path)

    ours = bench()
    assert ours._dtype() == {"dtype": "float32"}
    assert not set(SAMPLING_VLLM) & set(ours.sampling)
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    theirs = bench(*VLLM)
    versions = {"vllm": "9.9.9", "torch": torch.__version__}
    assert theirs._dtype() == {
        "dtype": "float32", "sampler": {**versions, "enforce_eager": False, "batch_invariant": False},
    }  # fmt: skip
    assert set(SAMPLING_VLLM) <= set(theirs.sampling)


def test_a_missing_vllm_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    done = itermerge(*SMALL, "sampler=vllm", cwd=tmp_path, env={"PYTHONPATH": ""})
    assert done.returncode != 0
    assert "sampler.python: " in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_asks_vllm(calls: Any, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from itermerge.config import check_evaluate
    from itermerge.evaluate import evaluate

    small = ("suite.n=8", "suite.pass_k_n=2", "task.n_validation=4", "sampler.n=2", f"others=[{LAB / 'seed1'}]")
    found = {}
    for name, words in {"hf": (), "vllm": VLLM}.items():
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = check_evaluate(compose("evaluate", [*small, *words, f"out={tmp_path / name}"]))
        (tmp_path / name).mkdir()
        found[name] = evaluate(cfg, tmp_path / name)
    assert len(calls("start")) == len(calls("load")) == 1
    assert gone(calls("start")[0]["pid"])
    ours, theirs = ([m["figures"] for m in found[name]["models"]] for name in ("hf", "vllm"))
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if "acc" in k} == {k: v for k, v in b.items() if "acc" in k}
        assert "diversity/token_entropy" in a
        assert "diversity/token_entropy" not in b

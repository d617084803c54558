"""Sweeps: their folder, going on in it, launchers, GPUs, and searches with Optuna."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, deterministic_set, forked, itermerge, run_here

from itermerge import cli, stages, sweep
from itermerge.config import ConfigError
from itermerge.sweep import SweepError

ONE = ("--multirun", *SMALL, "rounds=1")


def made_more_than_once(folder: Path) -> dict[str, int]:
    """Stages that the jobs of a sweep computed twice, by their run.log."""
    text = "".join(f.read_text() for f in folder.glob("*/run.log"))
    counts = Counter(re.findall(r"made (\w+ [0-9a-f]{16}) in", text))
    assert counts
    return {key: n for key, n in counts.items() if n > 1}


# --- the folder ----------------------------------------------------------------------------------------------------


def _folder(at: Path, command: list[str], jobs: list[list[str]]) -> Path:
    sweep.begin(at, jobs, command, resume=False)
    return at


def test_a_resumed_command_is_the_old_one_in_its_folder(tmp_path: Path) -> None:
    old = ["-m", "merge.ratio=0.5,1.0", "hydra.sweep.dir=x", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]
    folder = _folder(tmp_path / "it's", [*old, "--config-dir", "mine"], [["merge.ratio=0.5"], ["merge.ratio=1.0"]])
    quoted = str(folder).replace("'", "\\'")
    where = [f"sweep.resume='{quoted}'", f"hydra.sweep.dir='{quoted}'"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]
    again = ["--multirun", "--config-dir", "mine", "merge.ratio=0.5,1.0", *launcher, *where]
    assert sweep.resumed([f"sweep.resume={folder}"]) == again
    assert sweep.resumed(["-m", f"sweep.resume='{folder}'", "hydra.sweep.dir=other"]) == again
    # what says how to run replaces what said it before, another launcher also the settings of the old one
    fewer = sweep.resumed([f"sweep.resume={folder}", "hydra.launcher.n_jobs=1"])
    assert [a for a in fewer if "launcher" in a] == ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    for other in ("hydra/launcher=basic", "launch=gpus"):
        assert [a for a in sweep.resumed([f"sweep.resume={folder}", other]) if "launch" in a] == [other]
    # so does where things are kept, and a member of a group takes the keys of the former with it
    folder2 = _folder(
        tmp_path / "b", ["-m", "seed=0,1", "store.dir=x", "logger=wandb", "logger.project=p"], [["seed=0"]]
    )
    kept = sweep.resumed([f"sweep.resume={folder2}", "store.check_space=false", "logger=jsonl"])
    assert kept[1:5] == ["seed=0,1", "store.dir=x", "store.check_space=false", "logger=jsonl"]
    assert sweep.resumed([f"sweep.resume={folder2}", "store=none"])[1:5] == [
        "seed=0,1", "logger=wandb", "logger.project=p", "store=none"
    ]  # fmt: skip
    # a whole command stays what it is
    typed = sweep.resumed(["-m", "merge.ratio=0.3", f"sweep.resume={folder}"])
    assert typed == ["--multirun", "merge.ratio=0.3", *where]
    assert sweep.resumed(["merge.ratio=0.3", "sweep.resume=null"]) == ["merge.ratio=0.3", "sweep.resume=null"]


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"sweep\.resume: .*nowhere is no sweep's folder; there is no sweep\.json"):
        sweep.resumed([f"sweep.resume={tmp_path / 'nowhere'}"])


def test_a_sweep_is_not_begun_twice_and_goes_on_only_as_itself(tmp_path: Path) -> None:
    jobs = [["seed=0"], ["seed=1"]]
    folder = _folder(tmp_path / "s", ["-m", "seed=0,1"], jobs)
    with pytest.raises(SweepError, match=r"holds a sweep already, which is not overwritten; sweep\.resume=.*goes on"):
        sweep.begin(folder, jobs, ["-m", "seed=0,1"], resume=False)
    around = [["seed=0", f"sweep.resume={folder}", "hydra.sweep.subdir=0", "launch=gpus", "store.dir=x"], ["seed=1"]]
    sweep.begin(folder, around, [], resume=True)  # what is not the job's own does not count
    assert sweep.read(folder) == {"command": ["-m", "seed=0,1"], "cwd": os.getcwd(), "jobs": jobs}
    for other, said in ([["seed=0"], ["seed=2"]], "job 1 is 'seed=1', here it is 'seed=2'"), (
        [["seed=0"]], "job 1 is 'seed=1', here it is 'no such job'"
    ):  # fmt: skip
        with pytest.raises(SweepError, match=re.escape(said)):
            sweep.begin(folder, other, [], resume=True)
    (tmp_path / "old" / "0").mkdir(parents=True)  # job folders, whoever made them
    with pytest.raises(SweepError, match="holds a sweep already"):
        sweep.begin(tmp_path / "old", jobs, [], resume=False)


def test_marks(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "s", [], [["seed=0"], ["seed=1"], ["seed=2"]])
    for name, mark in (("0", "DONE"), ("1", "FAILED"), ("2", None)):
        (folder / name).mkdir()
        if mark:
            (folder / name / mark).write_text("Traceback\n  x\nValueError: no\n")
    assert [sweep.mark_of(folder / n) for n in "012"] == ["DONE", "FAILED", None]
    assert sweep.failed_before(folder) == "1"
    assert sweep.why(folder / "1" / "FAILED") == "ValueError: no"
    (folder / "1" / "more").write_text("Traceback\n  x\na.b.WorkerError: gone\n\nThe exit codes: 9\nDetailed text\n")
    assert sweep.why(folder / "1" / "more") == "a.b.WorkerError: gone"
    sweep.retry(folder / "1")
    assert sweep.mark_of(folder / "1") is None
    assert sweep.why(folder / "1" / sweep.BEFORE) == "ValueError: no"
    assert sweep.failed_before(folder) is None


# --- GPUs ----------------------------------------------------------------------------------------------------------

TAKE = """
import os, sys, time
from itermerge import sweep
print(sweep.take_gpu([4, 7], poll=0.05), sweep.take_gpu([4, 7]), os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.readline()
"""


def test_each_process_has_a_gpu_for_itself_until_it_ends(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", TAKE], env=os.environ | {"TMPDIR": str(tmp_path)}, **pipes)

    def said(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    first, second = start(), start()
    assert {said(first), said(second)} == {"4 4 4", "7 7 7"}
    third = start()
    time.sleep(0.5)
    first.kill()  # whichever way it ends
    freed = said(third)
    assert freed in ("4 4 4", "7 7 7")
    for process in (second, third):
        process.communicate("\n", timeout=60)
    first.communicate()


def test_a_job_takes_as_many_gpus_as_it_has_devices(tmp_path: Path) -> None:
    """All of them or none: two jobs never wait for one another."""
    code = """
import os, sys
from itermerge import sweep
from itermerge.config import ConfigError
n = int(sys.argv[1])
print(sweep.take_gpu([4, 7, 9], n, poll=0.05), flush=True)
try:
    sweep.take_gpu([4, 7, 9], n + 1)
except ConfigError as error:
    print(error, flush=True)
sys.stdin.readline()
"""

    def start(n: int) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        words = [sys.executable, "-c", code, str(n)]
        return subprocess.Popen(words, env=os.environ | {"TMPDIR": str(tmp_path)}, **pipes)

    def said(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    first = start(2)
    assert said(first) == "4,7"
    assert said(first).startswith("trainer.devices: 3, and this worker of the sweep has taken 2 GPUs")
    second = start(2)  # has to wait, and meanwhile holds nothing
    time.sleep(0.5)
    third = start(1)
    assert said(third) == "9"
    first.communicate("\n", timeout=60)
    assert said(second) == "4,7"
    for process in (second, third):
        process.communicate("\n", timeout=60)


def test_threads_are_set_before_torch_starts() -> None:
    code = """
import os, sys
from types import SimpleNamespace
from pathlib import Path
from itermerge import cli
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"], "torch" in sys.modules)
            sys.exit()
sys.meta_path.insert(0, Watch())
alone = SimpleNamespace(strategy="single", devices=1)
cli.start(SimpleNamespace(threads=3, trainer=alone, sweep=SimpleNamespace(gpus=None)), Path("."), [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "3", "False"]


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.take_gpu(None) is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=r"sweep\.gpus: nvidia-smi lists no GPU"):
        sweep.gpus("all")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert sweep.gpus("all") == ["2", "3"]
    assert sweep.gpus([0]) == ["0"]
    with pytest.raises(ConfigError, match=r"^trainer\.devices: 3 for each job, and sweep\.gpus has 2; use fewer"):
        sweep.take_gpu("all", 3)


# --- going on ------------------------------------------------------------------------------------------------------


def _times(folder: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def test_failed_jobs_are_named_and_tried_again_and_what_is_done_is_left_alone(tmp_path: Path) -> None:
    words = (*ONE, "model.seed=0,77", f"paths.models={tmp_path / 'models'}", f"store.dir={tmp_path / 'store'}")
    first = itermerge(*words, "hydra.sweep.dir=sweep", cwd=tmp_path)
    folder = tmp_path / "sweep"
    assert first.returncode == 1
    assert [sweep.mark_of(folder / n) for n in "01"] == ["DONE", "FAILED"]
    assert "job 1 failed: itermerge.tasks.TaskError: model.seed: " in first.stderr
    assert "1 of 2 jobs are not done: 1 failed. To run them:\n    itermerge sweep.resume=sweep\n" in first.stderr
    before = _times(folder / "0")

    refused = itermerge(*words, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert refused.returncode == 2
    assert "holds a sweep already, which is not overwritten" in refused.stderr

    shutil.copytree(stages.LAB_SEED0, tmp_path / "models" / "lab-seed77")
    second = itermerge("sweep.resume=sweep", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "1 of 2 jobs are done already, 1 to run: 1\n" in second.stdout
    assert [sweep.mark_of(folder / n) for n in "01"] == ["DONE", "DONE"]
    assert "TaskError" in (folder / "1" / sweep.BEFORE).read_text()
    assert "tried again; before, it failed with: itermerge.tasks.TaskError" in (folder / "1" / "run.log").read_text()
    assert _times(folder / "0") == before
    third = itermerge("sweep.resume=sweep", "store.check_space=false", cwd=tmp_path)
    assert third.returncode == 0, third.stderr
    assert "2 of 2 jobs are done already, 0 to run\n" in third.stdout

    config = folder / "0" / "config.yaml"  # as if a default had been another one then
    config.write_text(config.read_text().replace("warmup_ratio: 0.03", "warmup_ratio: 0.3"))
    changed = itermerge("sweep.resume=sweep", cwd=tmp_path)
    assert changed.returncode == 2
    assert "job 0 in sweep is done with another config than it would have now" in changed.stderr


def test_on_error_stop_leaves_out_what_has_not_begun(tmp_path: Path) -> None:
    words = (*ONE, "model.seed=77,0", "sweep.on_error=stop", "hydra.sweep.dir=sweep", f"store.dir={tmp_path / 'store'}")
    done = itermerge(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert [sweep.mark_of(tmp_path / "sweep" / n) for n in "01"] == ["FAILED", None]
    assert "job 1 is not started: job 0 failed (sweep.on_error=stop)" in done.stderr
    assert "2 of 2 jobs are not done: 1 failed, 1 interrupted or not begun. To run them:" in done.stderr
    assert "    itermerge sweep.resume=sweep sweep.on_error=continue\n" in done.stderr
    assert not (tmp_path / "sweep" / "1" / "rounds.jsonl").exists()
    inside = itermerge(*SMALL, "hydra.run.dir=sweep", cwd=tmp_path)
    assert inside.returncode == 2
    assert "sweep holds a sweep, whose jobs are in folders below it; give another hydra.run.dir" in inside.stderr
    assert sweep.mark_of(tmp_path / "sweep") is None
    shutil.copytree(stages.LAB_SEED0, Path(os.environ["ITERMERGE_HOME"]) / "models" / "lab-seed77")
    again = itermerge("sweep.resume=sweep", cwd=tmp_path)  # the old failure holds nothing up
    shutil.rmtree(Path(os.environ["ITERMERGE_HOME"]) / "models" / "lab-seed77")
    assert again.returncode == 0, again.stderr
    assert [sweep.mark_of(tmp_path / "sweep" / n) for n in "01"] == ["DONE", "DONE"]


def test_a_sweep_that_was_killed_goes_on_in_its_folder(tmp_path: Path) -> None:
    words = (*ONE, "merge.ratio=0.25,0.75", "rounds=2", "hydra.sweep.dir=sweep", f"store.dir={tmp_path / 'store'}")
    started = forked(*words, cwd=tmp_path)
    log = tmp_path / "sweep" / "0" / "run.log"
    for _ in range(6000):
        if log.is_file() and "made fit" in log.read_text():
            break
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert started.returncode == -9
    assert sweep.mark_of(tmp_path / "sweep" / "0") is None
    done = itermerge("sweep.resume=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert made_more_than_once(tmp_path / "sweep") == {}
    for job, ratio in (("0", 0.25), ("1", 0.75)):
        run_here(tmp_path / f"alone{job}", f"store.dir={tmp_path / 'other'}", f"merge.ratio={ratio}", "rounds=2")
        assert deterministic_set(tmp_path / "sweep" / job) == deterministic_set(tmp_path / f"alone{job}")


def test_ctrl_c_ends_a_sweep_with_the_command_that_goes_on(tmp_path: Path) -> None:
    words = (*ONE, "merge.ratio=0.25,0.75", "rounds=3", "hydra.sweep.dir=sweep", f"store.dir={tmp_path / 'store'}")
    started = forked(*words, cwd=tmp_path)
    log = tmp_path / "sweep" / "0" / "run.log"
    while not (log.is_file() and "made" in log.read_text()):
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=300)
    assert started.returncode == 130
    assert sweep.mark_of(tmp_path / "sweep" / "0") == "INTERRUPTED"
    assert "2 of 2 jobs are not done: 0 failed, 2 interrupted or not begun. To run them:" in err
    assert "    itermerge sweep.resume=sweep" in err


def test_two_processes_do_not_run_in_one_folder(tmp_path: Path) -> None:
    from itermerge.store import lock_file

    (tmp_path / "run").mkdir()
    with lock_file(tmp_path / "run" / cli.LOCK):
        done = itermerge(*SMALL, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert "run: another process is running there; give another hydra.run.dir" in done.stderr


def test_a_missing_launcher_is_said_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_installed", lambda module: False)
    for word, extra in (("hydra/launcher=ray", "ray"), ("launch=slurm", "submitit")):
        monkeypatch.setattr(sys, "argv", ["itermerge", "-m", word])
        with pytest.raises(SystemExit):
            cli.main()
        assert f"error: {word} needs the extra '{extra}': pip install 'itermerge[{extra}]'" in capsys.readouterr().err


# --- launchers -----------------------------------------------------------------------------------------------------


def test_two_workers_share_stages_and_give_the_bytes_of_one(tmp_path: Path) -> None:
    words = (*ONE, "rounds=2", "merge.ratio=0.25,0.5,0.75,1.0", "merge.every_n_epochs=last", "hydra.sweep.dir=sweep")
    done = itermerge(
        *words, f"store.dir={tmp_path / 'store'}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "sweep.gpus=[0,1]", "trainer.accelerator=cpu", cwd=tmp_path, env={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert made_more_than_once(tmp_path / "sweep") == {}
    taken = {json.loads((tmp_path / "sweep" / n / "provenance.json").read_text())["gpu"] for n in "0123"}
    assert taken <= {"0", "1"}
    for job, ratio in enumerate(("0.25", "0.5", "0.75", "1.0")):
        alone = tmp_path / f"alone{job}"
        run_here(alone, "store=none", "merge.every_n_epochs=last", f"merge.ratio={ratio}")
        assert deterministic_set(tmp_path / "sweep" / str(job)) == deterministic_set(alone)


def test_when_a_worker_dies_its_job_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    """joblib ends with an error and takes the other worker along; what had not begun is launched again."""
    words = (*ONE, "rounds=2", "merge.ratio=0.25,0.5,0.75", "hydra.sweep.dir=sweep", "hydra/launcher=joblib")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "itermerge", *words, "hydra.launcher.n_jobs=2", f"store.dir={tmp_path / 'store'}"]
    started = subprocess.Popen(command, cwd=tmp_path, **pipes)
    log = tmp_path / "sweep" / "0" / "run.log"
    while not (log.is_file() and "made" in log.read_text()):
        assert started.poll() is None
        time.sleep(0.02)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        words_of = stat.read_text().rpartition(")")[2].split() if stat.is_file() else ["", "0"]
        cmdline = stat.parent / "cmdline"
        if int(words_of[1]) == started.pid and b"popen_loky_posix" in cmdline.read_bytes():
            os.kill(int(stat.parent.name), signal.SIGKILL)
            break
    else:
        pytest.fail("no worker found")
    _, err = started.communicate(timeout=300)
    assert started.returncode == 1
    marks = [sweep.mark_of(tmp_path / "sweep" / n) for n in "012"]
    assert "FAILED" in marks
    assert "DONE" in marks
    assert None not in marks
    assert "the launcher ended with TerminatedWorkerError; 1 jobs are launched again" in err
    assert re.search(r"\d of 3 jobs are not done: \d failed\. To run them:", err)
    done = itermerge("sweep.resume=sweep", "hydra/launcher=basic", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert made_more_than_once(tmp_path / "sweep") == {}


def test_workers_whose_sweep_was_killed_end_after_their_job(tmp_path: Path) -> None:
    """loky's would stay, each with some hundred megabytes."""
    words = (*ONE, "merge.ratio=0.25,0.5", "hydra.sweep.dir=sweep", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    command = [sys.executable, "-m", "itermerge", *words, f"store.dir={tmp_path / 'store'}"]
    started = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, workers = tmp_path / "sweep" / "0" / "run.log", []
    while not (log.is_file() and "made" in log.read_text()):
        assert started.poll() is None
        time.sleep(0.02)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        words_of = stat.read_text().rpartition(")")[2].split() if stat.is_file() else ["", "0"]
        if int(words_of[1]) == started.pid and b"popen_loky_posix" in (stat.parent / "cmdline").read_bytes():
            workers.append(stat.parent)
    assert len(workers) == 2
    started.kill()
    started.communicate()
    for _ in range(600):
        if not any(w.exists() and ") Z " not in (w / "stat").read_text() for w in workers):
            return
        time.sleep(0.1)
    pytest.fail("workers are still there a minute later")


def test_submitit_local(tmp_path: Path) -> None:
    words = (*ONE, "merge.ratio=0.5", "hydra.sweep.dir=sweep", f"store.dir={tmp_path / 'store'}")
    done = itermerge(*words, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_here(tmp_path / "alone", "store=none", "rounds=1")
    assert deterministic_set(tmp_path / "sweep" / "0") == deterministic_set(tmp_path / "alone")


def test_presets_compose_with_the_launcher_they_name() -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from itermerge.config import conf_dir

    for name, target, settings in (
        ("gpus", "JoblibLauncher", {"n_jobs": 3}), ("slurm", "SlurmLauncher", {"gpus_per_node": 1, "cpus_per_task": 2})
    ):  # fmt: skip
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            words = [f"launch={name}", "sweep.gpus=[0,1,2]", "threads=2"]
            cfg = compose("config", words, return_hydra_config=True)
        assert str(cfg.hydra.launcher._target_).endswith(target)
        for key, value in settings.items():
            assert OmegaConf.select(cfg, f"hydra.launcher.{key}") == value


# --- searches ------------------------------------------------------------------------------------------------------


def _space() -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {"merge.ratio": FloatDistribution(0, 1), "rounds": CategoricalDistribution([1, 2, 3])}


def _finish(folder: Path, number: int, params: dict[str, Any]) -> None:
    (folder / str(number)).mkdir(exist_ok=True)
    final = {"val/id/acc": params["merge.ratio"] * params["rounds"], "val/ood/acc": 1 - params["merge.ratio"]}
    (folder / str(number) / "summary.json").write_text(json.dumps({"final": final}))


def _search(folder: Path, metrics: tuple[str, ...] = ("val/id/acc", "val/ood/acc"), **more: Any) -> Any:
    from itermerge.search import Search

    folder.mkdir(exist_ok=True)
    return Search(folder, _space(), metrics, more.get("algorithm", "tpe"), 0)


@pytest.mark.parametrize("algorithm", ["tpe", "nsga2", "random"])
def test_a_search_that_is_resumed_asks_what_it_would_have_asked(algorithm: str, tmp_path: Path) -> None:
    asked: dict[str, list[Any]] = {"whole": [], "killed": []}
    for name in asked:
        search = _search(tmp_path / name, algorithm=algorithm)
        for step in range(12):
            batch = search.ask(1, 12)
            if name == "killed" and step % 3 == 0:  # the process dies with the trial under way
                search = _search(tmp_path / name, algorithm=algorithm)
                assert search.again() == (batch, [])
            for number, params in batch.items():
                asked[name].append((number, params))
                _finish(tmp_path / name, number, params)
                search.tell(number, failed=False)
        assert search.ask(1, 12) == {}
    assert asked["whole"] == asked["killed"]
    assert len({str(p) for _, p in asked["whole"]}) > 6


def test_a_failed_trial_is_asked_for_again_once(tmp_path: Path) -> None:
    search = _search(tmp_path / "s", ("val/id/acc",))
    ((number, params),) = search.ask(1, 2).items()
    search.tell(number, failed=True)
    again = _search(tmp_path / "s", ("val/id/acc",))
    assert again.again() == ({}, [0])
    assert again.again() == ({}, [])
    batch = again.ask(5, 2)
    assert next(iter(batch.values())) == params  # in a folder of its own; the failed one's stays as it is
    assert sorted(batch) == [1, 2]  # two trials, the repeated one not counted
    for n, p in batch.items():
        _finish(tmp_path / "s", n, p)
        again.tell(n, failed=False)
    assert again.ask(5, 2) == {}


def test_a_trial_that_was_killed_while_it_was_thought_of_is_no_trial(tmp_path: Path) -> None:
    search = _search(tmp_path / "s")
    half = search.study.ask(fixed_distributions={"rounds": _space()["rounds"]})
    again = _search(tmp_path / "s")
    assert again.again() == ({}, [half.number])
    ((number, params),) = again.ask(1, 1).items()
    assert (number, params.keys()) == (1, _space().keys())


def test_a_search_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    from itermerge.search import Search

    _search(tmp_path / "s", ("val/id/acc",))
    with pytest.raises(ConfigError, match=r"has metrics \['val/id/acc'\], here it is \['val/ood/acc'\]"):
        _search(tmp_path / "s", ("val/ood/acc",))
    with pytest.raises(ConfigError, match=r"has algorithm tpe, here it is random"):
        _search(tmp_path / "s", ("val/id/acc",), algorithm="random")
    with pytest.raises(ConfigError, match=r"has fixed \[\], here it is \['rounds=5'\]"):
        Search(tmp_path / "s", _space(), ["val/id/acc"], "tpe", 0, ["rounds=5"])
    with pytest.raises(ConfigError, match=r"has space \{.*'rounds'.*\}, here it is \{'merge.ratio'"):
        Search(tmp_path / "s", {"merge.ratio": _space()["merge.ratio"]}, ["val/id/acc"], "tpe", 0)


def test_the_front_holds_what_nothing_beats_in_both(tmp_path: Path) -> None:
    search = _search(tmp_path / "s")
    values: dict[int, tuple[float, float]] = {}
    for _ in range(10):
        for number, params in search.ask(2, 10).items():
            _finish(tmp_path / "s", number, params)
            search.tell(number, failed=False)
            values[number] = (params["merge.ratio"] * params["rounds"], 1 - params["merge.ratio"])
    front = {
        n for n, (a, b) in values.items()
        if not any((c >= a and d >= b) and (c, d) != (a, b) for c, d in values.values())
    }  # fmt: skip
    lines = search.end()
    found = json.loads((tmp_path / "s" / "search.json").read_text())
    assert {row["job"] for row in found["best"]} == front
    assert lines[0] == f"Pareto front, {len(front)} trials by val/id/acc and val/ood/acc (search.json):"
    assert (tmp_path / "s" / "figures" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_of_a_search_are_validation_figures() -> None:
    from itermerge.search import check_metrics

    check_metrics(["val/id/acc", "val/ood/acc"])
    with pytest.raises(ConfigError, match=r"'ood/acc' is measured on test items, which choose nothing"):
        check_metrics(["val/id/acc", "ood/acc"])
    with pytest.raises(ConfigError, match="one or two metrics"):
        check_metrics(["val/id/acc"] * 3)


def test_optuna_over_the_command_line_and_on_after_its_end(tmp_path: Path) -> None:
    words = (
        *ONE, "hydra/sweeper=optuna", "merge.ratio=interval(0.2,0.9)", "rounds=int(interval(1,2))", "suite.pass_k_n=0",
        "sft.lr=tag(log,interval(1e-4,1e-3))", "suite.n_validation=8", f"store.dir={tmp_path / 'store'}",
        "hydra.sweeper.metrics=[val/id/acc,val/ood/acc]", "hydra.sweep.dir=search",
    )  # fmt: skip
    done = itermerge(*words, "hydra.sweeper.n_trials=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    more = itermerge("sweep.resume=search", "hydra.sweeper.n_trials=3", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    jobs = sweep.read(tmp_path / "search")["jobs"]
    assert len(jobs) == 3
    assert [sweep.mark_of(tmp_path / "search" / n) for n in "012"] == ["DONE"] * 3
    best = json.loads((tmp_path / "search" / "search.json").read_text())["best"]
    for row in best:
        final = json.loads((tmp_path / "search" / str(row["job"]) / "summary.json").read_text())["final"]
        assert (row["val/id/acc"], row["val/ood/acc"]) == (final["val/id/acc"], final["val/ood/acc"])
        assert f"merge.ratio={row['params']['merge.ratio']}" in jobs[row["job"]]
    assert "Pareto front" in more.stdout
    assert {o for job in jobs for o in job if o.startswith("rounds=")} <= {"rounds=1", "rounds=2"}
    reused = json.loads((tmp_path / "search" / "2" / "summary.json").read_text())["stages"]["reused"]
    assert reused["sample"] >= 1  # trials share what agrees


def test_a_search_does_not_go_on_in_a_sweep_of_another_kind(tmp_path: Path) -> None:
    _folder(tmp_path / "grid", ["-m", "merge.ratio=0.3,0.5"], [["merge.ratio=0.3"], ["merge.ratio=0.5"]])
    done = itermerge(
        *ONE, "sweep.resume=grid", "hydra/sweeper=optuna", "merge.ratio=interval(0.5,1)", cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 2
    assert "grid holds no search (optuna.log), but a sweep of another kind" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no key has a space to search"),
        (("merge.ratio=interval(0.2,1.5)",), "merge.ratio: must be at most 1, got 1.5"),
        (("merge.ratio=0.3,0.5", "hydra.sweeper.metrics=[ood/acc]"), "'ood/acc' is measured on test items"),
        (("merge.ratio=0.3,0.5", "hydra.sweeper.metrics=[val/ood/acc]"), "set suite.n_validation"),
        (("merge.ratio=0.3,0.5", "hydra.sweeper.algorithm=grid"), "'grid' is none of tpe, nsga2, random"),
        (("merge.ratio=0.3,0.5", "hydra.sweeper.n_trials=0"), "hydra.sweeper.n_trials: must be at least 1, got 0"),
        (("merge.ratio=0.3,0.5", "hydra.sweeper.n_jobs=-1"), "hydra.sweeper.n_jobs: must be at least 1, got -1"),
    ],
)
def test_mistakes_of_a_search_are_said_before_the_first_trial(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = itermerge(*ONE, "hydra/sweeper=optuna", "hydra.sweep.dir=search", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.rglob("rounds.jsonl"))

"""The command, in processes of its own: same bytes after kills, sweeps, marks, exit codes and messages."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, deterministic_set, forked, itermerge, run_here


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, made in this process and never interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_here(folder, f"store.dir={folder.parent / 'store'}")
    return folder


def test_one_command_makes_a_whole_run_folder_with_the_same_bytes(reference: Path, tmp_path: Path) -> None:
    done = itermerge(*SMALL, f"store.dir={tmp_path / 'store'}", cwd=tmp_path, env={"PYTHONHASHSEED": "5"}, reports=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert deterministic_set(folder) == deterministic_set(reference)
    names = {f.name for f in folder.iterdir()}
    assert names >= {
        "config.yaml", "provenance.json", "run.log", "timing.json", "rounds.jsonl", "rounds", "summary.json", "figures",
        "report.html", "DONE",
    }  # fmt: skip
    assert not names & {"FAILED", "INTERRUPTED", "wandb", "stages", ".hydra", "lightning_logs", "checkpoints"}
    assert re.search(
        r"run folder outputs/\S+, report outputs/\S+/report\.html, figures outputs/\S+/figures/id_ood\.png", done.stdout
    )
    assert "merge=linear ratio=0.5" in done.stdout
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["overrides"][: len(SMALL)] == list(SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outputs", "store"]
    assert "Warning" not in done.stderr


def _wait_for(started: subprocess.Popen[str], file: Path) -> None:
    """Until the run has written its first round; fails when it ended before."""
    for _ in range(6000):
        if file.is_file() and file.read_text():
            return
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    pytest.fail("the run did not get to its first round within five minutes")


@pytest.mark.parametrize("kind", ["local", "none"])
def test_killed_and_interrupted_at_any_moment_and_run_again_gives_the_same_bytes(
    kind: str, reference: Path, tmp_path: Path
) -> None:
    moments = random.Random(f"kill {kind}")
    store = [f"store.dir={tmp_path / 'store'}"] if kind == "local" else ["store=none"]
    words, run = [*SMALL, *store, f"hydra.run.dir={tmp_path / 'run'}"], tmp_path / "run"
    for number in [signal.SIGKILL, signal.SIGKILL, signal.SIGINT] if kind == "local" else [signal.SIGKILL]:
        (run / "rounds.jsonl").unlink(missing_ok=True)
        started = forked(*words, cwd=tmp_path)
        _wait_for(started, run / "rounds.jsonl")
        time.sleep(moments.uniform(0, 0.7))
        started.send_signal(number)
        _, err = started.communicate(timeout=300)
        if started.returncode == 0:
            break  # it was faster; the folder is finished
        assert started.returncode == (130 if number == signal.SIGINT else -number), err
        marks = {f.name for f in run.iterdir()} & {"DONE", "FAILED", "INTERRUPTED"}
        assert marks == ({"INTERRUPTED"} if number == signal.SIGINT else set())
        if number == signal.SIGINT:
            assert "Traceback" not in err
            assert "interrupted; the same command goes on from the finished stages" in (run / "run.log").read_text()
    else:
        done = itermerge(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        if kind == "local":
            assert sum(json.loads((run / "summary.json").read_text())["stages"]["reused"].values()) >= 1
    assert deterministic_set(run) == deterministic_set(reference)
    assert not {"INTERRUPTED", "FAILED", "stages"} & {f.name for f in run.iterdir()}


def test_a_finished_folder_is_refused(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    again = itermerge(*SMALL, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert again.returncode == 2
    assert "holds a finished run, which is never overwritten; give another hydra.run.dir" in again.stderr
    assert (tmp_path / "run" / "DONE").exists()
    mistaken = itermerge(*SMALL, "rounds=0", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert mistaken.returncode == 2
    assert not (tmp_path / "run" / "FAILED").exists()
    assert deterministic_set(tmp_path / "run") == deterministic_set(reference)


# --- sweeps --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Four jobs: ratio 0.5 and 1, and for each of them one whose examples are longer than it allows."""
    where = tmp_path_factory.mktemp("sweep")
    done = itermerge(
        "--multirun", *SMALL, "rounds=1", "merge.ratio=0.5,1.0", "sft.max_length=512,16", "hydra.sweep.dir=sweep",
        "merge.every_n_epochs=last", f"store.dir={where / 'store'}", "logger=wandb", cwd=where, reports=True,
    )  # fmt: skip
    return where / "sweep", done


Sweep = tuple[Path, subprocess.CompletedProcess[str]]


def test_a_failed_job_is_marked_and_named_and_the_others_go_on(sweep: Sweep) -> None:
    folder, done = sweep
    marks = [sorted({"DONE", "FAILED", "INTERRUPTED"} & {f.name for f in (folder / n).iterdir()}) for n in "0123"]
    assert marks == [["DONE"], ["FAILED"], ["DONE"], ["FAILED"]], done.stderr
    assert done.returncode == 1
    failed = (folder / "1" / "FAILED").read_text()
    assert failed.startswith("Traceback")
    assert "SftError: round 1: an example has" in failed
    named = [line for line in done.stderr.splitlines() if line.startswith("job ")]
    assert [line.split(":")[0] for line in named] == ["job 1 failed", "job 3 failed"]
    assert all("sft.max_length is 16" in line for line in named)


def test_a_sweep_ends_with_its_table_and_figure(sweep: Sweep) -> None:
    folder, done = sweep
    assert (folder / "figures" / "id_ood.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], float(row["merge.ratio"]), row["round"]) for row in rows] == [
        ("0", 0.5, "0"), ("0", 0.5, "1"), ("2", 1.0, "0"), ("2", 1.0, "1")
    ]  # fmt: skip
    for row in rows:
        line = json.loads((folder / row["job"] / "rounds.jsonl").read_text().splitlines()[int(row["round"])])
        assert float(row["id/acc"]) == pytest.approx(line["id/acc"], abs=1e-4)
    assert (folder / "figures" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    said = "sweep folder sweep, report sweep/report.html, figures sweep/figures/id_ood.png, sweep/figures/heatmap.png"
    assert said in done.stdout
    assert '<a href="2/report.html">' in (folder / "report.html").read_text()
    assert (folder / "2" / "report.html").is_file()
    rows = list(csv.DictReader((folder / "jobs.csv").read_text().splitlines()))
    assert [row["job"] for row in rows] == ["0", "2"]
    assert "itermerge.store.journal" not in done.stdout  # stage by stage, in run.log alone
    assert "started fit" in (folder / "0" / "run.log").read_text()


def test_jobs_of_a_sweep_share_their_stages(sweep: Sweep) -> None:
    folder, _ = sweep
    counts: list[dict[str, Any]] = [
        json.loads((folder / n / "summary.json").read_text())["stages"] for n in ("0", "2")
    ]  # fmt: skip
    assert counts[0]["reused"] == {}
    # at ratio 1 the tuned model is the merged one: job 0 had evaluated it before its merge, but drew no samples from it
    found = ("held_out", "probe", "sample", "verify", "importance", "fit", "update")
    assert counts[1]["reused"] == {"evaluate": 3} | dict.fromkeys(found, 1)
    assert counts[1]["computed"] == {"held_out": 1, "probe": 1, "analyze": 1}


def _records(content: bytes) -> Iterator[bytes]:
    """The records of an offline W&B file: after 7 bytes, LevelDB's log (blocks of 32 KiB, whole or split records)."""
    at, parts = 7, b""
    while at < len(content):
        left = 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6] if left >= 7 else 0
        if left < 7 or kind == 0:
            at += left  # the rest of a block is padding
            continue
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_each_job_of_a_sweep_has_one_offline_wandb_run_that_can_be_read(sweep: Sweep) -> None:
    from wandb.proto import wandb_internal_pb2

    folder, _ = sweep
    for job in "0123":
        (kept,) = (folder / job / "wandb").glob("offline-run-*")
        (file,) = kept.glob("*.wandb")
        config, rows, exit_code, artifacts, summary = {}, [], None, [], {}
        for data in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                group, name = record.run.run_group, record.run.display_name
            elif kind == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            elif kind == "summary":
                summary |= {i.key: json.loads(i.value_json) for i in record.summary.update}
            elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
                artifacts.append(record.request.log_artifact.artifact.type)
            elif kind == "artifact":
                artifacts.append(record.artifact.type)
            elif kind == "exit":
                exit_code = record.exit.exit_code
        assert config["merge"]["ratio"] == (0.5 if job in "01" else 1.0)
        assert group == "sweep"
        assert f"ratio={config['merge']['ratio']}" in name
        assert exit_code == (0 if job in "02" else 1)
        lines = [json.loads(line) for line in (folder / job / "rounds.jsonl").read_text().splitlines()]
        assert [row["id/acc"] for row in rows if "id/acc" in row] == [line["id/acc"] for line in lines]
        if job in "13":
            continue
        assert summary["setting/ratio"] == config["setting"]["ratio"] == config["merge"]["ratio"]
        assert artifacts.count("report") == 1  # beside the tables of the charts
        (logged,) = [row for row in rows if "tables/layers/path" in row]
        assert {"charts/pareto_table/path", "charts/id_ood_table/path", "figures/id_ood/path"} <= logged.keys()
        table = json.loads((kept / "files" / logged["tables/layers/path"]).read_text())
        change = {tuple(line[:2]): line[table["columns"].index("change")] for line in table["data"]}
        assert change[len(lines) - 1, "layer_03"] == lines[-1]["weights/change/layer_03"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("merge.anchor=base,bsae", r"error: job .*merge\.anchor=bsae.*: merge\.anchor: 'bsae' is none of base"),
        ("+sft.lrr=1,2", r"error: job .*: sft\.lrr: there is no such key; did you mean sft\.lr\?"),
        ("merge=linear,liner", r"merge/liner"),
    ],
)
def test_all_jobs_are_checked_before_the_first_one(second: str, message: str, tmp_path: Path) -> None:
    words = ("--multirun", *SMALL, second, "hydra.sweep.dir=sweep", f"store.dir={tmp_path / 'store'}")
    done = itermerge(*words, cwd=tmp_path)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.rglob("rounds.jsonl"))


# --- what a user meets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rounds=0"], "error: rounds: must be at least 1, got 0"),
        (["+merge.ratoi=0.2"], "error: merge.ratoi: there is no such key; did you mean merge.ratio?"),
        (["optimized_metric=acc"], "error: optimized_metric: 'acc' is none of "),
        (["store.dir=/dev/null/x"], "error: store.dir: cannot write to /dev/null/x"),
        pytest.param(
            ["trainer.accelerator=gpu"],
            "error: trainer.accelerator: gpu was asked for, and torch finds none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["model.seed=77"], "make it with: itermerge experiment=pretrain_lab model.seed=77"),
        (["logger=wandb", "logger.dir=/dev/null/x"], "error: logger.dir: cannot make /dev/null/x"),
    ],
)
def test_mistakes_end_with_one_line_and_a_mark(words: list[str], message: str, tmp_path: Path) -> None:
    done = itermerge(*words, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "FAILED").read_text().startswith("Traceback")


def test_help_lists_groups_and_commands(tmp_path: Path) -> None:
    done = itermerge("--help", cwd=tmp_path)
    assert done.returncode == 0
    for text in (
        "== Configuration groups",
        "merge: breadcrumbs, consensus, dare",
        "itermerge experiment=quickstart",
        "every_n_epochs",
    ):
        assert text in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        ("--help", 0), ("merge.ratoi=0.5", 1), ("rounds=many", 2), ("merge.ratio=2", 2), ("optimized_metric=id/ac", 2),
        ("--multirun merge.ratoi=0.5", 1), ("--multirun rounds=1,many", 2), ("--multirun merge.ratio=0.5,2", 2),
    ],
)  # fmt: skip
def test_help_and_what_is_wrong_with_a_config_load_no_torch(words: str, ends: int, tmp_path: Path) -> None:
    code = (
        f"import sys\nfrom itermerge.cli import main\nsys.argv = ['itermerge', *{words.split()!r}]\nended = 0\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    ended = stopped.code\n"
        "slow = {'torch', 'transformers', 'pytorch_lightning', 'wandb', 'altair'}\n"
        "print(ended, sorted(slow & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{ends} []", done.stderr


def test_the_collector_is_spared_what_is_imported_and_no_more(tmp_path: Path) -> None:
    code = """
import gc, weakref
from itermerge import cli
with cli._imports(1):
    import itermerge.loop
first = gc.get_freeze_count()
class Left: pass
model = Left()
model.trainer, there = model, weakref.ref(model)  # as a job leaves it
del model
with cli._imports(1):
    pass
gc.collect()
print(first > 100_000, gc.get_freeze_count() <= first, there() is None, gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4, done.stderr


def test_cfg_job_prints_the_config_and_runs_nothing(tmp_path: Path) -> None:
    done = itermerge("--cfg", "job", "merge.ratio=0.3", cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(r"^merge:\n(  .*\n)*?  ratio: 0\.3$", done.stdout, re.M)
    assert list(tmp_path.iterdir()) == []


def test_shell_completion(tmp_path: Path) -> None:
    done = itermerge("-sc", "install=bash", cwd=tmp_path)
    assert done.returncode == 0
    assert "hydra_bash_completion" in done.stdout
    line = {"COMP_LINE": "itermerge merge=", "COMP_POINT": "16"}
    query = itermerge("-sc", "query=bash", cwd=tmp_path, env=line)
    assert {"merge=linear", "merge=none", "merge=ties"} <= {*query.stdout.split()}

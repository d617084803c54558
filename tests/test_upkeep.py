"""The store's upkeep: list, verify, prune, and disk space before costly work."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import LAB_SMALL, compose_config, deterministic_set, itermerge, run_here
from safetensors.torch import save_file

from itermerge import stages, upkeep
from itermerge.config import check
from itermerge.store import Store, StoreError

DAY = 86400


def _fill(root: Path, names: Mapping[str, float], weights: bool = True) -> dict[str, Path]:
    """A store with one artifact a name, last used so many seconds ago; their folders."""
    store, folders = Store(root, {"threads": 1}, keep="last"), {}
    for name, ago in names.items():

        def compute(folder: Path) -> Mapping[str, Any]:
            (folder / "text.json").write_text("{}")
            if weights:
                save_file({"w": torch.zeros(100)}, folder / "model.safetensors")
            return {}

        made = store.stage(name, {"lr": 0.1, "how": {"n": 4}, "seed": name}, compute, modules=("store.py",))
        os.utime(made.folder / "manifest.json", times=(time.time() - ago,) * 2)
        folders[name] = made.folder
    return folders


def _run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        upkeep.main(words)
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_default_is_the_store_of_a_config_without_overrides() -> None:
    assert Path(check(compose_config()).store.dir).expanduser() == upkeep.default_store()
    done = subprocess.run(
        [sys.executable, "-c", "from itermerge import upkeep; print(upkeep.default_store())"],
        env={k: v for k, v in os.environ.items() if k != "ITERMERGE_HOME"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(Path("~/.cache/itermerge/store").expanduser())


def test_list_says_size_age_stage_and_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = _fill(tmp_path, {"fit": 3 * DAY, "merge": 60})
    code, said = _run("list", "--dir", str(tmp_path), capsys=capsys)
    assert code == 0
    assert "2 artifacts" in said
    rows = [line for line in said.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["merge", "fit", "fit", "merge"]  # last used first; sums
    assert folders["fit"].name[:16] in rows[1]
    assert "3d" in rows[1]
    size = sum(f.stat().st_size for f in folders["fit"].iterdir())
    assert f"{size / 1000:.1f} kB" in rows[1]
    assert "lr=0.1" in rows[1]
    assert "lr=0.1 n=4 threads=1" in rows[1]
    only = _run("list", "--dir", str(tmp_path), "--stage", "fit", capsys=capsys)[1]
    assert (only.count("│fit"), only.count("│merge")) == (2, 0)


def test_verify_finds_the_damaged_and_removes_it_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = _fill(tmp_path, {"fit": 0, "merge": 0, "sample": 0})
    assert _run("verify", "--dir", str(tmp_path), capsys=capsys) == (0, "0 of 3 artifacts damaged\n")
    file = folders["merge"] / "model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    code, said = _run("verify", "--dir", str(tmp_path), capsys=capsys)
    assert code == 1
    assert f"damaged: merge {folders['merge'].name[:16]} (model.safetensors does not match its digest)" in said
    assert "1 of 3 artifacts damaged" in said
    assert folders["merge"].exists()
    assert "1 removed, 2 whole" in _run("verify", "--dir", str(tmp_path), "--remove", capsys=capsys)[1]
    assert [folders[n].exists() for n in ("fit", "merge", "sample")] == [True, False, True]


def test_prune_removes_by_last_use_and_says_first_what_would_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = _fill(tmp_path, {"fit": 40 * DAY, "merge": 10 * DAY, "sample": 50 * DAY})
    leftover = folders["fit"].with_name(f"{folders['fit'].name}.tmp-{socket.gethostname()}-1")
    leftover.mkdir()
    os.utime(leftover, times=(0, 0))
    words = ("prune", "--dir", str(tmp_path), "--older-than", "30d")
    code, said = _run(*words, "--dry-run", capsys=capsys)
    assert code == 0
    assert "2 artifacts and 1 leftovers would go" in said
    assert all(f.exists() for f in (*folders.values(), leftover))
    assert "1 artifacts and 1 leftovers would go" in _run(*words, "--stage", "fit", "--dry-run", capsys=capsys)[1]
    assert "2 artifacts and 1 leftovers removed" in _run(*words, capsys=capsys)[1]
    assert {n: f.exists() for n, f in folders.items()} == {"fit": False, "merge": True, "sample": False}
    assert not leftover.exists()
    assert [f.name for f in tmp_path.rglob("*.lock")] == [f"{folders['merge'].name}.lock"]
    _fill(tmp_path, {"merge": 0})  # found, so used now
    assert "0 artifacts" in _run("prune", "--dir", str(tmp_path), "--older-than", "1h", capsys=capsys)[1]


def test_prune_of_weights_leaves_the_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = _fill(tmp_path, {"fit": 2 * DAY, "merge": 0})
    assert "1 weights" in _run("prune", "--dir", str(tmp_path), "--older-than", "1d", "--weights", capsys=capsys)[1]
    assert not (folders["fit"] / "model.safetensors").exists()
    assert (folders["merge"] / "model.safetensors").exists()
    assert _run("verify", "--dir", str(tmp_path), capsys=capsys)[0] == 0
    store = Store(tmp_path, {"threads": 1}, keep="last")

    def never(_: Path) -> Mapping[str, Any]:
        raise AssertionError

    store.stage("fit", {"lr": 0.1, "how": {"n": 4}, "seed": "fit"}, never, modules=("store.py",))
    assert store.tally.reused == {"fit": 1}


def test_what_a_run_under_way_has_used_is_not_pruned(tmp_path: Path) -> None:
    folders = _fill(tmp_path, {"fit": 5 * DAY, "merge": 5 * DAY})
    with Store(tmp_path, {"threads": 1}) as running:
        time.sleep(0.05)
        running.stage("merge", {"lr": 0.1, "how": {"n": 4}, "seed": "merge"}, lambda _: {}, modules=("store.py",))
        removed, _ = upkeep.prune(tmp_path, 0)
        assert [k.stage for k in removed] == ["fit"]
        assert folders["merge"].exists()
    assert [k.stage for k in upkeep.prune(tmp_path, 0)[0]] == ["merge"]
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_that_was_killed_does_not_keep_anything_from_being_pruned(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from itermerge.store import Store
with Store(Path({str(tmp_path)!r}), {{"threads": 1}}):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    _fill(tmp_path, {"fit": 10})
    assert upkeep.oldest_run(tmp_path) is None
    assert len(upkeep.prune(tmp_path, 0)[0]) == 1


def test_verify_does_not_remove_what_is_sound_again(tmp_path: Path) -> None:
    """Between its look and its removal a run may have replaced the artifact."""
    folders = _fill(tmp_path, {"fit": 0})
    (kept,) = upkeep.artifacts(tmp_path)
    assert not upkeep._remove(kept, float("inf"), damaged=True)
    assert folders["fit"].exists()


@pytest.mark.parametrize("age", ["30", "d", "-1d", "3y", "6m", ""])
def test_ages_that_are_none(age: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _run("prune", f"--older-than={age}", capsys=capsys)
    assert code == 2
    assert "is no age; write 12h, 30d, 8w, or 0s for all" in said


def test_the_command_is_there_and_says_where_there_is_no_store(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("itermerge-store")), "list", "--dir", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: --dir: there is no store at {tmp_path / 'x'}" in done.stderr


def test_one_byte_flipped_in_20_random_files_of_a_real_store_is_always_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = f"store.dir={tmp_path / 'store'}"
    run_here(tmp_path / "run", where)
    reference = deterministic_set(tmp_path / "run")
    draw = random.Random(5)
    files = sorted(
        f for f in (tmp_path / "store").glob("*/??/*/*") if f.name not in ("timing.json", "kept") and f.stat().st_size
    )
    for number in range(20):
        file = draw.choice(files)
        content, at = bytearray(file.read_bytes()), 0
        at = draw.randrange(len(content))
        content[at] ^= draw.randrange(1, 256)
        file.unlink()  # the run folders' own link keeps its bytes
        file.write_bytes(content)
        caplog.clear()
        summary = run_here(tmp_path / f"again{number}", where)
        computed = summary["stages"]["computed"]
        assert computed == {file.relative_to(tmp_path / "store").parts[0]: 1}, file
        assert f"damaged artifact {file.parent}" in caplog.text
        assert deterministic_set(tmp_path / f"again{number}") == reference


# --- space ---------------------------------------------------------------------------------------------------------


def _cfgs(*commands: tuple[str, ...]) -> list[Any]:
    return [check(compose_config(*words)) for words in commands]


@pytest.mark.parametrize(
    ("keep", "store", "runs"),
    [
        # chains: ratio .5 (rounds 1 and 3, tuned and merged), ratio 1 (2 rounds, the tuned model is the merged one);
        # each round has an update, half a model; 4 models more are in hand during a round
        ("all", 3 * 2.5 + 2 * 1.5 + 4, 1 + 3 + 2),
        # a chain's runs have a last model and its update each, and the first fit with its update
        ("last", (2 * 1.5 + 1.5) + (1.5 + 1.5) + 4, 3),
        ("none", 4, 0),
    ],
)
def test_need_counts_models(keep: str, store: float, runs: int) -> None:
    kept = f"store.keep={keep}"
    cfgs = _cfgs(("rounds=1", kept), ("rounds=3", kept), ("rounds=2", "merge.ratio=1", kept))
    assert upkeep.need([(cfg, 10) for cfg in cfgs]) == (10 * store, 10 * runs)


def test_need_of_runs_that_share_nothing_and_of_what_is_in_hand() -> None:
    apart = _cfgs(("rounds=1", "store=none", "store.keep=all"), ("rounds=3", "store=none", "store.keep=all"))
    assert upkeep.need([(cfg, 10) for cfg in apart]) == (10 * (2.5 * 4 + 4), 10 * 4)
    (mean,) = _cfgs(("rounds=5", "store.keep=last", "merge.anchor=mean"))  # reads all merged models so far
    assert upkeep.need([(mean, 10)]) == (10 * (3 + 4 + 5), 10)
    assert upkeep.need([(mean, 10)], workers=2) == (10 * (3 + 2 * (4 + 5)), 10)


def test_need_is_no_less_than_what_runs_keep(tmp_path: Path) -> None:
    """The estimate against real stores."""
    size = upkeep.weights_size(_cfgs(("model.seed=9",))[0])
    assert size == 4 * sum(w.numel() for w in stages.read_weights(LAB_SMALL).values())
    for keep in ("all", "last", "none"):
        words = (f"store.dir={tmp_path / keep}", f"store.keep={keep}", "merge.every_n_epochs=last")
        for rounds in (1, 2):
            run_here(tmp_path / f"{keep}{rounds}", *words, f"rounds={rounds}")
        used = sum(f.stat().st_size for f in (tmp_path / keep).rglob("*.safetensors"))
        store, _ = upkeep.need([(cfg, size) for cfg in _cfgs(("rounds=1", *words[1:]), ("rounds=2", *words[1:]))])
        assert used <= store <= used + 6 * size


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cfg,) = _cfgs(("rounds=3", "store.keep=all"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(0, 0, 114))
    said = r"1 run may need 115 B at .*, where 114 B are free .*store\.keep=last or none"
    with pytest.raises(StoreError, match=said):
        upkeep.check_space([(cfg, 10)], tmp_path / "not" / "yet", tmp_path)
    cfg.store.check_space = False
    upkeep.check_space([(cfg, 10)], tmp_path, tmp_path)
    cfg.store.check_space = True
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(0, 0, 115))
    upkeep.check_space([(cfg, 10)], tmp_path, tmp_path)


def test_a_sweep_that_does_not_fit_is_refused_before_its_first_job(tmp_path: Path) -> None:
    """A model of a petabyte, by its header."""
    import json
    import struct

    folder = tmp_path / "huge"
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**24, 2**24], "data_offsets": [0, 2**50]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    words = ("--multirun", "model=hf", f"model.path={folder}", "merge.ratio=0.5,1", "hydra.sweep.dir=sweep")
    done = itermerge(*words, f"store.dir={tmp_path / 'store'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: store.keep: the weights of 2 runs may need" in done.stderr
    assert "store.keep is 'last'" in done.stderr
    assert not (tmp_path / "sweep").exists()

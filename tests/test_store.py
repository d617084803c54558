"""The store: computed once, found again, never half-written, never served damaged."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from itermerge import store, weights
from itermerge.store import Artifact, Store, StoreError, file_digest, place

ENVIRONMENT = {"torch": "2.0", "threads": 1}
INPUTS = {"model": "abc", "how": {"n": 4, "dtype": "float32"}, "seed": 7}


class Compute:
    """Writes two files and counts how often it ran."""

    def __init__(self, text: str = "hello") -> None:
        self.text, self.runs = text, 0

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.runs += 1
        (folder / "out.txt").write_text(self.text)
        (folder / "sub").mkdir()
        (folder / "sub" / "more.bin").write_bytes(b"\x00\x01")
        return {"length": len(self.text)}


def _stage(at: Store, compute: Callable[[Path], Mapping[str, Any]], name: str = "s", **changes: Any) -> Artifact:
    modules, whole = changes.pop("modules", ("store.py",)), changes.pop("whole", False)
    return at.stage(name, {**INPUTS, **changes}, compute, modules=modules, whole=whole)


def _files(root: Path) -> list[Path]:
    """All files but the locks, which are empty and stay."""
    return [f for f in root.rglob("*") if f.is_file() and f.suffix != ".lock"]


def test_computed_once_then_found_by_another_store(tmp_path: Path) -> None:
    compute = Compute()
    first, second = Store(tmp_path, ENVIRONMENT), Store(tmp_path, ENVIRONMENT)
    made, found = _stage(first, compute), _stage(second, compute)
    assert compute.runs == 1
    assert found == made
    assert found.digest == made.digest
    assert made.facts == {"length": 5}
    assert set(made.files) == {"out.txt", "sub/more.bin"}
    assert (found.folder / "out.txt").read_text() == "hello"
    assert (first.tally.computed, first.tally.reused) == ({"s": 1}, {})
    assert (second.tally.computed, second.tally.reused) == ({}, {"s": 1})
    assert second.tally.seconds_saved > 0
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["inputs"] == {
        "stage": "s", "source": store.source_digest(("store.py",)), "environment": ENVIRONMENT, **INPUTS
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "abd"}, {"how": {"n": 5, "dtype": "float32"}}, {"how": {"n": 4, "dtype": "bfloat16"}}, {"seed": 8},
        {"more": None}, {"name": "other"}, {"modules": ("store.py", "sft.py")},
    ],
)  # fmt: skip
def test_every_part_of_the_key_counts(changes: dict[str, Any], tmp_path: Path) -> None:
    compute, at = Compute(), Store(tmp_path, ENVIRONMENT)
    keys = {_stage(at, compute).key, _stage(at, compute, **changes).key}
    assert (compute.runs, len(keys)) == (2, 2)


@pytest.mark.parametrize("changed", [{"torch": "2.1"}, {"threads": 2}])
def test_the_environment_is_part_of_the_key(changed: dict[str, Any], tmp_path: Path) -> None:
    one, two = Store(tmp_path, ENVIRONMENT), Store(tmp_path, {**ENVIRONMENT, **changed})
    assert _stage(one, Compute()).key != _stage(two, Compute()).key


def test_the_order_of_inputs_is_no_part_of_the_key(tmp_path: Path) -> None:
    at = Store(tmp_path, dict(reversed(ENVIRONMENT.items())))
    other = Store(tmp_path, ENVIRONMENT).stage(
        "s", dict(reversed(INPUTS.items())), Compute(), modules=("store.py",)
    )  # fmt: skip
    assert _stage(at, Compute()).key == other.key


def test_source_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SOURCE", tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "a.py").write_text("a = 1")
    (tmp_path / "b.py").write_text("b = 1")
    digests = []
    for file, text in ((None, ""), ("pack/a.py", "a = 2"), ("b.py", "b = 2"), ("pack/new.py", "")):
        if file:
            (tmp_path / file).write_text(text)
        store.source_digest.cache_clear()
        digests.append(store.source_digest(("pack", "b.py")))
    store.source_digest.cache_clear()
    assert len(set(digests)) == 4


def test_real_environment_names_what_floats_depend_on() -> None:
    got = store.environment("cpu", 1)
    assert got["torch"] == torch.__version__.split("+")[0] or got["torch"] == torch.__version__
    assert {"transformers", "tokenizers", "device", "device_name", "cpu_capability", "threads"} <= got.keys()
    assert store.environment("cpu", 2) != got


@given(st.integers(0, 6), st.integers(1, 255))
def test_a_flipped_byte_is_never_served(at: int, flip: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        compute, one = Compute("hello"), Store(Path(root), ENVIRONMENT)
        made = _stage(one, compute)
        file = made.folder / ("out.txt" if at < 5 else "sub/more.bin")
        content = bytearray(file.read_bytes())
        content[at if at < 5 else at - 5] ^= flip
        file.chmod(0o644)
        file.write_bytes(bytes(content))
        again = _stage(one, compute)
        assert compute.runs == 2
        assert again == made
        assert (again.folder / "out.txt").read_text() == "hello"


def _drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").chmod(0o644)
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


def _drop_file(folder: Path) -> None:
    (folder / "out.txt").unlink()


def _cut_file(folder: Path) -> None:
    (folder / "out.txt").chmod(0o644)
    (folder / "out.txt").write_text("")


def _change_facts(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").chmod(0o644)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "facts": {"length": 6}}))


@pytest.mark.parametrize("damage", [_drop_manifest, _cut_manifest, _drop_file, _cut_file, _change_facts])
def test_a_damaged_artifact_is_said_and_computed_again(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compute, at = Compute(), Store(tmp_path, ENVIRONMENT)
    made = _stage(at, compute)
    damage(made.folder)
    with caplog.at_level(logging.WARNING):
        again = _stage(at, compute)
    assert again == made
    assert compute.runs == 2
    assert "damaged artifact" in caplog.text
    assert str(made.folder) in caplog.text
    assert "computing it again" in caplog.text


def test_a_lost_duration_is_no_damage(tmp_path: Path) -> None:
    """timing.json is no part of the result, so neither its loss nor its content may end a run."""
    compute, at = Compute(), Store(tmp_path, ENVIRONMENT)
    made = _stage(at, compute)
    (made.folder / "timing.json").unlink()
    assert _stage(at, compute).facts == made.facts


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failing_stage_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def fails(folder: Path) -> Mapping[str, Any]:
        (folder / "out.txt").write_text("half")
        raise error

    at = Store(tmp_path, ENVIRONMENT)
    with pytest.raises(type(error)):
        _stage(at, fails)
    assert _files(tmp_path) == []
    assert at.tally.computed == {}
    assert _stage(at, Compute()).facts == {"length": 5}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said(code: int, tmp_path: Path) -> None:
    def fails(folder: Path) -> Mapping[str, Any]:
        raise OSError(code, os.strerror(code))

    with pytest.raises(StoreError, match=r"the disk is full: stage 's' .*run the same command again") as caught:
        _stage(Store(tmp_path, ENVIRONMENT), fails)
    assert str(tmp_path) in str(caught.value)
    assert _files(tmp_path) == []


@pytest.mark.parametrize("by", ["us", "safetensors"])
def test_a_disk_that_fills_while_weights_are_written_is_said(by: str, tmp_path: Path) -> None:
    """safetensors reports it by an error of its own, which is no OSError (seen on a full tmpfs)."""

    def writes(folder: Path) -> Mapping[str, Any]:
        if by == "safetensors":
            said = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise safetensors.SafetensorError(said)
        weights.save_tensors(Path("/dev/full"), {"w": torch.zeros(1)}, torch.float32)
        return {}

    with pytest.raises(StoreError, match="the disk is full"):
        _stage(Store(tmp_path, ENVIRONMENT), writes)


def test_a_file_that_was_hashed_while_it_was_written_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, read = Store(tmp_path, ENVIRONMENT), list[str]()
    monkeypatch.setattr(store, "file_digest", lambda path: read.append(path.name) or file_digest(path))

    def writes(folder: Path) -> Mapping[str, Any]:
        at.written(folder / "w", weights.save_tensors(folder / "w", {"w": torch.arange(9.0)}, torch.float32))
        (folder / "more.json").write_text("{}")
        if fails:
            raise ValueError("later")
        return {}

    def also(folder: Path) -> Mapping[str, Any]:
        (folder / "w").write_text("other bytes")
        return {}

    fails = True
    with pytest.raises(ValueError, match="later"):
        _stage(at, writes)
    made = _stage(at, also)  # nothing is left of what a stage that failed had told
    assert made.files == {"w": file_digest(made.folder / "w")}
    fails = False
    read.clear()
    made = at.stage("s", {"seed": 2}, writes, modules=("store.py",))
    assert read[0] == "more.json"
    assert "w" not in read
    assert made.files["w"] == file_digest(made.folder / "w")


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    def fails(folder: Path) -> Mapping[str, Any]:
        return {"text": (folder / "nowhere").read_text()}

    with pytest.raises(FileNotFoundError):
        _stage(Store(tmp_path, ENVIRONMENT), fails)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"store\.dir: cannot write to .*file/below .*another store\.dir, or store=no"):
        Store(tmp_path / "file" / "below", ENVIRONMENT)


def test_files_are_read_only(tmp_path: Path) -> None:
    made = _stage(Store(tmp_path, ENVIRONMENT), Compute())
    for name in (*made.files, "manifest.json"):
        assert stat.S_IMODE((made.folder / name).stat().st_mode) == 0o444


def test_what_another_process_finished_meanwhile_stays_in_place(tmp_path: Path) -> None:
    """That process may be reading it: the same bytes must not be taken away under its hands."""
    other = _stage(Store(tmp_path / "other", ENVIRONMENT), Compute())
    theirs = tmp_path / "mine" / other.folder.relative_to(tmp_path / "other")

    def slow(folder: Path) -> Mapping[str, Any]:
        shutil.copytree(other.folder, theirs)
        return Compute()(folder)

    got = _stage(Store(tmp_path / "mine", ENVIRONMENT), slow)
    copied = {f: f.stat().st_ino for f in _files(theirs)}
    assert (got.folder, got.files) == (theirs, other.files)
    assert {f.name for f in theirs.parent.iterdir()} == {theirs.name, f"{theirs.name}.lock"}  # no leftovers
    # copytree keeps the times of files, a new artifact has new ones
    assert (theirs / "out.txt").stat().st_mtime_ns == (other.folder / "out.txt").stat().st_mtime_ns
    assert copied


# --- several at once -----------------------------------------------------------------------------------------------

ATTEMPTS = """
import sys, threading, time
from pathlib import Path
from itermerge.store import Store

def compute(folder):
    with open(Path(sys.argv[1]) / "computed", "a") as file:
        file.write("once\\n")
    time.sleep(0.3)
    (folder / "out.txt").write_text("x" * 100000)
    return {"a": 1}

def attempt():
    store = Store(Path(sys.argv[1]) / "store", {"threads": 1})
    made = store.stage("s", {"seed": 1}, compute, modules=("store.py",))
    sizes.append((made.folder / "out.txt").stat().st_size)

sizes = []
threads = [threading.Thread(target=attempt) for _ in range(25)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sizes == [100000] * 25)
"""


def test_of_100_attempts_at_one_key_one_computes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ATTEMPTS, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=300)[0].strip() for process in started] == ["True"] * 4
    assert (tmp_path / "computed").read_text() == "once\n"


HOLDER = """
import sys, time
from pathlib import Path
from itermerge.store import Store

def compute(folder):
    (folder / "half").write_text("half")
    print("computing", flush=True)
    time.sleep(600)

Store(Path(sys.argv[1]), {"threads": 1}).stage("s", {"seed": 1}, compute, modules=("store.py",))
"""


def test_a_dead_holder_is_survived_and_its_leftovers_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "computing\n"
    compute, at, got = Compute(), Store(tmp_path, {"threads": 1}), []
    waiting = threading.Thread(
        target=lambda: got.append(at.stage("s", {"seed": 1}, compute, modules=("store.py",))), daemon=True
    )
    with caplog.at_level(logging.INFO):
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive()  # it waits for the other
        assert compute.runs == 0
        holder.kill()
        holder.communicate()
        waiting.join(60)
    assert "stage s is being computed by another run; waiting for it" in caplog.text
    assert compute.runs == 1
    assert {f.name for f in got[0].folder.parent.iterdir()} == {got[0].key, f"{got[0].key}.lock"}
    assert at.tally.seconds[0]["waited"] > 0.5
    assert at.tally.seconds_store < 0.5  # waiting is no cost of the store's


def test_the_work_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    """Where locks do not reach it, it may be computing the same stage."""
    compute, at = Compute(), Store(tmp_path, ENVIRONMENT)
    folder = _stage(at, compute).folder
    theirs = folder.with_name(f"{folder.name}.tmp-elsewhere-7")
    theirs.mkdir()
    shutil.rmtree(folder)
    _stage(at, compute)
    assert compute.runs == 2
    assert theirs.is_dir()


def test_an_artifact_that_is_taken_away_after_it_was_found_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, at = Compute(), Store(tmp_path, ENVIRONMENT)
    made = _stage(at, compute)
    real, first = Store._find, [True]

    def find(self: Store, folder: Path, key: str, whole: bool) -> Artifact | None:
        got = real(self, folder, key, whole)
        if first:
            first.clear()
            shutil.rmtree(folder)
        return got

    monkeypatch.setattr(Store, "_find", find)
    assert _stage(at, compute) == made
    assert compute.runs == 2


def test_weights_that_a_killed_drop_left_are_dropped_the_next_time(tmp_path: Path) -> None:
    def weights(folder: Path) -> Mapping[str, Any]:
        (folder / "model.safetensors").write_bytes(b"x")
        return {}

    at = Store(tmp_path, ENVIRONMENT, keep="last")
    folder = _stage(at, weights).folder
    (folder / store.DROPPED).write_text('["model.safetensors"]')
    at.drop_weights(folder)
    assert not (folder / "model.safetensors").exists()
    assert _stage(at, weights, whole=True).folder == folder
    assert (folder / "model.safetensors").exists()


def test_weights_that_come_back_otherwise_are_refused(tmp_path: Path) -> None:
    at, content = Store(tmp_path, ENVIRONMENT, keep="last"), [b"x"]

    def weights(folder: Path) -> Mapping[str, Any]:
        (folder / "model.safetensors").write_bytes(content[0])
        return {}

    folder = _stage(at, weights).folder
    at.drop_weights(folder)
    assert _stage(at, weights).folder == folder  # the facts are enough
    content[0] = b"y"
    with pytest.raises(StoreError, match="gave other bytes than before its weights were dropped"):
        _stage(at, weights, whole=True)
    assert (folder / "manifest.json").exists()


def test_seconds_of_a_stage_leave_out_those_that_it_had_computed_inside(tmp_path: Path) -> None:
    at = Store(tmp_path, ENVIRONMENT)

    def inner(folder: Path) -> Mapping[str, Any]:
        time.sleep(0.3)
        return {}

    def outer(folder: Path) -> Mapping[str, Any]:
        _stage(at, inner, name="inner")
        return {}

    _stage(at, outer, name="outer")
    took = {s["stage"]: s["seconds"] for s in at.tally.seconds}
    assert took["inner"] >= 0.3
    assert took["outer"] < 0.2
    assert at.tally.seconds_store < 0.2


@contextmanager
def _elsewhere(folder: Path, until: Callable[[], bool]) -> Iterator[None]:
    """While it lasts, somebody else holds the lock of an artifact's folder, until something is so (or 20 s)."""
    taken = threading.Event()

    def hold() -> None:
        with store.lock_file(folder.with_name(f"{folder.name}.lock")):
            taken.set()
            last = time.monotonic() + 20
            while not until() and time.monotonic() < last:
                time.sleep(0.01)

    folder.parent.mkdir(parents=True, exist_ok=True)
    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    yield
    holder.join()


def _folder_of(name: str, tmp_path: Path) -> Path:
    """Where an artifact will be."""
    made = _stage(Store(tmp_path / name, ENVIRONMENT), Compute(), name)
    return tmp_path / "store" / made.folder.relative_to(tmp_path / name)


def test_what_is_needed_later_is_made_while_another_computes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    at, first, later = Store(tmp_path / "store", ENVIRONMENT), _folder_of("first", tmp_path), Compute()

    def slow(folder: Path) -> Mapping[str, Any]:
        time.sleep(0.3)
        return later(folder)

    def prepare() -> None:
        time.sleep(0.3)  # prompts to read, say
        _stage(at, slow, "later")
        _stage(at, slow, "later")

    at.ahead = [prepare, lambda: _stage(at, later, "last")]
    with caplog.at_level(logging.INFO), _elsewhere(first, lambda: later.runs == 2):
        _stage(at, Compute(), "first")
    assert later.runs == 2
    assert [s["stage"] for s in at.tally.seconds] == ["later", "last", "first"]
    assert "stage first is being computed by another run; meanwhile later is made" in caplog.text
    assert at.tally.seconds_store < 0.2  # neither the other's seconds nor those of what was made meanwhile
    assert at.tally.seconds[-1].get("waited", 0) < 0.25
    assert at.tally.computed == {"later": 1, "last": 1, "first": 1}
    for counted in ({}, {"later": 1}):  # it counted when it was made
        _stage(at, slow, "later")
        assert (later.runs, at.tally.reused) == (2, counted)
    assert at.ahead == []


def test_what_the_run_had_already_counts_once_when_it_works_ahead(tmp_path: Path) -> None:
    at, first, compute = Store(tmp_path / "store", ENVIRONMENT), _folder_of("first", tmp_path), Compute()
    _stage(at, compute, "early")
    tried: list[Artifact] = []
    at.ahead = [lambda: tried.append(_stage(at, compute, "early"))]
    with _elsewhere(first, lambda: len(tried) == 1):
        _stage(at, Compute(), "first")
    assert (len(tried), compute.runs) == (1, 1)
    assert (at.tally.computed, at.tally.reused) == ({"early": 1, "first": 1}, {})


def test_what_fails_ahead_fails_in_its_place(tmp_path: Path) -> None:
    at, first = Store(tmp_path / "store", ENVIRONMENT), _folder_of("first", tmp_path)
    tried: list[Path] = []

    def fail(folder: Path) -> Mapping[str, Any]:
        tried.append(folder)
        raise ValueError("no such answer")

    at.ahead = [lambda: _stage(at, fail, "later")]
    with _elsewhere(first, lambda: len(tried) == 1):
        made = _stage(at, Compute(), "first")
    assert (made.facts, len(tried), at.tally.computed) == ({"length": 5}, 1, {"first": 1})
    with pytest.raises(ValueError, match="no such answer"):
        _stage(at, fail, "later")
    assert len(tried) == 2


def test_nobody_works_ahead_who_holds_a_lock(tmp_path: Path) -> None:
    """Two that did could wait for each other's locks."""
    at, inner = Store(tmp_path / "store", ENVIRONMENT), _folder_of("inner", tmp_path)
    tried: list[int] = []
    at.ahead = [lambda: tried.append(1)]
    began = time.monotonic()

    def outer(folder: Path) -> Mapping[str, Any]:
        with _elsewhere(inner, lambda: time.monotonic() > began + 0.3):
            return _stage(at, Compute(), "inner").facts

    assert _stage(at, outer, "outer").facts == {"length": 5}
    assert (tried, len(at.ahead)) == ([], 1)


def _mounts(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "mountinfo").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "mountinfo"


@pytest.mark.parametrize(
    ("kind", "options", "doubt"),
    [
        ("ext4", "rw", False), ("nfs4", "rw,vers=4.2,local_lock=none", False), ("nfs", "rw,local_lock=all", True),
        ("nfs", "rw,nolock,local_lock=none", True), ("nfs4", "rw,local_lock=flock", True),
        ("lustre", "rw,flock", False), ("lustre", "rw,localflock", True), ("cifs", "rw,nobrl", True),
        ("cifs", "rw", False),
    ],
)  # fmt: skip
def test_network_file_systems_without_locks_between_machines_are_said(
    kind: str, options: str, doubt: bool, tmp_path: Path
) -> None:
    store.locks_in_doubt.cache_clear()
    root = tmp_path / "mnt" / "my store"
    root.mkdir(parents=True)
    there = str(tmp_path / "mnt").replace(" ", "\\040")
    mounts = _mounts(
        tmp_path, "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw",
        f"30 22 0:40 / {there} rw,relatime shared:2 - {kind} server:/x {options}",
        "31 22 0:41 / /elsewhere rw - nfs server:/y rw,nolock",
    )  # fmt: skip
    said = store.locks_in_doubt(root, mounts)
    assert (said is not None) == doubt
    if said:
        assert f"{root} is on {kind}, mounted so that locks do not reach other machines" in said
    assert store.locks_in_doubt(Path("/"), mounts) is None
    assert store.locks_in_doubt(root, tmp_path / "none") is None


# --- place ---------------------------------------------------------------------------------------------------------


def test_place_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    target = tmp_path / "deep" / "b"
    target.parent.mkdir()
    target.write_text("old")
    place(tmp_path / "a", target)
    assert target.read_text() == "new"
    assert target.stat().st_ino == (tmp_path / "a").stat().st_ino


def test_place_copies_where_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("new")
    place(tmp_path / "a", tmp_path / "x" / "y" / "b")
    assert (tmp_path / "x" / "y" / "b").read_text() == "new"
    assert (tmp_path / "x" / "y" / "b").stat().st_ino != (tmp_path / "a").stat().st_ino
    assert len(_files(tmp_path / "x")) == 1

"""Stages: pure functions from (config slice, input contents, seed, environment) to an artifact, kept under their key.

An artifact is a folder of read-only files with `manifest.json` written last: its presence means that the stage is
whole. Every use checks the files against the manifest's digests; a damaged artifact is said, removed and recomputed.

Several runs may share a store. Who computes a stage holds the lock of its key, which the system frees when the holder
dies; the others make meanwhile what they will need later (`Store.ahead`), wait, and then find the artifact, which
appears whole, by one rename. Weights may be dropped (`store.keep`): the facts stay, and whoever needs the weights has
them computed again, to the same digest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)
journal = logging.getLogger(f"{__name__}.journal")  # one line for each stage started, made, found; to run.log alone
MANIFEST = "manifest.json"
DROPPED = "dropped.json"  # names of files that are not kept; the manifest still has their digests
KEPT = "kept"  # marks weights that a run with store.keep=all wants
RUNS = "runs"  # a lock file for each run that uses the store
USED = ".used-"  # with a run's name, beside weights that it has used
SOURCE = Path(__file__).parent
WEIGHTS = ".safetensors"


class StoreError(RuntimeError):
    """The store cannot be written."""


@dataclass(frozen=True)
class Artifact:
    """A whole stage: its folder, its key, and the facts that its function returned."""

    folder: Path
    key: str
    facts: Mapping[str, Any]
    files: Mapping[str, str]  # name -> sha256

    @property
    def digest(self) -> str:
        """sha256 over the files' names and contents."""
        return hashlib.sha256(json.dumps(dict(self.files), sort_keys=True).encode()).hexdigest()


@dataclass
class Tally:
    """What a run computed and what it found: counts by stage, and seconds."""

    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    seconds: list[dict[str, Any]] = field(default_factory=list)
    seconds_saved: float = 0.0
    seconds_store: float = 0.0  # keys, digests and writing: what the store itself costs


class Store:
    """Artifacts under `root`, one folder a key. Within `with store:` the artifacts that it uses are safe from `prune`.

    `keep` is what becomes of weights: `all` marks them, so that no other run drops them from the store. `ahead` are
    calls of stages that the run will come to and could make at once: runs that share rounds divide these among them.
    """

    def __init__(self, root: Path, environment: Mapping[str, Any], keep: str = "all") -> None:
        self.root, self.environment, self.keep, self.tally = Path(root), dict(environment), keep, Tally()
        self.ahead: list[Callable[[], object]] = []
        self._waits_for, self._is_making = "", False  # the stage that another run makes while this one works ahead
        self._met: set[str] = set()  # keys that the run came to
        self._met_ahead: set[str] = set()  # those that counted then, and do not when it comes to them again
        self._written: dict[Path, str] = {}
        self.run, self._inside = "", 0.0  # seconds in stages so far, those of a stage inside another with the outer
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StoreError(
                f"store.dir: cannot write to {self.root} ({error.strerror}); give another store.dir, or store=none"
            ) from error
        if doubt := locks_in_doubt(self.root):
            log.warning("store.dir: %s", doubt)

    def __enter__(self) -> Store:
        (self.root / RUNS).mkdir(exist_ok=True)
        self.run = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}.lock"
        self.lease = lock_file(self.root / RUNS / self.run)
        self.lease.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.lease.release()
        Path(self.lease.lock_file).unlink(missing_ok=True)

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        compute: Callable[[Path], Mapping[str, Any]],
        *,
        modules: tuple[str, ...],
        whole: bool = False,
    ) -> Artifact:
        """The artifact of stage `name` for these inputs: found, or made by `compute(folder)`.

        `compute` writes its files into the folder and returns facts (JSON); `modules` are the files of the package
        that take part in computing it, as `sft.py`. Of one key, one process at a time computes; others wait for it.
        An artifact whose weights were dropped counts as found, unless it must be `whole`.
        """
        started, before = time.perf_counter(), self._inside
        what = {"stage": name, "source": source_digest(modules), "environment": self.environment, **inputs}
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        folder = self.root / name / key[:2] / key
        seconds = waited = 0.0
        counts, got = self.tally.reused, self._find(folder, key, whole)
        if got is None or not self._mark_used(got):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(folder, name, ahead=not self._is_making) as waited:
                got = self._find(folder, key, whole)  # another may have made it meanwhile
                if got is None:
                    got, seconds = self._make(name, key, folder, compute, what)
                    counts = self.tally.computed
                self._mark_used(got)
        if counts is self.tally.reused:
            journal.info("found %s %s", name, key[:16])
        if key not in (self._met if self._waits_for else self._met_ahead):
            self._count(name, counts, folder, seconds, waited)
            if self._waits_for:
                self._met_ahead.add(key)
        elif not self._waits_for:
            self._met_ahead.discard(key)
        self._met.add(key)
        took = time.perf_counter() - started
        self.tally.seconds_store += took - seconds - waited - (self._inside - before)
        self._inside = before + took
        return got

    def _count(self, name: str, counts: dict[str, int], folder: Path, seconds: float, waited: float) -> None:
        counts[name] = counts.get(name, 0) + 1
        if counts is self.tally.reused:
            with suppress(OSError, ValueError, KeyError):  # a lost duration is no damage
                self.tally.seconds_saved += json.loads((folder / "timing.json").read_text())["seconds"]
        self.tally.seconds.append(
            {"stage": name, "seconds": round(seconds, 4), "reused": counts is self.tally.reused}
            | ({"waited": round(waited, 4)} if waited > 0.05 else {})
        )

    def written(self, file: Path, sha256: str) -> None:
        """Tells the digest of a file that a stage's function has put into its folder, so that it is not read again."""
        self._written[file] = sha256

    def _mark_used(self, artifact: Artifact) -> bool:
        """Notes the use, for `prune` and `drop_weights`; False when the artifact was taken away meanwhile."""
        try:
            with suppress(PermissionError):  # another user's
                os.utime(artifact.folder / MANIFEST)
            if any(file.endswith(WEIGHTS) for file in artifact.files):
                (artifact.folder / (KEPT if self.keep == "all" else f"{USED}{self.run}")).touch()
        except FileNotFoundError:
            return False
        return True

    def drop_weights(self, folder: Path) -> None:
        """Removes an artifact's weights, unless a run with keep=all has used them, or another that is under way: that
        one will do it. Facts and digests stay."""
        if (folder / KEPT).exists() or not list(folder.rglob(f"*{WEIGHTS}")):
            return
        with self._lock(folder, folder.parent.parent.name):
            marks = {mark: mark.name.removeprefix(USED) for mark in folder.glob(f"{USED}*")}
            used = [mark for mark, run in marks.items() if run != self.run and is_held(self.root / RUNS / run)]
            if (folder / KEPT).exists() or not (folder / MANIFEST).exists() or used:
                return
            remove_weights(folder)
            for mark in marks:
                mark.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, folder: Path, name: str, ahead: bool = False) -> Iterator[float]:
        """The key's lock; seconds that the run did nothing but wait for it. While another has it, the run works
        `ahead` where it may: where it holds no lock itself."""
        lock = lock_file(folder.with_name(f"{folder.name}.lock"))
        while True:
            started = time.perf_counter()
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if ahead and self.ahead:
                    self._work_ahead(name, self.ahead.pop(0))
                    continue
                log.info("stage %s is being computed by another run; waiting for it", name)
                lock.acquire(poll_interval=0.05)
            break
        waited = time.perf_counter() - started
        try:
            for left in folder.parent.glob(f"{folder.name}.tmp-{socket.gethostname()}-*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            yield waited
        finally:
            lock.release()  # its file stays, as filelock would have it; `prune` removes it with its artifact

    def _work_ahead(self, name: str, call: Callable[[], object]) -> None:
        """Makes stages that the run will come to. What fails will fail there again, and is said there."""
        started, before, outer = time.perf_counter(), self._inside, self._waits_for
        self._waits_for = name
        try:
            call()
        except Exception as error:
            journal.info("ahead: %s: %s", type(error).__name__, error)
        finally:
            self._waits_for = outer
            self._inside = before + time.perf_counter() - started

    def _make(
        self, name: str, key: str, folder: Path, compute: Callable[[Path], Mapping[str, Any]], what: dict[str, Any]
    ) -> tuple[Artifact, float]:
        """Computes the artifact and puts it in the place of one that is damaged, or has dropped weights."""
        journal.info("started %s %s", name, key[:16])
        if self._waits_for and not self._is_making:
            log.info("stage %s is being computed by another run; meanwhile %s is made", self._waits_for, name)
        former = self._former(folder)
        work = folder.with_name(f"{key}.tmp-{socket.gethostname()}-{os.getpid()}")
        try:
            work.mkdir(parents=True)
            at, before, outer = time.perf_counter(), self._inside, self._is_making
            self._is_making = True
            try:
                facts = dict(compute(work))
            finally:
                self._is_making = outer
            seconds = time.perf_counter() - at - (self._inside - before)  # without stages that it had to compute again
            made = self._seal(work, folder, key, facts, what, seconds, former)
        except Exception as error:
            if is_disk_full(error):
                raise StoreError(
                    f"the disk is full: stage {name!r} could not be written to {self.root}. Finished stages are "
                    "intact; free space or give another store.dir, and run the same command again"
                ) from error
            raise
        finally:
            self._written = {file: sha for file, sha in self._written.items() if work not in file.parents}
            shutil.rmtree(work, ignore_errors=True)
        journal.info("made %s %s in %.2f s", name, key[:16], seconds)
        return made, seconds

    def _find(self, folder: Path, key: str, whole: bool) -> Artifact | None:
        if not (folder / MANIFEST).is_file() or (whole and (folder / DROPPED).is_file()):
            return None
        manifest, problem = examine(folder)
        return None if problem else Artifact(folder, key, manifest["facts"], manifest["files"])

    def _former(self, folder: Path) -> str | None:
        """The digest of an artifact whose weights were dropped; None where there is none, or a damaged one."""
        if not folder.is_dir():
            return None
        manifest, problem = examine(folder)
        if problem:
            log.warning("damaged artifact %s (%s): computing it again, to replace it", folder, problem)
            return None
        return Artifact(folder, "", {}, manifest["files"]).digest

    def _seal(
        self, work: Path, folder: Path, key: str, facts: dict[str, Any], what: dict[str, Any], seconds: float,
        former: str | None,
    ) -> Artifact:  # fmt: skip
        files = sorted(str(f.relative_to(work)) for f in work.rglob("*") if f.is_file())
        digests = {name: self._written.pop(work / name, None) or file_digest(work / name) for name in files}
        made = Artifact(folder, key, facts, digests)
        if former not in (None, made.digest):
            raise StoreError(
                f"stage {what['stage']!r} gave other bytes than before its weights were dropped ({folder}); what was "
                "made from the former ones cannot go on. Use a new store.dir, or store.keep=all"
            )
        (work / "timing.json").write_text(json.dumps({"seconds": seconds}))
        manifest = {"key": key, "files": digests, "facts": facts, "inputs": what}
        (work / MANIFEST).write_text(json.dumps({**manifest, "digest": _digest_manifest(manifest)}))
        for name in [*files, MANIFEST]:
            (work / name).chmod(0o444)
        if theirs := self._find(folder, key, whole=True):  # of another machine that our lock did not reach
            return theirs
        old = work.with_name(f"{work.name}-old")
        with suppress(FileNotFoundError):
            os.replace(folder, old)
        try:
            os.replace(work, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (theirs := self._find(folder, key, True)):
                raise
            made = theirs
        shutil.rmtree(old, ignore_errors=True)
        return made


def remove_weights(folder: Path) -> None:
    """Removes an artifact's weights; to be called under its lock."""
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob(f"*{WEIGHTS}"))
    partial = folder / f"{DROPPED}.tmp"
    partial.write_text(json.dumps(names))
    os.replace(partial, folder / DROPPED)  # first said, then done
    for name in names:
        (folder / name).unlink(missing_ok=True)


def examine(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest of an artifact, and what is wrong with it or with its files (None: whole, or weights dropped)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.pop("digest") != _digest_manifest(manifest):
            return {}, f"{MANIFEST} does not match its digest"
        dropped = json.loads((folder / DROPPED).read_text()) if (folder / DROPPED).is_file() else []
        for name, digest in manifest["files"].items():
            if name not in dropped and file_digest(folder / name) != digest:
                return manifest, f"{name} does not match its digest"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return {}, f"{type(error).__name__}: {error}"
    return manifest, None


def lock_file(path: Path) -> FileLock:
    """A lock that the system frees when its holder dies. Where the file system has no such locks, filelock warns and
    takes a lock by existence, which notices a dead holder on the same machine alone."""
    return FileLock(path)


def is_held(path: Path) -> bool:
    """Whether a process holds this lock."""
    if not path.is_file():
        return False
    lock = lock_file(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@cache
def locks_in_doubt(root: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """What to know about locks between machines when `root` lies on a network file system that has them only locally;
    None where all is well, or cannot be told."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    above = [p.as_posix() for p in (root.resolve(), *root.resolve().parents)]
    mine = [line for line in lines if line[4].replace("\\040", " ") in above]
    if not mine:
        return None
    line = max(mine, key=lambda words: len(words[4]))  # the innermost mount; of several there, the last
    line = [words for words in mine if words[4] == line[4]][-1]
    kind, options = line[line.index("-") + 1], ",".join(line[line.index("-") + 3 :])
    local = {"nfs": ("nolock", "local_lock=all", "local_lock=flock"), "nfs4": ("local_lock=all", "local_lock=flock")}
    loose = any(option in options.split(",") for option in local.get(kind, ()))
    if kind == "lustre":
        loose = "flock" not in options.split(",")
    if kind in ("cifs", "smb3"):
        loose = "nobrl" in options.split(",")
    if not loose:
        return None
    return (
        f"{root} is on {kind}, mounted so that locks do not reach other machines: runs on several machines may compute "
        "the same stage twice (results stay right: an artifact appears whole, by one rename). Mount it with locks, or "
        "give a store.dir to each machine"
    )


def _digest_manifest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that no space is left (safetensors says it in words, without an errno)."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def place(source: Path, target: Path, link: bool = True) -> None:
    """Puts a file into a run folder: a hard link where it may be one and the file system allows, else a copy.

    Files of artifacts are read-only and may be linked; a user's own model may not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        if not link:
            raise OSError
        os.link(source, target)
    except OSError:
        partial = target.with_name(target.name + ".tmp")
        shutil.copyfile(source, partial)
        os.replace(partial, target)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def source_digest(modules: tuple[str, ...]) -> str:
    """sha256 over the named files of the package (a folder stands for its *.py files)."""
    sha = hashlib.sha256()
    for module in modules:
        path = SOURCE / module
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            sha.update(file.name.encode() + file.read_bytes())
    return sha.hexdigest()


def cpu_flags() -> dict[str, bool]:
    """The bfloat16 instructions of an x86 CPU, which torch's cpu_capability does not tell; empty on others."""
    import torch

    able = getattr(torch.cpu, "get_capabilities", dict)()
    return {flag: bool(able[flag]) for flag in ("amx_bf16", "avx512_bf16") if flag in able}


def environment(device: str, threads: int) -> dict[str, Any]:
    """What floating-point results depend on besides code and inputs."""
    import torch

    return {
        **{p: version(p) for p in ("torch", "transformers", "tokenizers", "pytorch-lightning", "numpy")},
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": cpu_flags(),
        "threads": threads,
    }

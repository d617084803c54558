"""Stages: pure functions from (config slice, input contents, seed, environment) to an artifact, kept under their key.

An artifact is a folder of read-only files with `manifest.json` written last: its presence means that the stage is
whole. Every use checks the files against the manifest's digests; a damaged artifact is said, removed and recomputed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
SOURCE = Path(__file__).parent


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
    """Artifacts under `root`, one folder a key."""

    def __init__(self, root: Path, environment: Mapping[str, Any]) -> None:
        self.root, self.environment, self.tally = Path(root), dict(environment), Tally()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise StoreError(
                f"store.dir: cannot write to {self.root} ({error.strerror}); give another store.dir, or store=none"
            ) from error

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        compute: Callable[[Path], Mapping[str, Any]],
        *,
        modules: tuple[str, ...],
    ) -> Artifact:
        """The artifact of stage `name` for these inputs: found, or made by `compute(folder)`.

        `compute` writes its files into the folder and returns facts (JSON); `modules` are the files of the package
        that take part in computing it, as `sft.py`.
        """
        started = time.perf_counter()
        what = {"stage": name, "source": source_digest(modules), "environment": self.environment, **inputs}
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        folder = self.root / name / key[:2] / key
        found = self._find(folder, key)
        if found is not None:
            self._count(name, self.tally.reused, 0.0, started)
            with suppress(OSError, ValueError, KeyError):  # a lost duration is no damage
                self.tally.seconds_saved += json.loads((folder / "timing.json").read_text())["seconds"]
            return found
        work = folder.with_name(f"{key}.tmp{os.getpid()}")
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
            at = time.perf_counter()
            facts = dict(compute(work))
            seconds = time.perf_counter() - at
            made = self._seal(work, folder, key, facts, what, seconds)
        except Exception as error:
            if is_disk_full(error):
                raise StoreError(
                    f"the disk is full: stage {name!r} could not be written to {self.root}. Finished stages are "
                    "intact; free space or give another store.dir, and run the same command again"
                ) from error
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._count(name, self.tally.computed, seconds, started)
        return made

    def _count(self, name: str, counts: dict[str, int], seconds: float, started: float) -> None:
        counts[name] = counts.get(name, 0) + 1
        self.tally.seconds.append({"stage": name, "seconds": round(seconds, 4), "reused": counts is self.tally.reused})
        self.tally.seconds_store += time.perf_counter() - started - seconds

    def _find(self, folder: Path, key: str) -> Artifact | None:
        if not folder.is_dir():
            return None
        problem = None
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if manifest.pop("digest") != _digest_manifest(manifest):
                raise ValueError(f"{MANIFEST} does not match its digest")
            for name, digest in manifest["files"].items():
                if file_digest(folder / name) != digest:
                    problem = f"{name} does not match its digest"
                    break
            else:
                return Artifact(folder, key, manifest["facts"], manifest["files"])
        except (OSError, ValueError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        log.warning("damaged artifact %s (%s): removed, computing it again", folder, problem)
        shutil.rmtree(folder)
        return None

    def _seal(
        self, work: Path, folder: Path, key: str, facts: dict[str, Any], what: dict[str, Any], seconds: float
    ) -> Artifact:
        files = sorted(str(f.relative_to(work)) for f in work.rglob("*") if f.is_file())
        digests = {name: file_digest(work / name) for name in files}
        (work / "timing.json").write_text(json.dumps({"seconds": seconds}))
        manifest = {"key": key, "files": digests, "facts": facts, "inputs": what}
        (work / MANIFEST).write_text(json.dumps({**manifest, "digest": _digest_manifest(manifest)}))
        for name in [*files, MANIFEST]:
            (work / name).chmod(0o444)
        try:
            os.replace(work, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            log.info("stage %s was made by another run at the same time; that one is kept", folder.parent.parent.name)
            if theirs := self._find(folder, key):
                return theirs
        return Artifact(folder, key, facts, digests)


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

"""Checkpoints merged into one folder, under the law of `merging.law`.

What `itermerge-merge base=A tuned=B merge=RULE out=C` does. Pieces of mapped tensors are merged, cast and written to
their place in safetensors files whose headers are known beforehand, so that no rule needs memory for a model (a user's
own function takes whole tensors). Work is in `C.partial`, with a journal: after a kill the same command goes on, to the
same bytes, and `C` appears whole, by one rename.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
from filelock import Timeout
from rich.table import Table
from torch import Tensor

from . import recipes
from .config import Between, ConfigError, bytes_of
from .merging import Merge, MergeError, tensor_ratios
from .merging.law import PIECE
from .rules import method_of, source_of
from .store import StoreError, is_disk_full, lock_file, source_digest
from .tracking import console, progress
from .weights import (
    DTYPES,
    WEIGHT_FILES,
    WEIGHTS_FILE,
    Checkpoint,
    PolicyError,
    comparable,
    header_of,
    is_vocabulary,
    place_of,
    resolve,
    tied_to,
)  # fmt: skip

JOURNAL = "journal.jsonl"
SYNC = 1 << 28  # bytes written between two entries of the journal, which a kill costs at most
SAMPLE = 1 << 22  # weights that a plan measures the time of
TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the output stands; `begin` counts the bytes of its file."""

    stored: str  # as the file calls it
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    begin: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Job:
    """A merge, checked and laid out, before anything is written. Raises ConfigError, PolicyError or MergeError.

    `base` and `tuned` have the tensors that are merged, under the same names; `slots` has, for each, its places in the
    output: two where a file holds the embeddings again as a tied head.
    """

    def __init__(self, cfg: Between, typed: Sequence[str] = ()) -> None:
        self.cfg, self.typed, self.out = cfg, list(typed), Path(cfg.out).expanduser()
        check_out(self.out)
        self.keys = ["tuned"] if len(cfg.tuned) == 1 else [f"tuned[{i}]" for i in range(len(cfg.tuned))]
        given = {"base": cfg.base, **dict(zip(self.keys, cfg.tuned, strict=True))}
        folders = {key: resolve(path, key=key) for key, path in given.items()}
        for key, folder in folders.items():
            if self.out.resolve().is_relative_to(folder):
                raise ConfigError(f"out: {self.out} is inside {key}={given[key]}; give a folder of its own")
        self.folder = folders[self.keys[0]]
        if not (self.folder / "config.json").is_file():
            raise PolicyError(f"{self.keys[0]}: {self.folder} has no config.json; expected a Hugging Face model folder")
        self.inputs = {key: Checkpoint(folder) for key, folder in folders.items()}
        self.whole = self.inputs[self.keys[0]]  # its names, files and dtypes are those of the output
        for key, model in self.inputs.items():
            check_dtypes(key, model)
        self.notes: list[str] = []
        self.base, self.tuned = self._compared()
        for name in self.base:
            kinds = {DTYPES[model.dtypes[name]].is_floating_point for model in (self.base, *self.tuned)}
            if len(kinds) > 1:
                said = ", ".join(f"{m.dtypes[name]} in {m.files[name]}" for m in (self.base, *self.tuned))
                raise PolicyError(f"{name}: is {said}; quantised weights cannot be merged, save a dequantised copy")
        policy = cfg.merge.policy
        modules = [(m["match"], m["factor"]) for m in policy.modules]
        self.ratios = tensor_ratios(self.base, cfg.merge.ratio, layers=policy.layers, modules=modules)
        self.slots, self.headers = self._layout()
        self.others, left_out = other_files(self.folder)
        if left_out:
            self.notes.append(f"not copied from {cfg.tuned[0]}: {', '.join(left_out)}")
        self.method = method_of(cfg.merge)
        self.merge()  # what the law refuses is refused now

    def merge(self) -> Merge:
        return Merge(self.method, self.base, self.tuned, self.ratios, seed=self.cfg.merge.seed or 0)

    def _compared(self) -> tuple[Checkpoint, list[Checkpoint]]:
        base, models = self.inputs["base"], {key: self.inputs[key] for key in self.keys}
        rows = {key: {m.shapes[n] for n in m if is_vocabulary(n)} for key, m in models.items()}
        for key in self.keys[1:]:
            if rows[key] != rows[self.keys[0]]:
                raise PolicyError(
                    f"{key} and {self.keys[0]} have embeddings of other shapes ({sorted(rows[key])} and "
                    f"{sorted(rows[self.keys[0]])}); merge them with the base one at a time, or give both one size "
                    "with transformers' resize_token_embeddings"
                )
        try:
            for key, model in models.items():  # until the base has what all of them have
                base, _, notes = comparable(base, model, key, common_rows=True)
                self.notes += [note for note in notes if note not in self.notes]
            return base, [comparable(base, model, key, common_rows=True)[1] for key, model in models.items()]
        except PolicyError as error:
            kinds = [f"{key}, {model.folder}, is a {kind_of(model.folder)}" for key, model in self.inputs.items()]
            raise PolicyError(f"{error} ({'; '.join(kinds)})") from error

    def _layout(self) -> tuple[dict[str, list[Slot]], dict[str, bytes]]:
        """(places of each merged tensor, header of each file)"""
        names = {stored: name for name, stored in self.tuned[0].stored.items()}
        for head in [n for n in self.whole if place_of(n)[0] == "head" and n not in names]:
            names[head] = names[tied_to(self.whole, head) or ""]
            self.notes.append(f"{head} of the output is the merged embeddings again, as in {self.cfg.tuned[0]}")
        dtypes = {stored: DTYPES[self.whole.dtypes[stored]] for stored in names}
        if self.cfg.dtype is not None:
            asked = getattr(torch, self.cfg.dtype)
            dtypes = {stored: asked if old.is_floating_point else old for stored, old in dtypes.items()}
        slots = [Slot(s, dtypes[s], self.whole.shapes[s], self.whole.files[s].name) for s in sorted(names)]
        placed, headers = lay_out(in_shards(slots, self.cfg.shard_size))
        out: dict[str, list[Slot]] = {}
        for slot in placed:
            out.setdefault(names[slot.stored], []).append(slot)
        return out, headers

    @property
    def placed(self) -> list[Slot]:
        return [slot for slots in self.slots.values() for slot in slots]

    def size_of(self, file: str) -> int:
        """Bytes of a file of weights."""
        return len(self.headers[file]) + sum(slot.size for slot in self.placed if slot.file == file)

    @property
    def size(self) -> int:
        """Bytes of the folder, but for the few that describe it."""
        weights = sum(slot.size for slot in self.placed) + sum(map(len, self.headers.values()))
        return weights + sum((self.folder / name).stat().st_size for name in self.others)

    @property
    def workers(self) -> int:
        """Tensors at a time: one where equal magnitudes are counted in name order."""
        return 1 if self.method.scope == "model" else self.cfg.threads

    def identity(self) -> str:
        """What the bytes of the output depend on, as a digest: what is begun goes on only if it is the same."""
        files = {key: [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files_of(model)]
                 for key, model in self.inputs.items()}  # fmt: skip
        code = source_digest(("merging", "weights.py", "checkpoints.py")), source_of(self.cfg.merge)
        what = [recipes.recipe(self), files, code, [version(p) for p in ("torch", "numpy")], sorted(self.others)]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def merge(cfg: Between, typed: Sequence[str] = ()) -> None:
    """Makes the folder `out`, or shows the plan; `typed` is the command line, for the card. Raises ConfigError,
    PolicyError or MergeError for what cannot be merged, StoreError where the disk is too small."""
    torch.set_num_threads(1)  # cfg.threads are tensors at a time, which leaves the bits alone
    job = Job(cfg, typed)
    for note in job.notes:
        log.warning("%s", note)
    if cfg.plan:
        show_plan(job)
        return
    partial = job.out.with_name(f"{job.out.name}.partial")
    with _alone(partial, job.out):
        begun = _begin(job, partial)
        folder = partial / "model"
        try:
            _write_weights(job, folder, begun)
            _write_others(job, folder)
        except OSError as error:
            if is_disk_full(error):
                raise StoreError(
                    f"the disk is full: {partial} could not be written whole, {_mib(job.size)} in all. Free space, and "
                    "run the same command again: it goes on from what is written"
                ) from error
            raise
        for file in [*folder.rglob("*"), folder]:
            _sync(file)
        (partial / JOURNAL).unlink()
        folder.rename(job.out)
        _sync(job.out.parent)
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"folder {cfg.out}: {len(job.placed)} tensors, {_mib(job.size)}", soft_wrap=True, highlight=False)


def check_out(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"out: {out} exists already, and is never overwritten; give another out")


def check_dtypes(key: str, model: Checkpoint) -> None:
    for name, dtype in model.dtypes.items():
        if dtype not in DTYPES:
            raise PolicyError(
                f"{name}: {key} ({model.files[name]}) has it in {dtype}, which cannot be merged (known: "
                f"{', '.join(DTYPES)}); save a dequantised copy, in bfloat16, and merge that"
            )


def files_of(model: Checkpoint) -> list[Path]:
    return sorted(set(model.files.values()))


def kind_of(folder: Path) -> str:
    """The architecture that a folder's config names."""
    with suppress(OSError, ValueError, AttributeError):
        return str(json.loads((folder / "config.json").read_text()).get("model_type"))
    return "model without a config.json"


def other_files(folder: Path) -> tuple[list[str], list[str]]:
    """(what is copied byte for byte, what is not): a tokenizer, configs, code, licences are, other weights and folders
    are not."""
    files = [f.relative_to(folder).as_posix() for f in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")])
             if f.is_file()]  # fmt: skip
    copied = [f for f in files if not f.endswith(WEIGHT_FILES) and f not in recipes.MADE and not f.startswith(".")]
    ours = {file.name for file in files_of(Checkpoint(folder))}
    left = [f for f in files if f.endswith(WEIGHT_FILES) and f not in ours and not f.endswith(".index.json")]
    left += [f"{d.name}/" for d in sorted(folder.iterdir())
             if d.is_dir() and d.name != TEMPLATES and not d.name.startswith(".")]  # fmt: skip
    return copied, left


def in_shards(slots: Sequence[Slot], limit: Any) -> list[Slot]:
    """The files' names: as many as they are now, or files of at most `limit` bytes, filled in name order."""
    if limit is None:
        single = len({slot.file for slot in slots}) == 1
        return [replace(slot, file=WEIGHTS_FILE) if single else slot for slot in slots]
    sizes: list[list[Slot]] = [[]]
    room = bytes_of(limit, "shard_size")
    for slot in slots:
        if sizes[-1] and sum(s.size for s in sizes[-1]) + slot.size > room:
            sizes.append([])
        sizes[-1].append(slot)
    count = len(sizes)
    return [
        replace(s, file=WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
        for number, shard in enumerate(sizes, 1) for s in shard
    ]  # fmt: skip


def lay_out(slots: Sequence[Slot]) -> tuple[list[Slot], dict[str, bytes]]:
    """(slots with their places, {file: header})."""
    placed: list[Slot] = []
    headers: dict[str, bytes] = {}
    for file in sorted({slot.file for slot in slots}):
        mine = {slot.stored: slot for slot in slots if slot.file == file}
        headers[file], begins = header_of({name: (slot.dtype, slot.shape) for name, slot in mine.items()})
        placed += [replace(mine[name], begin=begin) for name, begin in begins.items()]
    return placed, headers


# --- the work ---------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(partial: Path, out: Path) -> Iterator[None]:
    """Holds the lock of what is being made."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: cannot make {partial} ({error.strerror})") from error
    if foreign := [f.name for f in partial.iterdir() if f.name not in (".lock", JOURNAL, "model")]:
        raise ConfigError(f"out: {partial}, where the work would be, holds {foreign[0]}; remove it or give another out")
    lock = lock_file(partial / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"out: another process is making {out}; wait for it, or give another out") from None
    try:
        check_out(out)
        yield
    finally:
        lock.release()


def _begin(job: Job, partial: Path) -> _Journal:
    """The journal of what is there already: of the same merge, else a new one. Raises StoreError where the disk has not
    the space for the rest."""
    journal = _Journal(partial / JOURNAL, job.identity())
    if journal.found and not _has_files(job, partial / "model"):
        journal.forget()
    if journal.done or journal.state:
        log.info("going on in %s: %d of %d tensors are written", partial, len(journal.done), len(job.slots))
    elif journal.found:
        log.warning("%s was begun with another config, other inputs or another version; starting anew", partial)
    if not journal.done:
        shutil.rmtree(partial / "model", ignore_errors=True)
    there = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file())
    free, needed = shutil.disk_usage(partial).free, job.size - there
    if free < needed:
        raise StoreError(
            f"out: {job.out} needs {_mib(needed)} of disk, and {_mib(free)} are free at {partial.parent}; free space, "
            "give another out, or a smaller dtype"
        )
    return journal


def _has_files(job: Job, folder: Path) -> bool:
    """Whether the files that a journal speaks of are there, with their sizes."""
    files = {name: folder / name for name in job.headers}
    return all(file.is_file() and file.stat().st_size == job.size_of(name) for name, file in files.items())


class _Journal:
    """Which tensors are whole on the disk, a line each, and what a rule over the whole model needs to go on."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.lock, self.unsynced = path, Lock(), 0
        self.done: list[str] = []
        self.state: list[list[int]] | None = None
        self.lines: list[dict[str, Any]] = []
        self.found = path.is_file()
        self.identity = identity
        if not self._read(identity):
            self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self.done, self.state = [], None
        self.path.write_text(json.dumps({"identity": self.identity}) + "\n")

    def _read(self, identity: str) -> bool:
        if not self.found:
            return False
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or lines[0] != {"identity": identity}:
            return False
        self.path.write_text(whole)
        self.done = [line["done"] for line in lines[1:] if line["done"]]
        self.state = lines[-1].get("state")
        return True

    def add(self, name: str | None, size: int, state: list[list[int]] | None, files: Mapping[str, int]) -> None:
        with self.lock:
            self.lines.append({"done": name, "state": state})
            self.unsynced += size
            if self.unsynced >= SYNC:
                self.flush(files)

    def flush(self, files: Mapping[str, int]) -> None:
        """The journal says what is on the disk, whatever happens then."""
        for file in files.values():
            os.fsync(file)
        with self.path.open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in self.lines)
            out.flush()
            os.fsync(out.fileno())
        self.lines, self.unsynced = [], 0


def _write_weights(job: Job, folder: Path, journal: _Journal) -> None:
    folder.mkdir(exist_ok=True)
    files = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666) for name in job.headers}
    try:
        for name, header in job.headers.items():
            _put(files[name], header, 0)
            os.truncate(files[name], job.size_of(name))
        works: SimpleQueue[Merge] = SimpleQueue()
        for _ in range(job.workers):
            works.put(_prepared(job, journal, files))

        def one(name: str) -> None:
            work = works.get()
            try:
                write_tensor(job, work, name, files)
                journal.add(name, sum(slot.size for slot in job.slots[name]), work.state(), files)
            finally:
                works.put(work)

        todo = [name for name in sorted(job.slots) if name not in set(journal.done)]
        with progress("merging tensors", len(todo)) as tick, ThreadPoolExecutor(job.workers) as pool:
            for _ in pool.map(one, todo):
                tick(1)
        journal.flush(files)
    finally:
        for file in files.values():
            os.close(file)


def _prepared(job: Job, journal: _Journal, files: Mapping[str, int]) -> Merge:
    work = job.merge()
    if journal.state:
        work.restore(journal.state)
    elif job.method.scope == "model":
        total = sum(math.prod(shape) for shape in job.base.shapes.values())
        reads = 2 * len(job.tuned)  # of all tensors, in steps of a million weights
        with progress("looking at all weights, in millions", reads * total // 10**6) as tick:
            seen = [0]

            def on_piece(weights: int) -> None:
                seen[0] += weights
                tick(seen[0] // 10**6)
                seen[0] %= 10**6

            work.prepare(on_piece)
        journal.add(None, SYNC, work.state(), files)
    return work


def write_tensor(job: Job, work: Merge, name: str, files: Mapping[str, int]) -> None:
    """The merged pieces of a tensor at their places in the files, and the rows that only the tuned model has."""
    slots = job.slots[name]
    try:
        for begin, _, piece in work.pieces(name):
            _put_piece(files, slots, begin, piece)
    except MergeError as error:
        where = [str(model.files[name]) for model in (job.base, *job.tuned)]
        raise MergeError(str(error) if where[0] in str(error) else f"{error} ({', '.join(where)})") from error
    merged, total = math.prod(job.base.shapes[name]), math.prod(slots[0].shape)
    rest = job.whole[slots[0].stored].reshape(-1)
    for begin in range(merged, total, PIECE):
        _put_piece(files, slots, begin, rest[begin : begin + PIECE])


def _put_piece(files: Mapping[str, int], slots: Sequence[Slot], begin: int, piece: Tensor) -> None:
    for slot in slots:
        cast = piece.to(slot.dtype)
        if slot.dtype == torch.float16 and piece.dtype != torch.float16 and not torch.isfinite(cast).all():
            raise MergeError(
                f"{slot.stored}: has values that float16 cannot hold (above 65504); use dtype=bfloat16 or float32"
            )
        _put(files[slot.file], cast.view(torch.uint8).numpy().data, slot.begin + begin * slot.dtype.itemsize)


def _put(file: int, data: bytes | memoryview, at: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(file, left, at)
        left, at = left[count:], at + count


def _write_others(job: Job, folder: Path) -> None:
    """What a Hugging Face folder has beside its weights."""
    for name in job.others:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(job.folder / name, folder / name)
    if job.cfg.dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        for key in {"torch_dtype", "dtype"} & config.keys() or {"dtype"}:
            config[key] = job.cfg.dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(job.headers) > 1:
        total = {"total_size": sum(slot.size for slot in job.placed)}
        index = {"metadata": total, "weight_map": {slot.stored: slot.file for slot in job.placed}}
        (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    recipes.write(job, folder)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# --- the plan ---------------------------------------------------------------------------------------------------------


def show_plan(job: Job) -> None:
    """What would be done, as a table on the console, and how long the arithmetic would take."""
    table = Table(title="plan", title_justify="left", padding=(0, 0))
    for column in ("row", "tensors", "parameters", "ratio"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row, names in recipes.by_row(job).items():
        weights = sum(math.prod(job.base.shapes[n]) for n in names)
        table.add_row(row, str(len(names)), f"{weights:,}", recipes.ratio_said([job.ratios[n] for n in names]))
    console.print(table)
    seconds, memory = estimate(job)
    shards: dict[str, int] = {}
    for slot in job.placed:
        shards[slot.file] = shards.get(slot.file, 0) + slot.size
    dtypes = sorted({str(slot.dtype).removeprefix("torch.") for slot in job.placed})
    parent = next(p for p in job.out.resolve().parents if p.is_dir())
    said = {
        "out": f"{job.cfg.out}: {len(shards)} file{'s' * (len(shards) > 1)} of weights, {_mib(job.size)} in all",
        "dtype": ", ".join(dtypes),
        "files": ", ".join(f"{name} {_mib(size)}" for name, size in shards.items()),
        "copied": ", ".join(job.others),
        "notes": "; ".join(job.notes) or "nothing is left out",
        "time": f"about {seconds:.0f} s of reading and arithmetic, measured on a sample; and what writing takes",
        "memory": f"about {_mib(memory)} of its own, beside mapped files" if memory else "not known on this system",
        "disk": f"{_mib(shutil.disk_usage(parent).free)} free at {parent}",
    }
    for key, text in said.items():
        console.print(f"{key}: {text}", soft_wrap=True, highlight=False, markup=False)


def estimate(job: Job) -> tuple[float, int]:
    """(seconds, bytes of private memory), from the first rows of the tensor that half of all weights stand before."""
    sizes = {n: math.prod(job.base.shapes[n]) for n in job.base}
    total, before = sum(sizes.values()), 0
    name = next(iter(sizes))
    for n in sorted(sizes, key=lambda n: sizes[n]):
        before += sizes[n]
        if 2 * before >= total:
            name = n
            break
    others = job.base.keys() - {name}
    rows = {name: max(1, SAMPLE * job.base.shapes[name][0] // max(1, sizes[name]))} if job.base.shapes[name] else {}
    rows = {n: min(count, job.base.shapes[n][0]) for n, count in rows.items()}
    base, *tuned = [model.without(others)[0].first_rows(rows) for model in (job.base, *job.tuned)]
    work = Merge(replace(job.method, scope="tensor"), base, tuned, {name: job.ratios[name]}, seed=0)
    started = time.perf_counter()
    for _, _, piece in work.pieces(name):
        piece.to(job.slots[name][0].dtype)
    took = time.perf_counter() - started
    sampled = math.prod(base.shapes[name])
    memory = _private_memory()
    if memory and job.method.function is not None:
        memory += 4 * max(sizes.values()) * (2 + 2 * len(tuned)) * job.workers
    return took / max(1, sampled) * total / job.workers, memory


def _private_memory() -> int:
    """Bytes that this process has to itself; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    return 0


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"

"""What keeps a store usable: its list, its check, its pruning (`itermerge-store`), and disk space before costly work.

    itermerge-store list [--stage fit] [--sort size|age]
    itermerge-store verify [--remove]
    itermerge-store prune --older-than 30d [--stage sample] [--weights] [--dry-run]

Imports no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from rich.console import Console
from rich.table import Table

from .config import ModelLab, Root, is_vanilla
from .store import MANIFEST, RUNS, WEIGHTS, StoreError, examine, is_held, lock_file, locks_in_doubt, remove_weights

KEEP_ALL_UP_TO = 256 * 2**20  # bytes of float32 weights up to which store.keep=auto means all
UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}
STAGES = (
    "sample", "verify", "fit", "merge", "evaluate", "held_out", "probe", "solutions_ood", "importance", "update",
    "analyze", "search",
)  # fmt: skip


# --- disk space before a run or a sweep ----------------------------------------------------------------------------


def keep_of(cfg: Root, size: int) -> str:
    """What `store.keep` means for a model of `size` bytes in float32: all, last or none."""
    if cfg.store.keep != "auto":
        return cfg.store.keep
    return "all" if size <= KEEP_ALL_UP_TO else "last"


def need(runs: Sequence[tuple[Root, int]], workers: int = 1) -> tuple[int, int]:
    """Upper bounds, in bytes, of the weights that runs (config, bytes of one model) put into the store and, where those
    cannot be hard links to it, into their run folders. Runs that differ in `rounds` alone are one chain, whose stages
    they share, unless store=none; `workers` of them run at a time."""
    chains: dict[str, list[tuple[Root, int]]] = {}
    for number, (cfg, size) in enumerate(runs):
        plain = dataclasses.asdict(cfg)
        own = ("rounds", "sweep", "store", "paths", "logger", "optimized_metric", "export")
        chain = {k: v for k, v in plain.items() if k not in own} | {"number": number if cfg.store.kind == "none" else 0}
        chains.setdefault(json.dumps(chain, sort_keys=True), []).append((cfg, size))
    store = run = in_hand = 0
    for group in chains.values():
        (cfg, size), lengths = group[0], [c.rounds for c, _ in group]
        copies = 1 if is_vanilla(cfg.merge) else 2  # there the merged model is the tuned one
        keep = keep_of(cfg, size)
        # in half models: a round's update is half a model; under `last` fit and update of round 1 stay as well
        halves = {"all": max(lengths) * (2 * copies + 1), "last": 3 * len(group) + 3, "none": 0}[keep]
        store += size * halves // 2
        run += size * {"all": sum(lengths), "last": len(group), "none": 0}[keep]
        history = max(lengths) if getattr(cfg.merge, "anchor", "base") == "mean" and keep != "all" else 0
        history += 2 * max(lengths) if getattr(cfg.merge, "over", "tuned") == "rounds" and keep != "all" else 0
        in_hand = max(in_hand, (4 + history) * size)  # a round's start, tuned and merged model, and two updates
    return store + workers * in_hand, run


def check_space(runs: Sequence[tuple[Root, int]], store: Path, folder: Path, workers: int = 1) -> None:
    """Raises StoreError, with the ways out, when the weights of these runs would not fit on the disks of the store and
    of the run folders."""
    if not runs or not all(cfg.store.check_space for cfg, _ in runs):
        return
    into_store, into_runs = need(runs, workers)
    store, folder = _existing(store), _existing(folder)
    wanted = {store: into_store}
    runs_at = store
    if store.stat().st_dev != folder.stat().st_dev:
        wanted[runs_at := folder] = into_runs
    wanted[runs_at] += sum(len(c.export.rounds) * size // (1 if c.export.dtype == "float32" else 2) for c, size in runs)
    for place, amount in wanted.items():
        free = shutil.disk_usage(place).free
        if amount > free:
            (cfg, size) = max(runs, key=lambda run: run[1])
            raise StoreError(
                f"store.keep: the weights of {len(runs)} run{'s' * (len(runs) > 1)} may need {size_said(amount)} at "
                f"{place}, where {size_said(free)} are free (one model has {size_said(size)}; store.keep is "
                f"{keep_of(cfg, size)!r}). Use store.keep=last or none, another store.dir, or free space with: "
                "itermerge-store prune; store.check_space=false skips this estimate, which counts as missing what is "
                "there already"
            )


def weights_size(cfg: Root) -> int | None:
    """Bytes of the model's weights in float32, from the headers of its files; None for one that is not here yet."""
    if isinstance(cfg.model, ModelLab):
        shipped = Path(__file__).parent / "lab" / f"seed{cfg.model.seed}"
        folder = shipped if shipped.is_dir() else Path(cfg.paths.models).expanduser() / f"lab-seed{cfg.model.seed}"
    else:
        folder = Path(cfg.model.path).expanduser()
    files = sorted(folder.glob(f"*{WEIGHTS}")) if folder.is_dir() else []
    return sum(map(_elements, files)) * 4 if files else None


def _elements(file: Path) -> int:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for side in tensor["shape"]:
                count *= side
            total += count
    return total


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


# --- the store's artifacts -----------------------------------------------------------------------------------------


def default_store() -> Path:
    """store.dir of a config without overrides."""
    return Path(os.environ.get("ITERMERGE_HOME", "~/.cache/itermerge")).expanduser() / "store"


@dataclass(frozen=True)
class Kept:
    """An artifact as it lies there: bytes of its files, those of them that run folders hold too, time of last use."""

    folder: Path
    stage: str
    size: int
    linked: int
    used: float

    def inputs(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / MANIFEST).read_text())["inputs"]
        except (OSError, ValueError, KeyError):
            return {}


def artifacts(root: Path) -> Iterator[Kept]:
    """The artifacts under `root`, finished or damaged."""
    for folder in sorted(root.glob("*/??/*")):
        if not folder.is_dir() or ".tmp" in folder.name or len(folder.name) != 64:
            continue
        try:
            stats = [f.stat() for f in folder.rglob("*") if f.is_file()]
            manifest = folder / MANIFEST
            used = manifest.stat().st_mtime if manifest.is_file() else folder.stat().st_mtime
        except FileNotFoundError:  # a run is about to replace or drop it
            continue
        linked = sum(s.st_size for s in stats if s.st_nlink > 1)
        yield Kept(folder, folder.parent.parent.name, sum(s.st_size for s in stats), linked, used)


def verify(root: Path) -> list[tuple[Kept, str]]:
    """The damaged artifacts, and what is wrong with each."""
    found = ((kept, examine(kept.folder)[1]) for kept in artifacts(root))
    return [(kept, problem) for kept, problem in found if problem]


def oldest_run(root: Path) -> float | None:
    """When the longest-running of the runs that use the store now began; None when there is none."""
    files = list((root / RUNS).glob("*.lock"))
    starts = [file.stat().st_mtime for file in files if is_held(file)]
    return min(starts, default=None)


def prune(
    root: Path, older: float, *, stage: str | None = None, weights: bool = False, dry_run: bool = False
) -> tuple[list[Kept], int]:
    """Removes artifacts not used for `older` seconds (with `weights`: only their weights); those removed, and the
    number of leftovers of killed runs that were removed as well. What a run that is under way has used stays."""
    running = oldest_run(root)
    limit = min(time.time() - older, running if running is not None else float("inf"))
    removed = []
    for kept in artifacts(root):
        if kept.used > limit or (stage and kept.stage != stage):
            continue
        if weights and not list(kept.folder.rglob(f"*{WEIGHTS}")):
            continue
        if not dry_run and not _remove(kept, limit, weights):
            continue
        removed.append(kept)
    ours = "*" if locks_in_doubt(root) is None else f"{socket.gethostname()}-*"  # others' may be at work unseen
    left = [f for f in root.glob(f"*/??/*.tmp-{ours}") if f.stat().st_mtime <= limit]
    if not dry_run:
        for file in (root / RUNS).glob("*.lock"):
            if not is_held(file):  # of a run that was killed
                file.unlink(missing_ok=True)
        for folder in left:
            with_lock = lock_file(folder.with_name(f"{folder.name.partition('.tmp')[0]}.lock"))
            try:
                with with_lock.acquire(timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
            except Timeout:  # not a leftover: it is being computed
                continue
        for file in root.glob("*/??/*.lock"):  # of artifacts that are gone
            if not file.with_suffix("").exists():
                try:
                    with lock_file(file).acquire(timeout=0):
                        file.unlink(missing_ok=True)
                except Timeout:
                    continue
    return removed, len(left)


def _remove(kept: Kept, limit: float, weights: bool = False, damaged: bool = False) -> bool:
    """Under the key's lock, and only if it was not used meanwhile, or is still damaged."""
    folder = kept.folder
    try:
        with lock_file(folder.with_name(f"{folder.name}.lock")).acquire(timeout=0):
            manifest = folder / MANIFEST
            if manifest.is_file() and manifest.stat().st_mtime > limit:
                return False
            if damaged and examine(folder)[1] is None:
                return False
            if weights:
                remove_weights(folder)
            else:
                gone = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-pruned")
                os.replace(folder, gone)  # never half an artifact under its key
                shutil.rmtree(gone)
            return True
    except (Timeout, FileNotFoundError):
        return False


# --- the command ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """`itermerge-store`: exit status 1 when `verify` finds damage."""
    parser = argparse.ArgumentParser(
        prog="itermerge-store", description="Lists, checks and prunes the store of finished stages."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, default=default_store(), help="the store (default: %(default)s)")
    common.add_argument("--stage", choices=STAGES, help="only this stage")
    verbs = parser.add_subparsers(dest="verb", required=True)
    lister = verbs.add_parser("list", parents=[common], help="size, last use, stage and config of each artifact")
    lister.add_argument("--sort", choices=("age", "size"), default="age")
    checker = verbs.add_parser("verify", parents=[common], help="compares all files with their digests")
    checker.add_argument("--remove", action="store_true", help="removes what is damaged; runs compute it again")
    pruner = verbs.add_parser("prune", parents=[common], help="removes what has not been used for a while")
    pruner.add_argument("--older-than", type=_age, required=True, help="since its last use: 12h, 30d, 8w, 0s for all")
    pruner.add_argument("--weights", action="store_true", help="removes weights alone: facts and samples stay")
    pruner.add_argument("--dry-run", action="store_true", help="says what would go, and removes nothing")
    args = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=200)
    if not args.dir.is_dir():
        print(f"error: --dir: there is no store at {args.dir}", file=sys.stderr)
        sys.exit(2)
    if args.verb == "list":
        console.print(_table(args.dir, args.stage, args.sort, console.width))
    elif args.verb == "verify":
        damaged = [(k, p) for k, p in verify(args.dir) if args.stage in (None, k.stage)]
        for kept, problem in damaged:
            console.print(f"damaged: {kept.stage} {kept.folder.name[:16]} ({problem})", soft_wrap=True)
            if args.remove:
                _remove(kept, float("inf"), damaged=True)
        total = sum(args.stage in (None, kept.stage) for kept in artifacts(args.dir))
        if args.remove:
            console.print(f"{len(damaged)} removed, {total} whole")
        else:
            console.print(f"{len(damaged)} of {total} artifacts damaged")
        sys.exit(1 if damaged else 0)
    else:
        gone, left = prune(
            args.dir, args.older_than, stage=args.stage, weights=args.weights, dry_run=args.dry_run
        )  # fmt: skip
        for kept in gone:
            console.print(
                f"{kept.stage} {kept.folder.name[:16]} {size_said(kept.size)}", soft_wrap=True, highlight=False
            )
        size, linked = sum(k.size for k in gone), sum(k.linked for k in gone)
        said = "would go" if args.dry_run else "removed"
        also = f"; run folders hold {size_said(linked)} of it, which stays until they go" if linked else ""
        console.print(
            f"{len(gone)} {'weights' if args.weights else 'artifacts'} and {left} leftovers {said}: "
            f"{size_said(size)}{also}", soft_wrap=True,
        )  # fmt: skip


def _table(root: Path, stage: str | None, order: str, width: int) -> Table:
    """A line an artifact, and a line a stage at the end."""
    kept = [k for k in artifacts(root) if stage in (None, k.stage)]
    kept.sort(key=(lambda k: -k.used) if order == "age" else (lambda k: -k.size))
    total = f"{len(kept)} artifacts, {size_said(sum(k.size for k in kept))}, in {root}"
    table = Table(title=total, title_justify="left", padding=(0, 0))
    for column in ("stage", "key", "size", "last use", "config"):
        table.add_column(column, justify="right" if column in ("size", "last use") else "left", no_wrap=True)
    room = max(10, width - 54)  # what the other columns leave
    now = time.time()
    for k in kept:
        table.add_row(k.stage, k.folder.name[:16], size_said(k.size), _ago(now - k.used), _config(k.inputs())[:room])
    table.add_section()
    for name in sorted({k.stage for k in kept}):
        mine = [k for k in kept if k.stage == name]
        oldest = _ago(now - min(k.used for k in mine))
        table.add_row(name, f"all {len(mine)}", size_said(sum(k.size for k in mine)), f"<= {oldest}", "")
    return table


def _config(inputs: Mapping[str, Any]) -> str:
    """The inputs that a person chose, as key=value; what tells artifacts apart first."""
    first = ("rule", "ratio", "lr", "epochs", "family", "dataset", "n", "temperature", "dtype", "batch_size")
    said: list[tuple[str, Any]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(name, inner)
        elif value is not None and not (isinstance(value, str) and len(value) == 64) and not isinstance(value, list):
            said.append((prefix, value))

    for name, value in inputs.items():
        if name not in ("stage", "source", "environment", "seed"):
            walk(name, value)
    if threads := inputs.get("environment", {}).get("threads"):
        said.append(("threads", threads))
    said.sort(key=lambda item: first.index(item[0]) if item[0] in first else len(first))
    return " ".join(f"{name}={value}" for name, value in said)


def _age(text: str) -> float:
    if text == "0s":
        return 0.0
    if not text[:-1].replace(".", "", 1).isdigit() or text[-1] not in UNITS:  # 6m could be months or minutes
        raise argparse.ArgumentTypeError(f"{text!r} is no age; write 12h, 30d, 8w, or 0s for all")
    return float(text[:-1]) * UNITS[text[-1]]


def _ago(seconds: float) -> str:
    for unit in ("w", "d", "h"):
        if seconds >= 2 * UNITS[unit]:
            return f"{seconds / UNITS[unit]:.0f}{unit}"
    return f"{max(seconds, 0) / 60:.0f} min"


def size_said(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


if __name__ == "__main__":
    main()

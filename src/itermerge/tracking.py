"""Where figures go while a run works: JSON lines always, W&B where asked; the console's table and progress bars."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import current_process
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Metrics = Mapping[str, float]
Tick = Callable[[int], None]


class TrackingError(RuntimeError):
    """A logger that cannot be started."""


class Tracker(Protocol):
    """Takes the figures of each round in order; `finish` is called once, also when the run failed."""

    def log_round(self, number: int, metrics: Metrics) -> None: ...

    def log_curve(self, number: int, losses: list[float]) -> None:
        """The fit's mean loss of each epoch of a round."""
        ...

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None: ...


class NullTracker:
    """`logger=jsonl`: rounds.jsonl is the run folder's own and needs no tracker."""

    def log_round(self, number: int, metrics: Metrics) -> None: ...

    def log_curve(self, number: int, losses: list[float]) -> None: ...

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None: ...


class WandbTracker:
    """One W&B run a job, on axes of our own: `round`, and `sft/epoch` counted over rounds."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, name: str, group: str, config: dict) -> None:
        import wandb

        directory = Path(settings["dir"] or folder)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackingError(f"logger.dir: cannot make {directory} ({error.strerror})") from error
        if not os.access(directory, os.W_OK):
            raise TrackingError(f"logger.dir: {directory} cannot be written to; W&B needs a folder even when offline")
        try:
            self.run: Any = wandb.init(
                project=settings["project"], entity=settings["entity"], mode=settings["mode"], dir=directory,
                group=settings["group"] or group, name=name, config=config, reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise TrackingError(
                f"logger=wandb: W&B did not start ({error}); logger.mode=offline needs no account"
            ) from error
        self.run.define_metric("round")
        self.run.define_metric("sft/epoch")
        self.run.define_metric("*", step_metric="round")
        self.run.define_metric("sft/epoch_loss", step_metric="sft/epoch")
        self.epoch = 0

    def log_round(self, number: int, metrics: Metrics) -> None:
        self.run.log({"round": number, **metrics})

    def log_curve(self, number: int, losses: list[float]) -> None:
        for loss in losses:
            self.epoch += 1
            self.run.log({"round": number, "sft/epoch": self.epoch, "sft/epoch_loss": loss})

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        self.run.summary.update({k: v for k, v in summary.items() if not isinstance(v, list)})
        self.run.finish(exit_code=1 if failed else 0)


class RoundsFile:
    """rounds.jsonl: one line a round, keys in order, no dates and no durations."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def add(self, number: int, metrics: Metrics) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"round": number, **dict(sorted(metrics.items()))}) + "\n")


console = Console(stderr=False)


@contextmanager
def progress(what: str, total: int) -> Iterator[Tick]:
    """A bar over `total` steps; silent where the output is not a terminal, or is shared by several workers."""
    alone = current_process().name == "MainProcess"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (alone and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


def at_majority(base: Metrics) -> list[str]:
    """The OOD tasks whose accuracy, for all that its interval says, is no better than always giving the commonest
    answer: there is nothing to lose on them, and nothing to read from them."""
    names = [name.split("/")[1] for name in base if name.startswith("ood/") and name.endswith("/majority")]
    return [n for n in names if base[f"ood/{n}/acc_low"] <= base[f"ood/{n}/majority"]]


def majority_note(base: Metrics) -> str:
    """A line for the foot of a table, empty where no task is at its majority baseline."""
    marked = [
        f"{n} {100 * base[f'ood/{n}/acc']:.0f} ({100 * base[f'ood/{n}/majority']:.0f})" for n in at_majority(base)
    ]
    return f"base at the majority baseline (accuracy, baseline): {', '.join(marked)}" if marked else ""


def round_table(title: str, rounds: Sequence[Metrics]) -> Table:
    """The rounds so far: ID and OOD accuracy in per cent with 95% intervals, and what was practised on."""
    table = Table(
        title=title,
        title_justify="left",
        padding=(0, 0),
        caption="\n".join(
            filter(None, ["accuracy in %, 95% interval; solved: share of samples", majority_note(rounds[0])])
        ),
        caption_justify="left",
    )
    for column in ("round", "ID", "OOD near", "OOD far", "OOD", "val", "solved", "drift"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rounds):
        table.add_row(
            str(number),
            *(_with_interval(row, name) for name in ("id/acc", "ood/near/acc", "ood/far/acc", "ood/acc")),
            _percent(row, "val/id/acc"),
            _percent(row, "train_sample/accept_rate"),
            f"{row['weights/drift']:.4f}" if "weights/drift" in row else "",
        )
    return table


def _percent(row: Metrics, name: str) -> str:
    return f"{100 * row[name]:.1f}" if name in row else ""


def _with_interval(row: Metrics, name: str) -> str:
    if name not in row:
        return ""
    return f"{100 * row[name]:.1f} {100 * row[f'{name}_low']:.0f}-{100 * row[f'{name}_high']:.0f}"

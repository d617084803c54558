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


# Figures whose change from the base stands in a W&B summary.
GAINS = ("id/acc", "ood/acc", "ood/near/acc", "ood/far/acc", "val/id/acc", "sample/pass@1", "diversity/token_entropy")


class TrackingError(RuntimeError):
    """A logger that cannot be started."""


class Tracker(Protocol):
    """Takes the figures of each round in order, then the run folder; `finish` is called once, also when the run
    failed."""

    def log_round(self, number: int, metrics: Metrics) -> None: ...

    def log_curve(self, number: int, losses: list[float]) -> None:
        """The fit's mean loss of each epoch of a round."""
        ...

    def log_folder(self, folder: Path, report: Sequence[Path]) -> None:
        """Tables, charts and artifacts of what stands in the run folder; `report` are its page and pictures."""
        ...

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None: ...


class NullTracker:
    """`logger=jsonl`: rounds.jsonl is the run folder's own and needs no tracker."""

    def log_round(self, number: int, metrics: Metrics) -> None: ...

    def log_curve(self, number: int, losses: list[float]) -> None: ...

    def log_folder(self, folder: Path, report: Sequence[Path]) -> None: ...

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None: ...


class WandbTracker:
    """One W&B run a job, on axes of our own: `round`, and `sft/epoch` counted over rounds. `config` is the job's, with
    `setting`: what a sweep's panels group by."""

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
        self.settings, self.setting = settings, config["setting"]
        self.base: Metrics = {}

    def log_round(self, number: int, metrics: Metrics) -> None:
        self.base = self.base or metrics
        self.run.log({"round": number, **metrics})

    def log_curve(self, number: int, losses: list[float]) -> None:
        for loss in losses:
            self.epoch += 1
            self.run.log({"round": number, "sft/epoch": self.epoch, "sft/epoch_loss": loss})

    def log_folder(self, folder: Path, report: Sequence[Path]) -> None:
        """Once, when the run ends: `tables/layers` and `tables/samples`, `charts/*` of them and of ID and OOD accuracy,
        the pictures, and an artifact of config, figures and report; the weights where `logger.log_model` says so."""
        import wandb
        from wandb.plot import line_series, scatter

        if not (folder / "rounds.jsonl").is_file():
            return
        rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        if not rounds:
            return
        changes, logged = layer_table(folder), {"round": rounds[-1]["round"]}
        if changes[1]:
            logged["tables/layers"] = wandb.Table(*changes, allow_mixed_types=True)
        if layers := [row for row in changes[1] if row[1].startswith("layer_")]:
            by_round = {t: [row[2] for row in layers if row[0] == t] for t in dict.fromkeys(row[0] for row in layers)}
            depths = list(range(max(map(len, by_round.values()))))
            logged["charts/change_by_layer"] = line_series(
                [depths] * len(by_round), list(by_round.values()), [f"round {t}" for t in by_round],
                title="relative change of each layer", xname="layer",
            )  # fmt: skip
            names = [name for name in changes[0] if name.startswith("importance/")]
            if names:
                first = [row for row in layers if row[0] == layers[0][0]]
                columns = [[row[changes[0].index(name)] or 0.0 for row in first] for name in names]
                shares = [[value / (sum(map(abs, column)) or 1) for value in column] for column in columns]
                logged["charts/importance_by_layer"] = line_series(
                    [depths] * len(names), shares, [name.removeprefix("importance/") for name in names],
                    title="importance of each layer, share of the sum", xname="layer",
                )  # fmt: skip
        if samples := sample_table(folder, self.settings["samples"]):
            logged["tables/samples"] = wandb.Table(*samples, allow_mixed_types=True)
        kinds = [name for name in ("id/acc", "ood/acc", "ood/near/acc", "ood/far/acc") if name in rounds[0]]
        logged["charts/id_ood"] = line_series(
            [line["round"] for line in rounds], [[line[name] for line in rounds] for name in kinds], kinds,
            title="accuracy", xname="round",
        )  # fmt: skip
        points = wandb.Table(["round", "id/acc", "ood/acc"], [[r["round"], r["id/acc"], r["ood/acc"]] for r in rounds])
        logged["charts/pareto"] = scatter(points, "id/acc", "ood/acc", title="OOD against ID accuracy, by round")
        pages = [file for file in report if file.suffix == ".html"]
        logged |= {f"figures/{file.stem}": wandb.Image(str(file)) for file in report if file.suffix == ".png"}
        self.run.log(logged)
        kept = wandb.Artifact(f"report-{self.run.id}", type="report", metadata={"rounds": len(rounds) - 1})
        for file in (folder / "config.yaml", folder / "rounds.jsonl", folder / "summary.json", *pages):
            if file.is_file():
                kept.add_file(str(file))
        self.run.log_artifact(kept)
        models = sorted(folder.glob("rounds/*/model"))
        if self.settings["log_model"] and models:
            number = int(models[-1].parent.name)
            weights = wandb.Artifact(f"model-{self.run.id}", type="model", metadata={"round": number})
            weights.add_dir(str(models[-1]))
            self.run.log_artifact(weights)

    def finish(self, summary: Mapping[str, Any], failed: bool) -> None:
        """`summary` and, for panels over a sweep, `gain/*` (final minus base) and `setting/*`."""
        flat = {k: v for k, v in summary.items() if not isinstance(v, list)}
        flat |= {f"setting/{k}": v for k, v in self.setting.items()}
        flat |= {f"gain/{k}": flat[k] - self.base[k] for k in GAINS if k in flat and k in self.base}
        self.run.summary.update(flat)
        self.run.finish(exit_code=1 if failed else 0)


def layer_table(folder: Path) -> tuple[list[Any], Any]:
    """Columns and rows of a run's layers: round, row (layer_00, ..., embed, norm, head), relative change, the same
    before the last merge event, share of the squared change, figures of the round's own update, and importances."""
    found = folder / "rounds" / "00" / "importance.json"
    importance = json.loads(found.read_text())["estimators"] if found.is_file() else {}
    updates = ("cosine", "sign_agreement", "effective_rank")
    columns = ["round", "row", "change", "pre_merge/change", "energy", *updates]
    columns += [f"importance/{name}" for name in importance]
    rows = []
    for file in sorted(folder.glob("rounds/*/layers.json")):
        layers = json.loads(file.read_text())
        for row, figures in layers["merged"].items():
            update = layers["update"].get(row, {})
            rows.append(
                [int(file.parent.name), row, figures["relative"], layers["pre_merge"][row]["relative"]]
                + [figures["energy"], *(update.get(name) for name in updates)]
                + [values[row]["mean"] if row in values else None for values in importance.values()]
            )
    return columns, rows


def sample_table(folder: Path, n: int) -> tuple[list[Any], Any] | None:
    """Columns and rows of up to `n` training and `n` held-out samples a round, spread evenly over it; None without
    any."""
    columns = ["round", "set", "id", "sample", "prompt", "completion", "answer", "gold", "verdict", "reason"]
    rows = []
    for kind, name in (("training", "samples.jsonl"), ("held-out", "held_out.jsonl")):
        for file in sorted(folder.glob(f"rounds/*/{name}")):
            found = [json.loads(line) for line in file.read_text().splitlines()]
            picked = [found[i * len(found) // n] for i in range(n)] if len(found) > n else found
            rows += [[int(file.parent.name), kind, *(sample[c] for c in columns[2:])] for sample in picked]
    return (columns, rows) if rows and n else None


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

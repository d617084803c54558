"""Reports of runs, sweeps and comparisons, from their folders alone: report.html, figures/*.png, tables.

    itermerge-report DIR [DIR ...]     makes them again

Folders may be half-written: a report says what is missing. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import charts, page, runs, sweeps
from .folders import (
    Job,
    ReportError,
    flat,
    job_folders,
    label,
    mean_interval,
    read_rounds,
    read_run,
    read_sweep,
    retention,
    write_tables,
)  # fmt: skip

__all__ = [
    "Job", "ReportError", "analysis", "charts", "flat", "label", "main", "make", "mean_interval", "read_rounds",
    "read_run", "read_sweep", "retention", "run", "sweep",
]  # fmt: skip

Say = Callable[[str], None]
RUN_FIGURES = ("id_ood", "importance_change", "layers", "diversity", "pass_at_k")
SWEEP_FIGURES = ("id_ood", "heatmap", "vs_vanilla", "pareto", "collapse", "layers", "mismatch")


def _nobody(_: str) -> None:
    """Hears nothing."""


def run(folder: Path, say: Say = _nobody) -> list[Path]:
    """Writes report.html and figures/*.png of a run folder, finished or not; their paths. `say` is told what is missing
    or cannot be read."""
    with charts.unchecked():
        made = runs.page(read_run(folder))
    return _write(made, folder, {name: name for name in RUN_FIGURES}, say)


def sweep(folder: Path, say: Say = _nobody) -> tuple[Table, list[Path]]:
    """Writes sweep.csv, jobs.csv, report.html and figures/*.png of a sweep folder; the console table, and the paths of
    page and figures."""
    jobs = read_sweep(folder)
    table = write_tables(folder, jobs)
    names = {name: name for name in SWEEP_FIGURES}
    if (folder / "optuna.log").is_file():
        names["pareto"] = "pareto_test"  # pareto.png is the search's own, of validation items
    with charts.unchecked():
        made = sweeps.page(folder, jobs)
    return table, _write(made, folder, names, say)


def analysis(folder: Path, say: Say = _nobody) -> list[Path]:
    """Writes report.html and figures/*.png of a comparison of two checkpoints; their paths."""
    with charts.unchecked():
        made = runs.analysis_page(folder)
    return _write(made, folder, {name: name for name in RUN_FIGURES}, say)


def _write(made: page.Page, folder: Path, names: dict[str, str], say: Say) -> list[Path]:
    for text in made.missing():
        say(f"{folder}: {text}")
    path = page.write(made, folder / "report.html")
    pictures = {f.name: f for f in made.figures() if f.name in names}
    for n in names.keys() - pictures.keys():  # of an earlier report
        (folder / "figures" / f"{names[n]}.png").unlink(missing_ok=True)
    return [
        path,
        *(charts.write_png(pictures[n], folder / "figures" / f"{names[n]}.png") for n in names if n in pictures),
    ]


def kind_of(folder: Path) -> str:
    """What a folder holds: `sweep`, `run` or `analysis`. Raises ReportError."""
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder")
    if (folder / "sweep.json").is_file() or any((d / "config.yaml").is_file() for d in job_folders(folder)):
        return "sweep"
    if (folder / "analysis.json").is_file() or ((folder / "layers.json").is_file() and (folder / "cli.log").is_file()):
        return "analysis"
    if (folder / "rounds.jsonl").is_file() or (folder / "config.yaml").is_file():
        return "run"
    raise ReportError(
        f"{folder} is no run (config.yaml, rounds.jsonl), no sweep (sweep.json, or folders 0, 1, ... of jobs) and no "
        "comparison (analysis.json, layers.json)"
    )


def make(folder: Path, jobs: bool = False, say: Say = _nobody) -> list[Path]:
    """The report of whatever a folder holds, with `jobs` those of a sweep's jobs before it; the paths."""
    kind = kind_of(folder)
    if kind != "sweep":
        return run(folder, say) if kind == "run" else analysis(folder, say)
    own = [p for d in job_folders(folder) if jobs for p in run(d, say)]
    table, paths = sweep(folder, say)
    Console().print(table)
    return own + paths


def main(arguments: Sequence[str] | None = None) -> None:
    """`itermerge-report DIR [DIR ...]`."""
    parser = argparse.ArgumentParser(
        prog="itermerge-report", description="makes report.html and figures/*.png of runs, sweeps and comparisons again"
    )
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="a run's, a sweep's or a comparison's folder"
    )
    parser.add_argument("--jobs", action="store_true", help="of a sweep also the reports of its jobs")
    given = parser.parse_args(arguments)
    try:
        for folder in given.folders:
            kind_of(folder)
        for folder in given.folders:
            for path in make(folder, given.jobs, lambda text: print(f"note: {text}", file=sys.stderr)):
                print(path)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

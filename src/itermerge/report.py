"""Figures and tables of finished runs, from run folders alone. Imports no torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from .tracking import majority_note

PANELS = {"id/acc": "in-domain (ID)", "ood/near/acc": "out-of-domain, near", "ood/far/acc": "out-of-domain, far"}


def read_rounds(folder: Path) -> list[dict[str, float]]:
    """The lines of rounds.jsonl."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def run_figure(folder: Path) -> Path:
    """figures/id_ood.png of one run."""
    return _draw({"run": [read_rounds(folder)]}, folder / "figures" / "id_ood.png")


@dataclass(frozen=True)
class Job:
    """A finished job of a sweep: its varied keys (`seed` apart), its rounds, its stage counts, and its retention."""

    folder: Path
    seed: int
    keys: dict[str, Any]
    config: dict[str, Any]
    rounds: list[dict[str, float]]
    stages: dict[str, Any]
    best: int
    retention: float | None = None

    @property
    def vanilla(self) -> bool:
        return self.config.get("merge.kind") == "none" or self.config.get("merge.ratio") == 1


def label(keys: Mapping[str, Any], exact: bool = False) -> str:
    """Keys as one line, numbers to four digits unless `exact`."""
    short = {k: f"{v:.4g}" if isinstance(v, float) and len(repr(v)) > 7 else v for k, v in keys.items()}
    said = keys if exact else short
    return " ".join(f"{k.removeprefix('merge.').removeprefix('sft.')}={v}" for k, v in said.items()) or "run"


def groups(jobs: Sequence[Job], without: Sequence[str] = ()) -> dict[str, list[Job]]:
    """Jobs with the same keys (those of `without` apart), by label; exact labels where short ones would be alike."""
    by_keys: dict[str, list[Job]] = {}
    keys: dict[str, dict[str, Any]] = {}
    for job in jobs:
        mine = {k: v for k, v in job.keys.items() if k not in without}
        by_keys.setdefault(json.dumps(mine, sort_keys=True), []).append(job)
        keys[json.dumps(mine, sort_keys=True)] = mine
    short = [label(k) for k in keys.values()]
    return {
        label(keys[name], exact=short.count(label(keys[name])) > 1): group for name, group in by_keys.items()
    }  # fmt: skip


def read_sweep(folder: Path) -> list[Job]:
    """The finished jobs of a sweep folder, in order."""
    folders = [d for d in folder.iterdir() if d.name.isdigit() and (d / "DONE").is_file()]
    folders = [d for d in folders if (d / "summary.json").is_file()]
    folders.sort(key=lambda d: int(d.name))
    configs = [flat(OmegaConf.to_container(OmegaConf.load(d / "config.yaml"))) for d in folders]
    varied = sorted({k for c in configs for k in c if len({str(other.get(k)) for other in configs}) > 1} - {"seed"})
    if "merge.ratio" in varied and any("merge.ratio" in c for c in configs):
        varied = [k for k in varied if k == "merge.kind" or not k.startswith("merge.") or all(k in c for c in configs)]
    jobs = []
    for d, c in zip(folders, configs, strict=True):
        summary = json.loads((d / "summary.json").read_text())
        keys = {k: c.get(k) for k in varied}
        jobs.append(
            Job(d, c["seed"], keys, c, read_rounds(d), summary["stages"], summary["best_round_by_validation"])
        )  # fmt: skip
    twins = {_without_merge(j): j for j in jobs if j.vanilla}
    return [replace(j, retention=retention(j, twins.get(_without_merge(j)))) for j in jobs]


def _without_merge(job: Job) -> str:
    return json.dumps({k: v for k, v in job.config.items() if not k.startswith("merge.")}, sort_keys=True)


def retention(job: Job, vanilla: Job | None) -> float | None:
    """(ID_T - ID_0) / (ID_T - ID_0 of vanilla), of the run with the same seed and everything but the merge; None where
    there is none, or where the 95% interval of vanilla's gain (paired by item) includes 0."""
    if vanilla is None:
        return None
    last = len(vanilla.rounds) - 1
    task = str(vanilla.config.get("task.family") or vanilla.config.get("task.label") or vanilla.config["task.dataset"])
    try:
        before, after = (
            json.loads((vanilla.folder / "rounds" / f"{t:02d}" / "scores.json").read_text())[task]["correct"]
            for t in (0, last)
        )
    except (OSError, KeyError):
        return None
    gains = [a - b for a, b in zip(after, before, strict=True)]
    gain = fmean(gains)
    half = 1.96 * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
    if abs(gain) <= half:
        return None
    return (job.rounds[-1]["id/acc"] - job.rounds[0]["id/acc"]) / gain


def sweep(folder: Path) -> tuple[Table, list[Path]]:
    """The console table of a sweep; and its files: sweep.csv (a row a job and round), jobs.csv (a row a job),
    figures/id_ood.png, and figures/heatmap.png if ratios were varied."""
    jobs = read_sweep(folder)
    by_round = [
        {"job": j.folder.name, "seed": j.seed, **j.keys}
        | {k: round(v, 5) for k, v in line.items() if "weights/change" not in k}
        for j in jobs
        for line in j.rounds
    ]
    _write_csv(folder / "sweep.csv", by_round)
    _write_csv(folder / "jobs.csv", [_job_row(j) for j in jobs])
    lines = {name: [j.rounds for j in group] for name, group in groups(_longest(jobs), without=["rounds"]).items()}
    pictures = [_draw(lines, folder / "figures" / "id_ood.png")]
    if heatmap := _heatmap(_longest(jobs), folder / "figures" / "heatmap.png"):
        pictures.append(heatmap)
    return _table(jobs), pictures


def _job_row(job: Job) -> dict[str, Any]:
    figures = ("id/acc", "ood/acc", "ood/near/acc", "ood/far/acc", "val/id/acc", "val/ood/acc")
    row: dict[str, Any] = {"job": job.folder.name, "seed": job.seed, **job.keys, "best_round": job.best}
    for when, line in (("base", job.rounds[0]), ("final", job.rounds[-1]), ("best", job.rounds[job.best])):
        row |= {f"{when}/{name}": round(line[name], 5) for name in figures if name in line}
    row["retention"] = "" if job.retention is None else round(job.retention, 4)
    counts = {what: sum(job.stages[what].values()) for what in ("computed", "reused")}
    return row | counts | {"seconds_saved": job.stages["seconds_saved"]}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _longest(jobs: list[Job]) -> list[Job]:
    """Of jobs that differ in `rounds` alone the longest, which contains the others."""
    chains: dict[str, Job] = {}
    for job in jobs:
        chain = json.dumps({k: v for k, v in job.config.items() if k != "rounds"}, sort_keys=True)
        if chain not in chains or len(job.rounds) > len(chains[chain].rounds):
            chains[chain] = job
    return list(chains.values())


# Quantiles .975 of Student's t for 1, 2, ... degrees of freedom.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval (Student's t; 0 for one value, whose interval is not known)."""
    n = len(values)
    if n < 2:
        return fmean(values), 0.0
    t = _T975[n - 2] if n - 2 < len(_T975) else 1.96 + 2.5 / (n - 1)  # within .01 of the quantile
    return fmean(values), t * stdev(values) / n**0.5


def _table(jobs: list[Job]) -> Table:
    """A row a job; where there are several seeds a row a setting, with means over seeds and their intervals."""
    settings = groups(jobs)
    seeds = max(map(len, settings.values()))
    spread = f"; mean of {seeds} seeds ± 95%" if seeds > 1 else ""
    notes = dict.fromkeys(filter(None, (majority_note(j.rounds[0]) for j in jobs)))
    table = Table(
        title=f"final round minus base, in points{spread}",
        title_justify="left",
        padding=(0, 0),
        caption="\n".join(
            [
                "best: the round that validation chooses, its ID; kept: ID gain / vanilla's, if that is sure",
                "stages: computed/needed",
                *notes,
            ]
        ),
        caption_justify="left",
    )
    for column in ("run", "ID", "near", "far", "best", "kept", "stages", "saved"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column != "run")
    for name, group in settings.items():
        best = sorted({j.best for j in group})
        retained = [j.retention for j in group if j.retention is not None]
        made, found = (sum(sum(j.stages[what].values()) for j in group) for what in ("computed", "reused"))
        gain = fmean(100 * (j.rounds[j.best]["id/acc"] - j.rounds[0]["id/acc"]) for j in group)
        table.add_row(
            name,
            *(_change(group, name) for name in ("id/acc", "ood/near/acc", "ood/far/acc")),
            f"{'-'.join(map(str, dict.fromkeys((best[0], best[-1]))))}: {gain:+.1f}",
            f"{fmean(retained):.2f}" if retained else "",
            f"{made}/{made + found}",
            f"{sum(j.stages['seconds_saved'] for j in group):.0f}s",
        )
    return table


def _change(group: list[Job], name: str) -> str:
    lines = [(j.rounds[0], j.rounds[-1]) for j in group]
    changes = [100 * (now[name] - base[name]) for base, now in lines if name in now and name in base]
    if not changes:
        return ""
    mean, half = mean_interval(changes)
    return f"{mean:+.1f}" + (f"±{half:.1f}" if len(changes) > 1 else "")


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted keys, without what changes no result."""
    if not isinstance(node, dict):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        if prefix or key not in ("store", "logger", "paths", "sweep"):
            out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _heatmap(jobs: list[Job], path: Path) -> Path | None:
    """Change of ID and of OOD accuracy over ratio x rounds, seeds averaged; settings of other keys are rows of panels.
    None when fewer than two ratios were run, or so many that nobody could read it."""
    from matplotlib.figure import Figure

    cells: dict[str, dict[float, list[Job]]] = {}
    for name, group in groups(jobs, without=("merge.ratio", "merge.kind", "rounds")).items():
        for job in group:
            ratio = 1.0 if job.vanilla else job.config.get("merge.ratio")
            if ratio is not None:
                cells.setdefault(name, {}).setdefault(float(ratio), []).append(job)
    cells = {name: by_ratio for name, by_ratio in cells.items() if len(by_ratio) > 1}
    if not cells or len(cells) > 12 or max(map(len, cells.values())) > 24:
        return None
    columns = {"id/acc": "in-domain (ID)", "ood/acc": "out-of-domain (OOD)"}
    ratios = sorted({r for by_ratio in cells.values() for r in by_ratio})
    longest = max(len(j.rounds) for by_ratio in cells.values() for group in by_ratio.values() for j in group)
    figure = Figure(
        figsize=(1.6 + 2 * (1.2 + 0.62 * longest), 0.9 + len(cells) * (0.8 + 0.36 * len(ratios))), layout="constrained"
    )
    grid = figure.subplots(len(cells), 2, squeeze=False)
    values = {
        (name, metric): [
            [_mean_change(by_ratio.get(ratio, []), metric, t) for t in range(1, longest)] for ratio in ratios
        ]
        for name, by_ratio in cells.items() for metric in columns
    }  # fmt: skip
    for column, (metric, title) in enumerate(columns.items()):
        drawn: Any = None
        every = [abs(v) for (_, m), rows in values.items() if m == metric for row in rows for v in row if v == v]
        limit = max([*every, 1.0])
        for row, name in enumerate(cells):
            axis, table = grid[row][column], values[name, metric]
            drawn = axis.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
            for y, line in enumerate(table):
                for x, value in enumerate(line):
                    if value == value:
                        dark = abs(value) > 0.6 * limit
                        axis.text(
                            x, y, f"{value:+.1f}", ha="center", va="center", fontsize=8,
                            color="white" if dark else "black",
                        )  # fmt: skip
            axis.set_xticks(range(longest - 1), [str(t) for t in range(1, longest)])
            axis.set_yticks(range(len(ratios)), [f"{r:g}" for r in ratios])
            base = fmean(100 * j.rounds[0][metric] for group in cells[name].values() for j in group)
            axis.set_title(f"{title}, base {base:.1f}%" + (f"   {name}" if name != "run" else ""), fontsize=9)
            if column == 0:
                axis.set_ylabel("merge.ratio")
            if row == len(cells) - 1:
                axis.set_xlabel("round")
        figure.colorbar(drawn, ax=list(grid[:, column]), label="points", shrink=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _mean_change(group: list[Job], metric: str, t: int) -> float:
    changes = [100 * (j.rounds[t][metric] - j.rounds[0][metric]) for j in group if t < len(j.rounds)]
    return fmean(changes) if changes else float("nan")


def _draw(runs: dict[str, list[list[dict[str, float]]]], path: Path) -> Path:
    """ID and OOD accuracy over rounds, one line a label: of a single run with its 95% interval as a band, of several
    seeds their mean, and lowest to highest as a band. Labels that differ in more than `ratio` get rows of their own."""
    from matplotlib.figure import Figure

    panels = {k: v for k, v in PANELS.items() if all(k in lines[0] for group in runs.values() for lines in group)}
    rows: dict[str, dict[str, str]] = {}
    for label in runs:
        words = label.split(" ")
        rest = " ".join(w for w in words if not w.startswith("ratio="))
        rows.setdefault(rest if len(runs) > 5 else "", {})[label] = (
            " ".join(w for w in words if w not in rest.split(" ")) or rest
        )
    figure = Figure(figsize=(4.2 * len(panels), 0.6 + 3.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(panels), squeeze=False, sharex=True, sharey="col")
    for axes, (row, labels) in zip(grid, rows.items(), strict=True):
        for axis, (name, title) in zip(axes, panels.items(), strict=True):
            for label, short in labels.items():
                group = [[100 * line[name] for line in lines] for lines in runs[label]]
                shortest = min(map(len, group))
                columns = list(zip(*(values[:shortest] for values in group), strict=True))
                x, y = range(shortest), [sum(c) / len(c) for c in columns]
                low, high = [min(c) for c in columns], [max(c) for c in columns]
                if len(group) == 1:
                    low, high = ([100 * line[name + end] for line in runs[label][0]] for end in ("_low", "_high"))
                (drawn,) = axis.plot(x, y, marker="o", markersize=3.5, label=short if row else label)
                axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.13, linewidth=0)
            axis.axhline(100 * next(iter(runs.values()))[0][0][name], color="0.5", linestyle=":", linewidth=1)
            axis.set_title(f"{title}   {row}", fontsize=10)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("accuracy (%)")
        if len(labels) > 1:
            axes[0].legend(fontsize=8)
    for axis in grid[-1]:
        axis.set_xlabel("round")
    most = max(map(len, runs.values()))
    band = f"lowest to highest of {most} seeds" if most > 1 else "95% interval over test items"
    figure.supxlabel(f"band: {band}; dotted: the base", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path

"""Figures and tables of finished runs, from run folders alone. Imports no torch."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
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
    """A finished job of a sweep: its varied keys (`seed` apart), its rounds and its stage counts."""

    name: str
    seed: int
    keys: dict[str, Any]
    rounds: list[dict[str, float]]
    stages: dict[str, Any]

    @property
    def label(self) -> str:
        return " ".join(f"{k.removeprefix('merge.').removeprefix('sft.')}={v}" for k, v in self.keys.items()) or "run"


def read_sweep(folder: Path) -> list[Job]:
    """The finished jobs of a sweep folder, in order."""
    folders = sorted((d for d in folder.iterdir() if (d / "summary.json").is_file()), key=lambda d: int(d.name))
    configs = [_flat(OmegaConf.to_container(OmegaConf.load(d / "config.yaml"))) for d in folders]
    varied = sorted({k for c in configs for k in c if len({str(other.get(k)) for other in configs}) > 1} - {"seed"})
    if "merge.ratio" in varied and any("merge.ratio" in c for c in configs):
        varied = [k for k in varied if k == "merge.kind" or not k.startswith("merge.") or all(k in c for c in configs)]
    return [
        Job(
            d.name,
            c["seed"],
            {k: c.get(k) for k in varied},
            read_rounds(d),
            json.loads((d / "summary.json").read_text())["stages"],
        )
        for d, c in zip(folders, configs, strict=True)
    ]


def sweep(folder: Path) -> tuple[Table, Path]:
    """sweep.csv (a row a job and round), figures/id_ood.png and the console table of a sweep (seeds averaged)."""
    jobs = read_sweep(folder)
    rows = [
        {"job": j.name, "seed": j.seed, **j.keys}
        | {k: round(v, 5) for k, v in line.items() if "weights/change" not in k}
        for j in jobs
        for line in j.rounds
    ]
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.label, []).append(job)
    seeds = max(len(g) for g in groups.values())
    spread = f"; mean of up to {seeds} seeds, lowest and highest in brackets" if seeds > 1 else ""
    notes = dict.fromkeys(filter(None, (majority_note(j.rounds[0]) for j in jobs)))
    table = Table(
        title=f"final round minus base, in points of accuracy{spread}", title_justify="left", padding=(0, 0),
        caption="\n".join(notes) or None, caption_justify="left",
    )  # fmt: skip
    for column in ("run", "ID", "OOD near", "OOD far", "pass@k", "computed", "reused"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for label, group in groups.items():
        top = max(
            (k for k in group[0].rounds[-1] if k.startswith("sample/pass@") and k[12:].isdigit()),
            key=lambda k: int(k[12:]), default="",
        )  # fmt: skip
        changes = [_change(group, name) for name in ("id/acc", "ood/near/acc", "ood/far/acc", top)]
        counts = [str(sum(sum(j.stages[what].values()) for j in group)) for what in ("computed", "reused")]
        table.add_row(label, *changes, *counts)
    return table, _draw(
        {label: [j.rounds for j in g] for label, g in groups.items()}, folder / "figures" / "id_ood.png"
    )


def _change(group: list[Job], name: str) -> str:
    changes = [
        100 * (j.rounds[-1][name] - j.rounds[0][name]) for j in group if name in j.rounds[-1] and name in j.rounds[0]
    ]
    if not changes:
        return ""
    spread = f" [{min(changes):+.1f} {max(changes):+.1f}]" if len(changes) > 1 else ""
    return f"{sum(changes) / len(changes):+.1f}{spread}"


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key not in ("store", "logger", "paths"):
            out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path

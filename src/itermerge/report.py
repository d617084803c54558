"""Figures and tables of finished runs, from run folders alone. Imports no torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

PANELS = {"id/acc": "in-domain (ID)", "ood/near/acc": "out-of-domain, near", "ood/far/acc": "out-of-domain, far"}


def read_rounds(folder: Path) -> list[dict[str, float]]:
    """The lines of rounds.jsonl."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def run_figure(folder: Path) -> Path:
    """figures/id_ood.png of one run."""
    return _draw({"this run": read_rounds(folder)}, folder / "figures" / "id_ood.png")


def sweep(folder: Path) -> tuple[Table, Path]:
    """sweep.csv, figures/id_ood.png and the console table of a sweep: one row a finished job."""
    jobs = sorted((d for d in folder.iterdir() if (d / "summary.json").is_file()), key=lambda d: int(d.name))
    configs = [_flat(OmegaConf.to_container(OmegaConf.load(d / "config.yaml"))) for d in jobs]
    rounds = [read_rounds(d) for d in jobs]
    keys = sorted({k for c in configs for k in c if len({str(other.get(k)) for other in configs}) > 1})
    keys = [k for k in keys if k != "merge.kind" or "merge.ratio" not in keys] or ["seed"]
    rows = []
    for d, config, lines in zip(jobs, configs, rounds, strict=True):
        for line in lines:
            names = [k for k in line if not k.startswith("weights/change") and not k.startswith("pre_merge/weights")]
            rows.append({"job": d.name, **{k: config.get(k) for k in keys}, **{k: line[k] for k in names}})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    labels = [" ".join(f"{k}={c.get(k)}" for k in keys) for c in configs]
    table = Table(title="final round against the base, points of accuracy (base in %)", title_justify="left")
    for column in ("job", *keys, "ID", "OOD near", "OOD far", "pass@k", "gap", "computed", "reused"):
        table.add_column(column, justify="right")
    for d, config, lines in zip(jobs, configs, rounds, strict=True):
        stages = json.loads((d / "summary.json").read_text())["stages"]
        changes = [_change(lines, name) for name in ("id/acc", "ood/near/acc", "ood/far/acc")]
        top = max(
            (k for k in lines[-1] if k.startswith("sample/pass@")), key=lambda k: int(k.split("@")[1]), default=""
        )
        table.add_row(
            d.name, *(str(config.get(k)) for k in keys), *changes, _change(lines, top) if top else "",
            f"{100 * lines[-1]['gap/superficiality']:+.1f}", str(sum(stages["computed"].values())),
            str(sum(stages["reused"].values())),
        )  # fmt: skip
    named = {
        f"{label} ({d.name})" if labels.count(label) > 1 else label: r
        for label, d, r in zip(labels, jobs, rounds, strict=True)
    }
    return table, _draw(named, folder / "figures" / "id_ood.png")


def _change(lines: list[dict[str, float]], name: str) -> str:
    if name not in lines[0] or name not in lines[-1]:
        return ""
    return f"{100 * (lines[-1][name] - lines[0][name]):+.1f} ({100 * lines[0][name]:.1f})"


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key not in ("store", "logger", "paths"):
            out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _draw(runs: dict[str, list[dict[str, float]]], path: Path) -> Path:
    """ID and OOD accuracy over rounds, one line a run, 95% intervals as bands."""
    from matplotlib.figure import Figure

    panels = {k: v for k, v in PANELS.items() if any(k in line for lines in runs.values() for line in lines)}
    figure = Figure(figsize=(4.2 * len(panels), 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for label, lines in runs.items():
            x = [line["round"] for line in lines]
            y, low, high = ([100 * line[name + end] for line in lines] for end in ("", "_low", "_high"))
            (drawn,) = axis.plot(x, y, marker="o", markersize=4, label=label)
            axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)
        base = 100 * next(iter(runs.values()))[0][name]
        axis.axhline(base, color="0.5", linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy (%)")
    if len(runs) > 1:
        axes[0].legend(fontsize=8 if len(runs) <= 6 else 6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path

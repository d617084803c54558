"""Do important layers change least? Mismatch of importance and change over finished sweeps (2503.02103, claim 3).

    python -m itermerge.study_layers DIR [DIR ...] --out results/NAME

`DIR` are sweep or run folders, or the --out of an earlier study. Written to --out, and printed:

    units.jsonl.gz   importance (example by example) and change (layer by layer) of every chain: all that follows
    mismatch.csv     each method and estimator: Spearman's correlation and the top layers' share of the squared update
    importance_change.png   means over bases and seeds, by layer

A *method* is what chains share apart from seed and base: (ratio, learning rate); a *unit* is one (base, seed).
Intervals are 95% percentile bootstraps over bases and seeds (as in `study`) and, within each, over the examples that
importance was measured on; never over layers. Beside each mean stands how many units have its sign, and how many have a
permutation p below .05. No torch is needed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .analysis import ESTIMATORS
from .analysis.mismatch import RESAMPLES, permutation_p, resampled_means, spearman, top_count, top_share
from .report import charts, flat, read_run
from .study import StudyError, markdown, unit_weights, write_csv

UNITS = "units.jsonl.gz"


@dataclass(frozen=True)
class Layers:
    """One chain at one round: importance values (examples, layers) by estimator, change and squared change by layer."""

    ratio: float
    lr: float
    base: str
    seed: int
    round: int
    values: dict[str, np.ndarray]
    change: np.ndarray
    energy: np.ndarray

    def line(self) -> str:
        kept = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return json.dumps(kept | {"values": {k: v.tolist() for k, v in self.values.items()}}) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Layers:
        read = json.loads(line)
        arrays = {name: np.array(read[name]) for name in ("change", "energy")}
        return cls(**(read | arrays | {"values": {k: np.array(v) for k, v in read["values"].items()}}))


def read(folders: Sequence[Path], number: int | None) -> list[Layers]:
    """Every finished chain below `folders`, at round `number` or its last, and the units that an earlier study kept.
    Raises StudyError where there is none, or where importance or layers are missing."""
    found: list[Layers] = []
    for folder in folders:
        if (folder / UNITS).is_file():
            with gzip.open(folder / UNITS, "rt") as file:
                found += map(Layers.of_line, file)
        for config in sorted(folder.glob("**/config.yaml")):
            if (config.parent / "summary.json").is_file():
                found.append(_of_run(config.parent, number))
    if not found:
        raise StudyError(f"no finished run, and no {UNITS}, below {', '.join(map(str, folders))}")
    if len({len(unit.change) for unit in found}) > 1:
        raise StudyError("the runs' models have different numbers of layers; study them apart")
    return found


def _of_run(folder: Path, number: int | None) -> Layers:
    run = read_run(folder)
    t = max(run.layers, default=0) if number is None else number
    if "values" not in run.importance or t not in run.layers:
        raise StudyError(f"{folder} has no importance.json, or no layers.json of round {t}; leave it out")
    config = flat(run.config)
    rows = [run.layers[t]["merged"][f"layer_{i:02d}"] for i in range(int(run.importance["layers"]))]
    base = str(config["model.seed"] if config["model.kind"] == "lab" else Path(config["model.path"]).name)
    found = run.importance["values"]
    values = {name: np.array(found[name]) for name in dict.fromkeys((*ESTIMATORS, *found)) if name in found}
    change, energy = (np.array([row[what] for row in rows]) for what in ("relative", "energy"))
    return Layers(
        float(config.get("merge.ratio", 1.0)), config["sft.lr"], base, config["seed"], t, values, change, energy
    )  # fmt: skip


def methods(units: Sequence[Layers]) -> dict[str, list[Layers]]:
    """Units by method, vanilla last. Raises StudyError where a unit stands there twice."""
    out: dict[str, list[Layers]] = {}
    for unit in sorted(units, key=lambda u: (u.ratio, u.lr, u.base, u.seed)):
        name = f"vanilla, lr {unit.lr:g}" if unit.ratio == 1 else f"ratio {unit.ratio:g}, lr {unit.lr:g}"
        if any((u.base, u.seed) == (unit.base, unit.seed) for u in out.setdefault(name, [])):
            raise StudyError(f"{name}, base {unit.base}, seed {unit.seed} stands there twice; leave one out")
        out[name].append(unit)
    return out


def table(units: Sequence[Layers], share: float) -> list[dict[str, Any]]:
    """A row a method and estimator."""
    rows = []
    for method, own in methods(units).items():
        weights = unit_weights([(u.base, u.seed) for u in own], RESAMPLES, np.random.default_rng(0))
        k, layers = top_count(len(own[0].change), share), len(own[0].change)
        for name in own[0].values:
            row: dict[str, Any] = {"method": method, "round": own[0].round, "estimator": name}
            drawn = [resampled_means(u.values[name], seed=i) for i, u in enumerate(own)]
            rho = [float(spearman(u.values[name].mean(0), u.change)) for u in own]
            held = [float(top_share(u.values[name].mean(0), u.energy, k)) for u in own]
            rhos = np.stack([spearman(d, u.change) for d, u in zip(drawn, own, strict=True)], 1)
            helds = np.stack([top_share(d, u.energy, k) for d, u in zip(drawn, own, strict=True)], 1)
            squared = [float(spearman(u.values[name].mean(0), u.energy)) for u in own]
            squares = np.stack([spearman(d, u.energy) for d, u in zip(drawn, own, strict=True)], 1)
            p = [permutation_p(u.values[name].mean(0).tolist(), u.change.tolist()) for u in own]
            row["Spearman"] = _interval(rho, rhos, weights, "+.2f")
            row["sign"] = f"{sum(r * np.mean(rho) > 0 for r in rho)}/{len(own)}"
            row["p < .05"] = f"{sum(x < 0.05 for x in p)}/{len(own)}"
            row["Spearman, squared change"] = _interval(squared, squares, weights, "+.2f")
            row[f"top {k} of {layers} hold"] = _interval([100 * h for h in held], 100 * helds, weights, ".1f")
            row["if even"] = f"{100 * k / layers:.1f}"
            rows.append(row)
    return rows


def _interval(values: Sequence[float], drawn: np.ndarray, weights: np.ndarray, form: str) -> str:
    """Mean over units [95%]; `drawn` is (resamples, units)."""
    low, high = np.percentile((drawn * weights).sum(1), [2.5, 97.5])
    mean = float(np.mean(values))
    return f"{mean:{form}} [{min(mean, low):{form}}, {max(mean, high):{form}}]"


def figure(units: Sequence[Layers], share: float) -> charts.Figure:
    """For each estimator: mean share of importance by layer, lowest to highest unit as whiskers, and mean share of the
    relative change of each method."""
    by_method = methods(units)
    first = {(u.base, u.seed): u for u in units}
    layers = len(units[0].change)
    k = top_count(layers, share)
    names = {True: f"importance: top {k}", False: "importance: other layers"}
    colours = {names[True]: charts.BLUE, names[False]: charts.PALE_BLUE}
    colours |= dict(zip(by_method, (charts.VERMILLION, charts.GREY, charts.GREEN, charts.PURPLE), strict=False))
    panels = []
    rows = {(row["method"], row["estimator"]): row for row in table(units, share)}
    for name in units[0].values:
        shares = np.stack([(m := u.values[name].mean(0)) / np.abs(m).sum() for u in first.values()])
        mean = shares.mean(0)
        top = set(np.argsort(-mean, kind="stable")[:k].tolist())
        bars = [
            {
                "layer": i, "what": names[i in top], "share": 100 * mean[i], "low": 100 * shares[:, i].min(),
                "high": 100 * shares[:, i].max(), "exact": mean[i],
            }
            for i in range(layers)
        ]  # fmt: skip
        lines = [
            {"layer": i, "what": method, "share": 100 * value, "exact": value}
            for method, own in by_method.items()
            for i, value in enumerate(np.mean([u.change / u.change.sum() for u in own], 0).tolist())
        ]
        said = [f"{method}: rho {rows[method, name]['Spearman']}" for method in by_method]
        panels.append(charts.importance([name, *said], bars, lines, colours, legend=True))
    caption = (
        "Bars: share of the importance of all layers, mean over bases and seeds (whiskers: lowest to highest). "
        "Lines: share of the relative change."
    )
    return charts.Figure("importance_change", panels, colours, columns=2, caption=caption)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m itermerge.study_layers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folders", type=Path, nargs="+", help="sweep or run folders, or an earlier study's --out")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables and the figure")
    parser.add_argument("--round", type=int, help="the round to look at (default: each chain's last)")
    parser.add_argument("--top-share", type=float, default=0.25, help="of the layers: the important ones")
    args = parser.parse_args(argv)
    try:
        units = read(args.folders, args.round)
        rows = table(units, args.top_share)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    kept = "".join(sorted(unit.line() for unit in units))
    (args.out / UNITS).write_bytes(gzip.compress(kept.encode(), mtime=0))
    write_csv(args.out / "mismatch.csv", rows)
    charts.write_png(figure(units, args.top_share), args.out / "importance_change.png")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

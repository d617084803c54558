"""Is merging more than a smaller step? Comparisons over finished sweeps, paired by item and by seed.

    python -m itermerge.study DIR [DIR ...] --out results/NAME

`DIR` are sweep folders, run folders, or the --out of an earlier study, which goes on there: learning rates x ratios x
seeds x bases. Written to --out, and printed:

    chains.jsonl.gz every chain with its verdicts item by item: all that the tables are made of
    sweep.csv       a row a job and round: the figures, without intervals
    grid.csv        each method (ratio, learning rate) at the last round, with intervals
    chosen.csv      the learning rate chosen on vanilla's ID validation accuracy, then each ratio at it, and each ratio
                    at the learning rate and round that its own validation accuracy chooses; against chosen vanilla
    matched.csv     each merged method against vanilla with a smaller step or fewer rounds: at equal ID accuracy, at
                    equal drift, and the mean of all of them
    robust.csv      over how many learning rates and rounds a method stays within 2 points of its best
    collapse.csv    pass@k, entropy and different solutions over rounds, vanilla against merging
    *.png           figures

A *method* is what chains share apart from seed and base. A *unit* is one (base, seed); a chain is a method on a unit.
Choices (learning rate, round, match) look at validation items and at weights, never at test items.

Intervals are 95% percentile bootstraps that resample bases, seeds within a base, and items within a task; all chains
answer the same items, so items are resampled alike for all of them and differences are paired by item and by unit. With
three bases such an interval is rough (three clusters): how many of the units have a difference of the same sign stands
beside it, as 8/9. No torch is needed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

RESAMPLES = 2000
WITHIN = 0.02  # "within 2 points of its best"
Items = Mapping[str, np.ndarray]  # {task: a value an item}
Unit = tuple[str, int]  # (base, seed)
CHAINS = "chains.jsonl.gz"


class StudyError(ValueError):
    """Folders that cannot be compared."""


@dataclass(frozen=True)
class Chain:
    """One finished run: its config (flat), and for each round its figures, the verdicts on its test and validation
    items, and its held-out samples, problem by problem."""

    config: dict[str, Any]
    rounds: list[dict[str, float]]
    correct: list[Items]
    sampled: list[Items]

    @property
    def base(self) -> str:
        return str(self.config["model.seed"] if self.config["model.kind"] == "lab" else self.config["model.path"])

    @property
    def unit(self) -> Unit:
        return self.base, int(self.config["seed"])

    @property
    def ratio(self) -> float:
        return float(self.config.get("merge.ratio", 1.0))

    @property
    def lr(self) -> float:
        return float(self.config["sft.lr"])

    def tasks(self, side: str) -> list[str]:
        """Labels of the near or far tasks."""
        return [t.get("label") or t.get("family") or t["dataset"] for t in self.config[f"suite.{side}"]]

    @classmethod
    def of_run(cls, folder: Path) -> Chain:
        config = _flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        correct: list[Items] = []
        sampled: list[Items] = []
        for number in range(len(rounds)):
            at = folder / "rounds" / f"{number:02d}"
            scores = json.loads((at / "scores.json").read_text())
            correct.append({label: np.array(score["correct"], float) for label, score in scores.items()})
            had = at / "held_out.json"
            sampled.append(_sampled(json.loads(had.read_text())) if had.is_file() else {})
        return cls(config, [_figures(line) for line in rounds], correct, sampled)

    def line(self) -> str:
        """One line of chains.jsonl.gz."""
        correct = [{k: "".join(str(int(x)) for x in v) for k, v in items.items()} for items in self.correct]
        sampled = [{k: [round(float(x), 5) for x in v] for k, v in items.items()} for items in self.sampled]
        whole = {"config": self.config, "rounds": self.rounds, "correct": correct, "sampled": sampled}
        return json.dumps(whole) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Chain:
        read = json.loads(line)
        correct: list[Items] = [{k: np.array([*map(int, v)], float) for k, v in i.items()} for i in read["correct"]]
        sampled: list[Items] = [{k: np.array(v, float) for k, v in i.items()} for i in read["sampled"]]
        return cls(read["config"], read["rounds"], correct, sampled)


def _figures(line: Mapping[str, float]) -> dict[str, float]:
    """The figures that the tables use, without intervals (those of the base's tasks apart)."""
    keep = ("id/acc", "val/id/acc", "ood/", "sample/pass@", "diversity/", "weights/drift", "gap/", "train_sample/")
    first = line["round"] == 0
    return {
        k: round(v, 6) for k, v in line.items()
        if k.startswith(keep) and (not k.endswith(("_low", "_high")) or (first and k.startswith("ood/")))
    }  # fmt: skip


def _sampled(rows: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """{figure: a value a problem}: pass@1, pass@n, share of different solutions, nats of entropy a token."""
    n, right, distinct, _, entropy, tokens = np.array(rows, float).T
    most = int(n.min())
    hit = [1 - math.comb(int(a - c), most) / math.comb(int(a), most) for a, c in zip(n, right, strict=True)]
    return {"pass@1": right / n, f"pass@{most}": np.array(hit), "entropy": entropy / tokens, "distinct": distinct / n}


@dataclass
class Method:
    """The chains of one setting, a unit each."""

    ratio: float
    lr: float
    other: str
    chains: dict[Unit, Chain]

    @property
    def name(self) -> str:
        said = "vanilla" if self.ratio == 1 else f"ratio {self.ratio:g}"
        return f"{said}, lr {self.lr:g}{', ' + self.other if self.other else ''}"

    @cached_property
    def last(self) -> int:
        return min(len(c.rounds) for c in self.chains.values()) - 1

    def mean(self, figure: str, number: int) -> float:
        return float(np.mean([c.rounds[number][figure] for c in self.chains.values()]))


Cell = tuple[Method, int]  # (method, round)


@dataclass(frozen=True)
class Interval:
    """A mean over units, its 95% interval, and how many of the units are on the mean's side of 0."""

    value: float
    low: float
    high: float
    agree: int
    units: int

    def points(self) -> str:
        """In points of accuracy: mean [interval] units that agree / all."""
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}] {self.agree}/{self.units}"

    def percent(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


# --- statistics ----------------------------------------------------------------------------------------------------


def interval(units: Mapping[Unit, Items], resamples: int = RESAMPLES) -> Interval:
    """The mean over units of the mean over tasks of the mean over items, with its bootstrap interval.

    `units` maps (base, seed) to {task: a value an item}; all units have the same tasks and items. Bases are resampled,
    then seeds within each base drawn, and items within each task, alike for all units.
    """
    names = sorted(units)
    tasks = list(units[names[0]])
    per_unit = [np.stack([units[u][t] for u in names]) for t in tasks]  # (units, items) a task
    rng = np.random.default_rng(0)
    weights = unit_weights(names, resamples, rng)
    means = np.zeros(resamples)
    for values in per_unit:
        size = values.shape[1]
        counts = rng.multinomial(size, np.full(size, 1 / size), resamples) / size
        means += np.einsum("ri,ri->r", weights @ values, counts) / len(tasks)
    by_unit = np.mean([v.mean(1) for v in per_unit], 0)
    value = float(by_unit.mean())
    low, high = np.percentile(means, [2.5, 97.5])
    agree = int(np.sum(np.sign(by_unit) == np.sign(value)))
    return Interval(value, float(low), float(high), agree, len(names))


def unit_weights(names: Sequence[Unit], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples, units): the weight of each (base, seed) when bases, and seeds within a base, are drawn anew."""
    bases = sorted({base for base, _ in names})
    weights = np.zeros((resamples, len(names)))
    drawn = rng.multinomial(len(bases), np.full(len(bases), 1 / len(bases)), resamples)
    for b, base in enumerate(bases):
        own = np.array([i for i, (other, _) in enumerate(names) if other == base])
        for times in range(1, len(bases) + 1):
            rows = np.flatnonzero(drawn[:, b] >= times)  # each time that a base is drawn, its seeds are drawn again
            weights[np.ix_(rows, own)] += rng.multinomial(len(own), np.full(len(own), 1 / len(own)), len(rows))
    return weights / weights.sum(1, keepdims=True)


def paired(a: Mapping[Unit, Items], b: Mapping[Unit, Items], tasks: Sequence[str]) -> dict[Unit, Items]:
    """a - b item by item, for the units that both have."""
    both = [u for u in a if u in b]
    if not both:
        raise StudyError("two methods have no (base, seed) in common")
    return {u: {t: a[u][t] - b[u][t] for t in tasks} for u in both}


def difference(a: Mapping[Unit, Items], b: Mapping[Unit, Items], tasks: Sequence[str] | None = None) -> Interval:
    """a - b, paired by unit and item, over the units that both have."""
    return interval(paired(a, b, tasks or list(next(iter(a.values())))))


# --- reading -------------------------------------------------------------------------------------------------------


def read(folders: Sequence[Path]) -> list[Method]:
    """The methods of all finished runs below `folders`, and of the chains.jsonl.gz that an earlier study left there.
    Raises StudyError when there is none. Of two runs of one chain the one with more rounds counts."""
    chains = []
    for folder in folders:
        if (kept := folder / CHAINS).is_file():
            with gzip.open(kept, "rt") as file:
                chains += [Chain.of_line(line) for line in file]
        chains += [Chain.of_run(f.parent) for f in sorted(folder.glob("**/summary.json"))]
    if not chains:
        raise StudyError(f"no finished run, and no {CHAINS}, below {', '.join(map(str, folders))}")
    own = ("seed", "model.seed", "model.path", "sft.lr", "rounds", "optimized_metric", "threads")
    configs = [c.config for c in chains]
    varied = sorted({k for c in configs for k in c if len({str(o.get(k)) for o in configs}) > 1} - set(own))
    varied = [k for k in varied if not k.startswith("merge.") or (k == "merge.anchor" and all(k in c for c in configs))]
    methods: dict[tuple[float, float, str], Method] = {}
    for chain in chains:
        other = ", ".join(f"{k}={chain.config.get(k)}" for k in varied)
        method = methods.setdefault((chain.ratio, chain.lr, other), Method(chain.ratio, chain.lr, other, {}))
        had = method.chains.get(chain.unit)
        if had is None or len(had.rounds) < len(chain.rounds):
            method.chains[chain.unit] = chain
    return sorted(methods.values(), key=lambda m: (m.ratio, m.lr, m.other))


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A config with dotted keys, without what does not tell chains apart."""
    if not isinstance(node, dict):
        return {prefix: _without_folders(node)}
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key not in ("store", "logger", "paths", "program"):
            out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _without_folders(node: Any) -> Any:
    """Local paths by their last part: the same model or file lies elsewhere on another machine."""
    if isinstance(node, dict):
        return {key: _without_folders(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_folders(value) for value in node]
    return Path(node).name if isinstance(node, str) and node.startswith(("/", "~", ".")) else node


class Study:
    """The tables over a set of methods. `rounds` is the round at which methods are compared."""

    def __init__(self, methods: Sequence[Method], rounds: int | None = None) -> None:
        self.methods = list(methods)
        self.vanilla = [m for m in methods if m.ratio == 1]
        if not self.vanilla:
            raise StudyError("no vanilla chains (merge.ratio=1 or merge=none) to compare with")
        self.rounds = rounds or min(m.last for m in methods)
        if short := [m.name for m in methods if m.last < self.rounds]:
            raise StudyError(f"round {self.rounds} is not there for {', '.join(short[:5])}")
        first = next(iter(self.vanilla[0].chains.values()))
        sides = {s: first.tasks(s) for s in ("near", "far")}
        self.id = next(label.removeprefix("val/") for label in first.correct[0] if label.startswith("val/"))
        self.groups = {"ID": [self.id], "OOD near": sides["near"], "OOD far": sides["far"]}
        self.groups = {k: v for k, v in self.groups.items() if v} | {"OOD": sides["near"] + sides["far"]}
        self._items: dict[tuple[int, int], dict[Any, Items]] = {}

    def items(self, method: Method, number: int) -> dict[Any, Items]:
        key = (id(method), number)
        if key not in self._items:
            self._items[key] = {u: c.correct[number] for u, c in method.chains.items()}
        return self._items[key]

    def value(self, method: Method, number: int, group: str) -> Interval:
        items = self.items(method, number)
        return interval({u: {t: i[t] for t in self.groups[group]} for u, i in items.items()})

    def against(self, pairs: Sequence[tuple[Cell, Cell]], group: str) -> Interval:
        """The mean over pairs of (method, round) of their difference, paired by unit and item."""
        found = [paired(self.items(*a), self.items(*b), self.groups[group]) for a, b in pairs]
        units = set.intersection(*(set(f) for f in found))
        return interval({u: {t: np.mean([f[u][t] for f in found], 0) for t in self.groups[group]} for u in units})

    def at_majority(self) -> list[str]:
        """OOD tasks that some base does not solve better than by always giving the commonest answer."""
        found: dict[str, None] = {}
        for chain in self.vanilla[0].chains.values():
            base = chain.rounds[0]
            for task in self.groups["OOD"]:
                if base[f"ood/{task}/acc_low"] <= base[f"ood/{task}/majority"]:
                    found[task] = None
        return list(found)

    # --- tables ------------------------------------------------------------------------------------------------

    def grid(self) -> list[dict[str, Any]]:
        """Each method at the last round, and the base."""
        rows = [self._row("base", self.vanilla[0], 0)]
        return rows + [self._row(m.name, m, self.rounds) for m in self.methods]

    def _row(self, name: str, method: Method, number: int) -> dict[str, Any]:
        row: dict[str, Any] = {"method": name, "units": len(method.chains), "round": number}
        row["val ID"] = f"{100 * method.mean('val/id/acc', number):.1f}"
        row |= {group: self.value(method, number, group).percent() for group in self.groups}
        row["drift"] = f"{method.mean('weights/drift', number):.4f}" if number else ""
        for figure in ("sample/pass@1", "sample/pass@8", "diversity/distinct", "diversity/token_entropy"):
            if figure in next(iter(method.chains.values())).rounds[number]:
                row[figure.split("/")[1]] = f"{method.mean(figure, number):.3f}"
        return row

    def best(self, methods: Sequence[Method], every_round: bool) -> Cell:
        """The (method, round) of the highest mean ID validation accuracy; of equals the smaller step."""
        cells = [
            (m, t)
            for m in sorted(methods, key=lambda m: m.lr)
            for t in (range(1, self.rounds + 1) if every_round else (self.rounds,))
        ]
        return max(cells, key=lambda cell: cell[0].mean("val/id/acc", cell[1]))

    def chosen(self) -> list[dict[str, Any]]:
        """Each ratio at the learning rate that vanilla's validation accuracy chooses, then at its own choice of
        learning rate and round; differences to vanilla chosen the same way."""
        rows = []
        for how, every_round in (("vanilla's learning rate, last round", False), ("own learning rate and round", True)):
            control = self.best(self.vanilla, every_round)
            for ratio, other in sorted({(m.ratio, m.other) for m in self.methods if m.ratio}, reverse=True):
                own = [m for m in self.methods if (m.ratio, m.other) == (ratio, other)]
                if not every_round:
                    own = [m for m in own if m.lr == control[0].lr]
                if not own:
                    continue
                at = self.best(own, every_round)
                rows.append({"chosen by": how, **self._compare(at, control)})
        return rows

    def _compare(self, at: Cell, control: Cell) -> dict[str, Any]:
        row: dict[str, Any] = {"method": at[0].name, "round": at[1], "control": control[0].name, "at round": control[1]}
        row |= {
            what: " / ".join(f"{scale * m.mean(figure, t):.{digits}f}" for m, t in (at, control))
            for what, figure, scale, digits in (("val ID", "val/id/acc", 100, 1), ("drift", "weights/drift", 1, 4))
        }
        if at == control:
            return row
        return row | {group: self.against([(at, control)], group).points() for group in self.groups}

    def matched(self) -> list[dict[str, Any]]:
        """Each merged method at the last round against the vanilla (learning rate, round) that is nearest to it, once
        in mean ID validation accuracy and once in the norm of the drift; and the mean over all of them."""
        rows = []
        cells = [(m, t) for m in sorted(self.vanilla, key=lambda m: m.lr) for t in range(1, self.rounds + 1)]
        for how, figure, away in _MATCHES:
            pairs: list[tuple[Cell, Cell]] = []
            for merged in (m for m in self.methods if 0 < m.ratio < 1):
                smaller = [c for c in cells if c[0].lr <= merged.lr] or cells
                target = merged.mean(figure, self.rounds)
                control = min(smaller, key=lambda c: round(away(c[0].mean(figure, c[1]), target), 9))
                pairs.append(((merged, self.rounds), control))
                rows.append({"equal": how, **self._compare(*pairs[-1])})
            if len(pairs) > 1:
                mean = {group: self.against(pairs, group).points() for group in self.groups}
                rows.append({"equal": how, "method": f"mean of these {len(pairs)}", **mean})
        return rows

    def robust(self) -> list[dict[str, Any]]:
        """For each ratio: over how many (learning rate, round) cells ID and OOD stay within 2 points of that ratio's
        best cell, and of the best over all ratios."""
        rows = []
        means: dict[tuple[int, int], tuple[float, float]] = {}
        for m in self.methods:
            for t in range(1, self.rounds + 1):
                means[id(m), t] = m.mean("id/acc", t), m.mean("ood/acc", t)
        top = max(v[0] for v in means.values()), max(v[1] for v in means.values())
        grids = [{m.lr for m in self.methods if m.ratio == r} for r in {m.ratio for m in self.methods if m.ratio}]
        shared = set.intersection(*grids)  # learning rates that every ratio has
        for ratio, other in sorted({(m.ratio, m.other) for m in self.methods if m.ratio}):
            own = [m for m in self.methods if (m.ratio, m.other) == (ratio, other) and m.lr in shared]
            cells = [(m, t, *means[id(m), t]) for m in own for t in range(1, self.rounds + 1)]
            best = max(c[2] for c in cells), max(c[3] for c in cells)
            row: dict[str, Any] = {"ratio": f"{ratio:g}{', ' + other if other else ''}", "cells": len(cells)}
            row |= {"best ID": f"{100 * best[0]:.1f}", "best OOD": f"{100 * best[1]:.1f}"}
            row["ID within 2 of own best"] = sum(c[2] >= best[0] - WITHIN for c in cells)
            row["OOD within 2 of own best"] = sum(c[3] >= best[1] - WITHIN for c in cells)
            row["ID within 2 of overall best"] = sum(c[2] >= top[0] - WITHIN for c in cells)
            both = [c for c in cells if c[2] >= top[0] - WITHIN and c[3] >= top[1] - WITHIN]
            row["ID and OOD within 2 of overall best"] = len(both)
            rates = sorted({c[0].lr for c in both if c[1] == self.rounds})
            row["learning rates, last round"] = " ".join(f"{lr:g}" for lr in rates)
            rows.append(row)
        return rows

    def collapse(self) -> list[dict[str, Any]]:
        """Held-out sampling over rounds, for the learning rates that vanilla and merged chains share, with the
        difference to vanilla of the same learning rate, paired by problem and unit."""
        rows = []
        twins = {(m.lr, m.other): m for m in self.vanilla}
        for m in self.methods:
            control = twins.get((m.lr, m.other))
            if control is None or m.ratio == 0:
                continue
            last = min(m.last, control.last)
            for number in (*range(0, last, 2), last) if last > 4 else range(last + 1):
                mine = {u: c.sampled[number] for u, c in m.chains.items()}
                theirs = {u: c.sampled[number] for u, c in control.chains.items()}
                row: dict[str, Any] = {"method": m.name, "round": number}
                for figure in next(iter(mine.values())):
                    one = {u: {figure: i[figure]} for u, i in mine.items()}
                    got = interval(one)
                    row[figure] = f"{got.value:.3f} [{got.low:.3f}, {got.high:.3f}]"
                    if m is not control:
                        gap = difference(mine, theirs, [figure])
                        row[f"{figure} - vanilla"] = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
                rows.append(row)
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """sweep.csv: the figures of every chain and round."""
        out = []
        for m in self.methods:
            for (base, seed), chain in sorted(m.chains.items()):
                for number, line in enumerate(chain.rounds):
                    head = {"ratio": m.ratio, "lr": m.lr, "other": m.other, "base": base, "seed": seed}
                    figures = {k: round(v, 4) for k, v in line.items() if not k.endswith(("_low", "_high", "majority"))}
                    out.append({**head, "round": number, **figures})
        return out


_MATCHES: tuple[tuple[str, str, Callable[[float, float], float]], ...] = (
    ("ID (validation)", "val/id/acc", lambda a, b: abs(a - b)),
    ("drift", "weights/drift", lambda a, b: abs(math.log(a / b))),
)


# --- output --------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows])


def draw(study: Study, path: Path) -> None:
    """OOD against ID and OOD against drift, at the last round: a line a ratio over learning rates."""
    from matplotlib.figure import Figure

    sides = [g for g in ("OOD near", "OOD far") if g in study.groups]
    figure = Figure(figsize=(4.6 * len(sides), 7.6), layout="constrained")
    axes: Any = figure.subplots(2, len(sides), squeeze=False)
    base = {g: 100 * study.value(study.vanilla[0], 0, g).value for g in study.groups}
    for ratio in sorted({m.ratio for m in study.methods if m.ratio}, reverse=True):
        own = sorted((m for m in study.methods if m.ratio == ratio), key=lambda m: m.lr)
        label = "vanilla" if ratio == 1 else f"ratio {ratio:g}"
        values = {g: [study.value(m, study.rounds, g) for m in own] for g in study.groups}
        for column, group in enumerate(sides):
            y = np.array([100 * v.value for v in values[group]])
            error = np.array([[100 * (v.value - v.low), 100 * (v.high - v.value)] for v in values[group]]).T
            for row, x in enumerate(
                ([100 * v.value for v in values["ID"]], [100 * m.mean("weights/drift", study.rounds) for m in own])
            ):
                axes[row][column].errorbar(
                    x, y, error, marker="s" if ratio == 1 else "o", markersize=5, linewidth=1.1, elinewidth=0.5,
                    color="black" if ratio == 1 else None, label=label, alpha=0.9,
                )  # fmt: skip
    for column, group in enumerate(sides):
        for row, what in enumerate(("ID accuracy (%)", "drift: |theta - base| / |base| (%, log scale)")):
            axis = axes[row][column]
            axis.axhline(base[group], color="0.5", linestyle=":", linewidth=1)
            axis.set(xlabel=what, ylabel=f"{group} accuracy (%)")
            axis.grid(alpha=0.25)
        axes[0][column].axvline(base["ID"], color="0.5", linestyle=":", linewidth=1)
        axes[1][column].set_xscale("log")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"round {study.rounds}; a point a learning rate; dotted: base; bars: 95%", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_collapse(study: Study, path: Path) -> None:
    """Held-out sampling over rounds, vanilla and merged, for the learning rates with the longest chains."""
    from matplotlib.figure import Figure

    longest = max(m.last for m in study.methods)
    rates = {m.lr for m in study.methods if m.last == longest and m.ratio < 1} or {m.lr for m in study.methods}
    methods = [m for m in study.methods if m.last == longest and m.ratio and m.lr in rates]
    first = next(iter(methods[0].chains.values())).sampled[0]
    figure = Figure(figsize=(3.5 * len(first), 3.3), layout="constrained")
    axes: Any = figure.subplots(1, len(first), squeeze=False)[0]
    for m in methods:
        by_round = [{u: c.sampled[t] for u, c in m.chains.items()} for t in range(longest + 1)]
        for axis, name in zip(axes, first, strict=True):
            values = [interval({u: {name: i[name]} for u, i in units.items()}, 500) for units in by_round]
            (line,) = axis.plot([v.value for v in values], marker="o", markersize=3, label=m.name)
            axis.fill_between(
                range(longest + 1), [v.low for v in values], [v.high for v in values], color=line.get_color(),
                alpha=0.12, linewidth=0,
            )  # fmt: skip
            axis.set_title({"entropy": "entropy (nats a token)"}.get(name, name), fontsize=10)
            axis.set_xlabel("round")
            axis.grid(alpha=0.25)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m itermerge.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="sweep or run folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables and figures")
    parser.add_argument("--rounds", type=int, help="the round to compare at (default: the last that all chains have)")
    args = parser.parse_args(argv)
    try:
        study = Study(read(args.folders), args.rounds)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "sweep.csv", study.rows())
    chains = sorted(c.line() for m in study.methods for c in m.chains.values())
    (args.out / CHAINS).write_bytes(gzip.compress("".join(chains).encode(), mtime=0))
    tables = {"grid": study.grid(), "chosen": study.chosen(), "matched": study.matched(), "robust": study.robust()}
    if next(iter(study.vanilla[0].chains.values())).sampled[0]:
        tables["collapse"] = study.collapse()
        draw_collapse(study, args.out / "collapse.png")
    for name, rows in tables.items():
        write_csv(args.out / f"{name}.csv", rows)
        print(f"\n{name} (round {study.rounds})\n\n{markdown(rows)}" if rows else f"\n{name}: nothing to compare")
    if floor := study.at_majority():
        print(f"\nat the majority baseline, nothing to lose there: {', '.join(floor)}")
    draw(study, args.out / "frontier.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

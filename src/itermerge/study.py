"""Is merging more than a smaller step? Comparisons over finished sweeps, paired by item and by seed.

    python -m itermerge.study DIR [DIR ...] --out results/NAME

`DIR` are sweep folders, run folders, or the --out of an earlier study, which goes on there: learning rates x ratios x
seeds x bases. Written to --out, and printed:

    chains.jsonl.gz every chain with its verdicts item by item: all that the tables are made of
    sweep.csv       a row a chain and round: the figures
    tasks.csv       each task on each base: accuracy with its Wilson interval, and the majority baseline
    grid.csv        each method (ratio, learning rate) at the last round
    chosen.csv      the learning rate chosen on vanilla's ID validation accuracy, then each ratio at it, and each ratio
                    at the learning rate and round that its own validation accuracy chooses; against chosen vanilla
    matched.csv     each merged method against vanilla with a smaller step or fewer rounds: at equal ID accuracy, at
                    equal drift, and the mean of all of them
    robust.csv      over how many learning rates and rounds a method stays within 2 points of its best
    collapse.csv    pass@k, entropy and different solutions over rounds, vanilla against merging
    *.png           figures

A *method* is what chains share apart from seed and base: rule and policy of the merge, ratio, learning rate, and what
else differs (keys that follow from rule and policy are not named). Where chains have labels, a method whose other keys
are not those of most chains goes by its label (a baseline, as star): it is no control, and stands at its own last round
where it has fewer than the others (RFT has one). A *unit* is one (base, seed); a chain is a method on
a unit. Vanilla is what merges nothing, whatever its keys: linear at ratio 1, not model stock at ratio 1.
All tables are over the units that every method has. Choices (learning rate, round, match) look at validation items and
at weights, never at test items; `robust` counts on test items, and is a description.

Intervals are 95% percentile bootstraps. Items are resampled within each task, alike for all chains, which answer the
same items. Bases and seeds are crossed (a seed has the same problems on every base) and resampled independently, n - 1
of n at a time (Rao and Wu, 1988), which makes the variance right for few of them. The tails are still those of three
clusters: in simulation (`benchmarks/coverage.py`) such an interval covers the truth in 82% of cases where bases or
seeds differ most, in 95 to 98% where items do. So beside each difference stands how many units have its sign, as 8/9.
Intervals are conditional on the choices. No torch is needed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from .config import conf_dir
from .evaluation import wilson
from .report import charts, flat
from .report.folders import is_vanilla, rule_of

RESAMPLES = 2000
WITHIN = 0.02  # "within 2 points of its best"
EQUAL_ID = 0.01  # controls at equal ID: validation accuracies at most a point apart
EQUAL_DRIFT = 1.15  # controls at equal drift: norms within 15%
Items = Mapping[str, np.ndarray]  # {task: a value an item}
Unit = tuple[str, int]  # (base, seed)
CHAINS = "chains.jsonl.gz"
UNIT_KEYS = ("seed", "model.seed", "model.path")
NO_MATTER = (
    "rounds", "optimized_metric", "threads", "suite.pass_k_n", "suite.pre_merge", "suite.n_validation", "merge.ratio",
    "merge.kind", "merge.policy.kind",
)  # fmt: skip
LOOKS = "analysis."  # looks at a chain, does not change it
OLDER = ("merge.kind", "merge.ratio", "merge.anchor", "merge.every_n_epochs", "merge.reset_optimizer")
PLAIN: Mapping[str, Any] = {  # what keys were in older runs, which do not have them
    "label": "", "sampler.hints": 0, "sft.l2_to_base": 0.0, "sft.kl_to_base": 0.0, "sft.replay": None,
    "sft.replay_share": 0.0, "sft.patience": None, "task.labels": "gold", "teacher.kind": "none",
}  # fmt: skip
ITEM_KEYS = (  # chains that differ here have not answered the same items
    "suite.", "task.kind", "task.family", "task.dataset", "task.options", "task.label", "task.file", "task.holds",
    "task.n_validation",
)  # fmt: skip


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

    @property
    def vanilla(self) -> bool:
        return is_vanilla(self.config)

    @property
    def rule(self) -> str:
        """Rule and policy, as `ties_rounds` or `linear importance`; "" for linear with a constant ratio, for what
        merges nothing, and at ratio 0, which is the base whatever the rule."""
        rule = rule_of(self.config)
        return "" if self.vanilla or not self.ratio or (rule == "linear" and self.ratio != 1) else rule

    def merge(self, key: str) -> Any:
        """The value of a key of the merge; what older runs do not have is that of merge=linear, and a seed of masks
        that is the run's is None."""
        value = self.config.get(key, neutral().get(key))
        return None if key == "merge.seed" and value == self.config["seed"] else value

    def tasks(self, side: str) -> list[str]:
        """Labels of the near or far tasks."""
        return [t.get("label") or t.get("family") or t["dataset"] for t in self.config[f"suite.{side}"]]

    def figure(self, name: str, number: int) -> float:
        """A figure of a round; the drift of a round that was skipped is that of the round before."""
        if name != "weights/drift":
            return self.rounds[number][name]
        return next((r[name] for r in reversed(self.rounds[: number + 1]) if name in r), 0.0)

    @classmethod
    def of_run(cls, folder: Path) -> Chain:
        whole = flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
        config = {key: _without_folders(value) for key, value in whole.items() if not key.startswith("program.")}
        rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        correct: list[Items] = []
        sampled: list[Items] = []
        for number in range(len(rounds)):
            at = folder / "rounds" / f"{number:02d}"
            scores = json.loads((at / "scores.json").read_text())
            correct.append({label: np.array(score["correct"], float) for label, score in scores.items()})
            had = at / "held_out.jsonl"
            sampled.append(_sampled(_counts(had)) if had.is_file() else {})
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
    """The figures that the tables use, without intervals."""
    keep = ("id/acc", "val/id/acc", "ood/", "sample/pass@", "diversity/", "weights/drift", "gap/", "train_sample/")
    kept = [k for k in line if (k.startswith(keep) and not k.endswith(("_low", "_high"))) or k == "merge/ratio"]
    return {k: round(line[k], 6) for k in kept}


@cache
def neutral() -> dict[str, Any]:
    """The keys of merge=linear that older runs do not have, and their values, which change nothing."""
    at = conf_dir() / "merge"
    merge, policy = (OmegaConf.to_container(OmegaConf.load(at / f)) for f in ("linear.yaml", "policy/constant.yaml"))
    assert isinstance(merge, dict)
    whole = flat({"merge": {k: v for k, v in merge.items() if k != "defaults"} | {"policy": policy}})
    return {k: v for k, v in whole.items() if k not in OLDER}


def _counts(file: Path) -> list[list[float]]:
    """For each problem of held_out.jsonl: samples, correct, different and different correct ones, nats, tokens."""
    problems: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        problems.setdefault(row["id"], []).append(row)
    return [
        [
            len(rows), sum(r["verdict"] for r in rows), len({r["completion"] for r in rows}),
            len({r["completion"] for r in rows if r["verdict"]}), sum(r["entropy"] for r in rows),
            sum(r["tokens"] for r in rows),
        ]
        for rows in problems.values()
    ]  # fmt: skip


def _sampled(rows: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """{figure: a value a problem}: pass@1, pass@n, share of different solutions, nats of entropy a token."""
    n, right, distinct, _, entropy, tokens = np.array(rows, float).T
    most = int(n.min())
    hit = [1 - math.comb(int(a - c), most) / math.comb(int(a), most) for a, c in zip(n, right, strict=True)]
    # by the mean number of tokens: their mean over problems is then all nats over all tokens, as in the run's figures
    return {"pass@1": right / n, f"pass@{most}": np.array(hit), "entropy": entropy / tokens.mean(),
            "distinct": distinct / n}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """The chains of one setting, a unit each. `rule` is "" for linear with a constant ratio; `how` is what else is
    particular of its merging, `other` of the rest."""

    ratio: float
    lr: float
    how: str
    other: str
    chains: dict[Unit, Chain]
    rule: str = ""
    named: bool = False  # `other` is a label

    @property
    def vanilla(self) -> bool:
        return self.ratio == 1 and not self.rule and not self.named

    @property
    def setting(self) -> str:
        """All but the learning rate."""
        return ", ".join(dict.fromkeys(filter(None, (*self._merge, self.how, self.other))))

    @property
    def name(self) -> str:
        return ", ".join(dict.fromkeys(filter(None, (*self._merge, f"lr {self.lr:g}", self.how, self.other))))

    @property
    def _merge(self) -> tuple[str, ...]:
        if self.ratio == 1 and not self.rule:
            return (self.other,) if self.named else ("vanilla",)
        return self.rule, f"ratio {self.ratio:g}"

    @cached_property
    def last(self) -> int:
        return min(len(c.rounds) for c in self.chains.values()) - 1

    @property
    def like(self) -> str:
        """`other` of the methods that this one is compared with."""
        return "" if self.named else self.other

    def at(self, number: int) -> int:
        """The round to look at for `number`: the last, where a named method has fewer."""
        return min(number, self.last) if self.named else number

    def mean(self, figure: str, number: int) -> float:
        return round(float(np.mean([c.figure(figure, self.at(number)) for c in self.chains.values()])), 9)


Cell = tuple[Method, int]  # (method, round)


@dataclass(frozen=True)
class Interval:
    """A mean over units, its 95% interval, how many of the units are on its side of 0, and the two-sided p of 0: twice
    the share of resamples on the other side, at least 2 / (resamples + 1). It is as good as the interval, no better."""

    value: float
    low: float
    high: float
    agree: int
    units: int
    p: float = 1.0

    def points(self) -> str:
        """In points of accuracy: mean [interval] units that agree / all."""
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}] {self.agree}/{self.units}"

    def percent(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


# --- statistics ----------------------------------------------------------------------------------------------------


def interval(units: Mapping[Unit, Items], resamples: int | None = None) -> Interval:
    """The mean over units of the mean over tasks of the mean over items, with its bootstrap interval.

    `units` maps (base, seed) to {task: a value an item}; all units have the same tasks and items. Bases, seeds, and
    items within each task are resampled, items alike for all units.
    """
    resamples = resamples or RESAMPLES
    names = sorted(units)
    tasks = list(units[names[0]])
    per_unit = [np.stack([units[u][t] for u in names]) for t in tasks]  # (units, items) a task
    weights, drawn = _draws(tuple(names), tuple(values.shape[1] for values in per_unit), resamples)
    means = np.zeros(resamples)
    for values, counts in zip(per_unit, drawn, strict=True):
        means += np.einsum("ri,ri->r", weights @ values, counts) / len(tasks)
    by_unit = np.mean([v.mean(1) for v in per_unit], 0).round(12)
    value = round(float(by_unit.mean()), 12)
    low, high = np.percentile(means, [2.5, 97.5])
    agree = int(np.sum(by_unit * np.sign(value) > 0))
    low, high = round(float(low), 12), round(float(high), 12)
    beyond = min(int(np.sum(means.round(12) <= 0)), int(np.sum(means.round(12) >= 0)))
    p = min(1.0, 2 * (1 + beyond) / (1 + resamples))
    return Interval(value, min(value, low), max(value, high), agree, len(names), p)


@lru_cache(maxsize=8)
def _draws(names: tuple[Unit, ...], sizes: tuple[int, ...], resamples: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Weights of units, and of each task's items, (resamples, items): alike for all intervals over the same ones."""
    rng = np.random.default_rng(0)
    weights = unit_weights(names, resamples, rng)
    return weights, [rng.multinomial(n, np.full(n, 1 / n), resamples) / n for n in sizes]


def unit_weights(names: Sequence[Unit], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples, units): the weight of each (base, seed) when bases and seeds are drawn anew, n - 1 of n each."""
    weights = np.ones((resamples, len(names)))
    for factor in (0, 1):
        levels = sorted({name[factor] for name in names}, key=str)
        n = len(levels)
        drawn = rng.multinomial(max(1, n - 1), np.full(n, 1 / n), resamples)
        weights *= drawn[:, [levels.index(name[factor]) for name in names]]
    weights[weights.sum(1) == 0] = 1  # where a base has not all seeds, a draw may hit no chain
    return weights / weights.sum(1, keepdims=True)


def paired(a: Mapping[Unit, Items], b: Mapping[Unit, Items], tasks: Sequence[str]) -> dict[Unit, Items]:
    """a - b item by item, for the units that both have. Raises StudyError when there are none."""
    both = [u for u in a if u in b]
    if not both:
        raise StudyError("two methods have no (base, seed) in common")
    return {u: {t: a[u][t] - b[u][t] for t in tasks} for u in both}


def difference(a: Mapping[Unit, Items], b: Mapping[Unit, Items], tasks: Sequence[str] | None = None) -> Interval:
    """a - b, paired by unit and item, over the units that both have."""
    return interval(paired(a, b, tasks or list(next(iter(a.values())))))


# --- reading -------------------------------------------------------------------------------------------------------


Found = tuple[str, Chain]  # where it was read, and the chain


def read(folders: Sequence[Path]) -> tuple[list[Method], list[str]]:
    """The methods of all finished runs below `folders` and of the chains.jsonl.gz that an earlier study left there, and
    the run folders that are not finished.

    Raises StudyError when a folder has no finished run, chains have not answered the same items, or two runs of one
    chain disagree. Of two runs of one chain the one with more rounds counts.
    """
    chains, unfinished = find(folders)
    return methods_of(chains), unfinished


def find(folders: Sequence[Path]) -> tuple[list[Found], list[str]]:
    """All chains below `folders`, and the run folders that are not finished. Raises StudyError where one has none."""
    chains: list[Found] = []
    unfinished = []
    for folder in folders:
        before = len(chains)
        if (kept := folder / CHAINS).is_file():
            with gzip.open(kept, "rt") as file:
                chains += [(f"{kept}, line {at}", Chain.of_line(line)) for at, line in enumerate(file, 1)]
        for config in sorted(folder.glob("**/config.yaml")):
            if (config.parent / "summary.json").is_file():
                chains.append((str(config.parent), Chain.of_run(config.parent)))
            elif (config.parent / "rounds.jsonl").is_file() or (config.parent / "FAILED").is_file():
                unfinished.append(str(config.parent))
        if len(chains) == before:
            raise StudyError(f"no finished run, and no {CHAINS}, below {folder}")
    return chains, unfinished


def methods_of(chains: Sequence[Found]) -> list[Method]:
    """Chains by method. Raises StudyError when they have not answered the same items, or two of one chain disagree."""
    configs = [c.config for _, c in chains]
    ours = [k for k in sorted({k for c in configs for k in c}) if k not in (*UNIT_KEYS, *NO_MATTER, "sft.lr", "label")]
    varied = [k for k in ours if not k.startswith(("merge.", LOOKS))]
    # another key that older runs do not have changed nothing when it came
    varied = [k for k in varied if len({str(c.get(k, PLAIN.get(k))) for c in configs if k in c or k in PLAIN}) > 1]
    if apart := [k for k in varied if f"{k}.".startswith(tuple(f"{key.rstrip('.')}." for key in ITEM_KEYS))]:
        raise StudyError(f"runs that differ in {', '.join(apart)} have not answered the same items; study them apart")
    how_keys: dict[str, list[str]] = {}  # by rule: what follows from rule and policy does not vary there
    for rule in {c.rule for _, c in chains}:
        own = [c for _, c in chains if c.rule == rule and c.ratio and not c.vanilla]
        keys = [k for k in ours if k.startswith("merge.")]
        how_keys[rule] = [k for k in keys if len({str(c.merge(k)) for c in own}) > 1]
    ways = [
        ", ".join(f"{k}={c.merge(k)}" for k in how_keys[c.rule]) if c.ratio > 0 and not c.vanilla else ""
        for _, c in chains
    ]
    methods: dict[tuple[float, float, str, str, str], Method] = {}
    where: dict[int, str] = {}
    for (at, chain), (how, other, named) in zip(chains, _others(configs, varied, ways), strict=True):
        key = (chain.ratio, chain.lr, how, other, chain.rule)
        method = methods.setdefault(key, Method(*key[:4], {}, chain.rule, named))
        had = method.chains.get(chain.unit)
        if had is not None and any(
            a[k] != b[k] for a, b in zip(had.rounds, chain.rounds, strict=False) for k in a.keys() & b.keys()
        ):  # what was looked at may differ
            raise StudyError(
                f"{where[id(had)]} and {at} are runs of one chain ({method.name}, base {chain.base}, seed "
                f"{chain.unit[1]}) with different figures; leave one out"
            )
        where[id(chain)] = at
        if had is None or len(had.rounds) < len(chain.rounds):
            method.chains[chain.unit] = chain
    return sorted(methods.values(), key=lambda m: (m.vanilla, m.rule, m.ratio, m.lr, m.how, m.other))


def _others(
    configs: Sequence[Mapping[str, Any]], varied: Sequence[str], ways: Sequence[str]
) -> list[tuple[str, str, bool]]:
    """For each config its way of merging, what else of it is particular, by its values of `varied`, and whether that is
    a label, which then stands for both. Raises StudyError for a label of several settings."""
    if not any(c.get("label") for c in configs):
        said = [", ".join(f"{k}={c.get(k, PLAIN.get(k))}" for k in varied) for c in configs]
        return [(way, other, False) for way, other in zip(ways, said, strict=True)]
    looked_at = [*varied, *OLDER[2:]]  # of merges, what a constant ratio has as well
    values = [[str(c.get(k, PLAIN.get(k))) for k in looked_at] for c in configs]
    for own, config in zip(values, configs, strict=True):
        if is_vanilla(config):  # merges nothing, whatever its keys
            own[len(varied) :] = [""] * (len(looked_at) - len(varied))
    columns = [[v for v in column if v] or [""] for column in zip(*values, strict=True)]
    usual = [Counter(column).most_common(1)[0][0] for column in columns]
    usual = [str(PLAIN[k]) if k in PLAIN else u for k, u in zip(looked_at, usual, strict=True)]
    settings: dict[str, tuple[list[str], str]] = {}
    out = []
    for config, own, way in zip(configs, values, ways, strict=True):
        apart = [f"{k}={v}" for k, v, u in zip(looked_at, own, usual, strict=True) if v != u and v]
        label = str(config.get("label") or "")
        if apart and label and settings.setdefault(label, (own, way)) != (own, way):
            raise StudyError(
                f"label {label!r} names two settings, {', '.join(apart)} {way} and another; study them apart"
            )
        plain = {f"{k}={u}" for k, u in zip(looked_at, usual, strict=True)}  # what a constant ratio has anyway
        way = ", ".join(part for part in way.split(", ") if part not in plain)
        out.append(("", label, True) if apart and label else (way, ", ".join(apart), False))
    return out


def _without_folders(node: Any) -> Any:
    """Local paths by their last two parts: the same model or file lies elsewhere on another machine."""
    if isinstance(node, dict):
        return {key: _without_folders(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_folders(value) for value in node]
    return "/".join(Path(node).parts[-2:]) if isinstance(node, str) and node.startswith(("/", "~", ".")) else node


class Study:
    """The tables over a set of methods, on the units that all have (ratio 0 apart, which is compared with nothing).
    `rounds` is the round at which methods are compared."""

    def __init__(self, methods: Sequence[Method], rounds: int | None = None) -> None:
        live = [m for m in methods if m.ratio]
        if not any(m.vanilla for m in live):
            raise StudyError("no vanilla chains (merge.ratio=1 or merge=none) to compare with")
        if rounds is not None and rounds < 1:
            raise StudyError(f"--rounds: {rounds} is not a round; the first is 1")
        have = [set(m.chains) for m in live]
        self.units, every = sorted(set.intersection(*have)), sorted(set.union(*have))
        if not self.units:
            raise StudyError("the methods have no (base, seed) in common; finish the sweep, or study fewer folders")
        self.left_out = [u for u in every if u not in self.units]
        self.methods = [replace(m, chains={u: m.chains[u] for u in self.units}) for m in live]
        self.vanilla = [m for m in self.methods if m.vanilla]
        self.zero = [m for m in methods if not m.ratio]
        whole = [m for m in self.methods if not m.named]
        self.rounds = rounds or min(m.last for m in whole)
        if short := [m.name for m in whole if m.last < self.rounds]:
            raise StudyError(f"round {self.rounds} is not there for {', '.join(short[:5])}")
        first = next(iter(self.vanilla[0].chains.values()))
        sides = {s: first.tasks(s) for s in ("near", "far")}
        self.id = next(label.removeprefix("val/") for label in first.correct[0] if label.startswith("val/"))
        self.groups = {"ID": [self.id], "OOD near": sides["near"], "OOD far": sides["far"]}
        self.groups = {k: v for k, v in self.groups.items() if v} | {"OOD": sides["near"] + sides["far"]}
        self.has_samples = all(c.sampled[0] for m in self.methods for c in m.chains.values())

    def value(self, method: Method, number: int, group: str) -> Interval:
        items = {u: c.correct[method.at(number)] for u, c in method.chains.items()}
        return interval({u: {t: i[t] for t in self.groups[group]} for u, i in items.items()})

    def against(self, pairs: Sequence[tuple[Cell, Cell]], group: str) -> Interval:
        """The mean over pairs of (method, round) of their difference, paired by unit and item."""
        tasks = self.groups[group]
        found = []
        for (a, at), (b, bt) in pairs:
            mine, theirs = ({u: c.correct[m.at(t)] for u, c in m.chains.items()} for m, t in ((a, at), (b, bt)))
            found.append(paired(mine, theirs, tasks))
        return interval({u: {t: np.mean([f[u][t] for f in found], 0) for t in tasks} for u in self.units})

    # --- tables ------------------------------------------------------------------------------------------------

    def tasks(self) -> list[dict[str, Any]]:
        """Each task on each base: greedy accuracy with its Wilson interval, and what a constant answer would score."""
        rows = []
        bases = {chain.base: chain for m in self.methods for chain in m.chains.values()}
        for group, labels in self.groups.items():
            for task in labels if group != "OOD" else ():
                row: dict[str, Any] = {"task": task, "side": group}
                for base, chain in sorted(bases.items()):
                    correct, n = int(chain.correct[0][task].sum()), len(chain.correct[0][task])
                    low, high = wilson(correct, n)
                    majority = chain.rounds[0].get(f"ood/{task}/majority")
                    row |= {"items": n} | ({} if majority is None else {"majority": f"{100 * majority:.1f}"})
                    mark = " at the majority" if majority is not None and low <= majority else ""
                    row[f"base {base}"] = f"{100 * correct / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]{mark}"
                rows.append(row)
        return rows

    def at_majority(self) -> list[str]:
        """OOD tasks that some base does not solve better than by always giving the commonest answer."""
        return [row["task"] for row in self.tasks() if any("at the majority" in str(v) for v in row.values())]

    def grid(self) -> list[dict[str, Any]]:
        """Each method at the last round, and the base."""
        rows = [self._row("base", self.vanilla[0], 0)]
        shown = [m for m in (*self.zero, *self.methods) if m.named or m.last >= self.rounds]
        return rows + [self._row(m.name, m, m.at(self.rounds)) for m in shown]

    def _row(self, name: str, method: Method, number: int) -> dict[str, Any]:
        row: dict[str, Any] = {"method": name, "units": len(method.chains), "round": number}
        row["val ID"] = f"{100 * method.mean('val/id/acc', number):.1f}"
        row |= {group: self.value(method, number, group).percent() for group in self.groups}
        row["drift"] = f"{method.mean('weights/drift', number):.4f}" if number else ""
        for figure in ("sample/pass@1", "sample/pass@8", "diversity/distinct", "diversity/token_entropy"):
            if all(figure in c.rounds[number] for c in method.chains.values()):
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
        """Each setting at the learning rate that vanilla's validation accuracy chooses (among those that all settings
        have), then at its own choice of learning rate and round; differences to vanilla chosen the same way."""
        settings: dict[str, list[Method]] = {}
        for m in sorted(self.methods, key=lambda m: (not m.vanilla, m.rule, -m.ratio)):
            settings.setdefault(m.setting, []).append(m)
        shared = set.intersection(*({m.lr for m in own} for own in settings.values()))
        same = "vanilla's learning rate" if len(shared) > 1 else "the one learning rate that all have"
        rows = []
        for how, every_round in ((f"{same}, last round", False), ("own learning rate and round", True)):
            for own in settings.values():
                vanilla = [m for m in self.vanilla if m.other == own[0].like]
                if not every_round:
                    vanilla, own = ([m for m in some if m.lr in shared] for some in (vanilla, own))
                if not vanilla or not own:
                    continue
                control = self.best(vanilla, every_round)
                at = self.best(own if every_round else [m for m in own if m.lr == control[0].lr], every_round)
                row = {"chosen by": how, **self._compare(at, control)}
                rates = sorted(m.lr for m in settings[at[0].setting])
                if len(rates) > 1 and at[0].lr in (rates[0], rates[-1]):
                    row["note"] = f"the {'lowest' if at[0].lr == rates[0] else 'highest'} rate tried"
                rows.append(row)
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
        """Each merged method at the last round against vanilla with a smaller learning rate or fewer rounds.

        At equal ID: of the (learning rate, round) cells whose mean ID validation accuracy is at most a point away, the
        one with the smallest drift, which is the gentlest vanilla that learns as much. At equal drift: the nearest
        within 15%. A method without such a cell has no control, and is not in the mean over all of them.
        """
        rows = []
        for how, find in (("ID (validation)", self.equal_id), ("drift", self.equal_drift)):
            pairs: list[tuple[Cell, Cell]] = []
            merged = [m for m in self.methods if not m.vanilla]
            for m in merged:
                cells = [
                    (v, t) for v in self.vanilla if v.other == m.like for t in range(1, self.rounds + 1)
                    if v.lr < m.lr or (v.lr == m.lr and t < self.rounds)
                ]  # fmt: skip
                control = find((m, self.rounds), cells)
                if control is None:
                    rows.append({"equal": how, "method": m.name, "round": m.at(self.rounds), "control": "none is near"})
                    continue
                pairs.append(((m, m.at(self.rounds)), control))
                rows.append({"equal": how, **self._compare(*pairs[-1])})
            if len(pairs) > 1:
                mean = {group: self.against(pairs, group).points() for group in self.groups}
                of = f"{len(pairs)}" if len(pairs) == len(merged) else f"{len(pairs)} of {len(merged)}"
                rows.append({"equal": how, "method": f"mean of these {of}", **mean})
        return rows

    def equal_id(self, at: Cell, cells: Sequence[Cell]) -> Cell | None:
        """Of the cells whose mean ID validation accuracy is at most a point away the one with the smallest drift."""
        target = at[0].mean("val/id/acc", at[1])
        near = [c for c in cells if abs(c[0].mean("val/id/acc", c[1]) - target) <= EQUAL_ID + 1e-9]
        return min(near, key=lambda c: c[0].mean("weights/drift", c[1]), default=None)

    def equal_drift(self, at: Cell, cells: Sequence[Cell]) -> Cell | None:
        """Of the cells whose mean drift is within 15% the nearest."""
        target = at[0].mean("weights/drift", at[1])
        drifts = [(c[0].mean("weights/drift", c[1]), c) for c in cells]
        near = [(abs(math.log(d / target)), c) for d, c in drifts if d > 0 and target > 0]
        away, cell = min(near, key=lambda x: x[0], default=(math.inf, at))
        return cell if away <= math.log(EQUAL_DRIFT) else None

    def robust(self) -> list[dict[str, Any]]:
        """For each setting, over the learning rates that all settings have: over how many (learning rate, round) cells
        ID and OOD stay within 2 points of the setting's best cell, and of the best over all settings. On test items."""
        settings: dict[str, list[Method]] = {}
        for m in self.methods:
            settings.setdefault(m.setting, []).append(m)
        shared = set.intersection(*({m.lr for m in own} for own in settings.values()))
        cells = {
            name: [
                (m, t, m.mean("id/acc", t), m.mean("ood/acc", t))
                for m in own if m.lr in shared for t in range(1, self.rounds + 1)
            ]
            for name, own in settings.items()
        }  # fmt: skip
        if not shared:
            return []
        every = [c for own in cells.values() for c in own]
        top = max(c[2] for c in every) - WITHIN - 1e-9, max(c[3] for c in every) - WITHIN - 1e-9
        rows = []
        for name, own in cells.items():
            best = max(c[2] for c in own), max(c[3] for c in own)
            both = [c for c in own if c[2] >= top[0] and c[3] >= top[1]]
            row: dict[str, Any] = {"method": name, "cells": len(own)}
            row |= {"best ID": f"{100 * best[0]:.1f}", "best OOD": f"{100 * best[1]:.1f}"}
            row["ID within 2 of own best"] = sum(c[2] >= best[0] - WITHIN - 1e-9 for c in own)
            row["OOD within 2 of own best"] = sum(c[3] >= best[1] - WITHIN - 1e-9 for c in own)
            row["ID within 2 of overall best"] = sum(c[2] >= top[0] for c in own)
            row["ID and OOD within 2 of overall best"] = len(both)
            rates = sorted({c[0].lr for c in both if c[1] == self.rounds})
            row["of these at the last round, learning rates"] = " ".join(f"{lr:g}" for lr in rates)
            rows.append(row)
        return rows

    def longest(self) -> list[Method]:
        """The methods with the longest chains, at learning rates that merged ones among them have."""
        most = max(m.last for m in self.methods)
        long = [m for m in self.methods if m.last == most]
        rates = {m.lr for m in long if not m.vanilla} or {m.lr for m in long}
        return [m for m in long if m.lr in rates]

    def collapse(self) -> list[dict[str, Any]]:
        """Held-out sampling over rounds in the longest chains, with the difference to vanilla of the same learning
        rate, paired by problem and unit. Empty without held-out samples."""
        rows = []
        methods = self.longest() if self.has_samples else []
        twins = {(m.lr, m.other): m for m in methods if m.vanilla}
        for m in methods:
            control = twins.get((m.lr, m.like), m)
            for number in (*range(0, m.last, 2), m.last) if m.last > 4 else range(m.last + 1):
                mine = {u: c.sampled[number] for u, c in m.chains.items()}
                theirs = {u: c.sampled[number] for u, c in control.chains.items()}
                row: dict[str, Any] = {"method": m.name, "round": number}
                for figure in next(iter(mine.values())):
                    got = interval({u: {figure: i[figure]} for u, i in mine.items()})
                    row[figure] = f"{got.value:.3f} [{got.low:.3f}, {got.high:.3f}]"
                    if m is not control:
                        gap = difference(mine, theirs, [figure])
                        row[f"{figure} - vanilla"] = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
                rows.append(row)
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """sweep.csv: the figures of every chain and round."""
        out = []
        rules = any(m.rule for m in self.methods)
        for m in (*self.zero, *self.methods):
            for (base, seed), chain in sorted(m.chains.items()):
                for number, line in enumerate(chain.rounds):
                    head: dict[str, Any] = {"rule": m.rule} if rules else {}
                    head |= {"ratio": m.ratio, "lr": m.lr, "how": m.how, "other": m.other, "base": base, "seed": seed}
                    figures = {k: round(v, 4) for k, v in line.items() if not k.endswith("majority")}
                    out.append({**head, "round": number, **figures})
        return out


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
    sides = [g for g in ("OOD near", "OOD far") if g in study.groups]
    base = {g: 100 * study.value(study.vanilla[0], 0, g).value for g in study.groups}
    settings: dict[str, list[Method]] = {}
    for m in sorted(study.methods, key=lambda m: (not m.vanilla, m.rule, -m.ratio, m.lr)):
        settings.setdefault(m.setting, []).append(m)
    colours = charts.categories([label for label, own in settings.items() if not own[0].vanilla])
    colours = {label: colours.get(label, charts.GREY) for label in settings}
    panels = []
    for what in ("ID", "drift"):
        for group in sides:
            rows = []
            for label, own in settings.items():
                for at, m in enumerate(own):
                    y = study.value(m, study.rounds, group)
                    x = (
                        study.value(m, study.rounds, "ID").value
                        if what == "ID"
                        else m.mean("weights/drift", study.rounds)
                    )
                    rows.append(
                        {
                            "x": 100 * x, "y": 100 * y.value, "low": 100 * y.low, "high": 100 * y.high,
                            "series": label, "at": at, "name": m.name,
                        }
                    )  # fmt: skip
            title = "ID accuracy (%)" if what == "ID" else "drift: |theta - base| / |base| (%, log scale)"
            panels.append(
                charts.frontier(
                    rows, colours, x=title, y=f"{group} accuracy (%)", log=what == "drift", base_y=base[group],
                    base_x=base["ID"] if what == "ID" else None,
                )
            )  # fmt: skip
    caption = f"Round {study.rounds}; a point a learning rate; dotted: the base; bars: 95%."
    charts.write_png(charts.Figure("frontier", panels, colours, columns=len(sides), caption=caption), path)


def draw_collapse(study: Study, path: Path) -> None:
    """Held-out sampling over rounds, vanilla and merged, for the learning rates with the longest chains."""
    methods = study.longest()
    longest = methods[0].last
    first = next(iter(methods[0].chains.values())).sampled[0]
    names = {m.name: charts.GREY for m in methods} | charts.categories([m.name for m in methods if not m.vanilla])
    panels = []
    for name in first:
        rows = []
        for m in methods:
            for t in range(longest + 1):
                v = interval({u: {name: c.sampled[t][name]} for u, c in m.chains.items()}, 500)
                rows.append({"x": t, "series": m.name, "value": v.value, "low": v.low, "high": v.high})
        title = {"entropy": "entropy (nats a token)"}.get(name, name)
        panels.append(charts.curves(title, rows, names, y=name, form=".3f", legend=True, width=230))
    caption = "Held-out problems; bands: 95%."
    charts.write_png(charts.Figure("collapse", panels, names, columns=len(panels), caption=caption), path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m itermerge.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="sweep or run folders, or an earlier study's --out")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables and figures")
    parser.add_argument("--rounds", type=int, help="the round to compare at (default: the last that all chains have)")
    args = parser.parse_args(argv)
    try:
        methods, unfinished = read(args.folders)
        study = Study(methods, args.rounds)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "sweep.csv", study.rows())
    chains = sorted(c.line() for m in methods for c in m.chains.values())
    (args.out / CHAINS).write_bytes(gzip.compress("".join(chains).encode(), mtime=0))
    names = ("tasks", "grid", "chosen", "matched", "robust", "collapse")
    for name, rows in ((name, getattr(study, name)()) for name in names):
        if rows:
            write_csv(args.out / f"{name}.csv", rows)
        print(f"\n{name} (round {study.rounds})\n\n{markdown(rows)}" if rows else f"\n{name}: nothing to compare")
    if floor := study.at_majority():
        print(f"\nat the majority baseline, nothing to lose there: {', '.join(floor)}")
    if study.left_out:
        said = ", ".join(f"base {base} seed {seed}" for base, seed in study.left_out)
        print(f"\nleft out, since not every method has them: {said}")
    if unfinished:
        print(f"\n{len(unfinished)} runs are not finished, and missing above: {', '.join(unfinished)}")
    draw(study, args.out / "frontier.png")
    if study.has_samples:
        draw_collapse(study, args.out / "collapse.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What stands in run, sweep and analysis folders, also in half-written ones; a sweep's tables. Imports no torch."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from yaml import YAMLError

from ..sweep import FILE, mark_of, why
from ..tracking import majority_note

Line = Mapping[str, Any]  # one line of rounds.jsonl
STATES = {
    "DONE": "finished", "FAILED": "failed", "INTERRUPTED": "interrupted", "REPLACED": "failed, its values tried again",
    "": "not finished: running, or killed",
}  # fmt: skip


class ReportError(ValueError):
    """A folder of which no report can be made."""


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl in order; none where there is no such file. A line that was cut off is left out."""
    return read_lines(folder / "rounds.jsonl")[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON lines file, and how many lines are not one."""
    if not path.is_file():
        return [], 0
    found, broken = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            broken += 1
    return found, broken


def number(line: Mapping[str, Any], name: str) -> float | None:
    """A figure; None where it is absent, no number, or not finite."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def rows_of(line: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """{layer_00: figure, ...} of the metrics `prefix`/<row>, without their intervals, in the model's order."""
    names = [n.removeprefix(f"{prefix}/") for n in line if n.startswith(f"{prefix}/")]
    names = [n for n in names if "/" not in n and not n.endswith(("_low", "_high"))]
    values = {n: number(line, f"{prefix}/{n}") for n in sorted(names, key=_depth)}
    return {n: v for n, v in values.items() if v is not None}


def _depth(row: str) -> tuple[int, int, str]:
    """Orders rows of a model from its embeddings to its head."""
    if found := re.fullmatch(r"layer_(\d+)", row):
        return 1, int(found[1]), row
    return {"embed": 0, "norm": 2, "head": 3}.get(row, 4), 0, row


def in_order(rows: Sequence[str]) -> list[str]:
    """Rows of a model from its embeddings to its head."""
    return sorted(set(rows), key=_depth)


@dataclass
class Run:
    """A run folder as far as it is written: `broken` says what is there and cannot be read."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    state: str = ""  # its mark
    why: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    importance: dict[str, Any] = field(default_factory=dict)
    importance_ood: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; empty where the file is absent, and, said in `broken`, unreadable."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            self.broken.append(f"{name} cannot be read: {error}")
            return {}
        if not isinstance(value, dict):
            self.broken.append(f"{name} holds no JSON object")
            return {}
        return value


def read_run(folder: Path) -> Run:
    """A run folder, finished or not. A run that wrote its summary is finished, unless a mark says otherwise: the
    report is made before the mark is set."""
    run = Run(folder, config=read_config(folder))
    if not run.config:
        run.broken.append("config.yaml is absent or cannot be read")
    run.rounds, cut = read_lines(folder / "rounds.jsonl")
    if cut:
        run.broken.append(f"rounds.jsonl has {cut} line{'s' * (cut > 1)} that cannot be read (cut off): left out")
    run.summary, run.timing = run.json("summary.json"), run.json("timing.json")
    run.provenance = run.json("provenance.json")
    run.state = mark_of(folder) or ("DONE" if run.summary else "")
    if run.state == "FAILED":
        run.why = why(folder / "FAILED")
    for t in (round_of(line, i) for i, line in enumerate(run.rounds)):
        if layers := run.json(f"rounds/{t:02d}/layers.json"):
            run.layers[t] = layers
    run.importance = run.json("rounds/00/importance.json") or _importance_of(run.rounds)
    run.importance_ood = run.json("rounds/00/importance_ood.json")
    return run


def round_of(line: Line, default: int) -> int:
    """The number of a line's round."""
    return int(number(line, "round") or 0) if "round" in line else default


def _importance_of(rounds: Sequence[Line]) -> dict[str, Any]:
    """importance.json as far as the metrics tell it: those of the first round that has them."""
    base = next((line for line in rounds if any(n.startswith("importance/") for n in line)), {})
    names = list(dict.fromkeys(n.split("/")[1] for n in base if re.match(r"importance/[^/]+/layer_\d+$", n)))
    estimators = {
        name: {
            row: {"mean": mean, "low": number(base, f"importance/{name}/{row}_low"),
                  "high": number(base, f"importance/{name}/{row}_high")}
            for row, mean in rows_of(base, f"importance/{name}").items()
        }
        for name in names
    }  # fmt: skip
    return {"estimators": estimators} if estimators else {}


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml, nested; empty where it is absent or unreadable."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}
    return {str(k): v for k, v in config.items()} if isinstance(config, dict) else {}


MERGES = ("merge.kind", "merge.policy.kind", "merge.ratio")  # what tells merges apart; their parameters follow


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
        return is_vanilla(self.config)

    @property
    def name(self) -> str:
        """The setting's name, where the jobs of its sweep have names."""
        return str(self.keys.get("label") or "")

    @property
    def control(self) -> bool:
        """Vanilla, and not under the name of another method."""
        return self.vanilla and self.name in ("", "vanilla")

    @property
    def rule(self) -> str:
        return rule_of(self.config)


def rule_of(config: Mapping[str, Any]) -> str:
    """The merge rule and, where it is not constant, the policy of its ratio."""
    policy = config.get("merge.policy.kind", "constant")
    return f"{config.get('merge.kind')}" + (f" {policy}" if policy != "constant" else "")


def is_vanilla(config: Mapping[str, Any]) -> bool:
    """Whether a flat config merges nothing: `config.is_vanilla` for configs of runs, older ones too."""
    one = {"merge.combine": ("mean", "slerp"), "merge.sparsify": ("none",), "merge.over": ("tuned",)}
    policy = {name: config.get(f"merge.policy.{name}") for name in ("rounds", "epochs", "layers", "search", "modules")}
    factors = [f for values in policy.values() if isinstance(values, list) for f in values]
    factors = [f.get("factor") if isinstance(f, dict) else f for f in factors]
    exact = all(config.get(key, values[0]) in values for key, values in one.items())
    neutral = all(f == 1 for f in factors) and not any(config.get(f"merge.policy.{k}") for k in ("strength", "angle"))
    return config.get("merge.kind") == "none" or (config.get("merge.ratio") == 1 and exact and neutral)


def label(keys: Mapping[str, Any], exact: bool = False) -> str:
    """Keys as one line, without those that have no value, numbers to four digits unless `exact`."""
    short = {k: f"{v:.4g}" if isinstance(v, float) and len(repr(v)) > 7 else v for k, v in keys.items()}
    said = {k: v for k, v in (keys if exact else short).items() if keys[k] is not None}
    named = [str(said.pop("label"))] if said.get("label") else []
    others = [f"{k.removeprefix('merge.').removeprefix('sft.')}={v}" for k, v in said.items() if k != "label"]
    return " ".join([*named, *others]) or "run"


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


def job_folders(folder: Path) -> list[Path]:
    """The folders of a sweep's jobs, in order."""
    return sorted((d for d in folder.iterdir() if d.name.isdigit() and d.is_dir()), key=lambda d: int(d.name))


def read_sweep(folder: Path) -> list[Job]:
    """The finished jobs of a sweep folder, in order; without those whose files cannot be read."""
    folders = [d for d in job_folders(folder) if (d / "DONE").is_file() and (d / "summary.json").is_file()]
    read = [(d, flat(read_config(d)), Run(d).json("summary.json"), read_rounds(d)) for d in folders]
    read = [r for r in read if "seed" in r[1] and _has_counts(r[2]) and r[3]]
    configs = [c for _, c, _, _ in read]
    varied = sorted({k for c in configs for k in c if len({str(other.get(k)) for other in configs}) > 1} - {"seed"})
    varied = [k for k in varied if not (k.startswith("merge.") and k not in MERGES and _follows(k, configs))]
    if "merge.ratio" in varied and any("merge.ratio" in c for c in configs):
        varied = [k for k in varied if k in MERGES or not k.startswith("merge.") or all(k in c for c in configs)]
    if "label" in varied:  # a name stands for what follows from it
        varied = ["label", *(k for k in varied if k != "label" and not _has_one_value(k, configs, ["label"]))]
    jobs = []
    for d, c, summary, rounds in read:
        best = min(max(int(number(summary, "best_round_by_validation") or 0), 0), len(rounds) - 1)
        jobs.append(Job(d, c["seed"], {k: c.get(k) for k in varied}, c, rounds, summary["stages"], best))
    twins = {_without_merge(j): j for j in jobs if j.control}
    return [replace(j, retention=retention(j, twins.get(_without_merge(j)))) for j in jobs]


def _follows(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key of the merge has one value for each rule and policy, or is the run's seed."""
    if key == "merge.seed" and all(c.get(key) in (None, c.get("seed")) for c in configs):
        return True
    return _has_one_value(key, configs, ["merge.kind", "merge.policy.kind"])


def _has_one_value(key: str, configs: Sequence[Mapping[str, Any]], by: Sequence[str]) -> bool:
    """Whether `key` has one value for each of the several values of the keys `by`."""
    values: dict[str, set[str]] = {}
    for c in configs:
        values.setdefault(str([c.get(k) for k in by]), set()).add(str(c.get(key)))
    return len(values) > 1 and all(len(v) == 1 for v in values.values())


def _has_counts(summary: Mapping[str, Any]) -> bool:
    stages = summary.get("stages")
    return isinstance(stages, dict) and all(isinstance(stages.get(k), dict) for k in ("computed", "reused"))


@dataclass(frozen=True)
class State:
    """What became of a job: its number, its overrides (from sweep.json), its mark ("none" before it begins), why."""

    number: int
    overrides: list[str]
    mark: str
    why: str = ""


def read_states(folder: Path) -> list[State]:
    """Every job of sweep.json, and every job's folder, in order."""
    listed = Run(folder).json(FILE).get("jobs", [])
    listed = listed if isinstance(listed, list) else []
    there = {int(d.name): d for d in job_folders(folder)}
    states = []
    for i in range(max([len(listed), *(n + 1 for n in there)])):
        if i < len(listed) or i in there:
            mark = (mark_of(there[i]) or "") if i in there else "none"
            said = why(there[i] / "FAILED") if mark == "FAILED" else ""
            states.append(State(i, list(listed[i]) if i < len(listed) else [], mark, said))
    return states


@dataclass(frozen=True)
class Setting:
    """Jobs that differ in seed alone. `short` is `name` without the keys that stand in `rest`."""

    name: str
    short: str
    rest: str
    jobs: list[Job]


def settings(jobs: Sequence[Job], most: int = 6) -> list[Setting]:
    """The longest chains by setting. Of more than `most` settings, those that differ in merge.ratio alone have the same
    `rest`, a row of panels each, unless that makes too many rows."""
    by_name = groups(longest(jobs), without=["rounds"])
    rests = {name: " ".join(w for w in name.split(" ") if not w.startswith("ratio=")) for name in by_name}
    split = len(by_name) > most and len(set(rests.values())) <= most
    out = []
    for name, group in by_name.items():
        rest = rests[name] if split else ""
        short = " ".join(w for w in name.split(" ") if w not in rest.split(" ")) or rest
        known = " (vanilla)" * all(j.control and not j.name for j in group)
        out.append(Setting(name + known, short + known, rest, group))
    return out


def by_ratio(jobs: Sequence[Job]) -> dict[str, dict[float, list[Job]]]:
    """The longest chains by their other keys, then by ratio; where several merge rules were run, a row each. Vanilla is
    at 1 in all of them, but for rules that have chains of their own there. Only rows of two ratios and more."""
    chains = longest(jobs)
    rules = sorted({j.rule for j in chains if not j.vanilla}) or ["none"]
    cells: dict[str, dict[float, list[Job]]] = {}
    for name, group in groups(chains, without=("merge.ratio", "merge.kind", "merge.policy.kind", "rounds")).items():
        for rule in rules:
            row = name if len(rules) == 1 else rule if name == "run" else f"{rule} {name}"
            for job in group:
                ratio = 1.0 if job.vanilla else job.config.get("merge.ratio")
                own = any(j.rule == rule and not j.vanilla and j.config.get("merge.ratio") == 1 for j in group)
                if ratio is not None and ((job.vanilla and not own) or (job.rule == rule and not job.vanilla)):
                    cells.setdefault(row, {}).setdefault(float(ratio), []).append(job)
    return {name: ratios for name, ratios in cells.items() if len(ratios) > 1}


def vanillas(jobs: Sequence[Job]) -> dict[Path, Job]:
    """For each job that has one, by its folder: the longest vanilla run with the same seed and everything but the merge
    and the number of rounds."""
    chains = {_without_merge(j, "rounds"): j for j in sorted(jobs, key=lambda j: len(j.rounds)) if j.control}
    return {j.folder: chains[key] for j in jobs if (key := _without_merge(j, "rounds")) in chains}


def mean_change(group: Sequence[Job], metric: str, t: int) -> float | None:
    """Mean over jobs of the change of a metric from the base to round t, in points; None where no job has it."""
    changes = [c for j in group if (c := change_of(j, metric, t)) is not None]
    return fmean(changes) if changes else None


def change_of(job: Job, metric: str, t: int) -> float | None:
    """The change of a metric from the base to round t, in points."""
    if t >= len(job.rounds):
        return None
    now, base = number(job.rounds[t], metric), number(job.rounds[0], metric)
    return None if now is None or base is None else 100 * (now - base)


def _without_merge(job: Job, *others: str) -> str:
    kept = {k: v for k, v in job.config.items() if not k.startswith("merge.") and k not in ("label", *others)}
    return json.dumps(kept, sort_keys=True)


def retention(job: Job, vanilla: Job | None) -> float | None:
    """(ID_T - ID_0) / (ID_T - ID_0 of vanilla), of the run with the same seed and everything but the merge; None where
    there is none, or where the 95% interval of vanilla's gain (paired by item) includes 0."""
    if vanilla is None:
        return None
    last = len(vanilla.rounds) - 1
    task = task_of(vanilla.config)
    try:
        before, after = (
            json.loads((vanilla.folder / "rounds" / f"{t:02d}" / "scores.json").read_text())[task]["correct"]
            for t in (0, last)
        )
    except (OSError, KeyError, ValueError):
        return None
    gained = change_of(job, "id/acc", len(job.rounds) - 1)
    if gained is None or len(after) != len(before):
        return None
    gains = [a - b for a, b in zip(after, before, strict=True)]
    gain = fmean(gains)
    half = 1.96 * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
    if abs(gain) <= half:
        return None
    return gained / 100 / gain


def task_of(config: Mapping[str, Any]) -> str:
    """The name of the ID task in a flat config."""
    return str(config.get("task.family") or config.get("task.label") or config.get("task.dataset"))


_BY_LAYER = re.compile(r"(weights/(change|cosine|sign_agreement|effective_rank)|importance/[^/]+)/")


def write_tables(folder: Path, jobs: Sequence[Job]) -> Table:
    """Writes sweep.csv (a row a job and round) and jobs.csv (a row a job); the console table."""
    by_round = [
        {"job": j.folder.name, "seed": j.seed, **j.keys}
        | {k: round(v, 5) if isinstance(v, float) else v for k, v in line.items() if not _BY_LAYER.search(k)}
        for j in jobs
        for line in j.rounds
    ]
    _write_csv(folder / "sweep.csv", by_round)
    _write_csv(folder / "jobs.csv", [job_row(j) for j in jobs])
    return _table(jobs)


def job_row(job: Job) -> dict[str, Any]:
    """A job's row in jobs.csv."""
    figures = ("id/acc", "ood/acc", "ood/near/acc", "ood/far/acc", "val/id/acc", "val/ood/acc")
    row: dict[str, Any] = {"job": job.folder.name, "seed": job.seed, **job.keys, "best_round": job.best}
    for when, line in (("base", job.rounds[0]), ("final", job.rounds[-1]), ("best", job.rounds[job.best])):
        row |= {f"{when}/{name}": round(value, 5) for name in figures if (value := number(line, name)) is not None}
    row["retention"] = "" if job.retention is None else round(job.retention, 4)
    counts = {what: sum(job.stages[what].values()) for what in ("computed", "reused")}
    return row | counts | {"seconds_saved": job.stages["seconds_saved"]}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def longest(jobs: Sequence[Job]) -> list[Job]:
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


def _table(jobs: Sequence[Job]) -> Table:
    """A row a job; where there are several seeds a row a setting, with means over seeds and their intervals."""
    by_keys = groups(jobs)
    seeds = max(map(len, by_keys.values()), default=1)
    spread = f"; mean of {seeds} seeds ± 95%" if seeds > 1 else ""
    notes = dict.fromkeys(filter(None, (at_majority(j.rounds[0]) for j in jobs)))
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
    for name, group in by_keys.items():
        best = sorted({j.best for j in group})
        retained = [j.retention for j in group if j.retention is not None]
        made, found = (sum(sum(j.stages[what].values()) for j in group) for what in ("computed", "reused"))
        gains = [c for j in group if (c := change_of(j, "id/acc", j.best)) is not None]
        table.add_row(
            name,
            *(_change(group, name) for name in ("id/acc", "ood/near/acc", "ood/far/acc")),
            f"{'-'.join(map(str, dict.fromkeys((best[0], best[-1]))))}" + (f": {fmean(gains):+.1f}" if gains else ""),
            f"{fmean(retained):.2f}" if retained else "",
            f"{made}/{made + found}",
            f"{sum(j.stages['seconds_saved'] for j in group):.0f}s",
        )
    return table


def at_majority(base: Line) -> str:
    """`tracking.majority_note` of the tasks whose figures are whole."""
    tasks = [n.split("/")[1] for n in base if n.startswith("ood/") and n.endswith("/majority")]
    whole = [t for t in tasks if all(number(base, f"ood/{t}/{x}") is not None for x in ("acc", "acc_low", "majority"))]
    return majority_note({f"ood/{t}/{x}": base[f"ood/{t}/{x}"] for t in whole for x in ("acc", "acc_low", "majority")})


def _change(group: list[Job], name: str) -> str:
    changes = [c for j in group if (c := change_of(j, name, len(j.rounds) - 1)) is not None]
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

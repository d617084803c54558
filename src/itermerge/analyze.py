"""Two checkpoints compared: layer change, layer importance on the base's solutions, and their mismatch.

What `itermerge-analyze base=A tuned=B` does. Change is streamed tensor by tensor, so it needs no memory for a model;
importance loads the base. Writes into a folder of its own, as a run does for each round: layers.json, importance.json,
analysis.json (mismatch and what was compared), config.yaml, and the report's page and pictures.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from . import evaluation, stages
from .analysis import change
from .analysis.importance import importance
from .analysis.mismatch import mismatch
from .config import Analyze, ConfigError, label
from .decoding import complete
from .policy import Policy
from .sft import Example
from .tasks import Problem, check_gold, derive_seed, verify_all
from .tracking import console, progress
from .weights import Checkpoint, comparable, resolve

log = logging.getLogger(__name__)


def analyze(cfg: Analyze, folder: Path) -> dict[str, Any]:
    """Writes the folder; what analysis.json holds. Raises PolicyError where the checkpoints differ in their tensors,
    ConfigError where solutions cannot be read, and AnalysisError where importance cannot be measured; by then the layer
    change is written."""
    solutions = None
    if cfg.solutions is not None:  # each line a problem of its own unless it has an id
        rows = stages.read_texts(cfg.solutions, "solutions", ("prompt",))
        solutions = [{"id": r["id"], "prompt": r["text"], "completion": r["completion"]} for r in rows]
    at, other = resolve(cfg.base, key="base"), resolve(cfg.tuned, key="tuned")
    base, tuned, notes = comparable(Checkpoint(at), Checkpoint(other))
    for note in notes:
        log.warning("%s", note)
    device, ranks = stages.device_of(cfg.accelerator), cfg.analysis.effective_rank
    ranks = change.ranks_are_cheap(base, device) if ranks == "auto" else ranks
    log.info("layer change of %d tensors", len(base))
    with progress("layer change", 2 if ranks else 1) as tick:
        rows = change.layer_change(base, tuned)
        tick(1)
        update = change.update_figures(base, tuned, None, ranks=ranks, device=device)
        tick(1)
    layers = {"pre_merge": rows, "merged": rows, "update": update}
    if not any(figures["energy"] for figures in rows.values()):
        notes.append("the two have the same weights: there is no change to compare with importance")
        log.warning("%s", notes[-1])
    _write(folder / "layers.json", layers)
    found: dict[str, Any] = {"base": cfg.base, "tuned": cfg.tuned, "source": None, "notes": notes}
    if cfg.analysis.importance:
        table = _importance(cfg, at, solutions)
        _write(folder / "importance.json", table)
        values = {name: np.array(v) for name, v in table["values"].items()}
        figures = mismatch(values, rows, cfg.analysis.top_share)
        found |= {"source": table["source"]} | {f"mismatch/{name}": value for name, value in figures.items()}
    _write(folder / "analysis.json", found)
    return found


def _importance(cfg: Analyze, folder: Path, solutions: list[dict[str, str]] | None) -> dict[str, Any]:
    """importance.json of the base, on the given solutions, else its own verified ones, else the task's gold ones."""
    policy = Policy(folder, trust_remote_code=cfg.trust_remote_code, device=stages.device_of(cfg.accelerator))
    source = "file"
    if solutions is None:
        source, solutions = "verified", _own_solutions(cfg, policy)
    if not solutions:
        source = "gold"
        problems = stages.build_task(cfg.task).problems("train", cfg.task.n_train, cfg.seed)
        solutions = [{"id": p.id, "prompt": p.prompt, "completion": p.gold} for p in problems]
        log.warning(
            "the base solves none of the problems of task %s: importance is measured on the task's own solutions "
            "(task=... names another one, solutions=FILE your own texts)", label(cfg.task),
        )  # fmt: skip
    chosen = stages.spread(solutions, cfg.analysis.examples)
    examples = [Example(policy.encode_prompt(e["prompt"]), policy.encode_completion(e["completion"])) for e in chosen]
    for number, example in enumerate(examples, 1):
        if not example.prompt or len(example.prompt) + len(example.completion) > policy.context:
            raise ConfigError(
                f"solutions: number {number} has a prompt of {len(example.prompt)} tokens and a completion of "
                f"{len(example.completion)}; a prompt needs one at least, and both together fit into {policy.context}"
            )
    log.info("importance by %s on %d solutions (%s)", ", ".join(cfg.analysis.importance), len(examples), source)
    total = len(examples) * ((set(cfg.analysis.importance) != {"taylor"}) + ("taylor" in cfg.analysis.importance))
    with progress("importance of layers", total) as tick:
        values = importance(
            policy.model, examples, cfg.analysis.importance, pad_id=policy.pad_id,
            batch_size=cfg.analysis.batch_size, on_progress=tick,
        )  # fmt: skip
    return stages.importance_table(values, source)


def _own_solutions(cfg: Analyze, policy: Policy) -> list[dict[str, str]]:
    task, sampler = stages.build_task(cfg.task), cfg.sampler
    problems = task.problems("train", cfg.task.n_train, cfg.seed)
    check_gold(task, problems)
    log.info("sampling %d solutions of %d problems of %s", len(problems) * sampler.n, len(problems), task.name)
    dtype = getattr(torch, stages.sampling_dtype(sampler.dtype, policy.device.type))
    with (
        progress(f"sampling solutions of {task.name}", len(problems) * sampler.n) as tick,
        stages.in_dtype(policy, dtype) as copy_,
    ):
        made = evaluation.sample(
            partial(complete, copy_), task, problems, sampler.n, derive_seed(cfg.seed, "analyze"),
            temperature=sampler.temperature, top_p=sampler.top_p, max_new_tokens=sampler.max_new_tokens,
            batch_size=sampler.batch_size, on_progress=tick,
        )  # fmt: skip
    flat = [(p, c) for p, completions in zip(problems, made, strict=True) for c in completions]
    verdicts = verify_all(task, [(p, c.text, c.finished) for p, c in flat])
    solved: dict[str, dict[str, Problem]] = {}  # the different correct ones of each problem
    for (p, c), verdict in zip(flat, verdicts, strict=True):
        if verdict.correct:
            solved.setdefault(p.id, {}).setdefault(c.text, p)
    return [
        {"id": id_, "prompt": p.prompt, "completion": text}
        for id_, texts in solved.items()
        for text, p in [*texts.items()][: cfg.task.max_solutions]
    ]


def show(found: dict[str, Any], layers: dict[str, Any]) -> None:
    """The figures as tables on the console."""
    table = Table(title="relative change", title_justify="left", padding=(0, 0))
    for column in ("row", "change", "mean |change|", "of the squared change", "effective rank"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row, figures in layers["merged"].items():
        rank = layers["update"][row]["effective_rank"]
        table.add_row(
            row, f"{figures['relative']:.5f}", f"{figures['mean_abs']:.2e}", f"{100 * figures['energy']:.1f}%",
            "" if rank is None else f"{rank:.2f}",
        )  # fmt: skip
    console.print(table)
    names = [k.split("/")[1] for k in found if k.endswith("/top_share")]
    if not names:
        return
    table = Table(
        title=f"importance ({found['source']} solutions) against change", title_justify="left", padding=(0, 0),
        caption=f"share: of the layers' squared change that the {found['mismatch/top_k']} most important hold",
        caption_justify="left",
    )  # fmt: skip
    for column in ("estimator", "Spearman", "p", "Spearman, squared", "share", "if even"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for name in names:
        at = f"mismatch/{name}"
        rho, low, high = (found.get(f"{at}/spearman{end}") for end in ("", "_low", "_high"))
        said = "" if rho is None else f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"
        p = f"{found[f'{at}/p']:.2g}" if f"{at}/p" in found else ""
        table.add_row(
            name,
            said,
            p,
            f"{found[f'{at}/spearman_squared']:+.2f}" if f"{at}/spearman_squared" in found else "",
            f"{100 * found[f'{at}/top_share']:.1f}%",
            f"{100 * found[f'{at}/top_expected']:.1f}%",
        )
    console.print(table)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")

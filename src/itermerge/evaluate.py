"""Any model on any suite: ID and OOD accuracy, pass@k, and several models compared item by item.

What `itermerge-evaluate model=hf model.path=DIR` does. Items, decoding and figures are those of a run with the same
task, suite and sampler, so a model that a run exported gets that run's own scores. Writes into a folder of its own:
scores.json and held_out.jsonl of `model` (of others in other_1/, other_2/, ...), config.yaml, and evaluation.json with
all figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.table import Table

from . import evaluation, stages, vllm
from .config import Evaluate, ModelLab, SamplerVLLM, to_dict
from .decoding import complete
from .policy import Policy, check_folder
from .tasks import TaskError
from .tracking import console, progress
from .weights import PolicyError, resolve


def evaluate(cfg: Evaluate, folder: Path) -> dict[str, Any]:
    """Writes the folder; what evaluation.json holds: `models`, each with its figures and reasons by task, and
    `compared`, each of the others' differences to `model`, paired by item. Raises TaskError or PolicyError, of any
    model before the first is evaluated."""
    device, trust = stages.device_of(cfg.accelerator), getattr(cfg.model, "trust_remote_code", False)
    given = f"lab, seed {cfg.model.seed}" if isinstance(cfg.model, ModelLab) else cfg.model.path
    models = {"": (given, stages.folder_of(cfg.model, cfg.paths))}
    models |= {f"other_{i}": (path, resolve(path, key="others")) for i, path in enumerate(cfg.others, 1)}
    for place, (_, at) in models.items():
        with _named(place):
            check_folder(at)
    engine: vllm.Engine | None = None
    if isinstance(cfg.sampler, SamplerVLLM):
        vllm.about(cfg.sampler.python)
        engine = vllm.Engine(stages.engine_spec(cfg.sampler, device, cfg.threads), folder)
    exams = stages.Exams(cfg.task, cfg.suite)

    def load(place: str) -> Policy:
        with _named(place):
            if engine and not exams.harness:
                policy: Policy = stages.Reader(models[place][1], trust_remote_code=trust)
            else:
                policy = Policy(models[place][1], trust_remote_code=trust, device=device)
            exams.check_lengths(policy, cfg.sampler.max_new_tokens)
        return policy

    policy: Policy | None = None
    for place in reversed(models):  # the faults of all are told before the first one is asked, which is loaded last
        policy = None
        policy = load(place)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg))))
    found: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    with closing(engine) if engine else nullcontext():
        for place, (name, _) in models.items():
            policy = policy or load(place)
            (folder / place).mkdir(parents=True, exist_ok=True)
            of, figures = _one(cfg, policy, exams, name, folder / place, engine)
            scores.append(of)
            reasons = {task: s["reasons"] for task, s in of.items()}
            found.append({"model": name, "figures": figures, "reasons": reasons})
            policy = None
    compared = [
        {"model": model["model"], "to": given, "figures": differences(scores[0], of, exams)}
        for model, of in zip(found[1:], scores[1:], strict=True)
    ]
    roles = {"id": exams.task.name, "near": exams.near, "far": exams.far}
    items = {task: {"n": s["n"], "majority": s["majority"]} for task, s in scores[0].items()}
    out = {"models": found, "compared": compared, "tasks": roles, "items": items}
    (folder / "evaluation.json").write_text(json.dumps(out, indent=1) + "\n")
    return out


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Errors of another model name `others`, and which."""
    try:
        yield
    except (PolicyError, TaskError) as error:
        if not place:
            raise
        said = f"others[{int(place.removeprefix('other_')) - 1}]: {str(error).removeprefix('model.path: ')}"
        raise type(error)(said) from error


def _one(
    cfg: Evaluate, policy: Policy, exams: stages.Exams, name: str, folder: Path, engine: vllm.Engine | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """(scores.json, figures) of one model; writes scores.json and held_out.jsonl."""
    how: Any = {"max_new_tokens": cfg.sampler.max_new_tokens, "batch_size": cfg.sampler.batch_size}
    problems = exams.validation[: cfg.suite.pass_k_n]
    dtype = getattr(torch, stages.sampling_dtype(cfg.sampler.dtype, policy.device.type))
    samples = len(problems) * cfg.sampler.n
    with (
        progress(f"{Path(name).name}: evaluating", exams.count + samples) as tick,
        stages.in_dtype(policy, dtype) as copy_,
    ):
        decode = partial(complete, copy_)
        if engine:
            engine.load(policy.folder, policy, trust_remote_code=getattr(cfg.model, "trust_remote_code", False))
            decode = engine.complete
        scores, rows = exams.scores(decode, tick, **how), []
        if problems:
            rows = stages.held_out_rows(
                decode, exams.task, problems, cfg.sampler.n, stages.held_out_seed(cfg.suite.seed), on_progress=tick,
                temperature=cfg.sampler.temperature, top_p=cfg.sampler.top_p, **how,
            )  # fmt: skip
        if engine and exams.harness:
            engine.pause()  # lm_eval asks the model in this process
        scores |= exams.harness_scores(copy_, tick, batch_size=cfg.sampler.batch_size)
        stages.write_json(folder / "scores.json", scores)
        figures = exams.figures(scores)
        if problems:
            stages.write_lines(folder / "held_out.jsonl", rows)
            figures |= stages.ratio_intervals(stages.sample_ratios(copy_, rows))
    return scores, figures


def differences(before: Mapping[str, Any], now: Mapping[str, Any], exams: stages.Exams) -> dict[str, float]:
    """Differences in accuracy between two scores.json of the same items, each with _low and _high (95%, items
    resampled in pairs), and gap/superficiality, the ID difference minus the mean OOD one."""
    own, away = exams.task.name, [*exams.near, *exams.far]
    of: dict[str, Sequence[str]] = {"id/acc": [own], "ood/acc": away, "ood/near/acc": exams.near}
    of |= {"ood/far/acc": exams.far} | {f"ood/{task}/acc": [task] for task in away}
    found = {
        name: evaluation.paired_interval([before[t]["correct"] for t in tasks], [now[t]["correct"] for t in tasks])
        for name, tasks in of.items() if tasks
    }  # fmt: skip
    if away:
        found["gap/superficiality"] = evaluation.gap_interval(before, now, own, away)
    return {
        f"{name}{end}": v
        for name, values in found.items()
        for end, v in zip(("", "_low", "_high"), values, strict=True)
    }


def show(found: Mapping[str, Any]) -> None:
    """The figures as tables on the console."""
    roles = {found["tasks"]["id"]: "ID"} | dict.fromkeys(found["tasks"]["near"], "near")
    roles |= dict.fromkeys(found["tasks"]["far"], "far")
    for model in found["models"]:
        figures = model["figures"]
        table = Table(
            title=model["model"], title_justify="left", padding=(0, 0), caption="accuracy in %, 95% interval; "
            "majority: what the commonest answer alone would score", caption_justify="left",
        )  # fmt: skip
        for column in ("task", "role", "n", "accuracy", "majority", "the others"):
            table.add_column(column, justify="right" if column in ("n", "majority") else "left")
        for task, role in roles.items():
            name = "id/acc" if role == "ID" else f"ood/{task}/acc"
            wrong = {reason: n for reason, n in model["reasons"][task].items() if n and reason != "correct"}
            said = ", ".join(f"{n} {reason}" for reason, n in wrong.items())
            n, most = found["items"][task].values()
            table.add_row(task, role, str(n), _percent(figures, name), f"{100 * most:.1f}", said)
        for side in ("ood", "ood/near", "ood/far"):
            if f"{side}/acc" in figures:
                table.add_row(f"mean {side}", "", "", _percent(figures, f"{side}/acc"), "", "")
        for name in (n for n in figures if n.startswith("sample/pass@") and not n.endswith(("_low", "_high"))):
            table.add_row(name.removeprefix("sample/"), "validation", "", _percent(figures, name), "", "")
        console.print(table)
    for pair in found["compared"]:
        table = Table(
            title=f"{pair['model']} against {pair['to']}", title_justify="left", padding=(0, 0),
            caption="difference in points, 95% interval, paired by item", caption_justify="left",
        )  # fmt: skip
        table.add_column("figure")
        table.add_column("difference")
        for name in (n for n in pair["figures"] if not n.endswith(("_low", "_high"))):
            table.add_row(name, _percent(pair["figures"], name, "+.1f"))
        console.print(table)


def _percent(figures: Mapping[str, float], name: str, form: str = ".1f") -> str:
    value, low, high = (100 * figures[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"

"""A run's model as a Hugging Face folder that says where it is from.

What `export.rounds=[final,best]` makes when a run ends, and `itermerge-export run=DIR` at any later time: weights in
one dtype, config, the tokenizer's files byte for byte, generation config, a card with the run's figures, and
recipe.json with its config, provenance and digests. The folder appears whole, by one rename.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from . import recipes
from .config import ModelLab, Root, TeacherFile, TeacherHF, TeacherLab, label, to_dict
from .policy import chat_text, eos_ids_of
from .store import file_digest, is_disk_full
from .tasks.prompts import messages_of
from .weights import WEIGHTS_FILE, Checkpoint, digest_weights, write_folder

log = logging.getLogger(__name__)
PROMPT_SHOWN = 2000  # characters of a prompt in the card
# What of a config says how a run went, and nothing of its model.
_HOW = ("sweep", "store", "logger", "paths", "export")


class ExportError(ValueError):
    """What cannot be exported, with the way out."""


def round_of(run: Path, wanted: Any) -> int:
    """The number of the round `final`, `best` (by validation) or of that number. Raises ExportError."""
    rounds = len(read_rounds(run))
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 0 <= wanted < rounds:
            raise ExportError(f"round: {run} has rounds 0 (the base) to {rounds - 1}, got {wanted}")
        return wanted
    if wanted not in ("final", "best"):
        raise ExportError(f"round: must be final, best, or a number from 0 to {rounds - 1}; got {wanted!r}")
    if not (run / "summary.json").is_file():
        raise ExportError(f"round: {run} is not finished; give a number from 0 to {rounds - 1}, or finish the run")
    summary = json.loads((run / "summary.json").read_text())
    return int(summary["rounds"] if wanted == "final" else summary["best_round_by_validation"])


def read_rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def placed(run: Path, number: int) -> Path | None:
    """The folder of the round's model in the run folder; None where its weights were not kept."""
    folder = run / "rounds" / f"{number:02d}" / "model"
    return folder if (folder / WEIGHTS_FILE).is_file() else None


def check_same(run: Path, again: Path, number: int) -> None:
    """Raises ExportError where a run computed again came to other figures: its weights are others then."""
    then, now = read_rounds(run)[number], read_rounds(again)[number]
    if differs := sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k)):
        name = differs[0]
        raise ExportError(
            f"round {number} was computed again, since its weights had not been kept, and came out otherwise: "
            f"{name} is {now.get(name)}, the run has {then.get(name)}. Other code, versions, device or threads give "
            "other weights; run it anew with store.keep=all or export.rounds=[final,best]"
        )


def check_base(run: Path, digest: str) -> None:
    """Raises ExportError where the base is not the one that the run started from, whose figures the card has. An
    unfinished run has not said which that was: a warning then."""
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else {}
    if "base_digest" not in summary:
        log.warning("whether the base is still the one of %s is not known: its summary.json does not say", run)
    elif summary["base_digest"] != digest:
        raise ExportError(
            f"round 0: the base is not the one that {run} started from: weights, config or tokenizer are others "
            f"(digest {digest[:12]}, in summary.json {summary['base_digest'][:12]}), or a former version of itermerge, "
            "whose digests were others, made the run; put the old ones back, or give model.revision in a new run"
        )


def export(
    cfg: Root, run: Path, number: int, model: Path, out: Path, dtype: str, decoding: str, like: Path | None = None
) -> None:
    """Makes `out` from the weights in `model`, which are those of round `number` of the run, and the other files of
    `like` (default: of `model`). Raises ExportError where `out` exists or the disk is too small."""
    like = like or model
    check_out(out)
    weights, kind = Checkpoint(model), getattr(torch, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    size, free = kind.itemsize * sum(map(math.prod, weights.shapes.values())), shutil.disk_usage(out.parent).free
    if size > free:
        raise ExportError(
            f"out: the model needs {size / 2**20:,.0f} MiB in {dtype} at {out.parent}, where {free / 2**20:,.0f} are "
            "free; give another out, or free space"
        )
    with _whole(out) as folder:
        write_folder(folder, weights, like, kind)
        trust = getattr(cfg.model, "trust_remote_code", False)
        generation_config(cfg, like, decoding, trust).save_pretrained(folder)
        provenance = {}
        with suppress(FileNotFoundError):
            provenance = json.loads((run / "provenance.json").read_text())
            provenance["changed"] = bool(provenance.pop("diff", None))  # the difference itself stays with the run
        words = AutoTokenizer.from_pretrained(like, trust_remote_code=trust)
        (folder / recipes.CARD).write_text(card(cfg, run, number, dtype, decoding, provenance, words))
        config = {key: value for key, value in to_dict(cfg).items() if key not in _HOW}
        files = {f.name: file_digest(f) for f in sorted(folder.iterdir())}
        recipe = {
            "itermerge": version("itermerge"), "round": number, "dtype": dtype, "decoding": decoding, "config": config,
            "provenance": provenance, "weights": digest_weights(weights), "files": files,
        }  # fmt: skip
        (folder / recipes.RECIPE).write_text(json.dumps(recipe, indent=1, sort_keys=True) + "\n")


def name_of(wanted: Any) -> str:
    """The folder of `final`, `best` or a round's number under RUN/export."""
    return f"round_{wanted:02d}" if isinstance(wanted, int) else wanted


def twin(made: Path, out: Path) -> None:
    """The same folder under another name, its weights linked where the file system allows."""
    check_out(out)
    with _whole(out) as folder:
        for file in sorted(made.iterdir()):
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)


def check_out(out: Path) -> None:
    if out.exists():
        raise ExportError(f"out: {out} exists already, and is never overwritten; give another out")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all is written, and goes when that fails."""
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        check_out(out)
        os.replace(partial, out)
    except Exception as error:
        if is_disk_full(error):
            raise ExportError(
                f"the disk is full: {out} could not be written; free space, or give another out"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def generation_config(cfg: Root, model: Path, decoding: str, trust: bool) -> GenerationConfig:
    """How the run decoded, for `generate`: greedy, as it evaluated, or sampled, as it practised. Sampling settings and
    penalties of the base's own generation config had no part in the run, and go."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
    if (model / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(model)
    else:
        own = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, trust_remote_code=trust))
    ends = eos_ids_of(model, tokenizer, own)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    how: dict[str, Any] = {"do_sample": False}
    if decoding == "sampled":  # top_k: transformers' own default would cut at 50
        how = {"do_sample": True, "temperature": cfg.sampler.temperature, "top_p": cfg.sampler.top_p, "top_k": 0}
    return GenerationConfig(
        eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=pad, bos_token_id=own.bos_token_id,
        max_new_tokens=cfg.sampler.max_new_tokens, **how,
    )  # fmt: skip


# --- the card -----------------------------------------------------------------------------------------------------


def card(
    cfg: Root, run: Path, number: int, dtype: str, decoding: str, provenance: Mapping[str, Any], tokenizer: Any
) -> str:
    """README.md, with the head that the Hugging Face hub reads."""
    rounds = read_rounds(run)
    base = f"the lab's base, seed {cfg.model.seed}" if isinstance(cfg.model, ModelLab) else cfg.model.path
    head: dict[str, Any] = {}
    if recipes.on_hub(base):
        head = {"base_model": base, "base_model_relation": "finetune"}
    head |= {"library_name": "transformers", "tags": ["self-improvement", "model-merging", "itermerge"]}
    lines = recipes.page(head, f"Round {number} of {cfg.rounds}: {label(cfg.task)}", _lead(number), {
        "base": base, **_training(cfg, rounds[1 : number + 1]), "seed": cfg.seed, "dtype": dtype,
        "decoding": f"{decoding}, up to {cfg.sampler.max_new_tokens} new tokens (generation_config.json)",
        "made with": ", ".join(f"{name} {v}" for name, v in provenance.get("versions", {}).items() if name in (
            "itermerge", "torch", "transformers", "python")) or f"itermerge {version('itermerge')}",
        **({"commit": provenance["commit"]} if provenance.get("commit") else {}),
    })  # fmt: skip
    lines += [f"Accuracy in %, greedy, up to {cfg.suite.n} test items a task, with 95% intervals (ID: in-domain, OOD: "
              "out-of-domain):", ""]  # fmt: skip
    columns = ["base"] + ([f"round {number}"] if number else [])
    lines += [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {said} | {' | '.join(cells)} |" for said, cells in _figures(cfg, rounds, number)]
    lines += ["", *_prompt(run, number, tokenizer), recipes.command("itermerge", provenance.get("overrides", [])), ""]
    lines += [f"Config, provenance and digests: `{recipes.RECIPE}`. The base's licence holds.", ""]
    return "\n".join(lines)


def _lead(number: int) -> str:
    if number == 0:
        return "The base itself: no round of the run was better on the validation items, or it was asked for."
    return (
        "Fine-tuned on its own verified solutions and merged back, round after round (Iterative Model Merging, "
        "[2503.02103](https://arxiv.org/abs/2503.02103))."
    )


def _training(cfg: Root, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What was done in these rounds."""
    if not rounds:
        return {}
    task, sft, merge = cfg.task, cfg.sft, cfg.merge
    learnt = ", ".join(f"{m['train_sample/examples']:.0f}" for m in rounds if "train_sample/examples" in m)
    source = ""
    if isinstance(cfg.teacher, TeacherFile):
        source = f", solutions of {cfg.teacher.path}"
    elif isinstance(cfg.teacher, TeacherLab):
        source = f", solutions by the lab's base of seed {cfg.teacher.seed}"
    elif isinstance(cfg.teacher, TeacherHF):
        source = f", solutions by {cfg.teacher.path}"
    how = "the same each round" if task.problems == "fixed" else "fresh each round"
    facts = {
        "data": f"{label(task)} ({task.kind}): {task.n_train} problems, {how}{source}; "
        f"labels: {task.labels}",
        "examples learnt, by round": learnt,
        "fine-tuning": f"{sft.epochs} epochs a round, lr {sft.lr:g}, from the {sft.start} model, data: {sft.data}",
    }  # fmt: skip
    if merge.kind == "none":
        return facts | {"merge": "none"}
    parameters = ", ".join(f"{key}={value}" for key, value in recipes.parameters_of(vars(merge)).items())
    at = {"last": "once a round", 1: "after each epoch"}.get(merge.every_n_epochs)
    policy = "" if merge.policy.kind == "constant" else f", times the factors of policy {merge.policy.kind}"
    return facts | {
        "merge": f"{merge.kind} ({parameters})",
        "ratio": f"{merge.ratio:g}{policy}",
        "anchor": f"{merge.anchor}, {at or f'after every {merge.every_n_epochs} epochs'}",
    }


def _figures(cfg: Root, rounds: list[dict[str, Any]], number: int) -> list[tuple[str, list[str]]]:
    """(row, cells) of base and this round."""
    own = label(cfg.task)
    names = {f"ID: {own}": "id/acc", "OOD, mean": "ood/acc", "OOD near, mean": "ood/near/acc"}
    names |= {"OOD far, mean": "ood/far/acc"}
    names |= {f"OOD near: {label(t)}": f"ood/{label(t)}/acc" for t in cfg.suite.near}
    names |= {f"OOD far: {label(t)}": f"ood/{label(t)}/acc" for t in cfg.suite.far}
    columns = [rounds[0], *([rounds[number]] if number else [])]
    return [(said, [_percent(m, name) for m in columns]) for said, name in names.items() if name in rounds[0]]


def _percent(metrics: Mapping[str, float], name: str) -> str:
    value, low, high = (100 * metrics[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _prompt(run: Path, number: int, tokenizer: Any) -> list[str]:
    """A prompt that the model learnt from, as it reads it: of the round's examples, or of an earlier round's."""
    for t in range(number, 0, -1):
        file = run / "rounds" / f"{t:02d}" / "examples.jsonl"
        if not file.is_file():
            continue
        with file.open() as opened:
            prompt = str(json.loads(opened.readline() or "{}").get("prompt", ""))
        if not prompt:  # a round without solutions
            continue
        if (messages := messages_of(prompt)) is not None:
            prompt = chat_text(tokenizer, messages)
        if "~~~" in prompt:
            break
        cut = f" (the last {PROMPT_SHOWN} characters)" if len(prompt) > PROMPT_SHOWN else ""
        return [f"A prompt that it was fine-tuned on{cut}:", "", "~~~text", prompt[-PROMPT_SHOWN:], "~~~", ""]
    return []

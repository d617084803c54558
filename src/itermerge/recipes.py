"""What a merged folder says of itself: its card, the recipe that makes it again, and the same for mergekit."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from .config import to_dict
from .weights import place_of

if TYPE_CHECKING:
    from .checkpoints import Job

CARD, RECIPE, MERGEKIT = "README.md", "recipe.json", "mergekit.yaml"
MADE = (CARD, RECIPE, MERGEKIT)
PAPERS: Mapping[str, str] = {
    "random": "2311.03099", "magnitude": "2306.01708", "rank": "2406.11617", "band": "2312.06795", "mean": "2203.05482",
    "sum": "2212.04089", "elect": "2306.01708", "stock": "2403.19522", "tall": "2405.07813", "consensus": "2405.07813",
}  # fmt: skip
# mergekit's name of a rule by our two parts, and what it does otherwise.
SAME: Mapping[tuple[str, str], str] = {
    ("none", "mean"): "linear", ("none", "sum"): "task_arithmetic", ("none", "slerp"): "slerp",
    ("none", "stock"): "model_stock", ("magnitude", "elect"): "ties", ("random", "mean"): "dare_linear",
    ("random", "sum"): "dare_linear", ("random", "elect"): "dare_ties", ("rank", "mean"): "della_linear",
    ("rank", "sum"): "della_linear", ("rank", "elect"): "della", ("band", "mean"): "breadcrumbs",
    ("band", "sum"): "breadcrumbs", ("band", "elect"): "breadcrumbs_ties",
}  # fmt: skip
OTHERWISE: Mapping[str, str] = {
    "random": "other masks, unseeded by default; what is kept is rescaled to the update's L1 norm, not by 1 / density",
    "rank": "other masks, unseeded by default; what is kept is rescaled to the update's L1 norm, not each entry",
    "magnitude": "one entry of a tensor more or less may be kept",
    "band": "one entry of a tensor more or less may be kept",
    "elect": "a sum of zero elects plus",
    "slerp": "a straight line where the cosine is above .9995, as of most fine-tunes; the angle is of float32 sums",
    "stock": "t is not held between 0 and 1",
}


def write(job: Job, folder: Path) -> None:
    """The card, recipe.json, and mergekit.yaml where mergekit has the rule."""
    (folder / RECIPE).write_text(json.dumps(recipe(job), indent=1, sort_keys=True) + "\n")
    (folder / CARD).write_text(card(job))
    if text := for_mergekit(job):
        (folder / MERGEKIT).write_text(text)


def recipe(job: Job) -> dict[str, Any]:
    """The config as far as it makes the result, the inputs by the sha256 of their files' headers, the version. No dates
    and no places: the same in every folder."""
    config = {key: value for key, value in to_dict(job.cfg).items() if key not in ("out", "plan", "threads")}
    inputs = {
        key: {file.name: {"bytes": file.stat().st_size, "header": header_digest(file)}
              for file in sorted(set(model.files.values()))}
        for key, model in job.inputs.items()
    }  # fmt: skip
    return {"itermerge": version("itermerge"), "config": config, "inputs": inputs}


def header_digest(file: Path) -> str:
    """sha256 of a safetensors file's header: names, dtypes, shapes and places."""
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read(int.from_bytes(opened.read(8), "little"))).hexdigest()


def card(job: Job) -> str:
    """README.md, with the head that the Hugging Face hub reads."""
    cfg, merge = job.cfg, job.cfg.merge
    named = [path for path in (cfg.base, *cfg.tuned) if on_hub(path)]
    head: dict[str, Any] = {"base_model": named, "base_model_relation": "merge"} if named else {}
    head |= {"library_name": "transformers", "tags": ["merge", "itermerge"]}
    papers = {PAPERS[part]: None for part in (merge.sparsify, merge.combine) if part in PAPERS}
    if merge.sparsify != "none" and merge.combine in ("mean", "sum"):
        papers = {PAPERS[merge.sparsify]: None}
    said = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    parameters = ", ".join(f"{key}={value}" for key, value in parameters_of(vars(merge)).items())
    dtypes = sorted({str(slot.dtype).removeprefix("torch.") for slot in job.placed})
    rows = {row: ratio_said([job.ratios[n] for n in names]) for row, names in by_row(job).items()}
    constant = len(set(rows.values())) == 1
    facts = {
        "base": cfg.base, "tuned": ", ".join(cfg.tuned), "rule": f"{merge.kind} ({parameters}) {said}".strip(),
        "ratio": next(iter(rows.values())) if constant else f"{merge.ratio:g} times the factors of its policy, below",
        "dtype": ", ".join(dtypes), "made with": f"itermerge {version('itermerge')}, torch {version('torch')}",
    }  # fmt: skip
    lead = "`merged = base + ratio * combine(sparsify(tuned - base))`, tensor by tensor, in float32:"
    lines = page(head, job.out.name, lead, facts)
    if not constant:
        lines += ["| row | ratio |", "|---|---|", *(f"| {row} | {ratio} |" for row, ratio in rows.items()), ""]
    if job.notes:
        lines += [*(f"- {note}" for note in job.notes), ""]
    lines += [command("itermerge-merge", job.typed), ""]
    lines += [f"Config and inputs: `{RECIPE}`. Configs, tokenizer and code are those of {cfg.tuned[0]}.", ""]
    return "\n".join(lines)


def on_hub(path: str) -> bool:
    """Whether a model is named as on the Hugging Face hub, and no folder here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not Path(path).is_dir()


def page(head: Mapping[str, Any], title: str, lead: str, facts: Mapping[str, Any]) -> list[str]:
    """The lines that a card begins with: what the hub reads, a title, a sentence, a table of facts."""
    lines = ["---", OmegaConf.to_yaml(OmegaConf.create(dict(head))).strip(), "---", "", f"# {title}", "", lead, ""]
    return [*lines, "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]


def command(name: str, typed: Sequence[str]) -> str:
    """A command line, indented as code."""
    return f"    {name} {' '.join(map(shlex.quote, typed))}".rstrip()


def by_row(job: Job) -> dict[str, list[str]]:
    """{embed, layer_00, ..., norm, head: names of tensors}"""
    rows: dict[str, list[str]] = {}
    for name in sorted(job.base):
        rows.setdefault(place_of(name)[0], []).append(name)
    order = {"embed": 0, "norm": 2, "head": 3}
    return {row: rows[row] for row in sorted(rows, key=lambda r: (order.get(r, 1), r))}


def ratio_said(ratios: Sequence[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def parameters_of(merge: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a rule and the parameters that it has."""
    names = ("sparsify", "combine", "density", "rescale", "epsilon", "gamma", "scope", "threshold", "agree", "weights",
             "seed", "function")  # fmt: skip
    return {name: value for name in names if (value := merge.get(name)) is not None}


def for_mergekit(job: Job) -> str | None:
    """mergekit.yaml; None where mergekit has no such rule, or the ratio is not the same everywhere."""
    merge, ratios = job.cfg.merge, set(job.ratios.values())
    method = SAME.get((merge.sparsify, merge.combine))
    stock = merge.combine == "stock"
    if method is None or len(ratios) > 1 or merge.scope == "model" or (stock and merge.ratio != 1):
        return None
    (ratio,) = ratios
    weights = [float(w) for w in merge.weights or [1.0] * len(job.tuned)]
    models: list[dict[str, Any]] = [{"model": path} for path in job.cfg.tuned]
    out: dict[str, Any] = {"merge_method": method, "base_model": job.cfg.base}
    if merge.combine == "slerp":
        models = [{"model": job.cfg.base}, *models]
        out["parameters"] = {"t": ratio}
    elif method == "linear":
        shares = [1 - ratio, *(ratio * w / sum(weights) for w in weights)]
        models = [{"model": job.cfg.base}, *models]
        models = [m | {"parameters": {"weight": share}} for m, share in zip(models, shares, strict=True)]
        out = {"merge_method": method, "parameters": {"normalize": False}}
    elif not stock:
        own = {k: v for k in ("density", "epsilon", "gamma") if (v := getattr(merge, k)) is not None}
        models = [m | {"parameters": {"weight": w, **own}} for m, w in zip(models, weights, strict=True)]
        out["parameters"] = {"normalize": merge.combine != "sum", "lambda": ratio}
        if merge.rescale is not None:
            out["parameters"]["rescale"] = merge.rescale
    dtypes = {str(slot.dtype).removeprefix("torch.") for slot in job.placed if slot.dtype.is_floating_point}
    out |= {"dtype": "float32"} | ({"out_dtype": next(iter(dtypes))} if len(dtypes) == 1 else {}) | {"models": models}
    differs = [OTHERWISE[part] for part in (merge.sparsify, merge.combine) if part in OTHERWISE]
    if merge.combine == "elect" and len(job.tuned) == 1:
        differs.remove(OTHERWISE["elect"])
    said = f"There: {'; '.join(differs)}." if differs else "The same values but for rounding."
    return f"# The same rule for mergekit. {said}\n" + OmegaConf.to_yaml(OmegaConf.create(out))

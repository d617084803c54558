"""The schema of every config key: type, unit, range, and the checks between keys.

Values stand in `conf/`, one place for each; here is what they may be. Groups whose members differ (`task=lab`,
`task=gym`) carry a `kind`, which picks the dataclass. `check` turns a composed config into a `Root`, or raises
`ConfigError` naming the key as typed. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from .analysis import ESTIMATORS


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key."""


def knob(
    *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None,
    among: tuple = (),
) -> Any:  # fmt: skip
    """A required field with a range or a set of values."""
    return field(default=MISSING, metadata={"ge": ge, "gt": gt, "le": le, "lt": lt, "among": among})


@dataclass
class ModelLab:
    """The lab's base model of one pretraining seed; 0, 1 and 2 are in the package."""

    kind: str = "lab"
    seed: int = knob(ge=0)


@dataclass
class ModelHF:
    """A Hugging Face causal LM: a local folder or a hub repository."""

    kind: str = "hf"
    path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = MISSING


@dataclass
class TaskLab:
    kind: str = "lab"
    family: str = MISSING


@dataclass
class TaskGym:
    """A reasoning-gym data set with few-shot prompts; `train_shots` examples stand before a question in training."""

    kind: str = "gym"
    dataset: str = MISSING
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    shots: int = knob(ge=0, le=64)
    train_shots: int = field(default=0, metadata={"ge": 0, "le": 64})


@dataclass
class TaskWords:
    """Word problems of a JSON-lines file; `holds` says whether its questions are split by a hash, or all test items."""

    kind: str = "words"
    file: str = MISSING
    label: str = MISSING
    holds: str = field(default="all", metadata={"among": ("all", "test")})
    shots: int = knob(ge=0)  # worked examples before a question; six are there
    train_shots: int = field(default=0, metadata={"ge": 0})


@dataclass
class _Practice:
    """What makes a task the one to practise on."""

    n_train: int = knob(ge=1)  # problems a round
    n_validation: int = knob(ge=1)  # problems that choose a round or a learning rate
    problems: str = knob(among=("fixed", "fresh"))  # the same each round, or drawn anew
    max_solutions: int | None = field(default=MISSING, metadata={"ge": 1})  # kept a problem


@dataclass
class PracticeLab(_Practice, TaskLab):
    pass


@dataclass
class PracticeGym(_Practice, TaskGym):
    pass


@dataclass
class PracticeWords(_Practice, TaskWords):
    pass


@dataclass
class Suite:
    """Evaluation: `n` test items of the ID task and of each OOD task; `pass_k_n` validation problems for pass@k."""

    n: int = knob(ge=1)
    seed: int = knob(ge=0)
    pass_k_n: int = knob(ge=0)
    n_validation: int = knob(ge=0)  # validation items of each OOD task: val/ood/*, for choosing
    pre_merge: bool = MISSING  # evaluate before the last merge event as well
    near: list[Any] = MISSING
    far: list[Any] = MISSING


@dataclass
class Sampler:
    kind: str = "hf"
    n: int = knob(ge=1)  # samples a problem
    temperature: float = knob(gt=0)
    top_p: float = knob(gt=0, le=1)
    max_new_tokens: int = knob(ge=1)
    batch_size: int = knob(ge=1)  # rows
    dtype: str = knob(among=("auto", "float32", "bfloat16"))  # of the copy that samples and evaluates


@dataclass
class Sft:
    epochs: int = knob(ge=1)
    lr: float = knob(gt=0)
    batch_size: int = knob(ge=1)
    schedule: str = knob(among=("constant", "linear", "cosine"))
    warmup_ratio: float = knob(ge=0, le=1)
    weight_decay: float = knob(ge=0)
    beta1: float = knob(ge=0, lt=1)
    beta2: float = knob(ge=0, lt=1)
    max_length: int = knob(ge=2)  # tokens of a prompt and its completion
    start: str = knob(among=("merged", "base", "tuned"))
    data: str = knob(among=("replace", "accumulate"))


@dataclass
class MergeNone:
    kind: str = "none"


@dataclass
class MergeLinear:
    """`ratio` is the tuned model's share; the anchor is fixed for the round."""

    kind: str = "linear"
    ratio: float = knob(ge=0, le=1)
    anchor: str = knob(among=("base", "previous", "mean"))
    every_n_epochs: Any = MISSING  # a whole number from 1, or "last"
    reset_optimizer: bool = MISSING


@dataclass
class Analysis:
    """Layer importance on `examples` of the base's own verified solutions, layer change, and what shows collapse."""

    importance: list[str] = MISSING  # estimators; [] for none
    examples: int = knob(ge=1)
    batch_size: int = knob(ge=1)  # rows of importance and of the predictions below
    ood: bool = MISSING  # importance on the OOD tasks as well
    top_share: float = knob(gt=0, le=1)  # of the layers: the important ones, whose share of the update is told
    effective_rank: Any = MISSING  # of each round's update: true, false, or auto (where it is cheap)
    kl_n: int = knob(ge=0)  # items of each OOD task for the KL divergence from the base
    train_n: int = knob(ge=0)  # training problems for memorisation


@dataclass
class Trainer:
    """Lightning's Trainer. gradient_clip_val is a norm, 0 for none."""

    accelerator: str = knob(among=("auto", "cpu", "gpu"))
    precision: str = knob(among=("auto", "32-true", "bf16-mixed", "16-mixed"))
    accumulate_grad_batches: int = knob(ge=1)
    gradient_clip_val: float = knob(ge=0)
    deterministic: bool = MISSING


@dataclass
class LoggerJsonl:
    kind: str = "jsonl"


@dataclass
class LoggerWandb:
    kind: str = "wandb"
    project: str = MISSING
    entity: str | None = None
    mode: str = knob(among=("offline", "online", "disabled"))
    group: str | None = None
    dir: str | None = None  # default: the run folder
    samples: int = knob(ge=0)  # rows a round of the table of samples
    log_model: bool = MISSING  # the last round's weights as an artifact


@dataclass
class _Store:
    keep: str = knob(among=("auto", "all", "last", "none"))  # whose weights are kept, of the rounds of a run
    check_space: bool = MISSING  # compare free space with an estimate first


@dataclass
class StoreLocal(_Store):
    kind: str = "local"
    dir: str = MISSING


@dataclass
class StoreNone(_Store):
    kind: str = "none"


@dataclass
class Sweep:
    """What a job of a sweep knows of it."""

    resume: str | None = MISSING  # the folder of a sweep that goes on
    on_error: str = knob(among=("continue", "stop"))
    gpus: Any = MISSING  # null, all, or a list of GPU numbers: one for each job at a time


@dataclass
class ProgramImm:
    """The loop of sampling, fitting, merging and evaluating."""

    kind: str = "imm"


@dataclass
class PretrainPhase:
    """One pass over `examples` fresh solutions; `styles` are the weights of a family's two styles."""

    examples: int = knob(ge=1)
    lr: float = knob(gt=0)
    styles: list[int] = field(default_factory=lambda: [1, 1])


@dataclass
class ProgramPretrainLab:
    """Makes the lab's base model of `model.seed` from nothing. Shape, corpus size and family weights."""

    kind: str = "pretrain_lab"
    out: str = MISSING
    phases: dict[str, PretrainPhase] = MISSING
    batch_size: int = knob(ge=1)
    width: int = knob(ge=8)
    layers: int = knob(ge=1)
    heads: int = knob(ge=1)
    kv_heads: int = knob(ge=1)
    ffn: int = knob(ge=8)
    families: dict[str, float] = MISSING


@dataclass
class Loop:
    on_empty: str = knob(among=("stop", "skip"))  # a round in which nothing verifies


@dataclass
class Paths:
    home: str = MISSING
    models: str = MISSING
    data: str = MISSING


@dataclass
class Root:
    """The whole config, as a run reads it."""

    seed: int = knob(ge=0)
    threads: int = knob(ge=1)  # CPU threads; part of every key, since sums depend on it
    rounds: int = knob(ge=1)
    optimized_metric: str = MISSING
    program: Any = None
    model: Any = None
    task: Any = None
    suite: Suite = field(default_factory=Suite)
    sampler: Any = None
    sft: Sft = field(default_factory=Sft)
    merge: Any = None
    trainer: Trainer = field(default_factory=Trainer)
    analysis: Analysis = field(default_factory=Analysis)
    loop: Loop = field(default_factory=Loop)
    logger: Any = None
    store: Any = None
    sweep: Sweep = field(default_factory=Sweep)
    paths: Paths = field(default_factory=Paths)


@dataclass
class AnalyzeAnalysis:
    importance: list[str] = MISSING
    examples: int = knob(ge=1)
    batch_size: int = knob(ge=1)
    top_share: float = knob(gt=0, le=1)
    effective_rank: Any = MISSING


@dataclass
class Analyze:
    """The config of `itermerge-analyze`: two checkpoints, and whose solutions importance is measured on."""

    base: str = MISSING
    tuned: str = MISSING
    out: str = MISSING
    solutions: str | None = None  # a JSON-lines file of prompt and completion; default: the base's own, of `task`
    seed: int = knob(ge=0)
    threads: int = knob(ge=1)
    accelerator: str = knob(among=("auto", "cpu", "gpu"))
    trust_remote_code: bool = MISSING
    task: Any = None
    sampler: Any = None
    analysis: AnalyzeAnalysis = field(default_factory=AnalyzeAnalysis)
    paths: Paths = field(default_factory=Paths)


KINDS: Mapping[str, Mapping[str, type]] = {
    "program": {"imm": ProgramImm, "pretrain_lab": ProgramPretrainLab},
    "model": {"lab": ModelLab, "hf": ModelHF},
    "task": {"lab": PracticeLab, "gym": PracticeGym, "words": PracticeWords},
    "sampler": {"hf": Sampler},
    "merge": {"none": MergeNone, "linear": MergeLinear},
    "logger": {"jsonl": LoggerJsonl, "wandb": LoggerWandb},
    "store": {"local": StoreLocal, "none": StoreNone},
}
EXAMS: Mapping[str, type] = {"lab": TaskLab, "gym": TaskGym, "words": TaskWords}


def conf_dir() -> Path:
    """The folder of config groups: beside this file in a wheel, at the top of a checkout."""
    here = Path(__file__).resolve().parent
    return next(d for d in (here / "conf", here.parent.parent / "conf") if (d / "config.yaml").is_file())


def check(composed: DictConfig) -> Root:
    """`composed` as a Root, every key known, of its type, in its range. Raises ConfigError."""
    raw = _plain(composed)
    _check_list(raw)
    schema = OmegaConf.structured(Root)
    for group, kinds in KINDS.items():
        schema[group] = OmegaConf.structured(_kind(kinds, raw.get(group), group))
    suite = raw.get("suite")
    exams: dict[str, list[Any]] = {}
    if isinstance(suite, dict):
        for side in ("near", "far"):
            listed = suite.pop(side, None)
            if not isinstance(listed, list):
                raise ConfigError(f"suite.{side}: expected a list of tasks, got {listed!r}")
            exams[side] = [
                _merge(OmegaConf.structured(_kind(EXAMS, item, f"suite.{side}[{i}]")), item, f"suite.{side}[{i}]")
                for i, item in enumerate(listed)
            ]
        raw["suite"] = suite | {"near": [], "far": []}
    root: Root = _merge(schema, raw, "")
    root.suite.near, root.suite.far = exams["near"], exams["far"]
    _cross_checks(root)
    return root


def check_analyze(composed: DictConfig) -> Analyze:
    """`composed` as the config of `itermerge-analyze`. Raises ConfigError."""
    raw = _plain(composed)
    _check_list(raw)
    schema = OmegaConf.structured(Analyze)
    for group in ("task", "sampler"):
        schema[group] = OmegaConf.structured(_kind(KINDS[group], raw.get(group), group))
    made: Analyze = _merge(schema, raw, "")
    _check_analysis(made.analysis)
    return made


def _plain(composed: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'config'}: {_first_line(error)}") from error
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items() if k != "hydra"}


def _check_list(raw: Mapping[str, Any]) -> None:
    asked = raw["analysis"].get("importance") if isinstance(raw.get("analysis"), dict) else []
    if isinstance(asked, str):
        raise ConfigError(f"analysis.importance: expected a list; write analysis.importance=[{asked}]")


def _check_analysis(analysis: Analysis | AnalyzeAnalysis) -> None:
    asked = analysis.importance
    if unknown := [name for name in asked if name not in ESTIMATORS]:
        raise ConfigError(f"analysis.importance: {unknown[0]!r} is none of {', '.join(ESTIMATORS)}")
    if len(set(asked)) < len(asked):
        raise ConfigError(f"analysis.importance: {', '.join(asked)} names one twice")
    asked_ranks = analysis.effective_rank
    if asked_ranks != "auto" and not isinstance(asked_ranks, bool):
        raise ConfigError(f"analysis.effective_rank: must be true, false or auto, got {asked_ranks!r}")


def to_dict(root: Root | Analyze) -> dict[str, Any]:
    """The resolved config as plain containers."""
    return dataclasses.asdict(root)


def _kind(kinds: Mapping[str, type], node: Any, key: str) -> type:
    if not isinstance(node, dict):
        raise ConfigError(f"{key}: expected a group of keys with a kind, got {node!r}")
    if node.get("kind") not in kinds:
        raise ConfigError(f"{key}.kind: {node.get('kind')!r} is none of {', '.join(kinds)}")
    return kinds[node["kind"]]


def _merge(schema: Any, raw: dict[str, Any], at: str) -> Any:
    prefix = f"{at}." if at else ""
    try:
        merged = OmegaConf.merge(schema, copy.deepcopy(raw))
        made = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(
            f"{prefix}{error.full_key}: there is no such key{_nearest(schema, str(error.full_key))}"
        ) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{prefix}{error.full_key}: a value is needed") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{prefix}{error.full_key}: {_first_line(error)}") from error
    _check_ranges(made, at)
    return made


def _nearest(schema: Any, key: str) -> str:
    from difflib import get_close_matches

    *path, last = key.split(".")
    node = OmegaConf.select(schema, ".".join(path)) if path else schema
    names = [str(k) for k in node] if isinstance(node, DictConfig) else []
    close = get_close_matches(last, names, 1)
    return f"; did you mean {'.'.join([*path, close[0]])}?" if close else f"; there are {', '.join(names)}"


def _check_ranges(node: Any, at: str) -> None:
    for f in dataclasses.fields(node):
        value, key, limits = getattr(node, f.name), f"{at}.{f.name}" if at else f.name, f.metadata
        if dataclasses.is_dataclass(value):
            _check_ranges(value, key)
        for name, item in value.items() if isinstance(value, dict) else ():
            if dataclasses.is_dataclass(item):
                _check_ranges(item, f"{key}.{name}")
        if value is None or not limits:
            continue
        if limits.get("among") and value not in limits["among"]:
            raise ConfigError(f"{key}: {value!r} is none of {', '.join(limits['among'])}")
        for name, text, ok in (
            ("ge", "at least", lambda v, x: v >= x),
            ("gt", "above", lambda v, x: v > x),
            ("le", "at most", lambda v, x: v <= x),
            ("lt", "below", lambda v, x: v < x),
        ):
            if limits.get(name) is not None and not ok(value, limits[name]):  # NaN fails every comparison
                raise ConfigError(f"{key}: must be {text} {limits[name]}, got {value}")


def _cross_checks(root: Root) -> None:
    if isinstance(root.program, ProgramPretrainLab):
        for name, phase in root.program.phases.items():
            if len(phase.styles) != 2 or min(phase.styles) < 0 or sum(phase.styles) == 0:
                raise ConfigError(f"program.phases.{name}.styles: needs two whole-number weights, got {phase.styles}")
    if isinstance(root.merge, MergeLinear):
        every = root.merge.every_n_epochs
        if every != "last" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ConfigError(f"merge.every_n_epochs: must be a whole number from 1, or last; got {every!r}")
    _check_analysis(root.analysis)
    gpus = root.sweep.gpus
    if gpus not in (None, "all") and not (
        isinstance(gpus, list) and gpus and all(isinstance(g, int) and not isinstance(g, bool) and g >= 0 for g in gpus)
    ):
        raise ConfigError(f"sweep.gpus: must be null, all, or a list of GPU numbers as [0,1]; got {gpus!r}")
    if not root.suite.near and not root.suite.far:
        raise ConfigError("suite.near, suite.far: at least one OOD task is needed")
    if root.suite.pass_k_n > root.task.n_validation:
        raise ConfigError(
            f"suite.pass_k_n: {root.suite.pass_k_n} problems, task.n_validation has only {root.task.n_validation}"
        )
    from .tasks.lab import FAMILIES

    for key, task in {
        "task": root.task,
        **{f"suite.near[{i}]": t for i, t in enumerate(root.suite.near)},
        **{f"suite.far[{i}]": t for i, t in enumerate(root.suite.far)},
    }.items():
        if isinstance(task, TaskLab) and task.family not in FAMILIES:
            raise ConfigError(f"{key}.family: {task.family!r} is none of {', '.join(FAMILIES)}")
    if isinstance(root.task, TaskWords) and root.task.holds != "all":
        raise ConfigError("task.holds: a file of test items alone cannot be practised on; all splits it by a hash")
    labels = [label(t) for t in (root.task, *root.suite.near, *root.suite.far)]
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise ConfigError(f"task, suite.near, suite.far: {', '.join(twice)} stands there more than once")
    if root.trainer.precision == "16-mixed" and root.trainer.accelerator == "cpu":
        raise ConfigError("trainer.precision: 16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true")
    check_metric(root, root.optimized_metric, "optimized_metric")


def check_metric(root: Root, metric: str, key: str) -> None:
    """Raises ConfigError, naming `key`, when a run of this config has no such final figure."""
    sides = [side for side in ("near", "far") if getattr(root.suite, side)]
    ood = [label(t) for t in (*root.suite.near, *root.suite.far)]
    known = {"val/id/acc", "id/acc", f"id/{label(root.task)}/acc", "ood/acc", *(f"ood/{name}/acc" for name in ood)}
    known |= {f"ood/{side}/acc" for side in sides}
    validation = {"val/ood/acc", *(f"val/ood/{side}/acc" for side in sides)}
    if metric in validation and not root.suite.n_validation:
        raise ConfigError(f"{key}: {metric} needs validation items of the OOD tasks; set suite.n_validation, as to 50")
    if metric not in known | validation:
        raise ConfigError(f"{key}: {metric!r} is none of {', '.join(sorted(known | validation))}")


def label(task: Any) -> str:
    """The task's name in metrics."""
    if isinstance(task, TaskGym):
        return task.label or task.dataset
    return task.family if isinstance(task, TaskLab) else task.label


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]

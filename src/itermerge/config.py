"""The schema of every config key: type, unit, range, and the checks between keys.

Values stand in `conf/`, one place for each; here is what they may be. Groups whose members differ (`task=lab`,
`task=gym`) carry a `kind`, which picks the dataclass. `check` turns a composed config into a `Root`, or raises
`ConfigError` naming the key as typed. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from .analysis import ESTIMATORS
from .tasks import prompts
from .tasks.verifiers import VERIFIERS

# The parts of merge rules (merging.law), and the parameters that each has.
SPARSIFY: Mapping[str, tuple[str, ...]] = {
    "none": (), "random": ("density", "rescale", "mask", "seed"), "magnitude": ("density", "scope"),
    "rank": ("density", "epsilon", "mask", "seed"), "band": ("density", "gamma", "scope"),
}  # fmt: skip
COMBINE: Mapping[str, tuple[str, ...]] = {
    "mean": (), "sum": (), "elect": (), "slerp": (), "stock": (), "tall": ("threshold",),
    "consensus": ("threshold", "agree"), "function": ("function",),
}  # fmt: skip
WEIGHTED = ("mean", "sum", "elect")
COLDEST = 0.01  # temperature that vLLM samples at; it takes lower ones for this one


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key."""


def knob(
    *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None,
    among: tuple = (),
) -> Any:  # fmt: skip
    """A required field with a range or a set of values."""
    return field(default=MISSING, metadata={"ge": ge, "gt": gt, "le": le, "lt": lt, "among": among})


@dataclass
class Lora:
    """Low-rank adapters in place of training all weights; each fit begins new ones and ends with them folded in."""

    rank: int | None = field(default=MISSING, metadata={"ge": 1})
    alpha: float = knob(gt=0)
    dropout: float = knob(ge=0, lt=1)
    targets: Any = MISSING  # all-linear, or a list of module names


@dataclass
class ModelLab:
    """The lab's base model of one pretraining seed; 0, 1 and 2 are in the package."""

    kind: str = "lab"
    seed: int = knob(ge=0)
    lora: Lora = field(default_factory=Lora)


@dataclass
class _HF:
    """A Hugging Face causal LM: a local folder or a hub repository."""

    kind: str = "hf"
    path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = MISSING


@dataclass
class ModelHF(_HF):
    lora: Lora = field(default_factory=Lora)


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
class Splits:
    """The data set's split of each part; parts that name the same one share it. null: there is no such part."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None


@dataclass
class TaskHub:
    """Rows of a repository of the Hugging Face hub, of a folder of that shape, or of one file (`tasks.hub`)."""

    kind: str = "hub"
    path: str = MISSING  # owner/name, a folder, or a .jsonl, .json, .csv or .parquet file
    name: Any = None  # the repository's config, or a list of them, joined; null: its only or default one
    revision: str | None = None  # of the hub
    splits: Splits = field(default_factory=Splits)
    shares: list[int] = field(default_factory=lambda: [60, 15, 25])  # of train, validation, test in a split they share
    question: str = MISSING  # a column, or a template as "{Body} {Question}"
    answer: str = MISSING  # a column; dots for what is nested
    choices: str | None = None  # a column: a list of texts, or {text: [...], label: [...]}
    solution: str | None = None  # a column with a worked solution, or a template
    where: dict[str, Any] = field(default_factory=dict)  # {column: value, or a list of them}: the rows that are kept
    verifier: str = knob(among=VERIFIERS)
    prompt: str = "qa"  # qa, alpaca, chat, or a text with {question} ({shots}, {instruction})
    train_prompt: str | None = None  # null: as prompt
    eval_prompt: str | None = None  # null: as prompt
    instruction: str = ""  # a paragraph before everything, or the system message
    shots: int = field(default=0, metadata={"ge": 0})  # worked examples before the question when sampling
    train_shots: int = field(default=0, metadata={"ge": 0})  # when fine-tuning
    eval_shots: int | None = field(default=None, metadata={"ge": 0})  # when evaluating; null: as when sampling
    shots_file: str | None = None  # word_problems, math, choice, boolean, or a file of {"question", "solution"} lines
    stop: list[str] | None = None  # strings that end a completion; null: the prompt's own
    label: str = ""  # in metrics; default: the last part of path


@dataclass
class TaskHarness:
    """A task of lm-evaluation-harness, for suites alone: no prompts of ours, no solutions to learn from."""

    kind: str = "lm_eval"
    task: str = MISSING  # its name there
    label: str = ""  # in metrics; default: task
    metric: str = (
        MISSING  # acc, acc_norm, exact_match, ..., 0 or 1 an item; with its filter as "exact_match,strict-match"
    )
    num_fewshot: int | None = field(default=None, metadata={"ge": 0})  # null: the task's own
    include_path: str | None = None  # a folder of task files beside lm_eval's


@dataclass
class _Practice:
    """What makes a task the one to practise on."""

    n_train: int = knob(ge=1)  # problems a round
    n_validation: int = knob(ge=1)  # problems that choose a round or a learning rate
    problems: str = knob(among=("fixed", "fresh"))  # the same each round, or drawn anew
    max_solutions: int | None = field(default=MISSING, metadata={"ge": 1})  # kept a problem
    labels: str = knob(among=("gold", "majority"))  # what a solution is right by: the gold answer, or most samples'
    # Training problems that share so many words in a row with an evaluated one are left out; null: none are.
    decontaminate: int | None = field(default=MISSING, metadata={"ge": 1})


@dataclass
class PracticeLab(_Practice, TaskLab):
    pass


@dataclass
class PracticeGym(_Practice, TaskGym):
    pass


@dataclass
class PracticeHub(_Practice, TaskHub):
    pass


@dataclass
class Suite:
    """Evaluation: `n` test items of the ID task and of each OOD task; `pass_k_n` validation problems for pass@k.

    In conf/, `tasks` holds tasks of conf/task by name, for near and far to refer to; here they have been put there.
    """

    n: int = knob(ge=1)
    seed: int = knob(ge=0)
    pass_k_n: int = knob(ge=0)
    n_validation: int = knob(ge=0)  # validation items of each OOD task: val/ood/*, for choosing
    pre_merge: bool = MISSING  # evaluate before the last merge event as well
    max_new_tokens: int | None = field(default=MISSING, metadata={"ge": 1})  # of a greedy answer; null: the sampler's
    near: list[Any] = MISSING
    far: list[Any] = MISSING


@dataclass
class Sampler:
    kind: str = "hf"
    n: int = knob(ge=1)  # samples a problem
    hints: int = knob(ge=0)  # samples with the answer given away, of each problem that none of these solves
    temperature: float = knob(gt=0)
    top_p: float = knob(gt=0, le=1)
    max_new_tokens: int = knob(ge=1)
    batch_size: int = knob(ge=1)  # rows
    dtype: str = knob(among=("auto", "float32", "bfloat16"))  # of the copy that samples and evaluates


@dataclass
class SamplerVLLM(Sampler):
    """By vLLM, in a process and perhaps an environment of its own."""

    kind: str = "vllm"
    python: str | None = MISSING  # of an environment with vllm; null: this one
    gpu_memory_utilization: float = knob(gt=0, le=1)  # share of the device's memory; on a CPU, of the machine's
    between: str = knob(among=("auto", "sleep", "stop", "keep"))  # what it does while the run computes without it
    enforce_eager: bool = MISSING  # neither torch.compile nor CUDA graphs
    batch_invariant: bool = MISSING  # a draw does not depend on its batch; on some GPUs
    timeout: float = knob(gt=0)  # seconds, to start or to load weights


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
    too_long: str = knob(among=("stop", "drop"))  # what becomes of longer ones
    start: str = knob(among=("merged", "base", "tuned"))
    data: str = knob(among=("replace", "accumulate"))
    l2_to_base: float = knob(ge=0)  # times half the squared distance from the base, added to the loss
    kl_to_base: float = knob(ge=0)  # times KL(tuned || base) in nats a completion token, added to the loss
    replay: str | None = (
        MISSING  # a JSON-lines file of prompt and completion, or `lab`: fresh solutions of all its families
    )
    replay_share: float = knob(ge=0, lt=1)  # of a fit's examples
    patience: int | None = field(default=MISSING, metadata={"ge": 1})  # epochs without a better validation accuracy


@dataclass
class TeacherNone:
    """The model practises on solutions of its own."""

    kind: str = "none"


@dataclass
class TeacherLab:
    """Solutions are sampled from another lab model."""

    kind: str = "lab"
    seed: int = knob(ge=0)


@dataclass
class TeacherHF(_HF):
    """Solutions are sampled from another causal LM."""


@dataclass
class TeacherFile:
    """Solutions stand in a JSON-lines file: question (or id) and completion."""

    kind: str = "file"
    path: str = MISSING


@dataclass
class MergeNone:
    kind: str = "none"


@dataclass
class RatioPolicy:
    """Factors by which `merge.ratio` is multiplied; lists are spread over rounds, epochs or depth and interpolated."""

    kind: str = MISSING
    rounds: list[float] = MISSING  # over rounds 1 to `span`
    span: int | None = field(default=MISSING, metadata={"ge": 1})  # null: all rounds
    epochs: list[float] = MISSING  # over the epochs of a round
    at_end: bool = MISSING  # no merge in any round but the last
    layers: list[float] = MISSING  # over the depth; embeddings take the first, final norm and head the last
    modules: list[Any] = MISSING  # {match, factor}, the first that fits counts
    importance: str | None = MISSING  # an estimator
    strength: float = knob(ge=-1, le=1)  # above 0: important layers move more
    angle: bool = MISSING  # by the cosine of this round's update with that of the round before
    search: list[float] = MISSING  # factors tried on validation items each round
    metric: str = knob(among=("val/id/acc", "val/mean/acc"))  # by which the best of them is chosen
    tolerance: float = knob(ge=0, le=1)  # the smallest factor that is no worse than the best by more than this


@dataclass
class Merge:
    """A rule under the law of `merging.law`; a parameter is null where its parts do not have it.

    `ratio` is the tuned model's share; the anchor is fixed for the round.
    """

    kind: str = MISSING  # the rule's name
    ratio: float = knob(ge=0, le=1)
    over: str = knob(among=("tuned", "rounds"))  # of the difference to the anchor, or of all rounds' updates
    sparsify: str = knob(among=tuple(SPARSIFY))
    combine: str = knob(among=tuple(COMBINE))
    density: float | None = field(default=MISSING, metadata={"gt": 0, "le": 1})  # share of the update that is kept
    rescale: bool | None = MISSING  # divide what is kept by its probability
    epsilon: float | None = field(default=MISSING, metadata={"ge": 0, "lt": 1})
    gamma: float | None = field(default=MISSING, metadata={"ge": 0, "lt": 1})
    scope: str | None = field(default=MISSING, metadata={"among": ("tensor", "model")})
    weights: list[float] | None = MISSING  # of several tuned models
    threshold: float | None = field(default=MISSING, metadata={"ge": 0})
    agree: int | None = field(default=MISSING, metadata={"ge": 1})
    mask: str | None = field(default=MISSING, metadata={"among": ("fresh", "fixed")})  # drawn anew each round, or not
    seed: int | None = field(default=MISSING, metadata={"ge": 0})  # of masks
    function: str | None = MISSING  # module.name of a rule of the user's own
    params: dict[str, Any] = MISSING  # its keyword arguments
    policy: RatioPolicy = field(default_factory=RatioPolicy)


@dataclass
class MergeEvents(Merge):
    """A rule in training."""

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

    strategy: str = knob(among=("single", "ddp", "fsdp"))
    devices: Any = MISSING  # a number, or auto: all GPUs; two processes on a CPU
    accelerator: str = knob(among=("auto", "cpu", "gpu"))
    precision: str = knob(among=("auto", "32-true", "bf16-mixed", "16-mixed"))
    accumulate_grad_batches: int = knob(ge=1)
    gradient_checkpointing: bool = MISSING  # activations inside a block are computed again when they are needed
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
class _Folder:
    dtype: str = knob(among=("float32", "bfloat16"))
    decoding: str = knob(
        among=("greedy", "sampled")
    )  # as the run evaluates, or as it practises: generation_config.json


@dataclass
class Export(_Folder):
    """Hugging Face folders of a run's models, made when it ends."""

    rounds: list[Any] = MISSING  # of final, best, and numbers


@dataclass
class Paths:
    home: str = MISSING
    models: str = MISSING
    data: str = MISSING


@dataclass
class Root:
    """The whole config, as a run reads it."""

    label: str = MISSING  # the setting's name in reports; "" for none
    seed: int = knob(ge=0)
    threads: int = knob(ge=1)  # CPU threads; part of every key, since sums depend on it
    rounds: int = knob(ge=1)
    plan: bool = MISSING  # say what would be done, what it costs and needs, and do nothing
    optimized_metric: str = MISSING
    program: Any = None
    model: Any = None
    task: Any = None
    suite: Suite = field(default_factory=Suite)
    sampler: Any = None
    sft: Sft = field(default_factory=Sft)
    teacher: Any = None
    merge: Any = None
    trainer: Trainer = field(default_factory=Trainer)
    analysis: Analysis = field(default_factory=Analysis)
    loop: Loop = field(default_factory=Loop)
    export: Export = field(default_factory=Export)
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


@dataclass
class ExportOf(_Folder):
    """The config of `itermerge-export`: a run's folder, and which of its models becomes a folder of its own."""

    run: str = MISSING
    round: Any = MISSING  # final, best, or a number
    out: str | None = MISSING  # null: RUN/export/ROUND


@dataclass
class Evaluate:
    """The config of `itermerge-evaluate`: models, and the task and suite that they are evaluated on."""

    others: list[str] = MISSING  # further models, each compared with `model`
    out: str = MISSING
    threads: int = knob(ge=1)
    accelerator: str = knob(among=("auto", "cpu", "gpu"))
    model: Any = None
    task: Any = None
    suite: Suite = field(default_factory=Suite)
    sampler: Any = None
    paths: Paths = field(default_factory=Paths)


@dataclass
class Between:
    """The config of `itermerge-merge`: checkpoints, the rule that merges them, and the folder that it makes."""

    base: str = MISSING
    tuned: Any = MISSING  # one, or a list
    out: str = MISSING
    merge: Merge = field(default_factory=Merge)
    dtype: str | None = knob(among=("float32", "bfloat16", "float16"))  # null: the first tuned model's, by tensor
    shard_size: Any = MISSING  # bytes, or a text as 5GB; null: the files that the first tuned model has
    plan: bool = MISSING  # say what would be done, and write nothing
    seed: int = knob(ge=0)
    threads: int = knob(ge=1)  # tensors at a time; no part of the result


# Keys of a rule that mean something in training alone.
IN_TRAINING = ("anchor", "every_n_epochs", "reset_optimizer")
# Of a policy, what leaves the ratio as it is. Between checkpoints all but `layers` and `modules` must be so.
NEUTRAL: Mapping[str, Any] = {
    "rounds": [1.0], "epochs": [1.0], "at_end": False, "importance": None, "strength": 0.0, "angle": False,
    "search": [],
}  # fmt: skip
KINDS: Mapping[str, Mapping[str, type]] = {
    "program": {"imm": ProgramImm, "pretrain_lab": ProgramPretrainLab},
    "model": {"lab": ModelLab, "hf": ModelHF},
    "task": {"lab": PracticeLab, "gym": PracticeGym, "hub": PracticeHub},
    "sampler": {"hf": Sampler, "vllm": SamplerVLLM},
    "teacher": {"none": TeacherNone, "lab": TeacherLab, "hf": TeacherHF, "file": TeacherFile},
    "merge": {"none": MergeNone, "*": MergeEvents},  # any other name: a rule, perhaps the user's own
    "logger": {"jsonl": LoggerJsonl, "wandb": LoggerWandb},
    "store": {"local": StoreLocal, "none": StoreNone},
}
PRACTICE = frozenset(f.name for f in dataclasses.fields(_Practice))
EXAMS: Mapping[str, type] = {"lab": TaskLab, "gym": TaskGym, "hub": TaskHub, "lm_eval": TaskHarness}


def conf_dir() -> Path:
    """The folder of config groups: beside this file in a wheel, at the top of a checkout."""
    here = Path(__file__).resolve().parent
    return next(d for d in (here / "conf", here.parent.parent / "conf") if (d / "config.yaml").is_file())


def check(composed: DictConfig) -> Root:
    """`composed` as a Root, every key known, of its type, in its range. Raises ConfigError."""
    raw = _plain(composed)
    _check_list(raw)
    rule = raw.get("merge")
    if isinstance(rule, dict) and rule.get("kind") == "none" and len(rule) > 1:
        key = next(k for k in rule if k != "kind")
        raise ConfigError(f"merge.{key}: merge=none has no keys; where an experiment sets some, use merge.ratio=1")
    root: Root = _with_suite(Root, KINDS, raw)
    _cross_checks(root)
    return root


def _with_suite(made: type, groups: Iterable[str], raw: dict[str, Any]) -> Any:
    """`raw` as a config that has `groups` and a suite, whose tasks differ in kind."""
    schema = OmegaConf.structured(made)
    for group in groups:
        schema[group] = OmegaConf.structured(_kind(KINDS[group], raw.get(group), group))
    suite = raw.get("suite")
    exams: dict[str, list[Any]] = {}
    if isinstance(suite, dict):
        named = list((suite.pop("tasks", None) or {}).values())
        for side in ("near", "far"):
            listed = suite.pop(side, None)
            if not isinstance(listed, list):
                raise ConfigError(f"suite.{side}: expected a list of tasks, got {listed!r}")
            # what a task of conf/task says of practice means nothing here
            listed = [{k: v for k, v in t.items() if k not in PRACTICE} if t in named else t for t in listed]
            exams[side] = [
                _merge(OmegaConf.structured(_kind(EXAMS, item, f"suite.{side}[{i}]")), item, f"suite.{side}[{i}]")
                for i, item in enumerate(listed)
            ]
        raw["suite"] = suite | {"near": [], "far": []}
    root: Any = _merge(schema, raw, "")
    if exams:
        root.suite.near, root.suite.far = exams["near"], exams["far"]
    return root


# Keys that say how a run practises; an evaluation has none of that.
SPLITS = ("train", "validation", "test")
_OF_RUNS = (
    "model.lora",
    "task.n_train",
    "task.problems",
    "task.max_solutions",
    "task.labels",
    "task.train_shots",
    "task.train_prompt",
    "task.decontaminate",
    "sampler.hints",
    "suite.pre_merge",
)


def check_evaluate(composed: DictConfig, typed: Sequence[str] = ()) -> Evaluate:
    """`composed` as the config of `itermerge-evaluate`; `typed` are the overrides of its command line. Raises
    ConfigError."""
    for word in typed:
        key = word.lstrip("+~").partition("=")[0]
        if any(key == name or key.startswith(f"{name}.") for name in _OF_RUNS):
            raise ConfigError(f"{key}: is of training; itermerge-evaluate has none")
    raw = _plain(composed)
    others = raw.get("others")
    if not isinstance(others, list) or not all(isinstance(path, str) for path in others):
        raise ConfigError(f"others: expected a list of folders or hub names, as [A,B]; got {others!r}")
    made: Evaluate = _with_suite(Evaluate, ("model", "task", "sampler"), raw)
    if is_test_only(made.task) and any(word.startswith("task.n_validation=") for word in typed):
        raise ConfigError(f"task.n_validation: task.splits.validation names no split of {made.task.path}; leave it out")
    _check_tasks(made)
    return made


def check_export(composed: DictConfig) -> ExportOf:
    """`composed` as the config of `itermerge-export`. Raises ConfigError."""
    made: ExportOf = _merge(OmegaConf.structured(ExportOf), _plain(composed), "")
    if not _is_round(made.round):
        raise ConfigError(f"round: must be final, best, or a number from 0, got {made.round!r}")
    return made


def _is_round(value: Any) -> bool:
    return value in ("final", "best") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def check_analyze(composed: DictConfig) -> Analyze:
    """`composed` as the config of `itermerge-analyze`. Raises ConfigError."""
    raw = _plain(composed)
    _check_list(raw)
    schema = OmegaConf.structured(Analyze)
    for group in ("task", "sampler"):
        schema[group] = OmegaConf.structured(_kind(KINDS[group], raw.get(group), group))
    made: Analyze = _merge(schema, raw, "")
    _check_analysis(made.analysis)
    if isinstance(made.sampler, SamplerVLLM):
        raise ConfigError("sampler=vllm: itermerge-analyze samples in its own process; use sampler=hf")
    if made.sampler.hints or made.task.labels != "gold":
        raise ConfigError("sampler.hints, task.labels: are of training; importance is measured on verified solutions")
    return made


def check_between(composed: DictConfig, typed: Sequence[str] = ()) -> Between:
    """`composed` as the config of `itermerge-merge`; `typed` are the overrides of its command line. Raises
    ConfigError."""
    raw = _plain(composed)
    rule = raw.get("merge")
    if not isinstance(rule, dict) or not isinstance(rule.get("kind"), str):
        raise ConfigError(f"merge: expected a rule with a kind, got {rule!r}")
    if rule["kind"] == "none":
        raise ConfigError("merge=none: would give back the tuned model; take a rule, as merge=linear")
    _check_typed({word.lstrip("+~").partition("=")[0] for word in typed})
    policy = rule.get("policy")
    if rule.get("anchor", "base") != "base" or (isinstance(policy, dict) and policy.get("at_end")):
        raise ConfigError(f"merge={rule['kind']}: says when rounds are merged; between checkpoints it is merge=linear")
    raw["merge"] = {key: value for key, value in rule.items() if key not in IN_TRAINING}
    made: Between = _merge(OmegaConf.structured(Between), raw, "")
    if isinstance(made.tuned, str):
        made.tuned = [made.tuned]
    if not isinstance(made.tuned, list) or not made.tuned or not all(isinstance(t, str) for t in made.tuned):
        raise ConfigError(f"tuned: expected a folder, a hub name, or a list of them as [A,B]; got {made.tuned!r}")
    if made.shard_size is not None:
        bytes_of(made.shard_size, "shard_size")
    _check_between(made.merge, len(made.tuned))
    return made


def _check_typed(keys: set[str]) -> None:
    """Refuses keys that say nothing between checkpoints, so that none is ignored."""
    for key in sorted(keys):
        name = key.removeprefix("merge.")
        if name in IN_TRAINING:
            raise ConfigError(f"{key}: is of training; between checkpoints the anchor is base=..., merged with once")
        if key in ("merge.over", "merge.mask"):
            raise ConfigError(f"{key}: is of rounds; between checkpoints updates are tuned - base, masks of merge.seed")
        if key.startswith("merge.policy.") and key.split(".")[2] not in ("layers", "modules"):
            raise ConfigError(f"{key}: is of training; between checkpoints merge.policy.layers and .modules may be set")


def _check_between(merge: Merge, models: int) -> None:
    _check_merge(merge)
    check_factors(merge.policy)
    for name, neutral in NEUTRAL.items():
        if (value := getattr(merge.policy, name)) != neutral:
            raise ConfigError(
                f"merge.policy.{name}: {value!r} is of training; between checkpoints the ratio may differ by layer and "
                "module alone (merge/policy=layers or modules)"
            )
    if merge.weights is not None and len(merge.weights) != models:
        raise ConfigError(f"merge.weights: {len(merge.weights)} weights, and tuned has {models}")
    if merge.combine == "stock" and models < 2:
        raise ConfigError(f"merge={merge.kind}: takes its ratio from the angle between tuned models; give tuned=[A,B]")
    if merge.combine == "slerp" and models > 1:
        raise ConfigError(f"merge={merge.kind}: is between base and one tuned model, got {models}")


def bytes_of(size: Any, key: str) -> int:
    """A number of bytes from 5GB, 500MB, 2GiB or a number. Raises ConfigError naming `key`."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", str(size))
    if not found or found[2].upper() not in units or isinstance(size, bool) or not float(found[1]):
        raise ConfigError(f"{key}: expected a size as 5GB or 500MB, got {size!r}")
    return round(float(found[1]) * units[found[2].upper()])


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


def to_dict(root: Root | Analyze | Between | Evaluate | ExportOf) -> dict[str, Any]:
    """The resolved config as plain containers."""
    return dataclasses.asdict(root)


def _kind(kinds: Mapping[str, type], node: Any, key: str) -> type:
    if not isinstance(node, dict):
        raise ConfigError(f"{key}: expected a group of keys with a kind, got {node!r}")
    kind, other = node.get("kind"), kinds.get("*")
    if isinstance(kind, str) and (kind in kinds or other):
        return kinds.get(kind) or kinds["*"]
    raise ConfigError(f"{key}.kind: {kind!r} is {'no name' if other else 'none of ' + ', '.join(kinds)}")


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
        if root.model.lora.rank is not None:
            raise ConfigError("model.lora.rank: a model is pretrained with all its weights; leave it null")
        for name, phase in root.program.phases.items():
            if len(phase.styles) != 2 or min(phase.styles) < 0 or sum(phase.styles) == 0:
                raise ConfigError(f"program.phases.{name}.styles: needs two whole-number weights, got {phase.styles}")
    if isinstance(root.merge, MergeEvents):
        every = root.merge.every_n_epochs
        if every != "last" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ConfigError(f"merge.every_n_epochs: must be a whole number from 1, or last; got {every!r}")
        _check_merge(root.merge)
        if root.merge.weights is not None:
            raise ConfigError("merge.weights: a round has one tuned model; weights are for itermerge-merge")
        if root.merge.combine in ("stock", "tall", "consensus") and root.merge.over != "rounds":
            raise ConfigError(f"merge.combine={root.merge.combine}: compares updates; use merge.over=rounds")
        if root.merge.over == "rounds" and every != "last" and every < root.sft.epochs:
            raise ConfigError(
                "merge.over=rounds: a round's update is whole after its fit; use merge.every_n_epochs=last"
            )
        _check_policy(root, root.merge)
    _check_sft(root)
    for value in (wanted := root.export.rounds):
        if not _is_round(value) or (isinstance(value, int) and value > root.rounds):
            raise ConfigError(f"export.rounds: takes final, best, and numbers from 0 to {root.rounds}; got {value!r}")
    if len(set(map(str, wanted))) < len(wanted):
        raise ConfigError(f"export.rounds: {', '.join(map(str, wanted))} names one twice")
    targets = root.model.lora.targets
    if targets != "all-linear" and not (
        isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    ):
        raise ConfigError(f"model.lora.targets: must be all-linear or a list of module names, got {targets!r}")
    _check_analysis(root.analysis)
    gpus = root.sweep.gpus
    if gpus not in (None, "all") and not (
        isinstance(gpus, list) and gpus and all(isinstance(g, int) and not isinstance(g, bool) and g >= 0 for g in gpus)
    ):
        raise ConfigError(f"sweep.gpus: must be null, all, or a list of GPU numbers as [0,1]; got {gpus!r}")
    if not root.suite.near and not root.suite.far:
        raise ConfigError("suite.near, suite.far: at least one OOD task is needed")
    _check_trainer(root)
    _check_tasks(root)
    check_metric(root, root.optimized_metric, "optimized_metric")
    if isinstance(root.sampler, SamplerVLLM) and root.trainer.strategy != "single":
        raise ConfigError("sampler=vllm: samples on one device; use trainer=single, or sampler=hf on all of them")
    if isinstance(root.sampler, SamplerVLLM) and root.sft.patience is not None and root.model.lora.rank is not None:
        raise ConfigError("sft.patience: vLLM reads whole weights, not adapters in training; use sampler=hf")


def _check_trainer(root: Root) -> None:
    trainer, n = root.trainer, root.trainer.devices
    if trainer.precision == "16-mixed" and trainer.accelerator == "cpu":
        raise ConfigError("trainer.precision: 16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true")
    if n != "auto" and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ConfigError(f"trainer.devices: must be a whole number from 1, or auto; got {n!r}")
    if trainer.strategy == "single":
        if n != 1:
            raise ConfigError(f"trainer.devices: {n} devices need a strategy; use trainer=ddp or trainer=fsdp")
        return
    if isinstance(root.program, ProgramPretrainLab):
        raise ConfigError("trainer.strategy: the lab's models are pretrained in one process; use trainer=single")
    if n == 1:
        return  # then all of them are one process
    if n != "auto":
        check_shares(root, n)
    elif root.sweep.gpus is not None:
        raise ConfigError("trainer.devices: sweep.gpus gives jobs GPUs of their own; say how many, trainer.devices=2")
    if trainer.strategy == "fsdp":
        _check_fsdp(root)


def check_shares(root: Root, n: int) -> None:
    """Raises ConfigError where a step has fewer examples than there are devices, or where jobs of a sweep have fewer
    GPUs."""
    if root.sft.batch_size < n:
        raise ConfigError(
            f"sft.batch_size: {root.sft.batch_size} examples a step cannot be shared out to trainer.devices={n}; "
            f"use sft.batch_size={n} or more (trainer.accumulate_grad_batches lower)"
        )
    if isinstance(root.sweep.gpus, list) and len(root.sweep.gpus) < n:
        raise ConfigError(
            f"trainer.devices: {n} for each job, and sweep.gpus has {len(root.sweep.gpus)}; give more, or fewer devices"
        )


def _check_fsdp(root: Root) -> None:
    """What needs whole weights inside of a fit."""
    merge, sft = root.merge, root.sft
    every = merge.every_n_epochs if isinstance(merge, MergeEvents) and not is_vanilla(merge) else "last"
    why = "trainer.strategy=fsdp spreads each weight over the devices, and"
    if every != "last" and every < sft.epochs:
        raise ConfigError(
            f"merge.every_n_epochs: {why} merge events inside a fit need whole ones; use "
            "merge.every_n_epochs=last, or trainer=ddp"
        )
    if root.model.lora.rank is not None:
        raise ConfigError(f"model.lora.rank: {why} adapters are folded into whole ones; use trainer=ddp, or rank null")
    for key in ("l2_to_base", "kl_to_base", "patience"):
        if getattr(sft, key):
            raise ConfigError(f"sft.{key}: {why} this needs whole ones; use trainer=ddp")
    if root.trainer.precision == "16-mixed":
        raise ConfigError("trainer.precision: 16-mixed does not go with trainer.strategy=fsdp; use bf16-mixed")


def _check_tasks(root: Root | Evaluate) -> None:
    if isinstance(root.sampler, SamplerVLLM) and root.sampler.temperature < COLDEST:
        raise ConfigError(f"sampler.temperature: vLLM has none below {COLDEST}, got {root.sampler.temperature:g}")
    if root.suite.n_validation and all(isinstance(t, TaskHarness) for t in (*root.suite.near, *root.suite.far)):
        raise ConfigError(
            "suite.n_validation: is of OOD tasks, and there are none that have such items (those of lm_eval do not)"
        )
    alone = isinstance(root, Evaluate) and is_test_only(root.task)
    if alone and root.suite.pass_k_n:
        raise ConfigError(
            "suite.pass_k_n: is of validation problems, and task.splits.validation names no split of "
            f"{root.task.path}; use suite.pass_k_n=0, or give one"
        )
    if not alone and root.suite.pass_k_n > root.task.n_validation:
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
        if isinstance(task, TaskHub):
            parts = ("test",) if key != "task" else SPLITS if isinstance(root, Root) else SPLITS[1:]
            _check_hub(key, task, [part for part in parts if not (alone and part == "validation")])
    labels = [label(t) for t in (root.task, *root.suite.near, *root.suite.far)]
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise ConfigError(f"task, suite.near, suite.far: {', '.join(twice)} stands there more than once")


def _check_sft(root: Root) -> None:
    sft = root.sft
    if (sft.replay is None) != (sft.replay_share == 0):
        raise ConfigError("sft.replay, sft.replay_share: go together, as sft.replay=FILE sft.replay_share=0.25")
    if sft.replay == "lab" and not isinstance(root.model, ModelLab):
        raise ConfigError("sft.replay=lab: is of the lab's families; for another model give a JSON-lines file")
    if sft.l2_to_base and root.model.lora.rank is not None:
        raise ConfigError("sft.l2_to_base: is of all weights, which adapters leave as they are; use sft.kl_to_base")
    every = root.merge.every_n_epochs if isinstance(root.merge, MergeEvents) and not is_vanilla(root.merge) else "last"
    if sft.patience is not None and every != "last" and every < sft.epochs:
        raise ConfigError("sft.patience: an epoch that is kept may be any; use merge.every_n_epochs=last")
    if root.task.labels == "majority" and root.sampler.n < 2:
        raise ConfigError("task.labels=majority: needs votes; use sampler.n=8")
    if root.task.labels == "majority" and root.sampler.hints:
        raise ConfigError("sampler.hints: give gold answers away, task.labels=majority does without; leave one out")
    if root.task.labels == "majority" and getattr(getattr(root.merge, "policy", None), "importance", None):
        raise ConfigError("merge.policy.importance: is measured by gold answers, task.labels=majority does without")
    if root.sampler.hints and isinstance(root.teacher, TeacherFile):
        raise ConfigError("sampler.hints: nothing is sampled with teacher=file; leave it 0")
    if "\n" in root.label:
        raise ConfigError("label: must be one line")


def is_test_only(task: Any) -> bool:
    """Whether a task has no validation items."""
    return isinstance(task, TaskHub) and task.splits.validation is None


def _check_hub(key: str, task: TaskHub, parts: Sequence[str]) -> None:
    """`parts` are those of task.splits that are needed."""
    for part in parts:
        if getattr(task.splits, part) is None:
            raise ConfigError(
                f"{key}.splits.{part}: names no split of {task.path}; give one that is there: parts with the same "
                "split share it, cut by a hash of the question"
            )
    if len(task.shares) != 3 or min(task.shares) < 1:
        raise ConfigError(
            f"{key}.shares: needs three whole numbers from 1 (train, validation, test), got {task.shares}"
        )
    if not isinstance(task.name, (str, type(None))) and not (
        isinstance(task.name, list) and task.name and all(isinstance(n, str) for n in task.name)
    ):
        raise ConfigError(f"{key}.name: expected a config of {task.path} or a list of them, got {task.name!r}")
    if task.choices is not None and task.verifier != "choice":
        raise ConfigError(f"{key}.choices: are for verifier=choice, and {key}.verifier is {task.verifier}")
    eval_shots = task.shots if task.eval_shots is None else task.eval_shots
    for name, template, shots in (
        ("prompt", task.prompt, task.shots), ("train_prompt", task.train_prompt or task.prompt, task.train_shots),
        ("eval_prompt", task.eval_prompt or task.prompt, eval_shots),
    ):  # fmt: skip
        if why := prompts.problem_of(template, shots, task.instruction):
            raise ConfigError(f"{key}.{name}: {why}")


def _check_merge(merge: Merge) -> None:
    """Which parameters a rule has follows from its two parts: null where it has none."""
    own = {*SPARSIFY[merge.sparsify], *COMBINE[merge.combine]}
    parts = f"sparsify={merge.sparsify}, combine={merge.combine}"
    for name in sorted({n for parts in (*SPARSIFY.values(), *COMBINE.values()) for n in parts}):
        value = getattr(merge, name)
        if name in own and value is None:
            raise ConfigError(f"merge.{name}: a value is needed by merge={merge.kind} ({parts})")
        if name not in own and value is not None:
            raise ConfigError(f"merge.{name}: merge={merge.kind} ({parts}) has no such parameter; leave it null")
    if merge.combine != "function" and merge.params:
        raise ConfigError(f"merge.params: are those of merge.function, which merge={merge.kind} does not have")
    if merge.weights is not None and merge.combine not in WEIGHTED:
        raise ConfigError(f"merge.weights: merge={merge.kind} (combine={merge.combine}) takes none; leave it null")
    if merge.weights is not None and merge.combine != "sum" and not all(w > 0 for w in merge.weights):
        raise ConfigError(f"merge.weights: must be above 0 for a mean, got {merge.weights}")
    if merge.combine == "slerp" and (merge.sparsify != "none" or merge.over == "rounds"):
        raise ConfigError("merge.combine=slerp: goes with sparsify=none and over=tuned; the arc is between two models")
    if merge.combine == "stock" and merge.sparsify != "none":
        raise ConfigError("merge.combine=stock: takes its angle from whole updates; use sparsify=none")
    density = merge.density or 0.0
    if merge.epsilon is not None and not (density - merge.epsilon > 0 and density + merge.epsilon <= 1):
        raise ConfigError(
            f"merge.epsilon: density - epsilon must be above 0 and density + epsilon at most 1; got {density:g} "
            f"and epsilon {merge.epsilon:g}"
        )
    if merge.gamma is not None and density + merge.gamma > 1:
        raise ConfigError(f"merge.gamma: density + gamma must be at most 1, got {density:g} + {merge.gamma:g}")


def _check_policy(root: Root, merge: MergeEvents) -> None:
    policy, at = merge.policy, "merge.policy"
    check_factors(policy)
    if policy.importance is not None and policy.importance not in root.analysis.importance:
        known = ", ".join(root.analysis.importance) or "nothing"
        raise ConfigError(
            f"{at}.importance: {policy.importance!r} is not measured; analysis.importance has {known} "
            f"(estimators: {', '.join(ESTIMATORS)})"
        )
    if policy.importance is None and policy.strength:
        raise ConfigError(f"{at}.strength: needs {at}.importance, as skip")
    if policy.span is not None and len(policy.rounds) < 2:
        raise ConfigError(f"{at}.span: spreads {at}.rounds, which has one factor; give it two, as [1.0, 0.5]")
    if not policy.search and (policy.tolerance or policy.metric != "val/id/acc"):
        raise ConfigError(f"{at}.tolerance, {at}.metric: are of the line search; give {at}.search=[0.5, 1.0]")
    inner = merge.every_n_epochs != "last" and merge.every_n_epochs < root.sft.epochs
    for name in ("angle", "search"):
        if getattr(policy, name) and inner:
            raise ConfigError(f"{at}.{name}: decides after the fit; use merge.every_n_epochs=last")
    if policy.metric == "val/mean/acc" and policy.search and not root.suite.n_validation:
        raise ConfigError(f"{at}.metric: {policy.metric} needs OOD validation items, suite.n_validation=50")
    largest = max(policy.rounds) * max(policy.epochs) * max(policy.search, default=1) * (1 + abs(policy.strength))
    if merge.ratio * largest > 1 + 1e-9:
        raise ConfigError(
            f"{at}: merge.ratio times its factors must stay at most 1, and may be {merge.ratio:g} x {largest:g} "
            "(rounds, epochs, search, 1 + |strength|)"
        )


def check_factors(policy: RatioPolicy) -> None:
    """Raises ConfigError for lists of factors that are none."""
    for name in ("rounds", "epochs", "layers"):
        values = getattr(policy, name)
        if not values or min(values) < 0:
            raise ConfigError(f"merge.policy.{name}: expected a list of factors from 0, as [1.0, 0.5]; got {values}")
    if policy.search and min(policy.search) < 0:
        raise ConfigError(f"merge.policy.search: expected factors from 0, got {policy.search}")
    for i, item in enumerate(policy.modules):
        if not isinstance(item, dict) or set(item) != {"match", "factor"} or not isinstance(item["match"], str):
            raise ConfigError(f"merge.policy.modules[{i}]: expected {{match: PATTERN, factor: NUMBER}}, got {item!r}")
        if isinstance(item["factor"], bool) or not isinstance(item["factor"], int | float) or item["factor"] < 0:
            raise ConfigError(f"merge.policy.modules[{i}].factor: must be a number from 0, got {item['factor']!r}")
        try:
            re.compile(item["match"])
        except re.error as error:
            raise ConfigError(f"merge.policy.modules[{i}].match: {item['match']!r} is no pattern: {error}") from error


def is_vanilla(merge: Any) -> bool:
    """Whether the merged model is always the tuned one: merge=none, or linear (or SLERP) at ratio 1 without a
    policy."""
    if isinstance(merge, MergeNone):
        return True
    p, exact = merge.policy, merge.combine in ("mean", "slerp") and merge.sparsify == "none" and merge.over == "tuned"
    factors = [*p.rounds, *p.epochs, *p.layers, *(m["factor"] for m in p.modules), *p.search]
    return exact and merge.ratio == 1 and set(factors) <= {1} and not p.strength and not p.angle


def check_metric(root: Root, metric: str, key: str) -> None:
    """Raises ConfigError, naming `key`, when a run of this config has no such final figure."""
    sides = [side for side in ("near", "far") if getattr(root.suite, side)]
    ood = [label(t) for t in (*root.suite.near, *root.suite.far)]
    known = {"val/id/acc", "id/acc", f"id/{label(root.task)}/acc", "ood/acc", *(f"ood/{name}/acc" for name in ood)}
    known |= {f"ood/{side}/acc" for side in sides}
    asked = [side for side in sides if any(not isinstance(t, TaskHarness) for t in getattr(root.suite, side))]
    validation = {"val/ood/acc", *(f"val/ood/{side}/acc" for side in asked)} if asked else set()
    if metric in validation and not root.suite.n_validation:
        raise ConfigError(f"{key}: {metric} needs validation items of the OOD tasks; set suite.n_validation, as to 50")
    if metric not in known | validation:
        raise ConfigError(f"{key}: {metric!r} is none of {', '.join(sorted(known | validation))}")


def label(task: Any) -> str:
    """The task's name in metrics."""
    if isinstance(task, TaskGym):
        return task.label or task.dataset
    if isinstance(task, TaskHub):
        return task.label or Path(task.path).name.split(".")[0].lower()
    if isinstance(task, TaskHarness):
        return task.label or task.task
    return task.family


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]

"""The verbs of a round, each bound to the store: what goes into its key, and what it writes.

A `Bench` holds what the stages of one run share: config, tasks, problems, base model, store and the loaded policy. No
stage knows which task is in-domain; roles are told to `evaluation.metrics` alone, by `Exams.figures`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from . import evaluation, merging, vllm
from .analysis import change, diversity
from .analysis.change import AnalysisError
from .analysis.importance import importance
from .analysis.mismatch import interval_of_means, mismatch
from .config import (
    ConfigError,
    MergeEvents,
    MergeNone,
    ModelHF,
    ModelLab,
    Paths,
    Root,
    SamplerVLLM,
    Suite,
    TaskHarness,
    TaskHub,
    TaskLab,
    TeacherFile,
    TeacherHF,
    TeacherLab,
    check_shares,
    is_test_only,
    is_vanilla,
    label,
)
from .decoding import Decode, complete
from .devices import Events, Group, Job
from .evaluation import Exam
from .harness import HarnessExam, harness_scores
from .policy import Policy, check_folder, copy_in, eos_ids_of
from .rules import method_of, source_of
from .sft import Example, FitSpec, Fitted, LoraSpec, SftError, fit, short_enough
from .store import DROPPED, KEPT, MANIFEST, Artifact, Store, cpu_flags, file_digest, place
from .tasks import Problem, Task, TaskError, check_disjoint, check_gold, derive_seed, verify_all
from .tasks.contamination import Evaluated
from .tracking import progress
from .upkeep import keep_of
from .weights import (
    WEIGHTS_FILE,
    Checkpoint,
    PolicyError,
    Weights,
    digest_weights,
    mean_of,
    place_of,
    read_weights,
    resolve,
    save_tensors,
    write_folder,
)

T = TypeVar("T")
Ratio = float | Mapping[str, float]
log = logging.getLogger(__name__)
SAMPLING = (
    "policy.py",
    "weights.py",
    "decoding.py",
    "attention.py",
    "evaluation.py",
    "tasks/__init__.py",
    "tasks/prompts.py",
)
SAMPLING_VLLM = ("vllm.py", "vllm_worker.py")
PROBING = ("stages.py", "sft.py", "analysis/diversity.py")
IMPORTANCE = (
    "stages.py", "policy.py", "weights.py", "sft.py", "analysis/importance.py", "analysis/change.py",
    "analysis/mismatch.py", "tasks/prompts.py",
)  # fmt: skip
MERGING = ("weights.py", "merging/law.py")
FITTING = (
    *MERGING, "merging/callback.py", "policy.py", "sft.py", "packing.py", "tasks/__init__.py", "tasks/prompts.py",
)  # fmt: skip
LAB = Path(__file__).parent / "lab"  # the base models in the package, seed0 and on
LAB_SEED0 = LAB / "seed0"
NOT_THE_MODEL = (MANIFEST, DROPPED, KEPT, "timing.json")  # beside a model's files in its artifact
KEPT_NUMBERS = 1 << 26  # of the base's log-probabilities, which wait on the CPU for `kl/ood`: 256 MiB
VALIDATION_SEED = "validation"  # validation problems are the same in every run of a suite.seed


@dataclass(frozen=True)
class Model:
    """Weights in a folder; `digest` is of their content and of the tokenizer, not of the files that hold them.

    `restore` computes weights again that were dropped (`store.keep`); the base has none.
    """

    folder: Path
    digest: str
    restore: Callable[[], Artifact] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Merged:
    """theta_hat_t, and the ratio of each tensor in its last merge event, or of all."""

    model: Model
    ratio: Ratio = 1.0
    search: Artifact | None = None  # what was tried on validation items


@dataclass(frozen=True)
class Round:
    """What a round's fit and merges are told: its number, what it starts from and merges towards, and, for policies and
    for rules over rounds, the rounds before."""

    number: int
    start: Model
    anchor: Anchor
    past: Sequence[tuple[Model, Model]] = ()  # (tuned, start) of the rounds before
    importance: Mapping[str, float] = field(default_factory=dict)  # of the base's layers
    earlier: Model | None = None  # the update of the round before


class EmptyRound(RuntimeError):
    """No solution of a round was correct; there is nothing to learn from."""


def lab_folder(seed: int, models: str) -> Path:
    """The lab's base model of one pretraining seed. Raises TaskError when it has not been made."""
    folder = LAB / f"seed{seed}"
    if not folder.is_dir():
        folder = Path(models).expanduser() / f"lab-seed{seed}"
    if not (folder / "model.safetensors").is_file():
        raise TaskError(
            f"model.seed: {folder} is not there; make it with: itermerge experiment=pretrain_lab model.seed={seed}"
        )
    return folder


def folder_of(model: ModelLab | ModelHF, paths: Paths) -> Path:
    """The folder of a config's model, from the hub where it is there. Raises TaskError or PolicyError."""
    if isinstance(model, ModelLab):
        return lab_folder(model.seed, paths.models)
    return resolve(model.path, model.revision)


def build_task(spec: Any) -> Task:
    """The task of a config node. Raises TaskError when it cannot be had."""
    if isinstance(spec, TaskLab):
        from .tasks.lab import LabTask

        return LabTask(spec.family)
    if isinstance(spec, TaskHub):
        from .tasks.hub import HubTask

        return HubTask(
            spec.path, spec.question, spec.answer, spec.verifier, label(spec), subset=spec.name, revision=spec.revision,
            splits=dataclasses.asdict(spec.splits), shares=spec.shares, choices=spec.choices, solution=spec.solution,
            where=spec.where, prompt=spec.prompt, train_prompt=spec.train_prompt, eval_prompt=spec.eval_prompt,
            instruction=spec.instruction, shots=spec.shots, train_shots=spec.train_shots, eval_shots=spec.eval_shots,
            shots_file=spec.shots_file, own_stop=spec.stop,
        )  # fmt: skip
    from .tasks.gym import GymTask

    return GymTask(
        dataset=spec.dataset, label=label(spec), options=spec.options, shots=spec.shots, train_shots=spec.train_shots
    )


_TASK_KEYS = {
    "lab": ("kind", "family"),
    "gym": ("kind", "dataset", "options", "shots", "train_shots"),
    "hub": ("kind", "verifier", "prompt", "eval_prompt", "stop"),  # of the data, its problems enter the keys
}
JUDGES = ("math-verify", "latex2sympy2_extended", "sympy")  # whose versions decide what LaTeX is equal
TASK_FILES = {
    "lab": ("tasks/lab.py",),
    "gym": ("tasks/gym.py",),
    "hub": ("tasks/hub.py", "tasks/verifiers.py", "tasks/latex.py", "tasks/latex_worker.py"),
}


def task_key(spec: Any) -> dict[str, Any]:
    """What of a task decides its problems, prompts and verdicts."""
    judges = JUDGES if getattr(spec, "verifier", None) == "math" else ()
    return {name: getattr(spec, name) for name in _TASK_KEYS[spec.kind]} | {p: version(p) for p in judges}


def device_of(accelerator: str) -> str:
    if accelerator == "cpu" or not torch.cuda.is_available():
        if accelerator == "gpu":
            raise ConfigError("trainer.accelerator: gpu was asked for, and torch finds none; use auto or cpu")
        return "cpu"
    return "cuda"


def devices_of(cfg: Root, device: str, there: int | None = None) -> int:
    """How many devices a run has: processes that sample and fit. `there` are the GPUs, where that is known and no more
    than these may be asked for. Raises ConfigError."""
    if cfg.trainer.strategy == "single":
        return 1
    n = cfg.trainer.devices
    if n == "auto":
        n = torch.cuda.device_count() if device == "cuda" else 2
        check_shares(cfg, n)
    if there is not None and n > there:
        raise ConfigError(f"trainer.devices: {n} were asked for, and torch finds {there} GPUs; use fewer, or auto")
    return int(n)


def fast_at_bfloat16(device: str) -> bool:
    """Whether a GPU or an x86 CPU has instructions for it: what `auto` in sampler.dtype and trainer.precision means."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(cpu_flags().values())


def sampling_dtype(asked: str, device: str) -> str:
    """sampler.dtype, `auto` resolved."""
    return asked if asked != "auto" else "bfloat16" if fast_at_bfloat16(device) else "float32"


def engine_spec(sampler: SamplerVLLM, device: str, threads: int) -> vllm.EngineSpec:
    return vllm.EngineSpec(
        python=sampler.python, device=device, dtype=sampling_dtype(sampler.dtype, device), threads=threads,
        batch_size=sampler.batch_size, gpu_memory_utilization=sampler.gpu_memory_utilization, between=sampler.between,
        enforce_eager=sampler.enforce_eager, batch_invariant=sampler.batch_invariant, timeout=sampler.timeout,
    )  # fmt: skip


def harness_exam(spec: TaskHarness, suite: Suite) -> HarnessExam:
    """The items of a task of lm_eval. Raises TaskError, and NoData where its data are not here."""
    return HarnessExam(
        label(spec),
        spec.task,
        spec.metric,
        n=suite.n,
        seed=suite.seed,
        num_fewshot=spec.num_fewshot,
        include_path=spec.include_path,
    )


class Exams:
    """The items that a task and a suite are evaluated on, and a model's scores on them. Raises TaskError where a task
    or its items cannot be used.

    `all` are those of our own tasks: test items of the ID task and of the OOD tasks, then validation items; `harness`
    are OOD tasks of lm-evaluation-harness, which have test items alone.
    """

    def __init__(
        self, spec: Any, suite: Suite, build: Callable[[Any], Task] = build_task,
        harness: Callable[[TaskHarness, Suite], HarnessExam] = harness_exam,
    ) -> None:  # fmt: skip
        away = (*suite.near, *suite.far)
        self.task, self.max_new_tokens = build(spec), suite.max_new_tokens
        self.near, self.far = [label(s) for s in suite.near], [label(s) for s in suite.far]
        self.ours = [s for s in away if not isinstance(s, TaskHarness)]
        self.harness = [harness(s, suite) for s in away if isinstance(s, TaskHarness)]
        if self.harness:
            log.warning(
                "OOD accuracy alone is measured on %s: lm_eval's tasks have no validation items and no solutions to "
                "compare predictions on, and are not searched for training prompts",
                ", ".join(e.label for e in self.harness),
            )
        self.test = [Exam(label(s), t := build(s), t.problems("test", suite.n, suite.seed)) for s in self.ours]
        of = (suite.n_validation, suite.seed, VALIDATION_SEED)
        self.choosing = [
            Exam(f"val/{e.label}", e.task, e.task.problems("validation", *of)) for e in self.test if suite.n_validation
        ]
        self.own = self.task.problems("test", suite.n, suite.seed)
        self.validation: list[Problem] = []
        if not is_test_only(spec):  # a test-only task can be evaluated on, and nothing else
            self.validation = self.task.problems("validation", spec.n_validation, suite.seed, VALIDATION_SEED)
        own = [Exam(f"val/{self.task.name}", self.task, self.validation)] if self.validation else []
        self.all = [Exam(self.task.name, self.task, self.own), *self.test, *own, *self.choosing]
        for exam in self.all:
            check_gold(exam.task, exam.problems)
        check_disjoint(self.task.name, {"validation": self.validation, "test": self.own})

    @property
    def count(self) -> int:
        """Items in all."""
        return sum(len(e.problems) for e in self.all) + sum(len(e.items) for e in self.harness)

    def check_lengths(self, policy: Policy, new: int) -> None:
        """Raises TaskError, naming the task, when its prompts leave no room for an answer, and for a sample of `new`
        tokens."""
        new = max(new, self.max_new_tokens or 0)
        for exam in self.all:
            check_room(policy, exam.label, (p.asked for p in exam.problems), new)
        for exam in self.harness:
            exam.check_lengths(policy)

    def scores(
        self, decode: Decode, on_progress: Callable[[int], None], *, max_new_tokens: int, batch_size: int
    ) -> dict[str, Any]:
        """What scores.json holds of our own tasks; answers of `max_new_tokens` where suite.max_new_tokens does not say
        otherwise."""
        max_new_tokens = self.max_new_tokens or max_new_tokens
        how = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "on_progress": on_progress}
        return evaluation.greedy_scores(decode, self.all, **how)

    def harness_scores(self, policy: Policy, on_progress: Callable[[int], None], *, batch_size: int) -> dict[str, Any]:
        """What it holds of lm_eval's."""
        return harness_scores(policy, self.harness, batch_size=batch_size, on_progress=on_progress)

    def figures(self, scores: Mapping[str, Any]) -> dict[str, float]:
        """The flat metrics of a scores.json; here, and only here, tasks get their roles."""
        return evaluation.metrics(scores, self.task.name, self.near, self.far)


def check_room(policy: Policy, name: str, prompts: Iterable[str], new: int, of: str = "prompt") -> None:
    """Raises TaskError, naming the task, when its longest prompt and `new` tokens are more than the model's context."""
    longest = max((len(policy.encode_prompt(text)) for text in set(prompts)), default=0)
    if longest + new > policy.context:
        raise TaskError(
            f"task {name!r}: its longest {of} has {longest} tokens and sampler.max_new_tokens (or "
            f"suite.max_new_tokens) is {new}, together more than the model's context of {policy.context}; "
            "lower the task's shots, or these"
        )


class Reader(Policy):
    """A model's tokenizer, chat template and context, on the meta device: no weights are read."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **how), **how)
        if (folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self.eos_ids = eos_ids_of(folder, self.tokenizer, self.model.generation_config)
        self.pad_id = self.eos_ids[0]


class Bench:
    """One run's tasks, problems, base and policy, and the stages over them."""

    def __init__(self, cfg: Root, store: Store, scratch: Path) -> None:
        self.cfg, self.store, self.scratch = cfg, store, scratch
        self.device = device_of(cfg.trainer.accelerator)
        self.devices = self._count_devices()
        self.group = None
        if self.devices > 1:
            self.group = Group(self.devices, self.device, threads=cfg.threads, scratch=scratch)
        if cfg.model.lora.rank is not None and not find_spec("peft"):
            raise ConfigError("model.lora.rank: adapters need the extra 'lora': pip install 'itermerge[lora]'")
        self.method = merging.LINEAR if isinstance(cfg.merge, MergeNone) else method_of(cfg.merge)
        self.dtype, self.precision = sampling_dtype(cfg.sampler.dtype, self.device), cfg.trainer.precision
        self.engine: vllm.Engine | None = None
        self.engine_key: dict[str, Any] = {}
        if isinstance(cfg.sampler, SamplerVLLM):
            spec = engine_spec(cfg.sampler, self.device, cfg.threads)
            own = {"enforce_eager": spec.enforce_eager, "batch_invariant": spec.batch_invariant}
            self.engine_key = {"sampler": self._versions(cfg.sampler) | own}
            self.engine = vllm.Engine(spec, scratch)
            log.info("sampler=vllm: diversity/token_entropy is left out; vLLM tells no whole distributions")
        if self.precision == "auto":
            self.precision = "bf16-mixed" if fast_at_bfloat16(self.device) else "32-true"
        of = self.of = Exams(cfg.task, cfg.suite, self._build, self._build_harness)
        self.task, self.exams, self.validation, self.near, self.far = of.task, of.all, of.validation, of.near, of.far
        kinds = sorted({s.kind for s in (cfg.task, *of.ours)})
        shared = ("devices.py",) if self.group else ()
        self.sampling = (*SAMPLING, *shared, *(file for kind in kinds for file in TASK_FILES[kind]))
        self.sampling += SAMPLING_VLLM if self.engine else ()
        self.fitting = (*FITTING, *shared)
        self.evaluated = Evaluated((p.text for e in self.exams for p in e.problems), cfg.task.decontaminate or 1)
        self.decontaminated: dict[str, int] = {}  # training problems left out as exact and ngram, of how many drawn
        self._practised: dict[tuple[object, ...], list[Problem]] = {}
        first = self.train_problems(1)
        check_gold(self.task, first)
        check_disjoint(self.task.name, {"train": first, "validation": self.validation, "test": of.own})
        for exam in (*of.test, *of.choosing):
            if exam.task.name != self.task.name:
                check_disjoint(f"{self.task.name} and {exam.label}", {"train": first, "items": exam.problems})
        self.replay, self.written = self._read_files()
        self.policy, self.base, self.base_weights = self._open()
        if cfg.trainer.gradient_checkpointing and not self.policy.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"trainer.gradient_checkpointing: {type(self.policy.model).__name__} has none; lower sft.batch_size "
                "and raise trainer.accumulate_grad_batches instead"
            )
        self.loaded = self.base.digest  # what is in the policy; "" for weights in between
        self.size = 4 * sum(w.numel() for w in self.base_weights.values())  # bytes, float32
        self.keep = store.keep = keep_of(cfg, self.size)
        self.replay = self._fit_for_replay(self.replay)
        self.teacher = self._find_teacher()
        self._check_ratios()
        self._base_logs: list[list[torch.Tensor]] | None = None
        self._check_lengths()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        if self.group:
            self.group.close()
        if self.engine:
            self.engine.close()

    def _count_devices(self) -> int:
        return devices_of(self.cfg, self.device, torch.cuda.device_count() if self.device == "cuda" else None)

    def _read_files(self) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
        """The examples of sft.replay, and the solutions of teacher=file by problem id and by question."""
        replay, written, pairs = self.cfg.sft.replay, {}, []
        if replay not in (None, "lab"):
            pairs = [(row["text"], row["completion"]) for row in read_texts(replay, "sft.replay", ("prompt",))]
        if isinstance(self.cfg.teacher, TeacherFile):
            for row in read_texts(self.cfg.teacher.path, "teacher.path", ("id", "question")):
                written.setdefault(_one_line(row["text"]), []).append(row["completion"])
        return pairs, written

    def _fit_for_replay(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of a replay file that may be learnt: not too long, and not among evaluated problems
        (task.decontaminate). Raises TaskError where none is left."""
        most = min(self.cfg.sft.max_length, self.policy.context)
        sizes = [len(e.prompt) + len(e.completion) for e in self._examples(pairs)]
        short = [pair for pair, size in zip(pairs, sizes, strict=True) if size <= most]
        clean = [p for p in short if self.cfg.task.decontaminate is None or self.evaluated.has(p[0]) is None]
        if len(clean) < len(pairs):
            said = (
                f"sft.replay: of {len(pairs)} examples of {self.cfg.sft.replay}, {len(pairs) - len(short)} have more "
                f"than {most} tokens (sft.max_length, context), {len(short) - len(clean)} stand in evaluated problems"
            )
            if not clean:
                raise TaskError(f"{said}; none is left")
            log.warning("%s; they are left out", said)
        return clean

    def _find_teacher(self) -> Model | None:
        """The model that solves the problems in place of the one that practises. Raises TaskError or PolicyError."""
        teacher = self.cfg.teacher
        if isinstance(teacher, TeacherLab):
            folder = lab_folder(teacher.seed, self.cfg.paths.models)
        elif isinstance(teacher, TeacherHF):
            folder = resolve(teacher.path, teacher.revision)
        else:
            return None
        check_folder(folder)
        return Model(folder, _digest_json([digest_weights(Checkpoint(folder)), _extras_digest(folder)]))

    def _build(self, spec: Any) -> Task:
        return build_task(spec)

    def _build_harness(self, spec: TaskHarness, suite: Suite) -> HarnessExam:
        return harness_exam(spec, suite)

    def _versions(self, sampler: SamplerVLLM) -> dict[str, str]:
        """Of vLLM and its torch. Raises EngineError where there is no vLLM."""
        return vllm.about(sampler.python)

    def _open(self) -> tuple[Policy, Model, Weights]:
        """The base model as a policy on the device, what the stages call it, and its weights on the CPU."""
        model = self.cfg.model
        folder = folder_of(model, self.cfg.paths)
        policy = Policy(folder, trust_remote_code=self._trusts(), device=self.device)
        self.extras = _extras_digest(folder)
        base = Model(folder, self._digest(policy.weights()))
        return policy, base, {k: v.to("cpu").clone() for k, v in policy.weights().items()}

    def _check_ratios(self) -> None:
        """Raises MergeError where a ratio of some round would be above 1, or a pattern fits no tensor."""
        if isinstance(self.cfg.merge, MergeNone):
            return
        policy = self.cfg.merge.policy
        most = self.cfg.merge.ratio * max(policy.rounds) * max(policy.epochs) * max(policy.search, default=1.0)
        places = map(place_of, self.base_weights)
        self._tensor_ratios(most, {row: 1 + abs(policy.strength) for row, _ in places if row.startswith("layer_")})

    def _tensor_ratios(self, ratio: float, rows: Mapping[str, float]) -> dict[str, float]:
        policy = self._merge_config().policy
        modules = [(m["match"], m["factor"]) for m in policy.modules]
        return merging.tensor_ratios(self.base_weights, ratio, layers=policy.layers, modules=modules, rows=rows)

    def _teacher_reader(self, teacher: Model) -> Policy:
        """What reads the prompts in the teacher's place, before it is loaded. Raises PolicyError."""
        return Reader(teacher.folder, trust_remote_code=self._trusts(teacher))

    def _check_lengths(self) -> None:
        """Raises TaskError, naming the task, when prompts of any round leave no room for an answer, PolicyError when
        the teacher cannot read them; warns when a solution may be too long to learn from."""
        cfg, name, new = self.cfg, self.task.name, self.cfg.sampler.max_new_tokens
        self.of.check_lengths(self.policy, new)
        if cfg.analysis.importance and cfg.analysis.ood:
            for exam in self.of.test:
                check_room(self.policy, exam.label, (p.prompt for p in exam.problems[: cfg.analysis.examples]), new)
        rounds = [self.train_problems(t) for t in range(1, 2 if cfg.task.problems == "fixed" else cfg.rounds + 1)]
        for problems in rounds if cfg.analysis.train_n else ():
            asked = (p.asked for p in problems[: cfg.analysis.train_n])
            check_room(self.policy, f"train/{name}", asked, self._answer()["max_new_tokens"])
        if not isinstance(cfg.teacher, TeacherFile):
            try:
                reader = self._teacher_reader(self.teacher) if self.teacher else self.policy
                for problems in rounds:
                    check_room(reader, f"train/{name}", (p.prompt for p in problems), new)
                    if cfg.sampler.hints:
                        hints = (p.hint_prompt for p in problems)
                        check_room(reader, f"train/{name}", hints, new, "prompt with a hint (sampler.hints)")
            except (TaskError, PolicyError) as error:
                if not self.teacher:
                    raise
                said = str(error).replace("model.path: ", "")
                raise type(error)(f"teacher={cfg.teacher.kind}: {said}") from error
        sft, most = cfg.sft, min(cfg.sft.max_length, self.policy.context)
        longest = 0
        for number, problems in enumerate(rounds, 1):
            lengths = [len(self.policy.encode_prompt(p.train_prompt)) for p in problems]
            longest = max(longest, *lengths)
            which, kind = (max(lengths), "longest") if sft.too_long == "stop" else (min(lengths), "shortest")
            if which >= most:
                of = "" if cfg.task.problems == "fixed" else f" of round {number}"
                raise TaskError(
                    f"task {name!r}: its {kind} training prompt{of} has {which} tokens, "
                    f"sft.max_length is {sft.max_length} and the model's context {self.policy.context}; lower "
                    "task.train_shots, raise sft.max_length, or leave such problems' solutions out with "
                    "sft.too_long=drop"
                )
        if sft.too_long == "stop" and not isinstance(cfg.teacher, TeacherFile) and longest + new + 1 > most:
            log.warning(
                "the longest training prompt has %d tokens, sampler.max_new_tokens is %d: with its end such an example "
                "may have %d, and sft.max_length is %d, the model's context %d. One that is longer ends the run after "
                "sampling; leave those out with sft.too_long=drop, or raise sft.max_length",
                longest, new, longest + new + 1, sft.max_length, self.policy.context,
            )  # fmt: skip

    # --- the verbs ---------------------------------------------------------------------------------------------

    def train_problems(self, number: int) -> list[Problem]:
        """The problems of a round: always the same, or fresh ones; none of them in an evaluated one
        (task.decontaminate)."""
        task = self.cfg.task
        which = ("fixed",) if task.problems == "fixed" else ("fresh", number)
        if which not in self._practised:
            self._practised[which] = self._draw_train(which)
        return self._practised[which]

    def _draw_train(self, which: tuple[object, ...]) -> list[Problem]:
        task, clean = self.cfg.task, []
        if task.decontaminate is None:
            return self.task.problems("train", task.n_train, self.cfg.seed, *which)
        counts, ask = {"exact": 0, "ngram": 0}, task.n_train
        seen: list[Problem] = []
        while len(clean) < task.n_train:
            try:
                drawn = self.task.problems("train", ask, self.cfg.seed, *which)
            except TaskError as error:
                left_out = sum(counts.values())
                if not left_out:
                    raise
                raise TaskError(
                    f"{error}. Of the first {len(seen)}, {left_out} share words in a row with evaluated problems and "
                    f"were left out (task.decontaminate={task.decontaminate})"
                ) from error
            for problem in drawn[len(seen) :]:
                why = self.evaluated.has(problem.text)
                if why is None:
                    clean.append(problem)
                else:
                    counts[why] += 1
            seen, ask = drawn, ask + task.n_train - len(clean)
        if any(counts.values()):
            log.info(
                "task %s: of %d training problems %d stand in evaluated ones and %d share %d words in a row with one; "
                "they are left out, others take their place",
                self.task.name, len(seen), counts["exact"], counts["ngram"], task.decontaminate,
            )  # fmt: skip
        for key, count in (counts | {"of": len(seen)}).items():
            self.decontaminated[key] = self.decontaminated.get(key, 0) + count
        return clean

    def solve(self, model: Model, number: int) -> Artifact:
        """samples.jsonl and examples.jsonl of a round (`verify`), of solutions by `model` or by the teacher; with hints
        for the problems that have none, where sampler.hints asks for them."""
        if isinstance(self.cfg.teacher, TeacherFile):
            return self.verify(self.given(number), number)
        model = self.teacher or model
        first = self.sample(model, number, self.train_problems(number))
        samples = self.verify(first, number)
        if not self.cfg.sampler.hints:
            return samples
        solved = {row["id"] for row in read_lines(samples.folder / "examples.jsonl")}
        left = [p for p in self.train_problems(number) if p.id not in solved]
        return self.verify(first, number, self.sample(model, number, left, hints=True)) if left else samples

    def by_base(self, samples: Artifact) -> Artifact:
        """`samples` of the first round; where a teacher has made them, the base's own of the same problems."""
        if self.cfg.teacher.kind == "none":
            return samples
        return self.verify(self.sample(self.base, 1, self.train_problems(1)), 1)

    def given(self, number: int) -> Artifact:
        """completions.jsonl: the first `sampler.n` solutions of each problem in the teacher's file."""
        problems, n = self.train_problems(number), self.cfg.sampler.n
        rows = [
            {"id": p.id, "sample": i, "completion": text, "finished": True, "tokens": 0}
            for p in problems
            for i, text in enumerate((self.written.get(p.id) or self.written.get(_one_line(p.text), ()))[:n])
        ]
        if not rows:
            raise TaskError(
                f"teacher.path: none of the round's {len(problems)} problems is in {self.cfg.teacher.path}; expected "
                f'lines of {{"question": ..., "completion": ...}} with questions as {problems[0].text[:80]!r}'
            )
        inputs = {"given": _digest_json(rows)}
        return self.store.stage("sample", inputs, lambda folder: _write_rows(folder, rows), modules=("stages.py",))

    def sample(self, model: Model, number: int, problems: Sequence[Problem], hints: bool = False) -> Artifact:
        """completions.jsonl: `sampler.n` completions for each problem, or `sampler.hints` with the answer given
        away."""
        cfg, n = self.cfg, self.cfg.sampler.hints if hints else self.cfg.sampler.n
        seed = derive_seed(cfg.seed, number, "hints" if hints else "sample")
        if hints:
            problems = [dataclasses.replace(p, prompt=p.hint_prompt) for p in problems]

        def compute(folder: Path) -> Mapping[str, Any]:
            with (
                progress(f"round {number}: sampling{' with hints' * hints}", len(problems) * n) as tick,
                self._decoder(model) as decode,
            ):
                made = evaluation.sample(
                    decode, self.task, problems, n, seed,
                    temperature=cfg.sampler.temperature, top_p=cfg.sampler.top_p, on_progress=tick, **self._decode(),
                )  # fmt: skip
            rows = [
                {"id": p.id, "sample": i, "completion": c.text, "finished": c.finished, "tokens": c.tokens}
                for p, cs in zip(problems, made, strict=True) for i, c in enumerate(cs)
            ]  # fmt: skip
            return _write_rows(folder, rows)

        how = {**self._decode(), "n": n, "temperature": cfg.sampler.temperature, "top_p": cfg.sampler.top_p}
        inputs = {
            "model": model.digest,
            "task": task_key(cfg.task),
            "problems": _ids(problems),
            "how": how,
            "seed": seed,
        }
        return self.store.stage("sample", inputs | self._dtype(), compute, modules=self.sampling)

    def verify(self, completions: Artifact, number: int, hinted: Artifact | None = None) -> Artifact:
        """samples.jsonl: each completion with its verdict; examples.jsonl: the different ones to learn from, in order:
        the correct ones, or with task.labels=majority those whose answer most samples of their problem gave. Those of
        `hinted` come last and are learnt without the hint; they count in no figure but `hinted`."""
        keep, problems = self.cfg.task.max_solutions, {p.id: p for p in self.train_problems(number)}
        by_vote = self.cfg.task.labels == "majority"

        def compute(folder: Path) -> Mapping[str, Any]:
            samples: list[dict[str, Any]] = []
            for artifact in filter(None, (completions, hinted)):
                rows = list(read_lines(artifact.folder / "completions.jsonl"))
                verdicts = verify_all(self.task, [(problems[r["id"]], r["completion"], r["finished"]) for r in rows])
                for row, verdict in zip(rows, verdicts, strict=True):
                    problem = problems[row["id"]]
                    hint = {"hint": True} if artifact is hinted else {}
                    samples.append(
                        {
                            "id": row["id"], "sample": row["sample"],
                            "prompt": problem.hint_prompt if hint else problem.prompt, "completion": row["completion"],
                            "answer": verdict.answer, "gold": problem.answer, "verdict": verdict.correct,
                            "reason": verdict.reason, "tokens": row["tokens"], **hint,
                        }
                    )  # fmt: skip
            own = [s for s in samples if "hint" not in s]
            answers: dict[str, list[str | None]] = {}
            for s in own if by_vote else ():
                answers.setdefault(s["id"], []).append(s["answer"])
            elected = {i: evaluation.elect(said) for i, said in answers.items()}
            examples: list[dict[str, Any]] = []
            kept: dict[str, list[str]] = {}
            for s in samples:
                right = s["verdict"] if not by_vote else s["answer"] is not None and s["answer"] == elected[s["id"]]
                had = kept.setdefault(s["id"], [])
                if not right or s["completion"] in had or (keep is not None and len(had) >= keep):
                    continue
                had.append(s["completion"])
                example = {"id": s["id"], "prompt": problems[s["id"]].train_prompt, "completion": s["completion"]}
                examples.append(example | ({"hint": True} if "hint" in s else {}))
            write_lines(folder / "samples.jsonl", samples)
            write_lines(folder / "examples.jsonl", examples)
            votes = {i: answer for i, answer in elected.items() if answer is not None}
            true = {(s["id"], s["answer"]) for s in own if s["verdict"]}
            counts: dict[str, tuple[int, int]] = {}
            for s in own:
                n, c = counts.get(s["id"], (0, 0))
                counts[s["id"]] = n + 1, c + s["verdict"]
            return {
                "samples": len(own), "examples": len(examples), "problems": len(problems),
                "reasons": evaluation.count_reasons([s["reason"] for s in own]),
                "solved": sum(c > 0 for _, c in counts.values()),
                "distinct": len({(s["id"], s["completion"]) for s in own}),
                "pass": _passes(list(counts.values())),
                **({"labelled": len(votes), "label_right": len(true & set(votes.items()))} if by_vote else {}),
                **({} if hinted is None else {"hinted": sum("hint" in e for e in examples)}),
            }  # fmt: skip

        inputs = {"completions": completions.digest, "task": task_key(self.cfg.task), "max_solutions": keep}
        inputs |= {"labels": self.cfg.task.labels, "hinted": None if hinted is None else hinted.digest}
        inputs["problems"] = _ids(list(problems.values()))
        return self.store.stage("verify", inputs, compute, modules=(*self.sampling, "stages.py"))

    def fit(self, examples: Sequence[Mapping[str, str]], now: Round) -> tuple[Model, Artifact]:
        """The self-improved model theta_t: fine-tuned from the round's start, with the merge events before the last."""
        cfg, spec = self.cfg, self._fit_spec()
        seed = derive_seed(cfg.seed, now.number, "fit")
        replayed = self._replayed(len(examples), now.number)
        examples = [*({k: e[k] for k in ("prompt", "completion")} for e in examples), *replayed]
        towards = self.base if spec.l2_to_base or spec.kl_to_base else None
        stop_on = Exam(f"val/{self.task.name}", self.task, self.validation) if spec.patience is not None else None
        inner = self._events(now)[:-1]
        ratios = {epoch: self._ratios(now, epoch) for epoch in inner}

        def compute(folder: Path) -> Mapping[str, Any]:
            events: dict[str, Any] | None = None
            if inner:
                events = {"method": self.method, "at": inner, "ratios": ratios, "seed": self._mask_seed(now),
                          "reset_optimizer": self._merge_config().reset_optimizer}  # fmt: skip
            rows = self._examples((e["prompt"], e["completion"]) for e in examples)
            try:
                if cfg.sft.too_long == "drop":
                    rows = short_enough(rows, min(spec.max_length, self.policy.context))
                total = -(-len(rows) // spec.batch_size) * spec.epochs
                with progress(f"round {now.number}: fine-tuning", total) as tick:
                    one = self._fit_on_devices if self.group else self._fit_here
                    fitted, digest = one(folder, rows, spec, now, seed, events, towards, stop_on, tick)
            except SftError as error:
                raise SftError(f"round {now.number}: {error}") from error
            dropped = len(examples) - len(rows)
            return {"digest": digest, "replayed": len(replayed), "dropped": dropped, **dataclasses.asdict(fitted)}

        events = None
        if inner:
            events = {
                "ratio": {str(epoch): _compact(ratio) for epoch, ratio in ratios.items()},
                "reset": self._merge_config().reset_optimizer, **self._merge_key(now),
            }  # fmt: skip
        inputs = {
            "start": now.start.digest, "examples": _digest_json(examples), "spec": _spec_key(spec),
            "events": events, "seed": seed, "base": towards.digest if towards else None,
            "too_long": cfg.sft.too_long,
        }  # fmt: skip
        if stop_on:
            inputs |= {"items": _ids(stop_on.problems), "task": task_key(cfg.task), "how": self._answer()}
            inputs |= self._dtype()
        modules = (*self.fitting, *self.sampling) if stop_on else self.fitting
        stage = partial(self.store.stage, "fit", inputs, compute, modules=modules)
        made = stage()
        return Model(made.folder, made.facts["digest"], partial(stage, whole=True)), made

    def _fit_here(
        self, folder: Path, rows: Sequence[Example], spec: FitSpec, now: Round, seed: int,
        events: Mapping[str, Any] | None, towards: Model | None, stop_on: Exam | None, tick: Callable[[int], None],
    ) -> tuple[Fitted, str]:  # fmt: skip
        """What a fit was like, and the digest of the weights that it leaves in the policy and in the folder."""
        # first: anchors that were dropped are computed again with the same policy
        callbacks = [merging.MergeCallback(now.anchor.weights(), **events)] if events else []
        policy = self._load(now.start)
        self.loaded = ""  # from here on the policy's weights are in between

        def score() -> float:
            assert stop_on is not None
            with self._decoding(policy) as decode:
                return self._accuracy(decode, stop_on)

        fitted = fit(
            policy, rows, spec, seed=seed, callbacks=callbacks, scratch=self.scratch,
            base=self.base_weights if towards else None, on_progress=tick, score=score if stop_on else None,
        )  # fmt: skip
        self._write(folder, policy.weights())
        self.loaded = self._digest(policy.weights())
        return fitted, self.loaded

    def _fit_on_devices(
        self, folder: Path, rows: Sequence[Example], spec: FitSpec, now: Round, seed: int,
        events: Mapping[str, Any] | None, towards: Model | None, stop_on: Exam | None, tick: Callable[[int], None],
    ) -> tuple[Fitted, str]:  # fmt: skip
        """The same by the processes of the group; the policy stays as it is."""
        self._leave_device()
        score = None if stop_on is None else lambda decode: self._accuracy(decode, stop_on)
        anchors = now.anchor.models if events else []

        def run(folders: Sequence[Path]) -> Fitted:
            assert self.group is not None
            start, *anchor = folders
            job = Job(
                start, self._trusts(), rows, spec, seed, folder, self.base.folder,
                base=towards.folder if towards else None, events=Events(anchor, events) if events else None,
                dtype=self.dtype,
            )  # fmt: skip
            return self.group.fit(job, score=score, on_progress=tick)

        fitted = self._with_folders([now.start, *anchors], run)
        return fitted, self._digest(Checkpoint(folder))

    def _replayed(self, n: int, number: int) -> list[dict[str, str]]:
        """Examples of sft.replay, such that they are sft.replay_share of a fit's; as many as the file has."""
        sft, seed = self.cfg.sft, derive_seed(self.cfg.seed, number, "replay")
        wanted = round(n * sft.replay_share / (1 - sft.replay_share))
        if sft.replay == "lab":
            from .tasks.lab import FAMILIES, corpus

            pairs = corpus(wanted, dict.fromkeys(FAMILIES, 1.0), (1, 1), seed)
        else:
            pairs = random.Random(seed).sample(self.replay, min(wanted, len(self.replay)))
            if len(pairs) < wanted:
                log.warning("sft.replay: %d examples were wanted, %s has %d", wanted, sft.replay, len(pairs))
        return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]

    def _accuracy(self, decode: Decode, exam: Exam) -> float:
        scores = evaluation.greedy_scores(decode, [exam], on_progress=lambda _: None, **self._answer())
        return sum(scores[exam.label]["correct"]) / len(exam.problems)

    def merge(self, tuned: Model, now: Round) -> Merged:
        """The merged model theta_hat_t: the round's last merge event. Where that changes nothing it is the tuned
        model."""
        if self._waits(now):
            return Merged(tuned)
        ratio = self._ratios(now, self.cfg.sft.epochs, tuned)
        search = self._search(tuned, now, ratio)
        if search:
            ratio = _times(ratio, search.facts["factor"], ratio)
        if self._does_nothing(ratio):
            return Merged(tuned, 1.0, search)

        def compute(folder: Path) -> Mapping[str, Any]:
            merged = self._last_event(tuned, now, ratio).all()
            self._write(folder, merged)
            return {"digest": self._digest(merged)}

        inputs = {"tuned": tuned.digest, "ratio": _compact(ratio), **self._merge_key(now)}
        stage = partial(self.store.stage, "merge", inputs, compute, modules=MERGING)
        made = stage()
        return Merged(Model(made.folder, made.facts["digest"], partial(stage, whole=True)), ratio, search)

    def _last_event(self, tuned: Model, now: Round, ratio: Ratio) -> merging.Merge:
        past, start = self._updates(now)
        models = [*(t for t, _ in past), self._stream(tuned)]
        starts = None if start is None else [*(s for _, s in past), start]
        seed = self._mask_seed(now) + self.cfg.sft.epochs
        return merging.Merge(self.method, now.anchor.weights(), models, ratio, starts=starts, seed=seed)

    def _search(self, tuned: Model, now: Round, ratio: Ratio) -> Artifact | None:
        """search.json: accuracy on validation items with each of merge.policy.search's factors, with one model in
        memory. Facts: the factor that is taken, the smallest of those within `tolerance` of the best."""
        policy = getattr(self.cfg.merge, "policy", None)
        if policy is None or not policy.search:
            return None
        exams = [e for e in self.exams if e.label.startswith("val/")]
        factors = sorted(set(policy.search))

        def compute(folder: Path) -> Mapping[str, Any]:
            tried = {}
            total = len(factors) * sum(len(e.problems) for e in exams)
            with progress(f"round {now.number}: line search", total) as tick:
                for factor in factors:
                    merge = self._last_event(tuned, now, _times(ratio, factor, self.base_weights))
                    merge.prepare()  # which may compute dropped weights again, with the same policy
                    self.loaded, own = "", self.policy.weights()
                    for name in merge.names:
                        for begin, end, piece in merge.pieces(name):
                            own[name].view(-1)[begin:end].copy_(piece)
                    with self._decoding(self.policy) as decode:
                        scores = evaluation.greedy_scores(decode, exams, on_progress=tick, **self._answer())
                    accuracy = {e.label: sum(scores[e.label]["correct"]) / len(e.problems) for e in exams}
                    own_task = accuracy.pop(f"val/{self.task.name}")
                    away = sum(accuracy.values()) / len(accuracy) if accuracy else None
                    tried[str(factor)] = {"val/id/acc": own_task, "val/ood/acc": away}
            write_json(folder / "search.json", tried)
            values = {f: v["val/id/acc"] for f, v in tried.items()}
            if policy.metric == "val/mean/acc":
                values = {f: (v["val/id/acc"] + v["val/ood/acc"]) / 2 for f, v in tried.items()}
            good = [float(f) for f, v in values.items() if v >= max(values.values()) - policy.tolerance - 1e-12]
            return {"factor": min(good)}

        inputs = {
            "tuned": tuned.digest, "ratio": _compact(ratio), "factors": factors, "metric": policy.metric,
            "tolerance": policy.tolerance, "items": {e.label: _ids(e.problems) for e in exams}, "how": self._answer(),
            "tasks": [task_key(t) for t in (self.cfg.task, *self.of.ours)],
            **self._merge_key(now),
        } | self._dtype()  # fmt: skip
        return self.store.stage("search", inputs, compute, modules=(*self.sampling, *MERGING, "stages.py"))

    def evaluate(self, model: Model, number: int) -> Artifact:
        """scores.json: greedy verdicts on the test items of every task, and on the ID task's validation items."""
        cfg = self.cfg

        def compute(folder: Path) -> Mapping[str, Any]:
            with progress(f"round {number}: evaluating", self.of.count) as tick:
                with self._decoder(model) as decode:
                    scores = self.of.scores(decode, tick, **self._decode())
                if self.of.harness:
                    with self._sampler(model) as policy:
                        scores |= self.of.harness_scores(policy, tick, batch_size=cfg.sampler.batch_size)
            write_json(folder / "scores.json", scores)
            return {}

        tasks = [task_key(cfg.task), *map(task_key, self.of.ours)]
        items = {e.label: _ids(e.problems) for e in self.exams}
        inputs = {"model": model.digest, "tasks": tasks, "items": items, "how": self._answer()} | self._dtype()
        modules = self.sampling
        if self.of.harness:
            inputs["harness"] = {e.label: e.digest for e in self.of.harness}
            modules = (*modules, "harness.py")
        return self.store.stage("evaluate", inputs, compute, modules=modules)

    def held_out_samples(self, model: Model, number: int) -> Artifact:
        """held_out.jsonl: samples with verdicts for each of the first `suite.pass_k_n` validation problems, with the
        same random numbers every round."""
        cfg, problems = self.cfg, self.validation[: self.cfg.suite.pass_k_n]
        how = {**self._decode(), "temperature": cfg.sampler.temperature, "top_p": cfg.sampler.top_p}
        seed = held_out_seed(cfg.suite.seed)

        def compute(folder: Path) -> Mapping[str, Any]:
            with (
                progress(f"round {number}: pass@k", len(problems) * cfg.sampler.n) as tick,
                self._decoder(model) as decode,
            ):
                rows = held_out_rows(decode, self.task, problems, cfg.sampler.n, seed, on_progress=tick, **how)
            write_lines(folder / "held_out.jsonl", rows)
            return {}

        inputs = {"model": model.digest, "task": task_key(cfg.task), "items": _ids(problems), "n": cfg.sampler.n,
                  "how": how, "seed": seed} | self._dtype()  # fmt: skip
        return self.store.stage("held_out", inputs, compute, modules=self.sampling)

    def probe(self, model: Model, number: int, held_out: Artifact | None) -> Artifact:
        """probe.json: {figure: (above, below)}, a number a problem, of the held-out samples (`sample_figures`), of the
        model's predictions of fixed texts (gold solutions of these problems, and of OOD items against the base), and of
        greedy answers to training problems."""
        spec, own = self.cfg.analysis, self.validation[: self.cfg.suite.pass_k_n]
        practised = self.train_problems(max(number, 1))[: spec.train_n]
        away = [ps for _, ps in self._ood_items(spec.kl_n)]

        def compute(folder: Path) -> Mapping[str, Any]:
            out: dict[str, Any] = {}
            if held_out:
                out |= sample_ratios(self.policy, read_lines(held_out.folder / "held_out.jsonl"))
            how = (self.policy.pad_id, spec.batch_size)
            with progress(f"round {number}: predictions", 3) as tick:
                base = self._base_predictions(away) if spec.kl_n and away else []
                policy = self._load(model)
                if texts := self._golds(own):
                    out["diversity/fixed_text_entropy"] = diversity.text_entropy(policy.model, texts, *how)
                tick(1)
                far = [
                    diversity.divergence(policy.model, then, self._golds(problems)[: len(then)], *how)
                    for problems, then in zip(away, base, strict=False)
                ]  # a task at a time: its prompts share their examples
                if far:
                    out["kl/ood"] = tuple([x for part in column for x in part] for column in zip(*far, strict=True))
                tick(1)
            if practised:
                with self._decoder(model) as decode:
                    exam = Exam("train", self.task, practised)
                    scores = evaluation.greedy_scores(decode, [exam], on_progress=lambda _: None, **self._answer())
                out["train/acc"] = (scores["train"]["correct"], [1] * len(practised))
            write_json(folder / "probe.json", out)
            return {}

        inputs = {
            "model": model.digest, "base": self.base.digest, "held_out": held_out.digest if held_out else None,
            "task": task_key(self.cfg.task), "texts": _ids(own), "ood": [_ids(ps) for ps in away],
            "train": _ids(practised), "batch_size": spec.batch_size, "how": self._answer(),
            "sacrebleu": version("sacrebleu"),
        } | self._dtype()  # fmt: skip
        return self.store.stage("probe", inputs, compute, modules=(*self.sampling, *PROBING))

    def solutions_ood(self) -> Artifact:
        """examples.jsonl: up to `analysis.examples` verified solutions by the base of OOD items, tasks in turn."""
        cfg, spec = self.cfg, self.cfg.analysis
        items = self._ood_items(spec.examples)
        seed = derive_seed(cfg.suite.seed, "solutions_ood")
        how = {**self._decode(), "temperature": cfg.sampler.temperature, "top_p": cfg.sampler.top_p}

        def compute(folder: Path) -> Mapping[str, Any]:
            found: list[list[dict[str, str]]] = []
            with (
                progress("importance: solving OOD items", sum(len(ps) for _, ps in items)) as tick,
                self._decoder(self.base) as decode,
            ):
                for task, problems in items:
                    made = evaluation.sample(decode, task, problems, 1, seed, on_progress=tick, **how)
                    verdicts = verify_all(
                        task, [(p, c.text, c.finished) for p, (c,) in zip(problems, made, strict=True)]
                    )
                    found.append([
                        {"id": p.id, "prompt": p.prompt, "completion": c.text}
                        for p, (c,), verdict in zip(problems, made, verdicts, strict=True) if verdict.correct
                    ])  # fmt: skip
            longest = max(map(len, found), default=0)
            rows = [rows[at] for at in range(longest) for rows in found if at < len(rows)]
            write_lines(folder / "examples.jsonl", rows[: spec.examples])
            return {}

        tasks = [task_key(t) for t in self.of.ours]
        inputs = {"model": self.base.digest, "tasks": tasks, "items": [_ids(ps) for _, ps in items], "how": how,
                  "examples": spec.examples, "seed": seed} | self._dtype()  # fmt: skip
        return self.store.stage("solutions_ood", inputs, compute, modules=(*self.sampling, "stages.py"))

    def importance(self, solutions: Sequence[Mapping[str, str]], name: str = "importance") -> Artifact:
        """`name`.json: importance of the base's layers by each estimator, on the first solutions of as many problems as
        there are (`analysis.examples` in all), with intervals over these examples and each one's own value.

        Raises AnalysisError where there is no solution.
        """
        spec = self.cfg.analysis
        chosen = spread(solutions, spec.examples)
        if not chosen:
            raise AnalysisError(f"{name}: the base has no verified solution to measure it on")

        def compute(folder: Path) -> Mapping[str, Any]:
            policy, self._copy = self._load(self.base), None  # gradients need the room
            examples = self._examples((e["prompt"], e["completion"]) for e in chosen)
            total = len(chosen) * ((set(spec.importance) != {"taylor"}) + ("taylor" in spec.importance))
            with progress("importance of layers", total) as tick, _deterministic(self.cfg, self.device):
                values = importance(
                    policy.model, examples, spec.importance, pad_id=policy.pad_id, batch_size=spec.batch_size,
                    on_progress=tick,
                )  # fmt: skip
            write_json(folder / f"{name}.json", importance_table(values, "verified"))
            return {}

        inputs = {
            "model": self.base.digest, "examples": _digest_json(chosen), "estimators": list(spec.importance),
            "batch_size": spec.batch_size, "name": name,
        }  # fmt: skip
        return self.store.stage("importance", inputs, compute, modules=IMPORTANCE)

    def update(self, start: Model, tuned: Model, earlier: Model | None) -> tuple[Model, Artifact]:
        """The round's own update, tuned - start, in bfloat16. Facts, by row: its cosine and sign agreement with the one
        of the round before, and its effective rank."""
        ranks, past = self._ranks(), earlier.digest if earlier else None

        def compute(folder: Path) -> Mapping[str, Any]:
            before, after = self._stream(start), self._stream(tuned)
            update = change.update_of(before, after)
            other = self.with_weights(earlier, Checkpoint) if earlier else None
            file = folder / WEIGHTS_FILE
            self.store.written(file, save_tensors(file, update, torch.bfloat16))
            figures = change.update_figures(before, after, update, other, ranks=ranks, device=self.device)
            return {"rows": figures}

        inputs = {"start": start.digest, "tuned": tuned.digest, "earlier": past, "ranks": ranks}
        stage = partial(self.store.stage, "update", inputs, compute, modules=("analysis/change.py", "weights.py"))
        made = stage()
        return Model(made.folder, made.digest, partial(stage, whole=True)), made

    def analyze(self, tuned: Model, merged: Merged, anchor: Anchor, update: Artifact | None) -> Artifact:
        """layers.json: weight change against the base by layer and kind, before and after the last merge event; the
        facts of the round's update; and by layer what the merge left of it: `ratio`, as asked, and `share`, as measured
        along the tuned model's difference to the anchor. Facts: the merged model's relative distance from base and
        anchor."""
        rows, model = update.facts["rows"] if update else {}, merged.model
        ratios = _times(merged.ratio, 1, self.base_weights)

        def compute(folder: Path) -> Mapping[str, Any]:
            found = change.changes(
                self.base_weights, anchor.weights(), self._stream(tuned), self._stream(model), ratios
            )
            layers = {"pre_merge": found.tuned, "merged": found.merged, "update": rows, "merge": found.left}
            write_json(folder / "layers.json", layers)
            return {"drift": found.drift, "anchor_distance": found.anchor_distance}

        inputs = {
            "base": self.base.digest, "tuned": tuned.digest, "merged": model.digest, "anchor": anchor.digest,
            "update": rows, "ratio": _compact(merged.ratio),
        }  # fmt: skip
        return self.store.stage("analyze", inputs, compute, modules=("analysis/change.py", "weights.py", "stages.py"))

    # --- weights on disk --------------------------------------------------------------------------------------------

    def _write(self, folder: Path, weights: Weights) -> None:
        """Weights into a stage's folder."""
        self.store.written(folder / WEIGHTS_FILE, write_folder(folder, weights, self.base.folder))

    def place_model(self, model: Model, target: Path) -> None:
        """Puts a model's files into a run folder."""

        def put(folder: Path) -> None:
            if model.restore is not None:  # first the weights, which another run may be about to drop
                place(folder / WEIGHTS_FILE, target / WEIGHTS_FILE)
            for file in sorted(folder.iterdir()):
                if file.is_file() and file.name not in NOT_THE_MODEL and not file.name.startswith("."):
                    place(file, target / file.name, link=folder != self.base.folder)

        self.with_weights(model, put)

    def shared_fit(self, number: int) -> bool:
        """Whether runs with other ratios have the same fit: in round 1, without merge events inside it."""
        every: Any = getattr(self.cfg.merge, "every_n_epochs", "last")
        return number == 1 and (is_vanilla(self.cfg.merge) or len(merging.events(self.cfg.sft.epochs, every)) == 1)

    # --- figures -----------------------------------------------------------------------------------------------

    def unseen(self, scores: Artifact) -> list[int]:
        """Verdicts on all ID problems that are never practised: test and validation items."""
        read = json.loads((scores.folder / "scores.json").read_text())
        return read[self.task.name]["correct"] + read[f"val/{self.task.name}"]["correct"]

    def superficiality(self, base: Artifact, now: Artifact) -> dict[str, float]:
        """gap/superficiality, ID gain minus OOD gain, with _low and _high."""
        then, scores = (json.loads((a.folder / "scores.json").read_text()) for a in (base, now))
        gap = evaluation.gap_interval(then, scores, self.task.name, [*self.near, *self.far])
        return {f"gap/superficiality{end}": v for end, v in zip(("", "_low", "_high"), gap, strict=True)}

    def figures(self, scores: Artifact) -> dict[str, float]:
        """The flat metrics of a scores.json."""
        return self.of.figures(json.loads((scores.folder / "scores.json").read_text()))

    # --- inside ------------------------------------------------------------------------------------------------

    def _digest(self, weights: Weights) -> str:
        started = time.perf_counter()
        digest = _digest_json([digest_weights(weights), self.extras])
        self.store.tally.seconds_store += time.perf_counter() - started  # keys need it, nothing else
        return digest

    def _weights(self, model: Model) -> Weights:
        return self.base_weights if model.digest == self.base.digest else self.with_weights(model, read_weights)

    def with_weights(self, model: Model, use: Callable[[Path], T]) -> T:
        """use(folder of the model), its weights computed again first if they were dropped."""
        for _ in range(10):  # another run may drop them between the two lines
            if model.restore is not None and not (model.folder / WEIGHTS_FILE).exists():
                model.restore()
            try:
                return use(model.folder)
            except FileNotFoundError:
                if model.restore is None:
                    raise
        raise FileNotFoundError(f"{model.folder}: other runs keep dropping its weights; use store.keep=all")

    def _with_folders(self, models: Sequence[Model], use: Callable[[list[Path]], T]) -> T:
        """use(folders of the models), as `with_weights`."""
        if not models:
            return use([])
        return self.with_weights(models[0], lambda at: self._with_folders(models[1:], lambda rest: use([at, *rest])))

    def _stream(self, model: Model) -> Weights:
        return self.base_weights if model.digest == self.base.digest else self.with_weights(model, Checkpoint)

    def _examples(self, texts: Iterable[tuple[str, str]]) -> list[Example]:
        encode, close = self.policy.encode_prompt, self.policy.encode_completion
        return [Example(encode(prompt), close(completion)) for prompt, completion in texts]

    def _ood_items(self, n: int) -> list[tuple[Task, Sequence[Problem]]]:
        """The first `n` test items of each OOD task."""
        return [(e.task, e.problems[:n]) for e in self.exams if e.label in (*self.near, *self.far)]

    def _ranks(self) -> bool:
        """analysis.effective_rank; `auto` leaves it out where it would take a CPU hours."""
        asked = self.cfg.analysis.effective_rank
        return change.ranks_are_cheap(self.base_weights, self.device) if asked == "auto" else bool(asked)

    def _golds(self, problems: Sequence[Problem]) -> list[Example]:
        """Prompts with their gold solutions, as far as these fit into the model's context."""
        texts = self._examples((p.asked, p.gold) for p in problems)
        return [t for t in texts if len(t.prompt) + len(t.completion) <= self.policy.context]

    def _base_predictions(self, tasks: Sequence[Sequence[Problem]]) -> list[list[torch.Tensor]]:
        """The base's log-probabilities for the gold solutions of OOD items, of each task as many as fit in its share of
        the memory for them."""
        if self._base_logs is None:
            policy, made = self._load(self.base), []
            room = KEPT_NUMBERS // policy.model.config.get_text_config().vocab_size // len(tasks)
            for problems in tasks:
                texts = self._golds(problems)
                fit = int((np.cumsum([len(t.completion) for t in texts]) <= room).sum())
                fit = max(fit, min(1, len(texts)))
                if fit < len(problems):
                    log.info("kl/ood: %d of %d items of a task fit (context, memory)", fit, len(problems))
                made.append(
                    diversity.keep_predictions(policy.model, texts[:fit], policy.pad_id, self.cfg.analysis.batch_size)
                )
            self._base_logs = made
        return self._base_logs

    @property
    def loaded(self) -> str:
        return self._loaded

    @loaded.setter
    def loaded(self, digest: str) -> None:
        self._loaded, self._copy = digest, None

    def _load(self, model: Model) -> Policy:
        if self.group:
            self.policy.model.to(self.device)
        if self.engine:
            self.engine.pause()
        if self.loaded != model.digest:
            self.policy.set_weights(self._weights(model))
            self.loaded = model.digest
        return self.policy

    @contextmanager
    def _decoder(self, model: Model) -> Iterator[Decode]:
        """What completes prompts with `model`."""
        if self.engine:
            if self.engine.loaded != model.digest:
                reader = self._teacher_reader(model) if model is self.teacher else self.policy
                how: dict[str, Any] = {"policy": reader, "name": model.digest, "trust_remote_code": self._trusts(model)}
                self.with_weights(model, partial(self.engine.load, **how))
            yield self.engine.complete
            return
        if self.group:
            yield self.with_weights(model, partial(self._load_on_devices, trust=self._trusts(model)))
            return
        with self._sampler(model) as policy:
            yield partial(complete, policy)

    @contextmanager
    def _decoding(self, policy: Policy) -> Iterator[Decode]:
        """What completes prompts with the policy as it is."""
        if self.engine:
            with tempfile.TemporaryDirectory(dir=self.scratch) as made:
                write_folder(folder := Path(made), policy.weights(), self.base.folder)
                self.engine.load(folder, self.policy, trust_remote_code=self._trusts())
            yield self.engine.complete
            self.engine.pause()
            return
        if self.group:
            with tempfile.TemporaryDirectory(dir=self.scratch) as made:
                write_folder(Path(made), policy.weights(), self.base.folder)
                yield self._load_on_devices(Path(made), self._trusts())
            return
        with in_dtype(policy, getattr(torch, self.dtype)) as copy_:
            yield partial(complete, copy_)

    def _sampler(self, model: Model) -> Any:
        """`model` as a policy in sampler.dtype."""
        if model is self.teacher:
            other = Policy(model.folder, trust_remote_code=self._trusts(model), device=self.device)
            return in_dtype(other, getattr(torch, self.dtype))
        own = in_dtype(self._load(model), getattr(torch, self.dtype), self._copy)
        self._copy = own.copy
        return own

    def _load_on_devices(self, folder: Path, trust: bool) -> Decode:
        assert self.group is not None
        self._leave_device()
        return self.group.load(folder, dtype=self.dtype, trust_remote_code=trust)

    def _leave_device(self) -> None:
        """Makes room on a GPU for the group's processes; `_load` comes back."""
        if self.device == "cuda":
            self._copy = None
            self.policy.model.to("cpu")
            torch.cuda.empty_cache()

    def _trusts(self, model: Model | None = None) -> bool:
        """Whether code in the folder of the model, or of the teacher, may run."""
        of = self.cfg.teacher if model is not None and model is self.teacher else self.cfg.model
        return getattr(of, "trust_remote_code", False)

    def _decode(self) -> dict[str, Any]:
        return {"max_new_tokens": self.cfg.sampler.max_new_tokens, "batch_size": self.cfg.sampler.batch_size}

    def _answer(self) -> dict[str, int]:
        """As `_decode`, of greedy answers."""
        own = self.of.max_new_tokens
        return self._decode() | ({} if own is None else {"max_new_tokens": own})

    def _dtype(self) -> dict[str, Any]:
        """What else decides rounding: of several devices, each has batches of its own; vLLM's versions and modes."""
        return {"dtype": self.dtype} | ({"devices": self.devices} if self.devices > 1 else {}) | self.engine_key

    def _merge_config(self) -> MergeEvents:
        assert isinstance(self.cfg.merge, MergeEvents)
        return self.cfg.merge

    @property
    def over_rounds(self) -> bool:
        """Whether a merge reads all rounds' updates."""
        return isinstance(self.cfg.merge, MergeEvents) and self.cfg.merge.over == "rounds"

    def _updates(self, now: Round) -> tuple[list[tuple[Weights, Weights]], Weights | None]:
        """(tuned, start) of the rounds before and the start of this one, for rules over rounds; else nothing."""
        if not self.over_rounds:
            return [], None
        return [(self._stream(t), self._stream(s)) for t, s in now.past], self._stream(now.start)

    def _mask_seed(self, now: Round) -> int:
        """Of a round's masks; each of its events adds its epoch."""
        if not self.method.random:
            return 0
        merge = self._merge_config()
        return derive_seed(merge.seed, "mask", *(() if merge.mask == "fixed" else (now.number,)))

    def _merge_key(self, now: Round) -> dict[str, Any]:
        """What decides a merge beside the tuned weights and the ratios."""
        method = vars(self.method) | {"function": source_of(self._merge_config())}
        past = [(t.digest, s.digest) for t, s in now.past] if self.over_rounds else None
        return {
            "method": method, "name": getattr(self.cfg.merge, "function", None), "anchor": now.anchor.digest,
            "past": past, "start": now.start.digest if past is not None else None, "masks": self._mask_seed(now),
            "epochs": self.cfg.sft.epochs if self.method.random else None,
        }  # fmt: skip

    def _ratios(self, now: Round, epoch: int, tuned: Model | None = None) -> dict[str, float]:
        """The ratio of each tensor in the event after an epoch, by the policy; `angle` needs the tuned model."""
        names = list(self.base_weights)
        if isinstance(self.cfg.merge, MergeNone):
            return dict.fromkeys(names, 1.0)
        merge, policy = self.cfg.merge, self.cfg.merge.policy
        rows: dict[str, float] = {}
        if policy.importance:
            rows = merging.by_importance(now.importance, policy.strength)
        if policy.angle and tuned and now.past:
            if now.earlier is None:
                raise merging.MergeError(
                    "merge.policy.angle: the update of the round before could not be analysed; run.log says why"
                )
            _, update = self.update(now.start, tuned, now.earlier)
            cosines = {row: figures["cosine"] for row, figures in update.facts["rows"].items()}
            rows = {row: rows.get(row, 1.0) * factor for row, factor in merging.by_angle(cosines).items()}
        ratio = merge.ratio * merging.over_time(policy.rounds, now.number, policy.span or self.cfg.rounds)
        ratio *= merging.over_time(policy.epochs, epoch, self.cfg.sft.epochs)
        return self._tensor_ratios(ratio, rows)

    def _waits(self, now: Round) -> bool:
        """Whether no merge comes before the last round (merge.policy.at_end), and this is another one."""
        return self.at_end and now.number < self.cfg.rounds

    @property
    def at_end(self) -> bool:
        return isinstance(self.cfg.merge, MergeEvents) and self.cfg.merge.policy.at_end

    def _does_nothing(self, ratio: Ratio) -> bool:
        return self.method.exact and not self.over_rounds and _compact(ratio) == 1

    def _events(self, now: Round) -> list[int]:
        """Epochs with a merge event that does something; the last always counts."""
        epochs = self.cfg.sft.epochs
        if is_vanilla(self.cfg.merge) or self._waits(now):
            return [epochs]
        *inner, last = merging.events(epochs, self._merge_config().every_n_epochs)
        return [*(e for e in inner if not self._does_nothing(self._ratios(now, e))), last]

    def ratio_metrics(self, now: Round, merged: Merged) -> dict[str, float]:
        """merge/ratio, the mean over weights of the last event's ratio; merge/effective_ratio, the same of what the
        ratios of all of the round's events leave of its update (of rules that are not linear, merge/share is what was
        left); merge/search, the factor that the line search took."""
        at = self._events(now)
        sizes = {name: w.numel() for name, w in self.base_weights.items()}
        of = [self._ratios(now, epoch) for epoch in at[:-1]] + [_times(merged.ratio, 1, sizes)]
        left = {n: merging.effective_ratio([r[n] for r in of], self.cfg.sft.epochs, at) for n in sizes}
        out = {"merge/ratio": _mean(of[-1], sizes), "merge/effective_ratio": _mean(left, sizes)}
        return out | ({"merge/search": merged.search.facts["factor"]} if merged.search else {})

    def _fit_spec(self) -> FitSpec:
        sft, trainer = self.cfg.sft, self.cfg.trainer
        return FitSpec(
            epochs=sft.epochs, lr=sft.lr, batch_size=sft.batch_size, schedule=sft.schedule,
            warmup_ratio=sft.warmup_ratio, weight_decay=sft.weight_decay, betas=(sft.beta1, sft.beta2),
            max_length=sft.max_length, accelerator="gpu" if self.device == "cuda" else "cpu", devices=self.devices,
            precision=self.precision, accumulate_grad_batches=trainer.accumulate_grad_batches,
            gradient_checkpointing=trainer.gradient_checkpointing,
            gradient_clip_val=trainer.gradient_clip_val, deterministic=trainer.deterministic, lora=self._lora(),
            l2_to_base=sft.l2_to_base, kl_to_base=sft.kl_to_base, patience=sft.patience,
            strategy=trainer.strategy if self.devices > 1 else "single",
        )  # fmt: skip

    def _lora(self) -> LoraSpec | None:
        lora = self.cfg.model.lora
        targets = lora.targets if isinstance(lora.targets, str) else tuple(lora.targets)
        return None if lora.rank is None else LoraSpec(lora.rank, lora.alpha, lora.dropout, targets)


class Anchor:
    """What a round merges towards; its weights are read when they are needed."""

    def __init__(self, bench: Bench, kind: str, history: Sequence[Model]) -> None:
        """`history` is theta_hat_0 .. theta_hat_{t-1}."""
        self.bench = bench
        self.models = {"base": [history[0]], "previous": [history[-1]], "mean": list(history)}[kind]
        self.digest = self.models[0].digest if len(self.models) == 1 else _digest_json([m.digest for m in self.models])

    def weights(self) -> Weights:
        return mean_of([self.bench._weights(m) for m in self.models])


@contextmanager
def _deterministic(cfg: Root, device: str) -> Iterator[None]:
    """trainer.deterministic for gradients outside of a fit; a CPU's are so anyway."""
    wanted = cfg.trainer.deterministic and device == "cuda"
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(False)


class in_dtype:
    """The policy with a copy of its model in another dtype, while it samples; the float32 weights stay as they are.
    `copy` is the one that was made before, of the same weights."""

    def __init__(self, policy: Policy, dtype: torch.dtype, copy: Any = None) -> None:
        self.policy, self.own, self.copy = policy, policy.model, copy
        if copy is None and dtype != torch.float32:
            self.copy = copy_in(self.own, dtype)

    def __enter__(self) -> Policy:
        if self.copy is not None:
            self.policy.model = self.copy
        return self.policy

    def __exit__(self, *_: object) -> None:
        self.policy.model = self.own


def _spec_key(spec: FitSpec) -> dict[str, Any]:
    """What of a spec decides a fit; of one device, there is no strategy."""
    return {k: v for k, v in dataclasses.asdict(spec).items() if k != "strategy" or spec.devices > 1}


def _compact(ratio: Ratio) -> Ratio:
    """One number where all tensors have the same ratio."""
    values = set(ratio.values()) if isinstance(ratio, Mapping) else {ratio}
    return values.pop() if len(values) == 1 else ratio


def _mean(values: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """The mean over weights; the value itself where all tensors have the same."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return sum(n * values[name] for name, n in sizes.items()) / sum(sizes.values())


def _times(ratio: Ratio, factor: float, names: Iterable[str]) -> dict[str, float]:
    return {name: (ratio[name] if isinstance(ratio, Mapping) else ratio) * factor for name in names}


def _passes(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Mean pass@k over problems for k = 1, 2, 4, ... up to the samples that every problem of these has."""
    most = min((n for n, _ in counts), default=0)
    ks = [k for k in (2**i for i in range(12)) if k <= most]
    return {str(k): sum(evaluation.pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in ks}


def held_out_seed(suite_seed: int) -> int:
    """The same random numbers every round, and for every model."""
    return derive_seed(suite_seed, "held_out")


def held_out_rows(
    decode: Decode, task: Task, problems: Sequence[Problem], n: int, seed: int, **how: Any
) -> list[dict[str, Any]]:
    """What held_out.jsonl holds: `n` samples a problem, with verdicts."""
    made = evaluation.sample(decode, task, problems, n, seed, asked=True, **how)
    flat = [(p, i, c) for p, cs in zip(problems, made, strict=True) for i, c in enumerate(cs)]
    verdicts = verify_all(task, [(p, c.text, c.finished) for p, _, c in flat])
    return [
        {
            "id": p.id, "sample": i, "prompt": p.asked, "completion": c.text, "answer": verdict.answer,
            "gold": p.answer, "verdict": verdict.correct, "reason": verdict.reason, "tokens": c.tokens,
            "entropy": None if math.isnan(c.entropy) else round(c.entropy, 6),
        }
        for (p, i, c), verdict in zip(flat, verdicts, strict=True)
    ]  # fmt: skip


def sample_ratios(policy: Policy, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`diversity.sample_figures` of held_out.jsonl's rows."""
    problems: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["id"], []).append(row)
    written = {row["completion"] for rows in problems.values() for row in rows}
    tokens = {t: policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in written}
    return diversity.sample_figures(list(problems.values()), tokens)


def ratio_intervals(ratios: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """Each figure of {name: (above, below)}, with _low and _high (95%, problems resampled); none without a sample."""
    out = {}
    for name, (above, below) in ratios.items():
        if sum(below):
            value, low, high = evaluation.ratio_interval(above, below)
            out.update({name: value, f"{name}_low": low, f"{name}_high": high})
    return out


def probe_metrics(artifact: Artifact, held_out: Sequence[int]) -> dict[str, float]:
    """sample/*, diversity/*, kl/ood and train/acc, each with _low and _high (95%, problems resampled), and
    gap/memorisation: accuracy on training problems minus that on `held_out`, verdicts on others of the same task."""
    ratios: dict[str, tuple[list[float], list[float]]] = json.loads((artifact.folder / "probe.json").read_text())
    out = ratio_intervals(ratios)
    if "train/acc" in out:
        above, below = ratios["train/acc"]
        counts = (int(sum(above)), len(below)), (sum(held_out), len(held_out))
        gap = zip(("", "_low", "_high"), evaluation.difference_interval(*counts), strict=True)
        out |= {f"gap/memorisation{end}": v for end, v in gap}
        out["train/acc_low"], out["train/acc_high"] = evaluation.wilson(*counts[0])
    return out


def spread(solutions: Sequence[Mapping[str, str]], n: int) -> list[dict[str, str]]:
    """`n` solutions: the first one of each problem, then the second ones, and so on; prompt and completion alone."""
    turns: dict[int, list[Mapping[str, str]]] = {}
    seen: dict[str, int] = {}
    for solution in solutions:
        turns.setdefault(seen.get(solution["id"], 0), []).append(solution)
        seen[solution["id"]] = seen.get(solution["id"], 0) + 1
    return [{"prompt": s["prompt"], "completion": s["completion"]} for turn in turns.values() for s in turn][:n]


def importance_table(values: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    """What importance.json holds: source (whose solutions), examples, layers, estimators ({name: {layer_00: {mean, low,
    high}}}) and each example's values."""
    rounded = {name: np.array([[float(f"{x:.8g}") for x in row] for row in v]) for name, v in values.items()}
    first = next(iter(rounded.values()))
    return {
        "source": source, "examples": first.shape[0], "layers": first.shape[1],
        "estimators": {
            name: {
                f"layer_{i:02d}": {"mean": float(m), "low": float(low), "high": float(high)}
                for i, (m, low, high) in enumerate(zip(*interval_of_means(v), strict=True))
            }
            for name, v in rounded.items()
        },
        "values": {name: v.tolist() for name, v in rounded.items()},
    }  # fmt: skip


def importance_metrics(table: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """<prefix>/<estimator>/layer_00, with _low and _high (95%, examples resampled)."""
    return {
        f"{prefix}/{name}/{row}{end}": figures[what]
        for name, rows in table["estimators"].items()
        for row, figures in rows.items()
        for end, what in (("", "mean"), ("_low", "low"), ("_high", "high"))
    }


def mismatch_metrics(
    table: Mapping[str, Any], layers: Mapping[str, Any], share: float, prefix: str
) -> dict[str, float]:
    """<prefix>/<estimator>/spearman and the others of `mismatch`, and their pre_merge/ twins where the merge changed
    something."""
    values = {name: np.array(v) for name, v in table["values"].items()}
    out = {f"{prefix}/{name}": value for name, value in mismatch(values, layers["merged"], share).items()}
    if layers["pre_merge"] != layers["merged"]:
        twins = mismatch(values, layers["pre_merge"], share)
        out |= {f"pre_merge/{prefix}/{name}": value for name, value in twins.items()}
    return out


def practice_metrics(facts: Mapping[str, Any]) -> dict[str, float]:
    """train_sample/*: what the round's samples were worth."""
    n = facts["samples"]
    return {
        "train_sample/accept_rate": facts["reasons"]["correct"] / n,
        **{f"train_sample/{reason}": count for reason, count in facts["reasons"].items()},
        **{f"train_sample/pass@{k}": v for k, v in facts["pass"].items()},
        "train_sample/distinct": facts["distinct"] / n,
        "train_sample/solved_problems": facts["solved"] / facts["problems"],
        "train_sample/examples": facts["examples"],
        **({"train_sample/hinted": facts["hinted"]} if "hinted" in facts else {}),
        **({"train_sample/labelled": facts["labelled"] / facts["problems"]} if "labelled" in facts else {}),
        **({"train_sample/label_acc": facts["label_right"] / facts["labelled"]} if facts.get("labelled") else {}),
    }


def fit_metrics(facts: Mapping[str, Any]) -> dict[str, float]:
    """sft/*: of the epoch that was kept, the loss, KL(tuned || base) where that is in it; that epoch, where it was
    chosen; examples that were replayed, and that were too long, where there are some."""
    at = facts["epoch"] - 1
    return {
        "sft/loss": facts["losses"][at],
        **({"sft/kl": facts["kl"][at]} if facts["kl"] else {}),
        **({"sft/epoch": facts["epoch"]} if facts["scores"] else {}),
        **{f"sft/{name}": facts[name] for name in ("replayed", "dropped") if facts[name]},
    }


def layer_metrics(layers: Mapping[str, Any]) -> dict[str, float]:
    """weights/change/<row> and its pre_merge/ twin; weights/cosine/<row>, weights/sign_agreement/<row> and
    weights/effective_rank/<row> of the round's own update, where they are defined; merge/ratio/<row>,
    merge/share/<row>."""
    out = {}
    for prefix, which in (("", "merged"), ("pre_merge/", "pre_merge")):
        for row, figures in layers[which].items():
            out[f"{prefix}weights/change/{row}"] = figures["relative"]
    for row, figures in layers["update"].items():
        out |= {f"weights/{name}/{row}": value for name, value in figures.items() if value is not None}
    for row, figures in layers["merge"].items():
        out |= {f"merge/{name}/{row}": value for name, value in figures.items() if value is not None}
    return out


def base_digest(folder: Path, trust_remote_code: bool = False) -> str:
    """What the stages of a run call the base in `folder`: its weights, config and tokenizer."""
    weights = Policy(folder, trust_remote_code=trust_remote_code).weights()
    return _digest_json([digest_weights(weights), _extras_digest(folder)])


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        yield from map(json.loads, file)


def _extras_digest(folder: Path) -> str:
    """The config and the tokenizer's files; not the dtype a config was saved with, nor who saved it."""
    config = json.loads((folder / "config.json").read_text())
    config = {
        k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
    }
    skip = ("config.json", "README.md", "recipe.json")
    files = {
        f.name: file_digest(f) for f in sorted(folder.iterdir())
        if f.suffix in (".json", ".model", ".txt", ".jinja") and f.name not in skip and "index" not in f.name
        and f.name not in ("manifest.json", "timing.json", "provenance.json")
    }  # fmt: skip
    return _digest_json([config, files])


def _digest_json(value: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _ids(problems: Sequence[Problem]) -> str:
    return _digest_json([vars(p) for p in problems])


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    write_lines(folder / "completions.jsonl", rows)
    return {}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def read_texts(path: str | Path, key: str, first: Sequence[str]) -> list[dict[str, str]]:
    """{id, text, completion} of each line of a JSON-lines file: `text` is the value of the first key of `first` that is
    there, `id` the line's own or its number. Raises ConfigError naming `key`, file and line."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key}: there is no file {file}; expected JSON lines")
    found = []
    with file.open("rb") as lines:  # its own newlines alone: JSON may hold others
        for at, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
                text, completion = row[next(k for k in first if k in row)], row["completion"]
                if not isinstance(text, str) or not isinstance(completion, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError, StopIteration) as error:
                expected = " or ".join(f'{{"{k}": TEXT, "completion": TEXT}}' for k in first)
                raise ConfigError(f"{key}: {file}, line {at}: expected {expected}, got {raw[:80]!r}") from error
            found.append({"id": str(row.get("id", at)), "text": text, "completion": completion})
    if not found:
        raise ConfigError(f"{key}: {file} is empty")
    return found


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")

"""What a run or a sweep would do, before any weights are loaded: stages, samples, tokens, steps, FLOPs, memory, disk.

    itermerge experiment=quickstart plan=true

The stages are not listed here a second time: the loop itself runs, over a store that computes nothing (`Ledger`) and a
model without weights (`Outline`, on the meta device). So a plan has the stages of the run, with their keys: what jobs
share is counted once, and what lies in the store already is found. Tokens are those of the real prompts; what a model
will write is not known, so its tokens are upper bounds (`max_new_tokens` each), and so is what is learned from (every
sample correct, up to `task.max_solutions`).

FLOPs of a forward pass over `tokens`, of which `predicted` get logits, `pairs` of them attending to one another:

    2 body tokens + 2 head predicted + 4 layers width pairs

`body`: weights of the blocks, `head`: those of the output, `width`: of the attention (2001.08361). Training takes three
times that, with adapters twice. What all prompts begin with, and a problem's prompt for its samples, count once, as
`decoding` computes them. Padding, norms, softmax, merging and optimizer steps are not counted.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import loop, pretrain, stages
from .config import (
    ModelLab,
    ProgramPretrainLab,
    Root,
    SamplerVLLM,
    StoreNone,
    Suite,
    TaskHarness,
    TeacherHF,
    TeacherLab,
    label,
)
from .evaluation import Exam
from .harness import HarnessExam
from .packing import LOGITS
from .policy import SHARED_FROM, Policy, eos_ids_of
from .sft import FitSpec
from .stages import Bench, Merged, Model, Round, lab_folder
from .store import MANIFEST, Artifact, Store, Tally, source_digest
from .tasks import NoData, Problem, Split, Task, Verdict
from .tracking import NullTracker, console, progress
from .upkeep import keep_of, need, size_said
from .vllm import EngineError
from .weights import Checkpoint, PolicyError, Weights

LOOK_UP_TO = 1 << 31  # bytes of a base's files up to which they are read once, for the keys of what the store has
CHARACTERS = 4  # a token has, where there is no tokenizer to ask
PLANNED = "planned:"


@dataclass(frozen=True)
class Cost:
    """Of one stage. `samples`: texts that are written, read or learned from. `new_tokens` are at most so many."""

    samples: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0  # of the optimizer
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True)
class Item:
    """A stage of a plan; `stored` says whether the store has it, None where that is not known."""

    round: int
    stage: str
    cost: Cost
    stored: bool | None


@dataclass(frozen=True)
class Shape:
    """What FLOPs and memory of a causal LM follow from: numbers of weights, and widths."""

    weights: int  # all of them, tied ones once
    body: int  # without embeddings and head
    head: int  # width x vocabulary, tied or not
    layers: int
    hidden: int
    width: int  # heads x their dimension
    kv: int  # the same of keys
    ffn: int
    vocab: int

    def forward(self, tokens: float, pairs: float, predicted: float) -> float:
        """FLOPs; the formula above."""
        return 2 * self.body * tokens + 2 * self.head * predicted + 4 * self.layers * self.width * pairs


@dataclass
class Plan:
    """Of one run, or of all jobs of a sweep: stages that several have stand there once."""

    jobs: int
    items: list[Item]
    calls: int  # stages of all jobs, were none shared
    memory: dict[str, dict[str, int]]  # {what: {part: bytes}}
    store: int  # bytes of weights on the store's disk, at most
    folders: int  # and in the run folders, where they are no hard links
    about: list[str] = field(default_factory=list)

    def total(self, *, stored: bool = False) -> Cost:
        """Of what is still to be done; with `stored`, of everything."""
        return sum((i.cost for i in self.items if stored or not i.stored), Cost())


def shape_of(model: Any) -> Shape:
    """The shape of a transformers causal LM; it may be on the meta device."""
    config = model.config.get_text_config()
    embedded, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters())
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        weights=weights, body=weights - embedded.numel() - (0 if head is embedded else head.numel()),
        head=head.numel(), layers=config.num_hidden_layers, hidden=config.hidden_size, width=heads * size,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * size,
        ffn=getattr(config, "intermediate_size", None) or 4 * config.hidden_size, vocab=head.shape[0],
    )  # fmt: skip


# --- a model without weights, a task without data, a store that computes nothing ------------------------------------


class Outline(Policy):
    """A policy on the meta device: config and tokenizer, no weights. Raises PolicyError where there is no config."""

    def __init__(
        self, path: str | Path, revision: str | None = None, trust_remote_code: bool = False, key: str = "model.path"
    ) -> None:
        how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        local = Path(path).expanduser()
        self.folder = local if local.is_dir() else Path()
        where = str(local) if local.is_dir() else str(path)
        how |= {} if local.is_dir() else {"revision": revision}
        try:
            config = AutoConfig.from_pretrained(where, **how)
        except (OSError, ValueError) as error:
            raise PolicyError(
                f"{key}: there is no config.json of {path}, neither in a folder nor from the Hugging Face hub "
                f"({_short(error)}). A plan needs no weights: give {key}=FOLDER with config.json, and the "
                "tokenizer's files for exact tokens"
            ) from error
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(where, **how)
        except (OSError, ValueError, KeyError, ImportError):
            self.tokenizer = None
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        self.eos_ids = eos_ids_of(self.folder, self.tokenizer, self.model.generation_config) if self.tokenizer else [0]
        self.pad_id = self.eos_ids[0]
        self.shape = shape_of(self.model)
        self._ids: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}

    def encode_prompt(self, text: str) -> Any:
        """Token ids, kept as an array; so many zeros as there may be tokens where there is no tokenizer."""
        if text not in self._ids:
            ids = super().encode_prompt(text) if self.tokenizer else [0] * math.ceil(len(text) / CHARACTERS)
            self._ids[text] = np.array(ids, np.int32)
        return self._ids[text]

    def length_of(self, completion: str) -> int:
        """Tokens of a completion, its eos included."""
        if completion not in self._lengths:
            self._lengths[completion] = (
                len(self.encode_completion(completion))
                if self.tokenizer
                else math.ceil(len(completion) / CHARACTERS) + 1
            )
        return self._lengths[completion]


class Unseen:
    """In place of a task whose data are not here: problems without text."""

    stop: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]:
        ids = [f"{self.name} {split} {seed} {i}" for i in range(n)]
        return [Problem(i, i, "", "", "", str(at)) for at, i in enumerate(ids)]

    def verify(self, problem: Problem, completion: str, finished: bool) -> Verdict:
        return Verdict("correct", problem.answer)


class UnseenExam(HarnessExam):
    """In place of a task of lm_eval whose data are not here."""

    def __init__(self, name: str, n: int) -> None:
        self.label, self.items, self.requests, self.digest = name, list(range(n)), [], PLANNED


class Ledger(Store):
    """A store that computes and writes nothing: of a stage that is not there, it notes what it would cost.

    What it gives back in its place has the key as its digest, so that the keys of later stages are known as well.
    """

    def __init__(self, root: Path, environment: Mapping[str, Any], *, scratch: Path, seen: dict[str, Item]) -> None:
        self.root, self.environment, self.keep, self.tally = Path(root), dict(environment), "all", Tally()
        self.scratch, self.seen, self.keys = scratch, seen, set[str]()
        self.note: Callable[[str], tuple[int, Cost]] = lambda _: (0, Cost())
        self.blind = False  # the base's digest is not known: nor what is there

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None: ...

    def stage(
        self, name: str, inputs: Mapping[str, Any], compute: Any, *, modules: tuple[str, ...], whole: bool = False
    ) -> Artifact:
        what = {"stage": name, "source": source_digest(modules), "environment": self.environment, **inputs}
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        self.keys.add(key)
        found = None if self.blind else self._there(self.root / name / key[:2] / key, key)
        if key not in self.seen:
            number, cost = self.note(name)
            self.seen[key] = Item(number, name, cost, None if self.blind else found is not None)
        if found:
            return found
        folder = self.scratch / key
        folder.mkdir(exist_ok=True)
        facts = {"digest": PLANNED + key, "losses": [0.0], "rows": {}, "factor": 0.5}
        return Artifact(folder, key, facts, {PLANNED: key})

    def _there(self, folder: Path, key: str) -> Artifact | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            return Artifact(folder, key, manifest["facts"], manifest["files"])
        except (OSError, ValueError, KeyError):
            return None

    def drop_weights(self, folder: Path) -> None: ...


class Sketch(Bench):
    """The stages of a run over a Ledger, each with its cost."""

    store: Ledger
    policy: Outline

    def __init__(self, cfg: Root, store: Ledger, scratch: Path, *, shared: dict[str, Any], about: list[str]) -> None:
        self.shared, self.about, self.number = shared, about, 0
        self.examples: Sequence[Mapping[str, Any]] = ()
        self.read: Sequence[Mapping[str, str]] = ()  # by the analysis of importance
        self.asked: Sequence[Problem] = ()  # of the samples, with the answer given away where `hinted`
        self.hinted = False
        self.solver: Shape | None = None  # who writes them, where it is not the model
        self.based = False  # whether the base's predictions are made
        super().__init__(cfg, store, scratch)
        if self.of.harness:
            asked = sum(len(e.items) for e in self.of.harness)
            self._say(
                f"not counted: what lm_eval asks for, its tokens, FLOPs and memory, {asked} items an evaluation: "
                f"{', '.join(e.label for e in self.of.harness)}"
            )
        store.note = lambda name: (self.number, self.cost(name))

    # what Bench would read

    def _count_devices(self) -> int:
        return stages.devices_of(self.cfg, self.device)  # those of another machine, it may be

    def _build(self, spec: Any) -> Task:
        key = f"task {json.dumps(dataclasses.asdict(spec), sort_keys=True, default=str)}"
        if key not in self.shared:
            self.shared[key] = _Remembering(stages.build_task(spec), label(spec), self._say)
        return self.shared[key]

    def _build_harness(self, spec: TaskHarness, suite: Suite) -> HarnessExam:
        key = f"harness {json.dumps([dataclasses.asdict(spec), suite.n, suite.seed], sort_keys=True)}"
        if key not in self.shared:
            try:
                self.shared[key] = stages.harness_exam(spec, suite)
            except NoData as error:
                self._say(f"items of {label(spec)} are not here, {suite.n} are taken to be: {_short(error)}")
                self.shared[key] = UnseenExam(label(spec), suite.n)
        return self.shared[key]

    def _versions(self, sampler: SamplerVLLM) -> dict[str, str]:
        share = sampler.gpu_memory_utilization
        self._say(f"memory, sampling: vLLM takes {share:g} of the device's (sampler.gpu_memory_utilization)")
        try:
            return super()._versions(sampler)
        except EngineError as error:
            self.store.blind = True
            self._say(f"what the store has is not known: it goes by vLLM's version, which is not here. {error}")
            return {}

    def _open(self) -> tuple[Policy, Model, Weights]:
        model = self.cfg.model
        if isinstance(model, ModelLab):
            path, how = str(lab_folder(model.seed, self.cfg.paths.models)), {}
        else:
            path = _snapshot(model.path, model.revision)
            how = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        key = f"model {path} {how}"
        if key not in self.shared:
            self.shared[key] = Outline(path, **how)
            self.shared[f"digest {key}"] = self._digest_of(self.shared[key])
        policy, digest = self.shared[key], self.shared[f"digest {key}"]
        if policy.tokenizer is None:
            self._say(f"no tokenizer in {path}: a token counts {CHARACTERS} characters")
        if digest is None:
            self.store.blind = True
            self._say(
                "what the store has is not known: it is looked up by the base's weights, which are not here, or large"
            )
        base = Model(policy.folder, digest or f"{PLANNED}{key}")
        return policy, base, policy.weights()

    def _find_teacher(self) -> Model | None:
        teacher: Any = self.cfg.teacher
        revision: str | None = None
        self.teaches: Shape | None = None
        if isinstance(teacher, TeacherLab):
            path = str(lab_folder(teacher.seed, self.cfg.paths.models))
        elif isinstance(teacher, TeacherHF):
            path, revision = _snapshot(teacher.path, teacher.revision), teacher.revision
        else:
            return None
        trust = isinstance(teacher, TeacherHF) and teacher.trust_remote_code
        outline = self.teaching = Outline(path, revision, trust, key="teacher.path")
        self.teaches, files = outline.shape, list(outline.folder.glob("*.safetensors"))
        if not files or sum(f.stat().st_size for f in files) > LOOK_UP_TO:
            self.store.blind = True
            self._say("what the store has is not known: it goes by the teacher's weights, which are not here, or large")
            return Model(outline.folder, f"{PLANNED}{path}")
        return super()._find_teacher()

    def _teacher_reader(self, teacher: Model) -> Policy:
        return self.teaching

    def _digest_of(self, policy: Outline) -> str | None:
        """Of a base whose files are here and are read in a moment; else None."""
        folder = policy.folder
        files = list(folder.glob("*.safetensors")) if folder != Path() else []
        if not files or sum(f.stat().st_size for f in files) > LOOK_UP_TO:
            return None
        self.extras = stages._extras_digest(folder)
        there, names = Checkpoint(folder), policy.weights().keys()
        return self._digest({name: there[name] for name in names}) if set(names) <= set(there) else None

    def _say(self, text: str) -> None:
        if text not in self.about:
            self.about.append(text)

    # the stages, told which round it is and what they read

    def solve(self, model: Model, number: int) -> Artifact:
        self.number, self.asked = number, ()
        made = super().solve(model, number)
        if not self.cfg.sampler.hints or made.folder.parent != self.store.scratch:
            return made
        model, problems = self.teacher or model, self.train_problems(number)  # at most, all of them want hints
        first = self.sample(model, number, problems)
        return self.verify(first, number, self.sample(model, number, problems, hints=True))

    def sample(self, model: Model, number: int, problems: Sequence[Problem], hints: bool = False) -> Artifact:
        self.asked, self.hinted, self.solver = problems, hints, self.teaches if model is self.teacher else None
        return super().sample(model, number, problems, hints)

    def verify(self, completions: Artifact, number: int, hinted: Artifact | None = None) -> Artifact:
        made = super().verify(completions, number, hinted)
        if made.folder.parent == self.store.scratch and not list(made.folder.iterdir()):
            kept = min(self.cfg.sampler.n, self.cfg.task.max_solutions or self.cfg.sampler.n)
            rows = [
                {"id": p.id, "prompt": p.train_prompt if learned else p.prompt, "completion": f"{PLANNED}{made.key}{i}",
                 "verdict": True}
                for learned in (True, False) for p in self.train_problems(number) for i in range(kept)
            ]  # fmt: skip
            half = len(rows) // 2
            stages.write_lines(made.folder / "examples.jsonl", rows[:half])
            stages.write_lines(made.folder / "samples.jsonl", rows[half:])
        return made

    def fit(self, examples: Sequence[Mapping[str, str]], now: Round) -> tuple[Model, Artifact]:
        self.examples = [*examples, *self._replayed(len(examples), now.number)]
        return super().fit(examples, now)

    def solutions_ood(self) -> Artifact:
        made = super().solutions_ood()
        if made.folder.parent == self.store.scratch:
            rows = [{"id": p.id, "prompt": p.prompt, "completion": f"{PLANNED}{made.key}"}
                    for _, ps in self._ood_items(self.cfg.analysis.examples) for p in ps]  # fmt: skip
            stages.write_lines(made.folder / "examples.jsonl", rows[: self.cfg.analysis.examples])
        return made

    def importance(self, solutions: Sequence[Mapping[str, str]], name: str = "importance") -> Artifact:
        self.read = stages.spread(solutions, self.cfg.analysis.examples)
        return super().importance(solutions, name)

    # what they cost

    def cost(self, stage: str) -> Cost:
        cfg, spec = self.cfg, self.cfg.analysis
        if stage == "verify":
            return Cost(samples=len(self.train_problems(self.number)) * cfg.sampler.n)
        if stage == "sample":  # nothing is asked where a file has the solutions
            count = cfg.sampler.hints if self.hinted else cfg.sampler.n
            prompts = [p.hint_prompt if self.hinted else p.prompt for p in self.asked]
            return self.generate(prompts, count, shape=self.solver) if prompts else Cost()
        if stage == "held_out":
            return self.generate([p.asked for p in self.validation[: cfg.suite.pass_k_n]], cfg.sampler.n)
        if stage == "solutions_ood":
            return sum((self.generate([p.prompt for p in ps]) for _, ps in self._ood_items(spec.examples)), Cost())
        if stage == "evaluate":
            return self._greedy(self.exams)
        if stage == "search":
            once = self._greedy([e for e in self.exams if e.label.startswith("val/")])
            return sum([once] * len(set(self._merge_config().policy.search)), Cost())
        if stage == "probe":
            own, away = self.validation[: cfg.suite.pass_k_n], [p for _, ps in self._ood_items(spec.kl_n) for p in ps]
            read = [(p.asked, p.gold) for p in (*own, *away)]
            base = [] if self.based else [(p.asked, p.gold) for p in away]  # once in a run
            self.based = True
            practised = self.train_problems(max(self.number, 1))[: spec.train_n]
            return self.reading([*read, *base]) + self._greedy([Exam("train", self.task, practised)])
        if stage == "fit":
            return self.training(self.examples)
        if stage == "importance":
            return self._importance()
        return Cost()  # merge, update, analyze: elementwise

    def _greedy(self, exams: Sequence[Exam]) -> Cost:
        new = self._answer()["max_new_tokens"]
        return sum((self.generate([p.asked for p in e.problems], new=new) for e in exams if e.problems), Cost())

    def generate(
        self, prompts: Sequence[str], samples: int = 1, new: int | None = None, shape: Shape | None = None
    ) -> Cost:
        """Of so many completions of each prompt, all of full length: `new` tokens, or as many as a sample may have. By
        the model, or by one of another shape."""
        new = int(self.cfg.sampler.max_new_tokens) if new is None else new
        shape = shape or self.policy.shape
        ids = [self.policy.encode_prompt(p) for p in prompts]
        lengths = np.array([len(i) for i in ids], float)
        shared = _shared(ids)
        tokens = shared + float((lengths - shared).sum())
        pairs = _pairs(shared) + float((_pairs(lengths) - _pairs(shared)).sum())
        # the first new token comes with the prompt; the others are fed one by one, each seeing all before it
        later = samples * (new - 1) * len(ids)
        pairs += samples * float((_pairs(lengths + new - 1) - _pairs(lengths)).sum())
        flops = shape.forward(tokens + later, pairs, len(ids) + later)
        return Cost(samples * len(ids), int(tokens), samples * new * len(ids), 0, flops)

    def reading(self, texts: Sequence[tuple[str, str]]) -> Cost:
        """Of one forward pass over prompts with their completions."""
        prompt, completion = self._lengths(texts)
        flops = self.policy.shape.forward(
            float((prompt + completion).sum()), float(_pairs(prompt + completion).sum()), float(completion.sum())
        )
        return Cost(len(texts), int(prompt.sum() + completion.sum()), 0, 0, flops)

    def training(self, examples: Sequence[Mapping[str, Any]]) -> Cost:
        """Of a fit on so many examples, all as long as they may be."""
        sft, trainer = self.cfg.sft, self.cfg.trainer
        prompt, completion = self._lengths([(e["prompt"], e["completion"]) for e in examples])
        room = sft.max_length - prompt
        planned = np.array([e["completion"].startswith(PLANNED) for e in examples])
        fits = (room > 0) & (planned | (completion <= room)) if sft.too_long == "drop" else room == room
        prompt, completion = prompt[fits], np.minimum(completion, np.maximum(room, 0))[fits]
        once = self.policy.shape.forward(
            float((prompt + completion).sum()), float(_pairs(prompt + completion).sum()), float(completion.sum())
        )
        batches = math.ceil(len(prompt) / sft.batch_size)
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * sft.epochs
        times = 2 if self.cfg.model.lora.rank else 3  # frozen weights get no gradient of their own
        times += bool(sft.kl_to_base)  # the base reads along
        flops = sft.epochs * times * once
        if sft.patience is not None:  # the validation problems after each epoch
            flops += sft.epochs * self._greedy([Exam("val", self.task, self.validation)]).flops
        read, learned = int(prompt.sum()), int(completion.sum())
        return Cost(len(prompt), read * sft.epochs, learned * sft.epochs, steps, flops)

    def _importance(self) -> Cost:
        wanted, layers = set(self.cfg.analysis.importance), self.policy.shape.layers
        texts = [(e["prompt"], e["completion"]) for e in self.read]
        once = self.reading(texts)
        passes = 3 * ("taylor" in wanted) + bool(wanted - {"taylor"}) + (layers / 2 if "skip" in wanted else 0)
        return dataclasses.replace(once, flops=once.flops * passes)

    def _lengths(self, texts: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of prompts and completions; of a planned completion, as many as there may be."""
        new, length_of = self.cfg.sampler.max_new_tokens, self.policy.length_of
        prompt = [len(self.policy.encode_prompt(p)) for p, _ in texts]
        completion = [new if c.startswith(PLANNED) else length_of(c) for _, c in texts]
        return np.array(prompt, float), np.array(completion, float)

    # what they need

    def memory(self) -> dict[str, dict[str, int]]:
        """{what: {part: bytes}}: of sampling and fine-tuning on the device, and of weights kept beside it."""
        cfg, shape = self.cfg, self.policy.shape
        first = self.train_problems(1)
        exams = [p.asked for e in self.exams for p in e.problems]
        longest = max(len(self.policy.encode_prompt(p)) for p in (*exams, *(p.prompt for p in first)))
        new = max(cfg.sampler.max_new_tokens, self._answer()["max_new_tokens"])
        n, strategy = self.devices, cfg.trainer.strategy
        rows = min(cfg.sampler.batch_size, -(-max(len(first) * cfg.sampler.n, len(exams)) // n))
        sampling = sampling_memory(shape, rows, longest + new, self.dtype, nucleus=cfg.sampler.top_p < 1)
        prompt = max(len(self.policy.encode_prompt(p.train_prompt)) for p in first)
        width = min(cfg.sft.max_length, prompt + cfg.sampler.max_new_tokens)
        trained = shape.weights if cfg.model.lora.rank is None else adapter_weights(self.policy.model, cfg.model.lora)
        rows = -(-min(cfg.sft.batch_size, len(first) * cfg.sampler.n) // n)
        fitting = fit_memory(
            shape, rows, width, cfg.sampler.max_new_tokens, self.precision, trained, cfg.trainer.gradient_checkpointing,
            compared=bool(cfg.sft.kl_to_base), whole=strategy == "fsdp",
        )  # fmt: skip
        if cfg.sft.kl_to_base or cfg.sft.l2_to_base:
            fitting["base"] = 4 * shape.weights
        out = {"fine-tuning": fitting} if self.engine else {"sampling": sampling, "fine-tuning": fitting}
        if n > 1:
            each = f"on each of {n} devices"
            fitting = spread(fitting, shape, n) if strategy == "fsdp" else fitting
            out = {f"sampling {each}": sampling_copy_alone(sampling), f"fine-tuning {each} ({strategy})": fitting}
        models = {"base": 4 * shape.weights, "a model that is read": 4 * shape.weights}
        if getattr(cfg.merge, "anchor", "base") != "base":
            models["anchor"] = 4 * shape.weights * (cfg.rounds + 1 if cfg.merge.anchor == "mean" else 1)
        if cfg.analysis.kl_n:
            tokens = sum(self.policy.length_of(p.gold) for _, ps in self._ood_items(cfg.analysis.kl_n) for p in ps)
            models["base's predictions"] = 4 * min(stages.KEPT_NUMBERS, tokens * shape.vocab)
        if n > 1:  # each reads the whole model, before it is moved to its device or spread
            models[f"{n} processes that read it"] = n * 4 * shape.weights
        out["kept on the CPU"] = models
        return out


class _Remembering:
    """A task whose problems are drawn once, for all jobs of a sweep; problems without text where there are no data."""

    def __init__(self, task: Task, name: str, say: Callable[[str], None]) -> None:
        self.task, self.drawn, self.said = task, dict[Any, list[Problem]](), say
        self.unseen = Unseen(name)

    def problems(self, split: Split, n: int, *seed: object) -> list[Problem]:
        key = (split, n, *seed)
        if key not in self.drawn:
            try:
                self.drawn[key] = self.task.problems(split, n, *seed)
            except NoData as error:
                self.said(f"prompts of {self.unseen.name} are counted as empty: {str(error).partition(';')[0]}")
                self.task = self.unseen
                self.drawn[key] = self.unseen.problems(split, n, *seed)
        return self.drawn[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


class _Record(loop.RunRecord):
    """The record of a run that does not happen: asks for the same stages, and writes nothing."""

    def attempt(self, what: str, make: Any) -> Any:
        return make()

    def measure_importance(self, bench: Bench, samples: Artifact) -> None:
        spec, rows = self.cfg.analysis, [f"layer_{i:02d}" for i in range(bench.policy.model.config.num_hidden_layers)]
        wanted = {"importance": lambda: loop.solved(bench.by_base(samples))} if spec.importance else {}
        if spec.importance and spec.ood:
            wanted["importance_ood"] = lambda: list(stages.read_lines(bench.solutions_ood().folder / "examples.jsonl"))
        for name, of in wanted.items():
            if name not in self.importance and (solutions := of()):
                file = bench.importance(solutions, name).folder / f"{name}.json"
                unknown = {"estimators": {e: {row: {"mean": 0.0} for row in rows} for e in spec.importance}}
                self.importance[name] = json.loads(file.read_text()) if file.is_file() else unknown

    def write(self, bench: Bench, number: int, *, merged: Merged, **_: Any) -> None:
        held_out = bench.held_out_samples(merged.model, number) if self.cfg.suite.pass_k_n else None
        bench.probe(merged.model, number, held_out)
        self.rounds.append({"val/id/acc": 0.5})

    def look_at_verdicts(self, samples: Artifact, number: int) -> None: ...

    def summary(self, bench: Bench, seconds: float) -> dict[str, Any]:
        return {"memory": bench.memory(), "size": bench.size} if isinstance(bench, Sketch) else {}


# --- memory ----------------------------------------------------------------------------------------------------------


def sampling_memory(shape: Shape, rows: int, positions: int, dtype: str, *, nucleus: bool) -> dict[str, int]:
    """Bytes by part, roughly, of `rows` texts written at once, of up to `positions` tokens each."""
    size = 2 if dtype == "bfloat16" else 4
    draw = 4 + 4 + 8 + 8 + (32 if nucleus else 0)  # scores, their softmax, the same in float64, its sums, and sorted
    copied = 2 * shape.weights if size == 2 else 0
    cache, scores = rows * positions * shape.layers * 2 * shape.kv * size, rows * shape.vocab * (size + draw)
    return {
        "weights": 4 * shape.weights, "copy that samples": copied, "KV cache": cache, "logits and draws": scores,
        "making the copy, in float32, beyond that": max(0, copied - cache - scores),
    }  # fmt: skip


def fit_memory(
    shape: Shape, rows: int, width: int, predicted: int, precision: str, trained: int, checkpointing: bool = False,
    *, compared: bool = False, whole: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Bytes by part, roughly, of a step on `rows` texts of `width` tokens, `predicted` of which get logits; `trained`
    weights have gradients and Adam's two moments.

    A block of Llama's kind keeps for the backward pass, of a token: its two norms' inputs and outputs in float32, and
    what its products and the attention read, in their precision (a float32 input is cast once for each product).
    Under `checkpointing` all blocks but one keep their inputs alone. Of many logits, `packing.LOGITS` are in memory at
    once, where the head is plain, as it mostly is; all of them where they are wanted `whole`, and as many again where
    they are `compared` to the base's.
    """
    size = 4 if precision == "32-true" else 2
    inputs = 2 if size == 4 else 5
    block = 16 * shape.hidden + size * (inputs * shape.hidden + 2 * shape.width + 2 * shape.kv + 4 * shape.ffn)
    kept = block + (shape.layers - 1) * 4 * shape.hidden if checkpointing else shape.layers * block
    logits = rows * min(predicted, width) * shape.vocab
    logits = 2 * logits if compared else logits if whole else min(logits, LOGITS)
    return {
        "weights": 4 * shape.weights, "gradients": 4 * trained, "Adam's moments": 8 * trained,
        "weights as products take them": 2 * (shape.body + shape.head) if size == 2 else 0,
        "activations": rows * width * kept,
        "logits": logits * (size + 8),  # float32 and their gradient
    }  # fmt: skip


def sampling_copy_alone(parts: Mapping[str, int]) -> dict[str, int]:
    """`sampling_memory` where the float32 weights stay on the CPU, as in a group's processes."""
    copied = parts["copy that samples"]
    return {
        "weights": copied or parts["weights"], "KV cache": parts["KV cache"],
        "logits and draws": parts["logits and draws"],
    }  # fmt: skip


def spread(parts: Mapping[str, int], shape: Shape, n: int) -> dict[str, int]:
    """`fit_memory` where weights, gradients and moments are spread over `n` devices (FSDP2). At a time a device has two
    blocks of the others' weights and the gradients of one, and those outside of the blocks."""
    kept = {"weights", "gradients", "Adam's moments"}
    block, rest = shape.body // shape.layers, shape.weights - shape.body
    shared = {name: -(-size // n) if name in kept else size for name, size in parts.items()}
    return {**shared, "gathered from the others": 4 * (3 * block + 2 * rest)}


def adapter_weights(model: Any, lora: Any) -> int:
    """Weights of the adapters of `model.lora`: rank x (in + out) a module."""
    head, total = model.get_output_embeddings(), 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        if lora.targets == "all-linear" or name.rpartition(".")[2] in lora.targets:
            total += lora.rank * (module.in_features + module.out_features)
    return total


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(cfgs: Sequence[Root], workers: int = 1) -> Plan:
    """The plan of a run, or of a sweep's jobs. Raises what the checks of a run raise before its first stage, and
    PolicyError where the model's config.json cannot be had."""
    seen: dict[str, Item] = {}
    shared: dict[str, Any] = {}
    about: list[str] = []
    memory: dict[str, dict[str, int]] = {}
    sizes: list[tuple[Root, int]] = []
    calls = 0
    with tempfile.TemporaryDirectory() as made, progress("planning jobs", len(cfgs)) as tick:
        scratch = Path(made)
        for number, cfg in enumerate(cfgs):
            tick(1)
            if isinstance(cfg.program, ProgramPretrainLab):
                item, shape = pretraining(cfg)
                seen[f"pretrain {cfg.model.seed} {number}"] = item
                memory["fine-tuning"] = fit_memory(shape, cfg.program.batch_size, 256, 256, "32-true", shape.weights)
                calls += 1
                continue
            cfg = copy.deepcopy(cfg)
            cfg.store.check_space = False  # the plan says what there must be
            mine = {} if isinstance(cfg.store, StoreNone) else seen
            ledgers: list[Ledger] = []

            def ledger(root: Path, environment: Mapping[str, Any], mine: Any = mine, ledgers: Any = ledgers) -> Ledger:
                ledgers.append(Ledger(root, environment, scratch=scratch, seen=mine))
                return ledgers[-1]

            def sketch(cfg: Root, store: Any, work: Path) -> Sketch:
                return Sketch(cfg, store, work, shared=shared, about=about)

            parts = loop.Parts(ledger, sketch, _Record)
            said = loop.run(cfg, _work(scratch, number), NullTracker(), parts)
            calls += len(ledgers[0].keys)
            if mine is not seen:
                seen |= {f"{number} {key}": item for key, item in mine.items()}
            for what, amounts in said["memory"].items():
                if sum(amounts.values()) > sum(memory.get(what, {}).values()):
                    memory[what] = amounts
            sizes.append((cfg, said["size"]))
    store, folders = need(sizes, min(workers, len(sizes))) if sizes else (0, 0)
    return Plan(len(cfgs), list(seen.values()), calls, memory, store, folders, [*_model_said(shared, sizes), *about])


def _work(scratch: Path, number: int) -> Path:
    folder = scratch / f"run-{number}"
    folder.mkdir()
    return folder


def _model_said(shared: Mapping[str, Any], sizes: Sequence[tuple[Root, int]]) -> list[str]:
    shapes = {policy.shape: policy for policy in shared.values() if isinstance(policy, Outline)}
    said = []
    for s, policy in shapes.items():
        tied = "tied" if s.weights == s.body + s.head else "not tied"
        said.append(
            f"model: {type(policy.model).__name__}, {s.weights:,} weights ({s.body:,} in the blocks, head of {s.vocab} "
            f"x {s.hidden} {tied}), {s.layers} layers, context {policy.context}"
        )
    keeps = sorted({keep_of(cfg, size) for cfg, size in sizes})
    return [*said, f"store.keep: {', '.join(keeps)}"] if keeps else said


def pretraining(cfg: Root) -> tuple[Item, Shape]:
    """Of experiment=pretrain_lab: the texts of its phases, each of at most 256 tokens."""
    program = cfg.program
    with torch.device("meta"):
        fresh = pretrain.model(
            program.width, program.layers, program.heads, program.kv_heads, program.ffn, len(pretrain.tokenizer()), 0
        )
    shape = shape_of(fresh)
    recipe = {"phases": {name: vars(phase) for name, phase in program.phases.items()}}
    spec = FitSpec(
        epochs=1, lr=1.0, batch_size=program.batch_size, schedule="cosine", warmup_ratio=0.0, weight_decay=0.0,
        betas=(0.9, 0.98), max_length=256, accelerator="cpu", devices=1, precision="32-true",
        accumulate_grad_batches=1, gradient_clip_val=1.0, deterministic=False,
    )  # fmt: skip
    texts = sum(phase.examples for phase in program.phases.values())
    flops = 3 * shape.forward(texts * 256, texts * _pairs(256), texts * 256)
    return Item(0, "pretrain", Cost(texts, 0, texts * 256, pretrain.steps(recipe, spec), flops), None), shape


def _pairs(length: Any) -> Any:
    """Of a text's tokens, each with itself and those before it."""
    return length * (length + 1) / 2


def _shared(ids: Sequence[np.ndarray]) -> int:
    """Tokens that all prompts begin with, where `decoding` computes them once."""
    if len(ids) < 2:
        return 0
    most = min(len(i) for i in ids) - 1
    same = np.ones(max(most, 0), bool)
    for row in ids[1:]:
        same &= ids[0][: len(same)] == row[: len(same)]
    length = len(same) if same.all() else int(same.argmin())
    return length if length >= SHARED_FROM else 0


def _snapshot(path: str, revision: str | None) -> str:
    """The folder of a hub's repository that is on this disk already; `path` itself where there is none."""
    if Path(path).expanduser().is_dir() or path.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, revision=revision, local_files_only=True)
    except Exception:  # not here, whatever the reason: the config alone is asked for
        return path


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


# --- as text ---------------------------------------------------------------------------------------------------------


def show(made: Plan) -> None:
    """The plan on the console."""
    alone = made.jobs == 1
    table = Table(title=_title(made), title_justify="left", padding=(0, 0))
    figures = ("samples", "prompt tokens", "new tokens <=", "steps", "FLOPs")
    for column in ("round" if alone else "stages", "stage", *figures, "in the store"):
        table.add_column(column, justify="left" if column in ("stage", "in the store") else "right")
    for first, name, cost, stored in _rows(made.items, alone):
        table.add_row(first, name, *_figures(cost), stored)
    table.add_section()
    table.add_row("", "to do", *_figures(made.total()), "")
    if any(item.stored for item in made.items):
        table.add_row("", "in all", *_figures(made.total(stored=True)), "")
    out = console if console.is_terminal else Console(width=120)
    out.print(table)
    for text in _needs(made):
        out.print(text, soft_wrap=True, highlight=False, markup=False)


def _title(made: Plan) -> str:
    stored = [item.stored for item in made.items]
    there = "" if None in stored else f", {stored.count(True)} of them in the store"
    if made.jobs == 1:
        return f"plan of a run: {len(made.items)} stages{there}"
    return f"plan of {made.jobs} jobs: {len(made.items)} stages ({made.calls} were none shared){there}"


def _rows(items: Sequence[Item], alone: bool) -> list[tuple[str, str, Cost, str]]:
    """A line a stage of a run, by round; of a sweep, a line a kind of stage."""
    said = {True: "yes", False: "", None: "?"}
    if alone:
        return [(str(i.round), i.stage, i.cost, said[i.stored]) for i in sorted(items, key=lambda i: i.round)]
    rows = []
    for name in dict.fromkeys(item.stage for item in items):
        mine = [item for item in items if item.stage == name]
        cost = sum((item.cost for item in mine), Cost())
        there = sum(bool(item.stored) for item in mine)
        rows.append((str(len(mine)), name, cost, "?" if mine[0].stored is None else str(there or "")))
    return rows


def _figures(cost: Cost) -> list[str]:
    counts = [f"{n:,}" if n else "" for n in (cost.samples, cost.prompt_tokens)]
    counts += [f"{cost.new_tokens:,}" if cost.new_tokens else "", f"{cost.steps:,}" if cost.steps else ""]
    return [*counts, f"{cost.flops:.2e}" if cost.flops else ""]


def _needs(made: Plan) -> list[str]:
    said = []
    for what, parts in made.memory.items():
        amounts = ", ".join(f"{part} {size_said(size)}" for part, size in parts.items() if size)
        said.append(f"memory, {what}: about {size_said(sum(parts.values()))} ({amounts})")
    if made.store or made.folders:
        said.append(
            f"disk: weights of at most {size_said(made.store)} in the store; in run folders {size_said(made.folders)} "
            "more where they are on another disk"
        )
    said += made.about
    said.append(
        "upper bounds: every sample as long as it may be, every sample correct. FLOPs: forward 2 x weights a token and "
        "4 x layers x width a pair of tokens, training 3 x that. Memory of analyses is not counted; nor is time"
    )
    return said

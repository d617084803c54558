"""Supervised fine-tuning of the policy on its own verified solutions, with PyTorch Lightning: one fit a round.

Loss on the completion only. Labels are built from lengths and never from `ids != pad`, since pad may be eos and the
model must learn to stop. Optimizer and schedule are fresh each fit.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, Dataset
from transformers import DynamicCache

from .packing import IGNORED, LOGITS, ChunkedLoss, Piece, can_pack, common, pack, packing, plain_head
from .policy import SHARED_FROM, Policy, keeps_every_key
from .tasks import derive_seed
from .weights import Weights

PIECE = 64  # tokens that cost as much as one more piece does


class SftError(RuntimeError):
    """A fit that cannot go on."""


@dataclass(frozen=True)
class LoraSpec:
    """Adapters of peft: rank, scale alpha / rank, dropout, and the modules that get one."""

    rank: int
    alpha: float
    dropout: float
    targets: str | Sequence[str]


@dataclass(frozen=True)
class FitSpec:
    """One fit. `lr` is the peak of a schedule that warms up over `warmup_ratio` of the steps."""

    epochs: int
    lr: float
    batch_size: int
    schedule: str  # constant | linear | cosine
    warmup_ratio: float
    weight_decay: float
    betas: tuple[float, float]
    max_length: int
    accelerator: str
    devices: int
    precision: str
    accumulate_grad_batches: int
    gradient_clip_val: float
    deterministic: bool
    gradient_checkpointing: bool = False  # activations of a block are computed again when they are needed
    lora: LoraSpec | None = None  # train adapters, folded into the weights at the end
    l2_to_base: float = 0.0  # times half the squared distance of the weights from the base
    kl_to_base: float = 0.0  # times KL(tuned || base), nats a completion token
    patience: int | None = None  # epochs without a better score; the best epoch's weights are kept
    strategy: str = "single"  # single | ddp | fsdp: how `devices` processes share a fit (`devices.Group`)


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the completion to learn (its eos included)."""

    prompt: Sequence[int]
    completion: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Fitted:
    """What a fit was like, a number an epoch: mean loss (nats a completion token, without what pulls to the base), mean
    KL(tuned || base) where that is in the loss, score where there is one; and the epoch whose weights were kept."""

    losses: list[float]
    kl: list[float]
    scores: list[float]
    epoch: int


class Examples(Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, each (batch, longest), padded on the right."""
    width = max(map(len, examples))
    ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, e in enumerate(examples):
        start, end = len(e.prompt), len(e)
        ids[row, :end] = torch.tensor([*e.prompt, *e.completion])
        mask[row, :end] = 1
        labels[row, start:end] = ids[row, start:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch_of(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """`pieces` of like length, each as `collate` makes it, and `tokens`: the predicted ones of all of them, by which
    the sum of their losses is divided."""
    pieces = [collate(rows, pad_id) for rows in cut(examples)]
    return {"pieces": pieces, "tokens": sum(int((p["labels"][:, 1:] != IGNORED).sum()) for p in pieces)}


def cut(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples in pieces, shortest first, such that their tokens with padding, and PIECE for each piece, are
    fewest."""
    rows = sorted(examples, key=len)
    best = {0: (0, 0)}  # {end: (cost up to there, where the last piece begins)}
    for end in range(1, len(rows) + 1):
        if end == len(rows) or len(rows[end - 1]) < len(rows[end]):
            width = len(rows[end - 1])
            best[end] = min((cost + (end - at) * width + PIECE, at) for at, (cost, _) in best.items())
    pieces, end = [], len(rows)
    while end:
        begin = best[end][1]
        pieces.append(rows[begin:end])
        end = begin
    return pieces[::-1]


def part_of(examples: Sequence[Example], rank: int, n: int, pad_id: int, uncut: bool = False) -> dict[str, Any]:
    """As `batch_of`, of the examples of a batch that process `rank` of `n` has, in one piece where `uncut`; `tokens`
    are those of the whole batch. Lengths are dealt out evenly. A process that gets nothing has an example that counts
    nothing, so that it takes part in what all processes do together."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    dealt = [examples[i] for i in sorted(order[rank::n])]
    tokens = sum(len(e.completion) - (not e.prompt) for e in examples)  # nothing comes before a first token
    mine = dealt or examples[:1]
    batch = {"pieces": [collate(mine, pad_id)]} if uncut else batch_of(mine, pad_id)
    return {**batch, "tokens": tokens if dealt else math.inf}


class LanguageModel(pl.LightningModule):
    """The LM for fine-tuning: mean cross-entropy a completion token (nats), AdamW, warm-up and schedule by step.

    Where several processes share a fit, `losses` and `kl` are what each adds to the mean over the tokens of all; their
    gradients, which the strategy averages, count as many times as there are processes.
    """

    def __init__(
        self, model: Any, spec: FitSpec, steps: int, base: Any = None, packed: bool = False, chunked: bool = False
    ) -> None:
        """`packed` where `can_pack` says so, `chunked` where there is a `plain_head`."""
        super().__init__()
        self.model, self.spec, self.steps, self.packed, self.chunked = model, spec, steps, packed, chunked
        self.base = (base,)  # in a tuple: no part of this module, which is moved, trained and counted
        self.losses: list[float] = []
        self.kl: list[float] = []

    def on_fit_start(self) -> None:
        self.model.train()  # from_pretrained returns eval mode, and Lightning keeps what it finds

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean loss of a batch as `batch_of` makes it."""
        pieces, tokens, base = batch["pieces"], batch["tokens"], self.base[0]
        loss, kl = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        head = self.model.get_output_embeddings()
        if self.chunked and base is None and tokens * len(head.weight) > LOGITS:
            for hidden, targets in predictions(self.model, pieces, self.packed, hidden=True):
                here = targets != IGNORED
                loss = loss + ChunkedLoss.apply(hidden[here], head.weight, targets[here]) / tokens
        else:
            with torch.no_grad():
                before = [logits for logits, _ in predictions(base, pieces, self.packed)] if base else []
            apart = self.spec.strategy == "fsdp"  # its processes are to call the model as often as one another
            for i, (logits, targets) in enumerate(predictions(self.model, pieces, self.packed, apart=apart)):
                loss = loss + token_loss(logits, targets, "sum") / tokens
                if base:
                    kl = kl + token_divergence(logits, before[i], targets, "sum") / tokens
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SftError(
                f"the loss is {value} in epoch {self.current_epoch + 1}, batch {batch_idx + 1}; "
                "lower sft.lr, or set trainer.gradient_clip_val"
            )
        self.losses.append(value)
        if base:
            self.kl.append(float(kl.detach()))
            loss = loss + self.spec.kl_to_base * kl
        return loss * self.spec.devices

    def configure_model(self) -> None:
        if self.spec.strategy == "fsdp" and not isinstance(self.model, FSDPModule):  # it may be asked for twice
            from .analysis.importance import find_blocks

            mesh = self.device_mesh
            assert mesh is not None
            for block in find_blocks(self.model):
                fully_shard(block, mesh=mesh["data_parallel"])
            fully_shard(self.model, mesh=mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        spec = self.spec
        optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay,
            fused=spec.precision != "16-mixed",  # Lightning cannot clip gradients that a fused optimizer unscales
        )  # fmt: skip
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.steps, spec))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.spec.precision == "16-mixed":
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if gradient_clip_val:  # Lightning refuses under bf16-mixed, for a scaler that is not there
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)
        return None


def completion_loss(model: Any, piece: Piece) -> Tensor:
    """Mean cross-entropy (nats) over the labelled tokens."""
    return token_loss(*completion_logits(model, piece))


def token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Mean or sum of the cross-entropy (nats) of logits (..., vocabulary) over the targets (...) that are not
    ignored."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def token_divergence(logits: Tensor, base: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Mean or sum of KL(model || base) (nats) over the positions whose target is not ignored; shapes as in
    `token_loss`."""
    here = targets != IGNORED
    mine, theirs = (torch.log_softmax(x[here].float(), -1) for x in (logits, base))
    of = (mine.exp() * (mine - theirs)).sum(-1)
    return of.mean() if reduction == "mean" else of.sum()


def predictions(
    model: Any, pieces: Sequence[Piece], packed: bool, *, hidden: bool = False, apart: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (..., vocabulary), or the `hidden` states before them, where completion tokens are predicted, and these
    tokens (...): of all pieces at once where the model is `packed`, else piece by piece (`apart`: as in
    `completion_logits`)."""
    if not packed:
        yield from (completion_logits(model, piece, hidden=hidden, apart=apart) for piece in pieces)
        return
    shared = 0 if model.training and has_dropout(model) else common(pieces)  # dropout draws for each row
    inputs, where, targets = pack(pieces, shared)
    if hidden:
        yield model.base_model(**inputs).last_hidden_state[0, where], targets
    else:
        yield model(**inputs, logits_to_keep=where).logits[0], targets


def completion_logits(model: Any, batch: Piece, *, hidden: bool = False, apart: bool = False) -> tuple[Tensor, Tensor]:
    """Logits (rows, columns, vocabulary), or the `hidden` states before them, where labelled tokens are predicted, and
    these tokens (rows, columns).

    Logits are made for their columns alone, and what all rows begin with is computed once, unless rows are to stay
    `apart`; neither changes them or their gradient, rounding apart.
    """
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    columns = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]  # a column's logits predict the next one
    takes_columns = "logits_to_keep" in inspect.signature(model.forward).parameters
    shared, cache = 0 if apart else shared_columns(model, ids, int(columns[0])), None
    if shared:
        cache = DynamicCache(config=model.config)
        last = {"logits_to_keep": 1} if takes_columns else {}
        model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True, **last)
        if cache.get_seq_length() != shared:  # a model that keeps its past elsewhere
            shared, cache = 0, None
    if cache is not None:
        cache.batch_repeat_interleave(len(ids))
    inputs = {"input_ids": ids[:, shared:], "attention_mask": mask, "past_key_values": cache, "use_cache": bool(shared)}
    if hidden:
        logits = model.base_model(**inputs).last_hidden_state[:, columns - shared]
    elif takes_columns:
        logits = model(**inputs, logits_to_keep=columns - shared).logits
    else:
        logits = model(**inputs).logits[:, columns - shared]
    return logits, labels[:, columns + 1]


def shared_columns(model: Any, ids: Tensor, most: int) -> int:
    """How many of the first `most` columns all rows share, to compute them once; 0 where that does not pay, or where
    rows would not be independent any more: dropout draws for each row."""
    same = (ids[:, :most] == ids[:1, :most]).all(0)
    length = most if bool(same.all()) else int(same.long().argmin())
    if len(ids) < 2 or length < SHARED_FROM or not keeps_every_key(model):
        return 0
    if model.training and (has_dropout(model) or any(getattr(m, "gradient_checkpointing", 0) for m in model.modules())):
        return 0  # checkpointed blocks keep no past
    return length


def has_dropout(model: Any) -> bool:
    """Whether training draws anything at random: a dropout module, or a rate in the config (OPT's are functions)."""
    rates = [v for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, int | float)]
    return any(rates) or any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules())


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """`model` with blocks that keep their inputs alone for the backward pass, until the end."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.23
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


def lr_factor(step: int, steps: int, spec: FitSpec) -> float:
    """The share of the peak learning rate at optimizer step `step` of `steps`."""
    warmup = math.ceil(spec.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[spec.schedule]


class _Progress(pl.Callback):
    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self.on_progress = on_progress

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.on_progress(1)


class _TowardsBase(pl.Callback):
    """Adds strength (theta - theta_0) to the gradient before each step, which is that of strength/2 |theta - theta_0|^2
    (L2-SP, 1802.01483); the gradient's clipping sees it."""

    def __init__(self, model: Any, base: Weights, strength: float) -> None:
        self.strength = strength
        self.pairs = [(p, base[name]) for name, p in model.named_parameters() if p.requires_grad]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pairs = [(p, w.to(p.device, p.dtype)) for p, w in self.pairs]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        with torch.no_grad():
            for p, w in self.pairs:
                if p.grad is not None:
                    p.grad.add_(p - w, alpha=self.strength)


class _BestEpoch(pl.Callback):
    """Keeps the trained weights of the epoch with the highest score, the first of equals; ends the fit after `patience`
    epochs without a higher one."""

    def __init__(self, score: Callable[[], float], patience: int) -> None:
        self.score, self.patience = score, patience
        self.scores: list[float] = []
        self.kept: dict[str, Tensor] = {}
        self.epoch = 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.eval()
        self.scores.append(self.score())
        pl_module.train()
        if self.scores[-1] > max(self.scores[:-1], default=-math.inf):
            trained = ((n, p) for n, p in pl_module.named_parameters() if p.requires_grad)
            self.kept, self.epoch = {n: p.detach().clone() for n, p in trained}, len(self.scores)
        trainer.should_stop = len(self.scores) - self.epoch >= self.patience

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = dict(pl_module.named_parameters())
        with torch.no_grad():
            for name, tensor in self.kept.items():
                own[name].copy_(tensor)


def _adapt(model: Any, spec: LoraSpec, seed: int) -> Callable[[], None]:
    """Puts adapters into `model`, which alone are trained; what folds them into its weights again. Raises SftError for
    modules that it does not have."""
    from peft import LoraConfig, LoraModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
        alpha: Any = spec.alpha  # peft says int, and multiplies
        config = LoraConfig(r=spec.rank, lora_alpha=alpha, lora_dropout=spec.dropout, target_modules=targets)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # what is tied is refused below
                tuner: Any = LoraModel(model, config, "default")
        except ValueError as error:
            raise SftError(f"model.lora.targets: {error}") from error

    def train_all() -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)

    def fold() -> None:
        tuner.merge_and_unload()
        train_all()

    shared = model.get_input_embeddings().weight
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    if bad := [n for n, m in layers.items() if m.base_layer.weight is shared]:
        tuner.unload()
        train_all()
        raise SftError(
            f"model.lora.targets: {bad[0]} is the embeddings (or tied to them), and an adapter folded into it would "
            "change both; leave it out"
        )
    return fold


def short_enough(examples: Sequence[Example], most: int) -> list[Example]:
    """The examples of at most so many tokens. Raises SftError where there is none."""
    kept = [e for e in examples if len(e) <= most]
    if not kept:
        raise SftError(f"all {len(examples)} examples have more than {most} tokens; raise sft.max_length")
    return kept


def fit(
    policy: Policy,
    examples: Sequence[Example],
    spec: FitSpec,
    *,
    seed: int,
    rank: int = 0,
    callbacks: Sequence[pl.Callback] = (),
    scratch: Path,
    base: Weights | None = None,
    score: Callable[[], float] | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Fitted:
    """Trains the policy's weights in place; losses and what else each epoch was like.

    The order of the examples and dropout follow `seed`. `base` are the weights that l2_to_base and kl_to_base pull to,
    `score` measures the policy after an epoch for `patience`. With several devices this is process `rank` of
    `spec.devices` that do the same, and the losses are its part of those. Raises SftError when the loss is not finite
    or an example is longer than `spec.max_length` tokens, and KeyboardInterrupt when interrupted.
    """
    longest = max(map(len, examples))
    if longest > min(spec.max_length, policy.context):
        raise SftError(
            f"an example has {longest} tokens; sft.max_length is {spec.max_length} and the model's context "
            f"{policy.context}. Raise sft.max_length, lower sampler.max_new_tokens, or leave such examples out with "
            "sft.too_long=drop"
        )
    batches = math.ceil(len(examples) / spec.batch_size)
    steps = math.ceil(batches / spec.accumulate_grad_batches) * spec.epochs
    device = policy.device
    handler = signal.getsignal(signal.SIGINT)
    torch.manual_seed(derive_seed(seed, "dropout", *((rank,) if rank else ())))
    before = None
    if spec.kl_to_base:
        assert base is not None
        before = _frozen(policy.model, base)
    fold = _adapt(policy.model, spec.lora, derive_seed(seed, "adapter")) if spec.lora else lambda: None
    sample = _sample(examples[0], policy)  # read by the model as it is trained: a head may have an adapter by now
    packed, chunked = can_pack(policy.model, sample), plain_head(policy.model, sample[0]) is not None
    uncut = False
    if spec.strategy == "fsdp":  # its processes are to call the model as often as one another, and never a part of it
        chunked, uncut = False, not packed
    loader = DataLoader(
        Examples(examples),
        batch_size=spec.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(derive_seed(seed, "order")),
        collate_fn=lambda rows: part_of(rows, rank, spec.devices, policy.pad_id, uncut),
    )
    module = LanguageModel(policy.model, spec, steps, before, packed, chunked)
    own: list[pl.Callback] = [_Progress(on_progress)]
    if spec.l2_to_base:
        assert base is not None
        own.append(_TowardsBase(policy.model, base, spec.l2_to_base))
    best = None
    if spec.patience is not None:
        assert score is not None
        best = _BestEpoch(score, spec.patience)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Consider setting `persistent_workers=True`.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # one process, by design
        warnings.filterwarnings(
            "ignore", message=".*isinstance\\(treespec, LeafSpec\\).*"
        )  # Lightning 2.6 on torch 2.13
        trainer = pl.Trainer(
            max_epochs=spec.epochs,
            accelerator=spec.accelerator,
            devices=spec.devices,
            strategy=_strategy(spec),
            use_distributed_sampler=False,  # each process draws the whole order, and takes its part of each batch
            precision=spec.precision,  # pyright: ignore[reportArgumentType]  # checked by config
            accumulate_grad_batches=spec.accumulate_grad_batches,
            gradient_clip_val=spec.gradient_clip_val or None,
            deterministic=spec.deterministic,
            callbacks=[*own, *callbacks, *filter(None, (best,))],
            plugins=[LightningEnvironment()],  # our own processes: not what Lightning would make of a Slurm job's
            default_root_dir=scratch,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            with ExitStack() as stack:
                if spec.gradient_checkpointing:
                    stack.enter_context(checkpointing(policy.model))
                for model in (policy.model, before) if packed else ():
                    if model is not None:
                        stack.enter_context(packing(model))
                trainer.fit(module, loader)
        except SystemExit as stopped:  # Lightning turns Ctrl-C into SystemExit and ignores further signals
            raise KeyboardInterrupt from stopped
        finally:
            signal.signal(signal.SIGINT, handler)
            torch.use_deterministic_algorithms(False)
            fold()
            policy.model.eval()
            if spec.strategy != "fsdp":  # then its weights are spread over the processes
                policy.model.to(device)  # Lightning leaves the model on the CPU
    losses, kl = (
        [sum(e) / len(e) for at in range(spec.epochs) if (e := values[at * batches : (at + 1) * batches])]
        for values in (module.losses, module.kl)
    )
    return Fitted(losses, kl, best.scores if best else [], best.epoch if best else len(losses))


def _strategy(spec: FitSpec) -> Any:
    """Lightning's, for processes that are there already."""
    if spec.strategy == "ddp":
        return DDPStrategy(forward_sync_buffers=False, gradient_as_bucket_view=True)
    if spec.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=spec.devices, tensor_parallel_size=1)
    return "auto"


def _frozen(model: Any, weights: Weights) -> Any:
    """A copy of `model` with other weights, to compare with."""
    other = copy.deepcopy(model).eval().requires_grad_(False)
    for name, p in other.named_parameters():
        p.copy_(weights[name])
    return other


def _sample(example: Example, policy: Policy) -> list[Piece]:
    """Three short rows of one example's tokens, two of them in one piece: to see how a model reads."""
    ids = [*example.prompt, *example.completion][:48]
    ids = (ids * 24)[: max(24, len(ids))]
    head, rest = ids[:SHARED_FROM], ids[SHARED_FROM:]
    rows = [[*head, *rest[:8]], [*head, *rest[::-1]], [*head, *rest[2:]]]
    first, *others = (Example(row[:-3], row[-3:]) for row in rows)
    return [{k: v.to(policy.device) for k, v in collate(e, policy.pad_id).items()} for e in ([first], others)]

"""Merge events while training: when they are, and the Lightning callback that does them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..weights import Checkpoint, Weights
from .law import LINEAR, Merge, MergeError, Method

Every = int | Literal["last"]


def events(epochs: int, every: Every) -> list[int]:
    """The epochs (from 1) that a merge event follows: multiples of `every`, and always the last."""
    inner = [] if every == "last" else [e for e in range(1, epochs) if e % every == 0]
    return [*inner, epochs]


def effective_ratio(ratios: Sequence[float], epochs: int, at: Sequence[int]) -> float:
    """The share of a round's update that its events leave: the mean over epochs e of the product of the ratios of the
    events from e on. `ratios` are those of the events `at`."""
    total = 0.0
    for e in range(1, epochs + 1):
        share = 1.0
        for ratio, event in zip(ratios, at, strict=True):
            share *= ratio if event >= e else 1.0
        total += share
    return total / epochs


class MergeCallback(pl.Callback):
    """Blends the trained weights with an anchor after epochs, and training goes on from the blend.

    `anchor` is a model's weights by name, a Hugging Face folder (mapped, never loaded whole), or None: the weights at
    the start of the fit, copied to the CPU and saved in Lightning's checkpoints. `ratio` is the tuned model's share: a
    number, or one a tensor; `ratios` gives events of their own. `at` lists the epochs (from 1) that an event follows;
    None: every one. Unless told not to, an event clears the optimizer's moments, which describe a point that the
    weights have left; one that changes nothing (linear at ratio 1) clears nothing.

    Works with full fine-tuning and with adapters of peft: a linear event scales the adapter and blends the frozen
    weights below, which is exact; every other rule is folded into the weights below, and the adapter starts anew from
    zero. Tensors that are not trained are left as they are; tied ones are merged once; buffers never. A piece of the
    anchor at a time goes to a parameter's device. Under DDP all ranks do the same. Raises MergeError under strategies
    that shard parameters (FSDP, DeepSpeed), since a rank then holds no whole tensor.
    """

    def __init__(
        self,
        anchor: Weights | str | Path | None = None,
        ratio: float | Mapping[str, float] = 0.5,
        *,
        method: Method = LINEAR,
        at: Sequence[int] | None = None,
        ratios: Mapping[int, float | Mapping[str, float]] | None = None,
        reset_optimizer: bool = True,
        seed: int = 0,
    ) -> None:
        self.anchor: Weights | None = Checkpoint(Path(anchor)) if isinstance(anchor, str | Path) else anchor
        self.own_anchor = anchor is None
        self.ratio, self.method, self.at, self.ratios = ratio, method, at, dict(ratios or {})
        self.reset_optimizer, self.seed = reset_optimizer, seed
        self.done: list[int] = []
        self.restored = False  # from a checkpoint, with the anchor

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        shards = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
        if any(kind.__name__ in shards for kind in type(trainer.strategy).__mro__):
            raise MergeError(
                f"trainer.strategy: {type(trainer.strategy).__name__} spreads each tensor over ranks, and merge events "
                "inside a fit need whole ones; use merge.every_n_epochs=last (merged between fits), or DDP"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.own_anchor and not self.restored:
            model = _model(pl_module)
            own = _parts(model, trained=set(_adapters(model)))
            self.anchor = {n: p.detach().to("cpu", copy=True) for n, p in own.items()}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.restored = False  # another fit has another start

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.at is not None and epoch not in self.at:
            return
        ratio = self.ratios.get(epoch, self.ratio)
        if not (self.method.exact and _all_one(ratio)):
            self.merge(_model(pl_module), ratio, epoch)
            if self.reset_optimizer:
                for optimizer in trainer.optimizers:
                    optimizer.state.clear()
        self.done.append(epoch)

    @torch.no_grad()
    def merge(self, model: Any, ratio: float | Mapping[str, float], epoch: int = 0) -> None:
        """One event, in place."""
        assert self.anchor is not None
        adapters = _adapters(model)
        if adapters and self.method.exact and self.method.combine == "mean":
            self._scale(model, adapters, ratio)
            return
        for layer in adapters.values():
            layer.merge()
        try:
            self._blend(_parts(model, trained=set(adapters)), ratio, epoch)
        finally:
            for layer in adapters.values():
                _leave_merged(layer)

    def _blend(self, own: dict[str, Tensor], ratio: float | Mapping[str, float], epoch: int) -> None:
        work = Merge(self.method, _some(self.anchor or {}, own), [own], ratio, seed=self.seed + epoch)
        work.prepare()
        for name in work.names:
            target = own[name]
            flat = target.view(-1) if target.is_contiguous() else None
            whole = torch.empty(target.numel(), device=target.device) if flat is None else flat
            for begin, end, piece in work.pieces(name, whole if whole.dtype == torch.float32 else None):
                if piece.data_ptr() != whole[begin:end].data_ptr():
                    whole[begin:end].copy_(piece)
            if flat is None:
                target.copy_(whole.view(target.shape))

    def _scale(self, model: Any, adapters: dict[str, Any], ratio: float | Mapping[str, float]) -> None:
        """(1 - r) anchor + r (W + s B A) = ((1 - r) anchor + r W) + s (r B) A."""
        below = _parts(model, trained=set(adapters))
        self._blend(below, ratio, 0)
        for name, layer in adapters.items():
            share = ratio if not isinstance(ratio, Mapping) else ratio[name]
            for active in layer.active_adapters:
                layer.lora_B[active].weight.mul_(share)

    def state_dict(self) -> dict[str, Any]:
        kept = self.anchor if self.own_anchor and self.anchor is not None else None
        return {"done": list(self.done), "anchor": None if kept is None else dict(kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = list(state_dict["done"])
        if self.own_anchor:
            self.anchor, self.restored = state_dict["anchor"], True


def _model(pl_module: pl.LightningModule) -> Any:
    return getattr(pl_module, "model", pl_module)


def _all_one(ratio: float | Mapping[str, float]) -> bool:
    return all(r == 1 for r in ratio.values()) if isinstance(ratio, Mapping) else ratio == 1


def _some(weights: Weights, names: Mapping[str, Any]) -> dict[str, Tensor]:
    if missing := [n for n in names if n not in weights]:
        raise MergeError(f"{missing[0]}: is trained, and the anchor does not have it")
    return {n: weights[n] for n in names}


def _plain(name: str) -> str:
    """A parameter's name without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _adapters(model: Any) -> dict[str, Any]:
    """peft's LoRA layers by the name of the weight below them. Raises MergeError for adapters of embeddings and with
    DoRA, which are no product of two matrices on top of a weight."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_B") and hasattr(layer, "base_layer"):
            if getattr(layer, "lora_embedding_B", None) or any(getattr(layer, "use_dora", {}).values()):
                raise MergeError(f"{_plain(name)}: has an adapter of embeddings or DoRA, which events cannot merge")
            found[f"{_plain(name)}.weight"] = layer
    return found


def _parts(model: Any, trained: set[str] | frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """The trained parameters, and those below adapters, by plain name; adapters' own left out."""
    named = {
        _plain(name): p for name, p in model.named_parameters()
        if ".lora_" not in name and (p.requires_grad or _plain(name) in trained)
    }  # fmt: skip
    return {name: p.detach() for name, p in named.items()}


def _leave_merged(layer: Any) -> None:
    """What an adapter held is in the weight below it now, and it starts anew from zero."""
    for active in list(layer.merged_adapters):
        layer.merged_adapters.remove(active)
        layer.lora_B[active].weight.zero_()

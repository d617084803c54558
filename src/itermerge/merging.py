"""Merge rules, and the Lightning callback that applies them while training (2503.02103).

One law: merged = anchor + ratio * combine(sparsify(tuned - anchor)). A rule is a pure function of named tensors.
A merge event blends the model with its anchor; events before a round's last one happen inside the fit, by
`MergeCallback`; the last one is a stage of its own. Both call `merge_tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from .policy import Weights, check_same_tensors

Every = int | Literal["last"]
Rule = Callable[[Tensor, Tensor, float], Tensor]


class MergeError(ValueError):
    """A merge that cannot be done, naming the tensor."""


def linear(anchor: Tensor, tuned: Tensor, ratio: float) -> Tensor:
    """(1 - ratio) anchor + ratio tuned, by one fused lerp; bit for bit the anchor at 0, the tuned tensor at 1
    (2203.05482)."""
    if ratio in (0, 1):  # a lerp would lose the sign of a zero, and overflow for very large differences
        return (tuned if ratio == 1 else anchor).clone()
    return torch.lerp(anchor, tuned, ratio)


RULES: Mapping[str, Rule] = {"linear": linear}


def merge_tensor(rule: str, name: str, anchor: Tensor, tuned: Tensor, ratio: float) -> Tensor:
    """One tensor merged in float32. Raises MergeError when the result is not finite."""
    merged = RULES[rule](anchor.float(), tuned.float(), ratio)
    if not torch.isfinite(merged).all():
        raise MergeError(f"{name}: the merged tensor has values that are not finite")
    return merged


def merge(rule: str, anchor: Weights, tuned: Weights, ratio: float) -> dict[str, Tensor]:
    """All tensors merged by `rule`; new tensors, inputs untouched."""
    check_same_tensors(anchor, tuned, "the anchor", "the tuned weights")
    return {name: merge_tensor(rule, name, anchor[name], tuned[name], ratio) for name in tuned}


def mean(weights: list[Weights]) -> dict[str, Tensor]:
    """The plain mean of several models, tensor by tensor, summed in the given order."""
    return {name: torch.stack([w[name].float() for w in weights]).mean(0) for name in weights[0]}


def events(epochs: int, every: Every) -> list[int]:
    """The epochs (from 1) that a merge event follows: multiples of `every`, and always the last."""
    inner = [] if every == "last" else [e for e in range(1, epochs) if e % every == 0]
    return [*inner, epochs]


def effective_ratio(ratio: float, epochs: int, at: list[int]) -> float:
    """The share of a round's update that its events leave: the mean over epochs e of ratio^(events from e on)."""
    return sum(ratio ** sum(event >= e for event in at) for e in range(1, epochs + 1)) / epochs


class MergeCallback(pl.Callback):
    """Blends the weights with `anchor` after each epoch in `at`.

    The anchor stays on the CPU; one tensor at a time goes to the device. Unless told not to, an event clears the
    optimizer's moments, which describe a point that the weights have left. Only trained tensors are merged.
    """

    def __init__(self, rule: str, anchor: Weights, ratio: float, at: list[int], reset_optimizer: bool) -> None:
        self.rule, self.anchor, self.ratio, self.at, self.reset_optimizer = rule, anchor, ratio, at, reset_optimizer
        self.done: list[int] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch not in self.at:
            return
        model: Any = pl_module.model
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    anchor = self.anchor[name].to(parameter.device)
                    parameter.copy_(merge_tensor(self.rule, name, anchor, parameter, self.ratio))
        if self.reset_optimizer:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        self.done.append(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"done": list(self.done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = list(state_dict["done"])

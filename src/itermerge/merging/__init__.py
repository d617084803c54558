"""Merging (2503.02103): the law of all rules, the ratio of each tensor, the callback while training."""

from __future__ import annotations

from .callback import MergeCallback, effective_ratio, events
from .law import LINEAR, Merge, MergeError, Method
from .ratios import by_angle, by_importance, over_time, tensor_ratios

__all__ = [
    "LINEAR", "Merge", "MergeCallback", "MergeError", "Method", "by_angle", "by_importance", "effective_ratio",
    "events", "over_time", "tensor_ratios",
]  # fmt: skip

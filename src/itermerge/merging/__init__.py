"""Merging (2503.02103): the law of all rules, the ratio of each tensor, the callback while training.

The callback's module is imported when it is asked for: Lightning takes seconds, and merging checkpoints needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .law import LINEAR, Merge, MergeError, Method
from .ratios import by_angle, by_importance, over_time, tensor_ratios

if TYPE_CHECKING:
    from .callback import MergeCallback, effective_ratio, events

__all__ = [
    "LINEAR", "Merge", "MergeCallback", "MergeError", "Method", "by_angle", "by_importance", "effective_ratio",
    "events", "over_time", "tensor_ratios",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import callback

    return getattr(callback, name)

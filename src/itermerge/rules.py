"""From the config of a merge to the method that does it."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from .config import ConfigError, Merge
from .merging import Method


def method_of(merge: Merge) -> Method:
    """The method of a rule's config. Raises ConfigError when a rule of the user's own cannot be had."""
    given = {"density", "rescale", "epsilon", "gamma", "scope", "threshold", "agree"}
    parameters = {name: value for name in sorted(given) if (value := getattr(merge, name)) is not None}
    function: Any = None
    if merge.function is not None:
        module, _, name = merge.function.rpartition(".")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"merge.function: {merge.function!r} cannot be had ({error}); expected module.name of a function, in a "
                "file beside your --config-dir's YAML files or on the PYTHONPATH"
            ) from error
        if not callable(function):
            raise ConfigError(f"merge.function: {merge.function} is no function")
    return Method(
        sparsify=merge.sparsify, combine=merge.combine, weights=tuple(merge.weights or ()), params=dict(merge.params),
        function=function, **parameters,
    )  # fmt: skip


def source_of(method: Method) -> str | None:
    """The text of the file that holds a user's own rule: what it does is part of a result's key."""
    file = inspect.getsourcefile(method.function) if method.function else None
    return Path(file).read_text() if file else None

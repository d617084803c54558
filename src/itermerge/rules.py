"""From the config of a merge to the method that does it."""

from __future__ import annotations

import importlib
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
        source_of(merge)
    return Method(
        sparsify=merge.sparsify, combine=merge.combine, weights=tuple(merge.weights or ()), params=dict(merge.params),
        function=function, **parameters,
    )  # fmt: skip


def source_of(merge: Merge) -> str | None:
    """The text of the module that holds a user's own rule: what it does is part of a result's key. Raises ConfigError
    for one without a Python source."""
    if merge.function is None:
        return None
    file = str(getattr(importlib.import_module(merge.function.rpartition(".")[0]), "__file__", ""))
    if not file.endswith(".py"):
        raise ConfigError(
            f"merge.function: {merge.function} has no Python source to know its results by; wrap it in your own"
        )
    return Path(file).read_text()

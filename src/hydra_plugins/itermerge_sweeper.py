"""The sweeper of itermerge; Hydra takes sweepers from the `hydra_plugins` package alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException
from omegaconf import OmegaConf

from itermerge import cli
from itermerge.config import ConfigError, check


class CheckedSweeper(BasicSweeper):
    """Hydra's basic sweeper, with every job's config checked before the first job, and a summary at the end."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        assert self.config is not None
        jobs = [job for jobs in self.overrides or [] for job in jobs] if self.batch_index == 1 else batch
        for overrides in jobs:
            try:
                composed = loader.load_sweep_config(self.config, list(overrides))
                with_job = OmegaConf.masked_copy(composed, [str(k) for k in composed if k != "hydra"])
                check(with_job)
            except (ConfigError, HydraException) as error:
                cli.die(f"job {' '.join(overrides)}: {error}")

    def sweep(self, arguments: list[str]) -> Any:
        results, error = None, None
        try:
            results = super().sweep(arguments)
        except Exception as raised:  # Hydra raises the first failed job's error when all jobs have run
            error = raised
        finally:
            folder = self.sweep_dir()
            failed = cli.end_of_sweep(folder) if folder is not None else []
        if failed:
            sys.exit(1)
        if error is not None:
            raise error
        return results

    def sweep_dir(self) -> Path | None:
        assert self.config is not None
        folder = Path(self.config.hydra.sweep.dir)
        return folder if folder.is_dir() else None

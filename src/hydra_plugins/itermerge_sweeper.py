"""The sweeper of itermerge; Hydra takes sweepers from the `hydra_plugins` package alone."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from itermerge import cli, sweep
from itermerge.config import ConfigError, Root, check


class CheckedSweeper(BasicSweeper):
    """All combinations of the overrides, through any launcher. Every config is checked before the first job; a sweep
    that is resumed leaves out what is DONE; it ends with its table, its figures, and the command that goes on."""

    def sweep(self, arguments: list[str]) -> None:
        try:
            jobs = self.expand(arguments)
            cfgs = self.check(jobs)
            folder = self.folder()
            sweep.begin(folder, jobs, sys.argv[1:], resume=cfgs[0].sweep.resume is not None)
        except (ConfigError, sweep.SweepError, HydraException) as error:
            cli.die(str(error))
        todo = [i for i in range(len(jobs)) if sweep.mark_of(folder / str(i)) != "DONE"]
        cli.before_sweep([cfgs[i] for i in todo], folder, done=len(jobs) - len(todo), workers=self.workers())
        with _Ending(folder):
            size = self.max_batch_size or len(todo)
            for at in range(0, len(todo), size):
                self.launch({i: jobs[i] for i in todo[at : at + size]}, folder)

    def expand(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of each job."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*(f"{k}={v}" for k, v in self.params.items()), *arguments])
        return self.split_arguments(parsed, None)[0]

    def check(self, jobs: Sequence[Sequence[str]]) -> list[Root]:
        """Each job's config. Raises ConfigError naming the job."""
        assert self.hydra_context is not None
        assert self.config is not None
        cfgs = []
        for overrides in jobs:
            try:
                composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
                cfgs.append(check(OmegaConf.masked_copy(composed, [str(k) for k in composed if k != "hydra"])))
            except (ConfigError, HydraException) as error:
                raise ConfigError(f"job {' '.join(overrides)}: {error}") from error
        return cfgs

    def folder(self) -> Path:
        """Where the sweep lands. Raises ConfigError for job folders that are not numbers."""
        assert self.config is not None
        node = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        assert isinstance(node, dict)
        if node["subdir"] != "${hydra.job.num}":
            raise ConfigError("hydra.sweep.subdir: the folders of jobs are their numbers; leave it as it is")
        return Path(str(self.config.hydra.sweep.dir))

    def workers(self) -> int:
        """How many jobs the launcher runs at once on this machine, as far as its config says."""
        assert self.config is not None
        launcher: DictConfig = self.config.hydra.launcher
        jobs = launcher.get("n_jobs", 1)
        return jobs if isinstance(jobs, int) else 1

    def launch(self, jobs: dict[int, list[str]], folder: Path) -> None:
        """Runs jobs by number, and marks those FAILED that ended before they could do it themselves."""
        assert self.launcher is not None
        numbered = [[*overrides, f"hydra.sweep.subdir={i}"] for i, overrides in jobs.items()]
        results = self.launcher.launch(numbered, initial_job_idx=min(jobs))
        for i, result in zip(jobs, results, strict=True):
            error = result._return_value
            if result.status == JobStatus.FAILED and not isinstance(error, cli.NotStarted):
                mark = folder / str(i) / "FAILED"
                if sweep.mark_of(mark.parent) is None:
                    mark.parent.mkdir(exist_ok=True)
                    mark.write_text("".join(traceback.format_exception(error)))


class _Ending:
    """Whatever ends a sweep, an error of Hydra's or Ctrl-C included: its table, what failed, how to go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        complete = cli.end_of_sweep(self.folder)
        if kind is None and not complete:
            sys.exit(1)

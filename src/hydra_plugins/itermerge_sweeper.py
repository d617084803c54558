"""The sweeper of itermerge; Hydra takes sweepers from the `hydra_plugins` package alone."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from itermerge import cli, sweep
from itermerge.config import ConfigError, Root, check, check_metric


class CheckedSweeper(BasicSweeper):
    """All combinations of the overrides, through any launcher. Every config is checked before the first job; a sweep
    that is resumed leaves out what is DONE; it ends with its table, its figures, and the command that goes on."""

    def sweep(self, arguments: list[str]) -> None:
        try:
            jobs = self.expand(arguments)
            cfgs = self.check(jobs)
            folder, resume = self.folder(), cfgs[0].sweep.resume is not None
            todo = [i for i in range(len(jobs)) if not resume or sweep.mark_of(folder / str(i)) != "DONE"]
            cli.before_sweep([cfgs[i] for i in todo], folder, done=len(jobs) - len(todo), workers=self.workers())
            sweep.begin(folder, jobs, sys.argv[1:], resume)
        except (ConfigError, sweep.SweepError, HydraException) as error:
            cli.die(str(error))
        with _Ending(folder):
            size = self.max_batch_size or len(todo) or 1
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


class OptunaSweeper(CheckedSweeper):
    """Trials that Optuna suggests: each a job, `n_jobs` of them at a time through any launcher.

    A key's space is a sweep of it: `interval(0.1,1)` (float), `int(interval(1,6))`, `tag(log, interval(1e-5,1e-3))`,
    `range(1,4)`, or values as in `0.3,0.5,1`. Other keys are fixed.
    """

    def __init__(
        self, n_trials: int, n_jobs: int | None, metrics: list[str] | None, algorithm: str, seed: int,
        params: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        super().__init__(max_batch_size=None, params=params)
        self.n_trials, self.n_jobs, self.metrics = n_trials, n_jobs, list(metrics or [])
        self.algorithm, self.seed = algorithm, seed

    def sweep(self, arguments: list[str]) -> None:
        try:
            import optuna  # noqa: F401
        except ImportError:
            cli.die("hydra/sweeper=optuna needs the extra 'optuna': pip install 'itermerge[optuna]'")
        from itermerge.search import Search, check_metrics, overrides

        try:
            space, fixed = self.space(arguments)
            corners = [[*fixed, *(f"{k}={v}" for k, v in values.items())] for values in _corners(space)]
            cfgs = self.check(corners)
            metrics = self.metrics or [cfgs[0].optimized_metric]
            check_metrics(metrics)
            for metric in metrics:
                check_metric(cfgs[0], metric, "hydra.sweeper.metrics")
            folder, resume = self.folder(), cfgs[0].sweep.resume is not None
            cli.before_sweep(cfgs[-1:] * self.n_trials, folder, done=0, workers=self.workers())
            sweep.begin(folder, None if resume else [], sys.argv[1:], resume)
            search = Search(folder, space, metrics, self.algorithm, self.seed)
        except (ConfigError, sweep.SweepError, HydraException) as error:
            cli.die(str(error))
        at_once = self.n_jobs or (os.cpu_count() or 1 if self.workers() < 0 else self.workers())
        with _Ending(folder, search.end):
            batch = search.again() if resume else {}
            while batch := batch or search.ask(at_once, self.n_trials):
                jobs = {number: [*fixed, *overrides(params)] for number, params in batch.items()}
                sweep.add_jobs(folder, jobs)
                self.launch(jobs, folder)
                for number in jobs:
                    mark = sweep.mark_of(folder / str(number))
                    if mark in ("DONE", "FAILED"):
                        search.tell(number, failed=mark == "FAILED")
                stopped = any(sweep.mark_of(folder / str(i)) != "DONE" for i in jobs)
                if stopped and cfgs[0].sweep.on_error == "stop":
                    break
                batch = {}

    def space(self, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
        """Optuna's distribution of each swept key, and the other overrides. Raises ConfigError."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        space: dict[str, Any] = {}
        fixed: dict[str, str] = {}
        for override in parser.parse_overrides([*(f"{k}={v}" for k, v in self.params.items()), *arguments]):
            key, swept = override.get_key_element(), override.value()
            space.pop(key, None)
            fixed.pop(key, None)
            if not override.is_sweep_override():
                fixed[key] = f"{key}={override.get_value_element_as_str()}"
            elif isinstance(swept, IntervalSweep):
                assert swept.start is not None
                assert swept.end is not None
                whole = isinstance(swept.start, int) and isinstance(swept.end, int) and "int" in swept.tags
                kind: Any = IntDistribution if whole else FloatDistribution
                space[key] = kind(swept.start, swept.end, log="log" in swept.tags)
            else:
                pairs = zip(override.sweep_iterator(), override.sweep_string_iterator(), strict=True)
                choices = [v if isinstance(v, bool | int | float) else text for v, text in pairs]
                space[key] = CategoricalDistribution(choices)
        if not space:
            raise ConfigError(
                "hydra/sweeper=optuna: no key has a space to search; give for example 'merge.ratio=interval(0.1,1)'"
            )
        return space, list(fixed.values())


def _corners(space: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings that show whether a space is legal: all lowest, each key at each end or each choice, all highest."""
    ends = {k: list(d.choices) if hasattr(d, "choices") else [d.low, d.high] for k, d in space.items()}
    low = {k: v[0] for k, v in ends.items()}
    return [low, *({**low, k: v} for k, vs in ends.items() for v in vs[1:]), {k: v[-1] for k, v in ends.items()}]


class _Ending:
    """Whatever ends a sweep, an error of Hydra's or Ctrl-C included: its table, what failed, how to go on."""

    def __init__(self, folder: Path, last_words: Callable[[], list[str]] | None = None) -> None:
        self.folder, self.last_words = folder, last_words

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        complete = cli.end_of_sweep(self.folder)
        for line in self.last_words() if self.last_words else []:
            print(line)
        if kind is None and not complete:
            sys.exit(1)

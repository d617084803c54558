"""The sweeper of itermerge; Hydra takes sweepers from the `hydra_plugins` package alone."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from itermerge.store import is_held
from itermerge.upkeep import need


class CheckedSweeper(BasicSweeper):
    """All combinations of the overrides, through any launcher, with each of `cases`: named lists of overrides that are
    no grid. Every config is checked before the first job; a sweep that is resumed leaves out what is DONE; it ends with
    its table, its figures, and the command that goes on."""

    def __init__(
        self, max_batch_size: int | None, params: dict[str, Any] | None, cases: Mapping[str, Sequence[str]] | None
    ) -> None:
        # null takes out what an experiment put in: a key of the grid, a case
        super().__init__(
            max_batch_size=max_batch_size, params={k: v for k, v in (params or {}).items() if v is not None}
        )
        self.cases = {k: v for k, v in (cases or {}).items() if v is not None}

    def sweep(self, arguments: list[str]) -> None:
        try:
            at_once = self.max_batch_size
            if at_once is not None and at_once < 1:
                raise ConfigError(f"hydra.sweeper.max_batch_size: must be at least 1, or null; got {at_once}")
            jobs = self.expand(arguments)
            cfgs = self.check(jobs)
            if cfgs[0].plan:
                cli.show_plan(cfgs, self.workers())
                return
            folder, resume = self.folder(), cfgs[0].sweep.resume is not None
            done = [i for i in range(len(jobs)) if resume and sweep.mark_of(folder / str(i)) == "DONE"]
            todo = {i: jobs[i] for i in range(len(jobs)) if i not in done}
            cli.before_sweep({i: cfgs[i] for i in todo}, folder, len(done), self.workers())
            sweep.begin(folder, jobs, sys.argv[1:], resume)
            for i in done:
                if not cli.same_config(folder / str(i), cfgs[i]):
                    raise sweep.SweepError(
                        f"sweep.resume: job {i} in {folder} is done with another config than it would have now (see "
                        "its config.yaml); a default or a file of its command has changed since. Begin a new sweep"
                    )
        except (ConfigError, sweep.SweepError, HydraException) as error:
            cli.die(str(error))
        with _Ending(folder):
            for i in todo:
                sweep.retry(folder / str(i))
            numbers, size = list(todo), at_once or len(todo) or 1
            for at in range(0, len(numbers), size):
                self.launch({i: todo[i] for i in numbers[at : at + size]}, folder, cfgs[0].sweep.on_error)

    def expand(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of each job. A case's own count more than params, what was typed more than both. Raises
        ConfigError."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*(f"{k}={v}" for k, v in self.params.items()), *arguments])
        grid = self.split_arguments(parsed, None)[0]
        for name, own in self.cases.items():
            if not re.fullmatch(r"[\w-]+", str(name)) or not isinstance(own, Sequence) or isinstance(own, str):
                raise ConfigError(f"hydra.sweeper.cases.{name}: expected a name and a list of overrides, got {own!r}")
        typed = {_key(o) for o in arguments}
        jobs = []
        for name, own in self.cases.items():
            for job in grid:
                given = [o for o in job if _key(o) in typed]
                jobs.append([f"label={name}", *(o for o in job if o not in given), *map(str, own), *given])
        return jobs or grid

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

    def launch(self, jobs: Mapping[int, list[str]], folder: Path, on_error: str) -> list[int]:
        """Runs jobs by number, and marks those FAILED that could not do it themselves; the numbers of those that came
        to their end. When the launcher itself ends with an error (a worker was killed), those that had not begun are
        launched again, where it runs them on this machine; else the error is raised."""
        assert self.launcher is not None
        numbered = [[*overrides, f"hydra.sweep.subdir={i}"] for i, overrides in jobs.items()]
        if not jobs:
            return []
        try:
            results = self.launcher.launch(numbered, initial_job_idx=min(jobs))
        except Exception as error:
            left = {i: overrides for i, overrides in jobs.items() if sweep.mark_of(folder / str(i)) is None}
            begun = [i for i in left if (folder / str(i) / "config.yaml").is_file()]
            for i in begun:
                if not is_held(folder / str(i) / cli.LOCK):  # else it is still running
                    _mark_failed(folder / str(i), error)
            again = {i: overrides for i, overrides in left.items() if i not in begun}
            local = type(self.launcher).__name__ in ("BasicLauncher", "JoblibLauncher")
            if not (begun and again and local and on_error == "continue"):
                raise
            print(
                f"the launcher ended with {type(error).__name__}; {len(again)} jobs are launched again", file=sys.stderr
            )
            done = [i for i in jobs if sweep.mark_of(folder / str(i)) == "DONE"]
            return done + self.launch(again, folder, on_error)
        done = []
        for i, result in zip(jobs, results, strict=True):
            if result.status == JobStatus.COMPLETED:
                done.append(i)
            elif not isinstance(result._return_value, cli.NotStarted | cli.Occupied):
                _mark_failed(folder / str(i), result._return_value)
        return done


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _mark_failed(folder: Path, error: Any) -> None:
    if sweep.mark_of(folder) is None:
        folder.mkdir(exist_ok=True)
        (folder / "FAILED").write_text("".join(traceback.format_exception(error)))


class OptunaSweeper(CheckedSweeper):
    """Trials that Optuna suggests: each a job, `n_jobs` of them at a time through any launcher.

    A key's space is a sweep of it: `interval(0.1,1)` (float), `int(interval(1,6))`, `tag(log, interval(1e-5,1e-3))`,
    `range(1,4)`, or values as in `0.3,0.5,1`. Other keys are fixed.
    """

    def __init__(
        self, n_trials: int, n_jobs: int | None, metrics: list[str] | None, algorithm: str, seed: int,
        params: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        super().__init__(max_batch_size=None, params=params, cases=None)
        self.n_trials, self.n_jobs, self.metrics = n_trials, n_jobs, list(metrics or [])
        self.algorithm, self.seed = algorithm, seed

    def sweep(self, arguments: list[str]) -> None:
        try:
            import optuna  # noqa: F401
        except ImportError:
            cli.die("hydra/sweeper=optuna needs the extra 'optuna': pip install 'itermerge[optuna]'")
        from itermerge.search import LOG, Search, check_metrics, overrides

        try:
            space, fixed = self.space(arguments)
            corners = [[*fixed, *(f"{k}={v}" for k, v in values.items())] for values in _corners(space)]
            cfgs = self.check(corners)
            metrics = self.metrics or [cfgs[0].optimized_metric]
            check_metrics(metrics)
            for metric in metrics:
                check_metric(cfgs[0], metric, "hydra.sweeper.metrics")
            for key, value in (("n_trials", self.n_trials), ("n_jobs", self.n_jobs)):
                if value is not None and value < 1:
                    raise ConfigError(f"hydra.sweeper.{key}: must be at least 1, got {value}")
            dearest = max(cfgs, key=lambda cfg: need([(cfg, 1)]))
            if dearest.plan:
                note = f"a search: {self.n_trials} trials at most, each of them at most this (the largest of the space)"
                cli.show_plan([dearest], self.workers(), [note])
                return
            folder, resume = self.folder(), cfgs[0].sweep.resume is not None
            if resume and not (folder / LOG).is_file():
                raise sweep.SweepError(f"sweep.resume: {folder} holds no search ({LOG}), but a sweep of another kind")
            # each trial as large as the largest corner, and sharing nothing
            trials = {i: replace(dearest, seed=i) for i in range(self.n_trials)}
            cli.before_sweep(trials, folder, done=0, workers=self.workers())
            sweep.begin(folder, None if resume else [], sys.argv[1:], resume)
            search = Search(folder, space, metrics, self.algorithm, self.seed, sweep.own(fixed))
        except (ConfigError, sweep.SweepError, HydraException) as error:
            cli.die(str(error))
        at_once = self.n_jobs or (os.cpu_count() or 1 if self.workers() < 0 else self.workers())
        with _Ending(folder, search.end):
            batch, replaced = search.again() if resume else ({}, [])
            for number in replaced:
                if (folder / str(number) / "FAILED").is_file():
                    os.replace(folder / str(number) / "FAILED", folder / str(number) / "REPLACED")
            while batch := batch or search.ask(at_once, self.n_trials):
                jobs = {number: [*fixed, *overrides(params)] for number, params in batch.items()}
                sweep.add_jobs(folder, jobs)
                done = self.launch(jobs, folder, cfgs[0].sweep.on_error)
                for number in jobs:
                    if number in done or sweep.mark_of(folder / str(number)) == "FAILED":
                        search.tell(number, failed=number not in done)
                if len(done) < len(jobs) and cfgs[0].sweep.on_error == "stop":
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
                whole = "int" in swept.tags or (isinstance(swept.start, int) and isinstance(swept.end, int))
                kind: Any = IntDistribution if whole else FloatDistribution
                cast: Any = int if whole else float
                space[key] = kind(cast(swept.start), cast(swept.end), log="log" in swept.tags)
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

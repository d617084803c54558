"""Optuna's search over config keys, one trial a job of a sweep. The study lies in the sweep's folder (`optuna.log`).

One metric is maximised, or two, whose best compromises are a Pareto front; all of them on validation items. Needs the
extra `optuna`. Knows no Hydra.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError
from .tasks import derive_seed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

LOG = "optuna.log"
ALGORITHMS = ("tpe", "nsga2", "random")


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises ConfigError unless there are one or two, of validation items."""
    if not 1 <= len(metrics) <= 2:
        raise ConfigError(f"hydra.sweeper.metrics: one or two metrics are maximised, got {list(metrics)}")
    if test := [m for m in metrics if not m.startswith("val/")]:
        raise ConfigError(
            f"hydra.sweeper.metrics: {test[0]!r} is measured on test items, which choose nothing; take val/id/acc, or, "
            "with suite.n_validation=50 or so, val/ood/acc, val/ood/near/acc, val/ood/far/acc"
        )


class Search:
    """A study that asks for trials and is told what became of them. Its draws depend on `seed` and on the number of
    trials before them, so that a search that is resumed goes on as it would have."""

    def __init__(
        self, folder: Path, space: Mapping[str, BaseDistribution], metrics: Sequence[str], algorithm: str, seed: int,
        fixed: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`fixed` are the overrides that all trials have. Raises ConfigError when the study in `folder` is another."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"hydra.sweeper.algorithm: {algorithm!r} is none of {', '.join(ALGORITHMS)}")
        self.optuna, self.folder, self.space, self.metrics = optuna, folder, dict(space), list(metrics)
        self.algorithm, self.seed = algorithm, seed
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / LOG))), study_name="sweep", load_if_exists=True,
            directions=[optuna.study.StudyDirection.MAXIMIZE for _ in metrics], sampler=self._sampler(0),
        )  # fmt: skip
        mine = {
            "metrics": self.metrics, "fixed": list(fixed), "space": {k: str(d) for k, d in self.space.items()},
            "algorithm": algorithm, "seed": seed,
        }  # fmt: skip
        theirs = self.study.user_attrs.get("search")
        if theirs is None:
            self.study.set_user_attr("search", mine)
        elif different := [name for name, value in mine.items() if theirs[name] != value]:
            name = different[0]
            raise ConfigError(
                f"sweep.resume: the search in {folder} has {name} {theirs[name]}, here it is {mine[name]}; a search "
                "goes on as it was begun (but for hydra.sweeper.n_trials), another needs a folder of its own"
            )

    def _sampler(self, number: int) -> Any:
        seed = derive_seed("search", self.seed, number) % 2**32
        samplers = self.optuna.samplers
        if self.algorithm == "random":
            return samplers.RandomSampler(seed=seed)
        if self.algorithm == "nsga2":
            return samplers.NSGAIISampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=8)

    def again(self) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """What a resumed search begins with: trials that were under way, which keep number and values; and the numbers
        of the failed ones, whose values are asked for again as new trials."""
        states = self.optuna.trial.TrialState
        for trial in self.study.get_trials(states=(states.RUNNING,)):
            if trial.params.keys() != self.space.keys():  # killed while it was being thought of
                self.study.tell(trial.number, state=states.FAIL)
        retried = set(self.study.user_attrs.get("retried", []))
        failed = [t for t in self.study.get_trials(states=(states.FAIL,)) if t.number not in retried]
        self.study.set_user_attr("retried", sorted(retried | {t.number for t in failed}))
        for trial in failed:
            if trial.params.keys() == self.space.keys():
                self.study.enqueue_trial(trial.params)
        running = self.study.get_trials(states=(states.RUNNING,))
        return {t.number: t.params for t in running}, [t.number for t in failed]

    def ask(self, most: int, trials: int) -> dict[int, dict[str, Any]]:
        """The values of up to `most` further trials by number; none when there are `trials` already. Trials that took
        a failed one's place do not count."""
        asked: dict[int, dict[str, Any]] = {}
        waiting = self.optuna.trial.TrialState.WAITING
        replaced = len(self.study.user_attrs.get("retried", []))
        for _ in range(most):
            begun = [t for t in self.study.get_trials(deepcopy=False) if t.state != waiting]
            if len(begun) - replaced >= trials:
                break
            self.study.sampler = self._sampler(len(begun))
            trial = self.study.ask(fixed_distributions=self.space)
            asked[trial.number] = trial.params
        return asked

    def tell(self, number: int, failed: bool) -> None:
        """What became of a trial: the figures of its run folder, or that it failed."""
        if failed:
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
            return
        final = json.loads((self.folder / str(number) / "summary.json").read_text())["final"]
        self.study.tell(number, [final[m] for m in self.metrics])

    def best(self) -> list[FrozenTrial]:
        """The best trial, or those of the Pareto front, by the first metric."""
        states = self.optuna.trial.TrialState
        if not self.study.get_trials(states=(states.COMPLETE,)):
            return []
        found = self.study.best_trials if len(self.metrics) > 1 else [self.study.best_trial]
        return sorted(found, key=lambda t: (t.values[0], -t.number))

    def end(self) -> list[str]:
        """Writes search.json and, for two metrics, figures/pareto.png; lines that say what was found."""
        best = self.best()
        rows = [
            {"job": t.number, "params": t.params, **dict(zip(self.metrics, t.values, strict=True))} for t in best
        ]  # fmt: skip
        (self.folder / "search.json").write_text(json.dumps({"metrics": self.metrics, "best": rows}, indent=1) + "\n")
        if len(self.metrics) > 1 and best:
            self._pareto(best)
        head = "best trial" if len(self.metrics) == 1 else f"Pareto front, {len(best)} trials"
        said = [f"{head} by {' and '.join(self.metrics)} (search.json):"] if best else ["no trial was finished"]
        for trial in best:
            values = "  ".join(f"{m} {100 * v:.1f}" for m, v in zip(self.metrics, trial.values, strict=True))
            said.append(f"  job {trial.number}: {values}  {' '.join(overrides(trial.params))}")
        return said

    def _pareto(self, best: list[FrozenTrial]) -> None:
        from .report import charts

        done = self.study.get_trials(states=(self.optuna.trial.TrialState.COMPLETE,))
        chosen = {t.number for t in best}
        colours = {"Pareto front": charts.VERMILLION, "trials": charts.GREY}
        points = [
            {"x": 100 * t.values[0], "y": 100 * t.values[1], "name": str(t.number),
             "series": "Pareto front" if t.number in chosen else "trials"} for t in done
        ]  # fmt: skip
        front = [p for p in points if p["series"] == "Pareto front"]
        x, y = (f"{metric} (%)" for metric in self.metrics)
        figure = charts.Figure(
            "pareto", [charts.pareto(points, front, colours, x=x, y=y, labels=len(front) <= 8)], colours, columns=1
        )
        charts.write_png(figure, self.folder / "figures" / "pareto.png")


def overrides(params: Mapping[str, Any]) -> list[str]:
    """A trial's values as overrides, numbers in full."""
    return [f"{key}={value}" for key, value in params.items()]

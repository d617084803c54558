"""Iterative Model Merging, as the algorithm box has it (2503.02103):

    theta_hat_0 = base
    for t = 1..T:
        S_t         = correct solutions sampled from theta_hat_{t-1}
        theta_t     = SFT(start, S_t)                           merge callback inside
        theta_hat_t = anchor + ratio * (theta_t - anchor)       the last merge event
        evaluate theta_t and theta_hat_t

Each line is a stage (`stages`): found in the store or computed. Nothing here knows Hydra.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import export, stages, tracking
from .config import Root, StoreLocal
from .merging import MergeError
from .stages import Anchor, Bench, EmptyRound, Merged, Model, Round
from .store import Artifact, Store, StoreError, environment, is_disk_full, place
from .upkeep import check_space

T = TypeVar("T")
log = logging.getLogger(__name__)
UNJUDGED = ("unparseable", "timed_out", "error")


class Parts(NamedTuple):
    """What makes the store, the stages and the record of a run."""

    store: Callable[..., Store]
    bench: Callable[..., Bench]
    record: Callable[..., RunRecord]


def run(
    cfg: Root, folder: Path, tracker: tracking.Tracker, parts: Parts | None = None, until: int | None = None
) -> dict[str, Any]:
    """Runs the loop and writes the run folder; the summary. `parts` are others than the usual ones: a plan's. `until`
    is a round to stop after: what rounds depend on, as schedules, goes by `cfg.rounds` as before."""
    parts = parts or Parts(Store, Bench, RunRecord)
    private = folder / "stages"  # store=none: stages live in the run folder until the run is done
    root = Path(cfg.store.dir).expanduser() if isinstance(cfg.store, StoreLocal) else private
    started = time.perf_counter()
    store = parts.store(root, environment(stages.device_of(cfg.trainer.accelerator), cfg.threads))
    with tempfile.TemporaryDirectory() as scratch, store, parts.bench(cfg, store, Path(scratch)) as bench:
        check_space([(cfg, bench.size)], root, folder)
        record = parts.record(cfg, folder, tracker)
        look_at_lengths(cfg, bench)
        history, examples, tuned, made = [bench.base], [], bench.base, []
        past: list[tuple[Model, Model]] = []  # (tuned, start) of each round that was fitted
        until = cfg.rounds if until is None else until
        store.ahead = record.ahead(bench, bench.base, 0, until)
        record.write(bench, 0, scores=bench.evaluate(bench.base, 0), merged=Merged(bench.base))
        look_at_base(record.rounds[0])
        last = until if not cfg.export.rounds else None  # the end, where weights may go

        for t in range(1, until + 1):
            anchor = Anchor(bench, getattr(cfg.merge, "anchor", "base"), history)
            samples = bench.solve(history[-1], t)
            record.look_at_verdicts(samples, t)
            solutions = list(stages.read_lines(samples.folder / "examples.jsonl"))
            if not solutions and on_empty(cfg, t, samples, folder):
                merged = Merged(history[-1])
                if past and t == cfg.rounds and bench.at_end:  # the one merge is still to come
                    merged = bench.merge(past[-1][0], Round(t, past[-1][1], anchor, past[:-1]))
                    made.append((t, merged.model))
                history.append(merged.model)
                store.ahead = record.ahead(bench, history[-1], t, until)
                record.write(
                    bench,
                    t,
                    samples=samples,
                    merged=merged,
                    scores=bench.evaluate(history[-1], t),
                )
                drop_weights(bench, made, history, tuned, past, record.update, done=t == last)
                continue
            record.measure_importance(bench, samples)
            store.ahead = []
            examples = unique([*examples, *solutions]) if cfg.sft.data == "accumulate" else solutions
            start = {"merged": history[-1], "base": bench.base, "tuned": tuned}[cfg.sft.start]
            now = Round(t, start, anchor, list(past), record.layer_importance(), record.update)
            tuned, fitted = bench.fit(examples, now)
            merged = bench.merge(tuned, now)
            layers = record.look_at_layers(bench, now, tuned, merged)
            past.append((tuned, start))
            made += [(t, model) for model in (tuned, merged.model, record.update) if model]
            history.append(merged.model)
            store.ahead = record.ahead(bench, history[-1], t, until)
            record.write(
                bench, t, samples=samples, fitted=fitted, tuned=tuned, merged=merged, now=now,
                pre_scores=bench.evaluate(tuned, t) if cfg.suite.pre_merge else None,
                scores=bench.evaluate(merged.model, t), layers=layers,
            )  # fmt: skip
            drop_weights(bench, made, history, tuned, past, record.update, done=t == last)

        summary = record.summary(bench, time.perf_counter() - started)
        if cfg.export.rounds:
            export_rounds(cfg, folder, bench, history)
            drop_weights(bench, made, history, tuned, past, record.update, done=True)
    shutil.rmtree(private, ignore_errors=True)
    return summary


def look_at_lengths(cfg: Root, bench: Bench) -> None:
    """Warns where most of the task's own solutions would not fit in a sample."""
    lengths = [bench.policy.length_of(p.gold) for p in bench.validation]
    most = cfg.sampler.max_new_tokens
    if 2 * sum(length > most for length in lengths) > len(lengths):
        log.warning(
            "task %s: %d of %d solutions of its own have more than sampler.max_new_tokens=%d tokens, the longest %d: a "
            "sample as long is cut off and not judged. Raise sampler.max_new_tokens (and suite.max_new_tokens, "
            "sft.max_length)", bench.task.name, sum(length > most for length in lengths), len(lengths), most,
            max(lengths),
        )  # fmt: skip


def export_rounds(cfg: Root, folder: Path, bench: Bench, history: list[Model]) -> None:
    """The Hugging Face folders of export.rounds; a round that is asked for under two names is written once. Folders of
    other names, as of itermerge-export, stay."""
    for name in map(export.name_of, cfg.export.rounds):  # of this run, when it did not come to its end
        for left in (folder / "export" / name, *(folder / "export").glob(f"{name}.partial-*")):
            shutil.rmtree(left, ignore_errors=True)
    made: dict[int, Path] = {}
    for wanted in cfg.export.rounds:
        number, out = export.round_of(folder, wanted), folder / "export" / export.name_of(wanted)
        if number in made:
            export.twin(made[number], out)
            continue
        how = (out, cfg.export.dtype, cfg.export.decoding, bench.base.folder)
        bench.with_weights(history[number], lambda at, n=number, how=how: export.export(cfg, folder, n, at, *how))
        made[number] = out


def drop_weights(
    bench: Bench,
    made: list[tuple[int, Model]],
    history: list[Model],
    tuned: Model,
    past: list[tuple[Model, Model]],
    update: Model | None,
    done: bool,
) -> None:
    """store.keep=last or none: drops the weights that no later round reads. Those of the last round stay under `last`
    (with its update, which a next round would be compared with), and fit and update of round 1 if runs with other
    ratios share them. What was dropped is computed again where it is needed."""
    if bench.keep == "all":
        return
    wanted = [] if done and bench.keep == "none" else [history[-1]] + ([update] if update else [])
    if not done:
        wanted += [tuned] if bench.cfg.sft.start == "tuned" else []
        wanted += history if getattr(bench.cfg.merge, "anchor", "base") == "mean" else []
        wanted += [model for pair in past for model in pair] if bench.over_rounds else []
    if bench.keep == "last":
        wanted += [model for t, model in made if model not in history and bench.shared_fit(t)]
    for _, model in made:
        if model.digest not in {bench.base.digest, *(m.digest for m in wanted)}:
            bench.store.drop_weights(model.folder)


def solved(samples: Artifact) -> list[dict[str, Any]]:
    """The different correct samples of a round with the prompts that they answered, those with hints left out."""
    rows = stages.read_lines(samples.folder / "samples.jsonl")
    return unique([row for row in rows if row["verdict"] and "hint" not in row])


def unique(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples without repeats, first ones first."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for example in examples:
        first.setdefault((example["id"], example["completion"]), example)
    return list(first.values())


def look_at_base(base: Mapping[str, float]) -> None:
    """Says before the first round what the base's figures mean for what is to come."""
    if base["val/id/acc"] in (0, 1):
        fate = (
            "nothing to learn from, unless sampling finds solutions" if base["val/id/acc"] == 0 else "nothing to gain"
        )
        log.warning(
            "the base solves %.0f%% of the ID validation items: %s; take %s task",
            100 * base["val/id/acc"], fate, "an easier" if base["val/id/acc"] == 0 else "a harder",
        )  # fmt: skip
    if note := tracking.majority_note(base):
        log.warning("%s; such OOD tasks show no loss", note)


def on_empty(cfg: Root, number: int, samples: Artifact, folder: Path) -> bool:
    """True when a round without correct solutions is to be skipped; else raises EmptyRound with the counts."""
    counts = ", ".join(f"{n} {reason}" for reason, n in samples.facts["reasons"].items() if n)
    said = f"round {number}: none of {samples.facts['samples']} samples is correct ({counts})"
    if cfg.loop.on_empty == "skip":
        log.warning("%s; the round is skipped (loop.on_empty=skip)", said)
        return True
    where = folder / "rounds" / f"{number:02d}" / "samples.jsonl"
    place(samples.folder / "samples.jsonl", where)
    raise EmptyRound(
        f"{said}. Take an easier task, raise sampler.n, or look at the samples in rounds/{number:02d}/samples.jsonl; "
        "loop.on_empty=skip goes on with the same model"
    )


class RunRecord:
    """The run folder: rounds/NN with round.json last, rounds.jsonl, and the tracker beside them."""

    def __init__(self, cfg: Root, folder: Path, tracker: tracking.Tracker) -> None:
        self.cfg, self.folder, self.tracker = cfg, folder, tracker
        self.file = tracking.RoundsFile(folder / "rounds.jsonl")
        self.rounds: list[dict[str, float]] = []
        self.importance: dict[str, dict[str, Any]] = {}  # by prefix of the metrics
        self.update: Model | None = None  # that of the last round
        self.base: Artifact | None = None  # its scores
        self.failed: dict[str, str] = {}
        self.warned: set[str] = set()  # of what look_at_verdicts has warned

    def attempt(self, what: str, make: Callable[[], T]) -> T | None:
        """make(), or None when it failed: an analysis is worth no run. The reason is logged, and stands in
        summary.json under `analysis_failed`."""
        try:
            return make()
        except Exception as error:
            if isinstance(error, StoreError) or is_disk_full(error):
                raise
            self.failed[what] = f"{type(error).__name__}: {error}"
            log.warning("%s failed, the run goes on without it: %s", what, error, exc_info=True)
            return None

    def ahead(self, bench: Bench, model: Model, number: int, until: int) -> list[Callable[[], object]]:
        """For `Store.ahead`: what depends on the model of a round alone, but for its evaluation, which comes first."""

        def look() -> None:
            bench.probe(model, number, self._held_out(bench, model, number))

        def practise() -> Artifact:
            return bench.solve(model, number + 1)

        def measure() -> None:
            for name, solutions in self._measured_on(bench, practise()).items():
                if name not in self.importance and (of := solutions()):
                    bench.importance(of, name)

        return [practise, look, measure] if number < until else [look]

    def _held_out(self, bench: Bench, model: Model, number: int) -> Artifact | None:
        return bench.held_out_samples(model, number) if self.cfg.suite.pass_k_n else None

    def _measured_on(self, bench: Bench, samples: Artifact) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        """What gives the solutions that importance is measured on, by the measure's name."""
        spec = self.cfg.analysis
        wanted = {"importance": lambda: solved(bench.by_base(samples))} if spec.importance else {}
        if spec.importance and spec.ood:
            wanted["importance_ood"] = lambda: list(stages.read_lines(bench.solutions_ood().folder / "examples.jsonl"))
        return wanted

    def measure_importance(self, bench: Bench, samples: Artifact) -> None:
        """Importance of the base's layers, once a chain: on its own solutions of the first round that has some."""
        for name, solutions in self._measured_on(bench, samples).items():
            if name in self.importance:
                continue
            made = self.attempt(name, lambda name=name, of=solutions: bench.importance(of(), name))
            self.importance[name] = json.loads((made.folder / f"{name}.json").read_text()) if made else {}
            if made:
                place(made.folder / f"{name}.json", self.folder / "rounds" / "00" / f"{name}.json")

    def write(
        self, bench: Bench, number: int, *, scores: Artifact, merged: Merged, samples: Artifact | None = None,
        fitted: Artifact | None = None, tuned: Model | None = None, now: Round | None = None,
        pre_scores: Artifact | None = None, layers: Artifact | None = None,
    ) -> None:  # fmt: skip
        """Puts a round's artifacts and figures in place and tells the tracker."""
        metrics = bench.figures(scores)
        held_out = self._held_out(bench, merged.model, number)
        probed = self.attempt(f"round {number}: diversity", partial(bench.probe, merged.model, number, held_out))
        if probed:
            metrics |= stages.probe_metrics(probed, bench.unseen(scores))
        if pre_scores:
            metrics |= {f"pre_merge/{name}": value for name, value in bench.figures(pre_scores).items()}
        if samples:
            metrics |= stages.practice_metrics(samples.facts)
        if fitted and now:
            metrics |= stages.fit_metrics(fitted.facts) | bench.ratio_metrics(now, merged)
        if layers:
            metrics |= {
                "weights/drift": layers.facts["drift"], "merge/anchor_distance": layers.facts["anchor_distance"]
            }  # fmt: skip
            changed = json.loads((layers.folder / "layers.json").read_text())
            metrics |= stages.layer_metrics(changed)
            for name, table in self.importance.items():
                metrics |= self.mismatch(number, name, table, changed)
        if self.base is None:
            self.base = scores
        else:
            metrics |= bench.superficiality(self.base, scores)

        folder = self.folder / "rounds" / f"{number:02d}"
        (folder / "round.json").unlink(missing_ok=True)
        for artifact in filter(None, (samples, scores, held_out, probed, layers, merged.search)):
            for name in artifact.files:
                place(artifact.folder / name, folder / name)
        if number and (bench.keep == "all" or (bench.keep == "last" and number == self.cfg.rounds)):
            bench.place_model(merged.model, folder / "model")
        self.rounds.append(metrics)
        self.file.add(number, metrics)
        (folder / "round.json").write_text(
            json.dumps({"round": number, **dict(sorted(metrics.items()))}, indent=1) + "\n"
        )
        if fitted:
            self.tracker.log_curve(number, fitted.facts["losses"])
        self.tracker.log_round(number, metrics)
        if number:
            tracking.console.print(tracking.round_table(describe(self.cfg), self.rounds))

    def look_at_layers(self, bench: Bench, now: Round, tuned: Model, merged: Merged) -> Artifact | None:
        """The analysis of layers, the round's update in it beside that of the round before."""
        updated = self.attempt(f"round {now.number}: update", partial(bench.update, now.start, tuned, self.update))
        self.update, figures = updated or (None, None)
        analyze = partial(bench.analyze, tuned, merged, now.anchor, figures)
        return self.attempt(f"round {now.number}: layer change", analyze)

    def look_at_verdicts(self, samples: Artifact, number: int) -> None:
        """Says what became of a round's samples; warns once where most could not be judged, once where most were cut
        off."""
        n, reasons = samples.facts["samples"], samples.facts["reasons"]
        log.info("round %d: %d samples: %s", number, n, ", ".join(f"{c} {r}" for r, c in reasons.items() if c))
        unjudged = {r: c for r in UNJUDGED if (c := reasons[r])}
        if 2 * sum(unjudged.values()) > n and "unjudged" not in self.warned:
            self.warned.add("unjudged")
            log.warning(
                "round %d: of %d samples %s: the verifier finds no answer in most of them. Look at rounds/%02d/"
                "samples.jsonl, then at task.verifier, task.prompt, the worked examples (task.shots) and task.stop",
                number, n, ", ".join(f"{c} {r}" for r, c in unjudged.items()), number,
            )  # fmt: skip
        if 2 * reasons["truncated"] > n and "truncated" not in self.warned:
            self.warned.add("truncated")
            log.warning(
                "round %d: %d of %d samples were cut off after %d tokens, and are not judged: raise "
                "sampler.max_new_tokens (and sft.max_length), or let the answer end, by task.stop",
                number, reasons["truncated"], n, self.cfg.sampler.max_new_tokens,
            )  # fmt: skip

    def layer_importance(self) -> dict[str, float]:
        """{layer_00: importance} by the estimator of merge.policy.importance, nothing without one. Raises MergeError
        where it could not be measured: the merge needs it."""
        policy = getattr(self.cfg.merge, "policy", None)
        if policy is None or policy.importance is None:
            return {}
        table = self.importance.get("importance") or {}
        if not table:
            raise MergeError(
                f"merge.policy.importance: {policy.importance} could not be measured: "
                f"{self.failed.get('importance', 'no solution of the base was correct')}"
            )
        return {row: figures["mean"] for row, figures in table["estimators"][policy.importance].items()}

    def mismatch(self, number: int, name: str, table: dict[str, Any], layers: dict[str, Any]) -> dict[str, float]:
        """The figures of importance against change; with those of importance itself in the first round that has any."""
        if not table:
            return {}
        told = any(key.startswith(f"{name}/") for metrics in self.rounds for key in metrics)
        own = {} if told else stages.importance_metrics(table, name)
        prefix = name.replace("importance", "mismatch")
        compare = partial(stages.mismatch_metrics, table, layers, self.cfg.analysis.top_share, prefix)
        return own | (self.attempt(f"round {number}: {prefix}", compare) or {})

    def summary(self, bench: Bench, seconds: float) -> dict[str, Any]:
        """summary.json and timing.json; the summary."""
        if self.cfg.analysis.importance and not self.importance:
            self.failed["importance"] = "no round had verified solutions of the base to measure it on"
        best = max(range(len(self.rounds)), key=lambda t: (self.rounds[t]["val/id/acc"], -t))
        tally = bench.store.tally
        summary = {
            "computed_in": {
                "device": bench.device, "sampler_dtype": bench.dtype, "trainer_precision": bench.precision
            },
            "base_digest": bench.base.digest, "decontaminated": bench.decontaminated,
            "weights_kept": bench.keep, "rounds": len(self.rounds) - 1,
            "final": self.rounds[-1], "base": self.rounds[0],
            "best_round_by_validation": best, "analysis_failed": self.failed,
            "gap/superficiality": self.rounds[-1]["gap/superficiality"],
            "stages": {
                "computed": tally.computed, "reused": tally.reused, "seconds_saved": round(tally.seconds_saved, 2)
            },
        }  # fmt: skip
        timing = {"seconds": round(seconds, 2), "store_seconds": round(tally.seconds_store, 3), "stages": tally.seconds}
        (self.folder / "timing.json").write_text(json.dumps(timing, indent=1) + "\n")
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        return summary


def describe(cfg: Root) -> str:
    """One line that says what a run is: merge, ratio, policy, learning rate, seed."""
    merge: Any = cfg.merge
    said = "merge=none (vanilla)"
    if merge.kind != "none":
        policy = "" if merge.policy.kind == "constant" else f" policy={merge.policy.kind}"
        said = f"merge={merge.kind} ratio={merge.ratio}{policy}"
    return f"{said}  lr={cfg.sft.lr:g}  seed={cfg.seed}"

"""The doors. The only module that knows Hydra.

One job: check the config, set threads, run, and mark the folder DONE, FAILED (with the traceback) or INTERRUPTED.
What a sweep adds stands in `hydra_plugins/itermerge_sweeper.py`.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import current_process
from pathlib import Path
from typing import Any, NoReturn

import hydra
from filelock import Timeout
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from . import sweep, upkeep
from .config import (
    ConfigError,
    Export,
    ProgramPretrainLab,
    Root,
    StoreLocal,
    check,
    check_analyze,
    check_between,
    check_evaluate,
    check_export,
    conf_dir,
    to_dict,
)
from .store import StoreError, is_disk_full, lock_file

# What `pip install itermerge[...]` brings each of Hydra's launchers, and the module that shows that it is there.
LAUNCHERS = {
    "submitit_local": ("submitit", "hydra_plugins.hydra_submitit_launcher"),
    "submitit_slurm": ("submitit", "hydra_plugins.hydra_submitit_launcher"),
    "ray": ("ray", "hydra_plugins.hydra_ray_launcher"),
}
LAUNCHERS |= {"slurm": LAUNCHERS["submitit_slurm"]}  # launch=...
LOCK = ".lock"  # held while a process runs in a run folder
log = logging.getLogger("itermerge")
# How many jobs have GPUs at a time: ${gpu_count:WANTED,DEVICES}
OmegaConf.register_new_resolver(
    "gpu_count",
    lambda wanted, each=1: max(1, len(sweep.found_gpus(wanted)) // (each if isinstance(each, int) else 1)),
    replace=True,
)


def main() -> None:
    """`itermerge [overrides]` and `python -m itermerge`."""
    try:
        sys.argv[1:] = sweep.resumed(sys.argv[1:])
    except sweep.SweepError as error:
        die(str(error))
    for given in sys.argv[1:]:
        key, _, launcher = given.partition("=")
        if key.removeprefix("+") in ("hydra/launcher", "launch") and launcher in LAUNCHERS:
            extra, module = LAUNCHERS[launcher]
            if not _installed(module):
                die(f"{given} needs the extra {extra!r}: pip install 'itermerge[{extra}]'")
    run = _hydra_main(job)
    with tempfile.TemporaryDirectory() as nowhere:
        if is_plan(sys.argv[1:]):  # Hydra makes a run's folder before we are asked: nothing of it is to stay
            sys.argv.append(f"hydra.run.dir='{nowhere}/run'")
        try:
            run()
        except KeyboardInterrupt:
            sys.exit(130)


def _hydra_main(task: Callable[[DictConfig], Any], config_name: str = "config") -> Callable[[], None]:
    """`task` as a command that Hydra composes the config of."""
    ConfigLoaderImpl.get_group_options = _group_options
    return hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(task)


def _group_options(
    self: Any, group_name: str, results_filter: Any = ObjectType.CONFIG, config_name: str | None = None,
    overrides: list[str] | None = None,
) -> list[str]:  # fmt: skip
    """As Hydra's own, which copies all config sources for each question; --help asks some 130, which took a second."""
    copies = self.__dict__.setdefault("_copies", {})
    if (of := (config_name, *(overrides or ()))) not in copies:
        copies[of] = self._parse_overrides_and_create_caching_repo(config_name, overrides or [])[1]
    return copies[of].get_group_options(group_name, results_filter)


def is_plan(arguments: Sequence[str]) -> bool:
    """Whether a command line says plan=true."""
    given = [a.partition("=")[2] for a in arguments if a.lstrip("+").startswith("plan=")]
    return bool(given) and given[-1].lower() in ("true", "yes", "on", "1")


def show_plan(cfgs: Sequence[Root], workers: int = 1, notes: Sequence[str] = ()) -> None:
    """What plan=true says of a run or of a sweep's jobs; ends with what a run would end with before its first stage."""
    with _imports(max(cfg.threads for cfg in cfgs)):
        from . import plan

    try:
        made = plan.plan(cfgs, workers)
    except Exception as error:
        if _expected(error):
            die(str(error))
        raise
    made.about += notes
    plan.show(made)


def analyze_main() -> None:
    """`itermerge-analyze base=A tuned=B`."""
    _hydra_main(_analyze, "analyze")()


def _analyze(composed: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with _door():
        cfg = check_analyze(composed)
        if (folder / "layers.json").exists() or (folder / "config.yaml").exists():
            raise Occupied(f"out: {folder} holds something already, which is never overwritten; give another out")
        with _imports(cfg.threads):
            from . import analyze, report, tracking

        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg))))
        found, failed = {}, None
        try:
            found = analyze.analyze(cfg, folder)
        except BaseException as error:
            if not (folder / "layers.json").exists():
                (folder / "config.yaml").unlink()  # nothing was made: the folder may be used again
            if not isinstance(error, Exception) or not (folder / "layers.json").exists():
                raise
            failed = error
        made = report.analysis(folder)
        analyze.show(found, json.loads((folder / "layers.json").read_text()))
        tracking.console.print(f"folder {_short(folder)}, report {_short(made[0])}", soft_wrap=True)
        if failed:
            raise failed


def merge_main() -> None:
    """`itermerge-merge base=A tuned=B merge=RULE out=C`."""
    _hydra_main(_merge, "checkpoints")()


def _merge(composed: DictConfig) -> None:
    with _door("interrupted; the same command goes on from what is written"):
        users_own_modules()
        typed = list(HydraConfig.get().overrides.task)
        cfg = check_between(composed, typed)
        with _imports(1, models=False):  # torch's own threads; cfg.threads are tensors at a time
            from . import checkpoints

        checkpoints.merge(cfg, typed)


def evaluate_main() -> None:
    """`itermerge-evaluate model=hf model.path=DIR`."""
    _hydra_main(_evaluate, "evaluate")()


def _evaluate(composed: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with _door():
        cfg = check_evaluate(composed, list(HydraConfig.get().overrides.task))
        if (folder / "evaluation.json").exists() or (folder / "config.yaml").exists():
            raise Occupied(f"out: {folder} holds something already, which is never overwritten; give another out")
        with _imports(cfg.threads):
            from . import evaluate, tracking

        evaluate.show(evaluate.evaluate(cfg, folder))
        tracking.console.print(f"folder {_short(folder)}", soft_wrap=True)


def export_main() -> None:
    """`itermerge-export run=DIR`."""
    _hydra_main(_export, "export")()


def _export(composed: DictConfig) -> None:
    with _door("interrupted; nothing was made"):
        users_own_modules()
        asked = check_export(composed)
        run = Path(asked.run).expanduser()
        cfg = _config_of(run)
        with _imports(cfg.threads):
            from . import export, tracking

        number = export.round_of(run, asked.round)
        out = run / "export" / export.name_of(asked.round) if asked.out is None else Path(asked.out).expanduser()
        export.check_out(out)
        with _weights_of(cfg, run, number, out.parent) as model:
            export.export(cfg, run, number, model, out, asked.dtype, asked.decoding)
        tracking.console.print(f"round {number} of {_short(run)} in {_short(out)}", soft_wrap=True, highlight=False)


def _config_of(run: Path) -> Root:
    """The config of a run folder. Raises ConfigError."""
    if (run / sweep.FILE).is_file():
        raise ConfigError(f"run: {run} holds a sweep; give one of its jobs, as {run}/0")
    if not (run / "config.yaml").is_file() or not (run / "rounds.jsonl").is_file():
        raise ConfigError(f"run: {run} is no run folder: there is no config.yaml or no rounds.jsonl in it")
    loaded = OmegaConf.load(run / "config.yaml")
    assert isinstance(loaded, DictConfig)
    try:
        return check(loaded)
    except ConfigError as error:
        raise ConfigError(f"run: {run}/config.yaml is not of this version of itermerge: {error}") from error


@contextmanager
def _weights_of(cfg: Root, run: Path, number: int, near: Path) -> Iterator[Path]:
    """The folder of a round's weights. Where they were not kept, the run is gone through again up to that round in a
    folder in `near`: its stages are found in its store, and what is missing there is computed."""
    from . import export, loop, stages, tracking

    if (model := export.placed(run, number)) is not None:
        yield model
        return
    if not number:
        base = stages.folder_of(cfg.model, cfg.paths)
        export.check_base(run, stages.base_digest(base, getattr(cfg.model, "trust_remote_code", False)))
        yield base
        return
    found = f"what {cfg.store.dir} has of it is found" if isinstance(cfg.store, StoreLocal) else "all of it, store=none"
    log.warning("the weights of round %d were not kept: the run is computed again up to them (%s)", number, found)
    cfg.export = Export(dtype="float32", decoding="greedy", rounds=[number])
    near.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="again-", dir=near) as scratch:
        again = Path(scratch)
        claim(again, cfg)
        loop.run(cfg, again, tracking.NullTracker(), until=number)
        export.check_same(run, again, number)
        yield again / "export" / export.name_of(number)


@contextmanager
def _door(interrupted: str | None = None) -> Iterator[None]:
    """How a command beside `itermerge` itself ends: with one line for what a user can mend, with 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _expected(error):
            die(str(error))
        raise


def users_own_modules() -> None:
    """Makes the folder of --config-dir one that Python modules are imported from."""
    sources = HydraConfig.get().runtime.config_sources
    sys.path[:0] = [s.path for s in sources if s.provider == "command-line" and s.path not in sys.path]


class NotStarted(RuntimeError):
    """A job that was left out because another one had failed (sweep.on_error=stop)."""


class Occupied(FileExistsError):
    """A run folder that holds something else, which is left as it is."""


def job(composed: DictConfig) -> float | None:
    """One run; the figure named by `optimized_metric`."""
    leave_with_parent()
    with _at_work:
        return _job(composed)


def _job(composed: DictConfig) -> float | None:
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    single = hydra_cfg.mode == RunMode.RUN
    lock = lock_file(folder / LOCK)
    try:
        users_own_modules()
        cfg = check(composed)
        if single and cfg.sweep.resume:
            raise ConfigError("sweep.resume: goes on with a whole sweep; a single run goes on with hydra.run.dir=DIR")
        if cfg.plan:
            show_plan([cfg])
            return None
        occupy(lock, folder, wait=not single)
        if not single and (folder / "DONE").exists() and same_config(folder, cfg):
            return figure_of(folder, cfg)
        if not single and cfg.sweep.on_error == "stop" and (other := sweep.failed_before(folder.parent)):
            raise NotStarted(f"job {folder.name} is not started: job {other} failed (sweep.on_error=stop)")
        claim(folder, cfg)
        value = start(cfg, folder, list(hydra_cfg.overrides.task))
        (folder / "DONE").write_text("")
        return value
    except KeyboardInterrupt:
        if lock.is_locked:  # else it waited for another process, whose folder this is
            (folder / "INTERRUPTED").write_text("the same command goes on from the finished stages\n")
        log.warning("interrupted; the same command goes on from the finished stages (folder %s)", folder)
        if single:
            sys.exit(130)
        raise
    except (NotStarted, Occupied) as error:
        return fail(folder, error, single, mark=False)
    except Exception as error:
        return fail(folder, error, single)
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def leave_with_parent(poll: float = 2.0) -> None:
    """In a worker of joblib: ends this process when the sweep's own has died, after the job at hand. loky's workers
    would stay for ever, with all their memory."""
    if _watching or not current_process().name.startswith("Loky"):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll)
        with _at_work:
            os._exit(1)

    _watching.append(threading.Thread(target=watch, daemon=True))
    _watching[0].start()


_at_work = threading.Lock()  # held while a job runs
_watching: list[threading.Thread] = []


def occupy(lock: Any, folder: Path, wait: bool) -> None:
    """Makes this the only process in the run folder. Raises Occupied if another is there and we do not wait."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise Occupied(f"{folder}: another process is running there; give another hydra.run.dir") from None
        log.warning("another process is running in %s; waiting for it", _short(folder))
        lock.acquire(poll_interval=0.5)


def same_config(folder: Path, cfg: Root) -> bool:
    """Whether a run folder's config.yaml says the same, apart from how it is run (no part of a result)."""
    how = ("sweep", "store", "logger", "paths", "plan")
    try:
        theirs = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except OSError:
        return False
    mine = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))))
    assert isinstance(theirs, dict)
    assert isinstance(mine, dict)
    return {k: v for k, v in theirs.items() if k not in how} == {k: v for k, v in mine.items() if k not in how}


def figure_of(folder: Path, cfg: Root) -> float | None:
    """What a finished run returned."""
    summary = folder / "summary.json"
    return float(json.loads(summary.read_text())["final"][cfg.optimized_metric]) if summary.is_file() else None


def claim(folder: Path, cfg: Root) -> None:
    """Takes the run folder: a new one, or an unfinished one of the same config. Raises Occupied."""
    config = folder / "config.yaml"
    if (folder / sweep.FILE).exists():
        raise Occupied(f"{folder} holds a sweep, whose jobs are in folders below it; give another hydra.run.dir")
    if (folder / "DONE").exists():
        raise Occupied(f"{folder} holds a finished run, which is never overwritten; give another hydra.run.dir")
    if config.exists() and not same_config(folder, cfg):
        raise Occupied(f"{folder} holds an unfinished run of another config (see its config.yaml)")
    sweep.retry(folder)
    if (folder / sweep.BEFORE).exists():
        log.info("tried again; before, it failed with: %s", sweep.why(folder / sweep.BEFORE))
    for name in (*sweep.MARKS, "summary.json"):
        (folder / name).unlink(missing_ok=True)
    partial = folder / "config.yaml.tmp"
    partial.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg))))
    os.replace(partial, config)


def start(cfg: Root, folder: Path, overrides: list[str]) -> float | None:
    """Runs a checked config in its folder."""
    gpu = sweep.take_gpu(cfg.sweep.gpus, gpus_of(cfg))
    with _imports(cfg.threads):
        from . import loop, tracking
    made_by = provenance(overrides) | ({"gpu": gpu} if gpu is not None else {})
    (folder / "provenance.json").write_text(json.dumps(made_by, indent=1) + "\n")
    if isinstance(cfg.program, ProgramPretrainLab):
        return _pretrain(cfg, folder)
    tracker = make_tracker(cfg, folder)
    summary: dict[str, Any] = {}
    made: list[Path] = []
    try:
        summary = loop.run(cfg, folder, tracker)
        made = _report(folder)
    finally:
        try:
            tracker.log_folder(folder, made)
        except Exception:  # the run is whole, or has an error of its own to tell
            print(
                f"tables and charts of {_short(folder)} did not reach the logger:\n{traceback.format_exc()}",
                file=sys.stderr,
            )
        finally:
            tracker.finish(summary.get("final", {}), failed=not summary)
    pictures = ", ".join(_short(p) for p in made[1:])
    said = f"report {_short(made[0])}, figures {pictures}" if made else "without a report"
    tracking.console.print(f"run folder {_short(folder)}, {said}", soft_wrap=True)
    for what, reason in summary["analysis_failed"].items():
        tracking.console.print(f"not measured: {what} ({reason})", soft_wrap=True, markup=False)
    return float(summary["final"][cfg.optimized_metric])


def gpus_of(cfg: Root) -> int:
    """How many GPUs a job of a sweep takes."""
    return cfg.trainer.devices if cfg.sweep.gpus is not None and cfg.trainer.devices != "auto" else 1


def _report(folder: Path) -> list[Path]:
    """The paths of a run's report, the page first; none where it cannot be made: the run itself is whole."""
    from . import report

    try:
        return report.run(folder)
    except Exception:
        print(f"the report of {_short(folder)} could not be made:\n{traceback.format_exc()}", file=sys.stderr)
        return []


@contextmanager
def _imports(threads: int, models: bool = True) -> Iterator[None]:
    """For imports of what computes, torch the first of them: with so many threads, and silent where it loads models.

    They make half a million objects that stay. Python's collector is never to look at these: neither in between nor at
    the end of the process, which would take a second or two. A sweep's worker imports once; what its former jobs have
    left is for the collector.
    """
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        import torch

        torch.set_num_threads(threads)
        if models:
            from transformers.utils import logging as hf_logging

            hf_logging.disable_progress_bar()
            hf_logging.set_verbosity_error()
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()
            atexit.register(gc.freeze)  # what came since


def make_tracker(cfg: Root, folder: Path) -> Any:
    from . import loop, tracking

    if cfg.logger.kind == "jsonl":
        return tracking.NullTracker()
    group = folder.parent.name if folder.parent.name not in ("", "outputs") else "single"
    setting = {"ratio": getattr(cfg.merge, "ratio", 1.0), "merge": cfg.merge.kind, "lr": cfg.sft.lr}
    setting |= {"rounds": cfg.rounds, "seed": cfg.seed}
    config = to_dict(cfg) | {"setting": setting}
    return tracking.WandbTracker(vars(cfg.logger), folder, loop.describe(cfg), group, config)


def _pretrain(cfg: Root, folder: Path) -> float:
    from . import pretrain, tracking
    from .sft import FitSpec

    program, out = cfg.program, Path(cfg.program.out).expanduser()
    if (out / "model.safetensors").exists():
        raise FileExistsError(f"program.out: {out} already holds a model; remove it, or give another program.out")
    spec = FitSpec(
        epochs=1, lr=1.0, batch_size=program.batch_size, schedule="cosine", warmup_ratio=0.03, weight_decay=0.01,
        betas=(0.9, 0.98), max_length=256, accelerator="cpu", devices=1, precision="32-true",
        accumulate_grad_batches=1, gradient_clip_val=1.0, deterministic=False,
    )  # fmt: skip
    names = ("width", "layers", "heads", "kv_heads", "ffn", "families")
    recipe = {name: getattr(program, name) for name in names}
    recipe |= {"threads": cfg.threads, "phases": {k: vars(phase) for k, phase in program.phases.items()}}
    code = provenance([])
    with (
        tempfile.TemporaryDirectory() as scratch,
        tracking.progress("pretraining", pretrain.steps(recipe, spec)) as tick,
    ):
        loss = pretrain.pretrain(
            out, seed=cfg.model.seed, recipe=recipe, spec=spec, scratch=Path(scratch), on_progress=tick,
            provenance={"commit": code["commit"], "versions": code["versions"]},
        )  # fmt: skip
    tracking.console.print(
        f"lab base model of seed {cfg.model.seed} in {_short(out)} (final mean loss {loss:.4f} nats a token)"
    )
    return loss


def provenance(overrides: list[str]) -> dict[str, Any]:
    """What made a run: versions, commit and difference to it (of a checkout), the command's overrides."""
    from importlib.metadata import version

    def git(*words: str) -> str | None:
        got = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return got.stdout.strip() if got.returncode == 0 else None

    try:
        commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD")
    except OSError:  # no git on this machine
        commit, diff = None, None
    names = ("itermerge", "torch", "transformers", "tokenizers", "pytorch-lightning", "hydra-core", "numpy")
    versions = {name: version(name) for name in names} | {"python": platform.python_version()}
    return {"overrides": overrides, "versions": versions, "commit": commit, "diff": diff}


def fail(folder: Path, error: Exception, single: bool, mark: bool = True) -> None:
    """Marks the folder FAILED; a single run ends with the message, a sweep's job hands the error to Hydra."""
    if mark and not (folder / "DONE").exists():
        (folder / "FAILED").write_text("".join(traceback.format_exception(error)))
    if not single:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        raise error
    if _expected(error):
        die(str(error))
    if is_disk_full(error):
        die(f"the disk is full: {folder} could not be written. Finished stages are intact; free space and run it again")
    raise error


def _expected(error: Exception) -> bool:
    """Errors whose message is meant for the user; others keep their traceback."""
    return type(error).__module__.startswith("itermerge.") or isinstance(error, FileExistsError)


def die(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def before_sweep(cfgs: Mapping[int, Root], folder: Path, done: int, workers: int) -> None:
    """Says what is about to run, and ends with an error when GPUs or disks cannot do it."""
    if done:
        jobs = f": {', '.join(map(str, cfgs))}" if cfgs else ""
        print(f"{done} of {done + len(cfgs)} jobs are done already, {len(cfgs)} to run{jobs}")
    if not cfgs:
        return
    first = next(iter(cfgs.values()))
    cores, threads = os.cpu_count() or 1, max(cfg.threads for cfg in cfgs.values())
    workers = min(cores if workers < 0 else workers, len(cfgs))
    known = [(cfg, size) for cfg in cfgs.values() if (size := upkeep.weights_size(cfg)) is not None]
    stores = {Path(c.store.dir).expanduser() if isinstance(c.store, StoreLocal) else folder for c, _ in known}
    try:
        each = max(map(gpus_of, cfgs.values()))
        if first.sweep.gpus is not None and workers * each > (count := len(sweep.gpus(first.sweep.gpus))):
            of = "one" if each == 1 else f"trainer.devices={each}"
            die(f"hydra.launcher.n_jobs: {workers} jobs at once, sweep.gpus has {count}, and each job keeps {of}")
        for place in stores:
            upkeep.check_space(known, place, folder, workers)
    except (ConfigError, StoreError) as error:
        die(str(error))
    if workers * threads > cores:
        print(
            f"note: {workers} jobs at once with {threads} threads each on {cores} cores will slow each other down; "
            f"hydra.launcher.n_jobs={max(1, cores // threads)} fits", file=sys.stderr,
        )  # fmt: skip
    begun_in = sweep.read(folder).get("cwd", os.getcwd()) if (folder / sweep.FILE).is_file() else os.getcwd()
    if begun_in != os.getcwd():
        print(
            f"note: this sweep was begun in {begun_in}; relative paths of its command are others here", file=sys.stderr
        )


def end_of_sweep(folder: Path) -> bool:
    """Draws the sweep's figures and says which jobs failed, why, and how to go on; whether all jobs are done."""
    from . import report, tracking

    jobs = range(len(sweep.read(folder)["jobs"]))
    marks = {i: sweep.mark_of(folder / str(i)) for i in jobs}
    if "DONE" in marks.values():
        try:
            table, (page, *pictures) = report.sweep(folder)
            tracking.console.print(table)
            drawn = ", ".join(_short(picture) for picture in pictures)
            tracking.console.print(
                f"sweep folder {_short(folder)}, report {_short(page)}, figures {drawn}", soft_wrap=True
            )
        except Exception:  # what failed and how to go on must be said all the same
            print(f"the sweep's table could not be made:\n{traceback.format_exc()}", file=sys.stderr)
    failed = [i for i in jobs if marks[i] == "FAILED"]
    for i in failed:
        where = folder / str(i) / "FAILED"
        print(f"job {i} failed: {sweep.why(where)} (traceback in {_short(where)})", file=sys.stderr)
    left = [i for i in jobs if marks[i] not in ("DONE", "REPLACED")]
    if left:
        stopped = "sweep.on_error=stop" in sweep.read(folder)["command"] and failed
        go_on = " sweep.on_error=continue" if stopped else ""
        other = f", {len(left) - len(failed)} interrupted or not begun" if len(left) > len(failed) else ""
        print(
            f"{len(left)} of {len(jobs)} jobs are not done: {len(failed)} failed{other}. To run them:\n"
            f"    itermerge {sweep.RESUME}{_short(folder)}{go_on}", file=sys.stderr,
        )  # fmt: skip
    return not left


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

"""The doors. The only module that knows Hydra.

One job: check the config, set threads, run, and mark the folder DONE, FAILED (with the traceback) or INTERRUPTED.
What a sweep adds stands in `hydra_plugins/itermerge_sweeper.py`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .config import ConfigError, ProgramPretrainLab, Root, check, conf_dir, to_dict
from .store import is_disk_full

MARKS = ("DONE", "FAILED", "INTERRUPTED")
log = logging.getLogger("itermerge")


def main() -> None:
    """`itermerge [overrides]` and `python -m itermerge`."""
    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)


def job(composed: DictConfig) -> float | None:
    """One run; the figure named by `optimized_metric`."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    single = hydra_cfg.mode == RunMode.RUN
    try:
        cfg = check(composed)
        claim(folder, cfg)
    except (ConfigError, FileExistsError) as error:
        return fail(folder, error, single, mark=isinstance(error, ConfigError))
    try:
        value = start(cfg, folder, list(hydra_cfg.overrides.task))
    except KeyboardInterrupt:
        (folder / "INTERRUPTED").write_text("the same command goes on from the finished stages\n")
        log.warning("interrupted; the same command goes on from the finished stages (folder %s)", folder)
        if single:
            sys.exit(130)
        raise
    except Exception as error:
        return fail(folder, error, single)
    (folder / "DONE").write_text("")
    return value


def claim(folder: Path, cfg: Root) -> None:
    """Takes the run folder: a new one, or an unfinished one of the same config. Raises FileExistsError."""
    config, content = folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))
    if (folder / "DONE").exists():
        raise FileExistsError(f"{folder} holds a finished run, which is never overwritten; give another hydra.run.dir")
    if config.exists() and config.read_text() != content:
        raise FileExistsError(f"{folder} holds an unfinished run of another config (see its config.yaml)")
    for mark in MARKS:
        (folder / mark).unlink(missing_ok=True)
    config.write_text(content)


def start(cfg: Root, folder: Path, overrides: list[str]) -> float | None:
    """Runs a checked config in its folder."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    torch.set_num_threads(cfg.threads)
    (folder / "provenance.json").write_text(json.dumps(provenance(overrides), indent=1) + "\n")
    if isinstance(cfg.program, ProgramPretrainLab):
        return _pretrain(cfg, folder)
    from . import loop, report, tracking

    tracker = make_tracker(cfg, folder)
    summary: dict[str, Any] = {}
    try:
        summary = loop.run(cfg, folder, tracker)
    finally:
        tracker.finish(summary.get("final", {}), failed=not summary)
    picture = report.run_figure(folder)
    tracking.console.print(f"run folder {_short(folder)}, figure {_short(picture)}", soft_wrap=True)
    return float(summary["final"][cfg.optimized_metric])


def make_tracker(cfg: Root, folder: Path) -> Any:
    from . import loop, tracking

    if cfg.logger.kind == "jsonl":
        return tracking.NullTracker()
    group = folder.parent.name if folder.parent.name not in ("", "outputs") else "single"
    return tracking.WandbTracker(vars(cfg.logger), folder, loop.describe(cfg), group, to_dict(cfg))


def _pretrain(cfg: Root, folder: Path) -> float:
    import tempfile

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
    if mark:
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


def die(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def end_of_sweep(folder: Path) -> list[str]:
    """Draws the sweep's figure and says which jobs failed, and why; the failed jobs' folders."""
    from . import report, tracking

    jobs = sorted((d for d in folder.iterdir() if d.name.isdigit()), key=lambda d: int(d.name))
    if any((d / "summary.json").is_file() for d in jobs):
        table, picture = report.sweep(folder)
        tracking.console.print(table)
        tracking.console.print(f"sweep folder {_short(folder)}, figure {_short(picture)}", soft_wrap=True)
    failed = [d.name for d in jobs if (d / "FAILED").is_file()]
    for name in failed:
        last = (folder / name / "FAILED").read_text().strip().splitlines()[-1]
        print(f"job {name} failed: {last} (traceback in {_short(folder / name / 'FAILED')})", file=sys.stderr)
    return failed


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

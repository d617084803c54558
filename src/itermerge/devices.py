"""Several devices: a group of child processes, one a device, that sample and fit for the run that started them.

The children are fresh interpreters (`CHILD`) that hear from their parent over a pipe, a JSON line at a time, and answer
likewise. They know nothing of Hydra, of the store or of a tracker: they are told a model's folder, prompts with the
keys of their random numbers, or a fit. So jobs of a sweep may have several devices as well. They end with their parent,
whichever way it ends: a pipe that closes is the end.

Prompts are shared out by length, those of one prompt to one process; the draws of a sample are its own (`decoding`), so
completions are those of one device, rounding apart. Of a step's examples each process takes its part, and the loss is
the mean over the tokens of all of them (`sft`).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from .decoding import Completion, Decode, complete
from .merging import MergeCallback
from .policy import Policy, copy_in
from .sft import Example, FitSpec, Fitted, fit
from .weights import Weights, mean_of, write_folder

TAIL = 20  # lines of a process's log that an error shows
# What is imported stays: half a million objects, at which Python's collector would look again and again, for seconds.
CHILD = "import gc; gc.disable(); from itermerge import devices; gc.freeze(); gc.enable(); devices.main()"
PATIENCE = 5.0  # seconds for a process to end after its pipe was closed


class DeviceError(RuntimeError):
    """A process of a group that has ended, or failed with an error that is no user's."""


@dataclass(frozen=True)
class Events:
    """Merge events inside a fit: the folders of the anchor (their mean, where there are several), and what else
    `MergeCallback` is told."""

    anchor: Sequence[Path]
    how: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A fit: from the weights in `start`, into the folder `out`, whose other files are those of `like`."""

    start: Path
    trust_remote_code: bool
    examples: Sequence[Example]
    spec: FitSpec
    seed: int
    out: Path
    like: Path
    base: Path | None = None  # what l2_to_base and kl_to_base pull to
    events: Events | None = None
    dtype: str = "float32"  # of the copy that is scored
    scored: bool = False  # whether `patience` asks for a score after each epoch


class Group:
    """`n` processes, started when they are first asked for something. An error of one of them is raised here. One in a
    fit, where the others wait for it, ends them all, as does Ctrl-C; another request starts new ones. `scratch` is a
    folder for logs and for what is handed over."""

    def __init__(self, n: int, device: str, *, threads: int, scratch: Path) -> None:
        """`device` is cpu or cuda; `threads` are those of all processes together."""
        self.n, self.device, self.threads, self.scratch = n, device, threads, Path(scratch) / "devices"
        self.children: list[_Child] = []
        self.started = 0

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, folder: Path, *, dtype: str, trust_remote_code: bool = False) -> Decode:
        """What completes prompts with the model in `folder`, until another one is loaded. Raises FileNotFoundError
        where its weights are gone."""
        ask = {"do": "load", "folder": str(folder), "dtype": dtype, "trust_remote_code": trust_remote_code}
        self._all([ask] * self.n)
        return self.complete

    def complete(
        self,
        prompts: Sequence[str],
        *,
        keys: Sequence[int] | None,
        max_new_tokens: int,
        on_progress: Callable[[int], None] = lambda _: None,
        **how: Any,
    ) -> list[Completion]:
        """As `decoding.complete`; `batch_size` is that of each process."""
        shares = shared_out(prompts, max_new_tokens, self.n)
        asks = [
            {
                "do": "complete", "prompts": [prompts[i] for i in rows],
                "how": how | {"keys": keys and [keys[i] for i in rows], "max_new_tokens": max_new_tokens},
            }
            for rows in shares
        ]  # fmt: skip
        out: list[Completion | None] = [None] * len(prompts)
        for rows, made in zip(shares, self._all(asks, on_progress), strict=True):
            for i, completion in zip(rows, made, strict=True):
                out[i] = Completion(*completion)
        return [c for c in out if c is not None]

    def fit(
        self,
        job: Job,
        *,
        score: Callable[[Decode], float] | None = None,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> Fitted:
        """As `sft.fit`, with the weights in a folder; `score` is told what completes prompts with them as they are."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        told = self.scratch / "fit.pickle"
        told.write_bytes(pickle.dumps(dataclasses.replace(job, scored=score is not None)))
        answer = (lambda: score(self.complete)) if score else None
        parts = [Fitted(**said) for said in self._all([{"do": "fit", "job": str(told)}] * self.n, on_progress, answer)]
        return dataclasses.replace(
            parts[0], losses=_sums([p.losses for p in parts]), kl=_sums([p.kl for p in parts])
        )  # each process has its part of a mean over all tokens

    def close(self) -> None:
        """Ends the processes."""
        children, self.children = self.children, []
        for child in children:
            child.hang_up()
        for child in children:
            child.end()

    def _start(self) -> None:
        self.started += 1
        folder = self.scratch / str(self.started)
        folder.mkdir(parents=True)
        for rank in range(self.n):
            self.children.append(_Child(rank, self.n, self.device, max(1, self.threads // self.n), folder))

    def _all(
        self,
        asks: Sequence[Mapping[str, Any]],
        on_progress: Callable[[int], None] = lambda _: None,
        answer: Callable[[], Any] | None = None,
    ) -> list[Any]:
        """Each process's answer to its request, in order. `answer` is what they are told when all of them ask."""
        try:
            if not self.children:
                self._start()
            heard: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
            for child, ask in zip(self.children, asks, strict=True):
                child.ask(ask, heard)
            done: dict[int, Any] = {}
            errors: dict[int, BaseException] = {}
            asking: set[int] = set()
            while len(done) < self.n:
                rank, said = heard.get()
                if said is None:
                    raise DeviceError(self.children[rank].last_words())
                if "error" in said:
                    done[rank], errors[rank] = None, _error(rank, self.n, said["error"])
                    if asks[rank]["do"] == "fit":
                        raise errors[rank]
                elif "tick" in said:
                    on_progress(said["tick"])
                elif "asks" in said:
                    asking.add(rank)
                    if len(asking) == self.n:
                        assert answer is not None
                        asking, value = set(), answer()
                        for child in self.children:
                            child.ask({"do": "go on", "value": value}, heard)
                else:
                    done[rank] = said["done"]
        except BaseException:  # what the others are at is of no use to anyone
            self.close()
            raise
        if errors:
            raise errors[min(errors)]
        return [done[rank] for rank in range(self.n)]


class _Child:
    """A process of a group, as its parent sees it."""

    def __init__(self, rank: int, n: int, device: str, threads: int, folder: Path) -> None:
        self.rank, self.n, self.log = rank, n, folder / f"{rank}.log"
        env = {name: value for name, value in os.environ.items() if name not in ("NODE_RANK", "GROUP_RANK")}
        env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        env |= {"LOCAL_RANK": str(rank), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # users' own merge rules
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # trainer.deterministic, before cuBLAS is first used
        if sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of a group are on one machine
        words = [str(rank), str(n), device, str(threads), str(folder / "meeting")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, *words], env=env, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
            )  # fmt: skip
        self.heard: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def ask(self, what: Mapping[str, Any], heard: queue.Queue[tuple[int, dict[str, Any] | None]]) -> None:
        self.heard = heard
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has died: its last words are in the log
            heard.put((self.rank, None))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard.put((self.rank, json.loads(line)))
        self.heard.put((self.rank, None))

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def end(self) -> int:
        """Its exit code, when it has ended."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
        code = self.process.wait()
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def last_words(self) -> str:
        """How it ended, and the end of its log."""
        self.hang_up()
        code = self.end()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        tail = "\n    ".join(self.log.read_text(errors="replace").splitlines()[-TAIL:]) or "(empty)"
        hint = "; the system kills what takes too much memory (trainer.devices, sampler.batch_size)" * (code == -9)
        return f"the process of device {self.rank} of {self.n} has ended ({how}){hint}. The end of its log:\n    {tail}"


def shared_out(prompts: Sequence[str], new: int, n: int) -> list[list[int]]:
    """The rows of each of `n` processes, in order: all rows of a prompt to one of them, the longest first to whoever
    has least, where a row has its prompt's characters / 4 tokens and `new`."""
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    loads, shares = [0.0] * n, [list[int]() for _ in range(n)]
    weights = {prompt: len(own) * (len(prompt) / 4 + new) for prompt, own in rows.items()}
    for prompt in sorted(rows, key=lambda p: (-weights[p], rows[p][0])):
        rank = loads.index(min(loads))
        loads[rank] += weights[prompt]
        shares[rank] += rows[prompt]
    return [sorted(share) for share in shares]


def _sums(parts: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) for values in zip(*parts, strict=True)]


def _error(rank: int, n: int, said: Mapping[str, str]) -> BaseException:
    """What a process has raised: the same error where it is ours or of a missing file, else a DeviceError with its
    traceback."""
    module, _, name = said["kind"].rpartition(".")
    if module.startswith("itermerge.") or name == "FileNotFoundError":
        return getattr(importlib.import_module(module), name)(said["said"])
    return DeviceError(f"the process of device {rank} of {n} failed:\n{said['trace']}")


# --- in a child -----------------------------------------------------------------------------------------------------


class _Worker:
    """One process of a group."""

    def __init__(self, rank: int, n: int, device: str, meeting: str, inbox: queue.Queue[str], say: Any) -> None:
        self.rank, self.n, self.device, self.meeting, self.inbox, self.say = rank, n, device, meeting, inbox, say
        self.policy: Policy | None = None
        self.loaded: tuple[str, str] | None = None

    def serve(self) -> Any:
        """Does what it is told until it is told to go on with something else; the value that comes with that."""
        while True:
            ask = json.loads(self.inbox.get())
            if ask["do"] == "go on":
                return ask["value"]
            try:
                done = {"load": self.load, "complete": self.complete, "fit": self.fit}[ask.pop("do")](**ask)
            except Exception as error:
                kind = type(error)
                name, trace = f"{kind.__module__}.{kind.__qualname__}", traceback.format_exc()
                self.say({"error": {"kind": name, "said": str(error), "trace": trace}})
                continue
            self.say({"done": done})

    def load(self, folder: str, dtype: str, trust_remote_code: bool) -> None:
        if self.loaded == (folder, dtype):
            return
        self.forget()
        if not any(Path(folder).glob("*.safetensors")):
            raise FileNotFoundError(f"{folder}: its weights are gone")
        policy = Policy(Path(folder), trust_remote_code=trust_remote_code)
        if dtype != "float32":
            policy.model = copy_in(policy.model, getattr(torch, dtype))
        policy.model.to(self.device)
        self.policy, self.loaded = policy, (folder, dtype)

    def forget(self) -> None:
        self.policy = self.loaded = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def complete(self, prompts: list[str], how: dict[str, Any]) -> list[tuple[Any, ...]]:
        assert self.policy is not None
        made = complete(self.policy, prompts, on_progress=lambda k: self.say({"tick": k}), **how)
        return [dataclasses.astuple(c) for c in made]

    def fit(self, job: str) -> dict[str, Any]:
        told: Job = pickle.loads(Path(job).read_bytes())
        self.forget()
        self.meet()
        device = "cpu" if told.spec.strategy == "fsdp" else self.device  # a block at a time is moved, and spread
        policy = Policy(told.start, trust_remote_code=told.trust_remote_code, device=device)
        base = self.read(told, [told.base]) if told.base else None
        whole = _Whole(self.rank)
        callbacks: list[pl.Callback] = [whole] if told.spec.strategy == "fsdp" else []
        if told.events:
            callbacks.append(MergeCallback(self.read(told, told.events.anchor), **told.events.how))
        fitted = fit(
            policy, told.examples, told.spec, seed=told.seed, callbacks=callbacks, scratch=Path(job).parent, base=base,
            score=(lambda: self.score(policy, told.dtype)) if told.scored else None, rank=self.rank,
            on_progress=lambda k: self.say({"tick": k}) if self.rank == 0 else None,
        )  # fmt: skip
        if self.rank == 0:
            write_folder(told.out, whole.weights or policy.weights(), told.like)
        return dataclasses.asdict(fitted)

    def meet(self) -> None:
        """The processes find one another through a file: no port that somebody else could take meanwhile."""
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "nccl" if self.device == "cuda" else "gloo", init_method=f"file://{self.meeting}", rank=self.rank,
                world_size=self.n,
            )  # fmt: skip

    def read(self, job: Job, folders: Sequence[Path]) -> Weights:
        """The weights in a folder, on the CPU, or the mean of several."""
        return mean_of([Policy(folder, trust_remote_code=job.trust_remote_code).weights() for folder in folders])

    def score(self, policy: Policy, dtype: str) -> float:
        """The parent's judgement of the weights as they are: it asks for completions first."""
        self.policy = copy.copy(policy)
        if dtype != "float32":
            self.policy.model = copy_in(policy.model, getattr(torch, dtype))
        self.say({"asks": "score"})
        value = self.serve()
        self.forget()
        return value


class _Whole(pl.Callback):
    """Gathers weights that are spread over processes, one at a time, on the CPU of the first."""

    def __init__(self, rank: int) -> None:
        self.rank, self.weights = rank, dict[str, torch.Tensor]()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = pl_module.model
        for name, p in model.named_parameters():
            tensor = p.detach().full_tensor()
            if self.rank == 0:
                self.weights[name] = tensor.cpu()


def main() -> None:
    """A process of a group: `python -c CHILD RANK N DEVICE THREADS MEETING`."""
    rank, n, device, threads, meeting = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    inbox: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()

    def say(what: Mapping[str, Any]) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    _Worker(int(rank), int(n), device, meeting, inbox, say).serve()


def _listen(inbox: queue.Queue[str]) -> None:
    for line in sys.stdin:
        inbox.put(line)
    os._exit(0)  # the parent has hung up, or has died

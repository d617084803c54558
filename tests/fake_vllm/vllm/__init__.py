"""A stand-in for vLLM, with what `vllm_worker` uses of it, over a transformers model: the worker's tests put it on
PYTHONPATH. It is as strict as the real one where a mistake would go unseen there: a head computes with a packed copy of
its weights, cached keys and values outlive a reload, and a sleeping engine has no weights.

FAKE_VLLM_LOG: a file that gets a line of JSON for each call. FAKE_VLLM, or the file FAKE_VLLM_LOG.how: how it is to
misbehave.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

print("INFO: vLLM prints where it likes")
print("INFO: and here", file=sys.stderr)


def note(**what: Any) -> None:
    if path := os.environ.get("FAKE_VLLM_LOG"):
        with open(path, "a") as file:
            file.write(json.dumps(what) + "\n")


def misbehaves(how: str) -> bool:
    if os.environ.get("FAKE_VLLM") == how:
        return True
    with suppress(OSError), open(os.environ.get("FAKE_VLLM_LOG", "") + ".how") as file:
        return file.read() == how
    return False


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        assert self.seed is None or 0 <= self.seed < 1 << 63
        assert self.ignore_eos, "else it ends where the tokenizer says"
        assert self.detokenize or not self.stop, "stop strings are of text"


class Head(torch.nn.Module):
    """vLLM's on a CPU: `weight` is the embeddings', what computes is a packed copy of it."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.quant_method = self
        self.process_weights_after_loading(self)

    def process_weights_after_loading(self, layer: Head) -> None:
        packed = layer.weight.detach().clone()
        layer.cpu_linear = lambda x: torch.nn.functional.linear(x, packed)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.cpu_linear(x)  # type: ignore[operator]


class LLM:
    def __init__(self, model: str, **options: Any) -> None:
        note(do="start", pid=os.getpid(), options=options)
        if misbehaves("start"):
            raise ValueError("Free memory on device is less than desired GPU memory utilization")
        if misbehaves("slow"):
            time.sleep(600)
        assert options["load_format"] == "safetensors"
        assert options["generation_config"] == "vllm"
        assert options["max_model_len"] == -1
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"]))
        self.model.eval()
        if self.model.config.tie_word_embeddings:
            self.model.lm_head = Head(self.model.get_input_embeddings().weight)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.rows, self.may_sleep = options["max_num_seqs"], options["enable_sleep_mode"]
        self.asleep, self.stale = list[str](), False
        length = 20 if misbehaves("short") else self.model.config.max_position_embeddings
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[None]:
        assert method == "reload_weights"
        assert "weights" not in self.asleep, "there is no memory for weights"
        note(do="load", path=kwargs["weights_path"])
        own, given = dict(self.model.named_parameters()), {}
        for name in os.listdir(kwargs["weights_path"]):
            given |= load_file(os.path.join(kwargs["weights_path"], name)) if name.endswith(".safetensors") else {}
        with torch.no_grad():
            for name, tensor in given.items():
                own[name].copy_(tensor)
        self.stale = True
        return [None]

    def apply_model(self, function: Any) -> list[Any]:
        return [function(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.stale = False
        return not misbehaves("stale")

    def sleep(self, level: int) -> None:
        note(do="sleep", level=level)
        assert self.may_sleep
        self.asleep = ["weights", "kv_cache"]
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()

    def wake_up(self, tags: list[str]) -> None:
        self.asleep = [part for part in self.asleep if part not in tags]

    def generate(self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], use_tqdm: Any) -> list[Any]:
        note(do="generate", n=len(prompts), seeds=[p.seed for p in params], stop=params[0].stop)
        if misbehaves("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if misbehaves("hang"):
            time.sleep(600)
        assert not self.asleep
        assert not self.stale, "keys and values of other weights"
        for _ in use_tqdm(prompts, desc="prompts"):
            pass
        bar = use_tqdm(total=len(prompts), desc="completions")
        made: dict[int, Any] = {}
        for at in range(0, len(prompts), self.rows):
            rows = range(at, min(at + self.rows, len(prompts)))
            for row, output in self._batch([prompts[r]["prompt_token_ids"] for r in rows], [params[r] for r in rows]):
                made[at + row] = output
                bar.update(1)
        bar.close()
        return [SimpleNamespace(outputs=[made[r]]) for r in range(len(prompts))]

    @torch.inference_mode()
    def _batch(self, ids: list[list[int]], params: list[SamplingParams]) -> Any:
        """(row, output) of each as it ends; left padding, one random generator a row."""
        width = max(map(len, ids))
        tokens = torch.zeros((len(ids), width), dtype=torch.long)
        mask = torch.zeros((len(ids), width + params[0].max_tokens), dtype=torch.long)
        for at, row in enumerate(ids):
            tokens[at, width - len(row) :] = torch.tensor(row)
            mask[at, width - len(row) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        draws = [torch.Generator().manual_seed(p.seed or 0) for p in params]
        made: list[list[int]] = [[] for _ in ids]
        left, cache, begin, end = set(range(len(ids))), None, 0, width
        while left:
            out = self.model(
                input_ids=tokens, attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            scores, cache = out.logits[:, -1].float(), out.past_key_values
            chosen = scores.argmax(-1)
            for row in left if params[0].temperature else ():
                probs = torch.softmax(scores[row] / params[row].temperature, -1)
                chosen[row] = torch.multinomial(probs, 1, generator=draws[row])[0]
            for row in sorted(left):
                made[row].append(int(chosen[row]))
                reason = self._ends(made[row], params[row])
                if reason or len(made[row]) == params[row].max_tokens:
                    left.remove(row)
                    yield row, SimpleNamespace(
                        token_ids=tuple(made[row]), finish_reason="stop" if reason else "length",
                        stop_reason=reason[0] if reason else None,
                    )  # fmt: skip
            tokens, begin, end = chosen[:, None], end, end + 1

    def _ends(self, tokens: list[int], params: SamplingParams) -> list[Any]:
        """What ended it, if anything."""
        if tokens[-1] in params.stop_token_ids:
            return [tokens[-1]]
        text = self.tokenizer.decode(tokens) if params.stop and not misbehaves("late") else ""
        if misbehaves("early") and len(tokens) == 3:
            return params.stop[:1]
        return [s for s in params.stop if s in text][:1]

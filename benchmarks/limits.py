"""How near sampling and fine-tuning come to what the device itself can do: a GPU, or this machine's cores.

    python benchmarks/limits.py [--device cpu|cuda] [--model DIR] [--trials 3] [--threads 2] [--json]

Of SmolLM2-135M (make smollm2), or of a model in DIR:

    fit        96 training problems of experiment=smollm2_arithmetic with their gold answers, batches of 16, float32
               weights with products in bfloat16: its FLOPs a second as a share of those of a large product in bfloat16
    decoding   greedy answers to problems with four worked examples, in bfloat16: FLOPs likewise, and the bytes that
               steps must read (all weights, keys and values of each row, those of a shared beginning once) a second as
               a share of the speed at which the device sums up a large tensor

FLOPs are those that are run, counted by torch.utils.flop_counter in a run of its own: products and attention, padding
and what is computed twice included. Limits are measured in the same process, in turn with what is compared to them, the
best of all trials. A model of this size is far from a GPU's. With --json a last line of JSON; its ratio is the fit's
share.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sampling import workload
from sft import BATCH, LR, _quiet, examples_of
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from itermerge.decoding import _Batches, complete
from itermerge.policy import Policy, copy_in
from itermerge.sft import Example, FitSpec, fit


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


FOR_CPU: dict[Any, Any] = {  # which torch's table leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted(work: Callable[[], Any]) -> int:
    """FLOPs of `work`."""
    with FlopCounterMode(display=False, custom_mapping=FOR_CPU) as counter:
        work()
    return counter.get_total_flops()


def timed(device: str, work: Callable[[], Any]) -> float:
    """Its seconds, the device's own work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Limits:
    """The device's best speeds so far: FLOPs a second of a product in bfloat16, bytes a second read."""

    def __init__(self, device: str) -> None:
        self.device, size = device, 8192 if device == "cuda" else 2048
        self.a, self.b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
        self.long = torch.randn(2**30 if device == "cuda" else 2**26, device=device)  # beyond all caches
        self.flops = self.bytes = 0.0

    def measure(self) -> None:
        for _ in range(3):
            self.flops = max(self.flops, 2 * len(self.a) ** 3 / timed(self.device, lambda: self.a @ self.b))
            self.bytes = max(self.bytes, 4 * len(self.long) / timed(self.device, self.long.sum))


def bytes_of_steps(policy: Policy, work: Callable[[], Any]) -> int:
    """What the decoding steps and prefills of `work` must read at least: weights and caches."""
    config = policy.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = next(policy.model.parameters()).element_size()
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * item
    looked_up, head = policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight
    weights = item * (sum(p.numel() for p in policy.model.parameters()) - (looked_up is not head) * looked_up.numel())
    read, forward = 0, _Batches._forward

    def listen(self: _Batches, tokens: Any, positions: Any, mask: Any, begin: int, end: int, cache: Any) -> Any:
        nonlocal read
        own, once = (end - self.shared, self.shared) if self.split else (end, 0)
        read += weights + (len(tokens) * own + once) * a_token
        return forward(self, tokens, positions, mask, begin, end, cache)

    _Batches._forward = listen
    try:
        work()
    finally:
        _Batches._forward = forward
    return read


def fitting(policy: Policy, examples: Sequence[Example], device: str, scratch: Path) -> Callable[[], Any]:
    spec = FitSpec(
        epochs=1, lr=LR, batch_size=BATCH, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.999),
        max_length=2048, accelerator="gpu" if device == "cuda" else "cpu", devices=1, precision="bf16-mixed",
        accumulate_grad_batches=1, gradient_clip_val=1.0, deterministic=device == "cpu",
    )  # fmt: skip
    return lambda: fit(policy, examples, spec, seed=0, scratch=scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, help="a model's folder in place of SmolLM2-135M")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limits, rows, ratio = Limits(args.device), [], 0.0
    policy, prompts, stop, new, _, size = workload("smollm2", args.model, args.device)
    copied = copy.copy(policy)
    copied.model = copy_in(policy.model, torch.bfloat16)
    decode = partial(complete, copied, prompts, keys=None, stop=stop, max_new_tokens=new, batch_size=size)
    examples = examples_of("short", policy)
    tokens = {"fit": sum(map(len, examples))}
    with tempfile.TemporaryDirectory() as scratch:
        works = {"fit": fitting(policy, examples, args.device, Path(scratch)), "decoding": decode}
        decode()  # warms up, and tries once how the model may attend, which is to count nowhere
        flops = {name: counted(work) for name, work in works.items()}
        read = bytes_of_steps(copied, lambda: tokens.update(decoding=sum(c.tokens for c in decode())))
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(args.trials):
            for name, work in works.items():
                limits.measure()
                seconds[name].append(timed(args.device, work))
    for name in works:
        took = statistics.median(seconds[name])
        row: dict[str, Any] = {"what": name, "tokens/s": round(tokens[name] / took)}
        share = flops[name] / took / limits.flops
        row |= {"GFLOP/s": round(flops[name] / took / 1e9, 1), "of a product": f"{100 * share:.1f}%"}
        if name == "decoding":
            of = read / took / limits.bytes
            row |= {"GB/s": round(read / took / 1e9, 1), "of reading": f"{100 * of:.1f}%"}
        rows.append(row)
        ratio = share if name == "fit" else ratio
    rows.append({"what": args.device, "GFLOP/s": round(limits.flops / 1e9), "GB/s": round(limits.bytes / 1e9, 1)})
    columns = [*rows[1]]
    rows = [{key: row.get(key, "") for key in columns} for row in rows]
    for row in rows:
        print("   ".join(f"{key} {value}" for key, value in row.items() if value != ""))
    if args.json:
        print(json.dumps({"name": "limits", "rows": rows, "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    _quiet()
    sys.exit(main())

"""Sampling: our decoding against transformers' `generate`, on the prompts and stop lengths of the shipped presets.

    python benchmarks/sampling.py [--model lab|smollm2] [--dtype float32|bfloat16] [--trials 3] [--threads 1] [--json]

Both in one process, interleaved; `generate` at its best batch size of those tried, its prompts sorted by length.
Greedy, so that both do the same work: outputs are compared. Prints tokens a second and their ratio; with --json also as
the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from itermerge.decoding import _Stopper, complete
from itermerge.policy import Policy
from itermerge.smollm2 import default_folder
from itermerge.stages import LAB_SEED0


def by_generate(policy: Policy, prompts: Sequence[str], stop: Sequence[str], new: int, size: int) -> list[str]:
    """The same texts with `generate`: batches of like length, padded on the left, stop strings."""
    ids = [policy.encode_prompt(p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new, eos_token_id=policy.eos_ids, pad_token_id=policy.pad_id,
        stop_strings=list(stop) or None,
    )  # fmt: skip
    out, stopper = [""] * len(ids), _Stopper(policy, stop)
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        width = max(len(ids[r]) for r in rows)
        tokens = torch.full((len(rows), width), policy.pad_id)
        mask = torch.zeros_like(tokens)
        for i, r in enumerate(rows):
            tokens[i, width - len(ids[r]) :] = torch.tensor(ids[r])
            mask[i, width - len(ids[r]) :] = 1
        with torch.inference_mode():
            made = policy.model.generate(
                tokens, attention_mask=mask, generation_config=config, tokenizer=policy.tokenizer if stop else None
            )
        for r, row in zip(rows, made[:, width:].tolist(), strict=True):
            out[r] = stopper.read(row, 0.0).text
    return out


def workload(
    name: str, folder: Path | None = None, device: str = "cpu"
) -> tuple[Policy, list[str], tuple[str, ...], int, list[int], int]:
    """Policy (of `folder` in place of the usual one), prompts, stop strings, token limit, batch sizes of `generate` to
    try, our batch size."""
    if name == "lab":
        from itermerge.tasks.lab import LabTask

        task: Any = LabTask("chain")
        folder, new, sizes, own, n, repeat = folder or LAB_SEED0, 48, [64, 256, 512], 512, 300, 8
    else:
        from itermerge.tasks.gym import GymTask

        options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
        task = GymTask("chain_sum", options=options, shots=4)
        folder, new, sizes, own, n, repeat = folder or default_folder(), 16, [16, 32, 64], 64, 48, 4
    problems = task.problems("train", n, 0, "benchmark")
    prompts = [p.prompt for p in problems for _ in range(repeat)]
    return Policy(folder, device=device), prompts, task.stop, new, sizes, own


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("lab", "smollm2"), default="lab")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy, prompts, stop, new, sizes, own = workload(args.model)
    policy.model.to(getattr(torch, args.dtype))
    times: dict[str, list[float]] = {}
    same = 1.0
    for trial in range(args.trials + 1):  # the first warms up
        began = time.perf_counter()
        ours = complete(policy, prompts, keys=None, stop=stop, max_new_tokens=new, batch_size=own)
        if trial:
            times.setdefault("ours", []).append(time.perf_counter() - began)
        for size in sizes:
            began = time.perf_counter()
            theirs = by_generate(policy, prompts, stop, new, size)
            if trial:
                times.setdefault(f"generate, batch {size}", []).append(time.perf_counter() - began)
            same = min(same, sum(a.text == b for a, b in zip(ours, theirs, strict=True)) / len(ours))
    tokens = sum(c.tokens for c in ours)
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, seconds in medians.items():
        print(f"{args.model}: {name:22s} {tokens / seconds:9.0f} tokens/s")
    best = min(seconds for name, seconds in medians.items() if name != "ours")
    ratio = round(best / medians["ours"], 2)
    print(f"{args.model}: ratio to generate at its best {ratio:.2f}, same texts {100 * same:.1f}%")
    if args.json:
        rows = [{"what": name, "tokens/s": round(tokens / seconds)} for name, seconds in medians.items()]
        name = f"sampling, {args.model}, {args.dtype}"
        print(json.dumps({"name": name, "rows": rows, "ratio": ratio, "same_texts": round(same, 3)}))


if __name__ == "__main__":
    main()

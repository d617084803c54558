"""Sampling: our decoding against vLLM, on the prompts and stop lengths of the shipped presets.

    python benchmarks/vllm.py --python ENV/bin/python [--model lab|smollm2] [--dtype float32] [--trials 3] [--threads 1]

ENV has vLLM (its CPU build). Interleaved, by the calls of a run; greedy, so that both do the same work,
and their texts are compared; before and after vLLM was given other weights and these again. Prints tokens a second of
wall time and of CPU time (of all threads: what to read on a busy machine), seconds to start and to load, and the ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from sampling import workload

from itermerge import vllm
from itermerge.decoding import complete
from itermerge.stages import in_dtype
from itermerge.weights import write_folder


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, its threads' together."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment with vLLM")
    parser.add_argument("--model", choices=("lab", "smollm2"), default="lab")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--memory", type=float, default=0.1, help="share of the machine's that vLLM takes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy, prompts, stop, new, _, rows = workload(args.model)
    how = {"keys": None, "stop": stop, "max_new_tokens": new, "batch_size": rows}
    with tempfile.TemporaryDirectory() as made, in_dtype(policy, getattr(torch, args.dtype)) as copied:
        scratch = Path(made)
        spec = vllm.EngineSpec(
            args.python, "cpu", args.dtype, args.threads, rows, args.memory, "keep", args.eager, False, 600
        )
        engine = vllm.Engine(spec, scratch)
        write_folder(scratch / "other", {n: w.flip(0) for n, w in policy.weights().items()}, policy.folder)
        began = time.perf_counter()
        engine.load(policy.folder, policy)
        print(f"vLLM {vllm.about(args.python)['vllm']}: {time.perf_counter() - began:.1f} s to start")
        assert engine.process is not None
        pids = {"ours": os.getpid(), "vLLM": engine.process.running.pid}
        times: dict[str, list[float]] = {"ours": [], "vLLM": []}
        worked: dict[str, list[float]] = {"ours": [], "vLLM": []}
        for trial in range(args.trials + 1):  # the first warms up
            for name, decode in (("ours", None), ("vLLM", engine.complete)):
                began, before = time.perf_counter(), cpu_s(pids[name])
                done = decode(prompts, **how) if decode else complete(copied, prompts, **how)
                if trial:
                    times[name].append(time.perf_counter() - began)
                    worked[name].append(cpu_s(pids[name]) - before)
                if name == "ours":
                    ours = done
                else:
                    same = sum(a == b for a, b in zip(ours, done, strict=True)) / len(ours)
        engine.load(scratch / "other", policy)
        others = engine.complete(prompts[:8], **how)
        began = time.perf_counter()
        engine.load(policy.folder, policy)
        loading = time.perf_counter() - began
        again = engine.complete(prompts, **how)
        engine.close()
    tokens = sum(c.tokens for c in ours)
    for what, of in {"wall": times, "CPU": worked}.items():
        medians = {name: statistics.median(t) for name, t in of.items()}
        rates = ", ".join(f"{name} {tokens / seconds:.0f} tokens/s" for name, seconds in medians.items())
        print(f"{args.model} {args.dtype}, {what} time: {rates}, ratio to vLLM {medians['vLLM'] / medians['ours']:.2f}")
    print(f"{args.model} {args.dtype}: same completions {100 * same:.1f}%")
    kept = sum(a == b for a, b in zip(again, done, strict=True)) / len(done)
    other = sum(a == b for a, b in zip(others, done, strict=False)) / len(others)
    print(f"weights loaded in {loading:.2f} s; same texts {100 * kept:.1f}%, with others between {100 * other:.1f}%")


if __name__ == "__main__":
    main()

"""Fine-tuning: tokens a second and peak memory of our fit against TRL's SFTTrainer, on SmolLM2-135M.

    python benchmarks/sft.py [--workloads short long] [--trials 2] [--threads 2] [--json]

Needs TRL (benchmarks/requirements.txt) and the model (make smollm2). Without TRL: ours alone.

    short   96 training problems of experiment=smollm2_arithmetic with their gold answers, in its batches of 16
    long    48 word problems with worked solutions (reasoning-gym's gsm_symbolic, from a fixed seed), batches of 16

The same token ids, one epoch in random order, loss on completions alone, float32 weights with products in bfloat16,
fused AdamW, gradients clipped to norm 1, no logging, evaluation or saving. TRL packs (`bfd` with its padding-free
collator; `wrapped`, which cuts examples and lets neighbours see one another) into rows of as many tokens as our batches
have on average, one row an optimizer step; and, without packing, takes batches of 16 examples. All settings train the
same model object, from the same weights, alternating in one process. A first round warms up, at learning rate 0: its
loss is the one that is printed, and exit status 1 says that ours and that of TRL without packing are more than 2% apart
(packed rows hold other numbers of tokens, and a mean over rows is another one). Tokens are those of prompts and
completions, without padding. The ratio is of medians, to the faster of TRL's settings that pack; beside it the same of
the process's CPU time, which other work on the machine disturbs less.

Memory: the peak of private memory (RssAnon) of a process that only trains, on three batches, sampled each 20 ms by its
parent; a run of its own for each setting.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from itermerge.config import check, conf_dir
from itermerge.policy import Policy
from itermerge.sft import Example, FitSpec, fit
from itermerge.smollm2 import default_folder

TARGET = 1.2  # tokens a second, ours to TRL's
BATCH, LR = 16, 1e-4
TRL = ("trl bfd", "trl wrapped", "trl unpacked")


def examples_of(workload: str, policy: Policy) -> list[Example]:
    if workload == "short":
        from hydra import compose, initialize_config_dir

        from itermerge.stages import build_task

        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = check(compose("config", ["experiment=smollm2_arithmetic"]))
        problems = build_task(cfg.task).problems("train", 96, 0)
        pairs = [(p.train_prompt, p.gold) for p in problems]
    else:
        import reasoning_gym

        rows = reasoning_gym.create_dataset("gsm_symbolic", size=48, seed=1)
        pairs = [(f"Question: {r['question']}\nAnswer:", f" {r['metadata']['answer_cot']}") for r in rows]
    return [Example(policy.encode_prompt(p), policy.encode_completion(c)) for p, c in pairs]


def ours(policy: Policy, examples: Sequence[Example], scratch: Path, lr: float = LR) -> tuple[float, float, float]:
    """Seconds, those of the CPU, and mean loss."""
    spec = FitSpec(
        epochs=1, lr=lr, batch_size=BATCH, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.999),
        max_length=2048, accelerator="cpu", devices=1, precision="bf16-mixed", accumulate_grad_batches=1,
        gradient_clip_val=1.0, deterministic=True,
    )  # fmt: skip
    began, busy = time.perf_counter(), time.process_time()
    fitted = fit(policy, examples, spec, seed=0, scratch=scratch)
    return time.perf_counter() - began, time.process_time() - busy, fitted.losses[0]


def by_trl(
    setting: str, policy: Policy, examples: Sequence[Example], scratch: Path, lr: float = LR
) -> tuple[float, float, float]:
    """The same of `train`; packing is done before."""
    import datasets
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    rows = [
        {"input_ids": [*e.prompt, *e.completion], "completion_mask": [0] * len(e.prompt) + [1] * len(e.completion)}
        for e in examples
    ]
    packs = setting != "trl unpacked"
    width = max(max(map(len, examples)), round(sum(map(len, examples)) / len(examples) * BATCH)) if packs else 2048
    args = SFTConfig(
        output_dir=str(scratch), num_train_epochs=1, per_device_train_batch_size=1 if packs else BATCH,
        learning_rate=lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused",
        bf16=True, use_cpu=True, gradient_checkpointing=False, max_length=width, packing=packs,
        packing_strategy=setting.split()[1] if packs else "bfd", completion_only_loss=True, save_strategy="no",
        eval_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    policy.model.train()
    trainer = SFTTrainer(
        model=policy.model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=policy.tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    began, busy = time.perf_counter(), time.process_time()
    loss = trainer.train().training_loss
    return time.perf_counter() - began, time.process_time() - busy, loss


def way(name: str) -> Callable[..., tuple[float, float, float]]:
    return ours if name == "ours" else partial(by_trl, name)


def peak(name: str, workload: str, threads: int) -> float:
    """MiB of private memory, at most, of a process that trains so."""
    words = [sys.executable, __file__, "--only", name, "--workloads", workload, "--threads", str(threads)]
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while started.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{started.pid}/status").read_text())
        except OSError:
            break
        most = max(most, int(found.group(1)) if found else 0)
        time.sleep(0.02)
    if started.wait():
        raise SystemExit(f"{' '.join(words)} failed")
    return most / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=("short", "long"), default=("short", "long"))
    parser.add_argument("--examples", type=int, help="of each workload, at most (default: all)")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("ours", *TRL), help="train once so and print nothing: for the memory")
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(args.threads)
    policy = Policy(default_folder())
    names = ["ours", *(TRL if find_spec("trl") else ())]
    start = {n: w.clone() for n, w in policy.weights().items()} if not args.only else {}
    rows, ratios, same = [], {}, True
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        for workload in args.workloads:
            examples = examples_of(workload, policy)
            random.Random(0).shuffle(examples)
            examples = examples[: args.examples]
            if args.only:
                way(args.only)(policy, examples[: 3 * BATCH], scratch)
                continue
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            losses: dict[str, float] = {}
            for trial in range(args.trials + 1):  # the first warms up
                for name in names:
                    policy.set_weights(start)
                    if trial:
                        seconds[name].append(way(name)(policy, examples, scratch)[:2])
                    else:
                        losses[name] = way(name)(policy, examples, scratch, 0.0)[2]
            tokens = sum(map(len, examples))
            print(f"{workload}: {len(examples)} examples, {tokens} tokens, {args.threads} threads")
            speeds = {}
            for name in names:
                wall, busy = (statistics.median(s) for s in zip(*seconds[name], strict=True))
                speeds[name], memory = (tokens / wall, tokens / busy), peak(name, workload, args.threads)
                rows.append(
                    {"workload": workload, "way": name, "tokens/s": round(tokens / wall, 1),
                     "tokens/CPU s": round(tokens / busy, 1), "MiB": round(memory), "loss": round(losses[name], 4)}
                )  # fmt: skip
                said = f"{tokens / wall:6.0f} tokens/s {tokens / busy:6.0f} a CPU second   peak {memory:6.0f} MiB"
                print(f"  {name:13s} {said}   loss {losses[name]:.4f}", flush=True)
            if len(names) > 1:
                best = [speeds["ours"][i] / max(speeds["trl bfd"][i], speeds["trl wrapped"][i]) for i in (0, 1)]
                padded = [speeds["ours"][i] / speeds["trl unpacked"][i] for i in (0, 1)]
                ratios[workload] = round(best[0], 2)
                same &= abs(losses["ours"] / losses["trl unpacked"] - 1) < 0.02
                print(
                    f"  ratio to TRL's best packing {best[0]:.2f} (CPU time {best[1]:.2f}), target {TARGET}; to TRL "
                    f"without packing {padded[0]:.2f} ({padded[1]:.2f})"
                )
    if args.json:
        print(json.dumps({"name": "sft", "rows": rows, "ratio": min(ratios.values(), default=None)}))
    sys.exit(0 if same else "ours and TRL's loss are not those of the same tokens")


def _quiet() -> None:
    import logging
    import warnings

    from transformers.utils import logging as hf

    hf.set_verbosity_error()
    hf.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


if __name__ == "__main__":
    _quiet()
    main()

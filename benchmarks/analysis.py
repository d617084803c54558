"""What the analyses cost: importance beside plain forward passes, layer change beside reading the files.

    python benchmarks/analysis.py                                   # the lab, one thread: seconds
    python benchmarks/analysis.py --model smollm2 --threads 2       # SmolLM2-135M (make smollm2), 64 solutions
    python benchmarks/analysis.py --model smollm2 --plain 8         # ... and the plain way on 8 of them

Importance is measured on gold solutions with the worked examples in the prompt, as a run's are. The plain way to `skip`
is one batched forward pass with a hook for each layer left out (all layers, the whole prompt): timed on `--plain`
solutions, and its figures must be the same. Layer change is timed beside reading both checkpoints once.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from itermerge.analysis.change import layer_change, update_figures, update_of
from itermerge.analysis.importance import find_blocks, importance
from itermerge.config import check, conf_dir
from itermerge.policy import Policy
from itermerge.sft import IGNORED, Example, collate
from itermerge.stages import build_task, lab_folder
from itermerge.weights import Checkpoint, resolve, write_folder


def plain_skip(model: Any, examples: list[Example], pad_id: int) -> torch.Tensor:
    """(examples, layers): rises of the loss, each layer in a pass of its own over everything."""
    batch = collate(examples, pad_id)
    labels = batch["labels"][:, 1:]

    def losses() -> torch.Tensor:
        with torch.inference_mode():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        flat = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return flat.view(labels.shape).sum(1) / (labels != IGNORED).sum(1)

    whole, risen = losses(), []
    for block in find_blocks(model):
        handle = block.register_forward_hook(
            lambda _, args, named, out: (
                (h := args[0] if args else named["hidden_states"]) if not isinstance(out, tuple) else (h, *out[1:])
            ),
            with_kwargs=True,
        )
        risen.append(losses() - whole)
        handle.remove()
    return torch.stack(risen, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("lab", "smollm2"), default="lab")
    parser.add_argument("--solutions", type=int, default=64)
    parser.add_argument("--plain", type=int, help="solutions of the plain way (default: all on the lab, else none)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from hydra import compose, initialize_config_dir

    words = [] if args.model == "lab" else ["experiment=smollm2_arithmetic"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = check(compose("config", words))
    folder = lab_folder(0, "") if args.model == "lab" else resolve(cfg.model.path)
    policy, task = Policy(folder), build_task(cfg.task)
    problems = task.problems("train", args.solutions, 0)
    examples = [Example(policy.encode_prompt(p.prompt), policy.encode_completion(p.gold)) for p in problems]
    total = 0.0
    found: dict[str, Any] = {}
    for names in (("block_influence", "angular"), ("skip",), ("taylor",)):
        began = time.perf_counter()
        found |= importance(policy.model, examples, names, pad_id=policy.pad_id)
        seconds = time.perf_counter() - began
        total += seconds
        print(f"{' and '.join(names)}: {seconds:.2f} s", flush=True)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"importance of {len(examples)} solutions: {total:.2f} s, {args.threads} threads, at most {most:.2f} GB")
    same = True
    n = len(examples) if args.plain is None and args.model == "lab" else args.plain or 0
    if n:
        began = time.perf_counter()
        ours = importance(policy.model, examples[:n], ("skip",), pad_id=policy.pad_id)["skip"]
        middle = time.perf_counter()
        theirs = plain_skip(policy.model, examples[:n], policy.pad_id)
        end = time.perf_counter()
        apart = float((theirs - torch.from_numpy(ours)).abs().max())
        same = apart < 1e-3
        print(f"skip of {n} solutions: {middle - began:.2f} s, the plain way {end - middle:.2f} s, ratio "
              f"{(middle - began) / (end - middle):.2f}; largest difference {apart:.1e} nats")  # fmt: skip
    base = policy.weights()
    tuned = {name: w + 1e-3 * w.roll(1, 0) for name, w in base.items()}
    with tempfile.TemporaryDirectory() as name:
        for part, weights in (("base", base), ("tuned", tuned)):
            write_folder(Path(name) / part, weights, folder)
        one, other = Checkpoint(Path(name) / "base"), Checkpoint(Path(name) / "tuned")
        began = time.perf_counter()
        for model in (one, other):
            for tensor in model:
                model[tensor].sum()
        middle = time.perf_counter()
        layer_change(one, other)
        end = time.perf_counter()
        print(f"layer change: {end - middle:.2f} s, reading and adding up both files {middle - began:.2f} s, ratio "
              f"{(end - middle) / (middle - began):.1f}")  # fmt: skip
        began = time.perf_counter()
        update = update_of(one, other)
        update_figures(one, other, update, update)
        print(f"update, its effective rank, cosine and signs: {time.perf_counter() - began:.2f} s")
    sys.exit(not same)


if __name__ == "__main__":
    main()

"""One whole round of IMM on SmolLM2-135M: ours, and the same assembled from transformers' `generate`, TRL and mergekit.

    python benchmarks/round.py [--repeats 2] [--json]    about 12 minutes a repeat on two cores; needs `make smollm2`
    python benchmarks/round.py --share                   what of our round, and of the whole run, is neither forward,
                                                         backward, optimizer nor decode
    python benchmarks/round.py --sizes 16 32 64 128      the peer's `generate` on some items, to choose its batch size

The round is that of `experiment=smollm2_arithmetic` (problems, prompts, stop strings, precision, steps), analysis off,
since the peer has none; evaluated are the base and the merged model, each on all items of the suite. Both sides are
whole processes on the same threads, over the same base folder, into new folders, interleaved. `target` compares the
round itself: start-up, loading and all, the base's evaluation alone left out on both sides.

The peer is what a researcher would write: one process that samples with `generate` (bfloat16 weights, as ours; left
padding, prompts sorted by length, `num_return_sequences`, stop strings), verifies with our verifier, trains with TRL's
SFTTrainer (its own packing with as many tokens a step as ours, completions alone, bfloat16 autocast, fused AdamW, the
same schedule), saves, merges with `mergekit-yaml` (linear, its fastest settings here: benchmarks/merge.py), loads the
result and answers the items with `generate`. Exit status 1 unless both sides sample the same problems and their
accuracies are within 6 points: generators and rounding differ, so texts do.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PRESET = ("experiment=smollm2_arithmetic", "rounds=1")
BARE = ("analysis.importance=[]", "analysis.kl_n=0", "analysis.train_n=0", "suite.pass_k_n=0")
PEER_ROWS = 64  # of a batch of `generate`: the best of --sizes 16 32 64 128
TARGET = 0.5  # of the peer's time, at most
SHARE_TARGET = 0.05
NEAR = 0.06  # accuracies of the two sides
PARTS = ("sample", "verify", "fit", "merge", "evaluate", "other")


def spec(words: Sequence[str]) -> dict[str, Any]:
    """The checked config of a run, as plain data."""
    from hydra import compose, initialize_config_dir

    from itermerge.config import check, conf_dir, to_dict

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_dict(check(compose("config", overrides=list(words))))


def call(command: Sequence[str], cwd: Path) -> None:
    """Runs it; where it fails, says how and ends."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        sys.exit(f"{command[1:3]} failed with exit status {done.returncode}")


def into(work: Path) -> list[str]:
    """Where a run of ours lands."""
    return [f"hydra.run.dir={work / 'run'}", f"store.dir={work / 'store'}"]


# --- ours -----------------------------------------------------------------------------------------------------------


def ours(work: Path, words: Sequence[str]) -> dict[str, Any]:
    """Seconds of each part, `whole` and `base` (its evaluation), accuracies, and the ids of the samples."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "itermerge", *words, *into(work)]
    call(command, work)
    whole, run = time.perf_counter() - began, work / "run"
    stages = json.loads((run / "timing.json").read_text())["stages"]
    parts = dict.fromkeys(PARTS, 0.0)
    for stage in stages:
        if stage["stage"] in parts:
            parts[stage["stage"]] += stage["seconds"]
    base = next(s["seconds"] for s in stages if s["stage"] == "evaluate")
    parts["evaluate"] -= base
    parts["other"] = whole - base - sum(parts.values())
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (run / "rounds" / "01" / "samples.jsonl").read_text().splitlines()]
    return {
        "parts": parts, "whole": whole, "base": base, "examples": rounds[1]["train_sample/examples"],
        "accuracy": {n: [r[n] for r in rounds] for n in ("id/acc", "ood/acc")},
        "accept": rounds[1]["train_sample/accept_rate"], "ids": sorted({s["id"] for s in samples}),
    }  # fmt: skip


# --- the peer -------------------------------------------------------------------------------------------------------


def peer(work: Path, words: Sequence[str]) -> dict[str, Any]:
    """As `ours`."""
    (work / "spec.json").write_text(json.dumps(spec(words)))
    began = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--as-peer", str(work), "--began", str(time.time())]
    call(command, work)
    whole = time.perf_counter() - began
    made = json.loads((work / "peer.json").read_text())
    base = made["parts"].pop("base")
    parts = {name: made["parts"].get(name, 0.0) for name in PARTS}
    parts["other"] = whole - base - sum(parts.values())
    return made | {"parts": parts, "whole": whole, "base": base, "more": made["parts"]}


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], rows: int, new: int, stop: Sequence[str], k: int = 1,
    temperature: float | None = None,
) -> list[list[tuple[str, bool]]]:  # fmt: skip
    """`k` (text, whether it ended) for each prompt."""
    import torch

    sampled: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": k}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[tuple[str, bool]]] = [[] for _ in prompts]
    for at in range(0, len(order), rows // k):
        batch = order[at : at + rows // k]
        given = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            made = model.generate(
                **given, **sampled, max_new_tokens=new, stop_strings=list(stop), tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id,
            )[:, given["input_ids"].shape[1] :]  # fmt: skip
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        for row, text in enumerate(texts):
            found = [text.find(s) for s in stop if s in text]
            whole = bool(found) or bool((made[row] == tokenizer.eos_token_id).any())
            out[batch[row // k]].append((text[: min(found)] if found else text, whole))
    return out


def as_peer(work: Path, began: float) -> None:
    """The peer's whole process; writes peer.json."""
    cfg = json.loads((work / "spec.json").read_text())
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cfg["threads"])}
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from itermerge.tasks import verify_all
    from itermerge.tasks.gym import GymTask

    torch.set_num_threads(cfg["threads"])
    torch.manual_seed(cfg["seed"])
    seconds: dict[str, float] = {"imports": time.time() - began}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        at = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - at

    def build(node: dict[str, Any]) -> GymTask:
        return GymTask(node["dataset"], node["label"], node["options"], node["shots"], node["train_shots"])

    suite, sampler, sft, new = cfg["suite"], cfg["sampler"], cfg["sft"], cfg["sampler"]["max_new_tokens"]
    with part("problems"):
        task, away = build(cfg["task"]), [build(node) for node in (*suite["near"], *suite["far"])]
        practised = task.problems("train", cfg["task"]["n_train"], cfg["seed"], "fixed")
        exams = [("id", t, t.problems("test", suite["n"], suite["seed"])) for t in (task,)]
        exams += [(t.name, t, t.problems("test", suite["n"], suite["seed"])) for t in away]
        exams.append(
            ("val", task, task.problems("validation", cfg["task"]["n_validation"], suite["seed"], "validation"))
        )

    folder = Path(cfg["model"]["path"]).expanduser()

    def load(at: Path, dtype: torch.dtype) -> Any:
        with part("loading"):
            return AutoModelForCausalLM.from_pretrained(at, dtype=dtype).eval()

    with part("loading"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def evaluate(model: Any) -> dict[str, float]:
        right = {}
        for name, of, problems in exams:
            answers = generate(model, tokenizer, [p.asked for p in problems], PEER_ROWS, new, of.stop)
            verdicts = verify_all(of, [(p, *a) for p, (a,) in zip(problems, answers, strict=True)])
            right[name] = sum(v.correct for v in verdicts) / len(verdicts)
        return {"id/acc": right["id"], "ood/acc": sum(right[t.name] for t in away) / len(away)}

    model = load(folder, torch.bfloat16)
    with part("base"):
        before = evaluate(model)
    with part("sample"):
        made = generate(
            model, tokenizer, [p.prompt for p in practised], PEER_ROWS, new, task.stop, sampler["n"],
            sampler["temperature"],
        )  # fmt: skip
    del model
    with part("verify"):
        attempts = [(p, *a) for p, answers in zip(practised, made, strict=True) for a in answers]
        verdicts = verify_all(task, attempts)
        kept: dict[str, dict[str, str]] = {}  # by problem: different correct completions, in order
        for (problem, text, _), verdict in zip(attempts, verdicts, strict=True):
            had = kept.setdefault(problem.id, {})
            if verdict.correct and len(had) < cfg["task"]["max_solutions"]:
                had[text] = problem.train_prompt
        rows = [{"prompt": prompt, "completion": text} for had in kept.values() for text, prompt in had.items()]

    model = load(folder, torch.float32)
    with part("fit"):
        lengths = [len(tokenizer(r["prompt"] + r["completion"])["input_ids"]) + 1 for r in rows]
        args = SFTConfig(
            output_dir=str(work / "trl"), use_cpu=True, bf16=True, num_train_epochs=sft["epochs"], seed=cfg["seed"],
            learning_rate=sft["lr"], lr_scheduler_type=sft["schedule"], warmup_steps=sft["warmup_ratio"],
            weight_decay=sft["weight_decay"], adam_beta1=sft["beta1"], adam_beta2=sft["beta2"],
            max_grad_norm=cfg["trainer"]["gradient_clip_val"], optim="adamw_torch_fused", gradient_checkpointing=False,
            packing=True, per_device_train_batch_size=1, max_length=round(sft["batch_size"] * statistics.mean(lengths)),
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    with part("saving"):
        trainer.model.save_pretrained(work / "tuned")
        tokenizer.save_pretrained(work / "tuned")
    del model, trainer
    with part("merge"):
        models = "".join(
            f"  - {{model: {at}, parameters: {{weight: {w}}}}}\n"
            for at, w in ((folder, 1 - cfg["merge"]["ratio"]), (work / "tuned", cfg["merge"]["ratio"]))
        )
        (work / "merge.yaml").write_text(f"merge_method: linear\nmodels:\n{models}dtype: float32\n")
        command = [Path(sys.executable).with_name("mergekit-yaml"), work / "merge.yaml", work / "merged"]
        subprocess.run([*map(str, command), "-j", "1", "--no-write-model-card", "--quiet"], check=True)
    model = load(work / "merged", torch.bfloat16)
    with part("evaluate"):
        after = evaluate(model)
    told = {
        "parts": seconds, "accuracy": {n: [before[n], after[n]] for n in before}, "examples": len(rows),
        "accept": sum(v.correct for v in verdicts) / len(verdicts), "ids": sorted({p.id for p in practised}),
    }  # fmt: skip
    (work / "peer.json").write_text(json.dumps(told))


def try_sizes(sizes: Sequence[int], words: Sequence[str]) -> None:
    """Prints tokens a second of the peer's `generate` by rows of a batch: greedy on a suite's items, and sampled."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from itermerge.tasks.gym import GymTask

    cfg = spec(words)
    torch.set_num_threads(cfg["threads"])
    folder = Path(cfg["model"]["path"]).expanduser()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    node, new = cfg["task"], cfg["sampler"]["max_new_tokens"]
    task = GymTask(node["dataset"], node["label"], node["options"], node["shots"], node["train_shots"])
    prompts = [p.asked for p in task.problems("test", max(256, *sizes), 0)]
    for size in [sizes[0], *sizes]:  # the first warms up
        times = []
        for how in ({}, {"k": 4, "temperature": 0.8}):
            at = time.perf_counter()
            generate(model, tokenizer, prompts[:: how.get("k", 1)], size, new, task.stop, **how)
            times.append(time.perf_counter() - at)
        print(f"{size:4d} rows: {len(prompts)} greedy {times[0]:.1f} s, as many sampled {times[1]:.1f} s", flush=True)


# --- the share ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by name, each moment counted once: for the innermost of what is going on."""

    def __init__(self, name: str) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.stack, self.since = [name], time.perf_counter()

    def enter(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.calls[name] += 1
        self.stack.append(name)
        self.since = now

    def leave(self) -> None:
        now = time.perf_counter()
        self.seconds[self.stack.pop()] += now - self.since
        self.since = now

    def so_far(self) -> dict[str, float]:
        """Seconds by name up to this moment."""
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now
        return dict(self.seconds)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            self.enter(name)
            try:
                return function(*given, **named)
            finally:
                self.leave()

        return wrapped


DECODE = "decode: Python"
COMPUTE = ("forward", "backward", "optimizer", "draw", DECODE)


def watch_compute(clock: Clock) -> None:
    """Counts what torch and Lightning compute, wherever it is called from."""
    import pytorch_lightning as pl
    import torch

    from itermerge import decoding

    call = torch.nn.Module.__call__

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        if clock.stack[-1] in COMPUTE and clock.stack[-1] != DECODE:
            return call(self, *given, **named)
        clock.enter("forward")
        try:
            return call(self, *given, **named)
        finally:
            clock.leave()

    torch.nn.Module.__call__ = forward
    strategy = pl.strategies.Strategy
    strategy.training_step = clock.timed("forward", strategy.training_step)  # with the loss
    torch.Tensor.backward = clock.timed("backward", torch.Tensor.backward)
    torch.autograd.grad = clock.timed("backward", torch.autograd.grad)
    torch.nn.utils.clip_grad_norm_ = clock.timed("optimizer", torch.nn.utils.clip_grad_norm_)
    step = torch.optim.AdamW.step

    def stepped(self: Any, closure: Any = None) -> Any:
        inside = None if closure is None else clock.timed("fit: Lightning, batches", closure)
        return clock.timed("optimizer", step)(self, inside)

    torch.optim.AdamW.step = stepped
    decoding.draw = clock.timed("draw", decoding.draw)


def watch_rest(clock: Clock) -> None:
    """Gives names to what else a run does."""
    from itermerge import cli, decoding, loop, merging, policy, sft, stages, store, tasks, weights
    from itermerge.analysis import change, diversity, importance
    from itermerge.tasks.gym import GymTask

    bench, record = stages.Bench, loop.RunRecord
    named: list[tuple[str, Any, str]] = [
        ("loading", policy.Policy, "__init__"), ("loading", policy.Policy, "set_weights"),
        ("loading", weights, "read_weights"), ("tokenizing", policy.Policy, "encode_prompt"),
        ("copies in sampler.dtype", policy, "copy_in"), (DECODE, decoding, "complete"),
        ("digests", weights, "digest_weights"), ("digests", store, "file_digest"),
        ("writing weights", weights, "write_folder"), ("placing files", store, "place"),
        ("problems", GymTask, "problems"), ("verify", tasks, "verify_all"),
        ("checks of lengths", bench, "_check_lengths"),
        ("set-up of the stages", bench, "__init__"), ("fit: Lightning, batches", sft, "fit"),
        ("store: keys, manifests", store.Store, "stage"), ("merge", merging.Merge, "all"),
        ("layers: update", change, "update_of"), ("layers: update", change, "update_figures"),
        ("layers: change", change, "changes"), ("writing weights", weights, "save_tensors"),
        ("importance: not passes", bench, "importance"), ("importance: not passes", importance, "importance"),
        ("forward", importance, "_losses"),  # as in a fit
        ("probe: not passes", bench, "probe"), ("probe: not passes", diversity, "text_entropy"),
        ("probe: not passes", diversity, "keep_predictions"), ("probe: not passes", diversity, "divergence"),
        ("figures of samples", stages, "sample_ratios"), ("record of a round", record, "write"),
        ("report", cli, "_report"), ("provenance", cli, "provenance"),
    ]  # fmt: skip
    ours = [m for name, m in sys.modules.items() if name.startswith("itermerge")]
    for name, owner, attribute in named:
        was = getattr(owner, attribute)
        wrapped = clock.timed(name, was)
        for module in ours if owner in ours else ():  # where it was imported by name
            for alias in [key for key, value in vars(module).items() if value is was]:
                setattr(module, alias, wrapped)
        setattr(owner, attribute, wrapped)


def watch_rounds(clock: Clock, rounds: dict[int, dict[str, float]]) -> None:
    """Notes the seconds so far when a round's figures are written, by its number."""
    from itermerge.loop import RunRecord

    write = RunRecord.write

    def written(self: Any, bench: Any, number: int, **what: Any) -> None:
        write(self, bench, number, **what)
        rounds[number] = clock.so_far()

    RunRecord.write = written


def inside(out: Path, began: float, words: Sequence[str]) -> None:
    """A run with watches on it; writes `out`."""
    clock, rounds = Clock("else"), dict[int, dict[str, float]]()
    clock.seconds["start of Python"] += time.time() - began
    load = builtins.__import__

    def imports(name: str, *given: Any, **named: Any) -> Any:
        if name in sys.modules or clock.stack[-1] == "imports":
            return load(name, *given, **named)
        return clock.timed("imports", load)(name, *given, **named)

    builtins.__import__ = imports
    importlib.import_module = clock.timed("imports", importlib.import_module)
    from itermerge import cli

    begin = cli.start

    def start(*given: Any) -> Any:
        clock.enter("imports")
        with cli._imports(given[0].threads):
            watch_compute(clock)
            watch_rest(clock)
            watch_rounds(clock, rounds)
        clock.leave()
        return begin(*given)

    cli.start = start
    sys.argv = ["itermerge", *words]
    try:
        cli.main()
    finally:
        clock.leave()
        out.write_text(json.dumps({"seconds": clock.seconds, "calls": clock.calls, "rounds": rounds}))


def share(words: Sequence[str]) -> dict[str, Any]:
    """Prints where a run's wall time goes; its rows, and as `ratio` the share of the rounds: from the base's figures to
    those of the last round, so without start, the base's evaluation and the report."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        began = time.perf_counter()
        command = [
            sys.executable, str(Path(__file__).resolve()), "--inside", str(work / "share.json"), "--began",
            str(time.time()), *words, *into(work),
        ]  # fmt: skip
        call(command, work)
        whole = time.perf_counter() - began
        made = json.loads((work / "share.json").read_text())
    seconds, calls = made["seconds"], made["calls"]
    seconds["end of Python"] = whole - sum(seconds.values())
    rest = whole - sum(seconds[name] for name in COMPUTE if name in seconds)
    first, last = (made["rounds"][t] for t in (min(made["rounds"], key=int), max(made["rounds"], key=int)))
    between = {name: last[name] - first.get(name, 0.0) for name in last}
    rows = []
    for what, taken in sorted(seconds.items(), key=lambda row: (row[0] not in COMPUTE, -row[1])):
        row = {"what": what, "seconds": round(taken, 2), "share": f"{100 * taken / whole:.1f}%"}
        row |= {"of the rounds": round(between.get(what, 0.0), 2), "calls": calls.get(what, 1)}
        rows.append(row)
        print(
            f"{what:28s} {taken:8.2f} s {100 * taken / whole:6.1f}%  {row['of the rounds']:8.2f} s in rounds "
            f"{row['calls']:8d} calls"
        )
    own = seconds.get(DECODE, 0.0)
    alone = sum(between.values())
    beside = alone - sum(between[name] for name in COMPUTE if name in between)
    print(
        f"rounds, without start, the base's figures and the report: {alone:.1f} s, of which {beside:.1f} s, "
        f"{100 * beside / alone:.1f}%", flush=True,
    )  # fmt: skip
    print(
        f"whole run {whole:.1f} s, of which not forward, backward, optimizer or decode {rest:.1f} s, "
        f"{100 * rest / whole:.1f}%; with what Python does in decoding {100 * (rest + own) / whole:.1f}%", flush=True,
    )  # fmt: skip
    for what, taken, of in (("whole run", rest, whole), ("rounds", beside, alone)):
        row = {"what": f"not compute, {what}", "seconds": round(taken, 2), "share": f"{100 * taken / of:.1f}%"}
        rows.append(row | {"of the rounds": round(beside, 2), "calls": 1})
    print(f"share of the rounds {beside / alone:.3f} (target at most {SHARE_TARGET})", flush=True)
    return {"name": "share", "rows": rows, "ratio": beside / alone}


# --- both -----------------------------------------------------------------------------------------------------------


def compare(words: Sequence[str], repeats: int) -> tuple[dict[str, Any], bool]:
    """Prints both sides' times; what --json says, and whether both did the same work."""
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for repeat in range(repeats):
        for name, run in (("ours", ours), ("peer", peer)):
            with tempfile.TemporaryDirectory() as scratch:
                made = run(Path(scratch), words)
            sides[name].append(made)
            print(
                f"repeat {repeat + 1}, {name}: {made['whole']:.1f} s, accepted {100 * made['accept']:.1f}% of samples, "
                f"{made['examples']} examples; id/acc {made['accuracy']['id/acc'][0]:.3f} to "
                f"{made['accuracy']['id/acc'][1]:.3f}, ood/acc {made['accuracy']['ood/acc'][0]:.3f} to "
                f"{made['accuracy']['ood/acc'][1]:.3f}", flush=True,
            )  # fmt: skip
    table = {
        name: {part: statistics.median(m["parts"][part] for m in made) for part in PARTS}
        for name, made in sides.items()
    }
    rounds = {name: statistics.median(m["whole"] - m["base"] for m in made) for name, made in sides.items()}
    wholes = {name: statistics.median(m["whole"] for m in made) for name, made in sides.items()}
    lines = [(part, table["ours"][part], table["peer"][part]) for part in PARTS]
    lines += [("round", rounds["ours"], rounds["peer"])]
    lines += [("round and the base's evaluation", wholes["ours"], wholes["peer"])]
    rows = [
        {"seconds": name, "ours": round(mine, 1), "peer": round(theirs, 1), "ours / peer": round(mine / theirs, 2)}
        for name, mine, theirs in lines
    ]
    print(f"{'seconds':32s} {'ours':>8s} {'peer':>8s}  ours / peer")
    for row in rows:
        print(f"{row['seconds']:32s} {row['ours']:8.1f} {row['peer']:8.1f} {row['ours / peer']:10.2f}")
    first = sides["peer"][0]
    print(f"of the peer's other: {', '.join(f'{k} {v:.1f} s' for k, v in first['more'].items() if k not in PARTS)}")
    a, b = sides["ours"][0], sides["peer"][0]
    near = all(
        abs(x - y) <= NEAR for n in a["accuracy"] for x, y in zip(a["accuracy"][n], b["accuracy"][n], strict=True)
    )
    same = a["ids"] == b["ids"] and near
    print(f"both sides: {'the same problems, like accuracies' if same else 'DIFFERENT WORK'}")
    ratio = rounds["ours"] / rounds["peer"]
    print(f"ours / peer {ratio:.2f} (target at most {TARGET})", flush=True)
    accuracies = {n: m[0]["accuracy"] for n, m in sides.items()}
    return {"name": "round", "rows": rows, "ratio": ratio, "accuracies": accuracies}, same


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--share", action="store_true", help="our round alone, by what its time goes to")
    parser.add_argument("--bare", action="store_true", help="with --share: analysis off, as in the comparison")
    parser.add_argument("--sizes", type=int, nargs="+", help="batch sizes of the peer's generate to try")
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="further overrides of the run (both sides')")
    args = parser.parse_args()
    words, same = [*PRESET, *BARE, *args.overrides], True
    if args.as_peer:
        return as_peer(args.as_peer, args.began)
    if args.inside:
        return inside(args.inside, args.began, args.overrides)
    if args.sizes:
        return try_sizes(args.sizes, words)
    if args.share:
        told = share(words if args.bare else [*PRESET, *args.overrides])
    else:
        told, same = compare(words, args.repeats)
    if args.json:
        print(json.dumps(told))
    return sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()

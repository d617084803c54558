"""Merging: `itermerge-merge` against mergekit and against plain copies, on one pair of Qwen2.5-shaped bf16 checkpoints.

    python benchmarks/merge.py --mergekit VENV     # 0.5B, linear, dare, ties, slerp: about 12 minutes on two cores
    python benchmarks/merge.py --size 1.5b --rules linear ties --repeats 1
    python benchmarks/merge.py --all               # every rule of ours too; without --mergekit: ours and the limit
    python benchmarks/merge.py --callback          # the blend of a model in memory, alone

VENV is a virtual environment with mergekit (0.1.5). The checkpoints (random weights; tuned = base + 1% normal noise)
are made in --work, by default a temporary folder, and reused where they are already there: 2 GB for 0.5b, 6.2 GB for
1.5b, and one output more while it runs (two for --all: rules over rounds need a second tuned model).

Each repeat runs limit, ours, mergekit, in this order, as whole processes over the same files in the page cache; the
output is removed, and the disk's queue written out, between them, off the clock. Medians. So all three write into
memory, and the disk takes it later; with --durable the clock runs until the output is on the disk. The limit reads
both inputs and writes an output of the same size with plain copies of 8 MB, no arithmetic; for `linear` it is what can
be had.

mergekit gets the settings that were its fastest in single trials on two cores, others at work on them: `-j 1` (with
its default, torch's own threads, linear took 16-25 s instead of 9-14, DARE 30 instead of 15, SLERP 55-62 instead of
17, TIES 74 instead of 41; other settings: `--mergekit-options`); `dtype: bfloat16` (its task arithmetic then
rounds to bf16 at each step, where ours is in float32); no model card and no tokenizer. --async-write gained nothing at
one output shard; --low-cpu-memory and --lazy-unpickle concern GPUs and pickles. No GPU, HF_HUB_OFFLINE=1.

Private memory is Anonymous + Swap of /proc/PID/smaps_rollup over the process and its children, the largest of samples
each 20 ms, in runs of their own (sampling slows a process), so mapped files do not count. Exit status 1 if
one of ours is above 0.8 GiB; times only print beside their targets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2.0**30
BOUND_GIB = 0.8
LIMIT_TARGET = 1.3  # linear: at most this many times the limit
CALLBACK_TARGET = 0.7  # of the copy bandwidth, at least
CHUNK = 4_194_304  # elements made at a time, and bf16 elements copied at a time by the limit


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Qwen2 model with tied embeddings."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 151936

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of a saved file: by name."""
        kv = self.hidden // self.heads * self.kv_heads
        out: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden), "model.norm.weight": (self.hidden,),
        }  # fmt: skip
        for layer in range(self.layers):
            head = f"model.layers.{layer}."
            for kind, rows in (("q", self.hidden), ("k", kv), ("v", kv)):
                out[f"{head}self_attn.{kind}_proj.weight"] = (rows, self.hidden)
                out[f"{head}self_attn.{kind}_proj.bias"] = (rows,)
            out[f"{head}self_attn.o_proj.weight"] = (self.hidden, self.hidden)
            out[f"{head}mlp.gate_proj.weight"] = out[f"{head}mlp.up_proj.weight"] = (self.inner, self.hidden)
            out[f"{head}mlp.down_proj.weight"] = (self.hidden, self.inner)
            out[f"{head}input_layernorm.weight"] = out[f"{head}post_attention_layernorm.weight"] = (self.hidden,)
        return dict(sorted(out.items()))

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": self.vocabulary,
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
            "dtype": "bfloat16",
        }  # fmt: skip


SHAPES = {
    "tiny": Shape(hidden=64, layers=2, inner=128, heads=2, kv_heads=1, vocabulary=1000),  # to try the script itself
    "0.5b": Shape(hidden=896, layers=24, inner=4864, heads=14, kv_heads=2),
    "1.5b": Shape(hidden=1536, layers=28, inner=8960, heads=12, kv_heads=2),
}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One merge: our words beside base, tuned and out; mergekit's YAML for the same, where it is a peer; and the
    largest ratio of our time to mergekit's that counts as reached."""

    words: Sequence[str]
    mergekit: str | None = None
    target: float = math.nan
    tuned: int = 1


def _peer(method: str, models: str, more: str = "", base: bool = True) -> str:
    anchor = "base_model: {base}\n" if base else ""
    return f"merge_method: {method}\n{anchor}models:\n{models}{more}dtype: bfloat16\n"


CASES = {
    "linear": Case(
        ["merge=linear", "merge.ratio=0.5"],
        _peer(
            "linear",
            "  - model: {base}\n    parameters: {{weight: 0.5}}\n  - model: {tuned}\n    parameters: {{weight: 0.5}}\n",
            base=False,
        ),
        0.7,
    ),
    "dare": Case(
        ["merge=dare", "merge.ratio=0.5", "merge.density=0.8"],
        _peer("dare_linear", "  - model: {tuned}\n    parameters: {{weight: 0.5, density: 0.8}}\n"),
        0.5,
    ),
    "ties": Case(
        ["merge=ties", "merge.ratio=0.5", "merge.density=0.2"],
        _peer(
            "ties",
            "  - model: {tuned}\n    parameters: {{weight: 1.0, density: 0.2}}\n",
            "parameters: {{normalize: true, lambda: 0.5}}\n",
        ),
        0.15,
    ),
    "slerp": Case(
        ["merge=slerp", "merge.ratio=0.5"],
        _peer("slerp", "  - model: {base}\n  - model: {tuned}\n", "parameters: {{t: 0.5}}\n"),
        0.4,
    ),
    "ties, whole model": Case(["merge=ties", "merge.ratio=0.5", "merge.density=0.2", "merge.scope=model"]),
    "task_arithmetic": Case(["merge=task_arithmetic", "merge.ratio=0.5"], tuned=2),
    "dare_ties": Case(["merge=dare_ties", "merge.ratio=0.5"], tuned=2),
    "ties of two": Case(["merge=ties", "merge.ratio=0.5", "merge.density=0.2"], tuned=2),
    "della": Case(["merge=della", "merge.ratio=0.5"]),
    "breadcrumbs": Case(["merge=breadcrumbs", "merge.ratio=0.5"]),
    "model_stock": Case(["merge=model_stock"], tuned=2),
    "tall_mask": Case(["merge=tall_mask"], tuned=2),
    "consensus": Case(["merge=consensus"], tuned=2),
}
MERGEKIT_OPTIONS = ["-j", "1", "--no-write-model-card", "--no-copy-tokenizer", "--quiet"]


def _normal(seed: str, n: int) -> Any:
    """A tensor of n standard normal numbers, the same for the same text."""
    import torch

    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7])
    return torch.randn(n, generator=torch.Generator().manual_seed(number))


def make_checkpoints(folder: Path, shape: Shape, tuned: int) -> list[Path]:
    """The folders of the base and of `tuned` tuned models, made where they are not there; a chunk at a time."""
    import torch

    folders = [folder / "base", *(folder / f"tuned{i}" for i in range(1, tuned + 1))]
    missing = [f for f in folders if not (f / "config.json").exists()]  # written last
    if not missing:
        return folders
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dims in shape.tensors().items():
        size = 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    files = {}
    for one in missing:
        one.mkdir(parents=True, exist_ok=True)
        files[one] = (one / "model.safetensors").open("wb")
        files[one].write(len(head).to_bytes(8, "little") + head)
    for name, dims in shape.tensors().items():
        center = 1.0 if name.endswith("norm.weight") else 0.0
        for part, first in enumerate(range(0, math.prod(dims), CHUNK)):
            n = min(CHUNK, math.prod(dims) - first)
            base = _normal(f"base {name} {part}", n) * 0.02
            for i, one in enumerate(folders):
                if one in files:
                    weights = base + center
                    if i:
                        noise = _normal(f"{one.name} {name} {part}", n)
                        weights = weights.bfloat16().float() + noise * (0.01 * (center or 0.02))
                    files[one].write(weights.bfloat16().view(torch.uint8).numpy().data)
    for one, file in files.items():
        file.close()
        (one / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        (one / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (one / "config.json").write_text(json.dumps(shape.config(), indent=2))
    return folders


def plain_copy(base: Path, tuned: Path, out: Path) -> None:
    """The limit: reads both files, writes the first one's bytes."""
    out.mkdir()
    one, other = bytearray(2 * CHUNK), bytearray(2 * CHUNK)
    names = [folder / "model.safetensors" for folder in (base, tuned, out)]
    with names[0].open("rb", 0) as a, names[1].open("rb", 0) as b, names[2].open("wb", 0) as c:
        while n := a.readinto(one):
            b.readinto(other)
            c.write(memoryview(one)[:n])


def _tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    out = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                out += _tree(int(child))
    except OSError:  # it ended meanwhile
        pass
    return out


def _private_bytes(pid: int) -> int:
    total = 0
    for one in _tree(pid):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(("Anonymous:", "Swap:")))
    return total * 1024


@dataclass(frozen=True)
class Run:
    seconds: float
    resident: int  # peak resident bytes of the process, mapped pages included (VmHWM)
    private: int  # peak private bytes of its tree; 0 unless sampled
    inside: float  # seconds that the process itself printed last; not a number where it printed none


def _to_disk(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def run(command: Sequence[str | Path], out: Path, durable: bool = False, sample: bool = False) -> Run:
    """Runs it to its end, `durable`: until its output is on the disk; exits with what it said where it fails.

    Removes `out` before and after, off the clock.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    private = 0
    with tempfile.TemporaryFile() as said:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(c) for c in command], stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=out.parent
        )
        if sample:
            while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                private = max(private, _private_bytes(process.pid))
                time.sleep(0.02)
        _, status, usage = os.wait4(process.pid, 0)
        if durable and status == 0:
            _to_disk(out)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit status {process.returncode}\n{text}")
    shutil.rmtree(out, ignore_errors=True)
    last = text.split()[-1] if text.split() else ""
    return Run(seconds, usage.ru_maxrss * 1024, private, float(last) if last.replace(".", "").isdigit() else math.nan)


def copy_bandwidth(tensors: Sequence[Any], targets: Sequence[Any]) -> float:
    """Bytes a second moved by one pass of torch's `copy_` over the tensors: each is read once and written once."""
    moved = 0
    began = time.perf_counter()
    for source, target in zip(tensors, targets, strict=True):
        target.copy_(source)
        moved += 2 * source.numel() * source.element_size()
    return moved / (time.perf_counter() - began)


def callback(shape: Shape, repeats: int) -> None:
    """The blend of a float32 model in memory against copies of tensors of the same sizes, interleaved; best of each.

    A blend reads the anchor and the parameter and writes the parameter: 3 passes of its bytes.
    """
    import torch

    from itermerge.merging import MergeCallback

    model = torch.nn.Module()
    for name, dims in shape.tensors().items():
        model.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.full(dims, 0.5)))
    anchor = {name: torch.full_like(p, 0.25) for name, p in model.named_parameters()}
    size = 4 * sum(w.numel() for w in anchor.values())
    best, merge = {"copy": 0.0, "blend": 0.0}, MergeCallback(anchor).merge
    for _ in range(repeats + 1):
        best["copy"] = max(best["copy"], copy_bandwidth(list(anchor.values()), [p.data for p in model.parameters()]))
        began = time.perf_counter()
        merge(model, 0.5)
        best["blend"] = max(best["blend"], 3 * size / (time.perf_counter() - began))
    print(
        f"a model of {size / 1e9:.1f} GB in float32, {torch.get_num_threads()} threads: copies move "
        f"{best['copy'] / 1e9:.1f} GB/s, the blend {best['blend'] / 1e9:.1f} GB/s: {best['blend'] / best['copy']:.2f} "
        "of it (target 0.70)"
    )


def measure(name: str, case: Case, args: argparse.Namespace, folders: list[Path]) -> bool:
    """Prints one row; whether our memory is within the bound."""
    out, tuned = args.work / "out", folders[1 : 1 + case.tuned]
    commands: dict[str, list[str | Path]] = {
        "limit": [sys.executable, Path(__file__).absolute(), "--plain-copy", folders[0], folders[1], out]
    }
    if args.ours.exists():
        words = [f"base={folders[0]}", f"tuned=[{','.join(map(str, tuned))}]", f"out={out}", *case.words]
        commands["ours"] = [args.ours, *words, *args.words]
    if args.mergekit and case.mergekit:
        recipe = args.work / "mergekit.yaml"
        recipe.write_text(case.mergekit.format(base=folders[0], tuned=tuned[0]))
        commands["mergekit"] = [args.mergekit / "bin/mergekit-yaml", recipe, out, *args.mergekit_options]
    runs: dict[str, list[Run]] = {who: [] for who in commands}
    for repeat in range(args.repeats):
        for who, command in commands.items():
            runs[who].append(run(command, out, args.durable))
            print(f"  {name}, repeat {repeat + 1}: {who} {runs[who][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    peak = {who: run(command, out, sample=True) for who, command in commands.items() if who != "limit"}
    median = {who: statistics.median(r.seconds for r in rs) for who, rs in runs.items()}
    limit = f"{median['limit']:.2f} ({statistics.median(r.inside for r in runs['limit']):.2f})"
    cells = [f"{name:18s}", f"{limit:>13s}"]
    for who in ("ours", "mergekit"):
        cells.append(f"{median[who]:8.2f}" if who in median else f"{'-':>8s}")
    both = "ours" in median and "mergekit" in median
    cells.append(f"{median['ours'] / median['mergekit']:6.2f}" if both else f"{'-':>6s}")
    cells.append(f"{case.target:6.2f}" if case.target == case.target else f"{'-':>6s}")
    cells.append(f"{median['ours'] / median['limit']:7.2f}" if "ours" in median else f"{'-':>7s}")
    for who in ("ours", "mergekit"):
        cells.append(f"{peak[who].private / GIB:9.2f}" if who in peak else f"{'-':>9s}")
    cells.append(f"{peak['ours'].resident / GIB:9.2f}" if "ours" in peak else f"{'-':>9s}")
    print(" ".join(cells), flush=True)
    return "ours" not in peak or peak["ours"].private <= BOUND_GIB * GIB


def main() -> None:
    if sys.argv[1:2] == ["--plain-copy"]:
        began = time.perf_counter()
        plain_copy(*map(Path, sys.argv[2:5]))
        print(f"{time.perf_counter() - began:.3f}")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.5b")
    parser.add_argument("--mergekit", type=Path, help="a virtual environment with mergekit")
    parser.add_argument("--ours", type=Path, default=Path(sys.executable).with_name("itermerge-merge"))
    parser.add_argument("--work", type=Path, help="where the checkpoints are, or will be made and kept")
    parser.add_argument("--rules", nargs="+", choices=CASES, help="default: those with a peer")
    parser.add_argument("--all", action="store_true", help="all rules")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--durable", action="store_true", help="stop the clock when the output is on the disk (fsync)")
    parser.add_argument("--callback", action="store_true", help="only the blend in memory")
    parser.add_argument(
        "--mergekit-options", type=str.split, default=MERGEKIT_OPTIONS, help="its flags, in one word: '-j 2 --quiet'"
    )
    parser.add_argument("--words", nargs="*", default=[], help="further overrides of ours")
    args = parser.parse_args()
    args.ours = args.ours.absolute()  # the processes run in the work folder
    args.mergekit = args.mergekit and args.mergekit.absolute()
    shape = SHAPES[args.size]
    if args.callback:
        callback(shape, args.repeats)
        return
    names = args.rules or [name for name, case in CASES.items() if args.all or case.mergekit]
    if not args.ours.exists():
        print(f"{args.ours} is not there: install itermerge, or give --ours", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        args.work = (args.work or Path(temporary)).absolute() / args.size
        folders = make_checkpoints(args.work, shape, max(CASES[name].tuned for name in names))
        for folder in folders:  # into the page cache
            with (folder / "model.safetensors").open("rb", 0) as file:
                while file.read(2 * CHUNK):
                    pass
        load = os.getloadavg()[0]
        print(f"{args.size}, medians of {args.repeats}, load {load:.1f} on {os.cpu_count()} cores; seconds; peak GiB")
        print(
            f"{'rule':18s} {'limit (inner)':>13s} {'ours':>8s} {'mergekit':>8s} {'ratio':>6s} {'target':>6s} "
            f"{'/ limit':>7s} {'private':>9s} {'mergekit':>9s} {'resident':>9s}"
        )
        within = [measure(name, CASES[name], args, folders) for name in names]
    print(f"linear / limit: at most {LIMIT_TARGET}; private memory of ours: at most {BOUND_GIB} GiB")
    sys.exit(not all(within))


if __name__ == "__main__":
    main()

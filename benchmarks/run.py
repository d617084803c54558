"""Runs the benchmarks of this folder, each as a process of its own, and writes RESULTS.md beside this file.

    make bench                                all of them: 35 to 50 minutes on two cores with nothing else to do
    make bench ARGS="--only sampling sft"     those whose names begin so
    make bench ARGS="--vllm ENV/bin/python"   vLLM as well, from an environment that has it

Fixed settings and limits. A benchmark that fails, or does not end in time, is written as failed with its last line; the
others go on, and the exit status is 1. A missed target is no failure: machines differ. Each section names its date,
commit and machine, and is written when it is done; those of benchmarks that are not run this time stay as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
PACKAGES = ("itermerge", "torch", "transformers", "tokenizers", "pytorch-lightning", "numpy", "trl", "mergekit")


@dataclass(frozen=True)
class Benchmark:
    """A command of this folder, what it compares, the least (`at least`) or largest (`at most`) ratio that is wanted,
    minutes that it takes on two cores, and how its ratio is written where it prints no JSON."""

    name: str
    what: str
    command: Sequence[str]
    bound: str
    target: float | None
    minutes: float
    pattern: str = r"ratio[^\d\n]*([\d.]+)"


BENCHMARKS = (
    Benchmark(
        "startup", "`itermerge --help` and errors in a config; the ratio is the seconds of `--help`",
        ("startup.py", "--json"), "at most", 1.0, 0.5,
    ),
    Benchmark(
        "quickstart", "the demo, whole, against the code at the end of the first issue; the same accuracies",
        ("startup.py", "--quickstart", "--trials", "3", "--json"), "at most", 0.6, 10,
    ),
    Benchmark(
        "sampling-lab", "our decoding against `generate` at its best batch size, greedy, the lab, one thread",
        ("sampling.py", "--model", "lab", "--trials", "3", "--threads", "1"), "at least", 1.5, 2,
    ),
    Benchmark(
        "sampling-smollm2", "our decoding against `generate` at its best batch size, greedy, SmolLM2-135M, two threads",
        ("sampling.py", "--model", "smollm2", "--trials", "1", "--threads", "2"), "at least", 1.5, 4,
    ),
    Benchmark(
        "sft", "tokens a second of our fit against TRL's SFTTrainer with its own packing, SmolLM2-135M",
        ("sft.py", "--workloads", "short", "--trials", "2", "--json"), "at least", 1.2, 4,
    ),
    Benchmark(
        "round", "a whole round on SmolLM2-135M against `generate`, TRL, mergekit and a plain loop",
        ("round.py", "--repeats", "1", "--json"), "at most", 0.5, 12,
    ),
    Benchmark(
        "share", "what of a SmolLM2 round's wall time is not forward, backward, optimizer or decode; below it, a run's",
        ("round.py", "--share", "--json"), "at most", 0.05, 3,
    ),
    Benchmark(
        "merge", "`itermerge-merge` against mergekit and plain copies, linear, two 0.5B-shaped bfloat16 checkpoints",
        ("merge.py", "--mergekit", sys.prefix, "--rules", "linear", "--repeats", "2"), "at most", 0.7, 2,
        r"(?m)^linear +\S+ \(\S+\) +\S+ +\S+ +([\d.]+)",
    ),
    Benchmark(
        "limits", "FLOPs and bytes a second as shares of what the device can do, SmolLM2-135M; the ratio is the fit's",
        ("limits.py", "--json"), "at least", None, 2,
    ),
    Benchmark(
        "verifiers", "seconds of each verifier for hostile texts", ("verifiers.py", "2000"), "at most", None, 0.5,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a benchmark printed, `failed` where it did not end well, and its last line as JSON where it has one."""

    seconds: float
    lines: Sequence[str]
    failed: str | None
    told: Mapping[str, Any]

    def ratio(self, pattern: str) -> float | None:
        if "ratio" in self.told:
            return self.told["ratio"]
        found = re.findall(pattern, "\n".join(self.lines))
        return float(found[-1]) if found else None


def run(benchmark: Benchmark) -> Outcome:
    """Runs it, for at most four times its minutes and five more: a slower machine is no failure."""
    limit, began = 240 * benchmark.minutes + 300, time.perf_counter()
    command = [sys.executable, str(HERE / benchmark.command[0]), *benchmark.command[1:]]
    failed = None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except BaseException as error:  # its children too
            os.killpg(process.pid, 9)
            out, err = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            failed = f"not done after {limit:.0f} s"
    lines = [_plain(line) for line in out.splitlines() if line.strip()]
    if failed is None and process.returncode:
        last = [_plain(line) for line in err.splitlines() if line.strip()] or lines or [""]
        failed = f"exit status {process.returncode}: {last[-1]}"
    told: Mapping[str, Any] = {}
    if lines and lines[-1].startswith("{"):
        told = json.loads(lines.pop())
    return Outcome(time.perf_counter() - began, lines, failed, told)


def _plain(line: str) -> str:
    """Without what is of this machine alone: no folders above the checkout, no home."""
    return line.replace(f"{HERE.parent}/", "").replace(str(Path.home()), "~").rstrip()


def machine() -> str:
    """A line on when and with what the figures were measured."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*: (.+)", info.read_text())):
        model = found[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed")
    git = partial(subprocess.run, cwd=HERE.parent, capture_output=True, text=True, check=False)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() or "unknown"
    if git(["git", "status", "--porcelain", "--", ".", ":!benchmarks/RESULTS.md"]).stdout:
        commit += " with changes"
    from itermerge.store import cpu_flags

    fast = ", ".join(name for name, there in cpu_flags().items() if there) or "none"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}; {model}, {os.cpu_count()} cores, "
        f"{memory:.0f} GiB, for bfloat16: {fast}; {platform.system()}, Python {platform.python_version()}, "
        f"{', '.join(versions)}"
    )


def section(benchmark: Benchmark, outcome: Outcome) -> tuple[str, str]:
    """A benchmark's line in the summary, and its section."""
    shown = re.sub(r"\S+/bin/python", "ENV/bin/python", " ".join(benchmark.command))
    shown = shown.replace(sys.prefix, Path(sys.prefix).name)
    head = f"## {benchmark.name}\n\n{benchmark.what[0].upper()}{benchmark.what[1:]}: `python benchmarks/{shown}`.\n\n"
    target = "none" if benchmark.target is None else f"{benchmark.bound} {benchmark.target:g}"
    ratio = outcome.ratio(benchmark.pattern)
    if outcome.failed:
        body = "\n".join(outcome.lines)
        said = f"**Failed**: {outcome.failed}\n" + (f"\n```\n{body}\n```\n" if body else "") + f"\n{machine()}.\n"
        return f"| {benchmark.name} | | {target} | **failed** |", head + said
    reached = "measured"
    if benchmark.target is not None and ratio is not None:
        good = ratio >= benchmark.target if benchmark.bound == "at least" else ratio <= benchmark.target
        reached = "reached" if good else "**missed**"
    told = "" if ratio is None else f"{ratio:.3g}"
    said = "" if ratio is None else f"Ratio {told}, target {target}: {reached}. "
    body = table(outcome.told.get("rows", [])) or "```\n" + "\n".join(outcome.lines) + "\n```\n"
    took = f"{said}Took {outcome.seconds:.0f} s. {machine()}.\n"
    return f"| {benchmark.name} | {told} | {target} | {reached} |", f"{head}{body}\n{took}"


def written() -> dict[str, tuple[str, str]]:
    """{benchmark: (its line in the summary, its section)} of RESULTS.md as it is."""
    if not RESULTS.is_file():
        return {}
    head, *sections = re.split(r"(?m)^(?=## )", RESULTS.read_text())
    lines = {line.split("|")[1].strip(): line for line in head.splitlines() if line.startswith("| ")}
    named = {text.split("\n", 1)[0].removeprefix("## "): text.rstrip() + "\n" for text in sections}
    return {name: (lines[name], text) for name, text in named.items() if name in lines}


def write(made: Mapping[str, tuple[str, str]]) -> None:
    """RESULTS.md, in the order of `made`."""
    head = (
        "# Benchmarks\n\nWritten by `make bench` (benchmarks/run.py), not by hand; each section has a date of its own."
    )
    summary = "\n".join(line for line, _ in made.values())
    body = "\n".join(text for _, text in made.values())
    RESULTS.write_text(f"{head}\n\n| benchmark | ratio | target | |\n|---|---|---|---|\n{summary}\n\n{body}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; columns are the keys of the first row."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row.get(key, "") for key in rows[0]] for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ", ".join(b.name for b in BENCHMARKS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help=f"those that begin so: {names}")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM: compare with it as well")
    args = parser.parse_args()
    wanted = [n for given in args.only for n in given.split(",")]
    if unknown := [n for n in wanted if not any(b.name.startswith(n) for b in BENCHMARKS)]:
        parser.error(f"--only: there is no benchmark {', '.join(unknown)}; there are {names}")
    benchmarks = [(b, any(b.name.startswith(n) for n in wanted)) for b in BENCHMARKS]
    vllm = Benchmark(
        "vllm", "our decoding against vLLM's CPU build, greedy, the lab, one thread",
        ("vllm.py", "--python", args.vllm or "ENV/bin/python", "--trials", "2"), "at least", None, 4,
    )  # fmt: skip
    benchmarks.append((vllm, args.vllm is not None))
    made, failed = written(), False
    for benchmark, chosen in benchmarks:
        if not chosen:
            continue
        print(f"{benchmark.name}: about {benchmark.minutes:g} minutes", flush=True)
        outcome = run(benchmark)
        print("\n".join(f"    {line}" for line in (*outcome.lines, outcome.failed or "")).rstrip(), flush=True)
        made[benchmark.name] = section(benchmark, outcome)
        write({b.name: made[b.name] for b, _ in benchmarks if b.name in made})
        failed |= outcome.failed is not None
    print(f"wrote {RESULTS.relative_to(HERE.parent)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Accuracy of a policy on tasks, with intervals; pass@k; in-domain and out-of-domain means.

Scoring knows tasks only by their labels. Which of them is in-domain (ID), near or far is told to `metrics` alone.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .decoding import Completion, Decode
from .tasks import REASONS, Problem, Task, derive_seed, verify_all

Z95 = 1.959963984540054
SHARED_CHARACTERS = 80  # at the head of all prompts of a task: few-shot examples


@dataclass(frozen=True)
class Exam:
    """Problems of one task under a label, as `chain` or `val/chain`."""

    label: str
    task: Task
    problems: Sequence[Problem]


def greedy_scores(decode: Decode, exams: Sequence[Exam], *, on_progress: Callable[[int], None], **how: Any) -> dict:
    """{label: {n, correct: [0 or 1 an item], reasons: {reason: count}, majority}} of greedy answers by `decode`."""
    # Tasks go together where they can: fuller batches. A task with few-shot examples goes alone, to compute them once.
    groups: dict[tuple[tuple[str, ...], str], list[tuple[Exam, Problem]]] = {}
    for exam in exams:
        head = os.path.commonprefix([p.asked for p in exam.problems])  # noqa: RUF071  (of characters, as wanted)
        alone = head if len(head) >= SHARED_CHARACTERS else ""
        groups.setdefault((exam.task.stop, alone), []).extend((exam, p) for p in exam.problems)
    verdicts: dict[str, list[str]] = {exam.label: [] for exam in exams}
    for (stop, _), items in groups.items():
        prompts = [problem.asked for _, problem in items]
        done = decode(prompts, keys=None, stop=stop, on_progress=on_progress, **how)
        texts: dict[str, list[tuple[Problem, str, bool]]] = {}
        for (exam, problem), c in zip(items, done, strict=True):
            texts.setdefault(exam.label, []).append((problem, c.text, c.finished))
        for exam in exams:
            verdicts[exam.label] += [v.reason for v in verify_all(exam.task, texts.get(exam.label, []))]
    return {
        exam.label: {
            "n": len(exam.problems),
            "correct": [int(r == "correct") for r in verdicts[exam.label]],
            "reasons": count_reasons(verdicts[exam.label]),
            "majority": majority([p.answer for p in exam.problems]),
        }
        for exam in exams
    }


def sample_keys(problems: Sequence[Problem], n: int, *seed: object) -> list[int]:
    """One key for each of `n` samples a problem, samples of a problem side by side."""
    return [derive_seed(*seed, p.id, i) for p in problems for i in range(n)]


def sample(
    decode: Decode, task: Task, problems: Sequence[Problem], n: int, *seed: object, asked: bool = False, **how: Any
) -> list[list[Completion]]:
    """`n` sampled completions for each problem; of its prompt in evaluation where `asked`."""
    prompts = [p.asked if asked else p.prompt for p in problems for _ in range(n)]
    flat = decode(prompts, keys=sample_keys(problems, n, *seed), stop=task.stop, **how)
    return [flat[at : at + n] for at in range(0, len(flat), n)]


def count_reasons(reasons: Sequence[str]) -> dict[str, int]:
    counts = Counter(reasons)
    return {reason: counts[reason] for reason in REASONS}


def elect(answers: Sequence[str | None]) -> str | None:
    """The answer that most samples gave (2203.11171); None where fewer than two agree, or two answers have as many."""
    (first, votes), (_, next_) = [*Counter(a for a in answers if a is not None).most_common(2), *[("", 0)] * 2][:2]
    return first if votes >= 2 and votes > next_ else None


def majority(answers: Sequence[str]) -> float:
    """The share of the commonest answer: what a constant reply would score."""
    return max(Counter(answers).values()) / len(answers)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k), unbiased, for `c` correct of `n` samples (2107.03374)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_interval(tasks: Sequence[Sequence[int]], resamples: int = 2000) -> tuple[float, float, float]:
    """Mean over tasks of their accuracy, with a 95% bootstrap interval: items resampled within each task."""
    rates = np.array([sum(t) / len(t) for t in tasks])
    sizes = np.array([len(t) for t in tasks])
    rng = np.random.default_rng(0)
    # Resampling 0/1 items with replacement is a binomial draw.
    means = (rng.binomial(sizes, rates, (resamples, len(tasks))) / sizes).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(rates.mean()), float(low), float(high)


def difference_interval(a: tuple[int, int], b: tuple[int, int]) -> tuple[float, float, float]:
    """Difference of two independent proportions, (correct, n) each, with Newcombe's 95% score interval (1998)."""
    (p, q), (low_a, high_a), (low_b, high_b) = (c / n for c, n in (a, b)), wilson(*a), wilson(*b)
    return p - q, p - q - math.hypot(p - low_a, high_b - q), p - q + math.hypot(high_a - p, q - low_b)


def paired_interval(
    before: Sequence[Sequence[int]], now: Sequence[Sequence[int]], resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean over tasks of the difference `now` - `before` in accuracy, with a 95% bootstrap interval: items resampled
    within each task, paired. Each has a list of 0 and 1 a task, items in the same order."""
    rng, value, drawn = np.random.default_rng(0), 0.0, np.zeros(resamples)
    for then, after in zip(before, now, strict=True):
        gain = np.subtract(after, then).astype(float)
        counts = rng.multinomial(len(gain), np.full(len(gain), 1 / len(gain)), resamples)
        value, drawn = value + float(gain.mean()), drawn + (counts @ gain) / len(gain)
    low, high = np.percentile(drawn / len(before), [2.5, 97.5])
    return value / len(before), float(low), float(high)


def gap_interval(
    base: Mapping[str, Any], now: Mapping[str, Any], id_task: str, ood: Sequence[str], resamples: int = 2000
) -> tuple[float, float, float]:
    """(gain of the ID task) - (mean gain of the OOD tasks) between two scores.json, with a 95% bootstrap interval:
    items resampled within each task, paired."""
    gains = {t: np.subtract(now[t]["correct"], base[t]["correct"]).astype(float) for t in (id_task, *ood)}
    rng, gap, drawn = np.random.default_rng(0), 0.0, np.zeros(resamples)
    for task, gain in gains.items():
        weight = 1.0 if task == id_task else -1.0 / len(ood)
        counts = rng.multinomial(len(gain), np.full(len(gain), 1 / len(gain)), resamples)
        gap, drawn = gap + weight * float(gain.mean()), drawn + weight * (counts @ gain) / len(gain)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return gap, float(low), float(high)


def ratio_interval(above: Sequence[float], below: Sequence[float], resamples: int = 2000) -> tuple[float, float, float]:
    """sum(above) / sum(below) over problems, with a 95% bootstrap interval: problems resampled."""
    a, b = np.array(above, float), np.array(below, float)
    counts = np.random.default_rng(0).multinomial(len(a), np.full(len(a), 1 / len(a)), resamples)
    under = counts @ b
    ratios = (counts @ a)[under > 0] / under[under > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(a.sum() / b.sum()), float(low), float(high)


def metrics(scores: Mapping[str, Any], id_task: str, near: Sequence[str], far: Sequence[str]) -> dict[str, float]:
    """Flat figures: id/acc, id/<task>/acc, ood/<task>/acc, ood/acc, ood/near/acc and ood/far/acc, and val/id/acc
    and val/ood/* where these tasks have validation items, each with _low and _high (95%)."""
    out: dict[str, float] = {}

    def put(name: str, value: float, low: float, high: float) -> None:
        out.update({name: value, f"{name}_low": low, f"{name}_high": high})

    def put_task(name: str, label: str) -> None:
        correct = scores[label]["correct"]
        put(name, sum(correct) / len(correct), *wilson(sum(correct), len(correct)))

    put_task("id/acc", id_task)
    put_task(f"id/{id_task}/acc", id_task)
    if f"val/{id_task}" in scores:
        put_task("val/id/acc", f"val/{id_task}")
    for name, labels in {"ood": [*near, *far], "ood/near": near, "ood/far": far}.items():
        if labels:
            put(f"{name}/acc", *mean_interval([scores[label]["correct"] for label in labels]))
        if choosing := [f"val/{label}" for label in labels if f"val/{label}" in scores]:
            put(f"val/{name}/acc", *mean_interval([scores[label]["correct"] for label in choosing]))
    for label in [*near, *far]:
        put_task(f"ood/{label}/acc", label)
        out[f"ood/{label}/majority"] = scores[label]["majority"]
    return out

"""How alike a model's samples have become, and how far its predictions have moved: collapse in figures.

Every figure is a sum over problems above a sum below, kept by problem, so that intervals resample problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sacrebleu.metrics.bleu import BLEU
from torch import Tensor

from ..evaluation import pass_at_k
from ..sft import IGNORED, Example, collate, completion_logits
from .change import AnalysisError

Ratio = tuple[list[float], list[float]]  # above and below, a number a problem
NGRAMS = (1, 2, 3, 4)


def sample_figures(problems: Sequence[Sequence[Mapping[str, Any]]], tokens: Mapping[str, Sequence[int]]) -> dict:
    """{name: (above, below)}, a number a problem in each, from the samples of each problem.

    A sample has `completion`, `answer` (None where none was read), `verdict`, `reason`, `tokens`, `entropy` (None where
    it is not known); `tokens` gives a completion's token ids. Names: sample/pass@k (2107.03374) and sample/maj@k for
    k = 1, 2, 4, ...; sample/tokens (mean length); sample/<reason> (shares); diversity/distinct and distinct_correct
    (different solutions among all, among the correct ones), distinct_1 .. distinct_4 (different n-grams of tokens among
    all, 1510.03055), self_bleu (1802.01886), answer_entropy (nats), token_entropy (nats a token, of the model's own
    distribution).
    """
    out: dict[str, Ratio] = {}

    def put(name: str, above: float, below: float) -> None:
        ratio = out.setdefault(name, ([], []))
        ratio[0].append(above)
        ratio[1].append(below)

    most = min(map(len, problems))
    ks = [k for k in (2**i for i in range(12)) if k <= most]
    reasons = sorted({s["reason"] for samples in problems for s in samples})
    for samples in problems:
        n, texts = len(samples), [s["completion"] for s in samples]
        right = [s["completion"] for s in samples if s["verdict"]]
        answers = Counter(s["answer"] for s in samples if not s["verdict"])
        for k in ks:
            put(f"sample/pass@{k}", pass_at_k(n, len(right), k), 1)
            put(f"sample/maj@{k}", majority_at_k(len(right), list(answers.items()), k), 1)
        put("sample/tokens", sum(s["tokens"] for s in samples), n)
        for reason in reasons:
            put(f"sample/{reason}", sum(s["reason"] == reason for s in samples), n)
        put("diversity/distinct", len(set(texts)), n)
        put("diversity/distinct_correct", len(set(right)), len(right))
        for size in NGRAMS:
            grams = [g for text in texts for g in _ngrams(tokens[text], size)]
            put(f"diversity/distinct_{size}", len(set(grams)), len(grams))
        put("diversity/self_bleu", self_bleu([tokens[text] for text in texts]), 1)
        put("diversity/answer_entropy", entropy([len(right), *answers.values()]), 1)
        if None not in (known := [s["entropy"] for s in samples]):
            put("diversity/token_entropy", sum(known), sum(s["tokens"] for s in samples))
    return out


def majority_at_k(correct: int, others: Sequence[tuple[Any, int]], k: int) -> float:
    """The chance that the commonest answer of k samples, drawn without replacement, is the correct one.

    `correct` samples have it, `others` are (answer, samples) pairs; answers that could not be read (None) do not vote,
    and of equally common ones each wins with the same chance. Exact, by counting the subsets.
    """
    silent = sum(n for answer, n in others if answer is None)
    counts = [n for answer, n in others if answer is not None]
    total = 0.0
    for own in range(1, min(correct, k) + 1):
        # ways[ties][size]: subsets of the other answers, none of them commoner than `own`
        ways = {0: [math.comb(silent, size) for size in range(k - own + 1)]}
        for n in counts:
            after: dict[int, list[int]] = {}
            for ties, sizes in ways.items():
                for took in range(min(n, own, k - own) + 1):
                    into = after.setdefault(ties + (took == own), [0] * (k - own + 1))
                    for size, count in enumerate(sizes[: k - own + 1 - took]):
                        into[size + took] += count * math.comb(n, took)
            ways = after
        here = sum(sizes[k - own] / (ties + 1) for ties, sizes in ways.items())
        total += math.comb(correct, own) * here
    return total / math.comb(correct + silent + sum(counts), k)


def self_bleu(samples: Sequence[Sequence[int]]) -> float:
    """Mean BLEU-4 (0 to 1) of each sample against all others of its problem (1802.01886), over token ids, by sacreBLEU
    with exponential smoothing; orders that a short sample has not are left out. 1 for identical samples, 0 for one."""
    if len(samples) < 2:
        return 0.0
    counts = Counter(map(tuple, samples))
    grams = {sample: Counter(g for size in NGRAMS for g in _ngrams(sample, size)) for sample in counts}
    most: dict[tuple[int, ...], list[int]] = {}  # how often the two samples that have an n-gram most often have it
    for own in grams.values():  # counted once; sacreBLEU itself counts all others' again for each sample
        for gram, count in own.items():
            had = most.setdefault(gram, [0, 0])
            had[:] = sorted((*had, count))[:0:-1]
    total = 0.0
    for sample, n in counts.items():  # a sample with a twin scores 1, and twins among the others change nothing
        total += n if n > 1 else _bleu(sample, grams[sample], most, [len(o) for o in counts if o != sample]) / 100
    return total / len(samples)


def _bleu(
    sample: Sequence[int], grams: Mapping[tuple[int, ...], int], most: Mapping[tuple[int, ...], Sequence[int]],
    lengths: Sequence[int],
) -> float:  # fmt: skip
    """BLEU-4 (0 to 100) of a sample against others of these lengths, by sacreBLEU's formula."""
    right, of = [0] * len(NGRAMS), [0] * len(NGRAMS)
    for gram, count in grams.items():
        first, second = most[gram]
        of[len(gram) - 1] += count
        right[len(gram) - 1] += count if count < first else second  # at most as often as another one has it
    _, nearest = min((abs(len(sample) - length), length) for length in lengths)
    return BLEU.compute_bleu(right, of, len(sample), nearest, smooth_method="exp", effective_order=True).score


def entropy(counts: Sequence[int]) -> float:
    """Entropy (nats) of the shares that the counts have; 0 for none."""
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n) + 0.0


def _ngrams(tokens: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1))


# --- the model's predictions of fixed texts ------------------------------------------------------------------------


def predictions(
    model: Any, examples: Sequence[Example], pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """For batches of examples: their numbers, and the log-probabilities (examples, columns, vocabulary) with which the
    model predicts the tokens of their completions; columns beyond an example's own are NaN."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].completion))
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            batch = {k: v.to(device) for k, v in collate([examples[i] for i in rows], pad_id).items()}
            logits, targets = completion_logits(model, batch)
            logs = torch.log_softmax(logits.float(), -1)
            if logs.isnan().any():
                raise AnalysisError("the model's predictions are not finite; look for weights that are not")
            yield rows, logs.masked_fill((targets == IGNORED)[..., None], math.nan)


def text_entropy(model: Any, examples: Sequence[Example], pad_id: int, batch_size: int) -> Ratio:
    """(nats, tokens) of each example: the entropy of the model's predictions of its completion's tokens."""
    above, below = [0.0] * len(examples), [0.0] * len(examples)
    for rows, logs in predictions(model, examples, pad_id, batch_size):
        spread = torch.special.entr(logs.exp()).double().sum(-1)  # 0 where the probability is
        for i, row in enumerate(rows):
            above[row], below[row] = float(spread[i].nansum()), float(spread[i].isfinite().sum())
    return above, below


def keep_predictions(model: Any, examples: Sequence[Example], pad_id: int, batch_size: int) -> list[Tensor]:
    """What `divergence` compares with: each example's log-probabilities (tokens, vocabulary), on the CPU."""
    out: list[Tensor] = [torch.empty(0)] * len(examples)
    for rows, logs in predictions(model, examples, pad_id, batch_size):
        for i, row in enumerate(rows):
            out[row] = logs[i][~logs[i, :, 0].isnan()].cpu()
    return out


def divergence(model: Any, base: Sequence[Tensor], examples: Sequence[Example], pad_id: int, batch_size: int) -> Ratio:
    """(nats, tokens) of each example: KL(model || base) of the predictions of its completion's tokens."""
    above, below = [0.0] * len(examples), [0.0] * len(examples)
    for rows, logs in predictions(model, examples, pad_id, batch_size):
        for i, row in enumerate(rows):
            now = logs[i][~logs[i, :, 0].isnan()].double()
            then = base[row].to(now)
            nats = torch.where(now.exp() > 0, now.exp() * (now - then), 0.0).sum()
            above[row], below[row] = max(0.0, float(nats)), float(len(now))
    return above, below

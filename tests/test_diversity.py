"""What shows collapse: pass@k and maj@k against enumeration, self-BLEU and entropies by hand, divergence."""

from __future__ import annotations

import copy
import math
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from conftest import enliven
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from itermerge.analysis.change import AnalysisError
from itermerge.analysis.diversity import (
    divergence,
    entropy,
    keep_predictions,
    majority_at_k,
    sample_figures,
    self_bleu,
    text_entropy,
)
from itermerge.policy import Policy
from itermerge.sft import Example


def _samples(*answers: str | None) -> list[dict[str, Any]]:
    """A sample an answer; `5` is correct, None could not be read."""
    return [
        {
            "completion": f"so {a}", "answer": a, "verdict": a == "5", "tokens": 2, "entropy": 0.5,
            "reason": "correct" if a == "5" else "unparseable" if a is None else "wrong",
        }
        for a in answers
    ]  # fmt: skip


def _enumerated(answers: list[str | None], k: int) -> tuple[float, float]:
    """(pass@k, maj@k) over all subsets of k samples."""
    hits = wins = 0.0
    subsets = list(combinations(answers, k))
    for subset in subsets:
        hits += "5" in subset
        votes = Counter(a for a in subset if a is not None)
        best = [a for a, n in votes.items() if n == max(votes.values())]
        wins += ("5" in best) / len(best) if best else 0
    return hits / len(subsets), wins / len(subsets)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["5", "5", "6", "7", "8", None]), min_size=1, max_size=8), st.data())
def test_pass_and_majority_against_all_subsets(answers: list[str | None], data: Any) -> None:
    k = data.draw(st.sampled_from([k for k in (1, 2, 4, 8) if k <= len(answers)]))
    figures = sample_figures([_samples(*answers)], {f"so {a}": [1, 2] for a in answers})
    hit, majority = _enumerated(answers, k)
    assert figures[f"sample/pass@{k}"] == ([pytest.approx(hit)], [1])
    assert figures[f"sample/maj@{k}"] == ([pytest.approx(majority)], [1])


def test_majority_by_hand() -> None:
    assert majority_at_k(2, [("6", 1)], 3) == 1  # 5 5 6
    assert majority_at_k(1, [("6", 1)], 2) == 0.5  # a tie
    assert majority_at_k(1, [(None, 1)], 2) == 1  # what cannot be read does not vote
    assert majority_at_k(0, [(None, 2)], 2) == 0
    assert majority_at_k(2, [("6", 3), ("7", 3)], 1) == pytest.approx(2 / 8)


def test_figures_of_samples_by_hand() -> None:
    tokens = {"so 5": [1, 2, 3], "so 6": [1, 2, 4], "so None": [1]}
    got = sample_figures([_samples("5", "5", "6", None), _samples("6", "6")], tokens)
    assert got["diversity/distinct"] == ([3, 1], [4, 2])
    assert got["diversity/distinct_correct"] == ([1, 0], [2, 0])
    assert got["diversity/distinct_1"] == ([4, 3], [10, 6])  # 1 2 3 4 of ten tokens; 1 2 4 of six
    assert got["diversity/distinct_2"] == ([3, 2], [6, 4])  # 12 23 24; 12 24
    assert got["diversity/distinct_3"] == ([2, 1], [3, 2])
    assert got["diversity/distinct_4"] == ([0, 0], [0, 0])
    thirds = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))  # 5 5, 6, none
    assert got["diversity/answer_entropy"] == ([pytest.approx(thirds), 0], [1, 1])
    assert got["diversity/token_entropy"] == ([2.0, 1.0], [8, 4])
    assert got["sample/tokens"] == ([8, 4], [4, 2])
    assert got["sample/wrong"] == ([1, 2], [4, 2])
    assert got["sample/unparseable"] == ([1, 0], [4, 2])
    assert {k for k in got if "pass" in k} == {"sample/pass@1", "sample/pass@2"}  # the fewest samples that one has


def test_self_bleu_by_hand() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == 1
    assert self_bleu([[1, 2, 3, 4, 5]]) == 0  # no other sample
    # each against the other: 4 of 5 unigrams, 3 of 4, 2 of 3, 1 of 2; equal lengths
    want = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu([[1, 2, 3, 4, 5], [1, 2, 3, 4, 9]]) == pytest.approx(want)
    # of three, two alike: these score 1, the third is compared with them
    assert self_bleu([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 9]]) == pytest.approx((2 + want) / 3)
    assert self_bleu([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]) < 0.15
    assert self_bleu([[], [1]]) == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=7), min_size=2, max_size=6))
def test_self_bleu_is_sacrebleus_to_the_last_bit(samples: list[list[int]]) -> None:
    bleu, texts = BLEU(tokenize="none", effective_order=True), [" ".join(map(str, s)) for s in samples]
    counts, want = Counter(texts), 0.0
    for text, n in counts.items():
        others = [other for other in counts if other != text]
        want += n if n > 1 else bleu.sentence_score(text, others).score / 100
    assert self_bleu(samples) == want / len(samples)


def test_entropy_by_hand() -> None:
    assert entropy([1, 1]) == pytest.approx(math.log(2))
    assert [entropy([3]), entropy([]), entropy([0, 2])] == [0, 0, 0]


def test_predictions_of_minus_infinity_count_nothing_and_nan_is_said(tiny: Policy) -> None:
    policy = enliven(tiny)
    texts = _texts(policy)
    base = keep_predictions(policy.model, texts, policy.pad_id, 2)
    policy.model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([3]), -math.inf))
    nats, _ = divergence(policy.model, base, texts, policy.pad_id, 2)
    assert all(n > 0 and math.isfinite(n) for n in nats)
    assert all(math.isfinite(n) and n > 0 for n in text_entropy(policy.model, texts, policy.pad_id, 2)[0])
    policy.model.lm_head.register_forward_hook(lambda _, __, out: out * math.nan)
    with pytest.raises(AnalysisError, match="predictions are not finite"):
        divergence(policy.model, base, texts, policy.pad_id, 2)


def _texts(policy: Policy) -> list[Example]:
    rows = [("sum 34+18?", "34+18=52#52"), ("sum 3+1?", "4#4"), ("sum 34+1?", "34+1=35#35")]
    return [Example(policy.encode_prompt(p), policy.encode_completion(c)) for p, c in rows]


def test_predictions_against_each_example_alone(tiny: Policy) -> None:
    """KL(model || base) and entropy, in nats over the completion's tokens, by torch's own distributions."""
    policy = enliven(tiny)
    texts = _texts(policy)
    base = keep_predictions(policy.model, texts, policy.pad_id, 2)
    then = copy.deepcopy(policy.model)
    same, _ = divergence(policy.model, base, texts, policy.pad_id, 3)
    assert same == pytest.approx([0, 0, 0], abs=1e-5)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(0.9)
    nats, tokens = divergence(policy.model, base, texts, policy.pad_id, 2)
    spread, counted = text_entropy(policy.model, texts, policy.pad_id, 2)
    assert tokens == counted == [len(t.completion) for t in texts]
    for at, text in enumerate(texts):
        ids = torch.tensor([[*text.prompt, *text.completion]])
        where = slice(len(text.prompt) - 1, -1)
        with torch.no_grad():
            new, old = (torch.distributions.Categorical(logits=m(ids).logits[0, where]) for m in (policy.model, then))
        assert nats[at] == pytest.approx(float(torch.distributions.kl_divergence(new, old).sum()), rel=1e-4)
        assert spread[at] == pytest.approx(float(new.entropy().sum()), rel=1e-4)

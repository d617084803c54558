"""Do the layers that matter change least? Importance against change over a model's layers, with numpy alone.

The paper's claim (2503.02103): they do, which shows as a Spearman correlation below 0, and as the most important layers
holding less of the squared update than their number would give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np

EXACT_UP_TO = 8  # layers: 40,320 permutations
PERMUTATIONS = 10_000
RESAMPLES = 2000


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, ties at their mean rank."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (equal + 1) / 2


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis; NaN where one of them is constant or has one value."""
    return _correlation(ranks(np.asarray(x, float)), ranks(np.asarray(y, float)))


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = (r - r.mean(-1, keepdims=True) for r in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def permutation_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Two-sided p of Spearman's correlation: the share of permutations at least as far from 0; of all of them up to 8
    layers, else of 10,000 drawn ones and the observed one. NaN where the correlation is not defined."""
    observed = float(spearman(np.array(x), np.array(y)))
    if math.isnan(observed):
        return math.nan
    orders = _orders(len(x))
    a, b = ranks(np.array(x, float)), ranks(np.array(y, float))
    a, b = a - a.mean(), b - b.mean()
    found = b[orders] @ a / math.sqrt(float(a @ a) * float(b @ b))
    return float((np.abs(found) >= abs(observed) - 1e-12).mean())


@cache
def _orders(n: int) -> np.ndarray:
    """(permutations, n), in each row the numbers from 0 on; the first row in order."""
    if n <= EXACT_UP_TO:
        return np.array(list(permutations(range(n))))
    rng = np.random.default_rng(0)
    return np.vstack([np.arange(n), rng.permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1)])


def top_count(layers: int, share: float) -> int:
    """How many layers the `share` most important ones are: at least one."""
    return max(1, round(share * layers))


def top_share(importance: np.ndarray, energy: np.ndarray, k: int) -> np.ndarray:
    """Share of the squared update that the k most important layers hold (of equal ones the first), along the last axis
    of `importance`. NaN for an update of zero."""
    top = np.argsort(-np.asarray(importance, float), axis=-1, kind="stable")[..., :k]
    total = float(np.sum(energy))
    return np.asarray(energy, float)[top].sum(-1) / total if total else np.full(top.shape[:-1], math.nan)


def interval_of_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over examples (rows) of each layer, and its 95% interval: examples resampled."""
    low, high = np.percentile(resampled_means(values), [2.5, 97.5], axis=0)
    return values.mean(0), low, high


def mismatch(values: Mapping[str, np.ndarray], layers: Mapping[str, Any], share: float) -> dict[str, float]:
    """{<estimator>/spearman, _low, _high, <estimator>/p, <estimator>/spearman_squared, _low, _high,
    <estimator>/top_share, _low, _high, <estimator>/top_expected} and top_k.

    `values` are importances (examples, layers) by estimator; `layers` is a table of `layer_change`, of which the
    relative change (spearman) and the share of the squared change (spearman_squared, top_share) are compared with them;
    the two need not agree: a layer with large weights may change little for its norm and hold much of the squared
    change. Intervals: examples resampled, never layers. What is not defined (one layer, no change) is left out.
    """
    names = sorted((n for n in layers if n.startswith("layer_")), key=lambda n: int(n.removeprefix("layer_")))
    rows = [layers[name] for name in names]
    change, energy = (np.array([row[what] for row in rows]) for what in ("relative", "energy"))
    k = top_count(len(rows), share)
    out: dict[str, float] = {"top_k": k}
    for name, examples in values.items():
        mean, drawn = examples.mean(0), resampled_means(examples)
        ranked = ranks(drawn)
        figures = {
            "spearman": (float(spearman(mean, change)), _correlation(ranked, ranks(change))),
            "spearman_squared": (float(spearman(mean, energy)), _correlation(ranked, ranks(energy))),
            "top_share": (float(top_share(mean, energy, k)), top_share(drawn, energy, k)),
        }
        for what, (value, resampled) in figures.items():
            if not math.isnan(value):
                low, high = np.nanpercentile(resampled, [2.5, 97.5])
                out |= {f"{name}/{what}": value, f"{name}/{what}_low": float(low), f"{name}/{what}_high": float(high)}
        if f"{name}/spearman" in out:
            out[f"{name}/p"] = permutation_p(mean.tolist(), change.tolist())
        if f"{name}/top_share" in out:
            out[f"{name}/top_expected"] = k / len(rows)
    return out


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means over examples (rows) drawn with replacement: (resamples, layers)."""
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return counts @ values / n

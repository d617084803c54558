"""How often the study's 95% intervals hold the truth, when bases, seeds and items are drawn from known distributions.

    python benchmarks/coverage.py [--trials 250]

Values of an item are base + seed + chain + item + noise, normal with these standard deviations; the truth is 0.
"""

from __future__ import annotations

import argparse

import numpy as np

from itermerge.study import interval

CASES = {  # bases, seeds; standard deviations of base, seed, chain, item (and its noise)
    "3 bases x 3 seeds, bases differ most": (3, 3, 0.02, 0.002, 0.002, 0.05),
    "3 bases x 3 seeds, seeds differ most": (3, 3, 0.002, 0.02, 0.002, 0.05),
    "3 bases x 3 seeds, all comparable": (3, 3, 0.01, 0.01, 0.005, 0.15),
    "3 bases x 3 seeds, items differ most": (3, 3, 0.002, 0.002, 0.002, 0.3),
    "1 base x 3 seeds, seeds differ most": (1, 3, 0.0, 0.02, 0.002, 0.05),
    "1 base x 3 seeds, comparable with items": (1, 3, 0.0, 0.01, 0.005, 0.15),
}
ITEMS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=250)
    trials = parser.parse_args().trials
    rng = np.random.default_rng(7)
    for name, (bases, seeds, *sd) in CASES.items():
        held = 0
        for _ in range(trials):
            base, seed, item = (rng.normal(0, s, n) for s, n in ((sd[0], bases), (sd[1], seeds), (sd[3], ITEMS)))
            units = {
                (str(i), j): {"x": base[i] + seed[j] + rng.normal(0, sd[2]) + item + rng.normal(0, sd[3], ITEMS)}
                for i in range(bases) for j in range(seeds)
            }  # fmt: skip
            got = interval(units, 400)
            held += got.low <= 0 <= got.high
        print(f"{name:42s} {100 * held / trials:.0f}% of {trials}")


if __name__ == "__main__":
    main()

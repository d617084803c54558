"""The study's statistics against hand values and a slower bootstrap, and its tables on chains made by hand."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_here
from omegaconf import OmegaConf

from itermerge import study
from itermerge.study import Chain, Study, StudyError, difference, interval, main, read, unit_weights


def _items(rng: np.random.Generator, rate: float, n: int = 40) -> np.ndarray:
    return (rng.random(n) < rate).astype(float)


# --- intervals -----------------------------------------------------------------------------------------------------


def test_weights_of_units_are_those_of_drawing_two_of_three_bases_and_seeds() -> None:
    """A base is left out of a draw of 2 of 3 with probability (2/3)^2 = 4/9, a seed of 3 likewise, independently; a
    chain is in with probability (5/9)^2. Each draw is a distribution, with all chains alike on average."""
    w = unit_weights([(b, s) for b in "abc" for s in range(3)], 20000, np.random.default_rng(1))
    assert w.sum(1) == pytest.approx(np.ones(20000))
    assert w.mean(0) == pytest.approx(np.full(9, 1 / 9), abs=0.005)
    assert np.mean(w > 0, 0) == pytest.approx(np.full(9, (5 / 9) ** 2), abs=0.012)
    by_base = w.reshape(-1, 3, 3).sum(2)
    assert np.mean(by_base == 0, 0) == pytest.approx(np.full(3, 4 / 9), abs=0.012)
    # the variance of a mean over bases is then unbiased: of +1, 0, -1 it is 1 / 3, as from the sample variance 1
    assert np.var(by_base @ np.array([1.0, 0, -1])) == pytest.approx(1 / 3, abs=0.01)


def test_weights_where_not_every_base_has_every_seed() -> None:
    w = unit_weights([("a", 0), ("a", 1), ("b", 2)], 5000, np.random.default_rng(1))
    assert w.sum(1) == pytest.approx(np.ones(5000))
    assert unit_weights([("a", 0)], 5, np.random.default_rng(1)).tolist() == [[1.0]] * 5


def test_interval_is_that_of_a_bootstrap_written_out() -> None:
    """Two of three bases, one of two seeds (the same on all bases), and items of each task, drawn one by one."""
    rng = np.random.default_rng(0)
    units = {
        (base, seed): {"x": _items(rng, 0.3 + 0.2 * i), "y": _items(rng, 0.7, 25)}
        for i, base in enumerate("abc") for seed in range(2)
    }  # fmt: skip
    got = interval(units, 4000)
    assert got.value == pytest.approx(np.mean([[v.mean() for v in u.values()] for u in units.values()]))
    draw, means = random.Random(5), []
    for _ in range(4000):
        seed = draw.choice((0, 1))
        picked = [(base, seed) for base in draw.choices("abc", k=2)]
        at = {"x": draw.choices(range(40), k=40), "y": draw.choices(range(25), k=25)}
        means.append(np.mean([[units[u][t][at[t]].mean() for t in at] for u in picked]))
    low, high = np.percentile(means, [2.5, 97.5])
    assert got.low == pytest.approx(low, abs=0.015)
    assert got.high == pytest.approx(high, abs=0.015)


def test_an_interval_holds_its_mean_also_at_the_end_of_the_scale() -> None:
    got = interval({("a", 0): {"x": np.ones(200), "y": np.ones(7)}})
    assert (got.low, got.value, got.high) == (1, 1, 1)


def test_differences_are_paired_by_item_and_unit() -> None:
    """b is a with one item in ten lost: whatever is drawn of units, only those items vary."""
    rng = np.random.default_rng(0)
    a = {(base, seed): {"x": _items(rng, 0.5, 200)} for base in "ab" for seed in (0, 1)}
    b = {u: {"x": v["x"] - (np.arange(200) % 10 == 0)} for u, v in a.items()}
    got = interval(study.paired(b, a, ["x"]), 2000)
    assert got.value == pytest.approx(-0.1)
    assert (got.agree, got.units) == (4, 4)
    assert got.points().endswith(" 4/4")
    # 200 items, each a tenth: sd sqrt(.1 * .9 / 200) = .0212, so 1.96 sd = .0416
    assert got.high - got.low == pytest.approx(2 * 0.0416, rel=0.1)
    assert difference(a, a) == study.Interval(0, 0, 0, 0, 4)
    with pytest.raises(StudyError, match=r"no \(base, seed\) in common"):
        difference({("a", 0): a["a", 0]}, {("b", 0): a["b", 0]})


def test_only_common_units_are_compared() -> None:
    one, other = {"x": np.ones(4)}, {"x": np.zeros(4)}
    got = difference({("a", 0): one, ("a", 1): one}, {("a", 1): other, ("a", 2): one})
    assert (got.value, got.low, got.high) == (1, 1, 1)


# --- tables --------------------------------------------------------------------------------------------------------

N = 100


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are read for their means; tests of intervals say how many resamples they need."""
    monkeypatch.setattr(study, "RESAMPLES", 200)


def _run(
    folder: Path, *, ratio: float, lr: float, seed: int = 0, base: int = 0, val: Sequence[float], id_: Sequence[float],
    near: Sequence[float], drift: Sequence[float], **config: Any,
) -> None:  # fmt: skip
    """A finished run's folder: accuracies by round, the first items of each task being the correct ones."""
    merge = {"kind": "linear", "ratio": ratio} if ratio < 1 else {"kind": "none"}
    whole = {
        "seed": seed, "model": {"kind": "lab", "seed": base}, "sft": {"lr": lr}, "merge": merge,
        "suite": {"near": [{"kind": "lab", "family": "pair"}], "far": [{"kind": "lab", "family": "sort"}], "seed": 0},
        "sampler": {"n": 8}, "rounds": len(val) - 1, "store": {"dir": str(folder)}, **config,
    }  # fmt: skip
    lines = []
    for t in range(len(val)):
        at = folder / "rounds" / f"{t:02d}"
        at.mkdir(parents=True)
        rates = {"chain": id_[t], "pair": near[t], "sort": 0.9, "val/chain": val[t]}
        scores = {k: {"correct": [int(i < round(N * r)) for i in range(N)]} for k, r in rates.items()}
        (at / "scores.json").write_text(json.dumps(scores))
        # two problems: 2 of 4 samples correct, 3 different, 8 nats over 16 tokens; and 0 of 4, 1 different, 4 over 8
        held = [("p", "x", True), ("p", "x", True), ("p", "y", False), ("p", "z", False), *[("q", "w", False)] * 4]
        rows = [
            {"id": i, "completion": text, "verdict": right, "tokens": size, "entropy": size / 2}
            for i, text, right in held
            for size in (4 if i == "p" else 2,)
        ]
        (at / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = {"round": t, "id/acc": id_[t], "val/id/acc": val[t], "ood/acc": (near[t] + 0.9) / 2}
        line |= {"ood/pair/majority": 0.86, "ood/sort/majority": 0.1}
        lines.append(line | ({"weights/drift": drift[t]} if t else {}))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(whole))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "summary.json").write_text("{}")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two rounds, two seeds. Vanilla at three rates: the lowest has the best test ID but not the best validation ID."""
    cells: list[dict[str, Any]] = [
        {"ratio": 1.0, "lr": 1e-4, "val": [0.3, 0.40, 0.44], "id_": [0.3, 0.5, 0.6], "near": [0.9, 0.85, 0.80],
         "drift": [0, 0.010, 0.020]},
        {"ratio": 1.0, "lr": 2e-4, "val": [0.3, 0.45, 0.50], "id_": [0.3, 0.45, 0.5], "near": [0.9, 0.80, 0.70],
         "drift": [0, 0.020, 0.040]},
        {"ratio": 1.0, "lr": 4e-4, "val": [0.3, 0.35, 0.30], "id_": [0.3, 0.35, 0.3], "near": [0.9, 0.60, 0.40],
         "drift": [0, 0.050, 0.100]},
        {"ratio": 0.5, "lr": 4e-4, "val": [0.3, 0.42, 0.46], "id_": [0.3, 0.44, 0.5], "near": [0.9, 0.88, 0.84],
         "drift": [0, 0.025, 0.035]},
    ]  # fmt: skip
    for number, (cell, seed) in enumerate(itertools.product(cells, (0, 1))):
        _run(tmp_path / "sweep" / str(number), seed=seed, **cell)
    return tmp_path / "sweep"


def _by_method(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in rows}


def test_grid_has_the_base_and_each_method_at_the_last_round(sweep: Path) -> None:
    rows = _by_method(Study(read([sweep])[0]).grid())
    assert list(rows) == [
        "base", "ratio 0.5, lr 0.0004", "vanilla, lr 0.0001", "vanilla, lr 0.0002", "vanilla, lr 0.0004"
    ]  # fmt: skip
    assert rows["base"]["ID"].startswith("30.0 [")
    row = rows["vanilla, lr 0.0004"]
    assert (row["val ID"], row["units"], row["drift"]) == ("30.0", 2, "0.1000")
    assert row["OOD near"].startswith("40.0 [")
    assert row["OOD"].startswith("65.0 [")  # (40 + 90) / 2


def test_the_learning_rate_is_chosen_on_validation_items(sweep: Path) -> None:
    shared, own = "the one learning rate that all have, last round", "own learning rate and round"
    rows = {(r["chosen by"], r["method"]): r for r in Study(read([sweep])[0]).chosen()}
    # 4e-4 is the one rate that both have; left to itself vanilla takes 2e-4, in the middle of what was tried
    assert set(rows) == {
        (shared, "vanilla, lr 0.0004"), (shared, "ratio 0.5, lr 0.0004"), (own, "vanilla, lr 0.0002"),
        (own, "ratio 0.5, lr 0.0004"),
    }  # fmt: skip
    assert "note" not in rows[own, "vanilla, lr 0.0002"]
    merged = rows[own, "ratio 0.5, lr 0.0004"]
    assert (merged["control"], merged["at round"], merged["round"]) == ("vanilla, lr 0.0002", 2, 2)
    assert merged["OOD near"].startswith("+14.0 [")  # 84 - 70
    assert merged["OOD near"].endswith("] 2/2")
    assert "OOD near" not in rows[own, "vanilla, lr 0.0002"]  # against itself


def test_matched_controls_are_the_nearest_in_validation_id_and_in_drift(sweep: Path) -> None:
    by_id, by_drift = Study(read([sweep])[0]).matched()  # one merged method: no mean over several
    assert by_id["equal"] == "ID (validation)"
    # .46: of .40 .44 .45 .50 .35 (.30 is the same rate and round) .45 is a point away; near .84 - .80
    assert (by_id["control"], by_id["at round"]) == ("vanilla, lr 0.0002", 1)
    assert by_id["OOD near"].startswith("+4.0 [")
    # .035: of .010 .020 .020 .040 .050 the nearest by ratio is .040, within 15%; near .84 - .70
    assert (by_drift["control"], by_drift["at round"]) == ("vanilla, lr 0.0002", 2)
    assert by_drift["OOD near"].startswith("+14.0 [")
    assert by_drift["drift"] == "0.0350 / 0.0400"
    assert by_drift["val ID"] == "46.0 / 50.0"


def test_the_gentlest_vanilla_that_learns_as_much_is_the_control(sweep: Path) -> None:
    """Of two cells a point away in validation ID the one with the smaller drift, though the other is nearer."""
    for seed in (0, 1):
        _run(
            sweep / f"gentle{seed}", ratio=1.0, lr=5e-5, seed=seed, val=[0.3, 0.47, 0.30], id_=[0.3, 0.4, 0.4],
            near=[0.9, 0.86, 0.86], drift=[0, 0.004, 0.008],
        )  # fmt: skip
    by_id = Study(read([sweep])[0]).matched()[0]
    assert (by_id["control"], by_id["at round"]) == ("vanilla, lr 5e-05", 1)


def test_the_mean_over_matches_is_theirs_paired_and_leaves_out_what_has_no_control(sweep: Path) -> None:
    for seed in (0, 1):
        _run(
            sweep / f"other{seed}", ratio=0.7, lr=4e-4, seed=seed, val=[0.3, 0.4, 0.34], id_=[0.3, 0.4, 0.4],
            near=[0.9, 0.7, 0.5], drift=[0, 0.06, 0.055],
        )  # fmt: skip
        _run(
            sweep / f"far{seed}", ratio=0.3, lr=4e-4, seed=seed, val=[0.3, 0.9, 0.9], id_=[0.3, 0.4, 0.4],
            near=[0.9, 0.7, 0.5], drift=[0, 0.9, 0.9],
        )  # fmt: skip
    rows = Study(read([sweep])[0]).matched()
    assert [r.get("OOD near", r.get("control", "")).split(" ")[0] for r in rows[:4]] == [
        "none", "+4.0", "-10.0", "-3.0"
    ]  # fmt: skip  # .34 has .35, vanilla at 4e-4 after one round: near .50 - .60
    assert (rows[3]["method"], rows[3]["OOD near"][-3:]) == ("mean of these 2 of 3", "2/2")
    # drift .055 has .050, the same cell; .035 has .040
    assert [r["OOD near"].split(" ")[0] for r in rows[5:]] == ["+14.0", "-10.0", "+2.0"]


def test_robust_counts_the_cells_within_two_points_of_the_best(sweep: Path) -> None:
    merged, vanilla = Study(read([sweep])[0]).robust()
    # 4e-4 is the one learning rate that both have; ID .44 .50 and .35 .30; best of both .50
    assert (merged["cells"], merged["best ID"], merged["ID within 2 of own best"]) == (2, "50.0", 1)
    assert (vanilla["cells"], vanilla["best ID"], vanilla["ID within 2 of own best"]) == (2, "35.0", 1)
    assert (merged["ID within 2 of overall best"], vanilla["ID within 2 of overall best"]) == (1, 0)
    assert (merged["ID and OOD within 2 of overall best"], vanilla["ID and OOD within 2 of overall best"]) == (1, 0)
    assert merged["of these at the last round, learning rates"] == "0.0004"
    # OOD (near + .9) / 2: .89 .87 within 2 points of .89; .75 .65
    assert (merged["OOD within 2 of own best"], vanilla["OOD within 2 of own best"]) == (2, 1)


def test_ratio_zero_stands_in_the_grid_alone(sweep: Path) -> None:
    before = {name: getattr(Study(read([sweep])[0]), name)() for name in ("chosen", "matched", "robust", "collapse")}
    for seed in (0, 1):
        _run(
            sweep / f"zero{seed}", ratio=0.0, lr=1e-4, seed=seed, val=[0.3] * 3, id_=[0.3] * 3, near=[0.9] * 3,
            drift=[0, 0, 0],
        )  # fmt: skip
    after = Study(read([sweep])[0])
    assert {name: getattr(after, name)() for name in before} == before
    assert _by_method(after.grid())["ratio 0, lr 0.0001"]["drift"] == "0.0000"


def test_collapse_has_held_out_samples_with_vanilla_of_the_same_learning_rate(sweep: Path) -> None:
    rows = Study(read([sweep])[0]).collapse()
    (last,) = [r for r in rows if r["method"].startswith("ratio") and r["round"] == 2]
    # pass@1 (2/4 + 0) / 2; pass@4 (1 + 0) / 2; (3/4 + 1/4) / 2 different; (8 + 4) / (16 + 8) nats a token
    assert [last[k].split(" ")[0] for k in ("pass@1", "pass@4", "distinct", "entropy")] == [
        "0.250", "0.500", "0.500", "0.500"
    ]  # fmt: skip
    assert last["pass@1 - vanilla"] == "+0.000 [+0.000, +0.000]"


def test_tasks_have_wilson_intervals_and_their_majority(sweep: Path) -> None:
    chain, pair, sort = Study(read([sweep])[0]).tasks()
    # Wilson, 30 of 100: (.3 + 3.8415/200 -+ 1.96 sqrt(.3 * .7 / 100 + 3.8415 / 40000)) / 1.038415 = .2189, .3958
    assert (chain["side"], chain["base 0"]) == ("ID", "30.0 [21.9, 39.6]")
    assert (pair["majority"], sort["majority"]) == ("86.0", "10.0")
    assert pair["base 0"] == "90.0 [82.6, 94.5] at the majority"  # 86 is within its interval
    assert sort["base 0"] == "90.0 [82.6, 94.5]"
    assert Study(read([sweep])[0]).at_majority() == ["pair"]


def test_the_longer_of_two_runs_of_a_chain_counts(sweep: Path) -> None:
    _run(
        sweep / "longer", ratio=0.5, lr=4e-4, val=[0.3, 0.42, 0.46, 0.5], id_=[0.3, 0.44, 0.5, 0.5],
        near=[0.9, 0.88, 0.84, 0.8], drift=[0, 0.025, 0.035, 0.04],
    )  # fmt: skip
    (merged,) = [m for m in read([sweep])[0] if m.ratio == 0.5]
    assert len(merged.chains["0", 0].rounds) == 4  # its first rounds are those of the shorter run
    assert merged.last == 2  # the other seed has two rounds


def test_other_keys_make_other_methods(sweep: Path) -> None:
    _run(
        sweep / "sampled", ratio=0.5, lr=4e-4, val=[0.3] * 3, id_=[0.3] * 3, near=[0.9] * 3, drift=[0, 1, 1],
        sampler={"n": 16},
    )  # fmt: skip
    names = [m.name for m in read([sweep])[0]]
    assert "ratio 0.5, lr 0.0004, sampler.n=16" in names
    assert "ratio 0.5, lr 0.0004, sampler.n=8" in names


def test_a_key_that_older_runs_do_not_have_makes_no_other_method(sweep: Path) -> None:
    _run(
        sweep / "newer", ratio=0.5, lr=4e-4, seed=7, val=[0.3] * 3, id_=[0.3] * 3, near=[0.9] * 3, drift=[0, 1, 1],
        sft={"lr": 4e-4, "beta1": 0.9},
    )  # fmt: skip
    (method,) = [m for m in read([sweep])[0] if m.name == "ratio 0.5, lr 0.0004"]
    assert ("0", 7) in method.chains


def test_a_newer_key_with_one_value_is_a_difference_to_what_it_was_before(sweep: Path) -> None:
    """All that have the key are taught; those that have it not were not."""
    _run(
        sweep / "taught", ratio=0.5, lr=4e-4, seed=7, val=[0.3] * 3, id_=[0.3] * 3, near=[0.9] * 3, drift=[0, 1, 1],
        teacher={"kind": "lab"}, label="taught",
    )  # fmt: skip
    methods = {m.name: m for m in read([sweep])[0]}
    assert methods["ratio 0.5, lr 0.0004, taught"].named
    assert ("0", 7) not in methods["ratio 0.5, lr 0.0004"].chains


def test_ways_of_merging_are_told_apart_and_share_vanilla(sweep: Path) -> None:
    for seed in (0, 1):
        _run(
            sweep / f"often{seed}", ratio=0.5, lr=4e-4, seed=seed, val=[0.3] * 3, id_=[0.3] * 3, near=[0.2] * 3,
            drift=[0, 0.01, 0.02], merge={"kind": "linear", "ratio": 0.5, "anchor": "base", "every_n_epochs": 1},
        )  # fmt: skip
    got = Study(read([sweep])[0])
    often = "ratio 0.5, lr 0.0004, merge.anchor=base, merge.every_n_epochs=1"
    assert _by_method(got.grid())[often]["OOD near"].startswith("20.0 [")
    assert {m.name for m in got.vanilla} == {"vanilla, lr 0.0001", "vanilla, lr 0.0002", "vanilla, lr 0.0004"}
    assert _by_method([r for r in got.matched() if r["equal"] == "drift"])[often]["control"] == "vanilla, lr 0.0001"


def test_all_tables_are_over_the_units_that_every_method_has(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(
        sweep / "more", ratio=0.5, lr=4e-4, base=1, val=[0.9] * 3, id_=[0.9] * 3, near=[0.2] * 3, drift=[0, 1, 1]
    )  # fmt: skip
    got = Study(read([sweep])[0])
    assert (got.units, got.left_out) == ([("0", 0), ("0", 1)], [("1", 0)])
    assert _by_method(got.grid())["ratio 0.5, lr 0.0004"]["val ID"] == "46.0"
    assert main([str(sweep), "--out", str(tmp_path / "out")]) == 0
    assert "left out, since not every method has them: base 1 seed 0" in capsys.readouterr().out
    alone = read([sweep])[0]
    with pytest.raises(StudyError, match=r"no \(base, seed\) in common"):
        Study([m if m.ratio == 1 else replace(m, chains={("9", 9): m.chains["0", 0]}) for m in alone])


def test_a_failed_run_is_named(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep / "0" / "summary.json").unlink()
    assert main([str(sweep), "--out", str(tmp_path / "out")]) == 0
    assert f"1 runs are not finished, and missing above: {sweep / '0'}" in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_refused(sweep: Path) -> None:
    config = OmegaConf.load(sweep / "0" / "config.yaml")
    _run(sweep / "twin", ratio=1.0, lr=1e-4, val=[0.1] * 3, id_=[0.1] * 3, near=[0.1] * 3, drift=[0, 1, 1])
    with pytest.raises(StudyError, match=r"0 and .*twin are runs of one chain \(vanilla, lr 0.0001, base 0, seed 0"):
        read([sweep])
    (sweep / "twin" / "summary.json").unlink()
    config["suite"]["seed"] = 1
    (sweep / "0" / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(StudyError, match=r"runs that differ in suite.seed have not answered the same items"):
        read([sweep])


def test_a_skipped_round_keeps_the_drift_of_the_one_before(sweep: Path) -> None:
    lines = [json.loads(x) for x in (sweep / "6" / "rounds.jsonl").read_text().splitlines()]
    del lines[2]["weights/drift"]
    (sweep / "6" / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    row = _by_method(Study(read([sweep])[0]).grid())["ratio 0.5, lr 0.0004"]
    assert row["drift"] == "0.0300"  # (.025 + .035) / 2


def test_a_study_goes_on_from_what_an_earlier_one_kept(sweep: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert main([str(sweep), "--out", str(first)]) == 0
    assert main([str(first), "--out", str(again)]) == 0
    for file in sorted(first.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    names = {f.name for f in first.iterdir()}
    assert names >= {"sweep.csv", "grid.csv", "chosen.csv", "matched.csv", "robust.csv", "collapse.csv", study.CHAINS}
    assert (first / "frontier.png").read_bytes().startswith(b"\x89PNG")
    with (first / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 3
    assert [r["id/acc"] for r in rows if r["ratio"] == "0.5" and r["seed"] == "1"] == ["0.3", "0.44", "0.5"]
    assert str(sweep) not in (first / study.CHAINS).read_bytes().decode(errors="ignore")


def test_what_cannot_be_compared_is_said(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "no finished run, and no chains.jsonl.gz, below" in capsys.readouterr().err
    assert main([str(sweep), str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2  # a mistyped control
    assert str(tmp_path / "empty") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([str(sweep), "--out", str(tmp_path / "out"), "--rounds", "0"]) == 2
    assert "0 is not a round" in capsys.readouterr().err
    assert main([str(sweep), "--out", str(tmp_path / "out"), "--rounds", "3"]) == 2
    assert "round 3 is not there for ratio 0.5, lr 0.0004" in capsys.readouterr().err
    with pytest.raises(StudyError, match="no vanilla chains"):
        Study([m for m in read([sweep])[0] if m.ratio < 1])


def test_figures_are_those_of_the_runs(tmp_path: Path) -> None:
    """Two real runs, read and compared: the figures are their own, item by item."""
    for ratio in (0.5, 1.0):
        run_here(
            tmp_path / "runs" / f"{ratio}", f"merge.ratio={ratio}", "rounds=1", f"store.dir={tmp_path / 'store'}",
            "suite.pre_merge=false",
        )  # fmt: skip
    merged, vanilla = read([tmp_path / "runs"])[0]
    assert (merged.ratio, vanilla.ratio) == (0.5, 1.0)
    line = json.loads((tmp_path / "runs" / "0.5" / "rounds.jsonl").read_text().splitlines()[1])
    got = Study([merged, vanilla])
    for group, name in (("ID", "id/acc"), ("OOD near", "ood/near/acc"), ("OOD far", "ood/far/acc"), ("OOD", "ood/acc")):
        assert got.value(merged, 1, group).value == pytest.approx(line[name])
    held = got.collapse()[-1]
    assert f"{line['sample/pass@1']:.3f}" in {r["pass@1"].split(" ")[0] for r in got.collapse() if r["round"] == 1}
    assert set(held) >= {"pass@1", "pass@4", "entropy", "distinct"}


def test_where_a_model_lies_is_not_kept(sweep: Path) -> None:
    for number, where in enumerate(("/one/models", "~/other")):
        config = OmegaConf.to_container(OmegaConf.load(sweep / str(number) / "config.yaml"))
        assert isinstance(config, dict)
        config["model"] = {"kind": "hf", "path": f"{where}/smol"}
        config["suite"]["near"] = [{"kind": "words", "file": f"{where}/x.jsonl", "label": "pair"}]
        (sweep / str(number) / "config.yaml").write_text(OmegaConf.to_yaml(config))
    one, other = (Chain.of_run(sweep / n) for n in "01")
    assert one.base == "models/smol"
    assert other.base == "other/smol"  # two folders up is no machine's, and tells checkpoints of two runs apart
    assert "/one" not in one.line()
    assert "~" not in other.line()
    assert one.tasks("near") == ["pair"]


def test_a_line_of_chains_gives_the_chain_back(sweep: Path) -> None:
    chain = Chain.of_run(sweep / "0")
    again = Chain.of_line(chain.line())
    assert again.line() == chain.line()
    assert (again.unit, again.ratio, again.lr) == (("0", 0), 1.0, 1e-4)
    assert again.correct[2]["chain"].sum() == 60

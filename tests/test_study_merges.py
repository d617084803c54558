"""Which merge?, on chains made by hand: controls at equal ID, differences, corrections, what is said without them."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itermerge import study
from itermerge.report import charts
from itermerge.study import CHAINS, Chain, Study, StudyError, interval, methods_of
from itermerge.study_merges import BEST, NEAREST, VANILLA, Merges, holm, main

N = 100
LR = 4e-4
# Configs as runs write them: those of before the merge package have neither combine nor policy.
TIES = {"merge.kind": "ties_rounds", "merge.over": "rounds", "merge.sparsify": "magnitude", "merge.combine": "elect",
        "merge.density": 0.2}  # fmt: skip
STOCK = {"merge.kind": "model_stock", "merge.over": "rounds", "merge.combine": "stock"}
DARE = {"merge.kind": "dare", "merge.sparsify": "random", "merge.combine": "mean", "merge.density": 0.8}
IMPORTANCE = {
    "merge.kind": "linear", "merge.combine": "mean", "merge.policy.kind": "importance", "merge.policy.strength": -0.5,
    "merge.policy.importance": "skip",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESAMPLES", 200)


def _chains(
    *, ratio: float = 0.5, lr: float = LR, val: Sequence[float], id_: Sequence[float], near: Sequence[float],
    drift: Sequence[float], asked: Sequence[float] = (), far: float = 0.9, seeds: Sequence[int] = (0, 1), **config: Any,
) -> list[Chain]:  # fmt: skip
    """A chain a seed: accuracies by round, the first items of each task being the correct ones; round 0 is the base."""
    chains = []
    for seed in seeds:
        whole = {
            "seed": seed, "model.kind": "lab", "model.seed": 0, "sft.lr": lr, "rounds": len(val),
            "merge.kind": "linear", "merge.ratio": ratio, "merge.anchor": "base",
            "suite.near": [{"kind": "lab", "family": "pair"}],
            "suite.far": [{"kind": "lab", "family": "sort"}], **{k.replace("__", "."): v for k, v in config.items()},
        }  # fmt: skip
        if "merge.sparsify" in whole:
            whole["merge.seed"] = seed
        rounds, correct = [], []
        for t in range(len(val) + 1):
            v, i, n, d = (0.3, 0.3, 0.9, None) if t == 0 else (val[t - 1], id_[t - 1], near[t - 1], drift[t - 1])
            line = {"id/acc": i, "val/id/acc": v} | ({} if d is None else {"weights/drift": d})
            rounds.append(line | ({"merge/ratio": asked[t - 1]} if t and asked else {}))
            rates = {"chain": i, "pair": n, "sort": far if t else 0.9, "val/chain": v}
            correct.append({k: (np.arange(N) < round(N * r)).astype(float) for k, r in rates.items()})
        chains.append(Chain(whole, rounds, correct, [{} for _ in rounds]))
    return chains


def _constants() -> list[Chain]:
    """Two rounds. Validation ID .40 .46 at ratio 0.3, .45 .50 at 0.7, and .465 .20 at a smaller rate and drift."""
    return [
        *_chains(ratio=0.3, val=[0.40, 0.46], id_=[0.40, 0.45], near=[0.89, 0.88], drift=[0.006, 0.012]),
        *_chains(ratio=0.7, val=[0.45, 0.50], id_=[0.43, 0.50], near=[0.87, 0.80], drift=[0.015, 0.030]),
        *_chains(ratio=0.3, lr=1e-4, val=[0.465, 0.20], id_=[0.44, 0.2], near=[0.86, 0.9], drift=[0.002, 0.001]),
    ]


def _vanilla() -> list[Chain]:
    return [
        *_chains(ratio=1.0, lr=1e-4, val=[0.46, 0.60], id_=[0.42, 0.6], near=[0.85, 0.7], drift=[0.010, 0.020]),
        *_chains(ratio=1.0, val=[0.465, 0.30], id_=[0.48, 0.3], near=[0.78, 0.4], drift=[0.020, 0.100]),
        *_chains(ratio=1.0, lr=5e-5, val=[0.30, 0.30], id_=[0.3, 0.3], near=[0.9, 0.9], drift=[0.001, 0.002]),
    ]


def _rule(val: float = 0.46, id_: float = 0.46, near: float = 0.88, **config: Any) -> list[Chain]:
    return _chains(val=[0.42, val], id_=[0.42, id_], near=[0.89, near], drift=[0.02, 0.03], **config)


def _merges(*chains: list[Chain]) -> Merges:
    whole = [c for group in (*chains, _constants(), _vanilla()) for c in group]
    return Merges(Study(methods_of([(str(i), c) for i, c in enumerate(whole)])))


def _by(merges: Merges, kind: str) -> dict[str, dict[str, Any]]:
    return {row["rule"]: row for row in merges.rows() if row["against"] == kind}


# --- names and settings ---------------------------------------------------------------------------------------------


def test_rules_and_policies_are_told_apart_by_name() -> None:
    """Density, anchor and masks' seed follow from the rule, or from the run: they are not named."""
    made = _merges(_rule(**TIES), _rule(**DARE), _rule(**IMPORTANCE), _rule(ratio=1.0, **STOCK))
    assert [m.name for m in made.rules] == [
        "dare, ratio 0.5, lr 0.0004", "linear importance, ratio 0.5, lr 0.0004", "model_stock, ratio 1, lr 0.0004",
        "ties_rounds, ratio 0.5, lr 0.0004",
    ]  # fmt: skip
    assert [made.label(m) for m in made.rules] == ["dare", "linear importance", "model_stock", "ties_rounds"]
    assert {m.name for m in made.constants} == {
        "ratio 0.3, lr 0.0001", "ratio 0.3, lr 0.0004", "ratio 0.7, lr 0.0004"
    }  # fmt: skip


def test_what_varies_within_a_rule_is_named() -> None:
    made = _merges(_rule(**TIES), _rule(**TIES | {"merge.density": 0.5}), _rule(**DARE))
    assert [made.label(m) for m in made.rules] == [
        "dare", "ties_rounds, ratio 0.5, lr 0.0004, merge.density=0.2",
        "ties_rounds, ratio 0.5, lr 0.0004, merge.density=0.5",
    ]  # fmt: skip


def test_a_rule_at_ratio_one_is_not_vanilla() -> None:
    made = _merges(_rule(ratio=1.0, **STOCK))
    assert [m.name for m in made.rules] == ["model_stock, ratio 1, lr 0.0004"]
    assert {m.name for m in made.study.vanilla} == {f"vanilla, lr {x}" for x in ("5e-05", "0.0001", "0.0004")}
    assert _by(made, VANILLA)["model_stock, ratio 1, lr 0.0004"]["OOD near"].startswith("+3.0 [")


def test_older_runs_are_constant_ratios_of_the_linear_rule_and_newer_ones_are_the_same_method() -> None:
    new = _chains(
        ratio=0.3, val=[0.40, 0.46], id_=[0.40, 0.45], near=[0.89, 0.88], drift=[0.006, 0.012], seeds=(2,),
        merge__combine="mean", merge__over="tuned", merge__sparsify="none", merge__policy__kind="constant",
        merge__policy__rounds=[1.0],
    )  # fmt: skip
    (found,) = [m for m in _merges(_rule(**TIES), new).constants if (m.ratio, m.lr) == (0.3, LR)]
    whole = methods_of([(str(i), c) for i, c in enumerate([*_constants(), *new])])
    assert found.name == "ratio 0.3, lr 0.0004"
    assert [len(m.chains) for m in whole if m.name == found.name] == [3]


def test_linear_to_another_anchor_is_a_rule() -> None:
    made = _merges(_rule(**{"merge.anchor": "previous"}))
    (rule,) = made.rules
    assert rule.name == "ratio 0.5, lr 0.0004, merge.anchor=previous"
    assert len(made.constants) == 3


def test_the_ratio_asked_is_the_mean_over_rounds() -> None:
    made = _merges(_rule(asked=[1.0, 0.5], **IMPORTANCE))
    assert made.summary()[0]["ratio asked"] == "0.75"
    rows = {row["method"]: row for row in made.levels()}
    assert rows["ratio 0.3, lr 0.0004"]["ratio asked"] == "0.30"  # older runs do not say it: the ratio
    assert rows["vanilla, lr 0.0004"]["ratio asked"] == "1.00"
    assert (rows["base"]["ratio asked"], rows["base"]["ID"][:5]) == ("", "30.0 ")


# --- controls and differences ---------------------------------------------------------------------------------------


def test_controls_at_equal_id_have_the_smallest_drift_within_a_point() -> None:
    """The rule ends at .46. Constants within a point: .46 (drift .012), .45 (.015), .465 (.002, round 1 at the smaller
    rate). Vanilla: .46 (.010) and .465 (.020); the one with less drift, .30, learns less."""
    made = _merges(_rule(**TIES))
    name = "ties_rounds, ratio 0.5, lr 0.0004"
    best, nearest, vanilla = (_by(made, kind)[name] for kind in (BEST, NEAREST, VANILLA))
    assert best["control"] == "ratio 0.3, lr 0.0001, round 1"
    assert best["OOD near"].startswith("+2.0 [")  # .88 - .86
    assert best["ID"].startswith("+2.0 [")  # .46 - .44
    assert best["drift"] == "0.0300 / 0.0020"
    assert best["val ID"] == "46.0 / 46.5"
    assert nearest["control"] == "ratio 0.3, lr 0.0004, round 2"  # at .46; 0.7 is at .50
    assert nearest["OOD near"].startswith("+0.0 [")
    assert vanilla["control"] == "vanilla, lr 0.0001, round 1"
    assert vanilla["OOD near"].startswith("+3.0 [")  # .88 - .85
    assert vanilla["OOD near"].endswith("2/2")
    assert vanilla["OOD far"].startswith("+0.0 [")
    assert best["note"] == nearest["note"] == ""


def test_a_missing_control_is_said() -> None:
    """.80 is far from all cells; the nearest constant ratio at that rate is .50, and how far it is is said."""
    made = _merges(_rule(val=0.80, **TIES), _rule(**DARE))
    name = "ties_rounds, ratio 0.5, lr 0.0004"
    for kind in (BEST, VANILLA):
        assert _by(made, kind)[name] == {
            "against": kind, "rule": name, "control": "none within a point of ID (validation)"
        }  # fmt: skip
    assert _by(made, NEAREST)[name]["note"] == "30.0 points of ID (validation) apart"
    assert made.summary()[1]["OOD near - vanilla"] == "none near"
    assert made.said()[0].startswith(f"**Against {BEST}**: 1 of 2 rules have a control.")
    assert made.said()[3].startswith("**Against vanilla at equal drift**: 0 of 2")
    assert made.said()[4].startswith("8 comparisons of OOD")  # 2 sides x (1 + 2 + 1)


def test_without_a_constant_ratio_at_the_learning_rate_there_is_no_nearest() -> None:
    made = _merges(_chains(lr=7e-4, val=[0.4, 0.46], id_=[0.4, 0.46], near=[0.9, 0.88], drift=[0.1, 0.1], **TIES))
    assert _by(made, NEAREST)["ties_rounds, ratio 0.5, lr 0.0007"]["control"].startswith("none")


# --- many comparisons -----------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    # .01 x 3, .03 x 2, .04 x 1, which may not fall below .06
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_is_twice_the_share_of_resamples_beyond_zero() -> None:
    """100 items with 1 of them different: a resample has none of it with probability .99^100 = .366, twice that .73."""
    values = np.zeros(100)
    values[0] = 1
    got = interval({("a", 0): {"x": values}}, 4000)
    assert got.p == pytest.approx(0.73, abs=0.04)
    assert interval({("a", 0): {"x": np.ones(100)}}, 999).p == pytest.approx(2 / 1000)
    assert interval({("a", 0): {"x": np.zeros(100)}}, 999).p == 1


def test_what_keeps_more_is_named_where_id_is_not_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with 15 points more of near OOD than vanilla keeps more; another that has given up ID for it does not,
    though its validation ID is the same; a third keeps less."""
    monkeypatch.setattr(study, "RESAMPLES", 2000)
    made = _merges(_rule(near=1.0, **TIES), _rule(near=1.0, id_=0.05, **DARE), _rule(near=0.5, id_=0.42, **IMPORTANCE))
    said = made.said()[2]
    assert "OOD near: keeps more at equal ID: ties_rounds; keeps less: linear importance" in said
    assert "(uncorrected, 2 intervals are above 0 and 1 below)" in said
    assert "OOD far: keeps more at equal ID: none; keeps less: none" in said
    # p 2/2001 for the three of near OOD, 1 for those of far: times 6 the smallest
    assert made.adjusted[VANILLA, "ties_rounds, ratio 0.5, lr 0.0004", "OOD near"] == pytest.approx(6 * 2 / 2001)
    assert made.said()[-1] == "Round 2, 2 units: bases 0; seeds 0, 1."


# --- the command ----------------------------------------------------------------------------------------------------


def _kept(folder: Path, chains: Sequence[Chain]) -> Path:
    folder.mkdir(parents=True)
    (folder / CHAINS).write_bytes(gzip.compress("".join(c.line() for c in chains).encode()))
    return folder


def test_the_command_keeps_the_chains_of_the_first_folders_alone_and_goes_on_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [*_rule(**TIES), *_rule(seeds=(0,), **IMPORTANCE), *_rule(seeds=(1,), **IMPORTANCE)]
    first, theirs = _kept(tmp_path / "new", ours), _kept(tmp_path / "old", [*_constants(), *_vanilla()])
    out, again = tmp_path / "out", tmp_path / "again"
    assert main([str(first), "--against", str(theirs), "--out", str(out)]) == 0
    assert (out / "merges.md").read_text() in capsys.readouterr().out
    assert main([str(out), "--against", str(theirs), "--out", str(again)]) == 0
    names = {f.name for f in out.iterdir()}
    assert names == {CHAINS, "rules.csv", "merges.csv", "summary.csv", "merges.md", "frontier.png", "against.png"}
    for name in names:
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    assert gzip.decompress((out / CHAINS).read_bytes()).decode().count("\n") == 4
    with (out / "summary.csv").open() as file:
        assert [row["rule"] for row in csv.DictReader(file)] == ["linear importance", "ties_rounds"]


def test_units_that_a_rule_lacks_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = _kept(tmp_path / "all", [*_rule(seeds=(1,), **TIES), *_constants(), *_vanilla()])
    assert main([str(whole), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "left out, since not every method has them: base 0 seed 0" in said
    assert "Round 2, 1 units: bases 0; seeds 1." in said


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, chains, expected in (
        ("rules", [*_constants(), *_vanilla()], "no chains of a merge rule or a policy"),
        ("constants", [*_rule(**TIES), *_vanilla()], r"no chains of a constant ratio (merge=linear)"),
        ("vanilla", [*_rule(**TIES), *_constants()], "no vanilla chains"),
    ):
        folder = _kept(tmp_path / name, chains)
        assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_stand_beside_their_points_and_apart() -> None:
    """Ten points in one place: no name covers another or a point, all are in the panel."""
    points = [(300.0 + i, 200.0 + i) for i in range(10)]
    boxes = charts.beside(points, [f"name {i}" for i in range(10)], 640, 440, [(*p, *p) for p in points])
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 440
        assert not any(left < x < right and top < y < bottom for x, y in points)
        for other in boxes[:i]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    for corner in ((2.0, 2.0), (638.0, 2.0), (2.0, 438.0), (638.0, 438.0)):
        (box,) = charts.beside([corner], ["at the corner"], 640, 440)
        assert box[0] >= 0 <= box[1]
        assert box[2] <= 640
        assert box[3] <= 440


# --- methods with names ---------------------------------------------------------------------------------------------


def test_a_label_stands_for_what_is_particular_and_is_compared_with_plain_controls() -> None:
    """A restart is no vanilla though it merges nothing; a chain of one round stands at that round."""
    star = _rule(ratio=1.0, val=0.46, near=0.85, **{"label": "star", "sft.start": "base"})
    once = _chains(
        ratio=1.0, val=[0.46, 0.5], id_=[0.42, 0.46], near=[0.89, 0.80], drift=[0.02, 0.03],
        **{"label": "rft", "sampler.n": 40},
    )  # fmt: skip
    once = [
        type(c)({**c.config, "rounds": 1}, c.rounds[:2], c.correct[:2], c.sampled[:2]) for c in once
    ]  # round 0 and round 1
    imm = _rule(val=0.46, near=0.88, **{"label": "every_epoch", "merge.every_n_epochs": 1})
    plain = [*_constants(), *_vanilla()]
    usual = [
        type(c)(c.config | {"sft.start": "merged", "sampler.n": 8, "merge.every_n_epochs": "last"}, *rest)
        for c in plain for rest in [(c.rounds, c.correct, c.sampled)]
    ]  # fmt: skip
    for chain in (*star, *once, *imm):
        for key, value in {"sft.start": "merged", "sampler.n": 8, "merge.every_n_epochs": "last"}.items():
            chain.config.setdefault(key, value)
    found = [(str(i), c) for i, c in enumerate([*star, *once, *imm, *usual])]
    made = Merges(Study(methods_of(found)))
    assert [made.label(m) for m in made.rules] == ["every_epoch", "rft", "star"]
    assert made.study.rounds == 2
    vanilla = _by(made, VANILLA)
    assert {vanilla[f"{n}, lr 0.0004"]["control"] for n in ("star", "rft")} == {"vanilla, lr 0.0001, round 1"}
    assert all(m.other == "" for m in (*made.constants, *made.study.vanilla))
    levels = {row["method"]: row for row in made.levels()}
    assert levels["rft, lr 0.0004"]["drift"] == "0.0200"  # its only round
    assert levels["star, lr 0.0004"]["drift"] == "0.0300"
    two = [(at, type(c)({**c.config, "label": "star"}, c.rounds, c.correct, c.sampled)) for at, c in found[2:4]]
    with pytest.raises(StudyError, match="label 'star' names two settings"):
        methods_of([*found, *two])

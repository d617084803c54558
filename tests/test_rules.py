"""Merge rules and ratio policies in runs: what the loop hands to the law, what it records, what it shares and keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAB_SMALL, compose_config, deterministic_set, read_rounds, run_here
from torch import Tensor

from itermerge import stages
from itermerge.config import ConfigError, check, is_vanilla
from itermerge.merging import Merge, MergeError, Method
from itermerge.policy import Policy
from itermerge.report.folders import flat
from itermerge.report.folders import is_vanilla as is_vanilla_flat
from itermerge.rules import method_of, source_of
from itermerge.sft import Fitted
from itermerge.tasks import derive_seed
from itermerge.weights import place_of, read_weights

LAST = ("merge.every_n_epochs=last", "suite.pre_merge=false", "suite.pass_k_n=0", "analysis.importance=[]")
BASE = read_weights(LAB_SMALL)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Fits that add small random updates, partly the same in all rounds; (start, tuned) of each."""
    made: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def update(policy: Policy, *_: object, **__: object) -> Fitted:
        common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(len(made))
        start = {n: w.clone() for n, w in policy.weights().items()}
        tuned = {
            n: w + 1e-4 * (torch.randn(w.shape, generator=common) + torch.randn(w.shape, generator=own))
            for n, w in start.items()
        }
        policy.set_weights(tuned)
        made.append((start, tuned))
        return Fitted([0.0], [], [], 1)

    monkeypatch.setattr(stages, "fit", update)
    return made


def _model(run: Path, number: int) -> dict[str, Tensor]:
    return read_weights(run / "rounds" / f"{number:02d}" / "model")


def _run(tmp_path: Path, *words: str, name: str = "run", rounds: int = 3) -> list[dict[str, Any]]:
    run_here(tmp_path / name, *LAST, f"rounds={rounds}", f"store.dir={tmp_path / 'store'}", *words)
    return read_rounds(tmp_path / name)


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["merge=ties_rounds"], Method(sparsify="magnitude", combine="elect", density=0.2)),
        (["merge=ties_rounds", "merge.scope=model"],
         Method(sparsify="magnitude", combine="elect", density=0.2, scope="model")),
        (["merge=model_stock"], Method(combine="stock")),
        (["merge=consensus"], Method(combine="consensus", threshold=0.4, agree=2)),
        (["merge=tall_mask", "store.keep=last"], Method(combine="tall", threshold=0.4)),
        (["merge.over=rounds", "store.keep=last"], Method()),
    ],
)  # fmt: skip
def test_rules_over_rounds_merge_all_rounds_updates(
    words: list[str], method: Method, tmp_path: Path, fits: list[Any]
) -> None:
    """Each update from what its own fit started from, towards the base, also where old weights were dropped."""
    rounds = _run(tmp_path, *words)
    ratio = 1.0 if "merge=model_stock" in words else 0.5
    starts, tuned = [s for s, _ in fits], [t for _, t in fits]
    assert len(fits) == 3
    expected = Merge(method, BASE, tuned, ratio, starts=starts).all()
    got = _model(tmp_path / "run", 3)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    first = Merge(method, BASE, tuned[:1], ratio, starts=starts[:1]).all()
    assert all(torch.equal(starts[1][n], first[n]) for n in first)
    assert [r["merge/ratio"] for r in rounds[1:]] == pytest.approx([ratio] * 3)


def test_ema_is_a_linear_merge_with_the_round_before(tmp_path: Path, fits: list[Any]) -> None:
    _run(tmp_path, "merge=ema", "sft.start=tuned", "merge.ratio=0.25")
    average = BASE
    for number, (start, tuned) in enumerate(fits, 1):
        if number > 1:
            assert all(torch.equal(start[n], fits[number - 2][1][n]) for n in start)  # fits go on from the raw weights
        average = {n: torch.lerp(average[n], tuned[n], 0.25) for n in tuned}
        got = _model(tmp_path / "run", number)
        assert all(torch.equal(got[n], average[n]) for n in average)


def test_wise_ft_is_vanilla_but_for_the_last_round(tmp_path: Path, fits: list[Any]) -> None:
    vanilla = _run(tmp_path, "merge.ratio=1.0", name="vanilla")
    at_end = _run(tmp_path, "merge=wise_ft")
    assert len(fits) == 3  # all fits are shared
    assert [r["merge/ratio"] for r in at_end[1:]] == [1.0, 1.0, 0.5]
    assert [r["weights/drift"] for r in at_end[1:3]] == [r["weights/drift"] for r in vanilla[1:3]]
    expected = Merge(Method(), BASE, [fits[-1][1]], 0.5).all()
    assert all(torch.equal(_model(tmp_path / "run", 3)[n], expected[n]) for n in expected)


@pytest.mark.parametrize("merge", ["dare", "ties_rounds"])
def test_any_rule_may_wait_for_the_last_round(merge: str, tmp_path: Path, fits: list[Any]) -> None:
    rounds = _run(tmp_path, f"merge={merge}", "merge/policy=at_end")
    assert [r["merge/ratio"] for r in rounds[1:]] == [1.0, 1.0, 0.5]
    for number in (1, 2):
        assert all(torch.equal(_model(tmp_path / "run", number)[n], w) for n, w in fits[number - 1][1].items())
    assert any(not torch.equal(_model(tmp_path / "run", 3)[n], w) for n, w in fits[2][1].items())


def test_an_empty_last_round_does_the_merge_that_is_still_to_come(
    tmp_path: Path, fits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.Bench.verify

    def verify(self: Any, samples: Any, number: int) -> Any:
        made = real(self, samples, number)
        if number == 2:
            monkeypatch.setattr(stages, "read_lines", lambda path: iter(()))
        return made

    monkeypatch.setattr(stages.Bench, "verify", verify)
    _run(tmp_path, "merge=wise_ft", "loop.on_empty=skip", rounds=2)
    expected = Merge(Method(), BASE, [fits[0][1]], 0.5).all()
    assert all(torch.equal(_model(tmp_path / "run", 2)[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    "words",
    [["merge.policy.layers=[1.0, 3.0]"], ["merge.policy.modules=[{match: nothing, factor: 0}]"],
     ["merge.policy.search=[2.0]", "merge.policy.layers=[0.5, 1.5]"]],
)  # fmt: skip
def test_ratios_that_cannot_be_are_refused_before_any_work(words: list[str], tmp_path: Path, fits: list[Any]) -> None:
    with pytest.raises(MergeError, match=r"ratios are from 0 to 1|no tensor fits 'nothing'"):
        _run(tmp_path, "merge=wise_ft", *words)
    assert not fits
    assert not list((tmp_path / "store").glob("*/manifest.json"))


def test_a_search_with_dropped_weights_leaves_the_model_that_it_says(tmp_path: Path) -> None:
    """The fit is computed again by the search's own merge, with the same policy: same bytes as when all is kept."""
    words = (
        *LAST[:1],
        *LAST[2:],
        "merge/policy=search",
        "merge.policy.search=[0.7]",
        "rounds=1",
        "suite.pre_merge=true",
    )
    for keep in ("all", "none"):
        for ratio in ("0.4", "0.9"):
            where = (f"store.dir={tmp_path / keep}", f"store.keep={keep}", f"merge.ratio={ratio}")
            run_here(tmp_path / f"{keep}{ratio}", *words, *where)
    assert read_rounds(tmp_path / "all0.9") == read_rounds(tmp_path / "none0.9")


@pytest.mark.parametrize("mask", ["fresh", "fixed"])
def test_dares_masks_follow_the_seed_and_the_round(mask: str, tmp_path: Path, fits: list[Any]) -> None:
    _run(tmp_path, "merge=dare", f"merge.mask={mask}", "merge.seed=5", "sft.epochs=2", rounds=2)
    for number, (_, tuned) in enumerate(fits, 1):
        seed = derive_seed(5, "mask", *((number,) if mask == "fresh" else ())) + 2
        expected = Merge(Method(sparsify="random", density=0.8), BASE, [tuned], 0.5, seed=seed).all()
        got = _model(tmp_path / "run", number)
        assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_a_schedule_over_rounds(tmp_path: Path, fits: list[Any]) -> None:
    rounds = _run(tmp_path, "merge/policy=schedule", "merge.ratio=0.8")
    assert [r["merge/ratio"] for r in rounds[1:]] == pytest.approx([0.8, 0.6, 0.4])
    for number, (_, tuned) in enumerate(fits, 1):
        expected = Merge(Method(), BASE, [tuned], 0.8 * (1 - 0.25 * (number - 1))).all()
        torch.testing.assert_close(_model(tmp_path / "run", number), expected, rtol=0, atol=1e-8)
    longer = _run(tmp_path, "merge/policy=schedule", "merge.ratio=0.8", "merge.policy.span=2", name="span")
    assert [r["merge/ratio"] for r in longer[1:]] == pytest.approx([0.8, 0.4, 0.4])


def test_a_schedule_over_epochs_reaches_the_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(policy: Policy, *_: object, callbacks: Any, **__: object) -> Fitted:
        seen.extend((c.at, c.ratios, c.anchor) for c in callbacks)
        return Fitted([0.0] * 4, [], [], 4)

    monkeypatch.setattr(stages, "fit", spy)
    rounds = _run(tmp_path, "merge.every_n_epochs=1", "sft.epochs=4", "merge.policy.epochs=[2.0, 0.5]", rounds=1)
    ((at, ratios, anchor),) = seen
    assert at == [2, 3]  # at ratio 1, after the first epoch, there is nothing to do
    assert {e: {round(x, 9) for x in r.values()} for e, r in ratios.items()} == {2: {0.75}, 3: {0.5}}
    assert all(torch.equal(anchor[n], BASE[n]) for n in BASE)
    assert rounds[1]["merge/ratio"] == pytest.approx(0.25)
    # the epochs' updates meet .75 * .5 * .25 (twice), .5 * .25 and .25
    expected = (2 * 0.75 * 0.5 * 0.25 + 0.5 * 0.25 + 0.25) / 4
    assert rounds[1]["merge/effective_ratio"] == pytest.approx(expected)


def test_ratios_by_layer_and_module_are_applied_and_recorded(tmp_path: Path, fits: list[Any]) -> None:
    modules = "merge.policy.modules=[{match: norm|embed, factor: 0}]"
    rounds = _run(tmp_path, "merge/policy=layers", "merge.policy.layers=[0.0, 1.0]", modules, rounds=1)
    layers = json.loads((tmp_path / "run" / "rounds" / "01" / "layers.json").read_text())["merge"]
    got, (_, tuned) = _model(tmp_path / "run", 1), fits[0]
    for name in BASE:
        row, kind = place_of(name)
        fixed = kind in ("norms", "norm", "embed")
        ratio = 0.0 if fixed else 0.5 * int(row[6:]) / 3
        torch.testing.assert_close(got[name], torch.lerp(BASE[name], tuned[name], ratio), rtol=0, atol=1e-8)
    assert layers["embed"] == {"ratio": 0.0, "share": 0.0}
    for i in range(4):
        row = layers[f"layer_{i:02d}"]
        assert row["ratio"] == rounds[1][f"merge/ratio/layer_{i:02d}"]
        assert row["share"] == pytest.approx(0.5 * i / 3, rel=0.02, abs=1e-6)  # its norms, a few weights, stay
        assert row["ratio"] == pytest.approx(0.5 * i / 3, rel=0.02)


def test_ratios_by_measured_importance(tmp_path: Path) -> None:
    rounds = _run(
        tmp_path, "merge/policy=importance", "merge.policy.strength=-1.0", "analysis.importance=[skip]", rounds=1
    )
    table = json.loads((tmp_path / "run" / "rounds" / "00" / "importance.json").read_text())
    means = {row: figures["mean"] for row, figures in table["estimators"]["skip"].items()}
    order = sorted(means, key=lambda row: -means[row])
    ratios = [rounds[1][f"merge/ratio/{row}"] for row in order]
    assert ratios == pytest.approx([i / 3 for i in range(4)])  # .5 (1 - (2 r - 1)): the most important stays
    assert rounds[1]["merge/ratio/embed"] == 0.5
    assert rounds[1]["merge/share/" + order[0]] == 0


def test_importance_that_is_missing_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no blocks here")

    monkeypatch.setattr(stages, "importance", fails)
    with pytest.raises(MergeError, match=r"merge\.policy\.importance: skip could not be measured: .*no blocks here"):
        _run(tmp_path, "merge/policy=importance", "analysis.importance=[skip]", rounds=1)


def test_ratios_by_the_angle_of_rounds(tmp_path: Path, fits: list[Any]) -> None:
    rounds = _run(tmp_path, "merge/policy=angle", "merge.ratio=1.0", rounds=2)
    assert rounds[1]["merge/ratio"] == 1.0  # no round before
    for i in range(4):
        row = f"layer_{i:02d}"
        u, v = (torch.cat([(t[n] - s[n]).flatten() for n in s if place_of(n)[0] == row]).double() for s, t in fits[:2])
        c = float(u @ v / (u.norm() * v.norm()))
        assert 0.3 < c < 0.7  # half of the variance is common
        assert rounds[2][f"merge/ratio/{row}"] == pytest.approx(
            2 * c / (1 + c), abs=2e-3
        )  # updates are kept in bfloat16


def test_the_line_search_takes_the_smallest_factor_within_the_tolerance(
    tmp_path: Path, fits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    real = stages.evaluation.greedy_scores

    def scores(decode: Any, exams: Any, **how: Any) -> Any:
        made, (policy,) = real(decode, exams, **how), decode.args
        if all(e.label.startswith("val/") for e in exams):
            name = next(iter(BASE))
            full = (fits[-1][1][name] - BASE[name]).double()
            ratio = float(((policy.weights()[name] - BASE[name]).double() * full).sum() / full.square().sum())
            tried.append(round(ratio, 3))
            n = len(next(e for e in exams if e.label == "val/find").problems)
            right = {0.2: 2, 0.6: 5, 1.0: 6}[round(ratio, 1)]
            made["val/find"]["correct"] = [1] * right + [0] * (n - right)
        return made

    monkeypatch.setattr(stages.evaluation, "greedy_scores", scores)
    words = ["merge/policy=search", "merge.ratio=1.0", "merge.policy.search=[1.0, 0.2, 0.6]", "sampler.dtype=float32"]
    rounds = _run(tmp_path, *words, "merge.policy.tolerance=0.125", rounds=1)
    assert tried == [0.2, 0.6, 1.0]
    assert rounds[1]["merge/search"] == rounds[1]["merge/ratio"] == 0.6  # 5 of 8 is an eighth below 6 of 8
    expected = Merge(Method(), BASE, [fits[0][1]], 0.6).all()
    assert all(torch.equal(_model(tmp_path / "run", 1)[n], expected[n]) for n in expected)
    found = json.loads((tmp_path / "run" / "rounds" / "01" / "search.json").read_text())
    assert {f: v["val/id/acc"] for f, v in found.items()} == {"0.2": 0.25, "0.6": 0.625, "1.0": 0.75}
    strict = _run(tmp_path, *words, "merge.policy.tolerance=0.0", rounds=1, name="strict")
    assert strict[1]["merge/ratio"] == 1.0  # and that is the tuned model itself
    assert "merge/search" in strict[1]


def test_what_is_dropped_is_made_again_for_rules_over_rounds(tmp_path: Path) -> None:
    """Real fits: with store.keep=last, none and all the same bytes."""
    words = (*LAST, "merge=ties_rounds", "rounds=3", "sft.epochs=1")
    for keep in ("all", "last", "none"):
        run_here(tmp_path / keep, *words, f"store.dir={tmp_path / ('store_' + keep)}", f"store.keep={keep}")
    whole = {k: v for k, v in deterministic_set(tmp_path / "all").items() if "model/" not in k}
    assert whole == {k: v for k, v in deterministic_set(tmp_path / "last").items() if "model/" not in k}
    assert whole == deterministic_set(tmp_path / "none")


VANILLA = [
    (["merge=none"], True), (["merge.ratio=1.0"], True), (["merge=slerp", "merge.ratio=1.0"], True),
    (["merge.ratio=0.5"], False), (["merge=dare", "merge.ratio=1.0"], False), (["merge=model_stock"], False),
    (["merge.ratio=1.0", "merge/policy=schedule"], False), (["merge.ratio=1.0", "merge/policy=modules"], False),
    (["merge.ratio=1.0", "merge/policy=angle", "merge.every_n_epochs=last"], False),
    (["merge/policy=importance"], False),
    (["merge.ratio=1.0", "merge.over=rounds", "merge.every_n_epochs=last"], False),
]  # fmt: skip


@pytest.mark.parametrize(("words", "vanilla"), VANILLA)
def test_what_is_vanilla(words: list[str], vanilla: bool) -> None:
    """The same for a run and for the reports, which read its config.yaml."""
    from omegaconf import OmegaConf

    from itermerge.config import to_dict

    cfg = check(compose_config(*words))
    assert is_vanilla(cfg.merge) is vanilla
    assert is_vanilla_flat(flat(OmegaConf.to_container(OmegaConf.create(to_dict(cfg))))) is vanilla


def test_every_shipped_rule_names_its_source_and_gives_its_method() -> None:
    from itermerge.config import conf_dir

    for file in sorted((conf_dir() / "merge").glob("*.yaml")):
        if file.stem == "none":
            continue
        cfg: Any = check(compose_config(f"merge={file.stem}"))
        assert cfg.merge.kind == file.stem
        assert isinstance(method_of(cfg.merge), Method)
        assert file.read_text().startswith("# ")
        assert (
            file.stem == "slerp"
            or any(c.isdigit() for c in file.read_text().split("defaults:")[0])
            or "ema" in file.stem
        )


def test_a_rule_of_ones_own_is_a_function_and_a_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[Any]
) -> None:
    (tmp_path / "my_rules.py").write_text(
        "def clip(anchor, updates, most):\n    return updates[0].clamp(-most, most)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["merge.kind=clip", "merge.combine=function", "merge.function=my_rules.clip", "+merge.params.most=1e-4"]
    _run(tmp_path, *words, rounds=1)
    got, (_, tuned) = _model(tmp_path / "run", 1), fits[0]
    for name in BASE:
        expected = BASE[name] + 0.5 * (tuned[name] - BASE[name]).clamp(-1e-4, 1e-4)
        torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-8)
    # another text of the function is another merge: the stage is not found again
    (tmp_path / "my_rules.py").write_text("def clip(anchor, updates, most):\n    return 0 * updates[0]\n")
    sys.modules.pop("my_rules", None)
    _run(tmp_path, *words, rounds=1, name="other")
    assert all(torch.equal(_model(tmp_path / "other", 1)[n], BASE[n]) for n in BASE)
    # a decorator of another module hides nothing
    (tmp_path / "my_rules.py").write_text(
        "import torch\n@torch.no_grad()\ndef clip(anchor, updates, most):\n    return 2 * updates[0]\n"
    )
    sys.modules.pop("my_rules", None)
    first = source_of(check(compose_config(*words)).merge)
    assert "2 * updates" in str(first)
    with pytest.raises(ConfigError, match=r"merge\.function: torch\._C\._nn\.gelu has no Python source"):
        _run(tmp_path, *words, "merge.function=torch._C._nn.gelu", rounds=1, name="builtin")
    for wrong in ("my_rules.nothing", "no_such_module.f", "clip"):
        with pytest.raises(ConfigError, match=rf"merge\.function: '{wrong}' cannot be had"):
            _run(tmp_path, *words, f"merge.function={wrong}", rounds=1, name=wrong)

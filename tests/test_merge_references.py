"""Our rules against files that mergekit 0.1.5 and MergeLM (0dbd199) wrote: `fixtures/merge`, made by its make.py, whose
docstring says what each of them computes. Where their definition is not ours, the difference is part of the test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from itermerge.merging import LINEAR, Merge, Method

Weights = dict[str, Tensor]


def load(name: str) -> Weights:
    return load_file(Path(__file__).parent / "fixtures" / "merge" / f"{name}.safetensors")


BASE, A, B, FAR = (load(name) for name in ("base", "a", "b", "far"))
ALL = tuple(BASE)


def trim(density: float, combine: str = "elect", **more: object) -> Method:
    return Method(sparsify="magnitude", combine=combine, density=density, **more)  # pyright: ignore[reportArgumentType]


def band(density: float, gamma: float, weights: tuple[float, ...]) -> Method:
    return Method(sparsify="band", combine="sum", density=density, gamma=gamma, weights=weights)


CASES: dict[str, tuple[Method, list[Weights], float]] = {
    "mergekit_linear_5_5": (LINEAR, [A], 0.5),
    "mergekit_linear_3_7": (LINEAR, [A], 0.7),
    "mergekit_task": (Method(combine="sum", weights=(0.6, 0.3)), [A, B], 1.0),
    "mergekit_ties_2_one": (trim(0.2), [A], 0.5),
    "mergekit_breadcrumbs": (band(0.5, 0.1, (0.6, 0.3)), [A, B], 1.0),
    "mergelm_task": (Method(combine="sum"), [A, B], 0.4),
    "mergelm_average": (LINEAR, [A, B], 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_definition_gives_the_same_weights(name: str) -> None:
    method, tuned, ratio = CASES[name]
    ours, theirs = Merge(method, BASE, tuned, ratio).all(), load(name)
    assert ours.keys() == theirs.keys()
    for key in ALL:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=2e-7)
    assert any(not torch.equal(theirs[key], BASE[key]) for key in ALL)


def elects_nothing(updates: list[Tensor]) -> Tensor:
    """Where updates cancel each other exactly, so that no sign is elected."""
    return (torch.stack(updates).sum(0) == 0) & (torch.stack(updates) != 0).any(0)


def trimmed(density: float, of: Weights, weight: float, scope: str = "tensor") -> Weights:
    kept = Merge(trim(density, "sum", scope=scope), BASE, [of], 1.0).all()
    return {key: weight * (kept[key] - BASE[key]) for key in ALL}


@pytest.mark.parametrize(
    ("name", "density", "weights", "ratio", "scope"),
    [
        ("mergekit_ties_5", 0.5, (1.0, 1.0), 1.0, "tensor"),
        ("mergekit_ties_2", 0.2, (1.0, 1.0), 1.0, "tensor"),
        ("mergekit_ties_2_weighted", 0.2, (0.7, 0.4), 0.5, "tensor"),
        ("mergelm_ties", 503 / 2510, (1.0, 1.0), 0.5, "model"),  # its cut over the model keeps one entry more
    ],
)
def test_ties_is_theirs_but_where_no_sign_is_elected(
    name: str, density: float, weights: tuple[float, float], ratio: float, scope: str
) -> None:
    """A sum of zero: mergekit takes the positive updates, MergeLM those of the model's majority sign, we none."""
    ours = Merge(trim(density, scope=scope, weights=weights), BASE, [A, B], ratio).all()
    theirs, none = load(name), 0
    sides = [trimmed(density, of, w, scope) for of, w in zip((A, B), weights, strict=True)]
    for key in ALL:
        open_ = elects_nothing([side[key] for side in sides])
        torch.testing.assert_close(ours[key][~open_], theirs[key][~open_], rtol=1e-6, atol=2e-7)
        assert torch.equal(ours[key][open_], BASE[key][open_])
        none += int((open_ & (theirs[key] != BASE[key])).sum())
    assert none > 0 or "weighted" in name


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_slerp_is_theirs_where_theirs_is_an_arc(ratio: float) -> None:
    """mergekit takes a straight line above a cosine of .9995, as between a model and its fine-tune; we keep the arc."""
    ours = Merge(Method(combine="slerp"), BASE, [FAR], ratio).all()
    theirs = load(f"mergekit_slerp_{round(10 * ratio)}")
    straight = 0
    for key in ALL:
        a, b = BASE[key].double().flatten(), FAR[key].double().flatten()
        if float(a @ b / (a.norm() * b.norm())) > 0.9995:
            straight += 1
            torch.testing.assert_close(theirs[key], torch.lerp(BASE[key], FAR[key], ratio), rtol=1e-6, atol=2e-7)
            assert float((ours[key] - theirs[key]).abs().max()) > 1e-5
        else:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
            assert float((torch.lerp(BASE[key], FAR[key], ratio) - theirs[key]).abs().max()) > 1e-5
    assert straight == 1


def test_model_stock_is_theirs_where_the_angle_is_below_a_right_one() -> None:
    """mergekit does not clamp t: with opposed updates it moves away from their mean, we give the base."""
    ours, theirs = Merge(Method(combine="stock"), BASE, [A, B], 1.0).all(), load("mergekit_model_stock")
    opposed = [key for key in ALL if float(((A[key] - BASE[key]) * (B[key] - BASE[key])).sum()) < 0]
    assert len(opposed) == 3
    for key in ALL:
        if key in opposed:
            assert torch.equal(ours[key], BASE[key])
            assert not torch.equal(theirs[key], BASE[key])
        else:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=5e-7)


def test_dare_is_mergelms_for_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the paper runs (drop rate .2, rescaled, mean of two), with the masks that it drew."""
    masks = [load(f"mergelm_dare_mask_{which}") for which in "ab"]

    def draws(_: Merge, i: int, name: str, begin: int, size: int) -> np.ndarray:
        dropped = 1 - masks[i][name].flatten()[begin : begin + size].numpy()
        return dropped.astype(np.uint32) * np.uint32(0xFFFFFFFF)

    monkeypatch.setattr(Merge, "_draw", draws)
    ours = Merge(Method(sparsify="random", density=0.8), BASE, [A, B], 1.0).all()
    theirs = load("mergelm_dare")
    for key in ALL:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=2e-7)


def test_mergekits_dare_is_rescaled_by_norms_and_ours_by_the_density() -> None:
    """Its survivors are ours times 0.8 |u|_1 / |m u|_1, m its mask."""
    theirs = load("mergekit_dare")
    for key in ALL:
        update = A[key] - BASE[key]
        kept = torch.where(theirs[key] != BASE[key], update, torch.zeros(()))
        if not kept.any():
            continue
        scale = float(update.abs().sum() / kept.abs().sum())
        torch.testing.assert_close(theirs[key], BASE[key] + 0.5 * scale * kept, rtol=1e-5, atol=1e-6)
        if key == "model.embed_tokens.weight":
            assert scale != pytest.approx(1 / 0.8, rel=1e-3)
            assert float((kept != 0).sum() / (update != 0).sum()) == pytest.approx(0.8, abs=0.1)

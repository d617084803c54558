"""The policy: decoding that depends on nothing but prompt and key, weights on disk, and folders that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import enliven
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from itermerge.policy import (
    Completion,
    KeyedSampling,
    Policy,
    PolicyError,
    check_same_tensors,
    complete,
    digest_weights,
    read_weights,
    resolve,
    uniforms,
    write_folder,
)
from itermerge.tasks import derive_seed

PROMPTS = [
    "add 34+18?", "sum 34+18-15+27?", "sort qhcae?", "count a abcabcabca?", "max 101,305,233?", "find 10+?=44?",
    "shift 2 abc?", "mod 34+18%7?",
]  # fmt: skip
HOW: dict[str, Any] = {"max_new_tokens": 24}


def _greedy_by_hand(policy: Policy, prompt: str, steps: int) -> Completion:
    """One forward pass a token over the whole text: no cache, no padding, no `generate`."""
    ids, made = policy.encode_prompt(prompt), []
    with torch.inference_mode():
        while len(made) < steps and (not made or made[-1] not in policy.eos_ids):
            made.append(int(policy.model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    finished = made[-1] in policy.eos_ids
    return Completion(policy.tokenizer.decode(made[:-1] if finished else made), finished, len(made))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_left_padding_does_not_change_greedy_output(lab: Policy, batch_size: int) -> None:
    alone = [_greedy_by_hand(lab, p, 24) for p in PROMPTS]
    assert any(c.finished for c in alone)
    assert complete(lab, PROMPTS, keys=None, batch_size=batch_size, **HOW) == alone


def test_left_padding_does_not_change_a_random_models_output(tiny: Policy) -> None:
    enliven(tiny)
    alone = [_greedy_by_hand(tiny, p, 24) for p in PROMPTS]
    assert len({c.text for c in alone}) > 3
    assert complete(tiny, PROMPTS, keys=None, batch_size=8, **HOW) == alone


def test_a_draw_does_not_depend_on_its_batch(lab: Policy) -> None:
    prompts = [p for p in PROMPTS for _ in range(3)]
    keys = [derive_seed("test", i) for i in range(len(prompts))]
    how = HOW | {"temperature": 1.3, "top_p": 0.95}
    together = complete(lab, prompts, keys=keys, batch_size=len(prompts), **how)
    assert len({c.text for c in together}) > len(PROMPTS)  # samples of a problem differ
    alone = [complete(lab, [p], keys=[k], batch_size=1, **how)[0] for p, k in zip(prompts, keys, strict=True)]
    assert together == alone
    backwards = complete(lab, prompts[::-1], keys=keys[::-1], batch_size=5, **how)
    assert backwards[::-1] == together
    other = complete(lab, prompts, keys=[k + 1 for k in keys], batch_size=len(prompts), **how)
    assert other != together


def _draws(logits: list[float], n: int, temperature: float = 1.0, top_p: float = 1.0, position: int = 0) -> np.ndarray:
    """How often each token is drawn, over `n` keys."""
    keys = [derive_seed("frequency", i) for i in range(n)]
    scores = torch.tensor([logits]).repeat(n, 1)
    ids = torch.zeros(n, 4 + position, dtype=torch.long)
    chosen = KeyedSampling(keys, 4, temperature, top_p)(ids, scores)
    assert bool(((chosen == 0).sum(-1) == 1).all())
    assert bool(((chosen == -torch.inf).sum(-1) == len(logits) - 1).all())
    return np.bincount(chosen.argmax(-1).numpy(), minlength=len(logits))


@pytest.mark.parametrize(("temperature", "position"), [(1.0, 0), (0.5, 0), (2.0, 7)])
def test_sampling_frequencies_are_the_softmax_probabilities(temperature: float, position: int) -> None:
    logits = [0.3, -1.2, 1.7, 0.0, -0.4]
    weights = np.exp(np.array(logits) / temperature)
    expected = 20000 * weights / weights.sum()
    chi2 = ((_draws(logits, 20000, temperature, position=position) - expected) ** 2 / expected).sum()
    assert chi2 < 18.47  # 4 degrees of freedom: above it once in 1,000 sets of keys


def test_top_p_keeps_the_smallest_nucleus_and_rescales_it() -> None:
    logits = np.log([0.05, 0.5, 0.15, 0.3]).tolist()
    # 0.5 < 0.6 <= 0.5 + 0.3: tokens 1 and 3 stay, at 0.5 / 0.8 = 0.625 and 0.375
    counts = _draws(logits, 8000, top_p=0.6)
    assert counts[[0, 2]].tolist() == [0, 0]
    assert counts[1] / 8000 == pytest.approx(0.625, abs=4 * (0.625 * 0.375 / 8000) ** 0.5)
    assert _draws(logits, 500, top_p=0.4).tolist() == [0, 500, 0, 0]  # the commonest token alone reaches 0.4
    assert (_draws(logits, 8000, top_p=0.9) > 0).tolist() == [False, True, True, True]  # .5 + .3 + .15 = .95


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    assert _draws([0.0, -torch.inf, 0.0, -torch.inf], 4000)[[1, 3]].tolist() == [0, 0]


def test_uniforms_are_splitmix64() -> None:
    # the published first outputs of SplitMix64 from state 0 (Vigna's reference code)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    zero = np.zeros(1, dtype=np.uint64)
    assert [uniforms(zero, i)[0] for i in range(3)] == [(z >> 11) / 2**53 for z in published]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 10**6))
def test_uniforms_are_in_range_and_depend_on_their_own_key_alone(keys: list[int], position: int) -> None:
    got = uniforms(np.array(keys, dtype=np.uint64), position)
    assert got.dtype == np.float64
    assert bool(((got >= 0) & (got < 1)).all())
    assert [uniforms(np.array([k], dtype=np.uint64), position)[0] for k in keys] == got.tolist()


def test_a_stop_string_ends_a_completion_and_is_cut_off(lab: Policy) -> None:
    prompts = ["sort qhcae?", "sort zyxw?"]  # a worked solution lists letters between commas
    whole = complete(lab, prompts, keys=None, batch_size=2, **HOW)
    assert all("," in c.text for c in whole)
    cut = complete(lab, prompts, keys=None, batch_size=2, stop=(",", "nowhere"), **HOW)
    # one token a character, and one that stopped it
    assert cut == [Completion(c.text.split(",")[0], True, len(c.text.split(",")[0]) + 1) for c in whole]


def test_a_completion_that_meets_the_limit_is_not_finished(lab: Policy) -> None:
    whole = complete(lab, ["sort qhcae?"], keys=None, batch_size=1, **HOW)[0]
    assert whole.finished
    assert whole.tokens == len(whole.text) + 1  # a token a character, and eos
    for limit, finished in ((3, False), (len(whole.text), False), (len(whole.text) + 1, True)):
        short = complete(lab, ["sort qhcae?"], keys=None, batch_size=1, max_new_tokens=limit)[0]
        assert short == Completion(whole.text[:limit], finished, limit)


def test_progress_counts_every_prompt_once(tiny: Policy) -> None:
    ticks: list[int] = []
    complete(tiny, PROMPTS, keys=None, batch_size=3, max_new_tokens=1, on_progress=ticks.append)
    assert sum(ticks) == len(PROMPTS)


def test_a_prompt_that_does_not_fit_is_refused(tiny: Policy) -> None:
    # 10 characters + 247 new tokens = 257 positions, the model has 256
    with pytest.raises(PolicyError, match=r"need 257 positions, the model has 256; lower sampler\.max_new_tokens"):
        complete(tiny, ["add 34+18?"], keys=None, batch_size=1, max_new_tokens=247)


# --- weights -------------------------------------------------------------------------------------------------------


def test_digest_is_of_content_not_of_order_or_storage() -> None:
    a = {"x": torch.tensor([1.0, 2.5]), "y": torch.tensor([[3.0]])}
    same = digest_weights(a)
    assert digest_weights(dict(reversed(a.items()))) == same
    assert digest_weights({k: v.bfloat16() for k, v in a.items()}) == same  # these values are exact in bfloat16
    assert digest_weights({**a, "x": torch.tensor([[1.0, 0.0], [2.5, 0.0]])[:, 0]}) == same  # not contiguous
    others = (
        {**a, "x": torch.tensor([1.0, 2.5000002])}, {**a, "x": torch.tensor([[1.0, 2.5]])},
        {"x": a["x"], "z": a["y"]}, {"x": a["x"]}, {"x": torch.tensor([2.5, 1.0]), "y": a["y"]},
    )  # fmt: skip
    assert len({same, *map(digest_weights, others)}) == 6


def test_written_folder_has_the_same_bytes_each_time_and_loads_with_equal_logits(
    tmp_path: Path, write_variant: Callable[..., Path]
) -> None:
    tiny = Policy(write_variant({}))
    (tiny.folder / "README.md").write_text("not copied")
    weights = {name: w + 0.125 for name, w in tiny.weights().items()}
    for out, given_weights in (("a", weights), ("b", dict(reversed(weights.items())))):
        write_folder(tmp_path / out, given_weights, tiny.folder)
    files = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert files == sorted({"model.safetensors", *(f.name for f in tiny.folder.iterdir() if f.suffix == ".json")})
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tiny.folder / name).read_bytes()
    with safe_open(tmp_path / "a" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_weights(tmp_path / "a").keys() == weights.keys()
    assert all(torch.equal(w, weights[n]) for n, w in read_weights(tmp_path / "a").items())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.dtype == torch.float32
    tiny.set_weights(weights)
    ids = torch.tensor([tokenizer("sum 34+18?")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, tiny.model(ids).logits)


def test_written_folder_is_float32_whatever_the_source_was_saved_in(
    tiny: Policy, tmp_path: Path, write_variant: Callable[..., Path]
) -> None:
    half = write_variant({"config.json": {"dtype": "bfloat16", "torch_dtype": "bfloat16"}})
    write_folder(tmp_path / "out", {n: w.bfloat16() for n, w in tiny.weights().items()}, half)
    assert {str(w.dtype) for w in read_weights(tmp_path / "out").values()} == {"torch.float32"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_a_bfloat16_checkpoint_is_loaded_in_float32(tiny_folder: Path, write_variant: Callable[..., Path]) -> None:
    folder = write_variant({"config.json": {"dtype": "bfloat16"}})
    tensors = {k: v.bfloat16() for k, v in load_file(tiny_folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert {w.dtype for w in Policy(folder).weights().values()} == {torch.float32}


def test_set_weights_refuses_other_names_and_shapes_and_changes_nothing(tiny: Policy) -> None:
    before = digest_weights(tiny.weights())
    good = {name: torch.zeros_like(w) for name, w in tiny.weights().items()}
    first = next(iter(good))
    with pytest.raises(PolicyError, match=rf"missing \['{first}'\], unexpected \['more'\]"):
        tiny.set_weights({**{n: w for n, w in good.items() if n != first}, "more": torch.zeros(1)})
    last = list(good)[-1]
    with pytest.raises(PolicyError, match=rf"{last}: the weights to load has shape \(3,\), the model"):
        tiny.set_weights({**good, last: torch.zeros(3)})
    assert digest_weights(tiny.weights()) == before
    tiny.set_weights(good)
    assert all(not w.any() for w in tiny.weights().values())


def test_tied_embeddings_stand_once(tiny: Policy) -> None:
    assert not [name for name in tiny.weights() if "lm_head" in name]
    assert tiny.model.lm_head.weight is tiny.model.model.embed_tokens.weight


def test_check_same_tensors_passes_equal_ones() -> None:
    check_same_tensors({"a": torch.zeros(2)}, {"a": torch.ones(2)}, "one", "two")


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "added", "message"),
    [
        ("tokenizer", None, r"has no tokenizer .*tokenizer\.save_pretrained"),
        ("config.json", None, r"has no config\.json"),
        ("model.safetensors", "pytorch_model.bin", r"no \*\.safetensors weights\. Pickle checkpoints are not loaded"),
    ],
)
def test_folder_without(gone: str, added: str | None, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, folder := tmp_path / "m")
    for file in folder.glob(f"{gone}*"):
        file.unlink()
    if added:
        torch.save({}, folder / added)
    with pytest.raises(PolicyError, match=message) as caught:
        Policy(folder)
    assert str(folder) in str(caught.value)


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"model\.path: .*nowhere is not a folder"):
        Policy(tmp_path / "nowhere")


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere", "one", "one/two/three"])
def test_a_path_that_is_neither_folder_nor_repository(path: str) -> None:
    with pytest.raises(PolicyError, match=r"model\.path: .* is neither a folder nor a Hugging Face repository"):
        resolve(path)


def test_a_repository_out_of_reach_is_named() -> None:
    with pytest.raises(PolicyError, match=r"could not get no-such-owner-x/no-such-model from the Hugging Face hub"):
        resolve("no-such-owner-x/no-such-model")  # HF_HUB_OFFLINE is set: no request is made


NO_EOS: dict[str, Any] = {"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": None}}


def test_tokenizer_without_eos_is_refused(write_variant: Callable[..., Path]) -> None:
    with pytest.raises(PolicyError, match=r"the tokenizer in .* has no eos token and the generation config names none"):
        Policy(write_variant({**NO_EOS, "generation_config.json": None}))


def test_eos_may_come_from_the_generation_config_alone(write_variant: Callable[..., Path]) -> None:
    policy = Policy(write_variant({**NO_EOS, "generation_config.json": {"eos_token_id": [1, 9]}}))
    assert policy.eos_ids == [1, 9]
    assert policy.encode_completion("1")[-1] == 1


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_tokenizer_without_pad_or_with_pad_equal_to_eos(
    pad: str | None, write_variant: Callable[..., Path], tiny: Policy
) -> None:
    edits: dict[str, Any] = {"tokenizer_config.json": {"pad_token": pad}, "config.json": {"pad_token_id": None}}
    policy = Policy(write_variant(edits))
    assert (policy.pad_id, policy.eos_ids) == (1, [1])
    made = complete(enliven(policy), PROMPTS, keys=None, batch_size=8, **HOW)
    assert made == complete(enliven(tiny), PROMPTS, keys=None, batch_size=1, **HOW)


def test_a_prompt_is_not_closed_with_eos(tiny: Policy) -> None:
    plain, words = tiny.encode_prompt("add 1"), tiny.tokenizer

    class ClosesTexts:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*words(text)["input_ids"], 1]}

    tiny.tokenizer = ClosesTexts()
    assert tiny.encode_prompt("add 1") == plain
    assert len(plain) == len("add 1")

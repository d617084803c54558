"""The policy: weights on disk, and folders that are refused."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import enliven
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from itermerge.decoding import complete
from itermerge.policy import Policy, copy_in
from itermerge.weights import (
    PolicyError,
    check_same_tensors,
    digest_weights,
    read_weights,
    resolve,
    save_tensors,
    write_folder,
)

PROMPTS = ["add 34+18?", "sum 34+18-15+27?", "sort qhcae?", "count a abcabcabca?", "find 10+?=44?"]
HOW: dict[str, Any] = {"max_new_tokens": 24}

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_written_and_hashed_as_safetensors_writes_them(dtype: torch.dtype, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 5), "a.weight": (7,), 'ü"': (2, 1, 3), "scalar": (), "nothing": (0, 4), "large": (700, 1001)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors["turned"] = tensors["b"].T
    sha = save_tensors(tmp_path / "ours", tensors, dtype)
    save_file({n: w.to(dtype).contiguous() for n, w in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sha == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()


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


def test_a_copy_in_bfloat16_is_what_loading_in_bfloat16_gives(tiny: Policy) -> None:
    made = copy_in(tiny.model, torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)
    kept = dict(made.named_buffers())
    assert [(n, t.dtype) for n, t in loaded.named_buffers()] == [(n, t.dtype) for n, t in kept.items()]
    assert torch.float32 in {t.dtype for t in kept.values()}  # rotary frequencies: 8 bits of them turn far positions
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
    assert tiny.model.dtype == torch.float32
    ids = torch.tensor([tiny.encode_prompt("add 34+18?")])
    with torch.inference_mode():
        assert torch.equal(made(ids).logits, loaded(ids).logits)


def test_pyright_is_told_what_transformers_has() -> None:
    """typings/ names where each thing is defined; it must be what the top level gives."""
    stub = Path(__file__).parents[1] / "typings" / "transformers" / "__init__.pyi"
    named = re.findall(r"^from (\S+) import (.+)$", stub.read_text(), re.M)
    assert len(named) >= 10
    for module, said in named:
        name, alias = said.split(" as ")
        assert name == alias
        assert getattr(transformers, name) is getattr(import_module(module), name)

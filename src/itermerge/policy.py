"""The language model, any Hugging Face causal LM with its tokenizer: load, check, read and write weights."""

from __future__ import annotations

import copy
from array import array
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from .tasks.prompts import messages_of
from .weights import PolicyError, Weights, check_same_tensors

DATE = "26 Jul 2024"  # Llama 3's own default
KEPT_PROMPTS = 1 << 13  # that were read, 4 bytes a token
SHARED_FROM = 8  # tokens that all rows of a batch begin with, to compute them once


class Policy:
    """A causal LM and its tokenizer, on one device. Weights are changed in place by `set_weights` and by fitting."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, device: str = "cpu") -> None:
        self.folder = Path(folder)
        check_folder(self.folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        self.model: Any = model.to(device)
        self.model.eval()
        self.eos_ids = eos_ids_of(self.folder, self.tokenizer, self.model.generation_config)
        # Padding is masked, and losses are built from lengths, so any token will do; pad = eos is safe.
        self.pad_id: int = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_ids[0]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name, each once (tied ones under their first name), detached, not copied."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def set_weights(self, weights: Weights) -> None:
        """Raises PolicyError, naming tensors, unless `weights` has this model's names and shapes."""
        own = self.weights()
        check_same_tensors(own, weights, "the model", "the weights to load")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts before a text; of messages
        (`tasks.prompts`), as the chat template writes them, special tokens in it and none added. Raises PolicyError
        where there is no template. The same prompts are read for each model of a run, and kept."""
        messages = messages_of(text)
        key = text if messages is None else (text, self.tokenizer.chat_template)
        if key in self._read:
            return self._read[key].tolist()
        if messages is not None:
            ids: list[int] = self.tokenizer(self._chat(messages), add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(text)["input_ids"]
            # A tokenizer that closes a text with eos (T5's habit) would end the completion before it starts.
            ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        if len(self._read) >= KEPT_PROMPTS:
            self._read.clear()
        self._read[key] = array("i", ids)
        return ids

    @cached_property
    def _read(self) -> dict[str | tuple[str, Any], array[int]]:
        """Token ids of prompts that were read, by text, of messages with the chat template."""
        return {}

    def _chat(self, messages: list[dict[str, str]]) -> str:
        if self.tokenizer.chat_template is None:
            raise PolicyError(
                f"model.path: the tokenizer in {self.folder} has no chat template, which task.prompt=chat needs; "
                "use task.prompt=qa or alpaca, or a model that was tuned to chat"
            )
        try:
            return chat_text(self.tokenizer, messages)
        except Exception as error:  # the template's own, as for a system message that it does not know
            raise PolicyError(f"the chat template of {self.folder} refuses the prompt: {error}") from error

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a completion and the eos that ends it."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_ids[0]]

    def length_of(self, completion: str) -> int:
        """Tokens of a completion, its eos included."""
        return len(self.encode_completion(completion))

    @property
    def context(self) -> int:
        """Positions that the model has."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))


def chat_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Messages as the tokenizer's chat template writes them, ready for an answer. Some templates write the date: a
    fixed one, or the same run would differ tomorrow."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string=DATE, strftime_now=lambda _: DATE
    )


def copy_in(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model as its checkpoint would be loaded in `dtype`: what no checkpoint holds, as the angles of
    positions, keeps its own."""
    memo: dict[int, Any] = {}  # of deepcopy: what it takes for these tensors
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            cast = tensor.detach().to(dtype)
            memo[id(tensor)] = torch.nn.Parameter(cast, False) if isinstance(tensor, torch.nn.Parameter) else cast
    return copy.deepcopy(model, memo)


def keeps_every_key(model: Any) -> bool:
    """Whether each layer's cache holds all keys and values, so that what rows begin with may be computed once; not so
    with sliding windows or recurrent layers."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def check_folder(folder: Path) -> None:
    """Raises PolicyError unless `folder` holds a config, safetensors weights and a tokenizer."""
    if not folder.is_dir():
        raise PolicyError(f"model.path: {folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise PolicyError(f"model.path: {folder} has no config.json; expected a Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        raise PolicyError(
            f"model.path: {folder} has no *.safetensors weights. Pickle checkpoints are not loaded; convert them with "
            "transformers' save_pretrained (safetensors is its default)"
        )
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")):
        raise PolicyError(
            f"model.path: {folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); "
            "save the model's tokenizer beside it with tokenizer.save_pretrained"
        )


def eos_ids_of(folder: Path, tokenizer: Any, generation: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, then those of the generation config. Raises PolicyError where there
    are none."""
    ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    configured = generation.eos_token_id
    for extra in configured if isinstance(configured, list) else [configured]:
        if extra is not None and extra not in ids:
            ids.append(extra)
    if not ids:
        raise PolicyError(
            f"model.path: the tokenizer in {folder} has no eos token and the generation config names none, so the "
            "model could never learn to stop; set tokenizer.eos_token and save the tokenizer again"
        )
    return ids

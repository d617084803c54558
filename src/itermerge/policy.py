"""The language model: load, check, sample, read and write weights.

A `Policy` is any Hugging Face causal LM with its tokenizer. Sampling runs through `generate`, with one change: the
random number behind a token is a hash of (seed, problem, sample, position) and not a draw from a generator, so that a
completion does not depend on what else is in its batch, nor on the device.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

Weights = Mapping[str, Tensor]
WEIGHTS_FILE = "model.safetensors"
_NOT_COPIED = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".md",
    ".gitattributes",
    "recipe.json",
)


class PolicyError(ValueError):
    """A model folder that cannot be used, with what is missing and the way out."""


@dataclass(frozen=True)
class Completion:
    """What the model wrote; `finished` is False when it ran into the token limit."""

    text: str
    finished: bool
    tokens: int


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
        self.eos_ids = _eos_ids(self.folder, self.tokenizer, self.model)
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
        """Token ids of a prompt, with the special tokens that the tokenizer puts before a text."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        # A tokenizer that closes a text with eos (T5's habit) would end the completion before it starts.
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a completion and the eos that ends it."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_ids[0]]

    @property
    def context(self) -> int:
        """Positions that the model has."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))


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


def resolve(path: str, revision: str | None = None) -> Path:
    """A local folder: `path` itself where it is one, else the Hugging Face hub's snapshot of that repository."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local.resolve()
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise PolicyError(f"model.path: {path} is neither a folder nor a Hugging Face repository (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(path, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise PolicyError(
            f"model.path: could not get {path} from the Hugging Face hub ({type(error).__name__}). Check the name and "
            "the network, or give the path of a local folder"
        ) from error


def _eos_ids(folder: Path, tokenizer: Any, model: Any) -> list[int]:
    ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    configured = model.generation_config.eos_token_id
    for extra in configured if isinstance(configured, list) else [configured]:
        if extra is not None and extra not in ids:
            ids.append(extra)
    if not ids:
        raise PolicyError(
            f"model.path: the tokenizer in {folder} has no eos token and the generation config names none, so the "
            "model could never learn to stop; set tokenizer.eos_token and save the tokenizer again"
        )
    return ids


# --- weights -------------------------------------------------------------------------------------------------------


def check_same_tensors(a: Weights, b: Weights, name_a: str, name_b: str) -> None:
    """Raises PolicyError naming the tensors that differ in name or shape."""
    if a.keys() != b.keys():
        missing, extra = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
        raise PolicyError(
            f"{name_b} and {name_a} differ in their tensors: missing {missing[:5]}, unexpected {extra[:5]}"
        )
    for name in a:
        if a[name].shape != b[name].shape:
            raise PolicyError(f"{name}: {name_b} has shape {tuple(b[name].shape)}, {name_a} {tuple(a[name].shape)}")


def digest_weights(weights: Weights) -> str:
    """sha256 over names, shapes and float32 values, in name order: equal weights, equal digest, however stored."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu", torch.float32).contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().data)
    return sha.hexdigest()


def write_folder(folder: Path, weights: Weights, like: Path) -> None:
    """A Hugging Face folder in float32: `weights` as safetensors, the other files of `like` byte for byte (not its card
    and recipe, which describe other weights).

    Deterministic bytes: the metadata is exactly {format: pt}, since several keys come out in a different order in each
    process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(like.iterdir()):
        if file.is_file() and not file.name.endswith(_NOT_COPIED) and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {k: weights[k].detach().to("cpu", torch.float32).contiguous() for k in sorted(weights)}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable by its owner alone


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder that `write_folder` made, on the CPU."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# --- sampling ------------------------------------------------------------------------------------------------------


def uniforms(keys: np.ndarray, position: int) -> np.ndarray:
    """Numbers in [0, 1), one for each 64-bit key, by SplitMix64 of (key, position). Shape as `keys`, float64."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(position + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53


class KeyedSampling(LogitsProcessor):
    """Turns greedy decoding into sampling: leaves only the token that the keyed uniform number selects.

    Temperature, then nucleus (the smallest set of tokens whose probability reaches `top_p`), then inverse CDF in the
    order of the vocabulary.
    """

    def __init__(self, keys: Sequence[int], prompt_len: int, temperature: float, top_p: float) -> None:
        self.keys, self.prompt_len = np.array(keys, dtype=np.uint64), prompt_len
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        probs = torch.softmax(scores.float() / self.temperature, -1).to(wide)
        if self.top_p < 1:
            ranked, order = torch.sort(probs, dim=-1, descending=True, stable=True)
            ranked[(ranked.cumsum(-1) - ranked) >= self.top_p] = 0
            probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        cdf = probs.cumsum(-1)
        draw = torch.from_numpy(uniforms(self.keys, input_ids.shape[1] - self.prompt_len))
        token = torch.searchsorted(cdf, draw.to(cdf)[:, None] * cdf[:, -1:], right=True)
        token = token.clamp(max=probs.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def complete(
    policy: Policy,
    prompts: Sequence[str],
    *,
    keys: Sequence[int] | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Completion]:
    """One completion a prompt, in the order of `prompts`: greedy where `keys` is None, else sampled with these keys.

    Batches are made of prompts of like length and padded on the left. A stop string ends a completion and is cut off.
    Raises PolicyError when a prompt and its completion do not fit the model's context.
    """
    ids = [policy.encode_prompt(p) for p in prompts]
    if ids and (need := max(map(len, ids)) + max_new_tokens) > policy.context:
        raise PolicyError(
            f"the longest prompt and its completion need {need} positions, the model has {policy.context}; "
            "lower sampler.max_new_tokens or use shorter prompts"
        )
    out: list[Completion] = [Completion("", True, 0)] * len(prompts)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=policy.eos_ids, pad_token_id=policy.pad_id,
        stop_strings=list(stop) or None,
    )  # fmt: skip
    policy.model.eval()
    for rows in _batches([len(i) for i in ids], batch_size):
        width = max(len(ids[r]) for r in rows)
        tokens = torch.full((len(rows), width), policy.pad_id)
        mask = torch.zeros_like(tokens)
        for at, r in enumerate(rows):
            tokens[at, width - len(ids[r]) :] = torch.tensor(ids[r])
            mask[at, width - len(ids[r]) :] = 1
        processors = [] if keys is None else [KeyedSampling([keys[r] for r in rows], width, temperature, top_p)]
        with torch.inference_mode():
            made = policy.model.generate(
                tokens.to(policy.device), attention_mask=mask.to(policy.device), generation_config=config,
                logits_processor=processors, tokenizer=policy.tokenizer if stop else None,
            )  # fmt: skip
        for r, row in zip(rows, made[:, width:].tolist(), strict=True):
            out[r] = _read_completion(policy, row, stop)
        on_progress(len(rows))
    return out


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return (order[at : at + size] for at in range(0, len(order), size))


def _read_completion(policy: Policy, ids: list[int], stop: Sequence[str]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in policy.eos_ids), None)
    text: str = policy.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cuts = [at for s in stop if (at := text.find(s)) >= 0]
    if cuts:
        return Completion(text[: min(cuts)], True, len(policy.tokenizer(text[: min(cuts)])["input_ids"]) + 1)
    return Completion(text, end is not None, len(ids) if end is None else end + 1)

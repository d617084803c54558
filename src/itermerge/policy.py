"""The language model, any Hugging Face causal LM with its tokenizer: load, check, read and write weights."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

Weights = Mapping[str, Tensor]
WEIGHTS_FILE = "model.safetensors"
SHARED_FROM = 8  # tokens that all rows of a batch begin with, to compute them once
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


def resolve(path: str, revision: str | None = None, key: str = "model.path") -> Path:
    """A local folder: `path` itself where it is one, else the Hugging Face hub's snapshot of that repository. `key` is
    what the user called it."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local.resolve()
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise PolicyError(f"{key}: {path} is neither a folder nor a Hugging Face repository (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(path, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise PolicyError(
            f"{key}: could not get {path} from the Hugging Face hub ({type(error).__name__}). Check the name and "
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
        shapes = [w.shapes[name] if isinstance(w, Checkpoint) else tuple(w[name].shape) for w in (a, b)]
        if shapes[0] != shapes[1]:
            raise PolicyError(f"{name}: {name_b} has shape {shapes[1]}, {name_a} {shapes[0]}")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by name (one safetensors file, or shards), each read when it is asked for,
    in the file's dtype. Raises PolicyError, naming the file, where one is missing or cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise PolicyError(f"{self.folder} is not a folder")
        index = self.folder / "model.safetensors.index.json"
        files = sorted(self.folder.glob("*.safetensors"))
        if index.is_file():
            files = [self.folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        elif (self.folder / WEIGHTS_FILE).is_file():
            files = [self.folder / WEIGHTS_FILE]
        if not files:
            raise PolicyError(
                f"{self.folder} has no *.safetensors weights. Pickle checkpoints are not loaded; convert them with "
                "transformers' save_pretrained (safetensors is its default)"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, Any] = {}
        self._stored: dict[str, str] = {}  # by name, what the file calls it
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except Exception as error:  # safetensors has an exception of its own, and a missing file another
                raise PolicyError(f"{file} cannot be read ({error}); is the download or the copy whole?") from error
            for name in opened.keys():  # noqa: SIM118
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                self._open[name], self._stored[name] = opened, name

    def __getitem__(self, name: str) -> Tensor:
        return self._open[name].get_tensor(self._stored[name])

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some rows of a tensor, without reading the others."""
        return self._open[name].get_slice(self._stored[name])[begin:end]

    def without(self, names: Collection[str]) -> tuple[Checkpoint, list[str]]:
        """The same but for some tensors; the names of those that were there."""
        gone = sorted(n for n in names if n in self.shapes)
        return self._with({n: n for n in self.shapes if n not in gone}), gone

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same under other names."""
        return self._with({rename(n): n for n in self.shapes})

    def _with(self, former: Mapping[str, str]) -> Checkpoint:
        other = copy.copy(self)
        other.shapes = {new: self.shapes[old] for new, old in former.items()}
        other._open = {new: self._open[old] for new, old in former.items()}
        other._stored = {new: self._stored[old] for new, old in former.items()}
        return other


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

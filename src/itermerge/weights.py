"""Named tensors, in memory or in a Hugging Face folder; where each belongs in a model; folders of them, written."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Weights = Mapping[str, Tensor]
WEIGHTS_FILE = "model.safetensors"
WEIGHT_FILES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack",
)  # fmt: skip
_NOT_COPIED = (*WEIGHT_FILES, ".md", ".gitattributes", "recipe.json", "mergekit.yaml")
# The dtypes of tensors, as safetensors calls them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Masks and frequencies that checkpoints of older models hold beside their weights.
_BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")

_KINDS = (
    ("qkv", r"c_attn|query_key_value|qkv_proj|Wqkv"),
    ("q", r"q_proj|query"), ("k", r"k_proj|key"), ("v", r"v_proj|value"),
    ("o", r"o_proj|self_attn\.dense|attention\.dense|attn\.c_proj|out_proj"),
    ("gate_up", r"gate_up_proj"), ("gate", r"gate_proj|\.w1\b"), ("up", r"up_proj|dense_h_to_4h|mlp\.c_fc|fc1|\.w3\b"),
    ("down", r"down_proj|dense_4h_to_h|mlp\.c_proj|fc2|\.w2\b"),
    ("norms", r"norm|ln_\w+"),
)  # fmt: skip
KINDS = (*(kind for kind, _ in _KINDS), "other", "embed", "norm", "head")


class PolicyError(ValueError):
    """A model folder that cannot be used, with what is missing and the way out."""


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


def place_of(name: str) -> tuple[str, str]:
    """(row, kind) of a tensor: (`layer_03`, `q`), (`embed`, `embed`), (`head`, `head`), (`norm`, `norm`)."""
    if found := re.search(r"\.(\d+)\.", f".{name}."):
        kind = next((k for k, pattern in _KINDS if re.search(pattern, name[found.start() :])), "other")
        return f"layer_{int(found[1]):02d}", kind
    if re.search(r"lm_head|embed_out|score", name):
        return "head", "head"
    if re.search(r"emb|wte|wpe", name):
        return "embed", "embed"
    return "norm", "norm"


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return place_of(name)[0] in ("embed", "head") and not re.search(r"wpe|position", name)


def shape_of(weights: Weights, name: str) -> tuple[int, ...]:
    """A tensor's shape, without reading it from a checkpoint."""
    return weights.shapes[name] if isinstance(weights, Checkpoint) else tuple(weights[name].shape)


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
    """The tensors of a Hugging Face folder by name (one safetensors file, or shards), each mapped from its file, in the
    file's dtype: pages are read when they are used, and take no memory of their own. Raises PolicyError, naming the
    file, where one is missing or cannot be read."""

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
        self.dtypes: dict[str, str] = {}  # as safetensors calls them: BF16
        self._rows: dict[str, int] = {}  # of tensors of which only the first rows are meant
        self._open: dict[str, Any] = {}
        self.stored: dict[str, str] = {}  # by name, what the file calls it
        self.files: dict[str, Path] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except Exception as error:  # safetensors has an exception of its own, and a missing file another
                raise PolicyError(f"{file} cannot be read ({error}); is the download or the copy whole?") from error
            for name in opened.keys():  # noqa: SIM118
                about = opened.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(about.get_shape()), about.get_dtype()
                self._open[name], self.stored[name], self.files[name] = opened, name, file

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, mapped: a view of the file, never to be written to."""
        whole = self._open[name].get_tensor(self.stored[name])
        return whole[: self._rows[name]] if name in self._rows else whole

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def without(self, names: Collection[str]) -> tuple[Checkpoint, list[str]]:
        """The same but for some tensors; the names of those that were there."""
        gone = sorted(n for n in names if n in self.shapes)
        return self._with({n: n for n in self.shapes if n not in gone}), gone

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same under other names."""
        return self._with({rename(n): n for n in self.shapes})

    def first_rows(self, rows: Mapping[str, int]) -> Checkpoint:
        """The same with only so many rows of some tensors."""
        other = self.renamed(lambda n: n)
        other._rows |= rows
        other.shapes |= {n: (count, *self.shapes[n][1:]) for n, count in rows.items()}
        return other

    def _with(self, former: Mapping[str, str]) -> Checkpoint:
        other = copy.copy(self)
        other.shapes = {new: self.shapes[old] for new, old in former.items()}
        other.dtypes = {new: self.dtypes[old] for new, old in former.items()}
        other._rows = {new: self._rows[old] for new, old in former.items() if old in self._rows}
        other._open = {new: self._open[old] for new, old in former.items()}
        other.stored = {new: self.stored[old] for new, old in former.items()}
        other.files = {new: self.files[old] for new, old in former.items()}
        return other


def comparable(
    base: Checkpoint, tuned: Checkpoint, name: str = "tuned", *, common_rows: bool = False
) -> tuple[Checkpoint, Checkpoint, list[str]]:
    """Both with the tensors that they share, under the same names, and notes of what was left out: masks and
    frequencies that are no weights, and a head that is its model's embeddings. A prefix that one of them has
    (`transformer.`) is dropped. With `common_rows`, vocabularies of other sizes are cut to the rows that both have.
    `name` is what the user calls `tuned`. Raises PolicyError, naming tensors, where they differ in anything else."""
    notes, sides = [], {"base": base, name: tuned}
    for side in sides:
        sides[side], dropped = sides[side].without({n for n in sides[side] if _BUFFERS.search(n)})
        if dropped:
            notes.append(f"{len(dropped)} tensors of {side} are no weights, and left out: {dropped[0]}, ...")
    for side, other in (("base", name), (name, "base")):
        mine, theirs = sides[side], sides[other]
        prefixes = {n.partition(".")[0] + "." for n in mine.keys() - theirs.keys()}
        for prefix in sorted(prefixes):
            if sum(n.removeprefix(prefix) in theirs for n in mine if n.startswith(prefix)) > len(theirs) / 2:
                sides[side] = mine.renamed(lambda n, prefix=prefix: n.removeprefix(prefix))
    for side in sides:
        heads = {n for n in sides[side] if place_of(n)[0] == "head" and tied_to(sides[side], n)}
        sides[side], dropped = sides[side].without(heads)
        if dropped:
            notes.append(f"{dropped[0]} of {side} is left out: it is tied to the embeddings")
    if common_rows:
        notes += _cut(sides, name)
    try:
        check_same_tensors(sides["base"], sides[name], "base", name)
    except PolicyError as error:
        raise PolicyError(
            f"{error}. If both are one architecture, their files name tensors differently: load each with transformers "
            "and save it again"
        ) from error
    return sides["base"], sides[name], notes


def _cut(sides: dict[str, Checkpoint], name: str) -> list[str]:
    """Cuts embeddings and heads, in place, to the vocabulary that both sides have; notes of what that leaves out."""
    notes, (base, tuned) = [], (sides["base"], sides[name])
    for tensor in sorted(base.keys() & tuned.keys()):
        a, b = base.shapes[tensor], tuned.shapes[tensor]
        if a == b or not is_vocabulary(tensor) or a[1:] != b[1:]:
            continue
        rest = f"{name}'s other {b[0] - a[0]} are kept" if b > a else f"base's other {a[0] - b[0]} are left out"
        notes.append(f"{tensor}: base has {a[0]} rows, {name} {b[0]}: the first {min(a[0], b[0])} are merged, {rest}")
        for side in sides:
            sides[side] = sides[side].first_rows({tensor: min(a[0], b[0])})
    return notes


def tied_to(model: Checkpoint, head: str) -> str | None:
    """The embeddings that a head is equal to."""
    twins = [n for n in model if place_of(n)[0] == "embed" and model.shapes[n] == model.shapes[head]]
    return next((twin for twin in twins if torch.equal(model[head], model[twin])), None)


def digest_weights(weights: Weights) -> str:
    """sha256 over names, shapes and the sha256 of the float32 values, in name order: equal weights, equal digest,
    however stored. As many tensors at a time as torch has threads."""

    def of(name: str) -> bytes:
        tensor = weights[name].detach().to("cpu", torch.float32).contiguous()
        return f"{name}{tuple(tensor.shape)}".encode() + hashlib.sha256(tensor.numpy().data).digest()

    sha = hashlib.sha256()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for part in pool.map(of, sorted(weights)):
            sha.update(part)
    return sha.hexdigest()


def header_of(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file of tensors with these dtypes and shapes, and where each tensor begins: the
    widest dtypes first, so that all are aligned, then by name. Its metadata is exactly {format: pt}, since several keys
    would come out in a different order in each process."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, at = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        begins[name], end = at, at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins.items()}


def save_tensors(file: Path, weights: Weights, dtype: torch.dtype) -> str:
    """A safetensors file of all of them in one dtype, byte for byte that of `safetensors.torch.save_file`; its sha256,
    computed while it is written."""
    header, begins = header_of({name: (dtype, tuple(w.shape)) for name, w in weights.items()})
    sha = hashlib.sha256()
    with file.open("wb", buffering=0) as out, ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(sha.update, header)
        _write(out, header)
        for name in begins:
            data = weights[name].detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
            hashed.result()  # no more than two tensors wait
            hashed = pool.submit(sha.update, data)
            _write(out, data)
        hashed.result()
    return sha.hexdigest()


def _write(out: RawIOBase, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[out.write(left) or 0 :]


def write_folder(folder: Path, weights: Weights, like: Path, dtype: torch.dtype = torch.float32) -> str:
    """A Hugging Face folder in one dtype: `weights` as safetensors, the other files of `like` byte for byte (not its
    card and recipe, which describe other weights). The sha256 of the weights' file."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(like.iterdir()):
        if file.is_file() and not file.name.endswith(_NOT_COPIED) and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return save_tensors(folder / WEIGHTS_FILE, weights, dtype)


def mean_of(models: Sequence[Weights]) -> Weights:
    """The mean of each tensor, in float32; of one model, its weights themselves."""
    if len(models) == 1:
        return models[0]
    return {name: torch.stack([w[name].float() for w in models]).mean(0) for name in models[0]}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder that `write_folder` made, on the CPU."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

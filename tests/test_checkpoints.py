"""`itermerge-merge`: what it writes against the law in memory and hand values, what a kill leaves, mistakes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_a_process
from hydra import compose, initialize_config_dir
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from itermerge import checkpoints
from itermerge.config import ConfigError, check_between, conf_dir
from itermerge.merging import Merge, MergeError, law, tensor_ratios
from itermerge.policy import Policy
from itermerge.rules import method_of
from itermerge.store import StoreError, lock_file
from itermerge.weights import Checkpoint, PolicyError

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q = "model.layers.{}.self_attn.q_proj.weight"
TENSORS = {
    EMBED: (30, 8), NORM: (8,), HEAD: (30, 8), "model.layers.0.one": (1,), "model.layers.1.none": (0, 4),
    **{Q.format(i): (8, 8) for i in range(3)}, **{f"model.layers.{i}.mlp.up_proj.weight": (24, 8) for i in range(3)},
}  # fmt: skip


def random_weights(seed: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Random tensors; near those of `like`, with many equal differences, where it is given."""
    draw = torch.Generator().manual_seed(seed)
    if like is None:
        return {name: torch.randn(shape, generator=draw) for name, shape in TENSORS.items()}
    steps = {name: torch.randint(-3, 4, w.shape, generator=draw) / 64 for name, w in like.items()}
    return {name: (w + steps[name]) for name, w in like.items()}


def write_model(folder: Path, weights: Mapping[str, Tensor], shards: int = 1, **config: Any) -> Path:
    folder.mkdir(parents=True)
    names = sorted(weights)
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
        for file in set(where.values()):
            save_file({n: weights[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text(f'{{"of": "{folder.name}"}}')
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with base, one and two, whose words are relative to it."""
    monkeypatch.chdir(tmp_path)
    base = random_weights(0)
    write_model(tmp_path / "base", base)
    for seed, name in ((1, "one"), (2, "two")):
        write_model(tmp_path / name, random_weights(seed, base))
    return tmp_path


def config_of(*words: str) -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return check_between(compose("checkpoints", list(words)), words)


def merge(*words: str) -> dict[str, Tensor]:
    """Runs the command's inside; the tensors that it wrote."""
    cfg = config_of(*words)
    checkpoints.merge(cfg, words)
    return tensors_of(Path(cfg.out))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def command(cwd: Path, *words: str, before: str = "", fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """`itermerge-merge`; `fresh` in a process that begins with nothing imported."""
    code = f"{before}\nfrom itermerge.cli import merge_main; merge_main()"
    if not fresh:
        return in_a_process(code, *words, cwd=cwd)
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)


def half_back(anchor: Tensor, updates: list[Tensor], share: float) -> Tensor:
    """A user's own rule."""
    return share * sum(updates, torch.zeros_like(anchor)) - 0.125 * anchor


# --- values -----------------------------------------------------------------------------------------------------------

TWO = ("tuned=[one,two]",)
RULES: list[tuple[str, ...]] = [
    ("merge=linear",), ("merge=linear", *TWO, "merge.weights=[1,3]"), ("merge=task_arithmetic", *TWO), ("merge=dare",),
    ("merge=dare", "merge.seed=5", "merge.rescale=false"), ("merge=dare_ties", *TWO), ("merge=ties", *TWO),
    ("merge=ties", "merge.scope=model", *TWO), ("merge=breadcrumbs", "merge.gamma=0.1"),
    ("merge=breadcrumbs", "merge.scope=model", "merge.density=0.5"), ("merge=della", *TWO), ("merge=slerp",),
    ("merge=model_stock", *TWO), ("merge=tall_mask", *TWO), ("merge=consensus", *TWO), ("merge=ties_rounds", *TWO),
    ("merge.combine=function", "merge.function=test_checkpoints.half_back", "+merge.params.share=0.75", *TWO),
]  # fmt: skip
POLICIES = ["constant", "layers", "modules"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES, ids=" ".join)
def test_streamed_equals_in_memory(
    rule: tuple[str, ...], policy: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with several pieces a tensor, several tensors at a time, and other shards."""
    monkeypatch.setattr(law, "PIECE", 50)
    words = ("base=base", "tuned=one", "out=out", f"merge/policy={policy}", *rule)
    cfg = config_of(*words)
    wrote = merge(*words, "threads=3", "shard_size=2KB")
    tuned = [load_file(place / name / "model.safetensors") for name in cfg.tuned]
    modules = [(m["match"], m["factor"]) for m in cfg.merge.policy.modules]
    ratios = tensor_ratios(TENSORS, cfg.merge.ratio, layers=cfg.merge.policy.layers, modules=modules)
    base = load_file(place / "base" / "model.safetensors")
    law_says = Merge(method_of(cfg.merge), base, tuned, ratios, seed=cfg.merge.seed or 0).all()
    assert wrote.keys() == law_says.keys()
    for name, tensor in law_says.items():
        assert torch.equal(wrote[name], tensor), name
    assert any(not torch.equal(wrote[n], base[n]) and not torch.equal(wrote[n], tuned[0][n]) for n in wrote)


def test_hand_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", {NORM: torch.tensor([1.0, 2.0, 4.0])})
    write_model(tmp_path / "tuned", {NORM: torch.tensor([3.0, 2.0, 0.0])})
    got = merge("base=base", "tuned=tuned", "out=a", "merge.ratio=0.25")  # 1 + .25 x 2, 2, 4 - .25 x 4
    assert got[NORM].tolist() == [1.5, 2.0, 3.0]
    # Of updates 2, 0, -4 the largest third: -4.
    got = merge("base=base", "tuned=tuned", "out=b", "merge=ties", "merge.density=0.34", "merge.ratio=1")
    assert got[NORM].tolist() == [1.0, 2.0, 0.0]


def test_threads_shards_and_order_leave_the_bits_alone(place: Path) -> None:
    sharded = write_model(place / "sharded", tensors_of(place / "one"), shards=3)
    words = ("base=base", "merge=dare_ties")
    one = merge(*words, "tuned=one", "out=a", "threads=1")
    other = merge(*words, f"tuned={sharded.name}", "out=b", "threads=3")
    assert all(torch.equal(one[n], other[n]) for n in one)
    merge(*words, "tuned=one", "out=c", "threads=3")
    first, second = files_of(place / "a"), files_of(place / "c")
    assert first.pop("README.md") != second.pop("README.md")  # it names the command
    assert first == second


def test_several_weights_are_checked(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"merge\.weights: 3 weights, and tuned has 2"):
        config_of("base=base", *TWO, "out=o", "merge.weights=[1,1,1]")


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_whole_folder_loads(tiny_folder: Path, tiny: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "base")
    shutil.copytree(tiny_folder, tmp_path / "tuned")
    weights = {n: w + 0.25 for n, w in tensors_of(tiny_folder).items()}
    save_file(weights, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tuned" / "LICENSE.md").write_text("free")
    (tmp_path / "tuned" / "README.md").write_text("theirs")
    (tmp_path / "tuned" / "training_args.bin").write_text("x")
    (tmp_path / "tuned" / "runs").mkdir()
    merge("base=base", "tuned=tuned", "out=new/out")
    out = tmp_path / "new" / "out"
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    for name, weight in loaded.named_parameters():
        assert torch.allclose(weight, tiny.weights()[name] + 0.125, atol=1e-6), name
    for file in (tmp_path / "tuned").iterdir():
        if file.is_file() and file.name not in ("model.safetensors", "README.md", "training_args.bin"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "arxiv.org/abs/2203.05482" in card
    assert "not copied from tuned: training_args.bin, runs/" in card
    assert "itermerge-merge base=base tuned=tuned out=new/out" in card
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["config"]["merge"]["ratio"] == 0.5
    assert recipe["inputs"]["tuned"]["model.safetensors"]["bytes"] == (out / "model.safetensors").stat().st_size
    for text in (card, (out / "recipe.json").read_text()):
        assert str(tmp_path) not in text
    assert not list((tmp_path / "new").glob("*.partial"))


def test_a_sharded_tuned_model_keeps_its_files(place: Path) -> None:
    write_model(place / "sharded", tensors_of(place / "one"), shards=2)
    merge("base=base", "tuned=sharded", "out=out")
    index, theirs = (json.loads((place / f / "model.safetensors.index.json").read_text()) for f in ("out", "sharded"))
    assert index["weight_map"] == theirs["weight_map"]
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in tensors_of(place / "one").values())
    for file in ("part-0.safetensors", "part-1.safetensors"):
        assert load_file(place / "out" / file).keys() == load_file(place / "sharded" / file).keys()


def test_shard_size(place: Path) -> None:
    merge("base=base", "tuned=one", "out=out", "shard_size=2KB")
    files = sorted(f.name for f in (place / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) == 3  # 960, 960, 256 | 768, 256, ... of at most 2,000 bytes
    where = json.loads((place / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert where.keys() == TENSORS.keys()
    assert all(name in load_file(place / "out" / file) for name, file in where.items())
    with pytest.raises(ConfigError, match=r"shard_size: expected a size as 5GB or 500MB, got 'big'"):
        config_of("base=base", "tuned=one", "out=o", "shard_size=big")


def test_dtypes_are_the_tuned_models_or_as_asked(place: Path) -> None:
    mixed = {n: w.half() if "mlp" in n else w.bfloat16() for n, w in tensors_of(place / "one").items()}
    mixed[NORM] = mixed[NORM].float()
    write_model(place / "mixed", mixed, torch_dtype="bfloat16")
    got = merge("base=base", "tuned=mixed", "out=out")
    assert {n: w.dtype for n, w in got.items()} == {n: w.dtype for n, w in mixed.items()}
    base = tensors_of(place / "base")
    for name, tensor in got.items():
        exact = torch.lerp(base[name], mixed[name].float(), 0.5)
        assert torch.equal(tensor, exact.to(tensor.dtype))
    assert (place / "out" / "config.json").read_bytes() == (place / "mixed" / "config.json").read_bytes()
    asked = merge("base=base", "tuned=mixed", "out=asked", "dtype=float32")
    assert {w.dtype for w in asked.values()} == {torch.float32}
    assert json.loads((place / "asked" / "config.json").read_text()) == {
        "model_type": "llama",
        "torch_dtype": "float32",
    }


def test_a_value_that_float16_cannot_hold(place: Path) -> None:
    big = tensors_of(place / "one")
    big[NORM] = torch.full((8,), 2e5)
    write_model(place / "big", big)
    with pytest.raises(MergeError, match=rf"{NORM}: has values that float16 cannot hold.*base/model\.safetensors"):
        merge("base=base", "tuned=big", "out=out", "dtype=float16")
    assert not (place / "out").exists()
    merge("base=base", "tuned=big", "out=out2", "dtype=bfloat16")


@pytest.mark.parametrize(("base_rows", "tuned_rows"), [(30, 34), (34, 30)])
def test_other_vocabularies(base_rows: int, tuned_rows: int, place: Path) -> None:
    """Common rows are merged; the tuned model's own stay, the base's own go."""
    weights = {}
    for name, rows, seed in (("a", base_rows, 0), ("b", tuned_rows, 1)):
        weights[name] = random_weights(seed)
        for table in (EMBED, HEAD):
            weights[name][table] = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed + rows))
        write_model(place / name, weights[name])
    got = merge("base=a", "tuned=b", "out=out")
    for table in (EMBED, HEAD):
        assert torch.equal(got[table][:30], torch.lerp(weights["a"][table][:30], weights["b"][table][:30], 0.5))
        assert torch.equal(got[table][30:], weights["b"][table][30:])
        assert len(got[table]) == tuned_rows
    said = "tuned's other 4 are kept" if tuned_rows > base_rows else "base's other 4 are left out"
    want = f"{EMBED}: base has {base_rows} rows, tuned {tuned_rows}: the first 30 are merged, {said}"
    assert want in (place / "out" / "README.md").read_text()
    with pytest.raises(PolicyError, match=r"tuned\[1\] and tuned\[0\] have embeddings of other shapes.*resize_token"):
        merge("base=base", f"tuned=[{'b' if tuned_rows != 30 else 'a'},one]", "out=o")


@pytest.mark.parametrize("stored", ["base", "tuned", "both"])
def test_tied_embeddings(stored: str, place: Path) -> None:
    """A head that is the embeddings is merged once, and stands in the output where it stood in the tuned model."""
    sides = {}
    for name, seed in (("base", 3), ("tuned", 4)):
        sides[name] = {n: w for n, w in random_weights(seed).items() if n != HEAD}
        if stored in (name, "both"):
            sides[name][HEAD] = sides[name][EMBED].clone()
        write_model(place / f"{name}-tied", sides[name])
    got = merge("base=base-tied", "tuned=tuned-tied", "out=out", "merge=dare")
    assert got.keys() == sides["tuned"].keys()
    card = (place / "out" / "README.md").read_text()
    if stored != "base":
        assert torch.equal(got[HEAD], got[EMBED])
        assert f"{HEAD} of the output is the merged embeddings again" in card
    else:
        assert f"{HEAD} of base is left out: it is tied" in card


def test_names_are_those_of_the_tuned_file(place: Path) -> None:
    """A prefix that one side has, and masks that are no weights."""
    plain = {"wte.weight": torch.ones(4, 2), "h.0.mlp.c_fc.weight": torch.ones(2, 2)}
    more = {"h.0.attn.bias": torch.ones(2, 2, dtype=torch.bool)}
    write_model(place / "plain", plain | more)
    write_model(place / "prefixed", {f"transformer.{n}": 3 * w for n, w in plain.items()})
    got = merge("base=plain", "tuned=prefixed", "out=a")
    assert {n: w.unique().tolist() for n, w in got.items()} == {f"transformer.{n}": [2.0] for n in plain}
    assert "1 tensors of base are no weights, and left out: h.0.attn.bias" in (place / "a" / "README.md").read_text()
    assert merge("base=prefixed", "tuned=[plain,prefixed]", "out=b").keys() == plain.keys()


def test_whole_numbers_are_copied_if_equal(place: Path) -> None:
    base = tensors_of(place / "base") | {"model.count": torch.arange(4)}
    one = tensors_of(place / "one") | {"model.count": torch.arange(4)}
    write_model(place / "a", base)
    write_model(place / "b", one)
    write_model(place / "c", one | {"model.count": torch.ones(4, dtype=torch.int64)})
    assert merge("base=a", "tuned=b", "out=out", "dtype=bfloat16")["model.count"].tolist() == [0, 1, 2, 3]
    with pytest.raises(MergeError, match=r"model\.count: .*and differs.*a/model\.safetensors"):
        merge("base=a", "tuned=c", "out=other")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("merge=linear", "merge.ratio=0.25"), {"merge_method": "linear", "weights": [0.75, 0.25]}),
        (("merge=dare", "merge.ratio=0.25"), {"merge_method": "dare_linear", "lambda": 0.25, "density": 0.8}),
        (("merge=ties", *TWO), {"merge_method": "ties", "normalize": True, "density": 0.2, "weights": [1.0, 1.0]}),
        (("merge=della",), {"merge_method": "della", "epsilon": 0.1}),
        (("merge=breadcrumbs",), {"merge_method": "breadcrumbs", "gamma": 0.01, "normalize": False}),
        (("merge=slerp",), {"merge_method": "slerp", "t": 0.5}),
        (("merge=model_stock", *TWO), {"merge_method": "model_stock"}),
        (("merge=task_arithmetic", *TWO), {"merge_method": "task_arithmetic", "normalize": False, "lambda": 0.5}),
        (("merge=consensus", *TWO), None),
        (("merge=ties", "merge.scope=model"), None),
        (("merge=linear", "merge/policy=modules"), None),
    ],
)
def test_mergekit_gets_the_same_rule(words: tuple[str, ...], expected: dict[str, Any] | None, place: Path) -> None:
    import yaml

    merge("base=base", "tuned=one", "out=out", *words)
    file = place / "out" / "mergekit.yaml"
    assert file.exists() == (expected is not None)
    if expected is None:
        return
    text = file.read_text()
    assert text.startswith("# The same rule for mergekit.")
    got = yaml.safe_load(text)
    own = [m.get("parameters", {}) for m in got["models"]]
    flat = got | got.get("parameters", {}) | own[-1] | {"weights": [p.get("weight") for p in own]}
    assert {key: flat[key] for key in expected} == expected
    assert (got["dtype"], got["out_dtype"]) == ("float32", "float32")


# --- interrupted ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal
from itermerge import checkpoints
from itermerge.merging import law
law.PIECE, checkpoints.SYNC, checkpoints._left = 50, 1, [{pieces}]
inner = checkpoints._put_piece
def put(*args):
    checkpoints._left[0] -= 1
    if not checkpoints._left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    inner(*args)
checkpoints._put_piece = put
"""


@pytest.mark.parametrize("pieces", [12, 30])
@pytest.mark.parametrize(
    "words", [("merge=dare", "threads=2"), ("merge=ties", "merge.scope=model", "merge.density=0.4", *TWO)]
)
def test_a_killed_merge_goes_on(
    words: tuple[str, ...], pieces: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(law, "PIECE", 50)
    asked = ("base=base", "tuned=one", *words, "shard_size=2KB")
    whole = merge(*asked, "out=whole")
    killed = command(place, *asked, "out=out", before=KILLED.format(pieces=pieces))
    assert killed.returncode == -9, killed.stderr
    assert not (place / "out").exists()
    again: list[str] = []
    inner = checkpoints.write_tensor
    monkeypatch.setattr(checkpoints, "write_tensor", lambda j, w, name, f: again.append(name) or inner(j, w, name, f))
    monkeypatch.setattr(Merge, "prepare", lambda *_: pytest.fail("the passes over all tensors were made again"))
    got = merge(*asked, "out=out")
    assert 0 < len(again) < len(TENSORS)
    assert all(torch.equal(got[n], whole[n]) for n in whole)
    first, second = files_of(place / "whole"), files_of(place / "out")
    del first["README.md"], second["README.md"]
    assert first == second
    assert not (place / "out.partial").exists()


@pytest.mark.parametrize("change", ["config", "input"])
def test_what_was_begun_otherwise_starts_anew(change: str, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = ("base=base", "tuned=one", "out=out")
    assert command(place, *asked, before=KILLED.format(pieces=12)).returncode == -9
    if change == "config":
        asked = (*asked, "merge.ratio=0.25")
    else:
        save_file(random_weights(7), place / "one" / "model.safetensors", metadata={"format": "pt"})
    got = merge(*asked)
    assert "was begun with another config, other inputs or another version; starting anew" in caplog.text
    ratio = 0.25 if change == "config" else 0.5
    base, one = tensors_of(place / "base"), tensors_of(place / "one")
    assert all(torch.equal(got[n], torch.lerp(base[n], one[n], ratio)) for n in base)


@pytest.mark.parametrize("lost", ["model", "model/model.safetensors", "cut"])
def test_a_journal_without_its_files_is_no_progress(lost: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("base=base", "tuned=one", "merge=ties")
    expected = merge(*words, "out=whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_write_others", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(*words, "out=out")
    partial = place / "out.partial"
    assert len((partial / checkpoints.JOURNAL).read_text().splitlines()) == 1 + len(expected)
    if lost == "cut":
        os.truncate(partial / "model" / "model.safetensors", 100)
    elif lost == "model":
        shutil.rmtree(partial / lost)
    else:
        (partial / lost).unlink()
    again = merge(*words, "out=out")
    assert all(torch.equal(again[n], expected[n]) for n in expected)


def test_a_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("base=base", "tuned=one", "out=out")
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StoreError, match=r"out: out needs \d+ MiB of disk, and 0 MiB are free"):
        merge(*asked)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    inner, left = os.pwrite, [6]

    def full(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"the disk is full: out\.partial could not be written whole.*it goes on"):
        merge(*asked)
    assert not (place / "out").exists()
    monkeypatch.setattr(os, "pwrite", inner)
    assert merge(*asked).keys() == TENSORS.keys()


def test_one_process_at_a_time(place: Path) -> None:
    (place / "out.partial").mkdir()
    with (
        lock_file(place / "out.partial" / ".lock"),
        pytest.raises(ConfigError, match="out: another process is making out"),
    ):
        merge("base=base", "tuned=one", "out=out")
    merge("base=base", "tuned=one", "out=out")


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [("merge=ties", "merge.scope=model", *TWO), ("merge=slerp",), ("merge=della",)])
def test_a_plan_writes_nothing(rule: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    words = ("base=base", "tuned=one", "out=new/out", "merge/policy=modules", "plan=true", "shard_size=2KB", *rule)
    checkpoints.merge(config_of(*words), words)
    assert sorted(place.rglob("*")) == before
    said = capsys.readouterr().out
    assert re.search(r"embed *│ *1│ *240│ *0│", said)
    assert re.search(r"layer_00 *│ *3│ *257│ *0\.5│", said)  # 64 + 192 + 1
    assert "3 files of weights" in said
    assert "nothing is left out" in said
    assert re.search(r"time: about \d+ s of reading and arithmetic", said)
    assert re.search(r"memory: about \d+ MiB", said)


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import json, sys
from pathlib import Path
from itermerge import checkpoints
most, inner = [0], checkpoints._put_piece
def put(*args):
    most[0] = max(most[0], checkpoints._private_memory())
    inner(*args)
checkpoints._put_piece = put
import torch, atexit
start = checkpoints._private_memory()
atexit.register(lambda: Path("memory.json").write_text(json.dumps([start, most[0]])))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="private memory is read from Linux's /proc")
@pytest.mark.parametrize("rule", [("merge=dare", "threads=2"), ("merge=ties", "merge.scope=model")])
def test_memory_is_bounded(rule: tuple[str, ...], tmp_path: Path) -> None:
    """Two models of 400 MB in bfloat16, 300 of them in one tensor: less than a quarter of one on top of what torch
    takes."""
    shapes = {EMBED: (150_000, 1000), **{Q.format(i): (5000, 1000) for i in range(10)}}
    for name in ("base", "tuned"):
        folder = write_model(tmp_path / name, {NORM: torch.zeros(1)})
        slots = [checkpoints.Slot(n, torch.bfloat16, s, "model.safetensors") for n, s in sorted(shapes.items())]
        placed, headers = checkpoints.lay_out(slots)
        with (folder / "model.safetensors").open("wb") as file:  # zeros, which take no place on the disk
            file.write(headers["model.safetensors"])
            file.truncate(placed[-1].begin + placed[-1].size)
    done = command(tmp_path, "base=base", "tuned=tuned", "out=out", *rule, before=MEASURED, fresh=True)
    assert done.returncode == 0, done.stderr
    start, most = json.loads((tmp_path / "memory.json").read_text())
    assert 0 < most - start < 100_000_000
    assert most < 400_000_000
    shutil.rmtree(tmp_path / "out")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def _edited(**edits: Tensor | None) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        weights = tensors_of(place / "one")
        for name, value in edits.items():
            weights.pop(name, None)
            weights |= {} if value is None else {name: value}
        save_file(weights, place / "one" / "model.safetensors", metadata={"format": "pt"})

    return edit


def _pickled(place: Path) -> None:
    (place / "one" / "model.safetensors").rename(place / "one" / "pytorch_model.bin")


def _truncated(place: Path) -> None:
    file = place / "one" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _opposite(place: Path) -> None:
    save_file({n: -w for n, w in tensors_of(place / "base").items()}, place / "one" / "model.safetensors")


def _nothing(_: Path) -> None:
    pass


NAN = torch.full((8,), float("nan"))
FLOAT8 = torch.zeros(8, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("break_it", "words", "message"),
    [
        (_edited(**{Q.format(1): None}), (), r"missing \['model\.layers\.1\.self.*base, \S*base, is a llama"),
        (_edited(more=torch.zeros(1)), (), r"unexpected \['more'\]"),
        (_edited(**{Q.format(1): torch.zeros(2, 3)}), (), r"q_proj\.weight: tuned has shape \(2, 3\), base \(8, 8\)"),
        (_edited(**{NORM: NAN}), (), rf"{NORM}: the tuned weights \(\S*one/model\.safetensors\) hold values that"),
        (_edited(**{Q.format(0): FLOAT8}), (), r"q_proj\.weight: tuned \(\S*one/model\.\w+\) has it in F8_E4M3"),
        (_edited(**{NORM: torch.ones(8, dtype=torch.int8)}), (), rf"{NORM}: is F32 in \S+, I8 in \S+; quantised"),
        (_pickled, (), r"one has no \*\.safetensors weights\. Pickle checkpoints are not loaded; convert them"),
        (_truncated, (), r"one/model\.safetensors cannot be read .* whole\?"),
        (_opposite, ("merge=slerp",), r"lm_head\.weight: anchor and tuned tensor point in opposite.*one/model\.safe"),
        (_nothing, ("tuned=./nowhere",), r"tuned: \./nowhere is neither a folder nor a Hugging Face repository"),
        (_nothing, ("tuned=[one,./nowhere]",), r"tuned\[1\]: \./nowhere is neither"),
        (_nothing, ("out=one",), r"out: one exists already, and is never overwritten; give another out"),
        (_nothing, ("out=one/merged",), r"out: one/merged is inside tuned=one"),
        (_nothing, ("merge=none",), r"merge=none: would give back the tuned model"),
        (_nothing, ("merge=ema",), r"merge=ema: .*between checkpoints it is merge=linear"),
        (_nothing, ("merge=wise_ft",), r"merge=wise_ft: .*between checkpoints it is merge=linear"),
        (_nothing, ("merge.anchor=previous",), r"merge\.anchor: is of training; between checkpoints the anchor"),
        (_nothing, ("merge.every_n_epochs=last",), r"merge\.every_n_epochs: is of training"),
        (_nothing, ("merge.over=rounds",), r"merge\.over: is of rounds"),
        (_nothing, ("merge/policy=search",), r"merge\.policy\.search: .* is of training"),
        (_nothing, ("merge/policy=schedule",), r"merge\.policy\.rounds: \[1\.0, 0\.5\] is of training"),
        (_nothing, ("merge/policy=importance",), r"merge\.policy\.importance: 'skip' is of training"),
        (_nothing, ("merge.policy.angle=true",), r"merge\.policy\.angle: is of training"),
        (_nothing, ("merge.policy.modules=[{match: nosuch, factor: 0}]",), r"modules: no tensor fits 'nosuch'"),
        (_nothing, ("merge.policy.layers=[1,3]",), r"its ratio would be 0\.5 x 3"),
        (_nothing, ("merge=dare", "merge.density=0"), r"merge\.density: must be above 0"),
        (_nothing, ("merge=model_stock",), r"merge=model_stock: .* give tuned=\[A,B\]"),
        (_nothing, ("merge=slerp", *TWO), r"merge=slerp: is between base and one tuned model, got 2"),
        (_nothing, ("+merge.ratoi=0.2",), r"merge\.ratoi: there is no such key; did you mean merge\.ratio\?"),
        (_nothing, ("tuned=[]",), r"tuned: expected a folder, a hub name, or a list of them"),
        (_nothing, ("dtype=int8",), r"dtype: 'int8' is none of float32, bfloat16, float16"),
        (_nothing, ("merge.combine=function", "merge.function=no.such"), r"merge\.function: 'no\.such' cannot be had"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    break_it: Callable[[Path], None], words: tuple[str, ...], message: str, place: Path
) -> None:
    break_it(place)
    given = dict(word.split("=", 1) for word in ("base=base", "tuned=one", "out=out", *words))
    with pytest.raises((ConfigError, PolicyError, MergeError), match=message):
        merge(*(f"{key}={value}" for key, value in given.items()))
    assert not (place / "out").exists()


def test_extremes(place: Path) -> None:
    """Density 1 is the sum of all; ratio 0 and 1 give back anchor and tuned; one-element and empty tensors pass."""
    base, one = tensors_of(place / "base"), tensors_of(place / "one")
    assert all(torch.equal(w, base[n]) for n, w in merge("base=base", "tuned=one", "out=a", "merge.ratio=0").items())
    assert all(torch.equal(w, one[n]) for n, w in merge("base=base", "tuned=one", "out=b", "merge.ratio=1").items())
    linear = merge("base=base", "tuned=one", "out=c")
    dense = merge("base=base", "tuned=one", "out=d", "merge=ties", "merge.density=1")
    assert all(torch.allclose(w, dense[n], atol=1e-6) for n, w in linear.items())


def test_files_that_are_not_ours_stay(place: Path) -> None:
    (place / "out.partial").mkdir()
    (place / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out\.partial, where the work would be, holds thesis\.txt"):
        merge("base=base", "tuned=one", "out=out")
    assert (place / "out.partial" / "thesis.txt").read_text() == "mine"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_with_a_users_own_rule(place: Path) -> None:
    own = place / "mine" / "merge"
    own.mkdir(parents=True)
    (own / "halved.yaml").write_text(
        "defaults: [linear]\nkind: halved\ncombine: function\nfunction: my_rules.halved\nparams: {share: 0.5}\n"
    )
    (place / "mine" / "my_rules.py").write_text("def halved(anchor, updates, share):\n    return share * updates[0]\n")
    done = command(place, "--config-dir", "mine", "base=base", "tuned=one", "merge=halved", "merge.ratio=1", "out=out")
    assert done.returncode == 0, done.stderr
    base, one = tensors_of(place / "base"), tensors_of(place / "one")
    for name, tensor in tensors_of(place / "out").items():
        assert torch.allclose(tensor, base[name] + 0.5 * (one[name] - base[name]), atol=1e-6)
    assert "folder out: 11 tensors" in done.stdout
    assert sorted(f.name for f in place.iterdir()) == ["base", "mine", "one", "out", "two"]  # no logs, no outputs/


def test_a_mistake_ends_the_command_with_its_message(place: Path) -> None:
    done = command(place, "base=base", "tuned=one", "out=out", "merge.anchor=mean")
    assert done.returncode == 2
    assert done.stderr.startswith("error: merge.anchor: is of training")
    assert "Traceback" not in done.stderr


def test_nothing_slow_is_imported() -> None:
    slow = {"transformers", "pytorch_lightning", "wandb", "altair", "datasets"}
    code = f"import sys, itermerge.checkpoints; print(sorted({slow} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_first_rows_are_a_view(place: Path) -> None:
    model = Checkpoint(place / "base")
    cut = model.first_rows({EMBED: 3})
    assert (cut.shapes[EMBED], model.shapes[EMBED]) == ((3, 8), (30, 8))
    assert torch.equal(cut[EMBED], model[EMBED][:3])
    assert cut.renamed(lambda n: f"x.{n}")[f"x.{EMBED}"].shape == (3, 8)

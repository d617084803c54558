"""The recipe of the lab's base model: a small Llama, pretrained from nothing on worked solutions of the lab's families.

    itermerge experiment=pretrain_lab model.seed=3          (seeds 0, 1 and 2 are in the package)

Problems come from the lab's `pretrain` part, which no task draws from. Each solution is written in one of its family's
two styles, chosen at random; in a second, shorter phase at a lower learning rate by unequal weights, so that the model
has a preference between them. The result is a Hugging Face folder with `recipe.json` beside the weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .policy import Policy
from .sft import Example, FitSpec, fit
from .tasks import derive_seed
from .tasks.lab import ALPHABET, corpus
from .weights import write_folder

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocab = {token: i for i, token in enumerate([PAD, EOS, UNK, *ALPHABET])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def model(width: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, seed: int) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings."""
    torch.manual_seed(derive_seed(seed, "init"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256,
            tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip


def pretrain(
    out: Path,
    *,
    seed: int,
    recipe: Mapping[str, Any],
    spec: FitSpec,
    provenance: Mapping[str, Any],
    scratch: Path,
    on_progress: Callable[[int], None] = lambda _: None,
) -> float:
    """Writes the base model of `seed` into the folder `out`; the final epoch's loss (nats a completion token)."""
    start = scratch / "start"
    words = tokenizer()
    fresh = model(
        recipe["width"], recipe["layers"], recipe["heads"], recipe["kv_heads"], recipe["ffn"], len(words), seed
    )
    fresh.save_pretrained(start)
    words.save_pretrained(start)
    policy = Policy(start)
    policy.model.to("cuda" if spec.accelerator == "gpu" else "cpu")
    loss = math.nan
    for name, phase in recipe["phases"].items():
        which = (seed,) if name == "main" else (seed, name)
        pairs = corpus(phase["examples"], recipe["families"], phase["styles"], *which)
        examples = [Example(policy.encode_prompt(p), policy.encode_completion(c)) for p, c in pairs]
        fitted = fit(
            policy, examples, dataclasses.replace(spec, lr=phase["lr"]), seed=derive_seed(*which, "fit"),
            scratch=scratch, on_progress=on_progress,
        )  # fmt: skip
        loss = fitted.losses[-1]
    write_folder(out, policy.weights(), start)
    record = {"seed": seed, **recipe, "batch_size": spec.batch_size, "loss": round(loss, 4)}
    (out / "recipe.json").write_text(json.dumps({**record, **provenance}, indent=2) + "\n")
    return loss


def steps(recipe: Mapping[str, Any], spec: FitSpec) -> int:
    """Optimizer steps of the recipe."""
    return sum(math.ceil(phase["examples"] / spec.batch_size) * spec.epochs for phase in recipe["phases"].values())

"""Layer importance: every estimator against an independent computation, on small random models of many families."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import enliven
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from itermerge.analysis import ESTIMATORS
from itermerge.analysis.change import AnalysisError
from itermerge.analysis.importance import find_blocks, importance
from itermerge.policy import Policy
from itermerge.sft import Example

GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GQA, "qwen2": {"num_key_value_heads": 2}, "qwen3": GQA, "mistral": {"num_key_value_heads": 2},
    "gemma": GQA, "gemma2": GQA, "gemma3_text": GQA, "gpt2": {}, "gpt_neox": {}, "olmo2": {}, "bloom": {},
    "mixtral": GQA | {"num_local_experts": 2}, "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "mamba": {},
}  # fmt: skip
LAYERS = 3


def _model(family: str, layers: int = LAYERS, width: int = 32) -> Any:
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=64, **(special | FAMILIES[family]),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3, generator=draw)
    return model


def _examples(shared: int, n: int = 5) -> list[Example]:
    """Prompts that share their first tokens, of different lengths, as completions are."""
    rng = np.random.default_rng(0)
    head = rng.integers(3, 60, shared).tolist()
    return [
        Example(head + rng.integers(3, 60, 1 + i % 3).tolist(), rng.integers(3, 60, 2 + i).tolist()) for i in range(n)
    ]


def _loss(model: Any, example: Example) -> torch.Tensor:
    """The mean loss of one completion, of one row and nothing else."""
    ids = torch.tensor([[*example.prompt, *example.completion]])
    logits = model(ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
    return nn.functional.cross_entropy(logits, torch.tensor(example.completion))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [1, 12])
def test_skip_and_cosines_against_each_example_alone(family: str, shared: int) -> None:
    """The block's output is put back to its input by a hook, in a pass of its own for each example and block."""
    model, examples = _model(family), _examples(shared)
    got = importance(model, examples, ("skip", "block_influence", "angular"), pad_id=0, batch_size=3)
    blocks = find_blocks(model)
    assert len(blocks) == LAYERS
    for at, example in enumerate(examples):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def watch(_: Any, args: Any, named: Any, out: Any, seen: list[Any] = seen) -> None:
            hidden = args[0] if args else named["hidden_states"]
            seen.append((hidden[0].double(), (out[0] if isinstance(out, tuple) else out)[0].double()))

        def undo(_: Any, args: Any, named: Any, out: Any) -> Any:
            hidden = args[0] if args else named["hidden_states"]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        with torch.no_grad():
            handles = [b.register_forward_hook(watch, with_kwargs=True) for b in blocks]
            whole = float(_loss(model, example))
            for handle in handles:
                handle.remove()
            for layer, block in enumerate(blocks):
                handle = block.register_forward_hook(undo, with_kwargs=True)
                assert got["skip"][at, layer] == pytest.approx(float(_loss(model, example)) - whole, abs=1e-4)
                handle.remove()
        for layer, (before, after) in enumerate(seen):
            where = slice(len(example.prompt) - 1, len(example.prompt) + len(example.completion) - 1)
            cos = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
            assert got["block_influence"][at, layer] == pytest.approx(1 - float(cos[where].mean()), abs=1e-5)
            assert got["angular"][at, layer] == pytest.approx(math.acos(float(cos[where][-1])) / math.pi, abs=1e-4)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_skip_against_a_model_built_without_the_layer(layer: int) -> None:
    model, examples = _model("llama"), _examples(12)
    got = importance(model, examples, ("skip",), pad_id=0)["skip"]
    less = _model("llama", LAYERS - 1)
    weights = {}
    for name, w in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) == layer:
                continue
            parts[2] = str(int(parts[2]) - (int(parts[2]) > layer))
        weights[".".join(parts)] = w
    less.load_state_dict(weights, strict=True)
    with torch.no_grad():
        risen = [float(_loss(less, e) - _loss(model, e)) for e in examples]
    assert got[:, layer] == pytest.approx(risen, abs=1e-5)


def test_taylor_against_finite_differences() -> None:
    """The sum of |g w| over all weights of a small block, by central differences in float64."""
    model = _model("gpt2", 2, width=8).double()  # nothing in it is computed in float32
    (example,) = _examples(4, 1)
    got = importance(model, [example], ("taylor",), pad_id=0)["taylor"]
    total, step = 0.0, 1e-6
    with torch.no_grad():
        for p in find_blocks(model)[1].parameters():
            flat = p.view(-1)
            for i in range(len(flat)):
                w = float(flat[i])
                flat[i] = w + step
                above = float(_loss(model, example))
                flat[i] = w - step
                below = float(_loss(model, example))
                flat[i] = w
                total += abs((above - below) / (2 * step) * w)
    assert got[0, 1] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_taylor_is_of_each_example_alone(family: str) -> None:
    model, examples = _model(family), _examples(6)
    got = importance(model, examples, ("taylor",), pad_id=0)["taylor"]
    for at, example in enumerate(examples):
        model.zero_grad()
        _loss(model, example).backward()
        for layer, block in enumerate(find_blocks(model)):
            want = sum(float((p.grad * p).detach().abs().sum()) for p in block.parameters() if p.grad is not None)
            assert got[at, layer] == pytest.approx(want, rel=1e-4)


def test_batches_change_nothing_and_the_model_stays_as_it_was(tiny: Policy) -> None:
    policy = enliven(copy.copy(tiny))
    before = {name: w.clone() for name, w in policy.weights().items()}
    policy.model.train()
    policy.model.lm_head.weight.requires_grad_(False)
    rows = [("sum 34+18?", "34+18=52#52"), ("sum 3+1?", "3+1=4#4"), ("sum 34+1?", "34+1=35#35")]
    examples = [Example(policy.encode_prompt(p), policy.encode_completion(c)) for p, c in rows]
    done: list[int] = []
    one = importance(policy.model, examples, pad_id=policy.pad_id, batch_size=1, on_progress=done.append)
    all_ = importance(policy.model, examples, pad_id=policy.pad_id, batch_size=8)
    assert sum(done) == 2 * len(examples)
    for name in ESTIMATORS:
        assert one[name].shape == (3, 2)
        assert one[name] == pytest.approx(all_[name], abs=1e-5, rel=1e-4)
    assert all(torch.equal(w, before[name]) for name, w in policy.weights().items())
    assert policy.model.training
    flags = {name: p.requires_grad for name, p in policy.model.named_parameters()}
    assert not flags.pop("lm_head.weight", flags.pop("model.embed_tokens.weight", False))
    assert all(flags.values())
    assert all(p.grad is None for p in policy.model.parameters())
    assert not any("forward" in vars(block) for block in find_blocks(policy.model))
    policy.model.requires_grad_(True).eval()


def test_taylor_holds_one_gradient_at_a_time_and_keeps_those_that_were_there() -> None:
    model = _model("llama")
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    most: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: most.append(sum(q.grad is not None for q in model.parameters())))
    one = importance(model, _examples(1), ("taylor",), pad_id=0)["taylor"]
    assert max(most) <= 1
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert one == pytest.approx(importance(_model("llama"), _examples(1), ("taylor",), pad_id=0)["taylor"])


def test_one_layer_and_one_estimator() -> None:
    got = importance(_model("llama", 1), _examples(9), ("angular",), pad_id=0)
    assert {name: v.shape for name, v in got.items()} == {"angular": (5, 1)}


def test_forward_only_estimators_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama")
    passes = []
    inner = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: passes.append(1) or inner(self, *a, **k))
    importance(model, _examples(1), ("block_influence", "angular"), pad_id=0, batch_size=8)
    assert len(passes) == 1


def test_blocks_that_cannot_be_found_are_said() -> None:
    model = _model("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]])
    with pytest.raises(AnalysisError, match=r"Expected one list of 3 modules.*model\.layers \(1 x LlamaDecoderLayer\)"):
        find_blocks(model)
    with pytest.raises(AnalysisError, match=r"its decoder blocks cannot be found.*analysis\.importance=\[\]"):
        importance(model, _examples(1), pad_id=0)


def test_blocks_that_run_in_another_order_are_said() -> None:
    model = _model("llama")
    last = model.model.layers[2]
    last.register_forward_hook(lambda *_: None)
    inner = last.forward
    model.model.layers[0].forward = lambda hidden, *a, **k: inner(last(hidden, *a, **k), *a, **k)
    with pytest.raises(AnalysisError, match=r"expected to run once each, in order; they ran as \[2, 0, 1, 2\]"):
        importance(model, _examples(1), ("angular",), pad_id=0)


def test_a_loss_that_is_not_finite_is_said() -> None:
    model = _model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(AnalysisError, match=r"importance by skip: the value of layer 0 is not finite in example"):
        importance(model, _examples(1), ("skip",), pad_id=0)

"""Decoding that depends on nothing but prompt and key, whatever is padded, shared or dropped."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import enliven
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from itermerge import attention, decoding
from itermerge.decoding import Completion, complete, draw, uniforms
from itermerge.policy import Policy
from itermerge.tasks import derive_seed
from itermerge.weights import PolicyError

PROMPTS = [
    "add 34+18?", "sum 34+18-15+27?", "sort qhcae?", "count a abcabcabca?", "max 101,305,233?", "find 10+?=44?",
    "shift 2 abc?", "mod 34+18%7?",
]  # fmt: skip
HOW: dict[str, Any] = {"max_new_tokens": 24}


def _greedy_by_hand(policy: Policy, prompt: str, steps: int) -> Completion:
    """One forward pass a token over the whole text: no cache, no padding, no `generate`."""
    ids, made = policy.encode_prompt(prompt), []
    with torch.inference_mode():
        while len(made) < steps and (not made or made[-1] not in policy.eos_ids):
            made.append(int(policy.model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    finished = made[-1] in policy.eos_ids
    text = policy.tokenizer.decode(made[:-1] if finished else made, skip_special_tokens=True)
    return Completion(text, finished, len(made))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_left_padding_does_not_change_greedy_output(lab: Policy, batch_size: int) -> None:
    alone = [_greedy_by_hand(lab, p, 24) for p in PROMPTS]
    assert any(c.finished for c in alone)
    assert complete(lab, PROMPTS, keys=None, batch_size=batch_size, **HOW) == alone


def test_left_padding_does_not_change_a_random_models_output(tiny: Policy) -> None:
    enliven(tiny)
    alone = [_greedy_by_hand(tiny, p, 24) for p in PROMPTS]
    assert len({c.text for c in alone}) > 3
    assert complete(tiny, PROMPTS, keys=None, batch_size=8, **HOW) == alone


HEAD = "sum 34+18-15+27?34+18=52#64 "


def test_a_shared_head_is_computed_once_and_changes_nothing(tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    enliven(tiny)
    prompts = [HEAD + p for p in PROMPTS]
    alone = [_greedy_by_hand(tiny, p, 24) for p in prompts]
    assert len({c.text for c in alone}) > 3
    seen: list[int] = []
    forward = tiny.model.forward

    def count(input_ids: torch.Tensor, **how: Any) -> Any:
        seen.append(input_ids.numel())
        return forward(input_ids=input_ids, **how)

    count.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(tiny.model, "forward", count)
    for batch_size in (1, 3, 8, 40):
        seen.clear()
        assert complete(tiny, prompts, keys=None, batch_size=batch_size, **HOW) == alone
        assert seen[0] == len(HEAD)
        assert max(seen[1:]) <= 8 * max(map(len, PROMPTS))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "mistral", "qwen3", "gemma2", "gemma3_text", "cohere"])
def test_other_architectures_decode_as_by_hand(kind: str, tiny: Policy) -> None:
    """Learned and rotary positions, sliding windows shorter than the text: with a shared head, padding, early ends."""
    small = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256, "vocab_size": len(tiny.tokenizer),
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind in ("mistral", "gemma2", "gemma3_text"):
        small["sliding_window"] = 6
    torch.manual_seed(0)
    tiny.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small)).eval()
    enliven(tiny)
    prompts = [HEAD + p for p in PROMPTS]
    alone = [_greedy_by_hand(tiny, p, 16) for p in prompts]
    assert len({c.text for c in alone}) > 3
    for batch_size in (3, 40):
        assert complete(tiny, prompts, keys=None, batch_size=batch_size, max_new_tokens=16) == alone


def test_the_samples_of_a_problem_share_its_prompt(tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    enliven(tiny)
    sizes: list[int] = []
    forward = tiny.model.forward

    def count(input_ids: torch.Tensor, **how: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **how)

    count.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    prompts, keys = [p for p in PROMPTS for _ in range(3)], list(range(3 * len(PROMPTS)))
    alone = [complete(tiny, [p], keys=[k], batch_size=1, **HOW)[0] for p, k in zip(prompts, keys, strict=True)]
    monkeypatch.setattr(tiny.model, "forward", count)
    monkeypatch.setattr(decoding, "LEAVE_AT", 0)
    assert complete(tiny, prompts, keys=keys, batch_size=100, **HOW) == alone
    assert sizes[:2] == [len(PROMPTS), 3 * len(PROMPTS)]


def test_rows_that_end_leave_the_batch(lab: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = lab.model.forward

    def count(input_ids: torch.Tensor, **how: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **how)

    count.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(lab.model, "forward", count)
    made = complete(lab, PROMPTS, keys=None, batch_size=40, **HOW)  # all lengths in one batch
    assert sizes[0] == 8
    assert len(sizes) == max(c.tokens for c in made)
    alive = [sum(c.tokens > step for c in made) for step in range(len(sizes))]
    assert all(rows * 0.75 <= max(1, n) for rows, n in zip(sizes, alive, strict=True) if n < rows)
    assert sum(sizes) < 1.3 * sum(alive)


def test_the_last_rows_of_a_batch_wait_for_others(lab: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    run, steps, left = decoding._Batches.run, [0], list[int]()
    forward = decoding._Batches._forward

    def watched(self: Any, *given: Any, **how: Any) -> Any:
        left.append(len(waiting := run(self, *given, **how)))
        return waiting

    def counted(self: Any, *given: Any) -> Any:
        steps[0] += 1
        return forward(self, *given)

    monkeypatch.setattr(decoding._Batches, "run", watched)
    monkeypatch.setattr(decoding._Batches, "_forward", counted)
    prompts = [p for p in PROMPTS for _ in range(24)]
    keys = [derive_seed("wait", i) for i in range(len(prompts))]
    how: dict[str, Any] = {"temperature": 2.0, "max_new_tokens": 100}
    ticks: list[int] = []
    pooled = complete(lab, prompts, keys=keys, batch_size=32, on_progress=ticks.append, **how)
    taken, waited = steps[0], sum(left)
    assert waited > 4
    assert (sum(ticks), left[-1]) == (len(prompts), 0)
    monkeypatch.setattr(decoding, "WAIT_AT", 0)
    steps[0], left[:] = 0, []
    assert pooled == complete(lab, prompts, keys=keys, batch_size=32, **how)
    assert not any(left)
    assert taken < 0.9 * steps[0]
    assert [c.entropy for c in pooled] == pytest.approx(
        [c.entropy for c in complete(lab, prompts, keys=keys, batch_size=200, **how)], rel=1e-4
    )


def test_a_prompt_is_read_once_and_nobody_can_change_it(tiny: Policy) -> None:
    first = tiny.encode_prompt("add 1+2?")
    tokenizer, tiny.tokenizer = tiny.tokenizer, None
    again = tiny.encode_prompt("add 1+2?")
    assert again == first
    again.append(0)
    assert tiny.encode_prompt("add 1+2?") == first
    tiny.tokenizer = tokenizer
    assert tiny.encode_prompt("add 1+3?") != first


def test_entropy_is_that_of_the_distributions_drawn_from(lab: Policy) -> None:
    prompts, keys = PROMPTS[:3], [1, 2, 3]
    for prompt, c in zip(prompts, complete(lab, prompts, keys=keys, batch_size=3, temperature=1.7, **HOW), strict=True):
        ids = lab.encode_prompt(prompt)
        text = lab.encode_completion(c.text)[: c.tokens]
        with torch.inference_mode():
            logits = lab.model(torch.tensor([ids + text])).logits[0, len(ids) - 1 : -1]
        p = torch.softmax(logits, -1)
        assert c.entropy == pytest.approx(float(-(p * p.log()).nan_to_num(0).sum()), rel=1e-4)


def test_a_stop_string_may_stand_across_tokens_and_inside_one(tiny: Policy) -> None:
    class Words:
        """Token i is the i-th word."""

        texts: ClassVar[list[str]] = ["<pad>", "<eos>", "a", "\n", "b\nQues", "tion:", "x"]

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(self.texts[i] for i in ids)

    tiny.tokenizer = Words()
    stopper = decoding._Stopper(tiny, ("\nQuestion:", "xx"))
    assert [stopper.ended(t) for t in ([2], [2, 4], [2, 4, 5], [6], [6, 6], [3, 5], [2, 1])] == [
        False, False, True, False, True, False, True,
    ]  # fmt: skip
    assert stopper.read([2, 4, 5], 0.0) == Completion("ab", True, 3)
    assert stopper.read([2, 6], 0.0) == Completion("ax", False, 2)


def test_a_draw_does_not_depend_on_its_batch(lab: Policy) -> None:
    prompts = [p for p in PROMPTS for _ in range(3)]
    keys = [derive_seed("test", i) for i in range(len(prompts))]
    how = HOW | {"temperature": 1.3, "top_p": 0.95}
    together = complete(lab, prompts, keys=keys, batch_size=len(prompts), **how)
    assert len({c.text for c in together}) > len(PROMPTS)  # samples of a problem differ
    alone = [complete(lab, [p], keys=[k], batch_size=1, **how)[0] for p, k in zip(prompts, keys, strict=True)]
    assert together == alone
    backwards = complete(lab, prompts[::-1], keys=keys[::-1], batch_size=5, **how)
    assert backwards[::-1] == together
    other = complete(lab, prompts, keys=[k + 1 for k in keys], batch_size=len(prompts), **how)
    assert other != together


def _draws(logits: list[float], n: int, temperature: float = 1.0, top_p: float = 1.0, position: int = 0) -> np.ndarray:
    """How often each token is drawn, over `n` keys."""
    keys = [derive_seed("frequency", i) for i in range(n)]
    scores = torch.tensor([logits]).repeat(n, 1)
    chosen = draw(scores, np.array(keys, dtype=np.uint64), position, temperature, top_p)
    return np.bincount(chosen.numpy(), minlength=len(logits))


@pytest.mark.parametrize(("temperature", "position"), [(1.0, 0), (0.5, 0), (2.0, 7)])
def test_sampling_frequencies_are_the_softmax_probabilities(temperature: float, position: int) -> None:
    logits = [0.3, -1.2, 1.7, 0.0, -0.4]
    weights = np.exp(np.array(logits) / temperature)
    expected = 20000 * weights / weights.sum()
    chi2 = ((_draws(logits, 20000, temperature, position=position) - expected) ** 2 / expected).sum()
    assert chi2 < 18.47  # 4 degrees of freedom: above it once in 1,000 sets of keys


def test_top_p_keeps_the_smallest_nucleus_and_rescales_it() -> None:
    logits = np.log([0.05, 0.5, 0.15, 0.3]).tolist()
    # 0.5 < 0.6 <= 0.5 + 0.3: tokens 1 and 3 stay, at 0.5 / 0.8 = 0.625 and 0.375
    counts = _draws(logits, 8000, top_p=0.6)
    assert counts[[0, 2]].tolist() == [0, 0]
    assert counts[1] / 8000 == pytest.approx(0.625, abs=4 * (0.625 * 0.375 / 8000) ** 0.5)
    assert _draws(logits, 500, top_p=0.4).tolist() == [0, 500, 0, 0]  # the commonest token alone reaches 0.4
    assert (_draws(logits, 8000, top_p=0.9) > 0).tolist() == [False, True, True, True]  # .5 + .3 + .15 = .95


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    assert _draws([0.0, -torch.inf, 0.0, -torch.inf], 4000)[[1, 3]].tolist() == [0, 0]


def test_uniforms_are_splitmix64() -> None:
    # the published first outputs of SplitMix64 from state 0 (Vigna's reference code)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    zero = np.zeros(1, dtype=np.uint64)
    assert [uniforms(zero, i)[0] for i in range(3)] == [(z >> 11) / 2**53 for z in published]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 10**6))
def test_uniforms_are_in_range_and_depend_on_their_own_key_alone(keys: list[int], position: int) -> None:
    got = uniforms(np.array(keys, dtype=np.uint64), position)
    assert got.dtype == np.float64
    assert bool(((got >= 0) & (got < 1)).all())
    assert [uniforms(np.array([k], dtype=np.uint64), position)[0] for k in keys] == got.tolist()


def test_a_stop_string_ends_a_completion_and_is_cut_off(lab: Policy) -> None:
    prompts = ["sort qhcae?", "sort zyxw?"]  # a worked solution lists letters between commas
    whole = complete(lab, prompts, keys=None, batch_size=2, **HOW)
    assert all("," in c.text for c in whole)
    cut = complete(lab, prompts, keys=None, batch_size=2, stop=(",", "nowhere"), **HOW)
    # one token a character, and one that stopped it
    assert cut == [Completion(c.text.split(",")[0], True, len(c.text.split(",")[0]) + 1) for c in whole]


def test_a_completion_that_meets_the_limit_is_not_finished(lab: Policy) -> None:
    whole = complete(lab, ["sort qhcae?"], keys=None, batch_size=1, **HOW)[0]
    assert whole.finished
    assert whole.tokens == len(whole.text) + 1  # a token a character, and eos
    for limit, finished in ((3, False), (len(whole.text), False), (len(whole.text) + 1, True)):
        short = complete(lab, ["sort qhcae?"], keys=None, batch_size=1, max_new_tokens=limit)[0]
        assert short == Completion(whole.text[:limit], finished, limit)


def test_progress_counts_every_prompt_once(tiny: Policy) -> None:
    ticks: list[int] = []
    complete(tiny, PROMPTS, keys=None, batch_size=3, max_new_tokens=1, on_progress=ticks.append)
    assert sum(ticks) == len(PROMPTS)


def test_a_prompt_that_does_not_fit_is_refused(tiny: Policy) -> None:
    # 10 characters + 247 new tokens = 257 positions, the model has 256
    with pytest.raises(PolicyError, match=r"need 257 positions, the model has 256; lower sampler\.max_new_tokens"):
        complete(tiny, ["add 34+18?"], keys=None, batch_size=1, max_new_tokens=247)


def _of(kind: str, tiny: Policy, **more: Any) -> Policy:
    small = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "vocab_size": len(tiny.tokenizer),
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, **more,
    }  # fmt: skip
    torch.manual_seed(0)
    tiny.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small)).eval()
    return enliven(tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "cohere"])
def test_the_head_is_split_off_where_that_gives_the_models_own_logits(
    kind: str, dtype: torch.dtype, tiny: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every logit of a whole decoding, against a forward pass over the whole text; and no cache holds the head."""
    policy, seen, asked = _of(kind, tiny), [], []
    policy.model.to(dtype)
    real, update = decoding.draw, decoding._Room.update

    def spy(scores: torch.Tensor, keys: Any, position: int, *how: Any) -> torch.Tensor:
        seen.append((scores, real(scores, keys, position, *how)))
        return seen[-1][1]

    def count(self: Any, *states: torch.Tensor) -> Any:
        asked.append(self.capacity)
        return update(self, *states)

    monkeypatch.setattr(decoding, "draw", spy)
    monkeypatch.setattr(decoding._Room, "update", count)
    prompts = [HEAD + p for p in sorted(PROMPTS[:3], key=len)]  # as they go into the batch
    made = complete(policy, prompts, keys=[1, 2, 3], batch_size=16, max_new_tokens=6)
    assert decoding._SPLIT[(type(policy.model), dtype, policy.model.config.to_json_string())]
    assert max(asked) == max(map(len, PROMPTS[:3])) + 6  # a token a character
    tolerance, checked = 2e-5 if dtype == torch.float32 else 0.06, 0
    texts = [policy.encode_prompt(p) for p in prompts]
    for scores, chosen in seen:
        if len(scores) < len(texts):
            break  # a row has left, and others have changed places
        for at, text in enumerate(texts):
            with torch.inference_mode():
                own = policy.model(torch.tensor([text])).logits[0, -1]
            assert float((scores[at] - own).abs().max()) <= tolerance * float(own.abs().max())
            text.append(int(chosen[at]))
            checked += 1
    assert checked > len(texts)
    assert all(c.tokens for c in made)


def test_a_model_with_more_in_its_attention_keeps_its_own(tiny: Policy) -> None:
    policy = _of("gemma2", tiny, attn_logit_softcapping=2.0, sliding_window=512, layer_types=["full_attention"] * 2)
    policy.model.config._attn_implementation = "sdpa"  # which drops the cap; ours refuses it
    with pytest.raises(attention.Unsupported, match="softcap"), attention.decoding(policy.model, {}):
        policy.model(torch.tensor([policy.encode_prompt(HEAD)]))
    policy.model.config._attn_implementation = "eager"
    alone = [_greedy_by_hand(policy, HEAD + p, 8) for p in PROMPTS]
    assert complete(policy, [HEAD + p for p in PROMPTS], keys=None, batch_size=8, max_new_tokens=8) == alone


def test_attention_that_gives_other_logits_is_not_used(tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = _of("llama", tiny, rope_theta=123.0)
    alone = [_greedy_by_hand(policy, HEAD + p, 8) for p in PROMPTS]
    real = attention._flash

    def wrong(query: torch.Tensor, *rest: Any) -> Any:
        out, weight = real(query, *rest)
        return out, weight + 1

    monkeypatch.setattr(attention, "_flash", wrong)
    assert complete(policy, [HEAD + p for p in PROMPTS], keys=None, batch_size=8, max_new_tokens=8) == alone
    assert decoding._SPLIT[(type(policy.model), torch.float32, policy.model.config.to_json_string())] is False
    assert policy.model.config._attn_implementation == "sdpa"


def test_rows_from_the_end_fill_the_holes() -> None:
    room = decoding._Room(4, 6, {})
    states = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 3, 2).contiguous()
    room.update(states, -states)
    room.pack(3, torch.tensor([1]), torch.tensor([4]))
    assert room.keys[:, 0, 0, 0].tolist() == [0, 4, 2]
    assert room.values[:, 0, 2, 1].tolist() == [0, -4, -2]
    assert room.keys.shape == (3, 1, 3, 2)
    room.update(states[:3, :, :1], states[:3, :, :1])
    assert room.keys[1, 0, :, 0].tolist() == [4, 4, 4, 1]


def test_batches_lie_in_the_same_memory_one_after_the_other() -> None:
    memory: dict[int, torch.Tensor] = {}
    states = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 3, 4)

    def room(rows: int, capacity: int = 5) -> decoding._Room:
        made = decoding._Room(capacity, rows, memory)
        made.update(states + rows, -states)
        if rows > 2:
            assert not {x.data_ptr() for x in memory.values()} & {x.data_ptr() for x in made.room}
            made.batch_select_indices(torch.tensor([0] * (rows - 2) + [1, 1]))
        return made

    first = room(6)
    assert first.keys[:, 0, 2, 3].tolist() == [6, 6, 6, 6, 7, 7]
    assert first.values[:, 0, 2, 3].tolist() == [0, 0, 0, 0, -1, -1]
    assert [x.shape for x in first.room] == [(6, 1, 5, 4)] * 2
    at = [memory[i].data_ptr() for i in (0, 1)]
    for rows, capacity in ((5, 5), (2, 4), (6, 5)):
        second = room(rows, capacity)
        assert [x.data_ptr() for x in second.room] == at
        assert [x.shape for x in second.room] == [(rows, 1, capacity, 4)] * 2
        expected = [rows] * (rows - 2) + [rows + 1] * 2 if rows > 2 else [2, 3]
        assert second.keys[:, 0, 0, 0].tolist() == expected
    assert room(6, 6).keys[:, 0, 0, 0].tolist() == [6, 6, 6, 6, 7, 7]
    assert memory[0].numel() == 6 * 6 * 4


def test_the_head_multiplies_the_last_positions_of_all_rows_at_once(tiny: Policy) -> None:
    """Not as a slice of longer rows: torch would copy the head for each of them. And the model is left as it was."""
    head, seen = tiny.model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, given, made: seen.append((tuple(given[0].shape), given[0].is_contiguous())))
    complete(tiny, ["sum 1+2?", "sum 3+4?", "max 1,2,30?"], keys=None, max_new_tokens=3, batch_size=8)
    assert {shape[1] for shape, _ in seen} == {1}
    assert max(shape[0] for shape, _ in seen) == 2
    assert all(contiguous for _, contiguous in seen)
    assert not head._forward_pre_hooks

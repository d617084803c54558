"""Whether prompts fit is told at the start of a run: of every round, of the teacher, of hints, and of OOD items that
are solved."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, compose_config
from transformers import AutoTokenizer

from itermerge.config import check
from itermerge.stages import Bench
from itermerge.store import Store
from itermerge.tasks import TaskError
from itermerge.weights import PolicyError

LAB = tuple(word for word in SMALL if not word.startswith("task."))
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def start(tmp_path: Path, tiny_folder: Path) -> Callable[..., Bench]:
    """A run up to its first stage, of the tiny model (a token a character, 256 of them)."""

    def make(*words: str, small: tuple[str, ...] = SMALL) -> Bench:
        cfg = check(compose_config(*small, "model=hf", f"model.path={tiny_folder}", *words))
        with Store(tmp_path / "store", {}) as store:
            return Bench(cfg, store, tmp_path)

    return make


def _sums(folder: Path) -> str:
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps({"q": f"{i} + {i}?", "a": str(2 * i)}) + "\n" for i in range(200)))
    return str(file)


def _hub(folder: Path) -> tuple[str, ...]:
    return (
        *LAB, "task=hub", f"task.path={_sums(folder)}", "task.question=q", "task.answer=a", "task.verifier=numeric",
        "task.splits.test=train", "task.n_train=8", "task.n_validation=8", "sft.max_length=200",
    )  # fmt: skip


def test_problems_of_all_rounds(start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    own = Bench._draw_train

    def longer(self: Bench, which: Any) -> Any:
        first, *others = own(self, which)
        return [dataclasses.replace(first, **{key: "x" * 100}) if which == ("fresh", 2) else first, *others]

    monkeypatch.setattr(Bench, "_draw_train", longer)
    key = "prompt"
    start("sampler.max_new_tokens=200")
    start("sampler.max_new_tokens=200", "task.problems=fresh", "rounds=1")
    with pytest.raises(TaskError, match=r"task 'train/find': its longest prompt has 100 tokens .* is 200, .* 256"):
        start("sampler.max_new_tokens=200", "task.problems=fresh")
    key = "train_prompt"
    with pytest.raises(
        TaskError, match=r"its longest training prompt of round 2 has 100 tokens, sft\.max_length is 90"
    ):
        start("sft.max_length=90", "task.problems=fresh")


def test_prompts_with_hints(start: Callable[..., Bench]) -> None:
    start("sampler.max_new_tokens=240")  # 16 of the longest prompt
    with pytest.raises(TaskError, match=r"its longest prompt with a hint \(sampler\.hints\) has \d\d tokens"):
        start("sampler.max_new_tokens=240", "sampler.hints=2")


def test_the_teachers_context(start: Callable[..., Bench], write_variant: Callable[..., Path]) -> None:
    small = write_variant({"config.json": {"max_position_embeddings": 45}})
    words = ("teacher=hf", f"teacher.path={small}")
    start(*words, "sampler.max_new_tokens=31")  # 14 of the prompt
    with pytest.raises(TaskError, match=r"teacher=hf: task 'train/find': its longest prompt has 14 .* context of 45"):
        start(*words, "sampler.max_new_tokens=32")


def test_the_teachers_chat_template(start: Callable[..., Bench], tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "chats")
    words = AutoTokenizer.from_pretrained(tmp_path / "chats")
    words.chat_template = CHAT
    words.save_pretrained(tmp_path / "chats")
    how = (f"model.path={tmp_path}/chats", "task.prompt=chat", "teacher=hf")
    start(*how, f"teacher.path={tmp_path}/chats", small=_hub(tmp_path))
    with pytest.raises(PolicyError, match=r"^teacher=hf: the tokenizer in .* has no chat template"):
        start(*how, f"teacher.path={tiny_folder}", small=_hub(tmp_path))


def test_ood_items_that_are_solved_with_more_worked_examples(start: Callable[..., Bench], tmp_path: Path) -> None:
    task = (
        f"{{kind: hub, path: {_sums(tmp_path)}, question: q, answer: a, verifier: numeric, shots: 2, eval_shots: 0, "
        "shots_file: word_problems, splits: {test: train}}"
    )
    start(f"suite.near=[{task}]")
    with pytest.raises(TaskError, match=r"task 'sums': its longest prompt has \d\d\d tokens"):
        start(f"suite.near=[{task}]", "analysis.ood=true")


def test_solutions_that_may_be_too_long(start: Callable[..., Bench], caplog: pytest.LogCaptureFixture) -> None:
    """14 of the prompt, 32 of the sample and an end."""
    for words in (("sft.max_length=47",), ("sft.max_length=46", "sft.too_long=drop")):
        start(*words)
        assert "sft.too_long" not in caplog.text
    with caplog.at_level(logging.WARNING):
        start("sft.max_length=46")
    assert "may have 47, and sft.max_length is 46" in caplog.text
    assert "leave those out with sft.too_long=drop" in caplog.text

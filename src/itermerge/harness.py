"""Tasks of lm-evaluation-harness (the extra `lm_eval`) beside ours: kind `lm_eval` in suite.near and suite.far.

The harness gets the live model, its tokenizer and the batch size; it builds the prompts, reads the answers and judges
them. What comes back is 0 or 1 an item, in the form of `evaluation.greedy_scores`, so that intervals, pairing and
bootstrap are those of our own tasks. Items are drawn once, by `seed`, and are the same for every model.

It has its own random numbers, log levels and output: nothing of that reaches the rest of a run.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .evaluation import count_reasons, majority
from .policy import Policy
from .tasks import NoData, TaskError, derive_seed

SEED = 1234  # of few-shot examples and of whatever a task draws: lm_eval's own default
NEW_TOKENS = 256  # of a generation whose task sets no limit: lm_eval's own default
# Where a task's data lie, which is no part of what they are: the items themselves enter the key.
_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")


class HarnessExam:
    """`n` items of one lm_eval task under a label.

    `metric` is one of the task's that is 0 or 1 an item (`acc`, `acc_norm`, `exact_match`), with its filter where there
    are several (`exact_match,strict-match`); `num_fewshot` is the task's own where None; `include_path` is a folder of
    task files beside lm_eval's. Raises TaskError, with the way out, where lm_eval or the task is not there, the task is
    a group, has no such metric, or would run code.
    """

    def __init__(
        self, label: str, task: str, metric: str, *, n: int, seed: int, num_fewshot: int | None = None,
        include_path: str | None = None,
    ) -> None:  # fmt: skip
        require()
        self.label, self.name = label, task
        self.metric, _, self.filter = metric.partition(",")
        with _apart():
            loaded = self._load(include_path)
            (self.key,) = loaded["tasks"]
            self.task: Any = loaded["tasks"][self.key]
            self._check()
            if num_fewshot is not None:
                self.task.set_config(key="num_fewshot", value=num_fewshot)
            count = len(self.task.eval_docs)
            draw = random.Random(derive_seed(seed, "lm_eval", task))
            self.items = sorted(draw.sample(range(count), min(n, count)))
        with _apart():
            self.requests, self.targets = self._build()
            self.digest = self._digest()

    def _load(self, include_path: str | None) -> Mapping[str, Any]:
        if include_path is not None and not Path(include_path).expanduser().is_dir():
            raise TaskError(f"suite, lm_eval task {self.name!r}: include_path: there is no folder {include_path}")
        own = None if include_path is None else str(Path(include_path).expanduser().resolve())
        manager = _manager(own, whole=own is None)
        if own is not None and self.name not in manager.all_subtasks:
            manager = _manager(own, whole=True)
        if self.name not in manager.task_index:
            from difflib import get_close_matches

            close = get_close_matches(self.name, manager.all_subtasks, 3)
            raise TaskError(
                f"suite, lm_eval task {self.name!r}: lm_eval {version('lm_eval')} has none of this name"
                + (f"; did you mean {' or '.join(close)}?" if close else "; `lm-eval ls tasks` lists them")
                + " Task files of your own: include_path=DIR"
            )
        if self.name not in manager.all_subtasks:
            raise TaskError(
                f"suite, lm_eval task {self.name!r}: is a group of tasks; name the ones that you want, each with a "
                "line of its own"
            )
        try:
            return manager.load([self.name])
        except Exception as error:  # of its YAML, of `datasets`, of the hub
            raise NoData(
                f"suite, lm_eval task {self.name!r}: could not be loaded ({type(error).__name__}: {error}). Its data "
                "come from the Hugging Face hub unless its YAML names local files: check the network, or HF_HUB_OFFLINE"
            ) from error

    def _check(self) -> None:
        """Whether the task can be run here, and has the metric."""
        task, at = self.task, f"suite, lm_eval task {self.name!r}"
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"{at}: runs code that a model wrote, which is never done here")
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"{at}: has pictures or sounds; only text is evaluated")
        ways = task.aggregation()
        means = [name for name, way in ways.items() if getattr(way, "__name__", "") == "mean"]
        if self.metric not in ways:
            raise TaskError(f"{at}: metric: {self.metric!r} is none of its {', '.join(ways)}")
        if self.metric not in means:
            raise TaskError(
                f"{at}: metric: {self.metric} is no mean over items, each right or wrong"
                + (f"; take one of {', '.join(means)}" if means else "; this task has none that is")
            )
        filters = [f.name for f in getattr(task, "_filters", [])] or ["none"]
        if self.filter and self.filter not in filters:
            raise TaskError(f"{at}: metric: there is no filter {self.filter!r}; it has {', '.join(filters)}")
        if not self.filter and len(filters) > 1:
            said = " or ".join(f"'{self.metric},{name}'" for name in filters)
            raise TaskError(f"{at}: metric: answers are read in several ways; write {said}")
        self.filter = self.filter or filters[0]

    def _build(self) -> tuple[list[Any], list[Any]]:
        """(requests, targets), as every evaluation will have them."""
        self.task.set_fewshot_seed(seed=SEED)
        try:
            self.task.build_all_requests(samples=self.items)
        except Exception as error:  # few-shot examples from a split that is not there, a template's mistake
            raise TaskError(
                f"suite, lm_eval task {self.name!r}: its prompts could not be made "
                f"({type(error).__name__}: {error}); check num_fewshot and the task's YAML"
            ) from error
        docs = self.task.doc_iterator(samples=self.items)
        return list(self.task.instances), [self.task.doc_to_target(doc) for _, doc in docs]

    def _digest(self) -> str:
        """Of the items as the model reads them, their targets, and how answers are read and judged."""
        config = {k: v for k, v in self.task.dump_config().items() if k not in _PLACES}
        asked = [[r.request_type, r.doc_id, r.idx, r.repeats, r.args] for r in self.requests]
        what = [version("lm_eval"), self.task.VERSION, config, asked, self.targets, self.metric, self.filter]
        text = json.dumps(what, sort_keys=True, default=lambda value: type(value).__name__)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_lengths(self, policy: Policy) -> None:
        """Raises TaskError when an item does not fit into the model's context: the harness would cut its beginning. Not
        known without a tokenizer, as a plan may be."""
        if policy.tokenizer is None:
            return
        from lm_eval.models.utils import normalize_gen_kwargs

        for request in self.requests:
            if request.request_type not in ("loglikelihood", "generate_until"):
                continue  # rolling windows fit any context
            prompt, rest = request.args
            tokens = len(policy.tokenizer(prompt)["input_ids"])
            if request.request_type == "generate_until":
                new = normalize_gen_kwargs(rest, NEW_TOKENS).get("max_gen_toks", NEW_TOKENS)
            else:
                new = len(policy.tokenizer(rest, add_special_tokens=False)["input_ids"])
            if tokens + new > policy.context:
                raise TaskError(
                    f"suite, lm_eval task {self.name!r}: an item has a prompt of {tokens} tokens and {new} for its "
                    f"answer, together more than the model's context of {policy.context}; lower num_fewshot, or take "
                    "another task"
                )

    def scores(self, policy: Policy, batch_size: int, on_progress: Callable[[int], None]) -> dict[str, Any]:
        """{n, correct, reasons, majority} of the policy's model as it is, as `greedy_scores` has them; items in the
        order of the data. Raises TaskError where the metric is not 0 or 1 an item."""
        from lm_eval import evaluator

        with _apart(), _plain_generation(policy):
            live = _live(policy, batch_size, _Ticks(len(self.requests), len(self.items), on_progress))
            self.task.set_fewshot_seed(seed=SEED)
            found: Any = evaluator.evaluate(
                live, {"tasks": {self.key: self.task}, "groups": {}, "group_map": {}},
                samples={self.key: self.items}, bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
        rows = [row for row in found["samples"][self.key] if row["filter"] == self.filter]
        rows.sort(key=lambda row: row["doc_id"])
        values = [row[self.metric] for row in rows]
        if odd := [v for v in values if not isinstance(v, bool | int | float | np.number) or v not in (0, 1)]:
            raise TaskError(
                f"suite, lm_eval task {self.name!r}: metric: {self.metric} gives {odd[0]!r} for an item; what is "
                "neither right (1) nor wrong (0) has no interval here. Take acc, acc_norm or exact_match"
            )
        correct = [int(v) for v in values]
        return {
            "n": len(correct), "correct": correct,
            "reasons": count_reasons(["correct" if c else "wrong" for c in correct]),
            "majority": majority([json.dumps(row["target"], default=str) for row in rows]),
        }  # fmt: skip


def harness_scores(
    policy: Policy, exams: Sequence[HarnessExam], *, batch_size: int, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    """{label: {n, correct, reasons, majority}}, beside those of `evaluation.greedy_scores`."""
    return {exam.label: exam.scores(policy, batch_size, on_progress) for exam in exams}


def require() -> None:
    """Raises TaskError without the extra."""
    if not find_spec("lm_eval"):
        raise TaskError("suite: tasks of kind lm_eval need the extra 'lm_eval': pip install 'itermerge[lm_eval]'")


class _Ticks:
    """Counts requests, which the harness tells to the hook of its cache, and tells items."""

    def __init__(self, requests: int, items: int, on_progress: Callable[[int], None]) -> None:
        self.requests, self.items, self.tell = requests, items, on_progress
        self.seen = self.told = 0

    def add_partial(self, *_: Any) -> None:
        self.seen += 1
        now = min(self.items, self.seen * self.items // self.requests)
        if now > self.told:
            self.tell(now - self.told)
            self.told = now


def _live(policy: Policy, batch_size: int, ticks: _Ticks) -> Any:
    """The policy as the harness wants a model. The tokenizer is a copy: the harness sets its padding."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(policy.tokenizer)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(policy.eos_ids[0])
    make: Any = HFLM
    live = make(pretrained=policy.model, tokenizer=tokenizer, batch_size=batch_size, max_length=policy.context)
    live.set_cache_hook(ticks)
    return live


@contextmanager
def _plain_generation(policy: Policy) -> Iterator[None]:
    """Without the sampling, penalties and limits of the model's generation config: tasks have their own."""
    from transformers import GenerationConfig

    own = policy.model.generation_config
    policy.model.generation_config = GenerationConfig(
        eos_token_id=policy.eos_ids, pad_token_id=policy.pad_id, bos_token_id=own.bos_token_id
    )
    try:
        yield
    finally:
        policy.model.generation_config = own


@contextmanager
def _apart() -> Iterator[None]:
    """The harness by itself: fixed seeds, no bars, no log lines; everything outside stays as it was."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    env, logger = dict(os.environ), logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        with redirect_stderr(io.StringIO()):  # not stdout, where our own bar is
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        for name in os.environ.keys() - env.keys():
            del os.environ[name]
        os.environ.update(env)
        logger.setLevel(level)


@cache
def _manager(include_path: str | None, *, whole: bool) -> Any:
    """lm_eval's index of tasks, some ten thousand files, which take ten seconds: read once a process; or of the user's
    own folder alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=whole)

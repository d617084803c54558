"""What reviewers ask for beside merging: hints, votes, pulls to the base, replay, early stopping, teachers; their
presets, and cases in sweeps."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, compose_config, itermerge, read_rounds, run_here

from itermerge import stages
from itermerge.config import ConfigError, check, conf_dir
from itermerge.evaluation import elect
from itermerge.policy import Policy
from itermerge.sft import IGNORED, Example, FitSpec, Fitted, _TowardsBase, fit, token_divergence
from itermerge.tasks import TaskError
from itermerge.tasks.lab import LabTask, part_of

ONE = ("rounds=1", "suite.pass_k_n=0", "analysis.importance=[]", "analysis.kl_n=0", "analysis.train_n=0")
CHAIN = ("task.family=chain", "suite.near=[{kind: lab, family: pair}]")  # which the base solves now and then
SPEC = FitSpec(
    epochs=3, lr=1e-2, batch_size=2, schedule="constant", warmup_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.999),
    max_length=64, accelerator="cpu", devices=1, precision="32-true", accumulate_grad_batches=1, gradient_clip_val=0.0,
    deterministic=True,
)  # fmt: skip


def lines(folder: Path, name: str, number: int = 1) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "rounds" / f"{number:02d}" / name).read_text().splitlines()]


def _examples(policy: Policy) -> list[Example]:
    pairs = zip("abcd", "efgh", strict=True)
    return [Example(policy.encode_prompt(p), policy.encode_completion(c)) for p, c in pairs]


def _fit(policy: Policy, scratch: Path, **changes: Any) -> tuple[Fitted, float]:
    """A fit from the policy's weights, which are the base, and how far it went."""
    base = {n: w.clone() for n, w in policy.weights().items()}
    score: Callable[[], float] | None = changes.pop("score", None)
    examples = [
        Example(policy.encode_prompt(p), policy.encode_completion(c)) for p, c in zip("abcd", "efgh", strict=True)
    ]
    fitted = fit(
        policy, examples, dataclasses.replace(SPEC, **changes), seed=0, scratch=scratch, base=base, score=score
    )
    moved = sum(float((w - base[n]).square().sum()) for n, w in policy.weights().items())
    policy.set_weights(base)
    return fitted, math.sqrt(moved)


# --- pulls to the base ----------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    """KL of (3/4, 1/4) from (1/2, 1/2) is 3/4 log 3/2 + 1/4 log 1/2; of equal ones 0; the ignored does not count."""
    odds = math.log(3.0)
    logits = torch.tensor([[[odds, 0.0], [1.0, 1.0], [90.0, 0.0]]])
    base = torch.zeros(1, 3, 2)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.0) / 2
    assert float(token_divergence(logits, base, torch.tensor([[0, 1, IGNORED]]))) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_half_the_squared_distance_is_added() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -1.0]]))
    layer.weight.grad = torch.tensor([[0.5, 0.5]])
    callback = _TowardsBase(layer, {"weight": torch.tensor([[1.0, 0.0]])}, 0.25)
    callback.on_fit_start(None, None)  # pyright: ignore[reportArgumentType]
    callback.on_before_optimizer_step(None, None, None)  # pyright: ignore[reportArgumentType]
    assert layer.weight.grad.tolist() == [[0.5 + 0.25 * 2.0, 0.5 + 0.25 * -1.0]]


@pytest.mark.parametrize("key", ["l2_to_base", "kl_to_base"])
def test_a_pull_to_the_base_holds_weights_and_predictions_back(tiny: Policy, tmp_path: Path, key: str) -> None:
    free, far = _fit(tiny, tmp_path, kl_to_base=1e-9)
    held, near = _fit(tiny, tmp_path, **{"kl_to_base": 1e-9, key: 20.0})
    if key == "l2_to_base":
        assert near < 0.7 * far
    assert held.kl[-1] < 0.5 * free.kl[-1]
    assert len(free.kl) == len(free.losses) == 3
    assert 0 <= free.kl[0] < free.kl[1] < free.kl[2]


def test_without_a_pull_a_fit_is_what_it_was(tiny: Policy, tmp_path: Path) -> None:
    (plain, far), (tiny_pull, near) = _fit(tiny, tmp_path), _fit(tiny, tmp_path, kl_to_base=1e-12)
    assert plain.kl == []
    assert plain.losses == pytest.approx(tiny_pull.losses, rel=1e-6)
    assert far == pytest.approx(near, rel=1e-4)


# --- early stopping -------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_kept_and_the_fit_ends_after_patience(tiny: Policy, tmp_path: Path) -> None:
    told, seen = iter([0.1, 0.5, 0.5, 0.4, 0.9]), []
    base = {n: w.clone() for n, w in tiny.weights().items()}

    def score() -> float:
        assert not tiny.model.training
        seen.append({n: w.clone() for n, w in tiny.weights().items()})
        return next(told)

    spec = dataclasses.replace(SPEC, epochs=5, patience=2)
    fitted = fit(tiny, _examples(tiny), spec, seed=0, scratch=tmp_path, base=base, score=score)
    assert (fitted.scores, fitted.epoch, len(fitted.losses)) == ([0.1, 0.5, 0.5, 0.4], 2, 4)
    for name, w in tiny.weights().items():
        assert torch.equal(w, seen[1][name]), name
    assert any(not torch.equal(seen[1][n], seen[3][n]) for n in base)


def test_a_run_stops_early_by_its_validation_accuracy(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "baseline=early_stop", *ONE, "sft.epochs=4", f"store.dir={tmp_path}/store")
    first, last = read_rounds(tmp_path / "run")
    assert 1 <= last["sft/epoch"] <= 4
    (made,) = (tmp_path / "store" / "fit").rglob("manifest.json")
    facts = json.loads(made.read_text())["facts"]
    assert max(facts["scores"]) == facts["scores"][facts["epoch"] - 1] == last["val/id/acc"]  # of what was kept
    assert first["val/id/acc"] > 0


# --- votes ----------------------------------------------------------------------------------------------------------


def test_election_by_hand() -> None:
    assert elect(["7", "7", "8"]) == "7"
    assert elect(["7", "8", None, "8", "9"]) == "8"
    assert elect(["7", "7", "8", "8"]) is None  # no majority
    assert elect(["7", "8"]) is None  # nobody agrees
    assert elect([None, None]) is None
    assert elect([]) is None


def test_with_majority_labels_gold_answers_choose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(
        tmp_path / "run", "baseline=majority", *ONE, *CHAIN, "task.max_solutions=null"
    )  # fmt: skip
    samples, examples = lines(tmp_path / "run", "samples.jsonl"), lines(tmp_path / "run", "examples.jsonl")
    votes: dict[str, Counter[str]] = {}
    for s in samples:
        votes.setdefault(s["id"], Counter()).update([s["answer"]] if s["answer"] is not None else [])
    elected = {i: elect([*c.elements()]) for i, c in votes.items()}
    expected = {
        (s["id"], s["completion"]) for s in samples if s["answer"] is not None and elected[s["id"]] == s["answer"]
    }
    assert {(e["id"], e["completion"]) for e in examples} == expected
    assert any(not s["verdict"] for s in samples if (s["id"], s["completion"]) in expected)  # a wrong label was learnt

    # with other gold answers the same examples
    def wrong(self: LabTask, *args: Any) -> list[Any]:
        return [dataclasses.replace(p, answer="0", gold="#0") for p in drawn(self, *args)]

    drawn = LabTask.problems
    monkeypatch.setattr(LabTask, "problems", wrong)
    run_here(
        tmp_path / "wrong", "baseline=majority", *ONE, *CHAIN, "task.max_solutions=null"
    )  # fmt: skip
    assert lines(tmp_path / "wrong", "examples.jsonl") == examples
    line = read_rounds(tmp_path / "run")[1]
    labelled = {i for i, answer in elected.items() if answer is not None}
    gold = {s["id"]: s["gold"] for s in samples}
    assert line["train_sample/labelled"] == len(labelled) / len(votes)
    assert line["train_sample/label_acc"] == sum(elected[i] == gold[i] for i in labelled) / len(labelled)


# --- hints ----------------------------------------------------------------------------------------------------------


def test_importance_is_measured_on_the_bases_own_solutions_without_hints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hints the same examples as without; with a teacher those of a run without one."""
    seen: list[list[str]] = []

    def spy(self: Any, solutions: Any, name: str = "importance") -> Any:
        seen.append(sorted({s["prompt"] for s in solutions}))
        return measured(self, solutions, name)

    measured = stages.Bench.importance
    monkeypatch.setattr(stages.Bench, "importance", spy)
    own = (*CHAIN, "rounds=1", "suite.pass_k_n=0", "analysis.importance=[block_influence]", "analysis.kl_n=0")
    for number, more in enumerate([[], ["sampler.hints=30"], ["teacher=lab", "teacher.seed=1"]]):
        run_here(tmp_path / str(number), *own, "sampler.n=2", *more)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]
    assert not any("#" in prompt for prompt in seen[0])


def test_hints_are_for_unsolved_problems_and_not_learnt(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "baseline=star_hints", *ONE, "sampler.n=1", "sampler.hints=30", *CHAIN)
    samples, examples = lines(tmp_path / "run", "samples.jsonl"), lines(tmp_path / "run", "examples.jsonl")
    plain, hinted = ([s for s in samples if s.get("hint", False) is h] for h in (False, True))
    solved = {s["id"] for s in plain if s["verdict"]}
    assert len(plain) == 16
    assert len(hinted) == 30 * (16 - len(solved)) > 0
    assert not solved & {s["id"] for s in hinted}
    assert all(s["prompt"] == f"{s['gold']}#{s['id']}" for s in hinted)
    assert all(e["prompt"] == e["id"] for e in examples)
    line = read_rounds(tmp_path / "run")[1]
    by_hint = [e for e in examples if e.get("hint")]
    assert line["train_sample/hinted"] == len(by_hint) == len({s["id"] for s in hinted if s["verdict"]}) > 0
    assert line["train_sample/accept_rate"] == len(solved) / 16
    assert line["train_sample/examples"] == len(solved) + len(by_hint)


# --- replay ---------------------------------------------------------------------------------------------------------


def test_replayed_examples_are_a_share_of_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the part that the bases were pretrained on, which no task draws from."""
    learnt: list[Example] = []

    def spy(policy: Policy, examples: list[Example], *rest: Any, **how: Any) -> Fitted:
        learnt.extend(examples)
        texts.extend(policy.tokenizer.decode(e.prompt) for e in examples)
        return fit(policy, examples, *rest, **how)

    texts: list[str] = []
    monkeypatch.setattr(stages, "fit", spy)
    run_here(tmp_path / "run", "baseline=replay", *ONE, "sft.replay_share=0.5", f"store.dir={tmp_path}/store")
    line = read_rounds(tmp_path / "run")[1]
    old = [text for text in texts if part_of(text) == "pretrain"]
    assert line["sft/replayed"] == line["train_sample/examples"] == len(old) == len(learnt) / 2
    assert len({text.split()[0] for text in old}) > 3  # of several families


def test_replay_from_a_file_takes_what_it_has_and_names_bad_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "replay.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"find {n}+?=99?", "completion": f"#{99 - n}"}) + "\n" for n in (11, 12))
    )
    run_here(tmp_path / "run", *ONE, f"sft.replay={file}", "sft.replay_share=0.5")
    assert read_rounds(tmp_path / "run")[1]["sft/replayed"] == 2
    assert "examples were wanted" in caplog.text
    long = {"prompt": "find 11+?=99?", "completion": "1" * 300}
    with file.open("a") as more:
        more.write(json.dumps(long) + "\n")
    run_here(tmp_path / "long", *ONE, f"sft.replay={file}", "sft.replay_share=0.5")
    assert "1 have more than 256 tokens" in caplog.text  # before anything is computed, and left out
    assert read_rounds(tmp_path / "long")[1]["sft/replayed"] == 2
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=r"^sft\.replay: .*replay\.jsonl, line 2: expected .*completion"):
        run_here(tmp_path / "bad", *ONE, f"sft.replay={file}", "sft.replay_share=0.5")
    with pytest.raises(ConfigError, match=r"^sft\.replay: there is no file .*none\.jsonl"):
        run_here(tmp_path / "none", *ONE, f"sft.replay={tmp_path}/none.jsonl", "sft.replay_share=0.5")


# --- teachers -------------------------------------------------------------------------------------------------------


def test_a_teacher_solves_the_problems_and_the_student_learns(tmp_path: Path) -> None:
    """The solutions are those that the teacher would practise on itself; a file of them teaches the same."""
    run_here(tmp_path / "taught", *ONE, "teacher=lab", "teacher.seed=1")
    run_here(tmp_path / "itself", *ONE, "model.seed=1")
    taught = lines(tmp_path / "taught", "samples.jsonl")
    assert taught == lines(tmp_path / "itself", "samples.jsonl")
    written = tmp_path / "solutions.jsonl"
    written.write_text("".join(json.dumps({"question": s["id"], "completion": s["completion"]}) + "\n" for s in taught))
    run_here(tmp_path / "file", *ONE, "teacher=file", f"teacher.path={written}")
    assert lines(tmp_path / "file", "examples.jsonl") == lines(tmp_path / "taught", "examples.jsonl")
    last = [read_rounds(tmp_path / name)[1] for name in ("taught", "file", "itself")]
    assert last[0]["sft/loss"] == last[1]["sft/loss"] != last[2]["sft/loss"]
    assert last[0]["id/acc"] == last[1]["id/acc"]


def test_a_teachers_file_must_hold_some_of_the_problems(tmp_path: Path) -> None:
    written = tmp_path / "solutions.jsonl"
    written.write_text(json.dumps({"question": "another one", "completion": "#1"}) + "\n")
    with pytest.raises(TaskError, match=r"^teacher\.path: none of the round's 16 problems is in .*solutions\.jsonl"):
        run_here(tmp_path / "run", *ONE, "teacher=file", f"teacher.path={written}")
    with pytest.raises(ConfigError, match=r"^teacher\.path: there is no file .*gone\.jsonl"):
        run_here(tmp_path / "gone", *ONE, "teacher=file", f"teacher.path={tmp_path}/gone.jsonl")


# --- configs and sweeps ---------------------------------------------------------------------------------------------

BASELINES = sorted(f.stem for f in (conf_dir() / "baseline").glob("*.yaml"))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_one_word_and_has_its_name(name: str) -> None:
    plain, cfg = check(compose_config()), check(compose_config(f"baseline={name}"))
    assert cfg.label == name
    assert cfg.merge.every_n_epochs == "last"
    differs = {k for k in vars(cfg) if getattr(cfg, k) != getattr(plain, k)} - {"label"}
    assert differs, f"{name} is the default under another name"
    text = (conf_dir() / "baseline" / f"{name}.yaml").read_text()
    assert (
        name == "ema"
        or name == "vanilla"
        or name == "replay"
        or name == "early_stop"
        or re.search(r"\d{4}\.\d{4,5}", text)
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sft.replay=lab"], r"^sft\.replay, sft\.replay_share: go together"),
        (["sft.replay_share=0.5"], r"^sft\.replay, sft\.replay_share: go together"),
        (["model=hf", "model.path=x", "sft.replay=lab", "sft.replay_share=0.5"], r"^sft\.replay=lab: "),
        (["sft.l2_to_base=1", "model.lora.rank=2"], r"^sft\.l2_to_base: .*adapters"),
        (["sft.l2_to_base=-1"], r"^sft\.l2_to_base: must be at least 0"),
        (["sft.patience=1"], r"^sft\.patience: .*every_n_epochs=last"),
        (["sft.patience=0"], r"^sft\.patience: must be at least 1"),
        (["task.labels=majority", "sampler.n=1"], r"^task\.labels=majority: needs votes"),
        (["task.labels=majority", "sampler.hints=1"], r"^sampler\.hints: give gold answers away"),
        (["task.labels=silver"], r"^task\.labels: 'silver' is none of gold, majority"),
        (["teacher=file", "teacher.path=x", "sampler.hints=1"], r"^sampler\.hints: nothing is sampled"),
        (["merge=none", "+merge.ratio=0.5"], r"^merge\.ratio: merge=none has no keys"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(compose_config(*overrides))


def test_cases_of_a_sweep_are_no_grid(tmp_path: Path) -> None:
    """Each case with each combination; what is typed counts more than the case; a param that is null is not swept."""
    made = tmp_path / "conf" / "experiment"
    made.mkdir(parents=True)
    (made / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    cases:\n      plain: []\n"
        "      pulled: [sft.l2_to_base=1, merge.ratio=0.3, sft.lr=1e-4]\n    params:\n      seed: 0,1\n"
        "      merge.ratio: null\n"
        "      sft.lr: 2e-4\n"
    )
    words = ("--config-dir", str(tmp_path / "conf"), "experiment=mine", *SMALL, *ONE, "hydra.sweep.dir=out")
    done = itermerge(*words, "merge.ratio=0.7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "out" / "sweep.json").read_text())["jobs"]
    assert [(j[0], [o for o in j if o.startswith("seed=")]) for j in jobs] == [
        (f"label={name}", [f"seed={seed}"]) for name in ("plain", "pulled") for seed in (0, 1)
    ]
    configs = [(tmp_path / "out" / str(i) / "config.yaml").read_text() for i in range(4)]
    assert ["l2_to_base: 1.0" in c for c in configs] == [False, False, True, True]
    assert all("ratio: 0.7" in c for c in configs)
    assert ["lr: 0.0001" in c for c in configs] == [False, False, True, True]  # a case counts more than params
    # the report names the settings, and has no vanilla to compare them with
    assert "pulled" in done.stdout
    assert "no finished job is vanilla" in (tmp_path / "out" / "report.html").read_text()
    bad = itermerge(*words[:2], "experiment=mine", "hydra.sweeper.cases.plain=seed", cwd=tmp_path)
    assert bad.returncode == 2
    assert "hydra.sweeper.cases.plain: expected a name and a list of overrides" in bad.stderr

"""Whole runs in this process: same bytes on every way to them, what is shared, and rounds in which nothing verifies."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAB_SMALL, SMALL, compose_config, deterministic_set, read_rounds, run_here

import itermerge
from itermerge import cli, loop, sft, stages, tracking
from itermerge.config import check
from itermerge.decoding import complete
from itermerge.policy import Policy, copy_in
from itermerge.sft import Fitted, SftError
from itermerge.stages import EmptyRound
from itermerge.store import Store, StoreError, lock_file
from itermerge.tasks import TaskError
from itermerge.tracking import TrackingError, WandbTracker
from itermerge.weights import PolicyError, read_weights

STAGES = {"evaluate": 5, "held_out": 3, "sample": 2, "verify": 2, "fit": 2, "merge": 2, "analyze": 2,
          "update": 2, "probe": 3, "importance": 1}  # 2 rounds  # fmt: skip


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its store beside it, which other tests fill further, and the manifests of its own stages."""
    folder = tmp_path_factory.mktemp("runs") / "cold"
    summary = run_here(folder, f"store.dir={folder.parent / 'store'}")
    assert summary["stages"]["computed"] == STAGES
    assert summary["stages"]["reused"] == {}
    manifests = [json.loads(file.read_text()) for file in (folder.parent / "store").rglob("manifest.json")]
    (folder.parent / "manifests.json").write_text(json.dumps(manifests))
    return folder


def _beside(cold: Path) -> str:
    return f"store.dir={cold.parent / 'store'}"


def test_files_of_a_run(cold: Path) -> None:
    found = {str(f.relative_to(cold)) for f in cold.rglob("*") if f.is_file()}
    model = {f.name for f in LAB_SMALL.iterdir() if f.suffix in (".json", ".safetensors")}
    model -= {"recipe.json"}  # how the base was pretrained; it would lie about a tuned model
    expected = {"config.yaml", "rounds.jsonl", "summary.json", "timing.json", "DONE"}
    always = ("scores.json", "held_out.jsonl", "probe.json", "round.json")
    expected |= {f"rounds/00/{name}" for name in (*always, "importance.json")}
    for t in ("01", "02"):
        names = (*always, "samples.jsonl", "examples.jsonl", "layers.json")
        expected |= {f"rounds/{t}/{name}" for name in names} | {f"rounds/{t}/model/{name}" for name in model}
    assert found == expected


def test_a_warm_store_gives_the_same_bytes_and_computes_nothing(cold: Path, tmp_path: Path) -> None:
    summary = run_here(tmp_path / "warm", _beside(cold))
    assert deterministic_set(tmp_path / "warm") == deterministic_set(cold)
    assert (summary["stages"]["computed"], summary["stages"]["reused"]) == ({}, STAGES)
    assert summary["stages"]["seconds_saved"] > 0


def test_no_store_gives_the_same_bytes_and_leaves_no_stages(cold: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "none", "store=none")
    assert deterministic_set(tmp_path / "none") == deterministic_set(cold)
    assert not (tmp_path / "none" / "stages").exists()


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("seed=1", "sample"), ("sampler.temperature=0.9", "sample"), ("sampler.batch_size=8", "sample"),
        ("sft.lr=2e-3", "fit"), ("merge.ratio=0.25", "fit"),  # an event after the first of two epochs
        ("merge.reset_optimizer=false", "fit"), ("task.max_solutions=1", "verify"), ("suite.seed=1", "evaluate"),
    ],
)  # fmt: skip
def test_what_a_change_reaches_is_computed_again(cold: Path, tmp_path: Path, override: str, stage: str) -> None:
    summary = run_here(tmp_path / "run", _beside(cold), override, "rounds=1")
    assert summary["stages"]["computed"].get(stage)


def test_jobs_share_what_agrees(cold: Path, tmp_path: Path) -> None:
    """The only event is the last: another ratio shares round 1 up to and with its fit; fewer rounds share it all."""
    last = "merge.every_n_epochs=last"
    run_here(tmp_path / "a", f"store.dir={tmp_path / 'store'}", last, "merge.ratio=0.5", "rounds=1")
    summary = run_here(tmp_path / "b", f"store.dir={tmp_path / 'store'}", last, "merge.ratio=0.25", "rounds=1")
    # the base and the tuned model are evaluated already
    same = ("held_out", "probe", "sample", "verify", "fit", "importance", "update")
    assert summary["stages"]["reused"] == {"evaluate": 2} | dict.fromkeys(same, 1)
    other = ("merge", "evaluate", "held_out", "probe", "analyze")
    assert summary["stages"]["computed"] == dict.fromkeys(other, 1)
    fewer = run_here(tmp_path / "c", _beside(cold), "rounds=1")
    assert fewer["stages"]["computed"] == {}
    whole = deterministic_set(cold)
    for name, content in deterministic_set(tmp_path / "c").items():
        assert whole[name].startswith(content) if name == "rounds.jsonl" else whole[name] == content, name


def test_a_run_makes_what_it_needs_later_while_another_evaluates(cold: Path, tmp_path: Path) -> None:
    """The same run, the same stages, in another order: what comes of a round's model alone stands before its
    evaluation."""
    ours, manifests = tmp_path / "store", json.loads((cold.parent / "manifests.json").read_text())
    named = {(m["inputs"]["stage"], m["inputs"].get("model")): m["key"] for m in manifests}
    by = [(m["inputs"]["stage"], m["inputs"], m["facts"]) for m in manifests]
    models = [json.loads((cold / "summary.json").read_text())["base_digest"]]
    for _ in range(2):  # the chain of the rounds: a fit starts from the merged model
        tuned = next(facts["digest"] for stage, of, facts in by if stage == "fit" and of["start"] == models[-1])
        models.append(next(facts["digest"] for stage, of, facts in by if stage == "merge" and of["tuned"] == tuned))
    in_time: list[bool | None] = [None] * 3

    def evaluate(number: int, taken: threading.Event) -> None:
        early = ["held_out", "probe", *["sample"] * (number < 2), *["importance"] * (number == 0)]
        keys = [(name, named[name, models[number]]) for name in early]
        wanted = [ours / name / key[:2] / key / "manifest.json" for name, key in keys]
        held = named["evaluate", models[number]]
        with lock_file(ours / "evaluate" / held[:2] / f"{held}.lock"):
            taken.set()
            last = time.monotonic() + 100
            while not all(f.is_file() for f in wanted) and time.monotonic() < last:
                time.sleep(0.02)
            in_time[number] = all(f.is_file() for f in wanted)

    others = []
    for number, model in enumerate(models):
        (ours / "evaluate" / named["evaluate", model][:2]).mkdir(parents=True, exist_ok=True)
        others.append(threading.Thread(target=evaluate, args=(number, taken := threading.Event())))
        others[-1].start()
        assert taken.wait(10)
    summary = run_here(tmp_path / "run", f"store.dir={ours}")
    for other in others:
        other.join()
    assert in_time == [True] * 3
    assert summary["stages"]["computed"] == STAGES
    assert summary["stages"]["reused"] == {}
    assert {m["key"] for m in manifests} == {f.parent.name for f in ours.rglob("manifest.json")}
    assert deterministic_set(tmp_path / "run") == deterministic_set(cold)


def test_ratio_1_is_vanilla_byte_for_byte(tmp_path: Path) -> None:
    where = f"store.dir={tmp_path / 'store'}"
    run_here(tmp_path / "one", where, "merge.ratio=1")
    summary = run_here(tmp_path / "none", where, "merge=none")
    assert summary["stages"]["computed"] == {}
    run_here(tmp_path / "apart", f"store.dir={tmp_path / 'other'}", "merge=none")
    one, none, apart = (deterministic_set(tmp_path / name) for name in ("one", "none", "apart"))
    assert one == none == apart
    assert [line.get("merge/ratio") for line in read_rounds(tmp_path / "one")] == [None, 1.0, 1.0]


def test_ratio_0_stays_at_the_base(tmp_path: Path) -> None:
    run_here(tmp_path / "zero", f"store.dir={tmp_path / 'store'}", "merge.ratio=0", "rounds=1")
    base, now = read_weights(LAB_SMALL), read_weights(tmp_path / "zero" / "rounds" / "01" / "model")
    assert all(torch.equal(base[name], now[name]) for name in base)
    first, last = read_rounds(tmp_path / "zero")
    assert last["weights/drift"] == 0
    assert {k: v for k, v in last.items() if k in first and k != "round"} == {
        k: v for k, v in first.items() if k != "round"
    }
    assert last["pre_merge/weights/change/layer_00"] > 0


def test_a_bfloat16_copy_samples_and_the_weights_stay_float32(cold: Path, tmp_path: Path) -> None:
    where = f"store.dir={tmp_path / 'store'}"
    half = run_here(tmp_path / "half", where, "rounds=1", "sampler.dtype=bfloat16", "trainer.precision=bf16-mixed")
    assert half["computed_in"] == {"device": "cpu", "sampler_dtype": "bfloat16", "trainer_precision": "bf16-mixed"}
    made = read_weights(tmp_path / "half" / "rounds" / "01" / "model")
    assert {w.dtype for w in made.values()} == {torch.float32}
    assert any(not torch.equal(w, w.bfloat16().float()) for w in made.values())
    # the same base answers alike in either, item for item but for a few
    one, other = (json.loads((d / "rounds" / "00" / "scores.json").read_text()) for d in (cold, tmp_path / "half"))
    pairs = [(a, b) for task in one for a, b in zip(one[task]["correct"], other[task]["correct"], strict=True)]
    assert np.mean([a == b for a, b in pairs]) > 0.8
    again = run_here(tmp_path / "whole", where, "rounds=1")
    assert again["stages"]["reused"] == {}  # another dtype, another key


def test_each_model_is_copied_once_and_gradients_have_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    seen: list[list[bool]] = []

    def copied(model: Any, dtype: torch.dtype) -> Any:
        copy = copy_in(model, dtype)
        made.append(weakref.ref(copy))
        return copy

    def watched(own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            gc.collect()
            seen.append([ref() is not None for ref in made])
            return own(*given, **named)

        return run

    monkeypatch.setattr(stages, "copy_in", copied)
    monkeypatch.setattr(stages, "importance", watched(stages.importance))
    monkeypatch.setattr(stages, "fit", watched(stages.fit))
    run_here(tmp_path / "run", "store=none", "sampler.dtype=bfloat16", "analysis.importance=[taylor]")
    assert seen == [[False], [False], [False] * 3]  # importance of the base, two fits
    assert len(made) == 5  # base; tuned and merged of each round: evaluated, probed, sampled from


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bfloat16_where_the_device_is_fast_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(stages, "fast_at_bfloat16", lambda device: fast)
    summary = run_here(
        tmp_path / "run", "store=none", "rounds=1", "sampler.dtype=auto", "trainer.precision=auto"
    )  # fmt: skip
    expected = ("bfloat16", "bf16-mixed") if fast else ("float32", "32-true")
    assert (summary["computed_in"]["sampler_dtype"], summary["computed_in"]["trainer_precision"]) == expected


def test_merged_weights_follow_the_law(cold: Path, tmp_path: Path) -> None:
    """theta_hat_1 = base + ratio (theta_1 - base), theta_1 from the store."""
    run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", "merge.ratio=0.25", "rounds=1")
    (fitted,) = (tmp_path / "store" / "fit").rglob("model.safetensors")
    base, tuned = read_weights(LAB_SMALL), read_weights(fitted.parent)
    merged = read_weights(tmp_path / "run" / "rounds" / "01" / "model")
    moved = 0.0
    for name, b in base.items():
        expected = b.double() + 0.25 * (tuned[name].double() - b.double())
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
        moved += float((tuned[name] - b).abs().sum())
    assert moved > 0


def test_examples_are_the_different_verified_samples(cold: Path) -> None:
    for t in ("01", "02"):
        samples = [json.loads(line) for line in (cold / "rounds" / t / "samples.jsonl").read_text().splitlines()]
        examples = [json.loads(line) for line in (cold / "rounds" / t / "examples.jsonl").read_text().splitlines()]
        assert len(samples) == 16 * 4
        right = [(s["id"], s["completion"]) for s in samples if s["completion"].rpartition("#")[2] == s["gold"]]
        assert [(e["id"], e["completion"]) for e in examples] == list(dict.fromkeys(right))  # 4 samples: no cut at 4
        assert {s["reason"] for s in samples if s["verdict"]} == {"correct"}
        line = read_rounds(cold)[int(t)]
        assert line["train_sample/accept_rate"] == sum(s["verdict"] for s in samples) / 64
        assert line["train_sample/examples"] == len(examples)


def test_max_solutions_cuts_each_problem(cold: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "run", _beside(cold), "task.max_solutions=1", "rounds=1")
    read = [
        [json.loads(line)["id"] for line in (folder / "rounds" / "01" / "examples.jsonl").read_text().splitlines()]
        for folder in (cold, tmp_path / "run")
    ]
    assert read[1] == list(dict.fromkeys(read[0]))


def test_figures_of_the_rounds_agree_with_the_files(cold: Path) -> None:
    rounds = read_rounds(cold)
    assert [line["round"] for line in rounds] == [0, 1, 2]
    for t, line in enumerate(rounds):
        scores = json.loads((cold / "rounds" / f"{t:02d}" / "scores.json").read_text())
        assert line["id/acc"] == sum(scores["find"]["correct"]) / 8
        assert line["ood/acc"] == pytest.approx(sum(sum(scores[x]["correct"]) for x in ("chain", "sort")) / 16)
        assert json.loads((cold / "rounds" / f"{t:02d}" / "round.json").read_text()) == line
        assert list(line)[1:] == sorted(list(line)[1:])
    gap = (rounds[2]["id/acc"] - rounds[0]["id/acc"]) - (rounds[2]["ood/acc"] - rounds[0]["ood/acc"])
    assert rounds[2]["gap/superficiality"] == pytest.approx(gap)
    assert rounds[2]["gap/superficiality_low"] <= gap <= rounds[2]["gap/superficiality_high"]
    assert rounds[1]["merge/effective_ratio"] == pytest.approx(0.375)  # 2 epochs, 2 events at 1/2: (1/4 + 1/2) / 2
    summary = json.loads((cold / "summary.json").read_text())
    assert summary["final"] | {"round": 2} == rounds[2]
    best = max(line["val/id/acc"] for line in rounds)
    assert summary["best_round_by_validation"] == [line["val/id/acc"] for line in rounds].index(best)


def test_ood_validation_items_are_others_than_the_test_items_and_change_no_other_figure(
    cold: Path, tmp_path: Path
) -> None:
    run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", "suite.n_validation=6", "rounds=1")
    rounds, before = read_rounds(tmp_path / "run"), read_rounds(cold)
    for line, old in zip(rounds, before, strict=False):
        assert {k: v for k, v in line.items() if not k.startswith(("val/ood", "pre_merge/val/ood"))} == old
        assert 0 <= line["val/ood/acc"] <= 1
    scores = json.loads((tmp_path / "run" / "rounds" / "00" / "scores.json").read_text())
    assert {name: len(scores[name]["correct"]) for name in ("val/chain", "val/sort", "val/find", "chain")} == {
        "val/chain": 6, "val/sort": 6, "val/find": 8, "chain": 8
    }  # fmt: skip


def test_gap_of_a_model_that_lost_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruin(policy: Any, *_: Any, **__: Any) -> Fitted:
        policy.set_weights({name: torch.zeros_like(w) for name, w in policy.weights().items()})
        return Fitted([0.0], [], [], 1)

    monkeypatch.setattr(stages, "fit", ruin)
    run_here(tmp_path / "run", "merge=none", "rounds=1", "suite.pass_k_n=0", f"store.dir={tmp_path / 'store'}")
    base, last = read_rounds(tmp_path / "run")
    assert (last["id/acc"], last["ood/acc"]) == (0, 0)
    assert base["ood/acc"] > 0
    # (0 - ID_0) - (0 - OOD_0)
    assert last["gap/superficiality"] == pytest.approx(base["ood/acc"] - base["id/acc"])
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best_round_by_validation"]
    assert best == 0


def test_deterministic_files_hold_no_paths(cold: Path) -> None:
    for name, content in deterministic_set(cold).items():
        assert str(cold.parent).encode() not in content, name


def test_accumulated_examples_stand_once_in_their_first_order() -> None:
    rows = [{"id": i, "completion": c} for i, c in (("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("b", "1"))]
    assert loop.unique(rows) == [rows[0], rows[1], rows[3]]


@pytest.mark.parametrize("data", ["replace", "accumulate"])
def test_data_of_a_round(data: str, cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = sft.fit

    def counting(policy: Any, examples: Any, *rest: Any, **how: Any) -> list[float]:
        sizes.append(len({(tuple(e.prompt), tuple(e.completion)) for e in examples}))
        assert sizes[-1] == len(examples)
        return real(policy, examples, *rest, **how)

    monkeypatch.setattr(stages, "fit", counting)
    run_here(tmp_path / "run", f"sft.data={data}", f"store.dir={tmp_path / 'store'}", "suite.pass_k_n=0")
    files = [tmp_path / "run" / "rounds" / t / "examples.jsonl" for t in ("01", "02")]
    one, two = (set(file.read_text().splitlines()) for file in files)
    assert sizes == [len(one), len(one | two) if data == "accumulate" else len(two)]


def test_fresh_problems_change_every_round(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "task.problems=fresh", f"store.dir={tmp_path / 'store'}", "suite.pass_k_n=0")
    asked = []
    for t in ("01", "02"):
        lines = (tmp_path / "run" / "rounds" / t / "samples.jsonl").read_text().splitlines()
        asked.append({json.loads(line)["prompt"] for line in lines})
    assert [len(a) for a in asked] == [16, 16]
    assert asked[0] != asked[1]


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_never_overwritten(cold: Path) -> None:
    before = deterministic_set(cold)
    with pytest.raises(FileExistsError, match=r"holds a finished run, which is never overwritten"):
        run_here(cold, _beside(cold))
    assert deterministic_set(cold) == before


def test_an_unfinished_folder_of_another_config_is_refused(cold: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((cold / "config.yaml").read_text())
    with pytest.raises(FileExistsError, match=r"holds an unfinished run of another config"):
        run_here(tmp_path, _beside(cold), "seed=5")
    assert not (tmp_path / "rounds.jsonl").exists()


def test_a_run_goes_on_in_its_folder(cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first try fails in round 2; the second reads what is there."""
    real, calls = stages.fit, []

    def fails_in_round_2(*given: Any, **how: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise SftError("the loss is nan")
        return real(*given, **how)

    where = f"store.dir={tmp_path / 'store'}"
    monkeypatch.setattr(stages, "fit", fails_in_round_2)
    with pytest.raises(SftError, match=r"^round 2: the loss is nan"):
        run_here(tmp_path / "run", where)
    assert [line["round"] for line in read_rounds(tmp_path / "run")] == [0, 1]
    summary = run_here(tmp_path / "run", where)
    assert summary["stages"]["computed"]["fit"] == 1
    assert summary["stages"]["reused"]["fit"] == 1
    assert deterministic_set(tmp_path / "run") == deterministic_set(cold)


def test_load_run(cold: Path, tmp_path: Path) -> None:
    run = itermerge.load_run(cold)
    assert run.config["task"]["family"] == "find"
    assert run.rounds == read_rounds(cold)
    assert run.summary is not None
    assert run.summary["rounds"] == 2
    last, first = run.model(), run.model(1)
    written = read_weights(cold / "rounds" / "02" / "model")
    assert all(torch.equal(w, written[n]) for n, w in last.weights().items())
    assert any(not torch.equal(w, first.weights()[n]) for n, w in last.weights().items())
    assert complete(last, ["find 10+?=44?"], keys=None, batch_size=1, max_new_tokens=4)[0].tokens > 0
    with pytest.raises(FileNotFoundError, match=r"round 7 of .* has no model \(rounds that have one: 1, 2; store"):
        run.model(7)
    with pytest.raises(FileNotFoundError, match=r"is no run folder: it needs config\.yaml and rounds\.jsonl"):
        itermerge.load_run(tmp_path)


def test_a_job_returns_its_optimized_metric(cold: Path, tmp_path: Path) -> None:
    cfg = check(compose_config(*SMALL, _beside(cold), "optimized_metric=ood/sort/acc"))
    value = cli.start(cfg, tmp_path, ["seed=0"])
    assert value == read_rounds(cold)[-1]["ood/sort/acc"]
    assert (tmp_path / "figures" / "id_ood.png").read_bytes().startswith(b"\x89PNG")
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["overrides"] == ["seed=0"]
    assert provenance["versions"]["torch"].startswith("2.")


# --- rounds in which nothing verifies ------------------------------------------------------------------------------


def _random_model(folder: Path, tmp_path: Path) -> list[str]:
    return ["model=hf", f"model.path={folder}", f"store.dir={tmp_path / 'store'}", "sampler.max_new_tokens=4"]


def test_an_empty_round_stops_with_the_counts(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EmptyRound, match=r"round 1: none of 64 samples is correct \(.*\d truncated\).*on_empty=skip"):
        run_here(tmp_path / "run", *_random_model(tiny_folder, tmp_path))
    assert (tmp_path / "run" / "rounds" / "01" / "samples.jsonl").is_file()  # the message says to look at them
    assert [line["round"] for line in read_rounds(tmp_path / "run")] == [0]


def test_an_empty_round_is_skipped_when_asked(
    write_variant: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_variant({})
    (folder / "onnx").mkdir()  # as in many a snapshot of the hub
    (folder / "onnx" / "model.onnx").write_bytes(b"0")
    run_here(tmp_path / "run", *_random_model(folder, tmp_path), "loop.on_empty=skip")
    rounds = read_rounds(tmp_path / "run")
    assert [line["round"] for line in rounds] == [0, 1, 2]
    assert "round 2: none of 64 samples is correct" in caplog.text
    assert [line["train_sample/accept_rate"] for line in rounds[1:]] == [0, 0]
    assert "sft/loss" not in rounds[1]
    assert [line["id/acc"] for line in rounds] == [rounds[0]["id/acc"]] * 3
    written, own = read_weights(tmp_path / "run" / "rounds" / "02" / "model"), read_weights(folder)
    assert all(torch.equal(written[name], own[name]) for name in own)
    # the user's own file stays the user's own: what is done to the run folder does not reach it
    placed = (tmp_path / "run" / "rounds" / "01" / "model" / "model.safetensors").stat()
    assert placed.st_ino != (folder / "model.safetensors").stat().st_ino


def test_a_model_that_cannot_be_used_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"model\.path: .*nowhere is neither a folder nor"):
        run_here(tmp_path / "bad", "model=hf", "model.path=./nowhere", f"store.dir={tmp_path / 'store'}")


def test_examples_that_are_too_long_may_be_left_out(tmp_path: Path) -> None:
    store = f"store.dir={tmp_path / 'store'}"
    run_here(tmp_path / "all", store, "rounds=1")
    rows = map(json.loads, (tmp_path / "all" / "rounds" / "01" / "examples.jsonl").read_text().splitlines())
    lengths = sorted(len(row["prompt"]) + len(row["completion"]) + 1 for row in rows)  # one token a character, and eos
    most = lengths[len(lengths) // 2]
    assert most < lengths[-1]
    run_here(tmp_path / "some", store, "rounds=1", f"sft.max_length={most}", "sft.too_long=drop")
    whole, cut = read_rounds(tmp_path / "all")[1], read_rounds(tmp_path / "some")[1]
    assert "sft/dropped" not in whole
    assert cut["sft/dropped"] == sum(length > most for length in lengths)
    assert cut["sft/loss"] != whole["sft/loss"]
    with pytest.raises(SftError, match=r"round 1: an example has \d+ tokens; .* leave .* out with sft\.too_long=drop"):
        run_here(tmp_path / "stop", store, "rounds=1", f"sft.max_length={most}")
    with pytest.raises(TaskError, match=r"its shortest training prompt has \d+ tokens, sft\.max_length is 4 "):
        run_here(tmp_path / "none", store, "rounds=1", "sft.max_length=4", "sft.too_long=drop")


def test_answers_in_evaluation_may_have_a_length_of_their_own(tmp_path: Path) -> None:
    """One token is too few for any answer; samples have as many as before."""
    store = f"store.dir={tmp_path / 'store'}"
    run_here(tmp_path / "same", store, "rounds=1")
    run_here(tmp_path / "short", store, "rounds=1", "suite.max_new_tokens=1")
    same, short = read_rounds(tmp_path / "same"), read_rounds(tmp_path / "short")
    assert same[0]["id/acc"] > 0
    assert [line["id/acc"] for line in short] == [line["val/id/acc"] for line in short] == [0, 0]
    assert short[1]["train/acc"] == 0
    for name in ("train_sample/accept_rate", "sample/pass@1"):
        assert same[1][name] == short[1][name] > 0


def test_prompts_that_leave_no_room_are_refused_before_the_first_stage(tiny_folder: Path, tmp_path: Path) -> None:
    # find has prompts of up to 14 characters: 14 + 243 = 257 positions, the model has 256
    with pytest.raises(TaskError, match=r"task 'find': its longest prompt has 14 tokens .* is 243, .* context of 256"):
        run_here(tmp_path / "long", *_random_model(tiny_folder, tmp_path)[:-1], "sampler.max_new_tokens=243")
    with pytest.raises(TaskError, match=r"its longest training prompt has 14 tokens, sft\.max_length is 14"):
        run_here(tmp_path / "short", *_random_model(tiny_folder, tmp_path)[:-1], "sft.max_length=14")
    assert not list(tmp_path.glob("*/rounds*"))


@pytest.mark.parametrize(("accuracy", "said"), [(0.0, "nothing to learn from"), (1.0, "nothing to gain"), (0.5, "")])
def test_a_base_that_cannot_show_anything_is_said(accuracy: float, said: str, caplog: pytest.LogCaptureFixture) -> None:
    base = {"val/id/acc": accuracy, "ood/a/acc": 0.5, "ood/a/acc_low": 0.4, "ood/a/majority": 0.3}
    at_floor = {"ood/b/acc": 0.35, "ood/b/acc_low": 0.28, "ood/b/majority": 0.3}
    loop.look_at_base(base)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
    loop.look_at_base(base | at_floor)
    assert "majority baseline (accuracy, baseline): b 35 (30)" in caplog.text


# --- W&B -----------------------------------------------------------------------------------------------------------


class FakeRun:
    """What our tracker uses of a W&B run, written down."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.exit_code: int | None = None
        self.id = "abc"

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        assert self.exit_code is None
        self.logged.append(row)

    def log_artifact(self, artifact: Any) -> None:
        assert self.exit_code is None
        self.artifacts.append(artifact)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    import wandb

    runs: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**settings: Any) -> FakeRun:
        runs.append((settings, FakeRun()))
        return runs[-1][1]

    monkeypatch.setattr(wandb, "init", init)
    return runs


def test_wandb_gets_config_and_figures_on_axes_of_our_own(
    cold: Path, tmp_path: Path, wandb_runs: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    cfg = check(compose_config(*SMALL, _beside(cold), "logger=wandb"))
    cli.start(cfg, tmp_path, [])
    ((settings, run),) = wandb_runs
    assert settings["mode"] == "offline"
    assert settings["dir"] == tmp_path
    assert settings["config"]["merge"]["ratio"] == 0.5
    assert settings["config"]["task"]["family"] == "find"
    assert run.axes["*"] == "round"
    assert run.axes["sft/epoch_loss"] == "sft/epoch"
    rounds = read_rounds(cold)
    assert [row for row in run.logged if "id/acc" in row] == rounds
    curve = [(row["round"], row["sft/epoch"]) for row in run.logged if "sft/epoch_loss" in row]
    assert curve == [(1, 1), (1, 2), (2, 3), (2, 4)]  # two epochs a round, replayed from the store as well
    assert run.summary["id/acc"] == rounds[-1]["id/acc"]
    assert run.summary["gain/ood/acc"] == rounds[-1]["ood/acc"] - rounds[0]["ood/acc"]
    assert {k: v for k, v in run.summary.items() if k.startswith("setting/")} == {
        "setting/ratio": 0.5, "setting/merge": "linear", "setting/lr": 5e-4, "setting/rounds": 2, "setting/seed": 0
    }  # fmt: skip
    assert run.exit_code == 0


def test_wandb_gets_tables_charts_and_artifacts_of_the_run_folder(
    cold: Path, tmp_path: Path, wandb_runs: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    cfg = check(compose_config(*SMALL, _beside(cold), "logger=wandb", "logger.samples=3", "logger.log_model=true"))
    cli.claim(tmp_path, cfg)
    cli.start(cfg, tmp_path, [])
    ((_, run),) = wandb_runs
    (row,) = [row for row in run.logged if "tables/layers" in row]  # once: a table logged twice shows once
    layers = row["tables/layers"]
    assert len(layers.data) == 2 * 6  # two rounds; four layers, embeddings, final norm
    at = {name: i for i, name in enumerate(layers.columns)}
    rounds = read_rounds(cold)
    for line in layers.data:
        metrics, where = rounds[line[at["round"]]], line[at["row"]]
        assert line[at["change"]] == metrics[f"weights/change/{where}"]
        assert line[at["cosine"]] == metrics.get(f"weights/cosine/{where}")
        assert line[at["importance/skip"]] == rounds[1].get(f"importance/skip/{where}")
    samples = row["tables/samples"]
    assert len(samples.data) == 2 * 3 + 3 * 3  # training samples of two rounds, held-out ones of three
    files = [cold / "rounds" / "02" / "samples.jsonl", cold / "rounds" / "00" / "held_out.jsonl"]
    first = json.loads(files[0].read_text().splitlines()[0])
    assert [2, "training", *(first[c] for c in samples.columns[2:])] in samples.data
    charts = {name for name in row if name.startswith("charts/")}
    assert charts == {f"charts/{n}" for n in ("change_by_layer", "importance_by_layer", "id_ood", "pareto")}
    assert {"figures/id_ood", "figures/importance_change"} <= row.keys()
    kept, weights = run.artifacts
    assert {"config.yaml", "rounds.jsonl", "summary.json", "report.html"} == set(kept.manifest.entries)
    assert (weights.type, weights.metadata["round"]) == ("model", 2)
    assert "model.safetensors" in weights.manifest.entries


def test_tables_that_fail_cost_no_run_and_hide_no_error(
    cold: Path, tmp_path: Path, wandb_runs: list[tuple[dict[str, Any], FakeRun]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any) -> Any:
        raise ValueError("no such column")

    monkeypatch.setattr(tracking, "layer_table", fail)
    cfg = check(compose_config(*SMALL, _beside(cold), "logger=wandb"))
    (tmp_path / "whole").mkdir()
    assert cli.start(cfg, tmp_path / "whole", []) is not None
    assert "did not reach the logger" in capsys.readouterr().err
    assert wandb_runs[0][1].exit_code == 0

    def early(*_: Any, **__: Any) -> Any:
        raise TaskError("the very first stage")

    monkeypatch.setattr(stages.Bench, "evaluate", early)
    (tmp_path / "early").mkdir()
    with pytest.raises(TaskError, match="the very first stage"):
        cli.start(cfg, tmp_path / "early", [])
    assert wandb_runs[1][1].exit_code == 1


def test_wandb_is_told_of_a_failure(
    tiny_folder: Path, tmp_path: Path, wandb_runs: list[tuple[dict[str, Any], FakeRun]]
) -> None:
    cfg = check(compose_config(*SMALL, *_random_model(tiny_folder, tmp_path), "logger=wandb"))
    with pytest.raises(EmptyRound):
        cli.start(cfg, tmp_path, [])
    assert wandb_runs[0][1].exit_code == 1


def test_a_wandb_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cfg = check(compose_config("logger=wandb", f"logger.dir={tmp_path / 'file' / 'below'}"))
    with pytest.raises(TrackingError, match=r"logger\.dir: cannot make .*file/below"):
        cli.make_tracker(cfg, tmp_path)


def test_wandb_that_does_not_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**_: Any) -> None:
        raise wandb.Error("no API key configured")

    monkeypatch.setattr(wandb, "init", init)
    settings = {"project": "p", "entity": None, "mode": "online", "group": None, "dir": None}
    with pytest.raises(TrackingError, match=r"W&B did not start \(no API key configured\); logger\.mode=offline"):
        WandbTracker(settings, tmp_path, "n", "g", {"setting": {}})


def test_jsonl_needs_no_tracker(tmp_path: Path) -> None:
    assert isinstance(cli.make_tracker(check(compose_config()), tmp_path), tracking.NullTracker)


# --- analyses ------------------------------------------------------------------------------------------------------


def test_importance_is_measured_once_on_the_bases_own_solutions(cold: Path) -> None:
    table = json.loads((cold / "rounds" / "00" / "importance.json").read_text())
    assert (table["source"], table["layers"]) == ("verified", 4)
    assert list(table["estimators"]) == ["angular", "block_influence", "skip", "taylor"]
    rows = map(json.loads, (cold / "rounds" / "01" / "samples.jsonl").read_text().splitlines())
    solved = {(s["id"], s["completion"]) for s in rows if s["verdict"]}
    assert table["examples"] == len(solved) <= 64
    rounds = read_rounds(cold)
    assert not any(k.startswith(("importance/", "mismatch/")) for k in rounds[0])
    assert not any(k.startswith("importance/") for k in rounds[2])  # said once
    skip = table["estimators"]["skip"]["layer_03"]
    assert rounds[1]["importance/skip/layer_03"] == skip["mean"]
    assert skip["mean"] == pytest.approx(np.mean([v[3] for v in table["values"]["skip"]]))
    assert skip["low"] <= skip["mean"] <= skip["high"]


def test_mismatch_of_each_round_agrees_with_its_files(cold: Path) -> None:
    from scipy import stats

    table = json.loads((cold / "rounds" / "00" / "importance.json").read_text())
    rows = [f"layer_{i:02d}" for i in range(4)]
    for t, line in list(enumerate(read_rounds(cold)))[1:]:
        layers = json.loads((cold / "rounds" / f"{t:02d}" / "layers.json").read_text())
        for which, prefix in (("merged", ""), ("pre_merge", "pre_merge/")):
            change = [layers[which][row]["relative"] for row in rows]
            for name, figures in table["estimators"].items():
                mean = [figures[row]["mean"] for row in rows]
                at = f"{prefix}mismatch/{name}"
                assert line[f"{at}/spearman"] == pytest.approx(stats.spearmanr(mean, change).statistic)
                assert line[f"{at}/spearman_low"] <= line[f"{at}/spearman"] <= line[f"{at}/spearman_high"]
                energy = [layers[which][row]["energy"] for row in rows]
                assert line[f"{at}/spearman_squared"] == pytest.approx(stats.spearmanr(mean, energy).statistic)
                top = sorted(range(4), key=lambda i: -mean[i])[:1]
                assert line[f"{at}/top_share"] == pytest.approx(sum(energy[i] for i in top) / sum(energy))
                assert line[f"{at}/top_expected"] == 0.25
    assert line["mismatch/top_k"] == 1


def test_updates_of_successive_rounds_are_compared(tmp_path: Path) -> None:
    """The round's own updates: from the merged model before it to the tuned one, which vanilla's round folders hold."""
    run_here(tmp_path / "run", "merge=none", "rounds=2", f"store.dir={tmp_path / 'store'}", "suite.pass_k_n=0")
    models = [read_weights(tmp_path / "run" / "rounds" / f"0{t}" / "model") for t in (1, 2)]
    models.insert(0, read_weights(LAB_SMALL))
    name = "model.layers.2."
    u, v = (
        torch.cat([(b[n] - a[n]).flatten().bfloat16().double() for n in sorted(a) if n.startswith(name)])
        for a, b in ((models[0], models[1]), (models[1], models[2]))
    )
    first, second = read_rounds(tmp_path / "run")[1:]
    assert "weights/cosine/layer_02" not in first
    assert second["weights/cosine/layer_02"] == pytest.approx(float(u @ v / u.norm() / v.norm()), rel=1e-6)
    both = (u != 0) & (v != 0)
    agree = float(((u > 0) == (v > 0))[both].double().mean())
    assert second["weights/sign_agreement/layer_02"] == pytest.approx(agree, rel=1e-9)
    assert 0 < first["weights/effective_rank/layer_02"] < 1
    assert "weights/effective_rank/embed" not in first


def test_collapse_figures_agree_with_the_samples(cold: Path) -> None:
    for t, line in enumerate(read_rounds(cold)):
        rows = [json.loads(row) for row in (cold / "rounds" / f"{t:02d}" / "held_out.jsonl").read_text().splitlines()]
        assert len(rows) == 4 * 4  # suite.pass_k_n problems, sampler.n samples
        assert line["sample/pass@1"] == pytest.approx(np.mean([r["verdict"] for r in rows]))
        assert line["sample/correct"] == pytest.approx(line["sample/pass@1"])
        assert line["sample/tokens"] == pytest.approx(np.mean([r["tokens"] for r in rows]))
        texts = {(r["id"], r["completion"]) for r in rows}
        assert line["diversity/distinct"] == pytest.approx(len(texts) / 16)
        scores = json.loads((cold / "rounds" / f"{t:02d}" / "scores.json").read_text())
        unseen = np.mean(scores["find"]["correct"] + scores["val/find"]["correct"])
        assert line["gap/memorisation"] == pytest.approx(line["train/acc"] - unseen)
        assert line["gap/memorisation_low"] <= line["gap/memorisation"] <= line["gap/memorisation_high"]
        assert 0 < line["diversity/fixed_text_entropy"] < 1
    rounds = read_rounds(cold)
    assert rounds[0]["kl/ood"] == pytest.approx(0, abs=1e-9)
    assert rounds[2]["kl/ood"] > 1e-7


def test_importance_on_ood_tasks_on_request(tmp_path: Path) -> None:
    words = ("analysis.ood=true", "analysis.importance=[block_influence]", "rounds=1", "analysis.examples=6")
    run_here(tmp_path / "run", "model.seed=0", f"store.dir={tmp_path / 'store'}", *words)
    table = json.loads((tmp_path / "run" / "rounds" / "00" / "importance_ood.json").read_text())
    assert table["examples"] == 6
    line = read_rounds(tmp_path / "run")[1]
    assert {k.split("/")[1] for k in line if k.startswith("mismatch_ood/")} == {"block_influence", "top_k"}
    assert line["importance_ood/block_influence/layer_00"] == table["estimators"]["block_influence"]["layer_00"]["mean"]
    assert line["importance_ood/block_influence/layer_00"] != line["importance/block_influence/layer_00"]


def test_analyses_can_be_left_out(tmp_path: Path) -> None:
    off = ("analysis.importance=[]", "analysis.kl_n=0", "analysis.train_n=0", "analysis.effective_rank=false")
    run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", *off, "suite.pass_k_n=0", "rounds=1")
    assert not (tmp_path / "run" / "rounds" / "00" / "importance.json").exists()
    gone = ("importance/", "mismatch/", "kl/", "train/", "diversity/", "sample/", "weights/effective_rank")
    assert [k for line in read_rounds(tmp_path / "run") for k in line if k.startswith(gone)] == []


def test_a_failed_analysis_is_recorded_and_the_loop_goes_on(
    cold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from itermerge.analysis.change import AnalysisError

    def fail(*_: Any, **__: Any) -> Any:
        raise AnalysisError("no blocks here")

    monkeypatch.setattr(stages, "importance", fail)
    monkeypatch.setattr(stages.change, "changes", fail)
    monkeypatch.setattr(stages.diversity, "divergence", fail)
    summary = run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}")
    assert summary["analysis_failed"] == dict.fromkeys(
        ("importance", *(f"round {t}: {what}" for t in (1, 2) for what in ("diversity", "layer change")),
         "round 0: diversity"),
        "AnalysisError: no blocks here",
    )  # fmt: skip
    assert "importance failed, the run goes on without it: no blocks here" in caplog.text
    whole = read_rounds(cold)
    for line, other in zip(read_rounds(tmp_path / "run"), whole, strict=True):
        gone = (
            "weights",
            "importance",
            "mismatch",
            "sample",
            "diversity",
            "kl",
            "train",
            "gap/mem",
            "merge/anchor",
            "merge/ratio/",
            "merge/share/",
        )
        kept = {k: v for k, v in other.items() if not k.removeprefix("pre_merge/").startswith((*gone, "train/"))}
        assert kept.items() <= line.items()
        assert {k for k in line if k.startswith("train_sample/")} == {k for k in other if k.startswith("train_sample/")}
    assert not (tmp_path / "run" / "rounds" / "01" / "layers.json").exists()
    monkeypatch.undo()
    mended = run_here(tmp_path / "again", f"store.dir={tmp_path / 'store'}")  # nothing wrong was kept
    assert mended["analysis_failed"] == {}
    assert read_rounds(tmp_path / "again") == whole


def test_importance_that_could_not_be_measured_is_said(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model solves nothing."""
    cfg = check(compose_config(*SMALL, *_random_model(tiny_folder, tmp_path), "loop.on_empty=skip"))
    cli.start(cfg, tmp_path, [])
    said = "no round had verified solutions of the base to measure it on"
    assert json.loads((tmp_path / "summary.json").read_text())["analysis_failed"] == {"importance": said}
    assert f"not measured: importance ({said})" in capsys.readouterr().out


def test_ranks_belong_to_the_config_and_not_to_what_the_store_holds(tmp_path: Path) -> None:
    where = (f"store.dir={tmp_path / 'store'}", "rounds=1", "suite.pass_k_n=0", "analysis.importance=[]")
    for name, asked in (("on", "true"), ("off", "false"), ("again", "true")):
        run_here(tmp_path / name, *where, f"analysis.effective_rank={asked}")
        there = "weights/effective_rank/layer_00" in read_rounds(tmp_path / name)[1]
        assert there == (asked == "true")
    alone = f"store.dir={tmp_path / 'other'}"
    run_here(tmp_path / "alone", alone, *where[1:], "analysis.effective_rank=false")
    assert deterministic_set(tmp_path / "alone") == deterministic_set(tmp_path / "off")


def test_an_update_that_failed_once_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer change needs no update: it is there all the same, and a later run is as if nothing had happened."""
    from itermerge.analysis.change import AnalysisError

    how = ("suite.pass_k_n=0", "analysis.importance=[skip]")
    run_here(tmp_path / "clean", f"store.dir={tmp_path / 'clean_store'}", *how)
    inner, calls = stages.change.update_figures, []

    def once(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise AnalysisError("out of memory")
        return inner(*given, **named)

    monkeypatch.setattr(stages.change, "update_figures", once)
    summary = run_here(tmp_path / "hurt", f"store.dir={tmp_path / 'store'}", *how)
    assert summary["analysis_failed"] == {"round 1: update": "AnalysisError: out of memory"}
    first, second = read_rounds(tmp_path / "hurt")[1:]
    assert {"weights/drift", "weights/change/layer_03", "mismatch/skip/spearman"} <= first.keys()
    assert "weights/effective_rank/layer_03" not in first
    assert "weights/cosine/layer_03" not in second  # nothing to compare with
    assert "weights/effective_rank/layer_03" in second
    run_here(tmp_path / "after", f"store.dir={tmp_path / 'store'}", *how)
    assert deterministic_set(tmp_path / "after") == deterministic_set(tmp_path / "clean")


@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        ("importance", {"stages.py", "analysis/importance.py", "analysis/mismatch.py", "sft.py"}),
        ("probe", {"stages.py", "analysis/diversity.py", "evaluation.py", "decoding.py", "sft.py"}),
        ("update", {"analysis/change.py"}),
        ("analyze", {"stages.py", "analysis/change.py"}),
    ],
)
def test_keys_hold_the_code_that_makes_an_analysis(
    stage: str, needed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    inner = Store.stage

    def note(self: Store, name: str, inputs: Any, compute: Any, *, modules: Any, whole: bool = False) -> Any:
        seen.setdefault(name, set()).update(modules)
        return inner(self, name, inputs, compute, modules=modules, whole=whole)

    monkeypatch.setattr(Store, "stage", note)
    run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", "rounds=1", "analysis.importance=[angular]")
    assert needed <= seen[stage]


def test_gold_solutions_that_do_not_fit_are_left_out(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short context: all that needs no gold solution is measured."""
    monkeypatch.setattr(Policy, "context", 40)
    words = ("sampler.max_new_tokens=4", "sft.max_length=40", "rounds=1", "loop.on_empty=skip")
    summary = run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", *words)
    assert summary["analysis_failed"].keys() == {"importance"}  # nothing is solved in four tokens
    base = read_rounds(tmp_path / "run")[0]
    assert {"sample/pass@1", "diversity/self_bleu", "train/acc"} <= base.keys()


def test_a_full_disk_in_an_analysis_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "importance", full)
    with pytest.raises(StoreError, match="the disk is full: stage 'importance'"):
        run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", "rounds=1")


def test_a_skipped_round_leaves_a_gap_and_importance_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing verifies in round 1: importance is measured in round 2, on the same base, and no update is compared."""
    verify = stages.Bench.verify

    def nothing(self: Any, completions: Any, number: int) -> Any:
        if number != 1:
            return verify(self, completions, number)
        monkeypatch.setattr(self.task.__class__, "verify", lambda *_: Verdict("wrong", "0"))
        made = verify(self, completions, number)
        monkeypatch.setattr(self.task.__class__, "verify", inner)
        return made

    from itermerge.tasks import Verdict
    from itermerge.tasks.lab import LabTask

    inner = LabTask.verify
    monkeypatch.setattr(stages.Bench, "verify", nothing)
    run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}", "loop.on_empty=skip")
    first, second = read_rounds(tmp_path / "run")[1:]
    assert not any(k.startswith(("importance", "weights", "mismatch")) for k in first)
    assert "importance/skip/layer_00" in second
    assert "mismatch/skip/spearman" in second
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["analysis_failed"] == {}
    assert "weights/cosine/layer_00" not in second


# --- whose weights are kept ----------------------------------------------------------------------------------------


def _weights_in(folder: Path) -> dict[str, int]:
    """The number of weight files by stage of a store."""
    files = [f.relative_to(folder).parts[0] for f in folder.rglob("*.safetensors")]
    return {stage: files.count(stage) for stage in sorted(set(files))}


def _facts(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in deterministic_set(folder).items() if "/model/" not in name}


def _kept(events: str) -> tuple[str, ...]:
    return (f"merge.every_n_epochs={events}", "suite.pass_k_n=0")


@pytest.fixture(scope="module")
def all_kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Three rounds whose weights are all kept, made once for each kind of merge events."""

    @cache
    def folder(events: str) -> Path:
        at = tmp_path_factory.mktemp("kept")
        run_here(at / "all", f"store.dir={at / 'store'}", *_kept(events), "rounds=3")
        return at / "all"

    return folder


@pytest.mark.parametrize("events", ["1", "last"])
@pytest.mark.parametrize("keep", ["last", "none"])
def test_weights_that_are_not_kept_change_no_result_and_are_made_again_where_needed(
    keep: str, events: str, all_kept: Callable[[str], Path], tmp_path: Path
) -> None:
    how, whole = _kept(events), all_kept(events)
    where = (f"store.dir={tmp_path / 'store'}", *how, f"store.keep={keep}")
    run_here(tmp_path / "two", *where, "rounds=2")
    shared = {"fit": 1} if (keep, events) == ("last", "last") else {}  # that of round 1: other ratios have it too
    updates = {"update": 1 + len(shared)}  # the last one, and that of round 1 likewise
    assert _weights_in(tmp_path / "store") == (shared | {"merge": 1} | updates if keep == "last" else {})
    models = [f.parent.parent.name for f in (tmp_path / "two").rglob("model.safetensors")]
    assert models == (["02"] if keep == "last" else [])

    summary = run_here(tmp_path / "three", *where, "rounds=3")  # goes on where the other run ended
    assert summary["weights_kept"] == keep
    assert _facts(tmp_path / "three") == _facts(whole)
    # rounds 1 and 2, to have round 2's model, and the update that the next one is compared with
    again = {"fit": 2, "merge": 2, "update": 2} if keep == "none" else {}
    computed = summary["stages"]["computed"]
    assert {stage: computed[stage] - 1 for stage in again} == again
    if keep == "last":
        once = ("sample", "verify", "fit", "merge", "analyze", "update", "probe")
        assert computed == {"evaluate": 2} | dict.fromkeys(once, 1)
        models = {name: data for name, data in deterministic_set(whole).items() if "03/model" in name}
        assert {n: d for n, d in deterministic_set(tmp_path / "three").items() if "/model/" in n} == models

    warm = run_here(tmp_path / "warm", *where, "rounds=3")
    assert warm["stages"]["computed"] == {}  # facts are enough


def test_weights_made_again_inside_a_fit_do_not_disturb_it(tmp_path: Path) -> None:
    """The anchor of an event inside the fit was dropped: it is computed with the policy that is to be trained."""
    how = ("merge.anchor=mean", "sft.epochs=2", "merge.every_n_epochs=1", "suite.pass_k_n=0")
    run_here(tmp_path / "all", f"store.dir={tmp_path / 'other'}", *how, "rounds=3")
    where = (f"store.dir={tmp_path / 'store'}", *how, "store.keep=last")
    run_here(tmp_path / "two", *where, "rounds=2")  # keeps the model of round 2; the mean needs that of round 1 as well
    summary = run_here(tmp_path / "three", *where, "rounds=3")
    assert summary["stages"]["computed"]["merge"] == 2
    assert _facts(tmp_path / "three") == _facts(tmp_path / "all")


def test_weights_that_another_run_keeps_are_not_dropped(tmp_path: Path) -> None:
    where = f"store.dir={tmp_path / 'store'}"
    run_here(tmp_path / "all", where, "store.keep=all")
    before = _weights_in(tmp_path / "store")
    assert before == {"fit": 2, "merge": 2, "update": 2}
    run_here(tmp_path / "none", where, "store.keep=none")
    assert _weights_in(tmp_path / "store") == before


def test_weights_that_a_run_under_way_has_used_are_dropped_by_the_last_of_them(tmp_path: Path) -> None:
    """Two runs of one chain at once (rounds=1,2,3 over workers): the first to end must not take the other's weights."""

    def compute(folder: Path) -> dict[str, Any]:
        (folder / "model.safetensors").write_bytes(b"x")
        return {}

    def use(store: Store) -> Path:
        return store.stage("fit", {"seed": 1}, compute, modules=("store.py",)).folder

    first, second = Store(tmp_path, {}, keep="last"), Store(tmp_path, {}, keep="last")
    with second:
        with first:
            use(first)
            weights = use(second) / "model.safetensors"
            first.drop_weights(weights.parent)
            assert weights.exists()
        second.drop_weights(weights.parent)
        assert not weights.exists()
    assert second.tally.reused == {"fit": 1}


def test_a_mean_anchor_and_a_start_from_the_tuned_model_keep_what_they_read(tmp_path: Path) -> None:
    how = ("merge.anchor=mean", "sft.start=tuned", "rounds=3", "suite.pass_k_n=0")
    run_here(tmp_path / "all", f"store.dir={tmp_path / 'other'}", *how)
    summary = run_here(tmp_path / "last", f"store.dir={tmp_path / 'store'}", *how, "store.keep=last")
    assert summary["stages"]["computed"]["fit"] == summary["stages"]["computed"]["merge"] == 3  # none made twice
    assert _facts(tmp_path / "last") == _facts(tmp_path / "all")
    assert _weights_in(tmp_path / "store") == {"merge": 1, "update": 1}


def test_auto_keeps_all_of_a_small_model_and_the_last_of_a_large_one() -> None:
    from itermerge.upkeep import keep_of

    cfg = check(compose_config())
    assert [keep_of(cfg, size) for size in (1, 2**28, 2**28 + 1, 2**40)] == ["all", "all", "last", "last"]
    assert keep_of(check(compose_config("store.keep=none")), 1) == "none"
    assert keep_of(check(compose_config("store=none", "store.keep=all")), 2**40) == "all"


def test_a_run_folder_stays_whole_without_the_store(tmp_path: Path) -> None:
    import shutil

    run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}")
    before = deterministic_set(tmp_path / "run")
    shutil.rmtree(tmp_path / "store")
    assert deterministic_set(tmp_path / "run") == before
    assert itermerge.load_run(tmp_path / "run").model().weights()

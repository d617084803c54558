"""Two processes on a CPU do what one does: completions, fits, rounds; how they end, and what a plan says of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, compose_config, enliven, itermerge, read_rounds, run_here

from itermerge import plan, stages
from itermerge.config import ConfigError, check
from itermerge.decoding import complete
from itermerge.devices import DeviceError, Events, Group, Job, shared_out
from itermerge.merging import MergeCallback, Method
from itermerge.policy import Policy
from itermerge.sft import Example, FitSpec, Fitted, LoraSpec, SftError, batch_of, fit, part_of
from itermerge.stages import LAB_SEED0, devices_of
from itermerge.weights import PolicyError, Weights, read_weights, write_folder

SPEC = FitSpec(
    epochs=2, lr=1e-3, batch_size=4, schedule="cosine", warmup_ratio=0.1, weight_decay=0.01, betas=(0.9, 0.99),
    max_length=256, accelerator="cpu", devices=2, precision="32-true", accumulate_grad_batches=2,
    gradient_clip_val=0.05, deterministic=True, strategy="ddp",
)  # fmt: skip
TWO = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "threads=2")


@pytest.fixture(autouse=True)
def _quick(quick_python: None) -> None:
    """All but `test_no_process_is_left_when_the_parent_is_killed`, whose processes are real."""


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with Group(2, "cpu", threads=2, scratch=tmp_path_factory.mktemp("group")) as two:
        yield two


@pytest.fixture(scope="module")
def lively(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the tiny model whose texts vary."""
    folder = tmp_path_factory.mktemp("lively") / "model"
    write_folder(folder, enliven(Policy(tiny_folder)).weights(), tiny_folder)
    return folder


def examples(policy: Policy, n: int = 9) -> list[Example]:
    """Of different lengths; of the last batch of four there is one, and one of two processes has nothing."""
    texts = [(f"sum {i}+{i * i}?", f" {i + i * i} because of {'ten ' * (i % 4)}") for i in range(n)]
    return [Example(policy.encode_prompt(p), policy.encode_completion(c)) for p, c in texts]


def both(
    group: Group, folder: Path, spec: FitSpec, out: Path, *, base: Path | None = None,
    events: dict[str, Any] | None = None, scores: list[float] | None = None,
) -> tuple[tuple[Fitted, Weights], tuple[Fitted, Weights]]:  # fmt: skip
    """What a fit is like, and its weights, by two processes and by this one."""
    alone = Policy(folder)
    given = None if base is None else {n: w.clone() for n, w in Policy(base).weights().items()}
    asked: list[list[str]] = []

    def judge(decode: Any) -> float:
        assert scores is not None
        asked.append([c.text for c in decode(["a", "bc"], keys=[1, 2], max_new_tokens=5, batch_size=2)])
        return scores[(len(asked) - 1) % len(scores)]

    job = Job(folder, False, examples(alone), spec, 3, out, folder, base=base,
              events=Events([base], events) if events and base else None)  # fmt: skip
    two = group.fit(job, score=judge if scores else None)
    one = fit(
        alone, examples(alone), dataclasses.replace(spec, devices=1, strategy="single"), seed=3, scratch=out.parent,
        base=given, callbacks=[MergeCallback(given, **events)] if events else [],
        score=(lambda: judge(lambda *a, **k: complete(alone, *a, **k))) if scores else None,
    )  # fmt: skip
    half = len(asked) // 2
    assert asked[:half] == asked[half:]
    return (two, read_weights(out)), (one, alone.weights())


def assert_close(a: tuple[Fitted, Weights], b: tuple[Fitted, Weights], atol: float = 1e-5) -> None:
    assert (len(a[0].losses), a[0].epoch, a[0].scores) == (len(b[0].losses), b[0].epoch, b[0].scores)
    assert a[0].losses == pytest.approx(b[0].losses, rel=max(1e-5, atol))
    assert a[0].kl == pytest.approx(b[0].kl, rel=1e-3, abs=1e-7)
    assert a[1].keys() == b[1].keys()
    for name, tensor in a[1].items():
        torch.testing.assert_close(tensor, b[1][name], rtol=0, atol=atol)


# --- shares -----------------------------------------------------------------------------------------------------------


def test_prompts_are_shared_out_whole_and_evenly() -> None:
    assert shared_out([], 8, 2) == [[], []]
    assert shared_out(["a", "a", "a"], 8, 2) == [[0, 1, 2], []]
    long = "x" * 400
    # 3 x (100 + 10) are more than the others together: 2 x 10.25 + 10.25
    assert shared_out(["a", long, "b", long, "a", long], 10, 2) == [[1, 3, 5], [0, 2, 4]]
    prompts = [f"{i:0{1 + i % 7}}" for i in range(50) for _ in range(3)]
    shares = shared_out(prompts, 16, 3)
    assert sorted(i for share in shares for i in share) == list(range(150))
    assert all({prompts[i] for i in a}.isdisjoint(prompts[i] for i in b) for a, b in combinations(shares, 2))
    assert max(map(len, shares)) - min(map(len, shares)) <= 3


def test_examples_of_a_step_are_shared_out(tiny: Policy) -> None:
    rows = examples(tiny)
    parts = [part_of(rows, rank, 2, tiny.pad_id) for rank in range(2)]
    counts = [sum(len(piece["input_ids"]) for piece in part["pieces"]) for part in parts]
    assert counts == [5, 4]
    learned = [sum(int((piece["labels"] != -100).sum()) for piece in part["pieces"]) for part in parts]
    assert sum(learned) == sum(len(e.completion) for e in rows) == parts[0]["tokens"] == parts[1]["tokens"]
    assert max(learned) < 0.7 * sum(learned)
    nothing = part_of(rows[:1], 1, 2, tiny.pad_id)
    assert nothing["tokens"] == math.inf
    assert [len(piece["input_ids"]) for piece in nothing["pieces"]] == [1]
    (piece,) = part_of(rows, 0, 2, tiny.pad_id, uncut=True)["pieces"]
    assert len(piece["input_ids"]) == 5
    alone, whole = part_of(rows, 0, 1, tiny.pad_id), batch_of(rows, tiny.pad_id)
    assert alone["tokens"] == whole["tokens"]
    for mine, theirs in zip(alone["pieces"], whole["pieces"], strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_how_many_devices() -> None:
    def cfg(*words: str) -> Any:
        return check(compose_config(*words))

    assert devices_of(cfg(), "cuda", 8) == 1
    assert devices_of(cfg("trainer=ddp"), "cpu") == 2
    assert devices_of(cfg("trainer=ddp", "trainer.devices=1"), "cpu") == 1
    assert devices_of(cfg("trainer=ddp", "trainer.devices=3"), "cuda", 4) == 3
    with pytest.raises(ConfigError, match=r"^trainer\.devices: 5 were asked for, and torch finds 4 GPUs; use fewer"):
        devices_of(cfg("trainer=ddp", "trainer.devices=5"), "cuda", 4)
    with pytest.raises(ConfigError, match=r"^sft\.batch_size: 1 examples a step cannot be shared out to .*devices=2"):
        devices_of(cfg("trainer=ddp", "sft.batch_size=1"), "cpu")


# --- what two do ------------------------------------------------------------------------------------------------------


def test_completions_are_those_of_one_device(group: Group, lab: Policy) -> None:
    prompts = [f"sum {i}+{j}-15?" for i in range(10, 16) for j in (3, 14) for _ in range(2)]
    decode, ticks = group.load(LAB_SEED0, dtype="float32"), list[int]()
    for keys in (None, list(range(2**63, 2**63 + len(prompts)))):
        how: dict[str, Any] = {"keys": keys, "max_new_tokens": 16, "batch_size": 5, "stop": ("=",), "top_p": 0.9}
        alone = complete(lab, prompts, **how)
        assert len({c.text for c in alone}) > 3
        assert decode(prompts, **how, on_progress=ticks.append) == alone
    assert sum(ticks) == 2 * len(prompts)
    assert decode([], keys=None, max_new_tokens=4, batch_size=2) == []


def test_ddp_with_merge_events_is_the_fit_of_one(group: Group, lively: Path, tiny_folder: Path, tmp_path: Path) -> None:
    events = {"method": Method(sparsify="random", density=0.7), "at": [1], "ratios": {1: 0.4}, "seed": 5,
              "reset_optimizer": True}  # fmt: skip
    two, one = both(group, lively, SPEC, tmp_path / "out", base=tiny_folder, events=events)
    assert_close(two, one)
    start = read_weights(lively)
    assert any((two[1][n] - start[n]).abs().max() > 0.01 for n in start)  # it has moved
    again, _ = both(group, lively, SPEC, tmp_path / "again", base=tiny_folder, events=events)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert two[0] == again[0]


@pytest.mark.parametrize(
    ("precision", "attention"), [("32-true", "sdpa"), ("bf16-mixed", "sdpa"), ("32-true", "eager")]
)
def test_fsdp_is_the_fit_of_one(precision: str, attention: str, group: Group, lively: Path, tmp_path: Path) -> None:
    """In one row, and, where the model does not take it so, in one piece."""
    model = tmp_path / "model"
    shutil.copytree(lively, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_implementation": attention}))
    assert Policy(model).model.config._attn_implementation == attention
    checkpointing = precision == "bf16-mixed"
    spec = dataclasses.replace(SPEC, strategy="fsdp", precision=precision, gradient_checkpointing=checkpointing)
    two, one = both(group, model, spec, tmp_path / "out")
    assert_close(two, one, atol=1e-5 if precision == "32-true" else 5e-3)


def test_ddp_with_what_pulls_to_the_base(group: Group, lively: Path, tiny_folder: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, l2_to_base=0.1, kl_to_base=0.5)
    two, one = both(group, lively, spec, tmp_path / "out", base=tiny_folder)
    assert_close(two, one)
    assert len(two[0].kl) == 2


def test_ddp_with_adapters_stops_where_one_device_does(group: Group, lively: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    spec = dataclasses.replace(
        SPEC, epochs=4, patience=1, lora=LoraSpec(rank=2, alpha=4.0, dropout=0.0, targets="all-linear")
    )
    two, one = both(group, lively, spec, tmp_path / "out", scores=[0.5, 0.75, 0.25])
    assert_close(two, one)
    assert (two[0].scores, two[0].epoch) == ([0.5, 0.75, 0.25], 2)


# --- how they end -----------------------------------------------------------------------------------------------------


def gone(pids: list[int]) -> bool:
    """Whether none of these processes is there any more, zombies aside."""

    def there(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return not any(map(there, pids))


def soon(done: Callable[[], bool]) -> bool:
    for _ in range(600):
        if done():
            return True
        time.sleep(0.1)
    return False


def test_errors_of_processes_are_those_of_one(group: Group, lively: Path, tmp_path: Path) -> None:
    """One in a fit ends the group, and another request begins a new one; others it outlives."""
    with pytest.raises(FileNotFoundError, match="its weights are gone"):
        group.load(tmp_path / "nowhere", dtype="float32")
    decode = group.load(lively, dtype="bfloat16")
    with pytest.raises(DeviceError, match=r"(?s)the process of device 0 of 2 failed:.*Traceback.*colour"):
        decode(["a", "b"], keys=None, max_new_tokens=2, batch_size=2, colour="blue")
    with pytest.raises(PolicyError, match=r"lower sampler\.max_new_tokens or use shorter prompts"):
        decode(["a", "b"], keys=None, max_new_tokens=1000, batch_size=2)
    assert len(decode(["a", "b"], keys=None, max_new_tokens=2, batch_size=2)) == 2
    pids = [child.process.pid for child in group.children]
    job = Job(lively, False, examples(Policy(lively)), dataclasses.replace(SPEC, max_length=5), 3, tmp_path, lively)
    with pytest.raises(SftError, match=r"^an example has \d+ tokens; sft\.max_length is 5"):
        group.fit(job)
    assert soon(lambda: gone(pids))


def test_ctrl_c_ends_a_group(group: Group, lively: Path) -> None:
    decode = group.load(lively, dtype="float32")
    pids = [child.process.pid for child in group.children]

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(["a", "b"], keys=None, max_new_tokens=2, batch_size=2, on_progress=interrupt)
    assert soon(lambda: gone(pids))


def test_a_process_that_is_killed_is_named_with_the_end_of_its_log(group: Group, lively: Path) -> None:
    decode = group.load(lively, dtype="float32")
    victim, other = (child.process.pid for child in reversed(group.children))
    with group.children[1].log.open("a") as log:
        log.write("what it said last\n")
    os.kill(victim, signal.SIGKILL)
    said = r"(?s)^the process of device 1 of 2 has ended \(signal SIGKILL\); the system kills .*what it said last$"
    with pytest.raises(DeviceError, match=said):
        decode(["a", "b"], keys=None, max_new_tokens=2, batch_size=2)
    assert soon(lambda: gone([other]))


def test_no_process_is_left_when_the_parent_is_killed(lively: Path, tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom itermerge.devices import Group\n"
        f"group = Group(2, 'cpu', threads=1, scratch=Path({str(tmp_path)!r}))\n"
        f"decode = group.load(Path({str(lively)!r}), dtype='float32')\n"
        "decode(['a', 'b'], keys=None, max_new_tokens=2, batch_size=2)\n"
        "print(*(c.process.pid for c in group.children), flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([os.environ["NURSERY_PYTHON"], "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert not gone(pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert soon(lambda: gone(pids))


# --- runs -------------------------------------------------------------------------------------------------------------

QUICK = ("sft.batch_size=8", "analysis.importance=[skip]", "suite.pre_merge=false")


def test_a_run_on_two_devices_has_the_figures_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"store.dir={tmp_path / 'store'}"
    run_here(tmp_path / "two", *QUICK, *TWO, where)
    monkeypatch.setattr(Group, "_start", lambda _: pytest.fail("starts processes"))
    one = run_here(tmp_path / "one", *QUICK, "trainer.accelerator=cpu", "threads=2", where)
    assert one["stages"]["reused"] == {"importance": 1}  # on the same samples; what rounds otherwise is not shared
    rounds = zip(read_rounds(tmp_path / "two"), read_rounds(tmp_path / "one"), strict=True)
    for mine, theirs in rounds:
        assert mine.keys() == theirs.keys()
        for name in ("val/id/acc", "id/acc", "ood/acc", "sft/loss", "weights/drift", "train_sample/accept_rate"):
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-3)
    again = run_here(tmp_path / "again", *QUICK, *TWO, where)
    assert again["stages"]["computed"] == {}
    assert read_rounds(tmp_path / "again") == read_rounds(tmp_path / "two")


def test_a_sweep_with_two_devices_a_job(tmp_path: Path) -> None:
    """A line search has weights that are in no folder yet, patience has them in the fit."""
    words = (*SMALL, *QUICK, *TWO, "rounds=1", "merge.every_n_epochs=last", "merge/policy=search", "sft.patience=1",
             "merge.policy.search=[0.5,1.0]", "merge.ratio=0.6,1.0", "suite.pass_k_n=0")  # fmt: skip
    out = itermerge("--multirun", *words, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert out.returncode == 0, out.stderr + out.stdout
    for job in ("0", "1"):
        assert (tmp_path / "sweep" / job / "DONE").exists()
        assert len(json.loads((tmp_path / "sweep" / job / "rounds/01/search.json").read_text())) == 2
    said = json.loads((tmp_path / "sweep" / "1" / "summary.json").read_text())["stages"]
    assert said["reused"]["fit"] == 1


def test_keys_of_one_device_know_nothing_of_strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = plan.Ledger.stage, set[str]()

    def spy(self: Any, name: str, inputs: Any, *rest: Any, **how: Any) -> Any:
        made = own(self, name, inputs, *rest, **how)
        seen.add(f"{name} {made.key}")
        return made

    def keys(*words: str) -> set[str]:
        seen.clear()
        plan.plan([check(compose_config(*SMALL, "rounds=1", "plan=true", f"store.dir={tmp_path}", *words))])
        return set(seen)

    monkeypatch.setattr(plan.Ledger, "stage", spy)
    single = keys()
    assert {word.split()[0] for word in single} >= {"sample", "verify", "fit", "evaluate", "probe", "held_out"}
    assert keys("trainer=ddp", "trainer.devices=1") == single
    assert keys("trainer=ddp", "trainer.devices=2").isdisjoint(single)
    assert stages._spec_key(dataclasses.replace(SPEC, devices=1, strategy="single")).keys() == (
        {f.name for f in dataclasses.fields(FitSpec)} - {"strategy"}
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_memory_of_each_device_by_hand() -> None:
    shape = plan.Shape(weights=704, body=600, head=80, layers=2, hidden=8, width=8, kv=4, ffn=16, vocab=10)
    alone = plan.fit_memory(shape, rows=1, width=6, predicted=4, precision="bf16-mixed", trained=704)
    each = plan.spread(alone, shape, 8)
    assert [each[k] for k in ("weights", "gradients", "Adam's moments")] == [352, 352, 704]
    assert each["gathered from the others"] == 4 * (3 * 300 + 2 * 104)
    assert {k: v for k, v in each.items() if k not in alone or v == alone[k]}.keys() >= {"activations", "logits"}
    half = plan.sampling_memory(shape, rows=3, positions=20, dtype="bfloat16", nucleus=True)
    assert plan.sampling_copy_alone(half)["weights"] == 2 * 704
    whole = plan.sampling_memory(shape, rows=3, positions=20, dtype="float32", nucleus=True)
    assert plan.sampling_copy_alone(whole)["weights"] == 4 * 704


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_plan_shares_rows_out(strategy: str, tmp_path: Path) -> None:
    words = (*SMALL, "plan=true", f"store.dir={tmp_path}", "merge.every_n_epochs=last", "sft.batch_size=16")
    alone, four = (
        plan.plan([check(compose_config(*words, *more))]).memory
        for more in ((), (f"trainer={strategy}", "trainer.devices=4"))
    )
    one, each = alone["fine-tuning"], four[f"fine-tuning on each of 4 devices ({strategy})"]
    assert [4 * each[k] for k in ("activations", "logits")] == [one[k] for k in ("activations", "logits")]
    assert (4 if strategy == "fsdp" else 1) * each["Adam's moments"] == one["Adam's moments"]
    assert 4 * four["sampling on each of 4 devices"]["KV cache"] == alone["sampling"]["KV cache"]
    assert four["kept on the CPU"]["4 processes that read it"] == 4 * one["weights"]

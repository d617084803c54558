"""`itermerge-analyze` and the study of layers: figures against the parts that make them, and what a mistake meets."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_a_process, run_here
from safetensors.torch import load_file, save_file
from scipy import stats

from itermerge import study_layers
from itermerge.analysis.change import layer_change
from itermerge.policy import Policy
from itermerge.stages import LAB_SEED0
from itermerge.study import StudyError
from itermerge.weights import read_weights


def _variant(folder: Path, **edits: Any) -> Path:
    """The lab's base with weights edited: a factor, None to drop a tensor, or a tensor."""
    shutil.copytree(LAB_SEED0, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, edit in edits.items():
        if edit is None:
            del weights[name]
        else:
            weights[name] = edit if isinstance(edit, torch.Tensor) else weights[name] * edit
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def _analyze(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = "from itermerge.cli import analyze_main; analyze_main()"
    return in_a_process(code, *words, cwd=cwd, env={"COLUMNS": "120"})


Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The lab's base against itself with two matrices scaled, on few problems."""
    folder = tmp_path_factory.mktemp("compared")
    tuned = _variant(folder / "tuned", **{Q.format(2): 1.01, Q.format(5): 1.02})
    done = _analyze(
        folder, f"base={LAB_SEED0}", f"tuned={tuned}", "out=out", "task.family=find", "task.n_train=12", "sampler.n=2",
        "analysis.examples=8", "threads=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def test_change_of_two_checkpoints(compared: tuple[Path, str]) -> None:
    folder, said = compared
    layers = json.loads((folder / "layers.json").read_text())
    own = layer_change(read_weights(LAB_SEED0), load_file(folder.parent / "tuned" / "model.safetensors"))
    assert layers["merged"] == own
    assert layers["merged"]["layer_05"]["kinds"]["q"]["relative"] == pytest.approx(0.02, rel=1e-4)
    assert layers["merged"]["layer_03"]["relative"] == 0
    assert (layers["update"]["layer_03"]["effective_rank"], layers["update"]["layer_05"]["cosine"]) == (None, None)
    assert "layer_05" in said


def test_importance_and_mismatch_of_two_checkpoints(compared: tuple[Path, str]) -> None:
    folder, said = compared
    table = json.loads((folder / "importance.json").read_text())
    assert (table["source"], table["examples"], table["layers"]) == ("verified", 8, 8)
    found = json.loads((folder / "analysis.json").read_text())
    layers = json.loads((folder / "layers.json").read_text())["merged"]
    for name, values in table["values"].items():
        rows = [f"layer_{i:02d}" for i in range(8)]
        rho = stats.spearmanr(np.mean(values, 0), [layers[row]["relative"] for row in rows]).statistic
        assert found[f"mismatch/{name}/spearman"] == pytest.approx(rho)
        assert f"{rho:+.2f}" in said
    assert (folder / "report.html").stat().st_size > 500_000
    assert (folder / "figures" / "importance_change.png").read_bytes().startswith(b"\x89PNG")
    assert "report out/report.html" in said


def test_a_folder_is_never_overwritten(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    before = (folder / "layers.json").read_bytes()
    done = _analyze(folder.parent, f"base={LAB_SEED0}", f"tuned={LAB_SEED0}", "out=out")
    assert done.returncode == 2
    assert "out: " in done.stderr
    assert "never overwritten" in done.stderr
    assert (folder / "layers.json").read_bytes() == before


def test_solutions_that_do_not_fit_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        '{"prompt": "a", "completion": "1#1"}\n{"prompt": "%s", "completion": "2"}\n' % ("7" * 999)
    )
    done = _analyze(tmp_path, f"base={LAB_SEED0}", f"tuned={LAB_SEED0}", "out=out", "solutions=mine.jsonl")
    assert done.returncode == 2
    assert "solutions: number 2 has a prompt of" in done.stderr


def test_a_mistake_leaves_the_folder_free(tmp_path: Path) -> None:
    words = (f"base={LAB_SEED0}", "out=out", "analysis.importance=[]")
    assert _analyze(tmp_path, *words, "tuned=./nowhere").returncode == 2
    assert _analyze(tmp_path, *words, f"tuned={LAB_SEED0}").returncode == 0


def test_given_solutions_and_gold_ones(tmp_path: Path) -> None:
    """A base that solves nothing is measured on the task's own solutions, which is said; a file's texts come first."""
    nothing = _variant(tmp_path / "nothing", **{"model.norm.weight": 0.0})
    words = ("analysis.importance=[block_influence]", "analysis.examples=4", "task.n_train=6", "sampler.n=1")
    done = _analyze(tmp_path, f"base={nothing}", f"tuned={LAB_SEED0}", "out=gold", *words)
    assert done.returncode == 0, done.stderr
    assert "the base solves none of the problems of task chain" in done.stdout + done.stderr
    assert json.loads((tmp_path / "gold" / "importance.json").read_text())["source"] == "gold"
    (tmp_path / "mine.jsonl").write_text('{"prompt": "sum 1+2?", "completion": "3#3"}\n' * 3)
    done = _analyze(tmp_path, f"base={LAB_SEED0}", f"tuned={nothing}", "out=mine", *words, "solutions=mine.jsonl")
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "mine" / "importance.json").read_text())
    assert (table["source"], table["examples"]) == ("file", 3)


def _drop(name: str) -> Any:
    return lambda folder: _variant(folder, **{name: None})


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (_drop(Q.format(1)), (), r"tuned and base differ in their tensors: missing \['model\.layers\.1\.self"),
        (
            lambda f: _variant(f, **{Q.format(1): torch.zeros(2, 3)}), (),
            r"layers\.1\.self_attn\.q_proj\.weight: tuned has shape \(2, 3\), base \("
        ),
        (lambda f: _variant(f, **{Q.format(1): float("nan")}), (), r"q_proj\.weight: has weights that are not finite"),
        (lambda f: f, (), r"tuned: .* is neither a folder nor a Hugging Face repository"),
        (lambda _: LAB_SEED0, ("analysis.importance=[skp]",), r"analysis\.importance: 'skp' is none of skip, taylor"),
        (lambda _: LAB_SEED0, ("analysis.exampels=3",), r"exampels"),
        (lambda _: LAB_SEED0, ("solutions=none.jsonl",), r"solutions: there is no file none\.jsonl"),
        (lambda _: LAB_SEED0, ("analysis.effective_rank=maybe",), r"effective_rank: must be true, false or auto"),
        (lambda _: LAB_SEED0, ("solutions=bad.jsonl",), r"solutions: bad\.jsonl, line 2: expected"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make: Any, words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    import re

    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    done = _analyze(tmp_path, f"base={LAB_SEED0}", f"tuned={make(tmp_path / 'tuned')}", "out=out", *words)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "layers.json").exists()


def test_a_tied_head_that_only_one_file_holds_is_left_out(tmp_path: Path) -> None:
    weights = read_weights(LAB_SEED0)
    tied = _variant(tmp_path / "tied", **{"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    done = _analyze(tmp_path, f"base={LAB_SEED0}", f"tuned={tied}", "out=out", "analysis.importance=[]")
    assert done.returncode == 0, done.stderr
    assert "lm_head.weight of tuned is left out: it is tied to the embeddings" in done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["notes"]
    other = _variant(tmp_path / "other", **{"lm_head.weight": weights["model.embed_tokens.weight"] * 2})
    done = _analyze(tmp_path, f"base={LAB_SEED0}", f"tuned={other}", "out=out2", "analysis.importance=[]")
    assert "unexpected ['lm_head.weight']" in done.stderr


def test_change_stays_when_importance_fails(tmp_path: Path) -> None:
    """A base without a tokenizer: the change is written and reported, the command says what failed."""
    bare = _variant(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    done = _analyze(tmp_path, f"base={bare}", f"tuned={LAB_SEED0}", "out=out")
    assert done.returncode == 2
    assert "has no tokenizer" in done.stderr
    assert (tmp_path / "out" / "layers.json").exists()
    assert (tmp_path / "out" / "report.html").exists()


# --- the study -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chains")
    for seed in (0, 1):
        for ratio in ("0.5", "1"):
            name = f"{seed}-{ratio}"
            words = (f"merge.ratio={ratio}", f"seed={seed}", "rounds=1", "analysis.importance=[skip,angular]")
            run_here(folder / "runs" / name, f"store.dir={folder / 'store'}", "merge.every_n_epochs=last", *words)
    return folder


def test_study_of_layers_against_its_runs(chains: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = chains / "out"
    assert study_layers.main([str(chains / "runs"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = {(r["method"], r["estimator"]): r for r in study_layers.table(study_layers.read([out], None), 0.25)}
    assert set(rows) == {(m, e) for m in ("ratio 0.5, lr 0.0005", "vanilla, lr 0.0005") for e in ("skip", "angular")}
    for ratio, method in (("0.5", "ratio 0.5, lr 0.0005"), ("1", "vanilla, lr 0.0005")):
        lines = [
            json.loads((chains / "runs" / f"{s}-{ratio}" / "rounds" / "01" / "round.json").read_text()) for s in (0, 1)
        ]
        rho = np.mean([line["mismatch/skip/spearman"] for line in lines])
        held = np.mean([line["mismatch/skip/top_share"] for line in lines])
        row = rows[method, "skip"]
        assert row["Spearman"].startswith(f"{rho:+.2f} [")
        assert row["top 1 of 4 hold"].startswith(f"{100 * held:.1f} [")
        assert f"| {method} | 1 | skip | {rho:+.2f}" in printed
        p = [line["mismatch/skip/p"] for line in lines]
        assert row["p < .05"] == f"{sum(x < 0.05 for x in p)}/2"
    with gzip.open(out / "units.jsonl.gz", "rt") as file:
        assert len(file.readlines()) == 4
    again = chains / "again"
    assert study_layers.main([str(out), "--out", str(again)]) == 0
    for name in ("mismatch.csv", "units.jsonl.gz", "importance_change.png"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_intervals_of_the_study_hold_seeds_and_examples(chains: Path) -> None:
    """Units that agree exactly have the interval of their examples; without spread in these there is none."""
    units = study_layers.read([chains / "runs"], None)
    one = [u for u in units if u.ratio == 1 and u.seed == 0]
    flat = {name: np.repeat(v.mean(0)[None], 5, 0) for name, v in one[0].values.items()}
    twins = [study_layers.Layers(**(vars(one[0]) | {"seed": s, "values": flat})) for s in (0, 1, 2)]
    (row, _) = study_layers.table(twins, 0.25)
    value, interval = row["Spearman"].split(" ", 1)
    assert interval == f"[{value}, {value}]"
    away = study_layers.Layers(**(vars(twins[0]) | {"seed": 3, "change": -twins[0].change}))
    (spread, _) = study_layers.table([*twins, away], 0.25)
    low, high = (float(x) for x in spread["Spearman"].split(" ", 1)[1].strip("[]").split(", "))
    assert low < high


def test_a_study_of_nothing_or_of_twins_is_refused(chains: Path, tmp_path: Path) -> None:
    assert study_layers.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    units = study_layers.read([chains / "runs"], None)
    with pytest.raises(StudyError, match="stands there twice"):
        study_layers.table([*units, units[0]], 0.25)
    run = tmp_path / "run"
    shutil.copytree(chains / "runs" / "0-1", run)
    (run / "rounds" / "00" / "importance.json").unlink()
    with pytest.raises(StudyError, match=r"has no importance\.json"):
        study_layers.read([run], None)


def test_dtype_and_solutions_a_problem_are_heeded(tmp_path: Path) -> None:
    """One solution a problem, and samples of a bfloat16 copy, while importance is of the float32 weights."""
    words = (f"base={LAB_SEED0}", f"tuned={LAB_SEED0}", "task.family=find", "task.n_train=4", "sampler.n=8")
    words += ("analysis.importance=[angular]", "task.max_solutions=1", "sampler.dtype=bfloat16")
    done = _analyze(tmp_path, *words, "out=out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "importance.json").read_text())["examples"] <= 4


def test_samples_come_from_a_copy_in_the_dtype_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import compose_analyze

    from itermerge import analyze
    from itermerge.config import check_analyze

    seen: list[torch.dtype] = []

    def sample(decode: Any, *_: Any, **__: Any) -> list[list[Any]]:
        seen.append(next(decode.args[0].model.parameters()).dtype)
        return []

    monkeypatch.setattr(analyze.evaluation, "sample", sample)
    monkeypatch.setattr(analyze, "zip", lambda *_, **__: [], raising=False)
    policy = Policy(LAB_SEED0)
    for asked in ("float32", "bfloat16"):
        cfg = check_analyze(compose_analyze("base=a", "tuned=b", "out=c", f"sampler.dtype={asked}", "task.n_train=2"))
        analyze._own_solutions(cfg, policy)
    assert seen == [torch.float32, torch.bfloat16]
    assert next(policy.model.parameters()).dtype == torch.float32

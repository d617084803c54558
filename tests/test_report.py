"""Reports from folders alone: hand values for what tables and charts hold; gaps, half-written folders, hostile text."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from conftest import compose_config
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from itermerge import report
from itermerge.config import check, to_dict
from itermerge.report import charts, folders, runs, sweeps
from itermerge.report.page import p_value

ITEMS = 100


@cache
def config_of(*words: str) -> str:
    """The config.yaml of a run; composing takes longer than most reports."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(check(compose_config(*words)))))


def write_job(folder: Path, ids: list[int], oods: list[int], *words: str, best: int = 1, saved: float = 2.5) -> None:
    """A finished job: the items solved in each round, of 100, in domain and out of it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_of(f"rounds={len(ids) - 1}", *words))
    lines = [
        {
            "round": t, "id/acc": i / ITEMS, "id/acc_low": 0, "id/acc_high": 1, "ood/acc": o / ITEMS,
            "ood/near/acc": o / ITEMS, "ood/near/acc_low": 0, "ood/near/acc_high": 1, "ood/far/acc": 0.9,
            "ood/far/acc_low": 0, "ood/far/acc_high": 1, "val/id/acc": i / ITEMS,
        }
        for t, (i, o) in enumerate(zip(ids, oods, strict=True))
    ]  # fmt: skip
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for t, i in enumerate(ids):
        (folder / "rounds" / f"{t:02d}").mkdir(parents=True)
        correct = [1] * i + [0] * (ITEMS - i)
        (folder / "rounds" / f"{t:02d}" / "scores.json").write_text(json.dumps({"chain": {"correct": correct}}))
    stages = {"computed": {"fit": 3, "merge": 1}, "reused": {"sample": 6}, "seconds_saved": saved}
    (folder / "summary.json").write_text(json.dumps({"stages": stages, "best_round_by_validation": best}))
    (folder / "DONE").write_text("")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Ratios .5 and 1, two seeds, and of one chain a shorter run."""
    write_job(tmp_path / "0", [20, 40, 50], [80, 80, 79], "merge.ratio=0.5", "seed=0", best=2)
    write_job(tmp_path / "1", [20, 44, 56], [80, 81, 78], "merge.ratio=0.5", "seed=1", best=1)
    write_job(tmp_path / "2", [20, 30, 60], [80, 70, 60], "merge.ratio=1", "seed=0")
    write_job(tmp_path / "3", [20, 25, 21], [80, 75, 50], "merge.ratio=1", "seed=1")
    write_job(tmp_path / "4", [20, 40], [80, 80], "merge.ratio=0.5", "seed=0")
    (tmp_path / "5").mkdir()  # a job without an end
    return tmp_path


def specs(page: Path) -> dict[str, Any]:
    """The charts of a page, as its script reads them."""
    return json.loads(element(page, "specs"))


def element(page: Path, name: str) -> str:
    """The text of the script element with this id."""
    return page.read_text().split(f'id="{name}">', 1)[1].split("</script>", 1)[0]


def data(spec: dict[str, Any], having: str) -> list[dict[str, Any]]:
    """The rows of a chart that have this field."""
    return [row for rows in spec["datasets"].values() for row in rows if having in row]


def _cells(table: Any) -> list[list[str]]:
    console = Console(width=200, record=True)
    console.print(table)
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_the_table_has_means_over_seeds_with_student_intervals(sweep: Path) -> None:
    table, _ = report.sweep(sweep)
    rows = {row[0]: row for row in _cells(table)}
    assert set(rows) == {"ratio=0.5 rounds=2", "ratio=1.0 rounds=2", "ratio=0.5 rounds=1"}
    # ID changes 30 and 36: mean 33, s = 3 sqrt(2), half interval 12.706 s / sqrt(2) = 38.1
    assert rows["ratio=0.5 rounds=2"][1:] == ["+33.0±38.1", "-1.5±6.4", "+0.0±0.0", "1-2: +27.0", "0.75", "8/20", "5s"]
    assert rows["ratio=0.5 rounds=1"][1:] == ["+20.0", "+0.0", "+0.0", "1: +20.0", "", "4/10", "2s"]


def test_mean_interval_is_students() -> None:
    mean, half = report.mean_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.303 * (7 / 3) ** 0.5 / 3**0.5, rel=1e-3)
    assert report.mean_interval([5.0]) == (5.0, 0.0)
    assert report.mean_interval([0.0, 1.0] * 20)[1] == pytest.approx(2.0227 * 0.50637 / 40**0.5, rel=5e-3)  # t of 39


def test_retention_is_the_share_of_vanillas_gain_and_undefined_where_that_may_be_nothing(sweep: Path) -> None:
    jobs = {j.folder.name: j for j in report.read_sweep(sweep)}
    assert jobs["0"].retention == pytest.approx(30 / 40)  # seed 0: vanilla gained 40 of 100 items
    assert jobs["2"].retention == pytest.approx(1)
    assert jobs["1"].retention is None  # seed 1: one item of 100, whose interval includes 0
    assert jobs["4"].retention is None  # no vanilla of as many rounds


def test_jobs_csv_has_a_row_a_job_with_final_and_best_figures(sweep: Path) -> None:
    report.sweep(sweep)
    with (sweep / "jobs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert (rows[1]["final/id/acc"], rows[1]["best/id/acc"], rows[1]["best_round"]) == ("0.56", "0.44", "1")
    assert (rows[0]["computed"], rows[0]["reused"], rows[0]["seconds_saved"]) == ("4", "6", "2.5")
    assert (rows[0]["retention"], rows[1]["retention"]) == ("0.75", "")
    assert (rows[0]["merge.ratio"], rows[0]["rounds"], rows[0]["seed"]) == ("0.5", "2", "0")
    with (sweep / "sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 4 + 2


def test_heatmap_cells_are_mean_changes_over_ratio_and_rounds(sweep: Path) -> None:
    _, paths = report.sweep(sweep)
    assert [p.name for p in paths] == ["report.html", "id_ood.png", "heatmap.png", "vs_vanilla.png", "pareto.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths[1:])
    drawn = specs(sweep / "report.html")

    def cells(name: str) -> dict[tuple[str, str], float]:
        return {(c["y"], c["x"]): c["value"] for c in data(drawn[name], "y")}

    # (ratio, round). The shorter run is part of the longer one: it counts once
    assert cells("heatmap-0") == {
        ("0.5", "1"): pytest.approx(fmean([20, 24])), ("0.5", "2"): pytest.approx(33),
        ("1", "1"): pytest.approx(7.5), ("1", "2"): pytest.approx(20.5),
    }  # fmt: skip
    assert cells("heatmap-1") == {
        ("0.5", "1"): pytest.approx(0.5), ("0.5", "2"): pytest.approx(-1.5),
        ("1", "1"): pytest.approx(-7.5), ("1", "2"): pytest.approx(-25),
    }  # fmt: skip
    # minus vanilla of the same seed: rounds 1 and 2, (20-10 + 24-5) / 2 and (30-40 + 36-1) / 2
    assert cells("vs_vanilla-0") == {("0.5", "1"): pytest.approx(14.5), ("0.5", "2"): pytest.approx(12.5)}
    assert cells("vs_vanilla-1") == {("0.5", "1"): pytest.approx(8), ("0.5", "2"): pytest.approx(23.5)}
    scales = [
        layer["encoding"]["color"]["scale"]["domain"] for n in "01" for layer in drawn[f"heatmap-{n}"]["layer"][:1]
    ]
    assert scales[0] == scales[1] == [pytest.approx(-33), pytest.approx(33)]  # one scale for ID and OOD


def test_no_heatmap_of_one_ratio(tmp_path: Path) -> None:
    write_job(tmp_path / "0", [20, 40], [80, 80], "seed=0")
    write_job(tmp_path / "1", [20, 40], [80, 80], "seed=1")
    _, paths = report.sweep(tmp_path)
    assert [p.name for p in paths] == ["report.html", "id_ood.png", "pareto.png"]
    text = (tmp_path / "report.html").read_text()
    assert "no heatmap of ratio and rounds: fewer than two ratios are done" in text
    assert "no difference to vanilla" in text


def test_vanilla_by_merge_none_stands_at_ratio_1(tmp_path: Path) -> None:
    write_job(tmp_path / "0", [20, 40], [80, 80], "merge.ratio=0.5")
    write_job(tmp_path / "1", [20, 60], [80, 70], "merge=none")
    _, pictures = report.sweep(tmp_path)
    assert "heatmap.png" in [p.name for p in pictures]
    assert [j.retention for j in report.read_sweep(tmp_path)] == pytest.approx([0.5, 1.0])


def test_how_a_sweep_was_resumed_is_no_key_of_it(tmp_path: Path) -> None:
    write_job(tmp_path / "0", [20, 40], [80, 80], "merge.ratio=0.5", "sweep.resume=x")
    write_job(tmp_path / "1", [20, 60], [80, 70], "merge.ratio=1")
    assert [j.keys for j in report.read_sweep(tmp_path)] == [{"merge.ratio": 0.5}, {"merge.ratio": 1.0}]


def test_numbers_in_labels_have_four_digits() -> None:
    assert report.label({"sft.lr": 0.00023823967, "merge.ratio": 0.5, "rounds": 3}) == "lr=0.0002382 ratio=0.5 rounds=3"


def test_settings_whose_short_labels_are_alike_are_not_taken_for_seeds(tmp_path: Path) -> None:
    write_job(tmp_path / "0", [20, 40], [80, 80], "merge.ratio=0.512345678")
    write_job(tmp_path / "1", [20, 60], [80, 70], "merge.ratio=0.512312345")
    table, _ = report.sweep(tmp_path)
    assert [row[:2] for row in _cells(table)] == [["ratio=0.512345678", "+20.0"], ["ratio=0.512312345", "+40.0"]]


def test_a_job_without_its_mark_is_no_result(tmp_path: Path) -> None:
    """It failed after its summary, and is under way again."""
    for name in "01":
        write_job(tmp_path / name, [20, 40], [80, 80], f"seed={name}")
    (tmp_path / "1" / "DONE").unlink()
    assert [j.folder.name for j in report.read_sweep(tmp_path)] == ["0"]


def test_reports_need_no_torch(run_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from itermerge import report, upkeep, sweep; "
        f"report.run(Path({str(run_folder)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- runs -----------------------------------------------------------------------------------------------------------

LAYERS = 4
IMPORTANCE = {"skip": [0.5, 0.2, 0.2, 0.1], "taylor": [1.0, 2.0, 3.0, 4.0]}
CHANGE = {1: [0.01, 0.01, 0.01, 0.01], 2: [0.01, 0.02, 0.03, 0.04], 3: [0.02, 0.02, 0.02, 0.04]}


def _rows(values: list[float]) -> dict[str, float]:
    return {f"layer_{i:02d}": v for i, v in enumerate(values)}


def _with_interval(name: str, value: float, half: float = 0.1) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def write_run(folder: Path, *words: str, new: bool = True, rounds: int = 3, samples: int = 8) -> Path:
    """A finished run of 4 layers; `new`: with importance, mismatch, held-out samples and the whole of diversity."""
    write_job(folder, [20 + 5 * t for t in range(rounds + 1)], [80] * (rounds + 1), *words)
    lines = report.read_rounds(folder)
    for t, line in enumerate(lines):
        where = folder / "rounds" / f"{t:02d}"
        line |= _with_interval("sample/pass@1", 0.3) | _with_interval("sample/pass@2", 0.4)
        line |= _with_interval("diversity/token_entropy", 0.5 - 0.1 * t)
        line |= {"ood/pair/acc": 0.5, "ood/pair/acc_low": 0.4, "ood/pair/acc_high": 0.6, "ood/pair/majority": 0.25}
        if t:
            line |= {"gap/superficiality": 0.05 * t, "sft/loss": 0.1}
            change = _rows(CHANGE[min(t, 3)])
            line |= {f"weights/change/{r}": v for r, v in change.items()}
            merged = {
                r: {"relative": v, "kinds": {"q": {"relative": v}, "up": {"relative": 2 * v}}}
                for r, v in change.items()
            }
            layers: dict[str, Any] = {"pre_merge": merged, "merged": merged}
            write_samples(where / "samples.jsonl", samples)
            if new:
                cosine = None if t == 1 else 0.5
                layers["update"] = {r: {"cosine": cosine, "sign_agreement": 0.6, "effective_rank": 0.3} for r in change}
                line |= _with_interval("mismatch/skip/spearman", -0.52, 0.2)
                line |= {"mismatch/skip/p": 0.0234, "mismatch/skip/top_expected": 0.5, "mismatch/top_k": 2}
                line |= _with_interval("mismatch/skip/top_share", 0.18, 0.1)
            (where / "layers.json").write_text(json.dumps(layers))
        if new:
            line |= _with_interval("diversity/self_bleu", 0.4) | _with_interval("sample/maj@2", 0.35)
            line |= {
                f"sample/{r}": v
                for r, v in zip(("correct", "wrong", "unparseable", "truncated"), (0.3, 0.5, 0.1, 0.1), strict=True)
            }
            write_samples(where / "held_out.jsonl", samples)
    write_rounds(folder, lines)
    if new:
        estimators = {
            name: {r: {"mean": v, "low": 0.8 * v, "high": 1.2 * v} for r, v in _rows(values).items()}
            for name, values in IMPORTANCE.items()
        }
        facts = {"source": "verified", "examples": 64, "layers": LAYERS, "estimators": estimators, "values": {}}
        (folder / "rounds" / "00" / "importance.json").write_text(json.dumps(facts))
    (folder / "timing.json").write_text(
        json.dumps({"seconds": 9.5, "store_seconds": 0.1, "stages": [
            {"stage": "fit", "seconds": 4.0, "reused": False}, {"stage": "fit", "seconds": 2.0, "reused": False},
            {"stage": "sample", "seconds": 0.5, "reused": True},
        ]})
    )  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps({"overrides": ["seed=0"], "commit": "abc", "diff": "-a\n+<b>"}))
    return folder


def write_rounds(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_samples(path: Path, n: int, completion: str = "1+1=2", samples: int = 2) -> None:
    rows = [
        {"id": f"p{i // samples}", "sample": i % samples, "prompt": f"problem {i // samples}?",
         "completion": completion, "answer": "2", "gold": "3" if i % 2 else "2", "verdict": i % 2 == 0,
         "reason": "wrong" if i % 2 else "correct", "tokens": 5}
        for i in range(n)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def text_of(folder: Path) -> str:
    """What the report of a run says, without the scripts."""
    report.run(folder)
    page = (folder / "report.html").read_text()
    return html.unescape(re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL))


def test_a_run_has_its_page_and_figures(run_folder: Path) -> None:
    paths = report.run(run_folder)
    assert [p.name for p in paths] == [
        "report.html", "id_ood.png", "importance_change.png", "layers.png", "diversity.png", "pass_at_k.png"
    ]  # fmt: skip
    said = text_of(run_folder)
    for words in (
        "merge=linear ratio=0.5, lr=0.0005, seed=0", "finished", "20.0 → 35.0%", "+15.0 points", "0.50 → 0.20",
        "nats a token", "by validation: 25.0%", "Time by stage: 9.5 s in all",
    ):  # fmt: skip
        assert words in said, words
    assert 'class="note warn"' not in said  # nothing is missing
    assert "-a\n+<b>" in said
    assert "&lt;b&gt;" in (run_folder / "report.html").read_text()


def test_curves_hold_per_cent_with_intervals_and_the_base(run_folder: Path) -> None:
    report.run(run_folder)
    drawn = specs(run_folder / "report.html")
    rows = data(drawn["id_ood-0"], "x")
    assert [(r["x"], r["value"], r["low"], r["high"]) for r in rows] == [(t, 20 + 5 * t, 0, 100) for t in range(4)]
    assert [r["value"] for r in data(drawn["id_ood-0"], "what")] == [20]
    task = drawn["tasks-0"]
    assert task["title"] == "pair (OOD)"
    assert {(r["what"], r["value"]) for r in data(task, "what")} == {("base", 50), ("majority baseline", 25)}
    assert [(r["name"], r["series"], r["value"]) for r in data(drawn["timing-0"], "name")] == [
        ("fit", "computed", 6), ("sample", "read from the store", 0.5)
    ]  # fmt: skip
    steps = {(r["series"], r["x"]): r["value"] for r in data(drawn["pass_at_k-0"], "x")}
    assert steps["base", 1] == pytest.approx(30)
    assert steps["round 3", 2] == pytest.approx(40)
    legends = [layer["encoding"]["color"]["legend"] for layer in drawn["pass_at_k-0"]["layer"]]
    assert set(legends) == {None}  # the page has one for both panels
    assert (run_folder / "report.html").read_text().count("</i>round 3</span>") == 1


def test_importance_and_change_are_shares_of_their_sums(run_folder: Path) -> None:
    report.run(run_folder)
    drawn = specs(run_folder / "report.html")["importance_change-0"]
    bars = [r for r in data(drawn, "what") if r["what"].startswith("importance")]
    assert [(r["layer"], r["share"], r["low"], r["high"]) for r in bars] == [
        (i, pytest.approx(v), pytest.approx(0.8 * v), pytest.approx(1.2 * v)) for i, v in enumerate([50, 20, 20, 10])
    ]  # fmt: skip
    assert [r["what"] for r in bars] == ["importance: top 2"] * 2 + ["importance: other layers"] * 2
    taylor = data(specs(run_folder / "report.html")["importance_change-1"], "what")[:4]
    assert [(r["share"], r["exact"]) for r in taylor] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    lines = {(r["what"], r["layer"]): r["share"] for r in data(drawn, "what") if r["what"].startswith("change")}
    assert lines == {
        **{("change, round 1", i): pytest.approx(25) for i in range(4)},
        **{("change, round 3", i): pytest.approx(v) for i, v in enumerate([20, 20, 20, 40])},
    }
    assert drawn["title"] == {
        "text": "skip",
        "subtitle": [
            "relative change: ρ = −0.52 [−0.72, −0.32], p = .02",
            "squared update: top 2 layers hold 18% (50% if spread evenly)",
        ],
    }  # fmt: skip


def test_p_values_have_two_digits() -> None:
    assert [p_value(p) for p in (0.0004, 0.0123, 0.2, 1.0)] == ["p < .01", "p = .01", "p = .20", "p = 1.00"]


def test_layers_by_round_by_kind_and_between_updates(run_folder: Path) -> None:
    report.run(run_folder)
    drawn = specs(run_folder / "report.html")
    titles = {spec["title"]: spec for name, spec in drawn.items() if name.startswith("layers-")}
    by_round = {(c["y"], c["x"]): c["value"] for c in data(titles["relative change (%)"], "y")}
    assert by_round["layer_03", "2"] == pytest.approx(4)
    kinds = {(c["y"], c["x"]): c["value"] for c in data(titles["by kind of matrix, round 3 (%)"], "y")}
    assert kinds["layer_03", "up"] == pytest.approx(8)
    cosine = data(titles["cosine with the previous round's update"], "y")
    assert {(c["x"], c["value"], c["said"]) for c in cosine} == {
        ("1", None, "–"),
        ("2", 0.5, "+0.50"),
        ("3", 0.5, "+0.50"),
    }


def test_specs_are_valid_and_figures_show_their_data(run_folder: Path, sweep: Path) -> None:
    """Neither the page nor the PNG checks a spec; and a PNG whose data were lost is white but for its axes."""
    figures = runs.page(report.read_run(run_folder)).figures() + sweeps.page(sweep, report.read_sweep(sweep)).figures()
    assert len(figures) > 10
    for panel in (p for figure in figures for p in figure.panels):
        assert panel.to_dict(validate=True)
    report.run(run_folder)
    for name, colour in {
        "id_ood": charts.ID, "importance_change": charts.PALE_BLUE, "diversity": charts.VERMILLION,
        "pass_at_k": charts.GREY,
    }.items():  # fmt: skip
        pixels = np.asarray(Image.open(run_folder / "figures" / f"{name}.png").convert("RGB"))
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(-1) < 2).sum() > 300, name


def test_an_older_run_lacks_what_came_later_and_says_so(tmp_path: Path) -> None:
    paths = report.run(write_run(tmp_path / "run", new=False))
    assert [p.name for p in paths] == ["report.html", "id_ood.png", "layers.png", "diversity.png", "pass_at_k.png"]
    said = text_of(tmp_path / "run")
    assert "no layer importance: there is no importance.json" in said
    assert "not measured in this run: different solutions, different n-grams, self-BLEU" in said
    assert "no held-out samples in this folder" in said


def test_a_half_written_run_says_what_is_missing(run_folder: Path) -> None:
    for name in ("summary.json", "timing.json", "DONE"):
        (run_folder / name).unlink()
    lines = (run_folder / "rounds.jsonl").read_text()
    (run_folder / "rounds.jsonl").write_text(lines[:-40])
    (run_folder / "FAILED").write_text("Traceback (most recent call last):\n  File x\nOSError: disk <full>\n")
    (run_folder / "rounds" / "02" / "layers.json").unlink()
    said = text_of(run_folder)
    assert "failed: OSError: disk <full>" in said
    assert "rounds.jsonl has 1 line that cannot be read" in said
    assert "of rounds 0 to 3, 0, 1, 2 are written; 3 missing here" in said
    assert "round 2 has no rounds/02/layers.json" in said
    assert "no timing.json" in said


def test_gaps_are_marked(run_folder: Path) -> None:
    lines = report.read_rounds(run_folder)
    lines[1]["id/acc"] = float("nan")
    lines[2] = {k: v for k, v in lines[2].items() if not k.startswith(("weights/", "sft/", "ood/near"))}
    (run_folder / "rounds" / "02" / "layers.json").unlink()
    (run_folder / "rounds" / "02" / "samples.jsonl").unlink()
    (run_folder / "rounds" / "00" / "importance.json").write_text("{cut")
    write_rounds(run_folder, lines)
    said = text_of(run_folder)
    assert "no in-domain (ID) in round 1: a gap in the line" in said
    assert "no out-of-domain, near in round 2: a gap in the line" in said
    assert "round 2 has no layer figures: nothing was fitted in it" in said
    assert "no training samples of round 2 in this folder" in said
    assert "rounds/00/importance.json cannot be read" in said
    drawn = specs(run_folder / "report.html")
    assert [r["value"] for r in data(drawn["id_ood-0"], "x")] == [20, None, 30, 35]
    assert {c["said"] for c in data(drawn["layers-0"], "y") if c["x"] == "2"} == {"–"}


def test_a_lost_round_is_a_gap(run_folder: Path) -> None:
    lines = report.read_rounds(run_folder)
    write_rounds(run_folder, [lines[0], lines[1], lines[3]])
    assert "of rounds 0 to 3, 0, 1, 3 are written; 2 missing here" in text_of(run_folder)
    assert [r["value"] for r in data(specs(run_folder / "report.html")["id_ood-0"], "x")] == [20, 25, None, 35]


def test_importance_from_the_metrics_where_the_file_is_gone(run_folder: Path) -> None:
    lines = report.read_rounds(run_folder)
    lines[0] |= {f"importance/skip/{r}": v for r, v in _rows([3.0, 1.0, 0.0, 0.0]).items()}
    write_rounds(run_folder, lines)
    (run_folder / "rounds" / "00" / "importance.json").unlink()
    report.run(run_folder)
    drawn = specs(run_folder / "report.html")
    assert [r["share"] for r in data(drawn["importance_change-0"], "what")][:4] == [75, 25, 0, 0]
    assert "importance_change-1" not in drawn


@pytest.mark.parametrize(
    "left", [(), ("config.yaml",), ("config.yaml", "rounds.jsonl"), ("rounds.jsonl", "INTERRUPTED"), ("summary.json",)]
)
def test_any_part_of_a_run_folder_has_a_page(run_folder: Path, left: tuple[str, ...]) -> None:
    (run_folder / "INTERRUPTED").write_text("")
    for path in run_folder.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = "interrupted" if "INTERRUPTED" in left else "finished" if "summary.json" in left else "not finished"
    assert f'">{state}' in text_of(run_folder)


def test_one_layer_and_one_round(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1)
    lines = report.read_rounds(folder)
    lines = [{k: v for k, v in line.items() if not re.search(r"layer_0[1-3]", k)} for line in lines]
    write_rounds(folder, lines)
    facts = json.loads((folder / "rounds" / "00" / "importance.json").read_text())
    facts["estimators"] = {"skip": {"layer_00": facts["estimators"]["skip"]["layer_00"]}}
    (folder / "rounds" / "00" / "importance.json").write_text(json.dumps(facts))
    assert len(report.run(folder)) == 6
    shares = [r["share"] for r in data(specs(folder / "report.html")["importance_change-0"], "what")]
    assert shares == [100, 100]


def test_a_failed_analysis_is_told(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    (run_folder / "summary.json").write_text(json.dumps(summary | {"analysis_failed": {"round 2": "out of <memory>"}}))
    assert "the analysis of round 2 failed: out of <memory>" in text_of(run_folder)


# --- samples --------------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(run_folder: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)><!-- & \u2028"
    write_samples(run_folder / "rounds" / "01" / "samples.jsonl", 4, hostile)
    (run_folder / "FAILED").write_text(f"ValueError: {hostile}\n")
    report.run(run_folder)
    page = (run_folder / "report.html").read_text().replace(charts.bundle(), "")
    assert "<img" not in page
    assert "<!--" not in page.replace("<!DOCTYPE", "")
    read = json.loads(element(run_folder / "report.html", "samples-data"))
    assert [row["text"] for row in read["rows"] if row["round"] == 1 and row["set"] == "training"] == [hostile] * 4
    script = (Path(report.__file__).parent / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script)


def test_samples_are_cut_and_taken_evenly_over_problems(run_folder: Path) -> None:
    write_samples(run_folder / "rounds" / "01" / "samples.jsonl", 2400, "x" * 2500, samples=8)
    report.run(run_folder)
    read = json.loads(element(run_folder / "report.html", "samples-data"))
    mine = [row for row in read["rows"] if row["round"] == 1 and row["set"] == "training"]
    assert {"round": 1, "set": "training", "shown": 150, "of": 2400} in read["shown"]
    assert len({row["prompt"] for row in mine}) == len(mine) == 150  # of 300 problems every second one
    assert len({row["sample"] for row in mine}) == 8  # not always the first sample
    assert {(len(row["text"]), row["length"]) for row in mine} == {(2000, 2500)}


def test_few_problems_give_several_samples_each() -> None:
    rows = [{"id": f"p{i // 100}", "sample": i % 100} for i in range(300)]
    taken = [row["id"] for row in runs.spread(rows, 150)]
    assert {p: taken.count(p) for p in taken} == {"p0": 50, "p1": 50, "p2": 50}


def test_pages_are_self_contained_and_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=8, samples=8)
    for t in range(9):
        for name in ("samples", "held_out")[t == 0 :]:
            write_samples(folder / "rounds" / f"{t:02d}" / f"{name}.jsonl", 2400, "<long> " * 400)
    report.run(folder)
    page = (folder / "report.html").read_text()
    assert len(page.encode()) < 5_000_000
    assert "default-src 'none'" in page
    assert "connect-src" not in page
    around = page.replace(charts.bundle(), "")
    assert len(around) < len(page) - 500_000
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|\bsrc=", around)


def test_the_same_folder_gives_the_same_page(run_folder: Path) -> None:
    first = [p.read_bytes() for p in report.run(run_folder)]
    assert [p.read_bytes() for p in report.run(run_folder)] == first


# --- sweeps ---------------------------------------------------------------------------------------------------------


def test_the_sweeps_page_tells_every_job(sweep: Path) -> None:
    jobs = [
        [f"merge.ratio={r}", f"seed={s}"] for r, s in ((0.5, 0), (0.5, 1), (1, 0), (1, 1), (0.5, 0), (7, 0), (7, 1))
    ]
    (sweep / "sweep.json").write_text(json.dumps({"command": [], "jobs": jobs}))
    (sweep / "5" / "FAILED").write_text("Traceback\nConfigError: merge.ratio: 7 <is> too much\n")
    (sweep / "0" / "report.html").write_text("")
    report.sweep(sweep)
    page = (sweep / "report.html").read_text()
    said = html.unescape(page)
    assert "5 of 7 jobs are done, 1 failed" in said
    assert "job 5 failed (merge.ratio=7 seed=0): ConfigError: merge.ratio: 7 <is> too much" in said
    assert "not begun (merge.ratio=7 seed=1)" in said
    assert '<a href="0/report.html">0</a>' in page
    assert '<a href="1/">1</a>' in page
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    cells = [re.findall(r"<td data-key=\"([^\"]*)\"", row) for row in body.split("<tr>")[1:]]
    assert len(cells) == 7
    heads = re.findall(r'<th><button type="button">([^<]*)', page)
    assert [row[heads.index("final/id/acc")] for row in cells] == ["0.5", "0.56", "0.6", "0.21", "0.4", "", ""]


def test_pareto_points_are_means_with_student_intervals_and_the_front_is_not_beaten(sweep: Path) -> None:
    report.sweep(sweep)
    points = {p["name"]: p for p in data(specs(sweep / "report.html")["pareto-0"], "series")}
    # ID 50 and 56: mean 53, half interval 12.706 x 3 sqrt(2) / sqrt(2); OOD 79 and 78
    p = points["ratio=0.5"]
    assert (p["x"], p["y"], p["high_x"] - p["x"], p["y"] - p["low_y"]) == pytest.approx((53, 78.5, 38.118, 6.353))
    assert points["ratio=1.0 (vanilla)"]["x"] == pytest.approx(40.5)
    front = sweeps.front_of([{"x": 1, "y": 3}, {"x": 2, "y": 2}, {"x": 2, "y": 1}, {"x": 0, "y": 3}, {"x": 3, "y": 0}])
    assert front == [{"x": 1, "y": 3}, {"x": 2, "y": 2}, {"x": 3, "y": 0}]


def test_curves_by_setting_have_the_mean_and_the_range_of_seeds(sweep: Path) -> None:
    report.sweep(sweep)
    rows = {(r["series"], r["x"]): r for r in data(specs(sweep / "report.html")["id_ood-0"], "x")}
    r = rows["ratio=0.5", 2]
    assert (r["value"], r["low"], r["high"]) == pytest.approx((53, 50, 56))


def test_several_vanillas_have_greys_of_their_own(tmp_path: Path) -> None:
    for i, (ratio, base) in enumerate(((0.5, 0), (1, 0), (0.5, 1), (1, 1))):
        write_run(tmp_path / str(i), f"merge.ratio={ratio}", f"model.seed={base}")
    report.sweep(tmp_path)
    cloud = specs(tmp_path / "report.html")["pareto-0"]["layer"][1]
    found = re.findall(r"#[0-9A-Fa-f]{6}", json.dumps(cloud["encoding"]["color"]))
    assert len(set(found)) == len(found) == 4


def test_a_picture_of_an_earlier_report_goes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    report.run(folder)
    picture = folder / "figures" / "importance_change.png"
    assert picture.is_file()
    (folder / "rounds" / "00" / "importance.json").unlink()
    report.run(folder)
    assert not picture.exists()


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    report.main([str(folder)])
    assert "note:" not in capsys.readouterr().err
    (folder / "rounds" / "00" / "importance.json").write_text("")
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 9, "id/')
    report.main([str(folder)])
    said = capsys.readouterr().err
    assert "rounds.jsonl has 1 line that cannot be read (cut off): left out" in said
    assert "rounds/00/importance.json cannot be read" in said


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", {"best_round_by_validation": -5}), ("summary.json", {"stages": {"computed": 3}}),
        ("summary.json", {"best_round_by_validation": None}),
        ("rounds/00/importance.json", {"estimators": {"skip": {"layer_x": {"mean": 1.0}}}}),
    ],
)  # fmt: skip
def test_files_that_parse_and_make_no_sense_crash_no_report(file: str, content: dict[str, Any], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": 3}))
    assert report.run(folder)[0].is_file()
    assert report.sweep(tmp_path)[1][0].is_file()


def test_a_rounds_folder_is_no_comparison(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with pytest.raises(report.ReportError, match="is no run"):
        report.kind_of(folder / "rounds" / "02")


def test_profiles_and_mismatch_by_setting(tmp_path: Path) -> None:
    for i, (ratio, seed) in enumerate(((0.5, 0), (0.5, 1), (1, 0), (1, 1))):
        folder = write_run(tmp_path / str(i), f"merge.ratio={ratio}", f"seed={seed}")
        lines = report.read_rounds(folder)
        lines[-1] |= {"mismatch/skip/spearman": -0.4 - 0.2 * seed, "weights/change/layer_00": 0.01 * (1 + seed)}
        write_rounds(folder, lines)
    _, paths = report.sweep(tmp_path)
    drawn_as = ["id_ood", "heatmap", "vs_vanilla", "pareto", "collapse", "layers", "mismatch"]
    assert [p.stem for p in paths[1:]] == drawn_as
    drawn = specs(tmp_path / "report.html")
    # pass@1, pass@2, token entropy and different solutions over rounds, a line a setting
    entropy = {(r["series"], r["x"]): r["value"] for r in data(drawn["collapse-2"], "x")}
    assert entropy["ratio=0.5", 2] == pytest.approx(0.3)
    profile = {(r["series"], r["x"]): r for r in data(drawn["layers-0"], "x")}
    r = profile["ratio=0.5", 0]
    assert (r["value"], r["low"], r["high"]) == pytest.approx((1.5, 1, 2))
    rho = {r["name"]: r for r in data(drawn["mismatch-0"], "name")}
    # -.4 and -.6: half interval 12.706 x .1414 / sqrt(2)
    r = rho["ratio=0.5"]
    assert (r["value"], r["high"] - r["value"]) == pytest.approx((-0.5, 1.2706))
    assert {r["value"] for r in data(drawn["mismatch-1"], "value") if "name" not in r} == {50}  # k / L


def test_a_search_keeps_its_own_pareto_figure_and_names_its_best(sweep: Path) -> None:
    (sweep / "optuna.log").write_text("")
    best = {"job": 1, "params": {"merge.ratio": 0.123456789}, "val/id/acc": 0.5, "val/ood/acc": 0.25}
    (sweep / "search.json").write_text(json.dumps({"metrics": ["val/id/acc", "val/ood/acc"], "best": [best]}))
    _, paths = report.sweep(sweep)
    assert [p.stem for p in paths] == ["report", "id_ood", "heatmap", "vs_vanilla", "pareto_test"]
    said = "search, best by validation: job 1: val/id/acc 50.0%, val/ood/acc 25.0% with ratio=0.1235"
    assert said in paths[0].read_text()


def test_a_large_sweeps_page_is_small(tmp_path: Path) -> None:
    for i in range(18):
        write_run(tmp_path / str(i), f"merge.ratio={(1 + i // 3) / 6}", f"seed={i % 3}", samples=2)
    report.sweep(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_many_settings_of_other_keys_are_rows_of_panels(tmp_path: Path) -> None:
    for i, (ratio, lr) in enumerate((r, lr) for lr in (0.1, 0.2) for r in (0.1, 0.3, 0.5, 1)):
        write_job(tmp_path / str(i), [20, 40], [80, 80], f"merge.ratio={ratio}", f"sft.lr={lr}")
    report.sweep(tmp_path)
    drawn = specs(tmp_path / "report.html")
    assert drawn["id_ood-0"]["title"] == {"text": "in-domain (ID)", "subtitle": ["lr=0.1"]}
    assert drawn["id_ood-3"]["title"] == {"text": "in-domain (ID)", "subtitle": ["lr=0.2"]}
    assert {r["series"] for r in data(drawn["id_ood-3"], "x")} == {
        "ratio=0.1", "ratio=0.3", "ratio=0.5", "ratio=1.0 (vanilla)"
    }  # fmt: skip


def test_merge_rules_of_the_same_ratio_are_not_averaged(tmp_path: Path) -> None:
    write_job(tmp_path / "0", [20, 40], [80, 80], "merge.ratio=0.5")
    write_job(tmp_path / "1", [20, 60], [80, 80], "merge.ratio=0.5")
    config = tmp_path / "1" / "config.yaml"
    config.write_text(config.read_text().replace("kind: linear", "kind: dare"))
    write_job(tmp_path / "2", [20, 30], [80, 80], "merge=none")
    cells = folders.by_ratio(report.read_sweep(tmp_path))
    assert {n: {r: [j.folder.name for j in g] for r, g in rs.items()} for n, rs in cells.items()} == {
        "dare": {0.5: ["1"], 1: ["2"]}, "linear": {0.5: ["0"], 1: ["2"]}
    }  # fmt: skip


def test_a_sweep_without_a_finished_job_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"command": [], "jobs": [["seed=0"]]}))
    _, paths = report.sweep(tmp_path)
    assert [p.name for p in paths] == ["report.html"]
    assert "no job is done" in paths[0].read_text()


def test_an_unreadable_job_is_left_out_and_named(sweep: Path) -> None:
    (sweep / "1" / "config.yaml").write_text("a: [")
    (sweep / "3" / "rounds.jsonl").write_text('{"round": 0, "id/')
    report.sweep(sweep)
    assert [j.folder.name for j in report.read_sweep(sweep)] == ["0", "2", "4"]
    page = (sweep / "report.html").read_text()
    for name in "13":
        assert f"job {name} is done, but its config, summary or rounds cannot be read" in page


# --- comparisons and the command ------------------------------------------------------------------------------------


def write_analysis(folder: Path, importance: bool = True) -> Path:
    run = write_run(folder / "run")
    out = folder / "analysis"
    out.mkdir()
    shutil.copy(run / "rounds" / "03" / "layers.json", out / "layers.json")
    if importance:
        shutil.copy(run / "rounds" / "00" / "importance.json", out / "importance.json")
    facts = {k: v for k, v in report.read_rounds(run)[-1].items() if k.startswith("mismatch/")}
    shutil.copy(run / "config.yaml", out / "config.yaml")
    (out / "analysis.json").write_text(
        json.dumps(facts | {"base": "A", "tuned": "B", "source": "file", "notes": ["head <tied>"]})
    )
    return out


def test_a_comparison_of_two_checkpoints(tmp_path: Path) -> None:
    out = write_analysis(tmp_path)
    assert [p.name for p in report.analysis(out)] == ["report.html", "importance_change.png", "layers.png"]
    page = (out / "report.html").read_text()
    for words in ("<h1>B against A</h1>", "importance on solutions from a file", "head &lt;tied&gt;"):
        assert words in page, words
    drawn = specs(out / "report.html")
    assert drawn["importance_change-0"]["title"]["subtitle"][0] == "relative change: ρ = −0.52 [−0.72, −0.32], p = .02"
    lines = [r["share"] for r in data(drawn["importance_change-0"], "what") if r["what"] == "change"]
    assert lines == pytest.approx([20, 20, 20, 40])


def test_a_comparison_without_importance(tmp_path: Path) -> None:
    out = write_analysis(tmp_path, importance=False)
    assert [p.name for p in report.analysis(out)] == ["report.html", "layers.png"]
    assert "no layer importance" in (out / "report.html").read_text()


def test_the_command_finds_out_what_a_folder_holds(sweep: Path, tmp_path_factory: Any, capsys: Any) -> None:
    other = tmp_path_factory.mktemp("other")
    out = write_analysis(other)
    report.main([str(sweep), str(other / "run"), str(out)])
    said = capsys.readouterr().out
    for folder in (sweep, other / "run", out):
        assert str(folder / "report.html") in said
    assert "<h1>B against A</h1>" in (out / "report.html").read_text()
    assert not (sweep / "0" / "report.html").exists()
    report.main([str(sweep), "--jobs"])
    assert (sweep / "0" / "report.html").is_file()
    assert (sweep / "5" / "report.html").is_file()  # empty as it is


def test_the_command_refuses_other_folders(tmp_path: Path, run_folder: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (("empty", "is no run (config.yaml, rounds.jsonl), no sweep"), ("absent", "is no folder")):
        with pytest.raises(SystemExit) as ended:
            report.main([str(run_folder), str(tmp_path / folder)])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    assert not (run_folder / "report.html").exists()  # all are looked at before the first is made

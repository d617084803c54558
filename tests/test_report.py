"""The report of a sweep, from run folders alone: hand values for changes, intervals, retention, heatmaps."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import compose_config
from omegaconf import OmegaConf
from rich.console import Console

from itermerge import report
from itermerge.config import check, to_dict

ITEMS = 100


def write_job(folder: Path, ids: list[int], oods: list[int], *words: str, best: int = 1, saved: float = 2.5) -> None:
    """A finished job: the items solved in each round, of 100, in domain and out of it."""
    folder.mkdir(parents=True)
    OmegaConf.save(
        OmegaConf.create(to_dict(check(compose_config(f"rounds={len(ids) - 1}", *words)))), folder / "config.yaml"
    )
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


def test_heatmap_cells_are_mean_changes_over_ratio_and_rounds(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    real = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axis, table, **kw: drawn.append(table) or real(axis, table, **kw))
    _, pictures = report.sweep(sweep)
    assert [p.name for p in pictures] == ["id_ood.png", "heatmap.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    # rows: ratio .5, then 1; columns: rounds 1 and 2. The shorter run is part of the longer one: it counts once
    assert drawn[0] == [[pytest.approx(fmean([20, 24])), pytest.approx(33)], [pytest.approx(7.5), pytest.approx(20.5)]]
    assert drawn[1] == [[pytest.approx(0.5), pytest.approx(-1.5)], [pytest.approx(-7.5), pytest.approx(-25)]]


def test_no_heatmap_of_one_ratio(tmp_path: Path) -> None:
    write_job(tmp_path / "0", [20, 40], [80, 80], "seed=0")
    write_job(tmp_path / "1", [20, 40], [80, 80], "seed=1")
    _, pictures = report.sweep(tmp_path)
    assert [p.name for p in pictures] == ["id_ood.png"]


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


def test_reports_need_no_torch() -> None:
    code = "import sys; from itermerge import report, upkeep, sweep; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

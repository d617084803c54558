"""The committed results: the tables of a study are what its committed chains give."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from itermerge import study, study_layers, study_merges

RESULTS = Path(__file__).parent.parent / "results"
STUDIES = sorted(f.parent.name for f in RESULTS.glob("*/matched.csv"))
TABLES = ("tasks", "grid", "chosen", "matched", "robust")
CONTROLS = {  # where a study of merges takes its controls
    "lab_merges": ["lab_study"], "lab_baselines": ["lab_study"], "lab_ablations": ["lab_study"],
    "lab_distill": ["lab_study"], "smollm2_merges": ["smollm2"], "smollm2_baselines": ["smollm2", "smollm2_merges"],
}  # fmt: skip
MERGES = sorted(f.parent.name for f in RESULTS.glob("*/merges.csv"))


def test_there_are_studies() -> None:
    assert "lab_study" in STUDIES
    assert "lab_merges" in MERGES


@pytest.mark.parametrize("name", STUDIES)
def test_tables_are_those_of_the_chains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means to the digit; the intervals, for which a bootstrap would be drawn again, are left out."""
    monkeypatch.setattr(study, "RESAMPLES", 2)
    methods, unfinished = study.read([RESULTS / name])
    assert not unfinished
    made = study.Study(methods)
    for table in TABLES:
        with (RESULTS / name / f"{table}.csv").open() as file:
            kept = [{k: _means(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        again = [{k: _means(str(v)) for k, v in row.items() if str(v)} for row in getattr(made, table)()]
        assert again == kept, table


def _means(cell: str) -> str:
    return re.sub(r"\[[^]]*\]", "[]", cell)


def test_no_chain_names_a_folder_of_a_machine() -> None:
    for name in (*STUDIES, *MERGES):
        for _, chain in study.find([RESULTS / name])[0]:
            assert not re.search(r'"[/~]', chain.line())


@pytest.mark.parametrize("name", MERGES)
def test_tables_of_merges_are_those_of_the_chains_and_stand_in_the_readme(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means to the digit; intervals, and the p of a bootstrap, are left out."""
    monkeypatch.setattr(study, "RESAMPLES", 2)
    chains, _ = study.find([RESULTS / name, *(RESULTS / other for other in CONTROLS[name])])
    made = study_merges.tables(study_merges.Merges(study.Study(study.methods_of(chains))))
    for table, rows in made.items():
        with (RESULTS / name / f"{table}.csv").open() as file:
            kept = list(csv.DictReader(file))
        assert [_certain(row) for row in rows] == [_certain(row) for row in kept], table
        if table == "summary":
            readme = (RESULTS.parent / "README.md").read_text()
            assert all("| " + " | ".join(row.values()) + " |" in readme for row in kept)


def _certain(row: Mapping[str, Any]) -> dict[str, str]:
    return {k: _means(str(v)) for k, v in row.items() if str(v) and not k.startswith("p ")}


def test_wise_ft_is_vanilla_before_its_last_round() -> None:
    """Chains of two studies answer each item alike where they should."""
    methods, _ = study.read([RESULTS / name for name in ("lab_merges", "lab_study")])
    (wise,) = [m for m in methods if m.rule.startswith("wise_ft")]
    (vanilla,) = [m for m in methods if m.vanilla and m.lr == wise.lr]
    for unit, chain in wise.chains.items():
        for t in range(wise.last):
            for task, correct in chain.correct[t].items():
                assert (correct == vanilla.chains[unit].correct[t][task]).all(), (unit, t, task)


@pytest.mark.parametrize("name", ["lab_layers", "smollm2_layers"])
def test_tables_of_layers_are_those_of_the_units_and_stand_in_the_readme(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("itermerge.analysis.mismatch.RESAMPLES", 2)
    monkeypatch.setattr(study_layers, "RESAMPLES", 2)
    with (RESULTS / name / "mismatch.csv").open() as file:
        kept = list(csv.DictReader(file))
    made = study_layers.table(study_layers.read([RESULTS / name], None), 0.25)
    assert [{k: _means(str(v)) for k, v in row.items()} for row in made] == [
        {k: _means(v) for k, v in row.items()} for row in kept
    ]
    readme = (RESULTS.parent / "README.md").read_text()
    assert all("| " + " | ".join(row.values()) + " |" in readme for row in kept)


@pytest.mark.parametrize(
    ("benchmark", "script"),
    [
        ("startup", "`benchmarks/startup.py`"),
        ("quickstart", "startup.py --quickstart"),
        ("sampling-lab", "--model lab"),
        ("sampling-smollm2", "--model smollm2"),
        ("sft", "benchmarks/sft.py"),
        ("round", "benchmarks/round.py"),
        ("limits", "benchmarks/limits.py"),
    ],
)
def test_the_readme_has_the_ratio_that_a_benchmark_wrote(benchmark: str, script: str) -> None:
    root = Path(__file__).parents[1]
    summary, *sections = re.split(r"(?m)^## ", (root / "benchmarks" / "RESULTS.md").read_text())
    (row,) = re.findall(rf"(?m)^\| {benchmark} \| ([\d.]+) \|", summary)
    (line,) = [x for x in (root / "README.md").read_text().splitlines() if x.startswith("| ") and script in x]
    assert f" {row} " in line  # to the digit: rounded once more, 0.315 might be another number
    (section,) = [x for x in sections if x.startswith(f"{benchmark}\n")]
    measured = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", section.partition("`.\n\n")[2].partition("\nRatio")[0])]
    _, _, ours, theirs, *_ = line.split("|")
    for number in re.findall(r"\d[\d,]*(?:\.\d+)?", ours + theirs):
        told, digits = float(number.rstrip(",").replace(",", "")), len(number.partition(".")[2])
        assert any(round(x, digits) == told for x in measured), number


def test_the_readme_has_the_share_that_a_benchmark_wrote() -> None:
    root = Path(__file__).parents[1]
    written = (root / "benchmarks" / "RESULTS.md").read_text()
    (share,) = re.findall(r"(?m)^\| share \| ([\d.]+) \|", written)
    rows = re.findall(r"(?m)^\| ([^|]+) \| ([\d.]+) \| ([\d.]+)% \| ([\d.]+) \|", written)
    parts = [row for row in rows if not row[0].startswith("not compute")]
    whole, rounds = (sum(float(row[at]) for row in parts) for at in (1, 3))
    shares = {what: percent for what, _, percent, _ in rows if what.startswith("not compute")}
    assert f"{100 * float(share):.1f}" == shares["not compute, rounds"]
    said = (root / "README.md").read_text().replace("\n", " ")
    assert f"({rounds:.0f} s) {shares['not compute, rounds']}% is neither" in said
    assert f"the report ({whole:.0f} s), {shares['not compute, whole run']}%." in said

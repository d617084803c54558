"""The committed results: the tables of a study are what its committed chains give."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from itermerge import study, study_layers

RESULTS = Path(__file__).parent.parent / "results"
STUDIES = sorted(f.parent.name for f in RESULTS.glob(f"*/{study.CHAINS}"))
TABLES = ("tasks", "grid", "chosen", "matched", "robust")


def test_there_are_studies() -> None:
    assert "lab_study" in STUDIES


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
    for name in STUDIES:
        for method in study.read([RESULTS / name])[0]:
            for chain in method.chains.values():
                assert not re.search(r'"[/~]', chain.line())


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

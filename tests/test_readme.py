"""The README's commands: each `itermerge` line composes and passes the checks of a real start, each `make` target is
in the Makefile, each file it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

from itermerge.config import check, check_analyze, check_between, conf_dir

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [shlex.split(line.split(" # ")[0])[1:] for line in re.findall(r"^    (itermerge(?: .*)?)$", README, re.M)]
OWN = [words for words in COMMANDS if "--config-dir" in words]  # with files that stand in the README, too
COMMANDS = [words for words in COMMANDS if words not in OWN]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_composes(words: list[str]) -> None:
    overrides = [w for w in words if not w.startswith("-") and w != "job" and "DATE" not in w]
    if "hydra/launcher=ray" in overrides:
        pytest.importorskip("ray", reason="ray is no part of the tests' environment")
    parsed = OverridesParser.create().parse_overrides(overrides)
    for override in parsed:
        swept: Any = override.value()
        if isinstance(swept, IntervalSweep):
            values = [str(swept.start), str(swept.end)]
        elif override.is_sweep_override():
            values = list(override.sweep_string_iterator())
        else:
            values = [override.get_value_string()]
        others = [o.input_line or "" for o in parsed if o is not override and not o.is_sweep_override()]
        for value in values:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                check(compose("config", [*others, f"{override.key_or_group}={value}"]))


def test_the_rule_of_ones_own_runs(tmp_path: Path) -> None:
    """The README's function and YAML, written where it says, and its command on a small run."""
    from conftest import SMALL, itermerge, read_rounds

    block = README.partition("**A rule of your own**")[2].partition("Its text is part")[0]
    files = re.findall(r"^    # (my_conf/\S+)\n((?:    .*\n)+)", block, re.M)
    assert [name for name, _ in files] == ["my_conf/my_rules.py", "my_conf/merge/clip.yaml"]
    for name, text in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(r"^    ", "", text, flags=re.M))
    (words,) = OWN
    out = itermerge(*words, *SMALL, "model.seed=0", "rounds=1", "hydra.run.dir=run", "suite.pass_k_n=0", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    line = read_rounds(tmp_path / "run")[1]
    assert line["merge/ratio"] == 0.7
    assert 0 < line["merge/share/layer_00"] < 0.7  # what is clipped is smaller


def test_the_analyze_commands_compose() -> None:
    found = re.findall(r"^    itermerge-analyze (.*?)(?: +#.*)?$", README, re.M)
    assert len(found) >= 2
    for words in found:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            check_analyze(compose("analyze", [*shlex.split(words), "out=somewhere"]))


def test_the_merge_commands_compose() -> None:
    found = re.findall(r"^    itermerge-merge (.*?)(?: +#.*)?$", README, re.M)
    assert len(found) >= 3
    for words in found:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            check_between(compose("checkpoints", shlex.split(words)), shlex.split(words))


def test_every_metric_that_the_readme_names_is_one_of_a_run(tmp_path: Path) -> None:
    """The table of analyses, against the figures of a real small run."""
    from conftest import read_rounds, run_here

    run_here(tmp_path / "run", f"store.dir={tmp_path / 'store'}")
    there = {name for line in read_rounds(tmp_path / "run") for name in line}
    table = README.partition("## See why")[2].partition("### Weights")[0]
    named = [n for n in re.findall(r"`([\w@<>*/]+/[\w@<>*/]+)`", table) if not n.startswith(("outputs", "setting"))]
    assert len(named) > 8
    for name in named:
        pattern = re.escape(name).replace("<estimator>", "skip").replace("<row>", "layer_03").replace(r"\*", ".*")
        assert any(re.fullmatch(pattern, n) for n in there), name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^    make (\w+)", README, re.M)) | set(re.findall(r"`make (\w+)", README))
    assert {"demo", "test", "smollm2"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([^)h#][^)]*)\)|`(src/[\w/.]+)`", README):
        path = name[0] or name[1]
        assert (ROOT / path).exists(), path

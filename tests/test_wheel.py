"""The wheel carries everything: unpacked somewhere else, it composes, with a user's own --config-dir too."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAB = [f"lab/seed{seed}/model.safetensors" for seed in range(3)]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, check=True)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def itermerge(site: Path, cwd: Path, *words: str) -> str:
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['itermerge', *{list(words)!r}]; "
        "import itermerge.cli as c; assert c.__file__.startswith(sys.path[0]), c.__file__; c.main()"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    got = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stdout + got.stderr
    return got.stdout


def test_wheel_holds_conf_and_the_lab_model(unpacked: Path) -> None:
    for name in ("conf/config.yaml", "conf/experiment/quickstart.yaml", "lab/seed0/recipe.json", *LAB):
        assert (unpacked / "itermerge" / name).is_file(), name
    for name in ("page.html.j2", "page.css", "page.js"):
        assert (unpacked / "itermerge" / "report" / name).is_file(), name
    assert (unpacked / "hydra_plugins" / "itermerge_sweeper.py").is_file()
    assert all((unpacked / "itermerge" / name).stat().st_size <= 4_000_000 for name in LAB)


def test_wheel_composes_outside_the_checkout_with_a_config_dir(unpacked: Path, tmp_path: Path) -> None:
    own = tmp_path / "my_conf" / "task"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("defaults: [lab]\nfamily: find\nn_train: 7\n")
    said = itermerge(unpacked, tmp_path, "--config-dir", "my_conf", "task=mine", "--cfg", "job", "-p", "task")
    assert "family: find" in said
    assert "n_train: 7" in said

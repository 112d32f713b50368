"""What is installed: one name, with everything in it that the checkout has."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

import hasten

ROOT = Path(__file__).parents[1]
MOUNTS = {"components/hasten": "hasten", "pipelines": "hasten/pipelines", "conf": "hasten/conf"}


def sources() -> dict[str, Path]:
    """Place in the installed package -> file of the checkout."""
    found = {}
    for folder, mount in MOUNTS.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                found[f"{mount}/{file.relative_to(ROOT / folder).as_posix()}"] = file
    return found


@pytest.fixture
def wheel(wheel_file: Path) -> ZipFile:
    return ZipFile(wheel_file)


def metadata(wheel: ZipFile, name: str) -> str:
    return wheel.read(f"hasten-{hasten.__version__}.dist-info/{name}").decode()


def test_the_listed_packages_are_the_folders_with_code() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    with_code = {place.rpartition("/")[0].replace("/", ".") for place in sources() if place.endswith(".py")}
    assert listed == sorted(with_code)


def test_every_folder_with_code_is_a_package() -> None:
    folders = {file.parent for file in sources().values() if file.suffix == ".py"}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.slow
def test_the_wheel_takes_one_name_and_leaves_out_nothing(wheel: ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in held} == {"hasten"}
    assert held == set(sources())


@pytest.mark.slow
def test_the_wheel_names_its_version_license_and_command(wheel: ZipFile) -> None:
    described = message_from_string(metadata(wheel, "METADATA"))
    assert described["Version"] == hasten.__version__
    assert described["License-Expression"] == "Apache-2.0"
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    commands = ConfigParser()
    commands.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(commands["console_scripts"]) == {"hasten": "hasten.cli:main"}


@pytest.mark.slow
def test_the_wheel_alone_composes_every_knob(wheel: ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = "import hasten, sys; from hasten.cli import run; print(hasten.__file__); sys.exit(run(sys.argv[1:]))"
    shown = subprocess.run(
        [sys.executable, "-c", code, "run", "quantization=static", "--cfg", "job"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(str(tmp_path / "site" / "hasten" / "__init__.py"))
    assert "calibration_rows: 256" in shown.stdout

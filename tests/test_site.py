"""The documentation site: it builds without a broken link, shows every knob, asks nobody else, and says what is so."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
import yaml

from hasten.cli import with_pipeline
from hasten.core.groups import conf_folder
from hasten.core.recipe import Composer

ROOT = Path(__file__).resolve().parents[1]
FOLLOWED = ("bring-your-own.md", "hugging-face.md")
"""Pages whose commands are run (test_pages.py)."""
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def text(page: Path) -> str:
    """What a page says, without its markup."""
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def keys(node: object, prefix: str) -> Iterator[str]:
    if not isinstance(node, dict) or not node:
        yield prefix
        return
    for name, value in node.items():
        yield from keys(value, f"{prefix}.{name}")


@pytest.mark.slow
def test_every_option_and_knob_has_its_place_in_the_reference(site: Path) -> None:
    whole = ("strategy", "experiment", "space", "debug")
    for file in conf_folder().rglob("*.yaml"):
        if file.parent == conf_folder():
            continue
        group = file.parent.relative_to(conf_folder()).as_posix()
        page = site / "reference" / f"{group.replace('/', '-')}.html"
        assert f'id="{file.stem}"' in page.read_text(encoding="utf-8"), f"{group}={file.stem}"
        said = text(page)
        if group in whole:
            continue
        shared = file.read_text(encoding="utf-8").startswith("# @package _global_")
        prefix = "" if shared else f"{group.replace('/', '.')}."
        for key, value in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
            if key not in ("defaults", "_target_"):
                assert f"{prefix}{key}" in said, f"{key} of {group}={file.stem}"
                for line in file.read_text(encoding="utf-8").splitlines():
                    if line.startswith(f"{key}: ") and " # " in line and not isinstance(value, dict | list):
                        assert line.partition(" # ")[2].strip().replace("`", "") in said, line


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"""<(?:script|img|iframe|link|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")
    styles = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")
    for page in site.rglob("*.html"):
        assert not fetched.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not styles.search(sheet.read_text(encoding="utf-8")), sheet


def commands() -> Iterator[tuple[str, str]]:
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.name not in FOLLOWED:
            for block in SHELL.findall(page.read_text(encoding="utf-8")):
                for line in block.replace("\\\n", " ").splitlines():
                    if line.startswith("hasten"):
                        yield page.name, line


def overrides(page: str, line: str) -> list[str]:
    """Of a command; of a sweep those of one job."""
    words = shlex.split(line, comments=True)[1:]
    flags = [word for word in words if word.startswith("-")]
    assert set(flags) <= {"-m", "--help"}, f"{page}: {line}"
    given = with_pipeline([word for word in words if word not in flags], [conf_folder()])
    if "-m" not in flags:
        return given
    one = [re.sub(r"^([^=]*=[^,\[{(]*),.*$", r"\1", text) for text in given]
    return [text for text in one if not text.startswith(("hydra/", "hydra.", "hparams_search"))]


def test_commands_of_the_pages_name_options_and_knobs_that_there_are() -> None:
    found = list(commands())
    assert len(found) > 50
    root = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    there = set(keys(root, "")) | {f".{name}" for name in root}
    for file in conf_folder().rglob("*.yaml"):
        group = file.parent.relative_to(conf_folder()).as_posix()
        node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        there |= {*keys(node, f".{group}"), *(f".{group}.{name}" for name in node), *keys(node, "")}
    for page, line in found:
        for text in overrides(page, line):
            name, _, value = text.partition("=")
            if (conf_folder() / name).is_dir():
                options = value.strip("[]").split(",")
                assert all((conf_folder() / name / f"{option}.yaml").is_file() for option in options), f"{page}: {line}"
            elif not name.startswith("+"):
                assert f".{name}" in there, f"{page}: {line}: {name}"


@pytest.mark.drill
def test_every_command_of_the_pages_composes(hydra: None) -> None:
    for page, line in commands():
        Composer.of(overrides(page, line)).compose()


def test_every_page_is_in_the_navigation() -> None:
    said = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in said, page.name

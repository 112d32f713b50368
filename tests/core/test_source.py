"""Source fingerprints: what must and what must not change them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.core import source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a package anew and gives the fingerprint of its component."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def fingerprint(component: str, helper: str = "FACTOR = 2\n", stranger: str = "X = 1\n") -> str:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / "component.py").write_text(component)
        (folder / "helper.py").write_text(helper)
        (folder / "stranger.py").write_text(stranger)
        source.source_fingerprint.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            del sys.modules[name]
        return source.source_fingerprint("mine.component.Net")

    return fingerprint


PLAIN = "from mine.helper import FACTOR\n\nclass Net:\n    def f(self):\n        return FACTOR\n"


def test_comments_docstrings_and_layout_do_not_count(package: Callable[..., str]) -> None:
    method = "    def f(self):  # why\n        return (FACTOR)\n"
    dressed = f'"""Doc."""\n\nfrom mine.helper import FACTOR\n\n\nclass Net:\n    """Doc."""\n\n{method}'
    assert package(dressed) == package(PLAIN)


def test_code_counts(package: Callable[..., str]) -> None:
    assert package(PLAIN.replace("return FACTOR", "return FACTOR + 1")) != package(PLAIN)


@pytest.mark.parametrize(
    "spelling",
    ["from mine.helper import FACTOR", "from . import helper", "from .helper import FACTOR", "import mine.helper"],
)
def test_what_it_imports_from_its_own_package_counts(package: Callable[..., str], spelling: str) -> None:
    component = f"{spelling}\n\nclass Net: ...\n"
    assert package(component, helper="FACTOR = 3\n") != package(component, helper="FACTOR = 2\n")


def test_an_import_inside_a_function_counts(package: Callable[..., str]) -> None:
    lazy = "class Net:\n    def f(self):\n        from mine.helper import FACTOR\n        return FACTOR\n"
    assert package(lazy, helper="FACTOR = 3\n") != package(lazy, helper="FACTOR = 2\n")


def test_a_module_that_it_does_not_import_does_not_count(package: Callable[..., str]) -> None:
    assert package(PLAIN, stranger="X = 2\n") == package(PLAIN, stranger="X = 1\n")


def test_a_library_counts_by_its_version() -> None:
    assert source.source_fingerprint("hydra.errors.HydraException").startswith("library hydra 1.3")


def test_core_does_not_count(package: Callable[..., str]) -> None:
    from hasten.core import interfaces

    assert interfaces.__file__
    assert package("from hasten.core.interfaces import Pass\nclass Net: ...\n") != package("class Net: ...\n")
    assert source.source_fingerprint("hasten.core.store.Store") == source.source_fingerprint("hasten.core.trial.Trial")


def test_a_module_beside_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "net_of_mine.py").write_text("from layers_of_mine import act\n\nclass Net: ...\n")
    found = []
    for function in ("relu", "tanh"):
        (tmp_path / "layers_of_mine.py").write_text(f"def act():\n    return {function!r}\n")
        source.source_fingerprint.cache_clear()
        found.append(source.source_fingerprint("net_of_mine.Net"))
    assert found[0] != found[1]

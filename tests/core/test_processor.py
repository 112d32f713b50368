from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.core import processor


@pytest.fixture(autouse=True)
def _forgets_the_processor() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    processor.isa.cache_clear()
    processor.model_name.cache_clear()


def _pretend(monkeypatch: pytest.MonkeyPatch, file: Path, text: str) -> None:
    file.write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", file)


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_finds_integer_dot_products_of_x86(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str) -> None:
    _pretend(
        monkeypatch, tmp_path / "cpuinfo", f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 {flag} sse\n"
    )
    assert processor.has_vnni()
    assert processor.isa() == tuple(sorted(("avx2", flag)))
    assert processor.model_name() == "Some CPU"


def test_finds_integer_dot_products_of_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pretend(monkeypatch, tmp_path / "cpuinfo", "processor\t: 0\nFeatures\t: fp asimd evtstrm asimddp\n")
    assert processor.has_vnni()
    assert processor.isa() == ("asimd", "asimddp")


def test_avx2_alone_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pretend(monkeypatch, tmp_path / "cpuinfo", "flags\t: fpu sse4_2 avx avx2 fma\n")
    assert not processor.has_vnni()
    assert processor.isa() == ("avx", "avx2", "fma", "sse4_2")


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_finds_the_instructions_for_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str) -> None:
    _pretend(monkeypatch, tmp_path / "cpuinfo", f"flags\t: fpu avx2 {flag}\n")
    assert processor.has_bfloat16()
    _forget()
    _pretend(monkeypatch, tmp_path / "cpuinfo", "flags\t: fpu avx2 avx512f avx512_vnni\n")
    assert not processor.has_bfloat16()


def test_an_unknown_system_counts_as_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    assert processor.isa() == ()
    assert not processor.has_vnni()
    assert isinstance(processor.model_name(), str)


def test_imports_no_heavy_library() -> None:
    check = "import hasten.core.processor, sys; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0

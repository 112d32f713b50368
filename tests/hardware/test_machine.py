from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.core.cuda import Gpu
from hasten.hardware.machine import machine, machine_id

GPU = Gpu(name="NVIDIA H100", memory_bytes=80 * 2**30, driver="550.54", capability=(9, 0))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system with 48 KiB of L1d beside an instruction cache, 2 MiB of L2, 32 MiB of L3 and 16 GiB of memory."""
    caches = [(1, "Data", "48K"), (1, "Instruction", "64K"), (2, "Unified", "2048K"), (3, "Unified", "32M")]
    for index, (level, kind, size) in enumerate(caches):
        folder = tmp_path / "sys/devices/system/cpu/cpu0/cache" / f"index{index}"
        for name, value in (("level", level), ("type", kind), ("size", size)):
            write(folder / name, f"{value}\n")
    write(tmp_path / "proc/meminfo", "MemTotal:       16777216 kB\nMemFree:         1000 kB\n")
    return tmp_path


def test_reads_caches_and_memory_in_bytes(root: Path) -> None:
    here = machine(root)
    assert (here.l1d_bytes, here.l2_bytes, here.l3_bytes) == (48 * 1024, 2 * 1024**2, 32 * 1024**2)
    assert here.memory_bytes == 16 * 1024**3


def test_a_system_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert (here.l1d_bytes, here.l2_bytes, here.l3_bytes) == (None, None, None)
    assert here.logical_cores >= 1
    assert here.processor
    assert len(here.id) == 12


def test_an_unreadable_cache_size_is_unknown(root: Path) -> None:
    write(root / "sys/devices/system/cpu/cpu0/cache/index3/size", "large\n")
    assert machine(root).l3_bytes is None
    assert machine(root).l2_bytes == 2 * 1024**2


@pytest.mark.parametrize(
    "change", [{"processor": "other"}, {"logical_cores": 999}, {"isa": ("mmx",)}, {"l1d_bytes": 1}, {"l3_bytes": None}]
)
def test_the_id_changes_with_what_decides_timings(root: Path, change: dict[str, object]) -> None:
    here = machine(root)
    assert replace(here, **change).id != here.id  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"kernel": "other"}, {"python": "4.0"}, {"memory_bytes": 1}])
def test_the_id_stays_with_what_does_not(root: Path, change: dict[str, object]) -> None:
    here = machine(root)
    assert replace(here, **change).id == here.id  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"gpus": ()},
        {"gpus": (replace(GPU, name="NVIDIA L4"),)},
        {"gpus": (replace(GPU, driver="560.1"),)},
        {"gpus": (replace(GPU, capability=(8, 9)),)},
        {"gpus": (GPU, GPU)},
        {"visible_gpus": "1"},
    ],
)
def test_the_id_changes_with_the_gpus(root: Path, change: dict[str, object]) -> None:
    here = replace(machine(root), gpus=(GPU,), visible_gpus=None)
    assert replace(here, **change).id != here.id  # type: ignore[arg-type]
    assert json.loads(json.dumps(here.to_dict()))["gpus"][0]["name"] == "NVIDIA H100"


def test_without_a_gpu_it_does_not_matter_which_are_visible(root: Path) -> None:
    here = replace(machine(root), gpus=())
    assert replace(here, visible_gpus="0").id == here.id


def test_this_machine_is_told_the_same_way_twice_and_as_json() -> None:
    assert machine_id() == machine().id == json.loads(json.dumps(machine().to_dict()))["id"]

"""The roofline of a device of this machine, measured once for each number of threads and kept in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.core.cuda import gpus
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Target
from hasten.core.source import libraries
from hasten.core.store import Ingredients, Store
from hasten.evidence.latency import measuring_alone
from hasten.hardware.machine import machine_id
from hasten.hardware.probe import Device, Roofline, probe
from hasten.stages.stage import sources

STAGE = "roofline"
FILE = "roofline.json"


def roofline(store: Store, threads: int, device: Device) -> dict[str, Any]:
    """JSON form of what was measured with so many threads, or of the GPU.

    Raises:
        MeasurementError: it can't be measured.
    """

    def make(folder: Path) -> None:
        write_json(folder / FILE, _measured(threads, device).to_dict())

    found: dict[str, Any] = read_json(store.build(_ingredients(threads, device), make).folder / FILE)
    return found


def glance(store: Store, target: Target) -> Roofline:
    """The same for who leaves nothing behind: what the store has, or measured and not kept.

    Raises:
        MeasurementError: it can't be measured.
    """
    threads, device = target.threads, device_of(target)
    entry = store.find(STAGE, _ingredients(threads, device).key)
    return _measured(threads, device) if entry is None else Roofline.from_dict(read_json(entry.folder / FILE))


def device_of(target: Target) -> Device:
    """What of this machine is the target, or stands in for it."""
    return "cuda" if target.device == "gpu" else "cpu"


def _measured(threads: int, device: Device) -> Roofline:
    with measuring_alone():
        return probe(threads, device)


def _ingredients(threads: int, device: Device) -> Ingredients:
    names = [gpu.name for gpu in gpus()] if device == "cuda" else []
    return Ingredients(
        stage=STAGE,
        config={"threads": threads, "gpus": names},
        sources=sources("hasten.hardware.probe"),
        libraries=libraries("torch", "numpy"),
        machine={"id": machine_id()},
    )

"""What a run took of the machine, under the names that MLflow shows as system metrics.

Nothing is sampled: a thread that wakes up while a latency is measured would be measured too. The kernel counts anyway,
and between two readings of its counters lies the mean of all that was done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
MB = 1e6


@dataclass(kw_only=True)
class Meter:
    """Tells what happened since it was made, or was last read.

    Attributes:
        folder: on the disk whose space is told.
    """

    folder: Path
    _before: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before = _counters()

    def read(self) -> dict[str, float]:
        """Means and sums since the last reading, and what is used now; empty where there is no /proc."""
        counters, before = _counters(), self._before
        if not counters:
            return {}
        all_ticks = counters["ticks"] - before["ticks"]
        found = {
            "cpu_utilization_percentage": 100 * (1 - (counters["idle"] - before["idle"]) / max(all_ticks, 1.0)),
            "network_receive_megabytes": (counters["received"] - before["received"]) / MB,
            "network_transmit_megabytes": (counters["sent"] - before["sent"]) / MB,
            **_memory(),
            **_disk(self.folder),
        }
        self._before = counters
        return {f"system/{name}": round(value, 3) for name, value in found.items()}


def _counters() -> dict[str, float]:
    """Ticks of all cores and those in which they were idle, bytes that came in and went out; since the start."""
    try:
        ticks = [float(number) for number in (PROC / "stat").read_text().splitlines()[0].split()[1:9]]
        devices = [line.partition(":")[2].split() for line in (PROC / "net/dev").read_text().splitlines()[2:]]
    except (OSError, ValueError, IndexError):
        return {}
    received, sent = (sum(float(device[column]) for device in devices) for column in (0, 8))
    return {"ticks": sum(ticks), "idle": ticks[3] + ticks[4], "received": received, "sent": sent}


def _memory() -> dict[str, float]:
    kilobytes = {
        name: float(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in (PROC / "meminfo").read_text().splitlines())
    }
    total = kilobytes["MemTotal"]
    used = total - kilobytes["MemAvailable"]
    pages = int((PROC / "self/statm").read_text().split()[1])
    return {
        "system_memory_usage_megabytes": used * 1024 / MB,
        "system_memory_usage_percentage": 100 * used / total,
        "process_memory_megabytes": pages * os.sysconf("SC_PAGE_SIZE") / MB,
    }


def _disk(folder: Path) -> dict[str, float]:
    disk = shutil.disk_usage(folder)
    return {
        "disk_usage_megabytes": disk.used / MB,
        "disk_usage_percentage": 100 * disk.used / disk.total,
        "disk_available_megabytes": disk.free / MB,
    }

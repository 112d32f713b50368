"""What a run took of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.tracking import system
from hasten.tracking.system import Meter


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="there is no /proc")
def test_tells_what_was_used_under_the_names_of_mlflow(tmp_path: Path) -> None:
    meter = Meter(folder=tmp_path)
    found = meter.read()
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert found["system/disk_available_megabytes"] > 0


def test_tells_nothing_where_the_kernel_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "PROC", tmp_path / "none")
    assert Meter(folder=tmp_path).read() == {}


def test_counts_what_was_done_and_not_what_went_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(busy: int, idle: int, received: int) -> None:
        (tmp_path / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\n")
        (tmp_path / "net").mkdir(exist_ok=True)
        device = f"  eth0: {received} 0 0 0 0 0 0 0 7 0 0 0 0 0 0 0\n"
        (tmp_path / "net" / "dev").write_text(f"Inter-|   Receive\n face |bytes\n{device}")

    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 250 kB\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "statm").write_text("10 5 0 0 0 0 0\n")
    monkeypatch.setattr(system, "PROC", tmp_path)
    kernel(900, 100, 5_000_000)
    meter = Meter(folder=tmp_path)
    kernel(930, 170, 7_000_000)
    found = meter.read()
    assert found["system/cpu_utilization_percentage"] == 30.0
    assert found["system/network_receive_megabytes"] == 2.0
    assert found["system/network_transmit_megabytes"] == 0.0
    assert found["system/system_memory_usage_percentage"] == 75.0

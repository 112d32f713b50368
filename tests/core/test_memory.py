"""What is taken and what is free, from files as Linux writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from hasten.core.memory import free_bytes, resident_bytes

MEMINFO = "MemTotal:       9000 kB\nMemFree:        1000 kB\nMemAvailable:   8000 kB\n"
WAITING = "import sys; eaten = b'x' * {size}; print(flush=True); sys.stdin.read()"


def system(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_without_control_groups_all_that_is_available_is_free(tmp_path: Path) -> None:
    assert free_bytes(system(tmp_path, {"proc/meminfo": MEMINFO})) == 8000 * 1024


def test_a_system_that_tells_nothing_has_no_known_amount(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) is None


def test_the_tightest_control_group_above_the_process_decides(tmp_path: Path) -> None:
    groups = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/pod/container\n",
        "sys/fs/cgroup/pod/container/memory.max": "max\n",
        "sys/fs/cgroup/pod/container/memory.current": "1000000\n",
        "sys/fs/cgroup/pod/memory.max": "5000000\n",
        "sys/fs/cgroup/pod/memory.current": "2000000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 1500000\ninactive_file 400000\nactive_file 100000\n",
    }
    assert free_bytes(system(tmp_path, groups)) == 3_400_000


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    """With a namespace of its own the path is /; without one, that of the host, which is not mounted."""
    groups = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/not/mounted/here\n",
        "sys/fs/cgroup/memory.max": "3000000\n",
        "sys/fs/cgroup/memory.current": "3500000\n",
    }
    assert free_bytes(system(tmp_path, groups)) == 0


def test_control_groups_of_the_first_version_count(tmp_path: Path) -> None:
    groups = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "4000000\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000000\n",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 500000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000\n",
    }
    assert free_bytes(system(tmp_path, groups)) == 3_500_000


def test_counts_a_process_and_its_children() -> None:
    child = WAITING.format(size=50_000_000)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    before = resident_bytes(os.getpid())
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        taken, all_of_us = resident_bytes(process.pid), resident_bytes(os.getpid())
        process.stdin.close()
    assert taken == pytest.approx(65e6, rel=0.2)
    assert all_of_us - before > 50e6


def test_a_process_that_has_ended_takes_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert resident_bytes(process.pid) == 0

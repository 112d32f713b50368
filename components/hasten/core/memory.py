"""How much memory a process and its children take, and how much is free, read from /proc and /sys.

Address space can't be limited instead (RLIMIT_AS): torch and OpenVINO map many times what they ever touch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = (
    ("", Path("sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    ("", Path("sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file"),
    ("memory", Path("sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Controller in /proc/self/cgroup (none in version 2), where it is mounted, and what its files and counters are called.
"""


def resident_bytes(pid: int) -> int:
    """Resident set of a process, swap included, and what its children (compilers) take beyond pages that they share.

    0 where the process has ended, or the system has no /proc.
    """
    own = _kilobytes(Path(f"/proc/{pid}/status"), "VmRSS", "VmSwap")
    children = (_kilobytes(Path(f"/proc/{child}/smaps_rollup"), "Pss", "SwapPss") for child in _descendants(pid))
    return 1024 * (own + sum(children))


def anonymous_bytes(pid: int) -> int:
    """What a process and its children hold that is no page of a file, swap included; shared memory of workers counts.

    0 where the process has ended, or the system has no /proc.
    """
    family = (pid, *_descendants(pid))
    return 1024 * sum(_kilobytes(Path(f"/proc/{each}/status"), "RssAnon", "RssShmem", "VmSwap") for each in family)


def free_bytes(root: Path = Path("/")) -> int | None:
    """What can be taken without swapping, and within the limits of the control groups that this process is in.

    Args:
        root: where `proc` and `sys` are mounted.

    Returns:
        None where the system does not tell.
    """
    available = 1024 * _kilobytes(root / "proc/meminfo", "MemAvailable")
    return min([*([available] if available else []), *_group_rooms(root)], default=None)


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group, from this process' own up to the top, has left; cached files can be dropped for it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", maxsplit=2)
        for controller, mount, limit, usage, cached in _CGROUPS:
            if controller not in controllers.split(","):
                continue
            for group in (path, *map(str, Path(path).parents)):
                folder = root / mount / group.strip("/")
                bounds = [*_lines(folder / limit), *_lines(folder / usage)]
                if len(bounds) == 2 and bounds[0] != "max":
                    yield max(0, int(bounds[0]) - int(bounds[1]) + _counter(folder / "memory.stat", cached))


def _descendants(pid: int) -> Iterator[int]:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for line in _lines(file):
            for child in map(int, line.split()):
                yield child
                yield from _descendants(child)


def _kilobytes(file: Path, *names: str) -> int:
    """Sum of the lines `name:   123 kB`."""
    fields = (line.split() for line in _lines(file))
    return sum(int(words[1]) for words in fields if words[0].rstrip(":") in names)


def _counter(file: Path, name: str) -> int:
    """Value of the line `name 123`."""
    return next((int(words[1]) for words in map(str.split, _lines(file)) if words[0] == name), 0)


def _lines(file: Path) -> list[str]:
    """None where it is not there, not ours, or its process has just ended."""
    with suppress(OSError):
        return [line for line in file.read_text().splitlines() if line.strip()]
    return []

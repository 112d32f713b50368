"""Two hosts on one machine: network namespaces, joined by a pair of virtual interfaces of limited rate.

As root, on Linux. What goes from one to the other goes through the kernel's network and takes the time that it would
take on a link of that rate; nothing goes through shared memory. Their file system is one, as a cluster's shared one is.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of the two.

    Attributes:
        name: of its network namespace.
        address: at which the other reaches it.
        link: its interface to the other.
    """

    name: str
    address: str
    link: str

    def command(self, *words: str) -> list[str]:
        """What runs a command on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    @property
    def environment(self) -> dict[str, str]:
        """That gloo and torchrun need to find the link; hosts of one name would all be found at the same address."""
        return {"GLOO_SOCKET_IFNAME": self.link, "PET_LOCAL_ADDR": self.address}

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(word) for word in found.stdout.split()]


@contextmanager
def two_hosts(mbit: float) -> Iterator[tuple[Host, Host]]:
    """Hosts whose link takes so many times 10^6 bits per second in each direction; they end with all that runs there.

    Raises:
        OSError: this is no Linux, or its kernel knows no namespaces or no token bucket filter.
        PermissionError: of anybody but root.
    """
    if os.geteuid():
        raise PermissionError("only root makes network namespaces")
    # Of this process alone, so that several may have hosts at the same time.
    pair = tuple(
        Host(name=f"hasten-{os.getpid()}-{letter}", address=f"10.77.0.{number}", link=f"eth-{letter}")
        for number, letter in enumerate("ab", 1)
    )
    try:
        for host in pair:
            _run("ip", "netns", "add", host.name)
        ends = [("netns", host.name, "type", "veth") for host in pair]
        one, other = pair
        _run("ip", "link", "add", one.link, *ends[0], "peer", other.link, *ends[1][:2])
        for host in pair:
            _run(*host.command("ip", "addr", "add", f"{host.address}/24", "dev", host.link))
            _run(*host.command("ip", "link", "set", host.link, "up"))
            _run(*host.command("ip", "link", "set", "lo", "up"))
            limit = ("rate", f"{mbit:g}mbit", "burst", "256kb", "latency", "200ms")
            _run(*host.command("tc", "qdisc", "replace", "dev", host.link, "root", "tbf", *limit))
        yield one, other
    finally:
        for host in pair:
            for process in host.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)


def sent_bytes() -> int:
    """What the host that this process runs on has sent to the other so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip().startswith("eth-"):
            return int(figures.split()[8])
    raise OSError("no eth- interface in this namespace")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")

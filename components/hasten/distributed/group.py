"""The processes that train one model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from hasten.core.errors import ConfigError
from hasten.core.sections import Distributed, MeshShape

T = TypeVar("T")
_AGES = timedelta(days=365)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One process' place among those that train together.

    Attributes:
        spread: how the training is spread over them.
        rank: of this process.
        size: number of processes.
    """

    spread: Distributed
    rank: int
    size: int

    @property
    def shape(self) -> MeshShape:
        """How the processes are arranged."""
        return self.spread.mesh(self.size)

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The processes in the dimensions of `MeshShape`, the last of which are neighbours.

        Made when it is first asked for, which all processes have to do at the same time.
        """
        mesh = init_device_mesh("cpu", tuple(self.shape), mesh_dim_names=MeshShape._fields)
        for name in MeshShape._fields:  # PyTorch gives its groups half an hour
            _set_pg_timeout(self._timeout, mesh.get_group(name))
        return mesh

    @property
    def rows_rank(self) -> int:
        """Number, in `range(shape.data)`, of the share of each batch that this process sees."""
        shape = self.shape
        return self.rank // shape.tensor % shape.data

    @property
    def draws(self) -> int:
        """Number of what the process draws at random: the same for those that calculate parts of the same values."""
        return self.rank // self.shape.tensor

    @property
    def stage_rank(self) -> int:
        """Place of this process in the pipeline."""
        shape = self.shape
        return self.rank // (shape.data * shape.tensor)

    @cached_property
    def rows_group(self) -> dist.ProcessGroup | None:
        """Processes with other rows and the same part of the model; None for all of them. Made as `mesh` is."""
        if self.shape.data == self.size:
            return None
        numbers = torch.arange(self.size).view(-1, self.shape.data, self.shape.tensor).transpose(1, 2)
        groups = numbers.reshape(-1, self.shape.data).tolist()
        own: dist.ProcessGroup
        own, _ = dist.new_subgroups_by_enumeration(groups, timeout=self._timeout)  # type: ignore[no-untyped-call]
        return own

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.spread.timeout_seconds)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over those that have other rows."""
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.rows_group)
        totals: list[float] = sums.tolist()
        return totals

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives, in the order of their ranks."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def agreed(self, value: T, group: dist.ProcessGroup | None = None) -> T:
        """What the first process gives.

        Args:
            group: by which it is told, such as `patient()`.
        """
        told = [value]
        dist.broadcast_object_list(told, 0, group=group)
        return told[0]

    def meet(self) -> None:
        """Goes on when all are here."""
        dist.barrier()

    def patient(self) -> dist.ProcessGroup:
        """The same processes, for what may be waited for as long as it takes; made by all at the same time."""
        made: dist.ProcessGroup = dist.new_group(timeout=_AGES)
        return made


@contextmanager
def joined(spread: Distributed) -> Iterator[Group]:
    """Meets the others where torchrun's environment variables say, and takes leave of them.

    Whoever waits for a process that does not come ends after `spread.timeout_seconds`.

    Raises:
        ConfigError: there are fewer than there were to be, among which the model can't be divided.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=spread.timeout_seconds))
    try:
        group = Group(spread=spread, rank=dist.get_rank(), size=dist.get_world_size())
        _check(group)
        yield group
        dist.barrier()  # gloo aborts a process whose peer is gone while it still takes leave
    finally:
        dist.destroy_process_group()


def _check(group: Group) -> None:
    try:
        _ = group.shape
    except ConfigError as error:
        devices = group.spread.devices
        raise ConfigError(f"of distributed.devices={devices} processes {group.size} are there, and {error}") from error

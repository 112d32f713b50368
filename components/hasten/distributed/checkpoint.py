"""Checkpoints of several processes: each writes its share, in any layout of processes it is read again.

A checkpoint is a folder. PyTorch's distributed checkpointing divides what the processes have in common among them and
writes it as safetensors, which are read by name and place, so that the processes that read may be others, with other
shares. (Its own format keeps its index as a pickle, which would have to be run to be read.) What belongs to one process
alone is in a file of its own. The first process writes the index, which has the SHA-256 of all files, and renames the
folder when everything is on disk.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from hasten.artefacts import durable
from hasten.artefacts.durable import KEPT
from hasten.core.errors import HastenError, first_line
from hasten.core.files import file_digest
from hasten.distributed.group import Group

INDEX = "index.ckpt"
LEAST_PATIENCE_SECONDS = 600.0
"""For which a process that has written its share waits for the slowest, if `timeout_seconds` is not more: a hang of the
training is noticed by the training, and a disk may be slow."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class State:
    """What is kept of a training, as one process sees it.

    Attributes:
        tensors: by names that mean the same in every layout; a DTensor is a share, others are whole. A process that has
            no part of one does not name it.
        own: tensors and plain data of this process alone.
        common: plain data that are the same in all processes; the first's are kept.
    """

    tensors: Mapping[str, Tensor]
    own: Mapping[str, Any] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)

    def staged(self) -> State:
        """A copy in the processor's memory, that does not change when the training goes on."""
        return State(
            tensors={name: _copied(tensor) for name, tensor in self.tensors.items()},
            own=copy.deepcopy(dict(self.own)),
            common=copy.deepcopy(dict(self.common)),
        )


class Writing:
    """Writes one checkpoint after the other while the training goes on, which waits for the copy alone.

    Its processes talk about it among themselves, in a group of their own, so that what they say does not get between
    the collectives of the training. All processes make it at the same time.

    Attributes:
        seconds: that the last checkpoint took from the copy until it was safe; None where there is none yet.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        patience = timedelta(seconds=max(group.spread.timeout_seconds, LEAST_PATIENCE_SECONDS))
        self._processes = dist.new_group(backend="gloo", timeout=patience)
        self._thread: threading.Thread | None = None
        self._error: Exception | CheckpointException | None = None
        self.seconds: float | None = None

    @property
    def busy(self) -> bool:
        """A checkpoint is still being written by this process.

        Raises:
            RuntimeError: it could not.
        """
        self._check()
        return self._thread is not None and self._thread.is_alive()

    def start(self, folder: Path, state: State) -> None:
        """Copies the state and writes it in the background, when what is being written is done."""
        self.wait()
        staged = state.staged()
        # Not waited for by a process that ends in an error, whose peers may never come.
        self._thread = threading.Thread(target=self._work, args=(folder, staged), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written by this process.

        Raises:
            RuntimeError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._check()

    def close(self) -> None:
        """Waits for what is being written; then this can't be used any more."""
        self.wait()
        dist.destroy_process_group(self._processes)

    def _check(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"a checkpoint could not be written: {first_line(self._error)}") from self._error

    def _work(self, folder: Path, state: State) -> None:
        began = time.monotonic()
        try:
            write(folder, state, self._group, self._processes)
            if self._group.rank == 0:
                for old in _found(folder.parent)[KEPT:]:
                    shutil.rmtree(old)
        except (Exception, CheckpointException) as error:  # for the thread that trains, which raises it
            self._error = error
        else:
            self.seconds = time.monotonic() - began


def write(folder: Path, state: State, group: Group, processes: dist.ProcessGroup | None = None) -> None:
    """Writes a checkpoint together with the other processes; it is there when the first process returns.

    Args:
        processes: the same as of `group`, through which they talk; None for that which they train in.
    """
    partial = _partial(folder)
    partial.mkdir(parents=True, exist_ok=True)
    own = partial / _own(group.rank)
    durable.write(state.own, own)
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    write_tensors(dict(state.tensors), storage_writer=writer, process_group=processes)
    shards = partial.glob(f"{_shard(group.rank)}*")
    told = {"files": {file.name: file_digest(file) for file in (own, *shards)}, "rows_rank": group.rows_rank}
    found: list[Any] | None = [None] * group.size if group.rank == 0 else None
    dist.gather_object(told, found, group=processes)
    if found is None:
        return
    index = {
        "common": dict(state.common),
        "shape": tuple(group.shape),
        "rows_ranks": [each["rows_rank"] for each in found],
        "files": {name: sha256 for each in found for name, sha256 in each["files"].items()},
    }
    durable.write(index, partial / INDEX)
    _sync(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    _sync(folder.parent)


def newest(folder: Path, identity: str, group: Group) -> Path | None:
    """The latest whole checkpoint of the training with this identity, the same for all processes.

    Torn checkpoints, those of other trainings, what is unfinished and all but one before the latest are deleted. Each
    process reads an equal number of files of a checkpoint to see whether they are what was written.

    Returns:
        None where there is no such checkpoint and the training has to start afresh.
    """
    candidates = group.agreed([str(path) for path in _found(folder)])
    whole: list[Path] = []
    for candidate in map(Path, candidates):
        if len(whole) < KEPT and all(group.gathered(_is_whole(candidate, identity, group))):
            whole.append(candidate)
    if group.rank == 0:
        _sweep(folder, keep=whole)
    chosen: Path | None = group.agreed(whole[0] if whole else None)  # nobody goes on before all is tidy
    return chosen


def _sweep(folder: Path, keep: Iterable[Path]) -> None:
    """Deletes checkpoints, finished or not."""
    for path in {*folder.glob("step=*.ckpt"), *folder.glob("*.partial")} - set(keep):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_index(folder: Path) -> dict[str, Any]:
    """`common` and what a checkpoint is made of.

    Raises:
        HastenError: the index is torn or altered.
    """
    return durable.read(folder / INDEX)


def read_own(folder: Path, group: Group) -> tuple[dict[str, Any], bool]:
    """What belongs to one process: that with this one's rank where the processes are arranged as they were, else one
    that had the rows that come nearest.

    Returns:
        That, and whether the processes are arranged as they were.

    Raises:
        HastenError: the file is torn or altered.
    """
    index = read_index(folder)
    same = index["shape"] == tuple(group.shape)
    ranks = index["rows_ranks"]
    rank = group.rank if same else ranks.index(group.rows_rank % (max(ranks) + 1))
    return durable.read(folder / _own(rank)), same


def names(folder: Path) -> list[str]:
    """Of the tensors in a checkpoint."""
    return sorted(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors, or the shares that this process has of them, with what a checkpoint has under their names.

    What it has not is left as it is: a pipeline leaves out what none of its stages use.

    Raises:
        HastenError: it has one of another shape.
    """
    written = set(names(folder))
    tensors = {name: tensor for name, tensor in tensors.items() if name in written}
    if not tensors:
        return
    with warnings.catch_warnings():
        # Each process reads for itself, and needs to ask nobody.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized.*")
        try:
            read_tensors(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            reason = "; ".join(str(failure[0]) for failure in error.failures.values())
            raise HastenError(f"checkpoint {folder} is not of this model: {reason}") from error


def write_weights(folder: Path, model: nn.Module, group: Group) -> None:
    """Writes a model of which each process has all or a share, for who reads it without them."""
    if group.rank == 0:
        shutil.rmtree(_partial(folder), ignore_errors=True)
    group.agreed(None)  # what a process left that was killed is gone
    tensors, others = divided(model.state_dict())
    write(folder, State(tensors=tensors, common={"others": others}).staged(), group)


def read_weights(folder: Path, model: nn.Module) -> None:
    """Gives a whole model the weights that `write_weights` has written.

    Raises:
        HastenError: a file is torn or altered, or they are of another model.
    """
    index = read_index(folder)
    torn = [name for name, sha256 in index["files"].items() if not _is(folder / name, sha256)]
    if torn:
        raise HastenError(f"checkpoint {folder} is torn: the SHA-256 of {', '.join(torn)} does not match")
    tensors, _ = divided(model.state_dict())
    if unknown := sorted(set(names(folder)) - set(tensors)):
        raise HastenError(f"checkpoint {folder} is not of this model, which has no {unknown[0]}")
    loaded = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    load(folder, loaded)
    model.load_state_dict(loaded | index["common"]["others"])


def divided(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a state dict, and what else it has."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _is_whole(folder: Path, identity: str, group: Group) -> bool:
    """As far as this process looks."""
    try:
        index = read_index(folder)
    except (HastenError, OSError) as error:
        _log.info("%s; going back to the one before", error)
        return False
    mine = sorted(index["files"].items())[group.rank :: group.size]
    torn = [name for name, sha256 in mine if not _is(folder / name, sha256)]
    if torn:
        _log.info("checkpoint %s is torn: %s; going back to the one before", folder, ", ".join(torn))
    return not torn and index["common"].get("identity") == identity


def _is(file: Path, sha256: str) -> bool:
    return file.exists() and file_digest(file) == sha256


def _found(folder: Path) -> list[Path]:
    """Checkpoints of several processes, the latest first."""
    return sorted(
        (path for path in folder.glob("step=*.ckpt") if path.is_dir()),
        key=lambda path: int(path.stem.removeprefix("step=")),
        reverse=True,
    )


def _copied(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone(memory_format=torch.contiguous_format) if tensor.device.type == "cpu" else tensor.cpu()


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _own(rank: int) -> str:
    return f"process-{rank:05d}.ckpt"


def _shard(rank: int) -> str:
    """How PyTorch begins the names of the files of a process."""
    return f"shard-{rank + 1:05d}-"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

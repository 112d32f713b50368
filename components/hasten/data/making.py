"""Making prepared files shard by shard: here or in processes, and going on after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from time import monotonic

from hasten.core.interfaces import Progress
from hasten.core.processor import num_cores
from hasten.data.job import Job
from hasten.data.pieces import Shard, Shards
from hasten.data.preparers import Preparers

_WORTH_SECONDS = 1.0
"""Work that is left from which processes pay: each takes about a fifth of that to start."""


class Journal:
    """Which shards are finished, with their checksums: a line each, in the order in which they were finished.

    A shard counts where its bytes still have the checksum: that holds after a kill, and also after a loss of power that
    left some writes undone, without waiting for the disk after each shard.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def finished(self, job: Job, shards: Shards) -> frozenset[int]:
        """Numbers of the shards that need not be made again."""
        return frozenset(number for number, digest in self._lines() if job.digest(shards.spans(number)) == digest)

    def add(self, number: int, digest: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([number, digest]) + "\n")

    def _lines(self) -> Iterator[tuple[int, str]]:
        if not self._file.is_file():
            return
        for line in self._file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                number, digest = json.loads(line)
            except ValueError:  # a kill tore it
                continue
            yield number, digest


def make(
    shards: Shards,
    job: Job,
    journal: Journal,
    progress: Progress,
    processes: int | None = None,
    watch: Callable[[Shard], None] = lambda shard: None,
) -> None:
    """Makes all shards that are not finished.

    Args:
        processes: that work on it; 1: this one. None: this one, until it shows that several are worth starting.
        watch: is given every shard, finished or not, in their order.

    Raises:
        ConfigError: a transform refuses the rows.
        HastenError: a process died or raised. What is finished is kept.
    """
    finished = journal.finished(job, shards)
    todo = _unfinished(shards, finished, progress, watch)
    num_left = len(shards) - len(finished)
    if processes is None:
        num_left -= _made_here(todo, job, journal, progress, num_left, worth=num_cores() > 1)
        processes = min(num_left, num_cores())
    if num_left and processes > 1:
        with Preparers(job, processes) as preparers:
            for shard, digest in preparers.make(todo):
                journal.add(shard.number, digest)
                progress.advance(shard.num_rows)
    # What is left where there is one process, or where others can't import the transforms.
    _made_here(todo, job, journal, progress, num_left, worth=False)


def _unfinished(
    shards: Shards, finished: Collection[int], progress: Progress, watch: Callable[[Shard], None]
) -> Iterator[Shard]:
    for shard in shards:
        watch(shard)
        if shard.number in finished:
            progress.advance(shard.num_rows)
        else:
            yield shard


def _made_here(
    todo: Iterator[Shard], job: Job, journal: Journal, progress: Progress, num_left: int, *, worth: bool
) -> int:
    """Makes shards in this process: all, or where processes are `worth` it, until they are.

    Returns:
        How many it made.
    """
    seconds = 0.0
    made = 0
    for shard in todo:
        start = monotonic()
        journal.add(shard.number, job.make(shard))
        progress.advance(shard.num_rows)
        seconds += monotonic() - start
        made += 1
        if worth and seconds / made * (num_left - made) > _WORTH_SECONDS:
            break
    return made

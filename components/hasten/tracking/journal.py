"""What is still to be logged of a run, as files in its folder: nothing is lost while a tracking server is away."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hasten.core.credentials import without_credentials
from hasten.core.files import read_json, write_json
from hasten.tracking.operations import Desk, Operation, operation

log = logging.getLogger(__name__)

FOLDER = "unlogged"
"""Of a run's folder: one file for each record that the store does not have yet."""
FACTS = "run.json"
REFUSED = "refused.json"
"""In the run's folder: what the store did not take, with its reasons."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What has to be known to log a run later.

    Attributes:
        key: of the run, as `operations.KEY` has it.
        store: the tracking URI without what is secret in it.
        experiment: its name.
        artifacts: where a new experiment keeps its artefacts; None where a server decides that.
    """

    key: str
    store: str
    experiment: str
    artifacts: str | None


class Journal:
    """The records of one run in their order.

    A record is written before it is sent and removed afterwards. What is in the journal of a run that has ended, or was
    killed, is found through a folder of notes that all runs share, and sent by whoever comes next.

    Args:
        run_folder: of the run.
        key: of the run.
        notes: folder in which every run with a journal is noted.
    """

    def __init__(self, run_folder: Path, key: str, notes: Path) -> None:
        self.run_folder = run_folder.absolute()
        self.folder = self.run_folder / FOLDER / key
        self._notes = notes.absolute()
        self._lock = FileLock(self.folder / ".lock", thread_local=False)

    @classmethod
    def begin(cls, run_folder: Path, notes: Path, facts: Facts) -> Journal:
        """A new one, which nobody else sends as long as this process lives or it is closed."""
        journal = cls(run_folder, facts.key, notes)
        journal.folder.mkdir(parents=True, exist_ok=True)
        journal._lock.acquire()
        write_json(journal.folder / FACTS, vars(facts))
        write_json(journal._note, {"folder": str(journal.run_folder), "store": facts.store})
        return journal

    @property
    def facts(self) -> Facts:
        return Facts(**read_json(self.folder / FACTS))

    @property
    def num_pending(self) -> int:
        return len(self._entries())

    def add(self, operations: Sequence[Operation]) -> None:
        """Writes a record down."""
        entries = self._entries()
        number = int(entries[-1].stem) + 1 if entries else 0
        write_json(self.folder / f"{number:06d}.json", [each.to_dict() for each in operations])

    def send(self, desk: Desk, is_refusal: Callable[[Exception], bool]) -> int:
        """Sends what there is, from the oldest record on, and gives the number of records.

        Args:
            is_refusal: whether an error means that the store will never take it; it is kept beside the journal then.

        Raises:
            Exception: the store is away; what is not sent yet stays, as does the record in whose middle it broke off.
        """
        entries = self._entries()
        for entry in entries:
            for written in read_json(entry):
                try:
                    _insist(operation(written), desk, is_refusal)
                except Exception as error:
                    if not is_refusal(error):
                        raise
                    self._refused(written, error)
            entry.unlink()
        return len(entries)

    def close(self) -> None:
        """Leaves it to others; takes it away where nothing is left to be sent."""
        if self._lock.is_locked and not self.num_pending:
            self._note.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            _remove_empty(self.folder.parent)
        self._lock.release()

    def claim(self) -> bool:
        """Whether it is ours to send: there is one, and no living process has it."""
        if not (self.folder / FACTS).is_file():
            return False
        try:
            self._lock.acquire(timeout=0)
        except (Timeout, OSError):
            return False
        return (self.folder / FACTS).is_file()

    def _entries(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.json"))

    @property
    def _note(self) -> Path:
        return self._notes / f"{self.folder.name}.json"

    def _refused(self, written: dict[str, Any], error: Exception) -> None:
        reason = without_credentials(" ".join(str(error).split()))[:500] or type(error).__name__
        file = self.run_folder / REFUSED
        known = read_json(file) if file.is_file() else []
        write_json(file, [*known, {"reason": reason, "refused": written}])
        level = logging.DEBUG if known else logging.WARNING
        log.log(level, "tracking: the store did not take a part of the record (%s has it): %s", file, reason)


def left(notes: Path, store: str) -> Iterator[Journal]:
    """Journals of other runs for a store, the oldest first; notes of runs that are no longer there are removed."""
    for note in sorted(notes.glob("*.json"), key=lambda file: file.stat().st_mtime):
        try:
            noted = read_json(note)
        except (OSError, ValueError):  # another process has just removed it
            continue
        journal = Journal(Path(noted["folder"]), note.stem, notes)
        if not (journal.folder / FACTS).is_file():
            note.unlink(missing_ok=True)
        elif noted["store"] == store:
            yield journal


def below(run_folder: Path, notes: Path) -> Iterator[Journal]:
    """Journals in the folder of a run."""
    for facts in sorted((run_folder / FOLDER).glob(f"*/{FACTS}")):
        yield Journal(run_folder, facts.parent.name, notes)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another run's journal is in it
        folder.rmdir()


def _insist(each: Operation, desk: Desk, is_refusal: Callable[[Exception], bool]) -> None:
    """Sends it once more where it was refused: a database that goes away says some odd things."""
    try:
        each.send(desk)
    except Exception as error:
        if not is_refusal(error):
            raise
        each.send(desk)

"""The store: a content-addressed folder of finished stages.

Layout: `<stage>/<key>/` holds a finished stage with its `stage.json`; `.work/<stage>-<key>/` a stage in the making,
kept after a kill so that a training goes on from its checkpoint; `.locks/` one lock per key. A stage is finished the
moment its folder is renamed out of `.work`, so a process killed at any moment leaves nothing half-finished where it
would be read. `.given/` keeps what a notebook gave.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hasten.core.files import digest, read_json, sync_tree, tree_bytes, tree_digests, write_json

log = logging.getLogger(__name__)

MANIFEST = "stage.json"
GIVEN = ".given"
"""In the store: what a notebook gave as objects, kept as files, so that recipes can name it."""
ATTEMPT = "resume-attempt.json"
"""In a stage in the making: when the attempt began, and what earlier, killed attempts had cost."""


def code_folder(store: Path) -> Path:
    """Python modules that a notebook gave, from which every process of a run imports."""
    return store.absolute() / GIVEN / "code"


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """All that decides what a stage gives, and nothing else.

    Attributes:
        config: the stage's own section of the recipe.
        parents: role -> key of the stages that it reads.
        data: fingerprint of data that it reads from outside of the store.
        sources: fingerprints of the code that runs it.
        libraries: versions of the libraries that decide its result.
        machine: facts of the machine, for what is compiled or measured.
    """

    stage: str
    config: Mapping[str, Any]
    parents: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256 in hexadecimal."""
        return digest(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished stage.

    Attributes:
        seconds: what building it cost, whoever built it.
        fresh: whether this call built it.
    """

    stage: str
    key: str
    folder: Path
    seconds: float
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One line of `hasten store`. `state` is finished, unfinished or broken; `problem` says what is broken."""

    stage: str
    key: str
    folder: Path
    state: str
    num_bytes: int
    created: float
    seconds: float
    problem: str = ""


class Store:
    """Finds finished stages and builds missing ones, once, whoever asks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def find(self, stage: str, key: str) -> Entry | None:
        """The finished stage of that key, if there is one."""
        folder = self.folder / stage / key
        manifest = _manifest(folder)
        if manifest is None:
            return None
        return Entry(stage=stage, key=key, folder=folder, seconds=float(manifest["seconds"]))

    def build(self, ingredients: Ingredients, make: Callable[[Path], None]) -> Entry:
        """Gives the finished stage, building it under its lock if it is missing.

        Args:
            make: writes the stage's files into the given folder. The folder may hold what an earlier, killed attempt
                left; names that begin with `resume` are dropped before the stage is committed.
        """
        stage, key = ingredients.stage, ingredients.key
        if found := self.find(stage, key):
            return found
        with self._lock(stage, key):
            if found := self.find(stage, key):
                return found
            return self._make(ingredients, make)

    def _make(self, ingredients: Ingredients, make: Callable[[Path], None]) -> Entry:
        stage, key = ingredients.stage, ingredients.key
        work = self.folder / ".work" / f"{stage}-{key}"
        work.mkdir(parents=True, exist_ok=True)
        earlier = _spent_before(work)
        for leftover in work.iterdir():
            if not leftover.name.startswith("resume"):
                _remove(leftover)
        write_json(work / ATTEMPT, {"began": time.time(), "earlier_seconds": earlier})
        start = time.monotonic()
        make(work)
        seconds = round(earlier + time.monotonic() - start, 3)
        for leftover in list(work.glob("resume*")):
            _remove(leftover)
        manifest = {
            "stage": stage,
            "key": key,
            "ingredients": asdict(ingredients),
            "seconds": seconds,
            "created": time.time(),
            "files": tree_digests(work),
        }
        write_json(work / MANIFEST, manifest)
        sync_tree(work)
        final = self.folder / stage / key
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # without a readable manifest, or it would have been found
            self._discard(final)
        os.replace(work, final)
        return Entry(stage=stage, key=key, folder=final, seconds=seconds, fresh=True)

    @contextmanager
    def _lock(self, stage: str, key: str) -> Iterator[None]:
        lock = FileLock(self._lock_path(stage, key))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.info("waiting for another process that builds %s %s", stage, key[:12])
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _discard(self, folder: Path) -> None:
        """Takes a folder out of sight at once, and then removes it."""
        trash = self.folder / ".work" / f".trash-{folder.name}-{uuid.uuid4().hex}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, trash)
        shutil.rmtree(trash)

    def _lock_path(self, stage: str, key: str) -> Path:
        path = self.folder / ".locks" / f"{stage}-{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def listing(self) -> Iterator[Listing]:
        """All stages, finished and not, without reading their content."""
        for folder in sorted(self.folder.glob("[!.]*/*")):
            manifest = _manifest(folder)
            if manifest is None:
                yield Listing(
                    stage=folder.parent.name,
                    key=folder.name,
                    folder=folder,
                    state="broken",
                    num_bytes=tree_bytes(folder),
                    created=folder.stat().st_mtime,
                    seconds=0.0,
                    problem=f"no readable {MANIFEST}",
                )
            else:
                yield Listing(
                    stage=folder.parent.name,
                    key=folder.name,
                    folder=folder,
                    state="finished",
                    num_bytes=tree_bytes(folder),
                    created=manifest["created"],
                    seconds=manifest["seconds"],
                )
        for folder in sorted(self.folder.glob(".work/*")):
            stage, _, key = folder.name.rpartition("-")
            yield Listing(
                stage=stage,
                key=key,
                folder=folder,
                state="unfinished",
                num_bytes=tree_bytes(folder),
                created=folder.stat().st_mtime,
                seconds=0.0,
            )

    def verify(self) -> Iterator[Listing]:
        """The listing, with each finished stage's files held against their checksums."""
        for line in self.listing():
            problem = _problem(line.folder) if line.state == "finished" else ""
            yield Listing(**{**vars(line), "state": "broken", "problem": problem}) if problem else line

    def prune(self, days: float | None) -> Iterator[Listing]:
        """Removes unfinished and broken stages, and finished ones older than `days`; gives what it removed.

        A stage that another process is building is left alone.
        """
        for line in list(self.verify()):
            too_old = days is not None and time.time() - line.created > days * 86400
            if line.state == "finished" and not too_old:
                continue
            lock = FileLock(self._lock_path(line.stage, line.key))
            try:
                with lock.acquire(timeout=0):
                    self._discard(line.folder)
                    yield line
            except (Timeout, FileNotFoundError):
                continue


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What the stage was made from; None where a damaged disk or somebody's hand left no readable one."""
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        return manifest if {"seconds", "created", "files"} <= manifest.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _spent_before(work: Path) -> float:
    """Seconds of killed attempts, as far as the last file that each wrote shows: a resumed stage costs what it took."""
    attempt = work / ATTEMPT
    if not attempt.is_file():
        return 0.0
    known = read_json(attempt)
    last = max(path.stat().st_mtime for path in work.rglob("*"))
    return float(known["earlier_seconds"]) + max(0.0, last - float(known["began"]))


def _problem(folder: Path) -> str:
    expected = read_json(folder / MANIFEST)["files"]
    found = {name: value for name, value in tree_digests(folder).items() if name != MANIFEST}
    missing = [name for name in expected if name not in found]
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    extra = [name for name in found if name not in expected]
    parts = [
        f"{what} {', '.join(names)}"
        for what, names in (("missing", missing), ("changed", changed), ("unknown", extra))
        if names
    ]
    return "; ".join(parts)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()

"""Files that are whole or not there: written aside, flushed, renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a text file that a process killed at any moment leaves either as it was or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, values: Any, *, sort_keys: bool = True) -> None:
    """Writes JSON; with sorted keys, so that equal values give equal bytes."""
    write_text(path, json.dumps(values, indent=1, sort_keys=sort_keys, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digest(values: Any) -> str:
    """SHA-256 of plain values, independent of the order of keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digests(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Checksum and size in bytes of each file below the folder, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Reading and hashing large files leaves the interpreter to other threads.
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(file_digest, files))
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256, "bytes": path.stat().st_size}
        for path, sha256 in zip(files, digests, strict=True)
    }


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync_tree(folder: Path) -> None:
    """Flushes every file of the folder and the folder itself to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

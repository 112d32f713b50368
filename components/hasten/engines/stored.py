"""Files of a compiled model, as they are or compressed without loss, so that zeros among the weights save bytes."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_SUFFIX = ".gz"
_LEVEL = 6
"""Of zlib. Files of lzma are 3 to 11 % smaller, and take ten times as long to write and four to read."""


def store(source: Path, file: Path, compressed: bool) -> None:
    """Copies a file, or writes it compressed beside where it would lie, as `<name>.gz`; the same bytes every time."""
    if compressed:
        file.with_name(f"{file.name}{_SUFFIX}").write_bytes(gzip.compress(source.read_bytes(), _LEVEL, mtime=0))
    else:
        shutil.copyfile(source, file)


def read(file: Path) -> bytes:
    """What was stored compressed as `file`."""
    return gzip.decompress(file.with_name(f"{file.name}{_SUFFIX}").read_bytes())


@contextmanager
def unpacked(folder: Path, compressed: bool) -> Iterator[Path]:
    """A folder, for as long as the context lasts, in which every file lies as it was before it was stored."""
    if not compressed:
        yield folder
        return
    with TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            if file.suffix == _SUFFIX:
                Path(scratch, file.stem).write_bytes(read(file.with_suffix("")))
            elif file.is_file():
                shutil.copyfile(file, Path(scratch, file.name))
        yield Path(scratch)

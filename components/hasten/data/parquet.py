"""Parquet files of the user's own."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from hasten.core.errors import ConfigError
from hasten.core.interfaces import DataSource, RowStream, Table
from hasten.data.arrow import File, Format, Reading
from hasten.data.parts import SPLITS, Parts, parts

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024
"""Rows that are Python objects at once, besides those that are kept."""
_READ_BYTES = 2**20
"""Of a column that are read at once, however large the file's groups of rows are."""


@dataclass(frozen=True, kw_only=True)
class Parquet(DataSource):
    """Columns of Parquet files: one file, a folder of `.parquet` files or a pattern such as `data/train-*.parquet`.

    Columns of numbers, of lists of one length (also of lists) and of yes and no become arrays of numbers; texts and
    bytes stay what they are, and so do images as Hugging Face stores them ({bytes, path}), by their bytes. Files are
    read in the order of their names.

    Attributes:
        path: files whose rows are divided by `data.split`; or, instead:
        train, validate, test: files of each split. Where two are the same files, their rows are divided between the two
            in proportion to `data.split`; a split without files shares those of the split before it.
        inputs: columns; None for all but the targets and the index that pandas wrote.
        targets: the column of labels (texts are numbered in their order) or values; a list of columns of numbers; None
            for rows without labels.
        limit: rows of each file at most, from its first; None for all.
        nulls: `error`, or `drop` to leave out rows with a null (or NaN) in one of these columns.
    """

    path: str | None = None
    train: str | None = None
    validate: str | None = None
    test: str | None = None
    inputs: tuple[str, ...] | None = None
    targets: str | tuple[str, ...] | None = "label"
    limit: Annotated[int, Ge(1)] | None = None
    nulls: Literal["error", "drop"] = "error"

    def fingerprint(self) -> str:
        return self._reading().fingerprint()

    def load(self) -> Table:
        return self._reading().load()

    def stream(self) -> RowStream:
        return self._reading().stream()

    def _reading(self) -> Reading:
        named = {split: text for split in SPLITS if (text := getattr(self, split)) is not None}
        if self.path is not None and named:
            others = ", ".join(f"data.{split}={text}" for split, text in named.items())
            raise ConfigError(f"data.path={self.path} and {others} exclude one another: give the one or the others")
        if self.path is None and "train" not in named:
            if named:
                others = ", ".join(f"data.{split}" for split in named)
                raise ConfigError(f"data.train is missing beside {others}: a file, a folder or a pattern")
            raise ConfigError("data.path is missing: a file, a folder or a pattern; or data.train, .validate and .test")
        if self.path is not None:
            files = {"train": _files("data.path", self.path)}
            divided = Parts(texts={"train": "+".join(SPLITS)}, notes=())
        else:
            files = {split: _files(f"data.{split}", text) for split, text in named.items()}
            divided = parts({split: _identity(given) for split, given in files.items()})
            _check_apart({split: files[split] for split in divided.texts})
        return Reading(
            files={text: files[split] for split, text in divided.texts.items()},
            format=Format(name="Parquet file", schema=_schema, batches=_batches),
            parts=divided,
            inputs=self.inputs,
            targets=self.targets,
            limit=self.limit,
            nulls=self.nulls,
            ignored=pandas_index,
        )


def _files(key: str, text: str) -> tuple[File, ...]:
    path = Path(text)
    if path.is_dir():
        found = sorted(path.glob("*.parquet"))
        problem = "is a folder without .parquet files"
    elif path.exists():
        found, problem = [path], ""
    else:
        found = sorted(Path(name) for name in glob.glob(text, recursive=True))
        problem = "matches no file" if glob.has_magic(text) else "does not exist"
    if not found:
        raise ConfigError(f"{key}={text} {problem}")
    return tuple(File(path=file, key=key) for file in found)


def _identity(files: Sequence[File]) -> tuple[Path, ...]:
    return tuple(file.path.resolve() for file in files)


def _check_apart(files: dict[str, tuple[File, ...]]) -> None:
    for one, other in combinations(files, 2):
        if shared := set(_identity(files[one])) & set(_identity(files[other])):
            name = min(shared).name
            raise ConfigError(
                f"data.{one} and data.{other} both read {name}: take it out of one, or name the same files for both, "
                "and their rows are divided"
            )


def _schema(file: Path) -> pa.Schema:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as parquet:
        return parquet.schema_arrow


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    from pyarrow.parquet import ParquetFile

    # Buffered in advance, as by default, all that was read of a file stays in memory until it is closed.
    with ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=_READ_BYTES) as parquet:
        yield from parquet.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns))


def pandas_index(schema: pa.Schema) -> tuple[str, ...]:
    """Columns that number the rows of the data frame that was written, and say nothing of them."""
    columns = (schema.pandas_metadata or {}).get("index_columns", ())
    return tuple(column for column in columns if isinstance(column, str))

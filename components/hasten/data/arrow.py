"""Rows in Arrow's columns as NumPy arrays, read piece by piece: what sources of Parquet and Arrow files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, RowStream, Table
from hasten.data.fingerprint import Stream
from hasten.data.parts import Parts

if TYPE_CHECKING:
    import pyarrow as pa

TOLD = 3
"""Rows and files that an error or a note names of many."""
TOLD_CLASSES = 20

Kind: TypeAlias = Literal["numbers", "texts", "bytes"]


class RaggedError(ValueError):
    """Lists of one column differ in length."""


def holds(kind: pa.DataType) -> Kind | None:
    """What a column of this type becomes; None for what has no meaning to a model (dates, maps, lists of texts)."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return holds(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return holds(kind.storage_type)
    if _is_list(kind):
        return "numbers" if holds(kind.value_type) == "numbers" else None
    if types.is_struct(kind):
        # Images and sound as Hugging Face stores them: {bytes, path}.
        place = kind.get_field_index("bytes")
        return "bytes" if place >= 0 and holds(kind.field(place).type) == "bytes" else None
    for name, is_kind in (
        ("numbers", (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null)),
        ("texts", (types.is_string, types.is_large_string, types.is_string_view)),
        ("bytes", (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)),
    ):
        if any(check(kind) for check in is_kind):
            return name  # type: ignore[return-value]
    return None


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    checks = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(check(kind) for check in checks)


def present(column: pa.Array) -> NDArray[np.bool_]:
    """(B,) whether a row has a value: neither null nor NaN, nor a list that holds one."""
    import pyarrow.compute as pc

    column = _plain(column)
    if not _is_list(column.type):
        return ~np.asarray(pc.is_null(column, nan_is_null=True))
    there = np.asarray(column.is_valid())
    lists = column.filter(column.is_valid())
    elements = present(lists.flatten())
    if not elements.all():
        rows = np.repeat(np.arange(len(lists)), np.asarray(pc.list_value_length(lists)))
        there[there] = np.bincount(rows[~elements], minlength=len(lists)) == 0
    return there


def values(column: pa.Array) -> NDArray[Any]:
    """(B, ...) numbers, or (B,) objects: str or bytes. Yes and no become 1 and 0, decimals float64.

    Args:
        column: of a type that `holds` something, with a value in each row.

    Raises:
        RaggedError: lists differ in length.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column.type, pa.FixedShapeTensorType):
        return values(column.storage).reshape(-1, *column.type.shape)
    column = _plain(column)
    if _is_list(column.type):
        lengths = np.unique(np.asarray(pc.list_value_length(column)))
        if len(lengths) > 1:
            raise RaggedError(f"of {lengths[0]} to {lengths[-1]} values")
        elements = values(column.flatten())
        return elements.reshape(len(column), int(lengths[0]) if len(lengths) else 0, *elements.shape[1:])
    array: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return array.astype(np.uint8) if array.dtype == np.bool_ else array


def _plain(column: pa.Array) -> pa.Array:
    """The column without what is only another way to store the same."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types, kind = pa.types, column.type
    if types.is_dictionary(kind):
        return _plain(column.dictionary_decode())
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(column.storage)
    if types.is_struct(kind):
        return _plain(pc.struct_field(column, "bytes"))
    if types.is_decimal(kind):
        return column.cast(pa.float64())
    if types.is_string_view(kind):
        return column.cast(pa.large_string())
    if types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return column.cast(pa.large_binary())
    return column


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of rows.

    Attributes:
        key: where the user named it: `data.path`.
    """

    path: Path
    key: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """How files are read.

    Attributes:
        name: `Parquet file`.
        schema: the columns of a file.
        num_rows: of a file, without reading a column.
        batches: the rows of a file in order, some at a time: only these columns.
    """

    name: str
    schema: Callable[[Path], pa.Schema]
    num_rows: Callable[[Path], int]
    batches: Callable[[Path, Sequence[str]], Iterator[pa.RecordBatch]]


@contextmanager
def readable(file: File, name: str) -> Iterator[None]:
    """Turns what Arrow says of a broken file into one line."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{file.key}: {file.path} is not a readable {name}: {reason}") from error


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Rows of several files with the same columns, divided into inputs and targets.

    Attributes:
        files: text of `Table.parts` -> files, in order.
        inputs: columns; None for all that are no targets.
        targets: a column of labels or values; several columns of values; None for rows without labels.
        limit: rows of each file at most, from its first.
        nulls: what is done with a row without a value in one of these columns.
        ignored: columns that None does not stand for.
        notes: what is known before anything is read.
    """

    files: Mapping[str, Sequence[File]]
    format: Format
    parts: Parts
    inputs: tuple[str, ...] | None
    targets: str | tuple[str, ...] | None
    limit: int | None
    nulls: Literal["error", "drop"]
    ignored: Callable[[pa.Schema], Sequence[str]] = lambda schema: ()
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of the rows that `load` gives, held in memory a few at a time.

        Raises:
            ConfigError: as `load`.
        """
        streams: dict[str, Stream] = {}
        for part, columns in self._pieces([]):
            if part not in streams:
                streams[part] = Stream()
            streams[part].add(columns)
        whole = Stream()
        whole.add({part: np.array([stream.hexdigest()], dtype=object) for part, stream in streams.items()})
        return whole.hexdigest()

    def load(self) -> Table:
        """All rows.

        Raises:
            ConfigError: a file is broken, a column is missing, has another type than in other files, holds what no
                model can take, lists of several lengths, infinite numbers, or nulls that nobody allowed.
        """
        notes = [*self.notes, *self.parts.notes]
        rows: list[tuple[str, int]] = []
        pieces: dict[str, list[NDArray[Any]]] = {}
        for part, columns in self._pieces(notes):
            rows.append((part, len(next(iter(columns.values())))))
            for name, piece in columns.items():
                pieces.setdefault(name, []).append(piece)
        whole = {name: np.concatenate(pieces.pop(name)) for name in list(pieces)}
        inputs = {name.removeprefix(_INPUTS): array for name, array in whole.items() if name.startswith(_INPUTS)}
        targets = [array for name, array in whole.items() if name.startswith(_TARGETS)]
        return Table(
            inputs=inputs, targets=self._labels(targets, notes), parts=self.parts.column(rows), notes=tuple(notes)
        )

    def stream(self) -> RowStream:
        """All rows, of which only the targets are in memory.

        Raises:
            ConfigError: as `load`; what is wrong with inputs comes out when they are read, unless `nulls` drops rows.
        """
        notes = [*self.notes, *self.parts.notes]
        rows: list[tuple[str, int]] = []
        targets: dict[str, list[NDArray[Any]]] = {}
        for part, num_rows, columns in self._outline(notes):
            rows.append((part, num_rows))
            for name, piece in columns.items():
                targets.setdefault(name, []).append(piece)
        return RowStream(
            num_rows=sum(num_rows for _, num_rows in rows),
            pieces=self._inputs,
            targets=self._labels([np.concatenate(pieces) for pieces in targets.values()], notes),
            parts=self.parts.column(rows),
            notes=tuple(notes),
        )

    def _outline(self, notes: list[str]) -> Iterator[tuple[str, int, dict[str, NDArray[Any]]]]:
        """Parts, numbers of rows and targets of pieces, from as few columns as tell them."""
        if self.targets is None and self.nulls == "error":
            self._columns()
            for part, files in self.files.items():
                yield part, sum(map(self._num_rows, files)), {}
            return
        prefix = "" if self.nulls == "drop" else _TARGETS
        for part, columns in self._pieces(notes, prefix):
            targets = {name: values for name, values in columns.items() if name.startswith(_TARGETS)}
            yield part, len(next(iter(columns.values()))), targets

    def _num_rows(self, file: File) -> int:
        with readable(file, self.format.name):
            there = self.format.num_rows(file.path)
        return there if self.limit is None else min(there, self.limit)

    def _inputs(self) -> Iterator[Columns]:
        # Which rows are dropped, targets decide too.
        for _, columns in self._pieces([], "" if self.nulls == "drop" else _INPUTS):
            yield {name.removeprefix(_INPUTS): values for name, values in columns.items() if name.startswith(_INPUTS)}

    def _labels(self, columns: Sequence[NDArray[Any]], notes: list[str]) -> NDArray[Any] | None:
        if not columns:
            return None
        if not isinstance(self.targets, str):
            return np.stack(columns, axis=1)
        (labels,) = columns
        if labels.dtype == object:
            classes, labels = np.unique(labels, return_inverse=True)
            notes.append(f"The texts of {self.targets} are labels now, in their order: {told_classes(list(classes))}.")
        return labels.astype(np.int64) if labels.dtype.kind in "iu" else labels

    def _pieces(self, notes: list[str], prefix: str = "") -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
        """Rows of one part at a time: `inputs.<column>` and `targets.<column>`, or those of one prefix -> values."""
        columns = {name: column for name, column in self._columns().items() if name.startswith(prefix)}
        seen: dict[str, tuple[NDArray[Any], File]] = {}
        for part, files in self.files.items():
            num_rows = 0
            for file in files:
                for piece in self._pieces_of(file, columns, notes):
                    self._check_alike(file, columns, piece, seen)
                    num_rows += len(next(iter(piece.values())))
                    yield part, piece
            if not num_rows:
                read = ", ".join(dict.fromkeys(file.key for file in files))
                raise ConfigError(f"{read}: no rows are left to read in {told([str(file.path) for file in files])}")

    def _pieces_of(self, file: File, columns: Mapping[str, str], notes: list[str]) -> Iterator[dict[str, NDArray[Any]]]:
        tally = _Tally()
        with readable(file, self.format.name):
            for batch in self.format.batches(file.path, list(columns.values())):
                if self.limit is not None:
                    batch = batch.slice(0, self.limit - tally.num_rows)
                arrays = {name: batch.column(column) for name, column in columns.items()}
                kept = tally.count(arrays, batch.num_rows)
                if kept.any():
                    piece = {}
                    for name, array in arrays.items():
                        piece[name] = self._values(
                            file, columns[name], name, array if kept.all() else _rows(array, kept)
                        )
                    tally.count_infinite(piece)
                    yield piece
                if tally.num_rows == self.limit:
                    break
        problems = [
            f"{_key(name, columns)} has {count} values that are infinite or beyond float32 in {file.path}"
            for name, count in tally.infinite.items()
        ]
        if self.nulls == "error":
            problems += [
                f"{_key(name, columns)} {told_nulls(count, tally.rows[name], file.path)}: fill them in, or leave these "
                "rows out: data.nulls=drop (rows count from 0, NaN counts as null)"
                for name, count in tally.nulls.items()
            ]
        elif tally.nulls:
            notes.append(
                f"{tally.num_dropped} of {tally.num_rows} rows of {file.path} have a null in "
                f"{', '.join(columns[name] for name in tally.nulls)} and were left out."
            )
        if problems:
            raise ConfigError(*problems)

    def _values(self, file: File, column: str, name: str, array: pa.Array) -> NDArray[Any]:
        try:
            return values(array)
        except RaggedError as error:
            raise ConfigError(_ragged(f"{_key(name, {name: column})} has lists {error} in {file.path}")) from error

    def _check_alike(
        self,
        file: File,
        columns: Mapping[str, str],
        piece: Mapping[str, NDArray[Any]],
        seen: dict[str, tuple[NDArray[Any], File]],
    ) -> None:
        for name, array in piece.items():
            first, of = seen.setdefault(name, (array[:0], file))
            start = f"{_key(name, columns)} has"
            if first.dtype != array.dtype:
                raise ConfigError(
                    f"{start} {first.dtype} in {of.path} and {array.dtype} in {file.path}: all files must hold the same"
                )
            if first.shape[1:] != array.shape[1:]:
                raise ConfigError(
                    _ragged(
                        f"{start} rows of shape {first.shape[1:]} in {of.path} and {array.shape[1:]} in {file.path}"
                    )
                )

    def _columns(self) -> dict[str, str]:
        """`inputs.<column>` and `targets.<column>` -> the column, after all files were found to have them."""
        files = [file for part in self.files.values() for file in part]
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets or ()
        inputs: tuple[str, ...] = ()
        kinds: dict[str, tuple[Kind | None, File]] = {}
        for file in files:
            with readable(file, self.format.name):
                schema = self.format.schema(file.path)
            if not inputs:
                ignored = {*targets, *self.ignored(schema)}
                inputs = tuple(name for name in schema.names if name not in ignored)
                inputs = inputs if self.inputs is None else self.inputs
                check_names(inputs, targets, self.inputs)
            problems = list(missing(schema.names, inputs, targets, str(file.path)))
            if problems:
                raise ConfigError(*problems)
            for key, names in (("inputs", inputs), ("targets", targets)):
                for name in names:
                    self._check_kind(f"data.{key}={name}", schema, name, file, kinds)
        return {f"{_INPUTS}{name}": name for name in inputs} | {f"{_TARGETS}{name}": name for name in targets}

    def _check_kind(
        self, key: str, schema: pa.Schema, name: str, file: File, kinds: dict[str, tuple[Kind | None, File]]
    ) -> None:
        kind = schema.field(name).type
        held = holds(kind)
        first, of = kinds.setdefault(name, (held, file))
        if held is None:
            usable = ", ".join(other for other in schema.names if holds(schema.field(other).type))
            raise ConfigError(
                f"{key} holds {kind} in {file.path}, which is no number, no text and no bytes; columns that can be "
                f"read: {usable or 'none'}"
            )
        if held != first:
            raise ConfigError(
                f"{key} holds {first} in {of.path} and {held} in {file.path}: all files must hold the same"
            )
        if key.startswith("data.targets") and (
            held == "bytes" or (held == "texts" and not isinstance(self.targets, str))
        ):
            allowed = (
                "numbers, or texts as labels" if isinstance(self.targets, str) else "numbers, where they are several"
            )
            raise ConfigError(f"{key} holds {held} in {file.path}; targets are {allowed}")
        if key.startswith("data.targets") and not isinstance(self.targets, str) and _is_list(kind):
            raise ConfigError(f"{key} holds lists in {file.path}; of several targets each is one number a row")


_INPUTS, _TARGETS = "inputs.", "targets."


@dataclass(kw_only=True)
class _Tally:
    """What was counted in a file so far; dicts are by column."""

    num_rows: int = 0
    num_dropped: int = 0
    nulls: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    infinite: dict[str, int] = field(default_factory=dict)

    def count(self, arrays: Mapping[str, pa.Array], num_rows: int) -> NDArray[np.bool_]:
        """(B,) rows with a value in each column."""
        kept = np.ones(num_rows, dtype=np.bool_)
        for name, array in arrays.items():
            there = present(array)
            kept &= there
            if not there.all():
                empty = np.flatnonzero(~there)
                self.nulls[name] = self.nulls.get(name, 0) + len(empty)
                rows = self.rows.setdefault(name, [])
                rows += [self.num_rows + int(row) for row in empty[: TOLD - len(rows)]]
        self.num_rows += num_rows
        self.num_dropped += int(num_rows - kept.sum())
        return kept

    def count_infinite(self, piece: Mapping[str, NDArray[Any]]) -> None:
        for name, array in piece.items():
            if count := num_infinite(array):
                self.infinite[name] = self.infinite.get(name, 0) + count


def num_infinite(array: NDArray[Any]) -> int:
    """Values that are NaN, infinite or beyond float32."""
    if array.dtype.kind != "f":
        return 0
    with np.errstate(over="ignore"):
        return int(np.count_nonzero(~np.isfinite(array.astype(np.float32, copy=False))))


def _rows(array: pa.Array, kept: NDArray[np.bool_]) -> pa.Array:
    import pyarrow as pa

    return array.filter(pa.array(kept))


def _key(name: str, columns: Mapping[str, str]) -> str:
    return f"data.{name.partition('.')[0]}={columns[name]}"


def _ragged(start: str) -> str:
    return f"{start}: a model takes rows of one shape, so pad or cut them to one length"


def check_names(inputs: Sequence[str], targets: Sequence[str], given: Sequence[str] | None) -> None:
    """That columns are named, and each once.

    Raises:
        ConfigError: they are not.
    """
    if not inputs:
        raise ConfigError(f"data.inputs={'[]' if given is not None else 'null'} leaves no column for the model to take")
    names = [*inputs, *targets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"data.inputs and data.targets must name different columns, got {', '.join(twice)} twice")


def missing(there: Sequence[str], inputs: Sequence[str], targets: Sequence[str], where: str) -> Iterator[str]:
    """A line for each column that is not there."""
    from hasten.core.recipe import nearest

    for key, names in (("inputs", inputs), ("targets", targets)):
        for name in names:
            if name not in there:
                remedy = " (rows without labels: data.targets=null)" if key == "targets" else ""
                yield (
                    f"data.{key}={name} is no column of {where}{nearest(name, there)}; "
                    f"it has {', '.join(there) or 'none'}{remedy}"
                )


def told(names: Sequence[str]) -> str:
    """The first names of many: `a, b, c and 5 more`."""
    first, more = ", ".join(names[:TOLD]), len(names) - TOLD
    return f"{first} and {more} more" if more > 0 else first


def told_nulls(count: int, rows: Sequence[int], path: Path) -> str:
    """How many there are, and the first of their rows."""
    first = ", ".join(str(row) for row in rows[:TOLD])
    return f"has {count} null{'s'[: count > 1]} in {path}, the first in row{'s'[: count > 1]} {first}"


def told_classes(names: Sequence[str]) -> str:
    """Numbers and names of classes: `0 cat, 1 dog`."""
    first = ", ".join(f"{number} {name}" for number, name in enumerate(names[:TOLD_CLASSES]))
    return f"{first} and so on, {len(names)} in all" if len(names) > TOLD_CLASSES else first

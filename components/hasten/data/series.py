"""Time series, cut into windows to forecast from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Interval
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import INPUT, DataSource, Table
from hasten.data.arrow import File, check_names, holds, missing, num_infinite, present, readable, told_nulls, values
from hasten.data.fingerprint import of_table
from hasten.data.parts import SPLITS

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Series(DataSource):
    """A CSV or Parquet file with one row a step of time, oldest first, cut into windows.

    A row of the table is a window: inputs (channels, length) are the last `length` steps, targets (horizon * K,) the
    `horizon` steps after them of the K target columns, step by step: all columns of the first step, then of the second.

    Steps are divided, not windows: the oldest are to train on, the next to validate and the last to test on. A window
    belongs to the split in which all its targets lie, and to none where they cross a border; so no target value of a
    split, and nothing after it, was seen by an earlier split. Inputs may look back across the border: at that time they
    are known. Hence `data.split` divides nothing here. This is the protocol of the ETT benchmarks (Zhou et al. 2021,
    `steps=[8640,2880,2880]` for the hourly ones).

    Attributes:
        path: the file.
        targets: columns to forecast.
        inputs: columns to forecast from, the channels in this order; None for all that hold numbers, targets included.
        length: steps looked back on.
        horizon: steps forecast.
        stride: steps from one window to the next to train on.
        evaluation_stride: the same to validate and test on; None for `horizon`, so that no target is in two windows:
            errors of windows that overlap are alike, and a bound that takes them for independent promises too much.
        train_share, validate_share: of the steps, rounded down to whole steps; the rest is to test on.
        steps: numbers of steps to train, validate and test on, instead of shares; those after them are left out.
        scale_targets: subtract the mean of each target column and divide by its standard deviation, both of the steps
            to train on. Errors are then in standard deviations, as in the ETT benchmarks, and outputs have to be scaled
            back for use: the figures are told with the rows.
    """

    path: str
    targets: tuple[str, ...]
    inputs: tuple[str, ...] | None = None
    length: Annotated[int, Ge(1)] = 96
    horizon: Annotated[int, Ge(1)] = 24
    stride: Annotated[int, Ge(1)] = 1
    evaluation_stride: Annotated[int, Ge(1)] | None = None
    train_share: Annotated[float, Interval(gt=0, lt=1)] = 0.6
    validate_share: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    steps: tuple[int, int, int] | None = None
    scale_targets: bool = True

    def fingerprint(self) -> str:
        return of_table(self.load())

    def load(self) -> Table:
        series = self._read()
        targets = np.stack([series[name] for name in self.targets], axis=1).astype(np.float64)
        inputs = np.stack([series[name] for name in self.inputs or series], axis=1).astype(np.float32)
        borders = self._borders(len(targets))
        notes = []
        if self.scale_targets:
            targets, note = self._scaled(targets, borders[1])
            notes.append(note)
        starts = self._starts(borders)
        counts = [len(each) for each in starts]
        first = np.concatenate(starts)
        windows_BCL = np.lib.stride_tricks.sliding_window_view(inputs, self.length, axis=0)[first - self.length]
        targets_BKH = np.lib.stride_tricks.sliding_window_view(targets, self.horizon, axis=0)[first]
        notes.append(
            f"Windows to {', '.join(f'{split}: {count}' for split, count in zip(SPLITS, counts, strict=True))}; "
            f"{borders[-1]} of {len(targets)} steps are in use."
        )
        return Table(
            inputs={INPUT: np.ascontiguousarray(windows_BCL)},
            targets=targets_BKH.transpose(0, 2, 1).reshape(len(first), -1).astype(np.float32),
            parts=np.repeat(SPLITS, counts),
            in_order=True,
            notes=tuple(notes),
        )

    def _borders(self, num_steps: int) -> tuple[int, int, int, int]:
        """Steps where train begins, validate begins, test begins, and test ends."""
        if self.steps is not None:
            if min(self.steps) < 1:
                raise ConfigError(f"data.steps must be three numbers of at least 1, got {list(self.steps)}")
            if sum(self.steps) > num_steps:
                raise ConfigError(f"data.steps add up to {sum(self.steps)}, but {self.path} has {num_steps} steps")
            train, validate, test = self.steps
        else:
            if self.train_share + self.validate_share >= 1:
                given = f"{self.train_share:g} and {self.validate_share:g}"
                raise ConfigError(f"data.train_share and data.validate_share must leave steps to test on, got {given}")
            # A product such as 0.58 * 100 may be a hair below its whole number.
            train = math.floor(num_steps * self.train_share + 1e-9)
            validate = math.floor(num_steps * self.validate_share + 1e-9)
            test = num_steps - train - validate
        return 0, train, train + validate, train + validate + test

    def _starts(self, borders: tuple[int, int, int, int]) -> list[NDArray[np.int64]]:
        """Of each split, the steps at which the targets of its windows begin."""
        starts = []
        for split, begin, end in zip(SPLITS, borders[:-1], borders[1:], strict=True):
            first = max(begin, self.length)
            stride = self.stride if split == "train" else self.evaluation_stride or self.horizon
            starts.append(np.arange(first, end - self.horizon + 1, stride))
            if not len(starts[-1]):
                lengths = f"data.horizon={self.horizon} leaves"
                if first > begin:
                    lengths = f"data.length={self.length} and data.horizon={self.horizon} leave"
                raise ConfigError(f"{lengths} no window to {split} in steps {begin} to {end} of {self.path}")
        return starts

    def _scaled(self, targets: NDArray[np.float64], num_train: int) -> tuple[NDArray[np.float64], str]:
        mean, std = targets[:num_train].mean(axis=0), targets[:num_train].std(axis=0)
        for name, deviation in zip(self.targets, std, strict=True):
            if not deviation > 0:
                raise ConfigError(
                    f"data.targets={name} is constant in the {num_train} steps to train on of {self.path}"
                )
        figures = ", ".join(
            f"{name} = output * {deviation:.6g} + {centre:.6g}"
            for name, centre, deviation in zip(self.targets, mean, std, strict=True)
        )
        return (targets - mean) / std, f"Targets are in standard deviations of the steps to train on: {figures}."

    def _read(self) -> dict[str, NDArray[Any]]:
        """Columns that are read, inputs first; those of None are all but targets that are no inputs."""
        path = File(path=Path(self.path), key="data.path")
        if not path.path.exists():
            raise ConfigError(f"data.path={self.path} does not exist")
        name = "Parquet file" if path.path.suffix in (".parquet", ".pq") else "CSV file"
        with readable(path, name):
            table = _parquet(path.path) if name == "Parquet file" else _csv(path.path)
        if not self.targets:
            raise ConfigError("data.targets must name at least one column to forecast, got []")
        numeric = [column for column in table.column_names if _is_number(table.schema.field(column).type) and column]
        inputs = self.inputs if self.inputs is not None else tuple(numeric)
        problems = list(missing(table.column_names, inputs, self.targets, self.path))
        if problems:
            raise ConfigError(*problems)
        check_names(inputs, (), self.inputs)
        check_names(self.targets, (), self.targets)
        columns: dict[str, NDArray[Any]] = {}
        for key, names in (("inputs", inputs), ("targets", self.targets)):
            for column in names:
                if column not in numeric:
                    kind = table.schema.field(column).type
                    raise ConfigError(f"data.{key}={column} holds {kind} in {self.path}, not numbers")
                if column not in columns:
                    columns[column] = self._numbers(f"data.{key}={column}", table.column(column))
        problems = list(self._disorder(table))
        if problems:
            raise ConfigError(*problems)
        return columns

    def _numbers(self, key: str, column: pa.ChunkedArray) -> NDArray[Any]:
        there = np.concatenate([present(chunk) for chunk in column.chunks] or [np.zeros(0, np.bool_)])
        if not len(there):
            raise ConfigError(f"data.path={self.path} holds no steps")
        if not there.all():
            rows = np.flatnonzero(~there).tolist()
            raise ConfigError(
                f"{key} {told_nulls(len(rows), rows, Path(self.path))}: fill them in, for a series can't leave steps "
                "out (rows count from 0, NaN counts as null)"
            )
        numbers = np.concatenate([values(chunk) for chunk in column.chunks])
        if count := num_infinite(numbers):
            raise ConfigError(f"{key} has {count} values that are infinite or beyond float32 in {self.path}")
        return numbers

    def _disorder(self, table: pa.Table) -> Iterator[str]:
        """A line for the first column of times that does not go forward."""
        import pyarrow as pa

        for name in table.column_names:
            column = table.column(name)
            if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
                times = column.drop_null().to_numpy().astype("datetime64[ns]").astype(np.int64)
                if len(back := np.flatnonzero(np.diff(times) < 0)):
                    yield (
                        f"data.path={self.path}: {name} goes back in row {back[0] + 1} (from 0): sort the rows, oldest "
                        "first, for the future must not be trained on"
                    )
                return


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return holds(kind) == "numbers" and not pa.types.is_nested(kind) and not isinstance(kind, pa.BaseExtensionType)


def _csv(path: Path) -> pa.Table:
    from pyarrow import csv

    return csv.read_csv(path)


def _parquet(path: Path) -> pa.Table:
    from pyarrow.parquet import ParquetFile

    from hasten.data.parquet import pandas_index

    with ParquetFile(path) as parquet:
        index: Sequence[str] = pandas_index(parquet.schema_arrow)
        return parquet.read(columns=[name for name in parquet.schema_arrow.names if name not in index])

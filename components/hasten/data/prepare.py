"""From the rows of a source to splits on disk, as a model takes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.artefacts.rows import apply, as_inputs, take
from hasten.core.columns import joined
from hasten.core.construct import construct
from hasten.core.errors import ConfigError
from hasten.core.files import read_json, write_json, write_text
from hasten.core.interfaces import (
    Columns,
    DataSource,
    Input,
    Progress,
    Rows,
    RowStream,
    Signature,
    Silent,
    Table,
    Task,
    Transform,
)
from hasten.data.arrays import ArrayFile, mapped
from hasten.data.fingerprint import Stream
from hasten.data.job import Job
from hasten.data.making import Journal, make
from hasten.data.pieces import OfSplit, Shard, Shards, Transformed
from hasten.data.shares import split
from hasten.data.transforms import Standardize

SPLITS = ("train", "validate", "test")
RESUME = "resume"
"""Folder of what is in the making; `core.store` keeps it after a kill."""
_FEW = 16
"""Training rows that show what transforms make of all."""
_FITTED_ROWS = 4096
"""Of the files, which are looked at at once when the last transforms are fitted."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `write` left in a folder; rows are read when asked for, one split at a time.

    Attributes:
        inputs: that a model takes.
        output_shape: that the task wants of a row; None where the model decides.
        transforms: config nodes of the fitted transforms that lead from the source's columns to the inputs.
        facts: what constructors of models may ask for, such as `vocabulary_size`.
        fingerprint: of all rows as they came.
        test: fingerprint of the test rows as they came, whatever the other splits and the transforms are.
        num_rows: of each split.
        class_counts: split -> rows of each label; None where the task knows no labels.
        notes: of the source.
        in_order: whether rows follow one another in time.
        columns: that the files hold, in their order.
        num_deferred: of the transforms, the last ones, that are applied to what is read from the files, because what
            they are given takes fewer bytes.
        num_source_rows: of all rows as they came.
    """

    folder: Path
    inputs: tuple[Input, ...]
    output_shape: tuple[int, ...] | None
    transforms: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, int]
    fingerprint: str
    test: str
    num_rows: Mapping[str, int]
    class_counts: Mapping[str, tuple[int, ...]] | None
    notes: tuple[str, ...]
    in_order: bool
    columns: tuple[str, ...]
    num_deferred: int
    num_source_rows: int

    def rows(self, split: str, limit: int | None = None) -> Rows:
        """Rows of `train`, `validate` or `test` as a model takes them, in memory: all, or the first `limit`, without
        reading the rest."""
        rows = take(self.kept(split), slice(limit))
        inputs = {name: np.array(values) for name, values in rows.inputs.items()}
        return replace(rows, inputs=inputs, targets=np.array(rows.targets))

    def kept(self, split: str) -> Rows:
        """The rows as the files have them, mapped: looking at a row reads its pages from the disk, and no more."""
        files = {name: _column_file(split, place) for place, name in enumerate(self.columns)}
        return Rows(
            inputs={name: mapped(self.folder / file) for name, file in files.items()},
            targets=mapped(self.folder / _targets_file(split)),
            in_order=self.in_order,
            deferred=self._fitted()[len(self.transforms) - self.num_deferred :],
        )

    def raw(self, split: str, source: DataSource) -> Rows:
        """The rows as they came, in memory, with all transforms still to be applied.

        Args:
            source: that they were prepared from.

        Raises:
            ConfigError: as `DataSource.load`; or the source has more or fewer rows by now.
        """
        stream = source.stream()
        if stream.num_rows != self.num_source_rows:
            raise ConfigError(
                f"data has {stream.num_rows} rows and had {self.num_source_rows} when they were prepared: it must not "
                "change while it is in use"
            )
        shards = Shards(stream, {split: np.array(mapped(self.folder / _numbers_file(split)))})
        return Rows(
            inputs=joined(list(OfSplit(shards, split))),
            targets=np.array(mapped(self.folder / _targets_file(split))),
            in_order=self.in_order,
            deferred=self._fitted(),
        )

    def _fitted(self) -> tuple[Transform, ...]:
        return tuple(construct(each, "data.transforms") for each in self.transforms)

    def signature(self, output_shape: tuple[int, ...]) -> Signature:
        """Of a model for these rows."""
        return Signature(inputs=self.inputs, output_shape=output_shape)


def write(
    folder: Path,
    rows: Table | RowStream,
    *,
    task: Task,
    shares: Mapping[str, float],
    seed: int,
    normalize: bool,
    source: str,
    transforms: Sequence[Transform] = (),
    progress: Progress | None = None,
    processes: int | None = None,
) -> Prepared:
    """Splits and transforms the rows into arrays that are mapped to be read, and `data.json`.

    Each split has a `.npy` file of each column, one of the targets and one of the rows' numbers in the source: a batch
    is one gather, whichever rows it takes. The last transforms are left out of the files where they work element by
    element and what they are given takes fewer bytes.

    The same rows, shares, seed and transforms give the same bytes, whatever was killed on the way and however many
    processes work on it. Of inputs no more than a few shards are in memory at once, but for what transforms ask for
    when they are fitted.

    Args:
        folder: exists and takes the files. What an earlier, killed call with the same arguments left below `resume` is
            gone on from.
        shares: of `train`, `validate` and `test`.
        normalize: whether to standardise numbers with mean and deviation of the training rows, after the transforms.
        source: fingerprint of all rows.
        transforms: not fitted yet, or fitted: then they stay as they are.
        processes: as of `making.make`.

    Raises:
        ConfigError: as `split`; the targets don't fit the task; or a transform refuses the rows.
        HastenError: a process that prepares rows died.
    """
    if set(shares) != set(SPLITS):
        raise ConfigError(f"data.split must name {', '.join(SPLITS)}, got {', '.join(shares) or 'nothing'}")
    stream = rows.stream() if isinstance(rows, Table) else rows
    targets = task.targets(stream.targets, stream.num_rows)
    labels = task.labels(targets)
    # In our order, whatever the YAML's: it decides which rows go where.
    shares = {name: shares[name] for name in SPLITS}
    places = split(stream.num_rows, shares, seed, labels=labels, parts=stream.parts, in_order=stream.in_order)
    shards = Shards(stream, places)
    work = folder / RESUME
    work.mkdir(exist_ok=True)
    plan = _planned(work / "plan.json", [*transforms, *([Standardize()] if normalize else [])], shards)
    files = _files(work, plan, {name: len(numbers) for name, numbers in places.items()})
    job = Job(transforms=plan.applied, as_inputs=not plan.deferred, files=files)
    test = Stream()
    progress = progress or Silent()
    progress.start("preparing rows", sum(map(len, places.values())))
    try:
        make(shards, job, Journal(work / "shards.jsonl"), progress, processes, partial(_add_test_rows, test))
    finally:
        progress.stop()
    test.add({"targets": targets[places["test"]]})
    deferred = _fit(plan.deferred, _Blocks(files["train"]))
    fitted = [*plan.applied, *deferred]
    for name, numbers in places.items():
        for file in files[name]:
            os.replace(file.path, folder / file.path.name)
        np.save(folder / _targets_file(name), targets[numbers])
        np.save(folder / _numbers_file(name), numbers)
    output_shape = task.output_shape(targets)
    record = {
        "inputs": [each.to_dict() for each in _inputs(as_inputs(apply(deferred, plan.few)), fitted)],
        "output_shape": output_shape,
        "transforms": [node(transform) for transform in fitted],
        "facts": {name: value for transform in fitted for name, value in transform.facts().items()},
        "fingerprint": source,
        "test": test.hexdigest(),
        "num_rows": {name: len(numbers) for name, numbers in places.items()},
        "class_counts": None if labels is None else _class_counts(labels, places),
        "notes": stream.notes,
        "in_order": stream.in_order,
        "columns": list(plan.few),
        "num_deferred": len(deferred),
        "num_source_rows": stream.num_rows,
    }
    write_text(folder / "data.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(work)
    return read(folder)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is done before rows are written, and what is left for when they are read.

    Attributes:
        applied: fitted.
        deferred: transforms after those, not fitted yet.
        few: training rows as the files have them.
    """

    applied: tuple[Transform, ...]
    deferred: tuple[Transform, ...]
    few: Columns


def _planned(file: Path, steps: Sequence[Transform], shards: Shards) -> _Plan:
    """Fits what is applied before rows are written, or takes it from the file where a killed attempt left it."""
    training = OfSplit(shards, "train")
    few = {name: values[:_FEW] for name, values in next(iter(training)).items()}
    if file.is_file():
        applied = [construct(each, "data.transforms") for each in read_json(file)]
    else:
        num_before = len(steps)
        while num_before and steps[num_before - 1].elementwise:
            num_before -= 1
        applied = _fit(steps[:num_before], training)
        given = apply(applied, few)
        if _num_bytes(given) >= _num_bytes(as_inputs(given)):
            applied += _fit(steps[num_before:], Transformed(training, tuple(applied)))
        write_json(file, [node(transform) for transform in applied])
    deferred = tuple(steps[len(applied) :])
    made = apply(applied, few)
    return _Plan(applied=tuple(applied), deferred=deferred, few=made if deferred else as_inputs(made))


def _fit(transforms: Sequence[Transform], pieces: Iterable[Columns]) -> list[Transform]:
    """Each transform fitted to the training rows as those before it leave them."""
    fitted: list[Transform] = []
    for transform in transforms:
        fitted.append(transform.fit_pieces(Transformed(pieces, tuple(fitted))))
    return fitted


def _num_bytes(columns: Columns) -> int:
    return sum(values.nbytes for values in columns.values())


def _files(folder: Path, plan: _Plan, num_rows: Mapping[str, int]) -> dict[str, tuple[ArrayFile, ...]]:
    """Split -> file of each column."""
    return {
        split: tuple(
            ArrayFile.create(folder / _column_file(split, place), name, number, values)
            for place, (name, values) in enumerate(plan.few.items())
        )
        for split, number in num_rows.items()
    }


def _column_file(split: str, place: int) -> str:
    """By its number, since a column may have any name."""
    return f"{split}-column-{place}.npy"


def _targets_file(split: str) -> str:
    return f"{split}-targets.npy"


def _numbers_file(split: str) -> str:
    return f"{split}-numbers.npy"


@dataclass(frozen=True)
class _Blocks:
    """Rows of files, some at a time."""

    files: Sequence[ArrayFile]

    def __iter__(self) -> Iterator[Columns]:
        arrays = {file.column: mapped(file.path) for file in self.files}
        for start in range(0, len(next(iter(arrays.values()))), _FITTED_ROWS):
            yield {name: values[start : start + _FITTED_ROWS] for name, values in arrays.items()}


def _add_test_rows(test: Stream, shard: Shard) -> None:
    if "test" in shard.parts:
        columns = shard.parts["test"].columns.values()
        test.add({f"input {place}": values for place, values in enumerate(columns)})


def read(folder: Path) -> Prepared:
    """What `write` left in the folder, without the rows."""
    record = json.loads((folder / "data.json").read_text())
    counts = record["class_counts"]
    return Prepared(
        folder=folder,
        inputs=tuple(Input.from_dict(each) for each in record["inputs"]),
        output_shape=None if record["output_shape"] is None else tuple(record["output_shape"]),
        transforms=tuple(record["transforms"]),
        facts=record["facts"],
        fingerprint=record["fingerprint"],
        test=record["test"],
        num_rows=record["num_rows"],
        class_counts=None if counts is None else {name: tuple(rows) for name, rows in counts.items()},
        notes=tuple(record["notes"]),
        in_order=record["in_order"],
        columns=tuple(record["columns"]),
        num_deferred=record["num_deferred"],
        num_source_rows=record["num_source_rows"],
    )


def node(transform: Transform) -> dict[str, Any]:
    """The config node of a transform, with what it has learned."""
    kind = type(transform)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(transform)}  # type: ignore[call-overload]


def _inputs(columns: Columns, fitted: Sequence[Transform]) -> tuple[Input, ...]:
    dynamic = {name: axes for transform in fitted for name, axes in transform.dynamic().items()}
    return tuple(
        Input(name=name, shape=values.shape[1:], dtype=str(values.dtype), dynamic=tuple(dynamic.get(name, ())))
        for name, values in columns.items()
    )


def _class_counts(labels: NDArray[Any], places: Mapping[str, NDArray[np.int64]]) -> dict[str, list[int]]:
    num_classes = int(labels.max()) + 1
    return {name: np.bincount(labels[rows], minlength=num_classes).tolist() for name, rows in places.items()}

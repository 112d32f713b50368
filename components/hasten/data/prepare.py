"""From the rows of a source to splits on disk, as a model takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.artefacts.rows import apply, as_inputs
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Input, Rows, Signature, Table, Task, Transform
from hasten.data.fingerprint import fingerprint
from hasten.data.transforms import Standardize

SPLITS = ("train", "validate", "test")
_PREFIX = "inputs."


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

    def rows(self, split: str, limit: int | None = None) -> Rows:
        """Rows of `train`, `validate` or `test`: all, or the first `limit`, without reading the rest."""
        from safetensors import safe_open

        with safe_open(self.folder / f"{split}.safetensors", framework="numpy") as file:
            end = self.num_rows[split] if limit is None else min(limit, self.num_rows[split])
            inputs = {each.name: file.get_slice(f"{_PREFIX}{each.name}")[:end] for each in self.inputs}
            return Rows(inputs=inputs, targets=file.get_slice("targets")[:end], in_order=self.in_order)

    def signature(self, output_shape: tuple[int, ...]) -> Signature:
        """Of a model for these rows."""
        return Signature(inputs=self.inputs, output_shape=output_shape)


def split(
    num_rows: int,
    shares: Mapping[str, float],
    seed: int,
    *,
    labels: NDArray[Any] | None = None,
    parts: NDArray[Any] | None = None,
    in_order: bool = False,
) -> dict[str, NDArray[np.int64]]:
    """Disjoint row numbers per split, in ascending order.

    Args:
        shares: split -> share of the rows; what they leave over belongs to no split.
        seed: decides which rows go where.
        labels: (num_rows,), each divided in these shares as nearly as whole rows allow; None to divide all at once.
        parts: as of `Table`; rows that a part names for one split belong to it whatever the shares.
        in_order: the first rows to the first split and so on, instead of at random.

    Raises:
        ConfigError: a share is not above 0, they add up to more than 1, or a split or a label has too few rows.
    """
    _check_shares(shares)
    generator = np.random.default_rng(seed)
    pieces: dict[str, list[NDArray[np.int64]]] = {name: [] for name in shares}
    for names, members in _parts(num_rows, shares, parts):
        proportions = {name: shares[name] for name in names}
        if parts is not None:
            proportions = {name: share / math.fsum(proportions.values()) for name, share in proportions.items()}
        for label, rows in _by_label(members, None if in_order else labels):
            if len(rows) < len(names):
                _refuse_rare(label, len(rows), num_rows, names)
            ordered = rows if in_order else generator.permutation(rows)
            ends = np.cumsum(_whole_rows(len(rows), list(proportions.values())))
            for name, begin, end in zip(names, [0, *ends[:-1]], ends, strict=True):
                pieces[name].append(ordered[begin:end])
    if missing := [name for name, rows in pieces.items() if not rows]:
        raise ConfigError(f"data gives no rows for {', '.join(missing)}: give a file for each of {', '.join(shares)}")
    return {name: np.sort(np.concatenate(rows)) for name, rows in pieces.items()}


def _parts(
    num_rows: int, shares: Mapping[str, float], parts: NDArray[Any] | None
) -> list[tuple[tuple[str, ...], NDArray[np.int64]]]:
    """Splits that share rows, and those rows."""
    if parts is None:
        return [(tuple(shares), np.arange(num_rows))]
    found = []
    for text in np.unique(parts.astype(str)):
        names = tuple(name for name in shares if name in text.split("+"))
        if strangers := [name for name in text.split("+") if name not in shares]:
            raise ConfigError(f"data: {', '.join(strangers)} is no split; there are {', '.join(shares)}")
        found.append((names, np.flatnonzero(parts == text)))
    return found


def _by_label(members: NDArray[np.int64], labels: NDArray[Any] | None) -> list[tuple[Any, NDArray[np.int64]]]:
    if labels is None:
        return [(None, members)]
    return [(label, members[labels[members] == label]) for label in np.unique(labels[members])]


def _refuse_rare(label: Any, count: int, num_rows: int, names: Sequence[str]) -> None:
    splits = ", ".join(names)
    if label is None:
        raise ConfigError(f"data.split needs a row in each of {splits}, but there are only {count}: add rows")
    raise ConfigError(
        f"data.split needs a row of each label in each of {splits}, but label {label} has {count} of {num_rows} rows: "
        "add rows or drop the label"
    )


def _check_shares(shares: Mapping[str, float]) -> None:
    problems = [f"data.split.{name} must be above 0, got {share}" for name, share in shares.items() if not share > 0]
    if not problems and math.fsum(shares.values()) > 1 + 1e-9:
        problems = [f"data.split must add up to at most 1, got {math.fsum(shares.values()):g} from {dict(shares)}"]
    if problems:
        raise ConfigError(*problems)


def _whole_rows(count: int, shares: list[float]) -> list[int]:
    """Rows of each share by largest remainders, at least one each."""
    ideal = [count * share for share in shares]
    rows = [math.floor(value + 1e-9) for value in ideal]
    by_remainder = sorted(range(len(rows)), key=lambda place: rows[place] - ideal[place])
    for place in by_remainder[: round(math.fsum(ideal)) - sum(rows)]:
        rows[place] += 1
    rows = [max(1, number) for number in rows]
    while sum(rows) > count:
        rows[rows.index(max(rows))] -= 1
    return rows


def write(
    folder: Path,
    table: Table,
    *,
    task: Task,
    shares: Mapping[str, float],
    seed: int,
    normalize: bool,
    source: str,
    transforms: Sequence[Transform] = (),
) -> Prepared:
    """Splits and transforms the rows into `train`, `validate` and `test.safetensors` and `data.json`.

    The same rows, shares, seed and transforms give the same bytes.

    Args:
        folder: exists and takes the files.
        shares: of `train`, `validate` and `test`.
        normalize: whether to standardise numbers with mean and deviation of the training rows, after the transforms.
        source: fingerprint of all rows.
        transforms: not fitted yet, or fitted: then they stay as they are.

    Raises:
        ConfigError: as `split`; the targets don't fit the task; or a transform refuses the rows.
    """
    from safetensors.numpy import save_file

    if set(shares) != set(SPLITS):
        raise ConfigError(f"data.split must name {', '.join(SPLITS)}, got {', '.join(shares) or 'nothing'}")
    # In our order, whatever the YAML's: it decides which rows go where.
    shares = {name: shares[name] for name in SPLITS}
    num_rows = len(next(iter(table.inputs.values())))
    lengths = {name: len(values) for name, values in table.inputs.items()}
    if table.targets is not None:
        lengths["the targets"] = len(table.targets)
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ConfigError(f"data gives columns of different lengths: {told}")
    targets = task.targets(table.targets, num_rows)
    labels = task.labels(targets)
    places = split(num_rows, shares, seed, labels=labels, parts=table.parts, in_order=table.in_order)
    raw = {name: {column: values[places[name]] for column, values in table.inputs.items()} for name in SPLITS}
    test = fingerprint(*raw["test"].values(), targets[places["test"]])
    fitted = _fitted([*transforms, *([Standardize()] if normalize else [])], raw["train"])
    inputs: tuple[Input, ...] = ()
    for name in SPLITS:
        columns = as_inputs(apply(fitted, raw.pop(name)))
        inputs = inputs or _inputs(columns, fitted)
        tensors = {f"{_PREFIX}{column}": np.ascontiguousarray(values) for column, values in columns.items()}
        save_file({**tensors, "targets": targets[places[name]]}, folder / f"{name}.safetensors")
    output_shape = task.output_shape(targets)
    record = {
        "inputs": [each.to_dict() for each in inputs],
        "output_shape": output_shape,
        "transforms": [node(transform) for transform in fitted],
        "facts": {name: value for transform in fitted for name, value in transform.facts().items()},
        "fingerprint": source,
        "test": test,
        "num_rows": {name: len(rows) for name, rows in places.items()},
        "class_counts": None if labels is None else _class_counts(labels, places),
        "notes": table.notes,
        "in_order": table.in_order,
    }
    (folder / "data.json").write_text(json.dumps(record, indent=1) + "\n")
    return read(folder)


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
    )


def node(transform: Transform) -> dict[str, Any]:
    """The config node of a transform, with what it has learned."""
    kind = type(transform)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(transform)}  # type: ignore[call-overload]


def _fitted(transforms: Sequence[Transform], columns: Columns) -> list[Transform]:
    """Each transform fitted to the training rows as those before it leave them."""
    fitted: list[Transform] = []
    for transform in transforms:
        fitted.append(transform.fit(columns))
        columns = fitted[-1](columns)
    return fitted


def _inputs(columns: Columns, fitted: Sequence[Transform]) -> tuple[Input, ...]:
    dynamic = {name: axes for transform in fitted for name, axes in transform.dynamic().items()}
    return tuple(
        Input(name=name, shape=values.shape[1:], dtype=str(values.dtype), dynamic=tuple(dynamic.get(name, ())))
        for name, values in columns.items()
    )


def _class_counts(labels: NDArray[Any], places: Mapping[str, NDArray[np.int64]]) -> dict[str, list[int]]:
    num_classes = int(labels.max()) + 1
    return {name: np.bincount(labels[rows], minlength=num_classes).tolist() for name, rows in places.items()}

"""From the rows of a source to normalised splits on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Rows, Table
from hasten.data.fingerprint import fingerprint

SPLITS = ("train", "validate", "test")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `write` left in a folder; rows are read when asked for, one split at a time.

    Attributes:
        input_shape: of one row.
        num_classes: highest label plus one.
        mean, std: per feature or channel, of the training rows; 0 and 1 where nothing was normalised.
        fingerprint: of all rows as they came.
        test: fingerprint of the test rows as they came, whatever the other splits and the normalisation are.
        class_counts: split -> rows of each label.
    """

    folder: Path
    input_shape: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    test: str
    class_counts: Mapping[str, tuple[int, ...]]

    def rows(self, split: str) -> Rows:
        """Normalised rows of `train`, `validate` or `test`."""
        from safetensors.numpy import load_file

        arrays = load_file(self.folder / f"{split}.safetensors")
        return Rows(inputs=arrays["inputs"], targets=arrays["targets"])


def split(table: Table, shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Disjoint row numbers per split, in ascending order, each label in its share as nearly as whole rows allow.

    Args:
        table: all rows.
        shares: split -> share of the rows of each label; what they leave over belongs to no split.
        seed: decides which rows go where.

    Raises:
        ConfigError: a share is not above 0, they add up to more than 1, or a label has too few rows for a row in each.
    """
    _check_shares(shares)
    labels, counts = np.unique(table.targets, return_counts=True)
    if len(labels) < 2:
        raise ConfigError(f"data.targets must hold at least 2 different labels, got {labels.tolist()}")
    if counts.min() < len(shares):
        rare = labels[counts.argmin()]
        raise ConfigError(
            f"data.split needs a row of each label in each of {', '.join(shares)}, but label {rare} has "
            f"{counts.min()} of {len(table.targets)} rows: add rows or drop the label"
        )
    generator = np.random.default_rng(seed)
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in shares}
    for label, count in zip(labels, counts, strict=True):
        shuffled = generator.permutation(np.flatnonzero(table.targets == label))
        ends = np.cumsum(_whole_rows(int(count), list(shares.values())))
        for name, begin, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
            parts[name].append(shuffled[begin:end])
    return {name: np.sort(np.concatenate(rows)) for name, rows in parts.items()}


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


def statistics(train_inputs: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation per feature or channel (axis 1), over all other axes, in double precision.

    A feature that is constant on these rows gets the deviation 1, so that it is centred and not blown up.
    """
    axes = tuple(axis for axis in range(train_inputs.ndim) if axis != 1)
    mean = train_inputs.mean(axis=axes, dtype=np.float64)
    std = train_inputs.std(axis=axes, dtype=np.float64)
    constant = std <= 1e-6 * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)
    return mean, np.where(constant, 1.0, std)


def normalise(inputs: NDArray[Any], mean: NDArray[np.float64], std: NDArray[np.float64]) -> NDArray[np.float32]:
    """(inputs - mean) / std along axis 1."""
    along = (1, -1, *(1,) * (inputs.ndim - 2))
    return np.ascontiguousarray((inputs - mean.reshape(along)) / std.reshape(along), dtype=np.float32)


def write(
    folder: Path, table: Table, *, shares: Mapping[str, float], seed: int, normalize: bool, source: str
) -> Prepared:
    """Splits and normalises the rows into `train`, `validate` and `test.safetensors` and `data.json`.

    The same rows, shares, seed and choice give the same bytes.

    Args:
        folder: exists and takes the files.
        shares: of `train`, `validate` and `test`.
        normalize: whether to standardise with mean and deviation of the training rows.
        source: fingerprint of all rows.

    Raises:
        ConfigError: as `split`, or a split is missing.
    """
    from safetensors.numpy import save_file

    if set(shares) != set(SPLITS):
        raise ConfigError(f"data.split must name {', '.join(SPLITS)}, got {', '.join(shares) or 'nothing'}")
    places = split(table, shares, seed)
    mean, std = statistics(table.inputs[places["train"]])
    if not normalize:
        mean, std = np.zeros_like(mean), np.ones_like(std)
    num_classes = int(table.targets.max()) + 1
    for name in SPLITS:
        rows = {"inputs": normalise(table.inputs[places[name]], mean, std), "targets": table.targets[places[name]]}
        save_file(rows, folder / f"{name}.safetensors")
    record = {
        "input_shape": list(table.inputs.shape[1:]),
        "num_classes": num_classes,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "fingerprint": source,
        "test": fingerprint(table.inputs[places["test"]], table.targets[places["test"]]),
        "class_counts": {
            name: np.bincount(table.targets[places[name]], minlength=num_classes).tolist() for name in SPLITS
        },
    }
    (folder / "data.json").write_text(json.dumps(record, indent=1) + "\n")
    return read(folder)


def read(folder: Path) -> Prepared:
    """What `write` left in the folder, without the rows."""
    record = json.loads((folder / "data.json").read_text())
    return Prepared(
        folder=folder,
        input_shape=tuple(record["input_shape"]),
        num_classes=record["num_classes"],
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        fingerprint=record["fingerprint"],
        test=record["test"],
        class_counts={name: tuple(counts) for name, counts in record["class_counts"].items()},
    )

"""Arrays of the user's own."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import INPUT, DataSource, Table
from hasten.data.fingerprint import of_table
from hasten.data.parts import SPLITS


@dataclass(frozen=True, kw_only=True)
class Npz(DataSource):
    """A `.npz` file with an array of inputs, or several, and an array of targets, one row per sample.

    Axis 1 of the inputs is the feature or channel: (rows, features), (rows, channels, length) or
    (rows, channels, height, width). Grey images need their one channel: `inputs[:, None]`.

    Attributes:
        path: the file.
        inputs: name of the array of inputs; or a list of names, which are then those of the model's inputs.
        targets: name of the array of targets, (rows,) or (rows, values): finite numbers. None: rows without labels.
        parts: name of an array of texts, (rows,), that say which split a row belongs to: `train`, `validate` or `test`,
            or several, `validate+test`, between which their rows are divided. None: all rows are divided.
    """

    path: str
    inputs: str | tuple[str, ...] = "inputs"
    targets: str | None = "targets"
    parts: str | None = None

    def fingerprint(self) -> str:
        return of_table(self.load())

    def load(self) -> Table:
        names = (self.inputs,) if isinstance(self.inputs, str) else self.inputs
        if not names:
            raise ConfigError("data.inputs must name at least one array, got none")
        if twice := sorted({name for name in names if names.count(name) > 1 or name == self.targets}):
            raise ConfigError(f"data.inputs and data.targets must name different arrays, got {', '.join(twice)} twice")
        inputs, targets, parts = self._read(names)
        problems = [line for name, values in inputs.items() for line in self._problems_of_inputs(name, values)]
        if targets is not None:
            problems += self._problems_of_targets(targets)
        if parts is not None:
            problems += self._problems_of_parts(parts, len(next(iter(inputs.values()))))
        problems = problems or list(self._problems_of_rows(inputs, targets))
        if problems:
            raise ConfigError(*problems)
        if isinstance(self.inputs, str):
            inputs = {INPUT: inputs[self.inputs]}
        if targets is not None and targets.dtype.kind in "biu":
            targets = targets.astype(np.int64)
        return Table(inputs=inputs, targets=targets, parts=parts)

    def _read(self, names: tuple[str, ...]) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None, NDArray[Any] | None]:
        try:
            # Opened here, because np.load leaves a file open that turns out to be no archive.
            with open(self.path, "rb") as file:
                archive = np.load(file, allow_pickle=False)
                if isinstance(archive, np.lib.npyio.NpzFile):
                    inputs = {name: self._array(archive, "inputs", name) for name in names}
                    targets = None if self.targets is None else self._array(archive, "targets", self.targets)
                    parts = None if self.parts is None else self._array(archive, "parts", self.parts)
                    return inputs, targets, parts
        except FileNotFoundError as error:
            raise ConfigError(f"data.path={self.path} does not exist") from error
        except ConfigError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(f"data.path={self.path} is not a readable .npz file: {error}") from error
        raise ConfigError(
            f"data.path={self.path} holds a single array; save both: np.savez(path, inputs=..., targets=...)"
        )

    def _array(self, archive: Any, knob: str, name: str) -> NDArray[Any]:
        if name not in archive.files:
            remedy = " (rows without labels: data.targets=null)" if knob == "targets" else ""
            held = ", ".join(archive.files) or "nothing"
            raise ConfigError(f"data.{knob}={name} is not in {self.path}, which holds {held}{remedy}")
        try:
            array: NDArray[Any] = archive[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(f"data.{knob}={name} can't be read from {self.path}: {error}") from error
        return array

    def _problems_of_inputs(self, name: str, inputs: NDArray[Any]) -> Iterator[str]:
        array = f"data.inputs={name}"
        if inputs.dtype.kind not in "biuf":
            yield f"{array} must hold real numbers, got {inputs.dtype} ({self.path})"
        elif inputs.ndim < 2 or inputs.size == 0:
            yield (
                f"{array} must be (rows, features), (rows, channels, length) or (rows, channels, height, width), "
                f"none of them 0, got {inputs.shape} ({self.path})"
            )
        elif num_bad := _num_bad(inputs):
            yield (
                f"{array} has {num_bad} of {inputs.size} values that are NaN, infinite or beyond float32 ({self.path})"
            )

    def _problems_of_targets(self, targets: NDArray[Any]) -> Iterator[str]:
        array = f"data.targets={self.targets}"
        if targets.dtype.kind not in "biuf":
            yield f"{array} must hold real numbers, got {targets.dtype} ({self.path})"
        elif targets.ndim < 1 or (targets.ndim > 1 and targets.size == 0):
            yield f"{array} must be (rows,) or (rows, values), none of them 0, got {targets.shape} ({self.path})"
        elif num_bad := _num_bad(targets):
            yield (
                f"{array} has {num_bad} of {targets.size} values that are NaN, infinite or beyond float32 ({self.path})"
            )

    def _problems_of_parts(self, parts: NDArray[Any], num_rows: int) -> Iterator[str]:
        array = f"data.parts={self.parts}"
        if parts.dtype.kind != "U" or parts.shape != (num_rows,):
            yield f"{array} must be one text a row ({num_rows},), got {parts.dtype} {parts.shape} ({self.path})"
            return
        names = {name for text in np.unique(parts) for name in str(text).split("+")}
        if strangers := sorted(names - set(SPLITS)):
            yield f"{array} must name {', '.join(SPLITS)}, got {', '.join(strangers)} ({self.path})"

    def _problems_of_rows(self, inputs: Mapping[str, NDArray[Any]], targets: NDArray[Any] | None) -> Iterator[str]:
        first, *others = inputs
        num_rows = len(inputs[first])
        start = f"data.inputs={first} has {num_rows} rows"
        for name in others:
            if len(inputs[name]) != num_rows:
                yield f"{start}, data.inputs={name} has {len(inputs[name])}: as many are needed ({self.path})"
        if targets is not None and len(targets) != num_rows:
            yield (
                f"{start}, data.targets={self.targets} has {len(targets)}: one target per row is needed ({self.path})"
            )


def _num_bad(values: NDArray[Any]) -> int:
    with np.errstate(over="ignore"):
        return int(np.count_nonzero(~np.isfinite(values.astype(np.float32))))

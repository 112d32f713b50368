"""Arrays of the user's own."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import DataSource, Table
from hasten.data.fingerprint import fingerprint


@dataclass(frozen=True, kw_only=True)
class Npz(DataSource):
    """A `.npz` file with an array of inputs and an array of integer labels, one row per sample.

    Axis 1 of the inputs is the feature or channel: (rows, features), (rows, channels, length) or
    (rows, channels, height, width). Grey images need their one channel: `inputs[:, None]`.

    Attributes:
        path: the file.
        inputs: name of the array of inputs: finite numbers.
        targets: name of the array of labels (rows,): integers from 0.
    """

    path: str
    inputs: str = "inputs"
    targets: str = "targets"

    def fingerprint(self) -> str:
        table = self.load()
        return fingerprint(table.inputs, table.targets)

    def load(self) -> Table:
        inputs, targets = self._read()
        problems = [*self._problems_of_inputs(inputs), *self._problems_of_targets(targets)]
        if not problems and len(inputs) != len(targets):
            problems = [
                f"data.inputs={self.inputs} has {len(inputs)} rows, data.targets={self.targets} has {len(targets)}: "
                f"one label per row is needed ({self.path})"
            ]
        if problems:
            raise ConfigError(*problems)
        return Table(inputs=inputs, targets=targets.astype(np.int64))

    def _read(self) -> tuple[NDArray[Any], NDArray[Any]]:
        try:
            # Opened here, because np.load leaves a file open that turns out to be no archive.
            with open(self.path, "rb") as file:
                archive = np.load(file, allow_pickle=False)
                if isinstance(archive, np.lib.npyio.NpzFile):
                    return self._array(archive, "inputs", self.inputs), self._array(archive, "targets", self.targets)
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
            raise ConfigError(
                f"data.{knob}={name} is not in {self.path}, which holds {', '.join(archive.files) or 'nothing'}"
            )
        try:
            array: NDArray[Any] = archive[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(f"data.{knob}={name} can't be read from {self.path}: {error}") from error
        return array

    def _problems_of_inputs(self, inputs: NDArray[Any]) -> list[str]:
        array = f"data.inputs={self.inputs}"
        if inputs.dtype.kind not in "biuf":
            return [f"{array} must hold real numbers, got {inputs.dtype} ({self.path})"]
        if inputs.ndim < 2 or inputs.size == 0:
            return [
                f"{array} must be (rows, features), (rows, channels, length) or (rows, channels, height, width), "
                f"none of them 0, got {inputs.shape} ({self.path})"
            ]
        with np.errstate(over="ignore"):
            num_bad = int(np.count_nonzero(~np.isfinite(inputs.astype(np.float32))))
        if num_bad:
            return [
                f"{array} has {num_bad} of {inputs.size} values that are NaN, infinite or beyond float32 ({self.path})"
            ]
        return []

    def _problems_of_targets(self, targets: NDArray[Any]) -> list[str]:
        array = f"data.targets={self.targets}"
        if targets.ndim != 1:
            remedy = "; labels in one-hot form: np.argmax(targets, axis=1)" if targets.ndim == 2 else ""
            return [f"{array} must be (rows,), got {targets.shape} ({self.path}){remedy}"]
        wanted = f"{array} must be integer labels from 0"
        if targets.dtype.kind not in "iu":
            return [f"{wanted}, got {targets.dtype} ({self.path})"]
        if targets.size and targets.min() < 0:
            num_negative = int(np.count_nonzero(targets < 0))
            return [f"{wanted}, got {num_negative} below 0, the least {targets.min()} ({self.path})"]
        return []

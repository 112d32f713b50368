"""Mean 0 and deviation 1 for every feature or channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks


class Moments(NamedTuple):
    """Of the values of each feature so far, in double precision.

    Attributes:
        num_values: of a feature.
        mean: (features,).
        squares: (features,) sums of squared differences from the mean.
    """

    num_values: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    def with_more(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque 1983, The American Statistician 37:242)."""
        both = self.num_values + other.num_values
        away, share = other.mean - self.mean, other.num_values / both
        squares = self.squares + other.squares + away**2 * (self.num_values * share)
        return Moments(both, self.mean + away * share, squares)


@dataclass(frozen=True, kw_only=True)
class Standardize(Transform):
    """(values - mean) / std along axis 1, the feature or channel, as float32.

    Attributes:
        columns: names; None for all columns of numbers but those that models take as whole numbers (integers of 32 and
            64 bits: ids, masks).
        mean: column -> one value for each feature or channel; None: of the training rows.
        std: the same of the standard deviation, above 0; None: of the training rows, with 1 for what is constant there.
    """

    elementwise: ClassVar[bool] = True

    columns: tuple[str, ...] | None = None
    mean: Mapping[str, list[float]] | None = None
    std: Mapping[str, list[float]] | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ConfigError(
                "Standardize.mean and Standardize.std go together: give both or neither (data.transforms)"
            )
        for name, deviations in (self.std or {}).items():
            if self.mean is None or len(self.mean.get(name, [])) != len(deviations):
                raise ConfigError(
                    f"Standardize.mean and Standardize.std need as many values of {name} (data.transforms)"
                )
            if not all(deviation > 0 for deviation in deviations):
                raise ConfigError(f"std must be above 0, got {min(deviations)} (Standardize.std.{name})")
        if self.mean is not None and (
            set(self.mean) != set(self.std or ()) or set(self.columns or self.mean) - set(self.mean)
        ):
            raise ConfigError(
                "Standardize.columns, Standardize.mean and Standardize.std must name the same columns (data.transforms)"
            )

    def fit(self, columns: Columns) -> Standardize:
        return self.fit_pieces([columns])

    def fit_pieces(self, pieces: Iterable[Columns]) -> Standardize:
        if self.mean is not None:
            return self
        found: dict[str, Moments] = {}
        names = self.columns
        for columns in pieces:
            if names is None:
                names = tuple(name for name, values in columns.items() if _is_measured(values))
            for name in names:
                with np.errstate(invalid="ignore"):
                    more = moments(checks.numbers(columns, name, self))
                    found[name] = found[name].with_more(more) if name in found else more
        mean, std = {}, {}
        for name, of_column in found.items():
            means, deviations = _mean_and_std(of_column)
            if not (np.isfinite(means).all() and np.isfinite(deviations).all()):
                raise ConfigError(f"Standardize wants finite numbers in the column {name}, got NaN or infinite ones")
            mean[name], std[name] = means.tolist(), deviations.tolist()
        return replace(self, columns=names, mean=mean, std=std)

    def __call__(self, columns: Columns) -> Columns:
        if self.mean is None or self.std is None:
            raise ConfigError("Standardize has neither learned nor been given a mean (data.transforms)")
        after = dict(columns)
        for name, mean in self.mean.items():
            values = checks.numbers(columns, name, self)
            features = values.shape[1] if values.ndim > 1 else 1
            if features != len(mean):
                raise ConfigError(
                    f"Standardize wants {len(mean)} features or channels along axis 1 of the column {name}, got "
                    f"{features} in {values.shape}"
                )
            after[name] = normalise(values, np.array(mean), np.array(self.std[name]))
        return after


def moments(values: NDArray[Any]) -> Moments:
    """Of each feature or channel (axis 1), over all other axes."""
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    whole: Moments | None = None
    for part in checks.parts(values):
        doubles = values[part].astype(np.float64)
        mean = doubles.mean(axis=axes, keepdims=True)
        squares = np.atleast_1d(((doubles - mean) ** 2).sum(axis=axes))
        more = Moments(doubles.size // max(1, squares.size), mean.reshape(-1), squares)
        whole = more if whole is None else whole.with_more(more)
    assert whole is not None, "no rows"
    return whole


def statistics(values: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation per feature or channel (axis 1), over all other axes."""
    return _mean_and_std(moments(values))


def _mean_and_std(of: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A feature that is constant on these rows gets the deviation 1, so that it is centred and not blown up."""
    std = np.sqrt(of.squares / of.num_values)
    constant = std <= 1e-6 * np.maximum(np.abs(of.mean), np.finfo(np.float32).tiny)
    return of.mean, np.where(constant, 1.0, std)


def normalise(values: NDArray[Any], mean: NDArray[np.float64], std: NDArray[np.float64]) -> NDArray[np.float32]:
    """(values - mean) / std along axis 1, reckoned in double precision; (B,) values have one feature."""
    along = (1, -1, *(1,) * (values.ndim - 2)) if values.ndim > 1 else (1,)
    mean, std = mean.reshape(along), std.reshape(along)
    normal = np.empty(values.shape, dtype=np.float32)
    for part in checks.parts(values):
        np.divide(np.subtract(values[part], mean, dtype=np.float64), std, out=normal[part], casting="same_kind")
    return normal


def _is_measured(values: NDArray[Any]) -> bool:
    whole = values.dtype.kind in "iu" and values.dtype.itemsize >= 4
    return values.dtype.kind in "biuf" and not whole

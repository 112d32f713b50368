"""Which rows belong to which split, by shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError


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

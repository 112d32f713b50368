"""Rows that live in the process, as files that any process reads again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hasten.core.errors import ConfigError
from hasten.core.interfaces import INPUT, Table
from hasten.data.fingerprint import of_table
from hasten.data.parts import SPELLINGS, SPLITS, Parts, parts, spelt
from hasten.data.torch_dataset import TorchData, fixed_seed, map_style, of_module

Rows: TypeAlias = Any
"""A pair (inputs, targets), a mapping of pairs or datasets by split, a torch Dataset, or a LightningDataModule."""

NAME_CHARACTERS = 12
"""Of a digest in the name of a file."""
_INPUTS, _TARGETS, _PARTS = "inputs", "targets", "parts"
"""Names of arrays, as conf/data/npz.yaml has them."""


def kept(data: Rows, folder: Path) -> list[str]:
    """Writes the rows into a file named after their content, unless it is there, and gives the overrides that read it.

    Raises:
        ConfigError: it is nothing that has rows, or rows that no model takes.
    """
    table = _table(data)
    digest = of_table(table)[:NAME_CHARACTERS]
    if any(values.dtype == object for values in table.inputs.values()):
        return _parquet(table, folder / f"rows-{digest}")
    return _npz(table, folder / f"rows-{digest}.npz")


def divided(data: Rows) -> bool:
    """Whether the data say which rows are tested on."""
    return hasattr(data, "train_dataloader") or (isinstance(data, Mapping) and len(data) > 1)


def _table(data: Rows) -> Table:
    if isinstance(data, Mapping):
        return _of_splits(data)
    if isinstance(data, tuple | list) and len(data) == 2:
        return _pair(data, "data")
    if hasattr(data, "train_dataloader"):
        return _datasets(of_module(data))
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not _is_no_dataset(data):
        rows = map_style(data, "data")
        with fixed_seed():
            return TorchData().read({"train": ("data", rows)}, Parts(texts={"train": "+".join(SPLITS)}, notes=()))
    hint = ": to_parquet, and data=parquet" if type(data).__module__.startswith(("pandas", "polars")) else ""
    raise ConfigError(
        "data must be a pair (inputs, targets), a mapping of such by split, a torch Dataset or a LightningDataModule, "
        f"got {type(data).__name__}{hint}"
    )


def _is_no_dataset(data: Any) -> bool:
    """What could be taken for one: an array, a data frame, a text, a list."""
    return hasattr(data, "dtype") or hasattr(data, "columns") or isinstance(data, str | bytes | list | tuple)


def _of_splits(data: Mapping[str, Any]) -> Table:
    names = spelt(list(data))
    if strangers := [name for name in data if name not in names.values()]:
        known = ", ".join(spelling for spellings in SPELLINGS.values() for spelling in spellings)
        raise ConfigError(f"data: {', '.join(map(str, strangers))} is no split; there are {known}")
    if "train" not in names:
        raise ConfigError(f"data: train is missing beside {', '.join(data)}")
    given = {split: data[name] for split, name in names.items()}
    if not all(isinstance(rows, tuple | list) for rows in given.values()):
        return _datasets({split: (f"data[{names[split]!r}]", rows) for split, rows in given.items()})
    divided = parts({split: id(rows) for split, rows in given.items()})
    tables = {split: _pair(given[split], f"data[{names[split]!r}]") for split in divided.texts}
    first = tables["train"]
    for split, table in tables.items():
        if list(table.inputs) != list(first.inputs) or (table.targets is None) != (first.targets is None):
            raise ConfigError(
                f"data[{names[split]!r}] has other inputs than data[{names['train']!r}]: all must be alike"
            )
    try:
        inputs = {name: np.concatenate([table.inputs[name] for table in tables.values()]) for name in first.inputs}
        targets = None
        if first.targets is not None:
            targets = np.concatenate([table.targets for table in tables.values() if table.targets is not None])
    except ValueError as error:
        raise ConfigError(f"data: rows of the splits have different shapes: {error}") from error
    counts = [(text, len(next(iter(tables[split].inputs.values())))) for split, text in divided.texts.items()]
    return Table(inputs=inputs, targets=targets, parts=divided.column(counts), notes=divided.notes)


def _datasets(found: Mapping[str, tuple[str, Any]]) -> Table:
    if "train" not in found:
        raise ConfigError("data: there is no train_dataloader")
    for key, rows in found.values():
        map_style(rows, key)
    with fixed_seed():
        return TorchData().read(found, parts({split: id(rows) for split, (_, rows) in found.items()}))


def _pair(pair: Any, key: str) -> Table:
    if len(pair) != 2:
        raise ConfigError(f"{key} must be a pair (inputs, targets), got {len(pair)} values")
    given, targets = pair
    columns = given if isinstance(given, Mapping) else {INPUT: given}
    inputs = {str(name): _array(values, f"{key}: {name}") for name, values in columns.items()}
    wanted = None if targets is None else _array(targets, f"{key}: targets")
    if wanted is not None and wanted.dtype == object:
        raise ConfigError(f"{key}: targets are texts: number them, np.unique(targets, return_inverse=True)[1]")
    rows = {name: len(values) for name, values in {**inputs, **({} if wanted is None else {_TARGETS: wanted})}.items()}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ConfigError(f"{key}: one target a row is needed, got {told}")
    return Table(inputs=inputs, targets=wanted)


def _array(values: Any, key: str) -> NDArray[Any]:
    """(B, ...) numbers, or (B,) objects: texts or bytes."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if str(values.dtype) == "torch.bfloat16" else values.numpy()
    # NumPy's own texts and bytes lose the zeros at their end.
    if isinstance(values, list | tuple) and {type(value) for value in values} in ({str}, {bytes}):
        return np.array([*values, None], dtype=object)[:-1]
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ConfigError(f"{key}: rows differ in shape: {error}") from error
    if array.dtype.kind in "biuf" and array.ndim:
        return array
    if array.ndim == 1 and (rows := array.tolist()) and {type(row) for row in rows} in ({str}, {bytes}):
        return np.array([*rows, None], dtype=object)[:-1]
    got = f"{array.dtype} {array.shape}" if array.ndim else type(array.item()).__name__
    raise ConfigError(f"{key} must be an array of numbers, one row a sample, or a list of texts or bytes, got {got}")


def _npz(table: Table, file: Path) -> list[str]:
    single = list(table.inputs) == [INPUT]
    if not file.exists():
        arrays: dict[str, Any] = {_INPUTS if single else name: values for name, values in table.inputs.items()}
        if table.targets is not None:
            arrays[_TARGETS] = table.targets
        if table.parts is not None:
            arrays[_PARTS] = table.parts
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.stem}.{os.getpid()}.npz")
        np.savez(aside, **arrays)
        os.replace(aside, file)
    told = ["data=npz", f"data.path={quoted(file)}"]
    told += [] if single else [f"data.inputs=[{','.join(table.inputs)}]"]
    told += [] if table.targets is not None else ["data.targets=null"]
    return told + ([] if table.parts is None else [f"data.parts={_PARTS}"])


def _parquet(table: Table, folder: Path) -> list[str]:
    """A file for each part, in a folder: rows with texts or bytes."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = dict(table.inputs)
    if table.targets is not None:
        if table.targets.ndim > 1:
            raise ConfigError("data: rows with texts take one target each: write a Parquet file, and data=parquet")
        columns[_TARGETS] = table.targets
    texts = np.array(["+".join(SPLITS)] * len(next(iter(columns.values())))) if table.parts is None else table.parts
    told = ["data=parquet", f"data.inputs=[{','.join(table.inputs)}]"]
    told.append(f"data.targets={'null' if table.targets is None else _TARGETS}")
    for text in dict.fromkeys(map(str, texts)):
        file = folder / f"{text.replace('+', '-')}.parquet"
        if not file.exists():
            rows = pa.table({name: pa.array(values[texts == text].tolist()) for name, values in columns.items()})
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}.{os.getpid()}")
            parquet.write_table(rows, aside)
            os.replace(aside, file)
        told += [f"data.{split}={quoted(file)}" for split in text.split("+")]
    return told


def quoted(file: Path) -> str:
    """A path as the value of an override."""
    text = str(file)
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("'", "\\'") + "'"

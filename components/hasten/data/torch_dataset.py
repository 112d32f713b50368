"""Datasets of PyTorch, and data modules of Lightning."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.construct import locate
from hasten.core.errors import ConfigError
from hasten.core.interfaces import INPUT, DataSource, Table
from hasten.data.fingerprint import of_table
from hasten.data.parts import SPLITS, Parts, parts

Node = Mapping[str, Any]
_TARGETS = "targets"
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class TorchData(DataSource):
    """Items of a map-style `torch.utils.data.Dataset`, one row each.

    An item is a pair (inputs, target) or a mapping with the target under a key. Inputs are a tensor, an array, a
    number, a text or bytes, or a mapping of such: the columns. Each must have one shape in all items. Items are read
    one after another; a data module's collate functions, samplers and batch sizes are not used.

    Datasets are made with a fixed seed of `random`, NumPy and PyTorch, so that a data module that divides its rows at
    random divides them alike each time. Random augmentation is refused: rows are read once, and would be stuck in one
    random state.

    Attributes:
        dataset: whose rows are divided by `data.split`: `_target_` and arguments, which may be such nodes themselves;
            or, instead:
        train, validate, test: datasets of each split; one that is missing shares the rows of the one before it; or:
        datamodule: a LightningDataModule, of whose train, val and test loaders the datasets are taken.
        inputs: keys of a mapping item (or of a pair's inputs); None for all but the target.
        targets: key of a mapping item's target; of pairs any name serves. None for rows without labels.
    """

    # Mappings have no hash, and a source needs one.
    dataset: Node | None = field(default=None, hash=False)
    train: Node | None = field(default=None, hash=False)
    validate: Node | None = field(default=None, hash=False)
    test: Node | None = field(default=None, hash=False)
    datamodule: Node | None = field(default=None, hash=False)
    inputs: tuple[str, ...] | None = None
    targets: str | None = "label"

    def fingerprint(self) -> str:
        return of_table(self.load())

    def load(self) -> Table:
        with fixed_seed():
            return self.read(*self._datasets())

    def read(self, datasets: Mapping[str, tuple[str, Any]], divided: Parts) -> Table:
        """The items of datasets that are there already.

        Args:
            datasets: split -> (where the user named it, dataset).
            divided: which of them are read, and for whom.

        Raises:
            ConfigError: items that are no rows, or differ in shape.
        """
        read = {split: self._columns(key, rows) for split, (key, rows) in datasets.items() if split in divided.texts}
        _check_alike({datasets[split][0]: columns for split, columns in read.items()})
        first = next(iter(read.values()))
        columns = {name: np.concatenate([read[split][name] for split in divided.texts]) for name in first}
        counts = [(text, len(next(iter(read[split].values())))) for split, text in divided.texts.items()]
        targets = columns.pop(_TARGETS, None)
        return Table(
            inputs={name.removeprefix(_INPUTS): array for name, array in columns.items()},
            targets=targets,
            parts=divided.column(counts),
            notes=divided.notes,
        )

    def _datasets(self) -> tuple[dict[str, tuple[str, Any]], Parts]:
        """Split -> (where the user named it, dataset)."""
        named = {split: node for split in SPLITS if (node := getattr(self, split)) is not None}
        given = [key for key in ("dataset", "datamodule") if getattr(self, key) is not None]
        given += [", ".join(f"data.{split}" for split in named).removeprefix("data.")] if named else []
        if len(given) != 1:
            got = " and ".join(f"data.{key}" for key in given) or "none"
            raise ConfigError(f"one of data.dataset, data.train (and .validate, .test) and data.datamodule, got {got}")
        if self.dataset is not None:
            rows = map_style(_made(self.dataset, "data.dataset"), "data.dataset")
            return {"train": ("data.dataset", rows)}, Parts(texts={"train": "+".join(SPLITS)}, notes=())
        if self.datamodule is not None:
            found = of_module(_made(self.datamodule, "data.datamodule"))
        else:
            found = {split: (f"data.{split}", _made(node, f"data.{split}")) for split, node in named.items()}
        if "train" not in found:
            raise ConfigError(
                f"data.train is missing beside {', '.join(key for key, _ in found.values()) or 'the rest'}"
            )
        for key, rows in found.values():
            map_style(rows, key)
        same = {split: _identity(named.get(split), rows) for split, (_, rows) in found.items()}
        return found, parts(same)

    def _columns(self, key: str, rows: Any) -> dict[str, NDArray[Any]]:
        """Values of all items: `inputs.<name>` and, where there are labels, `targets`."""
        num_rows = len(rows)
        if not num_rows:
            raise ConfigError(f"{key} has no items")
        columns: dict[str, NDArray[Any]] = {}
        first: dict[str, NDArray[Any]] = {}
        for place in range(num_rows):
            item = self._item(key, rows, place)
            if not place:
                first = item
                columns = {name: np.empty((num_rows, *value.shape), value.dtype) for name, value in item.items()}
            _check_shape(key, place, first, item)
            for name, value in item.items():
                columns[name][place] = value[()]
        again = self._item(key, rows, 0)
        if any(not np.array_equal(first[name], again[name], equal_nan=first[name].dtype.kind == "f") for name in first):
            raise ConfigError(
                f"{key}: item 0 differs when it is read again; take random augmentation out of the dataset, rows are "
                "read once (data.augment changes training rows at random)"
            )
        return columns

    def _item(self, key: str, rows: Any, place: int) -> dict[str, NDArray[Any]]:
        try:
            item = rows[place]
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(f"{key}: item {place} can't be read: {type(error).__name__}: {error}") from error
        inputs, target = self._divided(item, f"{key}: item {place}")
        if isinstance(inputs, Mapping):
            names = list(self.inputs or inputs)
            for name in names:
                if name not in inputs:
                    held = ", ".join(str(other) for other in inputs)
                    raise ConfigError(f"data.inputs={name} is no key of item {place} of {key}, which has {held}")
        elif self.inputs is not None:
            raise ConfigError(
                f"data.inputs={','.join(self.inputs)} names keys, but item {place} of {key} has none: null"
            )
        else:
            names, inputs = [INPUT], {INPUT: inputs}
        columns = {f"{_INPUTS}{name}": _array(inputs[name], f"{key}: {name} of item {place}") for name in names}
        if self.targets is not None:
            columns[_TARGETS] = _array(target, f"{key}: target of item {place}")
            if columns[_TARGETS].dtype == object:
                raise ConfigError(f"{key}: target of item {place} is {target!r}, no number")
        return columns

    def _divided(self, item: Any, what: str) -> tuple[Any, Any]:
        """Inputs and target of an item."""
        if isinstance(item, Mapping):
            if self.targets is None:
                return item, None
            if self.targets not in item:
                held = ", ".join(str(name) for name in item)
                raise ConfigError(f"data.targets={self.targets} is no key of an item; {what} has {held}")
            return {name: value for name, value in item.items() if name != self.targets}, item[self.targets]
        if isinstance(item, Sequence) and not isinstance(item, str | bytes):
            if len(item) == 2:
                return item[0], item[1]
            if len(item) == 1 and self.targets is None:
                return item[0], None
        elif self.targets is None:
            return item, None
        got = f"{type(item).__name__} of {len(item)}" if isinstance(item, Sequence) else type(item).__name__
        raise ConfigError(
            f"{what} must be a pair (inputs, target) or a mapping, got {got} (rows without labels: data.targets=null)"
        )


_INPUTS = "inputs."


def _made(node: Any, key: str) -> Any:
    """What a node declares, its arguments first.

    Raises:
        ConfigError: it has no `_target_`, does not import, or its constructor raised.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key} must be a node with _target_, got {node!r}")
    thing = locate(str(node["_target_"]), key)
    # Not core.construct: there, names such as `split` belong to the stage, and datasets take arguments of such names.
    given = {name: _argument(value, f"{key}.{name}") for name, value in node.items() if name != "_target_"}
    try:
        return thing(**given)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{key}: {node['_target_']} can't be made: {type(error).__name__}: {error}") from error


def _argument(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _made(value, key)
        return {name: _argument(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_argument(each, key) for each in value]
    return value


def map_style(rows: Any, key: str) -> Any:
    from torch.utils.data import IterableDataset

    if isinstance(rows, IterableDataset):
        raise ConfigError(
            f"{key}: {type(rows).__name__} is an IterableDataset, whose rows can't be divided or read twice: give a "
            "dataset with __len__ and __getitem__"
        )
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ConfigError(f"{key}: {type(rows).__name__} is no dataset: it lacks __len__ or __getitem__")
    return rows


def of_module(module: Any) -> dict[str, tuple[str, Any]]:
    """Split -> (where it is, dataset of its loader), of the loaders that a LightningDataModule has."""
    loaders = {"train": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader"}
    if not hasattr(module, "train_dataloader"):
        raise ConfigError(f"data.datamodule: {type(module).__name__} is no LightningDataModule: no train_dataloader")
    found: dict[str, tuple[str, Any]] = {}
    try:
        module.prepare_data()
        for stage in ("fit", "test"):
            module.setup(stage)
        for split, name in loaders.items():
            if _overridden(module, name) and (loader := getattr(module, name)()) is not None:
                key = f"data.datamodule.{name}"
                if not hasattr(loader, "dataset"):
                    raise ConfigError(f"{key} must give one DataLoader, got {type(loader).__name__}")
                found[split] = (key, loader.dataset)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"data.datamodule: {type(error).__name__}: {error}") from error
    return found


def _overridden(module: Any, name: str) -> bool:
    # Lightning's own raise that they are to be overridden; both of its packages call their class so.
    method = getattr(type(module), name, None)
    return method is not None and not method.__qualname__.startswith("DataHooks.")


def _identity(node: Node | None, rows: Any) -> str:
    """What two datasets share if they are the same rows: how they are declared, or, from a data module, the object."""
    return repr(node) if node is not None else str(id(rows))


def _array(value: Any, what: str) -> NDArray[Any]:
    """A number, text or array as an array; texts and bytes are objects ()."""
    import torch

    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        value = plain.float().numpy() if plain.dtype == torch.bfloat16 else plain.numpy()
    if isinstance(value, str | bytes):
        text = np.empty((), dtype=object)
        text[()] = value
        return text
    if isinstance(value, bool | int | float | np.generic | np.ndarray | list | tuple):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{what} is no array: {error}") from error
        if array.dtype.kind in "biuf":
            return array.astype(np.uint8) if array.dtype.kind == "b" else array
    raise ConfigError(
        f"{what} is {type(value).__name__}, no tensor, array, number, text or bytes: convert it in the dataset"
    )


def _check_shape(key: str, place: int, first: Mapping[str, NDArray[Any]], item: Mapping[str, NDArray[Any]]) -> None:
    if set(first) != set(item):
        raise ConfigError(f"{key}: item {place} has {_told(item)} where item 0 has {_told(first)}")
    for name, value in item.items():
        for what, wanted, got in (("shape", first[name].shape, value.shape), ("dtype", first[name].dtype, value.dtype)):
            if wanted != got:
                raise ConfigError(
                    f"{key}: {name.removeprefix(_INPUTS)} of item {place} has {what} {got} where item 0 has {wanted}: "
                    "all must be alike"
                )


def _check_alike(read: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
    """That the items of all splits have the same columns, by where the user named them."""
    (first_key, first), *others = read.items()
    for key, columns in others:
        if set(columns) != set(first):
            raise ConfigError(f"{key} has {_told(columns)} where {first_key} has {_told(first)}")
        for name, values in columns.items():
            if values.shape[1:] != first[name].shape[1:] or values.dtype != first[name].dtype:
                raise ConfigError(
                    f"{key}: {name.removeprefix(_INPUTS)} is {values.dtype} {values.shape[1:]} where in {first_key} "
                    f"it is {first[name].dtype} {first[name].shape[1:]}: all must be alike"
                )


def _told(columns: Mapping[str, Any]) -> str:
    return ", ".join(name.removeprefix(_INPUTS) for name in columns)


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Random numbers of `random`, NumPy and PyTorch from a fixed seed; afterwards they go on as if nothing was."""
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)

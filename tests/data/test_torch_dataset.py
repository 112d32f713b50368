"""Datasets of PyTorch, and data modules of Lightning, as the config names them."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from hasten.core.errors import ConfigError
from hasten.data.torch_dataset import TorchData


class Pairs(Dataset[Any]):
    """(row number in 2x2, row number modulo 3), counting how often each item is read."""

    reads: list[int] = []  # noqa: RUF012

    def __init__(self, rows: int = 6, first: int = 0, split: str = "all", broken: int | None = None) -> None:
        self.rows, self.first, self.broken = rows, first, broken

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        Pairs.reads.append(place)
        if place == self.broken:
            raise KeyError("no such image")
        return torch.full((2, 2), float(self.first + place)), (self.first + place) % 3


class Items(Dataset[Any]):
    """Whatever it is given."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Any:
        return self.items[place]


class Wrapped(Items):
    """Of another dataset, as transforms do it."""

    def __init__(self, inner: Dataset[Any]) -> None:
        super().__init__([(inner[place][0] * 2, inner[place][1]) for place in range(len(inner))])


class Random(Pairs):
    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return torch.rand(2), 0


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Module:
    """A data module as Lightning has them, that divides its rows at random."""

    def __init__(self, test: bool = True) -> None:
        self.test, self.prepared = test, False

    def prepare_data(self) -> None:
        self.prepared = True

    def setup(self, stage: str) -> None:
        assert self.prepared
        self.train, self.validate = random_split(Pairs(20), [15, 5])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validate, batch_size=4)

    def test_dataloader(self) -> DataLoader[Any] | None:
        return DataLoader(Pairs(4, first=20)) if self.test else None


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_rows")
    for thing in (Pairs, Items, Wrapped, Random, Endless, Module):
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "my_rows", module)
    monkeypatch.setattr(Pairs, "reads", [])


def node(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"my_rows.{name}", **arguments}


def of(*items: Any, **knobs: Any) -> TorchData:
    return TorchData(dataset=node("Items", items=list(items)), **knobs)


def test_pairs_give_one_input_and_the_targets():
    table = TorchData(dataset=node("Pairs")).load()
    assert list(table.inputs) == ["input"]
    assert (table.inputs["input"].shape, table.inputs["input"].dtype) == ((6, 2, 2), np.float32)
    np.testing.assert_array_equal(table.inputs["input"][:, 0, 0], np.arange(6))
    assert table.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert (table.parts, table.notes) == (None, ())


def test_each_item_is_read_once_and_the_first_again_to_compare():
    TorchData(dataset=node("Pairs")).load()
    assert Pairs.reads == [0, 1, 2, 3, 4, 5, 0]


def test_items_with_keys_give_columns_by_their_names():
    items = [{"ids": torch.tensor([row, 1]), "mask": [1, 0], "text": f"row {row}", "star": row / 2} for row in range(3)]
    table = of(*items, targets="star").load()
    assert list(table.inputs) == ["ids", "mask", "text"]
    np.testing.assert_array_equal(table.inputs["ids"], [[0, 1], [1, 1], [2, 1]])
    assert table.inputs["text"].tolist() == ["row 0", "row 1", "row 2"]
    assert table.targets.tolist() == [0, 0.5, 1]
    assert list(of(*items, targets="star", inputs=("mask",)).load().inputs) == ["mask"]
    assert of(*items, targets=None).load().targets is None


@pytest.mark.parametrize(
    "item", [torch.ones(2), (torch.ones(2),), (torch.ones(2), 5)], ids=["alone", "in one", "a pair"]
)
def test_rows_may_have_no_labels(item):
    table = of(item, item, targets=None).load()
    np.testing.assert_array_equal(table.inputs["input"], np.ones((2, 2)))
    assert table.targets is None


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.float64(2), np.float64),
        (3, np.int64),
        (True, np.uint8),
        (torch.tensor(1, dtype=torch.uint8), np.uint8),
        (torch.tensor(1.5, dtype=torch.bfloat16), np.float32),
        (b"\x00", object),
    ],
)
def test_takes_numbers_and_bytes(value, dtype):
    assert of((value, 0), (value, 1)).load().inputs["input"].dtype == dtype


def test_arguments_may_be_nodes_and_bear_names_that_stages_use():
    inner = node("Pairs", split="train")
    table = TorchData(dataset=node("Wrapped", inner=inner)).load()
    np.testing.assert_array_equal(table.inputs["input"][:, 0, 0], 2 * np.arange(6))


def test_a_dataset_of_torch_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(
        sys.modules["my_rows"],
        "Items",
        lambda items: TensorDataset(torch.eye(3), torch.tensor([0, 1, 1])),
        raising=True,
    )
    assert of().load().targets.tolist() == [0, 1, 1]


def test_datasets_of_each_split_give_parts():
    train, test = node("Pairs", rows=4), node("Pairs", rows=2, first=4)
    table = TorchData(train=train, validate=test, test=test).load()
    assert table.parts.tolist() == ["train"] * 4 + ["validate+test"] * 2
    np.testing.assert_array_equal(table.inputs["input"][:, 0, 0], np.arange(6))


def test_a_data_module_gives_the_rows_of_its_loaders():
    table = TorchData(datamodule=node("Module")).load()
    assert table.parts.tolist() == ["train"] * 15 + ["validate"] * 5 + ["test"] * 4
    assert sorted(table.inputs["input"][:, 0, 0].tolist()) == list(range(24))
    assert table.inputs["input"][-4:, 0, 0].tolist() == [20, 21, 22, 23]
    assert set(TorchData(datamodule=node("Module", test=False)).load().parts) == {"train", "validate+test"}


def test_a_module_of_lightning_without_test_loader_shares_its_validation_rows(monkeypatch):
    from pytorch_lightning import LightningDataModule

    class Light(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Pairs(4))

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Pairs(2, first=4))

    monkeypatch.setattr(sys.modules["my_rows"], "Module", Light)
    assert TorchData(datamodule=node("Module")).load().parts.tolist() == ["train"] * 4 + ["validate+test"] * 2


def test_what_is_divided_at_random_is_divided_alike_each_time_and_random_numbers_go_on():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    one = TorchData(datamodule=node("Module"))
    assert torch.equal(torch.rand(1), wanted)
    prints = {one.fingerprint() for _ in range(2)}
    torch.manual_seed(6)
    assert prints == {one.fingerprint()}


def test_the_fingerprint_is_of_what_is_given():
    one = TorchData(dataset=node("Pairs"))
    same = TorchData(dataset=node("Pairs", split="other"))
    other = TorchData(dataset=node("Pairs", first=1))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_an_item_that_raises_is_named():
    with pytest.raises(ConfigError, match=r"^data\.dataset: item 3 can't be read: KeyError: 'no such image'$"):
        TorchData(dataset=node("Pairs", broken=3)).load()


@pytest.mark.parametrize(
    ("items", "knobs", "problem"),
    [
        ([], {}, r"data\.dataset has no items"),
        (
            [torch.ones(2)],
            {},
            r"data\.dataset: item 0 must be a pair \(inputs, target\) or a mapping, got Tensor .*=null",
        ),
        ([(1, 2, 3)], {}, r"data\.dataset: item 0 must be a pair .*, got list of 3"),
        ([{"x": 1}], {}, r"data\.targets=label is no key of an item; data\.dataset: item 0 has x$"),
        (
            [{"x": 1, "label": 0}],
            {"inputs": ("y",)},
            r"data\.inputs=y is no key of item 0 of data\.dataset, which has x$",
        ),
        ([(1, 0)], {"inputs": ("x",)}, r"data\.inputs=x names keys, but item 0 of data\.dataset has none"),
        ([(object(), 0)], {}, r"data\.dataset: input of item 0 is object, no tensor, array, number, text or bytes"),
        ([([[1], [1, 2]], 0)], {}, r"data\.dataset: input of item 0 is no array: "),
        ([(1, "cat")], {}, r"data\.dataset: target of item 0 is 'cat', no number"),
        (
            [(torch.ones(2), 0), (torch.ones(3), 0)],
            {},
            r"data\.dataset: input of item 1 has shape \(3,\) where item 0 has \(2,\): all must be alike",
        ),
        ([(1, 0), (1.5, 0)], {}, r"data\.dataset: input of item 1 has dtype float64 where item 0 has int64"),
        (
            [{"x": 1, "label": 0}, {"y": 1, "label": 0}],
            {},
            r"data\.dataset: item 1 has y, targets where item 0 has x, targets",
        ),
    ],
)
def test_refuses_items_that_make_no_columns(items, knobs, problem):
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        of(*items, **knobs).load()


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({}, r"one of data\.dataset, data\.train \(and \.validate, \.test\) and data\.datamodule, got none"),
        ({"dataset": node("Pairs"), "train": node("Pairs")}, r"one of .*, got data\.dataset and data\.train"),
        ({"test": node("Pairs")}, r"data\.train is missing beside data\.test"),
        ({"dataset": node("Endless")}, r"data\.dataset: Endless is an IterableDataset, .* __len__ and __getitem__"),
        ({"dataset": {"root": "rows"}}, r"data\.dataset must be a node with _target_, got \{'root': 'rows'\}"),
        ({"dataset": node("Nothing")}, r"data\.dataset\._target_=my_rows\.Nothing does not import"),
        ({"dataset": node("Pairs", row=3)}, r"data\.dataset: my_rows\.Pairs can't be made: TypeError: .*row"),
        ({"dataset": node("Random")}, r"data\.dataset: item 0 differs when it is read again; .*data\.augment"),
        ({"datamodule": node("Pairs")}, r"data\.datamodule: Pairs is no LightningDataModule"),
        (
            {"train": node("Pairs"), "test": node("Items", items=[(1, 2)])},
            r"data\.test: input is int64 \(\) where in data\.train it is float32 \(2, 2\): all must be alike",
        ),
    ],
)
def test_refuses_what_is_no_dataset(knobs, problem):
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        TorchData(**knobs).load()


def test_is_a_value():
    one, other = (TorchData(dataset=node("Pairs")) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)

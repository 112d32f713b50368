"""Rows that live in the process come back from the files that they are kept in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hasten.core.errors import ConfigError
from hasten.notebook import rows


class Letters(Dataset[Any]):
    """Items that are mappings."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"text": "abcd"[place], "weight": float(place), "label": place % 2}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Halves(LightningDataModule):
    """Rows 0 to 19 to train on, the others to test on."""

    def __init__(self, images: Any, labels: Any) -> None:
        super().__init__()
        self.rows = TensorDataset(torch.as_tensor(images), torch.as_tensor(labels))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.utils.data.Subset(self.rows, range(20)), batch_size=7, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.utils.data.Subset(self.rows, range(20, 30)))


def test_a_pair_of_arrays(images: Any, read_again: Any) -> None:
    table = read_again(images)
    np.testing.assert_array_equal(table.inputs["input"], images[0])
    np.testing.assert_array_equal(table.targets, images[1])
    assert table.parts is None


@pytest.mark.parametrize("made", [torch.as_tensor, np.ndarray.tolist], ids=["tensors", "lists"])
def test_a_pair_of_other_things(images: Any, read_again: Any, made: Any) -> None:
    table = read_again(tuple(made(each) for each in images))
    np.testing.assert_array_equal(np.float32(table.inputs["input"]), images[0])
    np.testing.assert_array_equal(table.targets, images[1])


def test_several_inputs_and_no_targets(images: Any, read_again: Any) -> None:
    table = read_again(({"pixels": images[0], "age": images[1][:, None]}, None))
    assert list(table.inputs) == ["pixels", "age"]
    assert table.targets is None


def test_splits_keep_their_rows_and_one_that_is_missing_shares(images: Any, read_again: Any) -> None:
    inputs, targets = images
    given = {"train": (inputs[:20], targets[:20]), "val": (inputs[20:], targets[20:])}
    table = read_again(given)
    np.testing.assert_array_equal(table.inputs["input"], inputs)
    assert table.parts.tolist() == ["train"] * 20 + ["validate+test"] * 10


def test_a_data_module_and_datasets_by_split(images: Any, read_again: Any) -> None:
    table = read_again(Halves(*images))
    np.testing.assert_array_equal(table.inputs["input"], images[0])
    assert table.parts.tolist() == ["train+validate"] * 20 + ["test"] * 10
    module = Halves(*images)
    again = read_again({"train": module.train_dataloader().dataset, "test": module.test_dataloader().dataset})
    assert again.parts.tolist() == table.parts.tolist()


def test_texts_and_bytes(read_again: Any) -> None:
    table = read_again(Letters())
    assert table.inputs["text"].tolist() == list("abcd")
    np.testing.assert_array_equal(table.inputs["weight"], [0, 1, 2, 3])
    np.testing.assert_array_equal(table.targets, [0, 1, 0, 1])
    table = read_again({"train": ([b"\x00", b"a\x00"], [0, 1]), "test": ([b"b"], [1])})
    assert table.inputs["input"].tolist() == [b"\x00", b"a\x00", b"b"]
    assert table.parts.tolist() == ["train+validate"] * 2 + ["test"]


def test_equal_rows_are_kept_once(images: Any, tmp_path: Path) -> None:
    told = rows.kept(images, tmp_path)
    assert rows.kept((images[0].copy(), images[1].tolist()), tmp_path) == told
    assert rows.kept((images[0] + 1, images[1]), tmp_path) != told
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ((np.zeros((3, 2)), [0, 1]), "data: one target a row is needed, got input 3, targets 2"),
        ((np.zeros((2, 2)), ["cat", "dog"]), "data: targets are texts: number them"),
        ((np.zeros((2, 2)), [[1], [1, 2]]), "data: targets: rows differ in shape"),
        (
            (3.0, [1]),
            "data: input must be an array of numbers, one row a sample, or a list of texts or bytes, got float",
        ),
        ({"train": (np.zeros((2, 2)), [0, 1]), "mine": ()}, "data: mine is no split; there are train,"),
        ({"test": (np.zeros((2, 2)), [0, 1])}, "data: train is missing beside test"),
        (
            {"train": (np.zeros((2, 2)), [0, 1]), "test": (np.zeros((2, 3)), [0, 1])},
            "data: rows of the splits have different shapes",
        ),
        (Endless(), "data must be a pair (inputs, targets)"),
        (np.zeros((2, 2)), "data must be a pair (inputs, targets)"),
        ("rows.npz", "data must be a pair (inputs, targets)"),
    ],
)
def test_what_has_no_rows_is_refused_in_one_line(data: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)) as error:
        rows.kept(data, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())

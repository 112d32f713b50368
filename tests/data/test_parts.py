"""Which rows belong to which split."""

from __future__ import annotations

import pytest

from hasten.data.parts import parts, spelt


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"train": 1, "validate": 2, "test": 3}, {"train": "train", "validate": "validate", "test": "test"}),
        ({"train": 1, "validate": 2, "test": 2}, {"train": "train", "validate": "validate+test"}),
        ({"train": 1, "validate": 1, "test": 2}, {"train": "train+validate", "test": "test"}),
        ({"train": 1, "validate": 1, "test": 1}, {"train": "train+validate+test"}),
        ({"train": 1, "test": 3}, {"train": "train+validate", "test": "test"}),
        ({"train": 1, "validate": 2}, {"train": "train", "validate": "validate+test"}),
        ({"train": 1}, {"train": "train+validate+test"}),
        ({"train": 1, "test": 1}, {"train": "train+validate+test"}),
    ],
)
def test_equal_rows_are_shared_and_missing_ones_come_from_the_split_before(given, texts):
    assert parts(given).texts == texts


def test_only_what_nobody_asked_for_is_told():
    assert parts({"train": 1, "validate": 2, "test": 2}).notes == ()
    assert len(parts({"train": 1}).notes) == 2


def test_rows_have_no_parts_where_all_splits_share_them():
    assert parts({"train": 1}).column([("train+validate+test", 3)]) is None
    column = parts({"train": 1, "test": 2}).column([("train+validate", 2), ("test", 1)])
    assert column is not None
    assert column.tolist() == ["train+validate", "train+validate", "test"]


def test_splits_are_known_by_their_usual_names():
    assert spelt(["dev", "extra", "train"]) == {"train": "train", "validate": "dev"}
    assert spelt(["validation", "val", "testing"]) == {"validate": "validation", "test": "testing"}

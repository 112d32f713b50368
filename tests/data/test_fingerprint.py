"""Identity by content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.interfaces import Table
from hasten.data.fingerprint import Stream, fingerprint, of_table

COLUMNS = {
    "numbers": np.arange(60.0).reshape(20, 3),
    "texts": np.array([f"{row}" * row for row in range(20)], dtype=object),
    "bytes": np.array([bytes(row) for row in range(20)], dtype=object),
}


def streamed(columns, cuts=()) -> str:
    stream = Stream()
    for begin, end in zip([0, *cuts], [*cuts, 20], strict=True):
        stream.add({name: values[begin:end] for name, values in columns.items()})
    return stream.hexdigest()


@given(cuts=st.lists(st.integers(0, 20)).map(sorted))
def test_where_the_pieces_are_cut_makes_no_difference(cuts):
    assert streamed(COLUMNS, cuts) == streamed(COLUMNS)


@pytest.mark.parametrize(
    "other",
    [
        COLUMNS | {"numbers": COLUMNS["numbers"] + 1e-9},
        COLUMNS | {"numbers": COLUMNS["numbers"].astype(np.float32)},
        COLUMNS | {"numbers": COLUMNS["numbers"].reshape(20, 3, 1)},
        COLUMNS | {"texts": COLUMNS["bytes"]},
        COLUMNS | {"texts": COLUMNS["texts"][::-1]},
        dict(reversed(COLUMNS.items())),
        {"numbers": COLUMNS["numbers"]},
    ],
    ids=["a value", "the dtype", "the shape", "bytes for texts", "the order", "the columns' order", "a column"],
)
def test_other_columns_have_another_fingerprint(other):
    assert streamed(other) != streamed(COLUMNS)


def test_strides_and_the_width_of_texts_make_no_difference():
    numbers = COLUMNS["numbers"]
    assert fingerprint(np.asfortranarray(numbers)) == fingerprint(numbers)
    assert (
        fingerprint(np.array(["a", "b"]))
        == fingerprint(np.array(["a", "b"], "<U9"))
        == fingerprint(np.array(["a", "b"], object))
    )


def test_arrays_without_a_value_have_one_too():
    assert fingerprint(np.zeros((4, 0), np.float32)) != fingerprint(np.zeros((5, 0), np.float32))


def test_a_table_is_all_that_it_holds_but_its_notes():
    targets, parts = np.arange(20), np.array(["train"] * 20)
    table = Table(inputs=COLUMNS, targets=targets, parts=parts)
    assert of_table(table) == of_table(Table(inputs=COLUMNS, targets=targets, parts=parts, notes=("Read slowly.",)))
    others = [
        Table(inputs=COLUMNS, targets=None, parts=parts),
        Table(inputs=COLUMNS, targets=targets),
        Table(inputs=COLUMNS, targets=targets, parts=parts, in_order=True),
        Table(inputs={"numbers": COLUMNS["numbers"]}, targets=targets, parts=parts),
    ]
    assert len({of_table(each) for each in [table, *others]}) == 5

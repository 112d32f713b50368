"""Columns of Parquet files, and what is said when they can't be used."""

from __future__ import annotations

import decimal
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.data.parquet import Parquet

ROWS = 40
COLUMNS = {
    "x": pa.array(np.linspace(0, 1, ROWS)),
    "text": pa.array([f"row {row}" for row in range(ROWS)]),
    "label": pa.array([row % 3 for row in range(ROWS)]),
}


def saved(path: Path, columns=COLUMNS, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def source(path: Path, columns=COLUMNS, **knobs) -> Parquet:
    return Parquet(path=str(saved(path, columns)), **knobs)


def test_reads_all_columns_but_the_labels_in_the_order_of_the_file(tmp_path):
    table = source(tmp_path / "rows.parquet").load()
    assert list(table.inputs) == ["x", "text"]
    np.testing.assert_array_equal(table.inputs["x"], np.linspace(0, 1, ROWS))
    assert table.inputs["text"].tolist() == [f"row {row}" for row in range(ROWS)]
    assert (table.inputs["text"].dtype, table.inputs["text"].shape) == (object, (ROWS,))
    np.testing.assert_array_equal(table.targets, np.arange(ROWS) % 3)
    assert (table.targets.dtype, table.parts, table.in_order, table.notes) == (np.int64, None, False, ())


def test_reads_the_columns_that_the_config_names(tmp_path):
    table = source(tmp_path / "rows.parquet", inputs=("label", "x"), targets=None).load()
    assert list(table.inputs) == ["label", "x"]
    assert table.targets is None


def test_reads_rows_up_to_the_limit_of_each_file(tmp_path):
    saved(tmp_path / "rows" / "a.parquet", row_group_size=7)
    saved(tmp_path / "rows" / "b.parquet")
    table = Parquet(path=str(tmp_path / "rows"), limit=10).load()
    assert table.inputs["text"].tolist() == [f"row {row}" for row in range(10)] * 2


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pa.array([True, False]), np.array([1, 0], np.uint8)),
        (pa.array([1.5, 2.5], pa.float16()), np.array([1.5, 2.5], np.float16)),
        (pa.array([decimal.Decimal("1.50"), decimal.Decimal("-2.25")]), np.array([1.5, -2.25])),
        (pa.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]])),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)), np.array([[1, 2], [3, 4]], np.int32)),
        (
            pa.array([[[1], [2]], [[3], [4]]], pa.large_list(pa.list_(pa.float32()))),
            np.float32([[[1], [2]], [[3], [4]]]),
        ),
        (pa.array(["b", "a"]).dictionary_encode(), np.array(["b", "a"], object)),
        (pa.array(["b", "a"], pa.large_string()), np.array(["b", "a"], object)),
        (pa.array([b"\x00", b""]), np.array([b"\x00", b""], object)),
        (pa.array([b"ab", b"cd"], pa.binary(2)), np.array([b"ab", b"cd"], object)),
        (pa.array([{"bytes": b"1", "path": None}, {"bytes": b"2", "path": "b"}]), np.array([b"1", b"2"], object)),
    ],
    ids=["bool", "half", "decimal", "list", "fixed", "nested", "category", "text", "bytes", "fixed bytes", "image"],
)
def test_turns_each_kind_of_column_into_an_array(tmp_path, column, wanted):
    columns = {"x": column, "label": [0, 1]}
    array = source(tmp_path / "rows.parquet", columns).load().inputs["x"]
    np.testing.assert_array_equal(array, wanted)
    assert array.dtype == wanted.dtype


def test_a_column_of_tensors_keeps_their_shape(tmp_path):
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    columns = {"x": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "label": [0, 1]}
    np.testing.assert_array_equal(source(tmp_path / "rows.parquet", columns).load().inputs["x"], images)


@pytest.mark.parametrize("category", [False, True])
def test_labels_that_are_texts_are_numbered_in_their_order_and_told(tmp_path, category):
    labels = pa.array(["dog", "ant", "dog", "cat"])
    columns = {"x": [1, 2, 3, 4], "kind": labels.dictionary_encode() if category else labels}
    table = source(tmp_path / "rows.parquet", columns, targets="kind").load()
    assert table.targets.tolist() == [2, 0, 2, 1]
    assert table.targets.dtype == np.int64
    assert table.notes == ("The texts of kind are labels now, in their order: 0 ant, 1 cat, 2 dog.",)


def test_several_targets_are_side_by_side(tmp_path):
    columns = {"x": [1, 2], "low": [0.5, 1.5], "high": [2.0, 3.0]}
    table = source(tmp_path / "rows.parquet", columns, targets=("high", "low")).load()
    np.testing.assert_array_equal(table.targets, [[2, 0.5], [3, 1.5]])
    assert list(table.inputs) == ["x"]


def test_the_index_that_pandas_wrote_is_no_input(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": [1.0, 2, 3, 4], "label": [0, 1, 0, 1]})
    frame[frame.x != 2].to_parquet(tmp_path / "rows.parquet")
    assert "__index_level_0__" in pq.read_schema(tmp_path / "rows.parquet").names
    assert list(Parquet(path=str(tmp_path / "rows.parquet")).load().inputs) == ["x"]


def with_nulls(*rows: int) -> dict[str, pa.Array]:
    labels = [None if row in rows else row % 3 for row in range(ROWS)]
    return COLUMNS | {"label": pa.array(labels, pa.int64())}


def test_a_null_label_is_one_error_with_its_file_number_and_rows(tmp_path):
    rows = source(tmp_path / "rows.parquet", with_nulls(17, 20, 31, 39))
    for read in (rows.load, rows.fingerprint):
        with pytest.raises(ConfigError) as caught:
            read()
        (problem,) = caught.value.problems
        assert re.match(
            r"data\.targets=label has 4 nulls in .*rows\.parquet, the first in rows 17, 20, 31: .*data\.nulls=drop",
            problem,
        )


def test_rows_with_a_null_are_dropped_on_request_and_told(tmp_path):
    table = source(tmp_path / "rows.parquet", with_nulls(17), nulls="drop").load()
    assert len(table.targets) == len(table.inputs["text"]) == ROWS - 1
    assert "row 17" not in table.inputs["text"]
    (note,) = table.notes
    assert re.match(r"1 of 40 rows of .*rows\.parquet have a null in label and were left out\.", note)


def test_nulls_of_inputs_and_those_within_lists_count_too(tmp_path):
    columns = {"a": [1.0, None, float("nan"), 4], "b": [[1, 2], [3, 4], [5, 6], [7, None]], "label": [0, 1, 0, 1]}
    with pytest.raises(ConfigError) as caught:
        source(tmp_path / "rows.parquet", columns).load()
    assert [problem.partition(" in ")[0] for problem in caught.value.problems] == [
        "data.inputs=a has 2 nulls",
        "data.inputs=b has 1 null",
    ]
    table = source(tmp_path / "rows.parquet", columns, nulls="drop").load()
    np.testing.assert_array_equal(table.inputs["b"], [[1, 2]])
    assert table.targets.tolist() == [0]


def test_a_file_of_many_row_groups_equals_one_with_a_single(tmp_path):
    one = Parquet(path=str(saved(tmp_path / "one.parquet")))
    many = Parquet(path=str(saved(tmp_path / "many.parquet", row_group_size=3, compression="gzip")))
    assert pq.ParquetFile(tmp_path / "many.parquet").num_row_groups == 14
    assert one.fingerprint() == many.fingerprint()
    for name, values in one.load().inputs.items():
        np.testing.assert_array_equal(many.load().inputs[name], values)
    np.testing.assert_array_equal(one.load().targets, many.load().targets)


@settings(max_examples=15, deadline=None)
@given(groups=st.integers(1, 2500), texts=st.booleans())
def test_the_fingerprint_knows_no_pieces(tmp_path_factory, groups, texts):
    """With more rows than are read at once."""
    folder = tmp_path_factory.mktemp("rows")
    values = [f"{row}" * (row % 5) for row in range(2500)] if texts else np.arange(5000.0).reshape(2500, 2).tolist()
    columns = {"x": values, "label": np.arange(2500) % 2}
    whole = Parquet(path=str(saved(folder / "one.parquet", columns))).fingerprint()
    assert Parquet(path=str(saved(folder / "two.parquet", columns, row_group_size=groups))).fingerprint() == whole


def test_the_fingerprint_is_of_the_columns_that_are_read(tmp_path):
    knobs = {"inputs": ("x",)}
    one = source(tmp_path / "one.parquet", **knobs)
    other = source(tmp_path / "elsewhere" / "two.parquet", COLUMNS | {"text": COLUMNS["label"]}, **knobs)
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    ("columns", "knobs"),
    [
        (COLUMNS | {"x": pa.array(np.linspace(0, 1 + 1e-9, ROWS))}, {}),
        (COLUMNS | {"label": pa.array([0] * ROWS)}, {}),
        (COLUMNS | {"text": pa.array([f"row {row} " for row in range(ROWS)])}, {}),
        (COLUMNS, {"inputs": ("text", "x")}),
        (COLUMNS, {"targets": None}),
        (COLUMNS, {"limit": ROWS - 1}),
    ],
    ids=["a value", "a label", "a text", "the order", "the target", "the limit"],
)
def test_other_rows_have_another_fingerprint(tmp_path, columns, knobs):
    one = source(tmp_path / "one.parquet").fingerprint()
    assert source(tmp_path / "two.parquet", columns, **knobs).fingerprint() != one


def test_texts_that_run_into_one_another_are_told_apart(tmp_path):
    one = source(tmp_path / "one.parquet", {"x": ["ab", "c"], "label": [0, 1]})
    other = source(tmp_path / "two.parquet", {"x": ["a", "bc"], "label": [0, 1]})
    assert one.fingerprint() != other.fingerprint()


def part(first: int, count: int) -> dict[str, pa.Array]:
    return {name: values.slice(first, count) for name, values in COLUMNS.items()}


def test_files_of_each_split_give_parts(tmp_path):
    files = {
        "train": saved(tmp_path / "a.parquet", part(0, 20)),
        "validate": saved(tmp_path / "b.parquet", part(20, 8)),
        "test": saved(tmp_path / "c.parquet", part(28, 12)),
    }
    table = Parquet(**{split: str(file) for split, file in files.items()}).load()
    assert table.parts.tolist() == ["train"] * 20 + ["validate"] * 8 + ["test"] * 12
    assert table.inputs["text"].tolist() == [f"row {row}" for row in range(ROWS)]


def test_splits_that_name_the_same_file_share_its_rows(tmp_path):
    train, rest = saved(tmp_path / "a.parquet", part(0, 20)), saved(tmp_path / "b.parquet", part(20, 20))
    again = str(tmp_path / "." / "b.parquet")
    table = Parquet(train=str(train), validate=str(rest), test=again).load()
    assert table.parts.tolist() == ["train"] * 20 + ["validate+test"] * 20
    assert table.notes == ()


def test_a_split_without_files_shares_those_of_the_one_before_it_and_it_is_told(tmp_path):
    train, test = saved(tmp_path / "a.parquet", part(0, 20)), saved(tmp_path / "b.parquet", part(20, 20))
    table = Parquet(train=str(train), test=str(test)).load()
    assert table.parts.tolist() == ["train+validate"] * 20 + ["test"] * 20
    assert table.notes == ("There are no rows for validate alone: those for train are divided by data.split.",)


def test_the_split_is_part_of_the_fingerprint(tmp_path):
    one, two = str(saved(tmp_path / "a.parquet", part(0, 20))), str(saved(tmp_path / "b.parquet", part(20, 20)))
    assert Parquet(train=one, test=two).fingerprint() != Parquet(train=two, test=one).fingerprint()
    assert Parquet(train=one, test=two).fingerprint() != Parquet(train=one, validate=two).fingerprint()


def test_a_pattern_names_the_files_of_a_split(tmp_path):
    for shard in range(2):
        saved(tmp_path / "data" / f"train-{shard}.parquet", part(shard * 10, 10))
    saved(tmp_path / "data" / "test-0.parquet", part(20, 5))
    table = Parquet(train=f"{tmp_path}/data/train-*.parquet", test=f"{tmp_path}/data/test-*.parquet").load()
    assert table.inputs["text"].tolist() == [f"row {row}" for row in range(25)]


def test_refuses_a_file_that_two_splits_read(tmp_path):
    saved(tmp_path / "data" / "a.parquet")
    test = saved(tmp_path / "data" / "b.parquet")
    with pytest.raises(ConfigError, match=r"^data\.train and data\.test both read b\.parquet: "):
        Parquet(train=str(tmp_path / "data"), test=str(test)).load()


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({}, r"data\.path is missing: .*data\.train"),
        ({"path": "a.parquet", "train": "b.parquet"}, r"data\.path=a\.parquet and data\.train=b\.parquet exclude"),
        ({"test": "b.parquet"}, r"data\.train is missing beside data\.test"),
        ({"path": "nowhere.parquet"}, r"data\.path=nowhere\.parquet does not exist$"),
        ({"train": "no-*.parquet"}, r"data\.train=no-\*\.parquet matches no file$"),
        ({"path": "empty"}, r"data\.path=empty is a folder without \.parquet files$"),
        ({"path": "rows.csv"}, r"data\.path: rows\.csv is not a readable Parquet file: "),
    ],
)
def test_refuses_what_names_no_rows(tmp_path, knobs, problem):
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("x,label\n1,2\n")
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        Parquet(**knobs).load()


@pytest.mark.parametrize("damage", [slice(4, 40), slice(500, 600)], ids=["a header", "a page with a checksum"])
def test_refuses_a_damaged_file(tmp_path, damage):
    values = np.random.default_rng(0).normal(size=1000)
    rows = saved(tmp_path / "rows.parquet", {"x": values, "label": [0] * 1000}, write_page_checksum=True)
    content = bytearray(rows.read_bytes())
    content[damage] = bytes(damage.stop - damage.start)
    rows.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^data\.path: .*rows\.parquet is not a readable Parquet file: "):
        Parquet(path=str(rows)).load()


@pytest.mark.parametrize(
    ("columns", "knobs", "problem"),
    [
        (
            {},
            {"targets": "lable"},
            r"data\.targets=lable is no column of .*, did you mean 'label'\?; it has x, text, label",
        ),
        ({}, {"inputs": ("y",)}, r"data\.inputs=y is no column of .*; it has x, text, label$"),
        ({}, {"inputs": ()}, r"data\.inputs=\[\] leaves no column"),
        (
            {},
            {"inputs": ("x", "label")},
            r"data\.inputs and data\.targets must name different columns, got label twice",
        ),
        ({}, {"targets": ("x", "text")}, r"data\.targets=text holds texts in .*; targets are numbers"),
        ({"x": [b"a"] * ROWS}, {"targets": "x"}, r"data\.targets=x holds bytes in .*; targets are numbers"),
        ({"x": [[1.0, 2]] * ROWS}, {"targets": ("x", "label")}, r"data\.targets=x holds lists in .*; of several"),
        (
            {"x": pa.array([0] * ROWS, pa.timestamp("ms"))},
            {},
            r"data\.inputs=x holds timestamp\[ms\] in .* no number, .*; columns that can be read: text, label$",
        ),
        ({"x": [["a", "b"]] * ROWS}, {}, r"data\.inputs=x holds list<.*> in .*, which is no number"),
        ({"x": [[1]] * 30 + [[1, 2, 3]] * 10}, {}, r"data\.inputs=x has lists of 1 to 3 values in .*: .* of one shape"),
        ({"x": [float("inf")] * ROWS}, {}, r"data\.inputs=x has 40 values that are infinite or beyond float32 in "),
        ({"x": [-1e39] * ROWS}, {}, r"data\.inputs=x has 40 values that are infinite or beyond float32 in "),
        ({"x": [None] * ROWS}, {"nulls": "drop"}, r"data\.path: no rows are left to read in "),
    ],
)
def test_refuses_columns_that_no_model_can_take(tmp_path, columns, knobs, problem):
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        source(tmp_path / "rows.parquet", COLUMNS | columns, **knobs).load()


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        (pa.array(range(ROWS)), r"data\.inputs=x has float64 in .*a\.parquet and int64 in .*b\.parquet"),
        (COLUMNS["text"], r"data\.inputs=x holds numbers in .*a\.parquet and texts in .*b\.parquet"),
        (pa.array([[1.0]] * ROWS), r"data\.inputs=x has rows of shape \(\) in .*a\.parquet and \(1,\) in .*b\.parquet"),
    ],
    ids=["dtype", "kind", "shape"],
)
def test_refuses_files_that_are_not_alike(tmp_path, column, problem):
    saved(tmp_path / "rows" / "a.parquet")
    saved(tmp_path / "rows" / "b.parquet", COLUMNS | {"x": column})
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        Parquet(path=str(tmp_path / "rows")).load()


def test_refuses_texts_that_are_no_utf_8(tmp_path):
    torn = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.int32([0, 2])), pa.py_buffer(b"\xff\xfe")])
    rows = source(tmp_path / "rows.parquet", {"x": torn, "label": [0]})
    with pytest.raises(ConfigError, match=r"^data\.path: .*rows\.parquet is not a readable Parquet file: "):
        rows.load()


def test_is_a_value():
    assert hash(Parquet(path="a", inputs=("x",))) == hash(Parquet(path="a", inputs=("x",)))

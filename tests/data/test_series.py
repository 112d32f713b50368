"""Windows of a time series, and that none sees the future."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.data.series import Series

STEPS = 20


def csv(path: Path, steps: int = STEPS, **columns) -> str:
    """A file whose `time` is the number of the step, `load` ten times that and `heat` its negative."""
    numbers = np.arange(steps)
    dates = [f"2024-01-{1 + number // 24:02} {number % 24:02}:00:00" for number in numbers]
    held = {"date": dates, "time": numbers, "load": numbers * 10.0, "heat": -numbers} | columns
    lines = [",".join(held), *(",".join(str(value) for value in row) for row in zip(*held.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def plain(path: str, **knobs) -> Series:
    usual = {"targets": ("load",), "length": 3, "horizon": 2, "scale_targets": False}
    return Series(path=path, **(usual | {"evaluation_stride": knobs.get("stride", 1)} | knobs))


def test_a_window_is_the_steps_before_and_those_after(tmp_path):
    table = plain(csv(tmp_path / "rows.csv"), inputs=("time", "heat")).load()
    inputs = table.inputs["input"]
    np.testing.assert_array_equal(inputs[0], [[0, 1, 2], [0, -1, -2]])
    np.testing.assert_array_equal(table.targets[0], [30, 40])
    np.testing.assert_array_equal(inputs[1], [[1, 2, 3], [-1, -2, -3]])
    np.testing.assert_array_equal(table.targets[1], [40, 50])
    assert (inputs.dtype, table.targets.dtype, table.in_order) == (np.float32, np.float32, True)


def test_several_targets_come_step_by_step(tmp_path):
    table = plain(csv(tmp_path / "rows.csv"), targets=("load", "time")).load()
    np.testing.assert_array_equal(table.targets[0], [30, 3, 40, 4])


def test_all_columns_of_numbers_are_the_channels_where_none_are_named(tmp_path):
    assert plain(csv(tmp_path / "rows.csv")).load().inputs["input"][0].tolist() == [[0, 1, 2], [0, 10, 20], [0, -1, -2]]


def test_splits_take_their_steps_in_order(tmp_path):
    """Of 20 steps 12, 4 and 4: targets begin at 3..10, 12..14 and 16..18."""
    table = plain(csv(tmp_path / "rows.csv")).load()
    assert table.parts.tolist() == ["train"] * 8 + ["validate"] * 3 + ["test"] * 3
    assert (table.targets[:, 0] / 10).tolist() == [*range(3, 11), *range(12, 15), *range(16, 19)]
    assert table.notes == ("Windows to train: 8, validate: 3, test: 3; 20 of 20 steps are in use.",)


def test_the_protocol_of_the_ett_benchmarks_gives_their_windows(tmp_path):
    """12, 4 and 4 months of hours, of which the benchmarks' loaders make 8449, 2785 and 2785 windows for 96 hours."""
    numbers = np.arange(17_420)
    path = tmp_path / "hours.parquet"
    pq.write_table(pa.table({"OT": numbers * 0.5}), path)
    rows = plain(str(path), targets=("OT",), length=96, horizon=96, steps=(8640, 2880, 2880))
    table = rows.load()
    parts, counts = np.unique(table.parts, return_counts=True)
    assert dict(zip(parts.tolist(), counts.tolist(), strict=True)) == {"train": 8449, "validate": 2785, "test": 2785}
    validate = table.parts == "validate"
    assert table.inputs["input"][validate][0, 0, 0] == (8640 - 96) * 0.5
    assert table.targets[validate][0, 0] == 8640 * 0.5
    assert "14400 of 17420 steps" in table.notes[-1]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(45, 80),
    length=st.integers(1, 12),
    horizon=st.integers(1, 5),
    stride=st.integers(1, 4),
    train=st.floats(0.4, 0.6),
)
def test_no_target_of_a_split_was_seen_by_an_earlier_one(tmp_path_factory, steps, length, horizon, stride, train):
    path = csv(tmp_path_factory.mktemp("rows") / "rows.csv", steps)
    knobs = {"length": length, "horizon": horizon, "stride": stride, "train_share": train}
    table = plain(path, inputs=("time",), targets=("time",), **knobs).load()
    latest = -1.0
    for split in ("train", "validate", "test"):
        rows = table.parts == split
        assert rows.any()
        inputs, targets = table.inputs["input"][rows], table.targets[rows]
        assert targets.min() > latest
        assert (inputs.max(axis=(1, 2)) == targets[:, 0] - 1).all()
        latest = max(inputs.max(), targets.max())
    assert (np.diff(table.targets[:, 0]) > 0).all()


def test_windows_to_judge_by_share_no_target_unless_they_are_told_to(tmp_path):
    table = plain(csv(tmp_path / "rows.csv"), evaluation_stride=None).load()
    judged = table.targets[table.parts != "train"]
    assert len(judged) == len(np.unique(judged[:, 0])) == 4
    assert len(np.unique(judged)) == judged.size


def test_windows_are_a_stride_apart(tmp_path):
    table = plain(csv(tmp_path / "rows.csv"), stride=3).load()
    assert (table.targets[:, 0] / 10).tolist() == [3, 6, 9, 12, 16]


def test_targets_are_scaled_by_the_steps_to_train_on_and_it_is_told(tmp_path):
    path = csv(tmp_path / "rows.csv")
    raw, scaled = plain(path).load(), plain(path, scale_targets=True).load()
    train = np.arange(12) * 10.0
    np.testing.assert_allclose(scaled.targets, (raw.targets - train.mean()) / train.std(), rtol=1e-6)
    np.testing.assert_array_equal(scaled.inputs["input"], raw.inputs["input"])
    assert scaled.notes[0].endswith("of the steps to train on: load = output * 34.5205 + 55.")


def test_a_later_step_changes_nothing_that_is_trained_on(tmp_path):
    one = plain(csv(tmp_path / "one.csv"), scale_targets=True).load()
    load = np.arange(STEPS) * 10.0
    load[12:] = 1e6
    other = plain(csv(tmp_path / "two.csv", load=load), scale_targets=True).load()
    train = one.parts == "train"
    np.testing.assert_array_equal(one.targets[train], other.targets[train])
    np.testing.assert_array_equal(one.inputs["input"][train], other.inputs["input"][train])


def test_csv_and_parquet_give_the_same_windows(tmp_path):
    numbers = np.arange(STEPS)
    pq.write_table(pa.table({"time": numbers, "load": numbers * 10.0, "heat": -numbers}), tmp_path / "rows.parquet")
    one, other = plain(csv(tmp_path / "rows.csv")), plain(str(tmp_path / "rows.parquet"))
    np.testing.assert_array_equal(one.load().inputs["input"], other.load().inputs["input"])
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    "knobs",
    [{"length": 4}, {"horizon": 1}, {"stride": 2}, {"train_share": 0.5}, {"targets": ("heat",)}, {"steps": (12, 4, 3)}],
)
def test_other_windows_have_another_fingerprint(tmp_path, knobs):
    path = csv(tmp_path / "rows.csv")
    assert plain(path).fingerprint() != plain(path, **knobs).fingerprint()


@pytest.mark.parametrize(
    ("columns", "knobs", "problem"),
    [
        ({}, {"path": "nowhere.csv"}, r"data\.path=nowhere\.csv does not exist$"),
        ({}, {"path": "torn.csv"}, r"data\.path: torn\.csv is not a readable CSV file: "),
        (
            {},
            {"targets": ("laod",)},
            r"data\.targets=laod is no column of rows\.csv, did you mean 'load'\?; it has date, ",
        ),
        ({}, {"inputs": ("date",)}, r"data\.inputs=date holds timestamp\[s\] in rows\.csv, not numbers"),
        ({}, {"targets": ()}, r"data\.targets must name at least one column to forecast"),
        (
            {},
            {"inputs": ("time", "time")},
            r"data\.inputs and data\.targets must name different columns, got time twice",
        ),
        ({}, {"steps": (12, 8, 4)}, r"data\.steps add up to 24, but rows\.csv has 20 steps"),
        ({}, {"steps": (12, 0, 4)}, r"data\.steps must be three numbers of at least 1"),
        (
            {},
            {"train_share": 0.8},
            r"data\.train_share and data\.validate_share must leave steps to test on, got 0\.8 and 0\.2",
        ),
        ({}, {"horizon": 5}, r"data\.horizon=5 leaves no window to validate in steps 12 to 16 of rows\.csv"),
        (
            {},
            {"length": 11},
            r"data\.length=11 and data\.horizon=2 leave no window to train in steps 0 to 12 of rows\.csv",
        ),
        ({"load": [1.0] * 12 + [2.0] * 8}, {"scale_targets": True}, r"data\.targets=load is constant in the 12 steps"),
        ({"load": ["", *range(19)]}, {}, r"data\.inputs=load has 1 null in rows\.csv, the first in row 0: "),
        ({"load": ["inf", *range(19)]}, {}, r"data\.inputs=load has 1 values that are infinite"),
        (
            {"date": [f"2024-01-{30 - day:02}" for day in range(20)]},
            {},
            r"data\.path=rows\.csv: date goes back in row 1 .* oldest",
        ),
    ],
)
def test_refuses_what_can_not_be_forecast(tmp_path, columns, knobs, problem):
    csv(tmp_path / "rows.csv", **columns)
    (tmp_path / "torn.csv").write_text("a,b\n1,2\n1\n")
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        plain(**({"path": "rows.csv"} | knobs)).load()

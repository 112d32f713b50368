"""Splits, statistics and what is left on disk."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Table
from hasten.data import prepare

SHARES = {"train": 0.5, "validate": 0.25, "test": 0.25}


def table_of(*counts: int) -> Table:
    """So many rows of label 0, 1, ..., mixed, each input unlike all others."""
    targets = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    inputs = np.arange(len(targets) * 2, dtype=np.float32).reshape(-1, 2) ** 1.5
    return Table(inputs=inputs, targets=targets)


@given(
    counts=st.lists(st.integers(3, 40), min_size=2, max_size=6),
    weights=st.tuples(*[st.floats(0.05, 1)] * 3),
    total=st.floats(0.3, 1),
    seed=st.integers(0, 2**32),
)
def test_splits_are_disjoint_and_hold_each_label_in_its_share(counts, weights, total, seed):
    shares = {name: total * weight / sum(weights) for name, weight in zip(SHARES, weights, strict=True)}
    table = table_of(*counts)
    parts = prepare.split(table, shares, seed)
    rows = np.concatenate(list(parts.values()))
    assert len(rows) == len(set(rows.tolist())) <= len(table.targets)
    for label, count in enumerate(counts):
        for name, places in parts.items():
            assert np.array_equal(places, np.sort(places))
            number = np.count_nonzero(table.targets[places] == label)
            assert number >= 1
            # Whole rows, and one more or less where another split needed its one row.
            assert abs(number - count * shares[name]) < 3


def test_whole_shares_are_met_exactly():
    parts = prepare.split(table_of(40, 20), SHARES, seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 30, "validate": 15, "test": 15}
    assert np.bincount(table_of(40, 20).targets[parts["test"]]).tolist() == [10, 5]


def test_leaves_out_what_the_shares_leave_over():
    parts = prepare.split(table_of(100, 100), {"train": 0.1, "validate": 0.1, "test": 0.1}, seed=0)
    assert sum(map(len, parts.values())) == 60


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_seed_alone_decides_which_rows_go_where(one, other):
    assume(one != other)
    table = table_of(60, 60)
    first, again, second = (prepare.split(table, SHARES, seed)["train"] for seed in (one, one, other))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("share", [0.0, -0.1, float("nan")])
def test_refuses_a_share_that_is_not_above_zero(share):
    with pytest.raises(ConfigError, match=rf"^data\.split\.test must be above 0, got {share}$"):
        prepare.split(table_of(9, 9), SHARES | {"test": share}, seed=0)


def test_refuses_shares_beyond_one():
    with pytest.raises(ConfigError, match=r"^data\.split must add up to at most 1, got 1\.25"):
        prepare.split(table_of(9, 9), SHARES | {"train": 0.75}, seed=0)


def test_accepts_shares_that_miss_one_by_rounding():
    prepare.split(table_of(9, 9), {"train": 0.7, "validate": 0.2, "test": 0.1 + 1e-12}, seed=0)


def test_refuses_a_label_with_fewer_rows_than_splits():
    with pytest.raises(ConfigError, match=r"^data\.split .* train, validate, test, but label 1 has 2 of 14 rows"):
        prepare.split(table_of(12, 2), SHARES, seed=0)


def test_refuses_a_single_label():
    with pytest.raises(ConfigError, match=r"^data\.targets must hold at least 2 different labels, got \[0\]"):
        prepare.split(table_of(12), SHARES, seed=0)


def test_statistics_are_per_channel_of_images_and_per_feature_of_rows():
    images = np.array([[[[1, 3]], [[10, 10]]], [[[5, 7]], [[30, 30]]]])
    mean, std = prepare.statistics(images)
    np.testing.assert_allclose(mean, [4, 20])
    np.testing.assert_allclose(std, [np.sqrt(5), 10])
    mean, std = prepare.statistics(np.array([[1.0, 10], [3, 30]]))
    np.testing.assert_allclose(mean, [2, 20])
    np.testing.assert_allclose(std, [1, 10])


def test_a_constant_feature_is_centred_and_not_blown_up():
    inputs = np.array([[0.1, 1e-9], [0.1, 3e-9], [0.1, 5e-9]], dtype=np.float32)
    normal = prepare.normalise(inputs, *prepare.statistics(inputs))
    assert abs(normal[:, 0]).max() < 1e-6
    np.testing.assert_allclose(normal[:, 1].std(), 1, rtol=1e-5)


def test_normalised_training_rows_have_mean_zero_and_deviation_one():
    inputs = np.random.default_rng(0).normal(7, 3, size=(50, 2, 4, 5))
    normal = prepare.normalise(inputs, *prepare.statistics(inputs))
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(normal.std((0, 2, 3)), 1, rtol=1e-6)


def written(folder, **changes):
    folder.mkdir()
    knobs = {"shares": SHARES, "seed": 0, "normalize": True, "source": "abc"} | changes
    return prepare.write(folder, table_of(20, 20), **knobs)


def test_rows_come_back_normalised_by_the_training_rows_alone(tmp_path):
    table, prepared = table_of(20, 20), written(tmp_path / "data")
    places = prepare.split(table, SHARES, seed=0)
    mean, std = table.inputs[places["train"]].mean(0), table.inputs[places["train"]].std(0)
    rows = prepare.read(tmp_path / "data").rows("test")
    np.testing.assert_allclose(rows.inputs, (table.inputs[places["test"]] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows.targets, table.targets[places["test"]])
    assert (rows.inputs.dtype, rows.targets.dtype, len(rows)) == (np.float32, np.int64, 10)
    np.testing.assert_allclose(prepared.mean, mean, rtol=1e-5)


def test_says_what_the_rows_are(tmp_path):
    prepared = written(tmp_path / "data")
    assert prepare.read(tmp_path / "data") == prepared
    assert (prepared.input_shape, prepared.num_classes, prepared.fingerprint) == ((2,), 2, "abc")
    assert prepared.class_counts == {"train": (10, 10), "validate": (5, 5), "test": (5, 5)}


def test_without_normalisation_rows_stay_as_they_are(tmp_path):
    prepared = written(tmp_path / "data", normalize=False)
    raw = table_of(20, 20).inputs[prepare.split(table_of(20, 20), SHARES, seed=0)["train"]]
    np.testing.assert_array_equal(prepared.rows("train").inputs, raw)
    assert (prepared.mean, prepared.std) == ((0, 0), (1, 1))


def test_the_same_request_writes_the_same_bytes(tmp_path):
    written(tmp_path / "one")
    written(tmp_path / "two")
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == ["data.json", "test.safetensors", "train.safetensors", "validate.safetensors"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_test_fingerprint_follows_the_test_rows_alone(tmp_path):
    one, two = written(tmp_path / "one"), written(tmp_path / "two", normalize=False)
    assert one.test == two.test
    assert one.test != written(tmp_path / "three", seed=1).test


def test_refuses_a_split_that_is_not_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.split must name train, validate, test, got train, test"):
        written(tmp_path / "data", shares={"train": 0.5, "test": 0.5})

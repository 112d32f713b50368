"""From a table to splits on disk: which rows go where, what the model is given, and what is kept of how."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hasten.artefacts.rows import apply, as_inputs
from hasten.core.construct import construct
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Input, Signature, Table, Transform
from hasten.data import prepare
from hasten.data.transforms import Standardize
from hasten.tasks.classification import Classification
from hasten.tasks.regression import Regression
from hasten.tasks.unlabelled import Unlabelled

SHARES = {"train": 0.5, "validate": 0.25, "test": 0.25}


def labels_of(*counts: int) -> np.ndarray:
    """So many rows of label 0, 1, ..., mixed."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))


def table_of(*counts: int) -> Table:
    """Rows with these labels, each input unlike all others."""
    targets = labels_of(*counts)
    inputs = np.arange(len(targets) * 2, dtype=np.float32).reshape(-1, 2) ** 1.5
    return Table(inputs={"input": inputs}, targets=targets)


@given(
    counts=st.lists(st.integers(3, 40), min_size=2, max_size=6),
    weights=st.tuples(*[st.floats(0.05, 1)] * 3),
    total=st.floats(0.3, 1),
    seed=st.integers(0, 2**32),
)
def test_splits_are_disjoint_and_hold_each_label_in_its_share(counts, weights, total, seed):
    shares = {name: total * weight / sum(weights) for name, weight in zip(SHARES, weights, strict=True)}
    labels = labels_of(*counts)
    parts = prepare.split(len(labels), shares, seed, labels=labels)
    rows = np.concatenate(list(parts.values()))
    assert len(rows) == len(set(rows.tolist())) <= len(labels)
    for label, count in enumerate(counts):
        for name, places in parts.items():
            assert np.array_equal(places, np.sort(places))
            number = np.count_nonzero(labels[places] == label)
            assert number >= 1
            # Whole rows, and one more or less where another split needed its one row.
            assert abs(number - count * shares[name]) < 3


def test_whole_shares_are_met_exactly():
    labels = labels_of(40, 20)
    parts = prepare.split(60, SHARES, seed=0, labels=labels)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 30, "validate": 15, "test": 15}
    assert np.bincount(labels[parts["test"]]).tolist() == [10, 5]


@given(st.integers(3, 200), st.integers(0, 2**32))
def test_without_labels_all_rows_are_divided_at_once(num_rows, seed):
    parts = prepare.split(num_rows, SHARES, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(num_rows))
    assert abs(len(parts["train"]) - num_rows / 2) <= 1


@given(st.integers(8, 60), st.integers(0, 5))
def test_a_time_series_is_cut_in_its_order_whatever_seed_and_labels(num_rows, seed):
    parts = prepare.split(num_rows, SHARES, seed, labels=np.arange(num_rows) % 2, in_order=True)
    assert np.concatenate(list(parts.values())).tolist() == list(range(num_rows))


def test_what_a_share_leaves_over_of_a_time_series_is_its_end():
    parts = prepare.split(100, {"train": 0.5, "validate": 0.2, "test": 0.1}, seed=0, in_order=True)
    assert [rows[[0, -1]].tolist() for rows in parts.values()] == [[0, 49], [50, 69], [70, 79]]


def test_rows_that_a_part_names_stay_in_their_split_whatever_the_shares():
    parts = np.array(["test"] * 5 + ["train"] * 3 + ["validate"] * 2)
    places = prepare.split(10, SHARES, seed=3, labels=np.arange(10) % 2, parts=parts)
    assert {name: rows.tolist() for name, rows in places.items()} == {
        "train": [5, 6, 7],
        "validate": [8, 9],
        "test": [0, 1, 2, 3, 4],
    }


def test_a_part_of_two_splits_is_divided_in_their_proportion_label_by_label():
    parts = np.repeat(["train", "validate+test"], [10, 40])
    labels = np.arange(50) % 2
    shares = {"train": 0.6, "validate": 0.3, "test": 0.1}
    places = prepare.split(50, shares, seed=0, labels=labels, parts=parts)
    assert places["train"].tolist() == list(range(10))
    assert {name: np.bincount(labels[places[name]]).tolist() for name in ("validate", "test")} == {
        "validate": [15, 15],
        "test": [5, 5],
    }


def test_parts_of_a_time_series_are_each_cut_in_their_order():
    parts = np.repeat(["validate+test", "train"], [20, 10])
    places = prepare.split(30, SHARES, seed=1, parts=parts, in_order=True)
    assert {name: rows[[0, -1]].tolist() for name, rows in places.items()} == {
        "train": [20, 29],
        "validate": [0, 9],
        "test": [10, 19],
    }


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (["train"] * 4 + ["validate"] * 4, r"^data gives no rows for test: "),
        (["train"] * 4 + ["holdout"] * 4, r"^data: holdout is no split; there are train, validate, test$"),
        (["train"] * 7 + ["validate+test"], r"needs a row in each of validate, test, but there are only 1: add rows$"),
    ],
)
def test_refuses_parts_that_leave_a_split_empty_or_name_none(parts, problem):
    with pytest.raises(ConfigError, match=problem):
        prepare.split(8, SHARES, seed=0, parts=np.array(parts))


def test_leaves_out_what_the_shares_leave_over():
    parts = prepare.split(200, {"train": 0.1, "validate": 0.1, "test": 0.1}, seed=0, labels=labels_of(100, 100))
    assert sum(map(len, parts.values())) == 60


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_seed_alone_decides_which_rows_go_where(one, other):
    assume(one != other)
    labels = labels_of(60, 60)
    first, again, second = (prepare.split(120, SHARES, seed, labels=labels)["train"] for seed in (one, one, other))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("share", [0.0, -0.1, float("nan")])
def test_refuses_a_share_that_is_not_above_zero(share):
    with pytest.raises(ConfigError, match=rf"^data\.split\.test must be above 0, got {share}$"):
        prepare.split(18, SHARES | {"test": share}, seed=0)


def test_refuses_shares_beyond_one():
    with pytest.raises(ConfigError, match=r"^data\.split must add up to at most 1, got 1\.25"):
        prepare.split(18, SHARES | {"train": 0.75}, seed=0)


def test_accepts_shares_that_miss_one_by_rounding():
    prepare.split(18, {"train": 0.7, "validate": 0.2, "test": 0.1 + 1e-12}, seed=0)


def test_refuses_a_label_with_fewer_rows_than_splits():
    with pytest.raises(ConfigError, match=r"^data\.split .* train, validate, test, but label 1 has 2 of 14 rows"):
        prepare.split(14, SHARES, seed=0, labels=labels_of(12, 2))


def test_refuses_fewer_rows_than_splits():
    with pytest.raises(ConfigError, match=r"^data\.split needs a row in each of train, validate, test, .*only 2"):
        prepare.split(2, SHARES, seed=0)


def written(folder, table=None, **changes):
    folder.mkdir()
    knobs = {"task": Classification(), "shares": SHARES, "seed": 0, "normalize": True, "source": "abc"} | changes
    return prepare.write(folder, table or table_of(20, 20), **knobs)


def places_of(table, seed=0):
    return prepare.split(len(table.targets), SHARES, seed, labels=table.targets)


def test_rows_come_back_normalised_by_the_training_rows_alone(tmp_path):
    table, prepared = table_of(20, 20), written(tmp_path / "data")
    places, inputs = places_of(table), table.inputs["input"]
    mean, std = inputs[places["train"]].mean(0), inputs[places["train"]].std(0)
    rows = prepare.read(tmp_path / "data").rows("test")
    np.testing.assert_allclose(rows.inputs["input"], (inputs[places["test"]] - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows.targets, table.targets[places["test"]])
    assert (rows.inputs["input"].dtype, rows.targets.dtype, len(rows)) == (np.float32, np.int64, 10)
    (standardize,) = prepared.transforms
    np.testing.assert_allclose(standardize["mean"]["input"], mean, rtol=1e-5)


def test_says_what_the_rows_are(tmp_path):
    table = replace(table_of(20, 20), notes=("2 files are no images and were left out: a, b",))
    prepared = written(tmp_path / "data", table)
    assert prepare.read(tmp_path / "data") == prepared
    assert (prepared.inputs, prepared.output_shape, prepared.fingerprint) == ((Input(shape=(2,)),), (2,), "abc")
    assert prepared.class_counts == {"train": (10, 10), "validate": (5, 5), "test": (5, 5)}
    assert prepared.num_rows == {"train": 20, "validate": 10, "test": 10}
    assert prepared.notes == table.notes
    assert prepared.signature((5,)) == Signature(inputs=prepared.inputs, output_shape=(5,))


def test_the_first_rows_are_read_without_the_rest(tmp_path):
    prepared = written(tmp_path / "data")
    few, all_of_them = prepared.rows("train", limit=3), prepared.rows("train")
    np.testing.assert_array_equal(few.inputs["input"], all_of_them.inputs["input"][:3])
    np.testing.assert_array_equal(few.targets, all_of_them.targets[:3])
    assert len(prepared.rows("train", limit=99)) == len(all_of_them) == 20


def test_without_normalisation_rows_stay_as_they_are(tmp_path):
    prepared = written(tmp_path / "data", normalize=False)
    table = table_of(20, 20)
    np.testing.assert_array_equal(
        prepared.rows("train").inputs["input"], table.inputs["input"][places_of(table)["train"]]
    )
    assert prepared.transforms == ()


def test_the_same_request_writes_the_same_bytes(tmp_path):
    written(tmp_path / "one")
    written(tmp_path / "two")
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    kinds = ("column-0", "numbers", "targets")
    assert names == ["data.json", *(f"{split}-{kind}.npy" for split in ("test", "train", "validate") for kind in kinds)]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_test_fingerprint_follows_the_test_rows_alone(tmp_path):
    one = written(tmp_path / "one")
    assert written(tmp_path / "two", normalize=False, transforms=[Repeat(column="input")]).test == one.test
    assert written(tmp_path / "three", seed=1).test != one.test
    relabelled = table_of(20, 20)
    assert written(tmp_path / "four", replace(relabelled, targets=1 - relabelled.targets)).test != one.test


def test_refuses_a_split_that_is_not_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.split must name train, validate, test, got train, test"):
        written(tmp_path / "data", shares={"train": 0.5, "test": 0.5})


def test_rows_without_labels_have_no_targets_and_no_classes(tmp_path):
    table = Table(inputs={"input": np.arange(24.0).reshape(12, 2)}, targets=None)
    prepared = written(tmp_path / "data", table, task=Unlabelled())
    rows = prepared.rows("validate")
    assert (rows.targets.shape, len(rows)) == ((3, 0), 3)
    assert (prepared.output_shape, prepared.class_counts) == (None, None)


def test_numbers_to_predict_are_kept_and_not_stratified(tmp_path):
    table = Table(inputs={"input": np.arange(24.0).reshape(12, 2)}, targets=np.arange(12) / 4)
    prepared = written(tmp_path / "data", table, task=Regression())
    targets = np.concatenate([prepared.rows(split).targets for split in prepare.SPLITS])
    assert (targets.dtype, targets.shape) == (np.float32, (12, 1))
    assert sorted(targets[:, 0].tolist()) == (np.arange(12) / 4).tolist()
    assert (prepared.output_shape, prepared.class_counts) == ((1,), None)


def test_targets_that_do_not_fit_the_task_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.targets must be integer labels from 0"):
        written(tmp_path / "data", replace(table_of(20, 20), targets=np.arange(40) / 3))
    assert list((tmp_path / "data").iterdir()) == []


@dataclass(frozen=True, kw_only=True)
class Lengths(Transform):
    """A text as its characters' numbers, as long as the longest of the training rows, and a mask."""

    column: str
    longest: int | None = None

    def fit(self, columns):
        return replace(self, longest=max(map(len, columns[self.column])))

    def __call__(self, columns):
        texts = columns[self.column]
        ids = np.array([[ord(letter) % 32 for letter in text.ljust(self.longest)[: self.longest]] for text in texts])
        rest = {name: values for name, values in columns.items() if name != self.column}
        return {"ids": ids, "mask": (ids > 0).astype(np.int32), **rest}

    def dynamic(self):
        return {"ids": (0,), "mask": (0,)}

    def facts(self):
        return {"vocabulary_size": 32}


@dataclass(frozen=True, kw_only=True)
class Repeat(Transform):
    column: str
    times: int = 2

    def __call__(self, columns):
        return {**columns, self.column: np.repeat(columns[self.column], self.times, axis=1)}


def texts_and_sizes(number=40):
    texts = np.array(["x" * (1 + row % 7) for row in range(number)], dtype=object)
    sizes = np.arange(number, dtype=np.uint8).reshape(-1, 1)
    return Table(inputs={"text": texts, "size": sizes}, targets=np.arange(number) % 2)


def test_transforms_make_the_inputs_in_order_with_their_types_and_lengths(tmp_path):
    prepared = written(tmp_path / "data", texts_and_sizes(), transforms=[Lengths(column="text"), Repeat(column="size")])
    assert prepared.inputs == (
        Input(name="ids", shape=(7,), dtype="int64", dynamic=(0,)),
        Input(name="mask", shape=(7,), dtype="int64", dynamic=(0,)),
        Input(name="size", shape=(2,), dtype="float32"),
    )
    assert prepared.facts == {"vocabulary_size": 32}
    rows = prepared.rows("train")
    assert list(rows.inputs) == ["ids", "mask", "size"]
    assert [values.dtype.name for values in rows.inputs.values()] == ["int64", "int64", "float32"]
    np.testing.assert_allclose(rows.inputs["size"].mean(0), 0, atol=1e-6)
    assert set(np.unique(rows.inputs["ids"])) == {0, 24}  # whole numbers are names, and not normalised


def test_each_transform_learns_from_what_the_one_before_made_of_the_training_rows(tmp_path):
    table = texts_and_sizes()
    longest = {name: max(map(len, table.inputs["text"][rows])) for name, rows in places_of(table).items()}
    table.inputs["text"][places_of(table)["test"][0]] = "x" * 50
    prepared = written(tmp_path / "data", table, transforms=[Lengths(column="text"), Repeat(column="ids", times=3)])
    assert prepared.rows("test").inputs["ids"].shape == (10, 3 * longest["train"])


def test_the_kept_transforms_are_rebuilt_from_their_nodes_and_give_the_same_inputs(tmp_path):
    table = texts_and_sizes()
    prepared = written(tmp_path / "data", table, transforms=[Lengths(column="text"), Repeat(column="size")])
    nodes = json.loads(json.dumps(prepared.transforms))
    rebuilt = [construct(node, "data.transforms") for node in nodes]
    assert [type(step) for step in rebuilt] == [Lengths, Repeat, Standardize]
    raw = {name: values[places_of(table)["validate"]] for name, values in table.inputs.items()}
    given = as_inputs(apply(rebuilt, raw))
    for name, values in prepared.rows("validate").inputs.items():
        np.testing.assert_array_equal(given[name], values)
    again = written(tmp_path / "again", table, transforms=rebuilt, normalize=False)
    for name, values in prepared.rows("test").inputs.items():
        np.testing.assert_array_equal(again.rows("test").inputs[name], values)


@pytest.mark.parametrize(
    ("values", "held"),
    [(["a", "b"], "texts or bytes"), ([b"a", b"b"], "texts or bytes"), ([1j, 2j], "values of type complex128")],
)
def test_refuses_a_column_that_is_left_for_no_model(values, held):
    column = np.array(values, dtype=complex if isinstance(values[0], complex) else object)
    with pytest.raises(
        ConfigError, match=rf"^data: the column caption holds {held}, which no model takes: .*data\.tra"
    ):
        as_inputs({"input": np.zeros((2, 3)), "caption": column})


@pytest.mark.parametrize(
    ("dtype", "taken"),
    [("bool", "float32"), ("uint8", "float32"), ("int16", "float32"), ("float64", "float32"), ("float16", "float32")]
    + [(name, "int64") for name in ("int32", "uint32", "int64")],
)
def test_whole_numbers_of_32_bits_and_more_are_names_and_all_others_measures(dtype, taken):
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    given = as_inputs({"input": values})["input"]
    assert given.dtype == taken
    np.testing.assert_array_equal(given, values)

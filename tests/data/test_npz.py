"""Arrays of the user's own, and what is said when they can't be used."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from hasten.core.errors import ConfigError
from hasten.data.npz import Npz

INPUTS = np.arange(12, dtype=np.float64).reshape(4, 3)
TARGETS = np.array([0, 1, 1, 2], dtype=np.uint8)


def saved(path: Path, **arrays) -> Npz:
    np.savez(path, **arrays)
    return Npz(path=str(path))


def test_reads_both_arrays_with_labels_as_int64(tmp_path):
    table = saved(tmp_path / "rows.npz", inputs=INPUTS, targets=TARGETS).load()
    assert list(table.inputs) == ["input"]
    np.testing.assert_array_equal(table.inputs["input"], INPUTS)
    np.testing.assert_array_equal(table.targets, [0, 1, 1, 2])
    assert table.targets.dtype == np.int64


def test_reads_the_arrays_that_the_config_names(tmp_path):
    np.savez(tmp_path / "rows.npz", x=INPUTS, y=TARGETS)
    table = Npz(path=str(tmp_path / "rows.npz"), inputs="x", targets="y").load()
    assert len(table.inputs["input"]) == len(table.targets) == 4


def test_several_inputs_keep_their_names_and_order(tmp_path):
    np.savez(tmp_path / "rows.npz", ids=INPUTS, mask=INPUTS[:, :2] > 3, y=TARGETS)
    table = Npz(path=str(tmp_path / "rows.npz"), inputs=("mask", "ids"), targets="y").load()
    assert list(table.inputs) == ["mask", "ids"]
    np.testing.assert_array_equal(table.inputs["mask"], INPUTS[:, :2] > 3)


def test_targets_may_be_values(tmp_path):
    values = np.array([[0.5, -1], [2, 3], [4, 5], [6, 7]])
    np.testing.assert_array_equal(saved(tmp_path / "rows.npz", inputs=INPUTS, targets=values).load().targets, values)


def test_rows_may_have_no_targets(tmp_path):
    np.savez(tmp_path / "rows.npz", inputs=INPUTS)
    assert Npz(path=str(tmp_path / "rows.npz"), targets=None).load().targets is None


def test_equal_content_has_an_equal_fingerprint_under_another_name_date_and_layout(tmp_path):
    one = saved(tmp_path / "one.npz", inputs=INPUTS, targets=TARGETS)
    np.savez_compressed(tmp_path / "two.npz", inputs=np.asfortranarray(INPUTS), targets=TARGETS)
    os.utime(tmp_path / "two.npz", (0, 0))
    assert one.fingerprint() == Npz(path=str(tmp_path / "two.npz")).fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        {"inputs": INPUTS + 1e-9, "targets": TARGETS},
        {"inputs": INPUTS, "targets": np.array([0, 1, 1, 1])},
        {"inputs": INPUTS.reshape(4, 3, 1), "targets": TARGETS},
    ],
    ids=["a value", "a label", "the shape"],
)
def test_other_content_has_another_fingerprint(tmp_path, other):
    one = saved(tmp_path / "one.npz", inputs=INPUTS, targets=TARGETS)
    assert one.fingerprint() != saved(tmp_path / "two.npz", **other).fingerprint()


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.path=.*nowhere\.npz does not exist$"):
        Npz(path=str(tmp_path / "nowhere.npz")).load()


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 and then nothing"])
def test_refuses_an_unreadable_file(tmp_path, content):
    (tmp_path / "rows.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^data\.path=.*rows\.npz is not a readable \.npz file"):
        Npz(path=str(tmp_path / "rows.npz")).load()


def test_refuses_a_truncated_file(tmp_path):
    source = saved(tmp_path / "rows.npz", inputs=INPUTS, targets=TARGETS)
    content = Path(source.path).read_bytes()
    Path(source.path).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"^data\.path="):
        source.load()


def test_refuses_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.path="):
        Npz(path=str(tmp_path)).load()


def test_refuses_a_lone_array(tmp_path):
    np.save(tmp_path / "rows.npy", INPUTS)
    with pytest.raises(ConfigError, match=r"^data\.path=.* holds a single array; .*savez"):
        Npz(path=str(tmp_path / "rows.npy")).load()


def test_never_unpickles(tmp_path):
    source = saved(tmp_path / "rows.npz", inputs=np.array([{"a": 1}], dtype=object), targets=TARGETS)
    with pytest.raises(ConfigError, match=r"^data\.inputs=inputs can't be read"):
        source.load()


def test_names_the_arrays_that_are_there(tmp_path):
    problem = r"^data\.targets=targets is not in .*, which holds inputs, labels \(rows without labels: .*=null\)$"
    with pytest.raises(ConfigError, match=problem):
        saved(tmp_path / "rows.npz", inputs=INPUTS, labels=TARGETS).load()


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"inputs": INPUTS[:, 0]}, r"data.inputs=inputs must be \(rows, features\).*, got \(4,\)"),
        ({"inputs": INPUTS[:, :0]}, r"data.inputs=inputs must be .* none of them 0, got \(4, 0\)"),
        ({"inputs": INPUTS.astype(str)}, r"data.inputs=inputs must hold real numbers, got <U"),
        ({"inputs": INPUTS * 1j}, r"data.inputs=inputs must hold real numbers, got complex128"),
        ({"inputs": np.where(INPUTS > 9, np.nan, INPUTS)}, r"data.inputs=inputs has 2 of 12 values that are NaN"),
        (
            {"inputs": np.where(INPUTS > 10, 1e39, INPUTS)},
            r"data.inputs=inputs has 1 of 12 values that are .* beyond float32",
        ),
        ({"targets": TARGETS.astype(str)}, r"data.targets=targets must hold real numbers, got <U"),
        ({"targets": np.array(1)}, r"data.targets=targets must be \(rows,\) or \(rows, values\), .*, got \(\)"),
        ({"targets": np.ones((4, 0))}, r"data.targets=targets must be .* none of them 0, got \(4, 0\)"),
        ({"targets": np.array([0, np.nan, np.inf, 1])}, r"data.targets=targets has 2 of 4 values that are NaN"),
        ({"targets": TARGETS[:3]}, r"data.inputs=inputs has 4 rows, data.targets=targets has 3"),
    ],
)
def test_refuses_what_can_not_be_trained_on(tmp_path, arrays, problem):
    with pytest.raises(ConfigError, match=problem):
        saved(tmp_path / "rows.npz", **({"inputs": INPUTS, "targets": TARGETS} | arrays)).load()


def test_says_all_that_is_wrong_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        saved(tmp_path / "rows.npz", inputs=INPUTS * np.nan, targets=np.full(4, np.inf)).load()
    assert [re.match(r"data\.\w+", problem).group() for problem in caught.value.problems] == [
        "data.inputs",
        "data.targets",
    ]


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        (
            {"inputs": ("inputs", "inputs")},
            r"data\.inputs and data\.targets must name different arrays, got inputs twice",
        ),
        ({"targets": "inputs"}, r"data\.inputs and data\.targets must name different arrays, got inputs twice"),
        ({"inputs": ()}, r"data\.inputs must name at least one array"),
        ({"inputs": ("inputs", "more")}, r"data\.inputs=inputs has 4 rows, data\.inputs=more has 3"),
    ],
)
def test_refuses_names_that_make_no_rows(tmp_path, knobs, problem):
    np.savez(tmp_path / "rows.npz", inputs=INPUTS, targets=TARGETS, more=INPUTS[:3])
    with pytest.raises(ConfigError, match=rf"^{problem}"):
        Npz(path=str(tmp_path / "rows.npz"), **knobs).load()

"""Rows that are none."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.core.errors import ConfigError
from hasten.data.noise import Noise


def test_is_standard_normal_in_the_shape_of_a_row():
    table = Noise(shape=(3, 8, 8), rows=100).load()
    noise = table.inputs["input"]
    assert (noise.shape, noise.dtype) == ((100, 3, 8, 8), np.float32)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert table.targets is None


def test_says_that_it_is_no_data():
    assert not Noise.real
    assert "noise" in Noise(shape=(2,)).load().notes[0]


def test_integers_are_in_any_vocabulary():
    ids = Noise(shape=(16,), rows=50, dtype="int64").load().inputs["input"]
    assert ids.dtype == np.int64
    assert np.unique(ids).tolist() == [0, 1]


def test_the_same_knobs_give_the_same_rows():
    one, other = Noise(shape=(4,)), Noise(shape=(4,))
    np.testing.assert_array_equal(one.load().inputs["input"], other.load().inputs["input"])
    assert one.fingerprint() == other.fingerprint()
    others = [Noise(shape=(5,)), Noise(shape=(4,), rows=65), Noise(shape=(4,), dtype="int64")]
    assert len({each.fingerprint() for each in [one, *others]}) == 4


def test_refuses_rows_without_an_axis():
    with pytest.raises(ConfigError, match=r"^data\.shape must have at least one axis"):
        Noise(shape=()).load()

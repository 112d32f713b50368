"""Requests as long and as many rows as the target says."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.core.interfaces import Input, Request, Target
from hasten.evidence.requests import refusals, request_of, sized

TOKENS = tuple(Input(name=name, shape=(6,), dtype="int64", dynamic=(0,)) for name in ("ids", "mask"))
SPECTRUM = Input(name="sound", shape=(2, 9), dynamic=(1,))
IMAGE = Input(shape=(1, 8, 8))


def target(length: int | None = None, *also: Request) -> Target:
    return Target(device="cpu", threads=1, batch_size=1, length=length, also=also, engines=("eager",))


def test_a_request_has_the_first_rows_and_begins_again_where_there_are_fewer() -> None:
    rows = {"ids": np.arange(12).reshape(2, 6), "mask": np.ones((2, 6), np.int64)}
    ids, mask = request_of(rows, TOKENS, Request(batch_size=3))
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5]])
    assert mask.shape == (3, 6)


def test_a_length_cuts_the_axes_that_may_differ_and_no_others() -> None:
    ids, mask = request_of(dict.fromkeys(("ids", "mask"), np.arange(6)[None]), TOKENS, Request(batch_size=1, length=2))
    np.testing.assert_array_equal(ids, [[0, 1]])
    assert mask.shape == (1, 2)
    (sound,) = request_of({"sound": np.zeros((1, 2, 9))}, (SPECTRUM,), Request(batch_size=4, length=5))
    assert sound.shape == (4, 2, 5)
    assert [each.shape for each in sized((SPECTRUM, IMAGE), 5)] == [(2, 5), (1, 8, 8)]
    assert [each.shape for each in sized((SPECTRUM,), None)] == [(2, 9)]


def test_a_length_beyond_the_greatest_is_refused_by_its_key() -> None:
    assert list(refusals(target(6, Request(batch_size=8, length=1)), TOKENS)) == []
    assert list(refusals(target(7), TOKENS)) == [
        "length must be at most 6, the size of input ids, got 7 (target.length)"
    ]
    assert list(refusals(target(None, Request(batch_size=1), Request(batch_size=1, length=9)), TOKENS)) == [
        "length must be at most 6, the size of input ids, got 9 (target.also[1].length)"
    ]


@pytest.mark.parametrize("asked", [target(4), target(None, Request(batch_size=1, length=4))])
def test_a_length_of_rows_that_have_none_is_refused(asked: Target) -> None:
    (refusal,) = refusals(asked, (IMAGE,))
    assert refusal.startswith("length must be null where no input has an axis whose size may differ, got 4 (target.")

"""Random changes of training rows."""

import numpy as np
import pytest
import torch

from hasten.core.errors import ConfigError
from hasten.data.augment import RandomCrop, RandomFlip

IMAGES = torch.arange(1.0, 1 + 64 * 2 * 5 * 6).reshape(64, 2, 5, 6)
SOUNDS = torch.arange(1.0, 1 + 64 * 3 * 9).reshape(64, 3, 9)
AUGMENTS = [RandomFlip(), RandomCrop(padding=2)]


@pytest.fixture(autouse=True)
def _seeded():
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


def shifted(row, shifts):
    """A row moved along each axis behind the channels, with zeros from outside."""
    padded = np.pad(row, [(0, 0), *[(9, 9)] * (row.ndim - 1)])
    cuts = [slice(9 + shift, 9 + shift + size) for shift, size in zip(shifts, row.shape[1:], strict=True)]
    return padded[(slice(None), *cuts)]


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("rows", [IMAGES, SOUNDS])
def test_the_seed_decides_everything_and_each_call_draws_anew(augment, rows):
    one, two = augment({"x": rows})["x"], augment({"x": rows})["x"]
    torch.manual_seed(0)
    torch.testing.assert_close(augment({"x": rows})["x"], one, rtol=0, atol=0)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_only_the_wanted_input_changes_and_on_a_copy(augment):
    before = IMAGES.clone()
    inputs = {"first": IMAGES, "second": SOUNDS}
    after = augment(inputs)
    assert list(after) == ["first", "second"]
    assert after["second"] is SOUNDS
    assert not torch.equal(after["first"], IMAGES)
    torch.testing.assert_close(IMAGES, before, rtol=0, atol=0)


def test_the_column_says_which_input():
    after = RandomFlip(column="b", probability=1)({"a": IMAGES, "b": SOUNDS})
    assert after["a"] is IMAGES
    torch.testing.assert_close(after["b"], SOUNDS.flip(2))


def test_every_row_is_flipped_or_not_on_its_own():
    flipped = RandomFlip()({"x": IMAGES})["x"]
    as_it_was = [torch.equal(after, before) for after, before in zip(flipped, IMAGES, strict=True)]
    mirrored = [torch.equal(after, before.flip(-1)) for after, before in zip(flipped, IMAGES, strict=True)]
    assert all(one != other for one, other in zip(as_it_was, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48


@pytest.mark.parametrize(("probability", "mirrored"), [(0.0, False), (1.0, True)])
def test_none_or_all_are_flipped_at_the_ends(probability, mirrored):
    flipped = RandomFlip(probability=probability)({"x": IMAGES})["x"]
    torch.testing.assert_close(flipped, IMAGES.flip(-1) if mirrored else IMAGES, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [IMAGES, SOUNDS])
def test_every_row_is_shifted_on_its_own_by_up_to_the_padding(rows):
    cropped = RandomCrop(padding=2)({"x": rows})["x"].numpy()
    assert cropped.shape == tuple(rows.shape)
    found = []
    for after, before in zip(cropped, rows.numpy(), strict=True):
        options = np.ndindex(*(5,) * (before.ndim - 1))
        moved = [place for place in options if np.array_equal(after, shifted(before, np.subtract(place, 2)))]
        assert len(moved) == 1
        found.append(moved[0])
    for axis in zip(*found, strict=True):
        assert set(axis) == set(range(5))
    if rows is IMAGES:
        assert len(set(found)) > 15


@pytest.mark.parametrize("augment", AUGMENTS)
def test_refuses_rows_of_features_and_columns_that_are_not_there(augment):
    with pytest.raises(ConfigError, match=r"features has the shape \(4, 3\) \(data\.augment\)$"):
        augment({"features": torch.zeros(4, 3)})
    with pytest.raises(ConfigError, match=r"column must be one of a, b, got c \(data\.augment\)$"):
        type(augment)(column="c")({"a": IMAGES, "b": IMAGES})

"""How good an order of rows is as a shuffle."""

import numpy as np
import pytest

from hasten.training.sampler import Blocks, order
from hasten.training.shuffle import shuffle_quality

NUM_ROWS, BATCH, CLASSES = 4000, 20, 10
SORTED = np.arange(NUM_ROWS) // (NUM_ROWS // CLASSES)


def mean_quality(blocks, epochs=20):
    found = [
        shuffle_quality(np.concatenate(list(order(NUM_ROWS, 0, epoch, blocks))), SORTED, BATCH)
        for epoch in range(epochs)
    ]
    return {name: np.mean([getattr(each, name) for each in found]) for name in vars(found[0])}


def test_the_order_of_the_file_is_none():
    found = shuffle_quality(np.arange(NUM_ROWS), SORTED, BATCH)
    assert found.distance == pytest.approx(3 / (NUM_ROWS + 1))
    assert found.rank_correlation == pytest.approx(1)
    assert found.batch_variance == pytest.approx(BATCH * (NUM_ROWS - 1) / (NUM_ROWS - BATCH))


def test_backwards_is_no_better_than_forwards():
    found = shuffle_quality(np.arange(NUM_ROWS)[::-1], SORTED, BATCH)
    assert (found.distance, found.rank_correlation) == pytest.approx((3 / (NUM_ROWS + 1), -1))


def test_a_uniform_permutation_is_one_within_what_chance_allows():
    found = mean_quality(None)
    # Standard deviations: of |i - j| about n / 3 / sqrt(2), of the correlation 1 / sqrt(n), of a variance of 200
    # batches in 9 degrees of freedom sqrt(2 / 1800).
    pairs = NUM_ROWS * 20
    assert found["distance"] == pytest.approx(1, abs=5 * np.sqrt(0.5 / pairs))
    assert found["rank_correlation"] == pytest.approx(0, abs=5 / np.sqrt(pairs))
    assert found["batch_variance"] == pytest.approx(1, abs=5 * np.sqrt(2 / 1800 / 20))


def test_one_block_in_a_window_keeps_neighbours_together_and_makes_pure_batches():
    found = mean_quality(Blocks(rows=400, window=1))
    assert found["distance"] < 0.2
    # Blocks are classes, and batches do not cross them.
    assert found["batch_variance"] == pytest.approx(BATCH * (NUM_ROWS - 1) / (NUM_ROWS - BATCH))


def test_the_more_blocks_in_a_window_the_better_the_shuffle():
    found = [mean_quality(Blocks(rows=20, window=window))["batch_variance"] for window in (1, 4, 20, 100, 200)]
    assert found == sorted(found, reverse=True)
    # Of a window of W pure blocks that are drawn from M, a batch varies between windows by (M - W) / (M - 1) / W, and
    # within one by (1 - 1 / W) / B, as a share of p (1 - p), up to the corrections for what is not put back.
    for window, ratio in zip((4, 20, 100), found[1:4], strict=True):
        between = (200 - window) / 199 / window
        within = (1 - between) / BATCH * (20 * window - BATCH) / (20 * window - 1)
        expected = (between + within) * BATCH * (NUM_ROWS - 1) / (NUM_ROWS - BATCH)
        assert ratio == pytest.approx(expected, rel=0.1)


def test_labels_that_are_all_the_same_can_not_be_sorted():
    assert shuffle_quality(np.arange(100), np.zeros(100), 10).batch_variance == 1.0


def test_what_is_left_over_of_the_last_batch_does_not_count():
    # One batch of ten rows, five of either label, out of eleven rows with six of the first.
    share, found = 6 / 11, 5 / 10
    variance = share * (1 - share) / 10 * (11 - 10) / (11 - 1)
    quality = shuffle_quality(np.arange(11), np.array([0, 1] * 5 + [0]), 10)
    assert quality.batch_variance == pytest.approx((found - share) ** 2 / variance)

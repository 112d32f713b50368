"""Learning rates against their formulas."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.sections import Schedule
from hasten.training.schedule import scheduler, share_of_peak


def rates(kind, total, lr=0.5):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = scheduler(kind, optimizer, lr, total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_rises_in_a_twentieth_of_the_steps_and_falls_along_half_a_period():
    # 40 steps: 2 of them rise by thirds of the peak, 38 fall.
    falling = [0.5 * (1 + math.cos(math.pi * step / 38)) / 2 for step in range(38)]
    assert rates("cosine", 40) == pytest.approx([0.5 / 3, 1 / 3, *falling])


def test_linear_falls_along_a_line():
    assert rates("linear", 10) == pytest.approx([0.5 * (1 - step / 10) for step in range(10)])


def test_constant_stays():
    assert rates("constant", 4) == [0.5] * 4


def test_one_cycle_begins_at_a_twenty_fifth_of_the_peak():
    found = rates("one_cycle", 20)
    assert found[0] == pytest.approx(0.02)
    assert max(found) == pytest.approx(0.5)


@given(st.sampled_from([kind for kind in get_args(Schedule) if kind != "one_cycle"]), st.integers(1, 200))
def test_every_step_learns_and_the_peak_is_reached_once_and_never_passed(kind, total):
    shares = [share_of_peak(kind, step, total) for step in range(total)]
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) == 1

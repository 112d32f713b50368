"""How often a training that may fail is worth a checkpoint."""

import math
from itertools import pairwise

import pytest

from hasten.distributed.interval import FIRST_LOOK, Interval, daly_seconds


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(interval, clock, *, steps, step_seconds, cost_seconds=0.0, write_steps=0):
    """Steps after which a checkpoint was begun, and how often it was looked whether one is due."""
    begun, looks = [], 0
    looks_at = interval.start(0)
    for step in range(1, steps + 1):
        clock.now += step_seconds(step) if callable(step_seconds) else step_seconds
        if step < looks_at:
            continue
        looks += 1
        due, looks_at = interval.look(step, busy=bool(begun) and step < begun[-1] + write_steps)
        if due:
            clock.now += cost_seconds
            begun.append(step)
            looks_at = interval.written(step, cost_seconds)
    return begun, looks


@pytest.mark.parametrize(
    ("cost", "mtbf", "seconds"),
    [
        # sqrt(2 * 2 * 400) = 40; C / 2M = 0.0025, whose root is 0.05: 40 * (1 + 0.05 / 3 + 0.0025 / 9) - 2
        (2, 400, 38.677778),
        # sqrt(2 * 8 * 100) = 40; C / 2M = 0.04, whose root is 0.2: 40 * (1 + 0.2 / 3 + 0.04 / 9) - 8
        (8, 100, 34.844444),
        (200, 100, 100),  # what costs as much as failures take is only worth it when one is due
        (300, 100, 100),
    ],
)
def test_is_the_interval_of_daly(cost, mtbf, seconds):
    assert daly_seconds(cost, mtbf) == pytest.approx(seconds, abs=1e-6)


def test_loses_less_time_than_other_intervals_do():
    cost, mtbf = 5.0, 3600.0

    def expected_seconds(interval):
        """To get one second of work done, by Daly's model with failures that follow Poisson and no time to restart."""
        return mtbf * math.expm1((interval + cost) / mtbf) / interval

    best = daly_seconds(cost, mtbf)
    assert all(expected_seconds(best) < expected_seconds(best * factor) for factor in (0.5, 0.9, 1.1, 2))


def test_without_failures_to_expect_it_is_what_was_asked_for():
    clock = Clock()
    begun, looks = run(Interval(seconds=5, clock=clock), clock, steps=200, step_seconds=0.125, cost_seconds=0.01)
    assert begun == [40, 80, 120, 160, 200]
    assert looks < 30
    assert Interval(seconds=5, clock=clock).told == ""


def test_begins_with_a_checkpoint_to_see_what_one_costs():
    clock = Clock()
    interval = Interval(seconds=5, mtbf_seconds=400, clock=clock)
    begun, _ = run(interval, clock, steps=100, step_seconds=1.0, cost_seconds=2.0)
    assert begun == [FIRST_LOOK, FIRST_LOOK + 39, FIRST_LOOK + 78]
    interval.safe_seconds = 3.0
    assert interval.told == (
        "A checkpoint every 38.7 s, chosen for one failure in 0.111111 h (distributed.mtbf_hours; Daly 2006), held the "
        "training up for 2e+03 ms (4.92% of the time) and was safe after 3 s: a failure is expected to cost the work "
        "of 22.3 s"
    )


def test_goes_by_what_checkpoints_cost_lately():
    clock = Clock()
    interval = Interval(seconds=5, mtbf_seconds=400, clock=clock)
    interval.start(0)
    for step in range(1, 20):
        clock.now += 10
        interval.written(step, 8.0 if step == 1 else 2.0)
    assert interval.cost_seconds == 2
    assert interval.wanted_seconds == daly_seconds(2, 400)


def test_begins_no_checkpoint_before_the_last_is_safe():
    clock = Clock()
    begun, _ = run(Interval(seconds=2, clock=clock), clock, steps=100, step_seconds=0.1, write_steps=45)
    assert all(45 <= after - before <= 48 for before, after in pairwise(begun))


def test_notices_in_time_that_steps_have_become_slower():
    clock = Clock()
    begun, _ = run(Interval(seconds=5, clock=clock), clock, steps=60, step_seconds=lambda step: 0.1 if step < 8 else 1)
    assert begun[0] <= 29  # 5 s at the pace of the first steps would have been 50 of them
    assert all(after - before <= 6 for before, after in pairwise(begun))

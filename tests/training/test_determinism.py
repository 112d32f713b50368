"""Arithmetic that comes out the same, in a process that stays as it was."""

import random

import numpy as np
import pytest
import torch

from hasten.training.determinism import random_state, reproducible, restore_random_state


def draw():
    return random.random(), np.random.normal(), random.gauss(0, 1), torch.rand(1).item()


def test_the_seed_decides_what_every_generator_draws():
    drawn = []
    for seed in (3, 3, 4):
        with reproducible(seed, threads=1):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))


def test_threads_and_strictness_hold_inside_alone_even_after_an_error():
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    inside = before[0] + 1

    def fail():
        with reproducible(0, threads=inside):
            assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (inside, True)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert before == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def test_memory_that_is_written_anyway_is_not_filled_first():
    before = torch.utils.deterministic.fill_uninitialized_memory
    with reproducible(0, threads=1):
        assert not torch.empty(100_000).isnan().all()
    assert torch.utils.deterministic.fill_uninitialized_memory is before


def test_the_generators_go_on_outside_as_if_nothing_had_been():
    state = random_state()
    wanted = draw(), draw()
    restore_random_state(state)
    first = draw()
    with reproducible(9, threads=1):
        draw()
    assert (first, draw()) == wanted

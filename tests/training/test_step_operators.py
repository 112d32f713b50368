"""Operators of a training step: their work against hand-made counts, their time against the phases they lie in."""

import numpy as np
import pytest
import torch
from torch import nn

from hasten.core.errors import MeasurementError
from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import TrainingSettings
from hasten.tasks.classification import Classification
from hasten.training.fit import fit
from hasten.training.step_clock import StepClock
from hasten.training.step_operators import OperatorWatch

BATCH, CHANNELS, SIZE, CLASSES = 8, 4, 6, 3
CALCULATING = {"forward", "backward", "optimizer"}


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(CHANNELS * SIZE**2, CLASSES),
    )


def train(folder, *, steps=8, **watching):
    generator = np.random.default_rng(0)
    rows = Rows(
        inputs={"input": generator.normal(size=(BATCH * steps, 1, SIZE, SIZE)).astype(np.float32)},
        targets=generator.integers(0, CLASSES, BATCH * steps),
    )
    return fit(
        net(),
        rows,
        TrainingSettings(epochs=1, batch_size=BATCH, lr=0.01, weight_decay=0.01),
        task=Classification(),
        seed=3,
        threads=1,
        folder=folder,
        checkpoint_seconds=1000,
        progress=Silent(),
        what="model",
        key="model.training",
        **watching,
    )


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    clock = StepClock()
    watch = OperatorWatch(clock, first=2, steps=3)
    fitted = train(tmp_path_factory.mktemp("watched"), clock=clock, callbacks=[watch])
    return fitted, clock, watch


def work_of(watch, phase, kind):
    found = [work for work in watch.figures.work if (work.phase, work.kind) == (phase, kind)]
    return tuple(sum(getattr(work, name) for work in found) for name in ("calls", "flops", "num_bytes"))


IMAGE, FEATURES = BATCH * SIZE**2, BATCH * CHANNELS * SIZE**2
FILTERS, WEIGHTS = CHANNELS * 9, CLASSES * CHANNELS * SIZE**2


def test_a_convolution_does_two_operations_per_multiply_add_and_touches_each_tensor_once(watched):
    *_, watch = watched
    assert work_of(watch, "forward", "convolution") == (1, 2 * FEATURES * 9, 4 * (IMAGE + FILTERS + FEATURES))


def test_the_gradient_of_a_first_layer_is_that_of_its_weights_alone(watched):
    *_, watch = watched
    expected = 4 * (FEATURES + IMAGE + FILTERS + FILTERS)
    assert work_of(watch, "backward", "convolution") == (1, 2 * FEATURES * 9, expected)


def test_the_gradient_of_a_linear_layer_is_two_products(watched):
    *_, watch = watched
    calls, flops, _ = work_of(watch, "backward", "linear")
    assert (calls, flops) == (2, 2 * 2 * BATCH * WEIGHTS)
    assert work_of(watch, "forward", "linear")[:2] == (1, 2 * BATCH * WEIGHTS)


def test_the_update_reads_and_writes_weights_gradients_and_moments(watched):
    *_, watch = watched
    parameters = sum(parameter.numel() for parameter in net().parameters())
    _, _, num_bytes = work_of(watch, "optimizer", "optimizer")
    assert 4 * 4 * parameters <= num_bytes <= 4 * 4 * parameters + 200  # and a counter of steps for each


def test_activations_that_wait_for_the_backward_pass_are_counted_once(watched):
    *_, watch = watched
    # The images, the convolution's output, that of the ReLU (which the linear layer keeps too), the log probabilities,
    # the targets, and mean and deviation of each channel; a few bytes more for the loss's own sum of weights.
    kept = 4 * (IMAGE + 2 * FEATURES + BATCH * CLASSES) + 8 * BATCH + 2 * 4 * CHANNELS
    assert kept <= watch.figures.activation_bytes <= kept + 64


def test_operators_of_each_kind_take_time_within_their_phase(watched):
    *_, watch = watched
    figures = watch.figures
    assert {each.phase for each in figures.operators} == CALCULATING == set(figures.watched_ms)
    for phase in CALCULATING:
        inside = sum(each.milliseconds for each in figures.operators if each.phase == phase)
        assert 0 < inside <= figures.watched_ms[phase]
    calls = {(each.phase, each.kind): each.calls for each in figures.operators}
    assert calls["forward", "convolution"] == calls["backward", "convolution"] == calls["forward", "linear"] == 1
    assert calls["backward", "linear"] == 2
    assert all(each.idle_ms > 0 for each in figures.operators)
    assert figures.page_fault_us >= 0


def test_the_update_has_one_kind_of_operators(watched):
    *_, watch = watched
    assert {each.kind for each in watch.figures.operators if each.phase == "optimizer"} == {"optimizer"}


def test_a_training_is_the_same_while_it_is_watched(tmp_path, watched):
    fitted, clock, watch = watched
    assert watch.done
    assert clock.num_steps == 8
    plain = train(tmp_path)
    assert plain.curves == fitted.curves
    pairs = zip(plain.model.state_dict().values(), fitted.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_training_that_ends_too_early_has_no_figures(tmp_path):
    clock = StepClock()
    watch = OperatorWatch(clock, first=2, steps=3)
    train(tmp_path, steps=4, clock=clock, callbacks=[watch])
    with pytest.raises(MeasurementError, match="steps 3 to 6, and the training ended after 4"):
        watch.figures  # noqa: B018

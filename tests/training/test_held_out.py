"""Training that stops where rows that it does not learn from say so."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hasten.core.errors import PassError
from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import TrainingSettings
from hasten.tasks.classification import Classification
from hasten.training.fit import fit
from hasten.training.held_out import divide
from hasten.training.predict import predict

SETTINGS = TrainingSettings(
    epochs=30, batch_size=16, lr=0.05, weight_decay=0.0, schedule="constant", patience=2, held_out=0.2
)
SEED, NUM_ROWS = 3, 60
TRAIN, JUDGE = divide(NUM_ROWS, SETTINGS.held_out, SEED, in_order=False)
STEPS_PER_EPOCH = len(TRAIN) // SETTINGS.batch_size


def rows(number=NUM_ROWS, **more):
    """Labels that can't be learnt: what is learnt of them by heart makes other rows worse."""
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(number, 6)).astype(np.float32)
    return Rows(inputs={"input": inputs}, targets=draw.integers(0, 3, number), **more)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))


class Killed(BaseException):
    """Like a SIGKILL, as far as nothing here catches it."""


class Until(Silent):
    def __init__(self, last):
        self.last, self.steps = last, 0

    def advance(self, steps=1):
        self.steps += steps
        if self.steps == self.last:
            raise Killed


def train(folder, *, data=None, settings=SETTINGS, progress=None, seconds=1e-6, model=None):
    return fit(
        model or net(),
        data or rows(),
        settings,
        task=Classification(),
        seed=SEED,
        threads=1,
        folder=folder,
        checkpoint_seconds=seconds,
        progress=progress or Silent(),
        what="student",
        key="student.training",
    )


def loss(model, numbers):
    data = rows()
    outputs = predict(model, {"input": data.inputs["input"][numbers]}, 7)
    return nn.functional.cross_entropy(torch.from_numpy(outputs), torch.from_numpy(data.targets[numbers])).item()


def assert_same(one, two):
    assert one.curves == two.curves
    pairs = zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"), seconds=1000)


def test_stops_when_patience_is_at_its_end_and_keeps_the_best_weights(undisturbed):
    judged = undisturbed.curves["held_out_loss"]
    best = int(np.argmin(judged))
    assert len(judged) == best + 1 + SETTINGS.patience < SETTINGS.epochs
    assert {len(curve) for curve in undisturbed.curves.values()} == {len(judged)}
    assert loss(undisturbed.model, JUDGE) == pytest.approx(min(judged), rel=1e-5)


def test_a_training_killed_at_any_step_stops_where_an_undisturbed_one_does(tmp_path, undisturbed):
    steps = STEPS_PER_EPOCH * len(undisturbed.curves["lr"])
    for step in (2, *range(STEPS_PER_EPOCH, steps + 1, STEPS_PER_EPOCH), steps):
        with pytest.raises(Killed):
            train(tmp_path, progress=Until(step))
    assert_same(train(tmp_path), undisturbed)
    # What has stopped stays stopped.
    counted = Until(None)
    assert_same(train(tmp_path, progress=counted), undisturbed)
    assert counted.steps == steps


def test_trains_on_no_row_that_judges(tmp_path):
    seen = set()

    class Spy(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.update(x[:, 0].tolist())
            return super().forward(x)

    data = rows()
    data.inputs["input"][:, 0] = np.arange(NUM_ROWS)
    train(tmp_path, model=Spy(6, 3), data=data, settings=replace(SETTINGS, lr=1e-4, epochs=6))
    assert seen <= set(TRAIN)
    assert len(seen) > 0.9 * len(TRAIN)


def test_goes_on_as_long_as_it_gets_better(tmp_path):
    data = rows()
    easy = replace(data, targets=data.inputs["input"][:, :3].argmax(1))
    fitted = train(tmp_path, data=easy, settings=replace(SETTINGS, epochs=5, lr=0.01), seconds=1000)
    judged = fitted.curves["held_out_loss"]
    assert len(judged) == 5
    assert judged == sorted(judged, reverse=True)


def test_without_a_patience_every_row_is_trained_on(tmp_path):
    one, other = (
        train(tmp_path / str(share), settings=replace(SETTINGS, patience=None, held_out=share, epochs=2))
        for share in (0.2, 0.5)
    )
    assert_same(one, other)
    assert "held_out_loss" not in one.curves


def test_needs_a_row_of_each_kind(tmp_path):
    with pytest.raises(
        PassError, match=r"student\.training\.patience needs a row to train on and a row to hold out, got 1"
    ):
        train(tmp_path, data=rows(1))


@given(st.integers(2, 90), st.floats(0.001, 0.999), st.booleans())
def test_every_row_trains_or_judges(number, share, in_order):
    train_rows, judges = divide(number, share, 0, in_order=in_order)
    assert sorted([*train_rows, *judges]) == list(range(number))
    assert abs(len(judges) - share * number) <= 1
    assert len(train_rows)
    assert len(judges)


def test_of_a_series_the_last_rows_judge():
    trained_on, judges = divide(10, 0.3, 0, in_order=True)
    assert (trained_on.tolist(), judges.tolist()) == (list(range(7)), [7, 8, 9])
    drawn = [divide(10, 0.3, 0, in_order=False)[1].tolist() for _ in range(2)]
    assert drawn[0] == drawn[1] != [7, 8, 9]

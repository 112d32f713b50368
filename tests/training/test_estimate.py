"""What a training will cost."""

import numpy as np
import pytest
import torch
from torch import nn

from hasten.core.errors import PassError
from hasten.core.interfaces import Rows
from hasten.core.sections import Step, TrainingSettings
from hasten.tasks.classification import Classification
from hasten.tasks.similarity import Similarity
from hasten.training.estimate import STEPS, training_seconds

SETTINGS = TrainingSettings(epochs=4, batch_size=8, lr=0.1, weight_decay=0.0)


ASKED: list[int] = []
"""Rows of every batch that any copy of a model was asked about."""


class Gated(nn.Module):
    """Takes two inputs by their names."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(6, 3)

    def forward(self, size, ids):
        ASKED.append(len(ids))
        return self.head(torch.cat([self.norm(self.words(ids).mean(1)), size], 1))


def rows(number=20):
    draw = np.random.default_rng(0)
    inputs = {"ids": draw.integers(0, 5, (number, 3)), "size": draw.normal(size=(number, 2)).astype(np.float32)}
    return Rows(inputs=inputs, targets=np.arange(number) % 3)


def seconds(model, data, settings=SETTINGS, num_rows=20, task=None, **more):
    return training_seconds(model, data, settings, task=task or Classification(), num_rows=num_rows, threads=1, **more)


def test_a_few_batches_are_tried_on_a_copy():
    model = Gated().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ASKED.clear()
    assert seconds(model, rows()) > 0
    assert ASKED == [8] * STEPS
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fewer_rows_than_a_batch_are_one_batch():
    ASKED.clear()
    assert seconds(Gated(), rows(5), num_rows=5) > 0
    assert ASKED == [5] * STEPS


def test_tries_steps_of_the_recipes_kind():
    ASKED.clear()
    assert seconds(Gated(), rows(), step=Step(batch_factor=2, micro_batches=3, precision="bfloat16")) > 0
    assert ASKED == [6, 5, 5] * STEPS


def test_no_epochs_cost_nothing():
    settings = TrainingSettings(epochs=0, batch_size=8, lr=0.1, weight_decay=0.0)
    assert seconds(Gated(), rows(), settings) == 0


def test_a_task_without_a_loss_says_so_before_anything_trains():
    with pytest.raises(PassError, match="embeddings have no labels to learn from"):
        seconds(Gated(), rows(), task=Similarity())

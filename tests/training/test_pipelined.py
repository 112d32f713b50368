"""What a pipeline wants of the rows of a step."""

import pytest
import torch
from torch import nn

from hasten.core.errors import PassError
from hasten.core.sections import Distributed, Step, TrainingSettings
from hasten.distributed.group import Group
from hasten.passes.pruning.masks import Masked
from hasten.training.pipelined import micro_rows, refuse


def group(**knobs):
    spread = Distributed(kind="hybrid", **knobs)
    return Group(spread=spread, rank=0, size=spread.devices)


def settings(rows):
    return TrainingSettings(epochs=1, batch_size=rows, lr=0.1, weight_decay=0.0)


def test_each_process_with_other_rows_has_equal_micro_batches():
    step = Step(micro_batches=4)
    assert micro_rows(settings(32), step, group(devices=2, pipeline=2), "model.training") == 8
    assert micro_rows(settings(32), step, group(devices=4, pipeline=2), "model.training") == 4


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            30,
            r"30 rows of a step \(model\.training\.batch_size\) can't be divided by trainer\.micro_batches=4 x 2 proc",
        ),
        (4, r"4 rows of a step"),
    ],
)
def test_refuses_rows_that_can_not_be_divided(rows, problem):
    with pytest.raises(PassError, match=problem):
        micro_rows(settings(rows), Step(micro_batches=4), group(devices=4, pipeline=2), "model.training")


def test_refuses_weights_that_are_held_at_zero_by_what_is_round_the_stages():
    masked = Masked(nn.Linear(2, 2), {"weight": torch.tensor([[True, False], [False, False]])})
    with pytest.raises(PassError, match=r"distributed\.pipeline can't divide .* held at zero .* distributed=fsdp can"):
        refuse(masked, settings(4), None, "model.training")

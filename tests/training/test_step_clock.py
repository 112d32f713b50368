"""The clock of a training's steps, with a fake one that ticks once whenever it is read."""

import time
from itertools import count

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import Step, TrainingSettings
from hasten.core.trial import PHASES
from hasten.tasks.classification import Classification
from hasten.training.fit import fit
from hasten.training.step_clock import StepClock

TICK = 1_000_000
BATCHES = 4


class Ticks:
    """Nanoseconds that grow by a millisecond whenever somebody asks; what was answered is kept."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return self.asked * TICK


class Spans(StepClock):
    """A clock that writes down which phase each stretch of time belonged to."""

    def __init__(self, **more):
        super().__init__(now=Ticks(), **more)
        self.spans = []

    def _mark(self):
        self.spans.append(self.phase)
        super()._mark()


class Parts(pl.LightningModule):
    """Adds up the gradients of the parts of each batch, and says what it does as the `Learner` says it."""

    def __init__(self, parts=1):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.parts = nn.Linear(3, 2), parts

    def training_step(self, batch, batch_idx):
        phase, optimizer = self.trainer.profiler.profile, self.optimizers()
        for part in batch.chunk(self.parts):
            with phase("forward"):
                loss = self.loss(part)
            with phase("backward"):
                self.manual_backward(loss)
        with phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    def loss(self, batch):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


def trained(clock, learner, *, epochs=1, data=None):
    pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        profiler=clock,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(learner, DataLoader(torch.ones(4 * BATCHES, 3) if data is None else data, batch_size=4))
    return clock


def merged(spans):
    """Neighbours of one phase taken together, as they follow one another."""
    return [phase for phase, before in zip(spans, [None, *spans[:-1]], strict=True) if phase != before]


def test_the_phases_of_a_step_follow_one_another():
    clock = trained(Spans(), Parts(2), data=torch.ones(4, 3))
    assert clock.num_steps == clock.num_updates == 1
    assert [phase for phase in merged(clock.spans) if phase != "other"] == [
        *("data", "transfer", "forward", "backward", "forward", "backward", "optimizer"),
    ]


def test_phases_add_up_to_the_time_between_the_first_and_the_last_mark():
    ticks = Ticks()
    clock = trained(StepClock(now=ticks), Parts(), epochs=3)
    assert clock.phases_ms.shape == (3 * BATCHES, len(PHASES))
    assert clock.phases_ms.sum() == ticks.asked - 1


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_of_several_parts_has_several_passes(parts):
    clock = trained(StepClock(now=Ticks()), Parts(parts), epochs=2)
    assert clock.num_steps == 2 * BATCHES
    expected = {"data": 1.0, "transfer": 1.0, "forward": parts, "backward": parts, "optimizer": 1.0}
    step = dict(zip(PHASES, clock.phases_ms[1], strict=True))
    assert {name: step[name] for name in expected} == expected
    assert len({tuple(step) for step in clock.phases_ms[1 : BATCHES - 1]}) == 1


def test_an_epochs_iterator_counts_as_waiting_for_data():
    clock = trained(StepClock(now=Ticks()), Parts(), epochs=2)
    waits = clock.phases_ms[:, PHASES.index("data")]
    assert waits[BATCHES] > waits[BATCHES + 1]
    assert set(waits[1:BATCHES]) == {1.0}


def test_a_slow_phase_is_found_where_it_is():
    # Ten ticks pass while a row is read, and five while the loss is calculated.
    ticks = Ticks()

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, row):
            [ticks() for _ in range(10)]
            return torch.ones(3)

    class SlowLoss(Parts):
        def loss(self, batch):
            [ticks() for _ in range(5)]
            return super().loss(batch)

    clock = trained(StepClock(now=ticks), SlowLoss(), data=Slow())
    found = dict(zip(PHASES, clock.phases_ms[1], strict=True))
    assert (found["data"], found["forward"], found["backward"]) == (41, 6, 1)


def test_the_device_is_waited_for_at_each_border():
    waits = count()
    clock = trained(StepClock(finish=lambda: next(waits), now=Ticks()), Parts())
    assert next(waits) == clock.phases_ms.sum() + 1


def test_memory_that_is_touched_for_the_first_time_is_counted():
    class Hungry(Parts):
        def training_step(self, batch, batch_idx):
            self.kept = [*getattr(self, "kept", []), np.ones(2**22)]
            return super().training_step(batch, batch_idx)

    faults = trained(StepClock(), Hungry()).page_faults
    assert faults.shape == (BATCHES,)
    assert (faults >= 16).all()  # 32 MB, in pages of 2 MB at most


def test_a_thread_that_sleeps_is_not_ready():
    class Sleepy(Parts):
        def loss(self, batch):
            time.sleep(0.05)
            return super().loss(batch)

    clock = trained(StepClock(), Sleepy())
    assert clock.delays_ms.shape == (BATCHES,)
    assert (clock.delays_ms >= 0).all()
    # Not of every step: on a busy machine the thread is kept waiting when it wakes, too.
    assert np.median(clock.phases_ms.sum(1) - clock.delays_ms) >= 45


SETTINGS = TrainingSettings(epochs=2, batch_size=12, lr=0.01, weight_decay=0.01)
STEPS_PER_EPOCH = 4


class Stop(BaseException):
    """Ends the process's training as a kill would."""


class Until(Silent):
    def __init__(self, last):
        self.left = last

    def advance(self, steps=1):
        self.left -= steps
        if self.left == 0:
            raise Stop


def fitted(folder, clock=None, progress=None, **more):
    torch.manual_seed(1)
    generator = np.random.default_rng(0)
    rows = Rows(
        inputs={"input": generator.normal(size=(50, 6)).astype(np.float32)}, targets=generator.integers(0, 3, 50)
    )
    return fit(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
        rows,
        SETTINGS,
        task=Classification(),
        seed=3,
        threads=1,
        folder=folder,
        checkpoint_seconds=1e-6,
        progress=progress or Silent(),
        what="model",
        key="model.training",
        clock=clock,
        **more,
    )


def test_a_training_is_the_same_with_the_clock(tmp_path):
    clock = StepClock()
    timed, untimed = fitted(tmp_path / "timed", clock), fitted(tmp_path / "untimed")
    assert timed.curves == untimed.curves
    assert clock.num_steps == SETTINGS.epochs * STEPS_PER_EPOCH
    assert (clock.phases_ms >= 0).all()
    assert (clock.phases_ms.sum(1) > 0).all()


def test_of_a_resumed_training_the_clock_has_the_steps_of_this_process(tmp_path):
    before, after = StepClock(now=Ticks()), StepClock(now=Ticks())
    with pytest.raises(Stop):
        fitted(tmp_path, before, Until(6))
    assert before.num_steps == 5
    fitted(tmp_path, after)
    assert after.num_steps == SETTINGS.epochs * STEPS_PER_EPOCH - 5
    # The augmentation and the pass itself, each with a mark at its end.
    assert set(after.phases_ms[:, PHASES.index("forward")]) == {2.0}
    assert set(after.phases_ms[:, PHASES.index("backward")]) == {1.0}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_each_part_of_a_batch_has_both_passes_and_the_step_one_update(tmp_path, micro_batches):
    clock = StepClock(now=Ticks())
    fitted(tmp_path, clock, step=Step(micro_batches=micro_batches))
    assert clock.num_steps == SETTINGS.epochs * STEPS_PER_EPOCH
    phases = dict(zip(PHASES, clock.phases_ms.T.tolist(), strict=True))
    assert set(phases["backward"]) == {micro_batches}
    assert set(phases["forward"]) == {micro_batches + 1}  # and what changes the batch before it is divided
    assert set(phases["optimizer"]) == {2.0}  # old gradients are dropped, and the weights updated

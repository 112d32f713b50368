"""The clock of a training's steps, with a fake one that ticks once whenever it is read."""

from itertools import count

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import TrainingSettings
from hasten.core.trial import PHASES
from hasten.tasks.classification import Classification
from hasten.training.fit import fit
from hasten.training.step_clock import StepClock

TICK = 1_000_000
BATCHES = 4
ONCE = {"data": 1, "transfer": 1, "forward": 1, "backward": 1}


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
        return super()._mark()


class Automatic(pl.LightningModule):
    def __init__(self, widths=(3, 2)):
        super().__init__()
        self.model = nn.Linear(*widths)

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


class Manual(Automatic):
    """Adds up the gradients of the parts of each batch."""

    def __init__(self, parts):
        super().__init__()
        self.automatic_optimization = False
        self.parts = parts

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in batch.chunk(self.parts):
            self.manual_backward(super().training_step(part, batch_idx))
        optimizer.step()


def trained(clock, learner, *, epochs=1, batches=BATCHES, **trainer):
    pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        profiler=clock,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    ).fit(learner, DataLoader(torch.ones(4 * batches, 3), batch_size=4))
    return clock


def merged(spans):
    """Neighbours of one phase taken together, as they follow one another."""
    return [phase for phase, before in zip(spans, [None, *spans[:-1]], strict=True) if phase != before]


def test_the_phases_of_a_step_follow_one_another():
    clock = trained(Spans(), Automatic(), batches=1)
    assert clock.num_steps == clock.num_updates == 1
    # The optimizer's step calls both passes: what lies between them, such as clearing the gradients, is its own.
    assert merged(clock.spans) == [
        *("other", "data", "other", "transfer", "other"),
        *("optimizer", "forward", "optimizer", "backward", "optimizer", "other"),
    ]


def test_phases_add_up_to_the_time_between_the_first_and_the_last_mark():
    ticks = Ticks()
    clock = trained(StepClock(now=ticks), Automatic(), epochs=3)
    assert clock.phases_ms.shape == (3 * BATCHES, len(PHASES))
    assert clock.phases_ms.sum() == ticks.asked - 1


def test_each_step_has_its_own_phases():
    clock = trained(StepClock(now=Ticks()), Automatic(), epochs=2)
    for step in clock.phases_ms:
        phases = dict(zip(PHASES, step, strict=True))
        assert {name: phases[name] for name in ONCE if name != "data"} == {
            name: ticks for name, ticks in ONCE.items() if name != "data"
        }
        assert phases["optimizer"] == 3
    assert len({tuple(step) for step in clock.phases_ms[1:BATCHES]}) == 1


def test_an_epochs_iterator_counts_as_waiting_for_data():
    clock = trained(StepClock(now=Ticks()), Automatic(), epochs=2)
    waits = clock.phases_ms[:, PHASES.index("data")]
    assert waits[BATCHES] > waits[BATCHES + 1]
    assert set(waits[1:BATCHES]) == {1.0}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_of_several_parts_has_several_passes(parts):
    clock = trained(StepClock(now=Ticks()), Manual(parts), epochs=2)
    assert clock.num_steps == 2 * BATCHES
    assert set(clock.phases_ms[:, PHASES.index("backward")]) == {parts}
    assert clock.phases_ms[:, PHASES.index("optimizer")].tolist() == [1.0] * 2 * BATCHES


def test_a_step_that_takes_several_batches_waits_for_each():
    clock = trained(Spans(), Automatic(), accumulate_grad_batches=2)
    assert clock.num_steps == BATCHES // 2
    for phase in ("transfer", "backward", "forward"):
        assert set(clock.phases_ms[:, PHASES.index(phase)]) == {2.0}
    assert merged(clock.spans).count("data") == BATCHES


def test_a_slow_phase_is_found_where_it_is():
    # Ten ticks pass within the loader's iterator, and five within the loss.
    ticks = Ticks()

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, row):
            [ticks() for _ in range(10)]
            return torch.ones(3)

    class SlowLoss(Automatic):
        def training_step(self, batch, batch_idx):
            [ticks() for _ in range(5)]
            return super().training_step(batch, batch_idx)

    clock = StepClock(now=ticks)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        profiler=clock,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SlowLoss(), DataLoader(Slow(), batch_size=1))
    found = dict(zip(PHASES, clock.phases_ms[1], strict=True))
    assert (found["data"], found["forward"], found["backward"]) == (11, 6, 1)


def test_the_device_is_waited_for_at_each_border():
    waits = count()
    clock = trained(StepClock(finish=lambda: next(waits), now=Ticks()), Automatic())
    assert next(waits) == clock.phases_ms.sum() + 1


def test_memory_that_is_touched_for_the_first_time_is_counted():
    class Hungry(Automatic):
        def training_step(self, batch, batch_idx):
            self.kept = [*getattr(self, "kept", []), np.ones(2**22)]
            return super().training_step(batch, batch_idx)

    faults = trained(StepClock(), Hungry()).page_faults
    assert faults.shape == (BATCHES,)
    assert (faults >= 16).all()  # 32 MB, in pages of 2 MB at most


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


def fitted(folder, clock=None, progress=None):
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
    assert set(after.phases_ms[:, PHASES.index("forward")]) == {1.0}

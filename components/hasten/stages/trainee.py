"""Trains in a process of its own, asked for a few steps at a time: `python -m hasten.stages.trainee [SPREAD]`.

It is driven by `evidence.pace.Trainee`, one JSON object a line. The first question says which training it is. A
training that has begun stands still between two questions, in the callback that ended its last step, and ends with its
standard input, hence with its parent.

Where the training is spread, as the JSON form of a `Distributed` says, several of these processes train together: the
first is asked and answers, and passes the questions on to its companions, with which it meets by torchrun's variables.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl

from hasten.core.errors import HastenError
from hasten.core.interpreter import leave_with_parent, private_channel
from hasten.core.recipe import Recipe
from hasten.core.sections import Distributed
from hasten.data.prepare import read
from hasten.distributed.group import Group, joined
from hasten.stages.stage import Tools
from hasten.stages.teacher import untrained
from hasten.stages.training import StageBench
from hasten.training.device import finish
from hasten.training.step_clock import StepClock
from hasten.training.step_operators import OperatorWatch

WATCHED_STEPS = 3
"""Whose operators are timed, at least."""
ENDLESS = 10**9
"""Steps of a training that goes on for as long as it is asked to."""


class Channel:
    """Questions in, answers out. Of several processes the first hears the questions and passes them on, and it alone is
    heard.

    Args:
        group: of processes that train together; None where this one trains alone.
    """

    def __init__(self, requests: IO[str], answers: IO[str], group: Group | None = None) -> None:
        self._requests, self._answers, self.group = requests, answers, group
        self._questions = group.patient() if group else None
        self._first = group is None or group.rank == 0

    def question(self) -> dict[str, Any]:
        """The next one.

        Raises:
            SystemExit: there is nobody left who asks.
        """
        line = self._requests.readline() if self._first else ""
        if self.group is not None:
            line = self.group.agreed(line, self._questions)
        if not line:
            raise SystemExit
        asked: dict[str, Any] = json.loads(line)
        return asked

    def answer(self, result: Any) -> None:
        self._write({"result": result})

    def refuse(self, error: Exception) -> None:
        """Raises the error again where others may be anywhere in their training: they end with this process."""
        name = "" if isinstance(error, HastenError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split()) or "no message"
        self._write({"error": f"{name}{message}", "trace": traceback.format_exc()})
        if self.group is not None:
            raise error

    def _write(self, answer: Mapping[str, Any]) -> None:
        if self._first:
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()


class Paced(pl.Callback):  # type: ignore[misc]
    """Lets a training take as many steps as it is asked for, and tells how long each took."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._wanted = 0
        self._stamps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, learner: pl.LightningModule, *batch: Any) -> None:
        self._stamps.append(time.perf_counter_ns())
        if len(self._stamps) <= self._wanted:
            return
        if self._wanted:
            self._channel.answer([(after - before) / 1e6 for before, after in pairwise(self._stamps)])
        else:
            self._channel.answer({"batch_size": learner.batch_size, "notes": list(learner.notes)})
        self._wanted = int(self._channel.question()["number"])
        self._stamps = [time.perf_counter_ns()]


class Watched(pl.Callback):  # type: ignore[misc]
    """Tells where the time of a training's steps goes, once its operators have been watched."""

    def __init__(self, channel: Channel, clock: StepClock, watch: OperatorWatch, warm_up: int, steps: int) -> None:
        self._channel, self._clock, self._watch = channel, clock, watch
        self._warm_up, self._steps = warm_up, steps

    def on_train_batch_end(self, trainer: pl.Trainer, learner: pl.LightningModule, *batch: Any) -> None:
        if not self._watch.done or trainer.should_stop:
            return
        undisturbed = slice(self._warm_up, self._warm_up + self._steps)
        self._channel.answer(
            {
                "phases_ms": self._clock.phases_ms[undisturbed].tolist(),
                "page_faults": self._clock.page_faults[undisturbed].tolist(),
                "delays_ms": self._clock.delays_ms[undisturbed].tolist(),
                "figures": self._watch.figures.to_dict(),
            }
        )
        trainer.should_stop = True


class Losses(pl.Callback):  # type: ignore[misc]
    """Keeps the loss of every step over the rows of all processes, and how many rows one takes."""

    def __init__(self, group: Group | None) -> None:
        self._group = group
        self._values: list[float] = []
        self.batch_size = 0

    def on_train_batch_end(self, trainer: pl.Trainer, learner: pl.LightningModule, *batch: Any) -> None:
        self._values.append(learner.last_loss * learner.last_share)
        self.batch_size = learner.batch_size

    def values(self) -> list[float]:
        """At the end; all processes have to ask for it."""
        return self._values if self._group is None else self._group.total(self._values)


def main() -> None:
    if len(sys.argv) == 1:
        _serve(Channel(*private_channel()))
        return
    spread = Distributed(**json.loads(sys.argv[1]))
    if os.environ["RANK"] != "0":
        leave_with_parent()
    with joined(spread) as group:
        requests, answers = (sys.stdin, sys.stdout) if group.rank else private_channel()
        _serve(Channel(requests, answers, group))


def _serve(channel: Channel) -> None:
    """Answers until nobody asks any more."""
    while True:
        asked = channel.question()
        try:
            _answer(channel, asked)
        except Exception as error:
            channel.refuse(error)


def _answer(channel: Channel, asked: Mapping[str, Any]) -> None:
    group = channel.group
    if asked["do"] == "losses":
        losses = Losses(group)
        _train(asked["spec"], group, [losses])
        channel.answer({"losses": losses.values(), "batch_size": losses.batch_size})
    elif asked["do"] == "profile":
        accelerator = asked["spec"]["recipe"]["trainer"]["accelerator"]
        clock = StepClock(None if accelerator == "cpu" else partial(finish, accelerator))
        # Where not every step communicates, as many are watched as there are from one that does to the next.
        every = group.spread.average_every if group else 1
        steps = every * math.ceil(WATCHED_STEPS / every)
        watch = OperatorWatch(clock, first=asked["warm_up"] + asked["steps"], steps=steps, group=group)
        told = Watched(channel, clock, watch, asked["warm_up"], asked["steps"])
        _train(asked["spec"], group, [watch, told], clock)
    else:
        _train(asked["spec"], group, [Paced(channel)])


def _train(
    spec: Mapping[str, Any], group: Group | None, callbacks: Sequence[pl.Callback], clock: StepClock | None = None
) -> None:
    recipe = Recipe(overrides=(), config={**spec["recipe"], "seed": spec["seed"]})
    inputs = {"data": Path(spec["data"])}
    model, _ = untrained(recipe, read(inputs["data"]))
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        tools = Tools(checkpoint_seconds=recipe.config["callbacks"]["checkpoint_seconds"])
        bench = StageBench(
            recipe=recipe, section="model", what="training", inputs=inputs, folder=Path(scratch), tools=tools
        )
        bench.fitted(
            model,
            distil=False,
            resume=Path(scratch) / "resume",
            steps=spec["steps"] or ENDLESS,
            clock=clock,
            callbacks=callbacks,
            group=group,
        )


if __name__ == "__main__":
    main()

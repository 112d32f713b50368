"""Measures how a recipe trains: rows per second, loss against the baseline's, and where a step's time goes.

Everything measured is kept in the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core.files import digest, read_json, write_json
from hasten.core.interfaces import Progress, Silent, StepFigures
from hasten.core.recipe import Recipe
from hasten.core.sections import Distributed, TrainingSettings
from hasten.core.store import Entry, Ingredients, Store
from hasten.core.training_objective import TrainingObjective, worth_comparing
from hasten.core.trial import Interval, LossCurves, StepProfile, TrainingEvaluation
from hasten.data.prepare import read
from hasten.evidence import pace
from hasten.evidence.latency import CANDIDATE, measuring_alone
from hasten.evidence.learning import SEGMENTS, compare
from hasten.hardware.machine import machine_id
from hasten.profiling.step import profile_step
from hasten.stages.build import Built
from hasten.stages.companions import arguments_of, companions, whereabouts
from hasten.stages.data import Data, task
from hasten.stages.roofline import roofline
from hasten.stages.stage import Tools, sources
from hasten.stages.teacher import Teacher, untrained
from hasten.stages.training import loader
from hasten.training.estimate import training_seconds

TRAINEE = "hasten.stages.trainee"
ALONE = "alone"
LOSSES, PACE, STEPS = "losses.json", "pace.json", "steps.json"
WARM_UP, PROFILED_STEPS = 8, 24
"""Steps before those whose phases are told, and those."""
START_SECONDS = 15.0
"""Expected of a training process before its first step."""


@dataclass(frozen=True, kw_only=True)
class TrainingEvaluator:
    """Prepares the rows of recipes and measures their trainings on this machine.

    Attributes:
        seed: of the first training of each recipe, of the order in which participants are timed, and of every
            bootstrap.
    """

    store: Store
    objective: TrainingObjective
    seed: int
    progress: Progress = field(default_factory=Silent)
    checkpoint_seconds: float = 5.0
    protocol: pace.PaceProtocol = field(default_factory=pace.PaceProtocol)

    def evaluate(
        self, recipe: Recipe, *, references: Mapping[str, Built], baseline: Built | None
    ) -> tuple[Built, TrainingEvaluation, dict[str, float]]:
        """Prepares a recipe's rows and measures its training.

        Its loss is compared with the baseline's where it is fast enough to be accepted.

        Args:
            references: `plain` and `previous`: with whose pace its own is compared, in turns in one session.
            baseline: with whose losses its own are compared; None for the baseline itself.

        Returns:
            The finished stages, the evaluation, and the recorded seconds of each stage and measurement that it took, by
            its key, whoever spent them.

        Raises:
            HastenError: a stage refused, or a training failed.
        """
        built = self.prepared(recipe)
        itself = [name for name, other in references.items() if self._key(other) == self._key(built)]
        others = {name: other for name, other in references.items() if name not in itself}
        pairs, seconds = self._paces(built, others)
        own, confidence = next(iter(pairs.values())), self.objective.confidence
        found = TrainingEvaluation(
            samples_per_second=pace.samples_per_second(own, confidence),
            step_ms=pace.step_ms(own, confidence),
            batch_size=own.batch_sizes[CANDIDATE],
            speedup=dict.fromkeys(itself, Interval(value=1.0, low=1.0, high=1.0))
            | {name: pace.speedups(pairs[name], confidence)[REFERENCE] for name in others},
            references={name: pace.samples_per_second(pairs[name], confidence, REFERENCE) for name in others},
            memory_bytes=own.memory_bytes[CANDIDATE],
            start_seconds=own.start_seconds[CANDIDATE],
            loss=None,
            notes=own.notes[CANDIDATE],
        )
        data = built.data
        seconds = {data.key: data.seconds} | seconds
        if baseline is None:
            return built, found, seconds | self._curves(built, self.objective.loss_seeds, self.objective.loss_steps)[1]
        if "previous" in others:
            memory_of_best = pairs["previous"].memory_bytes[REFERENCE]
            if worth_comparing(found, memory_of_best, self.objective):
                loss, more = self._learning(built, found.batch_size, baseline)
                return built, replace(found, loss=loss), seconds | more
        return built, found, seconds

    def plan(self, recipe: Recipe) -> list[tuple[str, str, Entry | None]]:
        """What measuring a recipe's training needs: name, key, and what the store has of it.

        Its pace is not among it: that belongs to a pair.
        """
        rows = Data().ingredients(recipe, {})
        key = Teacher().ingredients(recipe, {"data": rows.key}).key
        losses = self._curve_of(key, self.seed, self.objective.loss_steps)
        return [(it.stage, it.key, self.store.find(it.stage, it.key)) for it in (rows, losses)]

    def baseline_seconds(self, recipe: Recipe) -> float:
        """What the baseline will cost, from a few measured steps; the rows are prepared for that.

        Raises:
            ConfigError: the data can't be read or do not fit the model.
        """
        prepared = read(self.prepared(recipe).data.folder)
        settings = TrainingSettings(**recipe.section("model")["training"])
        rows = prepared.rows("train", limit=settings.batch_size)
        step = training_seconds(
            untrained(recipe, prepared)[0],
            rows,
            replace(settings, epochs=1),
            task=task(recipe),
            num_rows=min(settings.batch_size, len(rows)),
            threads=recipe.config["trainer"]["threads"],
            accelerator=recipe.config["trainer"]["accelerator"],
        )
        return START_SECONDS + step * self.objective.loss_steps * self.objective.loss_seeds + self.protocol.max_seconds

    def profile(self, built: Built) -> StepProfile:
        """Where the time of a training step goes, and the bottleneck.

        Raises:
            HastenError: the training failed.
        """
        limit, trainer = self.objective.max_memory_mb, built.recipe.config["trainer"]
        pairs, _ = self._paces(built, {})
        found = read_json(self._watched(built).folder / STEPS)
        return profile_step(
            phases_ms=np.array(found["phases_ms"]),
            page_faults=np.array(found["page_faults"], dtype=np.int64),
            figures=StepFigures.from_dict(found["figures"]),
            delays_ms=np.array(found["delays_ms"]) if built.recipe.config["loader"]["workers"] else None,
            roofline=roofline(self.store, trainer["threads"], "cuda" if trainer["accelerator"] == "cuda" else "cpu"),
            memory_bytes=pairs[ALONE].memory_bytes[CANDIDATE],
            memory_limit_bytes=None if limit is None else round(limit * 1e6),
        )

    def _watched(self, built: Built) -> Entry:
        ingredients = Ingredients(
            stage="steps",
            config={"warm_up": WARM_UP, "steps": PROFILED_STEPS},
            parents={"training": self._key(built)},
            sources=sources(TRAINEE),
            machine=_machine(built),
        )

        def make(folder: Path) -> None:
            spec = self._spec(built, seed=self.seed, steps=None)
            with measuring_alone(), pace.Trainee.of(self.training_of(built)) as trainee:
                write_json(folder / STEPS, trainee.profile(spec, warm_up=WARM_UP, steps=PROFILED_STEPS))

        return self.store.build(ingredients, make)

    def unfit(self, recipe: Recipe) -> str | None:
        """Why the recipe can't be trained on these rows: nothing that its checks have not told."""
        return None

    def prepared(self, recipe: Recipe) -> Built:
        """The stages that a training needs: its rows."""
        stage = Data()
        tools = Tools(progress=self.progress, checkpoint_seconds=self.checkpoint_seconds)
        entry = self.store.build(stage.ingredients(recipe, {}), lambda folder: stage.make(recipe, {}, folder, tools))
        return Built(recipe=recipe, entries={stage.name: entry})

    def _key(self, built: Built) -> str:
        """Equal for recipes that train at the same pace and with the same losses."""
        return digest([self._training(built), built.recipe.section("loader"), self.checkpoint_seconds])

    def _training(self, built: Built) -> str:
        """Equal for recipes whose trainings end with the same weights."""
        return Teacher().ingredients(built.recipe, built.keys).key

    def _spec(self, built: Built, *, seed: int, steps: int | None) -> pace.Spec:
        """What the training process is told; None for steps without end."""
        return {"recipe": built.recipe.config, "data": str(built.data.folder), "seed": seed, "steps": steps}

    def training_of(self, built: Built) -> pace.Training:
        """Without end."""
        settings, threads = loader(built.recipe), built.recipe.config["trainer"]["threads"]
        spread = Distributed.of(built.recipe.config["distributed"])
        return pace.Training(
            module=TRAINEE,
            spec=self._spec(built, seed=self.seed, steps=None),
            threads=threads,
            settle=max(1, settings.workers) * settings.ahead + 1,
            arguments=arguments_of(spread),
            companions=pace.alone if spread.kind == "single" else partial(companions, TRAINEE, spread, threads),
        )

    def _paces(self, built: Built, references: Mapping[str, Built]) -> tuple[dict[str, pace.Pace], dict[str, float]]:
        """One measurement for each pair of candidate and reference, and what measuring cost.

        All pairs that are missing are measured in one session, so that they share its rounds.
        """
        pairs: dict[str, Built | None] = {**references} or {ALONE: None}
        ingredients = {name: self._pair(built, reference) for name, reference in pairs.items()}
        missing = {
            name: reference
            for name, reference in references.items()
            if self.store.find("pace", ingredients[name].key) is None
        }
        session = _Session(evaluator=self, built=built, references=missing)
        found, seconds = {}, {}
        for name in pairs:
            entry = self.store.build(ingredients[name], partial(session.write, name))
            found[name] = pace.Pace.from_dict(read_json(entry.folder / PACE))
            seconds[entry.key] = entry.seconds
        return found, seconds

    def _pair(self, built: Built, reference: Built | None) -> Ingredients:
        return Ingredients(
            stage="pace",
            config={"protocol": asdict(self.protocol), "seed": self.seed},
            parents={
                "candidate": self._key(built),
                "reference": ALONE if reference is None else self._key(reference),
            },
            sources=sources("hasten.evidence.pace", TRAINEE),
            machine=_machine(built),
        )

    def _learning(self, built: Built, batch_size: int, baseline: Built) -> tuple[LossCurves, dict[str, float]]:
        """Both see the same number of rows."""
        before, seconds = self._curves(baseline, self.objective.loss_seeds, self.objective.loss_steps)
        rows = before[0]["batch_size"] * self.objective.loss_steps
        after, more = self._curves(built, self.objective.candidate_seeds, max(SEGMENTS, round(rows / batch_size)))
        curves = compare(
            [each["losses"] for each in before],
            [each["losses"] for each in after],
            batch_sizes=(before[0]["batch_size"], batch_size),
            confidence=self.objective.confidence,
        )
        return curves, seconds | more

    def _curves(self, built: Built, num_seeds: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """`losses` and `batch_size` of a training with each seed, and what they cost."""
        found, seconds = [], {}
        self.progress.start("comparing losses", num_seeds)
        try:
            with ExitStack() as stack:
                trainees = _Once(stack, self.training_of(built))
                for offset in range(num_seeds):
                    entry = self._curve(built, (self.seed + offset) % 2**32, steps, trainees)
                    found.append(read_json(entry.folder / LOSSES))
                    seconds[entry.key] = entry.seconds
                    self.progress.advance()
        finally:
            self.progress.stop()
        return found, seconds

    def _curve(self, built: Built, seed: int, steps: int, trainees: _Once) -> Entry:
        def make(folder: Path) -> None:
            write_json(folder / LOSSES, trainees.one.losses(self._spec(built, seed=seed, steps=steps)))

        return self.store.build(self._curve_of(self._training(built), seed, steps), make)

    @staticmethod
    def _curve_of(training: str, seed: int, steps: int) -> Ingredients:
        return Ingredients(
            stage="losses",
            config={"seed": seed, "steps": steps},
            parents={"training": training},
            sources=sources(TRAINEE),
        )


def _machine(built: Built) -> dict[str, Any]:
    return {"id": machine_id(), **whereabouts(Distributed.of(built.recipe.config["distributed"]))}


REFERENCE = "reference"
"""The other one of a stored pair."""


class _Once:
    """A training process that is started when it is first needed."""

    def __init__(self, stack: ExitStack, training: pace.Training) -> None:
        self._stack, self._training = stack, training

    @cached_property
    def one(self) -> pace.Trainee:
        return self._stack.enter_context(pace.Trainee.of(self._training))


@dataclass(kw_only=True)
class _Session:
    """Measures a candidate beside its references once, when the first pair is asked for, and hands out the pairs."""

    evaluator: TrainingEvaluator
    built: Built
    references: Mapping[str, Built]

    def write(self, name: str, folder: Path) -> None:
        """Writes the blocks of the candidate and of that reference."""
        participant = None if name == ALONE else self._participant(name)
        write_json(folder / PACE, self._measured.pair(participant, REFERENCE).to_dict())

    def _participant(self, name: str) -> str:
        """Two references may be the same training; it takes part once."""
        return self.evaluator._key(self.references[name])

    @cached_property
    def _measured(self) -> pace.Pace:
        evaluator = self.evaluator
        taking_part = {self._participant(name): built for name, built in self.references.items()}
        taking_part = {CANDIDATE: self.built, **taking_part}
        evaluator.progress.start("measuring", evaluator.protocol.max_rounds)
        try:
            return pace.measure(
                {name: evaluator.training_of(built) for name, built in taking_part.items()},
                evaluator.protocol,
                evaluator.seed,
                on_round=evaluator.progress.advance,
            )
        finally:
            evaluator.progress.stop()

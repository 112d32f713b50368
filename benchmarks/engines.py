"""Engine x precision x threads for four models at two batch sizes, and what the loop's choice loses against the best.

    .venv/bin/python benchmarks/engines.py
    .venv/bin/python benchmarks/engines.py \
        residual:data.train=cifar10_train.parquet residual:data.validate=cifar10_test.parquet \
        residual:model.checkpoint=resnet20_cifar10.safetensors depthwise:data.path=spoken_digits.parquet \
        transformer:data.train=trec_train.parquet transformer:data.test=trec_test.parquet \
        recurrent:data.path=ETTh1.csv

Arguments are overrides of a model's recipe, with the name of the model before them. A model that has none runs on noise
in the shape of its rows, where nothing can calibrate static int8 or judge the quality.

Every recipe of a table is compiled, which compares a float engine with eager PyTorch, and all that compile are timed in
turns in one session. `off by` is the largest difference of the outputs from eager PyTorch's, as a share of their range.
Then the loop chooses among the same moves, and its choice is timed against the best of the table that holds the
constraints, again in turns. Prints Markdown: a table for each model and batch size, what was refused and why, and at
last what the loop chose and lost.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hasten
from hasten.core.errors import HastenError
from hasten.core.objective import judge
from hasten.core.preflight import check
from hasten.core.recipe import Composer, Recipe
from hasten.core.trial import Evaluation, Interval
from hasten.data.prepare import read
from hasten.evidence import latency
from hasten.evidence.process import Worker
from hasten.evidence.worker import write_inputs
from hasten.notebook import composing
from hasten.session import Session
from hasten.stages.build import Built, build
from hasten.stages.stage import Tools

BRIEFLY = ("trainer.epochs=2", "trainer.patience=null")
"""Weights decide nothing here but whether fewer bits keep the quality."""
REAL: Mapping[str, Sequence[str]] = {
    "residual": (
        "experiment=cifar10",
        "model.arch.num_blocks=3",
        "model.training.epochs=0",
        "strategies.distill.checkpoint=none",
    ),
    "depthwise": ("experiment=spoken_digits", "model=depthwise", *BRIEFLY),
    "transformer": ("experiment=trec", *BRIEFLY),
    "recurrent": ("experiment=etth1", *BRIEFLY),
}
UNTRAINED = ("data=noise", "task=unlabelled", "model.training.epochs=0")
NOISE: Mapping[str, Sequence[str]] = {
    "residual": ("model=cifar_resnet", "model.arch.num_blocks=3", "model.arch.num_outputs=10", "data.shape=[3,32,32]"),
    "depthwise": ("model=depthwise", "model.arch.num_outputs=10", "data.shape=[1,32,50]"),
    "transformer": (
        "model=transformer",
        "model.arch.num_outputs=6",
        "model.arch.vocabulary_size=8000",
        "data.shape=[32]",
        "data.dtype=int64",
    ),
    "recurrent": ("model=recurrent", "model.arch.num_outputs=24", "data.shape=[7,96]"),
}
PRECISIONS: Mapping[str, Sequence[str]] = {
    "float32": (),
    "bfloat16": ("engine.precision=bfloat16",),
    "static int8": ("quantization=static",),
    "dynamic int8": ("quantization=dynamic",),
}
STRATEGIES = ("engine", "engine_threads", "bfloat16", "static_int8", "dynamic_int8")
"""Moves of the loop that are rows of the table, as far as there are such files."""
MAX_LOSS = 0.05
COMPARED_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe of the table that compiled.

    Attributes:
        off_by: largest difference of its outputs from eager PyTorch's, as a share of the range of the latter.
        p50_ms: median of a request with its interval.
    """

    name: str
    built: Built
    off_by: float
    p50_ms: Interval


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the loop's choice is worth.

    Attributes:
        ratio: time of a request of the choice over that of the table's best; exactly 1 where they are one artefact.
    """

    model: str
    batch_size: int
    best: Row
    choice: str
    ratio: Interval


def main(arguments: Sequence[str]) -> None:
    logging.getLogger("hasten").setLevel(logging.ERROR)
    wanted = _parsed(arguments)
    outcomes = []
    with composing(), tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        for model, batch_size in product(wanted.models, wanted.batches):
            overrides = [
                *_recipe(model, wanted.overrides),
                "tracking=none",
                "planner.max_trials=24",
                f"target.threads={max(wanted.threads)}",
                f"target.batch_size={batch_size}",
                f"target.engines=[{','.join(wanted.engines)}]",
                f"store.folder={scratch}/store",
            ]
            print(f"\n## {model}, batch {batch_size}\n", flush=True)
            bench = Bench(overrides=overrides, folder=Path(scratch), rounds=wanted.rounds)
            outcomes.append(bench.outcome(model, wanted.engines, wanted.threads))
    _print_summary(outcomes)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = {"type": lambda text: text.split(",")}
    numbers = {"type": lambda text: [int(number) for number in text.split(",")]}
    parser.add_argument("--models", default=list(REAL), help=f"of {', '.join(REAL)}", **names)
    parser.add_argument("--batches", default=[1, 32], help="rows of a request", **numbers)
    parser.add_argument(
        "--engines", default=["eager", "onnxruntime", "openvino"], help="inductor takes half a minute a row", **names
    )
    parser.add_argument("--threads", default=[1, 2], help="of a request; the loop may use the most of them", **numbers)
    parser.add_argument("--rounds", default=30, type=int, help="in which all take turns, at most")
    parser.add_argument("overrides", nargs="*", metavar="MODEL:KEY=VALUE")
    parsed = parser.parse_args(arguments)
    for text in parsed.overrides:
        if text.partition(":")[0] not in REAL:
            parser.error(f"{text} is no override of a model: {', '.join(f'{model}:key=value' for model in REAL)}")
    return parsed


def _recipe(model: str, overrides: Sequence[str]) -> list[str]:
    """Of a model, on the rows that its overrides name, or on noise."""
    mine = [text.partition(":")[2] for text in overrides if text.startswith(f"{model}:")]
    return [*REAL[model], *mine] if mine else [*NOISE[model], *UNTRAINED]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One model at one batch size.

    Attributes:
        overrides: its recipe in eager PyTorch.
        rounds: of a session in which all take turns, at most.
    """

    overrides: Sequence[str]
    folder: Path
    rounds: int

    def outcome(self, model: str, engines: Sequence[str], threads: Sequence[int]) -> Outcome:
        session = Session.of(self.overrides, self.folder)
        rows, refusals = self._table(session, engines, threads)
        best, refused_late = self._best(session, rows)
        _print_table(rows, {**refusals, **refused_late})
        choice, built = self._choice(session)
        outcome = Outcome(
            model=model,
            batch_size=session.target.batch_size,
            best=best,
            choice=choice,
            ratio=self._ratio(session, built, best.built),
        )
        print(f"\nBest: {best.name}. The loop's choice: {choice}, {_told(outcome)}", flush=True)
        return outcome

    def _table(
        self, session: Session, engines: Sequence[str], threads: Sequence[int]
    ) -> tuple[list[Row], dict[str, str]]:
        """What compiles, the fastest first, and why the others don't."""
        compiled, refusals = dict[str, Built](), dict[str, str]()
        for name, edit in _candidates(engines, threads):
            try:
                recipe = session.composer.compose(edit)
                check(recipe)
                compiled[name] = build(recipe, session.store, Tools())
            except HastenError as error:
                refusals[name] = "; ".join(str(error).splitlines())
        eager = self._outputs(session, next(iter(compiled.values())))
        off_by = {name: _difference(self._outputs(session, built), eager) for name, built in compiled.items()}
        medians = self._medians(session, compiled)
        rows = [
            Row(name=name, built=built, off_by=off_by[name], p50_ms=medians[name]) for name, built in compiled.items()
        ]
        return sorted(rows, key=lambda row: row.p50_ms.value), refusals

    def _medians(self, session: Session, compiled: Mapping[str, Built]) -> dict[str, Interval]:
        first, *others = compiled
        folders = {name: compiled[name].compiled.folder for name in others}
        measured = self._measured(session, compiled[first], folders)
        participants = {first: latency.CANDIDATE, **{name: name for name in others}}
        confidence = session.objective.confidence
        return {
            name: latency.latency_ms(measured, confidence, participant)["p50"]
            for name, participant in participants.items()
        }

    def _measured(self, session: Session, built: Built, references: Mapping[str, Path]) -> latency.Measurement:
        """In turns, each on all CPUs of the target whatever its threads, as the loop measures."""
        protocol = latency.LatencyProtocol(min_rounds=min(15, self.rounds), max_rounds=self.rounds)
        rows = list(read(built.data.folder).rows("train", limit=session.target.batch_size).inputs.values())
        return latency.measure(built.compiled.folder, references, session.target, rows, protocol, seed=0)

    def _outputs(self, session: Session, built: Built) -> NDArray[np.float32]:
        """Of training rows, in the engine."""
        with tempfile.TemporaryDirectory(prefix="hasten-") as scratch, Worker.of(session.target) as worker:
            rows = read(built.data.folder).rows("train", limit=COMPARED_ROWS).inputs
            inputs, outputs = write_inputs(Path(scratch) / "inputs.npz", rows.values()), Path(scratch) / "outputs.npy"
            worker.load(built.compiled.folder)
            worker.predict(inputs, outputs, batch_size=session.target.batch_size)
            given: NDArray[np.float32] = np.load(outputs)
        return given

    def _best(self, session: Session, rows: Sequence[Row]) -> tuple[Row, dict[str, str]]:
        """The fastest that the loop may accept, and why those before it may not be."""
        baseline, evaluation, _ = session.bench.evaluate(session.untouched, references={}, baseline=None)
        refused = dict[str, str]()
        for row in rows:
            reason = _broken(session, row.built, baseline, evaluation)
            if reason is None:
                return row, refused
            refused[row.name] = reason
        raise AssertionError("eager PyTorch breaks no constraint")

    def _choice(self, session: Session) -> tuple[str, Built]:
        """What the loop takes, by its overrides."""
        strategies = [name for name in STRATEGIES if name in session.composer.options("strategy")]
        with redirect_stdout(sys.stderr):
            result = hasten.optimize([*self.overrides, f"strategy=[{','.join(strategies)}]"], self.folder / "left")
        recipe: Recipe = Composer.of(result.best.overrides).compose()
        shared = set(session.recipe.overrides)
        told = [text for text in recipe.overrides if text not in shared]
        return " ".join(told) or "engine=eager", build(recipe, session.store, Tools())

    def _ratio(self, session: Session, choice: Built, best: Built) -> Interval:
        if choice.compiled.key == best.compiled.key:
            return Interval(value=1.0, low=1.0, high=1.0)
        measured = self._measured(session, best, {"choice": choice.compiled.folder})
        return latency.speedups(measured, session.objective.confidence)["choice"]


def _candidates(engines: Sequence[str], threads: Sequence[int]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and edit of every row, the first engine in floats first."""
    for (precision, edit), engine, number in product(PRECISIONS.items(), engines, threads):
        name = f"{engine}, {precision}, {number} thread{'s' if number > 1 else ''}"
        yield name, (f"engine={engine}", f"engine.threads={number}", *edit)


def _difference(outputs: NDArray[np.float32], eager: NDArray[np.float32]) -> float:
    return float(np.abs(outputs - eager).max() / np.ptp(eager))


def _broken(session: Session, built: Built, baseline: Built, evaluation: Evaluation) -> str | None:
    """The constraint that keeps the loop from accepting it; None where it holds all."""
    _, measured, _ = session.bench.evaluate(built.recipe, references={"previous": baseline}, baseline=baseline)
    share = built.recipe.section("quantization").get("min_integer_share") or 0.0
    judgement = judge(measured, evaluation, session.objective, min_integer_share=share)
    return None if judgement.holds else judgement.reason


def _print_table(rows: Sequence[Row], refusals: Mapping[str, str]) -> None:
    print("| engine, precision, threads | p50, ms | off by |\n|---|---|---|")
    for row in rows:
        p50 = row.p50_ms
        print(f"| {row.name} | {p50.value:.3f} [{p50.low:.3f}, {p50.high:.3f}] | {row.off_by:.2%} |")
    if refusals:
        print("\nRefused:\n")
    for reason in dict.fromkeys(refusals.values()):
        print(f"- {'; '.join(name for name, its in refusals.items() if its == reason)}: {reason}")


def _print_summary(outcomes: Sequence[Outcome]) -> None:
    print("\n## What the loop's choice loses\n")
    print("| model | batch | best of the table | its p50, ms | the loop's choice | against the best |")
    print("|---|---|---|---|---|---|")
    for outcome in outcomes:
        best = outcome.best
        print(
            f"| {outcome.model} | {outcome.batch_size} | {best.name} | {best.p50_ms.value:.3f} | {outcome.choice} | "
            f"{_told(outcome)} |"
        )


def _told(outcome: Outcome) -> str:
    ratio, lost = outcome.ratio, outcome.ratio.value - 1
    if ratio.low == ratio.high:
        return "the same artefact"
    interval = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] times its time"
    within = "inside the interval" if ratio.low <= 1 else f"at most {MAX_LOSS:.0%}" if lost <= MAX_LOSS else "too much"
    return f"{interval}, {max(0.0, lost):.1%} lost: {within}"


if __name__ == "__main__":
    main(sys.argv[1:])

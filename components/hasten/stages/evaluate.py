"""Measures built recipes: quality, latency, profile, certificate. Everything measured is kept in the store."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from hasten.artefacts.capture import GraphCost, cost_of, read_cost
from hasten.artefacts.module import build as build_module
from hasten.artefacts.module import load_weights, output_shape, rebuild
from hasten.core.construct import locate
from hasten.core.errors import ConfigError, EngineError
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import OperatorTime, Progress, Request, Signature, Silent, Target, Task
from hasten.core.objective import Objective
from hasten.core.recipe import Recipe
from hasten.core.sections import Step, TrainingSettings
from hasten.core.source import libraries
from hasten.core.store import Entry, Ingredients, Store
from hasten.core.trial import Certificate, Evaluation, Interval, Profile, Quality, RequestLatency
from hasten.data.prepare import Prepared, read
from hasten.evidence import latency
from hasten.evidence.bounds import corrected
from hasten.evidence.certificate import Ledger, Reading, certify, no_better_than_chance
from hasten.evidence.metrics import accuracy
from hasten.evidence.process import Worker
from hasten.evidence.quality import compared, no_better_than, quality
from hasten.evidence.requests import refusals, request_of, sized
from hasten.evidence.worker import ENGINE_FILE, write_inputs
from hasten.hardware.machine import machine_id
from hasten.stages import quantize
from hasten.stages.build import Built, build, plan
from hasten.stages.data import metrics, source, task
from hasten.stages.engine import engine_libraries, engine_sources
from hasten.stages.roofline import device_of, roofline
from hasten.stages.stage import Tools, declared, module_stage, read_notes, sources
from hasten.training.estimate import training_seconds

ACCURACY = "hasten.evidence.metrics.accuracy"
PROFILED_REQUESTS = 50
NO_REFERENCE = "alone"
REFERENCE = "reference"

BRIEFLY = latency.LatencyProtocol(min_rounds=5, max_rounds=12, precision=0.05)
"""For what an engine costs per call and operator: it explains a latency and decides nothing."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Builds recipes and measures them on the target.

    Attributes:
        looks: how many candidates may look at the validation rows; the quality bound is corrected for this number.
        seed: of the order in which participants are timed, and of every bootstrap.
    """

    store: Store
    target: Target
    objective: Objective
    looks: int
    seed: int
    progress: Progress = field(default_factory=Silent)
    checkpoint_seconds: float = 5.0
    protocol: latency.LatencyProtocol = field(default_factory=latency.LatencyProtocol)

    def evaluate(
        self, recipe: Recipe, *, references: Mapping[str, Built], baseline: Built | None
    ) -> tuple[Built, Evaluation, dict[str, float]]:
        """Builds a recipe and measures it.

        Args:
            references: `eager`, `engine`, `previous`: what its speed is compared with, in turns in one session.
            baseline: what its quality is compared with, row by row; None for the baseline itself.

        Returns:
            The finished stages, the evaluation, and the recorded seconds of each stage and measurement that it took, by
            its key, whoever spent them.

        Raises:
            HastenError: a stage refused, or an engine failed.
        """
        built = build(recipe, self.store, self._tools)
        qualities, outputs_entry = self._qualities(built, baseline)
        (name, leading), *_ = qualities.items()
        # An artefact is as fast as itself; measuring that would only show the noise.
        itself = [name for name, other in references.items() if other.compiled.key == built.compiled.key]
        others = {name: other for name, other in references.items() if name not in itself}
        stream = self._streams(built, others)
        pairs, seconds = self._latencies(built, others, stream=stream)
        first = requests = next(iter(pairs.values()))
        if stream:  # whose times are no latencies
            alone, more = self._latencies(built, {}, stream=False)
            requests, seconds = alone[NO_REFERENCE], seconds | more
        self._check_memory(first.memory_bytes[latency.CANDIDATE])
        compiled = read_json(built.compiled.folder / "compiled.json")
        emulated = locate(recipe.section("engine")["_target_"], "engine").emulates
        cost = self._cost(built)
        evaluation = Evaluation(
            metric=name,
            quality=leading.value,
            drop=leading.drop,
            metrics=qualities,
            latency_ms=latency.latency_ms(requests, self.objective.confidence),
            throughput=latency.throughput(first, self.objective.confidence),
            speedup={}
            if emulated
            else dict.fromkeys(itself, Interval(value=1.0, low=1.0, high=1.0)) | self._speedups(pairs),
            references_ms={} if emulated else self._references_ms(pairs),
            size_bytes=compiled["size_bytes"],
            memory_bytes=first.memory_bytes[latency.CANDIDATE],
            flops=sum(cost.flops.values()),
            num_parameters=cost.num_parameters,
            integer_share=compiled["integer_share"],
            starved=max(pair.num_starved / pair.num_rounds for pair in pairs.values()),
            notes=tuple(note for entry in built.entries.values() for note in read_notes(entry.folder)),
            emulated=emulated,
        )
        entries = (*built.entries.values(), outputs_entry)
        return built, evaluation, {entry.key: entry.seconds for entry in entries} | seconds

    def other_request(self, request: Request, built: Built, references: Mapping[str, Built]) -> RequestLatency:
        """How long a finished candidate takes for a request of `target.also`, in turns with its references.

        Raises:
            EngineError: an engine failed on it.
        """
        target = replace(self.target, batch_size=request.batch_size, length=request.length)
        itself = [name for name, other in references.items() if other.compiled.key == built.compiled.key]
        others = {name: other for name, other in references.items() if name not in itself}
        pairs, _ = replace(self, target=target)._latencies(built, others, stream=self._streams(built, others))
        first, confidence = next(iter(pairs.values())), self.objective.confidence
        return RequestLatency(
            batch_size=request.batch_size,
            length=request.length,
            latency_ms=latency.latency_ms(first, confidence),
            throughput=latency.throughput(first, confidence),
            speedup=dict.fromkeys(itself, Interval(value=1.0, low=1.0, high=1.0)) | self._speedups(pairs),
            references_ms=self._references_ms(pairs),
        )

    def baseline_seconds(self, recipe: Recipe) -> float:
        """What the baseline will cost: recorded where the store has a stage, else from a few measured training steps.

        Raises:
            ConfigError: the data can't be read or do not fit the model or the target's requests.
        """
        planned = {step.stage.name: step for step in plan(recipe, self.store)}
        recorded = sum(step.entry.seconds for step in planned.values() if step.entry is not None)
        rows = planned["data"].stage
        entry = self.store.build(
            rows.ingredients(recipe, {}), lambda folder: rows.make(recipe, {}, folder, self._tools)
        )
        prepared, node = read(entry.folder), recipe.section("model")
        if problems := list(refusals(self.target, prepared.inputs)):
            raise ConfigError(*problems)
        if planned["teacher"].entry is not None:
            return recorded
        model, _ = build_module(
            node["arch"], prepared.inputs, prepared.output_shape, seed=self.seed, facts=prepared.facts
        )
        if node["checkpoint"]:
            load_weights(model, Path(node["checkpoint"]), mapping=node["checkpoint_keys"])
        settings = TrainingSettings(**node["training"])
        if settings.epochs == 0:
            return 0.0
        step = Step.of(recipe.config["trainer"])
        return training_seconds(
            model,
            prepared.rows("train", limit=settings.batch_size * step.batch_factor),
            settings,
            task=task(recipe),
            num_rows=prepared.num_rows["train"],
            threads=recipe.config["trainer"]["threads"],
            accelerator=recipe.config["trainer"]["accelerator"],
            step=step,
        )

    def unfit(self, recipe: Recipe) -> str | None:
        """Why the recipe is not worth its trial, as far as the stages that are finished tell; else None.

        Its student can't take the rows, or its quantization reaches too few layers of the graph.
        """
        arch, quantizes = recipe.section("student").get("arch"), declared(recipe.section("quantization"))
        planned = plan(recipe, self.store) if arch or quantizes else []
        found = {step.stage.name: step.entry.folder for step in planned if step.entry is not None}
        if quantizes and "export" in found:
            return quantize.refusal(recipe, found["export"], found[module_stage(found)])
        return self._student_refusal(arch, found) if arch and {"data", "teacher"} <= found.keys() else None

    def _student_refusal(self, arch: Mapping[str, Any], found: Mapping[str, Path]) -> str | None:
        prepared = read(found["data"])
        shape = prepared.output_shape or output_shape(rebuild(found["teacher"]), prepared.inputs)
        try:
            build_module(arch, prepared.inputs, shape, seed=self.seed, facts=prepared.facts, key="student.arch")
        except ConfigError as error:
            return str(error)
        return None

    @property
    def _tools(self) -> Tools:
        return Tools(progress=self.progress, checkpoint_seconds=self.checkpoint_seconds)

    def profile(self, built: Built, evaluation: Evaluation) -> Profile:
        """Where a request's time goes on the target, and the bottleneck."""
        from hasten.profiling.bottleneck import profile
        from hasten.profiling.roofline import width

        compiled = read_json(built.compiled.folder / ENGINE_FILE)
        precision = compiled.get("precision", "float32")
        overhead = self._overhead(built.recipe, compiled)
        cost = self._cost(built)
        share = evaluation.integer_share or 0.0
        limit = self.objective.max_size_mb
        return profile(
            latency_ms=evaluation.latency_ms["p50"].value,
            operators=self._operators(built),
            cost={
                "kinds": {
                    kind: {"flops": cost.flops[kind], "bytes": cost.num_bytes[kind], "calls": cost.calls[kind]}
                    for kind in cost.calls
                },
                "weight_bytes": cost.weight_bytes,
            },
            roofline=roofline(self.store, self.target.threads, device_of(self.target)),
            call_us=overhead["call_us"],
            operator_us=overhead["operator_us"],
            weight_bytes=round(cost.weight_bytes * width(share, precision)),
            size_bytes=evaluation.size_bytes,
            size_limit_bytes=None if limit is None else round(limit * 1e6),
            batch_size=self.target.batch_size,
            integer_share=share,
            precision=precision,
        )

    def certify(self, baseline: Built, candidate: Built) -> Certificate:
        """Reads the test rows once, for the chosen candidate, and writes down that it did."""
        prepared, meaning = self._prepared(candidate), task(candidate.recipe)
        itself = baseline.compiled.key == candidate.compiled.key
        # The baseline held against itself selects nothing and learns nothing from the rows.
        reads = 0 if itself else Ledger(self.store.folder).record(prepared.test, candidate.compiled.key)
        before, after = (self._outputs(built, "test")[0] for built in (baseline, candidate))
        targets = self._targets(prepared, "test", meaning, before)
        labels = meaning.labels(targets)
        confidence = self.objective.confidence
        readings = {
            metric.name: Reading(
                baseline=quality(metric, before, targets, labels),
                candidate=compared(metric, before, after, targets, labels, confidence),
            )
            for metric in metrics(candidate.recipe)
        }
        nothing = self._nothing_to_certify(candidate.recipe, prepared, before, targets)
        return certify(readings, confidence=confidence, reads=reads, nothing=nothing)

    def _nothing_to_certify(
        self, recipe: Recipe, prepared: Prepared, before: NDArray[Any], targets: NDArray[Any]
    ) -> str | None:
        """Why keeping the baseline's quality would mean nothing on these rows; None where it means something."""
        meaning, confidence = task(recipe), self.objective.confidence
        if not source(recipe).real:
            return "Quality unchecked: there are no rows of real data"
        if not meaning.trains:
            return "Quality unchecked: the rows have no labels"
        first = metrics(recipe)[0]
        labels = meaning.labels(targets)
        if labels is not None and first.target == ACCURACY:
            return no_better_than_chance(accuracy(before, targets), labels, confidence)
        constant = meaning.constant(prepared.rows("train").targets, len(targets))
        return None if constant is None else no_better_than(first, constant, before, targets, confidence)

    def _check_memory(self, peak_bytes: int) -> None:
        """Holds a measurement to the target's limit, which may be a new one, or was passed for a moment only."""
        limit = self.target.memory_limit_mb
        if limit is not None and peak_bytes > limit * 1e6:
            allowed = f"target.memory_limit_mb={limit:g} allows {limit:.0f} MB"
            raise EngineError(f"serving took {peak_bytes / 1e6:.0f} MB of memory at its peak, {allowed}")

    def _speedups(self, pairs: Mapping[str, latency.Measurement]) -> dict[str, Interval]:
        compared = {name: pair for name, pair in pairs.items() if name != NO_REFERENCE}
        confidence = self.objective.confidence
        return {
            name: latency.speedups(pair, confidence, self.objective.speed)[REFERENCE] for name, pair in compared.items()
        }

    def _references_ms(self, pairs: Mapping[str, latency.Measurement]) -> dict[str, Interval]:
        compared = {name: pair for name, pair in pairs.items() if name != NO_REFERENCE}
        confidence = self.objective.confidence
        return {name: latency.latency_ms(pair, confidence, REFERENCE)["p50"] for name, pair in compared.items()}

    def _prepared(self, built: Built) -> Prepared:
        return read(built.data.folder)

    def _qualities(self, built: Built, baseline: Built | None) -> tuple[dict[str, Quality], Entry]:
        """Every metric on the validation rows, by name, and what the outputs cost."""
        meaning = task(built.recipe)
        outputs, entry = self._outputs(built, "validate")
        before = outputs if baseline is None else self._outputs(baseline, "validate")[0]
        targets = self._targets(self._prepared(built), "validate", meaning, before)
        labels = meaning.labels(targets)
        confidence = corrected(self.objective.confidence, self.looks)
        return {
            metric.name: quality(metric, outputs, targets, labels)
            if baseline is None
            else compared(metric, before, outputs, targets, labels, confidence)
            for metric in metrics(built.recipe)
        }, entry

    def _targets(self, prepared: Prepared, split: str, meaning: Task, baseline: NDArray[Any]) -> NDArray[Any]:
        """What outputs are compared with."""
        return baseline if meaning.learned_from == "baseline" else prepared.rows(split).targets

    def _outputs(self, built: Built, split: str) -> tuple[NDArray[np.float32], Entry]:
        """Outputs of the compiled artefact in its engine."""
        ingredients = Ingredients(
            stage="outputs",
            config={"split": split, "batch_size": self.target.batch_size},
            parents={"compile": built.compiled.key, "data": built.data.key},
            sources=sources("hasten.evidence.worker"),
        )

        def make(folder: Path) -> None:
            rows = self._prepared(built).rows(split)
            with (
                tempfile.TemporaryDirectory(prefix="hasten-") as scratch,
                Worker.of(self.target) as worker,
            ):
                inputs, outputs = Path(scratch) / "inputs.npz", Path(scratch) / "outputs.npy"
                write_inputs(inputs, rows.inputs.values())
                worker.load(built.compiled.folder)
                worker.predict(inputs, outputs, batch_size=self.target.batch_size)
                save_file({"outputs": np.load(outputs)}, folder / "outputs.safetensors")

        entry = self.store.build(ingredients, make)
        return load_file(entry.folder / "outputs.safetensors")["outputs"], entry

    def _streams(self, built: Built, references: Mapping[str, Built]) -> bool:
        """Whether throughput is optimised and an engine among them works on several requests at once."""
        nodes = [each.recipe.section("engine") for each in (built, *references.values())]
        return self.objective.speed == "mean" and any(locate(node["_target_"], "engine").streams for node in nodes)

    def _latencies(
        self, built: Built, references: Mapping[str, Built], *, stream: bool
    ) -> tuple[dict[str, latency.Measurement], dict[str, float]]:
        """One measurement for each pair of candidate and reference, and what measuring cost.

        All pairs that are missing are measured in one session, so that they share its rounds.
        """
        pairs: dict[str, Built | None] = {**references} or {NO_REFERENCE: None}
        ingredients = {name: self._pair(built, reference, stream) for name, reference in pairs.items()}
        missing = {
            name: reference
            for name, reference in pairs.items()
            if self.store.find("latency", ingredients[name].key) is None
        }
        session = _Session(
            self, built, {name: reference for name, reference in missing.items() if reference is not None}, stream
        )
        found, seconds = {}, {}
        for name in pairs:
            entry = self.store.build(ingredients[name], partial(session.write, name))
            found[name] = latency.Measurement.from_dict(read_json(entry.folder / "blocks.json"))
            seconds[entry.key] = entry.seconds
        return found, seconds

    def _pair(self, built: Built, reference: Built | None, stream: bool) -> Ingredients:
        return Ingredients(
            stage="latency",
            config={
                "batch_size": self.target.batch_size,
                "length": self.target.length,
                "threads": self.target.threads,
                "protocol": asdict(self.protocol),
                "seed": self.seed,
                **({"stream": True} if stream else {}),
            },
            parents={
                "candidate": built.compiled.key,
                "reference": reference.compiled.key if reference is not None else NO_REFERENCE,
                "data": built.data.key,
            },
            sources=sources("hasten.evidence.latency", "hasten.evidence.worker"),
            machine={"id": machine_id()},
        )

    def _request(self, built: Built) -> list[NDArray[Any]]:
        """Training rows as the target's request has them."""
        prepared = self._prepared(built)
        rows = prepared.rows("train", limit=self.target.batch_size).inputs
        return request_of(rows, prepared.inputs, self.target.request)

    def _cost(self, built: Built) -> GraphCost:
        """Of one row of the target's request."""
        export = built.entries["export"]
        if self.target.length is None:
            return read_cost(export.folder)
        ingredients = Ingredients(
            stage="cost",
            config={"length": self.target.length},
            parents={"export": export.key},
            sources=sources("hasten.artefacts.capture"),
            libraries=libraries("torch"),
        )

        def make(folder: Path) -> None:
            signature = Signature.from_dict(read_json(export.folder / "signature.json"))
            cut = replace(signature, inputs=sized(signature.inputs, self.target.length))
            write_json(folder / "cost.json", cost_of(rebuild(built.module.folder), cut).to_dict())

        return read_cost(self.store.build(ingredients, make).folder)

    def _operators(self, built: Built) -> list[OperatorTime]:
        """Times of the operators of one request, by the engine's own profiler."""
        ingredients = Ingredients(
            stage="operators",
            config={
                "batch_size": self.target.batch_size,
                "length": self.target.length,
                "threads": self.target.threads,
                "repeats": PROFILED_REQUESTS,
            },
            parents={"compile": built.compiled.key, "data": built.data.key},
            sources=sources("hasten.evidence.worker"),
            machine={"id": machine_id()},
        )

        def make(folder: Path) -> None:
            write_json(folder / "operators.json", self._profiled(built.compiled.folder, self._request(built)))

        entry = self.store.build(ingredients, make)
        return [OperatorTime(**values) for values in read_json(entry.folder / "operators.json")]

    def _profiled(self, compiled: Path, request: Sequence[NDArray[Any]]) -> list[dict[str, Any]]:
        pinned = Worker.of(self.target, latency.measuring_cpus(self.target.threads))
        with tempfile.TemporaryDirectory(prefix="hasten-") as scratch, pinned as worker:
            inputs = write_inputs(Path(scratch) / "request.npz", request)
            with latency.measuring_alone():
                return [asdict(operator) for operator in worker.operators(compiled, inputs, repeats=PROFILED_REQUESTS)]

    def _overhead(self, recipe: Recipe, node: Mapping[str, Any]) -> dict[str, float]:
        """What the recipe's engine, as it was compiled, costs per call and operator before it calculates anything."""
        ingredients = Ingredients(
            stage="overhead",
            config={
                "engine": dict(node),
                "threads": self.target.threads,
                "batch_size": self.target.batch_size,
                "protocol": asdict(BRIEFLY),
            },
            sources={**sources("hasten.stages.overhead"), **engine_sources(recipe)},
            libraries=engine_libraries(recipe),
            machine={"id": machine_id()},
        )

        def make(folder: Path) -> None:
            from hasten.stages.overhead import measure_overhead

            overhead = measure_overhead(node, self.target, BRIEFLY, self.seed)
            write_json(folder / "overhead.json", overhead.to_dict())

        overhead: dict[str, float] = read_json(self.store.build(ingredients, make).folder / "overhead.json")
        return overhead


class _Session:
    """Measures a candidate beside its references once, when the first pair is asked for, and hands out the pairs."""

    def __init__(self, evaluator: Evaluator, built: Built, references: Mapping[str, Built], stream: bool) -> None:
        self._evaluator = evaluator
        self._built = built
        self._references = references
        self._stream = stream

    def write(self, name: str, folder: Path) -> None:
        """Writes the blocks of the candidate and of that reference."""
        measured = self._measured
        blocks = {latency.CANDIDATE: measured.blocks_us[latency.CANDIDATE]}
        memory = {latency.CANDIDATE: measured.memory_bytes[latency.CANDIDATE]}
        if name != NO_REFERENCE:
            blocks[REFERENCE] = measured.blocks_us[self._participant(name)]
            memory[REFERENCE] = measured.memory_bytes[self._participant(name)]
        write_json(folder / "blocks.json", {**measured.to_dict(), "blocks_us": blocks, "memory_bytes": memory})

    def _participant(self, name: str) -> str:
        """Two references may be the same artefact; it takes part once."""
        return self._references[name].compiled.key

    @cached_property
    def _measured(self) -> latency.Measurement:
        evaluator = self._evaluator
        evaluator.progress.start("measuring", evaluator.protocol.max_rounds)
        try:
            return latency.measure(
                self._built.compiled.folder,
                {reference.compiled.key: reference.compiled.folder for reference in self._references.values()},
                evaluator.target,
                evaluator._request(self._built),
                evaluator.protocol,
                evaluator.seed,
                stream=self._stream,
                on_round=evaluator.progress.advance,
            )
        finally:
            evaluator.progress.stop()

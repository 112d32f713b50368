"""The ways in which so many processes can share a training, of which `distributed=auto` takes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hasten.core.errors import ConfigError
from hasten.core.schedules import unschedulable
from hasten.core.sections import Distributed, PipelineSchedule

SCHEDULES: tuple[PipelineSchedule, ...] = ("1F1B", "Interleaved1F1B")
"""Of a pipeline: with the fewest activations, and with a smaller bubble."""
PARTS_OF_PROCESS = 2
"""Micro-batches for each process of a pipeline, where the user leaves them at one."""
_ONLY_DDP = ("compression", "average_every")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to spread a training.

    Attributes:
        spread: with what the user typed.
        micro_batches: `trainer.micro_batches`.
    """

    spread: Distributed
    micro_batches: int

    @property
    def told(self) -> str:
        """In a few words, such as `hybrid pipeline=2 shards=2`."""
        spread, shape = self.spread, self.spread.mesh(self.spread.devices)
        words: list[str] = [spread.kind]
        if spread.kind == "hybrid" or (spread.kind == "fsdp" and shape.replicas > 1):
            words += [f"{name}={number}" for name, number in shape._asdict().items() if number > 1]
        if spread.kind == "ddp" and spread.compression != "none":
            words.append(spread.compression)
        if shape.pipeline > 1:
            words += [spread.schedule, f"micro_batches={self.micro_batches}"]
        return " ".join(words)

    def overrides(self, typed: Mapping[str, Any], micro_batches: int) -> tuple[str, ...]:
        """That choose it.

        Args:
            typed: what the user typed of the group `distributed`.
            micro_batches: that the recipe has.
        """
        stated = {**typed, **_stated(self.spread), "devices": self.spread.devices}
        told = [f"distributed.{name}={_spelt(value)}" for name, value in stated.items()]
        more = [] if self.micro_batches == micro_batches else [f"trainer.micro_batches={self.micro_batches}"]
        return (f"distributed={self.spread.kind}", *told, *more)


def _stated(spread: Distributed) -> dict[str, Any]:
    names = {
        "ddp": ("compression",),
        "fsdp": ("shards",),
        "tensor": ("tensor",),
        "pipeline": ("pipeline", "schedule"),
        "hybrid": ("pipeline", "shards", "tensor", "schedule"),
    }
    return {name: getattr(spread, name) for name in names.get(spread.kind, ())}


def _spelt(value: Any) -> str:
    """As the command line has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A layout and what is expected of it.

    Attributes:
        layout: in a few words.
        overrides: that choose it.
        devices: processes.
        process_bytes: of the process that needs most.
        step_ms: of the whole step.
        parts_ms: the same by what it goes to.
        seconds: of all trainings of the recipe.
        refused: why it can't be taken; empty where it can.
    """

    layout: str
    overrides: tuple[str, ...]
    devices: int
    process_bytes: float | None = None
    step_ms: float | None = None
    parts_ms: Mapping[str, float] | None = None
    seconds: float | None = None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Weighed:
        known = {each.name: values[each.name] for each in fields(cls)}
        return cls(**{**known, "overrides": tuple(known["overrides"])})


def layouts(auto: Distributed, devices: int, typed: Sequence[str], *, micro_batches: int) -> Iterator[Layout]:
    """One process alone, and every layout of so many processes that agrees with what the user typed.

    What changes how a model learns is taken only where it is typed: PowerSGD and `average_every`.

    Args:
        auto: the group as the user has it.
        typed: names of its knobs that the user typed, whose values stay.
        micro_batches: `trainer.micro_batches`; a pipeline takes more where there is one alone.
    """
    for kind, knobs in _kinds(devices):
        if not all(_agrees(getattr(auto, name), knobs[name]) for name in typed if name in knobs and name != "devices"):
            continue
        if kind != "ddp" and any(getattr(auto, name) != getattr(Distributed, name) for name in _ONLY_DDP):
            continue
        try:
            spread = replace(auto, kind=kind, **knobs)
        except ConfigError:
            continue
        if spread.mesh(spread.devices).pipeline == 1:
            yield Layout(spread=spread, micro_batches=micro_batches)
            continue
        for schedule in [auto.schedule] if "schedule" in typed else SCHEDULES:
            pipeline = spread.mesh(spread.devices).pipeline
            parts = micro_batches if micro_batches > 1 else PARTS_OF_PROCESS * pipeline
            if unschedulable(schedule, pipeline, parts) is None:
                yield Layout(spread=replace(spread, schedule=schedule), micro_batches=parts)


def _agrees(typed: Any, value: Any) -> bool:
    """0 leaves to a dimension whatever there is."""
    return bool(typed == value or (typed == 0 and value > 1))


def _kinds(devices: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Kind and what it divides, for so many processes."""
    yield "single", {"devices": 1, "pipeline": 1, "shards": 1, "tensor": 1}
    if devices == 1:
        return
    whole = {"devices": devices, "pipeline": 1, "shards": 1, "tensor": 1}
    for compression in ("none", "bfloat16"):
        yield "ddp", {**whole, "compression": compression}
    for pipeline, shards, tensor in _shapes(devices):
        knobs = {"devices": devices, "pipeline": pipeline, "shards": shards, "tensor": tensor}
        dividing = [name for name in ("pipeline", "shards", "tensor") if knobs[name] > 1]
        replicas = devices // (pipeline * shards * tensor)
        if dividing == ["shards"]:
            yield "fsdp", knobs
        elif len(dividing) == 1 and replicas == 1:
            yield dividing[0], knobs
        elif dividing:
            yield "hybrid", knobs


def _shapes(devices: int) -> Iterator[tuple[int, int, int]]:
    """Of pipeline, shards and tensor, whose product divides the processes; what is left are replicas."""
    for pipeline in _divisors(devices):
        for tensor in _divisors(devices // pipeline):
            for shards in _divisors(devices // pipeline // tensor):
                yield pipeline, shards, tensor


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]

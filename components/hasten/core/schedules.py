"""In which order the processes of a pipeline take the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hasten.core.sections import Distributed, PipelineSchedule

TWO_STAGES = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Schedules in which each process has two stages of the model."""
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""Of those: the first process has the first and the last stage, the last process the two in the middle."""
WEIGHTS_APART = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Schedules that calculate the gradients of weights apart from those of inputs, to fill what would be idle time."""


def num_stages(schedule: PipelineSchedule, processes: int) -> int:
    """Into how many the layers are divided."""
    return 2 * processes if schedule in TWO_STAGES else processes


def stages_of(schedule: PipelineSchedule, processes: int, process: int) -> tuple[int, ...]:
    """Numbers of the stages that one of the processes has, ascending."""
    if schedule not in TWO_STAGES:
        return (process,)
    return process, 2 * processes - 1 - process if schedule in V_SHAPED else process + processes


def unschedulable(schedule: PipelineSchedule, processes: int, micro_batches: int) -> str | None:
    """Why a step can't have so many micro-batches; None where it can."""
    chosen, given = f"distributed.schedule={schedule}", f"trainer.micro_batches={micro_batches}"
    fewest = {"1F1B": processes, "DualPipeV": 2 * processes}.get(schedule, 1)
    if micro_batches < fewest:
        return f"{chosen} needs a micro-batch for each of {fewest} stages, and {given}"
    rounds = max(1, micro_batches // processes)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and micro_batches % rounds:
        return (
            f"{chosen} takes the micro-batches in {rounds} equal rounds for {processes} processes, and {given}: "
            f"{micro_batches - micro_batches % processes} can be divided"
        )
    return None


def unfit_for_stages(config: Mapping[str, Any], spread: Distributed) -> Iterator[str]:
    """Why trainings can't be divided into the stages of a pipeline like that; nothing where they are not.

    Args:
        config: the whole one.
    """
    shape, schedule, trainer = spread.mesh(spread.devices), spread.schedule, config["trainer"]
    if shape.pipeline == 1:
        return
    chosen, pipeline = f"distributed.schedule={schedule}", f"distributed.pipeline={shape.pipeline}"
    if reason := unschedulable(schedule, shape.pipeline, trainer["micro_batches"]):
        yield reason
    if schedule in WEIGHTS_APART and shape.shards > 1:
        yield (
            f"{chosen} can't be combined with distributed.shards={shape.shards}, which collects gradients in backward "
            "passes that it divides: distributed.schedule=1F1B, or shards=1"
        )
    if (mode := trainer["compile"]) != "none":
        yield f"{pipeline} can't be combined with trainer.compile={mode}, which compiles one stage after the other"
    if (budget := trainer["activation_budget_mb"]) is not None:
        yield f"{pipeline} can't be combined with trainer.activation_budget_mb={budget:g}: no process has all layers"
    if spread.sequence_parallel:
        yield f"{pipeline} can't be combined with distributed.sequence_parallel=true, which hands on parts of sequences"
    sections = {name: config[name] for name in ("model", "student", "pruning", "quantization")}
    for section, node in (sections | {"distillation.assistant": config["distillation"].get("assistant") or {}}).items():
        training = node.get("training") or {}
        if training.get("epochs") and (patience := training.get("patience")) is not None:
            yield (
                f"{pipeline} can't be combined with {section}.training.patience={patience}: no process has the whole "
                "model, to judge rows that are held out"
            )
    if layers := config["distillation"].get("student_layers"):
        yield (
            f"{pipeline} can't be combined with distillation.student_layers={', '.join(layers)}: each process has some "
            "layers only"
        )

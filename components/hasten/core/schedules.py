"""In which order the processes of a pipeline take the micro-batches of a step."""

from __future__ import annotations

from hasten.core.sections import PipelineSchedule

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

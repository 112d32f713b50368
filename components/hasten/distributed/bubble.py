"""How long processes of a pipeline wait for one another."""

from __future__ import annotations

from hasten.core.sections import PipelineSchedule


def bubble_share(schedule: PipelineSchedule, stages: int, micro_batches: int) -> float:
    """Share of a step's time, in [0, 1), in which a process of a pipeline has nothing to do.

    In closed form, for stages of equal cost, a backward pass of twice the time of a forward pass, half of it for the
    gradients of the inputs, and without communication. It is the order of PyTorch's schedules, idle time counted until
    the last process has ended, for no weight is updated before. GPipe and 1F1B: Huang et al. 2019 and Narayanan et al.
    2021. With two stages a process (Interleaved1F1B; LoopedBFS, Lamy-Poirier 2023) the time to fill and drain is
    halved. Where gradients of weights fill the gaps (InterleavedZeroBubble, ZBVZeroBubble: Qi et al. 2024; DualPipeV:
    DeepSeek-AI 2024) one forward pass of a stage for each process but the first is left.

    Args:
        stages: processes of the pipeline, at least 1.
        micro_batches: of a step, at least 1.
    """
    others, missing = stages - 1, max(0, stages - micro_batches)
    if schedule in ("GPipe", "1F1B"):
        return others / (micro_batches + others)
    # In forward passes of one of a process' two stages; the work of a micro-batch is six of them.
    if schedule in ("Interleaved1F1B", "LoopedBFS"):
        idle = 3 * (others + missing)
    elif schedule == "InterleavedZeroBubble":
        idle = others + 2 * missing + max(0, stages - 2 * micro_batches)
    else:
        idle = max(others, 4 * stages - 2 - 2 * micro_batches)
    return idle / (6 * micro_batches + idle)

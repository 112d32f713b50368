"""A model whose layers are divided among processes that hand on micro-batches, by PyTorch's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor

from hasten.core.errors import PassError
from hasten.core.files import read_json, write_json
from hasten.core.schedules import TWO_STAGES, WEIGHTS_APART, num_stages, stages_of
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.distributed.group import Group
from hasten.distributed.pipeline_cut import Plan, planned
from hasten.distributed.pipeline_trace import Cut, Traced
from hasten.distributed.sharded import sharded

CUT = "cut.json"
"""File beside the checkpoints: a training that is started again is cut alike, so that it adds in the same order."""

Context = Callable[[], AbstractContextManager[object]]
Phase = Callable[[str], AbstractContextManager[object]]
Judge = Callable[[Tensor, slice], tuple[Tensor, Tensor | int]]
"""Loss of a micro-batch's outputs and how many rows are right, given which rows they are."""


def agreed_plan(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    group: Group,
    *,
    folder: Path,
    identity: str,
    inside: Context,
    plan: TensorPlan,
    what: str,
) -> Plan:
    """Where all processes cut a model; the first measures, unless there is a cut of the same training already.

    Args:
        inputs: of a micro-batch.
        folder: of the checkpoints, where the cut is kept.
        identity: of the training.
        inside: the context of forward passes, such as autocast.
        plan: by which layers are divided among processes.
        what: is cut, for errors.

    Raises:
        PassError: on all processes: the model can't be cut.
    """
    stages = num_stages(group.spread.schedule, group.shape.pipeline)
    told: Plan | str = ""
    if group.rank == 0:
        try:
            told = planned(
                model,
                inputs,
                stages,
                cut=_kept(folder / CUT, identity),
                inside=inside,
                seconds=group.spread.timeout_seconds / 4,  # the others wait for it
                plan=plan if group.shape.tensor > 1 else WHOLE,
                what=what,
            )
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / CUT, {"identity": identity, **told.cut._asdict()})
        except PassError as error:
            told = str(error)
    told = group.agreed(told)
    if isinstance(told, str):
        raise PassError(told)
    return told


def _kept(file: Path, identity: str) -> Cut | None:
    if not file.exists():
        return None
    kept = read_json(file)
    return Cut(opened=tuple(kept["opened"]), before=tuple(kept["before"])) if kept["identity"] == identity else None


class Pipeline:
    """This process' stages of a model, and how they train with those of the others.

    Args:
        model: whole, in training mode; its modules become those of the stages.
        names: of its inputs.
        plan: how it is cut, the same for all processes.
        micro_batches: of a step.
        inside: the context of forward passes, such as autocast.
        laid_out: gives a tensor that a stage takes the layout that its kernels like.
        seed: of random changes of inputs.

    Attributes:
        part: the modules of this process' stages under their names in the model.
        told: a sentence about where it is cut.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        plan: Plan,
        group: Group,
        *,
        micro_batches: int,
        inside: Context = nullcontext,
        laid_out: Callable[[Tensor], Tensor] = lambda values: values,
        seed: int = 0,
    ) -> None:
        self._group, self._seed = group, seed
        schedule, processes = group.spread.schedule, group.shape.pipeline
        traced = Traced(model, names, plan.cut.opened)
        borders, graphs = traced.borders(plan.cut), traced.stages(plan.cut, plan.given)
        self.told = (
            f"The layers are in {len(graphs)} stages, cut before {', '.join(plan.cut.before)} (names of blocks)."
        )
        self._held = stages_of(schedule, processes, group.stage_rank)
        self.part = _part(model, [graphs[number] for number in self._held])
        self._neighbours = group.mesh["pipeline"].get_group()
        self._modules = [
            _StageModule(
                graphs[number],
                overwrites=plan.overwrites[number],
                apart=schedule in WEIGHTS_APART,
                last=number == len(graphs) - 1,
                inside=inside,
                laid_out=laid_out,
            )
            for number in self._held
        ]
        self._stages = [
            _Stage(
                module,
                number,
                len(graphs),
                torch.device("cpu"),
                # With their shapes given, nothing is run to find them out, which would change statistics of batches.
                input_args=tuple(each.example() for each in traced.taken(borders[number], plan.given)),
                output_args=tuple(each.example() for each in traced.taken(borders[number + 1], plan.given)),
                group=self._neighbours,
            )
            for number, module in zip(self._held, self._modules, strict=True)
        ]
        self._first, self._last = 0 in self._held, len(graphs) - 1 in self._held
        self._schedule = get_schedule_class(schedule)(
            self._stages if schedule in TWO_STAGES else self._stages[0],
            n_microbatches=micro_batches,
            loss_fn=self._loss,
            scale_grads=False,
        )
        owners = [process for process in range(processes) if len(graphs) - 1 in stages_of(schedule, processes, process)]
        self._teller = dist.get_process_group_ranks(self._neighbours)[owners[0]]
        self._judge: Judge | None = None
        self._correct: list[Tensor | int] = []

    def spread(self) -> None:
        """Divides the parameters of the stages in place among the shards of the group, where there are any."""
        if self._group.shape.shards > 1:
            for stage in self._modules:
                graph = stage.graph
                targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
                leaves = dict.fromkeys(map(graph.get_submodule, targets))
                large = [leaf for leaf in leaves if any(each.ndim > 1 for each in leaf.parameters())]
                sharded(stage, self._group, [[leaf] for leaf in large])

    def step(self, inputs: Sequence[Tensor], judge: Judge, phase: Phase) -> tuple[Tensor, Tensor]:
        """Forward and backward passes of all micro-batches, after which the gradients are those of all rows.

        Args:
            inputs: of the model (B, ...), the same on all processes of the pipeline.
            judge: gives the loss whose gradients are wanted; their sum is told.
            phase: told of what begins and ends.

        Returns:
            Sum of losses and of rows that are right, on every process.
        """
        num_rows = len(inputs[0])
        for stage in self._stages:
            stage.phase = phase
        self._judge, self._correct = judge, []
        losses: list[Tensor] = []
        self._schedule.step(
            *(inputs if self._first else ()),
            return_outputs=False,
            **({"target": torch.arange(num_rows), "losses": losses} if self._last else {}),
        )
        outcome = torch.zeros(2, dtype=torch.float64)
        if self._last:
            outcome[0] = torch.stack([loss.detach() for loss in losses]).sum()
            outcome[1] = sum(self._correct)
        dist.broadcast(outcome, self._teller, group=self._neighbours)
        self._average()
        return outcome[0], outcome[1]

    def _loss(self, outputs: Tensor, numbers: Tensor) -> Tensor:
        assert self._judge is not None
        loss, correct = self._judge(outputs, slice(int(numbers[0]), int(numbers[-1]) + 1))
        self._correct.append(correct)
        return loss

    def _average(self) -> None:
        """Lets the gradients be the mean over those with other rows."""
        shape = self._group.shape
        number = shape.data
        if number == 1 or shape.shards > 1:  # those are averaged while the backward pass goes on
            return
        gradients = [_local(each.grad) for each in self.part.parameters() if each.grad is not None]
        for bucket in _buckets(gradients, int(self._group.spread.bucket_mb * 2**20)):
            flat = torch.cat([each.flatten() for each in bucket])
            dist.all_reduce(flat, group=self._group.rows_group)
            flat /= number
            for each, mean in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
                each.copy_(mean.view_as(each))

    def same_draws(self, step: int) -> AbstractContextManager[None]:
        """Where all processes of the pipeline draw the same from torch's generator, which is left as it was."""
        return drawing(self._seed, self._group.rows_rank, step)


@contextmanager
def drawing(*numbers: int) -> Iterator[None]:
    """Where torch's generator gives what belongs to these numbers, whatever was drawn before; it is left as it was."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed[0] >> np.uint64(1)))
        yield


class _Stage(PipelineStage):
    """A stage that tells what it does."""

    phase: Phase

    def forward_one_chunk(self, *arguments: Any, **knobs: Any) -> Any:
        with self.phase("forward"):
            return super().forward_one_chunk(*arguments, **knobs)

    def backward_one_chunk(self, *arguments: Any, **knobs: Any) -> None:
        with self.phase("backward"):
            super().backward_one_chunk(*arguments, **knobs)

    def backward_weight_one_chunk(self, *arguments: Any, **knobs: Any) -> None:
        with self.phase("backward"):
            super().backward_weight_one_chunk(*arguments, **knobs)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Sends contiguous tensors only, as all backends want; a gradient comes in the layout that its layer likes."""
        if gradients := self.bwd_cache.get(bwd_chunk_id):
            self.bwd_cache[bwd_chunk_id] = tuple(None if each is None else each.contiguous() for each in gradients)
        return super().get_bwd_send_ops(bwd_chunk_id)


class _StageModule(nn.Module):
    """A stage's graph as it is calculated; what it gives is contiguous and its own, so that it can be sent."""

    def __init__(
        self,
        graph: fx.GraphModule,
        *,
        overwrites: bool,
        apart: bool,
        last: bool,
        inside: Context,
        laid_out: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.graph = graph
        self._overwrites, self._apart, self._last = overwrites, apart, last
        self._inside, self._laid_out = inside, laid_out

    def forward(self, *values: Tensor) -> Any:
        if self._overwrites:
            values = tuple(value.clone() for value in values)
        with self._inside():
            outputs = self.graph(*map(self._laid_out, values))
        if self._last:
            return outputs.float()
        return tuple(self._own(output, values) for output in outputs)

    def _own(self, output: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The output as a contiguous tensor that is none of what the stage took, nor looks into another.

        Where gradients of weights are calculated apart, PyTorch detaches it in place before, so it must not be what
        they are calculated from, either.
        """
        taken = any(output is value for value in values) or (self._apart and output.requires_grad)
        if output.is_contiguous() and not output._is_view() and not taken:
            return output
        return output.clone(memory_format=torch.contiguous_format)


def _part(model: nn.Module, stages: Sequence[fx.GraphModule]) -> nn.Module:
    """What the stages use of a model, under the same names."""
    part = nn.Module()
    nodes = [node for stage in stages for node in stage.graph.nodes]
    for kind in ("call_module", "get_attr"):
        for name in sorted({str(node.target) for node in nodes if node.op == kind}):
            _add(part, model, name)
    return part.train()


def _add(part: nn.Module, model: nn.Module, name: str) -> None:
    *path, last = name.split(".")
    place, original = part, model
    for each in path:
        if each not in place._modules:
            place.add_module(each, nn.Module())
        place, original = place.get_submodule(each), original.get_submodule(each)
    value = getattr(original, last)
    if hasattr(place, last):
        return
    if isinstance(value, nn.Module):
        place.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        place.register_parameter(last, value)
    elif isinstance(value, Tensor):
        place.register_buffer(last, value, persistent=last not in original._non_persistent_buffers_set)


def _local(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(tensors: Sequence[Tensor], size_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors in lists of about so many bytes."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        bucket.append(tensor)
        held += tensor.nbytes
        if held >= size_bytes:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket

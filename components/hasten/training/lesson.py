"""What a student is taught, and by whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hasten.artefacts.module import forward
from hasten.artefacts.wrapper import inner
from hasten.core.interfaces import Distillation, Task
from hasten.distributed.data_parallel import averaged
from hasten.distributed.group import Group
from hasten.training.layers import LayerOutputs


def mean_answer(outputs: Sequence[Tensor]) -> Tensor:
    """What several teachers say together (B, *output_shape): the mean of their outputs.

    Of logits it is, at every temperature, the normalised geometric mean of the teachers' distributions, which Hinton,
    Vinyals and Dean 2015 name as soft targets of an ensemble; Ba and Caruana 2014 match it directly. So the mean is
    taken once, whatever the loss.
    """
    return outputs[0] if len(outputs) == 1 else torch.stack(list(outputs)).mean(0)


class Lesson(nn.Module):
    """A distillation loss with those who teach. Its parameters are the projections, which learn with the student.

    Args:
        loss: the distillation.
        student: is followed in its forward passes where the loss names layers, until `close`.
        teachers: in eval mode. Their mean answers what has no stored answer; layers are those of the first. They are no
            part of what is trained and kept in checkpoints.
        rows: a few rows of every input, to see what shapes the layers give.
        seed: of the projections' initial weights; torch's generator is left as it was, so that the student draws what
            it draws without them.

    Raises:
        ConfigError: the student or the teacher has no such layer, or the loss can't compare what the layers give.
    """

    def __init__(
        self,
        loss: Distillation,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        rows: Mapping[str, Tensor],
        seed: int,
    ) -> None:
        super().__init__()
        self.loss, self._teachers = loss, tuple(teachers)
        self.projections = nn.ModuleList()
        self._followed: tuple[LayerOutputs, ...] = ()
        student_layers, teacher_layers = loss.layers
        if student_layers:
            first = self._teachers[0]
            follow = (
                LayerOutputs(inner(student), student_layers, "student"),
                LayerOutputs(first, teacher_layers, "teacher"),
            )
            self._followed = follow
            shapes = _shapes(student, follow[0], rows), _shapes(first, follow[1], rows)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.projections = nn.ModuleList(loss.projections(*shapes))

    def forward(
        self, inputs: Mapping[str, Tensor], outputs: Tensor, answers: Tensor | None, targets: Tensor, task: Task
    ) -> Tensor:
        """Mean loss of a batch, a scalar, after the student's forward pass.

        Args:
            inputs: of the batch, as the student got them: whoever is asked sees the very same rows.
            outputs: of the student (B, *output_shape).
            answers: of the teacher, where they were stored.
        """
        if answers is None:
            answers = self._ask(inputs)
        loss = self.loss.loss(outputs, answers, targets, task)
        if self._followed:
            # In float32, as all of the loss, where the student's layers calculate in half precision.
            student, teacher = ([given.float() for given in each.take()] for each in self._followed)
            loss = loss + self.loss.layer_loss(student, teacher, list(self.projections))
        return loss

    def average(self, group: Group) -> None:
        """Lets the projections learn from the rows of all processes."""
        learn = [any(weight.requires_grad for weight in each.parameters()) for each in self.projections]
        self.projections = nn.ModuleList(
            averaged(each, group) if learns else each for each, learns in zip(self.projections, learn, strict=True)
        )

    def teach_on(self, device: torch.device) -> None:
        """Moves the teachers to the student's device; they are none of the modules that go there with the lesson."""
        for teacher in self._teachers:
            teacher.to(device)

    def close(self) -> None:
        """Leaves student and teacher without hooks, and the teachers on the CPU."""
        for each in self._followed:
            each.close()
        self.teach_on(torch.device("cpu"))

    def _ask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return mean_answer([forward(teacher, inputs) for teacher in self._teachers])


def _shapes(model: nn.Module, layers: LayerOutputs, rows: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """Of what the layers give; in eval mode, so that it leaves no trace in statistics of batches."""
    training = model.training
    with torch.no_grad():
        forward(model.eval(), rows)
    model.train(training)
    return [tuple(given.shape) for given in layers.take()]

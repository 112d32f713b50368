"""When to stop: rows that are not trained on say so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.distributed.group import Group
from hasten.training.batches import Batches
from hasten.training.module import Learner

CURVE = "held_out_loss"


class HeldOut(pl.Callback):  # type: ignore[misc]
    """Judges every epoch by its loss on held-out rows and keeps the best weights (Prechelt 1998).

    It stops after `patience` epochs in a row that were no better. All that it knows is part of the checkpoint, and it
    judges before the checkpoint of an epoch's last step is written, so that a resumed training stops where an
    undisturbed one does.

    Args:
        rows: that are not trained on.
        batch_size: rows that are judged at a time.
        steps_per_epoch: steps after which it judges.
        patience: epochs.
        group: of processes that train together, which all go by the first's judgement; None for one alone.
    """

    def __init__(
        self, rows: Batches, *, batch_size: int, steps_per_epoch: int, patience: int, group: Group | None = None
    ) -> None:
        self._rows, self._batch_size = rows, batch_size
        self._steps_per_epoch, self._patience, self._group = steps_per_epoch, patience, group
        self._least, self._waited = math.inf, 0
        self._best: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"least": self._least, "waited": self._waited, "best": self._best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._least, self._waited, self._best = (state_dict[name] for name in ("least", "waited", "best"))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_done(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        if trainer.global_step % self._steps_per_epoch:
            return
        assert isinstance(pl_module, Learner)
        loss = mean_loss(pl_module, self._rows, self._batch_size)
        if self._group is not None:
            loss = self._group.agreed(loss)
        pl_module.curves.setdefault(CURVE, []).append(loss)
        if loss < self._least:
            self._least, self._waited = loss, 0
            self._best = {name: value.clone() for name, value in pl_module.model.state_dict().items()}
        else:
            self._waited += 1
        self._stop_if_done(trainer)

    def restore(self, model: nn.Module) -> None:
        """Gives the model its best weights; those it has where no epoch had a finite loss."""
        if self._best:
            model.load_state_dict(self._best)

    def _stop_if_done(self, trainer: pl.Trainer) -> None:
        if self._waited >= self._patience:
            trainer.should_stop = True


def mean_loss(learner: Learner, rows: Batches, batch_size: int) -> float:
    """Mean over rows of the loss that the learner minimises, in float32, in eval mode and without random changes."""
    sizes, losses = [], []
    learner.model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            numbers = np.arange(start, min(start + batch_size, len(rows)))
            batch = tuple(values.to(learner.device) for values in rows.__getitems__(numbers))
            losses.append(learner.loss(batch).item())
            sizes.append(len(numbers))
    learner.model.train()
    return math.fsum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)


def divide(num_rows: int, share: float, seed: int, *, in_order: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows that judge, both ascending and at least one each.

    Args:
        num_rows: at least 2.
        share: of the rows that judge, in (0, 1).
        in_order: the last rows judge; drawn at random they would be neighbours of rows that are trained on.
    """
    count = min(max(1, round(share * num_rows)), num_rows - 1)
    order = np.arange(num_rows)
    if not in_order:
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).numpy()
    return np.sort(order[:-count]), np.sort(order[-count:])

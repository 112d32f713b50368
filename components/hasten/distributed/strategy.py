"""A group of processes as Lightning sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from hasten.distributed.checkpoint import State, Writing, divided, load, names, read_index, read_own
from hasten.distributed.group import Group
from hasten.distributed.state import optimizer_settings, optimizer_tensors, restore_optimizer, room, schedule_for

_MODEL = "module."


class GroupStrategy(DDPStrategy):  # type: ignore[misc]
    """Processes that have met already and whose model averages its gradients itself.

    Lightning's own strategy would wrap the whole module, and drops hooks of its communication on a CPU.

    In its checkpoints tensors have the names of the model, so that processes in another layout can go on from them. A
    callback keeps what belongs to its process alone where it has an attribute `of_this_process`; of the others the
    first process' are kept, and mappings to tensors have the names of the model's state and are shares as it is.

    Attributes:
        writing: of checkpoints in the background.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
        self._group = group
        self.writing = Writing(group)

    def configure_ddp(self) -> None:
        """Leaves the module as it is."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The state is read into the optimizer, which is made by then."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Begins to write a checkpoint; `writing` goes on with it."""
        of_model, others = divided(checkpoint["state_dict"])
        tensors = {_MODEL + name: tensor for name, tensor in of_model.items()}
        of_optimizers = optimizer_tensors(self.lightning_module, self.optimizers)
        tensors |= of_optimizers
        own, common = {}, {}
        for callback in self.lightning_module.trainer.callbacks:
            key = callback.state_key
            kept = checkpoint["callbacks"].get(key, {})
            if getattr(callback, "of_this_process", False):
                own[key] = kept
                continue
            common[key] = dict(kept)
            for field, values in kept.items():
                if _are_tensors(values):
                    common[key][field] = _Shares.MARK
                    tensors |= {_Shares.name(key, field, name): value for name, value in values.items()}
        told = {
            **checkpoint,
            "state_dict": others,
            "callbacks": common,
            "optimizer_states": [optimizer_settings(optimizer) for optimizer in self.optimizers],
        }
        # Where processes go steps of their own, they average their weights, and never what their optimizers know.
        apart = dict(of_optimizers) if self._group.spread.average_every > 1 else {}
        of_process = {"callbacks": own, "optimizers": apart}
        self.writing.start(Path(filepath), State(tensors=tensors, own=of_process, common=told))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fills the model and the optimizer, and gives what else Lightning wants to know.

        Raises:
            HastenError: the checkpoint is torn or altered, or of another model.
        """
        folder, module = Path(checkpoint_path), self.lightning_module
        checkpoint: dict[str, Any] = read_index(folder)["common"]
        own, as_before = read_own(folder, self._group)
        written = names(folder)
        of_optimizers = room(module, written)
        of_model, _ = divided(module.state_dict())
        tensors = {_MODEL + name: tensor for name, tensor in of_model.items()} | of_optimizers
        for key, kept in checkpoint["callbacks"].items():
            for field, values in kept.items():
                if values == _Shares.MARK:
                    kept[field] = {}
                    for name, tensor in divided(module.model.state_dict())[0].items():
                        if (full := _Shares.name(key, field, name)) in written:
                            tensors[full] = kept[field][name] = torch.zeros_like(tensor)
        load(folder, tensors)
        if as_before:
            of_optimizers |= own["optimizers"]
        for optimizer, settings in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            restore_optimizer(module, optimizer, of_optimizers, settings)
        checkpoint["lr_schedulers"] = [
            schedule_for(state, len(config.scheduler.optimizer.param_groups))
            for config, state in zip(self.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True)
        ]
        checkpoint["callbacks"] |= own["callbacks"]
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """What is no tensor; the tensors are there already."""
        if checkpoint["state_dict"]:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """It is there already."""


class _Shares:
    """Tensors that a callback keeps of the model."""

    MARK = "tensors"

    @staticmethod
    def name(callback: str, field: str, name: str) -> str:
        return f"callback.{callback}.{field}.{name}"


def _are_tensors(values: Any) -> bool:
    return isinstance(values, Mapping) and any(isinstance(value, Tensor) for value in values.values())

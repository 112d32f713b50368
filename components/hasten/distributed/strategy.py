"""A group of processes as Lightning sees it."""

from __future__ import annotations

from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy


class GroupStrategy(DDPStrategy):  # type: ignore[misc]
    """Processes that have met already and whose model averages its gradients itself.

    Lightning's own strategy would wrap the whole module, and drops hooks of its communication on a CPU.
    """

    def __init__(self) -> None:
        super().__init__(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")

    def configure_ddp(self) -> None:
        """Leaves the module as it is."""

"""Loss scaling for gradients in float16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from pytorch_lightning.plugins import MixedPrecision


class LossScaling(MixedPrecision):  # type: ignore[misc]
    """Scales the loss so that small gradients do not vanish in float16 (Micikevicius et al. 2018, section 3.2).

    A step whose gradients overflow is left out and the scale halved. The scale is part of the checkpoint. What runs in
    float16 is not its business (`training.step`): the loss stays in float32.

    Args:
        device: type of the device that trains, such as `cpu`.
    """

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device)

    def forward_context(self) -> AbstractContextManager[None]:
        return nullcontext()

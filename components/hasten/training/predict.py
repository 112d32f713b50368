"""Outputs of a model for many rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hasten.artefacts.module import forward
from hasten.core.interfaces import Columns
from hasten.core.sections import Accelerator
from hasten.training.device import device_of


def predict(
    model: nn.Module, inputs: Columns, batch_size: int, accelerator: Accelerator = "cpu"
) -> NDArray[np.float32]:
    """Outputs (B, *output_shape) in eval mode, a batch at a time; the model's own mode is left as it was.

    Args:
        model: on the CPU, where it is afterwards, too.
        accelerator: that calculates.
    """
    device = device_of(accelerator)
    training = {module: module.training for module in model.modules()}
    batches = zip(*(torch.split(torch.from_numpy(values), batch_size) for values in inputs.values()), strict=True)
    try:
        model.eval().to(device)
        with torch.inference_mode():
            moved = (dict(zip(inputs, (values.to(device) for values in batch), strict=True)) for batch in batches)
            parts = [forward(model, batch).cpu() for batch in moved]
            outputs: NDArray[np.float32] = torch.cat(parts).numpy()
            return outputs
    finally:
        model.cpu()
        for module, mode in training.items():
            module.training = mode

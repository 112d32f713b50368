"""Outputs of a model for many rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hasten.artefacts.module import forward
from hasten.core.interfaces import Columns


def predict(model: nn.Module, inputs: Columns, batch_size: int) -> NDArray[np.float32]:
    """Outputs (B, *output_shape) in eval mode, a batch at a time; the model's own mode is left as it was."""
    training = {module: module.training for module in model.modules()}
    batches = zip(*(torch.split(torch.from_numpy(values), batch_size) for values in inputs.values()), strict=True)
    try:
        with torch.inference_mode():
            model.eval()
            parts = [forward(model, dict(zip(inputs, batch, strict=True))) for batch in batches]
            outputs: NDArray[np.float32] = torch.cat(parts).numpy()
            return outputs
    finally:
        for module, mode in training.items():
            module.training = mode

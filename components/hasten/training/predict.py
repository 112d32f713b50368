"""Outputs of a model for many rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def predict(model: nn.Module, inputs: NDArray[Any], batch_size: int) -> NDArray[np.float32]:
    """Logits (B, C) in eval mode, a batch at a time; the model's own mode is left as it was."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.inference_mode():
            model.eval()
            outputs = [model(batch) for batch in torch.split(torch.from_numpy(inputs), batch_size)]
            logits: NDArray[np.float32] = torch.cat(outputs).numpy()
            return logits
    finally:
        for module, mode in training.items():
            module.training = mode

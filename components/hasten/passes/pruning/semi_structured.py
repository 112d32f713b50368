"""Linear layers whose weights have two zeros in every four, for the sparse tensor cores of NVIDIA GPUs."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from hasten.core.errors import PassError

KERNELS = "semi-structured kernels of an NVIDIA GPU (compute capability 8.0 or more)"
_CAPABILITY = (8, 0)
_KEPT, _GROUP = 2, 4


def kernels_missing() -> str | None:
    """Why this machine has no semi-structured kernels; None if it has."""
    if not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        return f"{name} has compute capability {major}.{minor}, and 8.0 is the first with sparse tensor cores"
    return None


def is_semi_structured(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 consecutive weights along the rows of a matrix are not zero."""
    if weight.ndim != 2 or weight.shape[1] % _GROUP:
        return False
    groups = weight.reshape(weight.shape[0], -1, _GROUP)
    return bool(((groups != 0).sum(-1) <= _KEPT).all())


def to_semi_structured(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy for inference whose linear layers skip their zeros (`torch.sparse.to_sparse_semi_structured`).

    A layer stays dense where its weights don't have the pattern or no kernel takes their shape: for 16-bit weights
    cuSPARSELt wants multiples of 16 outputs and 16 inputs.

    Args:
        model: on the GPU, in float16, bfloat16 or int8.

    Returns:
        The copy, and the names of the layers that were converted.

    Raises:
        PassError: the machine has no such kernels, or no layer could be converted, with the first reason.
    """
    if reason := kernels_missing():
        raise PassError(f"only {KERNELS} skip zeros in that pattern: {reason}")
    sparse = copy.deepcopy(model).eval().requires_grad_(False)
    converted, refused = [], []
    for name, layer in sparse.named_modules():
        if isinstance(layer, nn.Linear) and is_semi_structured(layer.weight):
            try:
                layer.weight = nn.Parameter(_sparse(layer.weight), requires_grad=False)
                converted.append(name)
            except RuntimeError as error:
                refused.append(f"{name}: {str(error).partition(chr(10))[0]}")
    if not converted:
        why = refused[0] if refused else "none has 2 of every 4 weights at zero"
        raise PassError(f"no linear layer of {type(model).__name__} can be converted: {why}")
    return sparse, tuple(converted)


def _sparse(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*SparseSemiStructuredTensor is in prototype.*", category=UserWarning
        )
        return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())

"""What a trace of PyTorch's profiler calls an operator."""

from __future__ import annotations

from hasten.artefacts.operators import kind

_FUSED = "## Call CompiledFxGraph"
"""How a trace calls what torch.compile made; its own time is that of the kernels it generated."""


def kind_of(event: str) -> str | None:
    """Of an operator or of a compiled graph; None of all else in a trace."""
    if event.startswith(_FUSED):
        return "fused"
    return kind(event) if event.startswith("aten::") else None

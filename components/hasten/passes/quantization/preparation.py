"""What is done to float weights before they are quantized."""

from __future__ import annotations

from pathlib import Path

import torch

from hasten.artefacts.capture import capture, write_graph
from hasten.artefacts.module import rebuild, save, surgery
from hasten.core.files import read_json
from hasten.core.interfaces import Columns, Graph
from hasten.passes.quantization.bias_correction import correct_biases
from hasten.passes.quantization.equalization import equalize
from hasten.passes.quantization.placement import Placement, batches

_REFERENCE_ROWS = 8


def prepared(
    graph: Graph, rows: Columns, placement: Placement, *, equalized: bool, bias_corrected: bool, folder: Path
) -> tuple[Graph, tuple[str, ...]]:
    """A float graph of the same network that loses less when its weights are quantized, and what was done to it.

    Equalization comes first, as it changes what quantization shifts.

    Args:
        folder: where the graph and its module artefact are written.

    Raises:
        PassError: the module can't be captured.
    """
    module, notes = rebuild(graph.module), []
    captured = capture(module, graph.signature).module()
    if equalized:
        pairs = equalize(captured)
        notes.append(f"{pairs} pairs of layers share their weights' range (quantization.equalize)")
    if bias_corrected:
        corrected, others = correct_biases(captured, rows, placement)
        notes.append(f"{corrected} layers have corrected biases, {others} have none (quantization.bias_correction)")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in captured.named_parameters():
            parameters[name].copy_(parameter)
    for part in (made := folder / "float", made / "module"):
        part.mkdir()
    save(made / "module", read_json(graph.module / "module.json")["arch"], module, surgery(graph.module))
    some = next(batches(rows, _REFERENCE_ROWS))
    return write_graph(module, made / "module", graph.signature, some, made), tuple(notes)

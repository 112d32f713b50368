"""Networks of any width: fake quantizers on the layers of a module, and what training, engines and the report want of
them.

Layers are convolutions and linear layers. Their inputs and their weights are quantized; sums, biases, normalizations
and what lies between layers stay in floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from hasten.artefacts.capture import capture, to_onnx
from hasten.artefacts.module import forward, rebuild
from hasten.artefacts.statistics import estimate_statistics
from hasten.core.errors import PassError
from hasten.core.interfaces import Bench, Columns, Graph
from hasten.passes.quantization.layers import kept
from hasten.passes.quantization.ranges import Histogram

_LAYERS = (_ConvNd, nn.Linear)
_FLOAT = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules with products of weights in them that no hook reaches."""
_BATCH = 64


class Scheme(Protocol):
    """Which fake quantizers a technique puts on a layer."""

    def weight_quantizer(self, weight: Tensor, axis: int) -> nn.Module:
        """Of one weight, whose output channels lie along the axis."""

    def input_quantizer(self, seen: Histogram) -> nn.Module | None:
        """Of inputs that were seen in calibration, with a method `settled` that gives a copy without parameters; None
        where inputs stay float."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A float module, and the fake quantizers that its layers are to have.

    Attributes:
        model: the module, without quantizers; its weights are on their grid.
        inputs: path of a layer -> the settled quantizer of its input.
        paths: of the quantized layers, in the order in which they run.
        notes: on what gets no fake quantizers.
    """

    model: nn.Module
    inputs: Mapping[str, nn.Module]
    paths: tuple[str, ...]
    notes: tuple[str, ...]

    def write(self, graph: Graph, file: Path) -> None:
        """Writes the ONNX graph that computes, in floats and for inputs in any range, what few bits would give.

        Raises:
            PassError: the module can't be captured.
        """
        model = rebuild(graph.module)
        _copy(self.model, model)
        for path, quantizer in self.inputs.items():
            _quantize_input(model.get_submodule(path), quantizer)
        to_onnx(capture(model, graph.signature), graph.signature, file)

    def cost(self, weight_bits: int, file: Path) -> str:
        """What the weights of the quantized layers would take, and what the file of floats takes, in words."""
        weights = sum(_weight(self.model.get_submodule(path)).numel() for path in self.paths)
        packed, whole = _told(weights * weight_bits / 8), _told(file.stat().st_size)
        return f"packed, the weights would take {packed} of the file's {whole}"


def simulate(
    scheme: Scheme,
    graph: Graph,
    rows: Columns,
    bench: Bench,
    *,
    keep: Sequence[str],
    bias_correction: bool = False,
    others: str = "stay in floats",
) -> Simulation:
    """Puts fake quantizers on a copy of the graph's module, calibrates them, and trains it through them.

    Args:
        rows: that ranges are measured on.
        bench: whose `fit` trains, starting from the calibrated network; what it leaves untrained is just calibrated.
        keep: layers that stay float: `first`, `last`, or the path of a layer or of a block of them.
        bias_correction: see `correct_means`.
        others: what becomes of all that gets no fake quantizers, in words; of what `keep` names it is clear.

    Raises:
        PassError: there are no rows or no layers, `keep` names none of them, or a layer's inputs are not finite.
    """
    if not len(next(iter(rows.values()), ())):
        raise PassError("quantization needs training rows to measure ranges on, got 0")
    model = rebuild(graph.module)
    seen = _inputs(model, rows)
    keeps, borrowed = kept(keep, list(seen)), _borrowed(model, list(seen))
    paths = tuple(path for path in seen if path not in keeps | borrowed)
    notes = tuple(_on_floats(model, list(seen), keeps, borrowed - keeps, others))
    if not paths:
        raise PassError(
            f"{type(model).__name__} has no layer to quantize: "
            + "; ".join((f"of its {len(seen)} convolutions and linear layers none is left", *notes))
        )
    for path in paths:
        layer = model.get_submodule(path)
        _quantize_input(layer, scheme.input_quantizer(seen[path]))
        axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
        parametrize.register_parametrization(layer, "weight", scheme.weight_quantizer(_weight(layer), axis))
    if bias_correction:
        correct_means(model, rebuild(graph.module), paths, rows)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trained = bench.fit(model)
    if any(not torch.equal(old, new) for old, new in zip(before, trained.parameters(), strict=True)):
        estimate_statistics(trained, bench.train.inputs)
    plain = rebuild(graph.module)
    _copy(trained, plain)
    return Simulation(
        model=plain,
        inputs={path: quantizer.settled() for path in paths if (quantizer := _input_quantizer(trained, path))},
        paths=paths,
        notes=notes,
    )


def check_family(family: str) -> None:
    """Refuses engines that read the module: the simulation is in the ONNX graph.

    Raises:
        PassError: naming the family.
    """
    if family in ("eager", "inductor"):
        raise PassError(
            f"quantization of any width is simulated in the ONNX graph, which {family} does not read: "
            "choose engine=onnxruntime or engine=openvino"
        )


def correct_means(quantized: nn.Module, reference: nn.Module, paths: Sequence[str], rows: Columns) -> None:
    """Takes the mean that quantization adds to the outputs of every layer back, channel by channel, in place.

    Measured on rows, layer by layer in the order in which they run, so that each sees its predecessors corrected (Nagel
    et al. 2019). The shift goes into the layer's bias, or, where it has none, into the mean of the batch normalization
    that reads it; a layer that has neither keeps its shift.
    """
    readers = _normalizations(reference, paths, rows)
    wanted = _output_means(reference, paths, rows)
    for path in paths:
        layer = quantized.get_submodule(path)
        shift = _output_means(quantized, [path], rows)[path] - wanted[path]
        if isinstance(layer.bias, Tensor):
            layer.bias.data -= shift.to(layer.bias.dtype)
        elif path in readers:
            mean = quantized.get_submodule(readers[path]).running_mean
            assert isinstance(mean, Tensor)
            mean += shift.to(mean.dtype)


def _inputs(model: nn.Module, rows: Columns) -> dict[str, Histogram]:
    """What the layers are given, in the order in which they first run; those that don't run are left out."""
    seen: dict[str, Histogram] = {}

    def observe(path: str, layer: nn.Module, arguments: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> None:
        try:
            seen.setdefault(path, Histogram()).observe(_given(arguments, keywords).numpy())
        except ValueError as error:
            raise PassError(f"the inputs of layer {path or 'model'} can't be quantized: {error}") from error

    with ExitStack() as hooks:
        for path, layer in _layers(model):
            hooks.enter_context(layer.register_forward_pre_hook(partial(observe, path), with_kwargs=True))
        _run(model, rows)
    return seen


def _output_means(model: nn.Module, paths: Sequence[str], rows: Columns) -> dict[str, Tensor]:
    """Mean output of each channel (C,) of the layers, over rows and places."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, layer: nn.Module, arguments: Any, output: Tensor) -> None:
        channels = output.movedim(1 if isinstance(layer, _ConvNd) else -1, 0).flatten(1).double()
        sums[path] = sums.get(path, 0) + channels.sum(1)
        counts[path] = counts.get(path, 0) + channels.shape[1]

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(model.get_submodule(path).register_forward_hook(partial(add, path)))
        _run(model, rows)
    return {path: total / counts[path] for path, total in sums.items()}


def _normalizations(model: nn.Module, paths: Sequence[str], rows: Columns) -> dict[str, str]:
    """Path of a layer -> path of the batch normalization that its output goes into as it is."""
    written: dict[int, str] = {}
    kept_alive: list[Tensor] = []  # so that no two tensors have one id
    found: dict[str, str] = {}

    def write(path: str, layer: nn.Module, arguments: Any, output: Tensor) -> None:
        kept_alive.append(output)
        written[id(output)] = path

    def read(path: str, layer: nn.Module, arguments: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> None:
        if source := written.get(id(_given(arguments, keywords))):
            found[source] = path

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(model.get_submodule(path).register_forward_hook(partial(write, path)))
        for path, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                hooks.enter_context(module.register_forward_pre_hook(partial(read, path), with_kwargs=True))
        _run(model, {name: values[:2] for name, values in rows.items()})
    return found


def _run(model: nn.Module, rows: Columns) -> None:
    number = len(next(iter(rows.values())))
    with torch.no_grad():
        for start in range(0, number, _BATCH):
            forward(model, {name: torch.tensor(values[start : start + _BATCH]) for name, values in rows.items()})


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, _LAYERS))


def _borrowed(model: nn.Module, paths: Sequence[str]) -> frozenset[str]:
    """Layers without a weight of their own: it belongs to another module, too, or is computed from other parameters."""
    owners = Counter(id(each) for module in model.modules() for each in module._parameters.values() if each is not None)
    weights = {path: model.get_submodule(path)._parameters.get("weight") for path in paths}
    return frozenset(path for path, weight in weights.items() if weight is None or owners[id(weight)] > 1)


def _on_floats(
    model: nn.Module, ran: Sequence[str], keeps: frozenset[str], borrowed: frozenset[str], others: str
) -> Iterator[str]:
    """What computes with weights and gets no fake quantizers, one sentence for each reason."""
    recurrent = [f"{path} ({type(module).__name__})" for path, module in model.named_modules() if _is_float(module)]
    inside = tuple(f"{path}." for path, module in model.named_modules() if _is_float(module))
    idle = [path for path, _ in _layers(model) if path not in ran and not path.startswith(inside)]
    if keeps:
        yield f"{', '.join(path for path in ran if path in keeps)} stay in floats (quantization.keep)"
    if borrowed:
        yield f"{', '.join(path for path in ran if path in borrowed)} {others}: their weights are shared or computed"
    if recurrent:
        yield f"{', '.join(recurrent)} {others}: only convolutions and linear layers get fake quantizers"
    if idle:
        yield f"{', '.join(idle)} {others}: nothing calls them as layers"


def _is_float(module: nn.Module) -> bool:
    return isinstance(module, _FLOAT)


def _quantize_input(layer: nn.Module, quantizer: nn.Module | None) -> None:
    if quantizer is not None:
        layer.add_module("input_quantizer", quantizer)
        # A plain function, because a copy of the layer has to call the copy of the quantizer.
        layer.register_forward_pre_hook(_through_input_quantizer, with_kwargs=True)


def _through_input_quantizer(
    layer: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, nn.Module)
    values = quantizer(_given(arguments, keywords))
    return (values, *arguments[1:]), {name: value for name, value in keywords.items() if name != "input"}


def _given(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """What a layer is called with, which all of PyTorch's name `input`."""
    return arguments[0] if arguments else keywords["input"]


def _input_quantizer(model: nn.Module, path: str) -> Any:
    return getattr(model.get_submodule(path), "input_quantizer", None)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Gives a module without quantizers the weights on their grid, and all else as it is."""
    for name, tensor in (*target.named_parameters(), *target.named_buffers()):
        path, _, attribute = name.rpartition(".")
        tensor.data = getattr(source.get_submodule(path), attribute).detach().clone()


def _told(num_bytes: float) -> str:
    """`134 kB`, as of reports."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"

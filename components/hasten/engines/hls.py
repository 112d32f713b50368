"""FPGAs: an HLS project by hls4ml, and its bit-accurate emulation on this processor."""

from __future__ import annotations

import ctypes
import io
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, Interval, MinLen

from hasten.core.errors import EngineError, first_line
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Columns, Engine, Graph, OperatorTime, Runner, Signature, Target
from hasten.engines.checks import unavailable
from hasten.engines.fpga_estimate import Estimate, estimate

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from hasten.engines.hls_layers import Network

_NAME = "network"
"""Of the top function that is synthesized."""
_PROJECT, _ESTIMATE, _EMULATION, _SYNTHESIS = "project", "estimate.json", "emulation.json", "synthesis.json"
_STAMP = "emulation"
_OVERFLOWED = 0.5
"""Difference from the graph, as a share of the range of its outputs, that rounding does not explain."""
_REPORTED = ("DSP", "LUT", "FF", "BRAM_18K", "WorstLatency", "IntervalMax", "EstimatedClockPeriod")
"""Of hls4ml's reading of the vendor's report."""
ANALYTIC = "analytic estimate, not synthesis"
_COMPILERS = {"Vitis": "vitis-run", "Vivado": "vivado_hls", "Quartus": "i++"}


@dataclass(frozen=True, kw_only=True)
class Hls(Engine):
    """Translates the graph to C++ for high-level synthesis, with the recipe's widths as fixed-point types.

    `project/` is the whole HLS project, ready for the vendor's tools. What runs here is the same C++ compiled for this
    processor: it gives bit by bit what the FPGA would, and its time says nothing about the FPGA.

    Attributes:
        backend: whose compiler the project is for.
        part: the FPGA; None for the backend's default.
        clock_ns: period of the clock.
        io_type: between layers, everything at once in registers (`io_parallel`) or one place after the other through
            FIFOs (`io_stream`), which is for larger convolutions.
        strategy: a multiplier of its own for every product (`latency`) or shared ones that read weights from block
            memory (`resource`).
        reuse_factor: products that one multiplier makes for each row or place; a layer takes the next factor that
            divides its products.
        bits: of what the recipe leaves in floats; where the binary point is, the reference rows say, layer by layer.
        synthesize: run the vendor's tools where they are installed, and report their figures.
    """

    family = "hls"
    libraries = ("hls4ml", "onnx", "onnxruntime")
    native_code: ClassVar[bool] = True
    extra = "hls"
    devices = ("fpga",)
    emulates = True
    reads_onnx = True

    backend: Literal["Vitis", "Vivado", "Quartus"] = "Vitis"
    part: Annotated[str, MinLen(1)] | None = None
    clock_ns: Annotated[float, Gt(0)] = 5.0
    io_type: Literal["io_parallel", "io_stream"] = "io_parallel"
    strategy: Literal["latency", "resource"] = "latency"
    reuse_factor: Annotated[int, Ge(1)] = 1
    bits: Annotated[int, Interval(ge=2, le=32)] = 16
    synthesize: bool = False

    def supports(self, quantized: bool, target: Target) -> str | None:
        if reason := unavailable(self, "hls4ml", target):
            return reason
        if shutil.which("g++") is None:
            return "hls needs g++ for the emulation: apt-get install g++ or conda install gxx"
        if self.synthesize and shutil.which(_COMPILERS[self.backend]) is None:
            return f"engine.synthesize=true needs {_COMPILERS[self.backend]} on PATH: engine.synthesize=false"
        return None

    def compile(self, graph: Graph, folder: Path) -> None:
        network = self._network(graph)
        project = folder / _PROJECT
        with _quiet():
            try:
                model = self._converted(network, project)
                model.write()
            except Exception as error:  # whatever it is, hls4ml raised it for this graph
                raise EngineError(f"hls4ml refused the graph: {first_line(error)}") from error
        _settle(project, {str(project): ".", model.config.get_config_value("Stamp"): _STAMP})
        estimated = self._estimated(network, model)
        write_json(folder / _ESTIMATE, {"kind": ANALYTIC, **estimated.to_dict()})
        _build_emulation(project)
        emulation = {
            "signature": graph.signature.to_dict(),
            "library": f"{_PROJECT}/firmware/{_NAME}-{_STAMP}.so",
            "layers": network.weighted,
            "quantized": network.quantized,
            "clipped": list(network.clipped),
        }
        write_json(folder / _EMULATION, emulation)
        write_json(folder / _EMULATION, {**emulation, "difference": self._difference(graph, folder)})
        if self.synthesize:
            with _quiet():
                write_json(folder / _SYNTHESIS, model.build() or {})

    def load(self, folder: Path) -> Runner:
        description = read_json(folder / _EMULATION)
        signature = Signature.from_dict(description["signature"])
        try:
            function = getattr(ctypes.CDLL(str((folder / description["library"]).resolve())), f"{_NAME}_float")
        except (OSError, AttributeError) as error:
            raise EngineError(f"hls can't load the emulation: {first_line(error)}") from error
        (source,) = signature.inputs
        function.restype = None
        function.argtypes = [np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")] * 2

        def run(*inputs: NDArray[Any]) -> NDArray[Any]:
            (rows,) = inputs
            if rows.shape[1:] != source.shape:
                raise EngineError(f"hls was compiled for rows of shape {source.shape}, got {rows.shape[1:]}")
            values = np.ascontiguousarray(np.moveaxis(rows, 1, -1), dtype=np.float32)  # channels last
            outputs = np.zeros((len(rows), *signature.output_shape), np.float32)
            for row, output in zip(values, outputs.reshape(len(rows), -1), strict=True):
                function(row, output)
            return outputs

        return run

    def notes(self, folder: Path) -> tuple[str, ...]:
        emulation, figures = read_json(folder / _EMULATION), read_json(folder / _ESTIMATE)
        widths = (
            f"{emulation['quantized']} of {emulation['layers']} layers multiply the recipe's integers, all else is "
            f"fixed point of {self.bits} bits; the emulation differs from the graph by {emulation['difference']:.2%} "
            "of the range of its outputs"
        )
        estimated = (
            f"{ANALYTIC}: {figures['dsps']} DSPs, {figures['luts']} LUTs, {figures['block_rams']} block RAMs, "
            f"{figures['cycles']} cycles ({figures['latency_us']:.3g} us at {self.clock_ns:g} ns), a row every "
            f"{figures['interval']} cycles"
        )
        emulated = "times and memory are of the emulation on this CPU and say nothing about the FPGA"
        return (emulated, estimated, widths, *emulation["clipped"], *_synthesized(folder))

    def integer_share(self, folder: Path) -> float:
        """All of it is fixed point; those layers count whose weights and inputs have widths of the recipe's."""
        emulation = read_json(folder / _EMULATION)
        return float(emulation["quantized"] / emulation["layers"]) if emulation["layers"] else 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The emulation as a whole: what its parts take on a CPU is not what they take on the FPGA."""
        run = self.load(folder)
        run(*inputs)
        start = perf_counter()
        for _ in range(repeats):
            run(*inputs)
        return [OperatorTime(name="emulation", kind="other", milliseconds=(perf_counter() - start) * 1000 / repeats)]

    def _network(self, graph: Graph) -> Network:
        import onnx

        from hasten.engines.hls_layers import read_network

        if len(graph.signature.inputs) != 1:
            raise EngineError(f"hls takes models of one input, got {', '.join(graph.signature.names)}")
        (source,) = graph.signature.inputs
        if source.dtype != "float32" or source.dynamic:
            raise EngineError(
                f"hls takes rows of floats of one shape, and {source.name} is {source.dtype} {source.shape}"
            )
        model = onnx.load(graph.onnx)
        return read_network(model, _ranges(model, _reference(graph)), self.bits)

    def _converted(self, network: Network, project: Path) -> Any:
        """hls4ml's model."""
        from hls4ml.model import ModelGraph
        from hls4ml.utils.config import create_config

        extras = {} if self.backend == "Quartus" else {"write_weights_txt": False}
        config = create_config(
            output_dir=str(project),
            project_name=_NAME,
            backend=self.backend,
            part=self.part,
            clock_period=self.clock_ns,
            io_type=self.io_type,
            **extras,
        )
        config["HLSConfig"] = {
            "Model": {
                "Precision": {"default": f"fixed<{self.bits},{min(self.bits, 6)}>"},
                "ReuseFactor": self.reuse_factor,
                "Strategy": self.strategy.capitalize(),
            },
            "LayerName": {name: {"Precision": dict(types)} for name, types in network.precisions.items()},
        }
        return ModelGraph.from_layer_list(config, list(network.layers), [network.input], [network.output])

    def _estimated(self, network: Network, model: Any) -> Estimate:
        factors = {each.name: each.get_attr("reuse_factor", self.reuse_factor) for each in model.get_layers()}
        return estimate(
            network.work,
            factors,
            self.strategy,
            streamed=self.io_type == "io_stream",
            clock_ns=self.clock_ns,
        )

    def _difference(self, graph: Graph, folder: Path) -> float:
        """From the ONNX graph on the reference rows, as a share of the range of its outputs.

        Raises:
            EngineError: it is more than rounding explains.
        """
        rows = _reference(graph)
        expected = _onnx_outputs(graph.onnx.read_bytes(), rows)[0]
        outputs = self.load(folder)(*rows.values())
        scale = float(np.ptp(expected)) or float(np.abs(expected).max()) or 1.0
        difference = float(np.abs(outputs - expected).max()) / scale
        if not difference <= _OVERFLOWED:
            raise EngineError(
                f"hls differs from the graph by {difference:.0%} of the output range: "
                f"engine.bits={self.bits} is too few"
            )
        return difference


def _ranges(model: onnx.ModelProto, rows: Columns) -> dict[str, float]:
    """Largest magnitude of every float tensor of the graph on the rows."""
    import onnx

    observed = onnx.shape_inference.infer_shapes(model)
    floats = [each for each in observed.graph.value_info if each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    given = {each.name for each in observed.graph.output}
    observed.graph.output.extend(each for each in floats if each.name not in given)
    names = [each.name for each in observed.graph.output]
    found = dict(zip(names, _onnx_outputs(observed.SerializeToString(), rows), strict=True)) | dict(rows)
    return {name: float(np.abs(values).max(initial=0)) for name, values in found.items()}


def _onnx_outputs(model: bytes, rows: Columns) -> list[NDArray[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the sum of floats depends on the threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # errors only
    outputs: list[NDArray[Any]] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(
        None, dict(rows)
    )
    return outputs


def _reference(graph: Graph) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    tensors = load_file(graph.reference)
    return {name: tensors[f"inputs.{name}"] for name in graph.signature.names}


def _build_emulation(project: Path) -> None:
    """Runs the project's own script, which compiles with g++.

    Raises:
        EngineError: with the compiler's first error.
    """
    done = subprocess.run(["bash", "build_lib.sh"], cwd=project, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise EngineError(f"g++ refused the emulation: {errors[0].strip()}")


def _settle(project: Path, names: Mapping[str, str]) -> None:
    """Replaces what differs from machine to machine and from run to run in the project's own files."""
    for file in (each for each in project.rglob("*") if each.is_file()):
        before = after = file.read_bytes()
        for name, lasting in names.items():
            after = after.replace(name.encode(), lasting.encode())
        if after != before:
            file.write_bytes(after)


def _synthesized(folder: Path) -> tuple[str, ...]:
    """What the vendor's tools said, where they ran."""
    file = folder / _SYNTHESIS
    if not file.exists():
        return ()
    report = read_json(file).get("CSynthesisReport", {})
    figures = ", ".join(f"{name} {report[name]}" for name in _REPORTED if name in report)
    return (f"synthesized: {figures or 'without a report'}",)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what hls4ml prints and warns of while it converts."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield

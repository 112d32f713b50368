"""TensorRT, NVIDIA's compiler and runtime for its GPUs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt, Interval

from hasten.core.cuda import cuda_problem
from hasten.core.errors import EngineError
from hasten.core.interfaces import Engine, Graph, Input, OperatorTime, Runner, Signature, Target
from hasten.engines import cuda
from hasten.engines.checks import check_parity, unavailable
from hasten.engines.half import halved
from hasten.engines.tensors import in_parts, read_signature, write_signature

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_PLAN = "model.plan"
_LAYERS = ("conv", "gemm", "matmul", "matrixmultiply", "fullyconnected")
"""Parts of the names of layer types that multiply by weights."""
_KINDS = {
    "conv": "convolution",
    "gemm": "linear",
    "matmul": "linear",
    "matrixmultiply": "linear",
    "fullyconnected": "linear",
    "attention": "linear",
    "norm": "normalization",
    "softmax": "normalization",
    "pool": "pooling",
    "reduce": "pooling",
    "quantize": "quantize",
    "reformat": "copy",
    "shuffle": "copy",
    "transpose": "copy",
    "concat": "copy",
    "pointwise": "elementwise",
    "elementwise": "elementwise",
    "activation": "elementwise",
    "scale": "elementwise",
    "relu": "elementwise",
    "add": "elementwise",
    "mul": "elementwise",
}
"""Part of a layer's type or name -> kind of its work, the first that fits."""
_HALF_QUANTIZED = "engine.precision={} is for float graphs; what a quantized graph leaves in floats stays in float32"


@dataclass(frozen=True, kw_only=True)
class TensorRt(Engine):
    """Compiles the ONNX file to a plan, which holds kernels for this model of GPU and this version of TensorRT.

    Every network is strongly typed: a layer calculates in the types that the graph gives it, as TensorRT 11 knows no
    other way. So 16-bit precisions are written into the graph, and integers are the quantize/dequantize pairs'.

    Loading a plan runs it: load only plans that you trust. No timing cache is kept, as it would carry choices from one
    recipe over to the next.

    Attributes:
        precision: of the layers of a float graph: `float32`, `float16` or `bfloat16`; inputs and outputs stay float32.
        static_batch: rows per request that the plan is built for; other numbers of rows are run in parts of that size,
            the last one filled up. None: any number.
        max_batch: most rows of one part, where `static_batch` is None.
        optimization_level: how long kernels are searched for, 0 (hardly) to 5 (all of them); TensorRT's default is 3.
        workspace_mb: most memory of the GPU that one layer may take for itself, 1 MB = 10^6 bytes; None: no limit.
        cuda_graph: all kernels of a request are launched at once, as a CUDA graph that is recorded for each new shape.
    """

    family = "tensorrt"
    libraries = ("tensorrt",)
    native_code: ClassVar[bool] = True
    extra = "tensorrt"
    devices = ("gpu",)
    reads_onnx = True
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {"optimization_level": (3, 5), "cuda_graph": (False, True)}

    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    static_batch: Annotated[int, Ge(1)] | None = None
    max_batch: Annotated[int, Ge(1)] = 64
    optimization_level: Annotated[int, Interval(ge=0, le=5)] = 3
    workspace_mb: Annotated[float, Gt(0)] | None = None
    cuda_graph: bool = False

    def supports(self, quantized: bool, target: Target) -> str | None:
        if reason := unavailable(self, "tensorrt", target) or cuda_problem():
            return reason
        return _HALF_QUANTIZED.format(self.precision) if quantized and self.precision != "float32" else None

    def compile(self, graph: Graph, folder: Path) -> None:
        if graph.quantized and self.precision != "float32":
            raise EngineError(_HALF_QUANTIZED.format(self.precision))
        write_signature(graph.signature, folder)
        (folder / _PLAN).write_bytes(self._plan(self._typed(graph.onnx), graph.signature))
        run = self.load(folder)
        if not graph.quantized:
            check_parity(run, graph, "tensorrt", self.static_batch, self.precision, cuda.TOLERANCES)

    def load(self, folder: Path) -> Runner:
        plan, signature = _Plan(folder), read_signature(folder)
        lane = cuda.Lane(signature.inputs)
        run = cuda.runner(lane, (_Recorded if self.cuda_graph else _Queued)(plan, lane))

        def run_all(*inputs: NDArray[Any]) -> NDArray[Any]:
            if self.static_batch is not None:
                return in_parts(run, inputs, self.static_batch)
            starts = range(0, len(inputs[0]), self.max_batch)
            return np.concatenate([run(*(values[at : at + self.max_batch] for values in inputs)) for at in starts])

        return run_all

    def notes(self, folder: Path) -> tuple[str, ...]:
        return cuda.notes(read_signature(folder))

    def integer_share(self, folder: Path) -> float:
        """Of the layers that multiply by weights, as the engine inspector lists them."""
        layers = [layer for layer in _Plan(folder).layers() if _multiplies(layer)]
        return sum(map(_reads_integers, layers)) / len(layers) if layers else 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The layers of the plan by TensorRT's own profiler, and the copies to the GPU and back."""
        plan, lane = _Plan(folder), cuda.Lane(read_signature(folder).inputs)
        run = cuda.runner(lane, _Queued(plan, lane))
        types = {layer["Name"]: _type(layer) for layer in plan.layers()}
        copies = cuda.copies(run, inputs, repeats)
        layers = [
            OperatorTime(name=name, kind=_kind(name, types.get(name, "")), milliseconds=total / repeats)
            for name, total in plan.layer_times(lambda: run(*inputs), repeats).items()
        ]
        return [*layers, *copies]

    def _typed(self, file: Path) -> bytes:
        if self.precision == "float32":
            return file.read_bytes()
        import onnx

        return bytes(halved(onnx.load(file), self.precision).SerializeToString())

    def _plan(self, model: bytes, signature: Signature) -> bytes:
        """The serialized engine.

        Raises:
            EngineError: TensorRT refused the graph or found no kernels for it.
        """
        tensorrt = _library()
        logger = _logger(tensorrt)
        builder = _started(tensorrt.Builder, logger)
        network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse(model):
            errors = [parser.get_error(place).desc() for place in range(parser.num_errors)]
            raise EngineError(f"tensorrt refused the graph: {_line(errors or logger.errors)}")
        config = builder.create_builder_config()
        config.builder_optimization_level = self.optimization_level
        config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED  # what `integer_share` reads
        config.set_flag(tensorrt.BuilderFlag.DISABLE_TIMING_CACHE)
        if self.workspace_mb is not None:
            config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, round(self.workspace_mb * 1e6))
        profile = builder.create_optimization_profile()
        for source in signature.inputs:
            profile.set_shape(source.name, *self._shapes(source))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(f"tensorrt built no engine: {_line(logger.errors)}")
        return bytes(plan)

    def _shapes(self, source: Input) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The least shape of a request, the one that kernels are chosen for, and the greatest."""
        most = self.static_batch or self.max_batch
        least = tuple(1 if axis in source.dynamic else size for axis, size in enumerate(source.shape))
        return (self.static_batch or 1, *least), (most, *source.shape), (most, *source.shape)


class _Plan:
    """A plan on the GPU, ready for requests of one caller at a time.

    Raises:
        EngineError: the file is no plan for this version of TensorRT and this GPU, or its memory does not suffice.
    """

    def __init__(self, folder: Path) -> None:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]  # TensorRT joins PyTorch's context
        self._tensorrt = _library()
        self._logger = _logger(self._tensorrt)
        self._runtime = _started(self._tensorrt.Runtime, self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((folder / _PLAN).read_bytes())
        if self._engine is None:
            raise EngineError(f"tensorrt refused the plan: {_line(self._logger.errors)}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"tensorrt got no memory for a request: {_line(self._logger.errors)}")
        names = [self._engine.get_tensor_name(place) for place in range(self._engine.num_io_tensors)]
        out = self._tensorrt.TensorIOMode.OUTPUT
        (self._output,) = (name for name in names if self._engine.get_tensor_mode(name) == out)

    def bind(self, rows: Mapping[str, torch.Tensor], lane: cuda.Lane) -> torch.Tensor:
        """Says where the rows lie, and gives the place that the outputs will be written to.

        Raises:
            EngineError: the plan takes no rows of such a shape.
        """
        for name, values in rows.items():
            shape = tuple(values.shape)
            if not self._context.set_input_shape(name, shape):
                raise EngineError(f"tensorrt takes no {name} of shape {shape}: {_line(self._logger.errors)}")
            self._context.set_tensor_address(name, values.data_ptr())
        outputs = lane.outputs(tuple(self._context.get_tensor_shape(self._output)))
        self._context.set_tensor_address(self._output, outputs.data_ptr())
        return outputs

    def enqueue(self, lane: cuda.Lane) -> None:
        """Queues the kernels of what is bound on the lane's stream.

        Raises:
            EngineError: TensorRT can't.
        """
        if not self._context.execute_async_v3(lane.stream.cuda_stream):
            raise EngineError(f"tensorrt could not run a request: {_line(self._logger.errors)}")

    def layers(self) -> list[dict[str, Any]]:
        """What the engine inspector tells of every layer."""
        inspector = self._engine.create_engine_inspector()
        told = json.loads(inspector.get_engine_information(self._tensorrt.LayerInformationFormat.JSON))
        # A layer that has nothing but its name is told as that.
        return [layer if isinstance(layer, dict) else {"Name": layer} for layer in told["Layers"]]

    def layer_times(self, request: Callable[[], object], repeats: int) -> dict[str, float]:
        """Layer -> milliseconds of all repeats. From then on every request waits for its layers' times."""
        tensorrt = self._tensorrt

        class Profiler(tensorrt.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                tensorrt.IProfiler.__init__(self)
                self.milliseconds: dict[str, float] = defaultdict(float)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.milliseconds[layer_name] += ms

        profiler = Profiler()
        self._context.profiler = profiler
        for _ in range(cuda.WARMUP):
            request()
        profiler.milliseconds.clear()
        for _ in range(repeats):
            request()
        return dict(profiler.milliseconds)


class _Queued:
    """Queues the kernels of a request one after the other."""

    def __init__(self, plan: _Plan, lane: cuda.Lane) -> None:
        self._plan = plan
        self._lane = lane

    def __call__(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        outputs = self._plan.bind(rows, self._lane)
        self._plan.enqueue(self._lane)
        return outputs


class _Recorded:
    """Records the kernels as a CUDA graph when a shape is new, and launches the record from then on."""

    _graph: torch.cuda.CUDAGraph
    _outputs: torch.Tensor

    def __init__(self, plan: _Plan, lane: cuda.Lane) -> None:
        self._plan = plan
        self._lane = lane
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        shapes = {name: tuple(values.shape) for name, values in rows.items()}
        if shapes != self._shapes:
            self._record(rows)
            self._shapes = shapes
        self._graph.replay()
        return self._outputs

    def _record(self, rows: Mapping[str, torch.Tensor]) -> None:
        import torch

        self._outputs = self._plan.bind(rows, self._lane)
        self._plan.enqueue(self._lane)  # what TensorRT sets up for a new shape can't be recorded
        self._lane.stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._lane.stream):
            self._plan.enqueue(self._lane)


def _library() -> Any:
    """The module `tensorrt`.

    Raises:
        EngineError: it, or a library that it needs, is not there.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise EngineError(f"tensorrt can't be loaded: {_line([str(error)])}") from error
    return tensorrt


def _started(kind_of: Callable[[Any], Any], logger: Any) -> Any:
    """A builder or a runtime, which are made on the GPU.

    Raises:
        EngineError: there is none that TensorRT can use.
    """
    try:
        return kind_of(logger)
    except TypeError as error:  # how the bindings say that they got nothing
        raise EngineError(f"tensorrt can't use this machine's GPU: {_line(logger.errors)}") from error


def _logger(tensorrt: Any) -> Any:
    """A logger that keeps the errors, and prints nothing."""
    severities = (tensorrt.ILogger.Severity.INTERNAL_ERROR, tensorrt.ILogger.Severity.ERROR)

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in severities:
                self.errors.append(msg)

    return Logger()


def _line(errors: Sequence[str]) -> str:
    """The last of the errors, which names what failed, in one line."""
    return " ".join(errors[-1].split()) if errors else "it does not say why"


def _type(layer: Mapping[str, Any]) -> str:
    return str(layer.get("ParameterType") or layer.get("LayerType") or "")


def _multiplies(layer: Mapping[str, Any]) -> bool:
    told = f"{layer.get('ParameterType', '')} {layer.get('LayerType', '')} {layer.get('TacticName', '')}".lower()
    return any(part in told for part in _LAYERS)


def _reads_integers(layer: Mapping[str, Any]) -> bool:
    """TensorRT 10 tells an input's type within its `Format/Datatype`, TensorRT 11 in a field of its own."""
    inputs = [each for each in layer.get("Inputs", ()) if isinstance(each, Mapping)]
    told = (str(value).lower() for each in inputs for key, value in each.items() if key != "Name")
    return any("int8" in value for value in told)


def _kind(name: str, layer_type: str) -> str:
    """By the type of the layer, and where that says nothing (`kgen`) by its name, which joins those of its nodes."""
    parts = (part for told in (layer_type, name) for part in _KINDS if part in told.lower())
    return next((_KINDS[part] for part in parts), "other")

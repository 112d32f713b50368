"""OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from hasten.artefacts.operators import kind
from hasten.core.errors import EngineError, first_line
from hasten.core.interfaces import Engine, Graph, OperatorTime, Runner, Target
from hasten.engines import stored
from hasten.engines.checks import THREADS, check_parity, fused, unavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MODEL, _MAPPED = "model.onnx", "model.xml"
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_WARMUP = 3
_LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected"})
"""Layers with weights, as OpenVINO calls them; a MatMul is a product of activations."""
_DATA = frozenset({"Constant", "Parameter", "Result", "Const", "Input", "Output"})
"""Nodes that calculate nothing, as the graph and as the compiled one call them."""


@dataclass(frozen=True, kw_only=True)
class OpenVino(Engine):
    """Compiles the ONNX file when it is loaded, without a model cache.

    Attributes:
        threads: of one request.
        static_batch: rows per request that the graph is compiled for, which saves shape work; the first request with
            another number of rows compiles it once more, for any. None: for any from the start.
        precision: of what is not quantized; in bfloat16, weights and activations are rounded to it.
        mapped: the graph is kept in OpenVINO's own form, whose weights are mapped into memory and not read from ONNX.
        compressed: the graph lies compressed on disk and is unpacked when it is loaded.
    """

    family = "openvino"
    libraries = ("openvino",)
    reads_onnx = True
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "threads": THREADS,
        "static_batch": (None, "${target.batch_size}"),
    }

    threads: Annotated[int, Ge(1)] = 1
    static_batch: Annotated[int, Ge(1)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    mapped: bool = False
    compressed: bool = False

    def __post_init__(self) -> None:
        stored.check_mapped(self.mapped, self.compressed)

    def supports(self, quantized: bool, target: Target) -> str | None:
        return unavailable(self, "openvino", target)

    def compile(self, graph: Graph, folder: Path) -> None:
        if self.mapped:
            self._convert(graph.onnx, folder / _MAPPED)
        else:
            stored.store(graph.onnx, folder / _MODEL, self.compressed)
        run = self.load(folder)
        if not graph.quantized:
            check_parity(run, graph, "openvino", self.static_batch, self.precision)

    def load(self, folder: Path) -> Runner:
        return _Runner(self, folder)

    def integer_share(self, folder: Path) -> float:
        operators = self.compiled(folder, self.static_batch).get_runtime_model().get_ops()
        infos = [operator.get_rt_info() for operator in operators]
        layers = [info for info in infos if info["layerType"].astype(str) in _LAYERS]
        integers = [info for info in layers if info["runtimePrecision"].astype(str) in ("u8", "i8")]
        return len(integers) / len(layers) if layers else 0.0

    def notes(self, folder: Path) -> tuple[str, ...]:
        import openvino

        exported = openvino.Core().read_model(self._stored(folder)).get_ops()
        run = self.compiled(folder, self.static_batch).get_runtime_model().get_ops()
        kinds = [operator.get_rt_info()["layerType"].astype(str) for operator in run]
        return (
            fused(
                "openvino",
                sum(operator.get_type_name() not in _DATA for operator in exported),
                sum(kind not in _DATA for kind in kinds),
            ),
        )

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The executed nodes, by OpenVINO's counters, which round each mean down to a whole microsecond."""
        batch = self.static_batch if self.static_batch == len(inputs[0]) else None
        compiled = self.compiled(folder, batch, PERF_COUNT=True)
        types = [source.element_type.to_dtype() for source in compiled.inputs]
        rows = [np.ascontiguousarray(values, dtype=dtype) for values, dtype in zip(inputs, types, strict=True)]
        request = compiled.create_infer_request()

        def totals(calls: int) -> dict[tuple[str, str], float]:
            """Milliseconds of all calls so far; the counters hold their mean."""
            counters = [counter for counter in request.get_profiling_info() if _runs(counter)]
            return {(each.node_name, each.node_type): each.real_time.total_seconds() * 1e3 * calls for each in counters}

        for _ in range(_WARMUP):
            request.infer(rows)
        before = totals(_WARMUP)
        for _ in range(repeats):
            request.infer(rows)
        return [
            OperatorTime(
                name=name,
                kind=kind(operator),
                milliseconds=max(0.0, total - before.get((name, operator), 0.0)) / repeats,
            )
            for (name, operator), total in totals(_WARMUP + repeats).items()
        ]

    def compiled(self, folder: Path, batch: int | None, **properties: Any) -> Any:
        """The compiled model, for exactly `batch` rows or for any number.

        Raises:
            EngineError: OpenVINO refused the graph.
        """
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            # A float graph stays float: with AMX or AVX512_BF16, OpenVINO's own choice is bfloat16.
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self.precision],
            # Pinning gains nothing for one request, and sends the workers of one machine to the same cores.
            "ENABLE_CPU_PINNING": False,
            "CACHE_DIR": "",
        }
        try:
            core = openvino.Core()
            model = core.read_model(self._stored(folder))
            if batch is not None:
                model.reshape({source: [batch, *list(source.partial_shape)[1:]] for source in model.inputs})
            return core.compile_model(model, "CPU", settings | properties)
        except Exception as error:
            raise EngineError(f"openvino refused the graph: {first_line(error)}") from error

    def _convert(self, onnx: Path, file: Path) -> None:
        import openvino

        try:
            model = openvino.Core().read_model(str(onnx))
            for number, operator in enumerate(model.get_ordered_ops()):
                # Nameless nodes are counted on through the life of a process: the same graph would give other bytes.
                if operator.get_friendly_name() == operator.get_name():
                    operator.set_friendly_name(f"{operator.get_type_name()}_{number}")
            openvino.save_model(model, file, compress_to_fp16=False)
        except Exception as error:
            raise EngineError(f"openvino refused the graph: {first_line(error)}") from error

    def _stored(self, folder: Path) -> str | bytes:
        """What OpenVINO reads the graph from."""
        if self.compressed:
            return stored.read(folder / _MODEL)
        return str(folder / (_MAPPED if self.mapped else _MODEL))


class _Request:
    """One infer request whose inputs stay in place: rows are copied in, outputs are copied out.

    On a small network, handing over the caller's arrays at every call (`share_inputs`) costs 20 microseconds more.
    """

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs: list[NDArray[Any]] = [np.empty(0) for _ in compiled.inputs]

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        for place, (kept, values) in enumerate(zip(self._inputs, inputs, strict=True)):
            if kept.shape != values.shape:
                tensor = self._request.get_input_tensor(place)
                tensor.shape = values.shape
                self._inputs[place] = tensor.data
            self._inputs[place][...] = values
        outputs: NDArray[Any] = self._request.infer({})[0]
        return outputs


class _Runner:
    """Sends each request to the graph that is compiled for its number of rows. Several callers wait for one another."""

    def __init__(self, engine: OpenVino, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._lock = Lock()
        self._requests: dict[int | None, _Request] = {}
        self._request(engine.static_batch)

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        batch = self._engine.static_batch if len(inputs[0]) == self._engine.static_batch else None
        with self._lock:
            return self._request(batch)(*inputs)

    def _request(self, batch: int | None) -> _Request:
        if batch not in self._requests:
            self._requests[batch] = _Request(self._engine.compiled(self._folder, batch))
        return self._requests[batch]


def _runs(counter: Any) -> bool:
    """Whether a node is run at all. One of less than a microsecond is reported as not run, but names its kernel."""
    return counter.status == counter.EXECUTED or not counter.exec_type.startswith(("undef", "unknown"))

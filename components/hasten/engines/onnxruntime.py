"""ONNX Runtime on the CPU or a GPU."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from hasten.artefacts.operators import kind
from hasten.core.errors import EngineError, first_line
from hasten.core.interfaces import Engine, Graph, OperatorTime, Runner, Target
from hasten.engines import cuda, stored
from hasten.engines.checks import THREADS, check_parity, fused, unavailable
from hasten.engines.tensors import read_signature, write_signature

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_MODEL, _WEIGHTS = "model.onnx", "weights.bin"
_MIN_BYTES = 1024
"""A smaller tensor stays in the graph, where it may be a shape that the optimisation has to know."""
_WARMUP = 3
_INTEGER_MARKS = ("QLinear", "QGemm", "Integer", "DynamicQuantize")
_CUDA = "CUDAExecutionProvider"
_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Engine):
    """Runs the ONNX file; the graph is optimised when it is loaded, for the processor that loads it.

    On a GPU the nodes that have no kernel there run on the CPU, and what they read and write is copied in between.

    Attributes:
        device: where it runs, `cpu` or `cuda`; CUDA's first GPU.
        threads: of one request. Several wait for work by spinning, ONNX Runtime's default, which halves the latency of
            a small network on two threads.
        static_batch: rows per request that the graph is optimised for, which saves shape work; the first request with
            another number of rows loads it once more, for any. None: for any from the start.
        graph_optimization: how far the graph is rewritten. A quantized graph runs in integers from `extended` on.
        mapped: the weights lie in a file of their own, which is mapped into memory and not read and parsed.
        compressed: the graph lies compressed on disk and is unpacked when it is loaded.
    """

    family = "onnxruntime"
    libraries = ("onnxruntime", "onnxruntime-gpu")
    devices = ("cpu", "gpu")
    reads_onnx = True
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "threads": THREADS,
        "static_batch": (None, "${target.batch_size}"),
        "graph_optimization": ("all", "extended", "basic"),
    }

    device: cuda.DeviceName = "cpu"
    threads: Annotated[int, Ge(1)] = 1
    static_batch: Annotated[int, Ge(1)] | None = None
    graph_optimization: Literal["disabled", "basic", "extended", "all"] = "all"
    mapped: bool = False
    compressed: bool = False

    def __post_init__(self) -> None:
        stored.check_mapped(self.mapped, self.compressed)

    @property
    def concurrent(self) -> bool:
        return self.device == "cpu"  # on a GPU calls share their buffers

    def supports(self, quantized: bool, target: Target) -> str | None:
        reason = unavailable(self, "onnxruntime", target)
        if reason is None and self.device == "cuda" and _CUDA not in _providers():
            return f"the installed onnxruntime has no {_CUDA}: pip uninstall onnxruntime, pip install onnxruntime-gpu"
        return reason

    def compile(self, graph: Graph, folder: Path) -> None:
        # Not the optimised graph, which is bound to the instructions of this processor.
        if self.mapped:
            _split(graph.onnx, folder)
        else:
            stored.store(graph.onnx, folder / _MODEL, self.compressed)
        if self.device == "cuda":
            write_signature(graph.signature, folder)
        run = self.load(folder)
        if not graph.quantized:
            tolerances = cuda.tolerances(self.device)
            check_parity(run, graph, "onnxruntime", self.static_batch, tolerances=tolerances)

    def load(self, folder: Path) -> Runner:
        if self.device == "cuda":
            return self._on_gpu(folder)
        session = self._session(folder, self._options(self.static_batch))
        sources, wanted = _sources(session), [session.get_outputs()[0].name]

        def run(*inputs: NDArray[Any]) -> NDArray[Any]:
            feed = _feed(sources, inputs)
            fits = self.static_batch is None or len(inputs[0]) == self.static_batch
            # As fast as an IOBinding within a microsecond, and good for several callers at once.
            outputs: NDArray[Any] = (session if fits else any_size()).run(wanted, feed)[0]
            return outputs

        @cache
        def any_size() -> Any:
            return self._session(folder, self._options(None))

        return run

    def integer_share(self, folder: Path) -> float:
        """Of the layers with weights: a product of activations, as in attention, is none of them."""
        layers = list(_layers(self._optimised(folder)))
        integers = [name for name in layers if any(mark in name for mark in _INTEGER_MARKS)]
        return len(integers) / len(layers) if layers else 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The nodes of the optimised graph, by ONNX Runtime's profile, whose resolution is a microsecond; on a GPU its
        kernels and copies, as ONNX Runtime's profile then tells when they were queued."""
        if self.device == "cuda":
            return cuda.kernels(self.load(folder), inputs, repeats)
        options = self._options(self.static_batch if self.static_batch == len(inputs[0]) else None)
        options.enable_profiling = True
        with TemporaryDirectory() as scratch:
            options.profile_file_prefix = str(Path(scratch, "profile"))
            session = self._session(folder, options)
            feed = _feed(_sources(session), inputs)
            for _ in range(_WARMUP + repeats):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        microseconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                node = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
                microseconds[node].append(event["dur"])
        return [
            OperatorTime(name=name, kind=kind(operator), milliseconds=sum(times[_WARMUP:]) / 1000 / repeats)
            for (name, operator), times in microseconds.items()
        ]

    def notes(self, folder: Path) -> tuple[str, ...]:
        import onnx

        content = stored.read(folder / _MODEL) if self.compressed else (folder / _MODEL).read_bytes()
        exported = onnx.load_from_string(content).graph.node
        copies = cuda.notes(read_signature(folder)) if self.device == "cuda" else ()
        return (fused("onnxruntime", len(exported), len(self._optimised(folder).node)), *copies)

    def _optimised(self, folder: Path) -> Any:
        """The graph that runs, as ONNX with operators of ONNX Runtime's own."""
        import onnx

        options = self._options(self.static_batch)
        with TemporaryDirectory() as scratch:
            optimised = Path(scratch, _MODEL)
            options.optimized_model_filepath = str(optimised)
            self._session(folder, options)
            return onnx.load(optimised, load_external_data=False).graph

    def _options(self, batch: int | None) -> Any:
        """Of a session for exactly `batch` rows, or for any number."""
        import onnxruntime

        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = {
            "disabled": levels.ORT_DISABLE_ALL,
            "basic": levels.ORT_ENABLE_BASIC,
            "extended": levels.ORT_ENABLE_EXTENDED,
            "all": levels.ORT_ENABLE_ALL,
        }[self.graph_optimization]
        options.log_severity_level = 3  # errors only
        if batch is not None:
            options.add_free_dimension_override_by_name("batch", batch)  # as every exported graph calls it
        return options

    def _on_gpu(self, folder: Path) -> Runner:
        import onnxruntime

        signature = read_signature(folder)
        lane = cuda.Lane(signature.inputs)
        options = onnxruntime.RunOptions()
        # The copy of the outputs is queued behind the kernels, and only that is waited for.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        @cache
        def bound(batch: int | None) -> tuple[Any, Any]:
            session = self._session(folder, self._options(batch), stream=lane.stream.cuda_stream)
            return session, session.io_binding()

        bound(self.static_batch)

        def calculate(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
            (number,) = {len(values) for values in rows.values()}
            session, binding = bound(number if number == self.static_batch else None)
            for source in signature.inputs:
                values = rows[source.name]
                binding.bind_input(
                    source.name, cuda.DEVICE, 0, np.dtype(source.dtype).type, tuple(values.shape), values.data_ptr()
                )
            outputs = lane.outputs((number, *signature.output_shape))
            binding.bind_output(
                session.get_outputs()[0].name, cuda.DEVICE, 0, np.float32, tuple(outputs.shape), outputs.data_ptr()
            )
            session.run_with_iobinding(binding, options)
            return outputs

        return cuda.runner(lane, calculate)

    def _session(self, folder: Path, options: Any, stream: int = 0) -> Any:
        """A session on the device.

        Args:
            stream: address of the CUDA stream that its kernels are queued on; 0 for one of its own.

        Raises:
            EngineError: ONNX Runtime refused the graph, or can't use the GPU.
        """
        import onnxruntime

        settings = {"user_compute_stream": str(stream)} if stream else {}
        providers = [(_CUDA, settings)] if self.device == "cuda" else []
        try:
            model = stored.read(folder / _MODEL) if self.compressed else str(folder / _MODEL)
            session = onnxruntime.InferenceSession(model, options, providers=[*providers, "CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"onnxruntime refused the graph: {first_line(error)}") from error
        if self.device == "cuda" and session.get_providers()[0] != _CUDA:
            # It only logs why: CUDA's or cuDNN's libraries of another version than it was built for.
            raise EngineError(f"onnxruntime could not load its {_CUDA}, most often for want of CUDA or cuDNN libraries")
        return session


def _providers() -> Sequence[str]:
    import onnxruntime

    found: Sequence[str] = onnxruntime.get_available_providers()
    return found


def _split(source: Path, folder: Path) -> None:
    """Writes the graph with its weights beside it: ONNX Runtime maps such a file into memory (1.32)."""
    import onnx

    onnx.save_model(
        onnx.load(source),
        folder / _MODEL,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=_WEIGHTS,
        size_threshold=_MIN_BYTES,
    )


def _layers(graph: Any) -> Iterator[str]:
    """Operators of the convolutions and linear layers that read weights: constants of at least two axes."""
    constants = {each.name for each in graph.initializer}
    weights = {each.name for each in graph.initializer if len(each.dims) > 1}
    for node in graph.node:
        reads_weights = any(name in weights for name in node.input)
        if kind(node.op_type) in ("convolution", "linear") and reads_weights:
            yield node.op_type
        if reads_weights and constants.issuperset(node.input):  # weights that are turned back into floats
            constants.update(node.output)
            weights.update(node.output)


def _sources(session: Any) -> dict[str, str]:
    """Name of each input -> its type."""
    return {source.name: _TYPES[source.type] for source in session.get_inputs()}


def _feed(sources: Mapping[str, str], inputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    pairs = zip(sources.items(), inputs, strict=True)
    return {name: np.ascontiguousarray(values, dtype=dtype) for (name, dtype), values in pairs}

"""ExecuTorch, PyTorch's runtime for phones and embedded CPUs, with XNNPACK's kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakSet

from annotated_types import Ge

from hasten.artefacts.operators import kind
from hasten.core.errors import EngineError, first_line
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Engine, Graph, OperatorTime, Runner, Target
from hasten.engines import stored
from hasten.engines.batches import check_shapes, exported, in_batches
from hasten.engines.checks import check_parity, unavailable
from hasten.engines.silence import silenced
from hasten.engines.tensors import read_inputs, tensors, write_signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MODEL, _DELEGATION = "model.pte", "delegation.json"
_WARMUP = 3
_PORTABLE, _OVERHEAD = "native_call_", "XNNPACK delegate"
_KINDS = {"Matrix Multiply": "linear", "Pooling": "pooling", "XNNPACK": "other", "_dim_order_": "copy"}
"""Part of the name of a kernel -> kind of its work, where its words are not one operator's name."""
_QUANTIZED = "executorch runs no quantized graph: choose engine=onnxruntime or engine=openvino"


@dataclass(frozen=True, kw_only=True)
class ExecuTorch(Engine):
    """Lowers the module to a program that ExecuTorch interprets. What XNNPACK has no kernels for is left to portable
    kernels, which are written to run anywhere, not fast. A recurrent layer is unrolled into one step after the other.

    The number of rows is fixed: XNNPACK reshapes along one dynamic axis at most, which a length needs.

    Attributes:
        threads: of one request. They belong to the whole process, and programs that are loaded hold on to them: a
            process that has loaded one can't load another with other threads.
        static_batch: rows per request that the program is made for; other numbers of rows are run in parts of that
            size, the last one filled up.
        compressed: the program lies compressed on disk and is unpacked when it is loaded.
    """

    family = "executorch"
    libraries = ("executorch", "torch")
    extra = "executorch"

    threads: Annotated[int, Ge(1)] = 1
    static_batch: Annotated[int, Ge(1)] = 1
    compressed: bool = False

    def supports(self, quantized: bool, target: Target) -> str | None:
        return unavailable(self, "executorch", target) or (_QUANTIZED if quantized else None)

    def compile(self, graph: Graph, folder: Path) -> None:
        if graph.quantized:
            raise EngineError(_QUANTIZED)
        program, delegation = self._lowered(graph)
        write_signature(graph.signature, folder)
        write_json(folder / _DELEGATION, delegation)
        with TemporaryDirectory() as scratch:
            Path(scratch, _MODEL).write_bytes(program)
            stored.store(Path(scratch, _MODEL), folder / _MODEL, self.compressed)
        check_parity(self.load(folder), graph, "executorch", self.static_batch)

    def load(self, folder: Path) -> Runner:
        return _Runner(self, folder)

    def notes(self, folder: Path) -> tuple[str, ...]:
        delegation = read_json(folder / _DELEGATION)
        delegated, portable = delegation["delegated"], delegation["portable"]
        total = delegated + sum(portable.values())
        note = f"XNNPACK runs {delegated} of {total} operators"
        if not portable:
            return (note,)
        most = sorted(portable, key=lambda name: (-portable[name], name))
        left = ", ".join(f"{name} {portable[name]}x" for name in most[:3])
        return (f"{note}; left to portable kernels: {left}{', ...' if len(most) > 3 else ''}",)

    def integer_share(self, folder: Path) -> float:
        return 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The instructions of the program and the kernels within the delegate, summed by name, by ExecuTorch's trace of
        events. Kernels within the delegate are counted in whole microseconds; what that leaves of its time is its
        overhead."""
        run = _Runner(self, folder, traced=True)
        for _ in range(_WARMUP + repeats):
            run(*inputs)
        calls = -(-len(inputs[0]) // self.static_batch)
        with TemporaryDirectory() as scratch, silenced():
            from executorch.devtools import Inspector

            run.write_trace(Path(scratch, "trace"))
            blocks = Inspector(etdump_path=str(Path(scratch, "trace"))).event_blocks
        (block,) = (block for block in blocks if block.name == "Execute")
        milliseconds: dict[str, list[float]] = defaultdict(list)
        for name, times in _works(block.events):
            milliseconds[name].append(sum(times[_WARMUP * calls :]) / repeats)
        return [
            OperatorTime(name=name, kind=_kind(name), milliseconds=sum(times), calls=float(len(times) * calls))
            for name, times in milliseconds.items()
        ]

    def program(self, folder: Path, *, traced: bool) -> tuple[Any, bytes]:
        """The loaded program, and its bytes, which it reads from as long as it lives.

        Raises:
            EngineError: ExecuTorch refused it, or the process has loaded one for other threads.
        """
        with silenced():
            from executorch.extension.pybindings import portable_lib

        if portable_lib._threadpool_get_thread_count() != self.threads:
            if _LOADED:
                raise EngineError(
                    f"this process has loaded an ExecuTorch program for {portable_lib._threadpool_get_thread_count()} "
                    f"threads, which engine.threads={self.threads} would take away from it"
                )
            portable_lib._unsafe_reset_threadpool(self.threads)
        content = stored.read(folder / _MODEL) if self.compressed else (folder / _MODEL).read_bytes()
        try:
            loaded = portable_lib._load_for_executorch_from_buffer(content, enable_etdump=traced)
            loaded.method_meta("forward")  # what is no program is told no earlier than it is asked for a method
        except Exception as error:
            raise EngineError(f"executorch refused the program: {first_line(error)}") from error
        return loaded, content

    def _lowered(self, graph: Graph) -> tuple[bytes, dict[str, Any]]:
        """The program, and how many operators XNNPACK took and which it left."""
        with silenced():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.devtools.backend_debug import get_delegation_info
            from executorch.exir import to_edge_transform_and_lower

            try:
                captured = exported(graph.module, graph.signature, self.static_batch, any_length=True)
                lowered = to_edge_transform_and_lower(captured, partitioner=[XnnpackPartitioner()])
                found = get_delegation_info(lowered.exported_program().graph_module)
                program = bytes(lowered.to_executorch().buffer)
            except Exception as error:
                raise EngineError(f"executorch refused the module: {first_line(error)}") from error
        portable = {
            name.removeprefix("aten_"): each.non_delegated
            for name, each in found.delegation_by_operator.items()
            if each.non_delegated and name != "getitem"
        }
        return program, {"delegated": found.num_delegated_nodes, "portable": portable}


_LOADED: WeakSet[_Runner] = WeakSet()
"""What holds on to the threads of the process. Setting their number frees the old ones under a program in use."""


class _Runner:
    """A loaded program. Its memory is planned for one request at a time: several callers wait for one another."""

    def __init__(self, engine: ExecuTorch, folder: Path, *, traced: bool = False) -> None:
        self._sources = read_inputs(folder)
        self._batch = engine.static_batch
        self._lock = Lock()
        self._program, self._bytes = engine.program(folder, traced=traced)
        _LOADED.add(self)

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        check_shapes(self._sources, inputs, any_length=True)
        with self._lock:
            return in_batches(self._run, inputs, self._batch)

    def write_trace(self, file: Path) -> None:
        self._program.write_etdump_result_to_file(str(file))

    def _run(self, inputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
        values = list(tensors(self._sources, inputs).values())
        outputs: NDArray[Any] = self._program.forward(values)[0].numpy()
        return outputs


def _works(events: Sequence[Any]) -> Iterator[tuple[str, Sequence[float]]]:
    """Name of each portable kernel, each kernel within a delegate and each delegate's overhead, and its milliseconds of
    every run."""
    inside: dict[int, list[Sequence[float]]] = defaultdict(list)
    for event in events:
        if event.is_delegated_op:
            inside[event._instruction_id].append(event.perf_data.raw)
            yield event.name.partition(" #")[0], event.perf_data.raw
    for event in events:
        if event.name.startswith(_PORTABLE):
            yield event.name.removeprefix(_PORTABLE).partition(".")[0], event.perf_data.raw
        elif event.name == "DELEGATE_CALL":
            kernels = map(sum, zip(*inside[event._instruction_id], strict=True))
            pairs = zip_longest(event.perf_data.raw, kernels, fillvalue=0.0)
            yield _OVERHEAD, [max(0.0, whole - within) for whole, within in pairs]


def _kind(name: str) -> str:
    """Of `native_layer_norm` or `Convolution (NHWC, F32) IGEMM`."""
    words = name.partition(" (")[0]
    bare = words.replace(" ", "").removesuffix("_copy").removeprefix("native_")
    return next((each for part, each in _KINDS.items() if part in words), None) or kind(bare)

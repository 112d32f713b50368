"""XLA, the compiler of TPUs, through JAX: here on its CPU back end."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from hasten.artefacts.operators import kind
from hasten.core.errors import EngineError, first_line
from hasten.core.interfaces import Engine, Graph, Input, OperatorTime, Runner, Signature, Target
from hasten.core.tpu import num_tpus
from hasten.engines import stored
from hasten.engines.checks import check_parity, unavailable
from hasten.engines.tensors import read_inputs, write_signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MODEL = "model.stablehlo"
_PLATFORMS = ("cpu", "tpu")
_WARMUP = 3
_NARROW = {"int64": "int32", "float64": "float32"}
"""JAX calculates in 32 bit: tokens and classes fit."""
_QUANTIZED = (
    "xla calculates quantize/dequantize pairs in floats, which is slower than the float graph: choose "
    "engine=onnxruntime or engine=openvino"
)


@dataclass(frozen=True, kw_only=True)
class Xla(Engine):
    """Translates the ONNX graph into StableHLO, the portable form, which is compiled where it is loaded.

    The artefact is one file for CPUs and TPUs. What only a TPU can show: its speed, and whether its rounding of float32
    products (three passes in bfloat16 at the highest precision) keeps the quality.

    Attributes:
        threads: of the pool that the CPU back end shares between all models of a process. It is made when JAX is used
            first: a later engine of the same process has the threads of the first.
        static_batch: rows per request that the program is compiled for when it is loaded; other numbers are compiled
            when they first come. None: all of them when they come.
        precision: of the factors in convolutions and linear layers; sums, and all else, are float32.
        compressed: the program lies compressed on disk and is unpacked when it is loaded.
    """

    family = "xla"
    libraries = ("jax", "jaxlib")
    extra = "xla"
    devices = ("cpu", "tpu")
    reads_onnx = True

    threads: Annotated[int, Ge(1)] = 1
    static_batch: Annotated[int, Ge(1)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compressed: bool = False

    def supports(self, quantized: bool, target: Target) -> str | None:
        if reason := unavailable(self, "jax", target):
            return reason
        if target.device == "tpu" and not num_tpus():
            return "no TPU is seen here, and times of XLA's CPU back end are none of a TPU: target=cpu engine=xla"
        return _QUANTIZED if quantized else None

    def compile(self, graph: Graph, folder: Path) -> None:
        if graph.quantized:
            raise EngineError(_QUANTIZED)
        write_signature(graph.signature, folder)
        with TemporaryDirectory(dir=folder) as scratch:
            program = Path(scratch, _MODEL)
            program.write_bytes(self._exported(graph))
            stored.store(program, folder / _MODEL, self.compressed)
        check_parity(self.load(folder), graph, "xla", self.static_batch, self.precision)

    def load(self, folder: Path) -> Runner:
        import jax

        program, sources = self._program(folder), read_inputs(folder)
        call = jax.jit(program.call)
        fixed = call.lower(*self._shapes(sources)).compile() if self._is_static(sources) else None
        expected = tuple(each.shape for each in self._shapes(sources)) if fixed else ()

        def run(*inputs: NDArray[Any]) -> NDArray[Any]:
            given = [_narrow(source, values) for source, values in zip(sources, inputs, strict=True)]
            known = fixed is not None and tuple(each.shape for each in given) == expected
            return np.asarray(fixed(*given) if fixed is not None and known else call(*given))

        return run

    def integer_share(self, folder: Path) -> float:
        return 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """What XLA made of the ONNX operators, by its own profile; a fusion counts as the operator that ends it."""
        import jax

        program, sources = self._program(folder), read_inputs(folder)
        given = [_narrow(source, values) for source, values in zip(sources, inputs, strict=True)]
        compiled = jax.jit(program.call).lower(*given).compile()
        for _ in range(_WARMUP):
            np.asarray(compiled(*given))
        with TemporaryDirectory() as scratch:
            with jax.profiler.trace(scratch):
                for _ in range(repeats):
                    np.asarray(compiled(*given))
            times = _times(Path(scratch))
        origins = _origins(compiled.as_text())
        return [
            OperatorTime(
                name=name,
                kind=kind(origins.get(name, name)),
                milliseconds=sum(nanoseconds) / 1e6 / repeats,
                calls=len(nanoseconds) / repeats,
            )
            for name, nanoseconds in times.items()
        ]

    def _exported(self, graph: Graph) -> bytes:
        """The program for any number of rows, and any length where the signature has one."""
        jax = self._jax()
        from hasten.engines.onnx_jax import to_jax

        try:
            program = jax.export.export(jax.jit(to_jax(graph.onnx, self.precision)), platforms=_PLATFORMS)
            serialized: bytes = program(*_symbolic(graph.signature)).serialize()
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"xla refused the graph: {first_line(error)}") from error
        return serialized

    def _program(self, folder: Path) -> Any:
        jax = self._jax()
        with stored.unpacked(folder, self.compressed) as whole:
            return jax.export.deserialize(bytearray((whole / _MODEL).read_bytes()))

    def _jax(self) -> Any:
        # PJRT's CPU client sizes its pool by this variable when it starts; it knows no option of that kind.
        os.environ["NPROC"] = str(self.threads)
        import jax
        import jax.export

        return jax

    def _is_static(self, sources: Sequence[Input]) -> bool:
        return self.static_batch is not None and not any(source.dynamic for source in sources)

    def _shapes(self, sources: Sequence[Input]) -> list[Any]:
        import jax

        return [
            jax.ShapeDtypeStruct((self.static_batch or 1, *each.shape), _NARROW.get(each.dtype, each.dtype))
            for each in sources
        ]


def _symbolic(signature: Signature) -> list[Any]:
    """Shapes of the inputs with unknown sizes; axes that are dynamic at the same place of several inputs are one."""
    import jax
    import jax.export

    scope = jax.export.SymbolicScope()
    shapes = []
    for source in signature.inputs:
        sizes = [f"length{axis}" if axis in source.dynamic else str(size) for axis, size in enumerate(source.shape)]
        shape = jax.export.symbolic_shape(", ".join(["batch", *sizes]), scope=scope)
        shapes.append(jax.ShapeDtypeStruct(shape, _NARROW.get(source.dtype, source.dtype)))
    return shapes


def _narrow(source: Input, values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(values, dtype=_NARROW.get(source.dtype, source.dtype))


def _times(folder: Path) -> dict[str, list[float]]:
    """Operator of the compiled program -> nanoseconds of each execution."""
    from jax.profiler import ProfileData

    found: dict[str, list[float]] = defaultdict(list)
    for file in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            for event in _events(plane):
                found[event.name].append(event.duration_ns)
    return found


def _events(plane: Any) -> Iterator[Any]:
    for line in plane.lines:
        for event in line.events:
            if any(name == "hlo_op" for name, _ in event.stats) and not event.name.startswith("end: "):
                yield event


def _origins(text: str) -> dict[str, str]:
    """Operator of the compiled program -> the ONNX operator that it comes from, by the scope in its metadata."""
    pairs = re.findall(r'%?([\w.-]+) = .*?metadata=\{op_name="([^"]*)"', text)
    return {name: _onnx_operator(scopes) for name, scopes in pairs}


def _onnx_operator(scopes: str) -> str:
    """`Conv` of `jit(run)/Conv/conv_general_dilated`."""
    named = [scope for scope in scopes.split("/") if scope[:1].isupper()]
    return named[-1] if named else scopes.rpartition("/")[2]

"""TVM, a compiler that searches by measurement for the loops of each kernel on this processor."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Gt

from hasten.core.errors import EngineError, first_line
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Engine, Graph, OperatorTime, Runner, Target
from hasten.engines import tvm_tuning
from hasten.engines.batches import check_shapes, exported, in_batches
from hasten.engines.checks import THREADS, check_parity, unavailable
from hasten.engines.silence import silenced
from hasten.engines.tensors import read_inputs, tensors, write_signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MODEL, _TUNING = "model.so", "tuning.json"
_WARMUP, _TIMED = 3, 15
_QUANTIZED = "tvm runs no quantized graph: choose engine=onnxruntime or engine=openvino"
_BROKEN_FFI = (0, 1, 15)
"""First version of apache-tvm-ffi with which the library of apache-tvm 0.27 crashes when it stores a module."""
_KINDS = {
    "conv": "convolution",
    "matmul": "linear",
    "norm": "normalization",
    "softmax": "normalization",
    "pool": "pooling",
    "mean": "pooling",
    "sum": "pooling",
    "vm.builtin": "other",
}
"""Part of a kernel's name -> kind of its work, the first that fits: a fused kernel is named after all that is in it."""


@dataclass(frozen=True, kw_only=True)
class Tvm(Engine):
    """Compiles the module, weights included, to a shared library for this processor. Shapes are fixed.

    Untuned, kernels are loops as the mathematics writes them, an order of magnitude slower than a library's.

    Attributes:
        threads: of one request; they belong to the calling thread, and a call that finds them changed sets them again.
        static_batch: rows per request that the library is made for; other numbers of rows are run in parts of that
            size, the last one filled up.
        tuning_seconds: that the search for faster kernels may take, besides the compilation itself; 0: not tuned.
        max_slowdown: a library that takes more than so many times as long as eager PyTorch is refused; None: none is.
    """

    family = "tvm"
    libraries = ("apache-tvm",)
    extra = "tvm"
    native_code: ClassVar[bool] = True
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {"threads": THREADS}

    threads: Annotated[int, Ge(1)] = 1
    static_batch: Annotated[int, Ge(1)] = 1
    tuning_seconds: Annotated[float, Ge(0)] = 60.0
    max_slowdown: Annotated[float, Gt(0)] | None = 3.0

    def supports(self, quantized: bool, target: Target) -> str | None:
        if reason := unavailable(self, "tvm", target):
            return reason
        if self.tuning_seconds and (reason := _cannot_tune()):
            return reason
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "tvm needs a C++ compiler (g++ or $CXX): apt-get install g++ or conda install gxx"
        return _QUANTIZED if quantized else None

    def compile(self, graph: Graph, folder: Path) -> None:
        if graph.quantized:
            raise EngineError(_QUANTIZED)
        for source in graph.signature.inputs:
            if source.dynamic:
                raise EngineError(f"tvm compiles fixed shapes: input {source.name} has a dynamic length")
        if self.tuning_seconds and (reason := _cannot_tune()):
            raise EngineError(reason)
        write_signature(graph.signature, folder)
        with silenced():
            try:
                note = self._build(graph, folder / _MODEL)
            except Exception as error:
                raise EngineError(f"tvm refused the module: {first_line(error)}") from error
        write_json(folder / _TUNING, {"note": note})
        run = self.load(folder)
        check_parity(run, graph, "tvm", self.static_batch)
        if self.max_slowdown is not None:
            self._check_slowdown(run, graph, self.max_slowdown)

    def load(self, folder: Path) -> Runner:
        return _Runner(self, folder)

    def notes(self, folder: Path) -> tuple[str, ...]:
        return (read_json(folder / _TUNING)["note"],)

    def integer_share(self, folder: Path) -> float:
        return 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The kernels and the virtual machine's own calls, summed by name, timed around each of them, which adds some
        microseconds to each."""
        run = _Runner(self, folder)
        for _ in range(_WARMUP):
            run(*inputs)
        seconds: dict[str, list[float]] = defaultdict(list)
        run.watch(lambda name, spent: seconds[name].append(spent))
        for _ in range(repeats):
            run(*inputs)
        return [
            OperatorTime(
                name=name, kind=_kind(name), milliseconds=sum(spent) * 1000 / repeats, calls=len(spent) / repeats
            )
            for name, spent in seconds.items()
        ]

    def _build(self, graph: Graph, library: Path) -> str:
        """Writes the library and says how it was tuned."""
        _set_threads(self.threads)
        import tvm
        from tvm import relax
        from tvm.relax.frontend.torch import from_exported_program

        program = exported(graph.module, graph.signature, self.static_batch, any_length=False)
        processor = tvm.target.codegen.llvm_get_system_cpu()
        target = tvm.target.Target({"kind": "llvm", "mcpu": processor, "num-cores": self.threads})
        passes = (
            relax.transform.DecomposeOpsForInference(),
            relax.transform.CanonicalizeBindings(),
            relax.get_pipeline("zero"),
        )
        with target, tvm.transform.PassContext(opt_level=3):
            module = tvm.transform.Sequential(passes)(from_exported_program(program, run_ep_decomposition=True))
            note = "tvm runs untuned kernels (engine.tuning_seconds=0)"
            if self.tuning_seconds:
                tuned = tvm_tuning.tune(module, target, self.tuning_seconds)
                with tuned.database:
                    module = relax.transform.MetaScheduleApplyDatabase(enable_warning=False)(module)
                note = tuned.note
            tvm.compile(module, target=target).export_library(str(library))
        return note

    def _check_slowdown(self, run: Runner, graph: Graph, allowed: float) -> None:
        from safetensors.numpy import load_file

        reference = load_file(graph.reference)
        order = np.arange(self.static_batch) % len(reference["outputs"])
        rows = {name: reference[f"inputs.{name}"][order] for name in graph.signature.names}
        slowdown = _seconds(lambda: run(*rows.values())) / _eager_seconds(graph, rows, self.threads)
        if slowdown > allowed:
            raise EngineError(
                f"tvm is {slowdown:.1f}x slower than eager PyTorch here, engine.max_slowdown={allowed:g} allows "
                f"{allowed:g}x: give it more engine.tuning_seconds ({self.tuning_seconds:g})"
            )


class _Runner:
    """A loaded library. The virtual machine runs one request at a time: several callers wait for one another."""

    def __init__(self, engine: Tvm, folder: Path) -> None:
        self._sources = read_inputs(folder)
        self._batch, self._threads = engine.static_batch, engine.threads
        self._lock = Lock()
        _set_threads(engine.threads)
        with silenced():
            import tvm
            from tvm import relax

            try:
                self._machine = relax.VirtualMachine(tvm.runtime.load_module(str(folder / _MODEL)), tvm.cpu())
            except Exception as error:
                raise EngineError(f"tvm refused the library: {first_line(error)}") from error
        self._tensor, self._main = tvm.runtime.tensor, self._machine["main"]

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        check_shapes(self._sources, inputs, any_length=False)
        with self._lock:
            _set_threads(self._threads)
            return in_batches(self._run, inputs, self._batch)

    def watch(self, tell: Callable[[str, float], None]) -> None:
        """Has the name of each function that the machine calls told, and the seconds that it took."""
        starts: list[float] = []

        def instrument(_: Any, name: str, before: bool, __: Any, *___: Any) -> None:
            if before:
                starts.append(time.perf_counter())
            else:
                tell(name, time.perf_counter() - starts.pop())

        self._machine.set_instrument(instrument)

    def _run(self, inputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
        rows = [self._tensor(each.numpy()) for each in tensors(self._sources, inputs).values()]
        found = self._main(*rows)
        outputs: NDArray[Any] = (found if hasattr(found, "numpy") else found[0]).numpy()
        return outputs


def _set_threads(number: int) -> None:
    """Of the pool of the calling thread, which is as large as the environment said when it was first used."""
    os.environ["TVM_NUM_THREADS"] = str(number)
    os.environ.setdefault("TVM_BIND_THREADS", "0")  # else it ties the calling thread to one core for good
    import tvm

    if tvm.runtime.num_threads() != number:
        tvm.get_global_func("runtime.config_threadpool")(1, number)


def _cannot_tune() -> str | None:
    try:
        found = version("apache-tvm-ffi")
    except PackageNotFoundError:  # built from source, with an ffi of its own
        return None
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < _BROKEN_FFI:
        return None
    return (
        f"apache-tvm-ffi {found} crashes tvm's tuning: pip install 'apache-tvm-ffi<{'.'.join(map(str, _BROKEN_FFI))}' "
        "or set engine.tuning_seconds=0"
    )


def _eager_seconds(graph: Graph, rows: Mapping[str, NDArray[Any]], threads: int) -> float:
    import torch

    from hasten.artefacts.module import forward, rebuild

    module, before = rebuild(graph.module), torch.get_num_threads()
    inputs = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in rows.items()}
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return _seconds(lambda: forward(module, inputs))
    finally:
        torch.set_num_threads(before)


def _seconds(call: Callable[[], Any]) -> float:
    """Of one call, the median of some."""
    times = []
    for _ in range(_WARMUP + _TIMED):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[_WARMUP:])


def _kind(kernel: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in kernel), "elementwise")

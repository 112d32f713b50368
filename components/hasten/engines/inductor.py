"""PyTorch's own compiler, ahead of time, to native code for this processor or GPU."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from hasten.core.errors import EngineError, first_line
from hasten.core.interfaces import Engine, Graph, Input, OperatorTime, Runner, Signature, Target
from hasten.engines import arithmetic, cuda, stored
from hasten.engines.checks import THREADS, check_parity, unavailable
from hasten.engines.tensors import in_parts, read_inputs, read_signature, tensors, write_signature

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn
    from torch.export import ExportedProgram

_MODEL = "model.pt2"
_PROFILED = "profiled.pt2"
"""The same with a mark round every kernel, which costs a few microseconds each; for `operators`, not to be deployed."""
_WARMUP = 3
_QUANTIZED = "inductor runs no quantized graph: choose engine=onnxruntime or engine=openvino"
_KINDS = {
    "conv": "convolution",
    "linear": "linear",
    "mm": "linear",
    "attention": "linear",
    "norm": "normalization",
    "softmax": "normalization",
    "pool": "pooling",
    "mean": "pooling",
    "sum": "pooling",
    "cpp_fused": "elementwise",
}
"""Part of a kernel's name -> kind of its work, the first that fits: a fused kernel is named after all that is in it."""


@dataclass(frozen=True, kw_only=True)
class AotInductor(Engine):
    """Compiles the module with AOTInductor, weights folded in ("freezing"), to a shared library in a package.

    What it compiled runs on processors with the instructions of this one, or on GPUs of this compute capability, under
    the same version of PyTorch, and loading it executes it: load only packages that you trust.

    Attributes:
        device: what the code is for, `cpu` or `cuda`; CUDA's first GPU.
        threads: of one request, for which the code is generated. They belong to the whole process: a call that finds
            them changed sets them again.
        static_batch: rows per request that the code is compiled for, which saves shape work; other numbers of rows are
            run in parts of that size, the last one filled up. None: any number.
        precision: of matrix products and convolutions, and of their weights; the rest as autocast decides. float16 is
            for GPUs.
        compressed: the package lies compressed on disk and is unpacked when it is loaded.
    """

    family = "inductor"
    libraries = ("torch",)
    native_code: ClassVar[bool] = True
    devices = ("cpu", "gpu")
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "threads": THREADS,
        "static_batch": (None, "${target.batch_size}"),
    }

    device: cuda.DeviceName = "cpu"
    threads: Annotated[int, Ge(1)] = 1
    static_batch: Annotated[int, Ge(1)] | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compressed: bool = False

    def supports(self, quantized: bool, target: Target) -> str | None:
        if quantized:
            return _QUANTIZED
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "inductor needs a C++ compiler (g++ or $CXX): apt-get install g++ or conda install gxx"
        reason = unavailable(self, "torch", target)
        if reason is None and self.device == "cuda" and find_spec("triton") is None:
            return "triton, which inductor writes the kernels of a GPU in, is not installed: pip install triton"
        return reason

    def compile(self, graph: Graph, folder: Path) -> None:
        if graph.quantized:
            raise EngineError(_QUANTIZED)
        from hasten.artefacts.capture import quiet
        from hasten.artefacts.module import rebuild

        place, batch = cuda.place(self.device), self.static_batch
        write_signature(graph.signature, folder)
        with TemporaryDirectory(dir=folder) as scratch, self._own_threads(), _environment(scratch), quiet():
            try:
                module = arithmetic.cast(rebuild(graph.module), self.precision).to(place)
                program = _exported(_calculating_in(module, self.precision, place), graph.signature, batch, place)
                _package(program, Path(scratch, _MODEL), on_gpu=self.device == "cuda")
                if self.device == "cpu":
                    _package(program, folder / _PROFILED, profiled=True)
            except Exception as error:
                raise EngineError(f"inductor refused the module: {first_line(error)}") from error
            stored.store(Path(scratch, _MODEL), folder / _MODEL, self.compressed)
        tolerances = cuda.tolerances(self.device)
        check_parity(self.load(folder), graph, "inductor", batch, self.precision, tolerances)

    def load(self, folder: Path) -> Runner:
        with stored.unpacked(folder, self.compressed) as whole:
            return self._runner(read_inputs(folder), whole / _MODEL)

    def notes(self, folder: Path) -> tuple[str, ...]:
        return cuda.notes(read_signature(folder)) if self.device == "cuda" else ()

    def integer_share(self, folder: Path) -> float:
        return 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The generated kernels and the library's that they call, summed by name: of a build that marks them, or as a
        GPU ran them, with the copies there and back."""
        if self.device == "cuda":
            return cuda.kernels(self.load(folder), inputs, repeats)
        # Kineto announces each profile on stderr. It reads its level when it is first used.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from torch.profiler import ProfilerActivity, profile

        run = self._runner(read_inputs(folder), folder / _PROFILED)
        for _ in range(_WARMUP):
            run(*inputs)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(repeats):
                run(*inputs)
        microseconds: dict[str, list[float]] = defaultdict(list)
        for event in profiled.events() or ():
            if event.cpu_parent is None and event.name.startswith(("graph_", "aoti_torch_")):
                microseconds[event.name].append(event.cpu_time_total)
        return [
            OperatorTime(
                name=name, kind=_kind(name), milliseconds=sum(times) / 1000 / repeats, calls=len(times) / repeats
            )
            for name, times in microseconds.items()
        ]

    def _runner(self, sources: Sequence[Input], package: Path) -> Runner:
        import torch

        model, threads = _loaded(package), self.threads
        if self.device == "cuda":
            return self._in_parts(sources, cuda.runner(cuda.Lane(sources), lambda rows: _called(model, rows)))

        def run(*inputs: NDArray[Any]) -> NDArray[Any]:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                outputs: NDArray[Any] = _called(model, tensors(sources, inputs)).numpy()
            return outputs

        return self._in_parts(sources, run)

    def _in_parts(self, sources: Sequence[Input], run: Runner) -> Runner:
        """Checks the shapes of a request and runs it in parts of the number of rows that the code is compiled for."""
        batch = self.static_batch

        def run_all(*inputs: NDArray[Any]) -> NDArray[Any]:
            for source, values in zip(sources, inputs, strict=True):
                _check_shape(source, values)
            return run(*inputs) if batch is None else in_parts(run, inputs, batch)

        return run_all

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _calculating_in(module: nn.Module, precision: str, place: str) -> nn.Module:
    """The module whose `forward` sets the precision itself: one that is set around the export gives wrong code."""
    if precision == "float32":
        return module
    forward = module.forward

    @wraps(forward)
    def cast(*inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        with arithmetic.calculating_in(precision, place):
            outputs: torch.Tensor = forward(*inputs, **named)
        return outputs.float()

    module.forward = cast
    return module


def _exported(module: nn.Module, signature: Signature, batch: int | None, place: str) -> ExportedProgram:
    import torch

    from hasten.artefacts.module import example

    rows = example(signature.inputs, batch or 2)  # a batch of 1 would be taken for a constant
    inputs = {name: values.to(place) for name, values in rows.items()}
    any_batch = {0: torch.export.Dim("batch")} if batch is None else {}
    shapes = {}
    for each in signature.inputs:
        lengths = {axis + 1: torch.export.Dim(f"length{axis}", max=each.shape[axis]) for axis in each.dynamic}
        shapes[each.name] = {**any_batch, **lengths}
    named = len(inputs) > 1
    return torch.export.export(
        module,
        () if named else tuple(inputs.values()),
        inputs if named else None,
        dynamic_shapes=shapes if named else tuple(shapes.values()),
    )


def _package(program: ExportedProgram, file: Path, *, on_gpu: bool = False, profiled: bool = False) -> None:
    import torch

    configs = {
        "freezing": True,
        "cpp.enable_kernel_profile": profiled,
        # A GPU's kernels are loaded when they are first called, and would otherwise be looked for in files beside the
        # library, which are gone by then.
        "aot_inductor.embed_kernel_binary": on_gpu,
        "compile_threads": 1,  # in this process, not in a pool that outlives it
        # Headers are kept for later in the system's temporary folder, 150 MB each.
        "aot_inductor.precompile_headers": False,
        "cpp_cache_precompile_headers": False,
    }
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=configs)


def _loaded(package: Path) -> Any:
    import torch

    # The library is unpacked into a file of its own, which is not needed any more once it is mapped, and which would
    # stay behind where the process is killed.
    with TemporaryDirectory() as scratch, _environment(scratch):
        try:
            return torch._inductor.aoti_load_package(str(package))
        except Exception as error:
            raise EngineError(f"inductor refused the package: {first_line(error)}") from error


@contextmanager
def _environment(scratch: str) -> Iterator[None]:
    """Lets PyTorch leave its files in a folder that will be gone."""
    gettempdir()  # asked for the first time in here, it would remember the folder
    wanted = {"TORCHINDUCTOR_CACHE_DIR": scratch, "TMPDIR": scratch}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_shape(source: Input, values: NDArray[Any]) -> None:
    """The generated code does not look at shapes: with a wrong one it would read what lies behind the array."""
    sizes = values.shape[1:]
    if len(sizes) == len(source.shape) and all(
        size == wanted or (axis in source.dynamic and 0 < size < wanted)
        for axis, (size, wanted) in enumerate(zip(sizes, source.shape, strict=True))
    ):
        return
    raise EngineError(f"the model was compiled for rows of {source.name} of shape {source.shape}, got {sizes}")


def _called(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    outputs: torch.Tensor = model(*inputs.values()) if len(inputs) == 1 else model(**inputs)
    return outputs


def _kind(kernel: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in kernel), "other")

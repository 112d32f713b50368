"""PyTorch without a compiler: the baseline that every speed-up is stated against."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from hasten.artefacts.operators import kind
from hasten.core.errors import EngineError
from hasten.core.interfaces import Engine, Graph, OperatorTime, Runner, Target
from hasten.engines import arithmetic, cuda, stored
from hasten.engines.checks import THREADS, check_parity, unavailable
from hasten.engines.tensors import read_inputs, read_signature, tensors, write_signature

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

_WEIGHTS = "weights.safetensors"
_FILES = ("module.json", "surgery.json", _WEIGHTS)
_WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Eager(Engine):
    """Runs the rebuilt module in inference mode.

    Attributes:
        device: where it runs, `cpu` or `cuda`; CUDA's first GPU.
        threads: of one request. They belong to the whole process: a call that finds them changed sets them again.
        precision: of matrix products and convolutions, and of their weights; the rest as autocast decides. float16 is
            for GPUs.
        channels_last: images lie with their channels together in memory, as the kernels of most convolutions want them.
        compressed: the weights lie compressed on disk and are unpacked when they are loaded.
    """

    family = "eager"
    libraries = ("torch",)
    devices = ("cpu", "gpu", "tpu", "fpga")
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {"threads": THREADS, "channels_last": (False, True)}

    device: cuda.DeviceName = "cpu"
    threads: Annotated[int, Ge(1)] = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compressed: bool = False

    def supports(self, quantized: bool, target: Target) -> str | None:
        if quantized:
            return "eager PyTorch runs no quantized graph: choose engine=onnxruntime or engine=openvino"
        return unavailable(self, "torch", target)

    def compile(self, graph: Graph, folder: Path) -> None:
        if graph.quantized:
            raise EngineError("eager PyTorch runs no quantized graph: choose engine=onnxruntime or engine=openvino")
        for name in _FILES:
            if (graph.module / name).exists():
                stored.store(graph.module / name, folder / name, self.compressed and name == _WEIGHTS)
        write_signature(graph.signature, folder)
        tolerances = cuda.tolerances(self.device)
        check_parity(self.load(folder), graph, "eager", precision=self.precision, tolerances=tolerances)

    def load(self, folder: Path) -> Runner:
        import torch

        module, sources = self._module(folder), read_inputs(folder)
        if self.device == "cuda":
            module.to(cuda.DEVICE)
            return cuda.runner(cuda.Lane(sources), partial(self._forward, module))
        threads = self.threads

        def run(*inputs: NDArray[Any]) -> NDArray[Any]:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                outputs: NDArray[Any] = self._forward(module, tensors(sources, inputs)).numpy()
            return outputs.copy()  # a module may return a view of its input or of a buffer

        return run

    def notes(self, folder: Path) -> tuple[str, ...]:
        return cuda.notes(read_signature(folder)) if self.device == "cuda" else ()

    def integer_share(self, folder: Path) -> float:
        return 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The operators that the module itself calls, each with everything below it, summed by name; on a GPU by the
        time of their kernels, and the copies to the GPU and back."""
        # Kineto announces each profile on stderr. It reads its level when it is first used.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from torch.profiler import ProfilerActivity, profile

        request, on_gpu = self._request(folder, inputs), self.device == "cuda"
        for _ in range(_WARMUP):
            request()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
            for _ in range(repeats):
                request()
        events = profiled.events() or ()
        microseconds: dict[str, list[float]] = defaultdict(list)
        for event in events:
            if event.cpu_parent is None and event.name.startswith("aten::"):
                microseconds[event.name].append(event.device_time_total if on_gpu else event.cpu_time_total)
        operators = [
            OperatorTime(
                name=name, kind=kind(name), milliseconds=sum(times) / 1000 / repeats, calls=len(times) / repeats
            )
            for name, times in microseconds.items()
        ]
        if not on_gpu:
            return operators
        copies = [each for each in cuda.summed(events, repeats) if cuda.is_copy_across(each.name)]
        return [each for each in operators if each.milliseconds and each.name != "aten::copy_"] + copies

    def _request(self, folder: Path, inputs: Sequence[NDArray[Any]]) -> Callable[[], object]:
        """What is profiled of a request: on a GPU all of it, on a CPU the module alone."""
        import torch

        if self.device == "cuda":
            return partial(self.load(folder), *inputs)
        module, rows = self._module(folder), tensors(read_inputs(folder), inputs)
        torch.set_num_threads(self.threads)
        return torch.inference_mode()(partial(self._forward, module, rows))

    def _module(self, folder: Path) -> nn.Module:
        import torch

        from hasten.artefacts.module import rebuild

        with stored.unpacked(folder, self.compressed) as whole:
            module = arithmetic.cast(rebuild(whole), self.precision)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs know no such `to`
        return module

    def _forward(self, module: nn.Module, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from hasten.artefacts.module import forward

        with arithmetic.calculating_in(self.precision, cuda.place(self.device)):
            return forward(module, arithmetic.laid_out(rows, self.channels_last)).float()

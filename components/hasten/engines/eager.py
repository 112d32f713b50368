"""PyTorch without a compiler: the baseline that every speed-up is stated against."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from hasten.artefacts.operators import kind
from hasten.core.errors import EngineError
from hasten.core.interfaces import Engine, Graph, OperatorTime, Runner, Target
from hasten.engines import arithmetic, stored
from hasten.engines.checks import THREADS, check_parity, unavailable
from hasten.engines.tensors import read_inputs, tensors, write_signature

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
        threads: of one request. They belong to the whole process: a call that finds them changed sets them again.
        precision: of matrix products and convolutions, with bfloat16 weights; the rest as autocast decides.
        channels_last: images lie with their channels together in memory, as the kernels of most convolutions want them.
        compressed: the weights lie compressed on disk and are unpacked when they are loaded.
    """

    family = "eager"
    libraries = ("torch",)
    devices = ("cpu", "gpu", "tpu", "fpga")
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {"threads": THREADS, "channels_last": (False, True)}

    threads: Annotated[int, Ge(1)] = 1
    precision: Literal["float32", "bfloat16"] = "float32"
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
        check_parity(self.load(folder), graph, "eager", precision=self.precision)

    def load(self, folder: Path) -> Runner:
        import torch

        module, sources = self._module(folder), read_inputs(folder)
        threads = self.threads

        def run(*inputs: NDArray[Any]) -> NDArray[Any]:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                outputs: NDArray[Any] = self._forward(module, tensors(sources, inputs)).numpy()
            return outputs.copy()  # a module may return a view of its input or of a buffer

        return run

    def integer_share(self, folder: Path) -> float:
        return 0.0

    def operators(self, folder: Path, inputs: Sequence[NDArray[Any]], repeats: int) -> Sequence[OperatorTime]:
        """The operators that the module itself calls, each with everything below it, summed by name."""
        # Kineto announces each profile on stderr. It reads its level when it is first used.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch
        from torch.profiler import ProfilerActivity, profile

        module, rows = self._module(folder), tensors(read_inputs(folder), inputs)
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            for _ in range(_WARMUP):
                self._forward(module, rows)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for _ in range(repeats):
                    self._forward(module, rows)
        microseconds: dict[str, list[float]] = defaultdict(list)
        for event in profiled.events() or ():
            if event.cpu_parent is None and event.name.startswith("aten::"):
                microseconds[event.name].append(event.cpu_time_total)
        return [
            OperatorTime(
                name=name, kind=kind(name), milliseconds=sum(times) / 1000 / repeats, calls=len(times) / repeats
            )
            for name, times in microseconds.items()
        ]

    def _module(self, folder: Path) -> nn.Module:
        import torch

        from hasten.artefacts.module import rebuild

        with stored.unpacked(folder, self.compressed) as whole:
            module = arithmetic.cast(rebuild(whole), self.precision)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def _forward(self, module: nn.Module, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from hasten.artefacts.module import forward

        with arithmetic.calculating_in(self.precision):
            return forward(module, arithmetic.laid_out(rows, self.channels_last)).float()

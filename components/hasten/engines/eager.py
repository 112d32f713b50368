"""PyTorch without a compiler: the baseline that every speed-up is stated against."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge

from hasten.artefacts.operators import kind
from hasten.core.errors import EngineError
from hasten.core.interfaces import Engine, Graph, OperatorTime, Runner, Target
from hasten.engines.checks import check_parity, unavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FILES = ("module.json", "surgery.json", "weights.safetensors")
_WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Eager(Engine):
    """Runs the rebuilt module in inference mode.

    Attributes:
        threads: of one request. They belong to the whole process: a call that finds them changed sets them again.
    """

    family = "eager"
    libraries = ("torch",)

    threads: Annotated[int, Ge(1)] = 1

    def supports(self, quantized: bool, target: Target) -> str | None:
        if quantized:
            return "eager PyTorch runs no quantized graph: choose engine=onnxruntime or engine=openvino"
        return unavailable("torch", self.threads, target)

    def compile(self, graph: Graph, folder: Path) -> None:
        if graph.quantized:
            raise EngineError("eager PyTorch runs no quantized graph: choose engine=onnxruntime or engine=openvino")
        for name in _FILES:
            if (graph.module / name).exists():
                shutil.copyfile(graph.module / name, folder / name)
        check_parity(self.load(folder), graph, "eager")

    def load(self, folder: Path) -> Runner:
        import torch

        from hasten.artefacts.module import rebuild

        module = rebuild(folder)
        threads = self.threads

        def run(inputs: NDArray[Any]) -> NDArray[Any]:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                outputs: NDArray[Any] = module(torch.from_numpy(_own(inputs))).numpy()
            return outputs.copy()  # a module may return a view of its input or of a buffer

        return run

    def integer_share(self, folder: Path) -> float:
        return 0.0

    def operators(self, folder: Path, inputs: NDArray[np.float32], repeats: int) -> Sequence[OperatorTime]:
        """The operators that the module itself calls, each with everything below it, summed by name."""
        # Kineto announces each profile on stderr. It reads its level when it is first used.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch
        from torch.profiler import ProfilerActivity, profile

        from hasten.artefacts.module import rebuild

        module, rows = rebuild(folder), torch.from_numpy(_own(inputs))
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            for _ in range(_WARMUP):
                module(rows)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for _ in range(repeats):
                    module(rows)
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


def _own(inputs: NDArray[Any]) -> NDArray[np.float32]:
    """The inputs as PyTorch can share them: contiguous floats that may be written to."""
    contiguous = np.ascontiguousarray(inputs, dtype=np.float32)
    return contiguous if contiguous.flags.writeable else contiguous.copy()

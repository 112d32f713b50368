"""Requests on an NVIDIA GPU: rows go there and outputs come back through page-locked memory, on one stream.

A Runner takes NumPy arrays and gives NumPy arrays, so that the time of a request holds both copies. They are cheap from
page-locked memory alone: the GPU reads and writes that by itself, while the host goes on (CUDA C++ Best Practices
Guide, "Pinned Memory"). Rows are therefore laid into buffers that stay from request to request, both copies and all
kernels are queued on one stream, and the host waits for that stream once, at the end.

Float32 is what each library makes of it: PyTorch's convolutions, ONNX Runtime and TensorRT round the factors of
products to TF32, with 10 bits of mantissa, on GPUs that have it. So did the user's model before anything was changed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hasten.core.interfaces import Input, OperatorTime, Runner, Signature
from hasten.engines import checks

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

DeviceName = Literal["cpu", "cuda"]
DEVICE = "cuda"
TOLERANCES: Mapping[str, float] = {"float32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference from eager PyTorch on the CPU, as a share of the range of its outputs, by the format that a GPU
calculates in: TF32 and float16 have 10 bits of mantissa, bfloat16 has 7."""
WARMUP = 3

_KINDS = {
    "memcpy": "copy",
    "memset": "copy",
    "nchwtonhwc": "copy",
    "nhwctonchw": "copy",
    "transpose": "copy",
    "triton_poi": "elementwise",
    "fprop": "convolution",
    "conv": "convolution",
    "winograd": "convolution",
    "attention": "linear",
    "fmha": "linear",
    "flash": "linear",
    "gemm": "linear",
    "gemv": "linear",
    "_mm": "linear",
    "softmax": "normalization",
    "norm": "normalization",
    "pool": "pooling",
    "reduce": "pooling",
    "triton_red": "pooling",
    "triton_per": "pooling",
    "quantize": "quantize",
    "elementwise": "elementwise",
}
"""Part of a kernel's name -> kind of its work, the first that fits: Triton names a fused kernel after all that is in
it, and cuDNN a convolution after the product of matrices that it is."""


def place(device: DeviceName) -> str:
    """PyTorch's name of an engine's device."""
    return DEVICE if device == "cuda" else "cpu"


def tolerances(device: DeviceName) -> Mapping[str, float]:
    """Precision -> largest difference from eager PyTorch in float32 on the CPU, for an engine on the device."""
    return TOLERANCES if device == "cuda" else checks.TOLERANCES


class Lane:
    """The way of requests to the GPU and back, for one caller at a time.

    Made after the weights are on the GPU: it waits for them once, as they were copied on another stream.
    """

    def __init__(self, sources: Sequence[Input]) -> None:
        import torch

        self._sources = sources
        self._inputs = {each.name: _Buffers(each.dtype) for each in sources}
        self._outputs = _Buffers("float32")
        torch.cuda.synchronize()
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def send(self, inputs: Sequence[NDArray[Any]]) -> dict[str, torch.Tensor]:
        """The rows on the GPU, by the names of the inputs; the copies are queued, and the host does not wait for them.

        Requests of one shape find their rows at one address.

        Raises:
            ValueError: there is not one array for each input.
        """
        rows = {}
        for source, values in zip(self._sources, inputs, strict=True):
            buffers = self._inputs[source.name]
            buffers.reshape(values.shape)
            np.copyto(buffers.array, values, casting="unsafe")
            rows[source.name] = buffers.device.copy_(buffers.host, non_blocking=True)
        return rows

    def outputs(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Where on the GPU outputs of that shape, in float32, may be written to; one address for one shape."""
        self._outputs.reshape(shape)
        return self._outputs.device

    def fetch(self, outputs: torch.Tensor) -> NDArray[Any]:
        """The outputs in an array of their own, in float32, after the one wait of a request."""
        self._outputs.reshape(tuple(outputs.shape))
        self._outputs.host.copy_(outputs.float(), non_blocking=True)
        self.stream.synchronize()
        return self._outputs.array.copy()


class _Buffers:
    """Memory of one input or of the outputs on both sides, as large as the largest request so far."""

    host: torch.Tensor
    device: torch.Tensor
    array: NDArray[Any]

    def __init__(self, dtype: str) -> None:
        import torch

        self._dtype: torch.dtype = getattr(torch, dtype)
        self._shape: tuple[int, ...] | None = None
        self._whole: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))

    def reshape(self, shape: tuple[int, ...]) -> None:
        """Lets `host`, `device` and `array` be of that shape. What lies in them is lost."""
        if shape == self._shape:
            return
        size = prod(shape)
        if size > len(self._whole[0]):
            self._whole = page_locked(size, self._dtype), on_device(size, self._dtype)
        self.host, self.device = (whole[:size].view(shape) for whole in self._whole)
        self.array = self.host.numpy()
        self._shape = shape


def page_locked(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host that the GPU reads and writes by itself."""
    import torch

    return torch.empty(size, dtype=dtype, pin_memory=True)


def on_device(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of the GPU."""
    import torch

    return torch.empty(size, dtype=dtype, device=DEVICE)


def runner(lane: Lane, calculate: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]) -> Runner:
    """Requests through the lane. Several callers wait for one another.

    Args:
        calculate: queues what it does with the rows (B, *shape) on PyTorch's current stream, and gives the outputs
            (B, *output_shape) on the GPU.
    """
    import torch

    lock = Lock()

    def run(*inputs: NDArray[Any]) -> NDArray[Any]:
        with lock, torch.inference_mode(), torch.cuda.stream(lane.stream):
            return lane.fetch(calculate(lane.send(inputs)))

    return run


def notes(signature: Signature) -> tuple[str, ...]:
    """What the report should say of the copies of a request."""
    there = sum(prod(each.shape) * np.dtype(each.dtype).itemsize for each in signature.inputs)
    back = prod(signature.output_shape) * np.dtype(np.float32).itemsize
    return (
        f"Of every row {there} bytes are copied to the GPU and {back} bytes back, through page-locked memory; latency "
        "holds both copies.",
    )


def kernels(run: Runner, inputs: Sequence[NDArray[Any]], repeats: int) -> list[OperatorTime]:
    """What the GPU did for a request, kernels and copies, summed by name, as CUPTI saw it through PyTorch's profiler.

    It sees all that the process does on the GPU, whichever library asked for it.
    """
    # Kineto announces each profile on stderr. It reads its level when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    for _ in range(WARMUP):
        run(*inputs)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            run(*inputs)
    return summed(profiled.events() or (), repeats)


def copies(run: Runner, inputs: Sequence[NDArray[Any]], repeats: int) -> list[OperatorTime]:
    """Of `kernels` those that bring rows to the GPU and outputs back."""
    return [each for each in kernels(run, inputs, repeats) if is_copy_across(each.name)]


def is_copy_across(name: str) -> bool:
    """Whether CUPTI calls a copy so that crosses between host and GPU."""
    return name.startswith(("Memcpy HtoD", "Memcpy DtoH"))


def summed(events: Iterable[Any], repeats: int) -> list[OperatorTime]:
    """The events of PyTorch's profiler that happened on the GPU, by name."""
    microseconds: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type.name == "CUDA":
            microseconds[event.name].append(event.time_range.elapsed_us())
    return [
        OperatorTime(name=name, kind=_kind(name), milliseconds=sum(times) / 1000 / repeats, calls=len(times) / repeats)
        for name, times in microseconds.items()
    ]


def _kind(kernel: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in kernel.lower()), "other")

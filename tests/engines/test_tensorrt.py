"""TensorRT, played by ONNX Runtime behind the part of its interface that is used.

Names and signatures are those of the bindings 10.13 and 11.4. What a GPU alone can show is in `test_cuda.py`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from hasten.artefacts.module import forward, rebuild
from hasten.core.errors import EngineError
from hasten.core.interfaces import Columns, Graph, Target
from hasten.engines import checks, cuda, tensorrt
from hasten.engines.tensorrt import TensorRt

TARGET = Target(device="gpu", reference="cuda", threads=1, batch_size=1, engines=("tensorrt",))


class ILogger:
    Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)

    def log(self, severity: int, msg: str) -> None: ...


class IProfiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None: ...


class OnnxParser:
    def __init__(self, network: dict[str, Any], logger: ILogger) -> None:
        self._network = network
        self._errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: self._errors[index])

    def parse(self, model: bytes) -> bool:
        self._network["model"] = model
        try:
            onnxruntime.InferenceSession(model)
        except Exception:
            self._errors = ["In node 0 with name: Conv_0\nand operator: Conv: unsupported"]
        return not self._errors


class Config:
    builder_optimization_level = 3
    profiling_verbosity = "LAYER_NAMES_ONLY"

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.limits: dict[str, int] = {}
        self.profiles: list[dict[str, Any]] = []

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def set_memory_pool_limit(self, pool: str, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class Builder:
    last: Config
    """The configuration of the last build."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> dict[str, Any]:
        assert flags == 2, "strongly typed"
        return {}

    def create_builder_config(self) -> Config:
        Builder.last = Config()
        return Builder.last

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *three: shapes.update({name: three}))

    def build_serialized_network(self, network: dict[str, Any], config: Config) -> bytearray | None:
        if config.limits.get("WORKSPACE") == 0:
            self._logger.log(ILogger.Severity.WARNING, "slow")
            self._logger.log(ILogger.Severity.ERROR, "10: Could not find any implementation for node Conv_0.")
            return None
        (profile,) = config.profiles
        return bytearray(json.dumps(profile).encode() + b"\n" + network["model"])


class Context:
    profiler: Any = None

    def __init__(self, profile: dict[str, Any], session: Any, logger: ILogger) -> None:
        self._profile = profile
        self._session = session
        self._logger = logger
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._profile[name]
        fits = len(shape) == len(most) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if not fits:
            self._logger.log(ILogger.Severity.ERROR, "3: shape is out of the profile")
        self._shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (output,) = self._session.get_outputs()
        return (next(iter(self._shapes.values()))[0], *output.shape[1:])

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7
        feed = {
            each.name: self._at(each.name, self._shapes[each.name], np.int64 if "int64" in each.type else np.float32)
            for each in self._session.get_inputs()
        }
        (outputs,) = self._session.run(None, feed)
        self._at("output", outputs.shape, np.float32)[...] = outputs
        self.runs += 1
        if self.profiler:
            for name, ms in (("Conv_0 + Relu_0", 2.0), ("__myl_kgen0", 1.0)):
                self.profiler.report_layer_time(name, ms)
        return True

    def _at(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_byte * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


LAYERS: list[Any] = [
    "Reformatting CopyNode for Input Tensor 0",
    {
        "Name": "Conv_0 + Relu_0",
        "LayerType": "CaskConvolution",
        "ParameterType": "Convolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
    },
    {
        "Name": "Conv_1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "int8 in its name", "Format/Datatype": "Row major linear FP32"}],
    },
    {"Name": "Gemm_0", "LayerType": "gemm", "Inputs": [{"Name": "y", "Format": "Row major", "DataType": "Int8"}]},
    {"Name": "__myl_kgen0", "LayerType": "kgen", "Inputs": [{"Name": "z", "DataType": "Int8"}]},
]


class CudaEngine:
    num_io_tensors: int
    last: Context

    def __init__(self, plan: bytes, logger: ILogger) -> None:
        head, _, model = plan.partition(b"\n")
        self._profile, self._session, self._logger = json.loads(head), onnxruntime.InferenceSession(model), logger
        self._names = [each.name for each in (*self._session.get_inputs(), *self._session.get_outputs())]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "OUTPUT" if name == "output" else "INPUT"

    def create_execution_context(self) -> Context:
        CudaEngine.last = Context(self._profile, self._session, self._logger)
        return CudaEngine.last

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": LAYERS}))


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> CudaEngine | None:
        if not plan.startswith(b"{"):
            self._logger.log(ILogger.Severity.ERROR, "6: The engine plan file is not compatible\nwith this version")
            return None
        return CudaEngine(plan, self._logger)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> Iterator[ModuleType]:
    module = ModuleType("tensorrt")
    for each in (ILogger, IProfiler, OnnxParser, Builder, Runtime):
        setattr(module, each.__name__, each)
    module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)  # type: ignore[attr-defined]
    for kind, name in (
        ("BuilderFlag", "DISABLE_TIMING_CACHE"),
        ("MemoryPoolType", "WORKSPACE"),
        ("ProfilingVerbosity", "DETAILED"),
        ("LayerInformationFormat", "JSON"),
        ("TensorIOMode", "OUTPUT"),
    ):
        setattr(module, kind, SimpleNamespace(**{name: name}))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def _eager(graph: Graph, rows: Columns) -> np.ndarray:
    with torch.inference_mode():
        return forward(rebuild(graph.module), {name: torch.tensor(values) for name, values in rows.items()}).numpy()


def _images(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((number, 3, 8, 8), dtype=np.float32)


def _texts(number: int, length: int) -> Columns:
    draw = np.random.default_rng(1)
    mask = np.arange(length) < draw.integers(1, length + 1, (number, 1))
    return {"ids": draw.integers(0, 30, (number, length)), "mask": mask.astype(np.int64)}


@pytest.mark.parametrize("engine", [TensorRt(), TensorRt(static_batch=2), TensorRt(max_batch=2)])
def test_agrees_with_eager_pytorch_at_any_batch_size(engine: TensorRt, graph: Graph, tmp_path: Path) -> None:
    engine.compile(graph, tmp_path)
    run = engine.load(tmp_path)
    for number in (1, 2, 7):
        rows = _images(number)
        np.testing.assert_allclose(run(rows), _eager(graph, {"input": rows}), rtol=1e-4, atol=1e-5)
    assert {file.name for file in tmp_path.iterdir()} == {"model.plan", "signature.json"}


def test_takes_several_inputs_of_any_length(reader: Graph, tmp_path: Path) -> None:
    TensorRt().compile(reader, tmp_path)
    run = TensorRt().load(tmp_path)
    for number, length in ((1, 10), (3, 4), (70, 2)):
        rows = _texts(number, length)
        np.testing.assert_allclose(run(*rows.values()), _eager(reader, rows), rtol=1e-4, atol=1e-5)


def test_builds_for_the_shapes_that_may_come(reader: Graph, graph: Graph, tmp_path: Path) -> None:
    TensorRt(max_batch=8).compile(reader, tmp_path)
    assert Builder.last.profiles == [dict.fromkeys(("ids", "mask"), ((1, 1), (8, 10), (8, 10)))]
    TensorRt(static_batch=4).compile(graph, tmp_path)
    assert Builder.last.profiles == [{"input": ((4, 3, 8, 8),) * 3}]


def test_settings_reach_the_builder(graph: Graph, tmp_path: Path) -> None:
    TensorRt(optimization_level=5, workspace_mb=256).compile(graph, tmp_path)
    assert Builder.last.builder_optimization_level == 5
    assert Builder.last.profiling_verbosity == "DETAILED"
    assert Builder.last.limits == {"WORKSPACE": 256_000_000}
    assert Builder.last.flags == ["DISABLE_TIMING_CACHE"]


def test_sixteen_bits_are_written_into_the_graph(graph: Graph, tmp_path: Path) -> None:
    engine = TensorRt(precision="float16")
    engine.compile(graph, tmp_path)
    rows, plain = _images(3), _eager(graph, {"input": _images(3)})
    error = np.abs(engine.load(tmp_path)(rows) - plain).max()
    assert 1e-6 * np.ptp(plain) < error < cuda.TOLERANCES["float16"] * np.ptp(plain)


class Recorder:
    """`torch.cuda.CUDAGraph` of a context whose runs it counts as recorded."""

    replays = 0

    def replay(self) -> None:
        Recorder.replays += 1
        CudaEngine.last.execute_async_v3(7)


def test_a_cuda_graph_is_recorded_for_each_new_shape(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda each, stream: recorded.append(each) or nullcontext())
    monkeypatch.setattr(Recorder, "replays", 0)
    engine = TensorRt(cuda_graph=True)
    TensorRt().compile(graph, tmp_path)
    run = engine.load(tmp_path)
    for number in (2, 2, 2, 3, 2):
        rows = _images(number)
        np.testing.assert_allclose(run(rows), _eager(graph, {"input": rows}), rtol=1e-4, atol=1e-5)
    assert (len(recorded), Recorder.replays) == (3, 5)


def test_counts_the_layers_that_read_integers(graph: Graph, tmp_path: Path) -> None:
    TensorRt().compile(graph, tmp_path)
    assert TensorRt().integer_share(tmp_path) == pytest.approx(2 / 3)  # of two convolutions and a product


def test_says_where_the_time_of_a_request_goes(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "copies", lambda run, inputs, repeats: [])
    TensorRt().compile(graph, tmp_path)
    found = {each.name: each for each in TensorRt().operators(tmp_path, [_images(2)], repeats=4)}
    assert {name: each.milliseconds for name, each in found.items()} == {"Conv_0 + Relu_0": 2.0, "__myl_kgen0": 1.0}
    assert found["Conv_0 + Relu_0"].kind == "convolution"
    assert found["__myl_kgen0"].kind == "other"


def test_every_failure_is_one_line(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"^tensorrt refused the graph: In node 0 with name: Conv_0 and .*$"):
        TensorRt().compile(replace(graph, onnx=tmp_path / "broken.onnx"), tmp_path)
    with pytest.raises(EngineError, match=r"^tensorrt built no engine: 10: Could not find any implementation .*$"):
        TensorRt(workspace_mb=1e-9).compile(graph, tmp_path)
    TensorRt().compile(graph, tmp_path)
    with pytest.raises(EngineError, match=r"^tensorrt takes no input of shape \(1, 3, 9, 9\): 3: shape is out"):
        TensorRt().load(tmp_path)(np.zeros((1, 3, 9, 9), np.float32))
    (tmp_path / "model.plan").write_bytes(b"of another version")
    with pytest.raises(EngineError, match=r"^tensorrt refused the plan: .*not compatible with this version$"):
        TensorRt().load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tensorrt"], "Builder", lambda logger: int("nothing"[:0] or None))  # type: ignore[arg-type]
        with pytest.raises(EngineError, match=r"^tensorrt can't use this machine's GPU: it does not say why$"):
            TensorRt().compile(graph, tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"^tensorrt can't be loaded: \S.*$"):
        TensorRt().compile(graph, tmp_path)


def test_a_quantized_graph_stays_in_its_types(graph: Graph, tmp_path: Path) -> None:
    reason = "engine.precision=float16 is for float graphs; what a quantized graph leaves in floats stays in float32"
    with pytest.raises(EngineError, match=reason):
        TensorRt(precision="float16").compile(replace(graph, quantized=True), tmp_path)


def test_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert TensorRt().supports(False, TARGET) == "tensorrt is not installed: pip install 'hasten[tensorrt]'"
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    host = replace(TARGET, device="cpu")
    assert TensorRt().supports(False, host) == "tensorrt runs on gpu, target.device is cpu"
    monkeypatch.setattr(tensorrt, "cuda_problem", lambda: "no NVIDIA GPU is seen here")
    assert TensorRt().supports(False, TARGET) == "no NVIDIA GPU is seen here"
    monkeypatch.setattr(tensorrt, "cuda_problem", lambda: None)
    assert TensorRt().supports(True, TARGET) is None
    assert "is for float graphs" in (TensorRt(precision="float16").supports(True, TARGET) or "")
    bare = replace(TARGET, precisions=("float32",))
    assert "engine.precision=float16 is none of" in (TensorRt(precision="float16").supports(False, bare) or "")


def test_says_that_a_plan_holds_native_code() -> None:
    assert TensorRt.native_code

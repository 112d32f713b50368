"""Engines on a GPU: what can be told without one, and with the marker `gpu` what can't."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from hasten.artefacts.module import forward, rebuild
from hasten.core import cuda as nvidia
from hasten.core.errors import EngineError
from hasten.core.interfaces import Columns, Engine, Graph, Input, Signature, Target
from hasten.engines import checks, cuda
from hasten.engines import onnxruntime as onnxruntime_engine
from hasten.engines.eager import Eager
from hasten.engines.inductor import AotInductor
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.tensorrt import TensorRt

TARGET = Target(device="gpu", reference="cuda", threads=1, batch_size=1, engines=("eager",))
INPUTS = (Input(name="ids", shape=(3,), dtype="int64", dynamic=(0,)), Input(name="image", shape=(2, 2)))


def _eager(graph: Graph, rows: Columns) -> np.ndarray:
    with torch.inference_mode():
        return forward(rebuild(graph.module), {name: torch.tensor(values) for name, values in rows.items()}).numpy()


def _texts(number: int, length: int) -> Columns:
    draw = np.random.default_rng(1)
    mask = np.arange(length) < draw.integers(1, length + 1, (number, 1))
    return {"ids": draw.integers(0, 30, (number, length)), "mask": mask.astype(np.int64)}


def _requests(number: int, length: int = 3) -> list[np.ndarray]:
    draw = np.random.default_rng(number)
    return [draw.integers(0, 9, (number, length)), draw.standard_normal((number, 2, 2), dtype=np.float32)]


def test_rows_go_there_as_the_model_takes_them(gpu: Any) -> None:
    lane = cuda.Lane(INPUTS)
    ids, images = _requests(4)
    rows = lane.send([ids.astype(np.int16), np.asfortranarray(images.astype(np.float64))])
    assert [rows["ids"].dtype, rows["image"].dtype] == [torch.int64, torch.float32]
    np.testing.assert_array_equal(rows["ids"].numpy(), ids)
    np.testing.assert_array_equal(rows["image"].numpy(), images)


def test_wants_one_array_an_input(gpu: Any) -> None:
    with pytest.raises(ValueError, match="shorter"):
        cuda.Lane(INPUTS).send(_requests(1)[:1])


def test_buffers_stay_for_requests_that_are_no_larger(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counted(size: int, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=dtype)

    monkeypatch.setattr(cuda, "page_locked", counted)
    lane = cuda.Lane(INPUTS)
    for number, length in ((2, 3), (2, 3), (1, 2), (2, 2), (3, 3), (1, 1)):
        rows = lane.send(_requests(number, length))
        assert rows["ids"].shape == (number, length)
    assert sizes == [6, 8, 9, 12]  # ids and images of two rows, then of three


def test_requests_of_one_shape_find_their_rows_at_one_address(gpu: Any) -> None:
    lane = cuda.Lane(INPUTS)
    addresses = {lane.send(_requests(2))["image"].data_ptr() for _ in range(3)}
    assert len(addresses) == 1


def test_a_request_waits_for_the_gpu_once(gpu: Any) -> None:
    lane = cuda.Lane(INPUTS)
    run = cuda.runner(lane, lambda rows: rows["image"].half().flatten(1))
    for number in (1, 2):
        request = _requests(number)
        outputs = run(*request)
        assert outputs.dtype == np.float32
        np.testing.assert_allclose(outputs, request[1].reshape(number, 4), atol=1e-3)
    assert gpu.waits == 2


def test_outputs_are_no_view_of_a_buffer(gpu: Any) -> None:
    run = cuda.runner(cuda.Lane(INPUTS), lambda rows: rows["image"])
    first = run(*_requests(2))
    kept = first.copy()
    run(np.zeros((2, 3)), np.zeros((2, 2, 2)))
    np.testing.assert_array_equal(first, kept)


def test_says_what_is_copied() -> None:
    (said,) = cuda.notes(Signature(inputs=INPUTS, output_shape=(10,)))
    assert said.startswith("Of every row 40 bytes are copied to the GPU and 40 bytes back")  # 3 * 8 + 4 * 4, 10 * 4


def _event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> Any:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: end - start))


def test_sums_what_the_gpu_did_by_name() -> None:
    events = [
        _event("Memcpy HtoD (Pinned -> Device)", 0, 2000),
        _event("sm80_xmma_fprop_implicit_gemm_tf32f32_nhwc", 0, 4000),
        _event("sm80_xmma_fprop_implicit_gemm_tf32f32_nhwc", 0, 8000),
        _event("ampere_sgemm_32x32_sliced1x4_tn", 0, 1000),
        _event("triton_poi_fused_add_relu_0", 0, 1000),
        _event("cudaLaunchKernel", 0, 9000, DeviceType.CPU),
    ]
    found = {each.kind: each for each in cuda.summed(events, repeats=2)}
    assert {kind: each.milliseconds for kind, each in found.items()} == {
        "copy": 1.0,
        "convolution": 6.0,
        "linear": 0.5,
        "elementwise": 0.5,
    }
    assert found["convolution"].calls == 1
    assert [cuda.is_copy_across(each.name) for each in found.values()] == [True, False, False, False]


def test_eager_pytorch_gives_the_same_through_the_lane(gpu: Any, reader: Graph, tmp_path: Path) -> None:
    engine = Eager(device="cuda")
    engine.compile(reader, tmp_path)
    run = engine.load(tmp_path)
    for number, length in ((1, 10), (3, 4), (2, 7)):
        rows = _texts(number, length)
        np.testing.assert_allclose(run(*rows.values()), _eager(reader, rows), rtol=1e-5, atol=1e-6)
    assert "bytes are copied to the GPU" in engine.notes(tmp_path)[0]
    assert Eager().notes(tmp_path) == ()


def test_float16_is_for_a_gpu(gpu: Any, reader: Graph, tmp_path: Path) -> None:
    host = replace(TARGET, device="cpu", reference="cpu")
    for engine in (Eager(precision="float16"), AotInductor(precision="float16")):
        assert engine.supports(False, host) == "engine.precision=float16 is for a GPU (engine.device=cuda)"
    engine = Eager(device="cuda", precision="float16")
    engine.compile(reader, tmp_path)
    rows = _texts(3, 10)
    expected = _eager(reader, rows)
    error = np.abs(engine.load(tmp_path)(*rows.values()) - expected).max()
    assert 1e-6 * np.ptp(expected) < error < cuda.TOLERANCES["float16"] * np.ptp(expected)


@pytest.mark.filterwarnings("ignore:Duplicate provider 'CPUExecutionProvider'")
def test_onnx_runtime_gives_the_same_from_bound_memory(
    gpu: Any, reader: Graph, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "_CUDA", "CPUExecutionProvider")
    engine = OnnxRuntime(device="cuda", static_batch=3)
    for name, source in (("reader", reader), ("graph", graph)):
        (tmp_path / name).mkdir()
        engine.compile(source, tmp_path / name)
    run, run_images = engine.load(tmp_path / "reader"), engine.load(tmp_path / "graph")
    for number, length in ((1, 10), (3, 4), (1, 10)):
        rows = _texts(number, length)
        np.testing.assert_allclose(run(*rows.values()), _eager(reader, rows), rtol=1e-4, atol=1e-5)
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype=np.float32)
    np.testing.assert_allclose(run_images(images), _eager(graph, {"input": images}), rtol=1e-4, atol=1e-5)
    assert "bytes are copied to the GPU" in engine.notes(tmp_path / "graph")[-1]


def test_onnx_runtime_without_cuda_is_an_engine_error(gpu: Any, graph: Graph, tmp_path: Path) -> None:
    """It would fall back to the CPU without a word."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(EngineError, match="could not load"):
        OnnxRuntime(device="cuda").compile(graph, tmp_path)


@pytest.mark.parametrize("engine", [Eager(device="cuda"), AotInductor(device="cuda"), OnnxRuntime(device="cuda")])
def test_needs_a_gpu(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cuda_problem", lambda: "no NVIDIA GPU is seen here")
    assert engine.supports(False, TARGET) == "engine.device=cuda can't be had: no NVIDIA GPU is seen here"
    assert replace(engine, device="cpu").supports(False, replace(TARGET, device="cpu", reference="cpu")) is None


def test_each_engine_needs_its_library_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cuda_problem", lambda: None)
    monkeypatch.setattr(onnxruntime_engine, "_providers", lambda: ["CPUExecutionProvider"])
    reason = OnnxRuntime(device="cuda").supports(False, TARGET)
    assert reason == (
        "the installed onnxruntime has no CUDAExecutionProvider: pip uninstall onnxruntime, pip install onnxruntime-gpu"
    )
    monkeypatch.setattr(onnxruntime_engine, "_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert OnnxRuntime(device="cuda").supports(True, TARGET) is None
    monkeypatch.setattr("hasten.engines.inductor.find_spec", lambda name: None)
    assert "triton" in (AotInductor(device="cuda").supports(False, TARGET) or "")
    assert Eager(device="cuda").supports(False, TARGET) is None


def test_runs_where_the_target_does() -> None:
    host = replace(TARGET, device="cpu", reference="cpu")
    for engine in (AotInductor(), OnnxRuntime()):
        assert engine.supports(False, TARGET) == (
            "engine.device=cpu is not where target.device=gpu runs, which is cuda"
        )
        assert replace(engine, device="cuda").supports(False, host) == (
            "engine.device=cuda is not where target.device=cpu runs, which is cpu"
        )
    assert Eager().supports(False, replace(TARGET, reference="cpu")) is None, "the reference may be the CPU's"


ON_GPU = {
    "eager": Eager(device="cuda"),
    "inductor": AotInductor(device="cuda"),
    "inductor for two rows": AotInductor(device="cuda", static_batch=2),
    "eager in float16": Eager(device="cuda", precision="float16"),
    "inductor in bfloat16": AotInductor(device="cuda", precision="bfloat16"),
    "onnxruntime": OnnxRuntime(device="cuda"),
    "onnxruntime for two rows": OnnxRuntime(device="cuda", static_batch=2),
    "tensorrt": TensorRt(),
    "tensorrt for two rows, recorded": TensorRt(static_batch=2, cuda_graph=True),
    "tensorrt in float16": TensorRt(precision="float16"),
    "tensorrt in bfloat16": TensorRt(precision="bfloat16"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ON_GPU.values(), ids=ON_GPU)
def test_agrees_with_eager_pytorch_on_the_cpu(engine: Engine, graph: Graph, reader: Graph, tmp_path: Path) -> None:
    if reason := engine.supports(False, TARGET):
        pytest.skip(reason)
    tolerance = cuda.TOLERANCES[getattr(engine, "precision", "float32")]
    for name, source in (("graph", graph), ("reader", reader)):
        (tmp_path / name).mkdir()
        engine.compile(source, tmp_path / name)
    run = engine.load(tmp_path / "graph")
    for number in (1, 2, 7, 3, 1):
        rows = np.random.default_rng(number).standard_normal((number, 3, 8, 8), dtype=np.float32)
        expected = _eager(graph, {"input": rows})
        np.testing.assert_allclose(run(rows), expected, atol=tolerance * np.ptp(expected))
    run = engine.load(tmp_path / "reader")
    for number, length in ((1, 10), (3, 4), (2, 7), (1, 10)):
        texts = _texts(number, length)
        expected = _eager(reader, texts)
        np.testing.assert_allclose(run(*texts.values()), expected, atol=tolerance * np.ptp(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ON_GPU.values(), ids=ON_GPU)
def test_says_where_the_time_of_a_request_on_a_gpu_goes(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    if reason := engine.supports(False, TARGET):
        pytest.skip(reason)
    engine.compile(graph, tmp_path)
    rows = np.zeros((2, 3, 8, 8), np.float32)
    operators = engine.operators(tmp_path, [rows], repeats=3)
    copies = [each for each in operators if cuda.is_copy_across(each.name)]
    assert {each.name[7:11] for each in copies} == {"HtoD", "DtoH"}
    assert all(each.kind == "copy" for each in copies)
    assert any(each.kind == "convolution" for each in operators)
    assert sum(each.milliseconds for each in operators) > 0


@pytest.mark.gpu
def test_knows_this_gpu() -> None:
    assert nvidia.cuda_problem() is None
    assert nvidia.gpus()[0].name == torch.cuda.get_device_name(0)

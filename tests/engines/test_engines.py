"""What every engine promises."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import forward, rebuild, save
from hasten.core.errors import EngineError
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Columns, Engine, Graph, Input, Runner, Signature, Target
from hasten.engines.eager import Eager
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.openvino import OpenVino
from hasten.engines.xla import Xla
from hasten.passes.quantization.static import StaticQuantization

TARGET = Target(device="cpu", threads=1, batch_size=1, engines=("eager", "onnxruntime", "openvino"))
ENGINES = {
    "eager": Eager(),
    "onnxruntime": OnnxRuntime(),
    "eager compressed": Eager(compressed=True),
    "onnxruntime compressed": OnnxRuntime(compressed=True),
    "openvino compressed": OpenVino(static_batch=1, compressed=True),
    "onnxruntime unoptimised": OnnxRuntime(graph_optimization="disabled"),
    "eager channels last": Eager(channels_last=True),
    "onnxruntime for one row": OnnxRuntime(static_batch=1),
    "onnxruntime mapped": OnnxRuntime(mapped=True),
    "openvino mapped": OpenVino(mapped=True),
    "openvino": OpenVino(),
    "openvino for one row": OpenVino(static_batch=1),
    "openvino for three rows": OpenVino(static_batch=3),
}
OPTIONAL = {"xla for three rows": (Xla(static_batch=3), "jax"), "xla compressed": (Xla(compressed=True), "jax")}
"""Engines that an extra installs, and the module without which they are skipped."""
EVERY_ENGINE = pytest.mark.parametrize(
    "engine",
    [
        *(pytest.param(engine, id=name) for name, engine in ENGINES.items()),
        *(
            pytest.param(
                engine,
                id=name,
                marks=pytest.mark.skipif(find_spec(module) is None, reason=f"pip install 'hasten[{engine.extra}]'"),
            )
            for name, (engine, module) in OPTIONAL.items()
        ),
    ],
)


def _compiled(engine: Engine, graph: Graph, folder: Path) -> Runner:
    engine.compile(graph, folder)
    return engine.load(folder)


def _eager(graph: Graph, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return rebuild(graph.module)(torch.tensor(rows)).numpy()


def _read(graph: Graph, rows: Columns) -> np.ndarray:
    with torch.no_grad():
        return forward(rebuild(graph.module), {name: torch.tensor(values) for name, values in rows.items()}).numpy()


def _texts(number: int, length: int = 10, seed: int = 1) -> Columns:
    """Random token ids below 30, and masks that leave at least one token."""
    draw = np.random.default_rng(seed)
    mask = np.arange(length) < draw.integers(1, length + 1, (number, 1))
    return {"ids": draw.integers(0, 30, (number, length)), "mask": mask.astype(np.int64)}


def _rows(graph: Graph, number: int, seed: int = 1) -> np.ndarray:
    shape = (number, *graph.signature.inputs[0].shape)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def _scaled_head(graph: Graph, folder: Path, factor: float) -> Graph:
    """The graph with its classifier's weights off by a factor."""
    model = onnx.load(graph.onnx)
    (head,) = (tensor for tensor in model.graph.initializer if tensor.name == "classifier.weight")
    head.CopyFrom(numpy_helper.from_array(factor * numpy_helper.to_array(head), head.name))
    onnx.save(model, folder / "off.onnx")
    return replace(graph, onnx=folder / "off.onnx")


@EVERY_ENGINE
def test_agrees_with_eager_pytorch_at_any_batch_size(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    run = _compiled(engine, graph, tmp_path)
    for number in (1, 2, 7, 3, 1):
        rows = _rows(graph, number)
        outputs = run(rows)
        assert outputs.dtype == np.float32
        np.testing.assert_allclose(outputs, _eager(graph, rows), rtol=1e-4, atol=1e-5)


@EVERY_ENGINE
def test_takes_arrays_of_any_layout_and_leaves_them_alone(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    run = _compiled(engine, graph, tmp_path)
    rows = _rows(graph, 3)
    expected = _eager(graph, rows)
    frozen, big = rows.copy(), np.zeros((6, *rows.shape[1:]), dtype=np.float32)
    frozen.flags.writeable = False
    big[::2] = rows
    unaligned = np.frombuffer(b"\0" + rows.tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(rows.shape)
    layouts = {
        "transposed": np.asfortranarray(rows),
        "strided": big[::2],
        "reversed": np.ascontiguousarray(rows[::-1])[::-1],
        "read-only": frozen,
        "unaligned": unaligned,
        "doubles": rows.astype(np.float64),
    }
    for name, layout in layouts.items():
        before = layout.copy()
        np.testing.assert_allclose(run(layout), expected, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(layout, before)


@EVERY_ENGINE
def test_what_it_returned_stays_when_it_is_called_again(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    run = _compiled(engine, graph, tmp_path)
    rows = _rows(graph, 1)
    first = run(rows)
    kept = first.copy()
    rows += 1
    assert not np.array_equal(run(rows), kept)
    np.testing.assert_array_equal(first, kept)


@EVERY_ENGINE
def test_takes_several_inputs_of_any_length(engine: Engine, reader: Graph, tmp_path: Path) -> None:
    run = _compiled(engine, reader, tmp_path)
    for number, length in ((1, 10), (3, 10), (3, 4), (2, 7), (1, 1), (1, 10)):
        rows = _texts(number, length)
        outputs = run(*rows.values())
        assert outputs.shape == (number, 2, 3)
        np.testing.assert_allclose(outputs, _read(reader, rows), rtol=1e-4, atol=1e-5)


@EVERY_ENGINE
def test_takes_integers_of_any_width(engine: Engine, reader: Graph, tmp_path: Path) -> None:
    run = _compiled(engine, reader, tmp_path)
    rows = _texts(3)
    narrow = [rows["ids"].astype(np.int32), rows["mask"].astype(bool)]
    np.testing.assert_array_equal(run(*narrow), run(*rows.values()))


@EVERY_ENGINE
def test_wants_every_input(engine: Engine, reader: Graph, tmp_path: Path) -> None:
    run = _compiled(engine, reader, tmp_path)
    with pytest.raises(ValueError, match="shorter"):
        run(_texts(1)["ids"])


@EVERY_ENGINE
def test_tells_the_time_of_several_inputs_too(engine: Engine, reader: Graph, tmp_path: Path) -> None:
    engine.compile(reader, tmp_path)
    kinds = {each.kind for each in engine.operators(tmp_path, list(_texts(1).values()), repeats=2)}
    assert "linear" in kinds


def test_refuses_a_graph_that_is_right_at_the_full_length_alone(reader: Graph, tmp_path: Path) -> None:
    model = onnx.load(reader.onnx)
    (last,) = (node for node in model.graph.node if "output" in node.output)
    last.output[0] = "right"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(10), "greatest"))
    model.graph.node.extend(
        [
            onnx.helper.make_node("Shape", ["ids"], ["length"], start=1, end=2),
            onnx.helper.make_node("Cast", ["length"], ["float_length"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Div", ["float_length", "greatest"], ["share"]),
            onnx.helper.make_node("Mul", ["right", "share"], ["output"]),
        ]
    )
    onnx.save(model, tmp_path / "off.onnx")
    with pytest.raises(EngineError, match=r"differs from eager PyTorch by .* on 16 rows of half the length"):
        OnnxRuntime().compile(replace(reader, onnx=tmp_path / "off.onnx"), tmp_path)


def test_eager_pytorch_returns_no_view_of_its_input(tmp_path: Path) -> None:
    save(tmp_path, {"_target_": "torch.nn.Flatten"}, torch.nn.Flatten())
    signature = Signature(inputs=(Input(shape=(3,)),), output_shape=(3,))
    write_json(tmp_path / "signature.json", signature.to_dict())
    rows = np.ones((2, 3), dtype=np.float32)
    outputs = Eager().load(tmp_path)(rows)
    rows[:] = 0
    np.testing.assert_array_equal(outputs, np.ones((2, 3)))


@EVERY_ENGINE
def test_leaves_the_graph_alone_and_writes_the_same_bytes_again(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    before = _hashes(graph.onnx.parent)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        engine.compile(graph, folder)
    assert _hashes(graph.onnx.parent) == before
    first, second = ({Path(name).name: digest for name, digest in _hashes(folder).items()} for folder in folders)
    assert first == second != {}


def _with_zeros(graph: Graph, folder: Path, share: float) -> Graph:
    """The graph with the smallest of its weights at zero, and what eager PyTorch makes of it."""
    module = rebuild(graph.module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter[parameter.abs() < parameter.abs().quantile(share)] = 0
    (folder / "module").mkdir(parents=True)
    save(folder / "module", read_json(graph.module / "module.json")["arch"], module)
    reference = load_file(graph.reference)
    return write_graph(module, folder / "module", graph.signature, {"input": reference["inputs.input"]}, folder)


@pytest.mark.parametrize("engine", [Eager(compressed=True), OnnxRuntime(compressed=True), OpenVino(compressed=True)])
def test_zeros_save_bytes_where_it_is_stored_compressed(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    sparse = _with_zeros(graph, tmp_path / "pruned", 0.9)
    sizes = []
    for name, each, source in (
        ("plain", replace(engine, compressed=False), sparse),
        ("dense", engine, graph),
        ("sparse", engine, sparse),
    ):
        (tmp_path / name).mkdir()
        run = _compiled(each, source, tmp_path / name)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / name).iterdir()))
        rows = _rows(graph, 3)
        np.testing.assert_allclose(run(rows), _eager(source, rows), rtol=1e-4, atol=1e-5)
    plain, dense, sparse_size = sizes
    assert sparse_size < 0.5 * dense < 0.5 * plain


@EVERY_ENGINE
def test_a_float_graph_runs_nothing_in_integers(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    engine.compile(graph, tmp_path)
    assert engine.integer_share(tmp_path) == 0


@pytest.mark.parametrize("engine", [OnnxRuntime(), OpenVino(static_batch=1), OpenVino()])
def test_refuses_a_graph_whose_outputs_are_off_with_the_figures(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    bent = _scaled_head(graph, tmp_path, 1.05)
    with pytest.raises(
        EngineError, match=r"differs from eager PyTorch by \d\.\d\d% of the output range on 24 rows; 0\.10%"
    ):
        engine.compile(bent, tmp_path)


def test_accepts_a_difference_below_the_tolerance(graph: Graph, tmp_path: Path) -> None:
    OnnxRuntime().compile(_scaled_head(graph, tmp_path, 1.0005), tmp_path)


def test_refuses_outputs_that_are_no_numbers(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"by nan%"):
        OnnxRuntime().compile(_scaled_head(graph, tmp_path, float("nan")), tmp_path)


def test_refuses_outputs_of_another_shape(graph: Graph, tmp_path: Path) -> None:
    reference = load_file(graph.reference)
    save_file({**reference, "outputs": reference["outputs"][:, :9].copy()}, tmp_path / "narrow.safetensors")
    with pytest.raises(EngineError, match=r"shape \(24, 10\), eager PyTorch \(24, 9\)"):
        OnnxRuntime().compile(replace(graph, reference=tmp_path / "narrow.safetensors"), tmp_path)


@pytest.mark.parametrize(("engine", "name"), [(OnnxRuntime(), "onnxruntime"), (OpenVino(), "openvino")])
def test_a_broken_file_is_an_engine_error(engine: Engine, name: str, graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=rf"^{name} refused the graph: \S.*$"):
        engine.compile(replace(graph, onnx=tmp_path / "broken.onnx"), tmp_path)


def test_each_engine_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, library in ((Eager(), "torch"), (OnnxRuntime(), "onnxruntime"), (OpenVino(), "openvino")):
        assert engine.supports(False, TARGET) is None
        assert engine.libraries[0] == library
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            assert engine.supports(False, TARGET) == f"{library} is not installed: pip install {library}"


def test_supports_no_more_threads_than_the_target_allows() -> None:
    for engine in (Eager(threads=4), OnnxRuntime(threads=4), OpenVino(threads=4)):
        assert engine.supports(False, TARGET) == "engine.threads=4 is more than target.threads=1 allows"
        assert engine.supports(False, replace(TARGET, threads=4)) is None


def test_eager_pytorch_refuses_a_quantized_graph(graph: Graph, tmp_path: Path) -> None:
    reason = "eager PyTorch runs no quantized graph: choose engine=onnxruntime or engine=openvino"
    assert Eager().supports(True, TARGET) == reason
    with pytest.raises(EngineError, match=reason):
        Eager().compile(replace(graph, quantized=True), tmp_path)


def test_the_engines_fit_a_quantized_graph() -> None:
    assert OnnxRuntime().supports(True, TARGET) is None
    assert OpenVino().supports(True, TARGET) is None


def test_eager_pytorch_keeps_its_threads_when_others_change_them(graph: Graph, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        run = _compiled(Eager(threads=2), graph, tmp_path)
        torch.set_num_threads(1)
        run(_rows(graph, 1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("engine", [Eager(), OnnxRuntime(), OpenVino(static_batch=1), OpenVino()])
def test_says_where_the_time_of_a_request_goes(
    engine: Engine, graph: Graph, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.compile(graph, tmp_path)
    operators = engine.operators(tmp_path, [_rows(graph, 1)], repeats=5)
    calls = Counter[str]()
    for operator in operators:
        calls[operator.kind] += round(operator.calls)
        assert operator.milliseconds >= 0
    assert calls["convolution"] == 6  # stem, two per block, one shortcut
    assert calls["linear"] == 1
    assert sum(operator.milliseconds for operator in operators) > 0
    assert capfd.readouterr() == ("", "")
    assert {file.name for file in tmp_path.iterdir()} <= {
        "model.onnx",
        "module.json",
        "signature.json",
        "weights.safetensors",
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", [OnnxRuntime(), OpenVino(static_batch=1)])
def test_a_quantized_graph_runs_in_integers(engine: Engine, graph: Graph, tmp_path: Path) -> None:
    StaticQuantization()(graph, {"input": _rows(graph, 64)}, engine.family, tmp_path)
    quantized = replace(graph, onnx=tmp_path / "model.onnx", quantized=True)
    compiled = tmp_path / "compiled"
    compiled.mkdir()
    run = _compiled(engine, quantized, compiled)
    assert engine.integer_share(compiled) >= 0.9
    rows = _rows(graph, 7)
    np.testing.assert_allclose(run(rows), _eager(graph, rows), atol=0.05 * np.ptp(_eager(graph, rows)))
    assert "linear" in {operator.kind for operator in engine.operators(compiled, [rows], repeats=2)}


@pytest.mark.slow
def test_a_quantized_graph_without_graph_optimisation_runs_in_floats(graph: Graph, tmp_path: Path) -> None:
    StaticQuantization()(graph, {"input": _rows(graph, 64)}, "onnxruntime", tmp_path)
    engine = OnnxRuntime(graph_optimization="disabled")
    compiled = tmp_path / "compiled"
    compiled.mkdir()
    engine.compile(replace(graph, onnx=tmp_path / "model.onnx", quantized=True), compiled)
    assert engine.integer_share(compiled) == 0

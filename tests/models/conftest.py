"""What tests of several models share: the graph that is deployed, in the engines that run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.artefacts.capture import capture, to_onnx
from hasten.artefacts.module import forward
from hasten.core.interfaces import Input, Rows, Signature

Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def engines(tmp_path: Path) -> Callable[..., dict[str, Run]]:
    """Engine -> outputs for named inputs, by the ONNX graph of a model."""

    def export(model: torch.nn.Module, *inputs: Input, num_outputs: int) -> dict[str, Run]:
        import onnxruntime
        import openvino

        signature = Signature(inputs=inputs, output_shape=(num_outputs,))
        file = tmp_path / "model.onnx"
        to_onnx(capture(model, signature), signature, file)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return {
            "onnxruntime": lambda rows: session.run(None, dict(rows))[0],
            "openvino": lambda rows: compiled(dict(rows))[0],
        }

    return export


@pytest.fixture
def assert_engines_agree() -> Callable[..., None]:
    """Holds every engine's outputs for some rows against the model's own."""

    def check(engines: Mapping[str, Run], model: torch.nn.Module, **rows: torch.Tensor) -> None:
        with torch.no_grad():
            wanted = forward(model, rows).numpy()
        assert np.isfinite(wanted).all()
        for name, run in engines.items():
            given = run({column: values.numpy() for column, values in rows.items()})
            np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5, err_msg=name)

    return check


@pytest.fixture
def assert_all_learn() -> Callable[..., None]:
    """Holds that the loss of some rows moves every parameter of a model, but those whose names end so."""

    def check(model: torch.nn.Module, *but: str, **rows: torch.Tensor) -> None:
        forward(model.train(), rows).square().sum().backward()
        still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
        assert [name for name in still if not name.endswith(but)] == []

    return check


class Untrained:
    """Rows for a pass, and a fine-tuning that leaves the model as it is."""

    seed = 0

    def __init__(self, **inputs: np.ndarray) -> None:
        self.train = Rows(inputs=inputs, targets=np.zeros(len(next(iter(inputs.values()))), dtype=np.int64))

    def fit(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.eval()


@pytest.fixture
def untrained() -> type[Untrained]:
    return Untrained

"""Training on another device than the CPU: what can be told without one, and with the marker `gpu` what can't."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceXLAStrategy
from torch import nn

from hasten.core.errors import PassError
from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import TrainingSettings
from hasten.passes.distillation.outputs import OutputMatching
from hasten.tasks.classification import Classification
from hasten.training import device
from hasten.training.checkpoint import CheckpointsOfTpu
from hasten.training.determinism import reproducible
from hasten.training.estimate import training_seconds
from hasten.training.fit import fit
from hasten.training.lesson import Lesson
from hasten.training.predict import predict

SETTINGS = TrainingSettings(epochs=3, batch_size=12, lr=0.01, weight_decay=0.01, patience=2)


def rows():
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(50, 6)).astype(np.float32)
    return Rows(inputs={"input": inputs}, targets=draw.integers(0, 3, 50))


def net(*more):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), *more, nn.Linear(16, 3))


def train(folder, accelerator, model=None, progress=None, **taught):
    return fit(
        model or net(),
        rows(),
        SETTINGS,
        task=Classification(),
        seed=3,
        threads=1,
        accelerator=accelerator,
        folder=folder,
        checkpoint_seconds=1e-6,
        progress=progress or Silent(),
        what="teacher",
        key="model.training",
        **taught,
    )


class Asked(BaseException):
    """Carries what Lightning's Trainer was asked for."""


class Workspaces(nn.Module):
    """Writes down how cuBLAS is set while it runs, and fails where it is told to."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.seen = error, SEEN

    def forward(self, x):
        SEEN.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        if self.error:
            raise RuntimeError(self.error)
        return x


SEEN: list[str | None] = []


@pytest.fixture
def pretended_cuda(monkeypatch):
    """What is asked of the GPU is done by the CPU."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setitem(device.LIGHTNING, "cuda", "cpu")
    monkeypatch.setitem(device._TORCH, "cuda", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    SEEN.clear()


@pytest.mark.parametrize(("accelerator", "named"), [("cpu", "cpu"), ("cuda", "gpu"), ("tpu", "tpu")])
def test_lightning_is_asked_for_one_device_of_the_kind(accelerator, named, tmp_path, monkeypatch):
    def asked(**arguments):
        raise Asked(arguments)

    xla = SimpleNamespace(get_rng_state=lambda: 5, set_rng_state=lambda seed: None)
    if accelerator == "tpu":
        monkeypatch.setitem(sys.modules, device.XLA, xla)
    monkeypatch.setattr(pl, "Trainer", asked)
    with pytest.raises(Asked) as found:
        train(tmp_path, accelerator)
    (arguments,) = found.value.args
    assert (arguments["accelerator"], arguments["devices"]) == (named, 1)
    if accelerator == "tpu":  # Lightning refuses any others there
        plugin = arguments["plugins"][-1]
        SingleDeviceXLAStrategy.checkpoint_io.fset(SimpleNamespace(), plugin)


def test_a_tpus_checkpoints_are_as_durable(tmp_path):
    checkpoints, state = CheckpointsOfTpu(), {"identity": "mine", "weights": torch.arange(3.0), "state": (1, (2,))}
    checkpoints.save_checkpoint(state, tmp_path / "step=1.ckpt")
    read = checkpoints.load_checkpoint(tmp_path / "step=1.ckpt")
    assert torch.equal(read.pop("weights"), state.pop("weights"))
    assert read == state
    assert [file.name for file in tmp_path.iterdir()] == ["step=1.ckpt"]


def test_a_tpus_generator_is_seeded_and_goes_on_afterwards(monkeypatch):
    states = [7]
    fake = SimpleNamespace(get_rng_state=lambda: states[-1], set_rng_state=states.append)
    monkeypatch.setitem(sys.modules, device.XLA, fake)
    with reproducible(3, threads=1, accelerator="tpu"):
        assert states[-1] == 3
    assert states[-1] == 7


@pytest.mark.usefixtures("pretended_cuda")
def test_the_workspace_of_cublas_is_fixed_for_the_training_alone(tmp_path):
    for accelerator, expected in (("cuda", ":4096:8"), ("cpu", None)):
        train(tmp_path / accelerator, accelerator, net(Workspaces()))
        assert set(SEEN) == {expected}
        SEEN.clear()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.usefixtures("pretended_cuda")
def test_a_setting_of_the_users_own_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    train(tmp_path, "cuda", net(Workspaces()))
    assert {*SEEN, os.environ["CUBLAS_WORKSPACE_CONFIG"]} == {":16:8"}


@pytest.mark.usefixtures("pretended_cuda")
def test_a_kernel_that_differs_from_time_to_time_is_refused_with_the_way_out(tmp_path):
    wanted = r"^trainer\.accelerator=cuda can't train this .* trainer\.accelerator=cpu can: pool does not have a determ"
    with pytest.raises(PassError, match=wanted):
        train(tmp_path, "cuda", net(Workspaces("pool does not have a\ndeterministic implementation")))


@pytest.mark.usefixtures("pretended_cuda")
def test_a_checkpoint_of_one_accelerator_is_not_resumed_on_another(tmp_path):
    class Steps(Silent):
        def advance(self, steps=1):
            counted.append(steps)

    train(tmp_path, "cuda")
    counted: list[int] = []
    train(tmp_path, "cpu", progress=Steps())
    assert set(counted) == {1}


def test_teachers_are_where_the_student_trains_and_back_afterwards(tmp_path):
    class Followed(nn.Module):
        def __init__(self):
            super().__init__()
            self.moves = []

        def to(self, device):
            self.moves.append(device.type)
            return super().to(device)

        def forward(self, x):
            return x[:, :3]

    teacher = Followed().eval()
    train(tmp_path, "cpu", loss=OutputMatching(), teachers=[teacher])
    assert teacher.moves == ["cpu", "cpu"]
    lesson = Lesson(OutputMatching(), net(), [expert := net()], {"input": torch.zeros(2, 6)}, 0)
    lesson.teach_on(torch.device("meta"))
    assert {value.device.type for value in expert.state_dict().values()} == {"meta"}
    assert not lesson.state_dict(), "teachers are no part of it"


@pytest.mark.usefixtures("pretended_cuda")
def test_outputs_and_estimates_are_of_the_accelerator_too(monkeypatch):
    asked = []
    for room in ("predict", "estimate"):
        monkeypatch.setattr(f"hasten.training.{room}.device_of", lambda name: asked.append(name) or torch.device("cpu"))
    model = net().eval()
    np.testing.assert_array_equal(predict(model, rows().inputs, 20, "cuda"), predict(model, rows().inputs, 20))
    arguments = {"task": Classification(), "num_rows": 50, "threads": 1}
    assert training_seconds(model, rows(), SETTINGS, accelerator="cuda", **arguments) > 0
    assert asked == ["cuda", "cpu", "cuda"]


ON_BOTH = """
    import sys
    from pathlib import Path

    sys.path.insert(0, sys.argv[1])
    from test_device import *
    from hasten.passes.distillation.features import FeatureMaps

    class Killed(BaseException):
        pass

    class Until(Silent):
        steps = 0

        def advance(self, steps=1):
            self.steps += steps
            if self.steps == 5:
                raise Killed

    def values(fitted):
        return list(fitted.model.state_dict().values())

    loss, teacher = FeatureMaps(student_layers=("2",), teacher_layers=("2",)), net().eval()
    for model in (net(), net(nn.Dropout(0.3))):
        folder = Path(type(model[3]).__name__)
        once = train(folder / "once", "cuda", model, loss=loss, teachers=[teacher])
        try:
            train(folder / "again", "cuda", model, Until(), loss=loss, teachers=[teacher])
        except Killed:
            pass
        again = train(folder / "again", "cuda", model, loss=loss, teachers=[teacher])
        assert once.curves == again.curves
        assert all(torch.equal(one, other) for one, other in zip(values(once), values(again), strict=True))
        assert {value.device.type for value in (*values(once), *teacher.state_dict().values())} == {"cpu"}
    gpu, cpu = (train(Path(name), name, loss=loss, teachers=[teacher]) for name in ("cuda", "cpu"))
    np.testing.assert_allclose(gpu.curves["train_loss"], cpu.curves["train_loss"], rtol=0.01)
    np.testing.assert_allclose(gpu.curves["held_out_loss"], cpu.curves["held_out_loss"], rtol=0.01)
    given = [predict(cpu.model, rows().inputs, 20, name) for name in ("cuda", "cpu")]
    np.testing.assert_allclose(*given, rtol=1e-3, atol=1e-3)
    arguments = {"task": Classification(), "num_rows": 50, "threads": 1}
    assert training_seconds(net(), rows(), SETTINGS, accelerator="cuda", **arguments) > 0
"""


@pytest.mark.gpu
def test_a_gpu_trains_the_same_again_and_nearly_what_the_cpu_does():
    # In a process of its own: how cuBLAS is set counts from a process's first product on.
    command = [sys.executable, "-c", textwrap.dedent(ON_BOTH), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

"""Models that live in the process are constructed again by another, from what was written down."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.core.interpreter import import_path
from hasten.notebook import modules

WIDTHS = {"small": (4, 6), "large": (64,)}
TABLE = torch.zeros(3)


@dataclass(frozen=True)
class Sizes:
    widths: tuple[int, ...] = WIDTHS["small"]

    def total(self) -> int:
        return sum(self.widths)


def halved(rows: Tensor) -> Tensor:
    return F.relu(rows) / 2


class Layer(nn.Module):
    def __init__(self, width: int, activation: Any = halved) -> None:
        super().__init__()
        self.width, self.activation = width, activation
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.activation(self.linear(rows))


class Net(nn.Module):
    """Uses what is defined around it."""

    def __init__(self, width: int = Sizes().total(), layers: int = 1) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.body = nn.Sequential(*(Layer(width) for _ in range(layers)))

    def forward(self, rows: Tensor) -> Tensor:
        return self.body(rows)


class Forgetful(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows)


class Changed(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows)


class UsesATensor(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows + TABLE


def seven() -> nn.Module:
    return Net(width=7)


@pytest.fixture(autouse=True)
def _of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    for thing in (Sizes, halved, Layer, Net, Forgetful, Changed, UsesATensor, seven):
        monkeypatch.setattr(thing, "__module__", "__main__")


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of the notebook, whose code is imported."""
    (tmp_path / "code").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def value(kept: modules.Kept, key: str) -> str:
    (found,) = [text.partition("=")[2] for text in kept.overrides if text.startswith(f"{key}=")]
    return found


def elsewhere(kept: modules.Kept, rows: Tensor, weights: bool = True) -> Tensor:
    """Outputs of the module as another process makes it."""
    module, _, name = value(kept, "model.arch._target_").rpartition(".")
    load = f"net.load_state_dict(load_file({value(kept, 'model.checkpoint')!r}))" if weights else "pass"
    script = (
        f"import torch; from safetensors.torch import load_file; from {module} import {name}; torch.manual_seed(0)\n"
        f"net = {name}(); {load}; print(net.eval()(torch.tensor({rows.tolist()})).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(eval(done.stdout))


@pytest.mark.slow
def test_an_instance_is_made_again_with_what_it_uses_and_its_weights(path: Path) -> None:
    net, rows = Net(layers=2).eval(), torch.randn(2, 10)
    kept = modules.kept(net, path)
    torch.testing.assert_close(elsewhere(kept, rows), net(rows))
    assert kept.name == "Net"
    assert value(kept, "model.training.epochs") == "0"


@pytest.mark.slow
def test_a_class_and_a_function_are_constructed_anew(path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 10)
    torch.manual_seed(0)
    expected = Net().eval()(rows)
    torch.testing.assert_close(elsewhere(modules.kept(Net, path), rows, weights=False), expected)
    assert elsewhere(modules.kept(seven, path), torch.zeros(1, 7), weights=False).shape == (1, 7)


def test_layers_of_torch_are_made_again(path: Path) -> None:
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding="valid", bias=False),
        nn.BatchNorm1d(4, momentum=None),
        nn.GELU("tanh"),
        nn.ModuleDict({"a": nn.LayerNorm(5)})["a"],
        nn.LSTM(5, 3, num_layers=2, dropout=0.5, bidirectional=True, batch_first=True),
    )
    kept = modules.kept(net, path)
    weights = load_file(value(kept, "model.checkpoint"))
    assert weights.keys() == net.state_dict().keys()
    torch.testing.assert_close(weights["0.weight"], net[0].weight)


def test_what_can_be_imported_is_imported(path: Path) -> None:
    from hasten.models.mlp import MLP

    assert value(modules.kept(MLP, path), "model.arch._target_") == "hasten.models.mlp.MLP"
    kept = modules.kept(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), path)
    module = value(kept, "model.arch._target_").partition(".")[0]
    written = (path / "code" / f"{module}.py").read_text()
    assert "torch.nn.Sequential(torch.nn.Flatten(" in written


def test_equal_models_are_kept_once_and_a_changed_definition_is_another(path: Path) -> None:
    def made(out: int) -> Any:
        torch.manual_seed(0)
        return modules.kept(nn.Sequential(nn.Linear(2, out)), path)

    assert made(3) == made(3)
    assert value(made(3), "model.arch._target_") != value(made(4), "model.arch._target_")
    assert len(list((path / "code").glob("*.py"))) == 2


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Forgetful(4), "model: the argument width of Forgetful is not known: set it (model.width = ...)"),
        (Changed(4), "model: Changed made again from its arguments differs in linear.weight, linear.in_features"),
        (UsesATensor(), "UsesATensor uses TABLE, a Tensor of the notebook, which can't be written down"),
        (lambda: Net(), "model is a lambda, which has no name to import: write it with def"),
        (Sizes, "model=Sizes is no class of torch.nn.Module"),
        ("net.pt", "model must be a torch.nn.Module, a class of them or a function, got str"),
    ],
)
def test_what_no_other_process_could_construct_is_refused_in_one_line(model: Any, told: str, path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)) as error:
        modules.kept(model, path)
    assert "\n" not in str(error.value)


def test_the_remedy_of_an_argument_that_is_not_known_works(path: Path) -> None:
    net = Forgetful(4)
    net.width = 4
    modules.kept(net, path)


def test_a_method_that_was_set_from_elsewhere_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Changed, "forward", Layer.forward)
    with pytest.raises(ConfigError, match="Changed is not defined in one piece"):
        modules.kept(Changed, path)


def test_a_model_of_transformers_is_sent_to_its_own_option(path: Path) -> None:
    kind = type("BertModel", (nn.Module,), {"__module__": "transformers.models.bert"})
    with pytest.raises(ConfigError, match=r"save_pretrained\(folder\).*model=huggingface"):
        modules.kept(kind(), path)

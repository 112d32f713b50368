"""Passes that train in rounds, killed in the last of them, and passes that measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import nn

from hasten.core.errors import ConfigError
from hasten.core.files import read_json
from hasten.core.interfaces import Silent
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.stages.build import build
from hasten.stages.prune import Prune
from hasten.stages.rehearsal import Rehearsal
from hasten.stages.stage import Tools, read_notes

pytestmark = pytest.mark.usefixtures("hydra")


class Killed(BaseException):
    """Like a SIGKILL, as far as nothing here catches it."""


class Recorded(Silent):
    """Counts the steps of every training, those from before a resume in one; ends at a step of one of them."""

    def __init__(self, last: tuple[int, int] | None = None) -> None:
        self.last = last
        self.trainings: list[list[int]] = []

    def start(self, what: str, total: int) -> None:
        self.trainings.append([])

    def advance(self, steps: int = 1) -> None:
        self.trainings[-1].append(steps)
        if (len(self.trainings), sum(self.trainings[-1])) == self.last:
            raise Killed


@pytest.mark.slow
def test_rounds_that_were_finished_before_a_kill_are_not_trained_again(tiny: tuple[str, ...], tmp_path: Path) -> None:
    store = Store(Path(tiny[-1].partition("=")[2]))
    untouched = build(Composer.of(tiny).compose(), store, Tools())
    inputs = {name: untouched.entries[name].folder for name in ("data", "teacher")}
    rounds = ("pruning=unstructured", "pruning.rounds=2", "pruning.sparsity=0.8", "pruning.training.epochs=1")
    recipe = Composer.of([*tiny, *rounds]).compose()

    def prune(folder: Path, progress: Recorded) -> None:
        folder.mkdir(exist_ok=True)
        Prune().make(recipe, inputs, folder, Tools(progress=progress, checkpoint_seconds=0))

    undisturbed, again = Recorded(), Recorded()
    prune(tmp_path / "undisturbed", undisturbed)
    with pytest.raises(Killed):
        prune(tmp_path / "killed", Recorded(last=(2, 5)))
    for leftover in (tmp_path / "killed").iterdir():  # as the store does
        if not leftover.name.startswith("resume"):
            leftover.unlink()
    prune(tmp_path / "killed", again)
    steps = len(undisturbed.trainings[0])
    assert [len(training) for training in undisturbed.trainings] == [steps, steps]
    assert [training[0] for training in again.trainings] == [steps, 4]
    one, other = (tmp_path / name for name in ("undisturbed", "killed"))
    assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    curves = read_json(other / "curves.json")
    assert curves == read_json(one / "curves.json")
    assert [len(values) for values in curves.values()] == [2, 2, 2]  # two rounds of an epoch each
    assert read_notes(other)[0].startswith("pruned and fine-tuned in 2 rounds, to 70, 80 % of")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        ("none", "engine=onnxruntime in floats: quantization that trains or times layers is not in them."),
        ("qat", "engine=onnxruntime in floats: quantization that trains or times layers is not in them."),
        ("static", "engine=onnxruntime with quantization=static."),
    ],
)
def test_says_whose_latency_was_met(
    quantization: str, told: str, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parameters(_: Rehearsal, models: Sequence[nn.Module]) -> list[float]:
        return [1.0 + sum(weights.numel() for weights in model.parameters()) for model in models]

    monkeypatch.setattr(Rehearsal, "models", parameters)
    untouched = build(Composer.of(tiny).compose(), Store(Path(tiny[-1].partition("=")[2])), Tools())
    inputs = {name: untouched.entries[name].folder for name in ("data", "teacher")}
    cut = ("pruning=structured", "pruning.sparsity=null", "pruning.latency_cut=0.2", "pruning.training.epochs=0")
    recipe = Composer.of([*tiny, *cut, "engine=onnxruntime", f"quantization={quantization}"]).compose()
    Prune().make(recipe, inputs, tmp_path, Tools())
    assert read_notes(tmp_path)[-1] == f"These latencies are those of {told}"


def test_what_quantizes_the_networks_that_are_timed_decides_the_result() -> None:
    keys = {"data": "0" * 64, "teacher": "1" * 64}
    cut = ("pruning=structured", "pruning.sparsity=null", "pruning.latency_cut=0.2", "engine=openvino")
    none, qat, static, few_rows = (
        Prune().ingredients(Composer.of([*cut, *quantization]).compose(), keys)
        for quantization in (
            ["quantization=none"],
            ["quantization=qat"],
            ["quantization=static"],
            ["quantization=static", "quantization.calibration_rows=9"],
        )
    )
    assert len({none.key, static.key, few_rows.key}) == 3
    assert none.key == qat.key
    assert {"onnxruntime", "openvino"} <= static.libraries.keys()


def test_refuses_what_is_no_technique(tmp_path: Path) -> None:
    recipe = Composer.of(["pruning._target_=fractions.Fraction"]).compose()
    keys = {"data": "0" * 64, "teacher": "1" * 64}
    assert Prune().ingredients(recipe, keys).key
    with pytest.raises(ConfigError, match=r"pruning\._target_=fractions\.Fraction is no ModulePass"):
        Prune().make(recipe, dict.fromkeys(keys, tmp_path), tmp_path, Tools())

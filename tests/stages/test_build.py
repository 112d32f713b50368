"""The walk through one recipe that has every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hasten.artefacts.module import rebuild
from hasten.core.errors import PassError
from hasten.core.files import read_json
from hasten.core.recipe import Composer, Recipe
from hasten.core.store import Store
from hasten.data.prepare import read
from hasten.stages.build import Built, build, plan
from hasten.stages.stage import Tools
from hasten.training.fit import fit
from hasten.training.predict import predict

pytestmark = pytest.mark.usefixtures("hydra")

FULL = (
    "student=resnet",
    "student.arch.widths=[8]",
    "distillation=soft_labels",
    "pruning=structured",
    "pruning.round_to=2",
    "quantization=static",
    "engine=onnxruntime",
)
STAGES = ["data", "teacher", "answers", "student", "prune", "export", "quantize", "compile"]


@pytest.fixture
def store(tiny: tuple[str, ...]) -> Store:
    return Store(Path(tiny[-1].partition("=")[2]))


def recipe(tiny: tuple[str, ...], *overrides: str) -> Recipe:
    return Composer.of([*tiny, *FULL, *overrides]).compose()


@pytest.fixture
def built(tiny: tuple[str, ...], store: Store) -> Built:
    return build(recipe(tiny), store, Tools())


def outputs(model: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(rows)).numpy()


def test_every_stage_is_finished_under_the_key_that_was_planned(
    tiny: tuple[str, ...], store: Store, built: Built
) -> None:
    planned = plan(recipe(tiny), store)
    assert [step.stage.name for step in planned] == list(built.entries) == STAGES
    assert {step.stage.name: step.key for step in planned} == built.keys
    assert all(step.entry is not None for step in planned)
    assert {line.state for line in store.verify() if line.key in built.keys.values()} == {"finished"}


def test_a_second_build_makes_nothing(tiny: tuple[str, ...], store: Store, built: Built) -> None:
    told: list[str] = []
    again = build(recipe(tiny), store, Tools(), on_stage=told.append)
    assert again.keys == built.keys
    assert not any(entry.fresh for entry in again.entries.values())
    assert told == []
    costs = [entry.seconds for entry in built.entries.values()]
    assert [entry.seconds for entry in again.entries.values()] == costs
    assert min(costs) > 0


def test_what_trains_leaves_its_curves_and_no_checkpoint(built: Built) -> None:
    for name in ("teacher", "student", "prune"):
        folder = built.entries[name].folder
        curves = read_json(folder / "curves.json")
        assert {quantity: len(values) for quantity, values in curves.items()} == dict.fromkeys(
            ("lr", "train_accuracy", "train_loss"), 3
        )
        assert not list(folder.glob("resume*"))


def test_pruning_makes_the_student_narrower(built: Built) -> None:
    student, pruned = (rebuild(built.entries[name].folder) for name in ("student", "prune"))
    before, after = (sum(p.numel() for p in model.parameters()) for model in (student, pruned))
    assert after < before


def test_the_exported_graph_gives_what_the_rebuilt_module_gives(built: Built) -> None:
    import onnxruntime

    rows = read(built.data.folder).rows("validate").inputs["input"][:7]
    session = onnxruntime.InferenceSession(str(built.entries["export"].folder / "model.onnx"))
    (exported,) = session.run(None, {"input": rows})
    np.testing.assert_allclose(exported, outputs(rebuild(built.module.folder), rows), rtol=1e-4, atol=1e-5)


def test_the_teachers_stored_answers_are_those_of_the_rebuilt_teacher(built: Built) -> None:
    rows = read(built.data.folder).rows("train").inputs["input"]
    stored = np.load(built.entries["answers"].folder / "outputs.npy")
    teacher = rebuild(built.entries["teacher"].folder)
    np.testing.assert_allclose(stored, outputs(teacher, rows), rtol=1e-4, atol=1e-5)


def test_one_set_of_answers_serves_every_student(tiny: tuple[str, ...], store: Store, built: Built) -> None:
    narrower = plan(recipe(tiny, "student.arch.widths=[4]"), store)
    assert {step.stage.name for step in narrower if step.entry is not None} == {"data", "teacher", "answers"}


def test_everything_that_trains_and_answers_does_so_on_the_accelerator(
    tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def training(*arguments: Any, accelerator: str, **named: Any) -> Any:
        asked.append((named["what"], accelerator))
        if named["what"] == "student":  # the last that trains
            raise InterruptedError
        return fit(*arguments, **named)

    def answering(model: torch.nn.Module, rows: Any, batch_size: int, accelerator: str) -> Any:
        asked.append(("answers", accelerator))
        return predict(model, rows, batch_size)

    monkeypatch.setattr("hasten.stages.training.fit", training)
    monkeypatch.setattr("hasten.stages.answers.predict", answering)
    typed = ("student=mlp", "student.arch.hidden=[8]", "distillation=soft_labels", "trainer.epochs=1")
    asked_for = Composer.of([*tiny, *typed, "trainer.accelerator=cuda"]).compose()
    with pytest.raises(InterruptedError):
        build(asked_for, Store(tmp_path / "store"), Tools())
    assert asked == [("teacher", "cuda"), ("answers", "cuda"), ("student", "cuda")]


@pytest.mark.slow
def test_what_changes_at_random_is_learned_from_a_teacher_on_line(tiny: tuple[str, ...], store: Store) -> None:
    flip = "data.augment=[{_target_: hasten.data.augment.RandomFlip}]"
    student = ("student=mlp", "student.arch.hidden=[8]", "distillation=soft_labels", "trainer.epochs=1", flip)
    changed = build(Composer.of([*tiny, *student]).compose(), store, Tools())
    assert list(changed.entries) == ["data", "teacher", "student", "export", "compile"]
    assert read_json(changed.entries["student"].folder / "curves.json")["train_loss"]
    stage = read_json(changed.entries["student"].folder / "stage.json")
    assert stage["ingredients"]["parents"].keys() == {"data", "teacher"}


def test_the_quantized_graph_runs_in_integers(built: Built) -> None:
    assert read_json(built.compiled.folder / "compiled.json")["integer_share"] == 1.0


def test_a_changed_sparsity_is_built_on_the_same_teacher_and_student(
    tiny: tuple[str, ...], store: Store, built: Built
) -> None:
    told: list[str] = []
    changed = build(recipe(tiny, "pruning.sparsity=0.25"), store, Tools(), on_stage=told.append)
    assert set(told) <= set(STAGES[4:])
    kept = {name for name in STAGES if changed.keys[name] == built.keys[name]}
    assert kept == {"data", "teacher", "answers", "student"}
    weights = [load_file(each.module.folder / "weights.safetensors") for each in (built, changed)]
    assert sum(map(np.size, weights[0].values())) < sum(map(np.size, weights[1].values()))


def test_the_same_recipe_in_another_store_gives_the_same_bytes(
    tiny: tuple[str, ...], built: Built, tmp_path: Path
) -> None:
    def files(entry: Any) -> dict[str, Any]:
        return read_json(entry.folder / "stage.json")["files"]

    elsewhere = build(recipe(tiny), Store(tmp_path / "elsewhere"), Tools())
    assert elsewhere.keys == built.keys
    assert {name: files(entry) for name, entry in elsewhere.entries.items()} == {
        name: files(entry) for name, entry in built.entries.items()
    }


def test_a_refused_stage_leaves_the_finished_ones(tiny: tuple[str, ...], store: Store) -> None:
    impossible = recipe(tiny, "pruning.sparsity=0.0")
    with pytest.raises(PassError, match="sparsity"):
        build(impossible, store, Tools())
    states = {step.stage.name: step.entry is not None for step in plan(impossible, store)}
    assert states == {name: name in ("data", "teacher", "answers", "student") for name in STAGES}

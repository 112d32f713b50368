"""Who teaches: the model, several teachers, an assistant; and the model's own architecture taught anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import initialize_config_module

from hasten.artefacts.module import rebuild
from hasten.core import schema
from hasten.core.files import read_json
from hasten.core.recipe import Composer, Recipe
from hasten.core.store import Entry, Store
from hasten.data.prepare import read
from hasten.stages.answers import teacher_outputs
from hasten.stages.build import plan, wanted
from hasten.stages.stage import Tools
from hasten.training.predict import predict

ASSISTANT = ("distillation.assistant.arch.widths=[6]", "distillation.assistant.arch.num_blocks=1")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        yield


def keys(*typed: str) -> dict[str, str]:
    return {step.stage.name: step.key for step in plan(Composer.of(typed).compose(), Store(Path("store")))}


def parents(recipe: Recipe, name: str) -> set[str]:
    """What a stage is made of."""
    made: dict[str, str] = {}
    for stage in wanted(recipe):
        ingredients = stage.ingredients(recipe, made)
        if stage.name == name:
            return set(ingredients.parents)
        made[stage.name] = ingredients.key
    raise KeyError(name)


def built(recipe: Recipe, last: str) -> dict[str, Entry]:
    """The recipe's stages up to one of them."""
    folder = recipe.config["store"]["folder"]
    entries: dict[str, Entry] = {}
    for stage in wanted(recipe):
        ingredients = stage.ingredients(recipe, {name: entry.key for name, entry in entries.items()})
        inputs = {name: entry.folder for name, entry in entries.items()}
        entries[stage.name] = Store(Path(folder)).build(
            ingredients, lambda folder, stage=stage, inputs=inputs: stage.make(recipe, inputs, folder, Tools())
        )
        if stage.name == last:
            return entries
    raise KeyError(last)


def answers_of(entry: Entry, data: Entry) -> np.ndarray:
    return predict(rebuild(entry.folder), read(data.folder).rows("train").inputs, 256)


@pytest.fixture(scope="module")
def taught(tiny: tuple[str, ...]) -> Mapping[str, Entry]:
    overrides = ("distillation=assistant", *ASSISTANT, "distillation.teachers=2", "student=mlp", "trainer.epochs=2")
    return built(Composer.of([*tiny, *overrides, "student.arch.hidden=[8]"]).compose(), "student")


def test_several_teachers_answer_by_their_mean(taught: Mapping[str, Entry]) -> None:
    first, second = (answers_of(taught[name], taught["data"]) for name in ("teacher", "teacher-2"))
    assert np.abs(first - second).max() > 0.01
    stored = teacher_outputs(taught["answers"].folder)
    np.testing.assert_allclose(stored, (first + second) / 2, rtol=1e-4, atol=1e-5)


def test_answers_are_mapped_from_their_file(taught: Mapping[str, Entry]) -> None:
    assert isinstance(teacher_outputs(taught["answers"].folder), np.memmap)


def test_an_assistant_learns_from_the_teachers_and_teaches_the_student(taught: Mapping[str, Entry]) -> None:
    made_of = {name: read_json(taught[name].folder / "stage.json")["ingredients"]["parents"] for name in taught}
    assert made_of["assistant"].keys() == {"data", "answers"}
    assert made_of["assistant-answers"]["assistant"] == taught["assistant"].key
    assert made_of["student"].keys() == {"data", "assistant-answers"}
    stored = teacher_outputs(taught["assistant-answers"].folder)
    np.testing.assert_allclose(stored, answers_of(taught["assistant"], taught["data"]), rtol=1e-4, atol=1e-5)
    assert rebuild(taught["assistant"].folder).stem[0].out_channels == 6
    assert read_json(taught["assistant"].folder / "curves.json")["train_loss"]


def test_an_assistant_decides_the_student_and_not_the_teacher() -> None:
    recipe = ("student=mlp", "distillation=assistant")
    one, other = keys(*recipe), keys(*recipe, "distillation.assistant.arch.widths=[6]")
    assert {name for name in one if one[name] != other[name]} >= {"assistant", "assistant-answers", "student"}
    assert {name for name in one if one[name] == other[name]} == {"data", "teacher", "answers"}


def test_an_assistant_is_a_student_of_that_architecture() -> None:
    arch = ("student.arch.widths=[24,48]", "student.arch.num_blocks=2")
    student = keys("student=resnet", *arch, "distillation=soft_labels")["student"]
    assert keys("student=mlp", "distillation=assistant")["assistant"] == student


def test_further_teachers_come_from_other_seeds_and_leave_the_model_what_it_is() -> None:
    recipe = ("student=mlp", "distillation=soft_labels")
    alone, three = keys(*recipe), keys(*recipe, "distillation.teachers=3")
    assert three.keys() - alone.keys() == {"teacher-2", "teacher-3"}
    assert three["teacher"] == alone["teacher"]
    assert len({three[name] for name in ("teacher", "teacher-2", "teacher-3")}) == 3
    assert three["answers"] != alone["answers"]
    # The one that is trained from the next seed is the second again, whoever else teaches.
    assert keys(*recipe, "distillation.teachers=2")["teacher-2"] == three["teacher-2"]


def test_a_further_teacher_is_loaded_and_not_trained(tiny: tuple[str, ...], taught: Mapping[str, Entry]) -> None:
    weights = taught["teacher-2"].folder / "weights.safetensors"
    overrides = ("student=mlp", "distillation=soft_labels", f"distillation.checkpoints=[{weights}]", "trainer.epochs=2")
    loaded = built(Composer.of([*tiny, *overrides]).compose(), "answers")
    assert not (loaded["teacher-2"].folder / "curves.json").exists()
    np.testing.assert_array_equal(teacher_outputs(loaded["answers"].folder), teacher_outputs(taught["answers"].folder))


@pytest.mark.parametrize("option", ["features", "attention"])
def test_layers_are_asked_of_the_teacher_itself(option: str) -> None:
    typed = ("student=resnet", f"distillation={option}")
    assert "answers" not in keys(*typed)
    assert parents(Composer.of(typed).compose(), "student") == {"data", "teacher"}
    several = Composer.of([*typed, "distillation.teachers=2"]).compose()
    assert parents(several, "student") == {"data", "teacher", "teacher-2"}


def test_relations_of_outputs_need_stored_answers_alone() -> None:
    typed = ("student=resnet", "distillation=relations")
    assert parents(Composer.of(typed).compose(), "student") == {"data", "answers"}


def test_a_student_learns_layers_and_leaves_projections_behind(tiny: tuple[str, ...]) -> None:
    overrides = ("student=resnet", "student.arch.widths=[4]", "distillation=features", "trainer.epochs=1")
    entries = built(Composer.of([*tiny, *overrides]).compose(), "student")
    assert sum(weights.numel() for weights in rebuild(entries["student"].folder).parameters()) < sum(
        weights.numel() for weights in rebuild(entries["teacher"].folder).parameters()
    )


def test_what_is_pruned_is_taught_by_its_unpruned_self() -> None:
    assert parents(Composer.of(["pruning=structured", "distillation=soft_labels"]).compose(), "prune") == {
        "data",
        "module",
        "answers",
    }


def test_born_again_is_the_models_architecture_from_other_weights(tiny: tuple[str, ...]) -> None:
    typed = (*tiny, "student=again", "distillation=soft_labels", "trainer.epochs=1", "student.training.lr=1e-9")
    entries = built(Composer.of(typed).compose(), "student")
    one, other = (rebuild(entries[name].folder).state_dict() for name in ("teacher", "student"))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    torch.manual_seed(0)
    arch = read_json(entries["teacher"].folder / "module.json")["arch"]
    from hasten.models.resnet import ResNet

    start = ResNet(**{name: value for name, value in arch.items() if name != "_target_"})
    # The model began with these weights; its successor, which has hardly moved, did not.
    assert (other["classifier.weight"] - start.classifier.weight).abs().max() > 0.01


@pytest.mark.parametrize("teachers", [1, 3])
def test_born_again_starts_from_no_teachers_weights(teachers: int) -> None:
    typed = ("student=again", "distillation=soft_labels", f"distillation.teachers={teachers}", "seed=5")
    recipe, made, seeds = Composer.of(typed).compose(), {}, []
    for stage in wanted(recipe):
        ingredients = stage.ingredients(recipe, made)
        made[stage.name] = ingredients.key
        if ingredients.stage == "teacher":
            seeds.append(ingredients.config["seed"])
        if stage.name == "student":
            assert ingredients.config["initial_seed"] not in seeds
    assert len(seeds) == teachers


def test_how_many_rows_would_be_held_out_counts_only_where_they_are() -> None:
    assert keys("trainer.held_out=0.3") == keys()
    patient = keys("trainer.patience=3")
    assert patient["teacher"] != keys()["teacher"]
    assert keys("trainer.patience=3", "trainer.held_out=0.3")["teacher"] != patient["teacher"]

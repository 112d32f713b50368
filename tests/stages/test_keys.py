"""Stage keys: what changes a result changes its key and the keys after it, and nothing else changes any."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hydra import initialize_config_module
from safetensors.numpy import save_file

from hasten.core import schema, source
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.stages.build import plan

pytestmark = pytest.mark.usefixtures("one_hydra")

FULL = (
    "student=resnet",
    "distillation=soft_labels",
    "pruning=structured",
    "quantization=static",
    "engine=onnxruntime",
    "target.threads=2",
    "engine.threads=1",
)
STAGES = ("data", "teacher", "answers", "student", "prune", "export", "quantize", "compile")
AFTER = {name: set(STAGES[position:]) for position, name in enumerate(STAGES)}


COMPOSERS: dict[tuple[str, ...], Composer] = {}
"""They remember what they composed, which takes far longer than the keys."""


@pytest.fixture(scope="module")
def one_hydra() -> Iterator[None]:
    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        yield
    COMPOSERS.clear()


def keys(*overrides: str, recipe: Sequence[str] = FULL) -> dict[str, str]:
    """Stage -> key of a recipe."""
    typed = (*recipe, *overrides)
    composed = COMPOSERS.setdefault(typed, Composer.of(typed)).compose()
    return {step.stage.name: step.key for step in plan(composed, Store(Path("store")))}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


DECIDES_NOTHING = (
    "target.batch_size=8",
    "target.engines=[eager]",
    "quantization.min_integer_share=0.5",
    "callbacks.checkpoint_seconds=60",
    "loader.cache=disk",
    "loader.row_by_row=true",
    "loader.workers=1",
    "loader.ahead=0",
    "loader.pin_memory=false",
    "objective.max_drop=0.5",
    "task.metrics.recall.max_drop=0.1",
    "planner.max_trials=3",
    "strategy=[engine]",
    "tracking=none",
    "store.days=3",
    "dry_run=true",
    "pipeline=run",
    "name=other",
)
CHANGES = [
    # what is changed, and the stages that it decides
    ("seed=1", AFTER["data"]),
    ("data.split.train=0.4", AFTER["data"]),
    ("data.normalize=false", AFTER["data"]),
    ("data.transforms=[{_target_: hasten.data.transforms.Scale, column: input}]", AFTER["data"]),
    ("task.label_smoothing=0.1", AFTER["data"]),
    ("model.arch.widths=[8]", AFTER["teacher"]),
    ("model.training.lr=0.01", AFTER["teacher"]),
    ("trainer.threads=1", AFTER["teacher"]),
    ("trainer.accelerator=cuda", AFTER["teacher"]),
    ("trainer.epochs=7", AFTER["teacher"]),
    ("loader.order=blocks", AFTER["teacher"]),
    ("loader.window_blocks=8", AFTER["teacher"]),
    ("loader.blocks_above_mb=1", AFTER["teacher"]),
    ("student.training.epochs=7", AFTER["student"]),
    ("student.arch.widths=[8]", AFTER["student"]),
    ("distillation.alpha=0.5", AFTER["student"]),
    ("distillation.temperature=2.0", AFTER["student"]),
    ("pruning.sparsity=0.25", AFTER["prune"]),
    ("pruning.training.batch_size=32", AFTER["prune"]),
    ("quantization.calibration_rows=128", AFTER["quantize"]),
    ("engine.threads=2", AFTER["compile"]),
    ("engine.graph_optimization=basic", AFTER["compile"]),
    # another family of engines wants its quantized operators elsewhere
    ("engine=openvino", AFTER["quantize"]),
]


@pytest.mark.parametrize(("override", "decided"), CHANGES, ids=[override for override, _ in CHANGES])
def test_only_the_stages_that_an_override_decides_get_new_keys(override: str, decided: set[str]) -> None:
    assert changed(keys(), keys(override)) == decided


def test_what_decides_no_result_changes_no_key() -> None:
    assert changed(keys(), keys(*DECIDES_NOTHING)) == set()


def test_openvino_is_compiled_for_its_batch_size() -> None:
    openvino = [*FULL, "engine=openvino"]
    assert changed(keys(recipe=openvino), keys("target.batch_size=8", recipe=openvino)) == {"compile"}


def test_a_float_graph_is_exported_once_for_all_engines() -> None:
    float_recipe = ["student=resnet"]
    engines = [keys(f"engine={name}", recipe=float_recipe) for name in ("eager", "onnxruntime", "openvino")]
    assert changed(engines[0], engines[1]) == changed(engines[1], engines[2]) == {"compile"}


def test_without_a_distillation_nobody_asks_the_teacher() -> None:
    assert "answers" not in keys("distillation=none")


def test_rows_that_change_at_random_are_the_same_rows_trained_in_another_way() -> None:
    augmented = keys("data.augment=[{_target_: hasten.data.augment.RandomFlip}]")
    plain = keys()
    assert "answers" not in augmented, "there is no stored answer to a changed row"
    assert {name for name in augmented if augmented[name] == plain[name]} == {"data"}


def test_answers_depend_on_the_teacher_and_on_nothing_that_learns_from_them() -> None:
    assert "answers" in changed(keys(), keys("model.training.lr=0.01"))
    for override in ("distillation.alpha=0.5", "student.arch.widths=[8]", "pruning.sparsity=0.25"):
        assert "answers" not in changed(keys(), keys(override))


def test_a_mapping_of_names_counts_only_beside_a_checkpoint() -> None:
    save_file({"weight": np.array([1.0])}, "one.safetensors")
    mapping = r"+model.checkpoint_keys={\Amodule\.: body.}"
    assert keys(mapping) == keys()
    loaded = keys("model.checkpoint=one.safetensors")
    assert changed(loaded, keys("model.checkpoint=one.safetensors", mapping)) == AFTER["teacher"]


def test_a_teacher_is_the_same_whatever_is_made_of_it() -> None:
    untouched, full = keys(recipe=()), keys()
    assert (untouched["data"], untouched["teacher"]) == (full["data"], full["teacher"])


def test_without_distillation_a_student_does_not_depend_on_the_teacher() -> None:
    recipe = ["student=resnet"]
    after = changed(keys(recipe=recipe), keys("model.training.lr=0.01", recipe=recipe))
    assert after == {"teacher"}


def save_rows(path: str, pixel: float) -> None:
    inputs = np.random.default_rng(0).normal(size=(60, 1, 8, 8))
    inputs[7, 0, 3, 3] = pixel
    np.savez(path, inputs=inputs, targets=np.arange(60) % 3)


def test_the_content_of_the_rows_counts_and_neither_their_name_nor_their_date() -> None:
    save_rows("rows.npz", pixel=0.5)
    save_rows("copy.npz", pixel=0.5)
    os.utime("copy.npz", (0, 0))
    save_rows("other.npz", pixel=0.25)
    mine = keys("data=npz", "data.path=rows.npz")
    assert keys("data=npz", "data.path=copy.npz") == mine
    assert changed(mine, keys("data=npz", "data.path=other.npz")) == AFTER["data"]


def test_the_content_of_a_checkpoint_counts_and_not_its_name() -> None:
    for name, weight in (("one", 1.0), ("same", 1.0), ("two", 2.0)):
        save_file({"weight": np.array([weight])}, f"{name}.safetensors")
    one, same, two = (keys(f"model.checkpoint={name}.safetensors") for name in ("one", "same", "two"))
    assert one == same
    assert changed(one, two) == changed(one, keys()) == AFTER["teacher"]


def test_the_code_of_a_users_own_model_counts_and_its_comments_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    module = "from torch import nn\n\nclass Net(nn.Module):\n    size = 3\n"

    def written(text: str) -> dict[str, str]:
        Path("keyed_net.py").write_text(text)
        source.source_fingerprint.cache_clear()
        return keys("model=custom", "model.arch._target_=keyed_net.Net")

    before = written(module)
    assert written(f"# explained\n{module}") == before
    assert changed(before, written(module.replace("3", "4"))) == AFTER["teacher"]

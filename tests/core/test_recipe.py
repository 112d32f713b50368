"""Recipes: normal form, identity, composition, and what a user is told when an override is wrong."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.core.groups import conf_folder
from hasten.core.recipe import UNTOUCHED, Composer, normalise, rebuild_command


def test_setting_a_group_drops_earlier_overrides_under_it() -> None:
    assert normalise(["pruning=structured", "pruning.sparsity=0.3", "pruning=none"]) == ("pruning=none",)


def test_a_group_keeps_overrides_that_come_after_it() -> None:
    assert normalise(["pruning=structured", "pruning.sparsity=0.3"]) == ("pruning=structured", "pruning.sparsity=0.3")


def test_the_last_value_wins() -> None:
    assert normalise(["seed=1", "seed=2"]) == ("seed=2",)


def test_one_spelling_for_one_value() -> None:
    assert normalise(["pruning.sparsity=0.50"]) == normalise(["pruning.sparsity=.5"]) == ("pruning.sparsity=0.5",)


OVERRIDES = st.lists(
    st.sampled_from(
        [
            "pruning=structured",
            "pruning=none",
            "pruning.sparsity=0.3",
            "pruning.sparsity=0.4",
            "engine=openvino",
            "engine.threads=2",
            "seed=3",
            "student=resnet",
            "+model.arch.depth=2",
        ]
    ),
    max_size=8,
)


@given(OVERRIDES)
def test_normalising_twice_changes_nothing(overrides: list[str]) -> None:
    once = normalise(overrides)
    assert normalise(once) == once


@given(OVERRIDES, OVERRIDES)
def test_an_edit_of_a_normal_form_equals_the_edit_of_what_was_typed(first: list[str], then: list[str]) -> None:
    assert normalise([*normalise(first), *then]) == normalise([*first, *then])


@given(st.permutations(["pruning=structured", "engine=openvino", "seed=3", "student=resnet"]))
def test_the_order_of_independent_overrides_does_not_matter(overrides: list[str]) -> None:
    assert normalise(overrides) == normalise(sorted(overrides))


@pytest.mark.usefixtures("hydra")
def test_on_a_command_line_a_knob_may_stand_before_its_group() -> None:
    recipe = Composer.of(["pruning.sparsity=0.3", "pruning=structured"]).compose()
    assert recipe.config["pruning"]["sparsity"] == 0.3


@pytest.mark.usefixtures("hydra")
def test_two_spellings_of_one_recipe_have_one_identity() -> None:
    composer = Composer.of([])
    assert composer.compose(["pruning=none"]).identity == composer.compose().identity
    assert composer.compose(["pruning=structured"]).identity != composer.compose().identity


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    "other", ["tracking=none", "planner.max_trials=3", "objective.max_drop=0.5", "callbacks.checkpoint_seconds=60"]
)
def test_what_does_not_decide_the_result_is_no_part_of_a_recipe(other: str) -> None:
    plain, changed = Composer.of([]).compose(), Composer.of([other]).compose()
    assert changed.identity == plain.identity
    assert changed.overrides == plain.overrides


@pytest.mark.usefixtures("hydra")
def test_how_a_result_is_judged_is_no_part_of_it() -> None:
    composer = Composer.of([])
    plain = composer.compose().identity
    assert composer.compose(["task.metrics.recall.max_drop=0.1"]).identity == plain
    assert composer.compose(["task.label_smoothing=0.1"]).identity != plain
    assert composer.compose(["data.normalize=false"]).identity != plain


@pytest.mark.usefixtures("hydra")
def test_a_recipe_is_composed_again_from_its_overrides() -> None:
    composer = Composer.of(["trainer.epochs=3"])
    edited = composer.compose(["student=resnet", "distillation=soft_labels", "engine=openvino"])
    assert Composer.of(edited.overrides).compose().identity == edited.identity


@pytest.mark.usefixtures("hydra")
def test_the_untouched_recipe_forgets_the_users_compression() -> None:
    recipe = Composer.of(["pruning=structured", "pruning.sparsity=0.3", "engine=openvino"]).compose(UNTOUCHED)
    assert recipe.identity == Composer.of([]).compose().identity


@pytest.mark.usefixtures("hydra")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None)
@given(st.sampled_from([0.1, 0.25, 0.5]), st.sampled_from(["l1", "l2"]))
def test_changing_one_stage_leaves_the_sections_of_others(sparsity: float, importance: str) -> None:
    recipe = Composer.of([]).compose(
        ["pruning=structured", f"pruning.sparsity={sparsity}", f"pruning.importance={importance}"]
    )
    plain = Composer.of([]).compose()
    assert {name for name in recipe.config if recipe.config[name] != plain.config[name]} == {"pruning"}


@pytest.mark.usefixtures("hydra")
def test_epochs_of_the_student_do_not_touch_the_teacher() -> None:
    recipe = Composer.of(["student=resnet", "student.training.epochs=5"]).compose()
    assert recipe.config["student"]["training"]["epochs"] == 5
    assert recipe.config["model"]["training"]["epochs"] == recipe.config["trainer"]["epochs"] != 5


@pytest.mark.usefixtures("hydra")
def test_what_an_experiment_leaves_to_the_user_has_to_be_given() -> None:
    """Also where the group's own file has a null for it, and where other keys repeat it."""
    with pytest.raises(ConfigError) as caught:
        Composer.of(["experiment=cifar10", "data.train=train.parquet"]).compose()
    assert caught.value.problems == tuple(
        f"{key} has no value and needs one: {key}=..."
        for key in ("data.validate", "model.checkpoint", "strategies.distill.checkpoint")
    )


@pytest.mark.usefixtures("hydra")
def test_every_strategy_that_is_meant_for_all_is_there_unless_some_are_named() -> None:
    files = sorted((conf_folder() / "strategy").glob("*.yaml"))
    for_all = [file.stem for file in files if yaml.safe_load(file.read_text()).get("by_default", True)]
    assert [strategy.name for strategy in Composer.of([]).strategies()] == for_all
    assert len(for_all) > 1
    assert "joint" not in for_all
    assert [strategy.name for strategy in Composer.of(["strategy=[joint]"]).strategies()] == ["joint"]
    assert [strategy.name for strategy in Composer.of(["strategy=[engine]"]).strategies()] == ["engine"]
    assert Composer.of(["strategy=[]"]).strategies() == ()


@pytest.mark.usefixtures("hydra")
def test_a_strategy_says_which_operators_it_changes() -> None:
    (narrow,) = Composer.of(["strategy=[weight_only]"]).strategies()
    assert narrow.operators == ("linear",)
    (any_of_them,) = Composer.of(["strategy=[weight_only]", "strategies.weight_only.operators=null"]).strategies()
    assert any_of_them.operators is None
    with pytest.raises(ConfigError, match="operators must be a list of names or null, got 'linear'"):
        Composer.of(["strategy=[weight_only]", "strategies.weight_only.operators=linear"]).strategies()


@pytest.mark.usefixtures("hydra")
def test_an_experiment_edits_a_strategy_that_is_chosen_and_no_other() -> None:
    typed = ["experiment=etth1", "data.path=ETTh1.csv", "strategy=[engine,distill_outputs]"]
    edited, _ = Composer.of(typed).strategies()
    (plain,) = Composer.of(["strategy=[distill_outputs]"]).strategies()
    assert edited.name == plain.name
    assert edited.attempts != plain.attempts
    assert edited.addresses == plain.addresses
    assert [strategy.name for strategy in Composer.of([*typed[:2], "strategy=[engine]"]).strategies()] == ["engine"]


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("prunning=structured", "prunning is no key of the config, did you mean 'pruning'?"),
        (
            "pruning=structurd",
            "pruning=structurd is no option of pruning, did you mean 'structured'?; there are ",
        ),
        (
            "model.training.epoch=3",
            "model.training.epoch is no key of the config, did you mean 'model.training.epochs'?",
        ),
        ("pruning.sparsity=0.5", "pruning.sparsity: pruning has no knobs as chosen; pick an option first, pruning=..."),
        ("seed=abc", "Value 'abc' of type 'str' could not be converted to Integer (seed)"),
        ("data=npz", "data.path has no value and needs one: data.path=..."),
        ("pruning.sparsity=[1", "'pruning.sparsity=[1' is not an override of the form key=value"),
    ],
)
def test_a_wrong_override_is_told_in_one_line(typed: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Composer.of([typed]).compose()
    assert str(caught.value).startswith(told)
    assert len(str(caught.value).splitlines()) == 1


def test_the_rebuild_command_can_be_pasted_into_a_shell() -> None:
    import shlex

    command = rebuild_command(["model.arch.widths=[16,32]", "engine=openvino"], None)
    assert shlex.split(command) == ["hasten", "run", "model.arch.widths=[16,32]", "engine=openvino"]


@pytest.mark.usefixtures("hydra")
def test_an_edit_of_the_untouched_recipe_does_not_bring_the_users_compression_back() -> None:
    composer = Composer.of(["pruning=structured", "engine=openvino"])
    untouched = composer.compose(UNTOUCHED)
    edited = composer.edited(untouched, ["engine=onnxruntime"])
    assert edited.config["pruning"] == untouched.config["pruning"]
    assert edited.overrides == ("engine=onnxruntime",)

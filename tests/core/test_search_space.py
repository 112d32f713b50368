from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.core.groups import conf_folder
from hasten.core.search_space import Alternatives, Decision, SearchSpace, Value

NODE: Mapping[str, Any] = {
    "network": [["student=same"], ["student=resnet", "student.training.epochs=3"]],
    "widths": {"key": "student.arch.widths", "values": [[8, 16], [16, 32]], "only_with": "student=resnet"},
    "pruning": {"key": "pruning", "values": ["none", "structured"]},
    "sparsity": {"key": "pruning.sparsity", "low": 0.2, "high": 0.6, "step": 0.2},
    "rows": {"key": "trainer.batch_size", "low": 8, "high": 10},
}


def space(**changes: Any) -> SearchSpace:
    return SearchSpace.of({**NODE, **changes})


def point(of: SearchSpace, **decided: Value) -> tuple[str, ...]:
    """The edit where these are decided, and what is declared first of all others."""

    def decide(decision: Decision) -> Value:
        first = next(iter(decision.offered)) if isinstance(decision, Alternatives) else decision.low
        return decided.get(decision.name, first)

    return of.point(decide).edit


def test_knobs_of_what_is_not_chosen_are_left_out() -> None:
    assert point(space()) == ("student=same", "pruning=none", "trainer.batch_size=8")
    decided = point(space(), network="student=resnet student.training.epochs=3", pruning="pruning=structured")
    assert decided == (
        "student=resnet",
        "student.training.epochs=3",
        "student.arch.widths=[8,16]",
        "pruning=structured",
        "pruning.sparsity=0.2",
        "trainer.batch_size=8",
    )


def test_a_grid_holds_every_point_once_and_its_conditions() -> None:
    edits = [it.edit for it in space().grid()]
    # same: (none + 3 sparsities) x 3 batches; resnet: that for each of 2 widths
    assert len(edits) == len(set(edits)) == (1 + 3) * 3 * (1 + 2)
    assert all(("pruning=structured" in edit) == any("sparsity" in text for text in edit) for edit in edits)
    assert {text for edit in edits for text in edit if "sparsity" in text} == {
        f"pruning.sparsity={value}" for value in ("0.2", "0.4", "0.6")
    }


def test_an_edit_says_what_was_decided() -> None:
    declared = space()
    for made in declared.grid():
        assert declared.values_of(made.edit) == pytest.approx(made.values, abs=1e-6)


@pytest.mark.parametrize(
    "edit", [(), ("student=same",), ("engine=eager",), ("student=same", "pruning=structured", "trainer.batch_size=8")]
)
def test_what_is_no_point_of_the_space_was_not_decided(edit: tuple[str, ...]) -> None:
    assert space().values_of(edit) is None


@given(st.floats(min_value=1e-4, max_value=0.1))
def test_any_number_between_the_bounds_can_be_read_back(value: float) -> None:
    declared = SearchSpace.of({"rate": {"key": "trainer.lr", "low": 1e-4, "high": 0.1, "log": True}})
    made = declared.point(lambda decision: value)
    read = declared.values_of(made.edit)
    assert read is not None
    assert read["rate"] == pytest.approx(value, rel=1e-5)
    assert 1e-4 <= float(read["rate"]) <= 0.1


def test_null_leaves_a_decision_out() -> None:
    assert point(space(network=None, widths=None, rows=None)) == ("pruning=none",)


def test_overrides_of_a_rung_go_to_those_that_choose_their_group() -> None:
    rung = ("pruning.training.epochs=0", "student.training.epochs=1", "trainer.epochs=1")
    plain, pruned = ("student=same", "pruning=none"), ("student=same", "pruning=structured")
    assert space().at(plain, rung) == (*plain, "trainer.epochs=1")
    assert space().at(pruned, rung) == (*pruned, "pruning.training.epochs=0", "trainer.epochs=1")


def test_a_technique_that_is_given_has_its_knobs_searched() -> None:
    node = {"sparsity": NODE["sparsity"]}
    assert point(SearchSpace.of(node)) == ()
    assert point(SearchSpace.of(node, ["pruning=structured"])) == ("pruning.sparsity=0.2",)


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ([], "space must map names to what is to be decided, got []"),
        ({}, "space leaves nothing to decide: name at least one decision, or take space=recipe"),
        ({"a": 3}, "space.a must be a list of alternatives, or key with values or with low and high, got 3"),
        ({"a": []}, "space.a must offer at least one alternative, got []"),
        ({"a": [["pruning"]]}, "space.a[0] must be a list of overrides key=value, got ['pruning']"),
        ({"a": {"values": [1]}}, "space.a.key must name a group or a knob, such as pruning.sparsity, got None"),
        ({"a": {"key": "b", "values": []}}, "space.a.values must be a list with at least one value, got []"),
        (
            {"a": {"key": "b", "low": 0, "hihg": 1}},
            "space.a.hihg is no key of it, did you mean 'high'?; it takes key, low, high, step, log, only_with",
        ),
        ({"a": {"key": "b", "low": 0}}, "space.a.high must be a number, got None"),
        ({"a": {"key": "b", "low": 2, "high": 1}}, "space.a.low must be at most space.a.high=1, got 2"),
        ({"a": {"key": "b", "low": 0, "high": 1, "step": 0}}, "space.a.step must be above 0 or null, got 0"),
        (
            {"a": {"key": "b", "low": 0, "high": 1, "log": True}},
            "space.a.low must be above 0 where log=true, got 0",
        ),
        (
            {"a": [["pruning=none"]], "b": {"key": "c", "values": [1], "only_with": ["pruning=nne"]}},
            "space.b.only_with: pruning=nne is offered by no decision before it, did you mean 'pruning=none'?; "
            "there are pruning=none",
        ),
    ],
)
def test_says_in_one_line_what_is_wrong(node: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        SearchSpace.of(node)
    assert error.value.problems == (told,)


def test_a_grid_needs_steps() -> None:
    with pytest.raises(ConfigError, match=r"space\.rate has no step, and a grid needs one"):
        SearchSpace.of({"rate": {"key": "trainer.lr", "low": 0.1, "high": 1.0}}).grid()


@pytest.mark.parametrize("file", sorted((conf_folder() / "space").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_packaged_space_can_be_searched(file: Any) -> None:
    node = yaml.safe_load(file.read_text().replace("${target.engines}", "[eager, openvino]"))
    assert len(list(islice(SearchSpace.of(node).grid(), 50))) == 50

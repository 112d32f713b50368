"""Widths that meet a latency, on a target whose latency is a formula."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artefacts import module as artefact
from hasten.core.errors import PassError
from hasten.core.interfaces import Input, Rows
from hasten.passes.pruning.groups import Group, Ranked
from hasten.passes.pruning.latency_table import WIDTHS, meet, rising, timed_widths
from hasten.passes.pruning.structured import StructuredPruning

SHAPE = (1, 8, 8)


def ranked(name, units, multiple=4, importance=None):
    group = Group(
        name=name,
        kind="channels",
        num_units=units,
        multiple=multiple,
        slices=(),
        channels=torch.arange(units)[:, None],
    )
    scores = torch.ones(1, units) if importance is None else torch.as_tensor(importance, dtype=torch.float64)[None]
    return Ranked.of(group, scores, weight=1.0)


def timer_of(latency, asked=None):
    def timer(allocations):
        if asked is not None:
            asked.append(len(allocations))
        return [latency(kept) for kept in allocations]

    return timer


def alone(group, kept):
    return group.name


THREE = [ranked("one", 24), ranked("two", 16), ranked("three", 24)]
PRICES = {"one": 1.0, "two": 3.0, "three": 0.2}


def additive(kept):
    return 5 + sum(PRICES[name] * width for name, width in kept.items())


def test_an_additive_latency_is_predicted_exactly_and_met_at_the_least_loss():
    met = meet(THREE, 0.5 * additive({"one": 24, "two": 16, "three": 24}), timer_of(additive), alone)
    assert met.predicted_ms == pytest.approx(met.measured_ms) == pytest.approx(additive(met.kept))
    target = 0.5 * (5 + 24 + 48 + 4.8)
    choices = itertools.product(*(each.group.widths for each in THREE))
    losses = [
        sum(each.loss(width) for each, width in zip(THREE, widths, strict=True))
        for widths in choices
        if additive(dict(zip(PRICES, widths, strict=True))) <= target
    ]
    assert met.measured_ms <= target
    assert sum(each.loss(met.kept[each.group.name]) for each in THREE) == pytest.approx(min(losses))


def test_narrows_what_is_slow_and_spares_what_matters():
    groups = [ranked("slow", 24), ranked("fast", 24)]
    met = meet(groups, 90.0, timer_of(lambda kept: 5 * kept["slow"] + kept["fast"]), alone)
    assert met.kept["slow"] < met.kept["fast"] == 24
    matters = ranked("slow", 24, importance=[1.0] * 24)
    idle = ranked("fast", 24, importance=[1e-9] * 16 + [1.0] * 8)
    met = meet([matters, idle], 40.0, timer_of(lambda kept: kept["slow"] + kept["fast"]), alone)
    assert met.kept == {"slow": 24, "fast": 8} or met.kept["fast"] <= 16


def in_tiles(kept):
    """As of an engine that works in tiles of 16, and takes the slow way where they are not full."""
    return 4 + sum(-(-width // 16) + 0.8 * (width % 16 > 0) for width in kept.values())


def test_never_takes_a_width_that_is_no_faster_than_a_wider_one():
    groups = [ranked("one", 64), ranked("two", 64)]
    for target in (10.9, 10.0, 9.1, 8.0, 7.0):
        kept = meet(groups, target, timer_of(in_tiles), alone).kept
        assert in_tiles(kept) <= target * 1.02
        for name, width in kept.items():
            wider = [in_tiles({**kept, name: other}) for other in groups[0].group.widths if other > width]
            assert all(in_tiles(kept) < latency for latency in wider), (target, kept)


def test_meets_a_latency_that_the_narrowest_widths_miss():
    def clumsy(kept):  # below 12 channels an engine takes the slow way
        return sum(width if width >= 12 else 24 for width in kept.values())

    met = meet([ranked("one", 24), ranked("two", 24)], 30.0, timer_of(clumsy), alone)
    assert met.measured_ms == clumsy(met.kept) <= 30.6
    assert min(met.kept.values()) >= 12


def test_measures_again_round_what_it_chose_where_the_table_was_wrong():
    asked = []

    def product(kept):  # what a width is worth depends on the other one
        return kept["one"] * kept["two"] / 10

    groups = [ranked("one", 24), ranked("two", 24, importance=np.linspace(0.1, 1, 24))]
    met = meet(groups, 12.0, timer_of(product, asked), alone)
    assert len(met.tables) <= 2
    assert met.measured_ms <= 12.0 * 1.02
    assert abs(met.predicted_ms / met.measured_ms - 1) < 0.15


def test_groups_that_are_alike_share_a_row():
    groups = [ranked(f"block{number}", 16) for number in range(8)]
    asked = []
    met = meet(groups, 100.0, timer_of(lambda kept: 10 + sum(kept.values()), asked), lambda group, kept: "block")
    (row,) = met.tables[0].rows
    assert row.groups == tuple(f"block{number}" for number in range(8))
    assert asked[1] == len(row.widths)
    assert met.predicted_ms == pytest.approx(met.measured_ms)
    narrowed = [width for width in met.kept.values() if width < 16]
    assert narrowed


def test_says_how_far_it_gets_where_no_width_is_narrow_enough():
    with pytest.raises(PassError, match=r"^6 ms can't be met by pruning: the fastest widths take 9 ms on the target"):
        meet([ranked("one", 16)], 6.0, timer_of(lambda kept: 5 + kept["one"]), alone)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_smoothed_latencies_never_go_down_and_rising_ones_stay(values):
    smooth = rising(values)
    assert all(one <= other + 1e-9 for one, other in itertools.pairwise(smooth))
    np.testing.assert_allclose(rising(sorted(values)), sorted(values), atol=1e-9)
    assert sum(smooth) == pytest.approx(sum(values), abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(units=st.integers(1, 300), multiple=st.integers(1, 16), place=st.floats(0, 1))
def test_few_widths_are_timed_with_the_ends_and_the_present_one(units, multiple, place):
    group = ranked("one", units, multiple).group
    centre = group.widths[round(place * (len(group.widths) - 1))]
    timed = timed_widths(group, centre)
    assert {group.widths[0], centre, units} <= set(timed) <= set(group.widths)
    assert list(timed) == sorted(set(timed))
    assert len(timed) <= WIDTHS
    assert timed == group.widths or len(group.widths) > WIDTHS


class Bench:
    """A target whose latency is a formula of the network."""

    seed = 0

    def __init__(self, latency):
        inputs = np.random.default_rng(0).normal(size=(16, *SHAPE)).astype(np.float32)
        self.train = Rows(inputs={"input": inputs}, targets=np.arange(16) % 3)
        self.latency, self.sessions = latency, 0

    def fit(self, model):
        return model.eval()

    def latencies_ms(self, models):
        self.sessions += 1
        busy = 1 + 0.5 * (self.sessions % 3)  # every session is slower by itself, for all alike
        return [busy * self.latency(model) for model in models]


def multiply_adds(model):
    pixels = {"stem": 64, "0": 64, "1": 16}
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            total += pixels.get(name.split(".")[1] if "." in name else "stem", 64) * module.weight.numel()
    return 0.1 + total / 1e5


def resnet():
    arch = {"_target_": "hasten.models.resnet.ResNet", "widths": [16, 32], "num_blocks": 1}
    return artefact.build(arch, [Input(shape=SHAPE)], (3,), seed=0)


def test_a_network_is_pruned_to_half_of_its_latency_and_says_so(tmp_path):
    model, arch = resnet()
    bench = Bench(multiply_adds)
    technique = StructuredPruning(sparsity=None, latency_cut=0.5, round_to=2)
    assert technique.measures
    surgery = technique(model, bench)
    share = multiply_adds(surgery.model) / multiply_adds(model)
    assert 0.4 < share <= 0.51
    (step,) = json.loads(json.dumps(surgery.steps))
    table = step["latency_table"]
    assert table["measured_ms"] / table["whole_ms"] == pytest.approx(share)
    assert abs(table["predicted_ms"] / table["measured_ms"] - 1) < 0.15
    (note,) = surgery.notes
    assert note.startswith(f"Pruned to a latency: predicted {table['predicted_ms']:.3g} ms from the latency table, ")
    assert f"measured {table['measured_ms']:.3g} ms" in note
    artefact.save(tmp_path, arch, surgery.model, surgery.steps)
    x = torch.from_numpy(bench.train.inputs["input"])
    assert torch.equal(artefact.rebuild(tmp_path)(x), surgery.model(x))


@pytest.mark.slow
def test_a_latency_is_met_in_rounds():
    model, _ = resnet()
    surgery = StructuredPruning(sparsity=None, latency_cut=0.5, round_to=2, rounds=2)(model, Bench(multiply_adds))
    assert len(surgery.steps) == 2
    assert 0.4 < multiply_adds(surgery.model) / multiply_adds(model) <= 0.51


def test_refuses_to_make_a_model_slower():
    def slower(model):  # only the network as it is runs the fast way
        return 1.0 if multiply_adds(model) == whole else 3.0

    model, _ = resnet()
    whole = multiply_adds(model)
    with pytest.raises(PassError, match="can't be met by pruning: the fastest widths take"):
        StructuredPruning(sparsity=None, latency_cut=0.05)(model, Bench(slower))


def test_does_not_time_anything_where_no_latency_is_asked_for():
    assert not StructuredPruning().measures
    model, _ = resnet()
    bench = Bench(multiply_adds)
    StructuredPruning(sparsity=None, flops_cut=0.3)(model, bench)
    assert bench.sessions == 0

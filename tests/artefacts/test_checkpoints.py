"""Checkpoints whose names differ from the model's: mapped, or told apart name by name."""

import re
import shlex

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import save_file
from torch import nn

from hasten.artefacts.module import load_weights
from hasten.core.errors import ConfigError


def net(num_blocks=2):
    """A model with the names stem.weight, blocks.<i>.{conv,norm}.weight ... linear.weight."""
    blocks = [nn.Sequential() for _ in range(num_blocks)]
    for block in blocks:
        block.add_module("conv", nn.Linear(4, 4, bias=False))
        block.add_module("norm", nn.BatchNorm1d(4))
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(3, 4, bias=False))
    model.add_module("blocks", nn.Sequential(*blocks))
    model.add_module("linear", nn.Linear(4, 2))
    return model


def renamed(model, *rules):
    """The model's weights under names of someone else's, by plain replacement."""
    state = {}
    for name, value in model.state_dict().items():
        for old, new in rules:
            name = name.replace(old, new)
        state[name] = value
    return state


def written(folder, state):
    file = folder / "weights.safetensors"
    save_file(state, file)
    return file


def problems(model, file, **more):
    with pytest.raises(ConfigError) as caught:
        load_weights(model, file, **more)
    return [
        problem.replace(f"model.checkpoint={file} does not fit Sequential: ", "") for problem in caught.value.problems
    ]


def assert_same(one, two):
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("rules", "mapping"),
    [
        ([("linear", "fc")], {r"^fc\.": "linear."}),
        ([("linear", "fc"), ("conv", "c1")], {r"\.c1\.": ".conv.", r"^fc\.": "linear."}),
        ([("blocks.", "blocks_")], {r"blocks_(\d+)": r"blocks.\1"}),
        ([("linear", "fc")], {"^fc": "head", "^head": "linear"}),
    ],
    ids=["prefix", "two", "group", "in order"],
)
def test_a_mapping_gives_the_names_of_the_model(tmp_path, rules, mapping):
    trained, fresh = net(), net()
    load_weights(fresh, written(tmp_path, renamed(trained, *rules)), mapping=mapping)
    assert_same(trained, fresh)


@pytest.mark.parametrize("mapping", [{r"^fc\.": "linear."}, {r"^module\.fc\.": "module.linear."}, {r"fc\.": "linear."}])
def test_a_mapping_is_written_with_or_without_the_prefix_of_a_wrapper(tmp_path, mapping):
    trained, fresh = net(), net()
    state = {f"module.{name}": value for name, value in renamed(trained, ("linear", "fc")).items()}
    load_weights(fresh, written(tmp_path, state), mapping=mapping)
    assert_same(trained, fresh)


def test_a_mapping_may_add_a_prefix_that_the_file_lacks(tmp_path):
    trained = net()
    fresh = nn.ModuleDict({"body": net()})
    load_weights(fresh, written(tmp_path, trained.state_dict()), mapping={r"\A": "body."})
    assert_same(trained, fresh["body"])


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    file = written(tmp_path, net(1).state_dict())
    problem = r"^model\.checkpoint_keys: \^fc, \^head matches none of the names, which are .*blocks\.0\.conv\.weight"
    with pytest.raises(ConfigError, match=problem):
        load_weights(net(1), file, mapping={"^fc": "linear", "^stem": "stem", "^head": "linear"})


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ({"(": "linear"}, r"^model\.checkpoint_keys: \( is no regular expression: missing \)"),
        ({"stem": r"\2"}, r"^model\.checkpoint_keys: \\2 can't replace stem: invalid group reference 2"),
        ({"stem": None}, r"^model\.checkpoint_keys must lead from texts to texts, got 'stem': None"),
        ({"^(weight|bias|linear)": "linear", "stem": "linear"}, "leads both linear.weight and stem.weight to linear.w"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused(tmp_path, mapping, problem):
    with pytest.raises(ConfigError, match=problem):
        load_weights(net(), written(tmp_path, net().state_dict()), mapping=mapping)


def test_the_mapping_is_named_after_the_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"^student\.checkpoint_keys: \( is no"):
        load_weights(net(), written(tmp_path, net().state_dict()), key="student.checkpoint", mapping={"(": ""})


def test_names_the_nearest_missing_one_for_each_unexpected_and_a_mapping(tmp_path):
    state = renamed(net(), ("linear", "fc"))
    assert problems(net(), written(tmp_path, state)) == [
        "2 missing: linear.weight, linear.bias",
        "2 unexpected: fc.bias (did you mean linear.bias?), fc.weight (did you mean linear.weight?)",
        r"try '+model.checkpoint_keys={\Afc\.: linear.}', which names them all",
    ]


@pytest.mark.parametrize(
    "rules",
    [
        [("linear", "fc")],
        [("conv", "c1"), ("norm", "bn")],
        [("blocks.", "encoder.blocks.")],
        [("stem", "backbone.stem"), ("blocks", "backbone.blocks"), ("linear", "backbone.linear")],
        [("stem", "net.stem"), ("blocks", "net.stages"), ("linear", "net.fc"), ("norm", "bn")],
        [("blocks.", "")],
    ],
)
def test_the_mapping_that_is_suggested_works_when_it_is_typed(tmp_path, rules):
    trained, fresh = net(), net()
    file = written(tmp_path, renamed(trained, *rules))
    *_, hint = problems(fresh, file)
    (typed,) = shlex.split(re.search(r"try ('.*'), which names them all", hint)[1])
    load_weights(fresh, file, mapping=OverridesParser.create().parse_override(typed).value())
    assert_same(trained, fresh)


def test_suggests_a_name_only_once_and_only_where_the_two_are_alike(tmp_path):
    state = {"linear.wight": torch.zeros(2, 4), "linear.weigth": torch.zeros(2, 4), "zzz": torch.zeros(2, 4)}
    (_, unexpected, *_) = problems(net(), written(tmp_path, state))
    assert unexpected.count("linear.weight?") == 1
    assert "zzz (did" not in unexpected


def test_suggests_a_name_of_another_shape_where_the_names_are_alike(tmp_path):
    state = {**net().state_dict(), "lineal.weight": torch.zeros(7, 4)}
    del state["linear.weight"]
    assert "1 unexpected: lineal.weight (did you mean linear.weight?)" in problems(net(), written(tmp_path, state))


def test_suggests_nothing_for_the_weights_of_another_model(tmp_path):
    state = {"q": torch.zeros(9, 9), "k": torch.zeros(9, 9)}
    missing, unexpected = problems(net(), written(tmp_path, state))
    assert unexpected == "2 unexpected: k, q"
    assert missing.startswith("13 missing: stem.weight, blocks.0.conv.weight")


def test_lists_ten_names_and_counts_the_rest(tmp_path):
    state = {f"zz{place:02}": torch.zeros(1) for place in range(13)}
    (_, unexpected) = problems(net(), written(tmp_path, state))
    assert unexpected == f"13 unexpected: {', '.join(f'zz{place:02}' for place in range(10))} and 3 more"


def test_a_shape_that_does_not_fit_is_told_after_the_mapping(tmp_path):
    state = renamed(net(), ("linear", "fc"))
    state["fc.weight"] = torch.zeros(10, 4)
    assert problems(net(), written(tmp_path, state), mapping={r"\Afc\.": "linear."}) == [
        "1 of another shape: linear.weight (10, 4) instead of (2, 4)"
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (nn.Linear(1, 1), r"it holds torch\.nn\.modules\.linear\.Linear, and code in a file is never run; save "),
        ({"weight": torch.ones(1), "seen": {1}, "more": re.compile("x")}, r"it holds re\._compile, and code in a file"),
    ],
)
def test_refuses_what_is_no_tensor_in_one_short_line(tmp_path, content, reason):
    file = tmp_path / "w.pt"
    torch.save(content, file)
    with pytest.raises(ConfigError, match=rf"^model\.checkpoint=.*w\.pt can't be read as .*: {reason}") as caught:
        load_weights(nn.Linear(1, 1), file)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    assert len(problem) < len(str(file)) + 250


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_says_in_one_line_that_half_a_file_is_damaged(tmp_path, name):
    file = tmp_path / name
    save_file({"weight": torch.ones(99)}, file) if name.endswith("safetensors") else torch.save(torch.ones(99), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ConfigError, match=r"tensors alone: it is damaged or of another format$"):
        load_weights(nn.Linear(1, 1), file)

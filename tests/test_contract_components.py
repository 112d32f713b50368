"""What every component promises, found by its YAML: a new file is held to the contract without being named here."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import initialize_config_module

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, example, forward, rebuild, save
from hasten.core import schema
from hasten.core.construct import STAGE_KEYS, construct, locate
from hasten.core.errors import ConfigError, PassError
from hasten.core.groups import conf_folder
from hasten.core.interfaces import (
    Columns,
    DataSource,
    Distillation,
    Edit,
    Engine,
    Graph,
    GraphPass,
    Input,
    ModulePass,
    Pass,
    Rows,
    Signature,
    Task,
    Tracker,
    TrainedGraphPass,
)
from hasten.core.preflight import check
from hasten.core.recipe import Composer, Recipe, normalise
from hasten.core.search import covering
from hasten.core.trial import BOTTLENECKS, Strategy
from hasten.engines import checks
from hasten.planning.bottleneck import check as check_strategies
from hasten.tasks.classification import Classification

KINDS: Mapping[str, type] = {
    "data": DataSource,
    "task": Task,
    "distillation": Distillation,
    "pruning": Pass,
    "quantization": Pass,
    "engine": Engine,
    "tracking": Tracker,
}
"""Group -> what its components are."""
GROUPS = (*KINDS, "planner", "model", "student")
BERT = "{model_type: bert, vocab_size: 9, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2}"
NEEDED = {
    "data=npz": ("data.path=rows.npz",),
    "data=hf_datasets": ("data.path=rows",),
    "data=images": ("data.path=rows",),
    "data=series": ("data.path=rows.csv", "data.targets=[OT]"),
    "model=custom": ("model.arch._target_=hasten.models.mlp.MLP",),
    "model=huggingface": (f"model.arch.config={BERT}",),
    "experiment=cifar10": (
        "data.train=train.parquet",
        "data.validate=test.parquet",
        "model.checkpoint=resnet56.safetensors",
        "strategies.distill.checkpoint=resnet20.safetensors",
    ),
    "experiment=cifar10_training": ("data.train=train.parquet", "data.validate=test.parquet"),
    "experiment=etth1": ("data.path=ETTh1.csv",),
    "experiment=trec": ("data.train=train.parquet", "data.test=test.parquet"),
    "experiment=spoken_digits": ("data.path=rows.parquet",),
}
"""What an option can't be composed without, or makes no sense without."""
SHAPE = (1, 8, 8)
INPUTS = (Input(shape=SHAPE),)
ROWS = {
    "images": INPUTS,
    "steps of a sequence": (Input(shape=(3, 8)),),
    "tokens": tuple(Input(name=name, shape=(6,), dtype="int64", dynamic=(0,)) for name in ("ids", "mask")),
    "tokens of transformers": tuple(
        Input(name=name, shape=(6,), dtype="int64", dynamic=(0,)) for name in ("input_ids", "attention_mask")
    ),
}
"""Kinds of rows that an architecture may be for."""
FACTS = {"vocabulary_size": 9}


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))


def read(group: str, option: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / group / f"{option}.yaml").read_text())


def component(group: str, option: str) -> dict[str, Any] | None:
    """The node that names the class, as the file spells it; None where the option stands for nothing."""
    node = read(group, option)
    node = node.get("arch", node) if group in ("model", "student") else node
    return node if isinstance(node, dict) and node.get("_target_") else None


OPTIONS = [(group, option) for group in (*GROUPS, "strategy", "space") for option in options(group)]
COMPONENTS = [(group, option) for group, option in OPTIONS if group in GROUPS and component(group, option)]
CONSTRUCTED = [(group, option) for group, option in COMPONENTS if group not in ("model", "student")]
VALUES = [(group, option) for group, option in CONSTRUCTED if group != "tracking"]
"""A tracker holds the run that it records; everything else is a value."""
each_option = pytest.mark.parametrize(("group", "option"), OPTIONS, ids=map("=".join, OPTIONS))
each_component = pytest.mark.parametrize(("group", "option"), COMPONENTS, ids=map("=".join, COMPONENTS))
each_constructed = pytest.mark.parametrize(("group", "option"), CONSTRUCTED, ids=map("=".join, CONSTRUCTED))
each_value = pytest.mark.parametrize(("group", "option"), VALUES, ids=map("=".join, VALUES))


def each(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("option", [name for kind, name in VALUES if kind == group])


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        yield


@functools.cache
def composed(group: str, option: str) -> Recipe:
    choice = f"{group}={option}"
    return Composer.of([choice, *NEEDED.get(choice, ())]).compose()


@functools.cache
def declared(strategy: str) -> Strategy:
    (found,) = Composer.of([f"strategy=[{strategy}]"]).strategies()
    return found


def made(group: str, option: str) -> Any:
    return construct(composed(group, option).section(group), group)


@each_option
def test_says_in_its_first_line_what_it_is_for(group: str, option: str) -> None:
    lines = (conf_folder() / group / f"{option}.yaml").read_text().splitlines()
    said = next(line for line in lines if not line.startswith("# @package"))
    assert said.startswith("# ")
    assert len(said) > 10


@each_option
def test_composes(group: str, option: str) -> None:
    if group == "strategy":
        assert declared(option).name == option
    else:
        assert composed(group, option).section(group) is not None


@each_component
def test_spells_every_knob_of_its_class_and_no_other(group: str, option: str) -> None:
    node = component(group, option)
    assert node is not None
    if node["_target_"] == "???":
        return
    knobs = inspect.signature(locate(node["_target_"], group)).parameters
    assert set(node) - STAGE_KEYS - {"_target_"} == set(knobs)


@each_component
def test_every_knob_is_explained_beside_it(group: str, option: str) -> None:
    node = component(group, option)
    assert node is not None
    lines = (conf_folder() / group / f"{option}.yaml").read_text().splitlines()
    indent = "  " if group in ("model", "student") else ""
    if indent:  # other sections may speak of parts of the model by the same names
        start = lines.index("arch:") + 1
        lines = [*itertools.takewhile(lambda line: line.startswith(indent), lines[start:])]
    for knob in set(node) - STAGE_KEYS - {"_target_"}:
        (line,) = [line for line in lines if line.startswith(f"{indent}{knob}:")]
        assert "# " in line, f"{knob} has no comment"


@each_constructed
def test_is_what_its_group_holds(group: str, option: str) -> None:
    assert isinstance(made(group, option), KINDS.get(group, object))


@each_value
def test_is_a_frozen_dataclass_of_keywords(group: str, option: str) -> None:
    thing = made(group, option)
    assert all(field.kw_only for field in dataclasses.fields(thing))
    with pytest.raises(dataclasses.FrozenInstanceError):
        thing.anything = 1


@each_value
def test_is_a_value_that_can_be_sent_to_another_process(group: str, option: str) -> None:
    one, other = made(group, option), made(group, option)
    assert one == other
    assert pickle.loads(pickle.dumps(one)) == one


@each_constructed
def test_gives_its_defaults_where_the_yaml_gives_no_other(group: str, option: str) -> None:
    """Who constructs it in Python gets what the YAML gives; `???` and interpolations are for the YAML alone."""
    node = component(group, option)
    assert node is not None
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(locate(node["_target_"], group))
        if field.default is not dataclasses.MISSING
    }
    spelt = {name: value for name, value in node.items() if name in defaults and "${" not in str(value)}
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in spelt.items()}
    assert {name: defaults[name] for name in spelt} == frozen


class Bench:
    """Rows of noise, a fine-tuning that leaves the model as it is, and a clock by which the first graph is fastest."""

    seed = 0
    task = Classification()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inputs = np.random.default_rng(0).normal(size=(64, *SHAPE)).astype(np.float32)
        self.train = Rows(inputs={"input": inputs}, targets=np.arange(64) % 3)

    def fit(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.eval()

    def graph_latencies_ms(self, graphs: Sequence[Graph]) -> list[float]:
        return [1.0 + number for number in range(len(graphs))]


def small_model() -> tuple[torch.nn.Module, dict[str, Any]]:
    arch = {"_target_": "hasten.models.resnet.ResNet", "widths": [8, 16], "num_blocks": 1}
    return build(arch, INPUTS, (3,), seed=0)


def outputs(model: torch.nn.Module, rows: Columns) -> np.ndarray:
    with torch.inference_mode():
        return forward(model.eval(), {name: torch.from_numpy(values) for name, values in rows.items()}).numpy()


@each("pruning")
def test_a_module_pass_works_on_a_copy_and_repeats_itself(option: str, tmp_path: Path) -> None:
    technique, bench = made("pruning", option), Bench(tmp_path)
    assert isinstance(technique, ModulePass)
    model, arch = small_model()
    before = copy.deepcopy(model.state_dict())
    cuts = [technique(model, bench) for _ in range(2)]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    first, second = (outputs(cut.model, bench.train.inputs) for cut in cuts)
    assert first.shape == (64, 3)
    np.testing.assert_array_equal(first, second)
    save(tmp_path, arch, cuts[0].model, cuts[0].steps)
    np.testing.assert_array_equal(outputs(rebuild(tmp_path), bench.train.inputs), first)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = tmp_path_factory.mktemp("graph")
    (folder / "module").mkdir()
    model, arch = small_model()
    rows = Bench(folder).train.inputs
    outputs(model.train(), rows)
    save(folder / "module", arch, model)
    return write_graph(model, folder / "module", Signature(inputs=INPUTS, output_shape=(3,)), rows, folder)


@each("quantization")
def test_a_graph_pass_works_on_a_copy_and_repeats_itself_for_some_engine(
    option: str, graph: Graph, tmp_path: Path
) -> None:
    import onnxruntime

    technique, bench = made("quantization", option), Bench(tmp_path)
    assert isinstance(technique, GraphPass | TrainedGraphPass)
    rows = bench.train.inputs
    lent = (bench,) if isinstance(technique, TrainedGraphPass) else ()
    before = graph.onnx.read_bytes()
    families = {made("engine", name).family for kind, name in VALUES if kind == "engine"}
    placed = []
    for family in sorted(families):
        folders = [tmp_path / family / attempt for attempt in ("one", "two")]
        try:
            for folder in folders:
                folder.mkdir(parents=True)
                calibration = {name: values[: technique.calibration_rows] for name, values in rows.items()}
                notes = technique(graph, calibration if technique.calibration_rows else {}, family, folder, *lent)
                assert all(isinstance(note, str) for note in notes)
        except PassError:  # it does not serve this family of engines
            continue
        first, second = (folder / "model.onnx" for folder in folders)
        assert first.read_bytes() == second.read_bytes()
        session = onnxruntime.InferenceSession(str(first))
        (given,) = session.run(None, dict(rows))
        assert given.shape == (64, 3)
        placed.append(family)
        if technique.measures:  # what places one graph after the other takes its time: one family shows it
            break
    assert placed
    assert graph.onnx.read_bytes() == before


@each("distillation")
def test_a_distillation_is_a_loss_that_the_student_can_follow(option: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 3, generator=generator, requires_grad=True) for _ in range(2))
    loss = made("distillation", option).loss(student, teacher.detach(), torch.arange(6) % 3, Classification())
    assert loss.shape == ()
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0


@each("distillation")
def test_a_distillation_compares_the_layers_that_it_names_for_any_sizes(option: str) -> None:
    distillation = made("distillation", option)
    ours, theirs = distillation.layers
    assert len(ours) == len(theirs)
    if not ours:
        return
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(6, 4, 3, 3, generator=generator, requires_grad=True) for _ in ours]
    teacher = [torch.randn(6, 8, 5, 4, generator=generator) for _ in theirs]
    projections = distillation.projections([tuple(each.shape) for each in student], [(6, 8, 5, 4) for _ in theirs])
    distillation.layer_loss(student, teacher, projections).backward()
    for tensor in (*student, *(weight for each in projections for weight in each.parameters())):
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().sum() > 0


@each("distillation")
def test_a_distillation_says_who_teaches(option: str) -> None:
    node = read("distillation", option)
    assert {name: node.get(name) for name in ("teachers", "checkpoints")} == {"teachers": 1, "checkpoints": []}
    assert "assistant" in node


@each("task")
def test_a_task_takes_targets_of_its_own_kind_and_no_others(option: str) -> None:
    task = made("task", option)
    accepted, refused = [], []
    for given in (None, np.arange(6) % 3, np.linspace(-1, 1, 6)):
        try:
            accepted.append(task.targets(given, 6))
        except ConfigError as error:
            refused += error.problems
    assert accepted
    assert all(problem.startswith("data.targets must ") for problem in refused)
    for targets in accepted:
        assert len(targets) == 6
        np.testing.assert_array_equal(task.targets(targets, 6), targets)


@each("task")
def test_metrics_of_a_task_judge_its_outputs(option: str) -> None:
    """Good outputs are better than bad ones, in the direction that the YAML says."""
    task, metrics = made("task", option), composed("task", option).section("task")["metrics"]
    labels = np.arange(30) % 3
    targets = np.eye(3, dtype=np.float32)[labels]
    learned = labels if task.labels(labels) is not None else targets
    good, bad = targets + np.float32(0.1) * targets, np.roll(targets, 1, axis=1)
    assert metrics
    for name, node in metrics.items():
        scores = [np.mean(locate(node["_target_"], name)(outputs, learned)) for outputs in (bad, good)]
        assert (scores[0] < scores[1]) == node["higher_is_better"], name


@pytest.mark.parametrize(("group", "option"), [pair for pair in COMPONENTS if pair[0] in ("model", "student")])
def test_an_architecture_takes_its_sizes_from_the_data(group: str, option: str) -> None:
    node = composed(group, option).section(group)["arch"]
    taken = []
    for kind, inputs in ROWS.items():
        try:
            model, filled = build(node, inputs, (3,), seed=0, facts=FACTS)
        except ConfigError as error:
            if "is not installed" in str(error):
                pytest.skip(str(error))
            continue
        assert outputs(model, {name: rows.numpy() for name, rows in example(inputs).items()}).shape == (2, 3)
        assert filled["num_outputs"] == 3
        assert filled.get("input_shape", list(inputs[0].shape)) == list(inputs[0].shape)
        taken.append(kind)
    assert taken, "there are no rows for it"


@pytest.mark.parametrize("option", options("experiment"))
def test_an_experiment_composes_from_parts_that_fit(option: str) -> None:
    choice = f"experiment={option}"
    recipe, problems = Composer.of([choice, *NEEDED.get(choice, ())]).compose(), ()
    try:
        check(recipe)
    except ConfigError as error:
        problems = error.problems
    assert [problem for problem in problems if "is no file" not in problem] == [], "its files are the user's to fetch"


@pytest.mark.parametrize("option", options("strategy"))
def test_a_strategy_addresses_bottlenecks_that_there_are(option: str) -> None:
    strategy = declared(option)
    check_strategies([strategy])
    assert strategy.addresses
    assert set(strategy.addresses) <= set(BOTTLENECKS)
    assert max(strategy.addresses.values()) > 1
    assert strategy.cost > 0


@pytest.mark.parametrize("option", options("strategy"))
def test_what_a_strategy_tries_composes_and_makes_sense_somewhere(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "has_bfloat16", lambda: True)
    composer, strategy = Composer.of(["target.threads=8"]), declared(option)
    edits = covering(strategy)
    if strategy.search and "high" in strategy.search:
        edits += covering(replace(strategy, search={**strategy.search, "low": strategy.search["high"]}))
    assert edits
    for edit in edits:
        assert len(normalise(edit)) == len(edit), "it overrides itself"
        assert admissible(composer, edit), edit


def admissible(composer: Composer, edit: Edit) -> bool:
    """Whether the edit passes the preflight on the engine of some recipe, on several devices, or in processes."""
    for choice in (*(f"engine={engine}" for engine in options("engine")), "target=mixed", "distributed=ddp"):
        try:
            check(composer.compose([choice, *edit]))
        except ConfigError:
            continue
        return True
    return False

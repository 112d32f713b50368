"""Everything that can be found wrong with a recipe before anything runs, all at once."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import TypeAdapter, ValidationError

from hasten.core.auto import absent, uncalculable, untrainable
from hasten.core.construct import STAGE_KEYS, arguments, construct, locate
from hasten.core.errors import ConfigError
from hasten.core.interfaces import DataSource, Engine, Pass, Target, Task
from hasten.core.objective import Objective
from hasten.core.recipe import Recipe, nearest
from hasten.core.schedules import unfit_for_stages
from hasten.core.sections import (
    Callbacks,
    Distributed,
    Launch,
    Loader,
    Metric,
    Search,
    Split,
    Step,
    Trainer,
    TrainingSettings,
)
from hasten.core.tensor_plan import TensorPlan
from hasten.core.training_objective import TRAINING, TrainingObjective

COMPONENTS = (
    "data",
    "task",
    "model.arch",
    "student.arch",
    "distillation",
    "distillation.assistant.arch",
    "pruning",
    "quantization",
    "engine",
    "planner",
    "tracking",
)
SECTIONS: Mapping[str, type] = {
    "target": Target,
    "loader": Loader,
    "trainer": Trainer,
    "distributed": Distributed,
    "callbacks": Callbacks,
    "launch": Launch,
    "hparams_search": Search,
    "data.split": Split,
    "model.training": TrainingSettings,
    "student.training": TrainingSettings,
    "distillation.assistant.training": TrainingSettings,
    "pruning.training": TrainingSettings,
    "quantization.training": TrainingSettings,
}


FROM_DATA = ("input_shape", "num_outputs", "num_classes", "vocabulary_size")
"""Arguments of models that the data may fill in."""

REQUIRED = (
    "data",
    "task",
    "model",
    "student",
    "distillation",
    "pruning",
    "quantization",
    "engine",
    "target",
    "loader",
    "trainer",
    "distributed",
)


def check(recipe: Recipe) -> None:
    """Holds a recipe against its components' signatures, types, ranges and combinations.

    Raises:
        ConfigError: with one line for each problem.
    """
    check_values(recipe)
    if problems := refusals(recipe):
        raise ConfigError(*problems)


def check_values(recipe: Recipe) -> None:
    """Holds every value of a recipe against the signature, type and range of what it is for.

    Raises:
        ConfigError: with one line for each problem.
    """
    if problems := _once(_problems(recipe)):
        raise ConfigError(*problems)


def refusals(recipe: Recipe) -> list[str]:
    """Why a recipe whose values are right makes no sense as a combination, one line for each reason; empty if it does.

    Raises:
        ConfigError: a component does not import.
    """
    return list(_combinations(recipe))


def _once(problems: Iterator[str]) -> list[str]:
    """Each problem where it was typed: a value that other sections take over is wrong there for the same reason."""
    first: dict[str, str] = {}
    for text in problems:
        first.setdefault(text.rpartition(" (")[0] or text, text)
    return list(first.values())


def _problems(recipe: Recipe) -> Iterator[str]:
    for key, kind in SECTIONS.items():
        node = _at(recipe.config, key)
        if node is not None:
            yield from _fields(node, typing.get_type_hints(kind, include_extras=True), key)
    yield from _objective(recipe.section("objective"))
    for key in COMPONENTS:
        node = _at(recipe.config, key)
        if node and node.get("_target_"):
            yield from _component(node, key)
    for list_key in ("data.transforms", "data.augment"):
        nodes = _at(recipe.config, list_key)
        if not isinstance(nodes, list):
            yield f"{list_key} must be a list of components, got {nodes!r}"
            continue
        for place, node in enumerate(nodes):
            if isinstance(node, Mapping) and node.get("_target_"):
                yield from _component(node, f"{list_key}[{place}]")
            else:
                yield f"{list_key}[{place}] must have a _target_, got {node!r}"
    yield from _metrics(recipe)
    yield from _loose_ends(recipe)


def _metrics(recipe: Recipe) -> Iterator[str]:
    nodes = _at(recipe.config, "task.metrics")
    if not isinstance(nodes, Mapping) or all(node is None for node in nodes.values()):
        yield f"task.metrics must name at least one metric, got {nodes!r}"
        return
    hints = {name: hint for name, hint in typing.get_type_hints(Metric, include_extras=True).items() if name != "name"}
    for name, node in nodes.items():
        key = f"task.metrics.{name}"
        if node is None:  # one of the task's that is not wanted
            continue
        if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
            yield f"{key}._target_ must be the dotted path of a function of (outputs, targets), got {node!r}"
            continue
        try:
            locate(node["_target_"], key)
        except ConfigError as error:
            yield from error.problems
        settings = {setting: value for setting, value in node.items() if setting != "_target_"}
        yield from _fields(settings, {setting: hint for setting, hint in hints.items() if setting != "target"}, key)


def _objective(node: Mapping[str, Any]) -> Iterator[str]:
    """Of requests or of training; an experiment may say what the other kind is to hold."""
    kinds = [Objective, TrainingObjective]
    if node.get("optimize") == TRAINING:
        kinds.reverse()
    hints, others = (typing.get_type_hints(kind, include_extras=True) for kind in kinds)
    yield from _fields(
        {name: value for name, value in node.items() if name in hints or name not in others}, hints, "objective"
    )


def _loose_ends(recipe: Recipe) -> Iterator[str]:
    config = recipe.config
    if dropped := [group for group in REQUIRED if not config[group]]:
        yield f"{', '.join(dropped)} can't be left out; an absent technique is the option none"
        return
    checkpoint = config["model"].get("checkpoint")
    for section in ("model", "student"):
        yield from _checkpoint(config[section], section)
    yield from _teachers(config)
    trained = bool(config["model"]["arch"].get("folder"))  # a folder that brings its weights along
    if not (checkpoint or trained or _made_up(config)) and config["model"]["training"]["epochs"] == 0:
        remedy = "give model.checkpoint=<file> or train at least 1 epoch"
        yield f"model.training.epochs=0 leaves the model untrained: {remedy}"
    share = config["quantization"].get("min_integer_share")
    if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
        yield f"min_integer_share must be a number in [0, 1], got {share!r} (quantization.min_integer_share)"
    seconds = config["engine"].get("search_seconds", 0)
    if not _fits(seconds, Annotated[float, annotated_types.Ge(0)]):
        yield f"search_seconds must be a number of at least 0, got {seconds!r} (engine.search_seconds)"
    days = config["store"]["days"]
    if days is not None and days < 0:
        yield f"days must be a number of at least 0 or null, got {days!r} (store.days)"
    if not 0 <= config["seed"] < 2**32:
        yield f"seed must be an integer in [0, 2^32), got {config['seed']} (seed)"
    if (again := config["sweep"]["again"]) not in (None, "failed", "all"):
        yield f"again must be one of failed, all or null, got {again!r} (sweep.again)"
    if config["store"]["action"] not in ("list", "verify", "prune"):
        yield f"action must be one of list, verify, prune, got {config['store']['action']!r} (store.action)"


def _checkpoint(node: Mapping[str, Any], section: str) -> Iterator[str]:
    file, mapping = node.get("checkpoint"), node.get("checkpoint_keys")
    if file and not Path(file).is_file():
        yield f"{section}.checkpoint={file} is no file"
    if file and not isinstance(mapping, Mapping):
        wanted = "a mapping of regular expressions to replacements, {} for none"
        yield f"checkpoint_keys must be {wanted}, got {mapping!r} ({section}.checkpoint_keys)"


ASSISTANT = ("arch", "checkpoint", "checkpoint_keys", "training")
"""What `distillation.assistant` has to spell, as a student does; a `tensor_plan` may be there, too."""


def _teachers(config: Mapping[str, Any]) -> Iterator[str]:
    """Who teaches: how many teachers, whose weights, and an assistant between them and the student."""
    node, model = config["distillation"], config["model"]
    number, files, assistant = node.get("teachers", 1), node.get("checkpoints", []), node.get("assistant")
    if not _fits(number, Annotated[int, annotated_types.Ge(1)]):
        yield f"teachers must be an integer of at least 1, got {number!r} (distillation.teachers)"
    elif number > 1 and model["training"]["epochs"] == 0:
        remedy = "name their weights in distillation.checkpoints instead"
        yield f"distillation.teachers={number} would all be the same, as model.training.epochs=0: {remedy}"
    if not _fits(files, list[str]):
        yield f"checkpoints must be a list of files, got {files!r} (distillation.checkpoints)"
    else:
        yield from (f"distillation.checkpoints: {file} is no file" for file in files if not Path(file).is_file())
    if assistant is None:
        return
    if not isinstance(assistant, Mapping) or set(assistant) - {"tensor_plan"} != set(ASSISTANT):
        yield f"distillation.assistant must spell {', '.join(ASSISTANT)}, got {assistant!r}"
        return
    arch = assistant["arch"]
    if not (isinstance(arch, Mapping) and arch.get("_target_")):
        none = "no assistant is distillation.assistant=null"
        yield f"distillation.assistant.arch must have a _target_, got {arch!r}; {none}"
        return
    yield from _checkpoint(assistant, "distillation.assistant")
    if not config["student"].get("arch"):
        yield "distillation.assistant needs a student to teach: student=..., or distillation.assistant=null"


def _made_up(config: Mapping[str, Any]) -> bool:
    """Whether the rows are no data: then a model that has learned nothing is timed as well as any."""
    try:
        return not getattr(locate(config["data"]["_target_"], "data"), "real", True)
    except ConfigError:
        return False


def _component(node: Mapping[str, Any], key: str) -> Iterator[str]:
    try:
        component = locate(node["_target_"], key)
    except ConfigError as error:
        yield from error.problems
        return
    given = arguments(node)
    parameters = inspect.signature(component).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            yield (
                f"{key}.{name} is no argument of {node['_target_']}{nearest(name, list(parameters))}; "
                f"it takes {', '.join(parameters) or 'none'}"
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given and name not in FROM_DATA:
            yield f"{key}.{name} has no value and {node['_target_']} needs one"
    owner = (
        component.__init__
        if inspect.isclass(component) and not hasattr(component, "__dataclass_fields__")
        else component
    )
    hints = typing.get_type_hints(owner, include_extras=True)
    known = {name: value for name, value in given.items() if name in parameters}
    filled = {name: value for name, value in known.items() if not (value is None and name in FROM_DATA)}
    yield from _fields(filled, hints, key, strict_names=False)


def _fields(node: Mapping[str, Any], hints: Mapping[str, Any], key: str, *, strict_names: bool = True) -> Iterator[str]:
    for name, value in node.items():
        if name in hints:
            if not _fits(value, hints[name]):
                yield f"{name} must be {describe(hints[name])}, got {value!r} ({key}.{name})"
        elif strict_names and name not in STAGE_KEYS:
            yield f"{key}.{name} is no key of {key}{nearest(name, list(hints))}; it has {', '.join(hints)}"


def _fits(value: Any, hint: Any) -> bool:
    try:
        TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def describe(hint: Any) -> str:
    """A type with its range in words: `a number in [0, 1)`."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *metadata = get_args(hint)
        return f"{describe(base)}{_range(metadata)}"
    if origin is Literal:
        return f"one of {', '.join(str(item) for item in get_args(hint))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(item) for item in get_args(hint))
    if origin in (tuple, list):
        inner = next((item for item in get_args(hint) if item is not Ellipsis), Any)
        return f"a list, each {describe(inner)}"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _range(metadata: list[Any]) -> str:
    low: object = None
    high: object = None
    open_low = open_high = False
    for item in metadata:
        for part in item if isinstance(item, annotated_types.GroupedMetadata) else (item,):
            if isinstance(part, annotated_types.Ge):
                low, open_low = part.ge, False
            elif isinstance(part, annotated_types.Gt):
                low, open_low = part.gt, True
            elif isinstance(part, annotated_types.Le):
                high, open_high = part.le, False
            elif isinstance(part, annotated_types.Lt):
                high, open_high = part.lt, True
    if low is not None and high is not None:
        return f" in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    if low is not None:
        return f" {'above' if open_low else 'of at least'} {low}"
    if high is not None:
        return f" {'below' if open_high else 'of at most'} {high}"
    return ""


def needed(wanted: str) -> str:
    """An entry of `requires` in words: `student=..., pruning=... or a quantization=... that trains`."""
    groups = [name.partition(".")[::2] for name in wanted.split("|")]
    *first, last = [f"a {group}=... that trains" if knob == "training" else f"{group}=..." for group, knob in groups]
    return f"{', '.join(first)} or {last}" if first else last


def _combinations(recipe: Recipe) -> Iterator[str]:
    config = recipe.config
    if reason := untrainable(config["trainer"]["accelerator"]):
        yield reason
    yield from _step(config["trainer"])
    yield from _distributed(config)
    chosen = {group: bool(config[group].get("_target_")) for group in ("distillation", "pruning", "quantization")}
    chosen["student"] = bool(config["student"].get("arch"))
    chosen["quantization.training"] = bool((config["quantization"].get("training") or {}).get("epochs"))
    for group in ("distillation", "pruning", "quantization"):
        if not chosen[group]:
            continue
        try:  # its knobs may contradict one another, which only it can tell
            technique = construct(config[group], group)
        except ConfigError as error:
            yield from error.problems
            continue
        if isinstance(technique, Pass) and (reason := technique.supports(_target(recipe))):
            yield f"{group}={recipe.option(group)} gains nothing on this target: {reason}"
        if group == "quantization" and isinstance(technique, Pass) and "compute" in technique.relieves:
            yield from _integers(recipe)
        component = locate(config[group]["_target_"], group)
        for wanted in getattr(component, "requires", ()):
            if not any(chosen.get(name, False) for name in wanted.split("|")):
                yield f"{group}={recipe.option(group)} needs {needed(wanted)}, and the recipe has none"
        for banned in getattr(component, "never_with", ()):
            other, _, option = banned.partition("=")
            if recipe.option(other) == option:
                yield f"{group}={recipe.option(group)} can't be combined with {banned}"
    yield from _rows(recipe, chosen)
    if recipe.section("objective").get("optimize") == TRAINING:
        yield from _training(recipe)
    else:
        yield from _engine(recipe, chosen["quantization"])


def _step(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Why a training step can't be calculated as the trainer wants it."""
    try:
        step = Step.of(trainer)
    except ConfigError as error:
        yield from error.problems
        return
    yield from uncalculable(step, trainer["accelerator"])


def _distributed(config: Mapping[str, Any]) -> Iterator[str]:
    """Why trainings can't be spread like that."""
    try:
        spread = Distributed.of(config["distributed"])
    except ConfigError as error:
        yield from error.problems
        return
    chosen = f"distributed={spread.kind}"
    yield from _foreign(spread)
    if spread.kind == "single":
        return
    if (accelerator := config["trainer"]["accelerator"]) != "cpu":
        yield f"{chosen} can't be combined with trainer.accelerator={accelerator}: it trains on processors alone"
    if config["trainer"]["precision"] == "float16":
        yield f"{chosen} can't be combined with trainer.precision=float16: trainer.precision=bfloat16 scales no loss"
    if spread.kind == "auto":
        return  # what it chooses is held against the rest
    if spread.static_graph and (parts := config["trainer"]["micro_batches"]) > 1:
        yield f"distributed.static_graph=true can't be combined with trainer.micro_batches={parts}: PyTorch refuses it"
    if spread.cpu_offload:
        yield "distributed.cpu_offload=true moves nothing: trainer.accelerator=cpu has all in the processor's memory"
    if spread.kind in ("fsdp", "hybrid") and (layout := config["trainer"]["layout"]) != "contiguous":
        yield f"{chosen} can't be combined with trainer.layout={layout}: PyTorch divides weights that are contiguous"
    yield from unfit_for_stages(config, spread)
    yield from _tensor(config, spread)


_OWN_KNOBS: Mapping[str, tuple[str, ...]] = {
    "ddp": (
        *("static_graph", "unused_parameters", "bucket_views", "bucket_mb"),
        *("compression", "powersgd_rank", "powersgd_start", "average_every"),
    ),
    "fsdp": ("reduce_precision", "reshard"),
    "tensor": ("sequence_parallel",),
}
"""Kind of `distributed` -> knobs that mean nothing to the others, but for hybrid, which is fsdp and tensor as well."""


def _foreign(spread: Distributed) -> Iterator[str]:
    """Knobs that were set for another kind."""
    kinds = {"hybrid": ("fsdp", "tensor"), "auto": tuple(_OWN_KNOBS)}.get(spread.kind, (spread.kind,))
    for kind, knobs in _OWN_KNOBS.items():
        for knob in knobs if kind not in kinds else ():
            if (given := getattr(spread, knob)) != getattr(Distributed, knob):
                shown = str(given).lower() if isinstance(given, bool) else given
                means = f"and means nothing to distributed={spread.kind}"
                yield f"distributed.{knob}={shown} is distributed={kind}'s, {means}"


def _tensor(config: Mapping[str, Any], spread: Distributed) -> Iterator[str]:
    """Why layers can't be divided as the plans of the models that are trained say."""
    tensor = spread.mesh(spread.devices).tensor
    sections = [name for name in ("model", "student", "pruning", "quantization") if config[name].get("training")]
    if config["distillation"].get("assistant"):
        sections.append("distillation.assistant")
    trained = [name for name in sections if _at(config, f"{name}.training.epochs")]
    plans = {plan.key: plan for plan in (TensorPlan.of(config, section) for section in trained)}
    for plan in plans.values():
        yield from plan.problems(tensor=tensor, sequence_parallel=spread.sequence_parallel)
    if tensor > 1 and (layers := config["distillation"].get("student_layers")):
        yield (
            f"distributed.tensor={tensor} can't be combined with distillation.student_layers={', '.join(layers)}, "
            "which each process would have a part of: distributed=fsdp keeps them whole"
        )


def _integers(recipe: Recipe) -> Iterator[str]:
    """Why a quantization that calculates in integers is not for the target."""
    precisions = _target(recipe).precisions
    if "int8" not in precisions:
        yield (
            f"quantization={recipe.option('quantization')} calculates in int8, which is none of "
            f"target.precisions={', '.join(precisions)}"
        )


def _rows(recipe: Recipe, chosen: Mapping[str, bool]) -> Iterator[str]:
    """What the recipe wants of rows that they can't give."""
    source, task = locate(recipe.section("data")["_target_"], "data"), recipe.section("task")
    meaning, option = locate(task["_target_"], "task"), recipe.option("task")
    if not (inspect.isclass(source) and issubclass(source, DataSource)):
        yield f"data._target_={recipe.section('data')['_target_']} is no DataSource"
        return
    if not (inspect.isclass(meaning) and issubclass(meaning, Task)):
        yield f"task._target_={task['_target_']} is no Task"
        return
    trains = [group for group in ("student", "distillation", "pruning", "quantization.training") if chosen[group]]
    if recipe.section("model")["training"]["epochs"] > 0:
        trains.append("model.training.epochs")
    if trains and not meaning.trains:
        yield f"{', '.join(trains)} would train, and the rows have no labels to learn from (task={option})"
    if trains and not source.real:
        yield f"{', '.join(trains)} would train, and there are no rows (data={recipe.option('data')})"
    if not source.real and meaning.trains:
        yield f"task={option} needs labelled rows, and there are none (data={recipe.option('data')}): task=unlabelled"
    if chosen["quantization"] and not source.real and recipe.section("quantization").get("calibration_rows"):
        yield (
            f"quantization={recipe.option('quantization')} measures ranges on rows, and there are none "
            f"(data={recipe.option('data')})"
        )
    if chosen["distillation"]:
        fits = locate(recipe.section("distillation")["_target_"], "distillation").outputs
        if fits not in (None, meaning.outputs):
            yield (
                f"distillation={recipe.option('distillation')} is for outputs that are {fits}, and those of "
                f"task={option} are {meaning.outputs}"
            )


def _training(recipe: Recipe) -> Iterator[str]:
    """Why there is no training to make faster."""
    if recipe.section("model")["training"]["epochs"] == 0:
        yield "objective=training makes the training of the model faster, and model.training.epochs=0 has none"
    objective, latency = recipe.section("objective"), ("max_latency_ms", "min_throughput", "max_size_mb")
    if limits := [f"objective.{key}={objective[key]}" for key in latency if objective.get(key) is not None]:
        yield f"objective=training measures no requests, and can't hold {', '.join(limits)}"
    if not locate(recipe.section("task")["_target_"], "task").trains:
        yield f"objective=training needs rows with labels, and task={recipe.option('task')} has none"


def _engine(recipe: Recipe, quantized: bool) -> Iterator[str]:
    target = _target(recipe)
    if reason := absent(target):  # each engine would say it again of itself
        yield reason
        return
    engine = construct(recipe.section("engine"), "engine")
    if not isinstance(engine, Engine):
        yield f"engine._target_={recipe.section('engine')['_target_']} is no Engine"
        return
    threads = getattr(engine, "threads", 1)
    if threads > target.threads:
        yield f"threads must be at most target.threads={target.threads}, got {threads} (engine.threads)"
    elif reason := engine.supports(quantized, target):
        yield f"engine={recipe.option('engine')} can't run this recipe: {reason}"
    elif engine.emulates and (keys := _decided_by_time(recipe.section("objective"))):
        yield (
            f"engine={recipe.option('engine')} is emulated here, and its times and memory say nothing about the "
            f"{target.device}: choose objective=size, got {', '.join(keys)}"
        )


def _decided_by_time(objective: Mapping[str, Any]) -> list[str]:
    """What the objective wants of the times or the memory of a process."""
    optimized = objective["optimize"]
    limits = ("max_latency_ms", "min_throughput", "max_memory_mb", "goal_speedup")
    found = [f"objective.{key}={objective[key]}" for key in limits if objective.get(key) is not None]
    return found if optimized == "size" else [f"objective.optimize={optimized}", *found]


def _target(recipe: Recipe) -> Target:
    node = recipe.section("target")
    return Target.of(node)


def _at(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node

"""What is refused before anything runs: metrics, transforms, and what the rows or the task can't give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra import initialize_config_module

from hasten.core import schema
from hasten.core.errors import ConfigError
from hasten.core.preflight import check
from hasten.core.recipe import Composer


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        yield


def problems(*overrides: str) -> tuple[str, ...]:
    try:
        check(Composer.of(overrides).compose())
    except ConfigError as error:
        return error.problems
    return ()


SCALE = "hasten.data.transforms.Scale"
METRIC = "task.metrics.accuracy"
WRONG = [
    # what was typed, and the one line that it gives
    (("task.metrics=null",), "task.metrics must name at least one metric, got None"),
    (
        ("task.metrics.accuracy=null", "task.metrics.recall=null"),
        "task.metrics must name at least one metric, got {'accuracy': None, 'recall': None}",
    ),
    (
        ("+task.metrics.mine.max_drop=0.1",),
        "task.metrics.mine._target_ must be the dotted path of a function of (outputs, targets), got {'max_drop': 0.1}",
    ),
    (
        (f"{METRIC}._target_=hasten.evidence.metrics.acuracy",),
        "task.metrics.accuracy._target_=hasten.evidence.metrics.acuracy does not import: ",
    ),
    (
        (f"{METRIC}.max_drop=-0.1",),
        "max_drop must be a number of at least 0 or null, got -0.1 (task.metrics.accuracy.max_drop)",
    ),
    ((f"{METRIC}.relative=maybe",), "relative must be true or false, got 'maybe' (task.metrics.accuracy.relative)"),
    (
        (f"+{METRIC}.maxdrop=0.1",),
        "task.metrics.accuracy.maxdrop is no key of task.metrics.accuracy, did you mean 'max_drop'?; it has "
        "higher_is_better, max_drop, relative, by_class",
    ),
    (
        ("target.precisions=[float32]", "quantization=static", "engine=openvino"),
        "quantization=static calculates in int8, which is none of target.precisions=float32",
    ),
    (("engine.search_seconds=-1",), "search_seconds must be a number of at least 0, got -1 (engine.search_seconds)"),
    (("task.label_smoothing=1",), "label_smoothing must be a number in [0, 1), got 1 (task.label_smoothing)"),
    (
        ("task=regression", "task.criterion=l3"),
        "criterion must be one of squared_error, absolute_error, huber, got 'l3'",
    ),
    (("data.transforms=null",), "data.transforms must be a list of components, got None"),
    (("data.transforms=[scale]",), "data.transforms[0] must have a _target_, got 'scale'"),
    (("data.transforms=[{column: input}]",), "data.transforms[0] must have a _target_, got {'column': 'input'}"),
    (
        (f"data.transforms=[{{_target_: {SCALE}, column: input}}, {{_target_: {SCALE}, colum: input}}]",),
        f"data.transforms[1].colum is no argument of {SCALE}, did you mean 'column'?; it takes ",
    ),
    (
        (f"data.transforms=[{{_target_: {SCALE}, column: 3}}]",),
        "column must be a text, got 3 (data.transforms[0].column)",
    ),
    (
        ("data.augment=[{_target_: hasten.data.augment.RandomFlip, probability: 2}]",),
        "probability must be a number in [0, 1], got 2 (data.augment[0].probability)",
    ),
    (
        ("data.augment=[{_target_: hasten.data.augment.Flip}]",),
        "data.augment[0]._target_=hasten.data.augment.Flip does",
    ),
    (
        ("distillation=soft_labels", "student=mlp", "task=regression"),
        "distillation=soft_labels is for outputs that are classes, and those of task=regression are numbers",
    ),
    (
        ("pruning=nm",),
        "pruning=nm gains nothing on this target: only semi-structured kernels of an NVIDIA GPU (compute capability 8.0"
        " or more) skip zeros in that pattern, and target.device=cpu has none; use pruning=unstructured for bytes or "
        "pruning=structured for time, or set pruning.without_kernels=true to prune here what is to run there",
    ),
    (("pruning=nm", "pruning.n=4"), "pruning.n must be less than pruning.m=4, got 4 (pruning.n)"),
    (("pruning=nm", "pruning.importance=filter"), "importance must be one of magnitude, taylor, random, got 'filter'"),
    (
        ("pruning=unstructured", "pruning.sparsity=null", "pruning.threshold=0.1", "pruning.rounds=2"),
        "pruning.rounds=2 needs pruning.sparsity, which grows from round to round: set pruning.rounds=1 to prune by ",
    ),
    (
        ("trainer.schedule=cosin",),
        "schedule must be one of one_cycle, cosine, linear, constant, got 'cosin' (trainer.schedule)",
    ),
    (
        ("trainer.precision=int8",),
        "precision must be one of float32, bfloat16, float16, got 'int8' (trainer.precision)",
    ),
    (("trainer.micro_batches=0",), "micro_batches must be an integer of at least 1, got 0 (trainer.micro_batches)"),
    (
        ("trainer.activation_budget_mb=0",),
        "activation_budget_mb must be a number above 0 or null, got 0 (trainer.activation_budget_mb)",
    ),
    (
        ("trainer.compile=default", "trainer.activation_budget_mb=100"),
        "trainer.activation_budget_mb=100 can't be combined with trainer.compile=default, which decides itself what is",
    ),
    (("trainer.patience=0",), "patience must be an integer of at least 1 or null, got 0 (trainer.patience)"),
    (("model.training.held_out=1",), "held_out must be a number in (0, 1), got 1 (model.training.held_out)"),
    (
        ("distillation=features", "student=resnet", "distillation.teacher_layers=[]"),
        "distillation.student_layers and distillation.teacher_layers must name as many layers each, at least 1, got "
        "['blocks'] and []",
    ),
    (
        ("distillation=features", "student=resnet", "distillation.channel_axis=2"),
        "channel_axis must be one of 1, -1, got 2 (distillation.channel_axis)",
    ),
    (
        ("distillation=soft_labels", "student=mlp", "distillation.teachers=0"),
        "teachers must be an integer of at least 1, got 0 (distillation.teachers)",
    ),
    (
        ("distillation=soft_labels", "student=mlp", "distillation.teachers=2", "model.training.epochs=0"),
        "distillation.teachers=2 would all be the same, as model.training.epochs=0: name their weights in "
        "distillation.checkpoints instead",
    ),
    (
        ("distillation=soft_labels", "student=mlp", "distillation.checkpoints=three"),
        "checkpoints must be a list of files, got 'three' (distillation.checkpoints)",
    ),
    (
        ("distillation=soft_labels", "student=mlp", "distillation.checkpoints=[nowhere.safetensors]"),
        "distillation.checkpoints: nowhere.safetensors is no file",
    ),
    (
        ("distillation=assistant", "pruning=structured"),
        "distillation.assistant needs a student to teach: student=..., ",
    ),
    (
        ("distillation=assistant", "student=mlp", "distillation.assistant.training.epochs=-1"),
        "epochs must be an integer of at least 0, got -1 (distillation.assistant.training.epochs)",
    ),
    (
        ("distillation=assistant", "student=mlp", "distillation.assistant.arch=null"),
        "distillation.assistant.arch must have a _target_, got None; no assistant is distillation.assistant=null",
    ),
    (
        ("distillation=soft_labels", "student=mlp", "distillation.assistant={arch: null}"),
        "distillation.assistant must spell arch, checkpoint, checkpoint_keys, training, got {'arch': None}",
    ),
    (
        ("data._target_=pathlib.Path", "task._target_=pathlib.Path"),
        "data._target_=pathlib.Path is no DataSource",
    ),
    (("task._target_=pathlib.Path",), "task._target_=pathlib.Path is no Task"),
]


@pytest.mark.parametrize(("typed", "told"), WRONG, ids=[" ".join(typed) for typed, _ in WRONG])
def test_says_what_is_wrong_in_one_line(typed: tuple[str, ...], told: str) -> None:
    found = [line for line in problems(*typed) if line.startswith(told)]
    assert len(found) == 1, problems(*typed)
    assert "\n" not in found[0]


def test_a_margin_that_metrics_take_over_is_wrong_where_it_was_typed() -> None:
    assert problems("objective.max_drop=2") == ("max_drop must be a number in [0, 1), got 2 (objective.max_drop)",)


def test_prunes_for_kernels_that_are_elsewhere_where_it_is_told_to() -> None:
    assert problems("pruning=nm", "pruning.without_kernels=true") == ()


UNTRAINED = ("model.training.epochs=0", "model.checkpoint=weights.safetensors")
UNLABELLED = ("task=unlabelled", *UNTRAINED)


@pytest.fixture
def _checkpoint() -> None:
    open("weights.safetensors", "wb").close()


@pytest.mark.usefixtures("_checkpoint")
@pytest.mark.parametrize(
    "trains",
    [
        ("student", "student=mlp"),
        ("pruning", "pruning=structured"),
        ("student, distillation", "student=mlp", "distillation=outputs"),
        ("model.training.epochs", "model.training.epochs=3"),
    ],
)
def test_rows_without_labels_train_nothing(trains: tuple[str, ...]) -> None:
    what, *overrides = trains
    told = f"{what} would train, and the rows have no labels to learn from (task=unlabelled)"
    assert problems(*UNLABELLED, *overrides) == (told,)


@pytest.mark.usefixtures("_checkpoint")
@pytest.mark.parametrize(
    "overrides", [(), ("engine=openvino",), ("quantization=static", "engine=onnxruntime")], ids=" ".join
)
def test_rows_without_labels_calibrate_and_are_served(overrides: tuple[str, ...]) -> None:
    assert problems(*UNLABELLED, *overrides) == ()


@pytest.mark.usefixtures("_checkpoint")
def test_embeddings_are_learned_from_the_untouched_model() -> None:
    taught = ("student=mlp", "distillation=outputs", "distillation.alpha=1")
    assert problems("task=similarity", *UNTRAINED, *taught) == ()


NOISE = ("data=noise", "data.shape=[1,8,8]", "task=unlabelled", "model.training.epochs=0")


def test_noise_times_a_model_that_has_learned_nothing() -> None:
    assert problems(*NOISE) == ()
    assert problems(*NOISE, "engine=onnxruntime") == ()
    assert "model.training.epochs=0 leaves the model untrained" in problems("model.training.epochs=0")[0]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ("quantization=static", "engine=onnxruntime"),
            "quantization=static measures ranges on rows, and there are none (data=noise)",
        ),
        (("task=classification",), "task=classification needs labelled rows, and there are none (data=noise): "),
        (("task=regression",), "task=regression needs labelled rows, and there are none (data=noise): task=unlabelled"),
        (("model.training.epochs=3",), "model.training.epochs would train, and there are no rows (data=noise)"),
        (("pruning=structured",), "pruning would train, and there are no rows (data=noise)"),
    ],
)
def test_noise_neither_trains_nor_calibrates_nor_judges(overrides: tuple[str, ...], told: str) -> None:
    assert [line for line in problems(*NOISE, *overrides) if line.startswith(told)]


def test_a_distillation_of_outputs_is_for_every_task() -> None:
    for task in ("classification", "regression"):
        assert problems("distillation=outputs", "student=mlp", f"task={task}") == ()


def test_all_problems_of_a_task_come_at_once() -> None:
    typed = (f"{METRIC}.max_drop=-1", "task.label_smoothing=2", "data.transforms=[scale]", "data.augment=[flip]")
    assert len(problems(*typed)) == 4

"""Ways to calculate a training step that must lead to the same weights, or to those that a formula gives."""

import gc
import math
import os
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from hasten.core.errors import PassError
from hasten.core.interfaces import Augment, Distillation, Rows, Silent
from hasten.core.sections import Step, TrainingSettings
from hasten.passes.distillation.features import FeatureMaps
from hasten.tasks.classification import Classification
from hasten.training.fit import fit
from hasten.training.step import scaled

SETTINGS = TrainingSettings(epochs=2, batch_size=12, lr=0.01, weight_decay=0.01)


def image_rows(number=50):
    draw = np.random.default_rng(0)
    return Rows(
        inputs={"input": draw.normal(size=(number, 3, 8, 8)).astype(np.float32)}, targets=draw.integers(0, 3, number)
    )


def plain_net(*more):
    torch.manual_seed(1)
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(convolution, *more, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))


def train(folder, step=Step(), *, model=None, data=None, settings=SETTINGS, progress=None, seconds=1e3, **more):  # noqa: B008
    return fit(
        model or plain_net(),
        data or image_rows(),
        settings,
        task=Classification(),
        seed=3,
        threads=1,
        folder=folder,
        checkpoint_seconds=seconds,
        progress=progress or Silent(),
        what="teacher",
        key="model.training",
        step=step,
        **more,
    )


def assert_close(one, two, **tolerance):
    torch.testing.assert_close(one.model.state_dict(), two.model.state_dict(), **tolerance)
    for name, values in one.curves.items():
        np.testing.assert_allclose(values, two.curves[name], rtol=tolerance.get("rtol", 1e-5), err_msg=name)


def assert_same(one, two):
    assert one.curves == two.curves
    assert one.model.state_dict().keys() == two.model.state_dict().keys()
    assert all(torch.equal(value, two.model.state_dict()[name]) for name, value in one.model.state_dict().items())


class Killed(BaseException):
    pass


class Until(Silent):
    """Ends the training at a step, and counts."""

    def __init__(self, last=0):
        self.last, self.steps = last, 0

    def advance(self, steps=1):
        self.steps += steps
        if self.steps == self.last:
            raise Killed


def killed_and_resumed(folder, step, **more):
    with pytest.raises(Killed):
        train(folder, step, progress=Until(5), seconds=1e-6, **more)
    return train(folder, step, progress=Until(), seconds=1e-6, **more)


@dataclass(frozen=True, kw_only=True)
class Noise(Augment):
    def __call__(self, inputs):
        return {name: values + 0.1 * torch.randn_like(values) for name, values in inputs.items()}


class Imitation(Distillation):
    def loss(self, student, teacher, targets, task):
        assert student.dtype == teacher.dtype == torch.float32
        return (student - teacher).square().mean()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("micro_batches", [2, 5, 12, 99])
def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(tmp_path, whole, micro_batches):
    progress = Until()
    fitted = train(tmp_path, Step(micro_batches=micro_batches), progress=progress)
    assert_close(fitted, whole, rtol=1e-3, atol=1e-5)
    assert progress.steps == 8


def test_parts_are_calculated_one_after_the_other(tmp_path):
    seen = []

    class Spy(nn.Identity):
        def forward(self, x):
            seen.append(len(x))
            return x

    train(tmp_path, Step(micro_batches=5), model=plain_net(Spy()), data=image_rows(12))
    assert seen == [3, 3, 2, 2, 2] * 2


def test_parts_see_the_rows_as_the_whole_batch_was_changed(tmp_path):
    teacher = plain_net().eval()
    taught = {"augment": [Noise()], "loss": Imitation(), "teachers": [teacher], "model": plain_net(nn.LeakyReLU())}
    in_parts = train(tmp_path / "parts", Step(micro_batches=3), **taught)
    # AdamW makes whole steps of gradients that are nothing but rounding, which differs from processor to processor.
    assert_close(in_parts, train(tmp_path / "whole", **taught), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kernels", ["foreach", "for_loop"])
def test_all_kernels_are_the_same_optimizer(tmp_path, whole, kernels):
    assert_close(train(tmp_path, Step(optimizer_kernels=kernels)), whole, rtol=1e-4, atol=1e-6)


def test_channels_last_is_where_it_calculates_and_gone_afterwards(tmp_path, whole):
    seen = []

    class Spy(nn.Identity):
        def forward(self, x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

    fitted = train(tmp_path, Step(layout="channels_last"), model=plain_net(Spy()), augment=[])
    torch.testing.assert_close(fitted.model[0].weight, whole.model[0].weight, rtol=1e-3, atol=1e-5)
    assert all(seen)
    assert all(value.is_contiguous() for value in fitted.model.state_dict().values())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_model_calculates_in_half_precision_and_nothing_else_does(tmp_path, whole, precision):
    seen = []

    class Spy(nn.Identity):
        def forward(self, x):
            seen.append(x.dtype if self.training else None)
            return x

    settings = TrainingSettings(epochs=2, batch_size=12, lr=0.01, weight_decay=0.01, patience=2)
    teacher = plain_net().eval()
    taught = {
        "loss": FeatureMaps(student_layers=("0",), teacher_layers=("0",)),
        "teachers": [teacher],
        "model": plain_net(Spy()),
        "settings": settings,
    }
    half = train(tmp_path / "half", Step(precision=precision), **taught)
    assert {kind for kind in seen if kind} == {getattr(torch, precision)}
    assert {value.dtype for value in half.model.state_dict().values()} == {torch.float32}
    # Half precision rounds to 3 digits or less, and eight steps of Adam move each weight by 0.01 at most.
    float32 = train(tmp_path / "float32", **taught)
    assert half.curves["train_loss"] != float32.curves["train_loss"]
    for curve in ("train_loss", "held_out_loss"):
        np.testing.assert_allclose(half.curves[curve], float32.curves[curve], rtol=0.02)


def test_small_gradients_do_not_vanish_in_float16(tmp_path):
    class Faint(Distillation):
        def loss(self, student, teacher, targets, task):
            return 1e-7 * task.loss(student, targets)

    # Its gradients are below what float16 can tell from zero (6e-8); Adam moves weights by lr whatever their size.
    taught = {"loss": Faint(), "teachers": [plain_net().eval()], "model": plain_net(nn.Dropout(0.0))}
    settings = TrainingSettings(epochs=1, batch_size=50, lr=0.01, weight_decay=0.0, schedule="constant")
    fitted = train(tmp_path, Step(precision="float16"), settings=settings, **taught)
    moved = (fitted.model[0].weight - plain_net()[0].weight).abs()
    assert (moved > 1e-4).float().mean() > 0.5


@pytest.mark.parametrize(
    "step",
    [
        Step(precision="bfloat16", layout="channels_last", micro_batches=5),
        Step(precision="float16", optimizer_kernels="foreach"),
        Step(precision="float16", micro_batches=2, batch_factor=2),
    ],
    ids=["bfloat16", "float16 foreach", "float16 fused"],
)
def test_killed_and_resumed_it_ends_the_same(tmp_path, step):
    model = plain_net(nn.BatchNorm2d(8), nn.Dropout(0.2))
    more = {"model": model, "augment": [Noise()], "settings": TrainingSettings(**{**vars(SETTINGS), "epochs": 4})}
    once = train(tmp_path / "once", step, **more)
    assert_same(killed_and_resumed(tmp_path / "again", step, **more), once)


def test_a_step_of_another_kind_never_goes_on_from_a_checkpoint(tmp_path, whole):
    with pytest.raises(Killed):
        train(tmp_path, Step(micro_batches=2), progress=Until(5), seconds=1e-6)
    progress = Until()
    assert_same(train(tmp_path, progress=progress), whole)
    assert progress.steps == 8


@pytest.mark.parametrize(("rule", "lr"), [("none", 0.01), ("sqrt", 0.02), ("linear", 0.04)])
def test_more_rows_a_step_scale_the_learning_rate(tmp_path, rule, lr):
    settings = TrainingSettings(epochs=2, batch_size=10, lr=0.01, weight_decay=0.0, schedule="constant")
    by_factor = train(tmp_path / "factor", Step(batch_factor=4, lr_scaling=rule), settings=settings)
    by_hand = TrainingSettings(epochs=2, batch_size=40, lr=lr, weight_decay=0.0, schedule="constant")
    assert_same(by_factor, train(tmp_path / "hand", settings=by_hand))
    assert by_factor.curves["lr"] == pytest.approx([lr, lr])


def test_the_learning_rate_is_scaled_by_the_rows_that_there_are():
    step = Step(batch_factor=8, lr_scaling="linear")
    settings = scaled(SETTINGS, step, 30)
    assert (settings.batch_size, settings.lr) == (30, pytest.approx(0.01 * 30 / 12))
    assert scaled(SETTINGS, step, 9).lr == 0.01
    assert scaled(SETTINGS, Step(batch_factor=2), 9000).lr == pytest.approx(0.01 * math.sqrt(2))


def test_a_loss_that_is_no_number_is_reported_at_its_step(tmp_path):
    class Broken(nn.Identity):
        steps = 0

        def forward(self, x):
            self.steps += 1
            return x * math.nan if self.steps == 11 else x  # in the second part of the fourth step

    wanted = r"became nan at step 4 of teacher: lower model\.training\.lr \(now 0\.01\)"
    with pytest.raises(PassError, match=wanted):
        train(tmp_path, Step(micro_batches=3), model=plain_net(Broken()), seconds=1e-6)
    assert not (tmp_path / "step=4.ckpt").exists()


def test_activations_calculated_again_change_nothing(tmp_path):
    model = plain_net(nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Conv2d(8, 8, 3), nn.ReLU())
    plain = train(tmp_path / "plain", model=model)
    step = Step(activation_budget_mb=0.1)
    fitted = train(tmp_path / "again", step, model=model)
    assert_close(fitted, plain)
    (note,) = fitted.notes
    assert note.startswith("trainer.activation_budget_mb=0.1: about ")
    assert plain.notes == ()
    assert_same(killed_and_resumed(tmp_path / "killed", step, model=model), fitted)


needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_compiled_it_is_the_same_training_again_and_again(tmp_path):
    settings = TrainingSettings(epochs=2, batch_size=12, lr=0.01, weight_decay=0.01, patience=3)
    taught = {
        "model": plain_net(nn.BatchNorm2d(8), nn.Dropout(0.3)),
        "settings": settings,
        "loss": FeatureMaps(student_layers=("0",), teacher_layers=("0",)),
        "teachers": [plain_net().eval()],
    }
    step, counters = Step(compile="default"), torch._dynamo.utils.counters
    counters.clear()
    once = train(tmp_path / "once", step, **taught)
    # One graph, though rows are held out: they are judged by the plain module.
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert_same(killed_and_resumed(tmp_path / "again", step, **taught), once)
    assert type(once.model) is nn.Sequential
    still = plain_net(nn.BatchNorm2d(8), nn.Dropout(0.0))
    still[
        0
    ].bias = None  # before a normalization its gradient is nothing but rounding, of which AdamW makes whole steps
    without = taught | {"model": still}
    eager = train(tmp_path / "eager", **without)
    assert_close(train(tmp_path / "compiled", step, **without), eager, rtol=1e-2, atol=1e-3)


def test_says_in_one_line_what_the_compiler_can_not_do(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    wanted = r"^trainer\.compile=default can't compile teacher, trainer\.compile=none runs it as it is: .*compiler"
    # What an earlier test compiled shall not be taken from a cache.
    with torch.compiler.config.patch(force_disable_caches=True), pytest.raises(PassError, match=wanted) as found:
        train(tmp_path, Step(compile="default"))
    assert "\n" not in str(found.value)


def test_the_garbage_collector_is_as_it_was_afterwards(tmp_path):
    train(tmp_path)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        train(tmp_path / "frozen")
        assert 0 < gc.get_freeze_count() <= before
    finally:
        gc.unfreeze()

"""Training that ends the same, interrupted or not."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from hasten.artefacts.module import forward
from hasten.core.errors import PassError
from hasten.core.interfaces import Augment, Distillation, Rows, Silent
from hasten.core.sections import Loader, TrainingSettings
from hasten.tasks.classification import Classification
from hasten.tasks.regression import Regression
from hasten.training.fit import fit
from hasten.training.predict import predict

SETTINGS = TrainingSettings(epochs=3, batch_size=12, lr=0.01, weight_decay=0.01)
STEPS = 12
BLOCKS = {"order": "blocks", "block_rows": 5, "window_blocks": 3}
LOADERS = {
    f"{order}, {name}": Loader(**ordered, **way)
    for order, ordered in {"rows": {"order": "rows"}, "blocks": BLOCKS}.items()
    for name, way in {
        "no thread": {"ahead": 0},
        "a thread": {"ahead": 2},
        "a worker": {"workers": 1},
        "row by row": {"row_by_row": True},
    }.items()
}


def rows(number=50, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(number, 6)).astype(np.float32)
    return Rows(inputs={"input": inputs}, targets=generator.integers(0, 3, number))


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def train(folder, *, model=None, data=None, settings=SETTINGS, progress=None, seed=3, seconds=1e-6, **more):
    return fit(
        model or net(),
        data or rows(),
        settings,
        task=more.pop("task", Classification()),
        seed=seed,
        threads=1,
        folder=folder,
        checkpoint_seconds=seconds,
        progress=progress or Silent(),
        what="teacher",
        key="model.training",
        **more,
    )


def assert_same(one, two):
    assert one.curves == two.curves
    pairs = zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True, kw_only=True)
class Shift(Augment):
    by: float

    def __call__(self, inputs):
        return {name: values + self.by for name, values in inputs.items()}


@dataclass(frozen=True, kw_only=True)
class Noise(Augment):
    amount: float = 0.1

    def __call__(self, inputs):
        return {name: values + self.amount * torch.randn_like(values) for name, values in inputs.items()}


class Killed(BaseException):
    """Like a SIGKILL, as far as nothing here catches it."""


class Recorded:
    """A progress that counts, and that ends the training at a step."""

    def __init__(self, last=None, error=Killed):
        self.last, self.error, self.started, self.steps, self.stopped = last, error, [], [], 0

    def start(self, what, total):
        self.started.append((what, total))

    def advance(self, steps=1):
        self.steps.append(steps)
        if sum(self.steps) == self.last:
            raise self.error

    def stop(self):
        self.stopped += 1


def killed(folder, step, **arguments):
    with pytest.raises(Killed):
        train(folder, progress=Recorded(step), **arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"), seconds=1000)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_training_killed_at_any_step_ends_as_if_it_had_not_been(tmp_path, undisturbed, step):
    killed(tmp_path, step)
    progress = Recorded()
    assert_same(train(tmp_path, progress=progress), undisturbed)
    # The checkpoint of a step is written after the progress heard of it, so the killed step is done again.
    assert progress.steps == ([step - 1] if step > 1 else []) + [1] * (STEPS - step + 1)


def test_a_training_killed_again_and_again_ends_the_same_and_keeps_two_checkpoints(tmp_path, undisturbed):
    for step in (3, 4, 5, 9, 12):
        killed(tmp_path, step)
        assert len(list(tmp_path.iterdir())) <= 3
    assert_same(train(tmp_path), undisturbed)


def test_a_finished_training_gives_its_result_again(tmp_path, undisturbed):
    train(tmp_path)
    progress = Recorded()
    assert_same(train(tmp_path, progress=progress), undisturbed)
    assert sum(progress.steps) in (0, STEPS)


def test_a_torn_checkpoint_costs_a_step_and_nothing_else(tmp_path, undisturbed):
    killed(tmp_path, 8)
    latest = tmp_path / "step=7.ckpt"
    latest.write_bytes(latest.read_bytes()[:1000])
    progress = Recorded()
    assert_same(train(tmp_path, progress=progress), undisturbed)
    assert progress.steps[0] == 6


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"data": rows(seed=1)},
        {"settings": TrainingSettings(epochs=3, batch_size=12, lr=0.02, weight_decay=0.01)},
        {"model": nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))},
        {"task": Classification(label_smoothing=0.1)},
        {"augment": [Noise(amount=0.1)]},
    ],
    ids=["seed", "rows", "settings", "initial weights", "task", "augmentation"],
)
def test_never_goes_on_from_another_training(tmp_path, undisturbed, other):
    killed(tmp_path, 6, **other)
    progress = Recorded()
    assert_same(train(tmp_path, progress=progress), undisturbed)
    assert progress.steps == [1] * STEPS


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    import importlib.util

    spec = importlib.util.spec_from_file_location("claims", sys.argv[1])
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)

    class Suicide(claims.Recorded):
        def advance(self, steps=1):
            super().advance(steps)
            if sum(self.steps) == 7:
                os.kill(os.getpid(), signal.SIGKILL)

    claims.train(Path(sys.argv[2]), progress=Suicide(), loader=claims.LOADERS[sys.argv[3]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["rows, a thread", "rows, a worker"])
def test_a_real_sigkill_in_another_process_changes_nothing(tmp_path, undisturbed, loader):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), __file__, str(tmp_path), loader]
    died = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False)
    assert died.returncode == -signal.SIGKILL
    progress = Recorded()
    assert_same(train(tmp_path, progress=progress), undisturbed)
    assert progress.steps[0] == 6


class Spy(nn.Linear):
    """Keeps the first column of every batch that it is trained on."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.seen = []

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.seen.append(x[:, 0].tolist())
        return super().forward(x)


def numbered(number=50):
    data = rows(number)
    data.inputs["input"][:, 0] = np.arange(number)
    return data


@pytest.mark.parametrize("loader", LOADERS)
def test_a_killed_and_resumed_training_sees_every_row_as_often_as_an_undisturbed_one(tmp_path, loader):
    def seen(folder, **arguments):
        model = Spy(6, 3)
        model.load_state_dict(first.state_dict())
        with contextlib.suppress(Killed):
            train(folder, model=model, data=numbered(), loader=LOADERS[loader], **arguments)
        return model.seen

    first = nn.Linear(6, 3)
    whole = seen(tmp_path / "whole")
    # Twice in the middle of an epoch; the step that was killed is done again.
    killed_once = seen(tmp_path / "killed", progress=Recorded(3))[:-1]
    killed_again = seen(tmp_path / "killed", progress=Recorded(7))[:-1]
    assert (len(killed_once), len(killed_again)) == (2, 4)
    assert killed_once + killed_again + seen(tmp_path / "killed") == whole
    for epoch in (whole[:4], whole[4:8], whole[8:]):
        taken = [row for batch in epoch for row in batch]
        assert len(set(taken)) == len(taken) == 48


def test_who_fetches_the_rows_changes_nothing_and_their_order_does(tmp_path):
    found = {name: train(tmp_path / name, loader=loader, seconds=1000) for name, loader in LOADERS.items()}
    for order in ("rows", "blocks"):
        for name in LOADERS:
            if name.startswith(order):
                assert_same(found[name], found[f"{order}, no thread"])
    assert found["rows, no thread"].curves != found["blocks, no thread"].curves


def test_never_goes_on_from_a_training_on_rows_of_another_name(tmp_path):
    killed(tmp_path, 6, contents="one")
    other, same = Recorded(), Recorded(6)
    shutil.copytree(tmp_path, tmp_path / "copy")
    train(tmp_path / "copy", progress=other, contents="two")
    assert other.steps == [1] * STEPS
    with pytest.raises(Killed):
        train(tmp_path, progress=same, contents="one")
    assert same.steps == [5, 1]


def test_tells_what_was_read_and_where_rows_were_kept(tmp_path):
    killed(tmp_path, 7)
    fitted = train(tmp_path)
    # Six steps were done, of four an epoch.
    assert [reading.num_batches for reading in fitted.readings] == [2, 4]
    assert [reading.asked_bytes for reading in fitted.readings] == [2 * 12 * (24 + 8), 4 * 12 * (24 + 8)]
    assert fitted.cache == "0 MB of training rows are held by the process"


def test_ctrl_c_comes_through_and_stays_possible(tmp_path, undisturbed):
    handler, progress = signal.getsignal(signal.SIGINT), Recorded(5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=progress)
    assert signal.getsignal(signal.SIGINT) is handler
    assert progress.stopped == 1
    assert_same(train(tmp_path), undisturbed)


def test_learns_what_can_be_learnt(tmp_path):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(400, 6)).astype(np.float32)
    data = Rows(inputs={"input": inputs}, targets=inputs[:, :3].argmax(1))
    settings = TrainingSettings(epochs=15, batch_size=32, lr=0.02, weight_decay=0.0)
    fitted = train(tmp_path, data=data, settings=settings, seconds=1000)
    assert (predict(fitted.model, data.inputs, 100).argmax(1) == data.targets).mean() > 0.95
    assert fitted.curves["train_loss"][-1] < 0.5 * fitted.curves["train_loss"][0]
    assert not fitted.model.training


def test_is_adamw_under_one_cycle(tmp_path):
    # All rows are one batch, so that their order only changes how the sums are rounded.
    data, model = rows(10), nn.Linear(6, 3)
    settings = TrainingSettings(epochs=20, batch_size=64, lr=0.05, weight_decay=0.1)
    fitted = train(tmp_path, model=model, data=data, settings=settings, seconds=1000)
    weight, bias = model.weight.detach().double().clone(), model.bias.detach().double().clone()
    moments = {name: [torch.zeros_like(value)] * 2 for name, value in (("weight", weight), ("bias", bias))}
    values = {"weight": weight, "bias": bias}
    inputs, labels = torch.from_numpy(data.inputs["input"]).double(), torch.from_numpy(data.targets)
    product = [1.0, 1.0]
    for step in range(20):
        lr, beta = one_cycle(step, 20, 0.05)
        wrong = torch.softmax(inputs @ values["weight"].T + values["bias"], 1) - nn.functional.one_hot(labels, 3)
        gradients = {"weight": wrong.T @ inputs / 10, "bias": wrong.mean(0)}
        product = [beta ** (step + 1), 0.999 ** (step + 1)]
        for name, gradient in gradients.items():
            first, second = moments[name]
            moments[name] = [beta * first + (1 - beta) * gradient, 0.999 * second + 0.001 * gradient**2]
            first, second = moments[name][0] / (1 - product[0]), moments[name][1] / (1 - product[1])
            values[name] = values[name] * (1 - lr * 0.1) - lr * first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(fitted.model.weight.double(), values["weight"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fitted.model.bias.double(), values["bias"], rtol=1e-3, atol=1e-4)


def one_cycle(step, total, peak):
    """Learning rate and first beta: a cosine up over 30 % of the steps from peak / 25, then down to peak / 250000."""
    turn = 0.3 * total - 1

    def cosine(start, end, share):
        return end + (start - end) * (1 + np.cos(np.pi * share)) / 2

    if step <= turn:
        return cosine(peak / 25, peak, step / turn), cosine(0.95, 0.85, step / turn)
    share = (step - turn) / (total - 1 - turn)
    return cosine(peak, peak / 25e4, share), cosine(0.85, 0.95, share)


def test_curves_are_plain_lists_with_a_value_per_epoch(undisturbed):
    assert sorted(undisturbed.curves) == ["lr", "train_accuracy", "train_loss"]
    for values in undisturbed.curves.values():
        assert len(values) == 3
        assert all(type(value) is float for value in values)
    # 4 steps an epoch, 12 in all.
    np.testing.assert_allclose(
        undisturbed.curves["lr"], [one_cycle(step, 12, 0.01)[0] for step in (3, 7, 11)], rtol=1e-6
    )


def test_curves_are_means_over_the_batches_of_the_epoch(tmp_path):
    data, model = rows(40), nn.Linear(6, 3)
    settings = TrainingSettings(epochs=1, batch_size=10, lr=1e-12, weight_decay=0.0)
    curves = train(tmp_path, model=model, data=data, settings=settings, seconds=1000).curves
    logits = torch.from_numpy(predict(model, data.inputs, 40))
    labels = torch.from_numpy(data.targets)
    assert curves["train_loss"][0] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert curves["train_accuracy"][0] == (logits.argmax(1) == labels).float().mean().item()


def test_leaves_the_model_the_generators_and_the_threads_alone(tmp_path):
    model, threads = net(), torch.get_num_threads()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    fit_model = train(tmp_path, model=model).model
    assert fit_model is not model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == threads
    assert random.getstate() == generators[0]
    assert np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])
    assert not torch.are_deterministic_algorithms_enabled()


def test_tells_its_progress_step_by_step(tmp_path):
    progress = Recorded()
    train(tmp_path, progress=progress)
    assert (progress.started, progress.steps, progress.stopped) == ([("teacher", STEPS)], [1] * STEPS, 1)


def test_prints_and_logs_nothing(tmp_path, capfd, caplog):
    train(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.startswith(("pytorch_lightning", "lightning"))] == []


def test_no_epochs_leave_the_weights_as_they_are(tmp_path):
    model = net()
    fitted = train(tmp_path, model=model, settings=TrainingSettings(epochs=0, batch_size=12, lr=0.01, weight_decay=0.0))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), fitted.model.state_dict().values(), strict=True)
    )
    assert fitted.curves == {}
    assert not fitted.model.training


def test_trains_in_training_mode_what_comes_in_eval_mode(tmp_path, undisturbed):
    assert_same(train(tmp_path, model=net().eval()), undisturbed)


def test_fewer_rows_than_a_batch_are_one_batch(tmp_path):
    progress = Recorded()
    train(tmp_path, data=rows(7), progress=progress)
    assert progress.started == [("teacher", 3)]


def test_refuses_batch_normalization_over_a_single_row(tmp_path):
    settings = TrainingSettings(epochs=1, batch_size=1, lr=0.01, weight_decay=0.0)
    with pytest.raises(PassError, match=r"more than one value .* teacher: raise model\.training\.batch_size \(now 1\)"):
        train(tmp_path, settings=settings)


class Explosion(Distillation):
    """Becomes infinite where the student has moved far enough."""

    def loss(self, student, teacher, targets, task):
        return torch.exp(1e3 * (student - teacher).abs().max())


def test_says_what_to_do_about_a_loss_that_is_no_number(tmp_path):
    data = rows(24)
    with pytest.raises(PassError, match=r"became nan at step 1 of teacher: lower model\.training\.lr \(now 0\.01\)"):
        train(tmp_path, data=Rows(inputs={"input": data.inputs["input"] * np.float32(np.inf)}, targets=data.targets))


def test_notices_a_loss_that_becomes_infinite_on_the_way(tmp_path):
    data, model = rows(24), nn.Linear(6, 3)
    outputs = predict(model, data.inputs, 24) + np.float32(0.01)
    settings = TrainingSettings(epochs=50, batch_size=24, lr=10.0, weight_decay=0.0)
    with pytest.raises(PassError, match=r"became inf at step ([2-9]|\d\d) of teacher: .*now 10\)"):
        train(tmp_path, model=model, data=data, settings=settings, loss=Explosion(), teacher_outputs=outputs)


class Imitation(Distillation):
    def loss(self, student, teacher, targets, task):
        return (student - teacher).square().mean()


def test_distils_row_by_row_from_the_teacher_and_not_from_the_labels(tmp_path):
    data, teacher = rows(60), nn.Linear(6, 3)
    outputs = predict(teacher, data.inputs, 60)
    settings = TrainingSettings(epochs=100, batch_size=20, lr=0.1, weight_decay=0.0)
    student = nn.Linear(6, 3)
    fitted = train(
        tmp_path, model=student, data=data, settings=settings, seconds=1000, loss=Imitation(), teacher_outputs=outputs
    )
    torch.testing.assert_close(fitted.model.weight, teacher.weight, atol=1e-2, rtol=1e-2)


def test_a_distillation_is_lent_the_tasks_own_loss(tmp_path):
    class Both(Distillation):
        def loss(self, student, teacher, targets, task):
            return 0 * teacher.sum() + task.loss(student, targets)

    data = rows(24)
    settings = TrainingSettings(epochs=2, batch_size=12, lr=0.05, weight_decay=0.0)
    taught = {"loss": Both(), "teacher_outputs": np.zeros((24, 3), np.float32)}
    model = nn.Linear(6, 3)
    alone = train(tmp_path / "alone", model=model, data=data, settings=settings)
    assert_same(train(tmp_path / "taught", model=model, data=data, settings=settings, **taught), alone)


def test_refuses_a_distillation_without_a_teacher_and_a_teacher_without_a_distillation(tmp_path):
    for half in ({"loss": Imitation()}, {"teachers": [net()]}, {"teacher_outputs": np.zeros((50, 3), np.float32)}):
        with pytest.raises(ValueError, match="a distillation loss needs a teacher, and a teacher needs a distillation"):
            train(tmp_path, **half)


def test_stored_answers_do_not_go_with_rows_that_are_changed_at_random(tmp_path):
    outputs = np.zeros((50, 3), np.float32)
    with pytest.raises(ValueError, match="are not its outputs for what augmentation makes of them"):
        train(tmp_path, augment=[Noise()], loss=Imitation(), teacher_outputs=outputs)


def test_every_batch_is_changed_anew_and_the_rows_are_not(tmp_path):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    data = rows(12)
    data.inputs["input"][:, 0] = 10 * np.arange(12)
    before = data.inputs["input"].copy()
    train(tmp_path, model=Spy(6, 3), data=data, augment=[Shift(by=10.0), Noise(amount=0.1)])
    assert len(seen) == 3
    # Each batch is all rows; their first column tells which is which.
    changed = [batch[batch[:, 0].argsort()].numpy() for batch in seen]
    assert all(0 < np.abs(batch - (before + 10)).max() < 1 for batch in changed)
    assert not np.array_equal(changed[0], changed[1])
    np.testing.assert_array_equal(data.inputs["input"], before)


def test_the_teacher_answers_the_changed_rows_and_does_not_learn(tmp_path):
    data, teacher = rows(60), nn.Linear(6, 3)
    before = teacher.weight.detach().clone()
    settings = TrainingSettings(epochs=100, batch_size=20, lr=0.1, weight_decay=0.0)
    taught = {"augment": [Shift(by=2.0), Noise(amount=0.5)], "loss": Imitation(), "teachers": [teacher]}
    fitted = train(tmp_path, model=nn.Linear(6, 3), data=data, settings=settings, seconds=1000, **taught)
    shifted = {"input": data.inputs["input"] + 2}
    np.testing.assert_allclose(predict(fitted.model, shifted, 60), predict(teacher, shifted, 60), atol=0.1)
    assert torch.equal(teacher.weight, before)
    assert teacher.weight.grad is None


@pytest.mark.parametrize("online", [False, True], ids=["alone", "with a teacher on-line"])
def test_a_killed_training_on_changing_rows_ends_as_if_it_had_not_been(tmp_path, online):
    changing = {"augment": [Shift(by=0.5), Noise(amount=0.3)]}
    if online:
        changing |= {"loss": Imitation(), "teachers": [net().eval()]}
    undisturbed = train(tmp_path / "undisturbed", seconds=1000, **changing)
    for step in (1, 6, 9):
        killed(tmp_path / "killed", step, **changing)
    progress = Recorded()
    assert_same(train(tmp_path / "killed", progress=progress, **changing), undisturbed)
    assert progress.steps[0] == 8
    still = train(tmp_path / "still", seconds=1000, **{**changing, "augment": [Shift(by=0.5)]})
    assert still.curves["train_loss"] != undisturbed.curves["train_loss"]


def test_never_goes_on_from_a_training_under_another_teacher(tmp_path):
    def taught(bias):
        teacher = nn.Linear(6, 3)
        nn.init.zeros_(teacher.weight)
        nn.init.constant_(teacher.bias, bias)
        return {"loss": Imitation(), "teachers": [teacher]}

    killed(tmp_path / "killed", 6, **taught(1.0))
    assert_same(train(tmp_path / "killed", **taught(2.0)), train(tmp_path / "alone", **taught(2.0)))


class Gated(nn.Module):
    """Takes two inputs by their names."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(6, 1)

    def forward(self, size, ids):
        return self.head(torch.cat([self.words(ids).mean(1), size], 1))


def gated_rows(number=40):
    draw = np.random.default_rng(5)
    inputs = {"ids": draw.integers(0, 5, (number, 3)), "size": draw.normal(size=(number, 2)).astype(np.float32)}
    return Rows(inputs=inputs, targets=(2 * inputs["size"][:, :1] + (inputs["ids"] == 1).sum(1, keepdims=True)))


def test_several_inputs_and_numbers_to_predict(tmp_path):
    data = gated_rows(200)
    data = Rows(inputs=data.inputs, targets=data.targets.astype(np.float32))
    torch.manual_seed(0)
    settings = TrainingSettings(epochs=40, batch_size=40, lr=0.1, weight_decay=0.0)
    fitted = train(tmp_path, model=Gated(), data=data, settings=settings, task=Regression(), seconds=1000)
    outputs = predict(fitted.model, data.inputs, 64)
    assert np.mean((outputs - data.targets) ** 2) < 0.05 * data.targets.var()
    assert sorted(fitted.curves) == ["lr", "train_loss"]
    assert all(len(values) == 40 for values in fitted.curves.values())


def test_curves_of_numbers_are_the_mean_of_the_tasks_loss(tmp_path):
    data, model = gated_rows(), Gated()
    data = Rows(inputs=data.inputs, targets=data.targets.astype(np.float32))
    settings = TrainingSettings(epochs=1, batch_size=10, lr=1e-12, weight_decay=0.0)
    curves = train(tmp_path, model=model, data=data, settings=settings, task=Regression(), seconds=1000).curves
    with torch.no_grad():
        errors = forward(model, {name: torch.from_numpy(values) for name, values in data.inputs.items()}).numpy()
    assert curves["train_loss"][0] == pytest.approx(np.mean((errors - data.targets) ** 2), rel=1e-4)

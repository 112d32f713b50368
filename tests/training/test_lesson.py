"""What a student is taught by layers and by several teachers, in training as it is."""

import numpy as np
import pytest
import torch
from torch import nn

from hasten.core.interfaces import Rows, Silent
from hasten.core.sections import TrainingSettings
from hasten.passes.distillation.features import FeatureMaps
from hasten.passes.distillation.outputs import OutputMatching
from hasten.passes.distillation.soft_labels import SoftLabels
from hasten.passes.pruning.masks import Masked
from hasten.tasks.classification import Classification
from hasten.training.fit import fit
from hasten.training.lesson import Lesson, mean_answer
from hasten.training.predict import predict

SETTINGS = TrainingSettings(epochs=3, batch_size=12, lr=0.01, weight_decay=0.01)
LAYERS = FeatureMaps(student_layers=("2",), teacher_layers=("1",), weight=5.0)


def rows(number=50):
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(number, 6)).astype(np.float32)
    return Rows(inputs={"input": inputs}, targets=draw.integers(0, 3, number))


def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def teacher(seed=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def train(folder, *, model=None, settings=SETTINGS, progress=None, seconds=1e-6, **taught):
    return fit(
        model or student(),
        rows(),
        settings,
        task=Classification(),
        seed=3,
        threads=1,
        folder=folder,
        checkpoint_seconds=seconds,
        progress=progress or Silent(),
        what="student",
        key="student.training",
        **taught,
    )


class Killed(BaseException):
    """Like a SIGKILL, as far as nothing here catches it."""


class Until(Silent):
    def __init__(self, last):
        self.last, self.steps = last, 0

    def advance(self, steps=1):
        self.steps += steps
        if self.steps == self.last:
            raise Killed


def assert_same(one, two):
    assert one.curves == two.curves
    pairs = zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_killed_training_with_projections_ends_as_if_it_had_not_been(tmp_path):
    taught = {"loss": LAYERS, "teachers": [teacher()]}
    undisturbed = train(tmp_path / "undisturbed", seconds=1000, **taught)
    for step in (1, 4, 6, 9, 12):
        with pytest.raises(Killed):
            train(tmp_path / "killed", progress=Until(step), **taught)
    assert_same(train(tmp_path / "killed", **taught), undisturbed)


def test_projections_learn_along_and_stay_out_of_the_model(tmp_path):
    made, before = [], []

    class Spied(FeatureMaps):
        def projections(self, student, teacher):
            made.extend(super().projections(student, teacher))
            before.append(made[0].weight.detach().clone())
            return made

    one = student()
    fitted = train(tmp_path, model=one, loss=Spied(student_layers=("2",), teacher_layers=("1",)), teachers=[teacher()])
    assert made[0].weight.shape == (8, 16, 1)
    assert not torch.equal(made[0].weight, before[0])
    assert fitted.model.state_dict().keys() == one.state_dict().keys()
    assert not any(module._forward_hooks for module in fitted.model.modules())


def test_layers_are_learnt(tmp_path):
    """With nothing but a linear map between them, the student's layer comes to hold what the teacher's does."""
    one = teacher()
    # So much weight that the loss of the answers, which can't become zero, does not count.
    taught = {"loss": FeatureMaps(student_layers=("0",), teacher_layers=("0",), weight=1e4), "teachers": [one]}
    settings = TrainingSettings(epochs=60, batch_size=25, lr=0.05, weight_decay=0.0)
    curves = train(tmp_path, settings=settings, seconds=1000, **taught).curves["train_loss"]
    assert curves[-1] < 0.05 * curves[0]


def test_the_layers_of_a_student_with_masks_have_the_names_that_they_have_without(tmp_path):
    dropped = {"0.weight": torch.zeros(16, 6, dtype=torch.bool)}
    plain = train(tmp_path / "plain", loss=LAYERS, teachers=[teacher()])
    masked = train(tmp_path / "masked", model=Masked(student(), dropped), loss=LAYERS, teachers=[teacher()])
    weights = zip(plain.model.parameters(), masked.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_the_student_draws_what_it_draws_without_projections():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    inputs = {"input": torch.from_numpy(rows(2).inputs["input"])}
    lessons = [Lesson(LAYERS, student().train(), [teacher()], inputs, seed) for seed in (0, 0, 1)]
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (lesson.projections[0].weight for lesson in lessons)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_looking_at_layers_leaves_statistics_and_modes_alone():
    one = student().train()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    Lesson(LAYERS, one, [teacher()], {"input": torch.from_numpy(rows(2).inputs["input"])}, 0)
    assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())
    assert all(module.training for module in one.modules())


def test_the_mean_of_several_teachers_is_that_of_their_outputs(tmp_path):
    teachers = [teacher(seed) for seed in (2, 3, 4)]
    outputs = [predict(each, rows().inputs, 50) for each in teachers]
    by_hand = (outputs[0] + outputs[1] + outputs[2]) / 3
    np.testing.assert_allclose(mean_answer(list(map(torch.from_numpy, outputs))), by_hand, rtol=1e-5)
    online = train(tmp_path / "online", loss=SoftLabels(), teachers=teachers)
    stored = train(tmp_path / "stored", loss=SoftLabels(), teacher_outputs=by_hand)
    np.testing.assert_allclose(online.curves["train_loss"], stored.curves["train_loss"], rtol=1e-4)
    alone = train(tmp_path / "alone", loss=SoftLabels(), teachers=teachers[:1])
    assert not np.allclose(online.curves["train_loss"], alone.curves["train_loss"], rtol=1e-3)


def test_mean_logits_are_the_geometric_mean_of_the_distributions_at_every_temperature():
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    for temperature in (1.0, 4.0):
        geometric = torch.softmax(logits / temperature, 2).prod(0) ** (1 / 3)
        mean = torch.softmax(mean_answer(list(logits)) / temperature, 1)
        torch.testing.assert_close(mean, geometric / geometric.sum(1, keepdim=True))


def test_asked_or_stored_a_teacher_says_the_same(tmp_path):
    one = teacher()
    online = train(tmp_path / "online", loss=OutputMatching(), teachers=[one])
    stored = train(tmp_path / "stored", loss=OutputMatching(), teacher_outputs=predict(one, rows().inputs, 50))
    np.testing.assert_allclose(online.curves["train_loss"], stored.curves["train_loss"], rtol=1e-4)


def test_answers_are_read_from_their_file_as_they_are_needed(tmp_path):
    outputs = predict(teacher(), rows().inputs, 50)
    np.save(tmp_path / "outputs.npy", outputs)
    mapped = np.load(tmp_path / "outputs.npy", mmap_mode="c")
    one = train(tmp_path / "mapped", loss=SoftLabels(), teacher_outputs=mapped)
    assert_same(one, train(tmp_path / "loaded", loss=SoftLabels(), teacher_outputs=outputs))


@pytest.mark.parametrize(
    ("taught", "told"),
    [
        ({"loss": LAYERS, "teacher_outputs": np.zeros((50, 3), np.float32)}, "do not tell what its layers give"),
        ({"loss": SoftLabels(), "teacher_outputs": np.zeros((49, 3), np.float32)}, "49 outputs are no answers for 50"),
    ],
)
def test_refuses_answers_that_do_not_answer(tmp_path, taught, told):
    with pytest.raises(ValueError, match=told):
        train(tmp_path, **taught)

"""A pass that trains in rounds, killed in the last of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.core.files import read_json
from hasten.core.interfaces import Silent
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.stages.build import build
from hasten.stages.prune import Prune
from hasten.stages.stage import Tools, read_notes

pytestmark = pytest.mark.usefixtures("hydra")


class Killed(BaseException):
    """Like a SIGKILL, as far as nothing here catches it."""


class Recorded(Silent):
    """Counts the steps of every training, those from before a resume in one; ends at a step of one of them."""

    def __init__(self, last: tuple[int, int] | None = None) -> None:
        self.last = last
        self.trainings: list[list[int]] = []

    def start(self, what: str, total: int) -> None:
        self.trainings.append([])

    def advance(self, steps: int = 1) -> None:
        self.trainings[-1].append(steps)
        if (len(self.trainings), sum(self.trainings[-1])) == self.last:
            raise Killed


@pytest.mark.slow
def test_rounds_that_were_finished_before_a_kill_are_not_trained_again(tiny: tuple[str, ...], tmp_path: Path) -> None:
    store = Store(Path(tiny[-1].partition("=")[2]))
    untouched = build(Composer.of(tiny).compose(), store, Tools())
    inputs = {name: untouched.entries[name].folder for name in ("data", "teacher")}
    rounds = ("pruning=unstructured", "pruning.rounds=2", "pruning.sparsity=0.8", "pruning.training.epochs=1")
    recipe = Composer.of([*tiny, *rounds]).compose()

    def prune(folder: Path, progress: Recorded) -> None:
        folder.mkdir(exist_ok=True)
        Prune().make(recipe, inputs, folder, Tools(progress=progress, checkpoint_seconds=0))

    undisturbed, again = Recorded(), Recorded()
    prune(tmp_path / "undisturbed", undisturbed)
    with pytest.raises(Killed):
        prune(tmp_path / "killed", Recorded(last=(2, 5)))
    for leftover in (tmp_path / "killed").iterdir():  # as the store does
        if not leftover.name.startswith("resume"):
            leftover.unlink()
    prune(tmp_path / "killed", again)
    steps = len(undisturbed.trainings[0])
    assert [len(training) for training in undisturbed.trainings] == [steps, steps]
    assert [training[0] for training in again.trainings] == [steps, 4]
    one, other = (tmp_path / name for name in ("undisturbed", "killed"))
    assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    curves = read_json(other / "curves.json")
    assert curves == read_json(one / "curves.json")
    assert [len(values) for values in curves.values()] == [2, 2, 2]  # two rounds of an epoch each
    assert read_notes(other)[0].startswith("pruned and fine-tuned in 2 rounds, to 70, 80 % of")

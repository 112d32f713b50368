"""A stage that trains in several processes: what it ends with, and what becomes of it when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_module
from torch import Tensor

from hasten.artefacts.module import rebuild
from hasten.core import schema
from hasten.core.errors import ConfigError, PassError
from hasten.core.files import read_json
from hasten.core.preflight import check
from hasten.core.recipe import Composer, Recipe
from hasten.core.store import Store
from hasten.stages.data import Data
from hasten.stages.stage import Tools, read_notes
from hasten.stages.teacher import Teacher

SMALL = ("model.arch.widths=[4]", "model.arch.num_blocks=1", "trainer.threads=1", "trainer.batch_size=60")
SPREAD = ("distributed=ddp",)
MLP = ("model=mlp", "model.arch.hidden=[16]", "trainer.threads=1", "trainer.batch_size=60")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    schema.register()
    with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
        yield


def recipe(*typed: str) -> Recipe:
    return Composer.of([*(() if "model=mlp" in typed else SMALL), *typed]).compose()


class Told:
    """What a progress heard."""

    def __init__(self) -> None:
        self.steps, self.total = 0, 0

    def start(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, steps: int = 1) -> None:
        self.steps += steps

    def stop(self) -> None: ...


def teacher(asked: Recipe, folder: Path, progress: Told | None = None, seconds: float = 100.0) -> Path:
    """The folder of the trained model."""
    store, tools = Store(folder), Tools(checkpoint_seconds=seconds, **({"progress": progress} if progress else {}))
    data = store.build(Data().ingredients(asked, {}), lambda made: Data().make(asked, {}, made, Tools()))
    inputs = {"data": data.folder}
    ingredients = Teacher().ingredients(asked, {"data": data.key})
    return store.build(ingredients, lambda made: Teacher().make(asked, inputs, made, tools)).folder


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(rebuild(folder).state_dict())


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def ranks(mark: Path) -> list[int]:
    """Processes that train below this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"hasten.stages.rank" in command and b"torch.distributed.run" not in command:
                folder = Path(command[command.index(b"hasten.stages.rank") + 1].decode())
                if (folder / "job.json").exists() and str(mark) in (folder / "job.json").read_text():
                    found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_two_processes_make_the_model_that_one_makes(tmp_path: Path) -> None:
    progress = Told()
    spread = teacher(recipe(*SPREAD, "trainer.epochs=2"), tmp_path / "two", progress)
    alone = teacher(recipe("trainer.epochs=2"), tmp_path / "one")
    assert difference(weights(spread), weights(alone)) <= 1e-5
    assert read_json(spread / "curves.json").keys() == read_json(alone / "curves.json").keys()
    assert read_notes(spread) == read_notes(alone)
    assert progress.steps == progress.total > 0
    assert not ranks(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("typed", [("distributed=fsdp", "trainer.micro_batches=2"), ("distributed=tensor",)])
def test_a_divided_model_comes_back_whole(tmp_path: Path, typed: tuple[str, ...]) -> None:
    spread = teacher(recipe(*MLP, "trainer.epochs=1", *typed), tmp_path / "two")
    alone = teacher(recipe(*MLP, "trainer.epochs=1"), tmp_path / "one")
    assert difference(weights(spread), weights(alone)) <= 1e-5
    assert read_json(spread / "curves.json").keys() == read_json(alone / "curves.json").keys()


@pytest.mark.slow
def test_a_plan_that_does_not_fit_the_model_is_told_by_its_processes(tmp_path: Path) -> None:
    plan = "model.tensor_plan={layers.1:column,layers.4:row}"
    with pytest.raises(PassError, match=r"model\.tensor_plan: the model has no module 'layers\.4'"):
        teacher(recipe(*MLP, "distributed=tensor", plan), tmp_path)


@pytest.mark.slow
def test_what_a_process_refuses_is_told_and_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"the loss became .* lower model\.training\.lr"):
        teacher(recipe(*SPREAD, "trainer.epochs=3", "trainer.lr=1e30"), tmp_path)
    assert not ranks(tmp_path)


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (("distributed.devices=2",), r"distributed=single is one process, and distributed\.devices=2"),
        (("distributed=ddp", "trainer.precision=float16"), r"can't be combined with trainer\.precision=float16"),
        (("distributed.compression=bfloat16",), r"distributed=ddp's, and means nothing to distributed=single"),
        (("distributed=fsdp", "distributed.bucket_mb=1"), r"distributed=ddp's, and means nothing to distributed=fsdp"),
        (
            ("distributed=ddp", "distributed.average_every=4", "distributed.compression=powersgd"),
            r"average_every=4 sends no gradients that distributed\.compression=powersgd could compress",
        ),
        (
            ("distributed=ddp", "distributed.static_graph=true", "trainer.micro_batches=2"),
            r"distributed\.static_graph=true can't be combined with trainer\.micro_batches=2",
        ),
        (("distributed=fsdp", "distributed.cpu_offload=true"), r"distributed\.cpu_offload=true moves nothing"),
        (("distributed=fsdp", "trainer.layout=channels_last"), r"can't be combined with trainer\.layout=channels_last"),
        (
            ("distributed=fsdp", "distributed.compression=powersgd"),
            r"distributed\.compression=powersgd is distributed=ddp's, and means nothing to distributed=fsdp",
        ),
        (
            ("distributed=ddp", "distributed.sequence_parallel=true"),
            r"distributed\.sequence_parallel=true is distributed=tensor's",
        ),
        (
            ("distributed=tensor",),
            r"distributed\.tensor=2 divides the layers that model\.tensor_plan names, and it names none",
        ),
        (
            ("distributed=tensor", "model=mlp", "distributed.sequence_parallel=true"),
            r"distributed\.sequence_parallel=true divides .* model\.tensor_plan calls .*, and it calls nothing so",
        ),
        (
            ("distributed=fsdp", "model=mlp", "model.tensor_plan={layers.1:colum}"),
            r"model\.tensor_plan: layers\.1 must be one of column, .*, got 'colum', did you mean 'column'\?",
        ),
        (
            ("distributed=tensor", "model=mlp", "student=resnet"),
            r"divides the layers that student\.tensor_plan names, and it names none",
        ),
        (
            ("distributed=tensor", "model=mlp", "student=mlp", "distillation=attention"),
            r"distributed\.tensor=2 can't be combined with distillation\.student_layers=blocks",
        ),
    ],
)
def test_refuses_what_makes_no_sense(typed: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(recipe(*typed))


def test_how_often_it_may_be_started_again_is_no_part_of_the_key() -> None:
    def key(*typed: str) -> str:
        return Teacher().ingredients(recipe(*typed), {"data": "rows"}).key

    patient = ("distributed.max_restarts=9", "distributed.timeout_seconds=5")
    assert key(*SPREAD) == key(*SPREAD, *patient)
    assert len({key(), key(*SPREAD), key(*SPREAD, "distributed.devices=4")}) == 3


@pytest.mark.drill
def test_nobody_trains_on_for_a_parent_that_was_killed(tmp_path: Path) -> None:
    command = [*SMALL, *SPREAD, "trainer.epochs=2000", "tracking=none", f"store.folder={tmp_path / 'store'}"]
    with subprocess.Popen([sys.executable, "-m", "hasten.cli", "run", *command], cwd=tmp_path) as parent:
        try:
            deadline = time.monotonic() + 120
            while len(ranks(tmp_path)) < 2 and time.monotonic() < deadline:
                time.sleep(0.2)
            assert len(ranks(tmp_path)) == 2
        finally:
            parent.kill()
    deadline = time.monotonic() + 30
    while ranks(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ranks(tmp_path)


NUM_KILLS = 10


def kill_now_and_then(store: Path, seed: int, ended: threading.Event, kills: list[int]) -> None:
    """Kills one process at a time: most when the training has gone on since the last kill, some while it starts."""
    random = torch.Generator().manual_seed(seed)

    def draw(most: float) -> float:
        return most * torch.rand(1, generator=random).item()

    reached = 0
    while len(kills) < NUM_KILLS and not ended.wait(0.2):
        written = [int(file.stem.removeprefix("step=")) for file in store.glob(".work/*/resume/step=*.ckpt")]
        starting = len(kills) % 5 == 4
        if not starting and max(written, default=0) <= reached:
            continue
        reached = max(written, default=0)
        if ended.wait(draw(6) if starting else draw(3)):
            return
        if victims := ranks(store):
            os.kill(victims[int(draw(len(victims)))], signal.SIGKILL)
            kills.append(reached)


@pytest.mark.drill
@pytest.mark.parametrize("seed", range(3))
def test_goes_on_where_it_was_when_processes_are_killed(tmp_path: Path, seed: int) -> None:
    asked = recipe(*SPREAD, "trainer.epochs=300", "distributed.max_restarts=20", "distributed.timeout_seconds=20")
    undisturbed = weights(teacher(asked, tmp_path / "undisturbed"))
    store, ended, kills = tmp_path / "killed", threading.Event(), list[int]()
    killer = threading.Thread(target=kill_now_and_then, args=(store, seed, ended, kills))
    killer.start()
    try:
        disturbed = weights(teacher(asked, store, seconds=1.0))
    finally:
        ended.set()
        killer.join()
    print(f"{len(kills)} kills after steps {kills}: largest difference {difference(disturbed, undisturbed):.2g}")
    assert kills
    assert difference(disturbed, undisturbed) == 0

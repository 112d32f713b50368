"""A stage that trains in several processes: what it ends with, and what becomes of it when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_module
from torch import Tensor, nn

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
from hasten.stages.training import StageBench

SMALL = ("model.arch.widths=[4]", "model.arch.num_blocks=1", "trainer.threads=1", "trainer.batch_size=60")
SPREAD = ("distributed=ddp",)
MLP = ("model=mlp", "model.arch.hidden=[16]", "trainer.threads=1", "trainer.batch_size=60")
PIPELINE = ("distributed=pipeline", "trainer.micro_batches=2")
HYBRID = ("distributed=hybrid", "distributed.pipeline=2", "distributed.tensor=1", "trainer.micro_batches=2")


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
@pytest.mark.parametrize(
    "typed",
    [("distributed=fsdp", "trainer.micro_batches=2"), pytest.param(("distributed=tensor",), marks=pytest.mark.drill)],
)
def test_a_divided_model_comes_back_whole(tmp_path: Path, typed: tuple[str, ...]) -> None:
    spread = teacher(recipe(*MLP, "trainer.epochs=1", *typed), tmp_path / "two")
    alone = teacher(recipe(*MLP, "trainer.epochs=1"), tmp_path / "one")
    assert difference(weights(spread), weights(alone)) <= 1e-5
    assert read_json(spread / "curves.json").keys() == read_json(alone / "curves.json").keys()


@pytest.mark.drill
def test_a_plan_that_does_not_fit_the_model_is_told_by_its_processes(tmp_path: Path) -> None:
    plan = "+model.tensor_plan={layers.4:row}"
    with pytest.raises(PassError, match=r"model\.tensor_plan: the model has no module 'layers\.4'"):
        teacher(recipe(*MLP, "distributed=tensor", plan), tmp_path)


@pytest.mark.drill
def test_two_processes_with_some_layers_each_make_the_model_that_one_makes(tmp_path: Path) -> None:
    micro_batches, progress = "trainer.micro_batches=4", Told()
    asked = recipe("distributed=pipeline", micro_batches, "trainer.epochs=2")
    check(asked)
    spread = teacher(asked, tmp_path / "two", progress)
    alone = teacher(recipe(micro_batches, "trainer.epochs=2"), tmp_path / "one")
    assert difference(weights(spread), weights(alone)) <= 1e-5
    curves = read_json(spread / "curves.json")
    for name, values in read_json(alone / "curves.json").items():
        assert curves[name] == pytest.approx(values, abs=1e-5)
    assert progress.steps == progress.total > 0
    assert not ranks(tmp_path)


@pytest.mark.slow
def test_what_a_process_refuses_is_told_and_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"the loss became .* lower model\.training\.lr"):
        teacher(recipe(*SPREAD, "trainer.epochs=3", "trainer.lr=1e30"), tmp_path)
    assert not ranks(tmp_path)


def test_one_process_trains_what_cannot_be_given_to_others(tmp_path: Path) -> None:
    asked = recipe(*SPREAD, "trainer.epochs=1")
    data = Store(tmp_path / "store").build(
        Data().ingredients(asked, {}), lambda made: Data().make(asked, {}, made, Tools())
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.note = lambda: "no pickle has this"
    bench = StageBench(
        recipe=asked, section="model", what="teacher", inputs={"data": data.folder}, folder=tmp_path, tools=Tools()
    )
    fitted = bench.trained(model, distil=False)
    assert difference(dict(fitted.model.state_dict()), dict(model.state_dict())) > 0
    assert "One process trained alone: distributed=ddp can't hand teacher to its processes" in " ".join(
        read_notes(tmp_path)
    )


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (("distributed.devices=2",), r"distributed=single is one process, and distributed\.devices=2"),
        (("distributed=ddp", "trainer.precision=float16"), r"can't be combined with trainer\.precision=float16"),
        (("distributed.compression=bfloat16",), r"distributed=ddp's, and means nothing to distributed=single"),
        (("distributed=fsdp", "distributed.bucket_mb=1"), r"distributed=ddp's, and means nothing to distributed=fsdp"),
        (("distributed=fsdp", "distributed.bucket_views=false"), r"bucket_views=false is distributed=ddp's, and means"),
        (("distributed=tensor", "model=mlp", "distributed.powersgd_rank=2"), r"powersgd_rank=2 is distributed=ddp's"),
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
        (
            ("distributed=pipeline",),
            r"schedule=1F1B needs a micro-batch for each of 2 stages, and trainer\.micro_batches=1",
        ),
        (
            (
                "distributed=pipeline",
                "distributed.devices=4",
                "distributed.schedule=DualPipeV",
                "trainer.micro_batches=4",
            ),
            r"schedule=DualPipeV needs a micro-batch for each of 8 stages",
        ),
        (
            ("distributed=pipeline", "distributed.schedule=Interleaved1F1B", "trainer.micro_batches=5"),
            r"in 2 equal rounds for 2 processes, and trainer\.micro_batches=5: 4 can be divided",
        ),
        (
            (*PIPELINE, "trainer.compile=default"),
            r"pipeline=2 can't be combined with trainer\.compile=default",
        ),
        (
            (*HYBRID, "distributed.shards=0", "distributed.schedule=ZBVZeroBubble"),
            r"schedule=ZBVZeroBubble can't be combined with distributed\.shards=2",
        ),
        (
            (*PIPELINE, "trainer.activation_budget_mb=1"),
            r"pipeline=2 can't be combined with trainer\.activation_budget_mb",
        ),
        ((*PIPELINE, "trainer.patience=2"), r"pipeline=2 can't be combined with model\.training\.patience=2"),
        (
            (*HYBRID, "distributed.sequence_parallel=true"),
            r"pipeline=2 can't be combined with distributed\.sequence_parallel=true",
        ),
        (
            (*PIPELINE, "student=cifar_resnet", "distillation=features", "distillation.student_layers=[layer1]"),
            r"pipeline=2 can't be combined with distillation\.student_layers=layer1",
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
ARRANGED = {
    "ddp": (*SPREAD,),
    "powersgd": (*SPREAD, "distributed.compression=powersgd", "distributed.powersgd_rank=4"),
    "fsdp": ("distributed=fsdp",),
    "pipeline": ("distributed=pipeline", "trainer.micro_batches=2"),
}


class Killer(threading.Thread):
    """Kills one process at a time: most at any moment of the training, some while a checkpoint is written, some while
    it starts again.

    Args:
        store: below which the processes train.
        seed: of its choices.

    Attributes:
        kills: steps that had been reached.
        lost: of each kill, steps and seconds since the last checkpoint that was safe.
        between: largest number of steps between two checkpoints.
    """

    def __init__(self, store: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self._store, self._random = store, torch.Generator().manual_seed(seed)
        self._ended = threading.Event()
        self._times: dict[int, float] = {}
        self._stale: int | None = None  # what processes told that were killed
        self.kills: list[int] = []
        self.lost: list[tuple[int, float]] = []
        self.between = 0

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while len(self.kills) < NUM_KILLS and not self._ended.is_set():
            way = ("training", "writing", "training", "starting")[len(self.kills) % 4]
            if way == "starting":
                self._watch(self._draw(10), lambda: False)
            else:
                last = max(self._safe(), default=0)
                self._watch(600, lambda last=last: self._began() and max(self._safe(), default=0) > last)
                self._watch(self._draw(3), lambda: False)
                if way == "writing":
                    self._watch(60, lambda: any(self._store.glob(".work/*/resume/*.partial/*")))
            if not self._ended.is_set() and (victims := ranks(self._store)):
                self._kill(victims[int(self._draw(len(victims)))])

    def _kill(self, victim: int) -> None:
        began, reached, now = self._began(), max(self._times, default=0), time.monotonic()
        os.kill(victim, signal.SIGKILL)
        safe = max(self._safe(), default=0)
        self.kills.append(reached)
        if began and safe in self._times:
            self.lost.append((reached - safe, now - self._times[safe]))
        self._times, self._stale = {}, self._step()

    def _watch(self, seconds: float, until: Callable[[], bool]) -> None:
        """Follows the steps for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not until() and not self._ended.wait(0.02):
            if (step := self._step()) is not None and step != self._stale:
                self._stale = None
                self._times.setdefault(step, time.monotonic())
            safe = self._safe()
            if len(safe) > 1:
                self.between = max(self.between, safe[-1] - safe[-2])

    def _began(self) -> bool:
        """Steps were made since the last kill."""
        return len(self._times) > 1

    def _step(self) -> int | None:
        for file in Path(os.environ.get("TMPDIR", "/tmp")).glob("*group-*/progress"):
            with suppress(OSError, ValueError):
                if str(self._store) in (file.parent / "job.json").read_text():
                    return int(file.read_text().split()[0])
        return None

    def _safe(self) -> list[int]:
        found = self._store.glob(".work/*/resume/step=*.ckpt")
        return sorted(int(path.stem.removeprefix("step=")) for path in found)

    def _draw(self, most: float) -> float:
        return most * torch.rand(1, generator=self._random).item()


@pytest.mark.drill
@pytest.mark.parametrize(("arranged", "seed"), [("ddp", 0), ("ddp", 1), ("powersgd", 2), ("fsdp", 3), ("pipeline", 4)])
def test_goes_on_where_it_was_when_processes_are_killed(tmp_path: Path, arranged: str, seed: int) -> None:
    patient = ("trainer.epochs=100", "distributed.max_restarts=20", "distributed.timeout_seconds=20")
    asked = recipe(*ARRANGED[arranged], *patient)
    undisturbed = weights(teacher(asked, tmp_path / "undisturbed"))
    seconds = 1.0
    with Killer(tmp_path / "killed", seed) as killer:
        disturbed = weights(teacher(asked, tmp_path / "killed", seconds=seconds))
    lost_steps, lost_seconds = (max(each) for each in zip(*killer.lost, strict=True))
    print(
        f"{arranged}: {len(killer.kills)} kills after steps {killer.kills}: largest difference "
        f"{difference(disturbed, undisturbed):.2g}; lost at most {lost_steps} steps in {lost_seconds:.2f} s, a "
        f"checkpoint every {seconds} s or at most {killer.between} steps: {killer.lost}"
    )
    assert killer.kills
    # Of two processes, each sum is of two numbers: there is no other order to add them in.
    assert difference(disturbed, undisturbed) == 0
    # The interval, and the time until a checkpoint is safe, which is less: none is begun before the last is.
    assert lost_steps <= 2 * killer.between

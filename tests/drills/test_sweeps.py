"""A sweep that is killed again and again gives what one that was left alone gives, whoever runs its jobs."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.drill

NUM_KILLS = 3
CHOICES = (
    "pruning.sparsity=0.25,0.5,0.75",
    "pruning.importance=l1,l2",
    "distillation=none,soft_labels",
    "engine=eager,onnxruntime",
)
EXPERIMENT = (
    "pruning=structured",
    "pruning.round_to=1",
    "model.arch.widths=[8]",
    "model.arch.num_blocks=1",
    "trainer.epochs=3",
    "trainer.batch_size=16",
    "trainer.lr=0.02",
    "trainer.threads=1",
    "target.engines=[eager,onnxruntime]",
    "tracking=none",
)


@contextmanager
def hasten(*arguments: str, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The sweep as a session of its own, and the mark that it and all its workers carry in their environment."""
    mark = uuid.uuid4().hex
    with (
        log.open("w") as written,
        subprocess.Popen(
            [sys.executable, "-m", "hasten.cli", "-m", "run", *EXPERIMENT, *arguments],
            stdout=written,
            stderr=written,
            env={**os.environ, "HASTEN_DRILL": mark},
            start_new_session=True,
            text=True,
        ) as process,
    ):
        yield process, mark


def marked(mark: str) -> list[int]:
    """Processes that carry the mark and are no zombies."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes() and ") Z " not in (environment.parent / "stat").read_text():
                found.append(int(environment.parent.name))
        except OSError:  # it has ended, or belongs to somebody else
            continue
    return found


def kill_all(mark: str) -> None:
    """The whole tree, at once as far as one process can."""
    deadline = time.monotonic() + 30
    while (alive := marked(mark)) and time.monotonic() < deadline:
        for process in alive:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    assert marked(mark) == []


def made(store: Path) -> dict[str, float]:
    """Stage and key of everything finished -> when."""
    manifests = [json.loads(file.read_text()) for file in store.glob("*/*/stage.json")]
    return {f"{manifest['stage']}/{manifest['key']}": manifest["created"] for manifest in manifests}


def ended(sweeps: Path) -> dict[str, str]:
    """Folder of every finished job -> what it left."""
    return {file.parent.name: file.read_text() for file in sweeps.glob("*/*/job.json")}


def assert_kept(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Nothing that was finished is gone, or was made a second time."""
    assert {name: after.get(name) for name in before} == before


def table(file: Path) -> list[dict[str, Any]]:
    """What the recipes of a sweep are and give, without what is measured in time."""
    jobs: Sequence[Mapping[str, Any]] = json.loads(file.read_text())["jobs"]
    wanted = ("metric", "quality", "size_bytes", "flops", "num_parameters")
    return [
        {"choices": job["choices"], "rebuild": job["rebuild"], **{name: job["evaluation"][name] for name in wanted}}
        for job in jobs
    ]


def test_three_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    arguments = [*CHOICES, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    store, sweeps = tmp_path / "outputs" / "store", tmp_path / "outputs" / "sweeps"
    generator, told = random.Random(0), list[str]()
    stages: dict[str, float] = {}
    jobs: dict[str, str] = {}
    start = time.monotonic()
    for number in range(NUM_KILLS + 1):
        began = time.monotonic()
        with hasten(*arguments, log=tmp_path / f"{number}.log") as (process, mark):
            if number < NUM_KILLS:
                enough = len(jobs) + generator.randint(1, 6)
                while len(ended(sweeps)) < enough and process.poll() is None and time.monotonic() - began < 600:
                    time.sleep(0.1)
                time.sleep(generator.uniform(0, 8))
            else:
                assert process.wait(900) == 0, (tmp_path / f"{number}.log").read_text()
            alive = process.poll() is None
            kill_all(mark)
            process.wait()
        assert_kept(stages, made(store))
        assert_kept(jobs, ended(sweeps))
        stages, jobs = made(store), ended(sweeps)
        seconds = time.monotonic() - began
        told.append(f"start {number}: {seconds:.0f} s, killed {alive}, {len(jobs)} jobs, {len(stages)} stages")
    print("\n".join([*told, f"{time.monotonic() - start:.0f} s in all"]))
    (file,) = sweeps.glob("*/sweep.json")
    summary = json.loads(file.read_text())
    assert len(jobs) == len(summary["jobs"]) == 24
    assert summary["failed"] == []
    assert len({tuple(job["choices"].items()) for job in summary["jobs"]}) == 24
    assert len([name for name in stages if name.startswith("teacher/")]) == 1
    # A recipe is measured beside the eager baseline once: one entry for each artefact, and none was made again.
    assert len({job["stages"]["compile"] for job in summary["jobs"]}) == 24
    assert all(job["evaluation"]["latency_ms"]["p50"]["value"] > 0 for job in summary["jobs"])
    ends = [line for log in tmp_path.glob("*.log") for line in log.read_text().splitlines() if line.startswith("[")]
    assert len({line.partition(":")[0] for line in ends}) == len(ends), "a job has come to its end twice"


def test_ctrl_c_ends_a_sweep_of_several_processes_and_keeps_what_is_done(tmp_path: Path) -> None:
    arguments = [*CHOICES, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    with hasten(*arguments, log=tmp_path / "log") as (process, mark):
        while len(ended(tmp_path / "outputs" / "sweeps")) < 3 and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
        deadline = time.monotonic() + 30
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = marked(mark)
        kill_all(mark)
    told = (tmp_path / "log").read_text()
    assert code == 130, told
    assert left == []
    assert "Traceback" not in told
    done = len(ended(tmp_path / "outputs" / "sweeps"))
    assert 3 <= done < 24
    assert f"interrupted; {done} jobs are kept, {24 - done} are missing: the same command goes on" in told
    (file,) = tmp_path.glob("outputs/sweeps/*/sweep.json")
    assert len(json.loads(file.read_text())["jobs"]) == done


DEADLY = """
import os
import torch

class Net(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        if width == 13:
            os._exit(9)
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.Linear(width, 10))

    def forward(self, rows):
        return self.layers(rows)
"""


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_job_whose_process_dies_fails_alone(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    model = [text for text in EXPERIMENT if not text.startswith(("model.", "pruning"))]
    arguments = ["model=custom", "model.arch._target_=deadly.Net", "+model.arch.width=12,13,14"]
    with (tmp_path / "log").open("w") as log:
        code = subprocess.run(
            [sys.executable, "-m", "hasten.cli", "-m", "run", *model, *arguments, f"hydra/launcher={launcher}"],
            stdout=log,
            stderr=log,
            timeout=600,
            check=False,
        ).returncode
    assert code == 1, (tmp_path / "log").read_text()
    (file,) = tmp_path.glob("outputs/sweeps/*/sweep.json")
    jobs = json.loads(file.read_text())["jobs"]
    assert [job["verdict"] for job in jobs] == ["accepted", "failed", "accepted"]
    assert jobs[1]["reason"].startswith("its process died: ")


@pytest.mark.filterwarnings("default")  # Ray has many of its own
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray and hydra-ray-launcher")
def test_two_nodes_of_ray_give_the_same_table_as_joblib(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    with hasten(*CHOICES, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", log=tmp_path / "joblib.log") as (
        process,
        _,
    ):
        assert process.wait(1200) == 0, (tmp_path / "joblib.log").read_text()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        arguments = [*CHOICES, "hydra/launcher=ray", f"hydra.launcher.ray.init.address={cluster.address}"]
        where = ["hydra.sweep.dir=ray", "store.folder=ray_store"]
        with hasten(*arguments, *where, log=tmp_path / "ray.log") as (process, _):
            assert process.wait(1200) == 0, (tmp_path / "ray.log").read_text()
    finally:
        cluster.shutdown()
    (file,) = tmp_path.glob("outputs/sweeps/*/sweep.json")
    mine, ray = table(file), table(tmp_path / "ray" / "sweep.json")
    for row in ray:
        row["rebuild"] = row["rebuild"].replace(" store.folder=ray_store", "")
    assert len(mine) == 24
    assert mine == ray

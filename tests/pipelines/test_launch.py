"""`hasten launch`: texts that start a run on several hosts, held against files, shells and stand-ins for SLURM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import yaml

from hasten import cli

GOLDEN = Path(__file__).parent / "golden"
TYPED = (
    "model=mlp",
    "distributed=hybrid",
    "distributed.devices=8",
    "launch.nodes=4",
    "launch.min_nodes=2",
    "launch.first=node-1",
    "launch.time=24:00:00",
    "launch.partition=cpu",
    "launch.image=registry.example.com/hasten:1",
    "launch.namespace=training",
    "launch.memory_gb=16",
    "trainer.threads=4",
    "trainer.epochs=3",
    "store.folder=/hasten/store",
    "target.engines=[eager,onnxruntime]",
    """name="it's $mine" """.strip(),
)
"""The last has all that a shell would take for its own."""
RUN = ["hasten.cli", "run", "launch.min_nodes=2", "store.folder=/hasten/store", "model=mlp", TYPED[-2]]
RUN += ["trainer.epochs=3", "trainer.threads=4", "distributed=hybrid", "distributed.devices=8", TYPED[-1]]


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What was printed, and the files that were written."""

    printed: str
    scripts: dict[str, str]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder, printed = tmp_path_factory.mktemp("launch") / "scripts", StringIO()
    with redirect_stdout(printed):
        assert cli.run(["launch", *TYPED, f"launch.write={folder}"]) == 0
    return Launched(printed=printed.getvalue(), scripts={file.name: file.read_text() for file in folder.iterdir()})


@pytest.mark.parametrize("name", ["first.sh", "others.sh", "slurm.sh", "pytorchjob.yaml"])
def test_what_is_written_and_printed_is_what_was_agreed(name: str, launched: Launched) -> None:
    assert launched.scripts[name] == (GOLDEN / name).read_text()
    assert launched.scripts[name] in launched.printed


def test_one_of_them_is_printed_as_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["launch", *TYPED, "launch.show=slurm"]) == 0
    assert capsys.readouterr().out == (GOLDEN / "slurm.sh").read_text()
    assert list(Path().iterdir()) == []


def test_the_manifest_asks_for_as_many_processes_and_cores_as_the_run(launched: Launched) -> None:
    spec = yaml.safe_load(launched.scripts["pytorchjob.yaml"])["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert worker["replicas"] * int(spec["nprocPerNode"]) == 8
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "16000M"}
    assert container["command"][-len(RUN) :] == RUN


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which programs are these lines of shell."""
    folder.mkdir()
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


TELLS = r'printf "%s\n" "$@"'


def told(script: str, environment: dict[str, str]) -> list[str]:
    """What a script hands to the stand-in for Python, word by word."""
    Path("script.sh").write_text(script)
    subprocess.run(["bash", "-n", "script.sh"], check=True)
    done = subprocess.run(["bash", "script.sh"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def agent(words: Sequence[str]) -> dict[str, str]:
    """torchrun's settings, and those of its rendezvous."""
    settings = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    return settings | dict(pair.split("=") for pair in settings["rdzv-conf"].split(","))


@pytest.mark.parametrize(("host", "is_host"), [("first", "true"), ("others", "false")])
def test_the_shell_hands_on_what_was_typed(host: str, is_host: str, tmp_path: Path, launched: Launched) -> None:
    words = told(launched.scripts[f"{host}.sh"], stand_ins(tmp_path / "bin", python=TELLS))
    assert words[-len(RUN) :] == RUN
    settings = agent(words)
    assert (settings["rdzv-endpoint"], settings["nnodes"], settings["is_host"]) == ("node-1:29400", "2:4", is_host)


@pytest.mark.parametrize(("node", "is_host"), [("0", "1"), ("3", "0")])
def test_slurm_hands_on_what_was_typed_and_has_the_hosts_meet_at_the_first(
    node: str, is_host: str, tmp_path: Path, launched: Launched
) -> None:
    environment = stand_ins(
        tmp_path / "bin",
        python=TELLS,
        scontrol='[ "$*" = "show hostnames n[7-9,12]" ] && printf "%s\\n" n7 n8 n9 n12',
        srun=f'while [[ "$1" == --* ]]; do shift; done; SLURM_NODEID={node} exec "$@"',
    )
    allocated = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[7-9,12]"}
    words = told(launched.scripts["slurm.sh"], environment | allocated)
    assert words[-len(RUN) :] == RUN
    settings = agent(words)
    assert (settings["rdzv-endpoint"], settings["rdzv-id"], settings["is_host"]) == ("n7:29400", "42", is_host)


def test_a_first_host_that_is_not_said_is_asked_for_by_the_shell(tmp_path: Path) -> None:
    cli.run(["launch", "distributed=ddp", "launch.nodes=2", "launch.write=scripts"])
    script, environment = Path("scripts/first.sh"), stand_ins(tmp_path / "bin", python=TELLS)
    assert agent(told(script.read_text(), environment | {"FIRST_NODE": "a"}))["rdzv-endpoint"] == "a:29400"
    refused = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "name or address of the first host" in refused.stderr


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ((), "distributed=single is one process"),
        (
            ("distributed=auto", "launch.nodes=2"),
            "distributed=auto weighs by the memory, the cores and the link of one host",
        ),
        (("distributed=ddp", "launch.nodes=3"), "distributed.devices=2 can't be divided by launch.nodes=3"),
        (("distributed=ddp", "launch.nodes=2", "launch.min_nodes=3"), "launch.min_nodes=3 is more than launch.nodes=2"),
        (
            ("model=mlp", "distributed=hybrid", "launch.nodes=4", "launch.min_nodes=2"),
            "launch.min_nodes=2 allows for 3 hosts: distributed.devices=3 can't be divided by",
        ),
        (("distributed=ddp", "launch.nodes=0"), "nodes must be an integer of at least 1, got 0 (launch.nodes)"),
        (("distributed=ddp", "launch.show=pbs"), "show must be one of all, torchrun, slurm, kubernetes, got 'pbs'"),
        (("distributed=ddp", "launch.name=My_Job"), "launch.name must be at most 40 small letters"),
    ],
)
def test_says_what_is_wrong(typed: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["launch", *typed]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"hasten: {problem}")
    assert told.count("\n") == 1


def test_a_folder_of_ones_own_configs_goes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my conf").mkdir()
    assert cli.run(["--config-dir", "my conf", "launch", "distributed=ddp", "launch.show=torchrun"]) == 0
    assert "-m hasten.cli --config-dir 'my conf' run distributed=ddp" in capsys.readouterr().out

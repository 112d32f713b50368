"""`hasten launch`: what starts a run on several hosts; with `launch.start=ray` it starts it itself.

torchrun is all that such a run needs: the same command on every host, whose agents find one another at the first. The
SLURM script and Kubernetes' PyTorchJob (kubeflow.org/v1, of the training operator) do nothing but call it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hasten.core.errors import ConfigError
from hasten.core.files import write_text
from hasten.core.sections import Distributed, Launch
from hasten.distributed import ray_workers
from hasten.session import Session

ENVIRONMENT = {
    # Else processes that are started again read the addresses of dead ones and wait for them (pytorch#135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
RENDEZVOUS = {"last_call_timeout": "10", "keep_alive_interval": "2", "keep_alive_max_attempt": "3"}
"""Seconds that agents wait for more hosts than they need; after 6 seconds of silence one is lost."""
FIRST = '"${FIRST_NODE:?name or address of the first host}"'
FILES = {"first": "first.sh", "others": "others.sh", "slurm": "slurm.sh", "kubernetes": "pytorchjob.yaml"}
TITLES = {
    "first": "on the first host",
    "others": "on every other host",
    "slurm": "with SLURM: sbatch slurm.sh",
    "kubernetes": "with Kubernetes: kubectl create -f pytorchjob.yaml",
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is to be started.

    Attributes:
        command: words after `python -m`, for every process.
        processes: of one host.
        threads: of one process.
    """

    launch: Launch
    command: Sequence[str]
    processes: int
    threads: int
    max_restarts: int

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "OMP_NUM_THREADS": str(self.threads)}

    @property
    def nodes(self) -> str:
        """As torchrun wants it."""
        least = self.launch.min_nodes or self.launch.nodes
        return str(least) if least == self.launch.nodes else f"{least}:{self.launch.nodes}"

    @property
    def rendezvous(self) -> dict[str, str]:
        return {"join_timeout": str(self.launch.join_seconds), **RENDEZVOUS}


def main(session: Session) -> int:
    """The command; its exit code."""
    config = session.recipe.config
    spread, launch = Distributed.of(config["distributed"]), Launch(**config["launch"])
    if spread.kind == "single":
        raise ConfigError("distributed=single is one process, which needs no launch: distributed=ddp")
    start = Start(
        launch=launch,
        command=command(session, launch),
        processes=launch.processes(spread),
        threads=config["trainer"]["threads"],
        max_restarts=spread.max_restarts,
    )
    if launch.start == "ray":
        ray_workers.start(
            start.command,
            processes=spread.devices,
            threads=start.threads,
            max_restarts=start.max_restarts,
            address=launch.ray_address,
            folder=session.folder.absolute(),
        )
        return 0
    made = scripts(start)
    if launch.write:
        for name, text in made.items():
            write_text(Path(launch.write) / FILES[name], text)
    shown = {"all": tuple(made), "torchrun": ("first", "others")}.get(launch.show, (launch.show,))
    for name in shown:
        if name in made:
            print(
                "" if launch.show in FILES else f"# {TITLES[name]}\n", made[name], sep="", end="\n" * (len(shown) > 1)
            )
    return 0


def command(session: Session, launch: Launch) -> tuple[str, ...]:
    """The user's own command line, less what only this pipeline reads."""
    kept = [
        text
        for text in (*session.composer.walk, *session.composer.base)
        if not text.startswith(("pipeline=", "launch.")) or text.startswith("launch.min_nodes=")
    ]
    where = ("--config-dir", str(session.config_dir)) if session.config_dir else ()
    return ("hasten.cli", *where, launch.command, *kept)


def scripts(start: Start) -> dict[str, str]:
    """Texts by the names of `FILES`."""
    others = {"others": _shell(torchrun(start, first=False))} if start.launch.nodes > 1 else {}
    return {
        "first": _shell(torchrun(start, first=True)),
        **others,
        "slurm": slurm(start),
        "kubernetes": yaml.safe_dump(pytorch_job(start), sort_keys=False, width=120),
    }


def torchrun(start: Start, *, first: bool) -> str:
    """The command of one host, for a shell."""
    launch = start.launch
    # Where the agents meet is said, not guessed from names, which a host may have several of.
    meeting = {"is_host": "true" if first else "false", **start.rendezvous}
    variables = " ".join(f"{name}={value}" for name, value in start.environment.items())
    endpoint = f"{shlex.quote(launch.first) if launch.first else FIRST}:{launch.port}"
    return f"{variables} {_agent(start, endpoint, _settings(meeting), launch.name)} -m {shlex.join(start.command)}"


def slurm(start: Start) -> str:
    """A batch script that runs one agent on each host of the allocation."""
    launch = start.launch
    wanted = {
        "job-name": launch.name,
        "nodes": start.launch.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": start.processes * start.threads,
        "time": launch.time,
        "partition": launch.partition,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in wanted.items() if value is not None]
    elastic = launch.min_nodes not in (None, launch.nodes)
    if elastic:
        lines.append("#SBATCH --no-kill")
    exports = [f"export {name}={value}" for name, value in start.environment.items()]
    settings = _settings(start.rendezvous)
    agent = _agent(start, '"$1":' + str(launch.port), f"is_host=$((SLURM_NODEID == 0)),{settings}", "$SLURM_JOB_ID")
    run = f"srun{' --no-kill' if elastic else ''} --kill-on-bad-exit={0 if elastic else 1}"
    each = shlex.quote(f'exec {agent} -m "${{@:2}}"')
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "set -euo pipefail",
            *exports,
            'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "# Each host's agent has to know whether the others meet at it.",
            "# shellcheck disable=SC2016",
            f'{run} bash -c {each} agent "${{hosts[0]}}" {shlex.join(start.command)}',
            "",
        ]
    )


def pytorch_job(start: Start) -> dict[str, Any]:
    """The manifest as data."""
    launch = start.launch
    cpus = str(start.processes * start.threads)
    memory = {"memory": f"{round(launch.memory_gb * 1e3)}M"} if launch.memory_gb else {}
    # How many processes is said to torchrun itself: the variable by which operators say it was called otherwise once.
    agent = [launch.python, "-m", "torch.distributed.run", f"--nproc-per-node={start.processes}"]
    # Of the pod, as its name need not be known to the others; torchrun reads --local-addr from it.
    own_address = {"name": "PET_LOCAL_ADDR", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    container = {
        "name": "pytorch",  # the operator looks for this name
        "image": launch.image,
        "command": [*agent, "-m", *start.command],
        "workingDir": launch.mount,
        "env": [*({"name": name, "value": value} for name, value in start.environment.items()), own_address],
        "resources": {"requests": {"cpu": cpus, **memory}, "limits": {"cpu": cpus, **memory}},
        "volumeMounts": [{"name": "shared", "mountPath": launch.mount}],
    }
    pod = {
        "containers": [container],
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": launch.volume}}],
    }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": launch.name, **({"namespace": launch.namespace} if launch.namespace else {})},
        "spec": {
            "nprocPerNode": str(start.processes),
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "rdzvPort": launch.port,
                "rdzvConf": [{"key": key, "value": value} for key, value in start.rendezvous.items()],
                "minReplicas": launch.min_nodes or launch.nodes,
                "maxReplicas": launch.nodes,
                "maxRestarts": start.max_restarts,
            },
            "pytorchReplicaSpecs": {
                "Worker": {"replicas": launch.nodes, "restartPolicy": "OnFailure", "template": {"spec": pod}}
            },
        },
    }


def _agent(start: Start, endpoint: str, meeting: str, run: str) -> str:
    """torchrun up to what it is to run."""
    return " ".join(
        [
            f"{shlex.quote(start.launch.python)} -m torch.distributed.run",
            f"--nnodes={start.nodes} --nproc-per-node={start.processes} --max-restarts={start.max_restarts}",
            f"--rdzv-backend=c10d --rdzv-endpoint={endpoint} --rdzv-id={run} --rdzv-conf={meeting}",
        ]
    )


def _settings(values: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())


def _shell(line: str) -> str:
    return f"{line}\n"

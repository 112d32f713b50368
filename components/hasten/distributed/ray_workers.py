"""A run on several hosts whose processes are workers of Ray Train, in place of those that torchrun's agents start.

A worker does nothing but start the command with the variables that torchrun would set. Who plans and who follows, what
is trained and what becomes of it when one dies is the same; a run that fails is started again by Ray Train.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hasten.core.errors import ConfigError, HastenError, first_line
from hasten.core.interpreter import import_path


def start(
    command: Sequence[str], *, processes: int, threads: int, max_restarts: int, address: str | None, folder: Path
) -> None:
    """Runs `python -m command` in workers, and returns when all have ended well.

    Args:
        threads: CPUs of one worker.
        max_restarts: times that all workers are started again after one has failed.
        address: of the Ray cluster; None for `RAY_ADDRESS`, or a cluster of this machine alone.
        folder: for what Ray Train writes, which all hosts see.

    Raises:
        ConfigError: Ray Train is not installed.
        HastenError: the run failed.
    """
    if find_spec("ray") is None:
        raise ConfigError("launch.start=ray needs Ray Train, which is not installed: pip install 'hasten[ray]'")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=address, ignore_reinit_error=True, runtime_env={"env_vars": {"PYTHONPATH": import_path()}})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"command": list(command), "folder": os.getcwd(), "threads": threads},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=processes, resources_per_worker={"CPU": threads}, placement_strategy="SPREAD"
        ),
        run_config=RunConfig(
            name="hasten", storage_path=str(folder), failure_config=FailureConfig(max_failures=max_restarts)
        ),
    )
    try:
        trainer.fit()
    except ray.exceptions.RayError as error:
        raise HastenError(f"the run failed in its Ray workers: {first_line(error)}") from error
    finally:
        ray.shutdown()


def _work(config: Mapping[str, Any]) -> None:
    """One worker. Ray Train has put it into a process group, which is used to agree on where the run's own meet."""
    import ray
    import torch.distributed as dist

    context = ray.train.get_context()
    place = [(ray.util.get_node_ip_address(), _free_port(), uuid.uuid4().hex)]
    dist.broadcast_object_list(place, 0)
    address, port, run = place[0]
    variables = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": run,
        "OMP_NUM_THREADS": config["threads"],
    }
    with subprocess.Popen(
        [sys.executable, "-m", *config["command"]],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        cwd=config["folder"] if Path(config["folder"]).is_dir() else None,
    ) as process:
        try:
            code = process.wait()
        finally:
            process.terminate()
    if code:
        raise RuntimeError(f"the process of rank {variables['RANK']} ended with exit code {code}")


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port

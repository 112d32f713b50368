"""The same command in workers of Ray Train."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from hasten import cli
from hasten.core.interpreter import import_path

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'hasten[ray]'"
)

TWO_RAYLETS = """
import sys
from ray.cluster_utils import Cluster
from hasten.cli import run
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
try:
    code = run([*sys.argv[1:], f"launch.ray_address={cluster.address}"])
finally:
    cluster.shutdown()
sys.exit(code)
"""
RUN = (
    *("model.arch.widths=[4]", "model.arch.num_blocks=1", "trainer.threads=1", "trainer.batch_size=60"),
    *("trainer.epochs=2", "target.engines=[eager]", "tracking=none", "distributed=ddp", "distributed.devices=2"),
)


def test_says_how_to_get_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "ray" else found(name, package)

    monkeypatch.setattr("hasten.distributed.ray_workers.find_spec", without)
    assert cli.run(["launch", "distributed=ddp", "launch.nodes=2", "launch.start=ray"]) == 2
    assert capsys.readouterr().err == (
        "hasten: launch.start=ray needs Ray Train, which is not installed: pip install 'hasten[ray]'\n"
    )


@needs_ray
@pytest.mark.drill
def test_two_raylets_run_what_torchrun_would(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_RAYLETS, "launch", *RUN, "launch.nodes=2", "launch.start=ray"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": import_path(), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (stage,) = tmp_path.glob("outputs/store/teacher/*/stage.json")
    assert '"devices": 2' in stage.read_text()
    assert len(list(tmp_path.glob("outputs/*/*/summary.json"))) == 1

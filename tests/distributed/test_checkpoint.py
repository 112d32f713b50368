"""What is kept of a training in several processes is enough to go on from, in any arrangement of them."""

import os
import subprocess
import sys
from pathlib import Path

from hasten.core.files import write_json

JOBS = Path(__file__).with_name("jobs.py")
sys.path.insert(0, str(JOBS.parent))

STOP = 14


def run(size, folder, asked):
    """Does the jobs in so many processes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "jobs.json", asked)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--rdzv-backend=c10d"]
    command = [sys.executable, *agent, "--rdzv-endpoint=localhost:0", str(JOBS), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-9000:]

"""Several processes train as one does on the same batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANKS = Path(__file__).with_name("ranks.py")
EXACT = ("batch normalization", "shares of different sizes", "parts", "parts of different sizes", "clipped")


def run(size, folder):
    """Trains all cases in so many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--rdzv-backend=c10d"]
    command = [sys.executable, *agent, "--rdzv-endpoint=localhost:0", str(RANKS), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Case -> what one process ends with."""
    sys.path.insert(0, str(RANKS.parent))
    try:
        import ranks

        folder = tmp_path_factory.mktemp("alone")
        return {name: ranks.trained(name, folder / name) for name in ranks.CASES}
    finally:
        sys.path.remove(str(RANKS.parent))


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.drill)]
)
def together(request, tmp_path_factory):
    """Case -> what each process ends with."""
    folder = tmp_path_factory.mktemp("together")
    run(request.param, folder)

    def ends(name):
        return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(request.param)]

    return ends


def difference(one, other):
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.mark.parametrize("name", EXACT)
def test_ends_with_the_weights_of_one_process(alone, together, name):
    for end in together(name):
        assert difference(end["weights"], alone[name].model.state_dict()) <= 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_tells_the_curves_of_all_rows(alone, together, name):
    for end in together(name):
        for curve, values in alone[name].curves.items():
            assert end["curves"][curve] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "powersgd", "powersgd of several buckets"])
def test_compressed_gradients_are_the_same_everywhere_and_others_than_whole_ones(alone, together, name):
    first, *others = together(name)
    assert all(difference(first["weights"], other["weights"]) == 0 for other in others)
    assert difference(first["weights"], alone[name].model.state_dict()) > 1e-5


LEARNS = [("float16", 0.7), ("bfloat16", 0.7), ("powersgd", 0.85), ("averaged", 0.7)]


@pytest.mark.parametrize(("name", "share"), LEARNS)
def test_learns_with_less_communication(together, name, share):
    loss = together(name)[0]["curves"]["train_loss"]
    assert loss[-1] < share * loss[0]


def test_processes_with_steps_of_their_own_are_equal_after_every_average_and_at_the_end(alone, together):
    first, other = together("averaged")[:2]
    differences = [(one - two).abs().max().item() for one, two in zip(first["steps"], other["steps"], strict=True)]
    averaged = [step for step, apart in enumerate(differences, 1) if apart == 0]
    assert averaged == [3, 6, 9, 12, 15, 18, 20]
    assert difference(first["weights"], other["weights"]) == 0  # statistics of batches among them
    assert difference(first["weights"], alone["averaged"].model.state_dict()) > 1e-5

"""Several processes train as one does on the same batches."""

import os
import subprocess
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from hasten.core.files import read_json

RANKS = Path(__file__).with_name("ranks.py")
SPEC = spec_from_file_location("ranks", RANKS)
ranks = sys.modules["ranks"] = module_from_spec(SPEC)
SPEC.loader.exec_module(ranks)

COMPRESSED = [name for name, case in ranks.CASES.items() if case.spread.compression != "none"]
EXACT = [name for name, case in ranks.CASES.items() if name not in COMPRESSED and not case.spread.local_steps]


def of_sizes(names):
    """Each name with each number of processes that it is for."""
    marks = {2: pytest.mark.slow, 4: pytest.mark.drill}
    pairs = [(size, name) for size in marks for name in names if size in ranks.CASES[name].sizes]
    return pytest.mark.parametrize(
        ("size", "name"), [pytest.param(size, name, marks=marks[size]) for size, name in pairs]
    )


def run(size, folder):
    """Trains all cases in so many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "--rdzv-backend=c10d"]
    command = [sys.executable, *agent, "--rdzv-endpoint=localhost:0", str(RANKS), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Case -> what one process ends with."""
    folder = tmp_path_factory.mktemp("alone")
    return cache(lambda name: ranks.trained(ranks.CASES[name], folder / name))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Number of processes, case -> what each ends with: all weights in the first, others those that they have whole.

    In place of a case `facts`, which the first of two tells.
    """

    @cache
    def folder(size):
        made = tmp_path_factory.mktemp("together")
        run(size, made)
        return made

    def ends(size, name):
        if name == "facts":
            return read_json(folder(size) / "facts-0.json")
        return [torch.load(folder(size) / f"{name}-{rank}.pt") for rank in range(size)]

    return ends


def difference(one, other):
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@of_sizes(EXACT)
def test_ends_with_the_weights_of_one_process(alone, together, size, name):
    expected = alone(name).model.state_dict()
    first = together(size, name)[0]["weights"]
    assert first.keys() == expected.keys()
    found = difference(first, expected)
    print(f"{name}: largest difference to one process {found:.2g}")
    assert found <= 1e-5


@of_sizes(EXACT)
def test_what_a_process_has_whole_is_the_same_everywhere(together, size, name):
    first, *others = (end["weights"] for end in together(size, name))
    for other in others:
        assert all(torch.equal(value, first[key]) for key, value in other.items())
        if ranks.CASES[name].spread.kind == "ddp":
            assert other.keys() == first.keys()
        else:
            assert sum(map(torch.numel, other.values())) < 0.5 * sum(map(torch.numel, first.values()))


@of_sizes(EXACT)
def test_tells_the_curves_of_all_rows(alone, together, size, name):
    for end in together(size, name):
        for curve, values in alone(name).curves.items():
            assert end["curves"][curve] == pytest.approx(values, abs=1e-5)


@of_sizes(COMPRESSED)
def test_compressed_gradients_are_the_same_everywhere_and_others_than_whole_ones(alone, together, size, name):
    first, *others = together(size, name)
    assert all(difference(first["weights"], other["weights"]) == 0 for other in others)
    assert difference(first["weights"], alone(name).model.state_dict()) > 1e-5


@of_sizes(["averaged"])
def test_processes_with_steps_of_their_own_are_equal_after_every_average_and_at_the_end(alone, together, size, name):
    first, other = together(size, name)[:2]
    differences = [(one - two).abs().max().item() for one, two in zip(first["steps"], other["steps"], strict=True)]
    averaged = [step for step, apart in enumerate(differences, 1) if apart == 0]
    assert averaged == [3, 6, 9, 12, 15, 18, 20]
    assert difference(first["weights"], other["weights"]) == 0  # statistics of batches among them
    assert difference(first["weights"], alone(name).model.state_dict()) > 1e-5


@of_sizes([*COMPRESSED, "averaged"])
def test_learns_with_less_communication(together, size, name):
    share = {"powersgd": 0.85, "powersgd of several buckets": 0.95}.get(name, 0.7)
    loss = together(size, name)[0]["curves"]["train_loss"]
    assert loss[-1] < share * loss[0]


@pytest.mark.slow
def test_gradients_are_reduced_once_a_step_whatever_its_parts(together):
    found = together(2, "facts")["collectives"]
    for whole, parts in found.values():
        assert whole["_reduce_scatter_base_"] == parts["_reduce_scatter_base_"] > 0
    again, kept = found["reshard=True"], found["reshard=False"]
    assert kept[1]["_allgather_base_"] == kept[0]["_allgather_base_"] < again[0]["_allgather_base_"]


@pytest.mark.slow
def test_gradients_are_clipped_by_the_norm_of_all_stages(together):
    assert together(2, "facts")["norm"] == pytest.approx(3**0.5)


@pytest.mark.slow
def test_refuses_a_plan_by_which_the_model_would_be_another(together):
    facts = together(2, "facts")
    assert "model.tensor_plan: divided as it says the model does not run" in facts["unpaired"]
    assert "model.tensor_plan: divided as it says the model gives (4, 5) for (4, 10)" in facts["last"]
    assert "model.tensor_plan: divided as it says the model gives other gradients of 2.weight" in facts["between"]

"""The command line: help, pipelines, and one clear line with exit code 2 for every request that makes no sense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hasten import cli
from hasten.core.groups import GROUPS, conf_folder, options


def test_help_needs_no_torch_and_no_hydra() -> None:
    code = (
        "import sys, hasten.cli\n"
        "assert hasten.cli.run(['--help']) == 0\n"
        "heavy = {'torch', 'hydra', 'mlflow', 'numpy', 'pytorch_lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_option_of_every_group_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["--help"])
    printed = capsys.readouterr().out
    for group in GROUPS:
        found = options(group, [conf_folder()])
        assert found, group
        for option, purpose in found.items():
            assert purpose, f"{group}/{option}.yaml has no first comment"
            assert f" {option} " in printed
            assert purpose in printed


def test_help_lists_the_users_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_conf" / "model").mkdir(parents=True)
    (tmp_path / "my_conf" / "model" / "mine.yaml").write_text("# My very own net\narch: null\n")
    cli.run(["--config-dir", "my_conf", "--help"])
    assert "My very own net" in capsys.readouterr().out


def test_composing_a_config_imports_no_torch() -> None:
    code = (
        "import sys, hasten.cli\nassert hasten.cli.run(['run', '--cfg', 'job']) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "StructuredPruning" not in done.stdout
    assert "max_trials" in done.stdout


def save_rows(path: str, inputs: np.ndarray, targets: np.ndarray) -> None:
    np.savez(path, inputs=inputs, targets=targets)


def rows(num_rows: int = 60, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(num_rows, 1, 8, 8)).astype(np.float32), np.arange(num_rows) % num_classes


WRONG = [
    # what was typed, and what the line must name
    (["optimise"], ["optimise is no pipeline", "did you mean 'optimize'?"]),
    (["prunning=structured"], ["prunning", "did you mean 'pruning'?"]),
    (["pruning=structurd"], ["pruning=structurd", "did you mean 'structured'?"]),
    (["run", "pruning=structured", "pruning.sparsty=0.3"], ["pruning.sparsty", "did you mean 'pruning.sparsity'?"]),
    (
        ["run", "pruning=structured", "pruning.sparsity=1.5"],
        ["sparsity must be a number in [0, 1) or null, got 1.5 (pruning.sparsity)"],
    ),
    (
        ["run", "pruning=structured", "pruning.sparsity=half"],
        ["sparsity must be a number", "'half'", "(pruning.sparsity)"],
    ),
    (["run", "pruning=structured", "pruning.importance=l3"], ["one of l1, l2", "'l3'", "(pruning.importance)"]),
    (["seed=abc"], ["seed", "abc"]),
    (["target.threads=0"], ["threads must be an integer of at least 1, got 0 (target.threads)"]),
    (["target.thread=1"], ["target.thread", "did you mean 'target.threads'?"]),
    (["trainer.accelerator=gpu"], ["accelerator must be one of cpu, cuda, tpu, got 'gpu' (trainer.accelerator)"]),
    (["run", "trainer.accelerator=tpu"], ["trainer.accelerator=tpu needs torch_xla and a TPU: "]),
    (["trainer.lr=-1"], ["lr must be a number above 0, got -1 (trainer.lr)"]),
    (["objective.max_drop=2"], ["max_drop must be a number in [0, 1), got 2 (objective.max_drop)"]),
    (["planner.max_trials=0"], ["max_trials must be an integer of at least 1, got 0 (planner.max_trials)"]),
    (["engine=openvino", "engine.threads=4"], ["threads must be at most target.threads=1, got 4 (engine.threads)"]),
    (["store", "store.action=delete"], ["action must be one of list, verify, prune, got 'delete' (store.action)"]),
    (["data=npz"], ["data.path has no value"]),
    (["data=npz", "data.path=nowhere.npz"], ["data.path", "nowhere.npz"]),
    (["data=npz", "data.path=text.npz"], ["data.path", "text.npz"]),
    (["data=npz", "data.path=rows.npz", "data.targets=labels"], ["data.targets", "labels", "targets"]),
    (["data=npz", "data.path=few.npz"], ["data.split", "rows"]),
    (["data=npz", "data.path=floats.npz"], ["data.targets"]),
    (["data=npz", "data.path=nan.npz"], ["data.inputs"]),
    (["data=npz", "data.path=rows.npz", "data.targets=null"], ["data.targets", "task=unlabelled"]),
    (["data=npz", "data.path=rows.npz", "task=unlabelled"], ["model.training.epochs would train", "task=unlabelled"]),
    (["data=npz", "data.path=floats.npz", "task=regression", "model.arch.num_outputs=3"], ["3 outputs", "1 outputs"]),
    (["task.metrics.accuracy._target_=nowhere.f1"], ["task.metrics.accuracy._target_=nowhere.f1 does not import"]),
    (["data=npz", "data.path=rows.npz", "model.arch.num_outputs=2"], ["model.arch", "2", "3"]),
    (["data.split.train=0.9"], ["data.split"]),
    (["model=custom", "model.arch._target_=nowhere.Net"], ["model.arch._target_=nowhere.Net does not import"]),
    (["model=custom", "model.arch._target_=torch.nn.Linea"], ["model.arch._target_=torch.nn.Linea does not import"]),
    (["model.checkpoint=nowhere.safetensors"], ["model.checkpoint=nowhere.safetensors"]),
    (["model.training.epochs=0"], ["model.training.epochs=0"]),
    (["run", "quantization=static"], ["engine=eager", "quant"]),
    (
        ["run", "distillation=soft_labels"],
        ["distillation=soft_labels needs student=..., pruning=... or a quantization=... that trains"],
    ),
    (["run", "student.training.epochs=3"], ["student.training"]),
    (["seed"], ["seed"]),
    (["run", "hydra.run.dir=rows.npz/out"], ["rows.npz", "Not a directory"]),
    (["seed=-1"], ["seed must be an integer in [0, 2^32), got -1"]),
    (["store", "store.action=prune", "store.days=-1"], ["days must be", "-1", "(store.days)"]),
    (["pruning=null"], ["a group takes the name of an option"]),
    (["~pruning"], ["pruning can't be left out"]),
    (["target.engines=[eager,toaster]"], ["target.engines: toaster is no option of engine", "openvino"]),
]


@pytest.fixture
def files(tmp_path: Path) -> None:
    inputs, targets = rows()
    save_rows("rows.npz", inputs, targets)
    save_rows("few.npz", inputs[:4], targets[:4])
    save_rows("floats.npz", inputs, targets + 0.5)
    broken = inputs.copy()
    broken[3, 0, 2, 2] = np.nan
    save_rows("nan.npz", broken, targets)
    Path("text.npz").write_text("no archive")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("typed", "named"), WRONG, ids=[" ".join(typed) for typed, _ in WRONG])
def test_says_what_is_wrong_and_leaves_nothing(
    typed: list[str], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    # One strategy is enough here: all that a run may use are composed before it starts.
    assert cli.run([*typed, "tracking=none", "strategy=[engine]"]) == 2
    told = capsys.readouterr().err
    assert all(words in told for words in named), told
    assert "Traceback" not in told
    assert len(told.strip().splitlines()) == 1, told
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and ".lock" not in path.name]
    assert all("store" in path.parts or path.name == "outputs" for path in left), left
    assert not list(tmp_path.glob("outputs/store/teacher/*"))


def test_tells_all_problems_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["run", "pruning=structured", "pruning.sparsity=2", "pruning.importance=l3", "target.batch_size=0"]
    assert cli.run([*typed, "tracking=none"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_shows_a_traceback_where_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert cli.run(["run", "pruning=structured", "pruning.sparsity=2", "tracking=none"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_wrong_key_in_a_sweep_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["-m", "run", "pruning=structured", "pruning.sparsty=0.1,0.2"]) == 2
    assert "pruning.sparsty" in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "store").exists()


REST = "search: null\ncost: 1\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"addresses: {{compute: 2}}\nattempts: []\n{REST}", "needs the first line: # @package strategies.mine"),
        (f"# @package strategies.mine\naddresses: {{compute: 2}}\n{REST}", "must spell addresses, attempts"),
        (
            f"# @package strategies.mine\naddresses: {{compute: 2}}\nattempts: []\nby_default: never\n{REST}",
            "by_default must be true or false, got 'never'",
        ),
        (
            f"# @package strategies.mine\naddresses: {{compute: 2}}\nattempts: [[pruning.sparsitty=0.3]]\n{REST}",
            "strategies.mine: pruning.sparsitty is no key of the config, did you mean 'pruning.sparsity'?",
        ),
    ],
)
def test_a_strategy_that_makes_no_sense_is_told_before_anything_runs(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_conf" / "strategy").mkdir(parents=True)
    (tmp_path / "my_conf" / "strategy" / "mine.yaml").write_text(text)
    assert cli.run(["--config-dir", "my_conf", "tracking=none"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "store" / "teacher").exists()

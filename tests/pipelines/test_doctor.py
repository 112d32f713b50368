"""`hasten doctor`: what works here, how to get what does not, and nothing left behind."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from hasten import cli
from hasten.core.cuda import Gpu
from hasten.core.errors import MeasurementError
from hasten.hardware.probe import Roofline

ENGINES = """
import os
from dataclasses import dataclass
from hasten.engines.eager import Eager

@dataclass(frozen=True, kw_only=True)
class Broken(Eager):
    def compile(self, graph, folder):
        raise RuntimeError("no kernel for Flatten")

@dataclass(frozen=True, kw_only=True)
class Crashing(Eager):
    def compile(self, graph, folder):
        os._exit(3)

@dataclass(frozen=True, kw_only=True)
class Wrong(Eager):
    def load(self, folder):
        right = super().load(folder)
        return lambda *inputs: right(*inputs) + 1

    def compile(self, graph, folder):
        Eager(threads=self.threads).compile(graph, folder)

@dataclass(frozen=True, kw_only=True)
class Elsewhere(Eager):
    devices = ("fpga",)

    def supports(self, quantized, target):
        return None if target.device == "fpga" else f"it runs on an FPGA, target.device is {target.device}"

@dataclass(frozen=True, kw_only=True)
class Absent(Eager):
    def supports(self, quantized, target):
        return "frobnicator is not installed: pip install frobnicator"
"""
CORE = "target.engines=[eager]"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A user's config folder with engines that don't work, beside their module."""
    (tmp_path / "my_broken_engines.py").write_text(ENGINES)
    folder = tmp_path / "my_conf" / "engine"
    folder.mkdir(parents=True)
    for name in ("Broken", "Crashing", "Wrong", "Elsewhere", "Absent"):
        text = f"# {name}\n_target_: my_broken_engines.{name}\nthreads: ${{target.threads}}\n"
        (folder / f"{name.lower()}.yaml").write_text(text)
    return folder.parent


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    """Exit code, and name of each line -> its state and what it tells."""
    code = cli.run([*arguments, "doctor"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines: dict[str, str] = {}
    for line in captured.out.splitlines():
        name, rest = line[:16].strip(), line[16:].strip()
        if name and line.startswith("  "):
            lines[name] = rest
        elif lines and line.startswith("  "):
            lines[next(reversed(lines))] += f" {rest}"
    return code, {name: " ".join(told.split()) for name, told in lines.items()}


@pytest.mark.slow
def test_tries_every_engine_and_says_how_to_get_what_is_missing(
    conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, told = doctor(capsys, "--config-dir", str(conf), CORE)
    assert code == 0
    for name in ("eager", "onnxruntime", "openvino"):
        assert told[name].startswith("ok ")
        assert " compiled and right in " in told[name]
    assert "no kernel for Flatten" in told["broken"]
    assert "exit code 3" in told["crashing"]
    assert "its outputs differ from eager PyTorch's by" in told["wrong"]
    assert {told[name].partition(" ")[0] for name in ("broken", "crashing", "wrong")} == {"fails"}
    assert told["elsewhere"].startswith("ok ")
    assert told["elsewhere"].endswith("s, for target.device=fpga")
    assert told["arithmetic"].startswith("ok float32 ")
    assert told["absent"] == "missing frobnicator is not installed: pip install frobnicator"
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"my_broken_engines.py", "my_conf"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["broken", "absent", "unheard_of"])
def test_an_engine_of_the_target_that_does_not_work_is_a_failure(
    conf: Path, engine: str, capsys: pytest.CaptureFixture[str], only: None
) -> None:
    assert doctor(capsys, "--config-dir", str(conf), f"target.engines=[eager,{engine}]")[0] == 1


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at few engines, to be quick."""
    from hasten.core.recipe import Composer

    monkeypatch.setattr(Composer, "options", lambda self, group: ["absent", "broken", "eager"])
    monkeypatch.setattr("hasten.stages.roofline.probe", lambda threads, device: roofline(threads))


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that takes its time."""
    monkeypatch.setattr("hasten.pipelines.doctor._engines", lambda session: iter(()))
    monkeypatch.setattr("hasten.stages.roofline.probe", lambda threads, device: roofline(threads))


def roofline(threads: int) -> Roofline:
    return Roofline(
        peak_gops={"float32": 112.4, "int8": 995.0},
        bandwidth_gbs={"L1": 197.0, "DRAM": 38.5},
        capacity_bytes={"L1": 49152},
        extensions=("AVX2",),
        noise={"float32": 0.01},
        noise_floor=0.0128,
        threads=threads,
        machine_id="here",
    )


@pytest.mark.usefixtures("no_engines")
class TestTheMachine:
    def test_tells_versions_processor_memory_compiler_and_places(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, told = doctor(capsys, "target.engines=[]")
        assert code == 0
        assert "Python 3." in told["versions"]
        assert "torch 2." in told["versions"]
        assert "cores" in told["processor"]
        assert told["memory"].endswith(" GB")
        assert told["outputs"].endswith("can be written")
        assert "sqlite:///outputs/mlflow.db" in told["record"]
        assert {"vectors", "C++ compiler", "transformers", "tokenizers", "datasets"} <= told.keys()
        assert list(tmp_path.iterdir()) == []

    def test_tells_what_the_machine_can_do_at_most(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        told = doctor(capsys, "target.engines=[]", "target.threads=2")[1]
        assert told["arithmetic"] == "ok float32 112, int8 995 GFLOP/s with 2 threads"
        assert told["bandwidth"] == "ok L1 197, DRAM 38.5 GB/s"
        assert told["noise floor"].startswith("ok 1.3 %")
        assert told["formats"].startswith("ok float32")
        assert list(tmp_path.iterdir()) == []

    def test_says_why_that_could_not_be_measured(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(threads: int, device: str) -> Roofline:
            raise MeasurementError("the roofline was not measured within 120 s")

        monkeypatch.setattr("hasten.stages.roofline.probe", broken)
        assert doctor(capsys, "target.engines=[]")[1]["roofline"].startswith("fails the roofline was not measured")

    @pytest.mark.parametrize(
        ("problem", "state"), [(None, "ok"), ("PyTorch is installed without CUDA: install a build", "missing")]
    )
    def test_tells_each_gpu_and_what_keeps_pytorch_from_it(
        self, problem: str | None, state: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        gpu = Gpu(name="NVIDIA H100", memory_bytes=85_520_809_984, driver="550.54.15", capability=(9, 0))
        monkeypatch.setattr("hasten.pipelines.doctor.gpus", lambda: (gpu,))
        monkeypatch.setattr("hasten.pipelines.doctor.cuda_problem", lambda: problem)
        told = doctor(capsys, "target.engines=[]")[1]["GPU"]
        assert told.startswith(f"{state} NVIDIA H100; 85.5 GB; driver 550.54.15; float32, bfloat16, float16")
        assert told.endswith(problem or "float16")

    def test_says_where_there_is_no_gpu(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hasten.pipelines.doctor.gpus", lambda: ())
        assert doctor(capsys, "target.engines=[]")[1]["GPU"] == "ok none"

    def test_says_how_to_get_a_compiler(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda name: None)
        told = doctor(capsys, "target.engines=[]")[1]
        assert told["C++ compiler"].startswith("missing")
        assert "apt-get install g++" in told["C++ compiler"]

    def test_says_how_to_get_an_extra(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("hasten.pipelines.doctor.find_spec", lambda name: None)
        told = doctor(capsys, "target.engines=[]")[1]
        assert told["datasets"].startswith("missing not installed: pip install")

    def test_names_a_store_that_is_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("")
        code, told = doctor(capsys, "target.engines=[]", "tracking.uri=sqlite:///file/mlflow.db")
        assert (code, told["record"].partition(" ")[0]) == (0, "fails")
        assert "tracking.uri" in told["record"]

    def test_a_recipe_that_lacks_something_is_no_concern_of_the_doctor(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert doctor(capsys, "target.engines=[]", "data=npz", "model=custom")[0] == 0

    def test_leaves_an_existing_store_as_it_was(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("CREATE TABLE runs (name)")
        before = (tmp_path / "mlflow.db").read_bytes()
        assert doctor(capsys, "target.engines=[]", "tracking.uri=sqlite:///mlflow.db")[1]["record"].startswith("ok")
        assert (tmp_path / "mlflow.db").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]

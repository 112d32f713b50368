"""`target=auto`: what the machine says stands in the recipe as if it were typed; a device that is missing is named."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hasten import cli
from hasten.core import auto, cuda, processor, tpu
from hasten.core.errors import ConfigError
from hasten.core.groups import conf_folder
from hasten.core.interfaces import Target
from hasten.core.preflight import check_values
from hasten.core.recipe import Composer, Recipe
from hasten.core.sections import Accelerator, Step
from hasten.session import Session

H100 = "NVIDIA H100 80GB HBM3, 81559, 550.54.15, 9.0\n"
OPEN: dict[str, Any] = dict.fromkeys(auto.LEFT_OPEN)


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    """What is asked of the machine once is asked again by every test."""
    remembered = (cuda.gpus, cuda.torch_cuda, processor.isa, tpu.num_tpus)
    for asked in remembered:
        asked.cache_clear()
    yield
    for asked in remembered:
        asked.cache_clear()


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    smi = subprocess.CompletedProcess([], 0, stdout=H100)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("hasten.core.cuda.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("hasten.core.cuda.subprocess.run", lambda *arguments, **settings: smi)
    monkeypatch.setattr("hasten.core.auto.cuda_problem", lambda: None)


def pretend_isa(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")


@pytest.mark.usefixtures("hydra", "without_gpu")
class TestAProcessor:
    def recipe(self, *overrides: str) -> Recipe:
        return Composer.of(["target=auto", *overrides]).compose()

    def test_gives_the_target_its_cores_and_its_engines(self) -> None:
        target = Target.of(self.recipe().section("target"))
        assert (target.device, target.reference, target.threads) == ("cpu", "cpu", processor.num_cores())
        assert target.engines[:1] == ("eager",)
        assert {"onnxruntime", "openvino"} <= set(target.engines)
        assert {"float32", "int8"} <= set(target.precisions)

    def test_is_said_by_the_recipe_so_that_the_same_is_built_elsewhere(self) -> None:
        recipe = self.recipe()
        threads = processor.num_cores()
        assert f"target.threads={threads}" in recipe.overrides
        assert "target.device=cpu" in recipe.overrides
        again = Composer.of(recipe.overrides).compose()
        assert (again.config, again.overrides) == (recipe.config, recipe.overrides)

    def test_does_not_say_what_was_typed(self) -> None:
        recipe = self.recipe("target.threads=1", "target.engines=[eager]", "target.precisions=[float32]")
        target = recipe.section("target")
        assert (target["threads"], target["engines"], target["precisions"]) == (1, ["eager"], ["float32"])

    def test_is_what_other_sections_refer_to(self) -> None:
        assert self.recipe("engine=onnxruntime").section("engine")["threads"] == processor.num_cores()

    def test_stays_out_of_targets_that_say_everything(self) -> None:
        assert not [text for text in Composer.of(["target=cpu"]).compose().overrides if text.startswith("target.")]

    @pytest.mark.parametrize(
        ("flags", "formats"),
        [
            ("avx2 fma", ("float32",)),
            ("avx512f avx512_bf16", ("float32", "bfloat16")),
            ("amx_bf16 amx_int8 avx512_fp16", ("float32", "bfloat16", "float16")),
        ],
    )
    def test_calculates_in_the_formats_it_has_instructions_for(
        self, flags: str, formats: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        pretend_isa(monkeypatch, tmp_path, flags)
        assert tuple(self.recipe().section("target")["precisions"]) == (*formats, "int8")

    @pytest.mark.parametrize("asked", ["target.device=gpu", "target.reference=cuda"])
    def test_refuses_a_gpu_that_is_not_there_before_anything_is_done(
        self, asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ConfigError, match=rf"^{asked} can't be served: no NVIDIA GPU is seen here[^\n]*$"):
            Session.of([asked, "target.engines=[eager]"], tmp_path)

    def test_refuses_to_train_on_a_gpu_that_is_not_there(self, tmp_path: Path) -> None:
        wanted = (
            r"^trainer\.accelerator=cuda needs a GPU that PyTorch can use: no NVIDIA GPU is seen here[^\n]*; "
            r"trainer\.accelerator=cpu trains on the processor$"
        )
        with pytest.raises(ConfigError, match=wanted):
            Session.of(["trainer.accelerator=cuda"], tmp_path)


class TestATpu:
    @pytest.fixture(autouse=True)
    def _with_torch_xla(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(tpu, "find_spec", lambda name: name)
        monkeypatch.setattr(tpu, "PCI", tmp_path)

    def plugged(self, folder: Path, device: str) -> None:
        folder.mkdir()
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(f"{device}\n")

    def test_is_told_by_the_pci_bus_from_other_cards_of_its_maker(self, tmp_path: Path) -> None:
        self.plugged(tmp_path / "network", "0x0042")
        assert (auto.untrainable("tpu") or "").startswith(
            f"trainer.accelerator=tpu needs torch_xla and a TPU: no TPU is seen here (in {tmp_path}); "
        )
        tpu.num_tpus.cache_clear()
        self.plugged(tmp_path / "v4", "0x005e")
        assert auto.untrainable("tpu") is None

    def test_is_useless_without_torch_xla(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plugged(tmp_path / "v4", "0x005e")
        monkeypatch.setattr(tpu, "find_spec", lambda name: None)
        assert "torch_xla is not installed (its newest release, 2.9, is for torch 2.9)" in (tpu.tpu_problem() or "")


class TestAStep:
    def reasons(self, accelerator: Accelerator, **knobs: Any) -> list[str]:
        return list(auto.uncalculable(Step(**knobs), accelerator))

    @pytest.mark.parametrize(("accelerator", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
    def test_is_compiled_where_there_is_a_compiler(
        self, accelerator: Accelerator, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        compiler = tmp_path / "compiler"
        monkeypatch.setenv(variable, str(compiler))
        (reason,) = self.reasons(accelerator, compile="default")
        assert reason.startswith(f"trainer.compile=default needs a compiler, and there is no {compiler}: install it, ")
        assert self.reasons(accelerator) == []
        compiler.touch(mode=0o755)
        assert self.reasons(accelerator, compile="default") == []

    def test_on_a_tpu_is_compiled_by_its_own_library_and_has_no_float16(self) -> None:
        assert self.reasons("tpu", precision="bfloat16") == []
        told = self.reasons("tpu", precision="float16", compile="max-autotune")
        assert [reason.partition(" ")[0] for reason in told] == [
            "trainer.precision=float16",
            "trainer.compile=max-autotune",
        ]


@pytest.mark.usefixtures("with_gpu")
class TestAGpu:
    def test_is_told_by_nvidia_smi(self) -> None:
        (gpu,) = cuda.gpus()
        assert (gpu.name, gpu.driver, gpu.capability) == ("NVIDIA H100 80GB HBM3", "550.54.15", (9, 0))
        assert gpu.memory_bytes == 81559 * 2**20

    def test_is_the_device_where_pytorch_can_use_it(self) -> None:
        said = auto.from_the_machine(OPEN)
        assert (said["device"], said["reference"]) == ("gpu", "cuda")
        assert said["precisions"] == ["float32", "bfloat16", "float16", "int8"]

    def test_is_no_device_for_who_asked_for_the_processor(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        pretend_isa(monkeypatch, tmp_path, "avx2")
        said = auto.from_the_machine({**OPEN, "device": "cpu"})
        assert (said["reference"], said["precisions"]) == ("cpu", ["float32", "int8"])

    def test_is_useless_to_a_pytorch_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "torch_cuda", lambda: None)
        assert "PyTorch is installed without CUDA" in (cuda.cuda_problem() or "")

    def test_may_train(self) -> None:
        assert auto.untrainable("cuda") is None

    def test_of_an_older_kind_has_no_bfloat16(self) -> None:
        assert cuda.Gpu(name="Tesla V100", capability=(7, 0)).float_formats == ("float32", "float16")


def test_a_gpu_is_told_by_the_driver_where_nvidia_smi_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "gpus" / "0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 47\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\n")
    monkeypatch.setattr(cuda, "DRIVER", tmp_path)
    monkeypatch.setattr("hasten.core.cuda.shutil.which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda.gpus() == (cuda.Gpu(name="NVIDIA A100-SXM4-40GB", driver="535.129.03"),)


@pytest.mark.parametrize(("line", "version"), [("cuda: Optional[str] = '12.8'", "12.8"), ("cuda = None", None)])
def test_pytorch_is_asked_for_cuda_without_being_imported(
    line: str, version: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '9'\n{line}\n")
    spec = type("Spec", (), {"origin": str(tmp_path / "torch" / "__init__.py")})
    monkeypatch.setattr("hasten.core.cuda.find_spec", lambda name: spec)
    assert cuda.torch_cuda() == version


def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu in range(4):  # two cores of two threads each
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr(processor, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(processor, "usable_cpus", lambda: frozenset(range(4)))
    monkeypatch.setattr(processor, "CPU_QUOTA", tmp_path / "cpu.max")
    assert processor.num_cores() == 2
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert processor.num_cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processor.num_cores() == 2


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("order", [("run", "target=auto", "--cfg", "job"), ("--cfg", "job", "run", "target=auto")])
def test_the_config_that_is_shown_says_it(order: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(order) == 0
    assert f"  threads: {processor.num_cores()}\n  batch_size: 1\n" in capsys.readouterr().out


TARGETS = sorted((conf_folder() / "target").glob("*.yaml"))


@pytest.mark.parametrize("file", TARGETS, ids=[file.stem for file in TARGETS])
class TestEveryFile:
    def test_spells_every_key_and_explains_it(self, file: Path) -> None:
        lines = file.read_text().splitlines()
        assert lines[0].startswith("# ")
        node = yaml.safe_load(file.read_text())
        assert set(node) == {field.name for field in dataclasses.fields(Target)}
        for key in set(node) - {"device"}:
            (place,) = [place for place, line in enumerate(lines) if line.startswith(f"{key}:")]
            assert "# " in lines[place] or lines[place - 1].startswith("# "), f"{key} has no comment"

    @pytest.mark.usefixtures("hydra", "without_gpu")
    def test_is_a_target_whose_values_are_right(self, file: Path) -> None:
        recipe = Composer.of([f"target={file.stem}", "target.engines=[eager]"]).compose()
        check_values(recipe)
        assert Target.of(recipe.section("target")).engines == ("eager",)

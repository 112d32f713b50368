"""The folder that a run leaves, loaded by somebody who has nothing else."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.artefacts.deployed import deploy
from hasten.core.construct import construct
from hasten.core.errors import HastenError
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Signature
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.data.digits import Digits
from hasten.data.prepare import normalise, read
from hasten.stages.build import build
from hasten.stages.stage import Tools

ENGINES = ("eager", "onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What `deploy` is given."""

    compiled: Path
    described: dict[str, Any]

    def deploy(self, folder: Path) -> None:
        deploy(self.compiled, folder, **self.described)


@pytest.fixture
def parts(hydra: None, tiny: tuple[str, ...], request: pytest.FixtureRequest) -> Parts:
    engine = getattr(request, "param", "onnxruntime")
    recipe = Composer.of([*tiny, f"engine={engine}"]).compose()
    built = build(recipe, Store(Path(tiny[-1].partition("=")[2])), Tools())
    prepared = read(built.data.folder)
    described = {
        "signature": Signature(input_shape=prepared.input_shape, output_shape=(prepared.num_classes,)),
        "engine": recipe.section("engine"),
        "mean": prepared.mean,
        "std": prepared.std,
        "provenance": {"overrides": list(recipe.overrides)},
    }
    return Parts(compiled=built.compiled.folder, described=described)


@pytest.fixture
def model(parts: Parts, tmp_path: Path) -> hasten.artefacts.deployed.Model:
    parts.deploy(tmp_path / "model")
    return hasten.load(tmp_path / "model")


RAW = Digits().load().inputs[:7]


@pytest.mark.parametrize("parts", ENGINES, indirect=True)
@pytest.mark.parametrize("num_rows", [1, 7])
def test_gives_for_raw_rows_what_the_engine_gives_for_normalised_ones(parts: Parts, model: Any, num_rows: int) -> None:
    run = construct(parts.described["engine"], "engine").load(parts.compiled)
    mean, std = (np.array(parts.described[name]) for name in ("mean", "std"))
    outputs = model(RAW[:num_rows])
    assert (outputs.shape, outputs.dtype) == ((num_rows, 10), np.float32)
    np.testing.assert_allclose(outputs, run(normalise(RAW[:num_rows], mean, std)), rtol=1e-4, atol=1e-5)


def test_takes_integers_and_floats_of_any_width(model: Any) -> None:
    expected = model(RAW.astype(np.float32))
    for dtype in (np.uint8, np.int64, np.float16, np.float64):
        np.testing.assert_array_equal(model(RAW.astype(dtype)), expected)


def test_leaves_the_rows_alone(model: Any) -> None:
    rows = RAW.astype(np.float32)
    before = rows.copy()
    model(rows)
    np.testing.assert_array_equal(rows, before)


def test_says_what_it_is_and_where_it_comes_from(model: Any) -> None:
    assert model.signature.input_shape == (1, 8, 8)
    assert model.engine["_target_"].endswith("OnnxRuntime")
    assert "engine=onnxruntime" in model.provenance["overrides"]


WRONG = {
    "one row without its batch": RAW[0],
    "other sizes": np.zeros((2, 1, 8, 9), np.float32),
    "flat rows": np.zeros((2, 64), np.float32),
    "a number": np.array(1.0),
    "no rows": RAW[:0],
    "a list": RAW.tolist(),
    "nothing": None,
}


@pytest.mark.parametrize("rows", WRONG.values(), ids=WRONG)
def test_refuses_other_rows_in_one_line_that_says_the_shape(model: Any, rows: Any) -> None:
    with pytest.raises(HastenError, match=r"\(rows, 1, 8, 8\)") as caught:
        model(rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["complex64", "bool", "U1", "object"])
def test_refuses_what_is_no_number_in_one_line(model: Any, dtype: str) -> None:
    with pytest.raises(HastenError, match=f"got dtype .*{np.dtype(dtype).name[:4]}|got dtype <U1") as caught:
        model(np.zeros((2, 1, 8, 8), np.float32).astype(dtype))
    assert "\n" not in str(caught.value)


def test_a_model_without_preprocessing_takes_rows_as_they_are(parts: Parts, tmp_path: Path) -> None:
    parts.described.update(mean=None, std=None)
    parts.deploy(tmp_path / "model")
    run = construct(parts.described["engine"], "engine").load(parts.compiled)
    rows = RAW.astype(np.float32)
    np.testing.assert_array_equal(hasten.load(tmp_path / "model")(rows), run(rows))


def test_code_of_another_package_runs_only_if_it_is_trusted(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_engine.py").write_text(
        "from hasten.engines.onnxruntime import OnnxRuntime\n\nclass Theirs(OnnxRuntime):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    parts.described["engine"] = {**parts.described["engine"], "_target_": "their_engine.Theirs"}
    parts.deploy(tmp_path / "model")
    with pytest.raises(HastenError, match=r"trust=\['their_engine'\]"):
        hasten.load(tmp_path / "model")
    assert hasten.load(tmp_path / "model", trust=["their_engine"])(RAW).shape == (7, 10)


@pytest.mark.parametrize("parts", ["eager"], indirect=True)
def test_an_architecture_of_another_package_is_code_too(parts: Parts, tmp_path: Path) -> None:
    parts.deploy(tmp_path / "model")
    file = tmp_path / "model" / "module.json"
    write_json(file, {"arch": {**read_json(file)["arch"], "_target_": "os.system", "command": "touch pwned"}})
    with pytest.raises(HastenError, match=r"trust=\['os'\]"):
        hasten.load(tmp_path / "model")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("parts", ["eager"], indirect=True)
def test_of_hasten_itself_only_engines_and_models_are_run(parts: Parts, tmp_path: Path) -> None:
    harmful = ["model=custom", "model.arch._target_=os.abort"]
    parts.deploy(tmp_path / "model")
    # in this order: the engine is looked at first
    for file, changed, what in (
        ("module.json", {"arch": {"_target_": "hasten.notebook.run", "overrides": harmful}}, "model"),
        ("model.json", {"engine": {"_target_": "hasten.notebook.run", "overrides": harmful}}, "engine"),
        ("model.json", {"engine": {"_target_": "hasten.data.digits.Digits"}}, "engine"),
    ):
        write_json(tmp_path / "model" / file, read_json(tmp_path / "model" / file) | changed)
        with pytest.raises(HastenError, match=f"{changed[next(iter(changed))]['_target_']} is no {what} of hasten"):
            hasten.load(tmp_path / "model")


def test_a_class_that_is_no_engine_is_refused(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_engine.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts.described["engine"] = {"_target_": "no_engine.Thing"}
    parts.deploy(tmp_path / "model")
    with pytest.raises(HastenError, match=r"no_engine\.Thing is no engine"):
        hasten.load(tmp_path / "model", trust=["no_engine"])


def test_a_folder_that_holds_no_model_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(HastenError, match="give the model/ folder"):
            hasten.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}', '{"format": 999}'])
def test_a_description_that_is_broken_or_of_another_version_is_told_in_one_line(
    parts: Parts, tmp_path: Path, content: str
) -> None:
    parts.deploy(tmp_path / "model")
    (tmp_path / "model" / "model.json").write_text(content)
    with pytest.raises(HastenError, match=r"model\.json") as caught:
        hasten.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_deployment_that_fails_leaves_the_model_before_it(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    parts.deploy(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    parts.described["provenance"] = {"not": {"json"}}
    with pytest.raises(TypeError):
        parts.deploy(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(folder)
    with pytest.raises(TypeError):
        parts.deploy(folder)
    assert not folder.exists()

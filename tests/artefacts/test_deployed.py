"""The folder that a run leaves, loaded by somebody who has nothing else."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import hasten
from hasten.artefacts.deployed import Model, deploy
from hasten.core.construct import construct
from hasten.core.errors import HastenError
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Columns, Graph, Input, Signature
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.data.digits import Digits
from hasten.data.prepare import node, read
from hasten.data.transforms import Standardize, Tokens
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.stages.build import build
from hasten.stages.data import COLUMNS
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
        "columns": read_json(built.data.folder / COLUMNS),
        "signature": prepared.signature((10,)),
        "engine": recipe.section("engine"),
        "transforms": prepared.transforms,
        "provenance": {"overrides": list(recipe.overrides)},
        "card": "# Digits\n",
    }
    return Parts(compiled=built.compiled.folder, described=described)


@pytest.fixture
def model(parts: Parts, tmp_path: Path) -> Model:
    parts.deploy(tmp_path / "model")
    return hasten.load(tmp_path / "model")


RAW = Digits().load().inputs["input"][:7]


@pytest.mark.parametrize("parts", ENGINES, indirect=True)
@pytest.mark.parametrize("num_rows", [1, 7])
def test_gives_for_raw_rows_what_the_engine_gives_for_normalised_ones(parts: Parts, model: Any, num_rows: int) -> None:
    run = construct(parts.described["engine"], "engine").load(parts.compiled)
    (standardize,) = parts.described["transforms"]
    mean, std = standardize["mean"]["input"][0], standardize["std"]["input"][0]
    outputs = model(RAW[:num_rows])
    assert (outputs.shape, outputs.dtype) == ((num_rows, 10), np.float32)
    normal = ((RAW[:num_rows] - mean) / std).astype(np.float32)
    np.testing.assert_allclose(outputs, run(normal), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model(input=RAW[:num_rows]), outputs)


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
    assert model.columns == {"input": (1, 8, 8)}
    assert model.signature == Signature(inputs=(Input(shape=(1, 8, 8)),), output_shape=(10,))
    assert model.engine["_target_"].endswith("OnnxRuntime")
    assert "engine=onnxruntime" in model.provenance["overrides"]


WRONG = {
    "one row without its batch": RAW[0],
    "other sizes": np.zeros((2, 1, 8, 9), np.float32),
    "flat rows": np.zeros((2, 64), np.float32),
    "a number": np.array(1.0),
    "a list": RAW.tolist(),
    "nothing": None,
}


@pytest.mark.parametrize("rows", WRONG.values(), ids=WRONG)
def test_refuses_other_rows_in_one_line_that_says_the_shape(model: Any, rows: Any) -> None:
    with pytest.raises(HastenError, match=r"\(rows, 1, 8, 8\)") as caught:
        model(rows)
    assert "\n" not in str(caught.value)


def test_refuses_no_rows(model: Model) -> None:
    with pytest.raises(HastenError, match=r"^the model takes at least one row, got none$"):
        model(RAW[:0])


@pytest.mark.parametrize("dtype", ["complex64", "bool", "U1", "object"])
def test_refuses_what_is_no_number_in_one_line(model: Any, dtype: str) -> None:
    with pytest.raises(HastenError, match=f"got dtype .*{np.dtype(dtype).name[:4]}|got dtype <U1") as caught:
        model(np.zeros((2, 1, 8, 8), np.float32).astype(dtype))
    assert "\n" not in str(caught.value)


def test_a_model_without_preprocessing_takes_rows_as_they_are(parts: Parts, tmp_path: Path) -> None:
    parts.described["transforms"] = []
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


def test_a_transform_is_code_too(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_step.py").write_text(
        "from hasten.core.interfaces import Transform\n\n"
        "class Theirs(Transform):\n    def __call__(self, columns):\n        return columns\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for target, told in (
        ("their_step.Theirs", r"wants code of the package 'their_step': load\(\.\.\., trust=\['their_step'\]\)"),
        ("os.system", r"trust=\['os'\]"),
        ("hasten.notebook.run", "hasten.notebook.run is no transform of hasten"),
    ):
        parts.described["transforms"] = [{"_target_": target}]
        parts.deploy(tmp_path / target)
        with pytest.raises(HastenError, match=told):
            hasten.load(tmp_path / target)
    rows = RAW.astype(np.float32)
    run = construct(parts.described["engine"], "engine").load(parts.compiled)
    theirs = hasten.load(tmp_path / "their_step.Theirs", trust=["their_step"])
    np.testing.assert_array_equal(theirs(rows), run(rows))


def test_tells_people_what_it_is(parts: Parts, tmp_path: Path) -> None:
    parts.deploy(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "# Digits\n"


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


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}', '{"format": 2}', '{"format": 999}'])
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


TEXTS = ["good", "bad bad", "good bad odd", "", "bad good bad good bad good bad good"]
IDS = [[2, 0, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0], [2, 3, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [3, 2] * 3]
SIZES = np.arange(10.0).reshape(5, 2)
Read = tuple[torch.nn.Module, Graph, Columns]


@pytest.fixture(scope="session")
def compiled_reader(reader: Read, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    OnnxRuntime().compile(reader[1], folder)
    return folder


def read_by(reader: Read, compiled: Path, folder: Path, columns: dict[str, Any], transforms: list[Any]) -> Model:
    deploy(
        compiled,
        folder,
        columns=columns,
        signature=reader[1].signature,
        engine={"_target_": "hasten.engines.onnxruntime.OnnxRuntime"},
        transforms=[node(transform) for transform in transforms],
        provenance={},
        card="",
    )
    return hasten.load(folder)


@pytest.fixture
def texts(reader: Read, compiled_reader: Path, tmp_path: Path) -> Model:
    """Takes texts and numbers; the second transform knows the training rows."""
    tokens = Tokens(column="text", length=6, vocabulary=("good", "bad"))
    standardize = Standardize().fit({"size": SIZES})
    columns = {"text": "text", "size": (2,)}
    return read_by(reader, compiled_reader, tmp_path / "model", columns, [tokens, standardize])


def test_texts_and_numbers_go_in_raw(reader: Read, texts: Model) -> None:
    normal = ((SIZES - SIZES.mean(0)) / SIZES.std(0)).astype(np.float32)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        expected = reader[0](ids=ids, mask=(ids > 0).long(), size=torch.from_numpy(normal)).numpy()
    np.testing.assert_allclose(texts(TEXTS, SIZES), expected, rtol=1e-4, atol=1e-5)
    for again in (
        texts(size=SIZES, text=TEXTS),
        texts(tuple(TEXTS), size=SIZES),
        texts(np.array(TEXTS), SIZES),
        texts(np.array(TEXTS, dtype=object), SIZES.astype(np.float32)),
    ):
        np.testing.assert_array_equal(again, texts(TEXTS, SIZES))


CALLS = [
    ((), {}, "the model takes text, size, got nothing"),
    ((TEXTS,), {}, "the model takes text, size, got 1 by place"),
    ((TEXTS, SIZES, SIZES), {}, "the model takes text, size, got 3 by place"),
    ((TEXTS, SIZES), {"size": SIZES}, "the model takes text, size, got 2 by place, size"),
    ((TEXTS,), {"sizes": SIZES}, "the model takes text, size, got 1 by place, sizes"),
    (("good", SIZES), {}, "text of the model takes a list of str, one a row, got str"),
    ((None, SIZES), {}, "text of the model takes a list of str, one a row, got NoneType"),
    ((iter(TEXTS), SIZES), {}, "text of the model takes a list of str, one a row, got list_iterator"),
    ((["good", b"bad", 3], SIZES), {}, "text of the model takes a list of str, one a row, got a list with bytes, int"),
    ((np.zeros((5, 2)), SIZES), {}, "text of the model takes a list of str, one a row, got ndarray"),
    (([], SIZES), {}, "text of the model takes at least one row, got none"),
    ((TEXTS[:3], SIZES), {}, "the model takes as many rows of each, got 3 of text, 5 of size"),
    ((TEXTS, SIZES[:, :1]), {}, r"size of the model takes rows of shape (rows, 2), got (5, 1)"),
    ((TEXTS, SIZES.tolist()), {}, r"size of the model takes a NumPy array of shape (rows, 2), got list"),
]


@pytest.mark.parametrize(("rows", "named", "told"), CALLS, ids=[told for _, _, told in CALLS])
def test_refuses_a_wrong_call_in_one_line_that_names_the_column(
    texts: Model, rows: tuple[Any, ...], named: dict[str, Any], told: str
) -> None:
    with pytest.raises(HastenError) as caught:
        texts(*rows, **named)
    assert str(caught.value) == told


def test_rows_that_come_as_the_model_takes_them_may_be_shorter(
    reader: Read, compiled_reader: Path, tmp_path: Path
) -> None:
    module, graph, rows = reader
    columns = {each.name: each.shape for each in graph.signature.inputs}
    model = read_by(reader, compiled_reader, tmp_path / "model", columns, [])
    for length in (1, 4, 6):
        shorter = {name: values[:, :length] if name != "size" else values for name, values in rows.items()}
        with torch.no_grad():
            expected = module(**{name: torch.from_numpy(values) for name, values in shorter.items()}).numpy()
        np.testing.assert_allclose(model(**shorter), expected, rtol=1e-4, atol=1e-5)
    longer = {name: np.repeat(values, 2, axis=1) if name != "size" else values for name, values in rows.items()}
    with pytest.raises(HastenError, match=r"^ids of the model takes rows of shape \(rows, 6\), got \(5, 12\)$"):
        model(**longer)
    with pytest.raises(HastenError, match=r"^size of the model takes rows of shape \(rows, 2\), got \(5, 1\)$"):
        model(rows["ids"], rows["mask"], rows["size"][:, :1])


def test_bytes_are_taken_as_a_list_or_decoded_already(reader: Read, compiled_reader: Path, tmp_path: Path) -> None:
    model = read_by(reader, compiled_reader, tmp_path / "model", {"image": "bytes"}, [])
    with pytest.raises(HastenError, match=r"^the model takes a list of bytes, one a row, got a list with str$"):
        model(["no image"])
    with pytest.raises(HastenError, match=r"^the model takes a list of bytes, one a row, got bytes$"):
        model(b"one image")


def test_a_model_may_be_called_by_many_threads_at_once() -> None:
    """The engine behind it need not stand that: only one call is in it at a time, unless it says that it does."""
    inside, most = [], []

    def runner(rows: NDArray[Any]) -> NDArray[Any]:
        inside.append(rows)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return rows

    signature = Signature(inputs=(Input(shape=(2,)),), output_shape=(2,))
    plain: dict[str, Any] = {"columns": {"input": (2,)}, "signature": signature, "engine": {}, "provenance": {}}
    model = Model(**plain, transforms=(), runner=runner)
    requests = [np.full((1, 2), number, np.float32) for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(model, requests))
    assert all((given == got).all() for given, got in zip(requests, outputs, strict=True))
    assert max(most) == 1

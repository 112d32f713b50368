"""The deployable artefact: a folder of data that `hasten.load` turns into a callable.

`model.json` holds the signature, the preprocessing, the engine with its settings and the provenance; beside it lies
what the engine compiled. Nothing in it is executed when it is read: graphs, weights and JSON.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from hasten.core.construct import construct, locate
from hasten.core.errors import ConfigError, HastenError
from hasten.core.files import read_json, write_text
from hasten.core.interfaces import Columns, Engine, Runner, Signature, Stream, Transform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODEL = "model.json"
FORMAT = 2
SCHEDULE = "schedule.json"
"""Beside what several devices compiled: which of them does what, and their engines."""
BOOK_KEEPING = (
    "stage.json",
    "compiled.json",
    "engine.json",
    "notes.json",
    "profiled.pt2",
    "placement.json",
    "resume*",
)
"""What lies beside a compiled model in the store and is not deployed."""
OUR_ENGINES, OUR_MODELS, OUR_TRANSFORMS = "hasten.engines.", "hasten.models.", "hasten.data.transforms."


@dataclass(frozen=True, kw_only=True)
class Model:
    """A deployed model: raw rows in, outputs (B, *output_shape) as float32 out.

    It is called with one argument a column, in order or by name: numbers as arrays (B, ...), texts and encoded images
    or sounds as lists of `str` or `bytes`.

    Attributes:
        columns: of the raw rows: name -> shape of one row, or `text` or `bytes`.
        signature: of the model behind the preprocessing, per row.
        engine: name of the engine and its settings.
        provenance: what it was made from and what was measured.
        transforms: the preprocessing, fitted on the training rows.
        concurrent: whether the runner may be called by several threads at once; otherwise they wait for one another, so
            that the model itself may be called by any number of them.
    """

    columns: Mapping[str, tuple[int, ...] | str]
    signature: Signature
    engine: Mapping[str, Any]
    provenance: Mapping[str, Any]
    transforms: Sequence[Transform]
    runner: Runner
    concurrent: bool = False
    _lock: RLock = field(default_factory=RLock, repr=False, compare=False)

    def __call__(self, *rows: Any, **named: Any) -> NDArray[np.float32]:
        """Preprocesses and runs the rows.

        Raises:
            HastenError: the rows' number, shape or type is not what the model takes.
        """
        with self._lock if "text" in self.columns.values() else nullcontext():  # tokenizers have a state of their own
            inputs = self._prepared(rows, named)
        with nullcontext() if self.concurrent else self._lock:
            outputs: NDArray[np.float32] = self.runner(*inputs)
        return outputs

    def stream(self, requests: Iterable[Any]) -> Iterator[NDArray[np.float32]]:
        """The outputs of many requests in their order; an engine with several devices works on several at once.

        Args:
            requests: each the rows of one, by place in a tuple or by name in a dict, or the only column as it is. No
                more of them are taken than are worked on.

        Raises:
            HastenError: as of a call, for the request that is due.
        """
        prepared = (self._prepared(*_arguments(request)) for request in requests)
        if isinstance(self.runner, Stream):
            yield from self.runner.stream(prepared)
        else:
            for inputs in prepared:
                yield self.runner(*inputs)

    def _prepared(self, rows: Sequence[Any], named: Mapping[str, Any]) -> list[NDArray[Any]]:
        """What the engine takes for the raw rows, in the order of the signature."""
        import numpy as np

        columns: Columns = self._checked(self._by_name(rows, named))
        for transform in self.transforms:
            columns = transform(columns)
        for each in self.signature.inputs:
            if each.dtype == "int64" and columns[each.name].dtype.kind == "f":
                raise HastenError(f"{self._who(each.name)} takes whole numbers, got {columns[each.name].dtype}")
        return [np.ascontiguousarray(columns[each.name], dtype=each.dtype) for each in self.signature.inputs]

    def _by_name(self, rows: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        given = {**dict(zip(self.columns, rows, strict=False)), **named}
        if len(rows) + len(named) != len(self.columns) or given.keys() != self.columns.keys():
            got = ", ".join([*(f"{len(rows)} by place" for _ in rows[:1]), *named]) or "nothing"
            raise HastenError(f"the model takes {', '.join(self.columns)}, got {got}")
        return given

    def _checked(self, given: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        checked = {}
        for name, shape in self.columns.items():
            rows = given[name]
            checked[name] = (
                self._objects(name, rows, shape) if isinstance(shape, str) else self._numbers(name, rows, shape)
            )
            if len(checked[name]) == 0:
                raise HastenError(f"{self._who(name)} takes at least one row, got none")
        if len({len(values) for values in checked.values()}) > 1:
            counts = ", ".join(f"{len(values)} of {name}" for name, values in checked.items())
            raise HastenError(f"the model takes as many rows of each, got {counts}")
        return checked

    def _objects(self, name: str, rows: Any, kind: str) -> NDArray[Any]:
        import numpy as np

        if isinstance(rows, np.ndarray) and rows.dtype.kind in "fiu" and kind == "bytes":
            return rows  # decoded already: the transform says whether it takes them
        wanted = str if kind == "text" else bytes
        several = isinstance(rows, list | tuple) or (isinstance(rows, np.ndarray) and rows.ndim == 1)
        strangers = {type(row).__name__ for row in rows if not isinstance(row, wanted)} if several else set()
        if not several or strangers:
            given = f"a list with {', '.join(sorted(strangers))}" if several else type(rows).__name__
            raise HastenError(f"{self._who(name)} takes a list of {wanted.__name__}, one a row, got {given}")
        return np.array([*rows, None], dtype=object)[:-1]  # the None keeps NumPy from looking into the rows

    def _numbers(self, name: str, rows: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        import numpy as np

        wanted = f"(rows, {', '.join(map(str, shape))})" if shape else "(rows,)"
        if not isinstance(rows, np.ndarray):
            raise HastenError(f"{self._who(name)} takes a NumPy array of shape {wanted}, got {type(rows).__name__}")
        if rows.dtype.kind not in "fiu":
            raise HastenError(f"{self._who(name)} takes numbers (float or integer arrays), got dtype {rows.dtype}")
        dynamic = next((each.dynamic for each in self.signature.inputs if each.name == name), ())
        if not _fits(rows.shape, shape, dynamic):
            raise HastenError(f"{self._who(name)} takes rows of shape {wanted}, got {rows.shape}")
        return rows

    def _who(self, name: str) -> str:
        return "the model" if len(self.columns) == 1 else f"{name} of the model"


def _arguments(request: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A request as the arguments of a call."""
    if isinstance(request, Mapping):
        return (), request
    return (request if isinstance(request, tuple) else (request,)), {}


def _fits(given: tuple[int, ...], row: tuple[int, ...], dynamic: Sequence[int]) -> bool:
    """Whether an array of rows has the shape of the row, or less along dynamic axes."""
    if len(given) != len(row) + 1:
        return False
    return all(
        size == most or (axis in dynamic and 0 < size < most)
        for axis, (size, most) in enumerate(zip(given[1:], row, strict=True))
    )


def deployable_bytes(compiled: Path) -> int:
    """Size on disk of what an engine compiled and a deployed model needs."""
    files = [path for path in compiled.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if not any(path.match(pattern) for pattern in BOOK_KEEPING))


def deploy(
    compiled: Path,
    folder: Path,
    *,
    columns: Mapping[str, Sequence[int] | str],
    signature: Signature,
    engine: Mapping[str, Any],
    transforms: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    card: str,
) -> None:
    """Copies what an engine compiled into `folder` and writes its `model.json`; the folder appears whole or not at all.

    Args:
        columns: of the raw rows, as of `Model`.
        engine: the engine's config node, `_target_` and settings.
        transforms: config nodes of the fitted preprocessing.
        card: what people should know of the model, in Markdown; becomes `README.md`.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(compiled, aside, ignore=shutil.ignore_patterns(*BOOK_KEEPING))
    description = {
        "format": FORMAT,
        "signature": signature.to_dict(),
        "preprocessing": {
            "columns": {name: _plain(shape) for name, shape in columns.items()},
            "transforms": [dict(node) for node in transforms],
        },
        "engine": dict(engine),
        "provenance": dict(provenance),
    }
    # Keys unsorted: columns go in by their place.
    write_text(aside / MODEL, json.dumps(description, indent=1, ensure_ascii=False) + "\n")
    write_text(aside / "README.md", card)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load(path: str | Path, trust: Sequence[str] = ()) -> Model:
    """Loads a deployed model with the engine and the settings that won.

    Args:
        path: the `model/` folder of a run.
        trust: top-level packages, beside hasten, whose code the artefact may name (an engine of yours); `native code`
            for an artefact that holds compiled machine code.

    Raises:
        HastenError: it is no such folder, names code that is not trusted, or the engine is not there.
    """
    folder = Path(path)
    description = _description(folder)
    node, preprocessing = description["engine"], description["preprocessing"]
    _check_trusted(folder, str(node["_target_"]), OUR_ENGINES, "engine", trust)
    for each in preprocessing["transforms"]:
        _check_trusted(folder, str(each["_target_"]), OUR_TRANSFORMS, "transform", trust)
    # Only where the module itself is run: other engines run a graph.
    for file in sorted(folder.rglob("module.json")):
        arch = read_json(file)["arch"]
        _check_trusted(folder, str(arch["_target_"]), OUR_MODELS, "model", trust)
    engine, transforms = _constructed(folder, node, "engine"), preprocessing["transforms"]
    if not isinstance(engine, Engine):
        raise HastenError(f"{folder}: {node['_target_']} is no engine")
    native = engine.native_code
    for part in _parts(folder):
        _check_trusted(folder, str(part["_target_"]), OUR_ENGINES, "engine", trust)
        native = native or bool(getattr(_constructed(folder, part, "engine"), "native_code", False))
    if native and "native code" not in trust:
        raise HastenError(
            f"{folder} holds compiled native code, which runs when it is loaded: load(..., trust=['native code']) if "
            "you trust who made it"
        )
    columns = preprocessing["columns"]
    return Model(
        columns={name: shape if isinstance(shape, str) else tuple(shape) for name, shape in columns.items()},
        signature=Signature.from_dict(description["signature"]),
        engine=node,
        provenance=description["provenance"],
        transforms=tuple(_constructed(folder, each, "transform") for each in transforms),
        runner=engine.load(folder),
        concurrent=engine.concurrent,
    )


def _parts(folder: Path) -> list[dict[str, Any]]:
    """Config nodes of the engines of several devices, where a schedule names them."""
    file = folder / SCHEDULE
    return [device["engine"] for device in read_json(file)["devices"]] if file.is_file() else []


def _plain(shape: Sequence[int] | str) -> list[int] | str:
    return shape if isinstance(shape, str) else list(shape)


def _constructed(folder: Path, node: Mapping[str, Any], key: str) -> Any:
    try:
        return construct(node, key)
    except ConfigError as error:
        raise HastenError(f"{folder}: {error}") from error


def _description(folder: Path) -> dict[str, Any]:
    file = folder / MODEL
    if not file.is_file():
        raise HastenError(f"{folder} holds no {MODEL}: give the model/ folder that a run left")
    try:
        description = read_json(file)
    except ValueError as error:
        raise HastenError(f"{file} is broken: {error}") from error
    wanted = ("signature", "preprocessing", "engine", "provenance")
    if not isinstance(description, dict) or description.get("format", FORMAT) != FORMAT:
        raise HastenError(f"{file} is not of format {FORMAT}, which this version of hasten reads")
    if missing := [name for name in wanted if not isinstance(description.get(name), dict)]:
        raise HastenError(f"{file} is broken: it has no {', '.join(missing)}")
    return description


def _check_trusted(folder: Path, target: str, ours: str, what: str, trust: Sequence[str]) -> None:
    """Refuses code that loading would run, unless it is an engine or model of hasten or of a trusted package.

    Not everything of hasten is harmless: `hasten.run` would take any class that the artefact names, and beside the
    engines lie functions that write files.
    """
    package = target.partition(".")[0]
    if package in trust or (target.startswith(ours) and _is_class_of(folder, target, ours, what)):
        return
    if package == "hasten":
        raise HastenError(f"{folder}: {target} is no {what} of hasten")
    raise HastenError(f"{folder} wants code of the package {package!r}: load(..., trust=[{package!r}]) if you trust it")


def _is_class_of(folder: Path, target: str, ours: str, what: str) -> bool:
    try:
        component = locate(target, what)
    except ConfigError as error:
        raise HastenError(f"{folder}: {error}") from error
    return inspect.isclass(component) and component.__module__.startswith(ours)

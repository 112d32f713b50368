"""The deployable artefact: a folder of data that `hasten.load` turns into a callable.

`model.json` holds the signature, the preprocessing, the engine with its settings and the provenance; beside it lies
what the engine compiled. Nothing in it is executed when it is read: graphs, weights and JSON.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.core.construct import construct
from hasten.core.errors import ConfigError, HastenError
from hasten.core.files import read_json, write_json
from hasten.core.interfaces import Engine, Runner, Signature

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODEL = "model.json"
FORMAT = 1
BOOK_KEEPING = ("stage.json", "compiled.json", "engine.json", "resume*")
"""What lies beside a compiled model in the store and is not deployed."""
OUR_ENGINES, OUR_MODELS = "hasten.engines.", "hasten.models."


@dataclass(frozen=True, kw_only=True)
class Model:
    """A deployed model. Call it with raw rows (B, *input_shape); it gives outputs (B, *output_shape) as float32.

    Attributes:
        signature: shapes per row.
        engine: name of the engine and its settings.
        provenance: what it was made from and what was measured.
    """

    signature: Signature
    engine: Mapping[str, Any]
    provenance: Mapping[str, Any]
    mean: NDArray[np.float32] | None
    std: NDArray[np.float32] | None
    runner: Runner

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Preprocesses and runs the rows.

        Raises:
            HastenError: the rows' shape or type is not what the model takes.
        """
        import numpy as np

        checked = self._checked(rows)
        if self.mean is not None and self.std is not None:
            checked = (checked - self.mean) / self.std
        outputs: NDArray[np.float32] = self.runner(np.ascontiguousarray(checked, dtype=np.float32))
        return outputs

    def _checked(self, rows: Any) -> NDArray[Any]:
        import numpy as np

        wanted = f"(rows, {', '.join(map(str, self.signature.input_shape))})"
        if not isinstance(rows, np.ndarray):
            raise HastenError(f"the model takes a NumPy array of shape {wanted}, got {type(rows).__name__}")
        if rows.dtype.kind not in "fiu":
            raise HastenError(f"the model takes numbers (float or integer arrays), got dtype {rows.dtype}")
        if rows.shape[1:] != self.signature.input_shape or rows.ndim == 0:
            raise HastenError(f"the model takes rows of shape {wanted}, got {rows.shape}")
        if len(rows) == 0:
            raise HastenError(f"the model takes at least one row of shape {wanted}, got none")
        return rows.astype(np.float32, copy=False)


def deployable_bytes(compiled: Path) -> int:
    """Size on disk of what an engine compiled and a deployed model needs."""
    files = [path for path in compiled.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if not any(path.match(pattern) for pattern in BOOK_KEEPING))


def deploy(
    compiled: Path,
    folder: Path,
    *,
    signature: Signature,
    engine: Mapping[str, Any],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    provenance: Mapping[str, Any],
) -> None:
    """Copies what an engine compiled into `folder` and writes its `model.json`; the folder appears whole or not at all.

    Args:
        mean: per channel, subtracted from the rows; None where they go in as they are.
        engine: the engine's config node, `_target_` and settings.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(compiled, aside, ignore=shutil.ignore_patterns(*BOOK_KEEPING))
    write_json(
        aside / MODEL,
        {
            "format": FORMAT,
            "signature": signature.to_dict(),
            "preprocessing": {"mean": mean, "std": std},
            "engine": dict(engine),
            "provenance": dict(provenance),
        },
    )
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load(path: str | Path, trust: Sequence[str] = ()) -> Model:
    """Loads a deployed model with the engine and the settings that won.

    Args:
        path: the `model/` folder of a run.
        trust: top-level packages, beside hasten, whose code the artefact may name (an engine of yours).

    Raises:
        HastenError: it is no such folder, names code that is not trusted, or the engine is not there.
    """
    import numpy as np

    folder = Path(path)
    description = _description(folder)
    node = description["engine"]
    _check_trusted(folder, str(node["_target_"]), OUR_ENGINES, "engine", trust)
    # Only where the module itself is run: other engines run a graph.
    if (folder / "module.json").is_file():
        arch = read_json(folder / "module.json")["arch"]
        _check_trusted(folder, str(arch["_target_"]), OUR_MODELS, "model", trust)
    try:
        engine = construct(node, "engine")
    except ConfigError as error:
        raise HastenError(f"{folder}: {error}") from error
    if not isinstance(engine, Engine):
        raise HastenError(f"{folder}: {node['_target_']} is no engine")
    signature = Signature.from_dict(description["signature"])
    extra_axes = (1,) * (len(signature.input_shape) - 1)
    mean, std = (
        None if values is None else np.asarray(values, np.float32).reshape(-1, *extra_axes)
        for values in (description["preprocessing"]["mean"], description["preprocessing"]["std"])
    )
    return Model(
        signature=signature,
        engine=node,
        provenance=description["provenance"],
        mean=mean,
        std=std,
        runner=engine.load(folder),
    )


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

    Not everything of hasten is harmless: `hasten.run` would take any class that the artefact names.
    """
    package = target.partition(".")[0]
    if package in trust or target.startswith(ours):
        return
    if package == "hasten":
        raise HastenError(f"{folder}: {target} is no {what} of hasten")
    raise HastenError(f"{folder} wants code of the package {package!r}: load(..., trust=[{package!r}]) if you trust it")

"""A deployed folder in MLflow's own format, with its signature and an example of what goes in."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hasten.core.files import read_json


def save(folder: Path, path: Path, run: str, model: Any) -> Path:
    """Writes what MLflow keeps of a deployed folder; nothing is pickled.

    Args:
        path: of the folder that is written.
        run: id of the run that made it.
        model: MLflow's entry for it.
    """
    import mlflow
    from mlflow.models import Model

    with warnings.catch_warnings():
        # It takes type hints for a schema and complains of its own; the logged signature is what checks the rows.
        warnings.filterwarnings("ignore", message="(?s).*[Tt]ype hint.*", category=UserWarning)
        # It wants an example even where texts or encoded images go in, of which there is no neutral one.
        warnings.filterwarnings("ignore", message="(?s).*input example was not provided.*", category=UserWarning)
        mlflow.pyfunc.save_model(
            path=str(path),
            mlflow_model=Model(
                artifact_path=model.artifact_location, model_uuid=model.model_id, model_id=model.model_id, run_id=run
            ),
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"model": str(folder)},
            # MLflow runs code of the model's author anyway; what this run itself has run may be run again.
            model_config={"trust": [*_packages(folder), "native code"]},
            signature=_signature(folder),
            input_example=_example(folder),
            pip_requirements=[f"hasten=={version('hasten')}"],
        )
    return path


def _signature(folder: Path) -> Any:
    """Of a deployed folder, in MLflow's terms."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    described = read_json(folder / "model.json")
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, *described["signature"]["output_shape"]))])
    columns = described["preprocessing"]["columns"]
    if any(isinstance(shape, str) for shape in columns.values()):
        kinds = {"text": "string", "bytes": "binary"}
        specs = [ColSpec(kinds[shape], name) for name, shape in columns.items() if isinstance(shape, str)]
        return ModelSignature(Schema(specs), outputs) if len(specs) == len(columns) else None
    types = {each["name"]: each["dtype"] for each in described["signature"]["inputs"]}
    tensors = [
        # A single input goes in without its name.
        TensorSpec(np.dtype(types.get(name, "float32")), (-1, *shape), name if len(columns) > 1 else None)
        for name, shape in columns.items()
    ]
    return ModelSignature(Schema(tensors), outputs)


def _packages(folder: Path) -> list[str]:
    """Top-level packages of the code that the deployed folder names."""
    described = read_json(folder / "model.json")
    named = [described["engine"]["_target_"], *(node["_target_"] for node in described["preprocessing"]["transforms"])]
    if (folder / "module.json").is_file():
        named.append(read_json(folder / "module.json")["arch"]["_target_"])
    return sorted({str(target).partition(".")[0] for target in named} - {"hasten"})


def _example(folder: Path) -> Any:
    """One row of zeros, as it goes into the deployed model; None where texts or bytes go in."""
    import numpy as np

    described = read_json(folder / "model.json")
    columns = described["preprocessing"]["columns"]
    if any(isinstance(shape, str) for shape in columns.values()):
        return None
    types = {each["name"]: each["dtype"] for each in described["signature"]["inputs"]}
    rows = {name: np.zeros((1, *shape), types.get(name, "float32")) for name, shape in columns.items()}
    return rows if len(rows) > 1 else next(iter(rows.values()))

"""The deployed model as MLflow runs it. MLflow keeps this file as code beside the model, so that nothing is pickled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE


class Served(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Raw rows in, outputs out, through `hasten.load`. Rows that the model does not take are the caller's mistake: the
    reason is told, and a server answers 400."""

    def load_context(self, context: Any) -> None:
        from hasten.artefacts.deployed import load

        self.model = load(context.artifacts["model"], trust=context.model_config["trust"])
        _answer_with_a_reason()

    # A bare np.ndarray is the one hint that MLflow leaves alone; the logged signature is what checks the rows.
    def predict(
        self,
        context: Any,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> np.ndarray[Any, Any]:
        from hasten.core.errors import HastenError

        rows, named = _columns(model_input)
        try:
            outputs = self.model(*rows, **named)
        except (HastenError, ValueError, TypeError) as error:
            raise MlflowException(" ".join(str(error).split()), INVALID_PARAMETER_VALUE) from error
        if not np.isfinite(outputs).all():
            given = {**dict(zip(self.model.columns, rows, strict=False)), **named}
            if strange := [name for name, values in given.items() if not _finite(values)]:
                raise MlflowException(f"{', '.join(strange)} must be finite numbers", INVALID_PARAMETER_VALUE)
        return outputs


def _columns(model_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The rows by place, or by name: several columns come as a dictionary of arrays, texts as a data frame."""
    if isinstance(model_input, np.ndarray):
        return (model_input,), {}
    columns = {str(name): model_input[name] for name in model_input}
    return (), {name: list(rows) if rows.dtype == object else np.asarray(rows) for name, rows in columns.items()}


def _finite(values: Any) -> bool:
    return not (isinstance(values, np.ndarray) and values.dtype.kind == "f") or bool(np.isfinite(values).all())


def _answer_with_a_reason() -> None:
    """Has MLflow's scoring server, if this is one, say what is wrong with requests that it stumbles over itself.

    MLflow 3.17 answers 500 to a request without a content type and to arrays that it can not make out of the JSON,
    because only some of its own errors are told.
    """
    server = sys.modules.get("mlflow.pyfunc.scoring_server")
    answer: Callable[..., Any] | None = getattr(server, "invocations", None)
    if server is None or answer is None or hasattr(answer, "__wrapped__"):
        return

    @wraps(answer)
    def told(data: Any, content_type: str | None, *others: Any, **named: Any) -> Any:
        try:
            return answer(data, content_type or "", *others, **named)
        except MlflowException:
            raise
        except Exception as error:
            raise MlflowException(f"the request can't be read: {_reason(error)}", INVALID_PARAMETER_VALUE) from error

    vars(server)["invocations"] = told


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


mlflow.models.set_model(Served())

"""The deployed model as MLflow runs it. MLflow keeps this file as code beside the model, so that nothing is pickled."""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np


class Served(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Raw rows in, outputs out, through `hasten.load`."""

    def load_context(self, context: Any) -> None:
        from hasten.artefacts.deployed import load

        self.model = load(context.artifacts["model"], trust=context.model_config["trust"])

    # A bare np.ndarray is the one hint that MLflow leaves alone; the logged signature is what checks the rows.
    def predict(
        self,
        context: Any,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> np.ndarray[Any, Any]:
        if isinstance(model_input, np.ndarray):
            return self.model(model_input)
        # Several columns come as a dictionary of arrays, texts and bytes as a data frame.
        columns = {str(name): model_input[name] for name in model_input}
        return self.model(
            **{name: list(rows) if rows.dtype == object else np.asarray(rows) for name, rows in columns.items()}
        )


mlflow.models.set_model(Served())

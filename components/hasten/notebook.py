"""The same pipelines from Python: `hasten.optimize(["data=npz", "data.path=rows.npz"])`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from hasten.core import schema
from hasten.core.trial import Result, TrainingResult
from hasten.session import Session


def optimize(overrides: Sequence[str] = (), folder: str | Path | None = None) -> Result | TrainingResult:
    """Goes round the loop, as `hasten` does on the command line.

    Args:
        overrides: as on the command line, `key=value`.
        folder: where to leave the results; `outputs/<date>/<time>` if it is not given.

    Raises:
        ConfigError: the overrides make no sense.
        HastenError: the baseline can't be built or measured.
    """
    from hasten.pipelines.optimize import optimize as pipeline

    return _run(pipeline, overrides, folder)


def run(overrides: Sequence[str] = (), folder: str | Path | None = None) -> Result | TrainingResult:
    """Builds and measures one recipe, as `hasten run` does. Arguments and errors as of `optimize`."""
    from hasten.pipelines.run import run as pipeline

    return _run(pipeline, overrides, folder)


def _run(
    pipeline: Callable[[Session], Result | TrainingResult], overrides: Sequence[str], folder: str | Path | None
) -> Result | TrainingResult:
    now = datetime.now()
    with composing():
        return pipeline(Session.of(overrides, Path(folder or f"outputs/{now:%Y-%m-%d}/{now:%H-%M-%S}")))


@contextmanager
def composing() -> Iterator[None]:
    """Hydra with the packaged configs, or as it runs already."""
    schema.register()
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
            yield

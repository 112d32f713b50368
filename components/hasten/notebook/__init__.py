"""The pipelines from Python, with objects of the process: `hasten.optimize(model=net, data=(images, labels))`.

What is given is kept below the store and named by overrides, as if it had been typed: arrays and the items of datasets
as files of rows, weights as safetensors, and the code that constructs a model as a Python module. So other processes
rebuild it, and so does the command line that a result names.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from hasten.core import schema
from hasten.core.errors import ConfigError
from hasten.core.recipe import Composer
from hasten.core.source import source_fingerprint
from hasten.core.store import GIVEN, code_folder
from hasten.core.trial import Result, TrainingResult
from hasten.notebook.outcome import Outcome, Report
from hasten.session import Session

if TYPE_CHECKING:
    from torch import nn

    from hasten.notebook.rows import Rows

log = logging.getLogger(__name__)

__all__ = ["Outcome", "Report", "composing", "optimize", "run"]


def optimize(
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
    *,
    model: nn.Module | Callable[..., nn.Module] | None = None,
    data: Rows | None = None,
) -> Outcome:
    """Goes round the loop, as `hasten` does on the command line.

    Args:
        overrides: as on the command line, `key=value`.
        folder: where to leave the results; `outputs/<date>/<time>` if it is not given.
        model: what is to become fast. A module is taken as it is, with its weights (`model.training.epochs=5` trains it
            on). A class of modules, or a function that makes one, is constructed and trained: `input_shape` and
            `num_outputs` are passed where it takes them, other arguments by overrides, `+model.arch.channels=16`. Both
            may be defined in the notebook itself. None for the model that the overrides declare.
        data: the rows: a pair (inputs, targets) of arrays or tensors, where inputs may be a dict of several and targets
            None; a dict of such pairs or datasets by split (`train`, `validate`, `test`; one that is missing shares
            the rows of the one before it); a torch Dataset; or a LightningDataModule. None for the data that the
            overrides declare.

    Raises:
        ConfigError: the overrides make no sense, or what is given can't be rebuilt in another process.
        HastenError: the baseline can't be built or measured.
    """
    from hasten.pipelines.optimize import optimize as pipeline

    return _run(pipeline, overrides, folder, model, data)


def run(
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
    *,
    model: nn.Module | Callable[..., nn.Module] | None = None,
    data: Rows | None = None,
) -> Outcome:
    """Builds and measures one recipe, as `hasten run` does. Arguments and errors as of `optimize`."""
    from hasten.pipelines.run import run as pipeline

    return _run(pipeline, overrides, folder, model, data)


def _run(
    pipeline: Callable[[Session], Result | TrainingResult],
    overrides: Sequence[str],
    folder: str | Path | None,
    model: Any,
    data: Any,
) -> Outcome:
    if isinstance(overrides, str):
        raise ConfigError(f"overrides are a list of texts, got one text: [{overrides!r}]")
    now = datetime.now()
    # Modules of the user's own may have changed since the last call.
    source_fingerprint.cache_clear()
    with composing():
        session = Session.of(
            [*_told(overrides, model, data), *overrides], Path(folder or f"outputs/{now:%Y-%m-%d}/{now:%H-%M-%S}")
        )
        return Outcome(result=pipeline(session), folder=session.folder)


def _told(overrides: Sequence[str], model: Any, data: Any) -> list[str]:
    """The objects as overrides, after what they need has been written below the store."""
    said = {text.lstrip("+~").partition("=")[0] for text in overrides}
    for name, given in (("model", model), ("data", data)):
        if given is not None and name in said:
            raise ConfigError(f"{name} is given twice: as an object, and by the override {name}=...")
    if model is None and data is None:
        return []
    folder = Path(str(Composer.of(overrides).setting("store.folder"))) / GIVEN
    from hasten.notebook import modules, rows

    told: list[str] = []
    if data is not None:
        told += rows.kept(data, folder)
    if model is not None:
        if modules.trained(model) and data is not None and not rows.divided(data):
            log.warning("the model comes with its weights: if it has seen some of these rows, give data by split")
        code_folder(folder.parent).mkdir(parents=True, exist_ok=True)
        if (place := str(code_folder(folder.parent))) not in sys.path:
            sys.path.append(place)
        importlib.invalidate_caches()
        kept = modules.kept(model, folder)
        told += kept.overrides
        if "name" not in said:
            told.append(f"name={kept.name}")
    return told


@contextmanager
def composing() -> Iterator[None]:
    """Hydra with the packaged configs, or as it runs already."""
    schema.register()
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_module(config_module="hasten.conf", version_base="1.3"):
            yield

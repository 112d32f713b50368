"""What the layers inside a model give, on the way to its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.core.recipe import nearest

_LISTED = 12


class LayerOutputs:
    """Keeps what some layers of a model gave in its latest forward pass, until it is closed.

    Of a layer that gives several tensors (a recurrent one, a block of a transformer) it keeps the first; of one that
    runs several times, the last.

    Args:
        model: gets a forward hook on each of the layers.
        paths: of the layers, as `model.named_modules()` spells them.
        who: the model is, as error messages call it: `student` or `teacher`.

    Raises:
        ConfigError: the model has no such layer.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], who: str) -> None:
        self._paths, self._who = tuple(paths), who
        modules = {path: module for path, module in model.named_modules() if path}
        for path in paths:
            if path not in modules:
                raise ConfigError(f"the {who} has no layer {path!r}{_told(path, modules)} ({self._key})")
        self._given: dict[str, Tensor] = {}
        self._handles = [modules[path].register_forward_hook(self._keep(path)) for path in dict.fromkeys(paths)]

    def take(self) -> list[Tensor]:
        """The outputs (B, ...) in the order of the paths; they are forgotten with it.

        Raises:
            ConfigError: a layer did not run.
        """
        given, self._given = self._given, {}
        if idle := [path for path in self._paths if path not in given]:
            raise ConfigError(f"{', '.join(idle)} did not run for the {self._who}'s outputs ({self._key})")
        return [given[path] for path in self._paths]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def _key(self) -> str:
        return f"distillation.{self._who}_layers"

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            self._given[path] = _first_tensor(output)

        return hook


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


def _told(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The nearest name, or those of the outermost layers."""
    if hint := nearest(path, list(modules)):
        return hint
    outer = [name for name in modules if "." not in name]
    return f"; it has {', '.join(outer[:_LISTED])}{' ...' if len(outer) > _LISTED else ''} and what is in them"

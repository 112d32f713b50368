"""From a `_target_` in a config to the thing itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hasten.core.errors import ConfigError

STAGE_KEYS = frozenset(
    {
        "training",
        "split",
        "normalize",
        "transforms",
        "augment",
        "metrics",
        "min_integer_share",
        "checkpoint",
        "checkpoint_keys",
        "teachers",
        "checkpoints",
        "assistant",
        "search_seconds",
    }
)
"""Keys of a leaf that its stage reads; all others are arguments of the component."""


def locate(target: str, key: str) -> Any:
    """Imports the class or function that `target` names.

    Raises:
        ConfigError: it does not import, naming the key that asked for it.
    """
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"{key}._target_ must be a dotted path such as package.module.Class, got {target!r}")
    try:
        return getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}._target_={target} does not import: {error}") from error


def arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    """What a component is constructed with: the node without `_target_` and without what its stage reads."""
    return {name: value for name, value in node.items() if name != "_target_" and name not in STAGE_KEYS}


def construct(node: Mapping[str, Any], key: str) -> Any:
    """The component that a resolved config node declares; lists become tuples, as frozen dataclasses want them.

    Raises:
        ConfigError: it does not import or does not take these arguments.
    """
    component = locate(node["_target_"], key)
    frozen = {name: _freeze(value) for name, value in arguments(node).items()}
    try:
        return component(**frozen)
    except TypeError as error:
        raise ConfigError(f"{key}: {error}") from error


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value

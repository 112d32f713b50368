"""Module artefacts: a PyTorch model as data.

A folder holds `module.json` (the constructor and its arguments), `surgery.json` (what was cut out of it afterwards, in
order; only where something was) and `weights.safetensors` (every parameter and buffer).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hasten.core.construct import locate
from hasten.core.errors import ConfigError, HastenError

_SHOWN = 3


def build(
    arch: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int, *, seed: int, key: str = "model.arch"
) -> tuple[nn.Module, dict[str, Any]]:
    """Constructs a model for the data and tries it on two rows.

    Args:
        arch: `_target_` and the constructor's arguments; `input_shape` and `num_classes` are filled in where the
            constructor takes them and they are null or absent.
        input_shape: of one row.
        num_classes: of the data.
        seed: of the initial weights; torch's generator is left as it was.
        key: how the config names `arch`.

    Returns:
        The model in training mode, and `arch` as it was filled in.

    Raises:
        ConfigError: it can't be constructed, does not run on such rows, or does not give one output per class.
    """
    constructor = locate(arch["_target_"], key)
    filled = {**arch, **_arguments_from_data(constructor, arch, input_shape, num_classes)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _construct(constructor, filled, key)
    name = arch["_target_"].rpartition(".")[2]
    if any(is_lazy(tensor) for tensor in _tensors(module).values()):
        raise ConfigError(f"{key}: {name} has lazy layers, which can't be rebuilt from its arguments: give their sizes")
    _check_outputs(module, input_shape, num_classes, f"{key}: {name}")
    return module, filled


def save(folder: Path, arch: Mapping[str, Any], model: nn.Module, surgery: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes the artefact into an existing folder. The same model gives the same bytes.

    Args:
        arch: as `build` filled it in.
        surgery: steps from `resized`, oldest first, that lead from the constructed model to this one.

    Raises:
        HastenError: the model keeps state outside of its parameters and buffers.
    """
    from safetensors.torch import save_file

    strange = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if strange:
        raise HastenError(
            f"{type(model).__name__} can't be saved as data: its state_dict() has {_some(strange)}, no tensors"
        )
    (folder / "module.json").write_text(json.dumps({"arch": dict(arch)}, indent=1) + "\n")
    if surgery:
        (folder / "surgery.json").write_text(json.dumps([dict(step) for step in surgery]) + "\n")
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in _tensors(model).items()
    }
    save_file(weights, folder / "weights.safetensors")


def surgery(folder: Path) -> tuple[dict[str, Any], ...]:
    """The steps that lead from the constructed model to this artefact, oldest first."""
    file = folder / "surgery.json"
    return tuple(json.loads(file.read_text())) if file.exists() else ()


def rebuild(folder: Path, trusted: tuple[str, ...] | None = None) -> nn.Module:
    """The saved model in eval mode: the same outputs bit for bit, and it trains on.

    Args:
        trusted: packages or dotted paths whose classes may be constructed; None trusts whoever wrote the folder.

    Raises:
        ConfigError: the class is not trusted, does not import or refuses its arguments.
        HastenError: the weights don't fit the class.
    """
    from safetensors.torch import load_file

    arch = json.loads((folder / "module.json").read_text())["arch"]
    target, key = arch["_target_"], str(folder / "module.json")
    if trusted is not None and not any(target == path or target.startswith(f"{path}.") for path in trusted):
        raise ConfigError(f"{key}: {target} is not in a trusted package, which are {', '.join(trusted) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        module = _construct(locate(target, key), arch, key)
    for step in surgery(folder):
        _resize(module, step["resized"])
    weights, tensors = load_file(folder / "weights.safetensors"), _tensors(module)
    problems = _misfits({name: tensor.shape for name, tensor in tensors.items()}, weights)
    if problems:
        raise HastenError(f"{folder / 'weights.safetensors'} does not fit {target}: {'; '.join(problems)}")
    for name, tensor in tensors.items():
        tensor.data = weights[name].clone()
    return module.eval()


def resized(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """What changed in size between two states of one model, as JSON-able data that `rebuild` replays.

    Returns:
        module name -> `attributes` (plain ones that changed, such as `out_channels`) and `tensors` (shapes of the
        parameters and buffers that changed).

    Raises:
        ValueError: the two don't have the same modules.
    """
    old_modules, new_modules = dict(before.named_modules()), dict(after.named_modules())
    if old_modules.keys() != new_modules.keys():
        raise ValueError(f"modules were added or removed: {_some(sorted(old_modules.keys() ^ new_modules.keys()))}")
    changes = {}
    for name, new in new_modules.items():
        old_shapes, new_shapes = _shapes(old_modules[name]), _shapes(new)
        old_plain, new_plain = _plain_attributes(old_modules[name]), _plain_attributes(new)
        change = {
            "attributes": {key: value for key, value in new_plain.items() if old_plain.get(key) != value},
            "tensors": {key: shape for key, shape in new_shapes.items() if old_shapes.get(key) != shape},
        }
        if change["attributes"] or change["tensors"]:
            changes[name] = change
    return changes


def load_weights(model: nn.Module, file: Path, key: str = "model.checkpoint") -> None:
    """Loads trained weights into the model: all of them, and nothing else.

    Args:
        file: `.safetensors`, or a state dict that `torch.load(weights_only=True)` reads, at the top or under
            `state_dict`. Prefixes `module.`, `model.` and `_orig_mod.`, which wrappers leave, are stripped where that
            makes the names match.

    Raises:
        ConfigError: the file is missing, unreadable or does not fit the model.
    """
    weights = _read_weights(file, key)
    shapes = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    while weights.keys().isdisjoint(shapes) and (stripped := _stripped(weights)) is not None:
        weights = stripped
    # Counters of batches: absent from many checkpoints, and without effect unless a momentum is None.
    weights = {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")} | weights
    problems = _misfits(shapes, weights)
    if problems:
        raise ConfigError(*(f"{key}={file} does not fit {type(model).__name__}: {problem}" for problem in problems))
    model.load_state_dict(weights)


def _arguments_from_data(
    constructor: Any, arch: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int
) -> dict[str, Any]:
    try:
        parameters = inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        return {}
    known = {"input_shape": list(input_shape), "num_classes": num_classes}
    return {name: value for name, value in known.items() if name in parameters and arch.get(name) is None}


def _construct(constructor: Any, arch: Mapping[str, Any], key: str) -> nn.Module:
    arguments = {name: _as_tuples(value) for name, value in arch.items() if name != "_target_"}
    try:
        module = constructor(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {arch['_target_']} can't be constructed: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{key}._target_={arch['_target_']} gives a {type(module).__name__}, not a torch.nn.Module")
    return module


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _check_outputs(module: nn.Module, input_shape: tuple[int, ...], num_classes: int, who: str) -> None:
    try:
        with torch.no_grad():
            outputs = module.eval()(torch.zeros(2, *input_shape))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{who} does not run on rows of shape {input_shape}: {reason}") from error
    finally:
        module.train()
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 2:
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigError(f"{who} must give (2, classes) for 2 rows of shape {input_shape}, got {given}")
    if outputs.shape[1] != num_classes:
        raise ConfigError(
            f"{who} gives {outputs.shape[1]} outputs, data has {num_classes} classes (labels 0..{num_classes - 1}): "
            "make them equal"
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those that `state_dict` leaves out; a shared one once, by its first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in _own_tensors(module).items()}


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return {name: _as_lists(value) for name, value in public.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, (tuple, list)) else value


def _resize(module: nn.Module, changes: Mapping[str, Any]) -> None:
    """Gives modules the recorded sizes, and their tensors new, empty storage."""
    for name, change in changes.items():
        part = module.get_submodule(name)
        for attribute, value in change["attributes"].items():
            setattr(part, attribute, _as_tuples(value) if isinstance(getattr(part, attribute), tuple) else value)
        for attribute, shape in change["tensors"].items():
            old = getattr(part, attribute)
            new = old.new_empty(shape)
            setattr(part, attribute, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _misfits(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in shapes if name not in weights]
    unexpected = [name for name in weights if name not in shapes]
    misshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    return [f"{len(names)} {what}: {_some(names)}" for what, names in found.items() if names]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _read_weights(file: Path, key: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"{key}={file} does not exist")
    try:
        content = _load(file)
    except Exception as error:  # a damaged or foreign pickle may raise anything
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{key}={file} can't be read as .safetensors or as a state dict of tensors alone: {reason}"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{key}={file} holds no state dict: names with tensors, at the top or under state_dict")
    return dict(content)


def _load(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _stripped(weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Without the prefix that a wrapper gave to every name; None if there is none."""
    for prefix in ("module.", "model.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): value for name, value in weights.items()}
    return None

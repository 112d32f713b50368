"""Module artefacts: a PyTorch model as data.

A folder holds `module.json` (the constructor and its arguments), `surgery.json` (what was cut out of it afterwards, in
order; only where something was) and `weights.safetensors` (every parameter and buffer).
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hasten.core.construct import locate
from hasten.core.errors import ConfigError, HastenError
from hasten.core.interfaces import Input

_SHOWN, _LISTED = 3, 10
_ALIKE, _VERY_ALIKE = 0.5, 0.6
"""Likeness, in [0, 1], from which a name is suggested: of a tensor of the same shape, and of another."""


def build(
    arch: Mapping[str, Any],
    inputs: Sequence[Input],
    output_shape: tuple[int, ...] | None,
    *,
    seed: int,
    facts: Mapping[str, int] = MappingProxyType({}),
    key: str = "model.arch",
) -> tuple[nn.Module, dict[str, Any]]:
    """Constructs a model for the data and tries it on two rows.

    Args:
        arch: `_target_` and the constructor's arguments; `input_shape` (of the first input), `num_outputs` or
            `num_classes`, and what `facts` names are filled in where the constructor takes them and they are null or
            absent.
        inputs: of the data.
        output_shape: of one row, as the task wants it; None where the model decides.
        seed: of the initial weights; torch's generator is left as it was.
        facts: what the data's transforms know, such as `vocabulary_size`.
        key: how the config names `arch`.

    Returns:
        The model in training mode, and `arch` as it was filled in.

    Raises:
        ConfigError: it can't be constructed, does not run on such rows, or gives other outputs.
    """
    constructor = locate(arch["_target_"], key)
    known: dict[str, Any] = {"input_shape": list(inputs[0].shape), **facts}
    if output_shape is not None:
        known |= dict.fromkeys(("num_outputs", "num_classes"), math.prod(output_shape))
    filled = {**arch, **_arguments_from_data(constructor, arch, known)}
    _check_complete(constructor, filled, key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _construct(constructor, filled, key)
    name = arch["_target_"].rpartition(".")[2]
    if any(is_lazy(tensor) for tensor in _tensors(module).values()):
        raise ConfigError(f"{key}: {name} has lazy layers, which can't be rebuilt from its arguments: give their sizes")
    _check_outputs(module, inputs, output_shape, f"{key}: {name}")
    # What was read from a folder of the user's has to be rebuilt without it.
    portable: Callable[[], dict[str, Any]] | None = getattr(module, "portable_arguments", None)
    return module, filled | (portable() if portable else {})


def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Outputs of a model for one input, which goes in as it is, or for several, which go in by their names."""
    outputs: Tensor = model(*inputs.values()) if len(inputs) == 1 else model(**inputs)
    return outputs


def output_shape(model: nn.Module, inputs: Sequence[Input]) -> tuple[int, ...]:
    """What the model gives for one row."""
    training = model.training
    with torch.no_grad():
        outputs = forward(model.eval(), example(inputs))
    model.train(training)
    return tuple(outputs.shape[1:])


def example(inputs: Sequence[Input], rows: int = 2) -> dict[str, Tensor]:
    """Rows that every model for these inputs takes: ones, which are a known token, an open mask and a number.

    Two rows by default, because torch.export takes a batch of one for a constant.
    """
    return {each.name: torch.ones(rows, *each.shape, dtype=getattr(torch, each.dtype)) for each in inputs}


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


def load_weights(
    model: nn.Module,
    file: Path,
    key: str = "model.checkpoint",
    mapping: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Loads trained weights into the model: all of them, and nothing else.

    Args:
        file: `.safetensors`, or a state dict that `torch.load(weights_only=True)` reads, at the top or under
            `state_dict`. Prefixes `module.`, `model.` and `_orig_mod.`, which wrappers leave, are stripped where that
            makes the names match.
        mapping: regular expression -> replacement, as of `re.sub`, applied in order to the names of the file, with or
            without the prefixes of wrappers. The config has it under `key` with `_keys` at its end.

    Raises:
        ConfigError: the file is missing, unreadable or does not fit the model, or the mapping is wrong: it is no
            regular expression, matches no name, or leads two names to one.
    """
    _check_mapping(mapping, f"{key}_keys")
    shapes = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    weights = _by_the_models_names(_read_weights(file, key), shapes, mapping, f"{key}_keys")
    # Counters of batches: absent from many checkpoints, and without effect unless a momentum is None.
    weights = {name: torch.tensor(0) for name in shapes if _counts_batches(name)} | weights
    problems = _misfits(shapes, weights, _meant(shapes, weights))
    if problems:
        problems += _remedy(shapes, weights, f"{key}_keys")
        raise ConfigError(*(f"{key}={file} does not fit {type(model).__name__}: {problem}" for problem in problems))
    model.load_state_dict(weights)


def _arguments_from_data(constructor: Any, arch: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in known.items() if name in parameters and arch.get(name) is None}


def _check_complete(constructor: Any, filled: Mapping[str, Any], key: str) -> None:
    """Refuses what the config leaves to the data and the data don't say."""
    try:
        parameters = inspect.signature(constructor).parameters
    except (TypeError, ValueError):
        return
    for name in ("num_outputs", "num_classes", "vocabulary_size"):
        required = name in parameters and parameters[name].default is inspect.Parameter.empty
        if required and filled.get(name) is None:
            raise ConfigError(f"{key}.{name} has no value, and the data don't say it: {key}.{name}=...")


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


def _check_outputs(module: nn.Module, inputs: Sequence[Input], output_shape: tuple[int, ...] | None, who: str) -> None:
    shapes = ", ".join(f"{each.name} {each.shape}" if len(inputs) > 1 else str(each.shape) for each in inputs)
    try:
        with torch.no_grad():
            outputs = forward(module.eval(), example(inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{who} does not run on rows of shape {shapes}: {reason}") from error
    finally:
        module.train()
    wanted = "(2, ...)" if output_shape is None else str((2, *output_shape)).replace("'", "")
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or len(outputs) != 2:
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigError(f"{who} must give {wanted} for 2 rows of shape {shapes}, got {given}")
    if output_shape is not None and tuple(outputs.shape[1:]) != output_shape:
        raise ConfigError(
            f"{who} gives {_outputs_told(tuple(outputs.shape[1:]))} a row, data.targets has "
            f"{_outputs_told(output_shape)} (for classes: labels 0..{output_shape[-1] - 1}): make them equal"
        )


def _outputs_told(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} outputs" if len(shape) == 1 else f"outputs of shape {shape}"


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


def _misfits(
    shapes: Mapping[str, torch.Size],
    weights: Mapping[str, Tensor],
    meant: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    missing = [name for name in shapes if name not in weights]
    unexpected = [
        f"{name} (did you mean {meant[name]}?)" if name in meant else name for name in _unexpected(shapes, weights)
    ]
    misshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    return [f"{len(names)} {what}: {_listed(names)}" for what, names in found.items() if names]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _read_weights(file: Path, key: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"{key}={file} does not exist")
    try:
        content = _load(file)
    except Exception as error:  # a damaged or foreign pickle may raise anything
        raise ConfigError(
            f"{key}={file} can't be read as .safetensors or as a state dict of tensors alone: {_refusal(error)}"
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


def _refusal(error: Exception) -> str:
    """What `torch.load` and safetensors say in a screenful, in a few words."""
    if (stranger := re.search(r"GLOBAL (\S+)", str(error))) is not None:
        return f"it holds {stranger[1]}, and code in a file is never run; save model.state_dict() alone"
    if "TorchScript" in str(error):
        return "it is a TorchScript program; save model.state_dict() instead"
    return "it is damaged or of another format"


def _check_mapping(mapping: Mapping[str, str], key: str) -> None:
    for pattern, replacement in mapping.items():
        if not (isinstance(pattern, str) and isinstance(replacement, str)):
            raise ConfigError(f"{key} must lead from texts to texts, got {pattern!r}: {replacement!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{key}: {pattern} is no regular expression: {error}") from error


def _by_the_models_names(
    weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], mapping: Mapping[str, str], key: str
) -> dict[str, Tensor]:
    """The weights by their names after the mapping, and without wrappers' prefixes where that makes some name match."""
    forms = [dict(weights)]
    while (stripped := _stripped(forms[-1])) is not None:
        forms.append(stripped)
    named, idle = None, []
    for form in forms:  # a mapping may be written for the names with wrappers' prefixes or without
        idle = _idle(form, mapping, key)
        if not idle:
            named = _renamed(form, mapping, key)
            while named.keys().isdisjoint(shapes) and (stripped := _stripped(named)) is not None:
                named = stripped
            if not named.keys().isdisjoint(shapes):
                return named
    if named is None:
        raise ConfigError(f"{key}: {', '.join(idle)} matches none of the names, which are {_listed(list(forms[-1]))}")
    return named


def _renamed(weights: Mapping[str, Tensor], mapping: Mapping[str, str], key: str) -> dict[str, Tensor]:
    named: dict[str, str] = {}
    for name in weights:
        new = _substituted(name, mapping, key)
        if new in named:
            raise ConfigError(f"{key} leads both {named[new]} and {name} to {new}")
        named[new] = name
    return {new: weights[name] for new, name in named.items()}


def _idle(names: Iterable[str], mapping: Mapping[str, str], key: str) -> list[str]:
    """The patterns that match nothing at their turn."""
    idle, names = [], list(names)
    for pattern, replacement in mapping.items():
        if not any(re.search(pattern, name) for name in names):
            idle.append(pattern)
        names = [_substituted(name, {pattern: replacement}, key) for name in names]
    return idle


def _substituted(name: str, mapping: Mapping[str, str], key: str) -> str:
    for pattern, replacement in mapping.items():
        try:
            name = re.sub(pattern, replacement, name)
        except re.error as error:
            raise ConfigError(f"{key}: {replacement} can't replace {pattern}: {error}") from error
    return name


def _unexpected(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> list[str]:
    """Names that the model does not have, the counters of batches last: they say the least."""
    unexpected = [name for name in weights if name not in shapes]
    return sorted(unexpected, key=_counts_batches)


def _counts_batches(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _meant(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Unexpected name -> the missing one that it resembles most, one of its own shape first; for those that are listed.

    A missing name is taken once.
    """
    missing = [name for name in shapes if name not in weights]
    meant = {}
    for name in _unexpected(shapes, weights)[:_LISTED]:
        equal = [other for other in missing if shapes[other] == weights[name].shape]
        likeness = {other: SequenceMatcher(None, name, other).ratio() for other in equal or missing}
        best = max(likeness, key=likeness.__getitem__, default=None)
        if best is not None and likeness[best] >= (_ALIKE if equal else _VERY_ALIKE):
            meant[name] = best
            missing.remove(best)
    return meant


def _remedy(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor], key: str) -> list[str]:
    """The mapping that gives unexpected names the ones that are meant, as it is typed, if there is one that helps."""
    mapping: dict[str, str] = {}
    wanted = {name for name in shapes if not _counts_batches(name)}
    named = {name: value for name, value in weights.items() if not _counts_batches(name)}
    for _ in range(_LISTED):
        for pattern, replacement in (_rule(name, other) for name, other in _meant(shapes, named).items()):
            now = {re.sub(pattern, replacement, name): value for name, value in named.items()}
            if len(now) == len(named) and len(wanted & now.keys()) > len(wanted & named.keys()):
                mapping[pattern], named = replacement, now
                break
        else:
            break
    if not mapping:
        return []
    empty = '""'
    rules = ", ".join(f"{pattern}: {replacement or empty}" for pattern, replacement in mapping.items())
    left = len(wanted - named.keys())
    return [f"try '+{key}={{{rules}}}', " + (f"which leaves {left} missing" if left else "which names them all")]


def _rule(name: str, meant: str) -> tuple[str, str]:
    """Pattern and replacement of the dotted parts in which two names differ."""
    old, new = name.split("."), meant.split(".")
    start = end = 0
    while start < min(len(old) - 1, len(new)) and old[start] == new[start]:
        start += 1
    while end < min(len(old) - 1, len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    before, after = "." * (start > 0), "." * (end > 0)
    found, wanted = ".".join(old[start : len(old) - end]), ".".join(new[start : len(new) - end])
    pattern = ("" if before else r"\A") + re.escape(before + found + after) + ("" if after else r"\Z")
    return pattern, before + wanted + after if wanted else before and after


def _stripped(weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Without the prefix that a wrapper gave to every name; None if there is none."""
    for prefix in ("module.", "model.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): value for name, value in weights.items()}
    return None

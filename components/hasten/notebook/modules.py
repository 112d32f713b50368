"""A model that lives in the process, as a Python module that constructs it and a file of its weights.

What a notebook defines no other process can import. Its source is therefore written down, with what it uses: other
classes and functions of the notebook by their source, libraries by their import, constants by their value. The name of
the module ends in a digest of its code, so that a definition that changed is another module.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import linecache
import math
import re
import symtable
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from hasten.artefacts.module import resized
from hasten.core.errors import ConfigError
from hasten.core.files import write_text
from hasten.core.source import without_docstrings
from hasten.notebook.rows import NAME_CHARACTERS, quoted

MAKES = "constructed"
"""Function of a written module that constructs the module."""
_OF_LAYERS: Mapping[str, tuple[str, ...]] = {
    name: ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", *more)
    for name, more in {"RNN": ("nonlinearity",), "LSTM": ("proj_size",), "GRU": ()}.items()
}
"""Arguments of layers whose signatures don't tell them."""
_NOT_KEPT = ("device", "dtype")
_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What became of a model.

    Attributes:
        name: as people will look for it.
    """

    name: str
    overrides: tuple[str, ...]


def trained(model: Any) -> bool:
    """Whether the model brings weights along."""
    return isinstance(model, nn.Module)


def kept(model: nn.Module | Callable[..., nn.Module], folder: Path) -> Kept:
    """Writes what rebuilds the model below the folder, `code/` and weights, and gives the overrides that name it.

    Raises:
        ConfigError: another process could not construct it.
    """
    if isinstance(model, nn.Module):
        return _of_instance(model, folder)
    if not inspect.isclass(model) and not inspect.isfunction(model):
        raise ConfigError(f"model must be a torch.nn.Module, a class of them or a function, got {type(model).__name__}")
    if inspect.isclass(model) and not issubclass(model, nn.Module):
        raise ConfigError(f"model={model.__name__} is no class of torch.nn.Module")
    if model.__name__ == "<lambda>":
        raise ConfigError("model is a lambda, which has no name to import: write it with def")
    if _importable(model, model.__qualname__):
        target = f"{model.__module__}.{model.__qualname__}"
    else:
        writing = Writing()
        target = f"{writing.written(writing.named(model, model.__name__), folder)}.{model.__name__}"
    return Kept(name=model.__name__, overrides=("model=custom", f"model.arch._target_={target}"))


def _of_instance(model: nn.Module, folder: Path) -> Kept:
    name = type(model).__name__
    if type(model).__module__.startswith("transformers."):
        raise ConfigError(
            f"model is a {name} of transformers: model.save_pretrained(folder), and then model=huggingface "
            "model.arch.folder=... among the overrides"
        )
    writing = Writing()
    made = writing.construction(model, "model")
    writing.body[MAKES] = f"def {MAKES}() -> torch.nn.Module:\n    return {made}"
    writing.imports[MAKES] = "import torch"
    module = writing.written(name, folder)
    again: nn.Module = _again(module, name)
    _check_alike(again, model, name)
    return Kept(
        name=name,
        overrides=(
            "model=custom",
            f"model.arch._target_={module}.{MAKES}",
            f"model.checkpoint={quoted(_weights(model, folder))}",
            "model.training.epochs=0",
        ),
    )


def _again(module: str, name: str) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            made: nn.Module = getattr(import_module(module), MAKES)()
    except Exception as error:  # whatever the user's constructor raises
        raise ConfigError(f"model: {name} can't be made again: {type(error).__name__}: {error}. {_REMEDY}") from error
    return made


_REMEDY = (
    "Its arguments are taken from attributes of the same names: set them (model.depth = 3), or give a function without "
    "arguments that makes it, and its weights by model.checkpoint=... model.training.epochs=0"
)


def _check_alike(again: nn.Module, model: nn.Module, name: str) -> None:
    try:
        # Attributes that only the user's has were set on it for us.
        changes = resized(model, again)
    except ValueError as error:
        raise ConfigError(f"model: {name} made again from its arguments is another: {error}. {_REMEDY}") from error
    strangers = [
        (place, key) for place, change in changes.items() for key in (*change["tensors"], *change["attributes"])
    ]
    if strangers:
        told = ", ".join(f"{place}.{key}".lstrip(".") for place, key in strangers[:3])
        raise ConfigError(f"model: {name} made again from its arguments differs in {told}. {_REMEDY}")


def _weights(model: nn.Module, folder: Path) -> Path:
    from safetensors.torch import save_file

    state = model.state_dict()
    if strange := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ConfigError(f"model: its state_dict() has {', '.join(strange[:3])}, which is no tensor")
    weights = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    file = folder / f"weights-{digest.hexdigest()[:NAME_CHARACTERS]}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.tmp")
        save_file(weights, aside)
        aside.replace(file)
    return file


@dataclass(kw_only=True)
class Writing:
    """A Python module that is being put together.

    Attributes:
        imports: name -> line that binds it.
        body: name -> definition, in the order in which they need one another.
    """

    imports: dict[str, str] = field(default_factory=dict)
    body: dict[str, str] = field(default_factory=dict)
    _means: dict[str, Any] = field(default_factory=dict)

    def written(self, name: str, folder: Path) -> str:
        """Writes the module below `folder/code`, unless it is there; its name."""
        imports, body = "\n".join(sorted(set(self.imports.values()))), "\n\n\n".join(self.body.values())
        text = f'"""What a notebook gave to hasten."""\n\nfrom __future__ import annotations\n\n{imports}\n\n\n{body}\n'
        digest = hashlib.sha256(ast.dump(without_docstrings(ast.parse(text))).encode()).hexdigest()
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
        module = f"{snake}_{digest[:NAME_CHARACTERS]}"
        file = folder / "code" / f"{module}.py"
        if not file.exists():
            write_text(file, text)
        invalidate_caches()
        return module

    def named(self, thing: Any, name: str, user: str = "model") -> str:
        """Sees to it that the name means the thing in the module; gives the name.

        Raises:
            ConfigError: it can neither be imported nor written down.
        """
        if name in self._means:
            if self._means[name] is thing:
                return name
            raise ConfigError(f"{user} uses two things that are called {name}: rename one")
        self._means[name] = thing
        if isinstance(thing, ModuleType):
            if thing.__name__ == "__main__" or _spec(thing.__name__) is None:
                raise ConfigError(f"{user} uses the module {name}, which no other process could import")
            self.imports[name] = f"import {thing.__name__} as {name}"
        elif (where := _importable(thing, name)) is not None:
            self.imports[name] = f"from {where[0]} import {where[1]}" + (f" as {name}" if where[1] != name else "")
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            self._define(thing, name)
        elif (told := _literal(thing)) is not None:
            self.body[name] = f"{name} = {told}"
        else:
            raise ConfigError(
                f"{user} uses {name}, a {type(thing).__name__} of the notebook, which can't be written down: make it "
                "an argument, a buffer or a plain value, or put the code into a file and import it"
            )
        return name

    def _define(self, thing: Any, name: str) -> None:
        source, known = _definition(thing)
        for used in _names(source):
            if used not in (name, thing.__name__) and used in known:
                self.named(known[used], used, thing.__name__)
        for used in _annotations(source):
            # For whoever reads it: annotations are not evaluated.
            if (
                used in known
                and used not in self._means
                and (isinstance(known[used], ModuleType) or _importable(known[used], used))
            ):
                self.named(known[used], used, thing.__name__)
        self.body[name] = source + (f"\n\n\n{name} = {thing.__name__}" if thing.__name__ != name else "")

    def construction(self, module: nn.Module, who: str) -> str:
        """An expression that makes a module of the same arguments."""
        kind = type(module)
        called = self._class(kind, who)
        if kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            layers = {name: self.construction(layer, f"{who}.{name}") for name, layer in module.named_children()}
            if kind is nn.ModuleList:
                return f"{called}([{', '.join(layers.values())}])"
            if kind is nn.Sequential and list(layers) == [str(place) for place in range(len(layers))]:
                return f"{called}({', '.join(layers.values())})"
            pairs = ", ".join(f"{name!r}: {layer}" for name, layer in layers.items())
            if kind is nn.ModuleDict:
                return f"{called}({{{pairs}}})"
            self.named(OrderedDict, "OrderedDict")
            return f"{called}(OrderedDict({{{pairs}}}))"
        arguments = ", ".join(f"{name}={told}" for name, told in self._arguments(module, who))
        return f"{called}({arguments})"

    def _class(self, kind: type[nn.Module], who: str) -> str:
        """A name for the class; layers of torch as everybody writes them."""
        if getattr(nn, kind.__name__, None) is kind:
            self.imports[MAKES] = "import torch"
            return f"torch.nn.{kind.__name__}"
        return self.named(kind, kind.__name__, who)

    def _arguments(self, module: nn.Module, who: str) -> Iterator[tuple[str, str]]:
        kind = type(module)
        if names := _OF_LAYERS.get(kind.__name__, ()) if kind.__module__.startswith("torch.") else ():
            yield from ((name, repr(getattr(module, name))) for name in names)
            return
        for parameter in inspect.signature(kind).parameters.values():
            if parameter.name in _NOT_KEPT or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value = getattr(module, parameter.name, _MISSING)
            told = self._told(value, parameter.name, f"{who}.{parameter.name}")
            if told is not None:
                yield parameter.name, told
            elif parameter.default is inspect.Parameter.empty:
                raise ConfigError(
                    f"{who}: the argument {parameter.name} of {kind.__name__} is not known: set it "
                    f"({who}.{parameter.name} = ...), or give a function without arguments that makes it, and its "
                    "weights by model.checkpoint=... model.training.epochs=0"
                )

    def _told(self, value: Any, name: str, who: str) -> str | None:
        """An argument's value as an expression; None where the attribute does not say it."""
        if name == "bias" and (value is None or isinstance(value, torch.Tensor)):
            return repr(value is not None)
        if isinstance(value, nn.Module):
            return self.construction(value, who)
        if (told := _literal(value)) is not None:
            return told
        if (inspect.isfunction(value) or inspect.isbuiltin(value) or inspect.isclass(value)) and value is not _MISSING:
            return self.named(value, value.__name__, who)
        return None


def _importable(thing: Any, name: str) -> tuple[str, str] | None:
    """Module and name under which every process finds the thing."""
    module = getattr(thing, "__module__", None)
    if not isinstance(module, str) or module == "__main__" or _spec(module) is None:
        return None
    for candidate in (getattr(thing, "__qualname__", ""), name):
        if candidate and "." not in candidate and getattr(import_module(module), candidate, _MISSING) is thing:
            return module, candidate
    return None


def _spec(module: str) -> Any:
    try:
        return find_spec(module)
    except (ImportError, ValueError):
        return None


def _literal(value: Any) -> str | None:
    """A plain value as Python writes it."""
    if isinstance(value, tuple | list):
        parts = [_literal(item) for item in value]
        if any(part is None for part in parts):
            return None
        inside = ", ".join(part for part in parts if part is not None)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(parts) == 1 else ''})"
    if isinstance(value, dict):
        pairs = [(_literal(key), _literal(item)) for key, item in value.items()]
        if any(key is None or item is None for key, item in pairs):
            return None
        return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
    return repr(value) if value is None or type(value) in (bool, int, str, bytes) else None


def _definition(thing: Any) -> tuple[str, Mapping[str, Any]]:
    """Source of a class or function, and what its names mean.

    Python finds the source of a notebook's functions, not that of its classes: they are looked up through their
    methods.
    """
    codes = list(_codes(thing))
    lines = linecache.getlines(codes[0][0].co_filename) if codes else []
    if not lines:
        raise ConfigError(
            f"{thing.__name__} has no source that can be read (typed at a prompt, or without methods): put it into a "
            "file and import it"
        )
    file = codes[0][0].co_filename
    tree = ast.parse("".join(lines))
    kinds = ast.ClassDef if inspect.isclass(thing) else ast.FunctionDef
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, kinds)
        and node.name == thing.__name__
        and all(code.co_filename == file and _begin(node) <= code.co_firstlineno <= _end(node) for code, _ in codes)
    ]
    if not found:
        raise ConfigError(
            f"{thing.__name__} is not defined in one piece (a method was set from elsewhere, or the file has changed "
            "since): define it anew"
        )
    node = found[-1]
    return textwrap.dedent("".join(lines[_begin(node) - 1 : _end(node)])).rstrip(), codes[0][1]


def _codes(thing: Any) -> Iterator[tuple[CodeType, Mapping[str, Any]]]:
    """Code that was written for the thing, and its globals; not what decorators such as dataclass made."""
    values = vars(thing).values() if inspect.isclass(thing) else [thing]
    for value in values:
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        function = inspect.unwrap(function) if isinstance(function, FunctionType) else function
        if isinstance(function, FunctionType) and linecache.getlines(function.__code__.co_filename):
            yield function.__code__, function.__globals__


def _begin(node: ast.ClassDef | ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _end(node: ast.ClassDef | ast.FunctionDef) -> int:
    return node.end_lineno or node.lineno


def _names(source: str) -> list[str]:
    """Names that a definition takes from around it, each once."""
    table = symtable.symtable(f"from __future__ import annotations\n{source}", "<definition>", "exec")
    found: dict[str, None] = {}
    pending = [table]
    while pending:
        scope = pending.pop(0)
        for symbol in scope.get_symbols():
            outer = scope is table or symbol.is_global()
            if outer and symbol.is_referenced() and not hasattr(builtins, symbol.get_name()):
                found[symbol.get_name()] = None
        pending += scope.get_children()
    return list(found)


def _annotations(source: str) -> list[str]:
    notes: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        found = getattr(node, "annotation", None), getattr(node, "returns", None)
        notes += [note for note in found if note is not None]
    return list(dict.fromkeys(name.id for note in notes for name in ast.walk(note) if isinstance(name, ast.Name)))

"""Parts of a model that run one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Block:
    """Modules of a model that run one after the other and are treated as one.

    Attributes:
        name: of the first, as `named_modules` spells it, and of the last where there are several.
        modules: one, or neighbours in `owner`.
        owner: the sequence that several modules are a part of; None for one.
    """

    name: str
    modules: tuple[nn.Module, ...]
    owner: nn.Sequential | None = None


def blocks(model: nn.Module) -> list[Block]:
    """What of a model can be calculated, calculated again or divided among processes by itself.

    Elements of `nn.Sequential` and `nn.ModuleList` are blocks, at the outermost level; where there are no such
    containers, the children. Elements that hold no modules (convolution, normalization, activation) would save nothing
    alone, as what a convolution keeps is its input: n layers with weights, and what is between them, are divided into
    about sqrt(n) blocks of sqrt(n) layers (Chen et al. 2016, section 4.1).
    """
    return list(_blocks(model, ""))


def _blocks(module: nn.Module, path: str) -> Iterator[Block]:
    if isinstance(module, nn.Sequential):
        for run in _runs(module):
            names = [f"{path}{name}" for name, _ in run]
            if len(run) > 1:
                yield Block(name=f"{names[0]}-{names[-1]}", modules=tuple(each for _, each in run), owner=module)
            else:
                yield from _element(run[0][1], names[0])
        return
    for name, child in module.named_children():
        if isinstance(module, nn.ModuleList):
            yield from _element(child, f"{path}{name}")
        elif any(_is_container(each) for each in child.modules()):
            yield from _blocks(child, f"{path}{name}.")
        else:
            yield Block(name=f"{path}{name}", modules=(child,))


def _element(module: nn.Module, name: str) -> Iterator[Block]:
    if _is_container(module):
        yield from _blocks(module, f"{name}.")
    else:
        yield Block(name=name, modules=(module,))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _runs(sequence: nn.Sequential) -> list[list[tuple[str, nn.Module]]]:
    """Elements with modules in them alone; the others in runs of as many matrices as the root of their number."""
    children = list(sequence.named_children())
    longest = math.ceil(math.sqrt(sum(_weighs(module) for _, module in children if _is_leaf(module))))
    runs: list[list[tuple[str, nn.Module]]] = []
    room = 0
    for name, module in children:
        if not _is_leaf(module):
            runs.append([(name, module)])
            room = 0
            continue
        if not runs or not _is_leaf(runs[-1][0][1]) or (_weighs(module) and not room):
            runs.append([])
            room = longest
        runs[-1].append((name, module))
        room -= _weighs(module)
    return runs


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _weighs(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))

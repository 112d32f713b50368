"""Fingerprints of components' source code: a stage is built again when its code changed, not when a comment did."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path


def libraries(*names: str) -> dict[str, str]:
    """Installed version of each distribution; `missing` where there is none."""
    return {name: _version(name) for name in names}


@functools.cache
def source_fingerprint(target: str) -> str:
    """SHA-256 over the syntax trees of a module (or of the module of a dotted class path) and of its local imports.

    Comments, docstrings and layout do not count. Local is all that is no part of Python and not installed as a library:
    the same package, and modules beside it. `hasten.core` is left out, since contracts and book-keeping decide no
    result. A module of an installed third-party library is fingerprinted by the library's version instead.
    """
    spec = _module_of(target)
    if spec is None:
        return "missing"
    if _is_library(spec):
        return f"library {spec.name.partition('.')[0]} {_library_version(spec.name)}"
    seen: dict[str, str] = {}
    _collect(spec, seen)
    return hashlib.sha256("\n".join(f"{name} {text}" for name, text in sorted(seen.items())).encode()).hexdigest()


def _collect(spec: ModuleSpec, seen: dict[str, str]) -> None:
    pending = [spec]
    while pending:
        module = pending.pop()
        if module.name in seen or module.name.startswith("hasten.core") or not (module.origin or "").endswith(".py"):
            continue
        tree = ast.parse(Path(str(module.origin)).read_text(encoding="utf-8"))
        seen[module.name] = hashlib.sha256(ast.dump(without_docstrings(tree)).encode()).hexdigest()
        pending.extend(_local_imports(tree, module))


def _local_imports(tree: ast.Module, module: ModuleSpec) -> Iterator[ModuleSpec]:
    package = module.name if module.submodule_search_locations else module.name.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [node.module])]
                )
            if not _is_local(base.partition(".")[0]):
                continue
            # Asking for a name below a module imports the module, which may be slow: only packages hold more modules.
            found = _find(base)
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [base, *inside] if found is not None and found.submodule_search_locations else [base]
        for name in names:
            if _is_local(name.partition(".")[0]) and (spec := _find(name)) is not None:
                yield spec


@functools.cache
def _is_local(top: str) -> bool:
    """Whether a top-level package or module is somebody's own code."""
    if top in sys.stdlib_module_names:
        return False
    spec = _find(top)
    return spec is not None and bool(spec.origin) and not _is_library(spec)


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree as it runs: its docstrings are taken out."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
            and isinstance(node.body[0].value, ast.Constant)
            and isinstance(node.body[0].value.value, str)
        ):
            node.body = node.body[1:]
    return tree


def _module_of(target: str) -> ModuleSpec | None:
    return _find(target) or _find(target.rpartition(".")[0])


def _find(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name) if name else None
    except (ImportError, AttributeError, ValueError):
        return None


def _is_library(spec: ModuleSpec) -> bool:
    origin = Path(spec.origin or "")
    return spec.name.partition(".")[0] != "hasten" and any(
        part in ("site-packages", "dist-packages") for part in origin.parts
    )


def _library_version(module: str) -> str:
    top = module.partition(".")[0]
    return _version(packages_distributions().get(top, [top])[0])


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"

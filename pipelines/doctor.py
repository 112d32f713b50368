"""`hasten doctor`: what works on this machine, and how to get what does not. It needs no data and leaves nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.core.construct import construct
from hasten.core.errors import ConfigError, HastenError
from hasten.core.interfaces import Engine
from hasten.core.recipe import Composer
from hasten.core.source import libraries
from hasten.reporting.terminal import Finding
from hasten.session import Session

if TYPE_CHECKING:
    from hasten.core.interfaces import Graph

SECTIONS = ("pipeline", "engine", "target", "tracking", "store", "hydra", "experiment", "debug")
"""What the user may have configured of the machine; a recipe's data and model are none of the doctor's business."""
EXTRAS = ("transformers", "tokenizers", "datasets")
X86 = (("AVX2", ("avx2",)), ("AVX-512", ("avx512f",)), ("VNNI", ("avx512_vnni", "avx_vnni")), ("AMX", ("amx_tile",)))
"""Vector extensions of x86 by the names that Linux gives them; one of each line suffices."""


def session(overrides: Sequence[str], folder: Path, config_folders: Sequence[Path]) -> Session:
    """The machine's part of the request, unchecked: whatever is wrong with it is to be told."""
    mine = [text for text in overrides if text.lstrip("+~").partition("=")[0].partition(".")[0] in SECTIONS]
    composer = Composer.of(mine)
    return Session(composer=composer, recipe=composer.compose(), folder=folder)


def main(session: Session) -> int:
    """The command; its exit code is 1 where an engine of `target.engines` does not work."""
    screen = session.screen
    screen.findings(
        "this machine", [*_versions(), *_machine(), _compiler(), _outputs(session.folder), _record(session)]
    )
    screen.findings("extras", [_extra(name) for name in EXTRAS])
    with screen:
        found = list(_engines(session))
    screen.findings("engines", found)
    wanted = session.recipe.section("target")["engines"]
    works = {finding.name for finding in found if finding.state == "ok"}
    return 0 if set(wanted) <= works else 1


def _engines(session: Session) -> Iterator[Finding]:
    """Every option of the group on the config search path, and what `target.engines` names beyond."""
    from hasten.stages.checkup import write_tiny

    options = session.composer.options("engine")
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        session.screen.start("trial compiles", total=len(options))
        graph = write_tiny(Path(scratch))
        for option in options:
            try:
                yield _engine(session, option, graph)
            except HastenError as error:
                yield Finding(name=option, state="fails", told=" ".join(str(error).split()))
            session.screen.advance()
        session.screen.stop()
    for name in session.recipe.section("target")["engines"]:
        if name not in options:
            yield Finding(name=name, state="missing", told="target.engines names it, and it is no option of engine")


def _engine(session: Session, option: str, graph: Graph) -> Finding:
    from hasten.stages.checkup import try_engine
    from hasten.stages.engine import engine_node

    node = engine_node(session.composer.compose([f"engine={option}"]))
    engine = construct(node, "engine")
    if not isinstance(engine, Engine):
        raise ConfigError(f"{node['_target_']} is no Engine")
    if reason := engine.supports(False, session.target):
        return Finding(name=option, state="missing", told=reason)
    seconds = try_engine(node, graph, session.target)
    by = ", ".join(f"{name} {number}" for name, number in libraries(*engine.libraries).items())
    return Finding(name=option, state="ok", told=f"{by}: compiled and right in {seconds:.1f} s")


def _versions() -> list[Finding]:
    numbers = {"Python": platform.python_version(), **libraries("hasten", "torch", "pytorch-lightning", "mlflow")}
    return [Finding(name="versions", state="ok", told=", ".join(f"{name} {it}" for name, it in numbers.items()))]


def _machine() -> list[Finding]:
    from hasten.hardware.machine import machine

    here = machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else here.logical_cores
    cores = f"{usable} of {here.logical_cores} cores" if usable != here.logical_cores else f"{usable} cores"
    memory = "unknown" if here.memory_bytes is None else f"{here.memory_bytes / 1e9:.1f} GB"
    return [
        Finding(name="processor", state="ok", told=f"{here.processor}, {cores}"),
        Finding(name="vectors", state="ok", told=_vectors(here.isa)),
        Finding(name="memory", state="ok", told=memory),
    ]


def _vectors(isa: Sequence[str]) -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ", ".join(isa) or "unknown"
    return ", ".join(f"{name} {'yes' if set(names) & set(isa) else 'no'}" for name, names in X86)


def _compiler() -> Finding:
    names = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        needed = "none, which engines that generate code need: apt-get install g++ (or set CXX)"
        return Finding(name="C++ compiler", state="missing", told=needed)
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return Finding(name="C++ compiler", state="ok", told=(done.stdout.splitlines() or [found])[0])


def _outputs(folder: Path) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(name="outputs", state="fails", told=f"{folder} can't be written: {error.strerror}")
    return Finding(name="outputs", state="ok", told=f"{os.path.relpath(folder)} can be written")


def _record(session: Session) -> Finding:
    """Whether the tracking store can be written, where its tracker can say so."""
    node = session.recipe.section("tracking")
    try:
        tracker = construct(node, "tracking")
    except ConfigError as error:
        return Finding(name="record", state="fails", told=str(error))
    problem = tracker.problem() if hasattr(tracker, "problem") else None
    where = tracker.command() or "none is kept"
    return Finding(name="record", state="fails" if problem else "ok", told=problem or where)


def _extra(name: str) -> Finding:
    if find_spec(name) is None:
        return Finding(name=name, state="missing", told=f"not installed: {_pip(name)}")
    try:
        return Finding(name=name, state="ok", told=version(name))
    except PackageNotFoundError:
        return Finding(name=name, state="ok", told="installed, of unknown version")


def _pip(name: str) -> str:
    """How to get a distribution: by the extra of hasten that names it, or by itself."""
    for line in requires("hasten") or ():
        wanted, _, condition = line.partition(";")
        if wanted.split(">")[0].split("=")[0].split("<")[0].strip() == name and "extra ==" in condition:
            extra = condition.rpartition("extra ==")[2].strip(" \"'")
            return f"pip install 'hasten[{extra}]'"
    return f"pip install {name}"

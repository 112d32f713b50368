"""`hasten doctor`: what works on this machine, and how to get what does not. It needs no data and leaves nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.core.construct import construct
from hasten.core.cuda import cuda_problem, gpus
from hasten.core.errors import ConfigError, HastenError
from hasten.core.interfaces import Engine
from hasten.core.processor import float_formats, has_vnni, usable_cpus
from hasten.core.recipe import Composer
from hasten.core.source import libraries
from hasten.hardware.machine import X86, extensions, machine
from hasten.reporting import units
from hasten.reporting.terminal import Finding
from hasten.session import Session

if TYPE_CHECKING:
    from hasten.core.interfaces import Graph

SECTIONS = ("pipeline", "engine", "target", "tracking", "store", "hydra", "experiment", "debug")
"""What the user may have configured of the machine; a recipe's data and model are none of the doctor's business."""
EXTRAS = ("transformers", "tokenizers", "datasets")


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
    screen.findings("what it can do at most", _roofline(session))
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
    target = session.target
    # What is made for another device is tried all the same: whether it is installed is what is asked.
    other = None if target.device in engine.devices else engine.devices[0]
    if reason := engine.supports(False, replace(target, device=other or target.device)):
        return Finding(name=option, state="missing", told=reason)
    seconds = try_engine(node, graph, target)
    by = ", ".join(f"{name} {number}" for name, number in libraries(*engine.libraries).items())
    made_for = f", for target.device={other}" if other else ""
    return Finding(name=option, state="ok", told=f"{by}: compiled and right in {seconds:.1f} s{made_for}")


def _roofline(session: Session) -> list[Finding]:
    """Peaks, bandwidths and noise of the target, from the store or measured in a few seconds."""
    from hasten.stages.roofline import glance

    try:
        found = glance(session.store, session.target)
    except HastenError as error:
        return [Finding(name="roofline", state="fails", told=" ".join(str(error).split()))]
    where = "on the GPU" if found.device == "cuda" else f"with {found.threads} thread{'s' * (found.threads > 1)}"
    peaks = ", ".join(f"{name} {units.digits(rate)}" for name, rate in found.peak_gops.items())
    nearest_first = sorted(found.bandwidth_gbs.items(), key=lambda item: -item[1])
    levels = ", ".join(f"{level} {units.digits(rate)}" for level, rate in nearest_first)
    told = {
        "arithmetic": f"{peaks} GFLOP/s {where}",
        "bandwidth": f"{levels} GB/s",
        "noise floor": f"{units.share(found.noise_floor)}: so much do identical measurements differ",
    }
    return [Finding(name=name, state="ok", told=text) for name, text in told.items()]


def _versions() -> list[Finding]:
    numbers = {"Python": platform.python_version(), **libraries("hasten", "torch", "pytorch-lightning", "mlflow")}
    return [Finding(name="versions", state="ok", told=", ".join(f"{name} {it}" for name, it in numbers.items()))]


def _machine() -> list[Finding]:
    here = machine()
    usable = len(usable_cpus())
    cores = f"{usable} of {here.logical_cores} cores" if usable != here.logical_cores else f"{usable} cores"
    memory = "unknown" if here.memory_bytes is None else f"{here.memory_bytes / 1e9:.1f} GB"
    return [
        Finding(name="processor", state="ok", told=f"{here.processor}, {cores}"),
        Finding(name="vectors", state="ok", told=_vectors(here.isa)),
        Finding(name="formats", state="ok", told=", ".join((*float_formats(), _int8()))),
        Finding(name="memory", state="ok", told=memory),
        *(_gpus() or [Finding(name="GPU", state="ok", told="none")]),
    ]


def _int8() -> str:
    return "int8" if has_vnni() else "int8 (without VNNI, so that sums of products saturate)"


def _gpus() -> list[Finding]:
    """Each GPU, and what keeps PyTorch from using it."""
    problem = cuda_problem()
    found = []
    for gpu in gpus():
        memory = units.size(gpu.memory_bytes) if gpu.memory_bytes is not None else "unknown memory"
        facts = [gpu.name, memory, f"driver {gpu.driver or 'unknown'}", ", ".join(gpu.float_formats)]
        told = f"{'; '.join(facts)}{f'; {problem}' if problem else ''}"
        found.append(Finding(name="GPU", state="missing" if problem else "ok", told=told))
    return found


def _vectors(isa: Sequence[str]) -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ", ".join(isa) or "unknown"
    return ", ".join(f"{name} {'yes' if name in extensions(isa) else 'no'}" for name in X86)


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

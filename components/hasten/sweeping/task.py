"""What Hydra calls for each command line, in this process or in another one."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from traceback import print_exception
from typing import TYPE_CHECKING

from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError, HastenError
from hasten.core.files import read_json, write_json
from hasten.sweeping.job import JOB_FILE, SUMMARY_FILE, deciding_trial, finished

if TYPE_CHECKING:
    from omegaconf import DictConfig

USAGE_ERROR = 2
INTERRUPTED = 130
SWEEP_VARIABLE = "HASTEN_SWEEP"
"""Environment variable that names the sweep which a job belongs to."""
LOG_FILE = "log.txt"
BEGUN_FILE = "begun.json"
LOCKS = ".locks"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Runs the pipeline that a config names.

    Attributes:
        folders: of configs: the user's, if there is one, and the packaged one.
        traceback: whether every error is shown with its traceback.
        codes: exit codes of all that it ran.
    """

    folders: tuple[Path, ...]
    traceback: bool = False
    codes: list[int] = field(default_factory=list)

    def __call__(self, config: DictConfig) -> int:
        code, _ = self.run(config)
        self.codes.append(code)
        return code

    def run(self, config: DictConfig) -> tuple[int, str]:
        """Exit code, and what went wrong."""
        from hydra.core.hydra_config import HydraConfig

        from hasten.session import Session

        hydra = HydraConfig.get()
        folder, overrides = Path(hydra.runtime.output_dir), list(hydra.overrides.task)
        code, reason = 0, ""
        try:
            if config.hparams_search is not None:
                raise ConfigError("hparams_search searches many recipes, which -m runs: hasten -m hparams_search=...")
            pipeline = import_module(f"hasten.pipelines.{config.pipeline.name}")
            # A pipeline that works whatever the recipe is makes its own session, in which nothing has been checked.
            make_session = getattr(pipeline, "session", Session.of)
            code = pipeline.main(make_session(overrides, folder, self.folders))
        except Exception as error:
            code, reason = report(error, traceback=self.traceback), one_line(error)
        remove_empty(folder)
        return code, reason


@dataclass(frozen=True, kw_only=True)
class SweptTask:
    """Runs one job of a sweep, once, whoever asks for it, and leaves `job.json` when it has come to its end.

    It is sent to other processes and machines: what they need to know is in it.

    Attributes:
        sweep: identity of the sweep.
        cwd: in which the sweep was started.
        configs: name of a job's folder -> digest of its config.
        logged: whether what a job prints goes into its folder instead of the terminal.
    """

    task: Task
    sweep: str
    cwd: Path
    configs: Mapping[str, str]
    logged: bool

    def __call__(self, config: DictConfig) -> int:
        from filelock import FileLock
        from hydra.core.hydra_config import HydraConfig

        from hasten.core import schema

        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see `hasten.cli.run`
        folder = Path(HydraConfig.get().runtime.output_dir)
        with _in_folder(self.cwd), _environment(SWEEP_VARIABLE, self.sweep):
            schema.register()
            log_to_stderr()
            lock = folder.parent / LOCKS / f"{folder.name}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            # A worker that outlives a killed sweep still runs its job.
            with FileLock(lock):
                if found := finished(folder, self.configs[folder.name]):
                    return int(found["code"])
                return self._once(config, folder)

    def _once(self, config: DictConfig, folder: Path) -> int:
        shutil.rmtree(folder, ignore_errors=True)
        start = time.monotonic()
        write_json(folder / BEGUN_FILE, {"process": os.getpid(), "host": socket.gethostname()})
        with _output_into(folder / LOG_FILE) if self.logged else nullcontext():
            code, reason = self.task.run(config)
        if code != INTERRUPTED:
            seconds = time.monotonic() - start
            write_outcome(folder, self.configs[folder.name], code=code, reason=reason, seconds=seconds)
        (folder / BEGUN_FILE).unlink(missing_ok=True)
        return code


def write_outcome(folder: Path, config_digest: str, *, code: int, reason: str, seconds: float) -> None:
    """Marks a job as finished; its verdict is that of its summary, where it left one."""
    verdict = "failed" if code else "done"
    if (folder / SUMMARY_FILE).is_file():
        trial = deciding_trial(read_json(folder / SUMMARY_FILE))
        verdict, reason = trial["verdict"], reason or trial["reason"]
    values = {
        "config": config_digest,
        "code": code,
        "verdict": verdict,
        "reason": without_credentials(reason) or (f"ended with exit code {code}" if code else ""),
        "seconds": round(seconds, 3),
        "summary": SUMMARY_FILE if (folder / SUMMARY_FILE).is_file() else None,
    }
    write_json(folder / JOB_FILE, values)


def report(error: Exception, *, traceback: bool) -> int:
    """One line for each problem; a traceback for a bug of ours, or where HYDRA_FULL_ERROR=1 asks for one.

    Returns:
        The exit code.
    """
    if traceback or not isinstance(error, HastenError):
        print_exception(error)
    else:
        for line in without_credentials(str(error)).splitlines():
            print(f"hasten: {line}", file=sys.stderr)
    return USAGE_ERROR if isinstance(error, ConfigError) else 1


def one_line(error: BaseException) -> str:
    """The message of an error of ours; of any other also its kind."""
    lines = without_credentials(str(error)).splitlines()
    told = "; ".join(" ".join(line.split()) for line in lines if line.strip())
    return told if isinstance(error, HastenError) else f"{type(error).__name__}: {told}"


def remove_empty(folder: Path) -> None:
    """Takes back the output folder that Hydra made for a run which left nothing in it."""
    while folder != Path.cwd() and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever stderr is at the time: a live display puts its own in place, and lines go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def log_to_stderr() -> None:
    logger = logging.getLogger("hasten")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)


@contextmanager
def _in_folder(cwd: Path) -> Iterator[None]:
    """Relative paths as the user typed them, and modules of theirs, which come last on the import path."""
    before, path_before = Path.cwd(), list(sys.path)
    os.chdir(cwd)
    if str(cwd) not in sys.path:
        sys.path.append(str(cwd))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path_before


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _output_into(file: Path) -> Iterator[None]:
    """All that this process and those that it starts print goes into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    with file.open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            yield
        finally:
            log.flush()
            for descriptor, earlier in zip((1, 2), saved, strict=True):
                os.dup2(earlier, descriptor)
                os.close(earlier)

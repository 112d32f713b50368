"""The command line: `hasten [pipeline] [overrides]`. Imports nothing heavy until a pipeline runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hasten.core.errors import ConfigError, HastenError
from hasten.core.groups import GROUPS, conf_folder, options

USAGE_ERROR = 2
INTERRUPTED = 130
FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Entry point of the `hasten` command.

    Exit codes: 0 done, 1 failed, 2 a request that makes no sense, 130 interrupted.
    """
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and gives its exit code."""
    # Before torch is loaded: its threads spin for long while they wait, and where another process wants a core that
    # makes a training step ten times slower and more. With this bound they soon sleep; idle machines lose nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    folders = config_folders(arguments)
    own = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from hasten.stages import followers

        try:
            own = followers.place()
            if own and (launcher := _launcher(arguments)):
                raise ConfigError(
                    f"hydra/launcher={launcher} starts processes of its own, which the followers that torchrun has "
                    "started do not know: leave it out"
                )
        except ConfigError as error:
            return _report(error, traceback=False) if os.environ["RANK"] == "0" else USAGE_ERROR
    if any(argument in ("--help", "-h") for argument in arguments):
        if own is None or own.rank == 0:
            print(help_text(folders))
        return 0
    if own is None:
        return _command(arguments, folders)
    with _command_line(["hasten", *arguments]):
        if own.rank > 0:
            return followers.follow(own)
        return followers.planned(own, lambda: _command(arguments, folders))


def _launcher(arguments: Sequence[str]) -> str:
    """That of a sweep, where it is not Hydra's own, which runs one job after the other in this process."""
    given = (argument.lstrip("+").partition("=") for argument in arguments)
    return next((option for name, _, option in given if name == "hydra/launcher" and option != "basic"), "")


def _command(arguments: Sequence[str], folders: Sequence[Path]) -> int:
    traceback = os.environ.get(FULL_ERROR) == "1"
    try:
        return _through_hydra(with_machine(with_pipeline(arguments, folders), folders), traceback=traceback)
    except KeyboardInterrupt:
        print("hasten: interrupted; what is finished stays in the store and is not made again", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _report(_explained(error, arguments), traceback=traceback)


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """The user's config folder, if one is given, and the packaged one."""
    mine = []
    for position, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            mine = [Path(value)] if given else [Path(item) for item in arguments[position + 1 : position + 2]]
    return [*mine, conf_folder()]


TAKE_A_VALUE = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--info",
    "-i",
)
"""Flags of Hydra whose value is the argument after them."""

OF_SWEEPS: dict[str, dict[str, str]] = {
    "hydra/launcher": {"basic": "One job after the other, in this process"},
    "hydra/sweeper": {},
}
"""Hydra's own groups that a sweep has a choice of, with options that have no file here."""


def with_pipeline(arguments: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Turns a first bare word into `pipeline=word`.

    Raises:
        ConfigError: a bare word that is no pipeline.
    """
    result, previous = [], ""
    for argument in arguments:
        bare = not argument.startswith(("-", "+", "~")) and "=" not in argument and previous not in TAKE_A_VALUE
        if bare:
            pipelines = options("pipeline", folders)
            if argument not in pipelines:
                from hasten.core.recipe import nearest

                known = f"there are {', '.join(pipelines)} (and overrides are key=value)"
                raise ConfigError(f"{argument} is no pipeline{nearest(argument, list(pipelines))}; {known}")
            argument = f"pipeline={argument}"
        result.append(argument)
        previous = argument
    return result


def with_machine(arguments: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Adds what `target=auto` leaves to the machine where Hydra only shows the config, which it composes itself."""
    if not any(argument.partition("=")[0] in ("--cfg", "-c") for argument in arguments):
        return [*arguments]
    from hasten.core import schema
    from hasten.core.recipe import left_to_the_machine
    from hasten.sweeping import launchers

    schema.register()
    launchers.register()
    places = [place for place, _ in enumerate(arguments) if _is_override(arguments, place)]
    mine = [folder for folder in folders if folder != conf_folder()]
    said = left_to_the_machine([arguments[place] for place in places], mine)
    first = places[0] if places else len(arguments)  # beside the others: Hydra takes no overrides around a flag
    return [*arguments[:first], *said, *arguments[first:]]


def _is_override(arguments: Sequence[str], place: int) -> bool:
    return not arguments[place].startswith("-") and (place == 0 or arguments[place - 1] not in TAKE_A_VALUE)


def help_text(folders: Sequence[Path]) -> str:
    """Usage, and every config group with its options, one line each."""
    lines = [
        "hasten [pipeline] [group=option] [key=value] ...",
        "",
        "Makes a PyTorch model fast enough, small enough and still right on the hardware that will run it,",
        "and proves it.",
        "",
        "  hasten                                       optimise the default experiment",
        "  hasten run pruning=structured engine=openvino   build and measure one recipe",
        "  hasten profile                               where the time goes on the target, and the bottleneck",
        "  hasten explain pruning=structured            what goes with what, what this recipe does or why it can't",
        "  hasten doctor                                what works on this machine, and how to get what does not",
        "  hasten launch distributed=ddp launch.nodes=2    what starts the same run on several hosts",
        "  hasten init                                  write a small project of your own to start from",
        "  hasten ui                                    look at the record of the runs in MLflow, until Ctrl-C",
        "  hasten compare runs=[a,b]                    two runs side by side, with a paired verdict",
        "  hasten report run=<id>                       the report of a run again, from what MLflow has of it",
        "  hasten sync                                  log what runs could not while the tracking server was away",
        "  hasten -m run pruning=none,structured        sweep recipes over one store; if killed, the same goes on",
        "  hasten -m hparams_search=recipe              search recipes with Optuna: latency, size and quality at once",
        "  hasten run dry_run=true                      what would be done, and what the store already has",
        "  hasten run --cfg job                         the composed config, every knob with its value",
        "  hasten --config-dir my_conf model=mine       with config files of your own",
        "",
        "Groups and their options:",
    ]
    for group in (*GROUPS, *OF_SWEEPS):
        found = {**OF_SWEEPS.get(group, {}), **options(group, folders)}
        for position, (option, purpose) in enumerate(found.items()):
            lines.append(f"  {group if position == 0 else '':<14} {option:<19} {purpose}")
    return "\n".join(lines)


def _through_hydra(arguments: Sequence[str], *, traceback: bool) -> int:
    from hydra import main as hydra_main

    from hasten.core import schema
    from hasten.sweeping import launchers, optuna, sweeper
    from hasten.sweeping.task import Task, log_to_stderr

    schema.register()
    launchers.register()
    sweeper.register(sweeper.HastenSweeper, optuna.OptunaSweeper)
    log_to_stderr()
    task = Task(folders=tuple(config_folders(arguments)), traceback=traceback)
    start = hydra_main(version_base="1.3", config_path="pkg://hasten.conf", config_name="config")
    with _errors_from_hydra(), _command_line(["hasten", *sweeper.with_late_knobs(arguments)]):
        start(task)()
    return max(task.codes, default=0)


@contextmanager
def _errors_from_hydra() -> Iterator[None]:
    """Has Hydra hand its errors on to us instead of printing them its own way and exiting with 1."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """The arguments as Hydra reads them, and the user's own modules importable from the working directory.

    It comes last on the import path, so that no file of theirs takes the place of a library.
    """
    arguments_before, path_before = sys.argv, list(sys.path)
    sys.argv = arguments
    sys.path.append(os.getcwd())
    try:
        yield
    finally:
        sys.argv, sys.path[:] = arguments_before, path_before


def _report(error: Exception, *, traceback: bool) -> int:
    from hasten.sweeping.task import report

    return report(error, traceback=traceback)


def _explained(error: Exception, arguments: Sequence[str]) -> Exception:
    """Hydra's and OmegaConf's complaints about the command line as a ConfigError; other errors as they are."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OSError) and error.filename:  # a folder that can't be written, a full disk
        return ConfigError(f"{error.filename}: {error.strerror}")
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):  # `group=null`
        return ConfigError(f"{error}: a group takes the name of an option, none for nothing")
    if isinstance(error, HastenError) or not isinstance(error, HydraException | OmegaConfBaseException):
        return error
    from hasten.core.recipe import explain

    return explain(error, arguments)


if __name__ == "__main__":
    main()

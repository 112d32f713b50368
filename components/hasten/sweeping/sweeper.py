"""hasten's sweeper: many command lines over one store, whatever starts them, and on from where it was killed."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hasten.core.auto import left_open
from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError, HastenError, first_line
from hasten.core.files import digest, read_json, write_json, write_text
from hasten.core.groups import GROUPS
from hasten.core.preflight import check_values
from hasten.core.recipe import Composer, Recipe, explain
from hasten.core.trial import Trial
from hasten.reporting import units
from hasten.reporting.facts import restored
from hasten.reporting.sweep import report, to_json
from hasten.reporting.terminal import Screen
from hasten.sweeping import launchers
from hasten.sweeping.job import IGNORED_SECTIONS, JOB_FILE, Job, Outcome, finished, identity, section, slug
from hasten.sweeping.summary import summarised
from hasten.sweeping.task import BEGUN_FILE, INTERRUPTED, LOCKS, SweptTask, Task, one_line, remove_empty, write_outcome

PLUGIN = "hydra_plugins.hasten.{}"
"""Hydra takes plugins of this name only; `register` says what they are."""

KEEPING = ("run", "optimize")
"""Pipelines whose jobs leave results. Others show something, which they do again each time they are asked."""

AGAIN = ("failed", "all")
LOCK_FILE = ".lock"
OWNER_FILE = ".owner.json"
WATCH_SECONDS = 0.5
"""Between two looks at which jobs of other processes have ended."""


def register(*sweepers: type[HastenSweeper]) -> None:
    """Makes sweepers known to Hydra, as `hydra_plugins.hasten.<class>`."""
    for sweeper in sweepers:
        Plugins.instance().class_name_to_class[PLUGIN.format(sweeper.__name__)] = sweeper


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A job with its folder, and the digest of its config; what is wrong with it where it does not compose."""

    job: Job
    folder: Path
    config: str
    number: int
    problem: ConfigError | None = None


class HastenSweeper(Sweeper):
    """Runs every combination of the choices on the command line.

    What a sweep is, where it lies, what of it is missing, who runs it and what is told of it is the same for every
    sweeper; one that searches overrides `jobs`, and perhaps the attributes below.

    Args:
        max_batch_size: jobs that a launcher is given at once; None for all.
        params: key -> choices, as if they were on the command line.
    """

    config: DictConfig
    hydra_context: HydraContext

    exclusive: ClassVar[bool] = True
    """Whether a sweep is run by one process at a time."""
    ignored: ClassVar[tuple[str, ...]] = ("hydra.sweeper.max_batch_size",)
    """Overrides that make no other sweep of it."""
    total: int | None = None
    """Number of jobs, where it is known before they run."""

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, Any] | None = None) -> None:
        self.max_batch_size = max_batch_size
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        assert isinstance(task_function, Task)
        self.hydra_context, self.task, self.config = hydra_context, task_function, config
        self.launched_by = str(config.hydra.runtime.choices["hydra/launcher"])
        if self.max_batch_size is not None and self.max_batch_size < 1:
            given = f"got {self.max_batch_size} (hydra.sweeper.max_batch_size)"
            raise ConfigError(f"max_batch_size must be at least 1 or null, {given}")
        launchers.check(self.launched_by)
        launchers.settle(config, self.launched_by)
        again = config.sweep.again
        if again is not None and again not in AGAIN:
            raise ConfigError(f"again must be one of {', '.join(AGAIN)} or null, got {again!r} (sweep.again)")
        self.config_dir = self.task.folders[0] if len(self.task.folders) > 1 else None
        chosen = set(re.findall(r"\w+", str(config.hydra.runtime.choices["pipeline"]))) - {"choice"}
        self.keeping = chosen <= set(KEEPING) and not config.dry_run

    # What a search overrides.

    def jobs(self, overrides: Sequence[Override]) -> Generator[Sequence[Job], Sequence[Outcome], None]:
        """Batches of jobs; each is answered with what became of its jobs, in their order.

        Args:
            overrides: of the command line and of `params`, with their choices and ranges.
        """
        jobs = expanded(overrides)
        self.total = len(jobs)
        yield jobs

    def concerns_all(self, problems: Sequence[ConfigError], batch: Sequence[Job]) -> bool:
        """Whether problems of some jobs of the first batch, found before they run, are the whole sweep's."""
        return len(problems) == len(batch)

    def notes(self) -> Sequence[str]:
        """What the summary says of how it was searched, one sentence each."""
        return ()

    @property
    def at_once(self) -> int:
        """Jobs that the launcher runs at the same time, as far as it says so; 1 for one after the other."""
        return int(self.config.hydra.launcher.get("n_jobs") or 1)

    # What is the same for all.

    def sweep(self, arguments: list[str]) -> list[Outcome]:
        """Runs what is missing, and shows all.

        Raises:
            ConfigError: something is wrong with every job.
            HastenError: another process runs this sweep.
            KeyboardInterrupt: what is finished is kept and has been shown.
        """
        typed = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        typed = [_without_single_choice(text) for text in typed if section(text) != "sweep"]
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(typed)
        named = (text for text in typed if text.lstrip("+").partition("=")[0] not in self.ignored)
        self.identity = identity([*named, *self._of_sweeper()], self.config_dir)
        self.command = _command_line(typed, self.config.hydra.overrides.hydra, self.config_dir)
        self.folder = self._folder()
        outcomes: dict[str, Outcome] = {}
        with self._alone() if self.keeping and self.exclusive else nullcontext():
            try:
                self._run(self.jobs(overrides), outcomes)
            except KeyboardInterrupt:
                self._conclude(list(outcomes.values()), interrupted=True)
                raise
            self._conclude(list(outcomes.values()))
        self.task.codes.extend(1 if outcome.failed else 0 for outcome in outcomes.values())
        return list(outcomes.values())

    def _run(self, batches: Generator[Sequence[Job], Sequence[Outcome], None], outcomes: dict[str, Outcome]) -> None:
        first, batch = True, next(batches, None)
        while batch is not None:
            placed = self._placed(batch, len(outcomes))
            if first:
                self._begin(placed)
                first = False
            for chunk in self._chunks(self._to_run(placed, outcomes)):
                self._launch(chunk, outcomes)
            found = [outcomes[item.folder.name] for item in placed]
            try:
                batch = batches.send(found)
            except StopIteration:
                batch = None

    def _of_sweeper(self) -> list[str]:
        """Overrides of Hydra's that say how it is searched."""
        mine = (text for text in self.config.hydra.overrides.hydra if re.match(r"\+*hydra[/.]sweeper", text))
        return [text for text in mine if text.lstrip("+").partition("=")[0] not in self.ignored]

    def _folder(self) -> Path:
        """That which the user named, or one that the command line names."""
        given = [str(text) for text in self.config.hydra.overrides.hydra]
        if any(text.startswith("hydra.sweep.subdir=") for text in given):
            raise ConfigError("hydra.sweep.subdir is named after each job's overrides: leave it out")
        folder = Path(self.config.hydra.sweep.dir).absolute()
        if not any(text.startswith("hydra.sweep.dir=") for text in given):
            name = self.config.name or self.config.hydra.runtime.choices["data"]
            folder /= f"{slug(str(name))}-{self.identity}"
        # Workers compose each job's config anew. Which launcher they have been started by is nothing to them.
        kept = [text for text in given if not re.match(r"\+*hydra([/.](launcher|sweeper)|\.sweep\.)", text)]
        with open_dict(self.config.hydra):
            self.config.hydra.sweep.dir = str(folder)
            self.config.hydra.overrides.hydra = [*kept, f"hydra.sweep.dir={quoted(str(folder))}"]
        return folder

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK_FILE)
        owner = self.folder / OWNER_FILE
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = read_json(owner) if owner.is_file() else {"process": "?", "host": "?"}
            raise HastenError(
                f"this sweep is under way in process {who['process']} of {who['host']} ({_shown(self.folder)}): wait "
                "for it, or give another folder, hydra.sweep.dir=..."
            ) from None
        try:
            write_json(owner, {"process": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _placed(self, jobs: Sequence[Job], done: int) -> list[_Placed]:
        found: dict[str, _Placed] = {}
        for job in jobs:
            name = job.name(self.config_dir)
            if name not in found:
                found[name] = self._composed(job, self.folder / name, done + len(found))
        return list(found.values())

    def _composed(self, job: Job, folder: Path, number: int) -> _Placed:
        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(job.overrides))
            with open_dict(config):
                config.pop("hydra")
            plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
            assert isinstance(plain, dict)
            decides = {name: value for name, value in plain.items() if name not in IGNORED_SECTIONS}
            placed = _Placed(job=job, folder=folder, config=digest(decides), number=number)
            if self.keeping and self._found(placed) is None:
                check_values(_recipe(job, config, plain))
            return placed
        except HastenError as error:
            problem = error if isinstance(error, ConfigError) else ConfigError(one_line(error))
        except (HydraException, OmegaConfBaseException) as error:
            problem = explain(error, job.overrides)
        return _Placed(job=job, folder=folder, config="", number=number, problem=problem)

    def _begin(self, placed: Sequence[_Placed]) -> None:
        """Before the first job runs: what is wrong with all of them, or what there is to do."""
        problems = [item.problem for item in placed if item.problem is not None]
        if problems and self.concerns_all(problems, [item.job for item in placed]):
            raise ConfigError(*dict.fromkeys(line for error in problems for line in error.problems))
        if not self.keeping:
            return
        done = sum(self._found(item) is not None for item in placed)
        number = f"{self.total} jobs" if self.total is not None else "a search"
        told = f"sweep {self.folder.name}: {number}"
        if done == self.total:
            again = f"{_shown(self.folder)}; sweep.again=all runs them again"
            self._say(f"{told}, all of them done before ({again})")
        else:
            self._say(f"{told}{f', {done} done before' if done else ''} ({_shown(self.folder)})")

    def _found(self, item: _Placed) -> Outcome | None:
        """What a job left, unless it is to run again."""
        found = finished(item.folder, item.config) if self.keeping else None
        again = self.config.sweep.again
        if found is None or again == "all" or (again == "failed" and (found["code"] or found["verdict"] == "failed")):
            return None
        return self._outcome(item, found, fresh=False)

    @staticmethod
    def _outcome(item: _Placed, found: Mapping[str, Any], *, fresh: bool) -> Outcome:
        known = {name: found[name] for name in ("code", "verdict", "reason", "seconds")}
        return Outcome(job=item.job, folder=item.folder, fresh=fresh, number=item.number, **known)

    def _to_run(self, placed: Sequence[_Placed], outcomes: dict[str, Outcome]) -> list[_Placed]:
        """Those that are missing; of the others, the outcomes are filled in."""
        missing = []
        for item in placed:
            if item.folder.name in outcomes:
                continue
            if (found := self._found(item)) is not None:
                outcomes[item.folder.name] = found
            elif item.problem is not None:
                write_outcome(item.folder, item.config, code=2, reason=one_line(item.problem), seconds=0.0)
                self._ended(item, outcomes)
            else:
                (item.folder / JOB_FILE).unlink(missing_ok=True)
                missing.append(item)
        return missing

    def _chunks(self, items: Sequence[_Placed]) -> Iterator[Sequence[_Placed]]:
        # In this process one after the other, so that each is told when it ends.
        size = 1 if self.launched_by == "basic" else self.max_batch_size or max(1, len(items))
        return (items[place : place + size] for place in range(0, len(items), size))

    def _launch(self, items: Sequence[_Placed], outcomes: dict[str, Outcome]) -> None:
        """Has the launcher run these jobs.

        Where it gives up because a process died, those that had begun run one by one, so that only the one whose
        process dies again has failed.
        """
        waiting, suspects = list(items), list[_Placed]()
        while waiting or suspects:
            alone = not waiting
            chunk, waiting = ([suspects.pop(0)], waiting) if alone else (waiting, [])
            for item in chunk:
                (item.folder / BEGUN_FILE).unlink(missing_ok=True)
            problem = self._tried(chunk, outcomes)
            missing = [item for item in chunk if item.folder.name not in outcomes]
            begun = [item for item in missing if (item.folder / BEGUN_FILE).is_file()]
            if problem is not None and len(missing) == len(chunk) and not begun:
                raise problem  # the launcher itself does not work
            if problem is not None and not alone:
                suspects += begun
                waiting = [item for item in missing if item not in begun]
                continue
            for item in missing:
                told = f"its process died: {first_line(problem)}" if problem else "its process left no result"
                reason = without_credentials(told)
                write_outcome(item.folder, item.config, code=1, reason=reason, seconds=0.0)
                self._ended(item, outcomes)

    def _tried(self, items: Sequence[_Placed], outcomes: dict[str, Outcome]) -> Exception | None:
        """Runs jobs; gives the launcher's error, or what went wrong around a job."""
        together = self.launched_by != "basic"
        task = SweptTask(
            task=self.task,
            sweep=self.folder.name,
            cwd=Path.cwd(),
            configs={item.folder.name: item.config for item in items},
            logged=together,
        )
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=task, config=self.config
        )
        own = [[*item.job.overrides, f"hydra.sweep.subdir={quoted(item.folder.name)}"] for item in items]
        problem: Exception | None = None
        try:
            with self._watched(items, outcomes) if together else nullcontext():
                returned: Sequence[JobReturn] = launcher.launch(own, initial_job_idx=items[0].number)
        except Exception as error:
            problem, returned = error, []
        finally:
            for item in items:
                if item.folder.name not in outcomes:
                    self._ended(item, outcomes)
        for answer in returned:
            if answer.status == JobStatus.FAILED:
                problem = problem or answer._return_value
            elif answer.return_value == INTERRUPTED:
                raise KeyboardInterrupt
        return problem

    def _ended(self, item: _Placed, outcomes: dict[str, Outcome]) -> None:
        """Takes in what a job has left, if it has come to its end."""
        found = finished(item.folder, item.config)
        if found is not None:
            outcome = outcomes[item.folder.name] = self._outcome(item, found, fresh=True)
            if self.keeping:
                self._say(f"[{item.number + 1}{f'/{self.total}' if self.total else ''}] {line(outcome)}")

    @contextmanager
    def _watched(self, items: Sequence[_Placed], outcomes: dict[str, Outcome]) -> Iterator[None]:
        """Tells of each job as it ends, while the launcher waits for all of them."""
        stop = Event()

        def watch() -> None:
            while not stop.wait(WATCH_SECONDS):
                for item in items:
                    if item.folder.name not in outcomes:
                        self._ended(item, outcomes)

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _conclude(self, outcomes: Sequence[Outcome], *, interrupted: bool = False) -> None:
        if not self.keeping:
            for outcome in outcomes:
                (outcome.folder / JOB_FILE).unlink(missing_ok=True)
                remove_empty(outcome.folder)
            shutil.rmtree(self.folder / LOCKS, ignore_errors=True)
            remove_empty(self.folder)
            return
        if not outcomes:
            return
        sweep = summarised(
            sorted(outcomes, key=lambda outcome: outcome.number),
            name=self.folder.name,
            experiment=str(self.config.name or self.config.hydra.runtime.choices["data"]),
            command=self.command,
            folder=self.folder,
            total=self.total,
            notes=self.notes(),
        )
        write_json(self.folder / "sweep.json", to_json(sweep))
        write_text(self.folder / "report.html", report(sweep))
        screen = Screen()
        screen.sweep(sweep)
        left = sweep.total - len(outcomes) if sweep.total is not None else 0
        if interrupted:
            still = f", {left} are missing" if left else ""
            screen.lines([f"interrupted; {len(outcomes)} jobs are kept{still}: the same command goes on"])
        if sweep.chosen is not None:
            self._say(f"rebuild    {sweep.chosen.rebuild}")
        self._say(f"report     {_shown(self.folder / 'report.html')}")

    @staticmethod
    def _say(text: str) -> None:
        print(text, flush=True)


def _recipe(job: Job, config: DictConfig, plain: Any) -> Recipe:
    """Of a job whose config is composed already, which saves a second time where nothing is open."""
    if left_open(plain["target"] or {}) or "???" in repr(plain):
        return Composer.of(job.overrides).compose()
    resolved = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    return Recipe(overrides=job.overrides, config={str(key): value for key, value in resolved.items()})


SINGLE_CHOICE = "choice({})"


def with_late_knobs(arguments: Sequence[str]) -> list[str]:
    """Arguments of a sweep that Hydra composes: knobs of a group whose option is swept become choices of one value.

    Hydra composes the command line once with all that is not swept, before it knows of any option of the group.
    """
    if not {"-m", "--multirun"} & set(arguments):
        return [*arguments]
    swept = {key for key, value in map(_split, arguments) if key in GROUPS and _is_choice(f"{key}={value}")}
    late = []
    for argument in arguments:
        key, value = _split(argument)
        knob = "." in key and section(key) in swept and value and not _is_choice(argument)
        late.append(f"{key}={SINGLE_CHOICE.format(value)}" if knob else argument)
    return late


def _split(argument: str) -> tuple[str, str]:
    key, _, value = argument.partition("=")
    return ("", "") if key.startswith("-") else (key, value)


def _is_choice(argument: str) -> bool:
    try:
        return OverridesParser.create().parse_override(argument).is_sweep_override()
    except HydraException:  # which is told when it is composed
        return False


def _without_single_choice(text: str) -> str:
    key, _, value = text.partition("=")
    before, after = SINGLE_CHOICE.split("{}")
    inner = value.removeprefix(before).removesuffix(after)
    return f"{key}={inner}" if value == f"{before}{inner}{after}" and not _is_choice(f"{key}={inner}") else text


def expanded(overrides: Sequence[Override]) -> list[Job]:
    """Every combination of the choices and ranges of a command line, the last choice varying fastest.

    Raises:
        ConfigError: an interval is no list of choices.
    """
    choices: dict[str, list[str]] = {}
    varied = []
    for override in overrides:
        key = override.get_key_element()
        choices.pop(key, None)
        if not override.is_sweep_override():
            choices[key] = [override.input_line or ""]
        elif override.is_discrete_sweep():
            varied.append(key)
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            remedy = "name values or a range(start,stop,step), or search it: hparams_search=..."
            raise ConfigError(f"{override.input_line} is no list of choices: {remedy}")
    return [
        Job(
            overrides=combination,
            varied=tuple(text for key, text in zip(choices, combination, strict=True) if key in varied),
        )
        for combination in itertools.product(*choices.values())
    ]


def line(outcome: Outcome) -> str:
    """One job on one line."""
    told = f"{outcome.job.told}: {'failed' if outcome.failed else outcome.verdict}"
    if outcome.failed:
        return f"{told}: {outcome.reason}"
    took = units.duration(outcome.seconds)
    if outcome.trial is None:
        return f"{told} ({took})"
    trial = restored(Trial, outcome.trial)
    if trial.training is not None:
        figure, against = f"{units.count(trial.training.samples_per_second.value)} rows/s", "plain"
    elif trial.evaluation is not None and not trial.evaluation.emulated:
        figure, against = f"p50 {units.latency(trial.evaluation.latency_ms['p50'].value)}", "eager"
    else:
        figure, against = "emulated", "eager"
    ratio = f", {units.ratio(trial.speedup[against].value)} vs {against}" if against in trial.speedup else ""
    return f"{told}, {figure}{ratio} ({took})"


def _command_line(typed: Sequence[str], of_hydra: Sequence[str], config_dir: Path | None) -> str:
    """That starts the sweep, and goes on with it."""
    where = ["--config-dir", str(config_dir)] if config_dir else []
    pipeline = [text.partition("=")[2] for text in typed if text.startswith("pipeline=")]
    rest = [text for text in typed if not text.startswith("pipeline=")]
    hydra = [text for text in of_hydra if not text.startswith("hydra.mode=")]
    return without_credentials(shlex.join(["hasten", *where, "-m", *pipeline, *hydra, *rest]))


def quoted(text: str) -> str:
    """As the value of an override."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _shown(folder: Path) -> str:
    """Relative to the working directory, where it lies below it."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)

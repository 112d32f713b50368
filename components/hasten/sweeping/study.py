"""The study of a search: kept in a database, shared by all who search the same, whoever of them dies."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal

from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Edit

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger(__name__)

EDIT, RECIPE, OWNER, RUNG, REASON, REFUSED = "edit", "recipe", "owner", "rung", "reason", "refused"
"""What is written beside a trial: its overrides, the identity of its recipe, who tries it, what its rungs gave, why it
ended, and why it was never tried."""
BEAT_SECONDS = 20
"""Between two signs of life of a trial that is under way."""
OPENINGS = 3
"""Attempts at opening a database."""
SILENT_SECONDS = 120
"""Without a sign of life after which a trial of another machine counts as lost."""


@dataclass(kw_only=True)
class Study:
    """One search.

    Attributes:
        shared: the study as Optuna has it.
        database: that it lies in.
        folder: of the sweep, as this process has it.
        running: trials that this process tries.
    """

    shared: optuna.Study
    database: RDBStorage
    folder: Path
    running: set[int] = field(default_factory=set)

    @classmethod
    def opened(
        cls,
        url: str,
        name: str,
        folder: Path,
        *,
        directions: Sequence[Literal["minimize", "maximize"]],
        sampler: optuna.samplers.BaseSampler,
        pruner: optuna.pruners.BasePruner,
    ) -> Study:
        """Creates it, or joins it where it is there.

        Raises:
            ConfigError: the database can't be reached, or the study there asks for something else.
        """
        import optuna
        from optuna.storages import RDBStorage

        shown = f"hparams_search.storage={without_credentials(url)}"

        def again(study: optuna.Study, trial: FrozenTrial) -> None:
            study.enqueue_trial(trial.params)

        def attempt() -> tuple[RDBStorage, optuna.Study]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # signs of life are called experimental
                database = RDBStorage(
                    _with_driver(url),
                    heartbeat_interval=BEAT_SECONDS,
                    grace_period=SILENT_SECONDS,
                    heartbeat_stale_trial_callback=again,
                )
            study = optuna.create_study(
                storage=database,
                study_name=name,
                directions=list(directions),
                sampler=sampler,
                pruner=pruner,
                load_if_exists=True,
            )
            return database, study

        for left in reversed(range(OPENINGS)):
            try:
                database, study = attempt()
                break
            except Exception as error:  # whatever the driver of a database raises
                if left and not isinstance(error, ImportError):
                    time.sleep(1)  # of processes that start together, one creates the tables
                    continue
                told = without_credentials(" ".join(str(error).split()))[:300]
                raise ConfigError(f"{shown} can't be opened: {type(error).__name__}: {told}") from None
        found = [direction.name.lower() for direction in study.directions]
        if found != list(directions):
            raise ConfigError(
                f"{shown} has a study {name} of {len(found)} objectives ({', '.join(found)}), and "
                f"hparams_search.objectives asks for {len(directions)} ({', '.join(directions)}): name another, "
                "hparams_search.study=..."
            )
        return cls(shared=study, database=database, folder=folder)

    def trials(self) -> list[FrozenTrial]:
        """All of them, in their order."""
        return self.shared.get_trials(deepcopy=False)

    def tried(self) -> list[FrozenTrial]:
        """Those that count: under way, or ended by themselves."""
        return [trial for trial in self.trials() if counts(trial)]

    def ask(self) -> Trial:
        """A new trial of this process; what others under way try counts as bad for the sampler."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice is for who calls Study.optimize
            return self.shared.ask()

    def begin(self, trial: Trial, edit: Edit, recipe: str) -> None:
        """Says what a trial tries, and that this process does."""
        trial.set_user_attr(RECIPE, recipe)
        trial.set_user_attr(OWNER, self._me())
        trial.set_user_attr(EDIT, list(edit))
        self._beat(trial._trial_id)

    def refuse(self, trial: Trial, reason: str) -> None:
        """Ends a trial that was never one. The sampler learns to look elsewhere."""
        from optuna.trial import TrialState

        trial.set_user_attr(REFUSED, reason)
        self.shared.tell(trial, state=TrialState.PRUNED)

    def end(self, trial: Trial, values: Sequence[float] | None, reason: str, limits: Mapping[str, float]) -> None:
        """Ends a trial with its values, or without any where it was given up.

        Args:
            limits: name -> excess of everything that it has to hold, above 0 where it does not.
        """
        from optuna.trial import TrialState

        for name, excess in limits.items():
            trial.set_constraint(name, excess)
        trial.set_user_attr(REASON, reason)
        if values is None:
            self.shared.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self.shared.tell(trial, list(values), skip_if_finished=True)
        self.running.discard(trial._trial_id)

    def taken_over(self) -> list[Trial]:
        """Trials of this folder whose process has died, which this process goes on with.

        Those of other folders on this machine are given up, and asked for once more; so are those of other machines
        which give no sign of life.
        """
        from filelock import FileLock
        from optuna.storages import fail_stale_trials
        from optuna.trial import Trial, TrialState

        mine = []
        with FileLock(self.folder / ".search.lock"):
            for frozen in self.shared.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
                owner = frozen.user_attrs.get(OWNER)
                if owner is None or owner["host"] != socket.gethostname() or _lives(owner):
                    continue
                if owner["folder"] == str(self.folder) and EDIT in frozen.user_attrs:
                    trial = Trial(self.shared, frozen._trial_id)
                    trial.set_user_attr(OWNER, self._me())
                    self._beat(frozen._trial_id)
                    mine.append(trial)
                else:
                    self.shared.tell(frozen.number, state=TrialState.FAIL)
                    self.shared.enqueue_trial(frozen.params)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fail_stale_trials(self.shared)
        return mine

    def release(self) -> None:
        """Leaves what this process has not ended to whoever starts the search again."""
        for trial_id in tuple(self.running):
            self.database.set_trial_user_attr(trial_id, OWNER, {**self._me(), "process": 0})
            self.running.discard(trial_id)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Gives signs of life of what this process tries."""
        stop = Event()

        def beat() -> None:
            while not stop.wait(BEAT_SECONDS):
                for trial_id in tuple(self.running):
                    try:
                        self.database.record_heartbeat(trial_id)
                    except Exception as error:  # the database is away for a while
                        log.debug("no sign of life of trial %s: %s", trial_id, without_credentials(str(error)))

        thread = Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _beat(self, trial_id: int) -> None:
        self.running.add(trial_id)
        self.database.record_heartbeat(trial_id)

    def _me(self) -> dict[str, Any]:
        process = os.getpid()
        return {"host": socket.gethostname(), "process": process, "began": _began(process), "folder": str(self.folder)}


def counts(trial: FrozenTrial) -> bool:
    """Whether it was tried: proposals that made no sense and trials that were lost do not count."""
    return EDIT in trial.user_attrs and (trial.state.name != "FAIL" or REASON in trial.user_attrs)


def _with_driver(url: str) -> str:
    """Of PostgreSQL with whichever driver there is: SQLAlchemy's choice without a name differs between its versions."""
    scheme, _, rest = url.partition("://")
    if scheme == "postgresql":
        found = [driver for driver in ("psycopg", "psycopg2") if find_spec(driver) is not None]
        if not found:
            raise ImportError("no driver of PostgreSQL is installed: pip install psycopg2-binary")
        return f"{scheme}+{found[0]}://{rest}"
    return url


def _lives(owner: Mapping[str, Any]) -> bool:
    """Whether that process of this machine is still the same one."""
    if owner["process"] == 0:  # released
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return bool(_began(owner["process"]) == owner["began"])


def _began(process: int) -> str:
    """When a process began, in the system's own unit; empty where the system does not tell."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[19]

"""`hparams_search=recipe`: the jobs of a sweep are proposed by Optuna, tried cheaply first, and the best in earnest."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hasten.core.errors import ConfigError, HastenError
from hasten.core.interfaces import Edit
from hasten.core.objective import Objective, excesses
from hasten.core.preflight import check_values
from hasten.core.recipe import Composer
from hasten.core.search_space import Point, SearchSpace
from hasten.core.sections import Search
from hasten.core.training_objective import TRAINING
from hasten.core.trial import Evaluation
from hasten.planning.sampling import require_optuna, sampler, suggested
from hasten.reporting.facts import restored
from hasten.session import Session
from hasten.sweeping.job import JOB_FILE, Job, Outcome, section
from hasten.sweeping.study import EDIT, REASON, RECIPE, RUNG, Study, counts
from hasten.sweeping.sweeper import HastenSweeper
from hasten.tracking.credentials import without_credentials

if TYPE_CHECKING:
    import optuna

DIRECTIONS: Mapping[str, Literal["minimize", "maximize"]] = {
    "latency": "minimize",
    "throughput": "maximize",
    "size": "minimize",
    "memory": "minimize",
    "quality": "maximize",
    "training": "maximize",
}
"""What `hparams_search.objectives` may name. latency: share of the time of eager PyTorch, measured in turns, so that
machines agree on it; throughput and training: rows per second against the same; size, memory: MB; quality: the first
metric, negative where lower is better."""
MAX_LEARNED = 40
"""Proposals of the sampler in a row that may lead to nothing new before points are drawn at random."""
MAX_PROPOSALS = 150
"""Proposals in a row that may lead to nothing new before the space counts as searched."""
UNTRAINED = ("speed", "throughput", "size", "memory", "integer_share")
"""Limits that no training mends: what breaks them untrained is given up."""
MAX_EXCESS = 1e6
"""How much worse than allowed what can't be compared counts: samplers add up what is broken."""


@dataclass(kw_only=True)
class _Candidate:
    """A trial under way.

    Attributes:
        rung: the next one that it is to be tried at.
        job: of that rung.
    """

    trial: optuna.Trial
    edit: Edit
    rung: int
    job: Job | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a job's recipe gave.

    Attributes:
        values: in the order of the objectives.
        quality: of its first metric, the more the better; None where nothing can judge it.
        limits: name -> excess of everything that it has to hold, above 0 where it does not.
    """

    values: tuple[float, ...]
    quality: float | None
    limits: Mapping[str, float] = field(default_factory=dict)


class OptunaSweeper(HastenSweeper):
    """Asks a study for points of the space and tells it what became of them.

    Several processes may search the same at once, on this machine in one folder, or on several over one database. Each
    point is a command line with the user's own overrides before it. It is tried at every rung, the cheapest first, as
    long as it stays promising.
    """

    exclusive: ClassVar[bool] = False
    ignored: ClassVar[tuple[str, ...]] = (
        *HastenSweeper.ignored,
        "hparams_search.timeout",
        "hparams_search.n_jobs",
        "hparams_search.storage",
    )

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        require_optuna("hparams_search")
        if config.hparams_search is None:
            raise ConfigError("hydra/sweeper=optuna needs to know what to search: hparams_search=recipe chooses both")
        if not self.keeping:
            asked = "dry_run=true" if config.dry_run else f"pipeline={config.pipeline.name}"
            raise ConfigError(f"hparams_search needs jobs that measure something: run or optimize, got {asked}")
        self.study: Study | None = None
        self._superseded: set[str] = set()
        self._gave_up = ""

    # What the sweep asks of a search.

    def jobs(self, overrides: Sequence[Override]) -> Generator[Sequence[Job], Sequence[Outcome], None]:
        typed = [override.input_line or "" for override in overrides]
        check_values(Composer.of(_plain(overrides)).compose())
        self.search = Search.of(_values(self.config.hparams_search))
        self.space = SearchSpace.of(_values(self.config.space))
        self._check()
        self.fixed = self._fixed(typed)
        self.objective = self._objective()
        self.session = Session.of(self.fixed, self.folder, self.task.folders)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study = study = self._opened()
        with study.alive():
            yield from self._searched(study)

    def _searched(self, study: Study) -> Generator[Sequence[Job], Sequence[Outcome], None]:
        """Batches, until enough has been tried, time is up, or nothing new is left."""
        started, points = time.monotonic(), self._proposals(study)
        under_way = [self._resumed(trial) for trial in study.taken_over()]
        if before := self._finished_before(study):
            yield before
        batch_size = self.search.n_jobs or self.at_once
        while True:
            late = self.search.timeout is not None and time.monotonic() - started >= self.search.timeout
            while not late and len(under_way) < batch_size and len(study.tried()) < self.search.n_trials:
                candidate = next(points, None)
                if candidate is None:
                    self._gave_up = "nothing new is left in the space"
                    break
                under_way.append(candidate)
            if late:
                self._gave_up = f"its {self.search.timeout:g} seconds are over (hparams_search.timeout)"
            if not under_way:
                return
            jobs = [self._job(candidate) for candidate in under_way]
            outcomes = {outcome.job: outcome for outcome in (yield jobs)}
            under_way = [it for it, job in zip(under_way, jobs, strict=True) if self._goes_on(study, it, outcomes[job])]

    def notes(self) -> Sequence[str]:
        """What became of the trials of the whole study, whoever tried them."""
        assert self.study is not None
        tried = self.study.tried()
        states = [trial.state.name for trial in tried]
        ended = f"{states.count('COMPLETE')} were tried in earnest, {states.count('PRUNED')} given up before"
        where = without_credentials(str(self.study.database.url))
        stopped = f" It ended as {self._gave_up}." if self._gave_up else ""
        return (
            f"Search by {self.search.sampler} for {', '.join(self.search.objectives)}: of {len(tried)} recipes {ended}."
            f"{stopped}",
            f"The study {self.study.shared.study_name} is kept in {where}.",
        )

    def _conclude(self, outcomes: Sequence[Outcome], *, interrupted: bool = False) -> None:
        """Of a recipe that was tried at several rungs, the last one is told."""
        if self.study is not None:
            self.study.release()
        last = [outcome for outcome in outcomes if outcome.folder.name not in self._superseded]
        super()._conclude(last, interrupted=interrupted)

    # From a proposal to a job.

    def _check(self) -> None:
        search = self.search
        if len(set(search.objectives)) < len(search.objectives):
            raise ConfigError(f"hparams_search.objectives names one twice: {', '.join(search.objectives)}")
        if search.pruner in ("median", "hyperband") and len(search.objectives) > 1:
            raise ConfigError(
                f"hparams_search.pruner={search.pruner} compares by one objective, got {len(search.objectives)} "
                f"({', '.join(search.objectives)}): halving or none"
            )
        if search.sampler == "grid":
            self.space.grid()

    def _fixed(self, typed: Sequence[str]) -> list[str]:
        """What every job has: the user's own overrides, and the pipeline and the budget that the search chose."""
        dropped = {"hparams_search"} | ({"space"} if self.config.pipeline.name == "run" else set())
        kept = [text for text in typed if section(text) not in dropped]
        said = {section(text) for text in kept if "." not in text.partition("=")[0]}
        pipeline = [] if "pipeline" in said else [f"pipeline={self.config.hydra.runtime.choices.pipeline}"]
        looks = "planner.max_trials"
        # So many look at the validation rows: the bounds of quality are corrected for it.
        budget = [] if any(text.startswith(f"{looks}=") for text in kept) else [f"{looks}={self.search.n_trials}"]
        return [*pipeline, *kept, *(budget if self.config.pipeline.name == "run" else [])]

    def _job(self, candidate: _Candidate) -> Job:
        edit = self._at(candidate.edit, candidate.rung)
        candidate.job = Job(overrides=(*self.fixed, *edit), varied=edit)
        return candidate.job

    def _at(self, edit: Edit, rung: int) -> Edit:
        return self.space.at(edit, tuple(self.search.rungs[rung]))

    def _rungs(self, edit: Edit) -> list[int]:
        """Rungs that make a recipe of their own of an edit; the last always does."""
        last = len(self.search.rungs) - 1
        seen: dict[Edit, int] = {self._at(edit, last): last}
        for rung in range(last):
            seen.setdefault(self._at(edit, rung), rung)
        return sorted(seen.values())

    def _next(self, edit: Edit, rung: int) -> int:
        return next(each for each in self._rungs(edit) if each >= rung)

    def _proposals(self, study: Study) -> Iterator[_Candidate]:
        """Points that make sense and are new, one after the other; it ends where none is found any more."""
        grid = iter(self.space.grid()) if self.search.sampler == "grid" else None
        asked = 0
        while asked < MAX_PROPOSALS:
            if grid is not None and not self._enqueued(study, grid):
                return
            if asked == MAX_LEARNED:  # it has settled on what is known
                study.shared.sampler = sampler("random", seed=self.search.seed + asked, startup_trials=1)
            trial = study.ask()
            point = suggested(self.space, trial)
            asked += 1
            reason, identity = self._refusal(study, point)
            if reason is not None:
                study.refuse(trial, reason)
                continue
            study.begin(trial, point.edit, identity)
            if asked > MAX_LEARNED:
                study.shared.sampler = self._sampler(trial.number + 1)
            asked = 0
            yield _Candidate(trial=trial, edit=point.edit, rung=self._next(point.edit, 0))

    def _enqueued(self, study: Study, grid: Iterator[Point]) -> bool:
        """Has the study ask for the next point of a grid that nobody has tried."""
        tried = {tuple(trial.user_attrs[EDIT]) for trial in study.tried()}
        refused = [trial.params for trial in study.trials() if not counts(trial)]
        for point in grid:
            if point.edit not in tried and dict(point.values) not in refused:
                study.shared.enqueue_trial(dict(point.values))
                return True
        return False

    def _refusal(self, study: Study, point: Point) -> tuple[str | None, str]:
        """Why a point is not to be tried, and the identity of its recipe."""
        engines = self.session.target.engines
        for text in point.edit:
            if text.startswith("engine=") and text.removeprefix("engine=") not in engines:
                return f"{text} is not among target.engines ({', '.join(engines)})", ""
        try:
            recipe = self.session.composer.compose(point.edit)
        except HastenError as error:
            return "; ".join(str(error).splitlines()), ""
        if reason := self.session.inadmissible(recipe):
            return reason, ""
        known = {trial.user_attrs[RECIPE]: trial.number for trial in study.tried()}
        if recipe.identity in known:
            return f"the same recipe as trial {known[recipe.identity]}", ""
        return None, recipe.identity

    # From an outcome to the study.

    def _goes_on(self, study: Study, candidate: _Candidate, outcome: Outcome) -> bool:
        """Tells the study what a job gave; whether its trial is to be tried at the next rung."""
        trial, last = candidate.trial, candidate.rung == len(self.search.rungs) - 1
        measured = self._measured(outcome)
        if measured is None:
            study.end(trial, None, f"failed: {without_credentials(outcome.reason)}", {})
            return False
        if last:
            study.end(trial, measured.values, outcome.reason, measured.limits)
            return False
        trial.set_user_attr(f"{RUNG} {candidate.rung}", {"values": measured.values, "quality": measured.quality})
        if reason := self._hopeless(study, candidate, measured):
            kept = {name: excess for name, excess in measured.limits.items() if name in UNTRAINED}
            study.end(trial, None, reason, kept)
            return False
        self._superseded.add(outcome.folder.name)
        candidate.rung = self._next(candidate.edit, candidate.rung + 1)
        return True

    def _hopeless(self, study: Study, candidate: _Candidate, measured: Measured) -> str | None:
        """Why a trial is not worth its next rung."""
        broken = [name for name in UNTRAINED if measured.limits.get(name, 0.0) > 0]
        if broken:
            return f"breaks a limit that no training mends: {', '.join(broken)}"
        trial, rung = candidate.trial, candidate.rung
        match self.search.pruner:
            case "median" | "hyperband":
                trial.report(measured.values[0], rung + 1)
                return f"given up at rung {rung} ({self.search.pruner})" if trial.should_prune() else None
            case "halving":
                found = [it.user_attrs.get(f"{RUNG} {rung}") for it in study.tried()]
                others = [self._worth(it["values"], it["quality"]) for it in found if it is not None]
                rank = standing(self._worth(measured.values, measured.quality), others)
                if rank >= max(1, math.ceil(self.search.keep * len(others))):
                    return f"given up at rung {rung}: {rank} of {len(others)} are better there (hparams_search.keep)"
        return None

    def _worth(self, values: Sequence[float], quality: float | None) -> tuple[float, ...]:
        """The objectives and the quality, whether or not it is one of them, the more the better."""
        signs = [1.0 if DIRECTIONS[name] == "maximize" else -1.0 for name in self.search.objectives]
        return (*(sign * value for sign, value in zip(signs, values, strict=True)), quality or 0.0)

    def _measured(self, outcome: Outcome) -> Measured | None:
        if outcome.trial is None:
            return None
        if (training := outcome.trial.get("training")) is not None:
            loss = training.get("loss")
            limits = {"loss": 0.0 if loss is None or loss["holds"] else 1.0}
            values = tuple(self._of_training(name, training) for name in self.search.objectives)
            return Measured(values=values, quality=None, limits=limits)
        evaluation = restored(Evaluation, outcome.trial["evaluation"])
        found = {name: min(excess, MAX_EXCESS) for name, excess in excesses(evaluation, self.objective).items()}
        # What is left for it to break is the share of integers that its quantization asks for.
        fewer = not outcome.trial["holds"] and all(excess <= 0 for excess in found.values())
        if outcome.trial["holds"]:  # so does the untouched model, which is compared with nothing
            found = {name: min(excess, 0.0) for name, excess in found.items()}
        return Measured(
            values=tuple(self._of_requests(name, evaluation) for name in self.search.objectives),
            quality=_quality(evaluation),
            limits={**found, "integer_share": float(fewer)},
        )

    @staticmethod
    def _of_requests(name: str, evaluation: Evaluation) -> float:
        match name:
            case "latency":
                if evaluation.emulated:
                    return evaluation.latency_ms["p50"].value
                ratio = evaluation.speedup.get("eager")
                return 1 / ratio.value if ratio else 1.0  # the untouched model itself
            case "throughput":
                return evaluation.throughput.value
            case "size":
                return evaluation.size_bytes / 1e6
            case "memory":
                return evaluation.memory_bytes / 1e6
            case "quality" if (quality := _quality(evaluation)) is not None:
                return quality
        why = "nothing can judge the outputs" if name == "quality" else "requests are made faster, not the training"
        raise ConfigError(f"hparams_search.objectives: {name} can't be measured here, as {why}")

    @staticmethod
    def _of_training(name: str, training: Mapping[str, Any]) -> float:
        if name == "memory":
            return float(training["memory_bytes"]) / 1e6
        if name != "training":
            raise ConfigError(
                f"hparams_search.objectives: {name} is not measured with objective=training: training or memory"
            )
        return float(training["speedup"]["plain"]["value"]) if "plain" in training["speedup"] else 1.0

    # The study.

    def _opened(self) -> Study:
        search = self.search
        url = search.storage or f"sqlite:///{self.folder / 'study.db'}"
        study = Study.opened(
            url,
            search.study or self.folder.name,
            self.folder,
            directions=[DIRECTIONS[name] for name in search.objectives],
            sampler=self._sampler(0),
            pruner=self._pruner(),
        )
        if found := len(study.trials()):  # started again, or by a second process: not the same draws once more
            study.shared.sampler = self._sampler(found)
        return study

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """One that draws anew, by the number of trials that there were."""
        seed = (self.search.seed * 10_007 + number) % 2**32
        return sampler(self.search.sampler, seed=seed, startup_trials=self.search.startup_trials)

    def _pruner(self) -> optuna.pruners.BasePruner:
        import optuna

        match self.search.pruner:
            case "median":
                return optuna.pruners.MedianPruner(n_startup_trials=self.search.startup_trials)
            case "hyperband":
                return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(2, len(self.search.rungs)))
            case _:
                return optuna.pruners.NopPruner()

    def _resumed(self, trial: optuna.Trial) -> _Candidate:
        """A trial that a process which died had begun, from its next rung on."""
        edit = tuple(trial.user_attrs[EDIT])
        passed = [rung for rung in range(len(self.search.rungs)) if f"{RUNG} {rung}" in trial.user_attrs]
        for rung in passed:
            self._superseded.add(self._named(edit, rung))
        return _Candidate(trial=trial, edit=edit, rung=self._next(edit, max(passed, default=-1) + 1))

    def _finished_before(self, study: Study) -> list[Job]:
        """Jobs of trials that have ended in this folder, so that the summary tells of them too."""
        found = []
        for trial in study.tried():
            if trial.state.name == "RUNNING" or REASON not in trial.user_attrs:
                continue
            edit = tuple(trial.user_attrs[EDIT])
            rungs = [rung for rung in self._rungs(edit) if (self.folder / self._named(edit, rung) / JOB_FILE).is_file()]
            if rungs:
                found.append(Job(overrides=(*self.fixed, *self._at(edit, rungs[-1])), varied=self._at(edit, rungs[-1])))
        return found

    def _named(self, edit: Edit, rung: int) -> str:
        at = self._at(edit, rung)
        return Job(overrides=(*self.fixed, *at), varied=at).name(self.config_dir)

    def _objective(self) -> Objective:
        node = _values(self.config.objective)
        limits = ("max_latency_ms", "min_throughput", "max_size_mb", "max_memory_mb")
        optimize = {"optimize": node["optimize"]} if node["optimize"] != TRAINING else {}
        return Objective(**optimize, **{name: node[name] for name in limits})


def standing(mine: Sequence[float], others: Sequence[Sequence[float]]) -> int:
    """How many of the others are better placed: dominated by fewer than this one is.

    One dominates another where it is as good in everything and better in something; the more the better.
    """
    placed = [sum(_dominates(rival, one) for rival in others) for one in others]
    beaten = sum(_dominates(rival, mine) for rival in others)
    return sum(place < beaten for place in placed)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(mine >= theirs for mine, theirs in pairs) and any(mine > theirs for mine, theirs in pairs)


def _quality(evaluation: Evaluation) -> float | None:
    """The first metric, the more the better."""
    if evaluation.quality is None:
        return None
    first = evaluation.metrics.get(evaluation.metric)
    return evaluation.quality if first is None or first.higher_is_better else -evaluation.quality


def _plain(overrides: Sequence[Override]) -> list[str]:
    """Overrides that are no choices.

    Raises:
        ConfigError: one is.
    """
    for override in overrides:
        if override.is_sweep_override():
            key = override.get_key_element()
            raise ConfigError(
                f"{override.input_line}: a search takes its choices from the space; +space.mine="
                f"{{key: {key}, values: [...]}} adds some, and without hparams_search every combination is run"
            )
    return [override.input_line or "" for override in overrides]


def _values(node: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}

"""How a search goes on: from what a study proposes to jobs, and from what they gave back to the study."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError
from hasten.core.interfaces import Edit
from hasten.core.objective import Objective, excesses
from hasten.core.search_space import Point, SearchSpace
from hasten.core.sections import Search
from hasten.core.trial import Evaluation
from hasten.planning.sampling import sampler, suggested
from hasten.reporting.facts import restored
from hasten.sweeping.job import JOB_FILE, Job, Outcome
from hasten.sweeping.study import EDIT, REASON, RECIPE, RUNG, Study, counts

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
"""What `hparams_search.objectives` may name. latency: share of the time of the untouched model in its best engine,
measured in turns, so that machines agree on it, and quiet and busy hours; training: training rows per second against
those of the untouched one; throughput: rows per second; size, memory: MB; quality: the first metric, negative where
lower is better."""
MAX_LEARNED = 40
"""Proposals of the sampler in a row that may lead to nothing new before points are drawn at random."""
MAX_PROPOSALS = 150
"""Proposals in a row that may lead to nothing new before the space counts as searched."""
FEW_POINTS = 500
"""Points of a space up to which it is counted what is left."""
UNTRAINED = ("speed", "throughput", "size", "memory", "integer_share")
"""Limits that no training mends: what breaks them untrained is given up."""
MAX_EXCESS = 1e6
"""How much worse than allowed what can't be compared counts: samplers add up what is broken."""


Judged = tuple[str | None, str]
"""Why a recipe makes no sense, or None, and its identity."""


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


@dataclass(kw_only=True)
class Searcher:
    """Points of a space as jobs, each at one rung after the other as long as it stays promising.

    Attributes:
        fixed: overrides that every job begins with.
        objective: limits that recipes have to hold.
        study: that is asked and told.
        folder: of the sweep, where jobs lie.
        config_dir: the user's own config folder, if there is one.
        judged: what is known of a point's recipe before it is tried.
        superseded: folders of jobs whose recipe was tried in earnest afterwards.
        refused: points that this process has found to make no sense, or nothing new.
        gave_up: why it ended before all trials were made; empty where it did not.
    """

    search: Search
    space: SearchSpace
    fixed: Sequence[str]
    objective: Objective
    study: Study
    folder: Path
    config_dir: Path | None
    judged: Callable[[Edit], Judged]
    superseded: set[str] = field(default_factory=set)
    refused: set[Edit] = field(default_factory=set)
    gave_up: str = ""

    def __post_init__(self) -> None:
        if found := len(self.study.trials()):  # started again, or by a second process: not the same draws once more
            self.study.shared.sampler = proposer(self.search, found)

    def batches(self, batch_size: int) -> Generator[Sequence[Job], Sequence[Outcome], None]:
        """Batches, until enough has been tried, time is up, or nothing new is left."""
        started, points = time.monotonic(), self._proposals()
        under_way = [self._resumed(trial) for trial in self.study.taken_over()]
        if before := self._finished_before():
            yield before
        while True:
            late = self.search.timeout is not None and time.monotonic() - started >= self.search.timeout
            while not late and len(under_way) < batch_size and len(self.study.tried()) < self.search.n_trials:
                candidate = next(points, None)
                if candidate is None:
                    self.gave_up = "nothing new is left in the space"
                    break
                under_way.append(candidate)
            if late:
                self.gave_up = f"its {self.search.timeout:g} seconds are over (hparams_search.timeout)"
            if not under_way:
                return
            jobs = [self._job(candidate) for candidate in under_way]
            outcomes = {outcome.job: outcome for outcome in (yield jobs)}
            under_way = [it for it, job in zip(under_way, jobs, strict=True) if self._goes_on(it, outcomes[job])]

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

    def _proposals(self) -> Iterator[_Candidate]:
        """Points that make sense and are new, one after the other; it ends where none is found any more."""
        grid = iter(self.space.grid()) if self.search.sampler == "grid" else None
        asked = 0
        while grid is not None or asked < MAX_PROPOSALS:
            if self._exhausted() or (grid is not None and not self._enqueued(grid)):
                return
            if asked == MAX_LEARNED:  # it has settled on what is known
                self.study.shared.sampler = sampler("random", seed=self.search.seed + asked, startup_trials=1)
            trial = self.study.ask()
            point = suggested(self.space, trial)
            asked += 1
            reason, identity = self._refusal(point)
            if reason is not None:
                self.refused.add(point.edit)
                self.study.refuse(trial, reason)
                continue
            self.study.begin(trial, point.edit, identity)
            if asked > MAX_LEARNED:
                self.study.shared.sampler = proposer(self.search, trial.number + 1)
            asked = 0
            yield _Candidate(trial=trial, edit=point.edit, rung=self._next(point.edit, 0))

    def _exhausted(self) -> bool:
        """Whether there are so few points that all of them are known."""
        if self._points is None:
            return False
        return self._points <= self.refused | {tuple(trial.user_attrs[EDIT]) for trial in self.study.tried()}

    @cached_property
    def _points(self) -> frozenset[Edit] | None:
        """All of them; None where they are many or can't be counted."""
        try:
            points = [point.edit for point in islice(self.space.grid(), FEW_POINTS + 1)]
        except ConfigError:
            return None
        return frozenset(points) if len(points) <= FEW_POINTS else None

    def _enqueued(self, grid: Iterator[Point]) -> bool:
        """Has the study ask for the next point of a grid that nobody has tried."""
        tried = {tuple(trial.user_attrs[EDIT]) for trial in self.study.tried()}
        refused = [trial.params for trial in self.study.trials() if not counts(trial)]
        for point in grid:
            if point.edit not in tried and dict(point.values) not in refused:
                self.study.shared.enqueue_trial(dict(point.values))
                return True
        return False

    def _refusal(self, point: Point) -> Judged:
        """Why a point is not to be tried, and the identity of its recipe."""
        reason, identity = self.judged(point.edit)
        if reason is None:
            known = {trial.user_attrs[RECIPE]: trial.number for trial in self.study.tried()}
            if identity in known:
                return f"the same recipe as trial {known[identity]}", identity
        return reason, identity

    def _goes_on(self, candidate: _Candidate, outcome: Outcome) -> bool:
        """Tells the study what a job gave; whether its trial is to be tried at the next rung."""
        trial, last = candidate.trial, candidate.rung == len(self.search.rungs) - 1
        measured = self._measured(outcome)
        if measured is None:
            self.study.end(trial, None, f"failed: {without_credentials(outcome.reason)}", {})
            return False
        if last:
            self.study.end(trial, measured.values, outcome.reason, measured.limits)
            return False
        trial.set_user_attr(f"{RUNG} {candidate.rung}", {"values": measured.values, "quality": measured.quality})
        if reason := self._hopeless(candidate, measured):
            kept = {name: excess for name, excess in measured.limits.items() if name in UNTRAINED}
            self.study.end(trial, None, reason, kept)
            return False
        self.superseded.add(outcome.folder.name)
        candidate.rung = self._next(candidate.edit, candidate.rung + 1)
        return True

    def _hopeless(self, candidate: _Candidate, measured: Measured) -> str | None:
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
                found = [it.user_attrs.get(f"{RUNG} {rung}") for it in self.study.tried()]
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
            values = tuple(_of_training(name, training) for name in self.search.objectives)
            return Measured(values=values, quality=None, limits=limits)
        evaluation = restored(Evaluation, outcome.trial["evaluation"])
        found = {name: min(excess, MAX_EXCESS) for name, excess in excesses(evaluation, self.objective).items()}
        # What is left for it to break is the share of integers that its quantization asks for.
        fewer = not outcome.trial["holds"] and all(excess <= 0 for excess in found.values())
        if outcome.trial["holds"]:  # so does the untouched model, which is compared with nothing
            found = {name: min(excess, 0.0) for name, excess in found.items()}
        return Measured(
            values=tuple(
                _of_requests(name, evaluation, _ratio(evaluation, outcome)) for name in self.search.objectives
            ),
            quality=_quality(evaluation),
            limits={**found, "integer_share": float(fewer)},
        )

    def _resumed(self, trial: optuna.Trial) -> _Candidate:
        """A trial that a process which died had begun, from its next rung on."""
        edit = tuple(trial.user_attrs[EDIT])
        passed = [rung for rung in range(len(self.search.rungs)) if f"{RUNG} {rung}" in trial.user_attrs]
        for rung in passed:
            self.superseded.add(self._named(edit, rung))
        return _Candidate(trial=trial, edit=edit, rung=self._next(edit, max(passed, default=-1) + 1))

    def _finished_before(self) -> list[Job]:
        """Jobs of trials that have ended in this folder, so that the summary tells of them too."""
        found = []
        for trial in self.study.tried():
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


def check(search: Search, space: SearchSpace) -> None:
    """
    Raises:
        ConfigError: what is asked for can't be searched so.
    """
    if len(set(search.objectives)) < len(search.objectives):
        raise ConfigError(f"hparams_search.objectives names one twice: {', '.join(search.objectives)}")
    if search.pruner in ("median", "hyperband") and len(search.objectives) > 1:
        raise ConfigError(
            f"hparams_search.pruner={search.pruner} compares by one objective, got {len(search.objectives)} "
            f"({', '.join(search.objectives)}): halving or none"
        )
    if search.sampler == "grid":
        space.grid()


def proposer(search: Search, number: int) -> optuna.samplers.BaseSampler:
    """A sampler that draws anew, by the number of trials that there were."""
    seed = (search.seed * 10_007 + number) % 2**32
    return sampler(search.sampler, seed=seed, startup_trials=search.startup_trials)


def pruner(search: Search) -> optuna.pruners.BasePruner:
    """Optuna's own, where the search asks for one of them."""
    import optuna

    match search.pruner:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=search.startup_trials)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(2, len(search.rungs)))
        case _:
            return optuna.pruners.NopPruner()


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


def _ratio(evaluation: Evaluation, outcome: Outcome) -> float | None:
    """How many times as fast as the untouched model in its best engine; None where nothing is compared by times."""
    measured = {name: ratio.value for name, ratio in evaluation.speedup.items()}
    if not measured and not evaluation.emulated and outcome.summary is not None:  # the untouched model itself
        measured = {name: float(ratio["value"]) for name, ratio in outcome.summary.get("speedup", {}).items()}
    return measured.get("engine", measured.get("eager"))


def _of_requests(name: str, evaluation: Evaluation, ratio: float | None) -> float:
    match name:
        case "latency":
            return 1 / ratio if ratio else evaluation.latency_ms["p50"].value
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


def _of_training(name: str, training: Mapping[str, Any]) -> float:
    if name == "memory":
        return float(training["memory_bytes"]) / 1e6
    if name != "training":
        raise ConfigError(
            f"hparams_search.objectives: {name} is not measured with objective=training: training or memory"
        )
    return float(training["speedup"]["plain"]["value"]) if "plain" in training["speedup"] else 1.0


def _quality(evaluation: Evaluation) -> float | None:
    """The first metric, the more the better."""
    if evaluation.quality is None:
        return None
    first = evaluation.metrics.get(evaluation.metric)
    return evaluation.quality if first is None or first.higher_is_better else -evaluation.quality

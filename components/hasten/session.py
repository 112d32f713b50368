"""What every pipeline works with: the user's recipe, the store, a way to try a recipe, and what a run leaves."""

from __future__ import annotations

import itertools
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from hasten.core.construct import construct, locate
from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError, HastenError
from hasten.core.files import read_json, write_json, write_text
from hasten.core.interfaces import Planner, Target, Tracker
from hasten.core.objective import Objective, gain, judge
from hasten.core.preflight import check, refusals
from hasten.core.recipe import UNTOUCHED, Composer, Recipe, rebuild_command, says_more
from hasten.core.sections import Distributed
from hasten.core.store import Store, code_folder
from hasten.core.training_objective import PLAIN_LOADER, PLAIN_STEP, TRAINING, TrainingObjective, judge_training
from hasten.core.trial import DATA, Choice, Diagnosis, Evaluation, Interval, Strategy, TrainingEvaluation, Trial
from hasten.reporting.terminal import Screen
from hasten.stages import followers

if TYPE_CHECKING:
    from hasten.stages.build import Built
    from hasten.stages.evaluate import Evaluator
    from hasten.stages.layout import Layouts
    from hasten.stages.training_evaluation import TrainingEvaluator
    from hasten.tracking.mlflow import MlflowTracker

log = logging.getLogger(__name__)

REQUEST_CHOICES = ("data", "model", "student", "distillation", "pruning", "quantization", "engine", "target")
TRAINING_CHOICES = ("loader", "trainer", "distributed")
"""Groups whose option people compare runs by."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trial together with the stages that it finished; `finished` is None where it failed before the last."""

    trial: Trial
    recipe: Recipe
    finished: Built | None = None

    @property
    def built(self) -> Built:
        assert self.finished is not None
        return self.finished

    @property
    def evaluation(self) -> Evaluation:
        assert self.trial.evaluation is not None
        return self.trial.evaluation

    @property
    def diagnosis(self) -> Diagnosis:
        """Only accepted trials are profiled."""
        assert self.trial.diagnosis is not None
        return self.trial.diagnosis


@dataclass(frozen=True, kw_only=True)
class UntouchedEngine:
    """The user's model as it is in one engine, and how much faster than in eager PyTorch it is there."""

    name: str
    built: Built
    speedup: Interval


@dataclass(kw_only=True)
class Session:
    """One command line, from its overrides to what it leaves.

    Attributes:
        composer: makes recipes out of overrides.
        recipe: what the user asked for, checked.
        folder: where this run leaves its results.
        config_dir: the user's own config folder, if there is one.
        candidates: every trial so far, in order; number 0 is the baseline.
        layouts: what `distributed=auto` was chosen from; None where it was not asked for.
    """

    composer: Composer
    recipe: Recipe
    folder: Path
    config_dir: Path | None = None
    candidates: list[Candidate] = field(default_factory=list)
    layouts: Layouts | None = None
    started: float = field(default_factory=time.monotonic)
    _refusals: dict[str, str | None] = field(default_factory=dict)
    _charged: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, overrides: Sequence[str], folder: Path, config_folders: Sequence[Path] = ()) -> Session:
        """Composes and checks the request.

        Raises:
            ConfigError: with one line for each thing that is wrong with it.
        """
        from hasten.stages.data import forget_fingerprints

        forget_fingerprints()
        composer = Composer.of(overrides)
        recipe = composer.compose()
        if (code := code_folder(store_folder(recipe))).is_dir() and str(code) not in sys.path:
            sys.path.append(str(code))
        check(recipe)
        known = composer.options("engine")
        if strangers := [name for name in recipe.section("target")["engines"] if name not in known]:
            there = ", ".join(known)
            raise ConfigError(f"target.engines: {', '.join(strangers)} is no option of engine; there are {there}")
        layouts = None
        if recipe.section("distributed")["kind"] == "auto":
            layouts = _spread(composer, recipe)
            composer = composer.settled(layouts.overrides)
            recipe = composer.compose()
            check(recipe)
        if planner := followers.planner():
            spread, min_nodes = Distributed.of(recipe.config["distributed"]), recipe.config["launch"]["min_nodes"]
            planner.meet(spread, store_folder(recipe), min_nodes=min_nodes)
        session = cls(
            composer=composer,
            recipe=recipe,
            folder=folder,
            config_dir=config_folders[0] if len(config_folders) > 1 else None,
            layouts=layouts,
        )
        if layouts is not None:
            session.screen.layouts(layouts.weighed, layouts.notes)
        return session

    @classmethod
    def of_part(cls, overrides: Sequence[str], sections: Sequence[str], folder: Path) -> Session:
        """What these sections say, unchecked: for a pipeline that has nothing to do with the recipe.

        Raises:
            ConfigError: an override of them names what there is not.
        """
        mine = [text for text in overrides if text.lstrip("+~").partition("=")[0].partition(".")[0] in sections]
        composer = Composer.of(map(_as_typed, mine))
        return cls(composer=composer, recipe=composer.compose(), folder=folder)

    @property
    def name(self) -> str:
        """Of the experiment, as people will look for it."""
        return str(self.recipe.config["name"] or self.recipe.option("data"))

    @cached_property
    def store(self) -> Store:
        return Store(store_folder(self.recipe))

    @cached_property
    def target(self) -> Target:
        return Target.of(self.recipe.section("target"))

    @property
    def speeds(self) -> str:
        """What is made faster: `requests` to the model, or its `training`."""
        return TRAINING if self.recipe.section("objective")["optimize"] == TRAINING else "requests"

    @cached_property
    def objective(self) -> Objective:
        """Of requests."""
        return Objective(**_own(Objective, self.recipe.section("objective")))

    @cached_property
    def training_objective(self) -> TrainingObjective:
        return TrainingObjective(**_own(TrainingObjective, self.recipe.section("objective")))

    @cached_property
    def screen(self) -> Screen:
        return Screen()

    @cached_property
    def tracker(self) -> Tracker:
        from hasten.tracking.guarded import Guarded

        tracker = construct(self.recipe.section("tracking"), "tracking")
        if not isinstance(tracker, Tracker):
            raise ConfigError(f"tracking._target_={self.recipe.section('tracking')['_target_']} is no Tracker")
        return Guarded(tracker)

    @property
    def mlflow(self) -> MlflowTracker:
        """Where runs are recorded, for those who read it.

        Raises:
            ConfigError: it is not in MLflow.
        """
        from hasten.tracking.mlflow import MlflowTracker

        node = self.recipe.section("tracking")
        tracker = construct(node, "tracking")
        if not isinstance(tracker, MlflowTracker):
            needs = f"hasten {self.recipe.config['pipeline']['name']} needs a record in MLflow"
            raise ConfigError(f"tracking._target_={node['_target_']} keeps none: {needs} (tracking=mlflow)")
        return tracker

    @cached_property
    def planner(self) -> Planner:
        planner = construct(self.recipe.section("planner"), "planner")
        if not isinstance(planner, Planner):
            raise ConfigError(f"planner._target_={self.recipe.section('planner')['_target_']} is no Planner")
        return planner

    @property
    def bench(self) -> Evaluator | TrainingEvaluator:
        """Builds and measures recipes."""
        return self.training_bench if self.speeds == TRAINING else self.request_bench

    @cached_property
    def training_bench(self) -> TrainingEvaluator:
        """Measures how recipes train."""
        from hasten.stages.training_evaluation import TrainingEvaluator

        return TrainingEvaluator(
            store=self.store,
            objective=self.training_objective,
            seed=self.recipe.config["seed"],
            progress=self.screen,
            checkpoint_seconds=self.recipe.config["callbacks"]["checkpoint_seconds"],
        )

    @cached_property
    def request_bench(self) -> Evaluator:
        """Builds recipes and measures their requests."""
        from hasten.stages.evaluate import Evaluator

        return Evaluator(
            store=self.store,
            target=self.target,
            objective=self.objective,
            looks=self.planner.max_trials,
            seed=self.recipe.config["seed"],
            progress=self.screen,
            checkpoint_seconds=self.recipe.config["callbacks"]["checkpoint_seconds"],
        )

    @cached_property
    def untouched(self) -> Recipe:
        """The user's model as it is, in eager PyTorch; its training as a plain script has it."""
        if self.speeds != TRAINING:
            return self.composer.compose(UNTOUCHED)
        plain = self.composer.compose([*UNTOUCHED, *PLAIN_LOADER])
        spread = Distributed.of(plain.config["distributed"])
        # A pipeline has no step without its micro-batches.
        kept = "trainer.micro_batches" if spread.mesh(spread.devices).pipeline > 1 else ""
        edits = [text for text in PLAIN_STEP if text.partition("=")[0] != kept and says_more(plain, text)]
        return self.composer.edited(plain, edits)

    def best_untouched_engine(self, baseline: Candidate) -> UntouchedEngine:
        """The untouched model in the target's engine that runs it fastest.

        It is what a compressed candidate has to be held against, so that what an engine gives is not credited to the
        compression. An engine that is missing or fails is left out with its reason.
        """
        best = self.eager_engine(baseline)
        for engine in self.target.engines:
            recipe = self.composer.compose([*UNTOUCHED, f"engine={engine}"])
            if recipe.identity == self.untouched.identity or _emulates(recipe):
                continue
            if reason := self.inadmissible(recipe):
                log.warning("%s", reason)
                continue
            try:
                built, evaluation, _ = self.request_bench.evaluate(
                    recipe, references={"eager": baseline.built}, baseline=baseline.built
                )
            except HastenError as error:
                log.warning("engine %s is left out: %s", engine, " ".join(str(error).split()))
                continue
            if evaluation.speedup["eager"].value > best.speedup.value:
                best = UntouchedEngine(name=engine, built=built, speedup=evaluation.speedup["eager"])
        return best

    @staticmethod
    def eager_engine(baseline: Candidate) -> UntouchedEngine:
        """The baseline as the best engine, where no other has been measured."""
        return UntouchedEngine(name="eager", built=baseline.built, speedup=Interval(value=1.0, low=1.0, high=1.0))

    def inadmissible(self, recipe: Recipe) -> str | None:
        """Why the recipe makes no sense here; None where it does."""
        if recipe.identity not in self._refusals:
            try:
                check(recipe)
                self._refusals[recipe.identity] = self.bench.unfit(recipe)
            except HastenError as error:
                self._refusals[recipe.identity] = "; ".join(str(error).splitlines())
        return self._refusals[recipe.identity]

    @cached_property
    def strategies(self) -> tuple[Strategy, ...]:
        """The moves that make faster what the objective asks for, and make sense for the task.

        Raises:
            ConfigError: a strategy makes no sense at all.
        """
        outputs = locate(self.recipe.section("task")["_target_"], "task").outputs
        mine = (each for each in self.composer.strategies() if each.speeds == self.speeds)
        return tuple(each for each in mine if each.outputs in (None, outputs))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Opens the record of the run; closes it as failed where the run ends without a result."""
        self.open()
        try:
            yield
        except BaseException as error:
            self.tracker.finish(None, self.folder, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise

    def show_estimate(self, baseline_seconds: float, strategies: Sequence[Strategy]) -> None:
        """Says what the run may cost at most, before it starts."""
        rows = [("baseline", 1, baseline_seconds)]
        rows += [(line.strategy, line.attempts, line.seconds) for line in self.planner.estimate([], strategies)]
        self.screen.estimate(rows, sum(seconds for _, _, seconds in rows))

    def show_plan(self, strategies: Sequence[Strategy] = ()) -> None:
        """Prints what would be done, stage by stage, with what the store already has.

        Args:
            strategies: of an optimisation; their first edits of the untouched model are shown too.
        """
        from hasten.stages.build import plan

        recipes = {"this recipe": self.recipe, "baseline": self.untouched}
        for strategy in strategies:
            for attempt in strategy.attempts:
                recipe = self.composer.edited(self.untouched, attempt)
                if self.inadmissible(recipe) is None:
                    recipes[" ".join(attempt)] = recipe
        shown: set[str] = set()
        for title, recipe in recipes.items():
            steps = (
                self.training_bench.plan(recipe)
                if self.speeds == TRAINING
                else [(planned.stage.name, planned.key, planned.entry) for planned in plan(recipe, self.store)]
            )
            rows = [
                (name, key, entry is not None, entry.seconds if entry else None)
                for name, key, entry in steps
                if key not in shown
            ]
            shown.update(key for _, key, *_ in rows)
            if rows:
                self.screen.stages(rows, title=title)

    def ready(self) -> float:
        """Reads the data and constructs the model: what is wrong with them is told before anything is left behind.

        Returns:
            Seconds that the baseline is expected to cost.

        Raises:
            ConfigError: the data can't be read, or the model does not fit them.
        """
        return self.bench.baseline_seconds(self.untouched)

    def open(self) -> None:
        """Writes the composed config into the run's folder and opens the record of the run."""
        self.folder = _claimed(self.folder)
        config_yaml = OmegaConf.to_yaml(OmegaConf.create(dict(self.recipe.config)))
        write_text(self.folder / "config.yaml", without_credentials(config_yaml))
        if self.layouts is not None:
            write_json(self.folder / "layouts.json", self.layouts.to_dict())
        overrides = [*self.composer.walk, *self.composer.base]
        self.tracker.start(self.name, config_yaml, overrides, self.folder)

    def rebuild_command(self, recipe: Recipe, speeds: str | None = None) -> str:
        """The command line that builds and measures a recipe again.

        Args:
            speeds: what of it is measured; None for what this run makes faster.
        """
        where = [text for text in self.composer.walk if text.startswith("store.folder=")]
        goal = ["objective=training"] if (speeds or self.speeds) == TRAINING else []
        return without_credentials(rebuild_command([*goal, *recipe.overrides, *where], self.config_dir))

    def references(self, best: Candidate, engine: UntouchedEngine) -> dict[str, Built]:
        """What a candidate is measured beside."""
        baseline = self.candidates[0].built
        if self.speeds == TRAINING:
            return {"plain": baseline, "previous": best.built}
        return {"eager": baseline, "engine": engine.built, "previous": best.built}

    def baseline(self) -> Candidate:
        """Trial 0: the untouched model in eager PyTorch.

        Raises:
            HastenError: it can't be built or measured; there is nothing to compare with then.
        """
        start = time.monotonic()
        built, evaluation, costs = self.bench.evaluate(self.untouched, references={}, baseline=None)
        trial = Trial(
            number=0,
            parent=None,
            overrides=self.untouched.overrides,
            edit=(),
            strategy="baseline",
            bottleneck="",
            verdict="accepted",
            reason=f"{'its training' if self.speeds == TRAINING else 'the model'} as it is, in eager PyTorch",
            seconds=self._charge(costs),
            spent=time.monotonic() - start,
            stages=built.keys,
            rebuild=self.rebuild_command(self.untouched),
            choices=self._choices(self.untouched),
            holds=True,
        )
        trial = self._profiled(_evaluated(trial, evaluation), built)
        self._say_data(built)
        return self.keep(Candidate(trial=trial, recipe=self.untouched, finished=built))

    def _say_data(self, built: Built) -> None:
        """Writes down which rows the run works with."""
        from hasten.data.prepare import read

        prepared = read(built.data.folder)
        told = {
            "name": self.recipe.option("data"),
            "fingerprint": prepared.fingerprint,
            "rows": dict(prepared.num_rows),
            "inputs": {each.name: f"{each.dtype} {list(each.shape)}" for each in prepared.inputs},
        }
        write_json(self.folder / DATA, told)

    def _choices(self, recipe: Recipe) -> dict[str, str]:
        """What matters of a recipe for those who compare it with others."""
        options = self.composer.choices(recipe)
        groups = (*REQUEST_CHOICES, *(TRAINING_CHOICES if self.speeds == TRAINING else ()))
        sparsity = recipe.section("pruning").get("sparsity")
        return {
            **{group: options[group] for group in groups},
            "pruning.sparsity": "none" if sparsity is None else str(sparsity),
        }

    def given(self) -> Choice:
        """The user's own recipe as an edit of the untouched model."""
        edit = tuple(text for text in self.recipe.overrides if text not in self.untouched.overrides)
        if self.speeds == TRAINING and any(text.startswith("loader.") for text in edit):
            edit = (f"loader={self.composer.choices(self.recipe)['loader']}", *edit)  # whose knobs they are
        return Choice(strategy="given", parent=0, edit=edit, expected_gain=None, why="declared on the command line")

    def attempt(
        self, choice: Choice, references: Mapping[str, Built], best: Candidate, *, failed_seconds: float = 0.0
    ) -> Candidate:
        """Tries one edit of a candidate's recipe: builds, measures and judges it. Whatever fails ends this trial only.

        Args:
            references: name -> finished build that the candidate's speed is compared with; `previous` is the best so
                far.
            failed_seconds: what a failed trial is charged with, so that a run that is started again decides the same.
        """
        parent = self.candidates[choice.parent]
        recipe = self.composer.edited(parent.recipe, choice.edit)
        number = len(self.candidates)
        start = time.monotonic()
        trial = Trial(
            number=number,
            parent=parent.trial.number,
            overrides=recipe.overrides,
            edit=choice.edit,
            strategy=choice.strategy,
            bottleneck=parent.trial.diagnosis.bottleneck if parent.trial.diagnosis else "",
            verdict="failed",
            reason="",
            expected_gain=choice.expected_gain,
            rebuild=self.rebuild_command(recipe),
            choices=self._choices(recipe),
        )
        built = None
        try:
            built, evaluation, costs = self.bench.evaluate(
                recipe, references=references, baseline=self.candidates[0].built
            )
            trial = self._judged(_evaluated(trial, evaluation), recipe, best, self._charge(costs))
            if trial.verdict == "accepted":
                trial = self._profiled(trial, built)
            trial = replace(trial, stages=built.keys)
        except HastenError as error:
            trial = replace(trial, reason=" ".join(str(error).split()), verdict="failed")
        except Exception as error:  # the one place: whatever a technique or an engine does, the loop goes on
            write_text(self.folder / f"trial-{number:02d}-error.txt", without_credentials(traceback.format_exc()))
            trial = replace(trial, reason=f"{type(error).__name__}: {' '.join(str(error).split())}", verdict="failed")
        if trial.verdict == "failed":
            trial = replace(
                trial, seconds=failed_seconds, evaluation=None, training=None, measured_gain=None, holds=False
            )
        trial = replace(trial, spent=time.monotonic() - start)
        return self.keep(Candidate(trial=trial, recipe=recipe, finished=built))

    def _judged(self, trial: Trial, recipe: Recipe, best: Candidate, cost: float) -> Trial:
        if trial.training is not None:
            assert best.trial.training is not None
            judgement = judge_training(trial.training, best.trial.training, self.training_objective)
            gained = trial.training.speedup["previous"].value
        else:
            assert trial.evaluation is not None
            share = recipe.section("quantization").get("min_integer_share") or 0.0
            judgement = judge(trial.evaluation, best.evaluation, self.objective, min_integer_share=share)
            gained = gain(trial.evaluation, best.evaluation, self.objective.quantity).value
        return replace(
            trial,
            verdict=judgement.verdict,
            reason=judgement.reason,
            holds=judgement.holds,
            measured_gain=gained,
            seconds=cost,
        )

    def _profiled(self, trial: Trial, built: Built) -> Trial:
        if trial.training is not None:
            return replace(trial, step_profile=self.training_bench.profile(built))
        assert trial.evaluation is not None
        return replace(trial, profile=self.request_bench.profile(built, trial.evaluation))

    def _charge(self, costs: Mapping[str, float]) -> float:
        """Recorded seconds of what no earlier trial of this run has been charged with, whoever spent them and when."""
        seconds = round(sum(spent for key, spent in costs.items() if key not in self._charged), 3)
        self._charged.update(costs)
        return seconds

    def keep(self, candidate: Candidate) -> Candidate:
        """Adds a finished trial to the history, the screen and the record."""
        self.candidates.append(candidate)
        self.screen.trial(candidate.trial)
        self.tracker.record(candidate.trial, _curves(candidate.finished), _files(self.folder, candidate.trial))
        return candidate


def _as_typed(text: str) -> str:
    """`run=12e4` as a text: an id of digits is no number."""
    name, _, value = text.partition("=")
    bare = value.strip("'\"")
    return f"run='{bare}'" if name == "run" and bare and "'" not in bare and bare != "null" else text


def store_folder(recipe: Recipe) -> Path:
    return Path(recipe.config["store"]["folder"]).absolute()


def _spread(composer: Composer, recipe: Recipe) -> Layouts:
    """What `distributed=auto` stands for in a recipe.

    Raises:
        ConfigError: nothing fits, or there are several hosts.
        HastenError: the model can't be looked at.
    """
    from hasten.stages.layout import choose

    planner = followers.planner()
    launched = recipe.config["pipeline"]["name"] == "launch" and recipe.config["launch"]["nodes"] > 1
    if launched or (planner is not None and planner.place.world > planner.place.local_world):
        raise ConfigError(
            "distributed=auto weighs by the memory, the cores and the link of one host, and this run has several: name "
            "the kind and its knobs (`dry_run=true` on one host shows the table)"
        )

    return choose(
        recipe,
        composer.typed("distributed"),
        Store(store_folder(recipe)),
        edit=lambda overrides: composer.settled(overrides).compose(),
        refusals=refusals,
        keep=not recipe.config["dry_run"],
    )


def _own(kind: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """What a section says of this kind of objective: an experiment may speak of the other kind as well."""
    return {each.name: section[each.name] for each in fields(kind) if each.name in section}


def _evaluated(trial: Trial, evaluation: Evaluation | TrainingEvaluation) -> Trial:
    if isinstance(evaluation, TrainingEvaluation):
        return replace(trial, training=evaluation)
    return replace(trial, evaluation=evaluation)


def _emulates(recipe: Recipe) -> bool:
    return bool(locate(recipe.section("engine")["_target_"], "engine").emulates)


def _curves(built: Built | None) -> dict[str, dict[str, list[float]]]:
    """Stage that trained -> its curves."""
    if built is None:
        return {}
    files = {name: entry.folder / "curves.json" for name, entry in built.entries.items()}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def _files(folder: Path, trial: Trial) -> dict[str, Path]:
    """What of a trial is kept beside its figures: its profile as a picture, its traceback."""
    found = {}
    error = folder / f"trial-{trial.number:02d}-error.txt"
    if error.is_file():
        found[error.name] = error
    if trial.profile is not None:
        from hasten.reporting import plots
        from hasten.reporting.page import picture

        found["profile.html"] = folder / "plots" / f"profile-{trial.number:02d}.html"
        title = f"trial {trial.number}"
        write_text(found["profile.html"], picture(title, plots.profiles([(title, trial.profile)])))
    return found


def _claimed(folder: Path) -> Path:
    """The folder, or one beside it where a run of the same second was faster."""
    for number in itertools.count(1):
        claimed = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        claimed.mkdir(parents=True, exist_ok=True)
        try:
            (claimed / "config.yaml").touch(exist_ok=False)
        except FileExistsError:
            continue
        return claimed
    raise AssertionError

"""Searches whose jobs are calculated in place of built, but for one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna

from hasten import cli
from hasten.core.errors import ConfigError
from hasten.core.files import write_json
from hasten.core.interfaces import Edit
from hasten.core.objective import Objective
from hasten.core.search_space import SearchSpace
from hasten.core.sections import Search
from hasten.core.trial import Drop, Evaluation, Interval, Quality, Trial
from hasten.reporting.facts import finite
from hasten.sweeping.job import JOB_FILE, Job, Outcome
from hasten.sweeping.searcher import DIRECTIONS, Searcher, check, proposer, pruner, standing
from hasten.sweeping.study import EDIT, REASON, Study

ALLOWED = 0.02
SPACE: Mapping[str, Any] = {
    "pruning": {"key": "pruning", "values": ["none", "structured"]},
    "sparsity": {"key": "pruning.sparsity", "low": 0.2, "high": 0.8, "step": 0.2},
    "engine": {"key": "engine", "values": ["eager", "onnxruntime"]},
}
"""Without pruning, or with 20, 40, 60 or 80 % of the channels gone, in two engines: ten recipes."""
CHEAP = "pruning.training.epochs=0"


def evaluation(speed: float, drop: float) -> Evaluation:
    def exact(value: float) -> Interval:
        return Interval(value=value, low=value, high=value)

    lost = Drop(value=drop, bound=drop, confidence=0.95, rows=100)
    return Evaluation(
        metric="accuracy",
        quality=0.98 - drop,
        drop=lost,
        latency_ms={name: exact(1 / speed) for name in ("p50", "p90", "p99")},
        throughput=exact(1e3 * speed),
        speedup={name: exact(speed) for name in ("eager", "engine", "previous")} if speed != 1 else {},
        references_ms={"eager": exact(1.0)},
        size_bytes=int(1e6 / speed),
        memory_bytes=10**8,
        flops=1,
        num_parameters=1,
        metrics={"accuracy": Quality(value=0.98 - drop, drop=lost, max_drop=ALLOWED, higher_is_better=True)},
    )


def calculated(recipe: Mapping[str, str]) -> Evaluation:
    """ONNX Runtime is four times as fast, a pruned share leaves its complement; untrained it loses ten times more."""
    gone = float(recipe.get("pruning.sparsity", 0.5)) if recipe["pruning"] == "structured" else 0.0
    speed = (4.0 if recipe["engine"] == "onnxruntime" else 1.0) / (1 - gone)
    untrained = bool(gone) and recipe.get("pruning.training.epochs") == "0"
    return evaluation(speed, gone / 25 * (10 if untrained else 1))


def trial(number: int, measured: Evaluation, overrides: tuple[str, ...]) -> Trial:
    assert measured.drop is not None
    holds = measured.drop.bound <= ALLOWED
    return Trial(
        number=number,
        parent=0 if number else None,
        overrides=overrides,
        edit=overrides,
        strategy="given" if number else "baseline",
        bottleneck="",
        verdict="accepted" if holds else "rejected",
        reason="calculated",
        holds=holds,
        evaluation=measured,
        rebuild="hasten run",
    )


@dataclass(frozen=True)
class JobSession:
    """As much of one as the pipeline asks for; nothing is composed a second time."""

    overrides: Sequence[str]
    folder: Path
    folders: Sequence[Path]


@dataclass
class Jobs:
    """In place of the pipeline `run`: leaves a calculated summary; is interrupted before the job of that number."""

    interrupted_at: int | None = None
    ran: list[tuple[str, ...]] = field(default_factory=list)

    def main(self, session: JobSession) -> int:
        if len(self.ran) == self.interrupted_at:
            raise KeyboardInterrupt
        overrides = tuple(session.overrides)
        self.ran.append(overrides)
        measured = calculated(dict(text.split("=", 1) for text in overrides))
        write_json(session.folder / "summary.json", summary(measured, overrides))
        return 0


def summary(measured: Evaluation, overrides: tuple[str, ...]) -> Any:
    """As `hasten run` leaves it."""
    baseline, own = (it.to_dict() for it in (trial(0, evaluation(1.0, 0.0), ()), trial(1, measured, overrides)))
    told = {"experiment": "digits", "optimize": "p50", "stopped": "one recipe"}
    return finite({**told, "baseline": baseline, "best": own, "trials": [baseline, own]})


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs()
    monkeypatch.setattr("hasten.pipelines.run.main", made.main)
    monkeypatch.setattr("hasten.pipelines.run.session", JobSession, raising=False)
    return made


@dataclass
class Driven:
    """A searcher whose jobs are calculated as soon as it asks for them."""

    searcher: Searcher
    study: Study
    ran: list[Job] = field(default_factory=list)

    def go(self, *, stop_after: int | None = None, batch_size: int = 1) -> Driven:
        batches = self.searcher.batches(batch_size)
        jobs = next(batches, None)
        while jobs is not None:
            if stop_after is not None and len(self.ran) >= stop_after:
                return self
            try:
                jobs = batches.send([self.tried(job) for job in jobs])
            except StopIteration:
                break
        return self

    def tried(self, job: Job) -> Outcome:
        folder = self.searcher.folder / job.name(None)
        if not (folder / JOB_FILE).is_file():
            self.ran.append(job)
            folder.mkdir(parents=True)
            recipe = dict(text.split("=") for text in job.overrides)
            write_json(folder / "summary.json", summary(calculated(recipe), job.overrides))
            write_json(folder / JOB_FILE, {})
        return Outcome(job=job, folder=folder, code=0, verdict="accepted", reason="calculated", seconds=1.0)

    @property
    def tells(self) -> list[Any]:
        return self.study.tried()


def driven(
    folder: Path, *, kept: bool = False, space: Any = SPACE, limits: Any = None, judged: Any = None, **knobs: Any
) -> Driven:
    """In memory, unless it is to be kept."""
    chosen = {"objectives": ["latency", "size", "quality"], "rungs": [[CHEAP], []], "n_trials": 6, **knobs}
    search, declared = Search(**chosen), SearchSpace.of(space)
    check(search, declared)
    folder.mkdir(exist_ok=True)
    study = Study.opened(
        f"sqlite:///{folder.parent / 'study.db'}" if kept else "sqlite:///:memory:",
        "one",
        folder,
        directions=[DIRECTIONS[name] for name in search.objectives],
        sampler=proposer(search, 0),
        pruner=pruner(search),
    )
    searcher = Searcher(
        search=search,
        space=declared,
        fixed=(),
        objective=Objective(**(limits or {})),
        study=study,
        folder=folder,
        config_dir=None,
        judged=judged or (lambda edit: (None, " ".join(edit))),
    )
    return Driven(searcher=searcher, study=study)


def test_tries_every_rung_and_tells_what_the_last_one_gave(tmp_path: Path) -> None:
    made = driven(tmp_path / "a", pruner="none").go()
    assert len(made.tells) == 6
    for told in made.tells:
        gone = told.params.get("sparsity", 0.0)
        speed = (4 if "onnxruntime" in told.params["engine"] else 1) / (1 - gone)
        assert told.state.name == "COMPLETE"
        assert told.values == pytest.approx([1 / speed, 1 / speed, 0.98 - gone / 25], abs=1e-5)
        assert (told.constraints["accuracy"] > 0) == (gone / 25 > ALLOWED)
    pruned = [it for it in made.tells if "sparsity" in it.params]
    assert len(made.ran) == len(made.tells) + len(pruned), "what has nothing to prune is tried once"
    assert len(made.searcher.superseded) == len(pruned)


def test_those_that_others_beat_at_a_cheap_rung_are_given_up(tmp_path: Path) -> None:
    # the same sparsities in the slower engine are worse in everything
    made = driven(tmp_path / "a", n_trials=10, sampler="grid", keep=0.3).go()
    given_up = [it for it in made.tells if it.state.name == "PRUNED"]
    assert given_up
    assert all("are better there (hparams_search.keep)" in it.user_attrs[REASON] for it in given_up)
    assert all(it.values is None for it in given_up)
    earnest = [it for it in made.tells if it.state.name == "COMPLETE"]
    assert len(made.ran) == len(made.tells) + sum("sparsity" in it.params for it in earnest)


@pytest.mark.parametrize("by", ["median", "hyperband"])
def test_optunas_own_pruners_compare_by_one_objective(tmp_path: Path, by: str) -> None:
    made = driven(tmp_path / "a", pruner=by, objectives=["latency"], n_trials=5, startup_trials=2).go()
    assert len(made.tells) == 5
    reasons = {it.user_attrs[REASON] for it in made.tells if it.state.name == "PRUNED"}
    assert reasons <= {f"given up at rung 0 ({by})"}


def test_what_breaks_a_limit_that_no_training_mends_is_given_up_untrained(tmp_path: Path) -> None:
    made = driven(
        tmp_path / "a", limits={"max_latency_ms": 0.5}, objectives=["latency"], sampler="grid", n_trials=10
    ).go()
    slow = [it for it in made.tells if "eager" in it.params["engine"] and it.params.get("sparsity", 1.0) < 0.5]
    assert len(slow) == 2
    assert {it.user_attrs[REASON] for it in slow} == {"breaks a limit that no training mends: speed"}
    assert all(it.constraints["speed"] > 0 and it.state.name == "PRUNED" for it in slow)


def test_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs: dict[str, Any] = {"kept": True, "pruner": "none", "n_trials": 5}
    first = driven(tmp_path / "a", **knobs).go(stop_after=3)
    assert len(first.ran) == 3
    monkeypatch.setattr("hasten.sweeping.study._lives", lambda owner: False)
    second = driven(tmp_path / "a", **knobs).go()
    assert len(second.tells) == 5
    assert {it.state.name for it in second.tells} == {"COMPLETE"}
    ran = [job.overrides for job in (*first.ran, *second.ran)]
    assert len(ran) == len(set(ran)), "nothing is measured twice"
    assert driven(tmp_path / "a", **knobs).go().ran == []


def test_what_a_process_does_not_end_it_leaves_to_the_next(tmp_path: Path) -> None:
    first = driven(tmp_path / "a", kept=True).go(stop_after=0)
    first.study.release()
    (left,) = driven(tmp_path / "a", kept=True).study.taken_over()
    assert left.user_attrs[EDIT] == first.tells[0].user_attrs[EDIT]


def test_as_many_are_tried_at_once_as_the_launcher_runs(tmp_path: Path) -> None:
    made = driven(tmp_path / "a")
    batches = made.searcher.batches(3)
    jobs = next(batches)
    assert len({job.overrides for job in jobs}) == 3


def test_a_grid_ends_when_every_recipe_was_tried(tmp_path: Path) -> None:
    made = driven(tmp_path / "a", space={**SPACE, "sparsity": None}, sampler="grid", n_trials=50).go()
    assert [" ".join(it.user_attrs[EDIT]) for it in made.tells] == [
        "pruning=none engine=eager",
        "pruning=none engine=onnxruntime",
        "pruning=structured engine=eager",
        "pruning=structured engine=onnxruntime",
    ]
    assert made.searcher.gave_up == "nothing new is left in the space"


def test_a_small_space_is_searched_when_all_of_it_is_known(tmp_path: Path) -> None:
    made = driven(tmp_path / "a", space={**SPACE, "sparsity": None}, n_trials=50).go()
    assert len(made.tells) == 4
    assert made.searcher.gave_up == "nothing new is left in the space"
    assert len(made.study.trials()) < 40


def test_what_makes_no_sense_is_no_trial(tmp_path: Path) -> None:
    def judged(edit: Edit) -> tuple[str | None, str]:
        return ("refused" if "engine=eager" in edit else None), " ".join(edit)

    made = driven(tmp_path / "a", judged=judged, sampler="random", n_trials=4).go()
    assert len(made.tells) == 4
    assert all("engine=onnxruntime" in job.overrides for job in made.ran)


def test_stops_when_its_time_is_over(tmp_path: Path) -> None:
    made = driven(tmp_path / "a", timeout=1e-9).go()
    assert made.ran == []
    assert made.searcher.gave_up == "its 1e-09 seconds are over (hparams_search.timeout)"


def test_failed_jobs_end_their_trials(tmp_path: Path) -> None:
    made = driven(tmp_path / "a")
    batches = made.searcher.batches(1)
    (job,) = next(batches)
    failed = Outcome(job=job, folder=tmp_path / "none", code=1, verdict="failed", reason="broken", seconds=1.0)
    assert next(iter(batches.send([failed]))) != job
    assert made.tells[0].user_attrs[REASON] == "failed: broken"


def test_says_what_can_not_be_searched_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pruner=median compares by one objective, got 3 .*: halving or none"):
        driven(tmp_path / "a", pruner="median")
    with pytest.raises(ConfigError, match=r"objectives names one twice: size, size"):
        driven(tmp_path / "a", objectives=["size", "size"])
    with pytest.raises(ConfigError, match=r"objectives: training can't be measured here"):
        driven(tmp_path / "a", objectives=["training"]).go()


SEARCH = (
    *("-m", "hparams_search=recipe", "tracking=none", "hydra.sweep.dir=sweep", "hparams_search.n_trials=2"),
    *("space.network=null", "space.widths=null", "space.distillation=null", "space.quantization=null"),
)


def test_the_command_line_goes_on_and_sums_up(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.interrupted_at = 1
    assert cli.run(SEARCH) == 130
    jobs.interrupted_at = None
    assert cli.run(SEARCH) == 0
    assert len(jobs.ran) == len(set(jobs.ran))
    sweep = json.loads(Path("sweep/sweep.json").read_text())
    assert len(sweep["jobs"]) == 2
    assert "2 recipes: " in " ".join(sweep["notes"])
    assert all("planner.max_trials=2" in overrides and "pipeline=run" in overrides for overrides in jobs.ran)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("hparams_search.sampler=best", "sampler must be one of tpe, nsga2, random, grid, got 'best'"),
        ("pruning.sparsity=0.1,0.2", "pruning.sparsity=0.1,0.2: a search takes its choices from the space"),
        ("dry_run=true", "hparams_search needs jobs that measure something: run or optimize, got dry_run=true"),
    ],
)
def test_says_in_one_line_what_is_wrong(wrong: str, told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*SEARCH, wrong]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hasten: ")]
    assert told in line


def test_a_search_is_many_runs(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(SEARCH[1:]) == 2
    assert "hparams_search searches many recipes, which -m runs" in capfd.readouterr().err


def test_a_missing_optuna_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hasten.planning.sampling.find_spec", lambda name: None)
    assert cli.run(SEARCH) == 2
    assert "pip install 'hasten[sweeps]'" in capfd.readouterr().err


def test_a_password_in_the_url_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Study.opened(
            "postgresql://me:secret@127.0.0.1:1/db",
            "one",
            tmp_path,
            directions=["minimize"],
            sampler=optuna.samplers.RandomSampler(),
            pruner=optuna.pruners.NopPruner(),
        )
    (problem,) = error.value.problems
    assert problem.startswith("hparams_search.storage=postgresql://***@127.0.0.1:1/db can't be opened: ")
    assert "secret" not in problem


def opened(folder: Path, name: str = "one") -> Study:
    folder.mkdir(exist_ok=True)
    return Study.opened(
        f"sqlite:///{folder.parent / 'study.db'}",
        name,
        folder,
        directions=["minimize"],
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.NopPruner(),
    )


def begun(study: Study, recipe: str) -> Any:
    asked = study.ask()
    asked.suggest_float("x", 0, 1)
    study.begin(asked, (f"recipe={recipe}",), recipe)
    return asked


def test_trials_of_a_dead_process_are_taken_over_in_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    begun(first, "lost")
    begun(second, "elsewhere")
    assert first.taken_over() == second.taken_over() == [], "their process lives"
    monkeypatch.setattr("hasten.sweeping.study._lives", lambda owner: False)
    (mine,) = opened(tmp_path / "a").taken_over()
    assert mine.user_attrs[EDIT] == ["recipe=lost"]
    states = [it.state.name for it in first.trials()]
    assert states == ["RUNNING", "FAIL", "WAITING"], "what nobody here goes on with is asked for once more"
    assert [it.number for it in first.tried()] == [0]


def test_two_processes_see_what_the_other_tries(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    one = begun(first, "one")
    first.end(one, [1.0], "calculated", {"accuracy": -0.1})
    begun(second, "two")
    second.refuse(second.ask(), "makes no sense")
    assert [it.user_attrs[EDIT] for it in first.tried()] == [["recipe=one"], ["recipe=two"]]
    assert len(first.trials()) == 3


def test_of_processes_that_start_together_none_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, failures = optuna.create_study, [RuntimeError("the table exists already")]

    def created(**knobs: Any) -> optuna.Study:
        if failures:
            raise failures.pop()
        return create(**knobs)

    monkeypatch.setattr("optuna.create_study", created)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert opened(tmp_path / "a").trials() == []


def test_a_study_of_other_objectives_is_refused(tmp_path: Path) -> None:
    study = opened(tmp_path / "a")
    with pytest.raises(Exception, match=r"has a study one of 1 objectives \(minimize\), and .* asks for 2"):
        Study.opened(
            str(study.database.url),
            "one",
            tmp_path,
            directions=["minimize", "maximize"],
            sampler=optuna.samplers.RandomSampler(),
            pruner=optuna.pruners.NopPruner(),
        )


@pytest.mark.parametrize(
    ("mine", "others", "place"),
    [
        ((1, 1), [(1, 1)], 0),
        ((1, 1), [(2, 0), (0, 2)], 0),
        ((1, 1), [(2, 2), (0, 0)], 1),
        ((0, 0), [(1, 1), (2, 2), (3, 0)], 3),
        ((2, 1), [(3, 3), (3, 2), (1, 1), (2, 1)], 2),
    ],
)
def test_who_is_better_by_several_objectives(mine: Any, others: Any, place: int) -> None:
    assert standing(mine, others) == place


@pytest.mark.slow
def test_searches_and_leaves_a_front(tiny: tuple[str, ...]) -> None:
    left_out = [f"space.{name}=null" for name in ("network", "widths", "pruning", "sparsity", "distillation")]
    assert (
        cli.run(["-m", "hparams_search=recipe", "hydra.sweep.dir=sweep", "space.quantization=null", *left_out, *tiny])
        == 0
    )
    sweep = json.loads(Path("sweep/sweep.json").read_text())
    assert len(sweep["jobs"]) == 2, "two engines, and nothing else to decide"
    study = optuna.load_study(study_name="sweep", storage="sqlite:///sweep/study.db")
    assert [it.user_attrs[REASON] != "" for it in study.trials if EDIT in it.user_attrs] == [True, True]
    assert study.best_trials

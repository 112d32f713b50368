"""Searches whose jobs are calculated in place of built, but for one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna

from hasten import cli
from hasten.core.files import write_json
from hasten.core.trial import Drop, Evaluation, Interval, Quality, Trial
from hasten.reporting.facts import finite
from hasten.sweeping.optuna import standing
from hasten.sweeping.study import EDIT, REASON, Study

ALLOWED = 0.02
SPACE = (
    "space.network=null",
    "space.widths=null",
    "space.distillation=null",
    "space.quantization=null",
    "space.sparsity.step=0.2",
    "space.engine.values=[eager,onnxruntime]",
)
"""Without pruning or with 20, 40, 60 or 80 % of the channels gone, in two engines: ten recipes."""
SEARCH = ("hparams_search=recipe", "hparams_search.rungs=[[pruning.training.epochs=0],[]]", "tracking=none")
RUNGS = "hparams_search.rungs=[[\"pruning.training.epochs=0\"],[]]"


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


def calculated(config: Mapping[str, Any]) -> Evaluation:
    """ONNX Runtime is four times as fast, a pruned share leaves its complement; untrained it loses ten times more."""
    pruning = config["pruning"]
    gone = pruning.get("sparsity") or 0.0
    speed = (4.0 if "onnxruntime" in config["engine"]["_target_"] else 1.0) / (1 - gone)
    untrained = bool(gone) and pruning["training"]["epochs"] == 0
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


@dataclass
class Jobs:
    """In place of the pipeline `run`: leaves a calculated summary; is interrupted before the job of that number."""

    interrupted_at: int | None = None
    ran: list[tuple[str, ...]] = field(default_factory=list)

    def main(self, session: Any) -> int:
        if len(self.ran) == self.interrupted_at:
            raise KeyboardInterrupt
        recipe = session.recipe
        self.ran.append(recipe.overrides)
        tried = [trial(0, evaluation(1.0, 0.0), ()), trial(1, calculated(recipe.config), recipe.overrides)]
        summary = {"experiment": "digits", "baseline": tried[0], "best": tried[1], "trials": tried}
        plain = {name: [it.to_dict() for it in each] if isinstance(each, list) else each for name, each in summary.items()}
        plain |= {name: plain[name].to_dict() for name in ("baseline", "best")}
        write_json(session.folder / "summary.json", finite({**plain, "stopped": "one recipe", "optimize": "p50"}))
        return 0


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs()
    monkeypatch.setattr("hasten.pipelines.run.main", made.main)
    return made


def search(*overrides: str) -> int:
    return cli.run(["-m", "hparams_search=recipe", RUNGS, *SPACE, "tracking=none", "hydra.sweep.dir=sweep", *overrides])


def studied(folder: str = "sweep") -> optuna.Study:
    return optuna.load_study(study_name=folder, storage=f"sqlite:///{folder}/study.db")


def tried() -> list[Any]:
    return [it for it in studied().trials if EDIT in it.user_attrs]


def test_tries_cheaply_first_and_the_better_in_earnest(jobs: Jobs) -> None:
    assert search("hparams_search.n_trials=7", "hparams_search.sampler=random") == 0
    trials = tried()
    assert len(trials) == 7
    assert all(it.state.is_finished() and REASON in it.user_attrs for it in trials)
    given_up = [it for it in trials if it.state.name == "PRUNED"]
    assert given_up
    assert all("are better there (hparams_search.keep)" in it.user_attrs[REASON] for it in given_up)
    # those without pruning are tried once, those that go on twice
    unpruned = [it for it in trials if "pruning=none" in it.user_attrs[EDIT]]
    in_earnest = len(trials) - len(given_up) - len(unpruned)
    assert len(jobs.ran) == len(trials) + in_earnest
    best = next(it for it in trials if it.state.name == "COMPLETE" and "engine=onnxruntime" in it.user_attrs[EDIT])
    gone = best.params.get("sparsity", 0.0)
    assert best.values == pytest.approx([(1 - gone) / 4, int(1e6 * (1 - gone) / 4) / 1e6, 0.98 - gone / 25])
    assert best.constraints["accuracy"] == pytest.approx(gone / 25 - ALLOWED if gone / 25 > ALLOWED else min(0, gone / 25 - ALLOWED))
    sweep = json.loads(Path("sweep/sweep.json").read_text())
    assert len(sweep["jobs"]) == 7
    assert "of 7 recipes" in str(sweep)


def test_goes_on_where_it_was_interrupted(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.interrupted_at = 3
    search_ = ("hparams_search.n_trials=5", "hparams_search.pruner=none", "hparams_search.objectives=[latency]")
    assert search(*search_) == 130
    assert len(jobs.ran) == 3
    jobs.interrupted_at = None
    assert search(*search_) == 0
    trials = tried()
    assert len(trials) == 5
    assert all(it.state.name == "COMPLETE" for it in trials)
    assert len(jobs.ran) == len(set(jobs.ran)), "no recipe was measured twice"
    assert len(json.loads(Path("sweep/sweep.json").read_text())["jobs"]) == 5
    before = len(jobs.ran)
    assert search(*search_) == 0
    assert len(jobs.ran) == before
    assert len(tried()) == 5


def test_a_grid_ends_when_every_recipe_was_tried(jobs: Jobs) -> None:
    assert search("hparams_search.sampler=grid", "hparams_search.n_trials=50", "space.sparsity=null", RUNGS.replace("pruning.training.epochs=0", "seed=1")) == 0
    assert sorted(" ".join(it.user_attrs[EDIT]) for it in tried()) == [
        "pruning=none engine=eager",
        "pruning=none engine=onnxruntime",
        "pruning=structured engine=eager",
        "pruning=structured engine=onnxruntime",
    ]


def test_what_breaks_a_limit_that_no_training_mends_is_given_up_untrained(jobs: Jobs) -> None:
    fast = ("objective.max_latency_ms=0.3", "hparams_search.pruner=none", "hparams_search.objectives=[latency]")
    assert search(*fast, "hparams_search.n_trials=6", "space.engine.values=[eager]", "space.pruning.values=[structured]") == 0
    trials = tried()
    slow = [it for it in trials if it.params["sparsity"] < 0.7]
    assert slow
    assert {it.user_attrs[REASON] for it in slow} == {"breaks a limit that no training mends: speed"}
    assert {it.state.name for it in slow} == {"PRUNED"}
    assert all(it.constraints["speed"] > 0 for it in slow)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["hparams_search.n_trials=0"], "n_trials must be an integer of at least 1, got 0 (hparams_search.n_trials)"),
        (
            ["hparams_search.sampler=best"],
            "sampler must be one of tpe, nsga2, random, grid, got 'best' (hparams_search.sampler)",
        ),
        (
            ["hparams_search.pruner=median"],
            "hparams_search.pruner=median compares by one objective, got 3 (latency, size, quality): halving or none",
        ),
        (["space.sparsity.low=0.9"], "space.sparsity.low must be at most space.sparsity.high=0.8, got 0.9"),
        (["pruning.sparsity=0.1,0.2"], "pruning.sparsity=0.1,0.2: a search takes its choices from the space"),
        (["dry_run=true"], "hparams_search needs jobs that measure something: run or optimize, got dry_run=true"),
        (
            ["hparams_search.storage=postgresql://me:secret@127.0.0.1:1/db"],
            "hparams_search.storage=postgresql://***@127.0.0.1:1/db can't be opened",
        ),
    ],
)
def test_says_in_one_line_what_is_wrong(wrong: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert search(*wrong) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hasten: ")]
    assert told in line
    assert "secret" not in line


def test_a_missing_optuna_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hasten.planning.sampling.find_spec", lambda name: None)
    assert search() == 2
    assert "pip install 'hasten[sweeps]'" in capfd.readouterr().err


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
    mine = ["-m", "hparams_search=recipe", "hparams_search.n_trials=3", "hydra.sweep.dir=sweep", *tiny]
    assert cli.run([*mine, "space.network=null", "space.widths=null", "space.pruning=null", "space.sparsity=null", "space.distillation=null"]) in (0, 1)
    sweep = json.loads(Path("sweep/sweep.json").read_text())
    assert len(sweep["jobs"]) == 3
    assert len([it for it in tried() if it.state.name == "COMPLETE"]) == len({it.params["engine"] for it in tried()}) or tried()

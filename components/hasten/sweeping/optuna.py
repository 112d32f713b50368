"""`hparams_search=recipe`: the jobs of a sweep are proposed by Optuna, tried cheaply first, and the best in earnest."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar

from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hasten.core.credentials import without_credentials
from hasten.core.errors import ConfigError, HastenError
from hasten.core.interfaces import Edit
from hasten.core.objective import Objective
from hasten.core.preflight import check_values
from hasten.core.recipe import Composer
from hasten.core.search_space import SearchSpace
from hasten.core.sections import Search
from hasten.core.training_objective import TRAINING
from hasten.planning.sampling import require_optuna
from hasten.session import Session
from hasten.sweeping.job import Job, Outcome, section
from hasten.sweeping.searcher import DIRECTIONS, Judged, Searcher, check, proposer, pruner
from hasten.sweeping.study import Study
from hasten.sweeping.sweeper import HastenSweeper


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
        self.searcher: Searcher | None = None

    def jobs(self, overrides: Sequence[Override]) -> Generator[Sequence[Job], Sequence[Outcome], None]:
        typed = _plain(overrides)
        check_values(Composer.of(typed).compose())
        search = Search.of(_values(self.config.hparams_search))
        fixed = self._fixed(typed, search)
        space = SearchSpace.of(_values(self.config.space), fixed)
        check(search, space)
        self.session = Session.of(fixed, self.folder, self.task.folders)
        self.folder.mkdir(parents=True, exist_ok=True)
        study = Study.opened(
            search.storage or f"sqlite:///{self.folder / 'study.db'}",
            search.study or self.folder.name,
            self.folder,
            directions=[DIRECTIONS[name] for name in search.objectives],
            sampler=proposer(search, 0),
            pruner=pruner(search),
        )
        self.searcher = Searcher(
            search=search,
            space=space,
            fixed=fixed,
            objective=self._objective(),
            study=study,
            folder=self.folder,
            config_dir=self.config_dir,
            judged=self._judged,
        )
        with study.alive():
            yield from self.searcher.batches(search.n_jobs or self.at_once)

    def notes(self) -> Sequence[str]:
        """What became of the trials of the whole study, whoever tried them."""
        assert self.searcher is not None
        search, study, gave_up = self.searcher.search, self.searcher.study, self.searcher.gave_up
        states = [trial.state.name for trial in study.tried()]
        ended = f"{states.count('COMPLETE')} were tried in earnest, {states.count('PRUNED')} given up before"
        stopped = f" It ended as {gave_up}." if gave_up else ""
        return (
            f"Search by {search.sampler} for {', '.join(search.objectives)}, {len(states)} recipes: {ended}.{stopped}",
            f"The study {study.shared.study_name} is kept in {without_credentials(str(study.database.url))}.",
        )

    def _conclude(self, outcomes: Sequence[Outcome], *, interrupted: bool = False) -> None:
        """Of a recipe that was tried at several rungs, the last one is told."""
        passed: set[str] = set()
        if self.searcher is not None:
            self.searcher.study.release()
            passed = self.searcher.superseded
        last = [outcome for outcome in outcomes if outcome.folder.name not in passed]
        super()._conclude(last, interrupted=interrupted)

    def _fixed(self, typed: Sequence[str], search: Search) -> list[str]:
        """What every job has: the user's own overrides, and the pipeline and the budget that the search chose."""
        one_recipe = self.config.pipeline.name == "run"
        dropped = {"hparams_search"} | ({"space"} if one_recipe else set())
        kept = [text for text in typed if section(text) not in dropped]
        keys = {text.lstrip("+").partition("=")[0] for text in kept}
        pipeline = [] if "pipeline" in keys else [f"pipeline={self.config.hydra.runtime.choices.pipeline}"]
        # So many look at the validation rows: the bounds of quality are corrected for it.
        looks = [f"planner.max_trials={search.n_trials}"]
        return [*pipeline, *kept, *(looks if one_recipe and "planner.max_trials" not in keys else [])]

    def _judged(self, edit: Edit) -> Judged:
        engines = self.session.target.engines
        for text in edit:
            if text.startswith("engine=") and text.removeprefix("engine=") not in engines:
                return f"{text} is not among target.engines ({', '.join(engines)})", ""
        try:
            recipe = self.session.composer.compose(edit)
        except HastenError as error:
            return "; ".join(str(error).splitlines()), ""
        return self.session.inadmissible(recipe), recipe.identity

    def _objective(self) -> Objective:
        node = _values(self.config.objective)
        limits = ("max_latency_ms", "min_throughput", "max_size_mb", "max_memory_mb")
        optimize = {"optimize": node["optimize"]} if node["optimize"] != TRAINING else {}
        return Objective(**optimize, **{name: node[name] for name in limits})


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

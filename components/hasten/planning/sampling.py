"""Optuna's samplers over a space of recipes: imported where a search begins, and nowhere before."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from hasten.core.errors import ConfigError
from hasten.core.search_space import Alternatives, Decision, Point, SearchSpace, Value

if TYPE_CHECKING:
    import optuna

Sampler = Literal["tpe", "nsga2", "random", "grid"]
"""tpe: recipes like the better ones are likelier (Bergstra et al. 2011). nsga2: generations, by Pareto rank (Deb et al.
2002). random: each as likely as any other. grid: one after the other, in the order of the space."""


def require_optuna(key: str) -> None:
    """Raises ConfigError, in one line that says how to get it, where Optuna is not installed."""
    if find_spec("optuna") is None:
        raise ConfigError(f"{key} needs Optuna, which is not installed: pip install 'hasten[sweeps]'")


def sampler(name: Sampler, *, seed: int, startup_trials: int) -> optuna.samplers.BaseSampler:
    """One that draws: a grid draws at random what nobody enqueued.

    Args:
        startup_trials: of tpe, drawn at random before it learns from them; of nsga2, the size of a generation.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells every trial; hasten does so in its own words
    match name:
        case "tpe":
            # Each decision by itself: with few trials, most of them of other options, the densities of all together see
            # single points. What is under way, here or elsewhere, counts as bad, so that nobody tries it too.
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=startup_trials, multivariate=False, constant_liar=True
            )
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, startup_trials))
        case "random" | "grid":
            return optuna.samplers.RandomSampler(seed=seed)


def suggested(space: SearchSpace, trial: Any) -> Point:
    """The point that Optuna chooses in a trial."""

    def decide(decision: Decision) -> Value:
        if isinstance(decision, Alternatives):
            choice: str = trial.suggest_categorical(decision.name, list(decision.offered))
            return choice
        if decision.whole:
            step = int(decision.step or 1)
            whole: int = trial.suggest_int(
                decision.name, int(decision.low), int(decision.high), step=step, log=decision.log
            )
            return whole
        number: float = trial.suggest_float(
            decision.name, decision.low, decision.high, step=decision.step, log=decision.log
        )
        return number

    return space.point(decide)

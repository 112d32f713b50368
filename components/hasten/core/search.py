"""What a strategy searches: the forms of `search` that its YAML may declare, and the edits that they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Edit
from hasten.core.trial import Strategy

LEFT_OUT = ("none", "same")
"""Options that stand for no technique: they have no knobs that a rung could set."""


@dataclass(frozen=True, kw_only=True)
class Halving:
    """`search.halving` of a strategy: many candidates tried cheaply, few of them in earnest.

    Attributes:
        space: choices that are made together, each given by its alternatives, which are lists of overrides. A candidate
            is an attempt of the strategy with one alternative of every choice.
        rungs: overrides that are added to the candidates, the cheapest rung first. One goes to the candidates that
            choose its group: `pruning.training.epochs=0` to those with `pruning=...` other than none. An empty list
            is the candidate as it is.
        keep: share of a rung's candidates that goes on to the next, in (0, 1); at least one goes on.
    """

    space: tuple[tuple[Edit, ...], ...]
    rungs: tuple[Edit, ...]
    keep: float

    @classmethod
    def of(cls, node: Any) -> Halving:
        """From the YAML.

        Raises:
            ConfigError: it is not spelt as it has to be.
        """
        try:
            halving = cls(
                space=tuple(tuple(_edit(edit) for edit in choice) for choice in node["space"].values()),
                rungs=tuple(_edit(rung) for rung in node["rungs"]),
                keep=float(node["keep"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wanted = "space (name: list of alternatives), rungs (list of lists of overrides) and keep"
            raise ConfigError(f"search.halving must spell {wanted}: {type(error).__name__}: {error}") from error
        if not halving.rungs or not all(halving.space):
            raise ConfigError(
                "search.halving needs at least one rung, and an alternative for every choice of its space"
            )
        if not 0 < halving.keep < 1:
            raise ConfigError(f"search.halving.keep must be a number in (0, 1), got {halving.keep:g}")
        return halving

    def candidates(self, attempts: Sequence[Edit]) -> tuple[Edit, ...]:
        """Every attempt with every combination of the space, in the order in which they are declared."""
        return tuple(tuple(itertools.chain(*parts)) for parts in itertools.product(attempts, *self.space))

    def at(self, candidate: Edit, rung: int) -> Edit:
        """The candidate as it is tried at a rung."""
        chosen = {key for key, _, option in (text.partition("=") for text in candidate) if option not in LEFT_OUT}
        return (*candidate, *(text for text in self.rungs[rung] if text.partition(".")[0] in chosen))

    def useless(self, attempts: Sequence[Edit]) -> list[str]:
        """Overrides of rungs that no candidate takes."""
        taken = {text for candidate in self.candidates(attempts) for edit in self._tried(candidate) for text in edit}
        return [text for rung in self.rungs for text in rung if text not in taken]

    def covering(self, attempts: Sequence[Edit]) -> Iterator[Edit]:
        """A few of the edits that are tried, which between them hold all overrides of the search."""
        seen: set[str] = set()
        for candidate in self.candidates(attempts):
            for edit in self._tried(candidate):
                if not seen.issuperset(edit):
                    seen.update(edit)
                    yield edit

    def _tried(self, candidate: Edit) -> Iterator[Edit]:
        return (self.at(candidate, rung) for rung in range(len(self.rungs)))


def halving(search: Mapping[str, Any] | None) -> Halving | None:
    """The successive halving that a strategy declares; None where it searches otherwise, or nothing.

    Raises:
        ConfigError: it is not spelt as it has to be.
    """
    return Halving.of(search["halving"]) if search and "halving" in search else None


def covering(strategy: Strategy) -> tuple[Edit, ...]:
    """Edits of a strategy which between them hold every override that it may try; of a bisected knob, its first value.

    Raises:
        ConfigError: its search is not spelt as it has to be.
    """
    if strategy.search is None:
        return strategy.attempts
    if declared := halving(strategy.search):
        return tuple(declared.covering(strategy.attempts))
    if not {"key", "low"} <= strategy.search.keys():
        raise ConfigError(f"search must spell key, low, high and tolerance, or halving, got {dict(strategy.search)}")
    first = f"{strategy.search['key']}={strategy.search['low']}"
    return tuple((*attempt, first) for attempt in strategy.attempts)


def _edit(overrides: Any) -> Edit:
    if not isinstance(overrides, list):
        raise TypeError(f"{overrides!r} is no list of overrides")
    return tuple(str(text) for text in overrides)

"""The measured search of an engine's own settings (`engine.search_seconds`): threads, layout, how far a graph is
optimised.

Coordinate descent: from the settings as they are given, every value that the engine declares worth trying
(`Engine.tunable`) is compiled and timed in turns with the best so far, setting after setting, as long as there is time.
What is measurably faster takes the best one's place. Where anything did, it is measured once more against the settings
as given: the fastest of many measurements owes part of its lead to luck, and this figure does not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors.numpy import load_file

from hasten.core.construct import construct, locate
from hasten.core.errors import ConfigError, EngineError
from hasten.core.interfaces import Engine, Graph, Target
from hasten.core.trial import Interval
from hasten.evidence import latency
from hasten.evidence.process import Worker

BUDGET = "search_seconds"
BRIEFLY = latency.LatencyProtocol(min_rounds=10, max_rounds=20, precision=0.01, max_seconds=5.0)
_CONFIDENCE = 0.95
_BASE = "base"

Node = Mapping[str, Any]
"""An engine with its settings, as the config spells it."""

Compare = Callable[[Node, Node], Interval | None]
"""How many times as fast the second is as the first; None where the engine refuses the second."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gave.

    Attributes:
        node: the engine with the settings that won, or those that were given.
        changes: the settings that won where others were given, as `name=value`.
        gain: of them over those that were given; None where these won.
        num_tried: settings that were compiled and timed, or refused.
        num_settings: settings that there were to be tried.
        seconds: that it took.
    """

    node: Node
    changes: tuple[str, ...]
    gain: Interval | None
    num_tried: int
    num_settings: int
    seconds: float

    def told(self) -> str:
        """In a sentence for the report."""
        left = self.num_settings - self.num_tried
        searched = f"searched {self.num_tried} of {self.num_settings} settings of the engine in {self.seconds:.0f} s"
        searched += f" ({left} left for want of time, engine.{BUDGET})" if left else ""
        if self.gain is None:
            return f"{searched}: none is measurably faster than those given"
        ratio = f"{self.gain.value:.2f}x [{self.gain.low:.2f}, {self.gain.high:.2f}]"
        return f"{searched}: {', '.join(self.changes)} give {ratio} the speed of those given"


def tuned(node: Node, graph: Graph, target: Target, seed: int) -> Found:
    """The fastest settings of an engine for a graph on the target that its budget suffices to find.

    Raises:
        EngineError: the engine refuses the graph with the settings that are given.
    """
    inputs = load_file(graph.reference)
    rows = [inputs[f"inputs.{name}"] for name in graph.signature.names]
    with tempfile.TemporaryDirectory(prefix="hasten-") as scratch:
        folders = (Path(scratch, str(number)) for number in count())
        compiled: dict[str, Path] = {}

        def ready(settings: Node) -> Path:
            key = repr(sorted(settings.items()))
            if key not in compiled:
                folder = next(folders)
                folder.mkdir()
                with Worker(threads=target.threads) as worker:
                    worker.compile(settings, graph, folder)
                compiled[key] = folder
            return compiled[key]

        def compare(base: Node, variant: Node) -> Interval | None:
            slower = ready(base)
            try:
                faster = ready(variant)
                measured = latency.measure(faster, {_BASE: slower}, target, rows, BRIEFLY, seed)
            except EngineError:
                return None
            return latency.speedups(measured, _CONFIDENCE)[_BASE]

        ready(node)
        return search(node, variants(node, graph.quantized, target), compare, float(node[BUDGET]))


def variants(node: Node, quantized: bool, target: Target) -> dict[str, tuple[Any, ...]]:
    """Setting -> values other than the given one that the engine declares worth trying and that it can run."""
    declared: Mapping[str, tuple[Any, ...]] = locate(node["_target_"], "engine").tunable
    found = {
        name: tuple(
            value
            for value in _resolved(values, target)
            if value != node[name] and _supported({**node, name: value}, quantized, target)
        )
        for name, values in declared.items()
    }
    return {name: values for name, values in found.items() if values}


def search(
    given: Node,
    settings: Mapping[str, tuple[Any, ...]],
    compare: Compare,
    seconds: float,
    clock: Callable[[], float] = monotonic,
) -> Found:
    """Coordinate descent from the given settings.

    Args:
        settings: name -> values to be tried, in this order.
        seconds: budget. Nothing is begun that, by the longest comparison so far, would not end within it, the last
            comparison with the given settings included.
    """
    start, longest, tried = clock(), 0.0, 0
    best, changes = given, dict[str, str]()

    def timed(base: Node, variant: Node) -> Interval | None:
        nonlocal longest
        began = clock()
        ratio = compare(base, variant)
        longest = max(longest, clock() - began)
        return ratio

    for name, value in _flat(settings):
        if clock() - start + 2 * longest > seconds:
            break
        tried += 1
        ratio = timed(best, {**best, name: value})
        if ratio is not None and ratio.low > 1:
            best, changes[name] = {**best, name: value}, f"{name}={_spelt(value)}"
    gain = timed(given, best) if changes else None
    won = gain is not None and gain.low > 1
    return Found(
        node=best if won else given,
        changes=tuple(changes.values()) if won else (),
        gain=gain if won else None,
        num_tried=tried,
        num_settings=len(list(_flat(settings))),
        seconds=clock() - start,
    )


def _flat(settings: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, values in settings.items() for value in values)


def _resolved(values: tuple[Any, ...], target: Target) -> Iterator[Any]:
    """The values with `${target.<key>}` filled in, as in a config."""
    for value in values:
        if isinstance(value, str) and value.startswith("${target."):
            yield getattr(target, value.removeprefix("${target.").removesuffix("}"))
        else:
            yield value


def _supported(node: Node, quantized: bool, target: Target) -> bool:
    try:
        engine = construct(node, "engine")
    except ConfigError:
        return False
    return isinstance(engine, Engine) and engine.supports(quantized, target) is None


def _spelt(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

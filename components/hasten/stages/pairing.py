"""How much faster one finished artefact is than another: from blocks of one session, or measured in turns now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.core.files import read_json
from hasten.core.interfaces import Progress, Silent, Target
from hasten.core.store import Entry, Store
from hasten.core.trial import Interval
from hasten.data.prepare import read
from hasten.evidence import latency
from hasten.evidence.requests import request_of

OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a trial has left in a store."""

    store: Store
    keys: Mapping[str, str]

    def entry(self, stage: str) -> Entry | None:
        """A stage, if the store still has it."""
        return self.store.find(stage, self.keys[stage]) if stage in self.keys else None


def inverse(ratio: Interval) -> Interval:
    """Of the other against the one."""
    return Interval(value=1 / ratio.value, low=1 / ratio.high, high=1 / ratio.low)


def stored(
    first: Finished, second: Finished, target: Target, confidence: float, seed: int, machine: str | None
) -> Interval | None:
    """How much faster the second is than the first, where they were once measured in turns; None elsewhere.

    Args:
        target: whose requests were measured; a store may hold those of others as well.
        machine: id of the one that it was measured on; None for any.
    """
    if "compile" not in first.keys or "compile" not in second.keys:
        return None
    one, other = first.keys["compile"], second.keys["compile"]
    for store in (second.store, first.store):
        files = sorted((store.folder / "latency").glob("*/stage.json"), key=lambda file: -file.stat().st_mtime)
        for manifest in files:
            ingredients = read_json(manifest)["ingredients"]
            parents, config = ingredients["parents"], ingredients["config"]
            pair = (parents.get("reference"), parents.get("candidate"))
            if pair not in ((one, other), (other, one)) or machine not in (None, ingredients["machine"]["id"]):
                continue
            wanted = {"batch_size": target.batch_size, "length": target.length, "threads": target.threads, "seed": seed}
            if {name: config[name] for name in wanted} != wanted:
                continue
            measurement = latency.Measurement.from_dict(read_json(manifest.parent / "blocks.json"))
            if measurement.stream:
                continue
            (ratio,) = latency.speedups(measurement, confidence).values()
            return ratio if pair == (one, other) else inverse(ratio)
    return None


def measured(
    first: Finished, second: Finished, target: Target, confidence: float, seed: int, progress: Progress | None = None
) -> Interval | None:
    """The same, measured in turns now; None where a store no longer has what that takes, or their inputs differ.

    Raises:
        EngineError: an engine failed.
    """
    progress = progress or Silent()
    one, other, data = first.entry("compile"), second.entry("compile"), first.entry("data")
    if one is None or other is None or data is None or first.keys["data"] != second.keys.get("data"):
        return None
    prepared, protocol = read(data.folder), latency.LatencyProtocol()
    rows = prepared.rows("train", limit=target.batch_size).inputs
    inputs = request_of(rows, prepared.inputs, target.request)
    progress.start("measuring both in turns", protocol.max_rounds)
    try:
        found = latency.measure(
            other.folder, {OTHER: one.folder}, target, inputs, protocol, seed, on_round=progress.advance
        )
    finally:
        progress.stop()
    return latency.speedups(found, confidence)[OTHER]

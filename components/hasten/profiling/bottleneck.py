"""Names the bottleneck of one request: how much of its latency is arithmetic, memory traffic and overhead.

The split, in milliseconds of a request with n operators:

- An engine's profiler slows down what it watches, and its means hold every interruption. Operators can't take longer
  than the latency less the cost of an empty call; where they seem to, all are scaled down to that.
- outside = latency - sum of the operators.
- overhead = max(outside, call + n * operator), with the measured costs of an empty call and of an operator that has
  nothing to do. Part of launching an operator lies outside its own time and is in `outside` already, hence the maximum
  and no sum. What exceeds `outside` is taken from the operators, the same for each launch, at most all of its time.
- What is left of each kind of operators is arithmetic or memory traffic, whichever takes longer on the roofline, up to
  1 / REACHABLE times what the roofline allows. Time beyond that is overhead too: neither fewer operations nor bytes
  would save it, but another engine may. So is all time of operators that the model itself does not ask for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import MeasurementError
from hasten.core.interfaces import OperatorTime
from hasten.core.trial import OperatorGroup, Profile
from hasten.profiling.roofline import Demand, Place, Roofs, demands, place
from hasten.profiling.told import told_size, told_time

REACHABLE = 0.25
"""Share of the roofline that the kernels of any good engine reach. Measured with one thread on the 21 convolutions of a
ResNet for 8x8 images: ONNX Runtime 0.87, eager PyTorch 0.08, on the same arithmetic."""


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """All operators of one kind: their time, what of it is launching, what they ask for and where that lies."""

    name: str
    milliseconds: float
    launch_ms: float
    calls: float
    demand: Demand
    place: Place

    @property
    def busy_ms(self) -> float:
        """Time that arithmetic or memory traffic explains."""
        return min(self.milliseconds - self.launch_ms, self.place.roof_ms / REACHABLE)

    @property
    def excess_ms(self) -> float:
        """Time that nothing explains but the engine."""
        return self.milliseconds - self.launch_ms - self.busy_ms


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Where the latency goes. The parts sum to `latency_ms`; `scale` is what operator times were multiplied by."""

    latency_ms: float
    outside_ms: float
    scale: float
    kinds: tuple[_Kind, ...]

    @property
    def launch_ms(self) -> float:
        return sum(kind.launch_ms for kind in self.kinds)

    @property
    def excess_ms(self) -> float:
        return sum(kind.excess_ms for kind in self.kinds)

    @property
    def calls(self) -> float:
        return sum(kind.calls for kind in self.kinds)

    def bound_by(self, bound: str) -> list[_Kind]:
        """The kinds that compute or memory holds up, the longest first."""
        return [kind for kind in self.kinds if kind.place.bound == bound and kind.busy_ms > 0]

    def shares(self) -> dict[str, float]:
        """compute + memory + overhead = 1."""
        parts = {
            "compute": sum(kind.busy_ms for kind in self.bound_by("compute")),
            "memory": sum(kind.busy_ms for kind in self.bound_by("memory")),
            "overhead": self.outside_ms + self.launch_ms + self.excess_ms,
        }
        total = sum(parts.values())
        return {name: part / total for name, part in parts.items()}


def profile(
    *,
    latency_ms: float,
    operators: Sequence[OperatorTime],
    cost: Mapping[str, Any],
    roofline: Mapping[str, Any],
    call_us: float,
    operator_us: float,
    weight_bytes: int,
    size_bytes: int,
    size_limit_bytes: int | None = None,
    batch_size: int = 1,
    integer_share: float = 0.0,
    precision: str = "float32",
) -> Profile:
    """Splits the latency of one request and names the bottleneck.

    Args:
        latency_ms: of one request, measured without a profiler.
        operators: of one request, by the engine's own profiler.
        cost: of one row: `kinds` (kind -> flops, bytes with weights, calls) and `weight_bytes`, all of float32.
        roofline: JSON form of what the probe measured with the target's threads.
        call_us: cost of an empty call of this engine.
        operator_us: cost of an operator that has nothing to do.
        weight_bytes: weights as the engine holds them.
        size_bytes: deployable files.
        size_limit_bytes: constraint on them; None for none.
        batch_size: rows of the request.
        integer_share: share of convolutions and linear layers that run in integers.
        precision: number format of all else.

    Returns:
        Shares of compute, memory and overhead, which sum to 1, and of capacity: the share of the bytes that has to go.

    Raises:
        MeasurementError: the latency is no positive number, or the engine's profiler saw no operators.
    """
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        raise MeasurementError(f"the latency of a request must be above 0 ms to be profiled, got {latency_ms}")
    if not sum(operator.milliseconds for operator in operators) > 0:
        raise MeasurementError("the engine's profiler reported no operators, so that the latency can't be split")
    roofs = Roofs.from_dict(roofline)
    wanted = demands(cost, batch_size, integer_share, precision)
    split = _split(latency_ms, operators, wanted, roofs, call_us, operator_us, weight_bytes)
    shares = split.shares()
    excess = max(0.0, 1 - size_limit_bytes / size_bytes) if size_limit_bytes is not None and size_bytes > 0 else 0.0
    told = sorted((name for name in shares if shares[name] >= 0.005), key=lambda name: -shares[name])
    evidence = [_EVIDENCE[name](split, roofs, shares[name]) for name in told]
    evidence.append(_weights(weight_bytes, roofs))
    if size_limit_bytes is not None and excess > 0:
        evidence.insert(0, _capacity(size_bytes, size_limit_bytes))
    if split.scale < 1:
        evidence.append(_scaled(split))
    return Profile(
        latency_ms=latency_ms,
        operators=tuple(_group(kind, latency_ms) for kind in split.kinds),
        shares={**shares, "capacity": excess},
        bottleneck="capacity" if excess > 0 else max(shares, key=lambda name: shares[name]),
        evidence=tuple(sentence for sentence in evidence if sentence),
        weight_bytes=weight_bytes,
        roofline=roofs.to_flat(),
    )


def _split(
    latency_ms: float,
    operators: Sequence[OperatorTime],
    wanted: Mapping[str, Demand],
    roofs: Roofs,
    call_us: float,
    operator_us: float,
    weight_bytes: int,
) -> _Split:
    milliseconds: dict[str, float] = {}
    calls: dict[str, float] = {}
    for operator in operators:
        milliseconds[operator.kind] = milliseconds.get(operator.kind, 0.0) + operator.milliseconds
        calls[operator.kind] = calls.get(operator.kind, 0.0) + operator.calls
    room_ms = max(0.0, latency_ms - call_us / 1e3)
    reported_ms = sum(milliseconds.values())
    scale = min(1.0, room_ms / reported_ms)
    outside_ms = max(0.0, latency_ms - reported_ms * scale)
    num_calls = sum(calls.values())
    inside_ms = max(0.0, (call_us + num_calls * operator_us) / 1e3 - outside_ms)
    kinds = [
        _Kind(
            name=name,
            milliseconds=time * scale,
            launch_ms=min(time * scale, inside_ms * calls[name] / num_calls) if num_calls else 0.0,
            calls=calls[name],
            demand=wanted.get(name, Demand()),
            place=place(wanted.get(name, Demand()), roofs, weight_bytes),
        )
        for name, time in milliseconds.items()
    ]
    kinds.sort(key=lambda kind: -kind.milliseconds)
    return _Split(latency_ms=latency_ms, outside_ms=outside_ms, scale=scale, kinds=tuple(kinds))


def _group(kind: _Kind, latency_ms: float) -> OperatorGroup:
    return OperatorGroup(
        kind=kind.name,
        calls=round(kind.calls),
        milliseconds=kind.milliseconds,
        share=min(1.0, kind.milliseconds / latency_ms),
        flops=kind.demand.flops,
        num_bytes=kind.demand.num_bytes,
        bound=kind.place.bound,
        roof_ms=kind.place.roof_ms,
    )


def _overhead(split: _Split, roofs: Roofs, share: float) -> str:
    parts = [f"{told_time(split.outside_ms)} outside the operators"]
    if split.launch_ms > 0:
        parts.append(f"{told_time(split.launch_ms)} of launching {split.calls:.0f} operators")
    if split.excess_ms > 0:
        parts.append(
            f"{told_time(split.excess_ms)} inside them beyond {1 / REACHABLE:g} times what the roofline allows"
        )
    return f"{share:.0%} of {told_time(split.latency_ms)} is overhead: {', '.join(parts)}"


def _compute(split: _Split, roofs: Roofs, share: float) -> str | None:
    if not (kinds := split.bound_by("compute")):
        return None
    first = kinds[0]
    return (
        f"{share:.0%} of {told_time(split.latency_ms)} is arithmetic: "
        f"{first.name} takes {told_time(first.milliseconds)} for "
        f"{first.demand.flops / 1e6:.3g} MFLOP, where the peak of {roofs.peak(first.demand.precision):.3g} GFLOP/s"
        f"{_integers(first.demand, roofs)} allows {told_time(first.place.roof_ms)}"
    )


def _integers(demand: Demand, roofs: Roofs) -> str:
    if not demand.integer_share:
        return ""
    return f" ({roofs.peak('int8'):.3g} in integers, {demand.integer_share:.0%} of it)"


def _memory(split: _Split, roofs: Roofs, share: float) -> str | None:
    if not (kinds := split.bound_by("memory")):
        return None
    first = kinds[0]
    return (
        f"{share:.0%} of {told_time(split.latency_ms)} is memory traffic: "
        f"{first.name} takes {told_time(first.milliseconds)} "
        f"to move {told_size(first.demand.num_bytes)}, where the bandwidth allows {told_time(first.place.roof_ms)}"
    )


_EVIDENCE = {"compute": _compute, "memory": _memory, "overhead": _overhead}


def _weights(weight_bytes: int, roofs: Roofs) -> str:
    level = roofs.level(weight_bytes)
    holder = "no cache holds" if level == "DRAM" else f"{level} holds"
    return f"{holder} the {told_size(weight_bytes)} of weights, which are read at {roofs.bandwidth_gbs[level]:.3g} GB/s"


def _capacity(size_bytes: int, limit_bytes: int) -> str:
    above = size_bytes / limit_bytes - 1
    return f"the files take {told_size(size_bytes)}, {above:.0%} above the limit of {told_size(limit_bytes)}"


def _scaled(split: _Split) -> str:
    return (
        f"operators take longer under the engine's profiler: their times are scaled by {split.scale:.2f} to the latency"
    )

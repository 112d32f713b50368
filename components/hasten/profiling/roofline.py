"""Where the operators of a request lie on the roofline of the machine (Williams, Waterman and Patterson, CACM 2009)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WEIGHTED = ("convolution", "linear")
"""Kinds that hold the weights, and that quantization turns into integer arithmetic."""


WIDTHS = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5, "int8": 0.25}
"""Bytes of a value in each number format, as a share of float32's."""


@dataclass(frozen=True, kw_only=True)
class Roofs:
    """What the machine can do at most.

    Attributes:
        peak_gops: number format -> 10^9 operations per second; `float32` is always among them.
        bandwidth_gbs: level, from the nearest to `DRAM` -> 10^9 bytes per second.
        capacity_bytes: cache level, from the nearest on -> bytes.
    """

    peak_gops: Mapping[str, float]
    bandwidth_gbs: Mapping[str, float]
    capacity_bytes: Mapping[str, int]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roofs:
        """From the JSON form of a measured roofline."""
        return cls(
            peak_gops=dict(values["peak_gops"]),
            bandwidth_gbs=dict(values["bandwidth_gbs"]),
            capacity_bytes=dict(values["capacity_bytes"]),
        )

    def to_flat(self) -> dict[str, float]:
        """For display: `<format>_gops` and `<level>_gbs`."""
        peaks = {f"{name}_gops": rate for name, rate in self.peak_gops.items()}
        return peaks | {f"{level.lower()}_gbs": rate for level, rate in self.bandwidth_gbs.items()}

    def peak(self, precision: str) -> float:
        """10^9 operations per second in a number format; of one that is no faster here it is float32's."""
        return self.peak_gops.get(precision, self.peak_gops["float32"])

    def level(self, working_set_bytes: float) -> str:
        """The nearest level of the memory that holds a working set."""
        for level, capacity in sorted(self.capacity_bytes.items(), key=lambda item: item[1]):
            if working_set_bytes <= capacity:
                return level
        return "DRAM"

    def compute_ms(self, flops: float, integer_share: float, precision: str = "float32") -> float:
        """Least time for the arithmetic, a share of it in integers and the rest in floats of one format."""
        seconds = flops * ((1 - integer_share) / self.peak(precision) + integer_share / self.peak("int8")) / 1e9
        return seconds * 1e3

    def memory_ms(self, num_bytes: float, working_set_bytes: float) -> float:
        """Least time to move the bytes of a working set from and to the level that holds it."""
        return num_bytes / self.bandwidth_gbs[self.level(working_set_bytes)] / 1e9 * 1e3


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What all operators of one kind ask of the machine within one request.

    Attributes:
        weight_bytes: read once a request, whatever the batch.
        activation_bytes: read and written.
        calls: over how many operators the activations are spread.
        integer_share: share of the arithmetic that runs in 8-bit integers.
        precision: number format of the rest.
    """

    flops: int = 0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    calls: int = 1
    integer_share: float = 0.0
    precision: str = "float32"

    @property
    def num_bytes(self) -> int:
        return round(self.weight_bytes + self.activation_bytes)

    @property
    def working_set_bytes(self) -> float:
        """Activations of one operator, which the next one reads while they are still near."""
        return self.activation_bytes / max(self.calls, 1)


def width(integer_share: float, precision: str) -> float:
    """Bytes of values of which a share is 8 bit wide and the rest is in one format, as a share of float32's."""
    return integer_share * WIDTHS["int8"] + (1 - integer_share) * WIDTHS[precision]


def demands(
    cost: Mapping[str, Any], batch_size: int, integer_share: float, precision: str = "float32"
) -> dict[str, Demand]:
    """Kind -> what its operators ask for one request.

    The weights are laid on convolutions and linear layers in proportion to their bytes; they are read once a request,
    while arithmetic and activations grow with the batch. Narrower numbers move fewer bytes.

    Args:
        cost: of one row in float32: `kinds` (kind -> flops, bytes with weights, calls) and `weight_bytes`.
        batch_size: rows of a request.
        integer_share: share of convolutions and linear layers that run in integers.
        precision: number format of all else.
    """
    weighted_bytes = sum(kind["bytes"] for name, kind in cost["kinds"].items() if name in WEIGHTED)
    weight_share = min(1.0, cost["weight_bytes"] / weighted_bytes) if weighted_bytes else 0.0
    found = {}
    for name, kind in cost["kinds"].items():
        weights = kind["bytes"] * weight_share if name in WEIGHTED else 0.0
        integers = integer_share if name in WEIGHTED else 0.0
        narrower = width(integers, precision)
        found[name] = Demand(
            flops=round(kind["flops"] * batch_size),
            weight_bytes=weights * narrower,
            activation_bytes=(kind["bytes"] - weights) * batch_size * narrower,
            calls=max(1, round(kind["calls"])),
            integer_share=integers,
            precision=precision,
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Place:
    """One kind of operators on the roofline: the least time for its arithmetic and for its bytes."""

    compute_ms: float
    memory_ms: float

    @property
    def bound(self) -> str:
        """`compute` or `memory`, whichever takes longer at best; what calculates nothing is bound by memory."""
        return "compute" if self.compute_ms > self.memory_ms else "memory"

    @property
    def roof_ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)


def place(demand: Demand, roofs: Roofs, resident_bytes: int) -> Place:
    """Where one kind lies.

    Args:
        demand: of the kind.
        roofs: of the machine.
        resident_bytes: weights of the whole model. Between two reads of one weight all others are read, so that weights
            come from the level that holds them all; activations come from the level that holds those of one operator.
    """
    weights_ms = roofs.memory_ms(demand.weight_bytes, resident_bytes)
    activations_ms = roofs.memory_ms(demand.activation_bytes, demand.working_set_bytes)
    compute_ms = roofs.compute_ms(demand.flops, demand.integer_share, demand.precision)
    return Place(compute_ms=compute_ms, memory_ms=weights_ms + activations_ms)

"""What a network of multipliers and adders would take of an FPGA, by arithmetic alone: no synthesis, no placement.

Model: a layer of N products for each place that it is applied at, with a reuse factor R, has ceil(N / R) multipliers
and takes new inputs every R cycles (Duarte et al. 2018, "Fast inference of deep neural networks in FPGAs for particle
physics", section 2.3; hls4ml's documentation of `ReuseFactor`). Its latency there is

    L = L_mult + (R - 1) * II_mult + L_activ,

with II_mult = 1, and here with `MULTIPLIER_CYCLES` and one cycle for each level of the adder tree as L_mult, and one
cycle of rounding and activation as L_activ. What the compiler saves by constants that are powers of two or share
digits, it saves beyond this; what control, FIFOs and routing cost is not in it, nor are flip-flops. DSPs and memories
are AMD's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

LEAST_DSP_BITS = 10
"""Products whose narrower factor has fewer bits are made of look-up tables (Duarte et al. 2018, section 3.2)."""
DSP_INPUTS = (27, 18)
"""Bits of the signed factors that one DSP48E2 multiplies (AMD UG579)."""
BLOCK_WORDS, BLOCK_BITS = 512, 36
"""Depth and width of an 18 kbit block memory in its widest form (AMD UG573)."""
MULTIPLIER_CYCLES = 3
"""Pipeline stages that a DSP48 needs to run at its full clock (AMD UG579); fewer do at slow ones."""

Strategy = Literal["latency", "resource"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of products.

    Attributes:
        inputs: products of each output.
        outputs: at each place.
        places: that the same weights are applied at, one after the other.
        nonzero: weights that are not zero.
        sum_bits: of the accumulator.
        scales: outputs at each place that one more product brings to another scale.
        scale_bits: of the factor of those.
    """

    name: str
    inputs: int
    outputs: int
    places: int
    nonzero: int
    input_bits: int
    weight_bits: int
    sum_bits: int
    scales: int
    scale_bits: int


@dataclass(frozen=True, kw_only=True)
class LayerEstimate:
    """What one layer takes.

    Attributes:
        multipliers: that work at the same time, those of scales included.
        dsps: DSP48 slices of the multipliers that are no look-up tables.
        luts: look-up tables of narrow multipliers and of adders.
        block_rams: of 18 kbit, for weights that are read one after the other.
        interval: cycles until the layer takes the next row.
        cycles: from a row's first value to its last result.
    """

    name: str
    reuse_factor: int
    multipliers: int
    dsps: int
    luts: int
    block_rams: int
    interval: int
    cycles: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sums over the layers; the interval is that of the slowest.

    Attributes:
        latency_us: of one row.
        rows_per_second: that the slowest layer lets through.
    """

    layers: tuple[LayerEstimate, ...]
    multipliers: int
    dsps: int
    luts: int
    block_rams: int
    interval: int
    cycles: int
    latency_us: float
    rows_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    layers: Sequence[Layer], reuse_factors: Mapping[str, int], strategy: Strategy, *, streamed: bool, clock_ns: float
) -> Estimate:
    """Of a network whose layers work one after the other.

    Args:
        reuse_factors: of each layer, by its name.
        streamed: places go through FIFOs: a layer begins when it has seen its first window, so that the layers work at
            the same time and the row takes what the slowest needs, and the depth of the others.
    """
    found = tuple(of_layer(each, reuse_factors[each.name], strategy) for each in layers)
    interval = max((each.interval for each in found), default=1)
    depths = [each.cycles - each.interval for each in found]
    cycles = interval + sum(depths) if streamed else sum(each.cycles for each in found)
    return Estimate(
        layers=found,
        multipliers=sum(each.multipliers for each in found),
        dsps=sum(each.dsps for each in found),
        luts=sum(each.luts for each in found),
        block_rams=sum(each.block_rams for each in found),
        interval=interval,
        cycles=cycles,
        latency_us=cycles * clock_ns / 1000,
        rows_per_second=1e9 / (interval * clock_ns),
    )


def of_layer(layer: Layer, reuse_factor: int, strategy: Strategy) -> LayerEstimate:
    """With `latency` and a reuse factor of 1 every product has its multiplier, and those with zero have none; else the
    multipliers are shared, and zeros are multiplied as all weights are."""
    products = layer.inputs * layer.outputs
    unrolled = strategy == "latency" and reuse_factor == 1
    multipliers = layer.nonzero if unrolled else math.ceil(products / reuse_factor)
    each, table = dsps_of_product(layer.input_bits, layer.weight_bits), luts_of_product
    scale_dsps = dsps_of_product(layer.sum_bits, layer.scale_bits)
    luts = 0 if each else multipliers * table(layer.input_bits, layer.weight_bits)
    luts += 0 if scale_dsps else layer.scales * table(layer.sum_bits, layer.scale_bits)
    interval = reuse_factor * layer.places
    depth = MULTIPLIER_CYCLES + math.ceil(math.log2(max(layer.inputs, 1))) + 1
    depth += MULTIPLIER_CYCLES if layer.scales else 0
    return LayerEstimate(
        name=layer.name,
        reuse_factor=reuse_factor,
        multipliers=multipliers + layer.scales,
        dsps=multipliers * each + layer.scales * scale_dsps,
        luts=luts + multipliers * layer.sum_bits,
        block_rams=0 if strategy == "latency" else _block_rams(multipliers * layer.weight_bits, reuse_factor),
        interval=interval,
        cycles=interval - 1 + depth,
    )


def dsps_of_product(first_bits: int, second_bits: int) -> int:
    """DSP48 slices of one signed product: none where look-up tables do, more than one where a factor is too wide.

    A wide factor is cut into a signed part and unsigned ones, which leave the sign's bit of their input unused.
    """
    narrow, wide = sorted((first_bits, second_bits))
    if narrow < LEAST_DSP_BITS:
        return 0
    return _parts(wide, DSP_INPUTS[0]) * _parts(narrow, DSP_INPUTS[1])


def luts_of_product(first_bits: int, second_bits: int) -> int:
    """Look-up tables of a product of n and m bits: an array of n * m full adders, one look-up table each."""
    return first_bits * second_bits


def _parts(bits: int, port: int) -> int:
    return 1 if bits <= port else 1 + math.ceil((bits - port) / (port - 1))


def _block_rams(word_bits: int, words: int) -> int:
    return math.ceil(word_bits / BLOCK_BITS) * math.ceil(words / BLOCK_WORDS)

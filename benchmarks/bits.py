"""What few bits cost a network, with and without training through the rounding.

    .venv/bin/python benchmarks/bits.py
    .venv/bin/python benchmarks/bits.py experiment=spoken_digits data.path=spoken_digits.parquet trainer.epochs=8

Arguments are overrides of the experiment. Prints a Markdown table of the quality on the test rows, in the task's first
metric: of the float network, and at each width after post-training quantization (PTQ) and after quantization-aware
training (QAT) that starts from it, weights and activations alike. Below it stands whether QAT loses less than half of
what PTQ loses at 4 bits.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import hasten

WIDTHS = (8, 6, 4, 3)
JUDGED = 4
"""The width at which training has to halve the loss."""
METHODS = {"PTQ": "affine", "QAT": "qat"}
ALWAYS = ("engine=onnxruntime", "tracking=none")


def main(overrides: Sequence[str]) -> None:
    logging.getLogger("hasten").setLevel(logging.WARNING)
    original, metric, sign = quality(overrides)
    print(f"| bits | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")
    print(f"| 32, float | {original:.4f} | {original:.4f} |", flush=True)
    losses = {}
    for bits in WIDTHS:
        found = [quality([*overrides, *quantized(option, bits)])[0] for option in METHODS.values()]
        print(f"| {bits} | {' | '.join(f'{value:.4f}' for value in found)} |", flush=True)
        losses[bits] = [sign * (original - value) for value in found]
    ptq, qat = losses[JUDGED]
    verdict = "less than half of it" if qat < ptq / 2 else "not less than half of it"
    print(f"\n{metric}: at {JUDGED} bits PTQ loses {ptq:.4f} and QAT {qat:.4f}, {verdict}")


def quantized(option: str, bits: int) -> list[str]:
    """Overrides of a candidate; the simulation of few bits has no integers in it."""
    widths = [f"quantization.weight_bits={bits}", f"quantization.activation_bits={bits}"]
    return [f"quantization={option}", *widths, "quantization.min_integer_share=0"]


def quality(overrides: Sequence[str]) -> tuple[float, str, int]:
    """On the test rows, in the engine, the name of the metric, and 1 where more of it is better, -1 where less is."""
    certificate = hasten.run([*ALWAYS, *overrides]).certificate
    sign = 1 if certificate.metrics[certificate.metric].higher_is_better else -1
    return certificate.candidate, certificate.metric, sign


if __name__ == "__main__":
    main(sys.argv[1:])

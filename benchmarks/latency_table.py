"""How well the latency table predicts the latency of what it makes the pruning choose.

    .venv/bin/python benchmarks/latency_table.py
    .venv/bin/python benchmarks/latency_table.py experiment=cifar10 data.train=train.parquet \
        data.validate=test.parquet model.checkpoint=resnet20.safetensors model.arch.num_blocks=3

Prunes the model of the experiment (digits, where none is given) to half of its measured latency, or by what
`pruning.latency_cut` says, in ONNX Runtime and in OpenVINO, without fine-tuning, which changes no latency. Prints the
last table of each, as Markdown, and what it predicted beside what was measured.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.core.errors import PassError
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.notebook import composing
from hasten.stages.build import build
from hasten.stages.stage import Tools

ENGINES = ("onnxruntime", "openvino")
EDIT = ("pruning=structured", "pruning.sparsity=null", "pruning.latency_cut=0.5", "pruning.training.epochs=0")


def main(overrides: Sequence[str]) -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("hasten.passes.pruning").setLevel(logging.INFO)
    summary = []
    with composing(), tempfile.TemporaryDirectory() as scratch:
        for engine in ENGINES:
            print(f"\n## {engine}\n")
            try:
                pruned = latency_table([*EDIT, *overrides, f"engine={engine}"], Store(Path(scratch)))
            except PassError as error:  # a network so small that no width halves what the engine takes for itself
                print(error)
                continue
            print_table(pruned["tables"][-1])
            summary.append((engine, pruned))
    print("\n| engine | whole, ms | asked for, ms | predicted, ms | measured, ms | error | tables |")
    print("|---|---|---|---|---|---|---|")
    for engine, pruned in summary:
        whole, target, predicted, measured = (
            pruned[f"{key}_ms"] for key in ("whole", "target", "predicted", "measured")
        )
        print(
            f"| {engine} | {whole:.3f} | {target:.3f} | {predicted:.3f} | {measured:.3f} | "
            f"{100 * (predicted / measured - 1):+.1f} % | {len(pruned['tables'])} |"
        )


def latency_table(overrides: Sequence[str], store: Store) -> dict[str, Any]:
    """What the pruning of the recipe kept of its way to the latency."""
    built = build(Composer.of(overrides).compose(), store, Tools())
    (step,) = json.loads((built.module.folder / "surgery.json").read_text())
    kept: dict[str, Any] = step["latency_table"]
    return kept


def print_table(table: dict[str, Any]) -> None:
    """One line for each kind of layer: what each width changes the latency by."""
    print(f"Round {table['centre_ms']:.3f} ms:\n")
    print("| groups | first | width now | ms of each other width, one group changed |")
    print("|---|---|---|---|")
    for row in table["rows"]:
        first = row["groups"][0]
        cells = (f"{width}: {ms:+.4f}" for width, ms in zip(row["widths"], row["ms"], strict=True))
        print(f"| {len(row['groups'])} | {first} | {table['centre'][first]} | {', '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])

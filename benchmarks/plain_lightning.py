"""Rows per second of hasten's training against a plain Lightning script's, in turns, in processes of their own.

    python benchmarks/plain_lightning.py experiment=cifar10_training data.train=TRAIN.parquet \
        data.validate=TEST.parquet trainer.precision=bfloat16 ...

The overrides are those of the recipe that `hasten objective=training` found; both train the same network with the same
batch size. The script (`benchmarks/lightning_script.py`) decodes every image whenever it is asked for it, in 0, 1 and 2
workers; the fastest of them counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hasten.evidence import pace
from hasten.evidence.latency import CANDIDATE
from hasten.notebook import composing
from hasten.session import Session

HERE = Path(__file__).resolve().parent
CONFIDENCE = 0.95
PROTOCOL = pace.PaceProtocol(min_rounds=10, max_rounds=20, max_seconds=240.0)


def main(overrides: list[str]) -> None:
    sys.path.insert(0, str(HERE))  # where the script's process finds it
    with composing():
        session = Session.of(["objective=training", "tracking=none", *overrides], Path("outputs/benchmark"))
        bench, recipe = session.training_bench, session.recipe
        contenders = {"hasten": recipe, "hasten, as a plain script": session.untouched}
        trainings = {name: bench.training_of(bench.prepared(it)) for name, it in contenders.items()}
    settings, trainer = recipe.section("model")["training"], recipe.config["trainer"]
    for workers in (0, 1, 2):
        spec = {
            "file": recipe.section("data")["train"],
            "num_blocks": recipe.section("model")["arch"]["num_blocks"],
            "batch_size": settings["batch_size"],
            "lr": settings["lr"],
            "threads": trainer["threads"],
            "workers": workers,
        }
        script = pace.Training("lightning_script", spec, trainer["threads"], settle=2 * workers + 1)
        trainings[f"Lightning script, {workers} workers"] = script
    trainings = {CANDIDATE: trainings.pop("hasten"), **trainings}
    measured = pace.measure(trainings, PROTOCOL, seed=0)
    ratios = pace.speedups(measured, CONFIDENCE)
    print("| training | rows per second | hasten's is so many times as fast |\n|---|---|---|")
    for name in trainings:
        rows = pace.samples_per_second(measured, CONFIDENCE, name)
        ratio = f"{ratios[name]:.3g}" if name in ratios else "–"
        print(f"| {'hasten' if name == CANDIDATE else name} | {rows:.0f} | {ratio} |")


if __name__ == "__main__":
    main(sys.argv[1:])

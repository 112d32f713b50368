"""What the teacher and the distillation earn on digits, beside a student trained alone and a logistic regression.

    .venv/bin/python benchmarks/digits.py

Five seeds; each seed has splits of its own, and all four models see the same rows of it. Prints a Markdown table of
test accuracies.
"""

from __future__ import annotations

import logging
import statistics

from sklearn.linear_model import LogisticRegression

import hasten
from hasten.core.interfaces import INPUT
from hasten.data.digits import Digits
from hasten.data.shares import split
from hasten.data.transforms import Standardize

SEEDS = range(5)
SHARES = {"train": 0.45, "validate": 0.275, "test": 0.275}
STUDENT = ("student=resnet", "engine=onnxruntime", "tracking=none")


def main() -> None:
    logging.getLogger("hasten").setLevel(logging.WARNING)
    titles = ("teacher", "student, distilled", "student alone", "logistic regression")
    columns: dict[str, list[float]] = {title: [] for title in titles}
    for seed in SEEDS:
        distilled = hasten.run([f"seed={seed}", "distillation=soft_labels", *STUDENT]).certificate
        alone = hasten.run([f"seed={seed}", *STUDENT]).certificate
        figures = (distilled.baseline, distilled.candidate, alone.candidate, logistic_regression(seed))
        for column, figure in zip(columns.values(), figures, strict=True):
            column.append(figure)
    print(f"| model | {' | '.join(f'seed {seed}' for seed in SEEDS)} | mean |")
    print(f"|---|{'---|' * (len(SEEDS) + 1)}")
    for name, values in columns.items():
        print(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in (*values, statistics.mean(values)))} |")


def logistic_regression(seed: int) -> float:
    """Test accuracy on the rows that the networks of this seed see, normalised as they are."""
    table = Digits().load()
    images, labels = table.inputs[INPUT], table.targets
    assert labels is not None
    rows = split(len(images), SHARES, seed, labels=labels)
    scale = Standardize().fit({INPUT: images[rows["train"]]})
    inputs = scale({INPUT: images})[INPUT].reshape(len(images), -1)
    model = LogisticRegression(max_iter=5000).fit(inputs[rows["train"]], labels[rows["train"]])
    return float(model.score(inputs[rows["test"]], labels[rows["test"]]))


if __name__ == "__main__":
    main()

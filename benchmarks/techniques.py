"""What each technique gives alone and in combination, and what the student reaches without its teacher.

    .venv/bin/python benchmarks/techniques.py experiment=cifar10 data.train=cifar10_train.parquet \
        data.validate=cifar10_test.parquet model.checkpoint=resnet56_cifar10.safetensors \
        strategies.distill.checkpoint=resnet20_cifar10.safetensors

Takes the overrides of the experiment; the student is the one that its strategy `distill` tries first, the training
through the rounding that of its strategy `qat_int8`. Prints a Markdown table of validation figures. Every row is a
recipe of its own over one store: what they share is made once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence

import hasten
from hasten.core.recipe import Composer
from hasten.core.trial import Result, Trial
from hasten.notebook import composing

ENGINE = ("engine=openvino",)
INT8 = ("quantization=static",)
PRUNED = ("pruning=structured", "pruning.sparsity=0.5")
TAUGHT = ("distillation=soft_labels",)


def main(experiment: Sequence[str]) -> None:
    logging.getLogger("hasten").setLevel(logging.WARNING)
    with composing():
        distill, qat = Composer.of([*experiment, "strategy=[distill,qat_int8]"]).strategies()
    student = tuple(text for text in distill.attempts[0] if not text.startswith("distillation"))
    print(
        "| recipe | latency p50 | against eager | against the untouched engine | times smaller | quality, validation |"
    )
    print("|---|---|---|---|---|---|")
    for title, overrides in recipes(student, qat.attempts[0]):
        result = hasten.run([*experiment, "tracking=none", *overrides])
        trial = result.trials[-1]
        if title == "engine alone":
            print(_row("the model in eager PyTorch", result, result.trials[0]))
        print(_row(title, result, trial), flush=True)


def recipes(student: Sequence[str], trained_int8: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Title and overrides of each row."""
    distilled = (*ENGINE, *student, *TAUGHT)
    yield "engine alone", ENGINE
    yield "int8", (*ENGINE, *INT8)
    yield "half of the channels", (*ENGINE, *PRUNED, *TAUGHT)
    yield "half of the channels, int8", (*ENGINE, *PRUNED, *TAUGHT, *INT8)
    yield "distilled student", distilled
    yield "student trained without the teacher", (*ENGINE, *student)
    yield "distilled student, int8", (*distilled, *INT8)
    yield "student trained without the teacher, int8", (*ENGINE, *student, *INT8)
    yield "distilled student, int8 trained through the rounding", (*distilled, *trained_int8)
    yield "distilled student, half of the channels", (*distilled, *PRUNED)
    yield "distilled student, half of the channels, int8", (*distilled, *PRUNED, *INT8)
    yield "all of them: int8 trained through the rounding", (*distilled, *PRUNED, *trained_int8)


def _row(title: str, result: Result, trial: Trial) -> str:
    measured = trial.evaluation
    if measured is None:
        return f"| {title} | failed: {trial.reason} | | | | |"
    ratios = [measured.speedup.get(name) for name in ("eager", "engine")]
    told = (f"{ratio.value:.3g}x [{ratio.low:.3g}, {ratio.high:.3g}]" if ratio else "–" for ratio in ratios)
    size = result.baseline.evaluation.size_bytes / measured.size_bytes if result.baseline.evaluation else 1.0
    quality = next(iter(measured.metrics.values())).told()
    latency = f"{1e3 * measured.latency_ms['p50'].value:.0f} µs"
    return f"| {title} | {latency} | {' | '.join(told)} | {size:.3g}x | {quality} |"


if __name__ == "__main__":
    main(sys.argv[1:])

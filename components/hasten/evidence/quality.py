"""How well a candidate does by each metric of the task, and how much of it may be lost against the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.core.construct import locate
from hasten.core.errors import ConfigError, HastenError
from hasten.core.sections import Metric
from hasten.core.trial import Drop, Quality
from hasten.evidence.bounds import class_drops, paired_drop, relative_drop, statistic_drop

Array = NDArray[Any]


def quality(metric: Metric, outputs: Array, targets: Array, labels: Array | None) -> Quality:
    """What the metric says of outputs (N, ...), without a comparison.

    Raises:
        ConfigError: the metric can't be computed, naming it and why.
        EngineError: the outputs are not finite or have another shape than the task's.
    """
    scores = _scores(metric, outputs, targets)
    value = float(np.mean(scores))
    if metric.by_class:
        worst = min if metric.higher_is_better else max
        value = worst(float(scores[labels == label].mean()) for label in np.unique(_labels(metric, scores, labels)))
    return Quality(
        value=value,
        drop=None,
        max_drop=metric.max_drop,
        higher_is_better=metric.higher_is_better,
        points=_is_share(scores),
    )


def compared(
    metric: Metric, baseline: Array, candidate: Array, targets: Array, labels: Array | None, confidence: float
) -> Quality:
    """The same with the one-sided bound of what the candidate lost against the baseline, on the same rows.

    Scores per row are compared as pairs; a metric that is one number for all rows is bootstrapped over rows. Where
    every class has to hold, the drop is that of the class that may have lost most.

    Args:
        baseline, candidate: outputs (N, ...).
        confidence: one-sided.

    Raises:
        ConfigError, EngineError: as of `quality`.
    """
    before, after = (_scores(metric, outputs, targets) for outputs in (baseline, candidate))
    drop = _drop(metric, before, after, (baseline, candidate, targets), labels, confidence)
    points = _is_share(before) and _is_share(after)
    found = quality(metric, candidate, targets, labels)
    return replace(found, drop=replace(drop, relative=metric.relative, points=points), points=points)


def no_better_than(metric: Metric, constant: Array, baseline: Array, targets: Array, confidence: float) -> str | None:
    """Why keeping the baseline's quality would mean nothing; None where it is surely better than a constant answer."""
    plain = replace(metric, relative=False, by_class=False)
    before, after = (_scores(plain, outputs, targets) for outputs in (constant, baseline))
    drop = _drop(plain, before, after, (constant, baseline, targets), None, confidence)
    if drop.bound < 0:
        return None
    shown = f"{metric.name} {np.mean(after):.4g}, of the best constant answer {np.mean(before):.4g}"
    return (
        "Nothing to certify: the baseline is not shown to be better than one answer for all rows "
        f"({shown}, {100 * confidence:.4g} % confidence)"
    )


def _drop(
    metric: Metric,
    before: Array,
    after: Array,
    rows: tuple[Array, Array, Array],
    labels: Array | None,
    confidence: float,
) -> Drop:
    sign = 1.0 if metric.higher_is_better else -1.0
    if before.ndim == 0:
        baseline, candidate, targets = rows
        return statistic_drop(
            lambda outputs, wanted: float(_scores(metric, outputs, wanted)),
            baseline,
            candidate,
            targets,
            confidence,
            higher_is_better=metric.higher_is_better,
            relative=metric.relative,
        )
    if metric.by_class:
        drops = class_drops(sign * before, sign * after, _labels(metric, before, labels), confidence)
        label, worst = max(drops.items(), key=lambda found: found[1].bound)
        return replace(worst, label=int(label))
    if metric.relative:
        return relative_drop(before, after, confidence, higher_is_better=metric.higher_is_better)
    return paired_drop(sign * before, sign * after, confidence)


def _labels(metric: Metric, scores: Array, labels: Array | None) -> Array:
    if labels is None or scores.ndim == 0 or metric.relative:
        raise ConfigError(
            f"task.metrics.{metric.name}.by_class=true needs a task with classes, a function that scores each row, and "
            "relative=false"
        )
    return labels


def _scores(metric: Metric, outputs: Array, targets: Array) -> Array:
    """(N,) scores, or () where the function gives one number for all rows."""
    key = f"task.metrics.{metric.name}._target_={metric.target}"
    function: Callable[[Array, Array], Any] = locate(metric.target, f"task.metrics.{metric.name}")
    try:
        scores = np.asarray(function(outputs, targets), dtype=np.float64)
    except HastenError:
        raise
    except Exception as error:  # a function of the user's may raise anything
        raise ConfigError(f"{key} raised {type(error).__name__}: {' '.join(str(error).split())}") from error
    if scores.shape not in ((), (len(outputs),)):
        raise ConfigError(f"{key} must give one number, or one a row ({len(outputs)},), got {scores.shape}")
    if broken := int(np.count_nonzero(~np.isfinite(scores))):
        raise ConfigError(f"{key} must give finite numbers, got {broken} of {scores.size} that are NaN or infinite")
    return scores


def _is_share(scores: Array) -> bool:
    """Whether rows are right or wrong, so that differences are percentage points."""
    return bool(scores.ndim and np.isin(scores, (0, 1)).all())

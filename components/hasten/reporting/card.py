"""The model card: what people should know of a model before they use it, in Markdown (Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from hasten.core.interfaces import Signature
from hasten.core.trial import Evaluation, Interval, Result, Verdict
from hasten.reporting import quality, units
from hasten.reporting.measures import measure
from hasten.reporting.quality import Line
from hasten.reporting.summary import claim, tried

SPLITS = {
    "train": "trained and calibrated on",
    "validate": "candidates were chosen on",
    "test": "the chosen one was certified on",
}
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "sve")
"""Vector extensions that decide most of how fast a model runs, of the many that a processor has."""
LONGEST_LIST = 4
"""Values of a transform's knob that are told; of longer lists their number is."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a result does not know of the model and its rows.

    Attributes:
        data: name of the rows, such as the option of the group `data`.
        fingerprint: SHA-256 of the rows as they came.
        num_rows: of each split.
        class_counts: split -> rows of each label from 0; None where there are no labels.
        transforms: config nodes of the fitted preprocessing.
        notes: what the user should know of how the rows were read.
        task: option of the group `task`.
        columns: raw column -> shape of one row, or `text` or `bytes`.
        signature: of the model behind the preprocessing.
        engine: config node of the engine that won.
        threads: of one request.
        batch_size: rows of one request.
        calibration_rows: training rows on which ranges were measured at most; None where the model is not quantized.
        trust: packages that `hasten.load` has to be told to trust.
    """

    data: str
    fingerprint: str
    num_rows: Mapping[str, int]
    class_counts: Mapping[str, Sequence[int]] | None
    transforms: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    task: str
    columns: Mapping[str, Sequence[int] | str]
    signature: Signature
    engine: Mapping[str, Any]
    threads: int
    batch_size: int
    calibration_rows: int | None
    trust: Sequence[str] = ()


def card(result: Result, facts: Facts) -> str:
    """The whole card."""
    sections = {
        "What it is": _identity(facts),
        "What was done to it": _history(result),
        "Data": _data(facts),
        "Quality": _quality(result),
        "Speed, size and memory": _speed(result, facts),
        "Limits": _bullets(_limits(result, facts)),
        "Use it": _use(result, facts),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())
    return f"# {_inline(result.experiment)}\n\n{_inline(claim(result))}\n\n{body}"


def _identity(facts: Facts) -> str:
    columns = [f"`{name}`: {_row(shape)}" for name, shape in facts.columns.items()]
    inputs = [
        f"`{each.name}`: {_row(each.shape)} of {each.dtype}" + (f", {_axes(each.dynamic)}" if each.dynamic else "")
        for each in facts.signature.inputs
    ]
    rows = [
        ("task", facts.task),
        ("a raw row", "; ".join(columns)),
        ("after the preprocessing", "; ".join(inputs)),
        ("output of a row", f"{_row(facts.signature.output_shape)} of float32"),
        ("engine", _component(facts.engine)),
    ]
    return _table(("", ""), rows)


def _axes(axes: Sequence[int]) -> str:
    return f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))} up to this size"


def _row(shape: Sequence[int] | str) -> str:
    return shape if isinstance(shape, str) else f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _component(node: Mapping[str, Any]) -> str:
    """`Standardize(mean=[64 values], eps=1e-05)`."""
    knobs = [f"{name}={_value(value)}" for name, value in node.items() if name != "_target_" and value is not None]
    return f"{str(node['_target_']).rpartition('.')[2]}({', '.join(knobs)})"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{len(value)} entries}}" if len(value) > LONGEST_LIST else str(dict(value))
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > LONGEST_LIST:
        return f"[{len(value)} values]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _history(result: Result) -> str:
    steps = [trial for trial in result.lineage if trial.number != result.baseline.number]
    verdicts = [trial.verdict for trial in result.trials if trial.number != result.baseline.number]
    counts = [f"{verdicts.count(kind)} {kind}" for kind in get_args(Verdict) if kind in verdicts]
    told = f"{_plural(len(verdicts), 'change')} tried{': ' if counts else ''}{', '.join(counts)}."
    if not steps:
        return f"Nothing: it is the model as it was given, in eager PyTorch. {told}"
    gains = {share.step.number: units.ratio(share.gain) for share in result.shares}
    rows = [
        (str(trial.number), trial.strategy, f"`{tried(trial)}`", gains.get(trial.number, quality.UNKNOWN), trial.reason)
        for trial in steps
        if trial.evaluation is not None
    ]
    table = _table(("trial", "strategy", "what it set", f"gain in {measure(result.optimize).name}", "verdict"), rows)
    parts = [f"{told} These led here, each on top of the one before:", table]
    if result.best.evaluation is not None and result.best.evaluation.notes:
        parts.append(f"How it was done:\n\n{_bullets(result.best.evaluation.notes)}")
    return "\n\n".join(parts)


def _data(facts: Facts) -> str:
    rows = [(name, str(count), _classes(facts, name), SPLITS.get(name, "")) for name, count in facts.num_rows.items()]
    steps = [_component(node) for node in facts.transforms]
    preprocessing = "; then ".join(f"`{step}`" for step in steps) or "none"
    return "\n".join(
        [
            f"{_inline(facts.data)}, fingerprint `{facts.fingerprint}`.",
            "",
            _table(("split", "rows", "rows of each class", "what they were for"), rows),
            "",
            f"Preprocessing, fitted on the training rows and part of this artefact: {preprocessing}.",
            *(f"\n{_inline(note)}" for note in facts.notes),
        ]
    )


def _classes(facts: Facts, split: str) -> str:
    counts = (facts.class_counts or {}).get(split)
    if counts is None:
        return quality.UNKNOWN
    if len(counts) <= 2 * LONGEST_LIST:
        return ", ".join(map(str, counts))
    return f"{len(counts)} classes, {min(counts)} to {max(counts)}"


def _quality(result: Result) -> str:
    certificate, after = result.certificate, result.best.evaluation
    parts = [_inline(certificate.statement)]
    if not certificate.checked:
        parts.insert(0, "**Unchecked.** No metric constrained what was done to this model: it may be fast and wrong.")
    if test := quality.certified(certificate):
        sure = f"{100 * certificate.confidence:.4g} % confidence, one-sided"
        parts.append(f"On {certificate.rows} test rows, that no candidate was chosen on ({sure}):\n\n{_metrics(test)}")
    before = result.baseline.evaluation
    if before is not None and after is not None and after.metrics:
        lines = quality.lines(after.metrics, {name: each.value for name, each in before.metrics.items()})
        parts.append(f"On the validation rows, that candidates were chosen on:\n\n{_metrics(lines)}")
    return "\n\n".join(parts)


def _metrics(lines: Sequence[Line]) -> str:
    rows = [
        (it.name, it.before, it.after, it.drop, it.bound, it.allowed if it.constrained else "not constrained")
        for it in lines
    ]
    return _table(("metric", "before", "after", "drop", "drop at most", "drop allowed"), rows)


def _speed(result: Result, facts: Facts) -> str:
    before, after = result.baseline.evaluation, result.best.evaluation
    if before is None or after is None:
        return "Not measured."
    start = {"p50": after.references_ms.get("eager", before.latency_ms["p50"])}
    rows = [
        (f"latency {name}", _interval(start.get(name, before.latency_ms[name])), _interval(latency))
        for name, latency in after.latency_ms.items()
    ]
    rows += [
        (
            f"latency p50 of {each.told}",
            _interval(each.references_ms["eager"]) if "eager" in each.references_ms else quality.UNKNOWN,
            _interval(each.latency_ms["p50"]),
        )
        for each in result.requests
    ]
    rows += [("rows per second", _rows_a_second(before), _rows_a_second(after))]
    if after.emulated:
        rows = [(name, value, "emulated") for name, value, _ in rows]
    rows += [
        (name, units.size(old), units.size(new))
        for name, old, new in (
            ("deployable files", before.size_bytes, after.size_bytes),
            ("peak memory of the process that serves it", before.memory_bytes, after.memory_bytes),
        )
        if not (after.emulated and old is before.memory_bytes)
    ]
    rows += [("parameters", units.count(before.num_parameters), units.count(after.num_parameters))]
    rows += [("FLOP of a row", units.count(before.flops), units.count(after.flops))]
    if after.integer_share is not None:
        rows.append(("layers that run in integers", "0 %", f"{after.integer_share:.0%}".replace("%", " %")))
    ratios = [
        f"{units.ratio_interval(ratio)} against {meaning}"
        for name, meaning in (
            ("eager", "the untouched model in eager PyTorch"),
            ("engine", f"the untouched model in {result.engine_reference}, its fastest engine"),
        )
        if (ratio := result.speedup.get(name)) is not None
    ]
    asked = f"{_plural(facts.threads, 'thread')} and {_plural(facts.batch_size, 'row')} a request"
    how = (
        f"Measured on {_machine(result.machine)}; {asked}; in brackets the confidence interval. Both took turns for "
        "the p50 and the speed-up; the other figures of the untouched model are of a session of its own."
    )
    table = _table(("", "untouched, in eager PyTorch", "this model"), rows)
    return "\n\n".join([how, table, *([f"Speed-up: {'; '.join(ratios)}."] if ratios else [])])


def _interval(milliseconds: Interval) -> str:
    return units.latency_interval(milliseconds)


def _rows_a_second(evaluation: Evaluation) -> str:
    rate = evaluation.throughput
    return f"{units.count(rate.value)} [{units.count(rate.low)}, {units.count(rate.high)}]"


def _machine(facts: Mapping[str, Any]) -> str:
    cores = facts.get("logical_cores")
    vectors = ", ".join(name for name in facts.get("isa") or () if name in VECTORS)
    parts = [str(facts.get("processor") or "an unknown processor")]
    parts += [_plural(int(cores), "core")] if cores else []
    parts += [f"with {vectors}"] if vectors else []
    return _inline(", ".join(parts))


def _limits(result: Result, facts: Facts) -> Iterable[str]:
    certificate = result.certificate
    if not certificate.checked:
        yield "Quality is unchecked: nothing says that this model still gives the answers of the one it was made from."
    elif not certificate.held:
        yield "The quality is not certified: the drop on new rows may be larger than was allowed."
    others = "requests than these" if result.requests else "batch sizes"
    yield f"Other machines, thread counts and {others} were not measured, and may rank engines differently."
    if certificate.checked:
        yield "The bounds speak of rows like the test rows. Rows from elsewhere, or from later, were not looked at."
    if certificate.reads > 1:
        yield (
            f"{certificate.reads} different artefacts have been certified on these test rows: they are no longer "
            "untouched, and the certificate is weaker than it says."
        )
    if facts.calibration_rows is not None:
        calibrated = min(facts.calibration_rows, facts.num_rows.get("train", facts.calibration_rows))
        yield f"Ranges of the integers were measured on {calibrated} training rows: values beyond them are clipped."
    yield "Fairness, robustness against adversaries and privacy of the training rows were not examined."
    yield from result.warnings


def _use(result: Result, facts: Facts) -> str:
    trust = f", trust={list(facts.trust)!r}" if facts.trust else ""
    rows = ", ".join(f"{name}={_example(shape)}" for name, shape in facts.columns.items())
    if len(facts.columns) == 1:
        rows = _example(next(iter(facts.columns.values())))
    warning = "Loading runs code of these packages.\n\n" if facts.trust else ""
    gives = ", ".join(("rows", *map(str, facts.signature.output_shape)))
    return (
        "```python\nimport hasten\nimport numpy as np\n\n"
        f'model = hasten.load("{result.model_folder}"{trust})\n'
        f"outputs = model({rows})  # raw rows in, ({gives}) out\n```\n\n"
        f"{warning}Rebuild it, and measure it again:\n\n```\n{result.best.rebuild}\n```"
    )


def _example(shape: Sequence[int] | str) -> str:
    if shape == "text":
        return '["one row"]'
    if shape == "bytes":
        return '[open("one_row", "rb").read()]'
    return f"np.zeros(({', '.join(map(str, (1, *shape)))}{',' if not shape else ''}))"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_inline(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {_inline(sentence)}" for sentence in sentences)


def _inline(text: str) -> str:
    """On one line, and no HTML."""
    return " ".join(text.split()).replace("<", "&lt;")

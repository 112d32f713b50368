"""The model card says what the model is, what was done to it, and what nobody has checked."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hasten.core.interfaces import Input, Signature
from hasten.core.trial import Result
from hasten.reporting.card import Facts, card

FACTS = Facts(
    data="digits",
    fingerprint="ab12" * 16,
    num_rows={"train": 810, "validate": 447, "test": 540},
    class_counts={"train": (80, 81) * 5, "validate": (44, 45) * 5, "test": (54,) * 10},
    transforms=(
        {"_target_": "hasten.data.transforms.Scale", "column": "input", "factor": 0.0625},
        {"_target_": "hasten.data.transforms.Standardize", "mean": list(range(64)), "std": None},
    ),
    notes=("3 files are no images and were left out: a.txt, b.txt, c.txt",),
    task="classification",
    columns={"input": (1, 8, 8)},
    signature=Signature(inputs=(Input(shape=(1, 8, 8)),), output_shape=(10,)),
    engine={"_target_": "hasten.engines.openvino.OpenVino", "threads": 1, "static_batch": 1},
    threads=1,
    batch_size=1,
    calibration_rows=256,
)


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text, flags=re.MULTILINE)[[*titles(text)].index(title) + 1]


def titles(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, flags=re.MULTILINE)


def test_has_every_section_and_whole_tables(result: Result) -> None:
    text = card(result, FACTS)
    assert text.startswith("# digits\n\ndigits runs 42.1 times as fast as in eager PyTorch")
    assert titles(text) == [
        "What it is",
        "What was done to it",
        "Data",
        "Quality",
        "Speed, size and memory",
        "Limits",
        "Use it",
    ]
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


def test_says_what_goes_in_and_out_and_what_runs_it(result: Result) -> None:
    told = section(card(result, FACTS), "What it is")
    for fact in ("classification", "`input`: (1, 8, 8) of float32", "(10,) of float32", "OpenVino(threads=1, "):
        assert fact in told


def test_follows_the_steps_that_led_to_the_model_and_no_others(result: Result) -> None:
    told = section(card(result, FACTS), "What was done to it")
    # Trial 8 edits 7, which edits 6, 3, 1 and the baseline.
    assert re.findall(r"^\| (\d+) \|", told, flags=re.MULTILINE) == ["1", "3", "6", "7", "8"]
    assert "3.33x faster than trial 7 [3.20, 3.47]" in told
    assert "11 changes tried: 4 accepted, 6 rejected, 1 failed." in told
    assert "| 7 | engine | `engine=openvino` | 1.83x | 1.83x faster than trial 3 [1.77, 1.90] |" in told
    assert told.strip().endswith("- the first and the last layer &lt;stay> float")
    untouched = replace(result, best=result.baseline)
    assert "Nothing: it is the model as it was given" in section(card(untouched, FACTS), "What was done to it")


def test_names_the_rows_by_their_fingerprint_and_the_preprocessing_by_its_steps(result: Result) -> None:
    told = section(card(result, FACTS), "Data")
    assert f"fingerprint `{FACTS.fingerprint}`" in told
    assert "| test | 540 | 10 classes, 54 to 54 | the chosen one was certified on |" in told
    assert "`Scale(column=input, factor=0.0625)`; then `Standardize(mean=[64 values])`" in told
    assert FACTS.notes[0] in told


def test_gives_quality_before_and_after_with_its_bounds(result: Result, forecast: Result) -> None:
    told = section(card(result, FACTS), "Quality")
    assert result.certificate.statement in told
    assert "| accuracy | 98.5 % | 98.0 % | 0.56 points | 1.49 points | 2.00 points |" in told
    assert "540 test rows, that no candidate was chosen on (95 % confidence, one-sided)" in told
    several = section(card(forecast, FACTS), "Quality")
    assert "| psnr | 31.2 | 30.9 | 0.3 | 0.75 | 2 |" in several
    assert "1.11 % of the baseline" in several


def test_gives_latencies_with_intervals_and_the_machine(result: Result) -> None:
    told = section(card(result, FACTS), "Speed, size and memory")
    assert "Example CPU 7000 16-Core Processor, 2 cores, with avx2; 1 thread and 1 row a request" in told
    for row in (
        "| latency p50 | 3.12 [3.03, 3.21] ms | 74.1 [71.9, 76.3] µs |",
        "| latency p99 | 4.37 [4.24, 4.50] ms | 104 [101, 107] µs |",
        "| deployable files | 4.39 MB | 118 kB |",
        "| layers that run in integers | 0 % | 100 % |",
        "42.1x [40.8, 43.4] against the untouched model in eager PyTorch",
        "17.7x [17.2, 18.2] against the untouched model in onnxruntime",
    ):
        assert row in told


def test_says_what_was_not_checked(result: Result) -> None:
    told = section(card(result, FACTS), "Limits")
    assert "Other machines" in told
    assert "measured on 256 training rows" in told
    assert result.warnings[0] in told
    assert "no longer" not in told
    again = replace(result, certificate=replace(result.certificate, reads=3, held=False))
    told = section(card(again, replace(FACTS, calibration_rows=None)), "Limits")
    assert "3 different artefacts have been certified on these test rows" in told
    assert "The quality is not certified" in told
    assert "training rows: values" not in told


def test_says_plainly_that_quality_is_unchecked(unchecked: Result) -> None:
    text = card(unchecked, replace(FACTS, class_counts=None))
    assert "**Unchecked.**" in section(text, "Quality")
    assert section(text, "Limits").partition("- ")[2].startswith("Quality is unchecked")
    assert "nan" not in text.split()


@pytest.mark.parametrize(
    ("columns", "call"),
    [
        ({"input": (1, 8, 8)}, "model(np.zeros((1, 1, 8, 8)))"),
        ({"value": ()}, "model(np.zeros((1,)))"),
        ({"text": "text"}, 'model(["one row"])'),
        ({"image": "bytes", "age": (1,)}, 'model(image=[open("one_row", "rb").read()], age=np.zeros((1, 1)))'),
    ],
)
def test_shows_how_to_load_and_rebuild_it(result: Result, columns: dict[str, tuple[int, ...] | str], call: str) -> None:
    told = section(card(result, replace(FACTS, columns=columns, trust=("my_model",))), "Use it")
    assert f"hasten.load(\"{result.model_folder}\", trust=['my_model'])" in told
    assert call in told
    assert f"```\n{result.best.rebuild}\n```" in told
    code = re.findall(r"```python\n(.*?)```", told, re.DOTALL)[0]
    compile(code, "card", "exec")


def test_text_of_others_breaks_no_table_and_is_no_html(result: Result) -> None:
    trials = list(result.trials)
    trials[8] = replace(trials[8], reason="a | b\n<script>")
    told = card(replace(result, best=trials[8], trials=tuple(trials)), FACTS)
    assert "a \\| b &lt;script>" in told
    assert "<script" not in told

"""`target.length` and `target.also`: what the target's requests decide, and what is timed for the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from hasten.core.files import read_json

pytestmark = pytest.mark.slow

QUESTION = "data.transforms=[{_target_: hasten.data.transforms.Tokens, column: text, vocabulary_size: 30, length: 16}]"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for rows of words and a transformer of one small layer."""
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in generator.integers(0, 25, 16)) for _ in range(120)]
    file = tmp_path_factory.mktemp("questions") / "questions.parquet"
    parquet.write_table(pyarrow.table({"text": texts, "label": np.arange(120) % 2}), file)
    sizes = ("model.arch.width=16", "model.arch.num_heads=2", "model.arch.num_layers=1", "model.arch.feedforward=16")
    rows = ("data=parquet", f"data.train={file}", "data.inputs=[text]", "data.targets=label", QUESTION)
    return ("model=transformer", *rows, *sizes, "trainer.epochs=1")


def test_times_the_other_requests_of_the_target_for_the_best(hasten: Callable[..., Any], store: Path) -> None:
    also = "target.also=[{batch_size: 8}]"
    ran = hasten("run", "engine=onnxruntime", also)
    assert ran.code == 0, ran.told
    (request,) = ran.summary["requests"]
    assert (request["request"], request["batch_size"], request["length"]) == ("b8", 8, None)
    assert set(request["latency_ms"]) == {"p50", "p90", "p99"}
    assert set(request["speedup"]) == {"eager", "engine"}
    for interval in (*request["latency_ms"].values(), *request["speedup"].values(), request["throughput"]):
        assert 0 < interval["low"] <= interval["value"] <= interval["high"]
    assert "p50 of 8 rows" in ran.printed
    page = (ran.folder / "report.html").read_text()
    assert "Other requests" in page
    kept = [read_json(file) for file in store.glob("latency/*/blocks.json")]
    assert 8 in {blocks["batch_size"] for blocks in kept}
    again = hasten("run", "engine=onnxruntime", also)
    assert again.summary["requests"] == ran.summary["requests"], "the store has it"


def test_a_shorter_request_is_what_is_measured_and_profiled(
    hasten: Callable[..., Any], questions: tuple[str, ...]
) -> None:
    long, short = (hasten("profile", *questions, f"target.length={length}") for length in ("null", "4"))
    assert (long.code, short.code) == (0, 0), long.told + short.told
    profiles = [read_json(each.folder / "profile.json") for each in (long, short)]
    flops = [{group["kind"]: group["flops"] for group in profile["operators"]} for profile in profiles]
    assert flops[0]["linear"] > 3 * flops[1]["linear"] > 0
    assert profiles[0]["latency_ms"] != profiles[1]["latency_ms"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("target.length=17", "length must be at most 16, the size of input ids, got 17 (target.length)"),
        ("target.also=[{batch_size: 1, length: 99}]", "got 99 (target.also[0].length)"),
    ],
)
def test_a_request_that_is_too_long_is_refused_before_anything_trains(
    asked: str, told: str, hasten: Callable[..., Any], questions: tuple[str, ...]
) -> None:
    refused = hasten("run", *questions, asked)
    assert refused.code == 2
    assert told in refused.told
    assert refused.told.count("\n") == 1
    assert not refused.folder.exists()


def test_rows_of_one_size_have_no_length(hasten: Callable[..., Any]) -> None:
    refused = hasten("run", "target.length=4")
    assert refused.code == 2
    assert "length must be null where no input has an axis whose size may differ" in refused.told

"""`hasten explain`: what goes with what, what a recipe does, and every reason why it would be refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from hasten import cli

MINE = """
from dataclasses import dataclass
from hasten.core.interfaces import GraphPass

@dataclass(frozen=True, kw_only=True)
class Ternary(GraphPass):
    relieves = ("memory", "capacity")
    requires = ("student|pruning",)
    never_with = ("engine=openvino", "pruning=unstructured")
    calibration_rows: int = 7

    def __call__(self, graph, calibration, family, folder):
        raise AssertionError("explain builds nothing")

    @property
    def measures(self):
        return True
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's config folder with a technique, one that does not import, an edited one, and a strategy to be named."""
    (tmp_path / "my_ternary.py").write_text(MINE)
    folder = tmp_path / "my_conf"
    (folder / "quantization").mkdir(parents=True)
    (folder / "quantization" / "ternary.yaml").write_text(
        "# Three values a weight\n_target_: my_ternary.Ternary\ncalibration_rows: 7\n"
    )
    (folder / "quantization" / "careful.yaml").write_text(
        "# Many rows\ndefaults: [static, _self_]\ncalibration_rows: 900\n"
    )
    (folder / "pruning").mkdir()
    (folder / "pruning" / "lost.yaml").write_text("# Gone\n_target_: nowhere.Lost\n")
    (folder / "strategy").mkdir()
    (folder / "strategy" / "three.yaml").write_text(
        "# @package strategies.three\n# Three values\naddresses: {memory: 8}\n"
        "attempts: [[quantization=ternary, engine=onnxruntime, student=mlp]]\n"
        "search: null\ncost: 1\nby_default: false\n"
    )
    return folder


def explain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit code, title of each table -> first column -> the others, and all that was printed."""
    monkeypatch.setenv("COLUMNS", "400")
    code = cli.run([*arguments, "explain"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    tables: dict[str, dict[str, str]] = {}
    for line in captured.out.splitlines():
        name, _, rest = line.strip().partition("  ")
        if line.startswith("  ") and line.strip() and tables:
            tables[next(reversed(tables))][name] = " | ".join(re.split(r" {2,}", rest.strip()))
        elif line.strip():
            tables[line.strip()] = {}
    return code, tables, captured.out + captured.err


def table(tables: Mapping[str, dict[str, str]], start: str) -> dict[str, str]:
    return next(rows for title, rows in tables.items() if title.startswith(start))


def test_tells_what_the_components_declare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, tables, _ = explain(capsys, monkeypatch)
    assert code == 0
    techniques = table(tables, "what techniques are for")
    assert techniques["pruning=structured"] == "compute, memory, capacity | training"
    assert techniques["distillation=soft_labels"] == (
        "lost quality | student=..., pruning=... or a quantization=... that trains | "
        "tasks whose outputs are not classes"
    )
    assert "256 rows to measure ranges on" in techniques["quantization=static"]
    assert "engine=eager" in techniques["quantization=dynamic"]
    assert not {"pruning=none", "student=same"} & techniques.keys()
    tasks = table(tables, "what tasks allow")
    assert tasks["task=regression"] == "numbers | yes | attention, cosine, features, outputs, relations"
    assert tasks["task=unlabelled"].startswith("numbers | no")
    assert "accepted: it can be run" in tables
    strategies = table(tables, "strategies on this recipe")
    assert strategies["static_int8"].endswith("engine=onnxruntime quantization=static")
    assert "joint (only where it is named)" in strategies
    assert [name for name in table(tables, "this recipe") if name] == [
        "stage",
        "data",
        "teacher",
        "export",
        "compile",
        "evaluate",
    ]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"


def test_the_matrix_names_the_reason_of_every_no(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.engines.checks.find_spec", lambda name: None if name == "openvino" else name)
    rows = table(explain(capsys, monkeypatch, "strategy=[engine]")[1], "what engines run")
    first = next(iter(rows))
    columns = [first, *rows[first].split(" | ")]
    cells = dict(zip(columns, rows["quantization=none"].split(" | "), strict=True))
    assert cells["eager"] == cells["onnxruntime"] == "yes"
    number = cells["openvino"].removeprefix("no ")
    assert any(line.startswith(f"{number} openvino is not installed: pip install openvino") for line in rows)
    assert dict(zip(columns, rows["quantization=static"].split(" | "), strict=True))["onnxruntime"] == "yes"
    assert {"no"} == {cell.partition(" ")[0] for cell in rows["quantization=dynamic"].split(" | ")} - {"yes"}


def test_tells_every_reason_why_a_combination_is_refused_and_that_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ("distillation=soft_labels", "quantization=static", "strategy=[engine]")
    code, tables, _ = explain(capsys, monkeypatch, *typed)
    assert code == 0
    assert list(tables["refused:"]) == [
        "distillation=soft_labels needs student=..., pruning=... or a quantization=... that trains, and the recipe has "
        "none",
        "engine=eager can't run this recipe: eager PyTorch runs no quantized graph: choose engine=onnxruntime or "
        "engine=openvino",
    ]
    assert "strategies on the untouched model" in tables


def test_tells_the_stages_with_the_knobs_that_were_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["pruning=structured", "pruning.sparsity=0.25", "distillation=soft_labels", "trainer.epochs=4"]
    _, tables, printed = explain(capsys, monkeypatch, *typed, "strategy=[engine]")
    stages = table(tables, "this recipe: distillation=soft_labels pruning=structured pruning.sparsity=0.25")
    assert stages["prune"] == (
        "pruning=structured | Remove whole channels, attention heads and hidden units through the dependency graph, "
        "then fine-tune | sparsity=0.25"
    )
    assert list(stages)[1:5] == ["data", "teacher", "answers", "prune"]
    assert re.search(r"distillation=soft_labels +Learn from the model's softened outputs", printed)
    assert "epochs=4" not in printed.partition("this recipe")[2].partition("\n")[2], "it follows from the trainer"
    assert set(table(tables, "strategies on this recipe")) == {"strategy", "engine"}


def test_tells_of_every_stage_what_it_does_and_of_distillation_where_something_trains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["student=mlp", "distillation=assistant", "distillation.teachers=2", "quantization=affine"]
    _, tables, printed = explain(capsys, monkeypatch, *typed, "engine=onnxruntime", "strategy=[engine]")
    assert table(tables, "what techniques are for")["quantization=affine"].split(" | ")[1] == (
        "256 rows to measure ranges on"
    )
    stages = table(tables, "this recipe")
    assert list(stages)[1:7] == ["data", "teacher", "teacher-2", "answers", "assistant", "assistant-answers"]
    assert all(stages.values())
    assert stages["teacher-2"] == stages["teacher"]
    assert printed.count("Soft labels over") == 1, "for the student, as the quantization does not train"


def test_a_value_that_is_wrong_by_itself_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, tables, told = explain(capsys, monkeypatch, "pruning=structured", "pruning.sparsity=1.5")
    assert (code, tables) == (2, {})
    assert "sparsity must be a number in [0, 1) or null, got 1.5 (pruning.sparsity)" in told


def test_techniques_of_the_users_own_are_in_it(
    mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, tables, _ = explain(
        capsys, monkeypatch, "--config-dir", str(mine), "quantization=ternary", "engine=openvino", "strategy=[three]"
    )
    assert code == 0
    techniques = table(tables, "what techniques are for")
    assert techniques["quantization=ternary"] == (
        "memory, capacity | student=... or pruning=...; 7 rows to measure ranges on; timing on the target | "
        "engine=openvino, pruning=unstructured"
    )
    careful = "compute, memory, capacity | 900 rows to measure ranges on | engine=hls"
    assert techniques["quantization=careful"] == careful
    assert "nowhere.Lost does not import" in techniques["pruning=lost"]
    assert "Three values a weight" in table(tables, "this recipe")["quantize"]
    assert list(tables["refused:"]) == [
        "quantization=ternary needs student=... or pruning=..., and the recipe has none",
        "quantization=ternary can't be combined with engine=openvino",
    ]
    assert table(tables, "strategies on the untouched model")["three (only where it is named)"] == (
        "memory 8x | quantization=ternary engine=onnxruntime student=mlp"
    )

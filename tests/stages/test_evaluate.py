"""What is held against the test rows: of tasks without labels, and of baselines that know nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from hasten.artefacts.module import build as build_module
from hasten.artefacts.module import output_shape, rebuild
from hasten.core.files import read_json
from hasten.core.interfaces import Input, Target
from hasten.core.objective import Objective
from hasten.core.recipe import Composer
from hasten.core.store import Store
from hasten.stages.build import Built, build
from hasten.stages.evaluate import Evaluator
from hasten.stages.stage import Tools

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hydra")]


def evaluator() -> Evaluator:
    target = Target(device="cpu", threads=1, batch_size=50, engines=("eager",))
    return Evaluator(store=Store(Path("store")), target=target, objective=Objective(max_drop=0.1), looks=1, seed=0)


def built(*overrides: str) -> Built:
    shared = ("model=mlp", "model.arch.hidden=[16]", "objective.max_drop=0.1", "trainer.epochs=3", "trainer.threads=1")
    return build(Composer.of([*shared, "trainer.lr=0.01", *overrides]).compose(), Store(Path("store")), Tools())


def test_embeddings_are_held_to_those_of_the_untouched_model() -> None:
    mlp = {"_target_": "hasten.models.mlp.MLP", "hidden": [16], "num_outputs": 5}
    images = (Input(shape=(1, 8, 8)),)
    model, _ = build_module(mlp, images, None, seed=0)
    save_file(model.state_dict(), "encoder.safetensors")
    encoder = ("task=similarity", "model.arch.num_outputs=5", "model.checkpoint=encoder.safetensors")
    untouched = (*encoder, "model.training.epochs=0")
    taught = ("student=mlp", "student.arch.hidden=[32]", "distillation=outputs", "distillation.alpha=1")
    baseline, candidate = built(*untouched), built(*untouched, *taught)
    assert output_shape(rebuild(candidate.module.folder), images) == (5,)
    assert read_json(candidate.entries["student"].folder / "curves.json").keys() == {"train_loss", "lr"}

    certificate = evaluator().certify(baseline, candidate)
    assert (certificate.metric, certificate.baseline) == ("cosine_similarity", pytest.approx(1, abs=1e-6))
    assert 0.5 < certificate.candidate < 1
    assert certificate.held == (certificate.bound <= 0.1)
    assert certificate.reads == 1
    again = evaluator().certify(baseline, baseline)
    assert (again.drop, again.reads) == (0, 0), "the baseline held against itself learns nothing from the rows"


def test_a_baseline_that_is_no_better_than_the_mean_has_nothing_to_keep() -> None:
    generator = np.random.default_rng(0)
    np.savez("rows.npz", inputs=generator.normal(size=(200, 4)), targets=generator.normal(size=200))
    unrelated = built("data=npz", "data.path=rows.npz", "task=regression", "trainer.epochs=1")
    certificate = evaluator().certify(unrelated, unrelated)
    assert not certificate.held
    assert certificate.statement.startswith(
        "Nothing to certify: the baseline is not shown to be better than one answer for all rows (squared_error "
    )


def test_every_metric_of_the_task_is_told_and_one_that_fails_is_enough() -> None:
    strict = ("task.metrics.recall.max_drop=0.01", "data=digits")
    baseline = built(*strict)
    candidate = built(*strict, "student=mlp", "student.arch.hidden=[2]")
    certificate = evaluator().certify(baseline, candidate)
    assert not certificate.held
    assert list(certificate.metrics) == list(certificate.baselines) == ["accuracy", "recall"]
    recall = certificate.metrics["recall"]
    assert recall.drop is not None
    assert not recall.holds
    assert f"recall of class {recall.drop.label}" in certificate.statement
    assert recall.value <= certificate.metrics["accuracy"].value
    assert json.dumps(certificate.to_dict(), allow_nan=False)


def test_a_quantization_that_reaches_too_few_layers_is_known_once_the_graph_is_there() -> None:
    small = ("model=resnet", "model.arch.widths=[4]", "model.arch.num_blocks=1", "trainer.epochs=1")
    untouched = Composer.of([*small, "engine=onnxruntime"]).compose()
    narrow = Composer.of([*small, "engine=onnxruntime", "quantization=dynamic"]).compose()
    assert evaluator().unfit(narrow) is None, "nothing has been exported"
    build(untouched, Store(Path("store")), Tools())
    told = "only 25% of the convolutions and linear layers can run in integers, 50% wanted"
    assert evaluator().unfit(narrow) == f"{told} (quantization.min_integer_share)"
    for fewer in (["quantization=dynamic", "quantization.min_integer_share=0.2"], ["quantization=static"]):
        assert evaluator().unfit(Composer.of([*small, "engine=onnxruntime", *fewer]).compose()) is None

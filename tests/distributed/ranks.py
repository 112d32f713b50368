"""One of several processes that train each of the `CASES`: `python ranks.py FOLDER`, with torchrun's variables."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.core.errors import HastenError
from hasten.core.files import write_json
from hasten.core.interfaces import Distillation, Rows, Silent
from hasten.core.sections import Distributed, Step, TrainingSettings
from hasten.core.tensor_plan import WHOLE, TensorPlan
from hasten.distributed.checkpoint import read_weights, write_weights
from hasten.distributed.group import Group, joined
from hasten.distributed.parameters import clip_gradients
from hasten.models.mlp import MLP
from hasten.models.transformer import Transformer
from hasten.passes.distillation.features import FeatureMaps
from hasten.passes.pruning.masks import Masked
from hasten.tasks.classification import Classification
from hasten.training.fit import Fitted, fit

NUM_ROWS, STEPS, LENGTH = 160, 20, 8


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 10, bias=False),  # one before a normalization has no gradient but noise
        nn.BatchNorm1d(10),
    )


def with_layer_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 10))


def with_layers() -> nn.Module:
    layers = (layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.GELU()))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), *layers, nn.Linear(128, 10))


def mlp() -> nn.Module:
    return MLP(input_shape=(1, 8, 8), num_outputs=10, hidden=(32, 16))


def transformer(dropout: float = 0.1) -> nn.Module:
    model = Transformer(
        input_shape=(LENGTH,),
        vocabulary_size=20,
        num_outputs=4,
        width=16,
        num_heads=4,
        num_layers=2,
        feedforward=32,
        dropout=dropout,
    )
    for layer in model.layers:
        layer.attention.key.bias = None  # the same for all keys, it changes no share, and has no gradient but noise
    return model


def with_zeros() -> nn.Module:
    model, random = with_layer_norm(), torch.Generator().manual_seed(2)
    return Masked(model, {"1.weight": torch.rand(32, 64, generator=random) < 0.5})


def teacher() -> nn.Module:
    torch.manual_seed(5)
    return with_layer_norm().eval()


def without_dropout() -> nn.Module:
    return transformer(dropout=0)


def in_place() -> nn.Module:
    layers = (nn.Linear(64, 32), nn.ReLU(inplace=True), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Linear(16, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def with_slope() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.PReLU(), nn.Linear(32, 10))


MLP_PLAN = TensorPlan(layers={"layers.1": "column", "layers.3": "row"})
PLAN = TensorPlan(
    layers={
        "tokens": "embedding",
        "layers.*.attention": "shared",
        **dict.fromkeys([f"layers.*.attention.{name}" for name in ("query", "key", "value")], "column"),
        "layers.*.attention.out": "row",
        "layers.*.linear1": "column",
        "layers.*.linear2": "row",
        "classifier": "column_gathered",
        "dropout": "sequence_scattered",
        "layers.*.normalization*": "sequence",
        "layers.*.dropout": "sequence",
        "normalization": "sequence_gathered",
    }
)


def images() -> Rows:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((NUM_ROWS, 1, 8, 8)).astype(np.float32)
    targets = (images.reshape(NUM_ROWS, -1)[:, :10]).argmax(1)
    return Rows(inputs={"image": images}, targets=targets)


def texts() -> Rows:
    rng = np.random.default_rng(0)
    ids = rng.integers(20, size=(NUM_ROWS, LENGTH))
    lengths = rng.integers(2, LENGTH + 1, size=(NUM_ROWS, 1))
    mask = (np.arange(LENGTH) < lengths).astype(np.int64)
    return Rows(inputs={"ids": ids, "mask": mask}, targets=ids[:, 0] % 4)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training in one process or in several.

    Attributes:
        batch_size: rows of a step.
        loss, teachers: of a distillation, where there is one.
        patience: with which it stops early; None for no rows held out.
        sizes: numbers of processes that it is for.
    """

    model: Callable[[], nn.Module] = with_layer_norm
    rows: Callable[[], Rows] = images
    batch_size: int = 32
    step: Step = field(default_factory=Step)
    spread: Distributed
    plan: TensorPlan = WHOLE
    sizes: tuple[int, ...] = (2, 4)
    loss: Distillation | None = None
    teachers: tuple[Callable[[], nn.Module], ...] = ()
    patience: int | None = None


def ddp(**knobs: object) -> Distributed:
    return Distributed(kind="ddp", devices=2, **knobs)


def fsdp(**knobs: object) -> Distributed:
    return Distributed(kind="fsdp", **{"devices": 2, "shards": 0, **knobs})


def tensor(**knobs: object) -> Distributed:
    return Distributed(kind="tensor", devices=2, tensor=0, **knobs)


def hybrid(**knobs: object) -> Distributed:
    return Distributed(kind="hybrid", devices=4, **knobs)


CASES = {
    "batch normalization": Case(model=with_batch_norm, spread=ddp()),
    "shares of different sizes": Case(model=with_batch_norm, batch_size=27, spread=ddp(static_graph=True)),
    "parts": Case(model=with_batch_norm, step=Step(micro_batches=4), spread=ddp()),
    "parts of different sizes": Case(batch_size=27, step=Step(micro_batches=3), spread=ddp(bucket_mb=0.001)),
    "clipped": Case(step=Step(clip_norm=0.05), spread=ddp(bucket_views=False)),
    "float16": Case(spread=ddp(compression="float16")),
    "bfloat16": Case(spread=ddp(compression="bfloat16")),
    "powersgd": Case(spread=ddp(compression="powersgd", powersgd_start=2)),
    "powersgd of several buckets": Case(
        model=with_layers, spread=ddp(compression="powersgd", powersgd_start=2, bucket_mb=0.05)
    ),
    "averaged": Case(model=with_batch_norm, spread=ddp(average_every=3)),
    "fsdp": Case(spread=fsdp()),
    "fsdp, batch normalization": Case(model=with_batch_norm, batch_size=27, spread=fsdp()),
    "fsdp, clipped": Case(step=Step(clip_norm=0.05), spread=fsdp(reshard=False)),
    "fsdp, parts of different sizes": Case(batch_size=27, step=Step(micro_batches=3), spread=fsdp()),
    "fsdp, transformer": Case(model=without_dropout, rows=texts, step=Step(optimizer_kernels="foreach"), spread=fsdp()),
    "fsdp, calculated again": Case(
        model=without_dropout, rows=texts, step=Step(activation_budget_mb=0.3), spread=fsdp(), sizes=(2,)
    ),
    "fsdp, held at zero": Case(model=with_zeros, spread=fsdp(), patience=3, sizes=(2,)),
    "fsdp, taught": Case(
        step=Step(micro_batches=2),
        spread=fsdp(),
        sizes=(2,),
        loss=FeatureMaps(student_layers=("1",), teacher_layers=("4",), channel_axis=-1),
        teachers=(teacher,),
    ),
    "tensor": Case(model=mlp, spread=tensor(), plan=MLP_PLAN),
    "tensor, changed in place": Case(
        model=in_place, spread=tensor(), plan=TensorPlan(layers={"1": "column", "3": "row"}), sizes=(2,)
    ),
    "tensor, transformer": Case(model=transformer, rows=texts, spread=tensor(), plan=PLAN),
    "tensor, clipped parts": Case(
        model=transformer, rows=texts, step=Step(micro_batches=3, clip_norm=0.05), spread=tensor(), plan=PLAN
    ),
    "sequence": Case(
        model=transformer,
        rows=texts,
        step=Step(micro_batches=2, clip_norm=0.05),
        spread=tensor(sequence_parallel=True),
        plan=PLAN,
    ),
    "replicas x shards": Case(
        batch_size=27,
        step=Step(micro_batches=3, clip_norm=0.05),
        spread=fsdp(devices=4, shards=2),
        sizes=(4,),
    ),
    "shards x tensor": Case(
        model=without_dropout,
        rows=texts,
        batch_size=27,
        step=Step(micro_batches=2, clip_norm=0.05),
        spread=hybrid(shards=0, tensor=2),
        plan=PLAN,
        sizes=(4,),
    ),
    "shards x sequence": Case(
        model=without_dropout,
        rows=texts,
        spread=hybrid(shards=0, tensor=2, sequence_parallel=True),
        plan=PLAN,
        sizes=(4,),
    ),
    "replicas x tensor": Case(
        model=without_dropout,
        rows=texts,
        step=Step(optimizer_kernels="for_loop", clip_norm=0.05),
        spread=hybrid(tensor=2),
        plan=PLAN,
        sizes=(4,),
    ),
}


def trained(case: Case, folder: Path, group: object = None, **more: object) -> Fitted:
    torch.manual_seed(1)
    model = case.model()
    steps_per_epoch = NUM_ROWS // case.batch_size
    return fit(
        model,
        case.rows(),
        TrainingSettings(
            epochs=STEPS // steps_per_epoch,
            batch_size=case.batch_size,
            lr=0.01,
            weight_decay=0.01,
            patience=case.patience,
        ),
        task=Classification(),
        step=case.step,
        seed=3,
        threads=1,
        folder=folder,
        checkpoint_seconds=1e9,
        progress=Silent(),
        what="model",
        key="model.training",
        group=group,
        plan=case.plan,
        loss=case.loss,
        teachers=[make() for make in case.teachers],
        **more,
    )


def together(fitted: Fitted, case: Case, folder: Path, group: Group) -> dict[str, torch.Tensor]:
    """The weights of all processes, as one that is not of them reads them."""
    write_weights(folder, fitted.model, group)
    group.agreed(None)  # it is there when the first has written it
    whole = case.model()
    read_weights(folder, whole)
    return whole.state_dict()


class Weights(pl.Callback):
    """A few of them after each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, learner: pl.LightningModule, *batch: object) -> None:
        self.steps.append(next(learner.parameters()).detach().clone())


class Collectives(TorchDispatchMode, pl.Callback):
    """Counts those of the last step of a training, by their names."""

    def on_train_batch_start(self, *arguments: object) -> None:
        self.counts = Counter()
        self.__enter__()

    def on_train_batch_end(self, *arguments: object) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def collectives(case: Case, group: Group, folder: Path) -> dict[str, int]:
    watch = Collectives()
    trained(case, folder, replace(group, spread=case.spread), steps=2, callbacks=[watch])
    return dict(watch.counts)


def norm_over_stages(group: Group) -> float:
    """Of gradients of ones, one more in each stage of a pipeline."""
    weight = nn.Parameter(torch.zeros(group.rank + 1))
    weight.grad = torch.ones_like(weight)
    spread = Distributed(kind="pipeline", devices=group.size, pipeline=0)
    return clip_gradients([weight], 1.0, replace(group, spread=spread)).item()


def refusal(case: Case, group: Group, folder: Path) -> str:
    try:
        trained(case, folder, replace(group, spread=case.spread))
    except HastenError as error:
        return str(error)
    return ""


def facts(group: Group, folder: Path) -> dict[str, object]:
    """What is to be seen in a group alone."""
    parts = {
        f"reshard={reshard}": [
            collectives(Case(step=Step(micro_batches=parts), spread=fsdp(reshard=reshard)), group, folder)
            for parts in (1, 4)
        ]
        for reshard in (True, False)
    }
    unpaired = Case(model=mlp, spread=tensor(), plan=TensorPlan(layers={"layers.1": "column"}))
    between = Case(model=with_slope, spread=tensor(), plan=TensorPlan(layers={"1": "column", "3": "row"}))
    last = Case(model=mlp, spread=tensor(), plan=TensorPlan(layers={"layers.5": "column"}))
    return {
        "collectives": parts,
        "norm": norm_over_stages(group),
        "unpaired": refusal(unpaired, group, folder),
        "between": refusal(between, group, folder),
        "last": refusal(last, group, folder),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    with joined(ddp()) as group:
        for name, case in CASES.items():
            if group.size in case.sizes:
                seen = [Weights()] if case.spread.local_steps else []
                fitted = trained(case, folder / "resume", replace(group, spread=case.spread), callbacks=seen)
                steps = [step for each in seen for step in each.steps]
                whole = together(fitted, case, folder / name, group)
                own = {key: value for key, value in fitted.model.state_dict().items() if not isinstance(value, DTensor)}
                weights = own if group.rank else whole
                file = folder / f"{name}-{os.environ['RANK']}.pt"
                torch.save({"weights": weights, "curves": fitted.curves, "steps": steps}, file)
        if group.size == 2:
            write_json(folder / f"facts-{group.rank}.json", facts(group, folder / "resume"))


if __name__ == "__main__":
    main()

"""A training as a plain Lightning script has it: what `benchmarks/plain_lightning.py` holds hasten's against.

A `Dataset` that decodes an image whenever it is asked for one, a `DataLoader` with workers, and a Trainer. Nothing here
is hasten's but the network, and the callback that lets it be asked for a few steps at a time.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hasten.core.interpreter import private_channel
from hasten.models.cifar_resnet import CifarResNet
from hasten.stages.trainee import Channel, Paced

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


class Images(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, file: str) -> None:
        table = pq.read_table(file, columns=["image", "label"])
        self.images, self.labels = table["image"].to_pylist(), table["label"].to_pylist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = Image.open(io.BytesIO(self.images[row])).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - MEAN) / STD, self.labels[row]


class Script(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, num_blocks: int, batch_size: int, lr: float) -> None:
        super().__init__()
        self.model = CifarResNet(input_shape=(3, 32, 32), num_outputs=10, num_blocks=num_blocks)
        self.batch_size, self.lr, self.notes = batch_size, lr, []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> None:
    channel = Channel(*private_channel())
    spec = channel.question()["spec"]
    torch.set_num_threads(spec["threads"])
    pl.seed_everything(0)
    script = Script(spec["num_blocks"], spec["batch_size"], spec["lr"])
    loader = DataLoader(
        Images(spec["file"]),
        batch_size=spec["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=spec["workers"],
        persistent_workers=spec["workers"] > 0,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=10**6,
        callbacks=[Paced(channel)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(script, loader)


if __name__ == "__main__":
    main()

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, save
from hasten.core.interfaces import Columns, Graph, Input, Signature

LENGTH, WORDS = 8, 20


class Reader(nn.Module):
    """One block of a transformer over token ids of any length, with a mask; three outputs a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.merge = nn.Linear(16, 16)
        self.normalization = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        rows, length, width = hidden.shape
        query, key, value = (
            layer(hidden).view(rows, length, 4, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = (query @ key.transpose(2, 3) / 2).masked_fill(mask[:, None, None, :] == 0, -1e4)
        mixed = torch.softmax(scores, -1) @ value
        hidden = hidden + self.merge(mixed.transpose(1, 2).reshape(rows, length, width))
        hidden = hidden + self.down(nn.functional.gelu(self.up(self.normalization(hidden))))
        weights = mask.unsqueeze(-1).float()
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def texts(number: int, seed: int = 0) -> Columns:
    """Random ids, and masks that leave at least one token."""
    draw = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < draw.integers(1, LENGTH + 1, (number, 1))
    return {"ids": draw.integers(0, WORDS, (number, LENGTH)), "mask": mask.astype(np.int64)}


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The graph of a `Reader`: two integer inputs and a dynamic length."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "module").mkdir()
    inputs = tuple(Input(name=name, shape=(LENGTH,), dtype="int64", dynamic=(0,)) for name in ("ids", "mask"))
    module, arch = build({"_target_": f"{__name__}.Reader"}, inputs, (3,), seed=0)
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", Signature(inputs=inputs, output_shape=(3,)), texts(16), folder)


@pytest.fixture
def many_texts() -> Columns:
    return texts(64, seed=1)

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, save
from hasten.core.interfaces import Columns, Graph, Input, Signature
from hasten.engines import cuda

SHAPE = (3, 8, 8)
LENGTH, WORDS = 10, 30


class Reader(nn.Module):
    """One block of a transformer over token ids of any length, with a mask; two rows of three outputs each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.merge = nn.Linear(16, 16)
        self.normalization = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, mask: Tensor, ids: Tensor) -> Tensor:  # not in the order of the signature
        hidden = self.embedding(ids)
        rows, length, width = hidden.shape
        heads = (
            layer(hidden).view(rows, length, 4, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None, :].bool())
        hidden = hidden + self.merge(mixed.transpose(1, 2).reshape(rows, length, width))
        hidden = hidden + self.down(nn.functional.gelu(self.up(self.normalization(hidden))))
        weights = mask.unsqueeze(-1).float()
        return self.head((hidden * weights).sum(1) / weights.sum(1)).view(rows, 2, 3)


def texts(number: int, length: int = LENGTH, seed: int = 0) -> Columns:
    """Random ids, and masks that leave at least one token."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, length + 1, number)
    return {
        "ids": draw.integers(0, WORDS, (number, length)),
        "mask": (np.arange(length) < lengths[:, None]).astype(np.int64),
    }


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A residual CNN whose batch norms have seen data, as a float graph."""
    folder = tmp_path_factory.mktemp("graph")
    (folder / "module").mkdir()
    signature = Signature(inputs=(Input(shape=SHAPE),), output_shape=(10,))
    arch = {"_target_": "hasten.models.resnet.ResNet", "widths": [8, 16], "num_blocks": 1}
    module, arch = build(arch, signature.inputs, (10,), seed=0)
    rows = np.random.default_rng(0).standard_normal((24, *SHAPE), dtype=np.float32)
    with torch.no_grad():
        module.train()(torch.tensor(rows))
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", signature, {"input": rows}, folder)


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The graph of a `Reader`: two integer inputs, a dynamic length and outputs of two axes."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "module").mkdir()
    inputs = tuple(Input(name=name, shape=(LENGTH,), dtype="int64", dynamic=(0,)) for name in ("ids", "mask"))
    module, arch = build({"_target_": f"{__name__}.Reader"}, inputs, (2, 3), seed=0)
    save(folder / "module", arch, module)
    signature = Signature(inputs=inputs, output_shape=(2, 3))
    return write_graph(module, folder / "module", signature, texts(16), folder)


class Stream:
    """A CUDA stream that has done everything at once, and counts how often it was waited for."""

    cuda_stream = 7
    waits = 0

    def synchronize(self) -> None:
        Stream.waits += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Stream]:
    """This machine's memory in the place of a GPU's, and streams that need no GPU."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "page_locked", cuda.on_device)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Stream, "waits", 0)
    return Stream

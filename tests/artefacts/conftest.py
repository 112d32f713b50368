"""A model of several inputs with an open length, and its graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import save
from hasten.core.interfaces import Columns, Graph, Input, Signature

LENGTH = 6
SIGNATURE = Signature(
    inputs=(
        Input(name="ids", shape=(LENGTH,), dtype="int64", dynamic=(0,)),
        Input(name="mask", shape=(LENGTH,), dtype="int64", dynamic=(0,)),
        Input(name="size", shape=(2,)),
    ),
    output_shape=(3,),
)


class Reader(nn.Module):
    """Mean vector of the known tokens of a text, beside some numbers; its arguments stand in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 4), nn.Linear(6, 3)

    def forward(self, size: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        known = mask.unsqueeze(-1).float()
        mean = (self.words(ids) * known).sum(1) / known.sum(1)
        return self.head(torch.cat([mean, size], 1))


def lines(number: int, length: int = LENGTH) -> Columns:
    generator = torch.Generator().manual_seed(number)
    known = torch.randint(1, length + 1, (number, 1), generator=generator)
    return {
        "ids": torch.randint(20, (number, length), generator=generator).numpy(),
        "mask": (torch.arange(length) < known).long().numpy(),
        "size": torch.randn(number, 2, generator=generator).numpy(),
    }


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Graph, Columns]:
    """The module, its graph, and the rows that the graph's reference holds."""
    torch.manual_seed(0)
    folder, module, rows = tmp_path_factory.mktemp("reader"), Reader().eval(), lines(5)
    (folder / "module").mkdir()
    save(folder / "module", {"_target_": f"{__name__}.Reader"}, module)
    return module, write_graph(module, folder / "module", SIGNATURE, rows, folder), rows

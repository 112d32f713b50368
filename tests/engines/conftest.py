from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.artefacts.capture import write_graph
from hasten.artefacts.module import build, save
from hasten.core.interfaces import Graph, Signature

SHAPE = (3, 8, 8)


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A residual CNN whose batch norms have seen data, as a float graph."""
    folder = tmp_path_factory.mktemp("graph")
    (folder / "module").mkdir()
    arch = {"_target_": "hasten.models.resnet.ResNet", "widths": [8, 16], "num_blocks": 1}
    module, arch = build(arch, SHAPE, 10, seed=0)
    rows = np.random.default_rng(0).standard_normal((24, *SHAPE), dtype=np.float32)
    with torch.no_grad():
        module.train()(torch.tensor(rows))
    save(folder / "module", arch, module)
    return write_graph(module, folder / "module", Signature(input_shape=SHAPE, output_shape=(10,)), rows, folder)

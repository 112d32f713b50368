"""Batch normalization over the rows of several processes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hasten.distributed.batch_norm import SynchronizedBatchNorm


@pytest.fixture
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def synchronized(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    layer.__class__ = SynchronizedBatchNorm  # type: ignore[assignment]
    layer.rows_group = None  # type: ignore[assignment]
    return layer


@pytest.mark.usefixtures("_alone")
def test_counts_rows_that_half_precision_can_not_count() -> None:
    torch.manual_seed(0)
    rows = (3 + torch.randn(257, 4)).bfloat16()  # 257 in bfloat16 is 256
    plain, layer = nn.BatchNorm1d(4), synchronized(nn.BatchNorm1d(4))
    expected = plain(rows.float())
    torch.testing.assert_close(layer(rows), expected.bfloat16(), atol=0, rtol=0.01)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, atol=0, rtol=1e-5)
    torch.testing.assert_close(layer.running_var, plain.running_var, atol=0, rtol=1e-5)


@pytest.mark.usefixtures("_alone")
def test_gradients_are_those_of_the_plain_layer() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 3, 5, dtype=torch.float32)
    ends = []
    for layer in (nn.BatchNorm1d(3), synchronized(nn.BatchNorm1d(3))):
        given = rows.clone().requires_grad_()
        layer(given).square().mul(torch.arange(15.0).view(3, 5)).sum().backward()
        ends.append((given.grad, layer.weight.grad, layer.bias.grad))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

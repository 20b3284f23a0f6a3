"""`engine: torch` averages gradients in buckets, while the backward still runs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gentrain.training import torch_engine
from gentrain.training.engine import EngineMisuse
from gentrain.training.optimizers import SGD
from gentrain.training.torch_engine import TorchEngine
from gentrain.training.world import World
from tests.ranks import run_ranks

WIDTH, LAYERS = 8, 5


class Branching(nn.Module):
    """Layers of which each rank uses others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS))
        self.reentrant = False

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        for index in used:
            layer = self.layers[index]
            x = x + (checkpoint(lambda x, layer=layer: layer(x).tanh(), x, use_reentrant=True) if self.reentrant else layer(x).tanh())
        return x


def _gradients(world: World, bucket: int) -> tuple[list[Tensor], list[Tensor], int, bool]:
    """(what the engine has after two losses, the mean of both ranks' own gradients, number of messages, whether reentrance was refused)."""
    torch_engine._BUCKET = bucket
    torch.manual_seed(0)
    network, own = Branching(), Branching()
    own.load_state_dict(network.state_dict())
    role = TorchEngine().build("model", network, SGD(), world)
    x = torch.randn(4, WIDTH, dtype=torch.float64) + world.rank
    losses = [([0, 1, 2], False), ([4, 1] if world.rank else [2, 3, 0], True)]  # 4 is reached on rank 1 only, 3 on rank 0 only
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(value: Tensor, **options: object) -> object:
        sent.append(value.numel())
        return all_reduce(value, **options)  # type: ignore[arg-type]

    dist.all_reduce = counted  # type: ignore[assignment]
    for used, last in losses:
        role._forwards += 1
        role.backward(network(x, used).square().mean(), last)
        own(x, used).square().mean().backward()
    dist.all_reduce = all_reduce
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in own.parameters()]
    for gradient in mine:
        dist.all_reduce(gradient)
        gradient /= world.size
    role.step(0.0)
    assert all(p.grad is None for p in network.parameters())
    network.reentrant = True
    role._forwards += 1
    try:
        role.backward(network(x.requires_grad_(), [0, 0]).square().mean(), True)
    except EngineMisuse:
        return found, mine, len(sent), True
    return found, mine, len(sent), False


@pytest.mark.parametrize("bucket, messages", [(1, 2 * LAYERS), (2 * 8 * WIDTH * (WIDTH + 1), 3), (2**20, 1)])
def test_buckets_average_whatever_each_rank_reaches(bucket: int, messages: int) -> None:
    for found, mean, sent, _ in run_ranks(2, _gradients, bucket):
        assert sent == messages
        assert len(found) == 2 * LAYERS
        torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-15)


def test_a_gradient_that_arrives_twice_is_refused_instead_of_sent_half_done() -> None:
    assert [refused for *_, refused in run_ranks(2, _gradients, 1)] == [True, True]

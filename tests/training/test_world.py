"""Joining and agreeing."""

from __future__ import annotations

import psutil
import pytest
import torch
import torch.distributed as dist

from gentrain.training.world import RankGroup, World, join, leave
from tests.ranks import run_ranks


def _listening() -> list[int]:
    """Ports of this process; other tests may have left some."""
    return sorted(each.laddr.port for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN)


def test_one_process_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = _listening()
    try:
        world = join()
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert dist.get_world_size() == 1
        assert join() == world  # adopts the group that is there
        assert len(_listening()) == len(before) + 1  # gloo's; no store's
    finally:
        leave()
    assert not dist.is_initialized() and _listening() == before


def test_the_group_of_one_process_is_the_identity_without_gradient() -> None:
    value = torch.ones(2, 3, requires_grad=True)
    for result in (RankGroup(1).mean(value), RankGroup(1).gather(value)):
        assert torch.equal(result, value) and not result.requires_grad
    assert RankGroup(1).any(True) and not RankGroup(1).any(False)


def _agree(world: World) -> tuple[torch.Tensor, torch.Tensor, bool, bool, bool]:
    group = RankGroup(world.size)
    value = torch.tensor([[1.0 + world.rank, 10.0]], requires_grad=True)
    mean, gathered = group.mean(value), group.gather(value.t().contiguous().t())
    assert not mean.requires_grad and not gathered.requires_grad and torch.equal(value, torch.tensor([[1.0 + world.rank, 10.0]]))
    return mean, gathered, group.any(world.rank == 1), group.any(False), world.is_main


@pytest.mark.distributed
def test_two_ranks_agree() -> None:
    results = run_ranks(2, _agree)
    for mean, gathered, one, none, _ in results:
        assert torch.equal(mean, torch.tensor([[1.5, 10.0]]))
        assert torch.equal(gathered, torch.tensor([[1.0, 10.0], [2.0, 10.0]]))
        assert one and not none
    assert [main for *_, main in results] == [True, False]

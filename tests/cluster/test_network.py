"""The network between ranks: slow ones and missing ones are named, before the first step."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from gentrain.cluster import network
from gentrain.cluster.attempts import ATTEMPTS, Started
from gentrain.cluster.network import Network, described, slow_ranks, waits
from gentrain.config import Document
from gentrain.training.logs import LOGS
from gentrain.training.loop import Outcome, train
from gentrain.training.meeting import HOSTS, RanksMissing, meet
from gentrain.training.run import parse_run
from gentrain.training.world import RankGroup, World, join, leave
from tests.ranks import run_ranks

QUICK, SLOW = (0.0002, 0.004), (0.0002, 0.300)


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ([QUICK, QUICK], []),
        ([QUICK, SLOW], [1]),
        ([SLOW, SLOW], []),  # 14 MB/s both: a slow network, not a slow rank
        ([(0.0002, 0.5), (0.0002, 0.5)], [0, 1]),  # slower than any network is meant to be
        ([QUICK, QUICK, SLOW, QUICK], [2]),
        ([(0.0002, 0.0001), (0.0002, 0.039), (0.0002, 0.0001)], []),  # as quick as Gigabit Ethernet, whatever the others are
        ([(0.0002, 0.004), (0.020, 0.004), (0.0002, 0.004)], [1]),  # latency
        ([(0.015, 0.004), (0.020, 0.004), (0.015, 0.004)], []),
        ([QUICK, SLOW, SLOW, QUICK, QUICK, QUICK], [1, 2]),
    ],
)
def test_what_counts_as_slow(seconds: list[tuple[float, float]], expected: list[int]) -> None:
    assert slow_ranks(torch.tensor(seconds)) == expected


def test_a_slow_rank_is_described_by_host_times_and_speed() -> None:
    text = described(torch.tensor([QUICK, SLOW, (0.0002, 0.006)]), ["a", "b", "c"], [1])
    assert text.startswith("rank 1 on b (0.2 ms for 4 bytes, 300.0 ms for 4 MiB: 14 MB/s); the others' median is 4.0 ms. Look at")


def _train_hindered(world: World, directory: str) -> str:
    """The messages of rank 1 leave late, as those of a busy host do."""
    leave()
    world = join(60)  # again, as the next stage of a recipe does
    if world.rank == 1:
        send = dist.isend

        def late(*arguments: Any, **named: Any) -> Any:
            time.sleep(0.4)
            return send(*arguments, **named)

        dist.isend = late
    values = {
        "method": "flow_matching", "data": "rings", "model": {"name": "mlp", "width": 16}, "engine": "torch", "output": directory,
        "training": {"samples": 64, "batch_size": 32, "log_every": 32},
    }  # fmt: skip
    return train(parse_run(Document(values, "test")), world, lambda: False, (Started, Network)).value


@pytest.mark.distributed
def test_a_rank_that_is_late_is_named_before_the_first_step_and_the_run_goes_on(tmp_path: Path) -> None:
    assert run_ranks(2, _train_hindered, str(tmp_path / "run")) == [Outcome.FINISHED.value] * 2
    started, slow = (json.loads(line) for line in (tmp_path / "run" / ATTEMPTS).read_text().splitlines())
    assert (slow["event"], slow["ranks"], slow["hosts"]) == ("slow network", [1], [socket.gethostname()])
    found = re.search(rf"rank 1 on {socket.gethostname()} \((\S+) ms for 4 bytes, (\S+) ms for 4 MiB: \d+ MB/s\)", slow["reason"])
    assert found is not None and all(float(number) > 100 for number in found.groups())
    lines = [json.loads(line) for line in (tmp_path / "run" / LOGS / "rank-0.jsonl").read_text().splitlines()]
    (warning,) = (line for line in lines if line["level"] == "WARNING")
    assert warning["message"] == f"slow network: {slow['reason']}"
    assert (warning["run"], warning["attempt"], warning["rank"]) == ("run", started["attempt"], 0)
    assert not (tmp_path / "run" / LOGS / "rank-1.jsonl").exists()  # had nothing to say


def test_neighbours_are_on_other_nodes_and_the_quicker_of_them_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six ranks on three nodes: each exchanges with those of its place on the nodes before and behind."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    asked: set[tuple[int, int]] = set()

    class Six(RankGroup):
        def __init__(self) -> None:
            self.size, self.rank = 6, 1

        def max(self, value: int) -> int:
            return value

        def gather(self, value: torch.Tensor) -> torch.Tensor:
            rank = torch.arange(6.0)
            return torch.stack([rank, 10 * rank], 1)[:, :, None].expand(6, 2, 2)  # r seconds for r - 2, 10 r for r + 2

    monkeypatch.setattr(network, "_exchange", lambda message, source, target: asked.add((source, target)) or 0.0)
    assert waits(Six())[:, 0].tolist() == [min((rank + 2) % 6, 10 * ((rank - 2) % 6)) for rank in range(6)]
    assert asked == {(5, 3), (3, 5)}


# --- meeting ----------------------------------------------------------------------------------------------------------------


def _port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_alone_a_rank_says_whom_it_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    port = _port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(
        RanksMissing, match=rf"rank 1 on {socket.gethostname()} cannot meet the others at 127\.0\.0\.1:{port} within 0\.5 s"
    ):
        meet(1, 2, 0.5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RanksMissing, match=r"3 of 4 ranks .*: rank 1 \(node 0\), rank 2 \(node 1\), rank 3 \(node 1\); here are rank 0 on"):
        meet(0, 4, 0.5)
    listening = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == int(port)] == ["127.0.0.1"]


def _wait(rank: int, environment: dict[str, str], said: Any) -> None:
    os.environ |= environment | {"RANK": str(rank)}
    try:
        join(start_limit_s=4.0)
    except RanksMissing as error:
        said.put((rank, str(error)))


@pytest.mark.distributed
def test_a_missing_rank_is_named_by_those_that_are_there() -> None:
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    environment = {
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(),
        "LOCAL_WORLD_SIZE": "1",
        HOSTS: "anna,berta,cäsar",
    }
    processes = [context.Process(target=_wait, args=(rank, environment, said)) for rank in (0, 1)]
    for process in processes:
        process.start()
    messages = dict(said.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    host = socket.gethostname()
    expected = f"1 of 3 ranks have not come within 4 s (cluster.network.start_limit_s): rank 2 (cäsar); here are rank 0 on {host}"
    assert messages[0].startswith(expected), messages
    assert messages[1].startswith(expected) or "its message names them" in messages[1] or "cannot meet" in messages[1], messages

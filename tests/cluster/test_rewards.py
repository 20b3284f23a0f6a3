"""The fleet of rewards: nothing is lost and nothing scored twice when an actor dies, or is too slow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gentrain.cluster import session
from gentrain.cluster.rewards import RewardFailed, RewardFleet
from gentrain.config import ConfigError, Document, build, load_plugins
from gentrain.data.digits import MNIST5k
from gentrain.rewards.base import Reward
from gentrain.rewards.networks import ClassifierProbability
from gentrain.training.callbacks import MetricsFile
from gentrain.training.loop import Outcome, train
from gentrain.training.run import save_config
from gentrain.training.world import World
from tests.distributed.cases import difference, records, run_of, state_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PLUGIN = str(Path(__file__).with_name("plugin_rewards.py"))


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session.session():
        session.start()
        yield


def fleet(directory: Path, trouble: dict[str, int], **settings: Any) -> RewardFleet:
    load_plugins(Document({"plugins": [PLUGIN]}, "test"))
    reward = build(Reward, Document({"name": "test_troubled", "directory": str(directory), **trouble}, "test"))
    return RewardFleet(reward, MNIST5k(), plugins=[PLUGIN], **{"actors": 2, "batch": 4, **settings})


def numbered(first: int, count: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Images, what was asked for, and the scores that they should have."""
    numbers = torch.arange(first, first + count)
    images = (numbers / 255 * 2 - 1).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    label = numbers % 10
    return images, {"label": label, "x": images}, 2.0 * numbers + label


def scored(directory: Path) -> list[int]:
    return sorted(int(line) for file in directory.glob("*.log") for line in file.read_text().split())


def test_a_killed_and_a_slow_actor_lose_nothing_and_score_nothing_twice(tmp_path: Path) -> None:
    with fleet(tmp_path, {"dies_at": 9, "hangs_at": 30}, timeout_s=4.0) as members:
        parts = [numbered(first, count) for first, count in ((0, 14), (14, 8), (22, 18))]
        tickets = {members.submit(images, asked): expected for images, asked, expected in parts}
        found = dict(members.results())
        assert found.keys() == tickets.keys()
        for ticket, expected in tickets.items():
            assert torch.equal(found[ticket], expected)
        images, asked, expected = numbered(40, 6)
        assert torch.equal(members(images, asked), expected)
        assert list(members.results()) == []
    assert (tmp_path / "died").exists() and (tmp_path / "hung").exists()
    assert scored(tmp_path) == list(range(46))


def test_results_stream_back_and_bytes_are_capped(tmp_path: Path) -> None:
    row = 28 * 28 * 4
    with fleet(tmp_path, {}, max_bytes=8 * row) as members:
        with pytest.raises(ConfigError, match="bytes of images at once, the fleet takes"):
            members.submit(*numbered(0, 9)[:2])
        for first in range(0, 32, 8):
            images, asked, _ = numbered(first, 8)
            members.submit(images, asked)
            assert members._bytes() <= 8 * row
        found = dict(members.results())
    for ticket, scores in found.items():
        assert torch.equal(scores, numbered(8 * ticket, 8)[2])
    assert len(found) == 4


def test_a_reward_that_always_fails_is_given_up_with_its_words(tmp_path: Path) -> None:
    with fleet(tmp_path, {"fails_at": 3}, actors=1, retries=1) as members:
        members.submit(*numbered(0, 8)[:2])
        with pytest.raises(RewardFailed, match="4 images could not be scored in 2 attempts: this image is cursed"):
            list(members.results())


def test_a_reward_that_reads_a_role_is_refused() -> None:
    with pytest.raises(ConfigError, match="reward: classifier reads networks of the method"):
        RewardFleet(ClassifierProbability(), MNIST5k())


def test_a_run_learns_from_a_fleet_what_it_learns_without_though_an_actor_dies(tmp_path: Path) -> None:
    load_plugins(Document({"plugins": [PLUGIN]}, "test"))
    common: dict[str, Any] = {
        "data": "digits", "path": "variance_preserving", "prediction": "eps", "engine": "torch",
        "model": {"name": "unet", "channels": [8, 16], "attention": [], "norm_groups": 4},
        "training": {"samples": 32, "batch_size": 16, "log_every": 16, "preview_every": 0},
    }  # fmt: skip

    def learn(name: str, method: dict[str, Any], **more: Any) -> Path:
        run = run_of({**common, "method": method, "output": str(tmp_path / name), **more})
        save_config(run)
        assert train(run, World(0, 1, torch.device("cpu")), lambda: False, [MetricsFile]) is Outcome.FINISHED
        return tmp_path / name

    roles = {"model": {"weights": str(learn("begin", {"name": "diffusion"}))}}
    found = []
    for name in ("alone", "fleet"):
        (tmp_path / f"notes_{name}").mkdir()
        reward: dict[str, Any] = {"name": "test_troubled", "directory": str(tmp_path / f"notes_{name}"), "dies_first": name == "fleet"}
        if name == "fleet":
            reward = {"name": "fleet", "reward": reward, "batch": 4}
        found.append(learn(name, {"name": "ddpo", "reward": reward, "sampler": {"name": "ddim", "steps": 2, "eta": 1}}, roles=roles))
    alone, fleet = found
    assert (tmp_path / "notes_fleet" / "died").exists() and len(scored(tmp_path / "notes_fleet")) == 32
    assert scored(tmp_path / "notes_fleet") == scored(tmp_path / "notes_alone")
    assert records(alone) == records(fleet) and difference(state_of(alone), state_of(fleet)) == 0


def test_a_fleet_of_a_reward_that_reads_a_role_is_refused() -> None:
    with pytest.raises(ConfigError, match="reward: classifier reads the network 'judge' of the method"):
        build(Reward, Document({"name": "fleet", "reward": "classifier"}, "test"))

"""What somebody who watches a run under Ray sees: who did not come, why it was started again, numbers for Prometheus, lines of logs."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gentrain.cluster import session
from gentrain.cluster.attempts import ATTEMPTS
from gentrain.cluster.launch import launch
from gentrain.cluster.stopping import STOP_FILE
from gentrain.config import Document
from gentrain.training.logs import LOGS
from gentrain.training.loop import Outcome
from gentrain.training.run import RunConfig, parse_run
from tests.cluster.test_rewards import fleet, numbered
from tests.slurm import until

pytestmark = [pytest.mark.gate, pytest.mark.cluster, pytest.mark.timeout(400)]

PLUGIN = Path(__file__).parents[1] / "cluster" / "plugin_late.py"
EXPECTED = {"samples", "samples_per_second", "step_seconds_count", "loader_wait_seconds_count", "failures_total"}
Series = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(scope="module", autouse=True)
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    marker = tmp_path_factory.mktemp("late") / "marker"
    with pytest.MonkeyPatch.context() as patch, session.session():
        patch.setenv("RAY_metrics_report_interval_ms", "500")  # 10 s by default
        patch.setenv("LATE_MARKER", str(marker))
        session.start()
        yield


def _scrape() -> Series:
    """Name without Ray's prefix -> its series, of all of ours that the nodes serve. Nothing but loopback is asked."""
    import ray

    found: Series = {}
    for node in ray.nodes():
        assert node["NodeManagerAddress"] == "127.0.0.1"
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
            text = page.read().decode()
        for name, tags, value in re.findall(r"^ray_gentrain_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)))
    return found


def _watch(run: RunConfig, seen: Series) -> None:
    """Stops the run when it has seen all, or after long enough."""

    def all_is_served() -> bool:
        seen.update(_scrape())
        return set(seen) >= EXPECTED and len(seen["step_seconds_count"]) == 2

    with suppress(AssertionError):
        until(all_is_served, 200, "all is served")
    (run.directory / STOP_FILE).touch()


def test_a_late_rank_is_named_the_run_starts_again_and_its_numbers_can_be_scraped(tmp_path: Path) -> None:
    values = {
        "method": {"name": "slow_flow", "sleep_s": 0.2}, "data": "rings", "model": {"name": "mlp", "width": 16}, "engine": "torch",
        "training": {"samples": 1_000_000, "batch_size": 32, "log_every": 32}, "plugins": [str(PLUGIN)],
        "output": str(tmp_path / "watched"),
        "cluster": {"place": "ray", "workers": 2, "backoff_s": 0.1, "network": {"start_limit_s": 3.0}},
    }  # fmt: skip
    run = parse_run(Document(values, "test"))
    seen: Series = {}
    watcher = threading.Thread(target=_watch, args=(run, seen))
    watcher.start()
    outcome = launch(run)
    watcher.join()
    assert outcome is Outcome.STOPPED
    failed, started, stopped = (json.loads(line) for line in (run.directory / ATTEMPTS).read_text().splitlines())
    assert (failed["event"], started["event"], stopped["event"]) == ("failed", "started", "stopped")
    assert f"1 of 2 ranks have not come within 3 s (cluster.network.start_limit_s): rank 1 ({socket.gethostname()})" in failed["reason"]
    assert set(seen) >= EXPECTED
    for name in ("samples", "samples_per_second", "step_seconds_count", "loader_wait_seconds_count"):
        for tags, value in seen[name]:
            assert (tags["run"], tags["attempt"]) == ("watched", started["attempt"]) and value > 0
    assert sorted(tags["rank"] for tags, _ in seen["step_seconds_count"]) == ["0", "1"]
    assert [tags["rank"] for tags, _ in seen["samples"]] == ["0"]
    assert seen["samples"][0][1] % 32 == 0
    steps, seconds = (seen[f"step_seconds_{part}"][0][1] for part in ("count", "sum"))
    assert seconds >= 0.2 * steps
    assert [(tags["run"], value) for tags, value in seen["failures_total"]] == [("watched", 1.0)]
    (line,) = [json.loads(line) for line in (run.directory / LOGS / "rank-0.jsonl").read_text().splitlines() if "network" in line]
    assert line["message"].startswith("network: 2 ranks sum 4 MiB in ")
    assert {key: line[key] for key in ("level", "run", "attempt", "rank")} == {
        "level": "INFO", "run": "watched", "attempt": started["attempt"], "rank": 0,
    }  # fmt: skip


def test_the_queue_and_the_latency_of_rewards_can_be_scraped(tmp_path: Path) -> None:
    with fleet(tmp_path, {}, actors=1) as members:
        members.submit(*numbered(0, 10)[:2])  # three batches, of which none is taken before the actor is there
        until(lambda: "reward_queue" in _scrape(), 60, "the queue is served")
        ((tags, waiting),) = _scrape()["reward_queue"]
        assert (tags["role"], waiting) == ("test_troubled", 3.0)
        list(members.results())
        until(lambda: _scrape().get("reward_seconds_count"), 60, "the latency is served")
        until(lambda: _scrape()["reward_queue"][0][1] == 0.0, 60, "the queue is empty")
    ((tags, count),) = _scrape()["reward_seconds_count"]
    assert (tags["role"], count) == ("test_troubled", 3.0)  # batches

"""A job of Ray Jobs whose workers are Ray Train's, on two nodes that this machine poses as."""

from __future__ import annotations

import json
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import gentrain
from gentrain.training.run import METRICS
from tests.cluster.test_jobs import Head, Shell, cluster, config, shell  # noqa: F401  # the last one is a fixture

pytestmark = [pytest.mark.gate, pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One core on each node, so that two workers are on two nodes."""
    with cluster(tmp_path_factory.mktemp("jobs"), cpus=1, further_nodes=1) as started:
        deadline = time.monotonic() + 60
        while (cores := _cores(started)) != [1.0, 1.0]:
            assert time.monotonic() < deadline, cores
            time.sleep(0.2)
        yield started


def _cores(head: Head) -> list[float]:
    """Of each node that is alive."""
    token = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/v0/nodes?detail=1", headers=token), timeout=60) as answer:
        nodes = json.load(answer)["data"]["result"]["result"]
    return [node["resources_total"].get("CPU", 0.0) for node in nodes if node["state"] == "ALIVE"]


def _wheel(folder: Path) -> Path:
    """Of this gentrain, which tells in a file which processes import it."""
    wheel, root = folder / "gentrain-0-py3-none-any.whl", Path(gentrain.__file__).parent
    tell = f"\nimport os\nwith open({str(folder / 'imported')!r}, 'a') as _file:\n    print(os.getpid(), file=_file)\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".html"):
                text = path.read_text() + (tell if path == root / "__init__.py" else "")
                archive.writestr(path.relative_to(root.parent).as_posix(), text)
        archive.writestr("gentrain-0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: gentrain\nVersion: {version('gentrain')}\n")
    return wheel


def test_workers_of_ray_train_live_in_the_cluster_of_the_job(head: Head, shell: Shell) -> None:  # noqa: F811
    """Same losses as in one process of this machine: one configuration, two places. What runs there is the wheel that was sent."""
    workers = ["cluster.place=ray", "cluster.workers=2", "cluster.network.interface=lo", "training.samples=800", "method.step_s=0"]
    status, printed = shell("submit", str(config(head)), "output=runs/there", f"cluster.submit.wheel={_wheel(head.folder)}", *workers)
    assert status == 0, printed
    status, printed = shell("logs", "there", "-f")
    assert "trained: " in printed and "succeeded" in shell("status", "there")[1], printed
    status, printed = shell("train", str(config(head)), "output=runs/here", *workers[3:])
    assert status == 0, printed
    there, here = (
        [json.loads(line) for line in (head.folder / "runs" / name / METRICS).read_text().splitlines()] for name in ("there", "here")
    )
    assert [line["loss/model"] for line in there] == pytest.approx([line["loss/model"] for line in here], rel=1e-5)
    (started, *_) = map(json.loads, (head.folder / "runs/there/attempts.jsonl").read_text().splitlines())
    assert started["ranks"] == 2
    assert len(set((head.folder / "imported").read_text().split())) >= 3  # the command and two workers

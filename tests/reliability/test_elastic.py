"""What a configuration says about a number of workers that may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gentrain.config import ConfigError
from gentrain.training.run import RunConfig, open_run, save_config
from tests.distributed.cases import run_of, values


def _run(output: Path, workers: Any, batch_size: int = 12, place: str = "ray") -> RunConfig:
    return run_of(values(output, batch_size=batch_size, micro_batches=2) | {"cluster": {"place": place, "workers": workers}})


@pytest.mark.parametrize("batch_size, remedy", [(12, 12), (30, 24), (5, 12)])
def test_a_batch_must_suit_every_size_of_the_range(batch_size: int, remedy: int) -> None:
    """Of 1, 2 and 3 workers with 2 micro-batches each: multiples of 12."""
    if batch_size == remedy:
        assert _run(Path("unused"), [1, 3], batch_size).cluster.most == 3
        return
    with pytest.raises(ConfigError, match=rf"training\.batch_size: .*each size from 1 to 3 workers x 2 micro-batches; {remedy} can"):
        _run(Path("unused"), [1, 3], batch_size)


@pytest.mark.parametrize("workers", [[3, 1], [0, 2], [1, 2, 3], [1], "two", True])
def test_what_is_no_range_is_refused_with_its_key(workers: Any) -> None:
    either = r"expected a whole number > 0 or \[a whole number > 0, a whole number > 0\]|it reads \[fewest, most\]"
    with pytest.raises(ConfigError, match=rf"cluster\.workers: ({either})"):
        _run(Path("unused"), workers)


def test_a_range_needs_ray() -> None:
    with pytest.raises(ConfigError, match="workers are Ray's"):
        _run(Path("unused"), [1, 2], place="inline")


def test_a_range_is_saved_with_the_run(tmp_path: Path) -> None:
    run = _run(tmp_path, [1, 3])
    save_config(run)
    assert open_run(tmp_path) == run and (run.cluster.fewest, run.cluster.most) == (1, 3)
    assert (_run(tmp_path, 2).cluster.fewest, _run(tmp_path, 2).cluster.most) == (2, 2)

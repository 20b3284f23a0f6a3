"""Checkpoints in a bucket, served on this machine: a run publishes there, goes on from there and is read from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.loop import train
from gentrain.training.roles import load_weights
from gentrain.training.run import CHECKPOINTS, RunConfig, refuse_other_settings, save_config
from gentrain.training.storage import ObjectStorage
from gentrain.training.world import World
from tests.distributed.cases import Job, run_of, state_of, train_all, values
from tests.reliability.buckets import served

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with served("bucket") as url:
        yield url


def _settings(output: Path, url: str | None, **training: Any) -> dict[str, Any]:
    where = {} if url is None else {"checkpoints": url}
    return values(output, "flow_matching", checkpoint_every=24, **where, **training)


def _newest(run: RunConfig) -> tuple[ObjectStorage, str]:
    storage = run.storage
    assert isinstance(storage, ObjectStorage)
    name = storage.latest()
    assert name is not None
    return storage, name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_goes_on_from_a_bucket_as_from_a_directory(tmp_path: Path, bucket: str, asynchronous: bool) -> None:
    train_all(ALONE, [Job(_settings(tmp_path / "local", None))])
    settings = _settings(tmp_path / "remote", f"{bucket}/{asynchronous}", async_checkpoints=asynchronous)
    run = run_of(settings)
    save_config(run)
    assert train_all(ALONE, [Job(settings, stop_at=3), Job(settings)]) == [("stopped", ""), ("finished", "")]
    storage, name = _newest(run)
    assert storage.names() == [f"{48:012d}", f"{72:012d}"] and name == f"{72:012d}"
    expected = state_of(tmp_path / "local")
    with storage.open(name) as checkpoint:
        checkpoint.verify()
        for stem in ("model.weights", "model.ema", "model.optimizer"):
            for key, value in checkpoint.shards(stem).whole().items():
                assert torch.equal(value, expected[f"{stem}/{key}"])
    weights = load_weights(str(tmp_path / "remote"))
    assert all(torch.equal(value, expected[f"model.ema/{key}"]) for key, value in weights.items())
    assert not (tmp_path / "remote" / CHECKPOINTS).exists() and not list((tmp_path / "remote").glob(".transfer-*"))


def test_other_settings_are_refused_by_what_the_bucket_holds(tmp_path: Path, bucket: str) -> None:
    settings = _settings(tmp_path, f"{bucket}/other")
    save_config(run_of(settings))
    train_all(ALONE, [Job(settings)])
    with pytest.raises(ConfigError, match="another optimizer"):
        refuse_other_settings(run_of(settings | {"optimizer": {"name": "sgd", "lr": 0.1}}))


def test_damage_in_a_bucket_is_named_before_anything_is_read(tmp_path: Path, bucket: str) -> None:
    settings = _settings(tmp_path, f"{bucket}/damaged")
    train_all(ALONE, [Job(settings, stop_at=2)])
    storage, name = _newest(run_of(settings))
    storage._fs.pipe_file(f"{storage._root}/{name}/model.ema.00000.safetensors", b"x")
    with pytest.raises(CheckpointError, match=rf"{bucket}/damaged/{name}/model\.ema\.00000\.safetensors differs"):
        train(run_of(settings), ALONE, lambda: False, [])


def test_an_upload_that_fails_is_told_and_the_former_checkpoint_stays(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(tmp_path, f"{bucket}/failing")
    train_all(ALONE, [Job(settings, stop_at=2)])
    put = ObjectStorage.put

    def no_bucket(self: ObjectStorage, name: str, file: str, write: Any) -> str:
        self._root = "no-such-bucket/run"
        return put(self, name, file, write)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "put", no_bucket)
        with pytest.raises(OSError, match=rf"no checkpoint could be written under {bucket}/failing: .*bucket does not exist"):
            train(run_of(settings), ALONE, lambda: False, [])
    storage, name = _newest(run_of(settings))
    assert storage.names() == [name] == [f"{24:012d}"]
    assert train_all(ALONE, [Job(settings)]) == [("finished", "")]


def test_no_credentials_are_told(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(OSError, match=r"no checkpoint can be read from s3://bucket/secret: .*credentials"):
            train(run_of(_settings(tmp_path, f"{bucket}/secret")), ALONE, lambda: False, [])
    finally:
        S3FileSystem.clear_instance_cache()

"""Checkpoints in a bucket, served on this machine: a run publishes there, goes on from there and is read from there."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gentrain.config import ConfigError
from gentrain.training.beginning import refuse_wrong_start
from gentrain.training.checkpoint import CheckpointError
from gentrain.training.loop import train
from gentrain.training.object_storage import ObjectStorage, open_storage
from gentrain.training.remedies import StoreError, has_secret, store_error, without_secrets
from gentrain.training.roles import load_weights
from gentrain.training.run import CHECKPOINTS, RunConfig, save_config
from gentrain.training.world import World
from tests.distributed.cases import Job, run_of, state_of, train_all, values
from tests.reliability.buckets import served
from tests.reliability.publishing import publish

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
        refuse_wrong_start(run_of(settings | {"optimizer": {"name": "sgd", "lr": 0.1}}), ())


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


@contextmanager
def _other_environment(**variables: str | None) -> Iterator[None]:
    """AWS_ variables, None to unset; S3's library is made to read them anew."""
    from s3fs import S3FileSystem

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, value in variables.items():
            environment.delenv(f"AWS_{name}") if value is None else environment.setenv(f"AWS_{name}", value)
        S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            S3FileSystem.clear_instance_cache()


NO_KEYS = {"ACCESS_KEY_ID": None, "SECRET_ACCESS_KEY": None}
CLOSED = {"ENDPOINT_URL": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    "variables, place, says",
    [
        (NO_KEYS, "s3://bucket/secret", "no usable credentials: export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (CLOSED, "s3://bucket/far", "it is out of reach: mend the network or the endpoint (AWS_ENDPOINT_URL)"),
        ({}, "s3://no-such-bucket/run", "there is no such bucket: create it, or correct the URL"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_told_with_the_remedy(
    tmp_path: Path, bucket: str, variables: dict[str, str | None], place: str, says: str
) -> None:
    run = run_of(_settings(tmp_path, place))
    save_config(run)
    told = f"training.checkpoints: {place} cannot be used: {says}"
    with _other_environment(**variables):
        with pytest.raises(OSError, match=re.escape(f"no checkpoint can be written under {place}: {told}")):
            train(run, ALONE, lambda: False, [])
        storage = run.storage
        storage.latest = lambda: f"{24:012d}"  # type: ignore[method-assign]
        calls: list[Callable[[], object]] = [lambda: storage.put("1", "x", lambda path: path.touch()), lambda: storage.publish("1", "{}")]
        if variables:  # of a bucket that is not there, a reader says that it holds nothing
            reading: list[Callable[[], object]] = [lambda: refuse_wrong_start(run, ()), lambda: load_weights(str(tmp_path)), storage.names]
            calls += reading if variables == NO_KEYS else reading[2:]
        for call in calls:
            with pytest.raises(StoreError, match=re.escape(told)):
                call()


@pytest.mark.parametrize("call", ["get_file", "cat_file", "find", "put_file", "pipe_file", "rm_file", "rm"])
def test_whatever_call_is_denied_it_is_told_with_the_remedy(tmp_path: Path, call: str) -> None:
    storage = ObjectStorage(f"memory://{uuid.uuid4()}/run", tmp_path)
    name = publish(storage, 24, {})

    class Denied:
        def __init__(self, fs: Any):
            self._fs = fs

        def __getattr__(self, name: str) -> Any:
            def refuse(*_: Any, **__: Any) -> None:
                raise PermissionError("Access Denied for https://me:canary-1@store/run?X-Amz-Signature=canary-2&part=1")

            return refuse if name == call else getattr(self._fs, name)

    storage._fs = Denied(storage._fs)

    def everything() -> None:
        with storage.open(storage.latest() or "") as checkpoint:
            checkpoint.verify()
        publish(storage, 48, {})
        storage.delete(name)

    with pytest.raises(StoreError, match=r"^training\.checkpoints: memory://\S+ cannot be used: access is denied: give") as error:
        everything()
    assert "canary" not in str(error.value) and "https://me:***@store/run?X-Amz-Signature=***&part=1" in str(error.value)


def test_a_clock_that_is_wrong_is_told_as_such() -> None:
    """S3 denies what is signed at another time than its own by more than a quarter of an hour, and its library says no more than that."""
    error = PermissionError("The difference between the request time and the current time is too large.")
    said = str(store_error("s3://bucket/run", error))
    assert said.startswith("training.checkpoints: s3://bucket/run cannot be used: the clock of this machine is wrong: set it, such as with")


def test_an_error_of_the_store_is_no_damage(tmp_path: Path) -> None:
    """A checkpoint that cannot be fetched must not be given up for another one."""
    storage = ObjectStorage(f"memory://{uuid.uuid4()}/run", tmp_path)
    name = publish(storage, 24, {})

    def refuse(*_: Any) -> None:
        raise TimeoutError("timed out")

    storage._fs = SimpleNamespace(get_file=refuse, find=storage._fs.find)
    with pytest.raises(StoreError, match="out of reach"), storage.open(name):
        pass


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:canary/of+slashes@bucket/run",
        "sftp://me:canary@host:22/run",
        "ftp://me:pass@canary@host/run",
        "ftp://me@home:canary@host/run",
        "abfs://box@account.dfs.core.windows.net/run?sig=canary&sv=1",
        "https://store/run?part=1&X-Amz-Security-Token=canary",
        "simplecache::s3://key:canary@bucket/run",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_shown(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.checkpoints: .*holds a secret.*give it in the environment") as error:
        run_of(_settings(tmp_path, url))
    assert "canary" not in str(error.value) and "***" in str(error.value)


def test_a_secret_in_a_place_that_a_run_names_as_its_former_one_is_not_shown(tmp_path: Path) -> None:
    assert open_storage("memory://me:canary@bucket/run?token=canary", tmp_path).where == "memory://me:***@bucket/run?token=***"


@pytest.mark.parametrize(
    "url", ["s3://bucket/run", "sftp://me@host:22/run", "abfs://box@account.dfs.core.windows.net/a", "hdfs://h:9000/a@b"]
)
def test_a_url_without_a_secret_is_kept(url: str) -> None:
    assert not has_secret(url) and without_secrets(f"at {url}, there") == f"at {url}, there"

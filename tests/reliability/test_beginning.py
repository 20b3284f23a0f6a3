"""A run never begins anew without a word, and never publishes where another run does; what is in its way is said before it starts."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from gentrain.config import ConfigError
from gentrain.training import storage as storages
from gentrain.training.beginning import IDENTITY, claim, refuse_wrong_start
from gentrain.training.callbacks import MetricsFile
from gentrain.training.checkpoint import CheckpointError, Piece
from gentrain.training.loop import Trainer, train
from gentrain.training.object_storage import open_storage
from gentrain.training.run import CHECKPOINTS, CONFIG, METRICS, save_config
from gentrain.training.storage import LATEST, OWNER, LocalStorage
from gentrain.training.world import World
from tests.distributed.cases import Job, difference, records, run_of, state_of, train_all, values
from tests.reliability.kills import die
from tests.reliability.publishing import publish

ALONE = World(0, 1, torch.device("cpu"))
SHARDS = {"model.weights": [{"a": Piece(torch.ones(3), 0, (3,))}]}


def _settings(output: Path, checkpoints: str | Path | None = None, **training: Any) -> dict[str, Any]:
    where = {} if checkpoints is None else {"checkpoints": str(checkpoints)}
    return values(output, "flow_matching", checkpoint_every=24, **where, **training)


def _train(settings: dict[str, Any], stop_at: int | None = None) -> tuple[str, str]:
    save_config(run_of(settings))
    return train_all(ALONE, [Job(settings, stop_at)])[0]


def _refused(settings: dict[str, Any]) -> ConfigError:
    """What the command says before it starts anything, and what the ranks say if they are started all the same."""
    with pytest.raises(ConfigError) as before:
        refuse_wrong_start(run_of(settings), ["attempts.jsonl"])
    return before.value


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- LATEST ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, "memory://latest-removed/run"])
def test_without_latest_beside_several_checkpoints_a_run_does_not_begin_anew(tmp_path: Path, where: str | None) -> None:
    settings = _settings(tmp_path / "run", where)
    assert _train(settings, stop_at=4) == ("stopped", "")
    storage = run_of(settings).storage
    assert len(storage.names()) == 2
    if isinstance(storage, LocalStorage):
        (storage.root / LATEST).unlink()
    else:
        storage._fs.rm_file(f"{storage._root}/{LATEST}")  # type: ignore[attr-defined]
    said = str(_refused(settings))
    assert f"{storage.where}/{LATEST} is missing" in said and f"the newest, {48:012d}" in said and "another output" in said
    kind, said = train_all(ALONE, [Job(settings)])[0]
    assert kind == "CheckpointError" and f"{LATEST} is missing" in said
    storage._write(LATEST, f"{48:012d}")
    assert _train(settings) == ("finished", "")
    assert [record["samples"] for record in records(tmp_path / "run")] == [12, 24, 36, 48, 60, 72]


def _train_and_die_before_latest(output: Path) -> None:
    sync = storages._sync

    def last(path: Path) -> None:
        sync(path)
        if path.name == CHECKPOINTS and (path / f"{24:012d}").exists():
            die()

    storages._sync = last
    _train(_settings(output))


def test_a_kill_between_the_first_checkpoint_and_latest_is_gone_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed = multiprocessing.get_context("spawn").Process(target=_train_and_die_before_latest, args=(tmp_path / "run",))
    killed.start()  # not a fork: autograd's threads, which earlier tests have started, would be missing in it
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run" / CHECKPOINTS / LATEST).exists()
    settings = _settings(tmp_path / "run")
    refuse_wrong_start(run_of(settings), [])
    assert run_of(settings).storage.latest() == f"{24:012d}"
    assert _train(settings) == ("finished", "")
    assert f"{24:012d} is the only checkpoint there, and is taken" in caplog.text
    _train(_settings(tmp_path / "whole"))
    assert difference(state_of(tmp_path / "run"), state_of(tmp_path / "whole")) == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_checkpoints_that_are_gone_are_missed(tmp_path: Path) -> None:
    """As when the file system that they are on is not mounted."""
    settings = _settings(tmp_path / "run", tmp_path / "disk")
    assert _train(settings, stop_at=2) == ("stopped", "")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (tmp_path / "disk").mkdir()
    assert "disk holds none of the checkpoints that this run has published; restore them" in str(_refused(settings))
    assert train_all(ALONE, [Job(settings)])[0][0] == "CheckpointError"
    (tmp_path / "disk").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    assert _train(settings) == ("finished", "")


# --- the place ---------------------------------------------------------------------------------------------------------------


def test_another_place_without_the_checkpoints_of_the_run_is_refused_and_one_with_them_is_not(tmp_path: Path) -> None:
    assert _train(_settings(tmp_path / "run"), stop_at=3) == ("stopped", "")
    moved = _settings(tmp_path / "run", tmp_path / "elsewhere")
    error = _refused(moved)
    assert error.key == "training.checkpoints"
    assert f"the checkpoints of this run are in {tmp_path}/run/checkpoints" in error.message
    assert "set it back, or copy them there" in error.message
    assert train_all(ALONE, [Job(moved)])[0][0] == "CheckpointError"
    assert not (tmp_path / "elsewhere").exists()
    shutil.copytree(tmp_path / "run" / CHECKPOINTS, tmp_path / "elsewhere")
    refuse_wrong_start(run_of(moved), [])
    assert _train(moved) == ("finished", "")
    assert json.loads((tmp_path / "run" / IDENTITY).read_text())["checkpoints"] == str(tmp_path / "elsewhere")
    assert [record["samples"] for record in records(tmp_path / "run")] == [12, 24, 36, 48, 60, 72]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_place_with_older_checkpoints_of_the_run_is_refused_until_the_newest_is_there(tmp_path: Path, reachable: bool) -> None:
    """A copy is gone on from elsewhere, and then the place is left out: the run would go back to where it was copied."""
    home, big = tmp_path / "run" / CHECKPOINTS, tmp_path / "big"
    assert _train(_settings(tmp_path / "run"), stop_at=3) == ("stopped", "")
    shutil.copytree(home, big)
    assert _train(_settings(tmp_path / "run", big)) == ("finished", "")
    identity = (tmp_path / "run" / IDENTITY).read_text()
    assert json.loads(identity) | {"run": ""} == {"run": "", "checkpoints": str(big), "published": 72}
    if not reachable:
        big.rename(tmp_path / "unmounted")
    back = _settings(tmp_path / "run")
    error = _refused(back)
    assert error.key == "training.checkpoints"
    assert f"are in {big}, up to 72 samples, and {home} holds none beyond 36; set it back, or copy them there" in error.message
    metrics = records(tmp_path / "run")
    assert train_all(ALONE, [Job(back)])[0][0] == "CheckpointError"
    assert (tmp_path / "run" / IDENTITY).read_text() == identity and records(tmp_path / "run") == metrics and len(metrics) == 6
    shutil.rmtree(home)
    shutil.copytree(big if reachable else tmp_path / "unmounted", home)
    refuse_wrong_start(run_of(back), [])
    assert _train(back) == ("finished", "")
    assert json.loads((tmp_path / "run" / IDENTITY).read_text()) | {"run": ""} == {"run": "", "checkpoints": "", "published": 72}


def test_a_checkpoint_that_a_kill_kept_out_of_the_identity_counts(tmp_path: Path) -> None:
    home, big = tmp_path / "run" / CHECKPOINTS, tmp_path / "big"
    assert _train(_settings(tmp_path / "run"), stop_at=3) == ("stopped", "")
    shutil.copytree(home, big)
    identity = (tmp_path / "run" / IDENTITY).read_text()
    assert _train(_settings(tmp_path / "run")) == ("finished", "")
    (tmp_path / "run" / IDENTITY).write_text(identity)  # as it was when 48 samples were published
    assert f"up to 72 samples, and {big} holds none beyond 36" in str(_refused(_settings(tmp_path / "run", big)))


def test_the_same_place_by_another_name_and_an_older_one_that_latest_names_are_gone_on_from(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "run")
    assert _train(settings) == ("finished", "")
    run_of(settings).storage._write(LATEST, f"{48:012d}")  # our own remedy for a damaged one
    refuse_wrong_start(run_of(settings), [])
    refuse_wrong_start(run_of(_settings(tmp_path / "run", tmp_path / "run" / CHECKPOINTS)), [])


def test_a_run_that_has_published_nothing_may_choose_another_place(tmp_path: Path) -> None:
    claim(run_of(_settings(tmp_path)), run_of(_settings(tmp_path)).storage)
    refuse_wrong_start(run_of(_settings(tmp_path, tmp_path / "elsewhere")), [])


def test_a_run_that_was_moved_goes_on(tmp_path: Path) -> None:
    assert _train(_settings(tmp_path / "here"), stop_at=3) == ("stopped", "")
    (tmp_path / "here").rename(tmp_path / "there")
    refuse_wrong_start(run_of(_settings(tmp_path / "there")), [])
    assert _train(_settings(tmp_path / "there")) == ("finished", "")


def test_a_run_whose_directory_did_not_outlive_its_node_goes_on_from_its_place(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "run", tmp_path / "place")
    assert _train(settings, stop_at=3) == ("stopped", "")
    identity = json.loads((tmp_path / "run" / IDENTITY).read_text())
    shutil.rmtree(tmp_path / "run")
    refuse_wrong_start(run_of(settings), [])
    (tmp_path / "run").mkdir()
    claim(run_of(settings), run_of(settings).storage)
    assert json.loads((tmp_path / "run" / IDENTITY).read_text()) == identity  # where its checkpoints are included
    assert _train(settings) == ("finished", "")
    assert json.loads((tmp_path / "run" / IDENTITY).read_text()) == identity | {"published": 72}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_the_place_of_another_run_is_refused_and_stays_as_it_is(tmp_path: Path, memory: bool, started: bool) -> None:
    place = f"memory://shared-{started}/place" if memory else str(tmp_path / "place")
    assert _train(_settings(tmp_path / "first", place), stop_at=3) == ("stopped", "")
    second = _settings(tmp_path / "second", place)
    if started:  # it has an identity already
        (tmp_path / "second").mkdir()
        claim(run_of(_settings(tmp_path / "second")), run_of(_settings(tmp_path / "second")).storage)
    before = _files(tmp_path / "place")
    error = _refused(second)
    assert error.key == "training.checkpoints" and f"another run, that of {tmp_path}/first" in error.message
    assert f"remove {run_of(second).storage.where}/{OWNER} if that run is given up" in error.message
    kind, said = train_all(ALONE, [Job(second)])[0]
    assert kind == "CheckpointError" and f"another run, that of {tmp_path}/first" in said
    assert _files(tmp_path / "place") == before
    assert _train(_settings(tmp_path / "first", place)) == ("finished", "")


def test_the_directory_of_another_run_is_refused_as_a_place(tmp_path: Path) -> None:
    assert _train(_settings(tmp_path / "first"), stop_at=3) == ("stopped", "")
    assert "another run, that of" in str(_refused(_settings(tmp_path / "second", tmp_path / "first" / CHECKPOINTS)))


@pytest.mark.parametrize("file", ["0/img.png", "notes.txt", "202401011200/img.png"])
@pytest.mark.parametrize("memory", [False, True])
def test_a_place_with_something_else_in_it_is_refused_and_stays_as_it_is(tmp_path: Path, memory: bool, file: str) -> None:
    place = f"memory://{uuid.uuid4()}/digits" if memory else str(tmp_path / "digits")
    storage = open_storage(place, tmp_path)
    files = fsspec.filesystem("memory") if memory else fsspec.filesystem("file", auto_mkdir=True)
    files.pipe(f"{place}/.keep", b"")  # which is nobody's
    assert storage.owner() == {}
    files.pipe(f"{place}/{file}", b"mine")
    settings = _settings(tmp_path / "run", place)
    error = _refused(settings)
    assert error.key == "training.checkpoints"
    assert f"{storage.where} holds {file.partition('/')[0]!r}, which no run has written there; name a place of its own" in error.message
    save_config(run_of(settings))
    kind, said = train_all(ALONE, [Job(settings)])[0]
    assert kind == "CheckpointError" and "which no run has written there" in said
    assert not (tmp_path / "run" / IDENTITY).exists()
    assert sorted(Path(path).name for path in files.find(place)) == sorted([".keep", Path(file).name])


@pytest.mark.parametrize("memory", [False, True])
def test_two_runs_that_claim_a_place_at_once_are_told_apart(tmp_path: Path, memory: bool) -> None:
    place = "memory://at-once/place" if memory else str(tmp_path / "place")
    first, second = open_storage(place, tmp_path), open_storage(place, tmp_path)
    write = first._write

    def late(name: str, text: str) -> None:
        second.claim("b", "/runs/b")
        write(name, text)  # over it: both found nothing

    first._write = late  # type: ignore[method-assign]
    first.claim("a", "/runs/a")
    first._write = write  # type: ignore[method-assign]
    publish(first, 1, SHARDS)
    with pytest.raises(CheckpointError, match=r"training\.checkpoints: .*was taken by the run or a later attempt in /runs/a on \S+; stop"):
        publish(second, 2, SHARDS)
    with pytest.raises(CheckpointError, match="was taken by"):
        second.discard("000000000001")
    assert first.names() == ["000000000001"] and first.latest() == "000000000001"
    late_too = open_storage(f"{place}-2", tmp_path)
    write = late_too._write
    late_too._write = lambda name, text: write(name, '{"run": "b", "output": "/runs/b"}')  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"was taken by the run or a later attempt in /runs/b"):
        late_too.claim("a", "/runs/a")  # which was written over before it could be read back


@pytest.mark.parametrize("memory", [False, True])
def test_an_attempt_that_another_one_has_followed_publishes_nothing_more(tmp_path: Path, memory: bool) -> None:
    """As of a copy of the run's directory with the same training.checkpoints, or on a node that was cut off."""
    place = "memory://followed/place" if memory else str(tmp_path / "place")
    older, newer = open_storage(place, tmp_path), open_storage(place, tmp_path)
    older.claim("a", "/runs/a")
    publish(older, 1, SHARDS)
    newer.claim("a", "/runs/a")
    older.prepare("000000000002")
    older.put("000000000002", "x", lambda path: path.write_text("x"))
    newer.sweep()  # a newer attempt begins
    with pytest.raises(CheckpointError, match="a later attempt"):
        older.publish("000000000002", "{}")
    publish(newer, 2, SHARDS)
    with pytest.raises(CheckpointError, match="a later attempt"):
        older.discard("000000000002")
    with pytest.raises(CheckpointError, match="a later attempt"):
        older.point("000000000001")
    assert newer.names() == ["000000000001", "000000000002"] and newer.latest() == "000000000002"


@pytest.mark.parametrize("memory", [False, True])
def test_two_machines_with_one_place_are_told_of_each_other(
    tmp_path: Path, memory: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under the same path of `output` they are one run to it, as a pod that was lost and the one that takes its place."""
    place = "memory://machines/place" if memory else str(tmp_path / "place")
    machines = []
    caplog.set_level(logging.INFO, "gentrain")
    for host in ("one", "two"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        machines.append(open_storage(place, tmp_path))
        machines[-1].claim("a", "/runs/a")
        publish(machines[-1], len(machines), SHARDS)
    assert caplog.messages == [f"{machines[0].where}: the last attempt ran on one; if it still does, it is refused at its next checkpoint"]
    monkeypatch.setattr("socket.gethostname", lambda: "one")
    with pytest.raises(CheckpointError, match=r"was taken by the run or a later attempt in /runs/a on two; stop one of them"):
        publish(machines[0], 3, SHARDS)
    assert machines[1].names() == [f"{1:012d}", f"{2:012d}"]
    caplog.clear()
    monkeypatch.setattr("socket.gethostname", lambda: "two")
    open_storage(place, tmp_path).claim("a", "/runs/a")
    assert not caplog.messages


@pytest.mark.parametrize("text", ["", "[]", '{"run": 3}', "{", '{"run": "a"}', '{"run": "a", "published": "x"}', "[" * 9_000])
def test_an_identity_or_an_owner_that_is_damaged_is_said_with_the_remedy(tmp_path: Path, text: str) -> None:
    settings = _settings(tmp_path)
    claim(run_of(settings), run_of(settings).storage)
    if text != '{"run": "a"}':
        kept = (tmp_path / IDENTITY).read_text()
        (tmp_path / IDENTITY).write_text(text)
        assert f"{tmp_path}/{IDENTITY} is damaged" in str(_refused(settings))
        (tmp_path / IDENTITY).write_text(kept)
    (tmp_path / CHECKPOINTS / OWNER).write_text(text)
    assert f"{OWNER} is damaged" in str(_refused(settings)) and "remove it" in str(_refused(settings))


# --- the settings ------------------------------------------------------------------------------------------------------------


def test_settings_that_change_weights_are_compared_with_those_in_the_checkpoint(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    assert _train(settings, stop_at=3) == ("stopped", "")
    (tmp_path / CONFIG).unlink()
    other = settings | {"optimizer": {"name": "sgd", "lr": 0.1}}
    assert "another optimizer.beta1" in str(_refused(other)) and "output" in str(_refused(other))
    longer = settings | {"training": settings["training"] | {"samples": 144, "log_every": 24, "keep_last": 1}}
    refuse_wrong_start(run_of(longer), [])


def test_our_own_remedies_are_taken_by_the_same_run(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    assert _train(settings, stop_at=3) == ("stopped", "")
    mended = settings | {
        "optimizer": settings["optimizer"] | {"lr": 0.001},
        "schedule": "constant",
        "engine": {"name": "torch", "gradient_clipping": 0.1},
        "sampler": {"name": "euler", "steps": 3},
        "training": settings["training"] | {"micro_batches": 1, "max_skipped": 99, "max_corrupt": 99},
    }
    changed = refuse_wrong_start(run_of(mended), [])
    assert changed.samples == 36
    assert changed.settings["optimizer.lr"] == (0.01, 0.001) and changed.settings["training.micro_batches"] == (2, 1)
    assert changed.settings["engine.gradient_clipping"] == (0.5, 0.1) and changed.settings["schedule.name"] == ("cosine", "constant")
    assert not any("max_" in key for key in changed.settings)
    assert _train(mended) == ("finished", "")
    assert refuse_wrong_start(run_of(mended), []).settings == {}  # the checkpoint records the new ones
    for other in ({"seed": 6}, {"optimizer": settings["optimizer"] | {"beta1": 0.5}}, {"model": "mlp"}):
        assert "holds a run with another" in str(_refused(mended | other))


def test_what_one_role_does_otherwise_from_now_on_is_compared_with_what_it_did(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    assert _train(settings, stop_at=3) == ("stopped", "")
    own = settings | {"roles": {"model": {"optimizer": settings["optimizer"] | {"lr": 0.001}}}}
    assert refuse_wrong_start(run_of(own), []).settings == {"roles.model.optimizer.lr": (0.01, 0.001)}


def test_so_is_an_optimiser_whose_numbers_are_for_another_batch(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    settings["training"] |= {"reference_batch_size": 6}
    assert _train(settings, stop_at=3) == ("stopped", "")
    own = settings | {"roles": {"model": {"optimizer": settings["optimizer"] | {"lr": 0.001}}}}
    assert refuse_wrong_start(run_of(own), []).settings == {"roles.model.optimizer.lr": (0.01, 0.001)}


def test_a_directory_that_shows_samples_and_has_neither_identity_nor_checkpoints_is_refused(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "run", tmp_path / "place")
    assert _train(settings, stop_at=3) == ("stopped", "")
    (tmp_path / "run" / IDENTITY).unlink()
    refuse_wrong_start(run_of(settings), [])  # the place says who it is
    metrics = records(tmp_path / "run")
    error = _refused(_settings(tmp_path / "run"))
    assert f"has seen 36 samples by its {METRICS}" in error.message and "name their place with training.checkpoints" in error.message
    assert train_all(ALONE, [Job(_settings(tmp_path / "run"))])[0][0] == "CheckpointError" and records(tmp_path / "run") == metrics


@pytest.mark.parametrize("samples", ["NaN", "1e999", "[]", "null", '"many"', "9" * 400])
def test_metrics_that_tell_no_number_of_samples_are_damaged_lines(tmp_path: Path, samples: str) -> None:
    (tmp_path / METRICS).write_text(f'{{"samples": {samples}}}\n{{"samples": 36}}\n')
    assert "has seen 36 samples by its" in _refused(_settings(tmp_path)).message


def test_an_identity_that_is_removed_while_a_run_trains_is_given_again(tmp_path: Path) -> None:
    class Removed(MetricsFile):
        def after_step(self, trainer: Trainer) -> None:
            (tmp_path / IDENTITY).unlink(missing_ok=True)

    settings = _settings(tmp_path)
    train(run_of(settings), ALONE, lambda: False, [Removed])
    assert not (tmp_path / IDENTITY).exists()
    assert _train(settings) == ("finished", "")
    owner = json.loads((tmp_path / CHECKPOINTS / OWNER).read_text())
    assert json.loads((tmp_path / IDENTITY).read_text()) == {"run": owner["run"], "checkpoints": "", "published": 72}


@pytest.mark.parametrize("saved", [3, [], "x"])
def test_settings_that_no_run_can_have_written_are_damage(tmp_path: Path, saved: object) -> None:
    publish(run_of(_settings(tmp_path)).storage, 24, SHARDS, settings=saved)
    assert "state.json is damaged (settings: " in str(_refused(_settings(tmp_path)))


def test_a_checkpoint_of_before_is_compared_with_the_configuration_beside_it(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    save_config(run_of(settings))
    publish(run_of(settings).storage, 24, SHARDS)
    refuse_wrong_start(run_of(settings), [])
    assert "another seed" in str(_refused(settings | {"seed": 6}))


# --- what is in the way ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, make, kind",
    [
        (METRICS, Path.mkdir, "file"),
        (METRICS, os.mkfifo, "file"),
        ("attempts.jsonl", Path.mkdir, "file"),
        (CONFIG, Path.mkdir, "file"),
        ("tensorboard", Path.touch, "directory"),
        ("samples", Path.touch, "directory"),
        (CHECKPOINTS, Path.touch, "directory"),
        (f"{CHECKPOINTS}/{LATEST}", Path.mkdir, "file"),
    ],
)
def test_what_is_in_the_way_is_said_before_anything_starts(tmp_path: Path, name: str, make: Callable[[Path], object], kind: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    error = _refused(_settings(tmp_path))
    assert error.key == "output" and f"{tmp_path}/{name} is in the way, where a {kind} has to be written; move it away" in error.message


def test_a_directory_in_place_of_latest_is_said_to_readers_too(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS / LATEST).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"{LATEST} cannot be read \(Is a directory\): a directory is in the way: move it away"):
        run_of(_settings(tmp_path)).storage.latest()


def test_a_file_in_place_of_a_directory_of_checkpoints_is_said_by_that_key(tmp_path: Path) -> None:
    (tmp_path / "place").touch()
    assert _refused(_settings(tmp_path / "run", tmp_path / "place")).key == "training.checkpoints"


@pytest.mark.parametrize("output", ["s3://bucket/run", "file:///scratch/run", "gs://u:{}@b/run"])
def test_a_url_is_no_output(output: str) -> None:
    with pytest.raises(ConfigError, match=r"test: output: .*is a URL, and this has to be a directory; .*training\.checkpoints") as error:
        run_of(values(Path("unused")) | {"output": output.format("canary")})
    assert "canary" not in str(error.value)


# --- metrics -----------------------------------------------------------------------------------------------------------------


def test_a_line_that_a_kill_cut_is_told_and_no_whole_one_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = _settings(tmp_path)
    assert _train(settings, stop_at=4) == ("stopped", "")
    metrics = tmp_path / METRICS
    whole = metrics.read_text()
    metrics.write_text(whole + '{"samples": 60, "lo')

    def killed(path: Path) -> None:
        if path.name == f".{METRICS}.tmp":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storages, "_sync", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run_of(settings), ALONE, lambda: False, [MetricsFile])
    assert metrics.read_text().startswith(whole)  # while it is written anew, the former is there
    caplog.clear()
    assert _train(settings) == ("finished", "")
    assert f"{metrics}: 1 damaged lines dropped" in caplog.text
    assert metrics.read_text().startswith(whole) and len(records(tmp_path)) == 6
    caplog.clear()
    before = metrics.stat()
    assert _train(settings) == ("finished", "")
    assert not caplog.text and (metrics.stat().st_ino, metrics.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

"""Checkpoints of others: each is refused by name, at little cost, and nothing is changed, run or lost."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gentrain.config import Document
from gentrain.training.checkpoint import MANIFEST, STATE, CheckpointError, manifest
from gentrain.training.loop import train
from gentrain.training.run import RunConfig, parse_run, save_config
from gentrain.training.world import World
from tests.reliability.hostile import Bomb, contained, safetensors

WEIGHTS, EMA, OPTIMIZER = (f"model.{kind}.00000.safetensors" for kind in ("weights", "ema", "optimizer"))
WORLD = World(0, 1, torch.device("cpu"))
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def _run(directory: Path, samples: int) -> RunConfig:
    values = {
        "method": "flow_matching", "data": "rings", "model": {"name": "mlp", "width": 8, "depth": 1}, "engine": "torch",
        "training": {"samples": samples, "batch_size": 16}, "output": str(directory),
    }  # fmt: skip
    return parse_run(Document(values, "test"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    run = _run(directory, 32)
    save_config(run)
    train(run, WORLD, lambda: False)
    return directory


def _resume(directory: Path) -> None:
    train(_run(directory, 64), WORLD, lambda: False)


def _honest(checkpoint: Path, **more: str) -> None:
    """Writes the manifest that belongs to what is there: whoever can write files can hash them."""
    files = [path for path in checkpoint.iterdir() if path.name != MANIFEST and path.is_file()]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / MANIFEST).write_text(manifest(hashes | more))


def _flip(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        data = bytearray((checkpoint / name).read_bytes())
        data[-5] ^= 1
        (checkpoint / name).write_bytes(data)

    return change


def _replace(name: str, data: bytes | str, honest: bool = False) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(data.encode() if isinstance(data, str) else data)
        if honest:
            _honest(checkpoint)

    return change


def _weights(data: bytes) -> Callable[[Path], None]:
    return _replace(WEIGHTS, data, honest=True)


def _state(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        state = json.loads((checkpoint / STATE).read_text())
        change(state)
        (checkpoint / STATE).write_text(json.dumps(state))
        _honest(checkpoint)

    return apply


def _swap(checkpoint: Path) -> None:
    first, second = checkpoint / WEIGHTS, checkpoint / EMA
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes() + b" ")
    second.write_bytes(contents)


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        moved = checkpoint.parent.parent / "moved"
        (checkpoint / name).rename(moved)
        make(checkpoint / name)

    return change


def _pointer(data: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint.parent / "LATEST").write_bytes(data) and None


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def _in_place_of_latest(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint.parent / "LATEST").unlink()
        make(checkpoint.parent / "LATEST")

    return change


def _layout(change: Callable[..., list[float]]) -> Callable[[Path], None]:
    """Changes what the header of the weights says of each tensor."""

    def apply(checkpoint: Path) -> None:
        with safe_open(checkpoint / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layout = {name: change(*told) for name, told in json.loads(file.metadata()["layout"]).items()}
        save_file(tensors, checkpoint / WEIGHTS, metadata={"layout": json.dumps(layout)})
        _honest(checkpoint)

    return apply


def _other_role(checkpoint: Path) -> None:
    for path in list(checkpoint.glob("model.*")):
        path.rename(path.with_name(path.name.replace("model.", "critic.")))
    _honest(checkpoint)


def _other_network(checkpoint: Path) -> None:
    tensors = {"x": torch.zeros(4)}
    save_file(tensors, checkpoint / WEIGHTS, metadata={"layout": json.dumps({"x": [0, 4]})})
    _honest(checkpoint)


def _elsewhere(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.parent.parent / "elsewhere")
    checkpoint.symlink_to(checkpoint.parent.parent / "elsewhere")


NO_FILE = f"{WEIGHTS} is no file of a checkpoint"
CHECKPOINTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("flipped byte in weights", _flip(WEIGHTS), f"{WEIGHTS} differs from its hash"),
    ("flipped byte in the average", _flip(EMA), f"{EMA} differs from its hash"),
    ("flipped byte in the optimizer", _flip(OPTIMIZER), f"{OPTIMIZER} differs from its hash"),
    ("flipped byte in the state", _flip(STATE), f"{STATE} differs from its hash"),
    ("cut short", lambda c: os.truncate(c / WEIGHTS, 100), f"{WEIGHTS} differs from its hash"),
    ("emptied", lambda c: os.truncate(c / WEIGHTS, 0), f"{WEIGHTS} differs from its hash"),
    ("swapped files", _swap, f"{WEIGHTS} differs from its hash"),
    ("missing weights", lambda c: (c / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    ("missing state", lambda c: (c / STATE).unlink(), f"{STATE} is missing"),
    ("state that no manifest names", lambda c: (c / STATE).unlink() or _honest(c), f"{STATE} is missing"),  # type: ignore[func-returns-value]
    ("missing manifest", lambda c: (c / MANIFEST).unlink(), f"it has no {MANIFEST}"),
    ("file too many", _replace("extra.safetensors", b""), "extra.safetensors is not in the manifest; remove it"),
    ("pickle too many", _replace("extra.pkl", pickle.dumps(Bomb("touch pwned"))), "extra.pkl is not in the manifest; remove it"),
    ("manifest is no JSON", _replace(MANIFEST, "{"), f"{MANIFEST} is damaged"),
    ("manifest is a list", _replace(MANIFEST, "[1]"), f"{MANIFEST} is damaged"),
    ("manifest without hashes", _replace(MANIFEST, '{"format": 2}'), f"{MANIFEST} is damaged"),
    ("manifest that is deep", _replace(MANIFEST, "[" * 100_000), f"{MANIFEST} is damaged"),
    ("manifest in bytes", _replace(MANIFEST, bytes(range(256))), f"{MANIFEST} is damaged"),
    ("manifest of the future", _replace(MANIFEST, '{"format": 99, "sha256": {}}'), "has format 99"),
    ("manifest that climbs", lambda c: _honest(c, **{"../../config.yaml": "0"}), "../../config.yaml is missing"),
    ("manifest of the whole disk", lambda c: _honest(c, **{"/etc/passwd": "0"}), "/etc/passwd is missing"),
    ("link in place of weights", _instead(WEIGHTS, lambda p: p.symlink_to(p.parent.parent.parent / "moved")), f"{WEIGHTS} is a link"),
    ("pipe in place of weights", _instead(WEIGHTS, os.mkfifo), f"{WEIGHTS} is a link, or no file"),
    ("folder in place of weights", _instead(WEIGHTS, os.mkdir), f"{WEIGHTS} differs from its hash"),
    ("link in place of the checkpoint", _elsewhere, "is a link"),
    ("others may write the checkpoint", lambda c: c.chmod(0o777), "may be written by other users; if you trust what is there: chmod"),
    ("others may write the weights", lambda c: (c / WEIGHTS).chmod(0o666), f"{WEIGHTS} may be written by other users"),
    ("LATEST is nonsense", _pointer(b"nonsense"), "LATEST names 'nonsense', which is not there; write one of these into it: 000000000032"),
    ("LATEST is empty", _pointer(b""), "LATEST names ''"),
    ("LATEST climbs", _pointer(b"../.."), "LATEST names '../..', which is not there"),
    ("LATEST names the disk", _pointer(b"/etc"), "LATEST names '/etc', which is not there"),
    ("LATEST in bytes", _pointer(bytes(range(128, 256))), "LATEST"),
    ("LATEST is long", _pointer(b"1" * 10**6), "LATEST"),
    ("LATEST of a terabyte", _in_place_of_latest(lambda path: _sparse(path)), "LATEST names "),
    ("LATEST is a pipe", _in_place_of_latest(os.mkfifo), "LATEST names ''"),
    ("LATEST is a device", _in_place_of_latest(lambda path: path.symlink_to("/dev/zero")), "LATEST names "),
    ("manifest of a terabyte", _instead(MANIFEST, lambda path: _sparse(path)), f"{MANIFEST} is damaged"),
    # whoever can write a checkpoint can hash it, too
    ("pickle in place of weights", _weights(pickle.dumps(Bomb("touch pwned"))), NO_FILE),
    ("header of 2^62 bytes", _weights(safetensors({}, length=2**62)), NO_FILE),
    ("header of 90 MB", _weights(safetensors(b" " * 10, length=90_000_000)), NO_FILE),
    ("header that is deep", _weights(safetensors(b"[" * 90_000)), NO_FILE),
    ("tensor of 2^60 numbers", _weights(safetensors({"x": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}})), NO_FILE),
    ("tensors that overlap", _weights(safetensors({"a": ONE, "b": ONE}, bytes(8))), NO_FILE),
    ("layout in fractions", _layout(lambda start, *shape: [float(start), *shape]), NO_FILE),
    ("layout of fractional sides", _layout(lambda start, *shape: [start, *map(float, shape)]), NO_FILE),
    ("layout of negative sides", _layout(lambda start, *shape: [start, *(-side for side in shape)]), NO_FILE),
    ("no layout", _weights(safetensors({"x": ONE}, bytes(4))), NO_FILE),
    ("other network", _other_network, "this network is not the one that was saved"),
    ("other role", _other_role, "has no model.weights.00000.safetensors"),
    ("other method", _state(lambda s: s.update(method="diffusion")), "was written by method 'diffusion'"),
    ("state is a number", _replace(STATE, "3", honest=True), f"{STATE} is damaged"),
    ("state is a list", _replace(STATE, "[]", honest=True), f"{STATE} is damaged"),
    ("state without samples", _state(lambda s: s.pop("samples")), f"{STATE} is damaged"),
    ("state of no method", _state(lambda s: s.pop("method")), f"{STATE} is damaged"),
    ("state of negative samples", _state(lambda s: s.update(samples=-16)), f"{STATE} is damaged"),
    ("state of unsound seconds", _state(lambda s: s.update(seconds=float("nan"))), f"{STATE} is damaged (seconds: nan"),
    ("state of seconds of 400 digits", _state(lambda s: s.update(seconds=10**400)), f"{STATE} is damaged (seconds: 1000"),
    ("state of steps that are text", _state(lambda s: s.update(skipped={"model": "x"})), f"{STATE} is damaged (skipped"),
    ("state of spikes that are a list", _state(lambda s: s.update(spikes=[])), f"{STATE} is damaged (spikes"),
    ("state of text samples", _state(lambda s: s.update(samples="many")), f"{STATE} is damaged"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", [row[1:] for row in CHECKPOINTS], ids=[row[0] for row in CHECKPOINTS])
def test_a_hostile_checkpoint_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], message: str
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(trained, directory)
    change(directory / "checkpoints" / "000000000032")
    monkeypatch.chdir(tmp_path)
    with contained(tmp_path), pytest.raises(CheckpointError) as caught:
        _resume(directory)
    assert message in str(caught.value) and len(str(caught.value)) < 1000
    assert str(directory) in str(caught.value), "the file is named"


def test_the_checkpoint_that_is_made_hostile_is_good(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    _honest(tmp_path / "run" / "checkpoints" / "000000000032")
    _resume(tmp_path / "run")

"""The stage `average`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.methods.base import Trained
from gentrain.recipes.base import Stage
from gentrain.training.averages import LONGEST, coefficients
from gentrain.training.checkpoint import Piece, manifest, shard_file, write_shard
from gentrain.training.run import CHECKPOINTS, RunConfig, open_run, save_config
from gentrain.training.storage import LocalStorage

log = logging.getLogger(__name__)

AVERAGE = "average.json"
_TOO_FAR = 0.1  # of the profile's norm; EDM2's own snapshots come within some per cent


@register("average")
@dataclass
class Average(Stage):
    """Makes a run whose generator has an average of another length, chosen after training (arXiv:2312.02696), for later stages.

    It is put together from the averages of `training.power_ema` in all checkpoints that the run has kept: the more there are
    (`training.keep_every`), the nearer it comes; average.json says how near.
    """

    run: str = option(help="the run, trained with training.power_ema")
    length: Annotated[float, Field(gt=0, le=LONGEST)] = option(
        help="sigma_rel: standard deviation of its profile, as a share of the training"
    )

    def execute(self, directory: Path) -> None:
        run = open_run(self.run)
        lengths, role = run.training.power_ema, run.method.generator
        if not lengths:
            raise ConfigError(f"{self.run} was not trained with training.power_ema, so that there is nothing to put together", key="run")
        trained = run.method.roles[role] if role is not None else None
        if role is None or not isinstance(trained, Trained) or not trained.ema:
            raise ConfigError(f"{run.method.registered_name} keeps no average of a generator", key="run")
        names = run.storage.names()
        if not names:
            raise ConfigError(f"{self.run} has no checkpoint yet; train it first", key="run")
        stored = [(int(name), each) for name in names for each in range(len(lengths)) if int(name)]
        factors, missing = coefficients([t for t, _ in stored], [lengths[each] for _, each in stored], int(names[-1]), self.length)
        if missing > _TOO_FAR:
            log.warning("only within %.0f %% of the average asked for; keep more checkpoints (training.keep_every)", 100 * missing)
        weights: dict[str, Tensor] = {}
        for (samples, each), factor in zip(stored, factors.tolist(), strict=True):
            with run.storage.open(f"{samples:012d}") as checkpoint:
                for name, value in checkpoint.shards(f"{role}.power{each}").whole().items():
                    weights[name] = weights.get(name, torch.zeros((), dtype=torch.float64)) + factor * value.double()
        make_run(run, names[-1], role, weights, directory)
        told = {"run": self.run, "length": self.length, "checkpoints": names, "missing": missing, "factors": factors.tolist()}
        (directory / AVERAGE).write_text(json.dumps(told, indent=1))


def make_run(run: RunConfig, name: str, role: str, weights: dict[str, Tensor], directory: Path) -> None:
    """A run of the checkpoint `name` with another average, without what only training needs."""
    copies = LocalStorage(directory / CHECKPOINTS)
    copies.prepare(name)
    hashes = {}
    with run.storage.open(name) as opened:
        buffers = {key: value for key, value in opened.shards(f"{role}.ema").whole().items() if key not in weights}
        shard = {key: Piece(value.float().reshape(-1), 0, tuple(value.shape)) for key, value in (weights | buffers).items()}
        file = shard_file(f"{role}.ema", 0)
        hashes[file] = copies.put(name, file, lambda path: write_shard(path, shard))
        kept = [each for each in opened.hashes if not each.startswith((f"{role}.ema.", f"{role}.power"))]
        for each in kept:
            hashes[each] = copies.put(name, each, lambda path, each=each: path.write_bytes(opened.file(each).read_bytes()))  # type: ignore[misc]
        copies.publish(name, manifest(hashes))
    run.output, run.training.checkpoints = str(directory), None
    save_config(run)

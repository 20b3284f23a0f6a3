"""A training run: the configuration that describes it and the directory that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from gentrain.config import ConfigError, Document, build, load, load_plugins, option, to_dict, to_yaml
from gentrain.data.base import Data
from gentrain.methods.base import Method, Trained
from gentrain.models.base import Model
from gentrain.models.denoiser import Prediction
from gentrain.paths.base import Path
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.samplers.base import Sampler
from gentrain.samplers.euler import Euler
from gentrain.training import checkpoint as checkpoints
from gentrain.training.engine import Engine
from gentrain.training.optimizers import AdamW, Constant, Optimizer, Schedule
from gentrain.training.zero import DeepSpeedEngine

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"


@dataclass
class Training:
    """How long, in what portions, and what is written on the way. Everything is counted in samples."""

    samples: PositiveInt = option(help="samples to see; rounded up to whole batches", unit="samples")
    batch_size: PositiveInt = option(64, "per optimiser step, over all workers and micro-batches", unit="samples")
    micro_batches: PositiveInt = option(1, "portions in which each worker computes its share of a batch (gradient accumulation)")
    log_every: PositiveInt = option(1_280, "between lines of metrics.jsonl", unit="samples")
    checkpoint_every: PositiveInt = option(64_000, "between checkpoints; one is always written at the end", unit="samples")
    keep_last: PositiveInt = option(2, "checkpoints kept")
    preview_every: NonNegativeInt = option(0, "between sample grids; 0 = none", unit="samples")
    preview_count: PositiveInt = option(40, "images in a sample grid")
    ema_half_life: PositiveInt = option(32_000, "of the average of the weights", unit="samples", source="EDM (Karras et al. 2022), F.2")
    ema_warmup: NonNegativeFloat = option(
        0.05, "the half-life is at most this share of the samples seen", source="EDM code release, ema_rampup_ratio"
    )
    max_skipped: NonNegativeInt = option(10, "optimiser steps of a role in a row that may be skipped for a gradient that is not finite")
    max_corrupt: NonNegativeInt = option(10, "data items that may be unreadable")
    data_workers: NonNegativeInt = option(0, "processes per rank that read data sets which are not held in memory")


@dataclass
class Cluster:
    """Where the run's processes live."""

    place: Literal["inline", "ray"] = option("inline", "inline: this process (or one rank of torchrun); ray: workers under Ray Train")
    workers: PositiveInt = option(1, "training workers (ray)")
    cpus_per_worker: PositiveInt = option(1, "cores and threads of a worker (ray)")
    gpus_per_worker: NonNegativeFloat = option(0.0, "accelerators of a worker (ray)")
    max_failures: NonNegativeInt = option(3, "worker or node deaths after which the run goes on from its last checkpoint (ray)")


@dataclass
class RoleSettings:
    """What one role does otherwise than the run as a whole; what is left out is the run's."""

    weights: str | None = option(None, "run directory whose weights it starts from (the average where there is one)")
    model: Model | None = option(None, "network")
    optimizer: Optimizer | None = option(None, "optimiser")
    schedule: Schedule | None = option(None, "learning-rate schedule")
    engine: Engine | None = option(None, "engine")
    placement: Literal["plain", "sharded", "offloaded"] = option(
        "plain", "of a frozen role's weights: on every rank, shared out over the ranks (ZeRO-3), or on the host until they are used"
    )


@dataclass
class RunConfig:
    """One training run."""

    method: Method = option(help="the algorithm")
    data: Data = option(help="the data set")
    model: Model = option(help="the network of every role that does not name its own")
    training: Training = option(help="length and portions")
    path: Path = option(RectifiedFlow, "probability path")
    prediction: Prediction = option("velocity", "what the network predicts")
    sampler: Sampler = option(Euler, "for sample grids, and the default of `sample`, `evaluate` and `export`")
    optimizer: Optimizer = option(AdamW, "optimiser")
    schedule: Schedule = option(Constant, "learning-rate schedule")
    engine: Engine = option(DeepSpeedEngine, "what holds the networks that learn")
    roles: dict[str, RoleSettings] = option(dict, "what single roles do otherwise")
    cluster: Cluster = option(Cluster, "where processes live")
    seed: NonNegativeInt = option(0, "of weights, data order and noise")
    plugins: list[str] = option(list, "the user's own modules: .py files or importable names")
    output: str = option("runs/run", "the run's directory")

    def __post_init__(self) -> None:
        unknown = set(self.roles) - set(self.method.roles)
        if unknown:
            known = ", ".join(self.method.roles)
            raise ConfigError(
                f"{self.method.registered_name} has no role {min(unknown)!r}; its roles: {known}", key=f"roles.{min(unknown)}"
            )
        for name, settings in self.roles.items():
            if settings.placement != "plain" and isinstance(self.method.roles[name], Trained):
                raise ConfigError(
                    f"role {name!r} learns, so its engine places it; set roles.{name}.engine.zero_stage", key=f"roles.{name}.placement"
                )
        if self.cluster.place == "inline" and self.cluster.workers > 1:
            raise ConfigError("workers are Ray's: set cluster.place=ray, or start ranks with torchrun", key="cluster.workers")
        portions = self.cluster.workers * self.training.micro_batches
        if self.training.batch_size % portions:
            remedy = self.training.batch_size - self.training.batch_size % portions or portions
            raise ConfigError(
                f"{self.training.batch_size} samples cannot be shared by {self.cluster.workers} workers x {self.training.micro_batches} "
                f"micro-batches; {remedy} can",
                key="training.batch_size",
            )
        for name, role in self.method.roles.items():
            if isinstance(role, Trained):
                optimizer, engine = self.optimizer_of(name), self.engine_of(name)
                if optimizer.needs not in engine.shows:
                    raise ConfigError(
                        f"{optimizer.registered_name} needs {optimizer.needs} access to the parameters of role {name!r}, which this engine "
                        "does not give; set engine.zero_stage to 0, engine to torch, or take an elementwise optimiser (adamw, sgd)",
                        key="optimizer",
                    )

    def role_settings(self, role: str) -> RoleSettings:
        return self.roles.get(role) or RoleSettings()

    def model_of(self, role: str) -> Model:
        return self.role_settings(role).model or self.model

    def optimizer_of(self, role: str) -> Optimizer:
        return self.role_settings(role).optimizer or self.optimizer

    def schedule_of(self, role: str) -> Schedule:
        return self.role_settings(role).schedule or self.schedule

    def engine_of(self, role: str) -> Engine:
        return self.role_settings(role).engine or self.engine

    @property
    def directory(self) -> FilePath:
        return FilePath(self.output)


def parse_run(document: Document) -> RunConfig:
    """The run that a document describes, its plugins loaded. Raises ConfigError."""
    load_plugins(document)
    return build(RunConfig, document)


def load_run(path: str | FilePath, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads the configuration of a run; its directory is runs/<file name> unless it says otherwise. Raises ConfigError."""
    return parse_run(load(path, overrides, {"output": f"runs/{FilePath(path).stem}"}))


def open_run(directory: str | FilePath, key: str = "") -> RunConfig:
    """The configuration saved with a run. Raises ConfigError, about `key`, when the directory is not one."""
    directory = FilePath(directory)
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory} is not a run's directory: it has no {CONFIG}; train a run, or correct the path", key=key)
    run = load_run(directory / CONFIG)
    run.output = str(directory)  # wherever it has been moved to since
    return run


def weight_settings(run: RunConfig) -> dict[str, Any]:
    """What a run's weights depend on: not where it runs and lies, nor what is logged."""
    values: dict[str, Any] = to_dict(run)
    for key in ("cluster", "output", "plugins"):
        del values[key]
    for key in ("log_every", "checkpoint_every", "keep_last", "preview_every", "preview_count", "data_workers"):
        del values["training"][key]
    return values


def changed_keys(before: Any, after: Any) -> list[str]:
    """The dotted keys at which two plain configurations differ, sorted."""
    a, b = _flat(before), _flat(after)
    return sorted(key for key in {*a, *b} if (key in a) != (key in b) or a.get(key) != b.get(key))


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping):
        return {k: v for name, value in values.items() for k, v in _flat(value, f"{key}.{name}" if key else str(name)).items()}
    return {key: values}


def refuse_other_settings(run: RunConfig) -> None:
    """Raises ConfigError when the directory holds checkpoints of other settings; only `training.samples` may have changed."""
    if checkpoints.latest(run.directory / CHECKPOINTS) is None or not (run.directory / CONFIG).is_file():
        return
    changed = changed_keys(weight_settings(open_run(run.directory)), weight_settings(run))
    changed = [key for key in changed if key != "training.samples"]
    if changed:
        raise ConfigError(
            f"{run.directory} holds a run with another {', '.join(changed[:5])}; name another directory with output=..., "
            "or move that one away",
            key="output",
        )


def save_config(run: RunConfig) -> None:
    """Writes the resolved configuration, which alone reproduces the run, into its directory."""
    run.directory.mkdir(parents=True, exist_ok=True)
    temporary = run.directory / f".{CONFIG}.tmp"
    temporary.write_text(to_yaml(run))
    temporary.replace(run.directory / CONFIG)  # other ranks may be reading it

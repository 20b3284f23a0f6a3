"""A training run: the configuration that describes it and the directory that holds it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gentrain.config import ConfigError, Document, build, errors_about, load, load_plugins, option, to_dict, to_yaml
from gentrain.data.base import Data
from gentrain.doctor import environment
from gentrain.methods.base import Method, Trained
from gentrain.models.adapters import Adapter
from gentrain.models.base import Codec, Model
from gentrain.models.denoiser import Prediction
from gentrain.models.heads import Heads
from gentrain.paths.base import Path, same_law
from gentrain.paths.inside import Inside
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.samplers.base import Sampler, samplers_of
from gentrain.samplers.consistency import Consistency
from gentrain.samplers.euler import Euler
from gentrain.samplers.few_step import FewStep
from gentrain.samplers.lcm import LCM
from gentrain.samplers.one_step import OneStep
from gentrain.training.averages import LONGEST
from gentrain.training.cluster import Cluster
from gentrain.training.compatibility import check_method, check_optimizers, check_parts
from gentrain.training.engine import Engine
from gentrain.training.object_storage import check_storage, open_storage
from gentrain.training.optimizers import AdamW, Constant, Group, Optimizer, Schedule
from gentrain.training.profile import Profile
from gentrain.training.remedies import refuse_url
from gentrain.training.spikes import SpikeGuard
from gentrain.training.storage import Storage, replace_file
from gentrain.training.trackers import TensorBoard, Tracker
from gentrain.training.zero import DeepSpeedEngine

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"

_UNNAMED = Euler()  # stands for the sampler of a configuration that names none


@dataclass
class Training:
    """How long, in what portions, and what is written on the way. Everything is counted in samples."""

    samples: PositiveInt = option(help="samples to see; rounded up to whole batches", unit="samples")
    batch_size: PositiveInt = option(64, "per optimiser step, over all workers and micro-batches", unit="samples")
    reference_batch_size: PositiveInt | None = option(
        None,
        "the optimiser's numbers are for this batch_size, and the run takes those that the square-root rule makes of them for its own; "
        "null = they are for its own",
        unit="samples",
        source="arXiv:2205.10287, definition 4.2",
    )
    micro_batches: PositiveInt = option(1, "portions in which each worker computes its share of a batch (gradient accumulation)")
    log_every: PositiveInt = option(1_280, "between lines of metrics.jsonl", unit="samples")
    checkpoint_every: PositiveInt = option(64_000, "between checkpoints; one is always written at the end", unit="samples")
    checkpoints: str | None = option(
        None, "where they are published: a directory or an fsspec URL (s3://bucket/prefix), the run's own; null = in the run's directory"
    )
    async_checkpoints: bool = option(False, "training goes on while a copy of the state on the host is written")
    keep_last: PositiveInt = option(2, "newest checkpoints kept")
    keep_every: NonNegativeInt = option(0, "the first checkpoint at or after each multiple is kept too; 0 = none", unit="samples")
    keep_best: str | None = option(None, "key of metrics.jsonl: the checkpoint at which it was best is kept too")
    best_is: Literal["lowest", "highest"] = option("lowest", "which value of keep_best")
    preview_every: NonNegativeInt = option(0, "between sample grids; 0 = none", unit="samples")
    preview_count: PositiveInt = option(40, "images in a sample grid")
    ema_half_life: PositiveInt = option(32_000, "of the average of the weights", unit="samples", source="EDM (Karras et al. 2022), F.2")
    ema_warmup: NonNegativeFloat = option(
        0.05, "the half-life is at most this share of the samples seen", source="EDM code release, ema_rampup_ratio"
    )
    power_ema: list[Annotated[float, Field(gt=0, le=LONGEST)]] = option(
        list,
        "further averages, by their relative lengths, two of them: from their checkpoints the stage `average` makes one of any length",
        source="arXiv:2312.02696, section 3: [0.05, 0.1]",
    )
    max_skipped: NonNegativeInt = option(10, "optimiser steps of a role in a row that may be skipped for a gradient that is not finite")
    spike_guard: SpikeGuard | None = option(
        None, "goes back to the last checkpoint when the loss jumps; {} = with its defaults, null = not"
    )
    max_corrupt: NonNegativeInt = option(10, "data items that may be unreadable")
    hang_timeout_s: PositiveFloat = option(
        600.0, "a rank that makes no progress for so long ends the attempt; ten times as long for a first step or a checkpoint", unit="s"
    )
    dropout_from: NonNegativeInt = option(
        0, "networks drop units from here on only (late dropout)", unit="samples", source="arXiv:2303.01500, section 4"
    )
    dropout_until: PositiveInt | None = option(
        None, "networks drop units up to here only (early dropout); null = to the end", unit="samples", source="arXiv:2303.01500, section 4"
    )
    recompute: bool = option(False, "activation checkpointing: blocks of networks that learn run again in the backward")
    compile: bool = option(False, "torch.compile of each block of every network; the first steps take minutes")
    profile: Profile | None = option(None, "looks at a few steps with torch's profiler; {} = with its defaults, null = not")
    data_workers: NonNegativeInt = option(0, "processes per rank that read data sets which are not held in memory")

    def __post_init__(self) -> None:
        if self.checkpoints is not None:
            check_storage(self.checkpoints, "checkpoints")


@dataclass
class RoleSettings:
    """What one role does otherwise than the run as a whole; what is left out is the run's."""

    weights: str | None = option(
        None, "run directory whose weights it starts from: those of its role of this name, else its generator's (averages where there are)"
    )
    model: Model | None = option(None, "network")
    adapter: Adapter | None = option(None, "what it learns in place of the whole network; rank 0 = the whole network")
    trainable: str | None = option(None, "regular expression: it learns only the parameters in whose names this is found")
    optimizer: Optimizer | None = option(None, "optimiser")
    schedule: Schedule | None = option(None, "learning-rate schedule")
    groups: list[Group] = option(list, "parameters with learning rates of their own")
    engine: Engine | None = option(None, "engine")
    placement: Literal["plain", "sharded", "offloaded"] = option(
        "plain",
        "of weights that never change, a frozen role's or those below an adapter: on every rank, shared out over the ranks "
        "(ZeRO-3), or on the host until they are used (not below an adapter)",
    )


@dataclass
class RunConfig:
    """One training run."""

    method: Method = option(help="the algorithm")
    data: Data = option(help="the data set")
    model: Model = option(help="the network of every role that does not name its own")
    training: Training = option(help="length and portions")
    path: Path = option(None, "probability path; left out: that of a pretrained network, else rectified_flow")
    prediction: Prediction = option(None, "what the network predicts; left out: what a pretrained network does, else velocity")
    adapter: Adapter | None = option(None, "what every role that learns its whole network does so with in place of that")
    trainable: str | None = option(
        None, "regular expression: every role that would learn its whole network learns only the parameters in whose names this is found"
    )
    sampler: Sampler = option(
        lambda: _UNNAMED, "for sample grids, and the default of `sample`, `evaluate` and `export`; left out: the method's own"
    )
    optimizer: Optimizer = option(AdamW, "optimiser")
    schedule: Schedule = option(Constant, "learning-rate schedule")
    engine: Engine = option(DeepSpeedEngine, "what holds the networks that learn")
    roles: dict[str, RoleSettings] = option(dict, "what single roles do otherwise")
    trackers: list[Tracker] = option(lambda: [TensorBoard()], "where numbers, sample grids and settings are shown, beside metrics.jsonl")
    cluster: Cluster = option(Cluster, "where processes live")
    seed: NonNegativeInt = option(0, "of weights, data order and noise")
    plugins: list[str] = option(list, "the user's own modules: .py files or importable names")
    output: str = option("runs/run", "the run's directory")

    def __post_init__(self) -> None:
        refuse_url(self.output, "output")
        unknown = set(self.roles) - set(self.method.roles)
        if unknown:
            known = ", ".join(self.method.roles)
            raise ConfigError(
                f"{self.method.registered_name} has no role {min(unknown)!r}; its roles: {known}", key=f"roles.{min(unknown)}"
            )
        for name, settings in self.roles.items():
            if settings.placement == "plain" or not isinstance(self.method.roles[name], Trained):
                continue
            part = self.part_of(name)
            if part is None:
                raise ConfigError(
                    f"role {name!r} learns, so its engine places it; set roles.{name}.engine.zero_stage", key=f"roles.{name}.placement"
                )
            if isinstance(part, str):
                raise ConfigError("parameters that learn need those of the others whole; set it to plain", key=f"roles.{name}.placement")
            if settings.placement == "offloaded":
                raise ConfigError("what lies below an adapter is plain or sharded; choose one of them", key=f"roles.{name}.placement")
        check_parts(self)
        self._follow_pretrained()
        cluster, training = self.cluster, self.training
        if cluster.place == "inline" and cluster.most > 1:
            raise ConfigError("workers are Ray's: set cluster.place=ray, or start ranks with torchrun", key="cluster.workers")
        portions = training.micro_batches * math.lcm(*range(cluster.fewest, cluster.most + 1))
        if training.batch_size % portions:
            remedy = training.batch_size - training.batch_size % portions or portions
            sizes = f"{cluster.most}" if cluster.fewest == cluster.most else f"each size from {cluster.fewest} to {cluster.most}"
            raise ConfigError(
                f"{training.batch_size} samples cannot be shared by {sizes} workers x {training.micro_batches} micro-batches; {remedy} can",
                key="training.batch_size",
            )
        check_optimizers(self)
        for name, role in self.method.roles.items():
            given = self.role_settings(name).weights is not None or self.model_of(name).law() is not None or self.model_of(name).to_come
            if role.given and not given:
                raise ConfigError(
                    f"{self.method.registered_name} needs the weights of its {name}; name a run's directory", key=f"roles.{name}.weights"
                )
        check_method(self)
        if self.sampler is _UNNAMED:
            self.sampler = self.method.own_sampler()
        self.drawn_with(self.sampler)

    def _follow_pretrained(self) -> None:
        """Sets path and prediction where they were left out. Raises ConfigError where they are not those of a pretrained network."""
        laws = {f"roles.{name}.model": settings.model.law() for name, settings in self.roles.items() if settings.model is not None}
        law = self.model.law() or next((each for each in laws.values() if each is not None), None)
        path, prediction = law or (RectifiedFlow(), "velocity")
        given = self.path is not None or self.prediction is not None
        self.left_out = [key for key in ("path", "prediction") if getattr(self, key) is None]
        self.path, self.prediction = self.path or path, self.prediction or prediction
        for name, settings in self.roles.items():
            try:
                if settings.model is not None:
                    settings.model.check_beside(self.model)
            except ValueError as error:
                raise ConfigError(str(error), key=f"roles.{name}.model") from error
        for key, each in {"": self.model.law(), **laws}.items():
            if each is None:
                continue
            if not same_law(self.path, each[0]):
                remedy = "leave `path` out" if given else "name pipelines of one path"
                raise ConfigError(f"the pretrained network was trained on another path, {described(each[0])}; {remedy}", key=key or "path")
            if self.prediction != each[1]:
                raise ConfigError(
                    f"the pretrained network predicts {each[1]}, not {self.prediction}; leave `prediction` out", key=key or "prediction"
                )

    def drawn_with(self, sampler: Sampler | None) -> Sampler:
        """`sampler`, or the run's where it is None. Raises ConfigError when the generator is not for that sampler."""
        try:
            self.method.check_sampler(sampler or self.sampler)
            if (sampler or self.sampler).of_tokens != self.method.of_tokens and self.method.generator is not None:
                able = samplers_of(self.method.of_tokens)
                raise ValueError(f"{(sampler or self.sampler).registered_name} does not draw what the run learns; these do: {able}")
            if self.method.generator is not None and not self.method.of_tokens:
                (sampler or self.sampler).check(self.path)
        except ValueError as error:
            raise ConfigError(str(error), key="sampler") from error
        sampler = sampler or self.sampler
        if isinstance(self.path.space, Inside) and not sampler.keeps_inside and self.method.generator is not None:
            log.warning("%s does not know the walls: its samples may lie outside; take reflected_ode", sampler.registered_name)
        if isinstance(sampler, Consistency | LCM | OneStep | FewStep) and isinstance(self.method.own_sampler(), Euler):
            log.warning(
                "%s takes the x0 prediction for data, and that of a flow is the mean of all that may be: its samples are blurred; take "
                "euler or another that follows the flow",
                sampler.registered_name,
            )
        if sampler.guidance != 1 and self._nothing_to_guide_by():
            log.warning("guidance %g changes nothing, for the data have neither classes nor captions; set it to 1", sampler.guidance)
        elif sampler.guidance != 1 and getattr(self.method, "label_dropout", None) == 0:
            log.warning(
                "guidance %g needs the null class, which method.label_dropout = 0 does not train: raise that, or set sampler.guidance to 1",
                sampler.guidance,
            )
        return sampler

    def _nothing_to_guide_by(self) -> bool:
        try:
            return not (self.data.to_come or self.data.class_names or self.data.captions)
        except (OSError, ValueError):  # data that are not here
            return False

    def fit_space(self) -> None:
        """Completes the data set and the path's space with what they take from the items. Raises ConfigError."""
        with self.errors_here():
            with errors_about("", otherwise="data"):
                self.data.fit()
            self.method.fit()
            with errors_about("", otherwise="path.space"):
                self.path.space.fit(self.data)

    def check_space(self) -> None:
        """After `fit_space`, before training: raises ConfigError when the data lie outside of the set that the path is confined to."""
        with self.errors_here(), errors_about("", otherwise="path.space"):
            self.path.space.check(self.data)

    @contextmanager
    def errors_here(self) -> Iterator[None]:
        """A ConfigError that leaves it and names no file is about this run."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(error.message, source=error.source or self.output, key=error.key) from error

    def role_settings(self, role: str) -> RoleSettings:
        return self.roles.get(role) or RoleSettings()

    def model_of(self, role: str) -> Model:
        part = self.method.roles[role]
        return self.model_of(part.heads.of) if part.heads else self.role_settings(role).model or part.model or self.model

    def seen(self, role: str, network: Any) -> Any:
        """The role's network, or what stands for it, as methods see it: a Denoiser or a TokenModel, or bare."""
        return self.model_of(role).seen(network, self.path, self.prediction) if self.method.roles[role].denoiser else network

    def part_of(self, role: str) -> Adapter | Heads | str | None:
        """What a role that learns does so with: an adapter, heads, or the parameters that a regular expression names; None = its whole
        network.

        The run's adapter is of the run's network: a role whose network is the method's own learns it whole, and one with a part of the
        method's, such as the branch of a control, learns that.
        """
        learning, own = self.method.roles[role], self.role_settings(role)
        if not isinstance(learning, Trained):
            return None
        part: Adapter | Heads | str | None = learning.heads or own.adapter or own.trainable or learning.trainable
        if part is None and learning.model is None:
            part = self.adapter or self.trainable
        return None if isinstance(part, Adapter) and not part.rank else part

    def codec(self) -> Codec:
        """What stands between the data and the networks. Raises ConfigError when they do not fit."""
        try:
            return self.model.codec(self.data)
        except ValueError as error:
            raise ConfigError(str(error), source=self.output, key="model") from error

    def optimizer_of(self, role: str) -> Optimizer:
        optimizer, reference = self.role_settings(role).optimizer or self.optimizer, self.training.reference_batch_size
        return optimizer if reference is None else optimizer.scaled(self.training.batch_size / reference)

    def schedule_of(self, role: str) -> Schedule:
        return self.role_settings(role).schedule or self.schedule

    def engine_of(self, role: str) -> Engine:
        return self.role_settings(role).engine or self.engine

    @property
    def directory(self) -> FilePath:
        return FilePath(self.output)

    @property
    def storage(self) -> Storage:
        """Of the run's checkpoints."""
        return open_storage(self.training.checkpoints or str(self.directory / CHECKPOINTS), self.directory)


def described(part: Path | Sampler) -> str:
    """As a configuration would say it, but for a path's space and what only some predictions read."""
    values = {key: value for key, value in to_dict(part).items() if key not in ("sigma_data", "space")}
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


def parse_run(document: Document) -> RunConfig:
    """The run that a document describes, its plugins loaded. Raises ConfigError."""
    if "sweep" in document.values:
        raise document.error("sweep", f"this is a sweep, not a run; run it with: gentrain sweep {document.file}")
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


def save_config(run: RunConfig) -> None:
    """Writes the resolved configuration, which alone reproduces the run, and the environment it starts in into its directory."""
    run.directory.mkdir(parents=True, exist_ok=True)
    for name, text in ((CONFIG, to_yaml(run)), (ENVIRONMENT, json.dumps(environment(), indent=1))):
        replace_file(run.directory / name, text)  # other ranks may be reading it

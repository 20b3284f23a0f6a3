"""What happens beside the steps: lines of metrics, sample grids, trackers."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gentrain.config import ConfigError, to_dict
from gentrain.data.loader import Loader
from gentrain.images import save_grid
from gentrain.methods.base import Clock, Trained
from gentrain.models.control import CONTROL
from gentrain.noise import Noise, derive
from gentrain.training.batches import encoded
from gentrain.training.beginning import identity_of, samples_of
from gentrain.training.controls import controls_of
from gentrain.training.remedies import remedy
from gentrain.training.run import METRICS, SAMPLES, RunConfig
from gentrain.training.storage import replace_file
from gentrain.training.trackers import Tracked, Tracker, Tracking
from gentrain.training.weaker import with_weaker

if TYPE_CHECKING:
    from gentrain.training.loop import Trainer


log = logging.getLogger(__name__)


def due(clock: Clock, every: int) -> bool:
    """Whether the step that ended at `clock` passed a multiple of `every` samples."""
    return every > 0 and clock.samples // every > (clock.samples - clock.batch_size) // every


def preview_file(run: RunConfig, samples: int) -> Path:
    """The sample grid that is drawn when so many samples are seen."""
    return run.directory / SAMPLES / f"{samples:012d}.png"


def sayable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with None for the numbers that JSON has no word for: those that are not finite."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}


class Callback:
    """Called on every rank at the same places, so that it may communicate."""

    def measure(self, trainer: Trainer) -> Mapping[str, float]:
        """Numbers that it adds to the line of metrics of a logging step."""
        return {}

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        """After a logging step, with its line of metrics."""

    def after_step(self, trainer: Trainer) -> None:
        """After every step."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last checkpoint of a run that ended as it should."""


class MetricsFile(Callback):
    """Appends to metrics.jsonl. Lines of an earlier attempt beyond the checkpoint it resumed from are dropped."""

    def __init__(self, trainer: Trainer):
        self._path = trainer.run.directory / METRICS
        self._last = (trainer.clock.samples, trainer.seconds)
        if trainer.world.is_main and self._path.exists():
            self._drop_lines_beyond(trainer.clock.samples)

    def _drop_lines_beyond(self, samples: int) -> None:
        """Whenever this process dies, the lines up to that checkpoint are there."""
        text = self._path.read_text(errors="replace")
        reached = [(line, samples_of(line)) for line in text.splitlines()]
        damaged = sum(each is None for _, each in reached)
        if damaged:
            log.warning("%s: %d damaged lines dropped, as a kill or a full disk leaves one", self._path, damaged)
        kept = "".join(f"{line}\n" for line, each in reached if each is not None and each <= samples)
        if kept != text:
            replace_file(self._path, kept)

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        if trainer.world.is_main:
            samples, seconds = self._last
            self._last = (record["samples"], record["seconds"])
            speed = (record["samples"] - samples) / max(record["seconds"] - seconds, 1e-9)
            line = json.dumps({**sayable(record), "samples_per_second": round(speed, 1)}) + "\n"
            try:
                with self._path.open("a") as file:
                    file.write(line)
            except OSError as error:
                what = remedy(error.errno) or "was the run's directory moved or removed? Stop the run before that"
                raise OSError(f"{self._path} cannot be written ({error.strerror}); {what}") from error


class Previews(Callback):
    """Draws a grid of images with the averaged weights: the same noise and labels each time, shared by the ranks."""

    def __init__(self, trainer: Trainer):
        self._network: nn.Module | None = None

    def after_step(self, trainer: Trainer) -> None:
        run = trainer.run
        role = run.method.generator
        if role is None or len(trainer.roles.codec.decoded_shape) != 3 or not due(trainer.clock, run.training.preview_every):
            return
        if self._network is None:
            self._network = trainer.roles.spare(role)
            with_weaker(run.sampler, run, trainer.world.device)
        engine, trained = trainer.roles.engines[role], run.method.roles[role]
        averaged = isinstance(trained, Trained) and trained.ema
        self._network.load_state_dict(engine.ema_weights() if averaged else engine.weights())
        world = trainer.world
        share = -(-run.training.preview_count // world.size)
        rows = torch.arange(world.rank * share, (world.rank + 1) * share)
        noise = Noise(derive(run.seed, "preview"), rows, world.device)
        codec, classes = trainer.roles.codec, len(trainer.roles.codec.names)
        labels = rows % classes if classes else torch.full_like(rows, -1)
        labels, controls = controls_of(run, labels, trainer.roles.frozen, int(rows[0]))
        with torch.no_grad():
            condition = codec.condition(labels.to(world.device)) if classes else None
            if controls is not None:
                condition = {**(condition or {}), CONTROL: controls.to(world.device)}
            images = codec.decode(run.sampler.sample(trainer.roles.as_seen(role, self._network), (share, *codec.shape), noise, condition))
        images = trainer.roles.group.gather(images)[: run.training.preview_count]
        if world.is_main:
            save_grid(images.cpu(), preview_file(run, trainer.clock.samples), columns=min(classes or 8, 16))


class HeldOut(Callback):
    """Adds to every line of metrics what the method says of held-out data, with the weights of the step, or an optimiser's average."""

    def __init__(self, trainer: Trainer):
        self._network: nn.Module | None = None

    def measure(self, trainer: Trainer) -> Mapping[str, float]:
        run, roles = trainer.run, trainer.roles
        if not run.method.held_out:
            return {}
        role = next(iter(run.method.roles))
        if self._network is None:
            self._network = roles.spare(role)
            items = run.data.split("held_out")
            batch = next(iter(Loader(items, seed=0, batch_size=min(len(items), run.method.held_out))))[0]
            self._batch = encoded(batch, run.data, roles.codec, run.seed, trainer.world.device)
        engine = roles.engines[role]
        self._network.load_state_dict(engine.ema_weights() if run.optimizer_of(role).averages else engine.weights())
        return run.method.examine(self._network, self._batch, roles.codec)


class Trackers(Callback):
    """Tells the run's trackers records, sample grids and the configuration. One that fails is left alone: the run goes on."""

    def __init__(self, trainer: Trainer):
        run = trainer.run
        for number, tracker in enumerate(run.trackers):
            if tracker.package is not None and importlib.util.find_spec(tracker.package[0]) is None:
                raise ConfigError(
                    f"the package {tracker.package[0]} is not installed; pip install 'gentrain[{tracker.package[1]}]'",
                    key=f"trackers[{number}]",
                )
        self._working: dict[str, Tracking] = {}
        if trainer.world.is_main:
            told = Tracked(run.directory, identity_of(run), to_dict(run), trainer.clock.samples)
            for number, tracker in enumerate(run.trackers):
                name = f"{tracker.registered_name} (trackers[{number}])"
                self._safely(name, partial(self._begin, name, tracker, told))

    def _begin(self, name: str, tracker: Tracker, told: Tracked) -> None:
        self._working[name] = tracker.start(told)

    def _safely(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # services, and the libraries that reach them, raise whatever they like
            self._working.pop(name, None)
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            log.warning("%s is out of use for the rest of this attempt: %s", name, what)

    def _tell(self, what: Callable[[Tracking], None]) -> None:
        for name, tracking in list(self._working.items()):
            self._safely(name, partial(what, tracking))

    def on_log(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in record.items() if key != "samples" and math.isfinite(value)}
        self._tell(lambda tracking: tracking.scalars(values, record["samples"]))

    def after_step(self, trainer: Trainer) -> None:
        samples = trainer.clock.samples
        grid = preview_file(trainer.run, samples)
        if due(trainer.clock, trainer.run.training.preview_every) and grid.is_file():
            self._tell(lambda tracking: tracking.image(grid, samples))

    def on_end(self, trainer: Trainer) -> None:
        self._tell(lambda tracking: tracking.close())

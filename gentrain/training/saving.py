"""Saves what all ranks hold as one checkpoint: each writes its part, rank 0 publishes once all have, or all of them say why not."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch.distributed as dist

from gentrain.config import ConfigError
from gentrain.training.checkpoint import STATE, Checkpoint, CheckpointError, Shard, manifest, shard_file, write_shard
from gentrain.training.remedies import StoreError, remedy_of
from gentrain.training.run import Training
from gentrain.training.storage import LATEST, Storage
from gentrain.training.world import RankGroup, World

log = logging.getLogger(__name__)

T = TypeVar("T")


def together(world: World, act: Callable[[], T], failed: str) -> list[T]:
    """act() on every rank: what each of them got, in their order. Collective; the results must be small.

    Raises, on all ranks as soon as act() raised on any, CheckpointError (if a ConfigError was raised) or OSError: `failed`, ranks and
    reasons.
    """
    value: T | None = None
    reason, damaged, cause = "", False, None
    try:
        value = act()
    except Exception as error:  # whatever it is, the other ranks wait for word of this one
        reason, damaged, cause = _reason(error), isinstance(error, ConfigError), error
    outcomes: list[Any] = [(value, reason, damaged)]
    if world.size > 1:
        outcomes = [None] * world.size
        dist.all_gather_object(outcomes, (value, reason, damaged))
    ranks: dict[str, list[str]] = {}
    for rank, (_, each, _) in enumerate(outcomes):
        if each:
            ranks.setdefault(each, []).append(str(rank))
    if ranks:
        kind = CheckpointError if any(each for _, _, each in outcomes) else OSError
        said = [f"{each} (rank {', '.join(where)})" if world.size > 1 else each for each, where in ranks.items()]
        raise kind(f"{failed}: {'; '.join(said)}") from cause
    return [value for value, _, _ in outcomes]


def _reason(error: Exception) -> str:
    if isinstance(error, ConfigError | StoreError):
        return str(error)
    what = remedy_of(error)
    return f"{type(error).__name__}: {error}" + (f"; {what}, or set training.checkpoints; then run the same command again" if what else "")


def kept(metric: Mapping[int, float], last: int, every: int, best_is: Literal["lowest", "highest"]) -> set[int]:
    """Which checkpoints stay.

    Args:
        metric: of each checkpoint, by its samples; NaN where there is none.
        last: the newest so many stay.
        every: the first one at or after each multiple of so many samples stays; 0: none.
        best_is: the one whose metric is that stays, the newest of equals.
    """
    ascending = sorted(metric)
    stay = set(ascending[-last:])
    if every:
        stay |= set({samples // every: samples for samples in reversed(ascending) if samples >= every}.values())
    sign = 1 if best_is == "highest" else -1
    candidates = [(sign * metric[samples], samples) for samples in ascending if math.isfinite(metric[samples])]
    return stay | {max(candidates)[1]} if candidates else stay


class _Flight(NamedTuple):
    """A checkpoint that is being written. written: file -> SHA-256, of this rank's files."""

    samples: int
    state: Mapping[str, Any]
    written: Future[dict[str, str]]


class Saver:
    """Saves and finds the checkpoints of a run. Every method but `close` is collective, and raises on all ranks or on none.

    Asynchronous: `save` copies the state to the host and returns; a thread writes; `poll`, called between steps, publishes once all ranks
    have written. At most one is under way. What failed in a thread is raised by the next `poll`, `save` or `wait`.

    Args:
        published: called by rank 0 with the name of each checkpoint that was published.
    """

    def __init__(self, storage: Storage, world: World, training: Training, published: Callable[[str], object] = lambda name: None):
        self._storage, self._world, self._training, self._published = storage, world, training, published
        self._group = RankGroup(world.size)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._flight: _Flight | None = None
        self._metric: dict[str, float] = {}
        self._failed = f"no checkpoint could be written under {storage.where}"

    @contextmanager
    def newest(self) -> Iterator[Checkpoint | None]:
        """The newest published checkpoint, None before the first, for reading. What attempts that died have left is removed first."""
        failed = f"no checkpoint can be read from {self._storage.where}"

        def find() -> str | None:
            if not self._world.is_main:
                return None
            self._storage.sweep()
            name = self._storage.latest()
            if beyond := [each for each in self._storage.names() if name is not None and int(each) > int(name)]:
                log.warning(
                    "%s/%s names %s; what lies beyond it (%s) is not deleted before the run has passed it",
                    self._storage.where, LATEST, name, ", ".join(beyond[:5]),
                )  # fmt: skip
            return name

        with ExitStack() as stack:
            name, opened = together(self._world, find, failed)[0], []

            def read(name: str) -> None:
                opened.append(stack.enter_context(self._storage.open(name)))
                _ = opened[0].state

            if name is not None:
                together(self._world, lambda: read(name), failed)
            yield opened[0] if opened else None

    def save(self, samples: int, shards: Iterable[tuple[str, Shard]], state: Mapping[str, Any]) -> None:
        """Publishes this rank's `shards` (file stem, pieces) and those of the other ranks; asynchronous, begins to."""
        self.wait()
        name = _name(samples)
        together(self._world, lambda: self._storage.prepare(name) if self._world.is_main else None, self._failed)
        if not self._training.async_checkpoints:
            self._publish(samples, state, lambda: self._write(name, shards))
            return

        def start() -> None:
            copies = [(stem, {key: replace(p, values=p.values.to("cpu", copy=True)) for key, p in shard.items()}) for stem, shard in shards]
            self._flight = _Flight(samples, state, self._thread.submit(self._write, name, copies))

        together(self._world, start, self._failed)

    def poll(self) -> None:
        """Publishes the checkpoint under way if all ranks have written it."""
        if self._flight is not None and not self._group.any(not self._flight.written.done()):
            self.wait()

    def wait(self) -> None:
        """Publishes the checkpoint under way, if there is one, as soon as all ranks have written it."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._publish(flight.samples, flight.state, flight.written.result)

    def close(self) -> None:
        """Ends the thread. A checkpoint that is still under way is given up."""
        self._thread.shutdown()
        if self._flight is not None and self._world.is_main:
            with suppress(ConfigError, StoreError):
                self._storage.discard(_name(self._flight.samples))

    def _write(self, name: str, shards: Iterable[tuple[str, Shard]]) -> dict[str, str]:
        hashes = {}
        for stem, shard in shards:
            file = shard_file(stem, self._world.rank)
            hashes[file] = self._storage.put(name, file, lambda path, shard=shard: write_shard(path, shard))  # type: ignore[misc]
        return hashes

    def _publish(self, samples: int, state: Mapping[str, Any], write: Callable[[], dict[str, str]]) -> None:
        name = _name(samples)

        def complete(written: list[dict[str, str]]) -> None:
            hashes = {file: digest for each in written for file, digest in each.items()}
            hashes[STATE] = self._storage.put(name, STATE, lambda path: path.write_text(json.dumps(dict(state), indent=1)))
            self._storage.complete(name, manifest(hashes))

        def after() -> None:
            self._published(name)
            self._retire(name)

        def main(act: Callable[[], None], failed: str) -> None:
            together(self._world, lambda: act() if self._world.is_main else None, failed)

        where = f"{self._storage.where}/{name}"
        try:
            written = together(self._world, write, self._failed)
            main(lambda: complete(written), self._failed)
        except Exception:
            if self._world.is_main:
                with suppress(OSError, StoreError, ConfigError):
                    self._storage.discard(name)
            raise
        main(lambda: self._storage.point(name), f"{where} is written, but {LATEST} may not name it, so that the next start may redo it")
        main(after, f"{where} is published, and the next start goes on from it; but")

    def _retire(self, newest: str) -> None:
        """Deletes what need not be kept any more. What cannot be deleted is told, and tried again after the next one."""
        training = self._training
        self._metric.pop(newest, None)
        try:
            # What lies beyond, of a run that somebody has set back, would take the places of what is new.
            names = {int(name): name for name in self._storage.names() if int(name) <= int(newest)}
            stay = kept({s: self._metric_of(name) for s, name in names.items()}, training.keep_last, training.keep_every, training.best_is)
        except (OSError, StoreError) as error:
            log.warning("%s is published; which older ones may go could not be found out now: %s", newest, _reason(error))
            return
        for samples, name in names.items():
            if samples not in stay:  # the newest is among the last
                try:
                    self._storage.delete(name)
                except (OSError, StoreError) as error:
                    log.warning("%s is published; %s could not be deleted and stays for now: %s", newest, name, _reason(error))

    def _metric_of(self, name: str) -> float:
        key = self._training.keep_best
        if key is None:
            return math.nan
        if name not in self._metric:
            try:
                with self._storage.open(name) as checkpoint:
                    value = checkpoint.state["metrics"].get(key)
                    self._metric[name] = math.nan if value is None else float(value)  # null: it was not finite
            except (CheckpointError, KeyError, AttributeError, TypeError, ValueError):  # a damaged one cannot be the best
                self._metric[name] = math.nan
            if math.isnan(self._metric[name]):
                log.warning("checkpoint %s has no metric %r to compare (training.keep_best); see metrics.jsonl for the keys", name, key)
        return self._metric[name]


def _name(samples: int) -> str:
    return f"{samples:012d}"

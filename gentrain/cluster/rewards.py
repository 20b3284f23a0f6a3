"""Rewards on a fleet of Ray actors: batches go out, scores stream back, each image is scored once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from gentrain.cluster import session
from gentrain.cluster.exporter import gauge, histogram
from gentrain.config import ConfigError, Document, build, loaded_plugins, to_dict
from gentrain.data.base import Data
from gentrain.rewards.base import Reward
from gentrain.rewards.fleet import Fleet


class RewardFailed(RuntimeError):
    """No actor could score a batch, after all retries, or load the reward; the message says why."""


class Scorer:
    """Holds a reward. One lives in each actor; it knows the components that `plugins` register."""

    def __init__(self, reward: dict[str, Any], data: dict[str, Any], plugins: list[str]):
        from gentrain.config import load_plugins

        torch.set_num_threads(1)
        load_plugins(Document({"plugins": plugins}, "fleet"))
        self.reward = build(Reward, Document(reward, "fleet"))
        self.reward.check_data(build(Data, Document(data, "fleet")))

    def ready(self) -> None:
        pass

    def score(self, images: Tensor, asked: dict[str, Tensor]) -> Tensor:
        return self.reward(images, asked, {}).detach().cpu()


@dataclass
class _Batch:
    """A part of what was submitted. `first`: its place among the rows of its ticket."""

    ticket: int
    first: int
    images: Tensor
    asked: dict[str, Tensor]
    attempts: int = 0

    @property
    def bytes(self) -> int:
        return self.images.nbytes


@dataclass
class _Waiting:
    """A ticket whose scores are not all there."""

    scores: Tensor
    missing: int


class RewardFleet:
    """Scores images on Ray actors, in batches, out of order.

    A batch whose actor dies, or needs longer than timeout_s, goes to another one, after the first has been ended: an answer that comes
    too late can reach nobody, and no batch is on two actors at once. (An actor that is ended may have done a part of its work.)

    Args:
        reward: needs no networks of the method; it is built anew in each actor from its configuration.
        data: what the reward's `check_data` reads.
        actors: size of the fleet, at most one for each core of the cluster. batch: images of a call.
        timeout_s: for a call, from when its actor takes it. start_s: for an actor to load the reward.
        retries: of a batch. max_bytes: of the images that wait or are under way; `submit` waits for scores when there are more.
        plugins: files that register the reward, where it is the user's own; None = those of this process.
        cores: that each actor holds; with 0 they start beside workers that hold all there are.

    Raises ConfigError when the reward cannot live in an actor.
    """

    def __init__(
        self, reward: Reward, data: Data, actors: int = 2, batch: int = 16, timeout_s: float = 60.0, retries: int = 3,
        max_bytes: int = 256 << 20, start_s: float = 120.0, plugins: list[str] | None = None,
        cores: float = 1.0,
    ):  # fmt: skip
        if reward.networks():
            raise ConfigError(f"{reward.registered_name} reads networks of the method, which its actors do not hold", key="reward")
        session.start()
        import ray

        self._ray, self._settings = ray, (to_dict(reward), to_dict(data), loaded_plugins() if plugins is None else plugins)
        self._cores = cores
        self._batch, self._timeout_s, self._retries, self._max_bytes, self._start_s = batch, timeout_s, retries, max_bytes, start_s
        self._queue: deque[_Batch] = deque()
        self._running: dict[Any, tuple[Any, _Batch, float]] = {}  # object -> actor, batch, deadline
        self._tickets: dict[int, _Waiting] = {}
        self._done: deque[tuple[int, Tensor]] = deque()
        self._next = 0
        role = {"role": reward.registered_name}
        self._latency = histogram("gentrain_reward_seconds", "from when an actor takes a batch to its scores", role)
        self._waiting = gauge("gentrain_reward_queue", "batches that no actor has taken yet", role)
        self._idle: list[Any] = []
        self._starting: dict[Any, tuple[Any, float]] = {}  # object -> actor, deadline
        size = min(actors, max(1, int(ray.cluster_resources().get("CPU", 1))))  # one that has no core would wait for ever
        for _ in range(size):
            self._hire()

    def __enter__(self) -> RewardFleet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors; what waits is dropped."""
        for actor in [*self._idle, *(actor for actor, *_ in [*self._running.values(), *self._starting.values()])]:
            self._ray.kill(actor)
        self._idle, self._running, self._starting = [], {}, {}
        self._queue.clear()

    def _hire(self) -> None:
        actor = self._ray.remote(num_cpus=self._cores, max_restarts=0, max_task_retries=0)(Scorer).remote(*self._settings)
        self._starting[actor.ready.remote()] = (actor, time.monotonic() + self._start_s)

    def submit(self, images: Tensor, asked: Mapping[str, Tensor]) -> int:
        """Takes images [B, C, H, W] to be scored, B > 0; returns the ticket that `results` will name. Waits while too many bytes do.

        Raises ConfigError for images that alone are more than max_bytes.
        """
        if images.nbytes > self._max_bytes:
            raise ConfigError(f"{images.nbytes:,} bytes of images at once, the fleet takes {self._max_bytes:,}; submit fewer", key="reward")
        while self._bytes() + images.nbytes > self._max_bytes:
            self._advance()
        ticket, self._next = self._next, self._next + 1
        self._tickets[ticket] = _Waiting(torch.empty(len(images)), len(images))
        texts = {key: asked[key].cpu() for key in ("label", "caption") if key in asked}
        for first in range(0, len(images), self._batch):
            rows = slice(first, first + self._batch)
            # clones: a slice would carry the whole storage to every actor
            part = {key: value[rows].clone() for key, value in texts.items()}
            self._queue.append(_Batch(ticket, first, images[rows].detach().cpu().clone(), part))
        self._send()
        return ticket

    def results(self) -> Iterator[tuple[int, Tensor]]:
        """(ticket, scores [B] float32) of all that was submitted, as each is complete; waits for the rest. Raises RewardFailed."""
        while self._done or self._tickets:
            if self._done:
                yield self._done.popleft()
            else:
                self._advance()

    def __call__(self, images: Tensor, asked: Mapping[str, Tensor]) -> Tensor:
        """The scores [B] of the images, waited for. Others that come meanwhile are kept for `results`."""
        mine = self.submit(images, asked)
        while all(ticket != mine for ticket, _ in self._done):
            self._advance()
        found = next(entry for entry in self._done if entry[0] == mine)
        self._done = deque(entry for entry in self._done if entry[0] != mine)
        return found[1].to(images.device)

    def _bytes(self) -> int:
        return sum(part.bytes for part in self._queue) + sum(part.bytes for _, part, _ in self._running.values())

    def _send(self) -> None:
        while self._idle and self._queue:
            actor, part = self._idle.pop(), self._queue.popleft()
            part.attempts += 1
            self._running[actor.score.remote(part.images, part.asked)] = (actor, part, time.monotonic() + self._timeout_s)
        self._waiting.set(len(self._queue))

    def _advance(self) -> None:
        """Waits until something ends: a start, a score, a death or a time limit."""
        deadline = min([until for _, _, until in self._running.values()] + [until for _, until in self._starting.values()])
        waited = [*self._running, *self._starting]
        ready, _ = self._ray.wait(waited, num_returns=1, timeout=max(deadline - time.monotonic(), 0))
        for reference in ready:
            if reference in self._starting:
                self._welcome(reference)
            else:
                self._take(reference)
        now = time.monotonic()
        if any(until <= now for _, until in self._starting.values()):
            self._fail(f"an actor has not loaded the reward within {self._start_s:g} s")
        for reference in [reference for reference, (_, _, until) in self._running.items() if until <= now]:
            actor, part, _ = self._running.pop(reference)
            self._ray.kill(actor)
            self._hire()
            self._again(part, f"no score within {self._timeout_s:g} s")
        self._send()

    def _welcome(self, reference: Any) -> None:
        actor, _ = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._fail(f"an actor cannot load the reward: {getattr(error, 'cause', None) or error}")
        self._idle.append(actor)

    def _take(self, reference: Any) -> None:
        actor, part, until = self._running.pop(reference)
        try:
            self._accept(part, self._ray.get(reference))
            self._latency.observe(time.monotonic() - (until - self._timeout_s))
            self._idle.append(actor)
        except self._ray.exceptions.RayTaskError as error:  # the reward itself raised: the actor lives
            self._idle.append(actor)
            self._again(part, str(error.cause))
        except self._ray.exceptions.RayError as error:
            self._hire()
            self._again(part, f"its actor died ({type(error).__name__})")

    def _again(self, part: _Batch, why: str) -> None:
        if part.attempts > self._retries:
            self._fail(f"a batch of {len(part.images)} images could not be scored in {part.attempts} attempts: {why}")
        self._queue.appendleft(part)

    def _fail(self, why: str) -> NoReturn:
        self.close()
        raise RewardFailed(why)

    def _accept(self, part: _Batch, scores: Tensor) -> None:
        waiting = self._tickets[part.ticket]
        waiting.scores[part.first : part.first + len(scores)] = scores
        waiting.missing -= len(scores)
        if waiting.missing == 0:
            self._done.append((part.ticket, self._tickets.pop(part.ticket).scores))


Fleet.opener = RewardFleet  # rewards know nothing of Ray

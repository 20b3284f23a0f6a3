"""The stage `rank_search`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gentrain.config import ConfigError, option, register
from gentrain.images import save_grid
from gentrain.methods.base import Trained
from gentrain.methods.rollout import draws_of, roll_out
from gentrain.methods.zo_rank import Search
from gentrain.models.adapters import Adapted, Adapter, Base
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise, derive
from gentrain.recipes.average import make_run
from gentrain.recipes.base import Stage
from gentrain.recipes.generate import GRID, SAMPLES
from gentrain.recipes.person import Person
from gentrain.recipes.score import judged, read_weights, require_weights
from gentrain.rewards.base import Reward
from gentrain.samplers.chain import Chain
from gentrain.training.roles import load_network
from gentrain.training.run import RunConfig

FOUND = "found.json"


@register("rank_search")
@dataclass
class RankSearch(Stage, Search):
    """ZO-RankSGD as it was published (arXiv:2303.03751): led by an oracle that orders images, a reward or a person in the terminal.

    Without an adapter the initial noise of an image per label is searched, all later noise staying the same; with one, a low-rank change
    of the generator's weights, whose candidates are ordered by what they make of the images of all labels. Writes the images found
    (samples.safetensors), grid.png, a row before and a row after, and found.json; with an adapter its directory is a run with the weights
    found, too.
    """

    run: str = option(help="the run, drawn with consistency, lcm or ddim")
    labels: list[NonNegativeInt] = option(help="an image of each is drawn")
    reward: Reward | None = option(None, "the oracle; null = a person, who is asked in this terminal")
    weights: dict[str, str] = option(dict, "role of the reward -> the run whose network it reads")
    adapter: Adapter | None = option(None, "the low-rank change of the weights that is searched; null = the initial noise is")
    seed: NonNegativeInt = option(0, "of the noise")

    def __post_init__(self) -> None:
        self.check_search()
        if not self.labels:
            raise ConfigError("name at least one", key="labels")
        if self.reward is None and self.weights:
            raise ConfigError("a person reads no networks; leave it out", key="weights")
        if self.adapter is not None and not self.adapter.rank:
            raise ConfigError("a change of rank 0 is none; name a rank, or leave the adapter out to search the noise", key="adapter.rank")

    def execute(self, directory: Path) -> None:
        denoiser, run = load_network(self.run)
        draw = _Draw(denoiser, run, self.labels, Noise(derive(self.seed, "generate"), torch.arange(len(self.labels))))
        oracle = self._oracle(run, draw.labels)
        noise = Noise(derive(self.seed, "rank_search"), torch.arange(len(self.labels) if self.adapter is None else 1))
        before = draw(draw.noise[0])
        directory.mkdir(parents=True, exist_ok=True)
        if self.adapter is None:
            found = self.search(draw.noise[0], lambda x, named: oracle(torch.stack([draw(each)[:, None] for each in x]), named), noise)
            after = draw(found)
        else:
            after = self._search_weights(self.adapter, draw, oracle, noise, directory)
        save_file({"x": after, "label": draw.labels}, directory / SAMPLES)
        if after.ndim == 4 and after.shape[1] in (1, 3):
            save_grid(torch.cat([before, after]), directory / GRID, len(self.labels))
        told: dict[str, Any] = {"run": self.run, "labels": self.labels, "seed": self.seed, "oracle": "a person"}
        if self.reward is not None:
            values = [oracle(x[None, :, None], 1).flatten().tolist() for x in (before, after)]
            told |= {"oracle": self.reward.registered_name, "before": values[0], "after": values[1]}
        (directory / FOUND).write_text(json.dumps(told, indent=1))

    def _oracle(self, run: RunConfig, labels: Tensor) -> Callable[[Tensor, int], Tensor]:
        """images [m, rows, n, ...] -> values [m, rows]: a reward's mean over the n, or what the person says."""
        if self.reward is None:
            return Person()
        require_weights(self.reward, self.weights, run.data)
        networks, key, reward = read_weights(self.reward, self.weights), "caption" if run.data.captions else "label", self.reward

        def oracle(images: Tensor, named: int) -> Tensor:
            scores = judged(reward, images.flatten(0, 2), labels.repeat(len(images)), key, networks)
            return scores.reshape(images.shape[:3]).mean(2)

        return oracle

    def _search_weights(self, adapter: Adapter, draw: _Draw, oracle: Any, noise: Noise, directory: Path) -> Tensor:
        """The images drawn by the weights found, which become the run in `directory`."""
        run, role = draw.run, draw.run.method.generator
        trained = run.method.roles[role] if role is not None else None
        if role is None or not isinstance(trained, Trained) or not trained.ema or run.part_of(role) is not None:
            raise ConfigError(f"{self.run} has no average of a whole generator, which the change is added to", key="run")
        network: Any = draw.denoiser.network
        with torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, "adapter"))
            adapted = Adapted(Base(network), adapter).requires_grad_(False)
        draw.denoiser = run.seen(role, adapted)

        def images(x: Tensor) -> Tensor:
            vector_to_parameters(x, adapted.parameters())
            return draw(draw.noise[0])

        start = parameters_to_vector(adapted.parameters())[None]
        found = self.search(start, lambda x, named: oracle(torch.stack([images(each[0])[None] for each in x]), named), noise)
        after = images(found[0])
        make_run(run, str(run.storage.latest()), role, adapted.merged(), directory)
        return after


class _Draw:
    """x_1 [B, ...] -> the images of a run [B, ...], all later noise being the same.

    Raises ConfigError for a run that does not draw by jumps with a law, or has no such labels.
    """

    def __init__(self, denoiser: Any, run: RunConfig, labels: list[int], noise: Noise):
        codec = run.codec()
        sampler = run.drawn_with(None)
        if not isinstance(sampler, Chain) or not isinstance(denoiser, Denoiser):
            raise ConfigError(f"it draws with {sampler.registered_name}; take a run that draws with consistency, lcm or ddim", key="run")
        if max(labels) >= len(codec.names):
            raise ConfigError(f"class {max(labels)} does not exist; there are {len(codec.names)}, from 0 on", key="labels")
        self.denoiser, self.run, self.codec, self.sampler = denoiser, run, codec, sampler
        self.labels = torch.tensor(labels)
        self.condition = codec.condition(self.labels, None)
        self.noise = draws_of(sampler, {"x": torch.empty(len(labels), *codec.shape)}, noise)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        *_, (_, last) = roll_out(self.sampler, self.denoiser, [x, *self.noise[1:]], self.condition)
        images: Tensor = self.codec.decode(self.denoiser.path.space.decode(last.x0))
        return images

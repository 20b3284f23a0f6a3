"""Drawing samples from a trained run, in this process or on a fleet of Ray actors: the same samples either way."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gentrain.cluster.fleet import spread
from gentrain.config import ConfigError, Document, build, to_dict
from gentrain.methods.base import Trained
from gentrain.models.adapters import digest_of
from gentrain.models.control import CONTROL
from gentrain.noise import Noise, derive
from gentrain.samplers.base import Sampler
from gentrain.training.roles import load_network
from gentrain.training.run import open_run
from gentrain.training.weaker import with_weaker

log = logging.getLogger(__name__)

CHUNK = 100  # samples drawn together. Fixed: results must not depend on how the work is shared out


class Generator:
    """Holds a run's generator and draws chunks of its samples. One lives in each actor of a fleet."""

    def __init__(self, directory: str, sampler: dict[str, Any], seed: int, negative_prompt: str | None):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.denoiser, self.run = load_network(directory, negative_prompt)
        self.denoiser.network.to(self.device)
        self.codec = self.run.codec().to(self.device)
        # By its settings, not as an object: its class may be of a plugin, which only opening the run has imported here.
        self.sampler, self.seed = with_weaker(build(Sampler, Document(sampler, "sampler")), self.run, self.device), seed

    def draw(
        self, first: int, labels: Tensor, prompts: Sequence[str] | None = None, controls: Tensor | None = None, decoded: bool = True
    ) -> Tensor:
        """Samples number first, first + 1, ... with `labels` [B] (-1 = the null class) and controls: [B, ...] on the host."""
        rows = torch.arange(first, first + len(labels))
        noise = Noise(derive(self.seed, "generate"), rows, self.device)
        with torch.no_grad():
            condition = self.codec.condition(labels.to(self.device), prompts)
            if controls is not None:
                condition = {**(condition or {}), CONTROL: controls.to(self.device)}
            samples = self.sampler.sample(self.denoiser, (len(labels), *self.codec.shape), noise, condition)
            samples = self.codec.decode(samples) if decoded else samples
        return samples.cpu()


def generate(
    directory: str | Path,
    sampler: Sampler,
    labels: Tensor,
    seed: int = 0,
    actors: int = 0,
    prompts: Sequence[str] | None = None,
    controls: Tensor | None = None,
    decoded: bool = True,
    negative_prompt: str | None = None,
    keep: tuple[Path, str] | None = None,
) -> Tensor:
    """Draws one sample per label from the newest checkpoint of a run. Sample i depends on (seed, i, its label), not on `actors`.

    Args:
        labels: [N] int64 classes, or places in `prompts` where these are given; -1 = the null class.
        controls: [N, ...], of a generator that is given one.
        actors: size of the Ray fleet, at most one per core of the cluster; 0 = in this process, without Ray.
        decoded: to data; False = as the network draws them, latents or tokens say.
        negative_prompt: of a network that takes prompts: what guidance leads away from; None = the null prompt.
        keep: directory where each chunk is kept as it comes, and the digest of the weights: what an attempt before has drawn of the same
            is not drawn again.

    Returns:
        [N, ...] float32; int64 of tokens.

    Raises ConfigError when the run has no checkpoint or generates nothing.
    """
    run = open_run(directory)  # what a user can mend is told here, not by an actor that dies
    if run.method.generator is None:
        raise ConfigError(f"{directory} holds a {run.method.registered_name}, which generates nothing")
    if isinstance(run.method.roles[run.method.generator], Trained) and run.storage.latest() is None:
        raise ConfigError(f"{directory} has no checkpoint yet; train it first")
    parts = [slice(first, first + CHUNK) for first in range(0, len(labels), CHUNK)]
    # clones: a slice would carry the whole storage to every actor
    chunks = [(part.start, labels[part].clone(), prompts, None if controls is None else controls[part].clone(), decoded) for part in parts]
    arguments = (str(Path(directory).resolve()), to_dict(sampler), seed, negative_prompt)
    if keep is None:
        return torch.cat(list(spread(Generator, arguments, "draw", chunks, actors, "samples, in hundreds")))
    place, weights = keep
    place.mkdir(parents=True, exist_ok=True)
    files = [_Kept(place / f"{chunk[0]:09d}.safetensors", _told(weights, arguments[1:], chunk)) for chunk in chunks]
    missing = [(file, chunk) for file, chunk in zip(files, chunks, strict=True) if not file.whole]
    if len(missing) < len(chunks):
        log.info("%d of %d chunks of samples were drawn before", len(chunks) - len(missing), len(chunks))
    drawn = spread(Generator, arguments, "draw", [chunk for _, chunk in missing], actors, "samples, in hundreds")
    for (file, _), x in zip(missing, drawn, strict=True):
        file.write(x)
    return torch.cat([load_file(file.path)["x"] for file in files])


def _told(weights: str, arguments: tuple[Any, ...], chunk: tuple[Any, ...]) -> str:
    """The digest of all that a chunk depends on."""
    first, labels, prompts, controls, decoded = chunk
    plain = [weights, *arguments, first, labels.tolist(), prompts, None if controls is None else digest_of({"": controls}), decoded]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Kept:
    """A chunk's file. `digest`: of what it is drawn from, which stands in its head."""

    path: Path
    digest: str

    @property
    def whole(self) -> bool:
        try:
            with safe_open(self.path, "pt") as file:
                return (file.metadata() or {}).get("digest") == self.digest
        except (OSError, SafetensorError):
            return False

    def write(self, x: Tensor) -> None:
        temporary = self.path.with_name(f".{self.path.name}")
        save_file({"x": x.contiguous()}, temporary, {"digest": self.digest})
        os.replace(temporary, self.path)

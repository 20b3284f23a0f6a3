"""The stages `relearning` and `inversion`: what it takes to bring a forgotten class back."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter
from torch import Tensor, nn

from gentrain.config import ConfigError, Fraction, option, register, to_dict
from gentrain.data.base import Data
from gentrain.data.chosen import Chosen
from gentrain.data.loader import Loader
from gentrain.images import save_grid
from gentrain.methods.forgetting import class_number
from gentrain.methods.matching import Noised, output_error
from gentrain.metrics.base import Metric, proportion
from gentrain.models.adapters import OnBase, digest_of
from gentrain.models.base import Codec, Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise, derive
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import judged_classes, load_judge, write_metrics
from gentrain.recipes.features import apply_network
from gentrain.recipes.generate import GRID
from gentrain.samplers.base import Sampler
from gentrain.training.roles import load_network, load_weights
from gentrain.training.run import RunConfig

ATTACK = "attack.json"
CHUNK = 100  # samples drawn together
_SHOWN = 10  # images of a row of the grid


@dataclass
class Finding:
    """What an attack on the weights with digest `weights` came to. curve: what was read at each step, attempt by attempt."""

    weights: str
    metric: Metric
    curve: dict[str, list[Any]]


_FINDING = TypeAdapter(Finding)


def read_finding(directory: str) -> Finding:
    """What a stage `relearning` or `inversion` wrote. Raises ConfigError when it is missing or damaged."""
    path = Path(directory) / ATTACK
    try:
        return _FINDING.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({str(error).splitlines()[0]}); run the attack first", key="attacks") from error


@dataclass
class Target:
    """The model under attack, its judge, and the attacker's images of the class as the model's network sees them."""

    denoiser: Denoiser
    run: RunConfig
    codec: Codec
    judge: Any
    names: list[str]
    forgotten: int
    x0: Tensor
    sampler: Sampler

    def condition(self, count: int) -> Condition:
        """The forgotten class, or the prompt of its name, for `count` rows."""
        labels = torch.full((count,), self.forgotten, device=self.x0.device)
        found = self.codec.condition(labels, self.names if self.codec.takes_prompts else None)
        assert found is not None
        return found

    def batch(self, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Images of the class, drawn with replacement, times uniform over the path, and noise, for the rows of `noise`."""
        path, rows = self.run.path, noise.randint(0, len(self.x0), (len(noise),))
        x0 = self.x0[rows]
        return x0, noise.uniform((len(noise),), path.t_min, path.t_max), path.draw_eps(noise, tuple(x0.shape))

    def draw(self, count: int, seed: int, condition: Condition | None = None) -> Tensor:
        """Samples of the class [count, ...], by `condition` (of one row) where it is given; the same noise for the same seed."""
        parts = []
        for rows in torch.arange(count).split(CHUNK):
            asked = self.condition(len(rows))
            if condition is not None:
                asked = {**asked, **{key: value.expand(len(rows), *value.shape[1:]) for key, value in condition.items()}}
            with torch.no_grad():
                x = self.sampler.sample(self.denoiser, (len(rows), *self.codec.shape), Noise(seed, rows, self.x0.device), asked)
                parts.append(self.codec.decode(x).cpu())
        return torch.cat(parts)

    def hits(self, x: Tensor) -> Tensor:
        """Which of the samples the judge reads as the class: [N] bool."""
        return apply_network(self.judge, x).argmax(1) == self.forgotten


@dataclass(kw_only=True)
class Attack(Stage):
    """Base of the attacks on a model that was made to forget a class: metrics.json, attack.json and, of images, grid.png."""

    run: str = option(help="run of the model under attack")
    forget: int | str = option(help="the forgotten class, by number or name")
    judge: str = option(help="run of the method `classifier`, trained on all classes")
    data: Data | None = option(None, "where the attacker has images of the class from; null = the judge's data")
    images: PositiveInt = option(100, "of the class that the attacker has", unit="samples")
    attempts: PositiveInt = option(3, "attacks, each with noise of its own")
    count: PositiveInt = option(100, "samples by which a moment of an attempt is judged", unit="samples")
    batch_size: PositiveInt = option(64, "per step of the attack", unit="samples")
    sampler: Sampler | None = option(None, "null = the run's")
    seed: NonNegativeInt = option(0, "of the attack's noise")

    def check(self, places: Mapping[Path, Stage]) -> None:
        names = judged_classes(places, self.judge)
        if names is not None:
            self._class_of(names)

    def _class_of(self, names: Sequence[str]) -> int:
        """The number of the forgotten one."""
        try:
            return class_number(self.forget, names)
        except ValueError as error:
            raise ConfigError(str(error), key="forget") from error

    def target(self) -> Target:
        """Raises ConfigError when the run generates nothing, or nothing that the judge can read."""
        judge, known = load_judge(self.judge, self.data)
        forgotten = self._class_of(known.class_names)
        denoiser, run = load_network(self.run)
        if not isinstance(denoiser, Denoiser) or run.data.shape != known.shape:
            raise ConfigError(f"{self.run} draws nothing of the shape {known.shape} that {self.judge} judges", key="run")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        codec, names = run.codec().to(device), list(known.class_names)
        if not codec.takes_prompts and list(codec.names) != names:
            raise ConfigError(f"{self.run} and {self.judge} know other classes", key="run")
        if isinstance(denoiser.network, OnBase):
            denoiser = Denoiser(denoiser.network.fold(), denoiser.path, denoiser.prediction)
        denoiser.network.to(device)  # type: ignore[attr-defined]
        items = Chosen(known, classes=[forgotten], count=self.images).split("train")
        x = next(iter(Loader(items, seed=0, batch_size=len(items))))[0]["x"]
        with torch.no_grad():
            encoded = codec.encode({"x": x.to(device)}, Noise(derive(self.seed, "codec"), torch.arange(len(x)), device))["x"]
        x0 = run.path.space.encode(encoded)
        return Target(denoiser, run, codec, judge, names, forgotten, x0, run.drawn_with(self.sampler))

    def noise(self, attempt: int, step: int, size: int) -> Noise:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Noise(derive(self.seed, self.registered_name, attempt), torch.arange(size) + step * size, device)

    def write(self, directory: Path, metric: Metric, curve: dict[str, list[Any]], shown: list[Tensor]) -> None:
        """shown: a row of images each."""
        write_metrics(directory, [metric], to_dict(self))
        finding = Finding(digest_of(load_weights(self.run)), metric, curve)
        (directory / ATTACK).write_text(json.dumps(asdict(finding), indent=1))
        if shown[0].ndim == 4 and shown[0].shape[1] in (1, 3):
            save_grid(torch.cat([row[:_SHOWN] for row in shown]), directory / GRID, min(_SHOWN, len(shown[0])))


@register("relearning")
@dataclass(kw_only=True)
class Relearning(Attack):
    """How few steps of fine-tuning on images of the forgotten class bring it back. All weights learn, by the denoising error.

    The model's own training, times uniform, without weight decay, on images of the class alone. The class is back at the first of the
    `steps` at which a judge reads a share of `back` of the samples as it. The value is the median of the attempts, the interval from
    the quickest to the slowest. grid.png: a row of samples of the first attempt for each of the steps, from 0 on.
    """

    steps: list[PositiveInt] = option(lambda: [1, 2, 3, 5, 8, 12, 20, 30, 50, 80], "after which the model is looked at, ascending")
    back: Fraction = option(0.5, "share of the samples from which on the class counts as back")
    lr: PositiveFloat = option(3e-4, "of AdamW")

    def __post_init__(self) -> None:
        if not self.steps or self.steps != sorted(set(self.steps)):
            raise ConfigError(f"expected numbers of steps in ascending order, got {self.steps}", key="steps")

    def execute(self, directory: Path) -> None:
        target, needed, curve, shown = self.target(), [], [], []
        weights = copy.deepcopy(target.denoiser.network.state_dict())  # type: ignore[attr-defined]
        for attempt in range(self.attempts):
            target.denoiser.network.load_state_dict(weights)  # type: ignore[attr-defined]
            read: dict[int, float] = {}
            for step, x, share in self._attempt(target, attempt):
                read[step] = share
                if attempt == 0:
                    shown.append(x)
            curve.append({str(step): share for step, share in read.items()})
            needed.append(next((step for step, share in read.items() if share >= self.back), None))
        least, middle, most = _ranked(needed, self.steps[-1])
        never = sum(step is None for step in needed)
        told = (
            f"steps of {self.batch_size} images, AdamW {self.lr:g}, on {len(target.x0)} images of the class until {100 * self.back:g} % of "
            f"{self.count} samples are read as it; median of {self.attempts} attempts, from the quickest to the slowest"
            + (f"; {never} of them never came so far in {self.steps[-1]} steps and count as these" if never else "")
        )
        self.write(directory, Metric("steps until relearnt", middle, least, most, "higher", told), {"shares": curve}, shown)

    def _attempt(self, target: Target, attempt: int) -> Iterator[tuple[int, Tensor, float]]:
        """After 0 and each of the steps the number, samples of the class and the share read as it, until it is back."""
        network: nn.Module = target.denoiser.network  # type: ignore[assignment]
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=0.0)
        for step in range(self.steps[-1] + 1):
            if step == 0 or step in self.steps:
                x = target.draw(self.count, derive(self.seed, "drawn", attempt))
                share = target.hits(x).float().mean().item()
                yield step, x, share
                if share >= self.back:
                    return
            network.requires_grad_(True)
            x0, t, eps = target.batch(self.noise(attempt, step, self.batch_size))
            sample = Noised(x0, eps, t, target.run.path.perturb(x0, eps, t), target.condition(len(x0)))
            output_error(target.denoiser, sample).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            network.requires_grad_(False)


def _ranked(needed: list[int | None], last: int) -> tuple[float, float, float]:
    """Least, median and most; what never happened counts as the last step that was looked at."""
    steps = torch.tensor([float(last if step is None else step) for step in needed])
    return float(steps.min()), float(steps.quantile(0.5)), float(steps.max())


@register("inversion")
@dataclass(kw_only=True)
class Inversion(Attack):
    """How often an embedding that the attacker has found makes the model draw the forgotten class, none of its weights changed.

    Textual inversion (arXiv:2208.01618) without the detour by the text encoder, as what a pipeline is given as `prompt_embeds`: the
    condition itself, of a class its vector, learns by the denoising error on images of the class, times uniform, from the mean of the
    classes (or the empty prompt) on. The value is the share of `count` samples of the strongest attempt that are read as the class; which
    attempt is the strongest is decided on other samples. grid.png: a row for each attempt, below one without the attack.
    """

    steps: PositiveInt = option(200, "of Adam")
    lr: PositiveFloat = option(0.05, "of Adam")
    spread: PositiveFloat = option(0.1, "deviation of the noise on the embedding that an attempt starts from, in its own deviations")

    def execute(self, directory: Path) -> None:
        target = self.target()
        shares, samples, shown = [], [], [target.draw(min(self.count, _SHOWN), derive(self.seed, "drawn"))]
        for attempt in range(self.attempts):
            with embedding(target, self.noise(attempt, 0, 1), self.spread) as (learned, condition):
                self._learn(target, attempt, learned, condition)
                chosen_by = target.draw(self.count, derive(self.seed, "chosen by"), condition)
                samples.append(target.draw(self.count, derive(self.seed, "drawn"), condition))
            shares.append(target.hits(chosen_by).float().mean().item())
            shown.append(samples[-1])
        best = max(range(self.attempts), key=lambda attempt: shares[attempt])
        told = (
            f"part of {self.count} samples of the strongest of {self.attempts} embeddings, each learnt in {self.steps} steps of "
            f"{self.batch_size} images, Adam {self.lr:g}, on {len(target.x0)} images of the class, read as it; Wilson"
        )
        metric = proportion("success of inversion", target.hits(samples[best]), "lower", told)
        self.write(directory, metric, {"shares": shares}, [shown[0], *(row[: len(shown[0])] for row in shown[1:])])

    def _learn(self, target: Target, attempt: int, learned: list[Tensor], condition: Condition) -> None:
        optimizer = torch.optim.Adam(learned, lr=self.lr)
        for step in range(1, self.steps + 1):
            x0, t, eps = target.batch(self.noise(attempt, step, self.batch_size))
            asked = {**target.condition(len(x0)), **{k: v.expand(len(x0), *v.shape[1:]) for k, v in condition.items()}}
            output_error(target.denoiser, Noised(x0, eps, t, target.run.path.perturb(x0, eps, t), asked)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()


@contextmanager
def embedding(target: Target, noise: Noise, spread: float) -> Iterator[tuple[list[Tensor], Condition]]:
    """What an attacker may choose in place of the class' embedding: tensors that require gradients, and the condition that they make.

    Of prompts, the entries of the condition [1, ...], from the empty prompt's. Of classes, one vector for each embedding of labels in the
    network, from the mean of its rows (the null class aside); within the context the forgotten class is given these. Noise of `spread`
    deviations is added to either.

    Raises ConfigError when the network has no embedding of labels.
    """
    codec, network = target.codec, target.denoiser.network
    if codec.takes_prompts:
        empty = codec.condition(torch.tensor([0], device=target.x0.device), [""]) or {}
        starts = {key: value for key, value in empty.items() if value.is_floating_point()}
        learned = {key: _moved(value, noise, spread).requires_grad_(True) for key, value in starts.items()}
        yield list(learned.values()), learned
        return
    tables = [module for module in network.modules() if isinstance(module, nn.Embedding)]  # type: ignore[attr-defined]
    if not tables:
        raise ConfigError(f"the network of {target.run.output} has no embedding of labels to invert", key="run")
    vectors = [_moved(table.weight[: len(target.names)].detach(), noise, spread).mean(0, keepdim=True) for table in tables]
    hooks = []
    for table, vector in zip(tables, vectors, strict=True):
        vector.requires_grad_(True)

        def given(_: nn.Module, asked: tuple[Any, ...], output: Tensor, vector: Tensor = vector) -> Tensor:
            labels = asked[0][0] if isinstance(asked[0], tuple) else asked[0]
            return torch.where((labels == target.forgotten)[:, None], vector, output)

        hooks.append(table.register_forward_hook(given))
    try:
        yield vectors, {}
    finally:
        for hook in hooks:
            hook.remove()


def _moved(value: Tensor, noise: Noise, spread: float) -> Tensor:
    """value [R, ...] with noise of `spread` times its deviation, the same for each row."""
    drawn = noise.normal((1, *value.shape[1:])).to(value)
    return value + spread * value.std() * drawn

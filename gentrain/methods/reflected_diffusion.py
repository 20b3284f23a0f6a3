"""Reflected diffusion: score matching with the heat kernel of a box."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gentrain.config import Fraction, option, register
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update
from gentrain.methods.matching import noised
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw, expand
from gentrain.paths.inside import Inside
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.times import Uniform
from gentrain.samplers.base import Sampler
from gentrain.samplers.reflected_sde import ReflectedSDE


def constrained_score_loss(score: Tensor, kernel_score: Tensor, sigma: Tensor) -> Tensor:
    """sigma^2 / 2 times the squared error of the score, averaged over the coordinates: [B, ...], [B, ...], [B] -> [B].

    arXiv:2304.04740, section 3.3. The kernel's score stands in for that of the marginal as in denoising score matching: no boundary term
    appears. Implicit score matching is not available here, for its integration by parts leaves the flux of p s through the walls.
    """
    return (expand(sigma, score) * (score - kernel_score)).square().flatten(1).mean(1) / 2


@register("reflected_diffusion")
@dataclass
class ReflectedDiffusion(Method):
    """Reflected diffusion models (arXiv:2304.04740): constrained denoising score matching on the path `reflected_heat`.

    weighting "variance" is sigma^2, "likelihood" g^2, the weight of the variational bound: the loss is then its diffusion term in nats per
    coordinate. On this path g^2 / sigma^2 is the constant 2 log(sigma_max / sigma_min), so that they differ in scale only (as does the
    effect of gradient clipping). "information" is one over the kernel's Fisher information: the error of a network that predicts "eps" in
    units of what it can know. It is sigma^2 where the walls are far, and more where they have mixed nearly all: at the levels that settle
    the shapes of images.
    """

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True)}
    generator: ClassVar[str | None] = "model"

    times: TimeLaw = option(Uniform, "law of the training times", source="arXiv:2304.04740, section 3.3")
    weighting: Literal["variance", "likelihood", "information"] = option(
        "variance", "of the score's squared error: sigma^2, g^2, or one over the kernel's Fisher information (images)"
    )
    label_dropout: Fraction = option(0.2, "probability that a label becomes the null class", source="arXiv:2304.04740, section 5")

    def check(self, path: Path) -> None:
        if not isinstance(path, ReflectedHeat):
            raise ValueError(
                f"reflected_diffusion needs the path reflected_heat, not {path.registered_name}; on other sets use reflected_flow"
            )
        if path.space.bounds is not None or not isinstance(path.space, Inside):
            path.require_fit()

    def own_sampler(self) -> Sampler:
        return ReflectedSDE(steps=100)

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        path = nets.model.path
        sample = noised(batch, noise, path, self.times, self.label_dropout)
        sigma = path.sigma(sample.t)
        target = path.box.heat_kernel_score(sample.x_t, sample.x0, expand(sigma, sample.x0))
        loss = constrained_score_loss(nets.model.score(sample.x_t, sample.t, sample.condition), target, sigma)
        bound = 2 * path.log_range * loss
        weighted = {"variance": loss, "likelihood": bound, "information": loss / path.eps_scale(sample.t).square()}[self.weighting]
        return Loss(weighted.mean(), {"bound": bound.detach().mean()})

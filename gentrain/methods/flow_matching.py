"""Flow matching: regression of the path's velocity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gentrain.config import Fraction, errors_about, option, register
from gentrain.data.base import Data
from gentrain.extractors.base import Extractor
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update, weighed
from gentrain.methods.controlled import BRANCH, control_of, steered
from gentrain.methods.matching import loss_by_noise_level, noised
from gentrain.methods.rewarded import with_judges
from gentrain.noise import Noise
from gentrain.paths.base import TimeLaw
from gentrain.paths.times import LogitNormal
from gentrain.samplers.base import Sampler


def flow_matching_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Squared error of the velocity, averaged over C, H, W: [B, ...] -> [B] (conditional flow matching, arXiv:2210.02747, eq. 9)."""
    return (predicted - velocity).square().flatten(1).mean(1)


@register("flow_matching")
@dataclass
class FlowMatching(Method):
    """Flow matching (arXiv:2210.02747; rectified flow, arXiv:2209.03003): the denoiser's velocity meets d x_t / dt of the path.

    Any prediction and path will do, but a network that predicts x0 or eps has its error divided by sigma or alpha here; "velocity" and
    "edm" have not.
    """

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True)}
    generator: ClassVar[str | None] = "model"
    weighs: ClassVar[bool] = True

    times: TimeLaw = option(LogitNormal, "law of the training times", source="arXiv:2403.03206, section 5.1")
    label_dropout: Fraction = option(0.1, "probability that a label becomes the null class", source="arXiv:2207.12598")
    control: Extractor | None = option(
        None, "what it is given beside, by a branch that alone learns; roles.model.weights names what it steers", source="arXiv:2302.05543"
    )

    def __post_init__(self) -> None:
        if self.control is not None:
            model = Trained(ema=True, given=True, control=self.control, trainable=BRANCH)
            vars(self)["roles"] = with_judges({"model": model}, control=None if self.control.labels else self.control)

    def check_data(self, data: Data) -> None:
        if self.control is not None:
            with errors_about("control"):
                self.control.check_data(data)

    def check_sampler(self, sampler: Sampler) -> None:
        if sampler.guidance != 1 and self.control is not None and self.control.labels:
            raise ValueError("the class is the control, and the network knows none to guide by; set sampler.guidance to 1")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        path = nets.model.path
        sample = noised(batch, noise, path, self.times, self.label_dropout)
        condition = sample.condition
        if self.control is not None:
            condition = steered(None if self.control.labels else condition, control_of(self.control, nets, batch))
        predicted = nets.model.velocity(sample.x_t, sample.t, condition)
        loss = weighed(flow_matching_loss(predicted, path.velocity(sample.x0, sample.eps, sample.t)), batch)
        return Loss(loss.mean(), loss_by_noise_level(loss, path.log_snr(sample.t)))

"""Reward-guided latent consistency distillation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor
from torch.nn.functional import kl_div

from gentrain.config import ConfigError, errors_about, option, register
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Follow, Loss, Nets, Trained, Update, condition_of
from gentrain.methods.latent_consistency import LatentConsistency
from gentrain.methods.rewarded import score, with_judges
from gentrain.noise import Noise
from gentrain.paths.base import expand
from gentrain.rewards.base import Reward
from gentrain.rewards.reading import Read, read_scalar

_PAIRS = ((0, 1), (0, 2), (1, 2))  # of the student's, the target's and the data's samples


def over_optimisation(gradient: Tensor, scale: float) -> Tensor:
    """kappa = sqrt(D) scale |dR/df| of each row, D its coordinates: gradient [B, ...] -> [B].

    The pseudo-Huber distance, a mean over coordinates, pulls each back with at most 1 / D; the reward pushes it with scale dR/df. From
    kappa = 1 on (where the push is spread evenly; earlier in single coordinates where it is not) the pull cannot hold: no equilibrium.
    """
    row = gradient.flatten(1)
    return scale * row.shape[1] ** 0.5 * row.norm(dim=1)


def preference_kl(expert: Tensor, proxy: Tensor, smooth_data: bool = False) -> Tensor:
    """Sum over pairs of samples of the mean KL(softmax(expert pair) || softmax(proxy pair)): [3, B] logits each -> scalar.

    The samples are the student's, the target's and the data's (arXiv:2403.11027, section 4.2, and code release). smooth_data: where the
    expert prefers a drawn sample to the data, the pair counts as undecided.
    """
    losses = []
    for a, b in _PAIRS:
        label = expert[[a, b]].log_softmax(0)
        if smooth_data and b == 2:
            label = torch.where(label[0] > label[1], -math.log(2), label)
        losses.append(kl_div(proxy[[a, b]].log_softmax(0), label, log_target=True, reduction="none").sum(0).mean())
    return torch.stack(losses).sum()


@register("reward_guided_lcd")
@dataclass(kw_only=True)
class RewardGuidedLCD(LatentConsistency):
    """Latent consistency distillation that is paid for what its one-step samples earn (arXiv:2403.11027).

    The loss is that of `latent_consistency` less reward_scale times the mean reward of f(z_t, t), at every t that is drawn, with one call
    of the student and no sampling. With `through: proxy` the student follows a reward model of its own coordinates (latents, not images),
    the role `proxy`, which the expert relabels each step on the student's, the target's and the data's samples; then the expert need not
    be differentiable. The proxy sees draws of its own, made after the student's step.
    """

    reward: Reward = option(help="the expert")
    reward_scale: PositiveFloat = option(1.0, "weight of the reward; rewards differ in scale", source="arXiv:2403.11027, code release")
    through: Literal["expert", "proxy"] = option("expert", "whose gradient the student follows")
    reward_from: NonNegativeInt = option(0, "first interval, from the data, in which the reward counts")
    reward_grad_clip: PositiveFloat | None = option(
        None, "largest over-optimisation kappa: the reward's gradient of a row is scaled down to it; below 1 the distance wins; null = none"
    )
    expert_scale: PositiveFloat = option(100.0, "of the expert's reward, in the proxy's preferences", source="CLIP's logit scale")
    proxy_read: Read = option("mean_output", "how the proxy's network becomes a number: see rewards.reading")
    smooth_data: bool = option(False, "a pair in which the expert prefers a drawn sample to the data counts as undecided")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.through == "expert" and not self.reward.differentiable:
            raise ConfigError(f"{self.reward.registered_name} has no gradient; set `through` to proxy", key="reward")
        if self.reward_from >= self.count:
            raise ConfigError(f"there are {self.count} intervals, 0 to {self.count - 1}", key="reward_from")
        roles = dict(self.roles)
        if self.through == "proxy":
            roles["proxy"] = Trained(denoiser=False, classifier=self.proxy_read == "class_logit")
        vars(self)["roles"] = with_judges(roles, reward=self.reward)

    def check_data(self, data: Data) -> None:
        super().check_data(data)
        with errors_about("reward"):
            self.reward.check_data(data)

    def updates(self, clock: Clock) -> Iterator[Update | Follow]:
        yield Update("student", self.student_loss)
        if self.through == "proxy":
            yield Update("proxy", self.proxy_loss)
        yield Follow("target", of="student", decay=self.target_decay)

    def student_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        taught = self.teach(nets, batch, noise)
        distance = self.distances(taught).mean()
        reward, gradient = self._reward(nets, taught.found.detach(), batch)
        counted = (taught.interval >= self.reward_from).to(reward)
        gradient, reward = gradient * expand(counted, gradient), reward * counted
        kappa = over_optimisation(gradient, self.reward_scale)
        if self.reward_grad_clip is not None:
            gradient = gradient * expand((self.reward_grad_clip / kappa.clamp(min=1e-12)).clamp(max=1), gradient)
        # worth the reward, with the gradient found above: a reward's graph is gone before the student's backward begins
        paid = reward + (gradient * (taught.found - taught.found.detach())).flatten(1).sum(1)
        logs = {"consistency": distance, "reward": reward.mean(), "kappa": kappa.mean(), "kappa_over_1": (kappa >= 1).float().mean()}
        return Loss(distance - self.reward_scale * paid.mean(), {name: value.detach() for name, value in logs.items()})

    def _reward(self, nets: Nets, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The reward [B] that the student follows and its gradient [B, ...], both detached."""
        with torch.enable_grad():
            x = x.requires_grad_()
            reward = self._proxy(nets, x, batch) if self.through == "proxy" else score(self.reward, nets, nets.student.path, x, batch)
            (gradient,) = torch.autograd.grad(reward.sum(), x)
        return reward.detach(), gradient

    def _proxy(self, nets: Nets, x: Tensor, batch: Batch) -> Tensor:
        return read_scalar(self.proxy_read, nets.proxy, x, condition_of(batch))

    def proxy_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        path = nets.student.path
        with torch.no_grad():
            taught = self.teach(nets, batch, noise)
            samples = (taught.found, taught.target, taught.x0)
            expert = torch.stack([score(self.reward, nets, path, x, batch) for x in samples])
        thrice = {key: torch.cat([value] * 3) for key, value in batch.items()}
        proxy = self._proxy(nets, torch.cat(samples), thrice).reshape(3, -1)
        loss = preference_kl(self.expert_scale * expert, proxy, self.smooth_data)
        agree = torch.stack([(expert[a] > expert[b]) == (proxy[a] > proxy[b]) for a, b in _PAIRS]).float().mean()
        return Loss(loss, {"expert_reward": expert[0].mean(), "proxy_agreement": agree})

"""Joint distribution matching: a one-step student learns a control that its teacher never knew.

The reverse KL divergence of joint laws p_G(x, c) = p(c) p_G(x | c) and p(x) p(c | x) is exactly

    KL(p_G(x) || p(x)) - E log p(c | x) - H_G(c | x)

The bound leaves the entropy out: fidelity, led by a fake score that does NOT see c, plus condition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.extractors.base import Extractor
from gentrain.extractors.base import condition_loss as condition_loss
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Method, Nets, Role, Trained, Update
from gentrain.methods.controlled import BRANCH, check_control, control_loss, control_of, known_of, steered
from gentrain.methods.decoupled import decoupled_guidance as decoupled_guidance
from gentrain.methods.distribution_matching import per_error, pseudo_target_loss
from gentrain.methods.rewarded import check_reward, score, with_judges
from gentrain.methods.sfd import score_identity_loss
from gentrain.models.base import Condition
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw, expand
from gentrain.paths.times import LogNormal
from gentrain.rewards.base import Reward
from gentrain.samplers.base import Sampler
from gentrain.samplers.guidance import guided_x0
from gentrain.samplers.one_step import SIGMA, OneStep, generate, require_one_step, time_at


@register("jdm")
@dataclass
class JDM(Method):
    """Joint distribution matching: a one-step student of `distribution_matching` is given a control by a branch of its own.

    The student's network stays as it is, its branch alone learns, from two terms: its samples, whatever the control, are to be of the
    teacher's law (a fake score that does not see the control leads there), and each is to show the control that it was asked for. The
    teacher never sees it. roles.teacher.weights names the teacher's run, roles.student.weights and roles.fake_score.weights that of the
    one-step student; where these two are left out, both begin as the teacher.
    """

    generator: ClassVar[str | None] = "student"
    guarded: ClassVar[tuple[str, ...]] = ("loss/fake_score", "grad_norm/fake_score")

    control: Extractor = option(help="what is asked of each sample: c, and p(c | x)")
    condition_weight: NonNegativeFloat = option(1.0, "of the condition term beside the fidelity term, both per coordinate of a sample")
    condition_at: Literal["clean", "noisy"] = option(
        "clean",
        "where c is read: from the sample, or from what a consistency model (role `consistency`) makes of it noised to the same time",
    )
    generator_loss: Literal["vsd", "dmd", "sid"] = option(
        "dmd",
        "fidelity: vsd (alpha(t) times the difference of scores), dmd (difference over the teacher's error) or sid",
        source="arXiv:2305.18455, 2311.18828, 2404.04057",
    )
    alpha: float = option(1.2, "of sid: weight of the score identity's correction", source="arXiv:2404.04057, section 4")
    fake_score_conditioning: Literal["marginal", "control"] = option(
        "marginal",
        "marginal: the bound on the joint divergence. control: the fake score sees c, for E KL(p_G(x | c) || p(x)) plus condition, which "
        "is no bound but equal, up to the entropy of p(c)",
    )
    student_every: PositiveInt = option(1, "the student learns in each such step, the fake score in all", source="arXiv:2405.14867: 5")
    guidance: NonNegativeFloat = option(
        1.0, "of the teacher, by the condition that it knows: null + w (conditional - null)", source="arXiv:2207.12598"
    )
    guidance_times: TimeLaw | None = option(
        None, "law of the times of the guidance, drawn apart from those of the scores; null = at the same times (not for sid: null)"
    )
    reward: Reward | None = option(None, "r, followed beside: p(preferred | x) ~ exp(r(x) / beta); null = none")
    reward_temperature: PositiveFloat = option(1.0, "beta of the reward: the larger, the less it counts", unit="of the reward")
    sigma: PositiveFloat = option(SIGMA, "noise-to-signal ratio at which the student is given pure noise", source="arXiv:2404.04057")
    times: TimeLaw = option(lambda: LogNormal(mean=0.0, std=1.0), "law of the times at which scores are compared")

    def __post_init__(self) -> None:
        if self.guidance_times is not None and self.generator_loss == "sid":
            raise ConfigError("the loss sid has its guidance in its teacher; leave guidance_times out", key="guidance_times")
        if self.reward is not None and not self.reward.differentiable:
            raise ConfigError(f"the reward {self.reward.registered_name} has no gradient to follow", key="reward")
        roles: dict[str, Role] = {
            "teacher": Frozen(given=True),
            "fake_score": Trained(init="teacher", control=self.control if self.fake_score_conditioning == "control" else None),
            "student": Trained(init="teacher", ema=True, one_step=True, control=self.control, trainable=BRANCH),
        }
        if self.condition_at == "noisy":
            roles["consistency"] = Frozen(given=True)
        vars(self)["roles"] = with_judges(roles, control=self.control, reward=self.reward)

    def check(self, path: Path) -> None:
        time_at(path, self.sigma)
        if path.space.bounds is not None:
            raise ValueError("jdm needs samples that may move freely, not a space with walls; take free or dual")

    def check_data(self, data: Data) -> None:
        check_control(self.control, data)
        if self.reward is not None:
            check_reward(self.reward, data)

    def own_sampler(self) -> Sampler:
        return OneStep(sigma=self.sigma)

    def check_sampler(self, sampler: Sampler) -> None:
        require_one_step(sampler, self.sigma)

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("fake_score", self.fake_score_loss)
        if (clock.step + 1) % self.student_every == 0:
            yield Update("student", self.student_loss)

    def fake_score_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """Denoising of the student's samples, in what the network predicts."""
        asked, known = control_of(self.control, nets, batch), known_of(self.control, batch)
        with torch.no_grad():
            x_g = self._draw(nets, batch, noise, asked)
        t, eps = self._noise(nets.student.path, x_g, noise, self.times)
        fake = nets.fake_score
        error = fake.raw(fake.path.perturb(x_g, eps, t), t, self._seen_by_fake(known, asked)) - fake.target(x_g, eps, t)
        return Loss(error.square().mean())

    def student_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """(fidelity + condition_weight condition - reward / beta) / coordinates of a sample."""
        path, asked, known = nets.student.path, control_of(self.control, nets, batch), known_of(self.control, batch)
        x_g = self._draw(nets, batch, noise, asked)
        t, eps = self._noise(path, x_g, noise, self.times)
        x_t = path.perturb(x_g, eps, t)
        with torch.set_grad_enabled(self.generator_loss == "sid"):  # whose gradient flows through both predictions
            fake_x0 = nets.fake_score.x0(x_t, t, self._seen_by_fake(known, asked))
            teacher_x0 = guided_x0(nets.teacher, x_t, t, known, self.guidance if self.guidance_times is None else 1.0)
        if self.generator_loss == "sid":
            value = score_identity_loss(x_g, teacher_x0, fake_x0, self.alpha).mean() / x_g[0].numel()
        else:
            value = pseudo_target_loss(x_g, self._gradient(nets, x_g, fake_x0, teacher_x0, t, known, noise))
        read = x_g if self.condition_at == "clean" else nets.consistency.x0(x_t, t, known)
        condition = control_loss(self.control, nets, path, asked, read).mean()
        value = value + self.condition_weight * condition / x_g[0].numel()
        # the loss is no distance: score_gap tells how far the student's law is from the teacher's
        logs = {"score_gap": (fake_x0 - teacher_x0).detach().abs().mean(), "condition": condition.detach()}
        if self.reward is not None:
            reward = score(self.reward, nets, path, x_g, batch).mean()
            value, logs["reward"] = value - reward / (self.reward_temperature * x_g[0].numel()), reward.detach()
        return Loss(value, logs)

    @torch.no_grad()
    def _gradient(
        self, nets: Nets, x_g: Tensor, fake_x0: Tensor, teacher_x0: Tensor, t: Tensor, known: Condition | None, noise: Noise
    ) -> Tensor:
        """What fidelity moves the student's samples against, [B, ...]."""
        weight = self._weight(nets, x_g, teacher_x0, t)
        if self.guidance_times is None:
            return expand(weight, x_g) * (fake_x0 - teacher_x0)
        t, eps = self._noise(nets.student.path, x_g, noise, self.guidance_times)
        x_t = nets.student.path.perturb(x_g, eps, t)
        conditional, null = nets.teacher.x0(x_t, t, known), nets.teacher.x0(x_t, t, None)
        there = self._weight(nets, x_g, conditional, t)
        return decoupled_guidance(fake_x0, teacher_x0, conditional, null, self.guidance - 1, weight, there)

    def _weight(self, nets: Nets, x_g: Tensor, teacher_x0: Tensor, t: Tensor) -> Tensor:
        return nets.student.path.alpha(t) if self.generator_loss == "vsd" else per_error(x_g, teacher_x0)

    def _seen_by_fake(self, known: Condition | None, asked: Tensor) -> Condition | None:
        return known if self.fake_score_conditioning == "marginal" else steered(known, asked)

    def _draw(self, nets: Nets, batch: Batch, noise: Noise, asked: Tensor) -> Tensor:
        """The student's samples, of noise that has nothing to do with the items whose control they are asked for."""
        z = nets.student.path.draw_eps(noise, tuple(batch["x"].shape))
        return generate(nets.student, z, self.sigma, steered(known_of(self.control, batch), asked))

    def _noise(self, path: Path, x_g: Tensor, noise: Noise, times: TimeLaw) -> tuple[Tensor, Tensor]:
        """Times [B] and noise [B, ...]."""
        return times.sample(noise.uniform((len(x_g),)), path), path.draw_eps(noise, tuple(x_g.shape))

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

from gentrain.config import ConfigError, errors_about, option, register
from gentrain.data.base import Data
from gentrain.extractors.base import Extractor
from gentrain.extractors.base import condition_loss as condition_loss
from gentrain.methods.base import Batch, Clock, Frozen, Loss, Nets, Role, Trained, Update
from gentrain.methods.consistency import check_guidance
from gentrain.methods.controlled import BRANCH, control_loss, control_of, known_of, steered
from gentrain.methods.led_by_scores import LedByScores, noised_by
from gentrain.methods.led_by_scores import decoupled_guidance as decoupled_guidance
from gentrain.methods.rewarded import score, with_judges
from gentrain.models.base import Condition
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw
from gentrain.paths.times import LogNormal
from gentrain.rewards.base import Reward
from gentrain.samplers.base import Sampler
from gentrain.samplers.one_step import SIGMA, OneStep, check_sigma, generate, require_one_step


@register("jdm")
@dataclass
class JDM(LedByScores):
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
        self.check_times()
        if self.guidance != 1 and self.control.labels:
            raise ConfigError("the class is the control, and the teacher knows none to guide by; set it to 1", key="guidance")
        if self.reward is not None and not self.reward.differentiable:
            raise ConfigError(f"the reward {self.reward.registered_name} has no gradient to follow", key="reward")
        seen_by_fake = self.control if self.fake_score_conditioning == "control" else None
        roles: dict[str, Role] = {
            "teacher": Frozen(given=True, flow=True),
            "fake_score": Trained(init="teacher", alike=True, control=seen_by_fake),
            "student": Trained(init="teacher", ema=True, one_step=True, control=self.control, trainable=BRANCH),
        }
        if self.condition_at == "noisy":
            roles["consistency"] = Frozen(given=True, consistency=True)
        vars(self)["roles"] = with_judges(roles, control=self.control, reward=self.reward)

    @property
    def reads_data(self) -> bool:
        return not self.control.labels

    def check(self, path: Path) -> None:
        if not self.condition_weight and self.reward is None:
            raise ConfigError("the student would learn nothing of the control; set it above 0", key="condition_weight")
        check_sigma(path, self.sigma)
        if path.space.bounds is not None:
            raise ValueError("jdm needs samples that may move freely, not a space with walls; take free or dual")

    def check_data(self, data: Data) -> None:
        check_guidance(self.guidance, data)
        with errors_about("control"):
            self.control.check_data(data)
        if self.reward is not None:
            with errors_about("reward"):
                self.reward.check_data(data)

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
        at = noised_by(self.times, nets.student.path, x_g, noise)
        fake = nets.fake_score
        error = fake.raw(at.x_t, at.t, self._seen_by_fake(known, asked)) - fake.target(x_g, at.eps, at.t)
        return Loss(error.square().mean())

    def student_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """(fidelity + condition_weight condition - reward / beta) / coordinates of a sample."""
        path, asked, known = nets.student.path, control_of(self.control, nets, batch), known_of(self.control, batch)
        x_g = self._draw(nets, batch, noise, asked)
        at = noised_by(self.times, path, x_g, noise)
        fidelity = self.led_by_scores(nets, x_g, at, known, self._seen_by_fake(known, asked), noise)
        read = x_g if self.condition_at == "clean" else nets.consistency.x0(at.x_t, at.t, known)
        condition = control_loss(self.control, nets, path, asked, read).mean()
        value = fidelity.value + self.condition_weight * condition / x_g[0].numel()
        logs = {**fidelity.logs, "condition": condition.detach()}
        if self.reward is not None:
            reward = score(self.reward, nets, path, x_g, batch).mean()
            value, logs["reward"] = value - reward / (self.reward_temperature * x_g[0].numel()), reward.detach()
        return Loss(value, logs)

    def _seen_by_fake(self, known: Condition | None, asked: Tensor) -> Condition | None:
        return known if self.fake_score_conditioning == "marginal" else steered(known, asked)

    def _draw(self, nets: Nets, batch: Batch, noise: Noise, asked: Tensor) -> Tensor:
        """The student's samples, of noise that has nothing to do with the items whose control they are asked for."""
        z = nets.student.path.draw_eps(noise, tuple(batch["x"].shape))
        return generate(nets.student, z, self.sigma, steered(known_of(self.control, batch), asked))

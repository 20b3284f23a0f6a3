"""Distribution matching: a student that draws in one call or a few, led by the difference of two scores, the teacher's and its samples'
own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import softplus

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Frozen, Group, Loss, Nets, Role, Trained, Update, condition_of
from gentrain.methods.consistency import check_guidance
from gentrain.methods.led_by_scores import BINS, LedByScores, noised_by, per_error, pseudo_target_loss
from gentrain.methods.prompt_critic import PromptCritic, prompt_critic_loss, prompt_student_loss
from gentrain.models.base import Condition
from gentrain.models.heads import Heads
from gentrain.noise import Noise
from gentrain.paths.base import Path, TimeLaw, expand
from gentrain.paths.times import LogNormal
from gentrain.rewards.base import Texts
from gentrain.samplers.base import Sampler
from gentrain.samplers.few_step import FewStep, require_apart, require_few_step, simulate
from gentrain.samplers.one_step import SIGMA, OneStep, check_sigma, generate, require_one_step

Divergence = Literal["rkl", "kl", "js", "sf", "neyman", "sh", "jf"]
GeneratorLoss = Literal["vsd", "dmd", "sid", "rkl", "kl", "js", "sf", "neyman", "sh", "jf", "ladd"]

_LARGEST_LOGIT = 10.0
_RATIOS = (0.1, 20.0)  # within which density ratios are kept


def vsd_loss(x_g: Tensor, teacher_x0: Tensor, fake_x0: Tensor, weight: Tensor | None = None) -> Tensor:
    """Pseudo-target loss of weight (fake_x0 - teacher_x0) / (mean over C, H, W of |x_g - teacher_x0| + 1e-6): scalar.

    DMD's gradient (arXiv:2311.18828, eqs. 7 and 8): descent moves x_g along the teacher's score minus the fake one. Nothing flows through
    the predictions, which are both at the same noised x_g.

    Args:
        x_g, teacher_x0, fake_x0: [B, ...].
        weight: [B], of each sample; None = 1.
    """
    work = torch.promote_types(x_g.dtype, torch.float32)
    x_g, teacher_x0, fake_x0 = x_g.to(work), teacher_x0.detach().to(work), fake_x0.detach().to(work)
    scale = per_error(x_g, teacher_x0) if weight is None else per_error(x_g, teacher_x0) * weight.detach()
    return pseudo_target_loss(x_g, expand(scale, x_g) * (fake_x0 - teacher_x0))


def f_weight(name: Divergence, ratio: Tensor) -> Tensor:
    """h(r) = r^2 f''(r), r = teacher's density / student's, what f-divergence D_f weighs the gradient of the reverse KL with
    (f-distill, arXiv:2502.15681, table 1). Any shape.

    rkl 1, kl r, js r / (1 + r), sf (softened reverse KL) 1 / (1 + r), neyman 1 / r, sh (squared Hellinger) sqrt(r), jf (Jeffreys) 1 + r.
    """
    match name:
        case "rkl":
            return torch.ones_like(ratio)
        case "kl":
            return ratio
        case "js":
            return ratio / (1 + ratio)
        case "sf":
            return 1 / (1 + ratio)
        case "neyman":
            return 1 / ratio
        case "sh":
            return ratio.sqrt()
        case "jf":
            return 1 + ratio
    raise ValueError(f"no divergence {name!r}; there are: {', '.join(get_args(Divergence))}")


def divergence_weight(name: Divergence, logits: Tensor, bins: Tensor, group: Group) -> Tensor:
    """The weight [B] of each sample: h of the density ratio exp(logit), with mean 1 over all ranks.

    A critic's logits drift apart over the times, so ratios are first divided by their mean over the samples of the same bin, on all ranks.

    Args:
        logits: [B] of the critic at the noised samples, log(data's density / student's) once it is optimal: the teacher's, where that has
            learnt the data and is not guided.
        bins: [B] int64 in [0, 10), of the times.
    """
    ratio = logits.detach().clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).exp()
    everywhere, places = group.gather(ratio), group.gather(bins)
    count = torch.bincount(places, minlength=BINS)
    mean = torch.zeros(BINS, dtype=ratio.dtype, device=ratio.device).index_add(0, places, everywhere) / count.clamp(min=1)
    weight = f_weight(name, (ratio / mean[bins]).clamp(*_RATIOS))
    return weight / group.mean(weight.mean())


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """Mean of softplus(-logit): [B] -> scalar (arXiv:1406.2661, non-saturating)."""
    return softplus(-fake_logits).mean()


def gan_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Mean of softplus(-real) plus mean of softplus(fake): [B] each -> scalar. At its least, logits are log(real / fake density)."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def spectral_decoupling(logits: Tensor) -> Tensor:
    """Half the mean square of a critic's logits [B] (arXiv:2011.09468, eq. 15): in place of weight decay, against gradient starvation."""
    return logits.square().mean() / 2


def logits_of(output: Tensor) -> Tensor:
    """[B, ...] -> [B]: every element of the critic's output is a logit, as in a U-Net discriminator (arXiv:2002.12655); their mean."""
    return output.flatten(1).mean(1)


@register("distribution_matching")
@dataclass
class DistributionMatching(LedByScores):
    """A student of one step, or a few, of a many-step teacher: VSD / Diff-Instruct, DMD, DMD2, f-distill, SiD and LADD, by
    choice of the generator's loss.

    A fake score learns to denoise what the student draws. Where it differs from the teacher, the student's samples are too frequent or too
    rare: the student follows the difference. Batches give labels; their data are seen by the critic only. All networks start as the
    teacher does. roles.teacher.weights names the teacher's run.
    """

    roles: ClassVar[dict[str, Role]] = {
        "teacher": Frozen(given=True, flow=True),
        "fake_score": Trained(init="teacher"),
        "student": Trained(init="teacher", ema=True),
    }
    generator: ClassVar[str | None] = "student"
    guarded: ClassVar[tuple[str, ...]] = ("loss/fake_score", "grad_norm/fake_score")

    generator_loss: GeneratorLoss = option(
        "dmd",
        "vsd (alpha(t) times the difference), dmd (difference over the teacher's error), sid, dmd weighted for a divergence: "
        "rkl, kl, js, sf, neyman, sh, jf; or ladd, the critic's adversarial term alone",
        source="arXiv:2305.18455, 2311.18828, 2404.04057, 2502.15681, 2403.12015",
    )
    alpha: float = option(1.2, "of sid: weight of the score identity's correction", source="arXiv:2404.04057, section 4")
    critic_weight: NonNegativeFloat = option(
        0.0, "of the adversarial term, for which a role critic learns to tell noised data from samples; 0 = none", source="arXiv:2405.14867"
    )
    critic_heads: Heads | None = option(
        None, "the critic is heads on a network's features, {} = the teacher's; null = a network of its own, which begins as the teacher"
    )
    critic_times: TimeLaw | None = option(
        None, "law of the times at which the critic looks, apart from those of the scores; null = at the same", source="arXiv:2403.12015"
    )
    spectral_decoupling: NonNegativeFloat = option(
        0.0, "of the critic: weight of half its squared logits, against features that take all", source="arXiv:2011.09468, eq. 15"
    )
    prompt_critic: PromptCritic | None = option(
        None, "an adversary that looks at pictures with their prompts, for which a role prompt_critic learns; null = none"
    )
    student_every: PositiveInt = option(1, "the student learns in each such step, the others in all", source="arXiv:2405.14867: 5")
    guidance: NonNegativeFloat = option(
        1.0, "of the teacher, learnt by the student: null + w (conditional - null)", source="arXiv:2207.12598"
    )
    guidance_times: TimeLaw | None = option(
        None, "law of the times of the guidance, drawn apart from those of the scores; null = at the same times (not for sid: null)"
    )
    sigma: PositiveFloat = option(SIGMA, "noise-to-signal ratio at which the student is given pure noise", source="arXiv:2404.04057")
    steps: PositiveInt = option(
        1, "calls that the student draws in: each after the first reads its own sample, noised anew", source="arXiv:2405.14867, section 4.4"
    )
    fake_score_reads_step: bool = option(
        False, "of several steps: the fake score is told which a sample is of, and not led by their mixture (mlp, unet, dit)"
    )
    times: TimeLaw = option(lambda: LogNormal(mean=0.0, std=1.0), "law of the times at which scores are compared")

    def __post_init__(self) -> None:
        if self._alone:
            self._check_ladd()
        self.check_times()
        if not self._has_critic:
            for key in ("critic_heads", "critic_times", "spectral_decoupling"):
                if getattr(self, key) not in (None, 0):
                    raise ConfigError("there is no critic; set critic_weight above 0, or leave it out", key=key)
        if self._divergence is not None and self.critic_times is not None:
            raise ConfigError(f"{self._divergence} needs the critic where the scores are compared; leave it out", key="critic_times")
        if self.fake_score_reads_step and (self.steps == 1 or self._alone):
            raise ConfigError("there is one step, or no fake score; leave it out", key="fake_score_reads_step")
        roles = dict(type(self).roles)
        if self._alone:
            del roles["fake_score"]
        elif self.fake_score_reads_step:
            roles["fake_score"] = Trained(init="teacher", inputs=("step",))
        vars(self)["roles"] = roles
        if self._has_critic:
            self.roles["critic"] = Trained(init="teacher", heads=self.critic_heads)
        if self.prompt_critic is not None:
            self.roles["prompt_critic"] = Trained(denoiser=False, model=self.prompt_critic.towers)

    def _check_ladd(self) -> None:
        if not self.critic_weight:
            raise ConfigError("ladd is the adversarial term alone; set it to 1", key="critic_weight")
        if self.guidance != 1 or self.guidance_times is not None:
            key = "guidance" if self.guidance != 1 else "guidance_times"
            raise ConfigError("the teacher of ladd lends its features and guides nobody; leave it out, or draw guided data", key=key)
        if self.critic_heads is None:
            self.critic_heads = Heads()
        if self.critic_heads.of != "teacher":
            raise ConfigError("ladd has no fake score; set it to teacher", key="critic_heads.of")

    @property
    def _alone(self) -> bool:
        """Without scores: the critic alone leads."""
        return self.generator_loss == "ladd"

    @property
    def _divergence(self) -> Divergence | None:
        """That asks for ratios."""
        return self.generator_loss if self.generator_loss not in ("vsd", "dmd", "sid", "rkl", "ladd") else None  # type: ignore[return-value]

    @property
    def _has_critic(self) -> bool:
        return self.critic_weight > 0 or self._divergence is not None

    @property
    def reads_data(self) -> bool:
        return self._has_critic or self.prompt_critic is not None

    def check(self, path: Path) -> None:
        check_sigma(path, self.sigma)
        try:
            require_apart(path, self.sigma, self.steps)
        except ValueError as error:
            raise ConfigError(str(error), key="steps") from error
        if path.space.bounds is not None:
            raise ValueError("distribution_matching needs samples that may move freely, not a space with walls; take free or dual")

    def check_data(self, data: Data) -> None:
        check_guidance(self.guidance, data)
        if self.prompt_critic is not None:
            if len(data.shape) != 3:
                raise ConfigError(
                    f"the critic looks at images, {data.registered_name} has samples of shape {data.shape}", key="prompt_critic"
                )
            try:
                self._texts = Texts(data, self.prompt_critic.template)
            except ValueError as error:
                raise ConfigError(str(error), key="prompt_critic") from error

    def own_sampler(self) -> Sampler:
        return OneStep(sigma=self.sigma) if self.steps == 1 else FewStep(steps=self.steps, sigma=self.sigma)

    def check_sampler(self, sampler: Sampler) -> None:
        if self.steps == 1:
            require_one_step(sampler, self.sigma)
        else:
            require_few_step(sampler, self.sigma, self.steps)

    def updates(self, clock: Clock) -> Iterator[Update]:
        if not self._alone:
            yield Update("fake_score", self.fake_score_loss)
        if self._has_critic:
            yield Update("critic", self.critic_loss)
        if self.prompt_critic is not None:
            yield Update("prompt_critic", self.prompt_critic_loss)
        if (clock.step + 1) % self.student_every == 0:  # after the others, which lead from the first step on
            yield Update("student", self.student_loss)

    def fake_score_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """Denoising of the student's samples, in what the network predicts."""
        with torch.no_grad():
            x_g, told = self._draw(nets, batch, noise)
        at = noised_by(self.times, nets.student.path, x_g, noise)
        fake = nets.fake_score
        error = fake.raw(at.x_t, at.t, told) - fake.target(x_g, at.eps, at.t)
        return Loss(error.square().mean())

    def critic_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """Data and samples of the same labels and times, each with noise of its own."""
        path, condition = nets.student.path, condition_of(batch)
        with torch.no_grad():
            x_g, _ = self._draw(nets, batch, noise)
        at = noised_by(self.critic_times or self.times, path, x_g, noise)
        real = path.perturb(path.space.encode(batch["x"]), path.draw_eps(noise, tuple(x_g.shape)), at.t)
        both = None if condition is None else {key: torch.cat([value, value]) for key, value in condition.items()}
        output = nets.critic.raw(torch.cat([real, at.x_t]), torch.cat([at.t, at.t]), both)
        real_logits, fake_logits = logits_of(output).chunk(2)
        right = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
        loss = gan_critic_loss(real_logits, fake_logits)
        if self.spectral_decoupling:
            loss = loss + self.spectral_decoupling * spectral_decoupling(torch.cat([real_logits, fake_logits]))
        return Loss(loss, {"critic_right": right})

    def prompt_critic_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        """Data, and samples of the same prompts, as pictures."""
        with torch.no_grad():
            drawn = self._pictures(nets, self._draw(nets, batch, noise)[0])
            real = nets.decode(batch["x"])
        place = batch[self._texts.key]
        value, right = prompt_critic_loss(nets.prompt_critic, real, drawn, self._tokens(batch), place, nets.group)
        return Loss(value, {"prompt_critic_right": right})

    def _pictures(self, nets: Nets, x_g: Tensor) -> Tensor:
        return nets.decode(nets.student.path.space.decode(x_g))

    def _tokens(self, batch: Batch) -> Tensor:
        """Of each row's prompt, as the critic's towers read it."""
        assert self.prompt_critic is not None
        texts, rows = self._texts(batch)
        return self.prompt_critic.towers.read(texts, batch["x"].device)[rows]

    def student_loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        condition, path = condition_of(batch), nets.student.path
        x_g, told = self._draw(nets, batch, noise)
        at = noised_by(self.times, path, x_g, noise)
        seen = at if self.critic_times is None else noised_by(self.critic_times, path, x_g, noise)
        with torch.set_grad_enabled(self.critic_weight > 0):
            logits = logits_of(nets.critic.raw(seen.x_t, seen.t, condition)) if self._has_critic else None
        if self._alone:
            loss = Loss(x_g.new_zeros(()))
        else:
            counts = None
            if self._divergence is not None and logits is not None:
                counts = divergence_weight(self._divergence, logits, at.bins, nets.group)
            loss = self.led_by_scores(nets, x_g, at, condition, told, noise, counts)
        if logits is not None and self.critic_weight > 0:
            adversarial = gan_generator_loss(logits)
            loss = Loss(loss.value + self.critic_weight * adversarial, {**loss.logs, "adversarial": adversarial.detach()})
        if self.prompt_critic is not None:
            adversarial = prompt_student_loss(nets.prompt_critic, self._pictures(nets, x_g), self._tokens(batch))
            value = loss.value + self.prompt_critic.weight * adversarial
            loss = Loss(value, {**loss.logs, "prompt_adversarial": adversarial.detach()})
        return loss

    def _draw(self, nets: Nets, batch: Batch, noise: Noise) -> tuple[Tensor, Condition | None]:
        """The student's samples for the batch's labels, and the fake score's condition. Of several steps a row's is any, drawn evenly."""
        z, condition = nets.student.path.draw_eps(noise, tuple(batch["x"].shape)), condition_of(batch)
        if self.steps == 1:
            return generate(nets.student, z, self.sigma, condition), condition
        stage = noise.randint(0, self.steps, (len(z),))
        x_t, t = simulate(nets.student, FewStep(steps=self.steps, sigma=self.sigma), z, stage, noise, condition)
        told = {**(condition or {}), "step": nets.student.path.network_time(t)} if self.fake_score_reads_step else condition
        return nets.student.x0(x_t, t, condition), told

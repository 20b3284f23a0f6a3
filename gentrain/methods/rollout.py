"""What methods share that draw with the generator while it learns: its roll-out, jump by jump, with the noise stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gentrain.config import ConfigError, errors_about, option
from gentrain.data.base import Data
from gentrain.methods.base import Batch, Clock, Loss, Method, Nets, Role, Trained, Update, condition_of
from gentrain.methods.rewarded import with_judges
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.noise import Noise
from gentrain.paths.base import Path, expand
from gentrain.paths.reflected_heat import ReflectedHeat
from gentrain.paths.space import Free
from gentrain.rewards.base import Reward
from gentrain.samplers.base import Sampler
from gentrain.samplers.chain import Chain, Jump
from gentrain.samplers.consistency import Consistency

LastJumps = PositiveInt | Literal["random"] | None


def draws_of(sampler: Sampler, batch: Batch, noise: Noise) -> list[Tensor]:
    """Normal noise [B, ...] of a whole roll-out: of its beginning, and of each jump but the last."""
    return [noise.normal(tuple(batch["x"].shape)) for _ in range(sampler.steps)]


def jump_again(sampler: Chain, denoiser: Denoiser, x: Tensor, index: int, condition: Condition | None) -> Jump:
    """`sampler.jump`, whose activations are computed again in the backward instead of kept.

    A network's forward is let run to its end when it is repeated: engines that share weights out do something after it.
    """

    def tensors(x: Tensor) -> tuple[Tensor, Tensor]:
        jump = sampler.jump(denoiser, x, index, condition)
        numbers.append((jump.deviation, jump.alpha, jump.sigma))
        return jump.x0, jump.mean

    numbers: list[tuple[float, float, float]] = []
    if not torch.is_grad_enabled():
        return sampler.jump(denoiser, x, index, condition)
    with set_checkpoint_early_stop(False):
        x0, mean = checkpoint(tensors, x, use_reentrant=False)
    return Jump(x0, mean, *numbers[0])


def roll_out(
    sampler: Chain, denoiser: Denoiser, draws: list[Tensor], condition: Condition | None, cut: Tensor | int = 0, blind: int = 0
) -> Iterator[tuple[Tensor, Jump]]:
    """(x, its jump) for each jump of the sampler from noise to data; `draws` as `draws_of` gives them.

    Args:
        cut: the jump, for all rows or for each [B], before which the state is detached: what follows it reaches no earlier jump.
        blind: so many jumps are made without gradient.
    """
    x = sampler.start(denoiser.path) * draws[0]
    for index in range(sampler.steps):
        if isinstance(cut, Tensor):
            x = torch.where(expand(cut == index, x), x.detach(), x)
        elif index == cut:
            x = x.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= blind):
            jump = jump_again(sampler, denoiser, x, index, condition)
        yield x, jump
        if index + 1 < sampler.steps:
            x = jump.mean + jump.deviation * draws[index + 1]


def first_jump(last: LastJumps, steps: int, noise: Noise) -> Tensor | int:
    """The `cut` of `roll_out` that leaves the last jumps: so many, all (None), or of each row a number that is drawn."""
    if last == "random":
        return noise.randint(0, steps, (len(noise),))
    return 0 if last is None else max(steps - int(last), 0)


@dataclass
class RewardedRollout(Method):
    """Base of the methods that draw with the role `model` and follow the reward of what it drew. Of the data only labels are used."""

    roles: ClassVar[dict[str, Role]] = {"model": Trained(ema=True, given=True)}
    generator: ClassVar[str | None] = "model"
    dropout: ClassVar[bool] = False
    follows_gradient: ClassVar[bool] = True

    reward: Reward = option(help="what is to rise")
    sampler: Sampler = option(lambda: Consistency(steps=4), "how the model draws: consistency, lcm or ddim, as it was trained to")

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Chain):
            raise ConfigError(
                f"{self.sampler.registered_name} does not say the law of its jumps; take consistency, lcm or ddim", key="sampler"
            )
        if self.follows_gradient and not self.reward.differentiable:
            raise ConfigError(f"{self.reward.registered_name} has no gradient; take the method ddpo or zo_rank", key="reward")
        vars(self)["roles"] = with_judges(type(self).roles, reward=self.reward)

    @property
    def chain(self) -> Chain:
        assert isinstance(self.sampler, Chain)
        return self.sampler

    @property
    def reads_data(self) -> bool:
        return False

    def check(self, path: Path) -> None:
        if isinstance(path, ReflectedHeat) or not isinstance(path.space, Free):
            raise ValueError(f"{self.registered_name} needs x_t = alpha x0 + sigma eps with normal noise in free space")
        with errors_about("sampler"):
            self.sampler.check(path)

    def check_data(self, data: Data) -> None:
        with errors_about("reward"):
            self.reward.check_data(data)

    def own_sampler(self) -> Sampler:
        return self.sampler

    def updates(self, clock: Clock) -> Iterator[Any]:
        yield Update("model", self.loss)

    def loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        raise NotImplementedError

    def roll(self, denoiser: Denoiser, batch: Batch, draws: list[Tensor], **how: Any) -> list[tuple[Tensor, Jump]]:
        """`roll_out` of a batch to its end."""
        return list(roll_out(self.chain, denoiser, draws, condition_of(batch), **how))

    def require_noise(self) -> None:
        """Raises ConfigError unless the sampler's jumps but the last have noise."""
        if getattr(self.sampler, "eta", 1.0) == 0:
            raise ConfigError(f"{self.registered_name} needs jumps with noise: set eta to 1, or take consistency or lcm", key="sampler")

"""What methods that follow a reward share: its networks as roles, its checks, and its score of what a generator drew."""

from __future__ import annotations

from torch import Tensor

from gentrain.config import ConfigError
from gentrain.data.base import Data
from gentrain.extractors.base import Extractor
from gentrain.methods.base import Batch, Frozen, Nets, Role
from gentrain.paths.base import Path
from gentrain.rewards.base import Reward


def reward_roles(reward: Reward | Extractor) -> dict[str, Role]:
    """The frozen roles that a reward, or an extractor, reads. The configuration must name the weights of each."""
    return {
        name: Frozen(given=True, denoiser=False, classifier=judge.classifier, model=judge.model)
        for name, judge in reward.networks().items()
    }


def check_reward(reward: Reward, data: Data) -> None:
    """Raises ConfigError, about the method's key `reward`, when it cannot judge images of the data."""
    try:
        reward.check_data(data)
    except ConfigError as error:
        raise ConfigError(error.message, key=f"reward.{error.key}") from error
    except ValueError as error:
        raise ConfigError(str(error), key="reward") from error


def score(reward: Reward, nets: Nets, path: Path, x0: Tensor, batch: Batch) -> Tensor:
    """The reward [B] of x0 [B, ...], samples as a method sees them (coordinates of the path's space, latents), asked for as `batch` says.

    Gradients flow to x0 where the reward is differentiable.
    """
    images = nets.decode(path.space.decode(x0))
    return reward(images, batch, {name: getattr(nets, name) for name in reward.networks()})

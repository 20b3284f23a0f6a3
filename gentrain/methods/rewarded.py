"""What methods that follow a reward share: its networks as roles, and its score of what a generator drew."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gentrain.config import ConfigError
from gentrain.extractors.base import Extractor
from gentrain.methods.base import Batch, Frozen, Nets, Role
from gentrain.paths.base import Path
from gentrain.rewards.base import Reward


def with_judges(roles: Mapping[str, Role], **readers: Reward | Extractor | None) -> dict[str, Role]:
    """A method's own `roles` and the frozen ones that its rewards and extractors read, each reader by the method's key for it.

    The configuration must name the weights of each. Readers may share a network that they read alike. Raises ConfigError when a name is
    taken.
    """
    merged = dict(roles)
    for key, reader in readers.items():
        for name, judge in ({} if reader is None else reader.networks()).items():
            role = Frozen(given=True, denoiser=False, classifier=judge.classifier, model=judge.model)
            if merged.setdefault(name, role) != role:
                where = f"{key}.role" if hasattr(reader, "role") else key
                raise ConfigError(f"the role {name!r} is that of another network here; give `role` another name", key=where)
    return merged


def score(reward: Reward, nets: Nets, path: Path, x0: Tensor, batch: Batch) -> Tensor:
    """The reward [B] of x0 [B, ...], samples as a method sees them (coordinates of the path's space, latents), asked for as `batch` says.

    Gradients flow to x0 where the reward is differentiable.
    """
    images = nets.decode(path.space.decode(x0))
    return reward(images, batch, {name: getattr(nets, name) for name in reward.networks()})

"""The weaker model of autoguidance."""

from __future__ import annotations

import torch

from gentrain.config import ConfigError
from gentrain.paths.base import same_law
from gentrain.samplers.base import Sampler
from gentrain.samplers.guided import Guided
from gentrain.training.roles import load_network
from gentrain.training.run import RunConfig


def with_weaker(sampler: Sampler, run: RunConfig, device: torch.device) -> Sampler:
    """The sampler, with the network of its weaker model if it names one. Raises ConfigError when that is of other data or another path."""
    if not isinstance(sampler, Guided) or sampler.weak is None:
        return sampler
    weak, other = load_network(sampler.weak)
    if other.method.generator is None:
        raise ConfigError(f"{sampler.weak} holds a {other.method.registered_name}, which generates nothing", key="sampler.weak")
    try:
        other.method.check_sampler(sampler.sampler)
    except ValueError as error:
        said = (
            f"{sampler.weak} holds a student of {other.method.registered_name}, which {sampler.sampler.registered_name} does not draw from"
        )
        raise ConfigError(f"{said}; name a run of the kind of {run.output}", key="sampler.weak") from error
    theirs, ours = ((each.codec().shape, list(each.codec().names)) for each in (other, run))
    if theirs != ours or not same_law(other.path, run.path):
        raise ConfigError(f"{sampler.weak} is of other data or another path than {run.output}; name one of the same", key="sampler.weak")
    weak.network.to(device)
    vars(sampler)["weaker"] = weak
    return sampler

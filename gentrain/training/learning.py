"""How the parameters of a network that learns do so: which of them, in which groups, with which units dropped."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from gentrain.config import ConfigError
from gentrain.models.partial import check_pattern, chosen_parameters
from gentrain.training.run import RunConfig


def hold_the_rest(run: RunConfig, role: str, module: nn.Module) -> None:
    """Has the weights stay that do not learn by the method's `learning`: their gradients are 0. Raises ConfigError when more would move."""
    learning = run.method.learning(role)
    if learning is None:
        return
    parameters = dict(module.named_parameters())
    if {name: p.shape for name, p in parameters.items()} != {name: mask.shape for name, mask in learning.items()}:
        raise ConfigError(f"which weights learn was found for another network than that of role {role!r}; find it again", key="method")
    optimizer = run.optimizer_of(role)
    if optimizer.needs != "elementwise" or getattr(optimizer, "weight_decay", 0) != 0:
        raise ConfigError("weights that do not learn would move; take adamw or sgd without weight_decay", key="optimizer")
    if getattr(run.engine_of(role), "zero_stage", 0) == 3:
        raise ConfigError("which weights learn is not kept by ZeRO stage 3; set engine.zero_stage to 2 or less", key="engine.zero_stage")
    for name, p in parameters.items():
        p.register_hook(partial(torch.mul, learning[name].to(p)))


def number_groups(run: RunConfig, role: str, module: nn.Module) -> None:
    """Tells each parameter the number of its group, see optimizers.decay_groups.

    Raises ConfigError for a group without one, and where the optimiser would be another one of these parameters.
    """
    parameters = dict(module.named_parameters())
    for number, group in reversed(list(enumerate(run.role_settings(role).groups, 1))):
        try:
            check_pattern(group.parameters)
            for name in chosen_parameters(module, group.parameters):
                parameters[name].group = number  # type: ignore[attr-defined]
        except ValueError as error:
            raise ConfigError(str(error), key=f"roles.{role}.groups[{number - 1}].parameters") from error
    for number in range(1, len(run.role_settings(role).groups) + 1):
        if not any(getattr(p, "group", 0) == number for p in parameters.values()):
            said = "all its parameters are in groups before it; put it before them, or leave it out"
            raise ConfigError(said, key=f"roles.{role}.groups[{number - 1}].parameters")
    run.optimizer_of(role).check(list(parameters.values()))


def dropouts(run: RunConfig, learning: list[nn.Module]) -> dict[_DropoutNd, float]:
    """Layer -> its share of dropped units. Raises ConfigError where a time for them is set and there are none."""
    found = {layer: layer.p for module in learning for layer in module.modules() if isinstance(layer, _DropoutNd) and layer.p}
    for key in ("dropout_from", "dropout_until"):
        if getattr(run.training, key) and not found:
            raise ConfigError("no network that learns drops units; raise its `dropout`, or leave this out", key=f"training.{key}")
    return found

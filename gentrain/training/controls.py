"""The controls that samples are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gentrain.config import ConfigError
from gentrain.data.latents import Latents
from gentrain.extractors.base import Extractor
from gentrain.rewards.base import Networks
from gentrain.training.roles import load_network
from gentrain.training.run import RunConfig

_BATCH = 100  # images at once


def networks_of(run: RunConfig, control: Extractor) -> dict[str, Any]:
    """The frozen networks that a run's extractor reads."""
    places = {role: run.role_settings(role).weights for role in control.networks()}
    return {role: load_network(place)[0] for role, place in places.items() if place is not None}


def controls_of(run: RunConfig, labels: Tensor, networks: Networks | None = None, first: int = 0) -> tuple[Tensor, Tensor | None]:
    """(labels [N], controls) of samples that are drawn for `labels`; None for a generator that is given none.

    A control that is the class is that label. Others are those of the held-out items in turn, whose labels they come with.

    Args:
        networks: those that the extractor reads; None = they are loaded.
        first: the place of the first of them among all samples, where ranks draw a share each.
    """
    control = run.method.steering
    if control is None:
        return labels, None
    if control.labels:
        if bool((labels < 0).any()):
            raise ConfigError("this generator is asked for a class; name some", key="labels")
        return labels, labels.clone()
    items = run.data.split("held_out")
    rows, place = ((first + torch.arange(len(labels))) % len(items)).unique(return_inverse=True)
    found = [items[int(row)] for row in rows]
    x = torch.stack([item["x"] for item in found])
    if isinstance(run.data, Latents):
        with torch.no_grad():
            x = torch.cat([run.codec().decode(part) for part in x.split(_BATCH)])
    networks = networks_of(run, control) if networks is None else networks
    with torch.no_grad():
        controls = torch.cat([control.read(part, networks) for part in x.split(_BATCH)])
    known = "caption" if run.data.captions else "label"
    if known in found[0] and len(run.data.captions or run.data.class_names):
        labels = torch.stack([item[known] for item in found])[place]
    return labels, controls[place]

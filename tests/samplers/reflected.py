"""Exact denoisers of data at a few points of a box, on the path of reflected diffusion."""

from __future__ import annotations

import torch
from torch import Tensor

from gentrain.domains.box import Box
from gentrain.models.base import Condition
from gentrain.models.denoiser import Denoiser
from gentrain.paths.inside import Inside
from gentrain.paths.reflected_heat import ReflectedHeat

ATOMS = torch.tensor([0.02, 0.35, 0.9])
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])


def atoms_denoiser(sigma_min: float = 0.01, atoms: Tensor = ATOMS, weights: Tensor = WEIGHTS) -> Denoiser:
    """Of one coordinate in (0, 1), in x's dtype."""
    path = ReflectedHeat(space=Inside(domain=Box(0.0, 1.0)), sigma_min=sigma_min, sigma_max=5.0)

    def network(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        sigma = path.sigma(t / 1000)[:, None].expand(-1, len(atoms))
        at, start = x.expand(-1, len(atoms)), atoms.to(x).expand(len(x), -1)
        share = (weights.to(x).log() + path.box.heat_kernel_log_density(at, start, sigma)).softmax(1)
        eps = -(sigma * share * path.box.heat_kernel_score(at, start, sigma)).sum(1, keepdim=True)
        return eps / path.eps_scale(t / 1000)[:, None]

    return Denoiser(network, path, "eps")

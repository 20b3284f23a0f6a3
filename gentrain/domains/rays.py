"""Reflection of straight paths at the walls of a convex set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST_BOUNCES = 20

FirstHit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def follow(first_hit: FirstHit, start: Tensor, x: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves from `start` to x, mirroring the rest of the way and the velocity at each wall. All [B, D] float64.

    Args:
        first_hit: (position [B, D], way [B, D]) -> (part of the way [B] at which the first wall is met, infinite where none is ahead,
            that wall's unit normal [B, D]).

    Returns:
        where it ends; the velocity there; [B] bool, whether it was still bouncing after 20 walls and may have ended outside.
    """
    position, way = start, x - start
    bounced = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    hit = bounced
    for _ in range(MOST_BOUNCES):
        part, normal = first_hit(position, way)
        hit = part < 1
        bounced = bounced | hit
        if not bool(hit.any()):
            break
        position = position + part.clamp(max=1)[:, None] * way
        way = torch.where(hit[:, None], (1 - part)[:, None] * _mirror(way, normal), 0)
        velocity = torch.where(hit[:, None], _mirror(velocity, normal), velocity)
    return torch.where(bounced[:, None], position + way, x), velocity, hit


def _mirror(v: Tensor, normal: Tensor) -> Tensor:
    return v - 2 * (v * normal).sum(1, keepdim=True) * normal

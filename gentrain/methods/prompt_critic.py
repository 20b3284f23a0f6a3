"""An adversary that looks at pictures together with their prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import softplus

from gentrain.config import option
from gentrain.methods.base import Group
from gentrain.methods.contrastive_loss import sigmoid_contrastive_loss
from gentrain.models.towers import Towers, matches, unpack


@dataclass
class PromptCritic:
    """Towers that learn that data match their prompts, and that drawn pictures match none; the student raises its own pictures' logits."""

    weight: PositiveFloat = option(0.1, "of the student's adversarial term")
    towers: Towers = option(
        lambda: Towers(initial_bias=-4.0), "the critic's network; roles.prompt_critic.weights may name a run of contrastive"
    )
    template: str = option("{}", "{} is the caption, or the name of the class")


def prompt_critic_loss(
    towers: Callable[..., Tensor], real: Tensor, drawn: Tensor, tokens: Tensor, place: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """The sigmoid loss of real and drawn pictures with the prompts of all ranks, and the share of pictures on the right side of 0.

    y is 1 for a real picture with a prompt of its own words, -1 for every other pair. The sum over a rank's 2 B pictures and the prompts of
    all ranks is divided by 2 B.

    Args:
        real, drawn: [B, C, H, W] in [-1, 1], both of the same prompts.
        tokens: of the prompts, as `Towers.read` gives them.
        place: [B] int64, equal where the prompts are.
    """
    rows = len(real)
    found = unpack(towers(torch.cat([real, drawn]), torch.cat([tokens, tokens])))
    same = (place[:, None] == group.gather(place)).to(torch.int8).mul(2).sub(1)
    seen = torch.cat([same, torch.full_like(same, -1)]).unflatten(1, (-1, rows))
    labels = torch.cat([seen, torch.zeros_like(seen)], 2).flatten(1)  # the second copy of each rank's prompts is left out
    loss = sigmoid_contrastive_loss(*found, labels=labels, group=group)
    with torch.no_grad():
        logits = matches(found) + found.logit_bias
        right = ((logits[:rows] > 0).float().mean() + (logits[rows:] < 0).float().mean()) / 2
    return loss, right


def prompt_student_loss(towers: Callable[..., Tensor], drawn: Tensor, tokens: Tensor) -> Tensor:
    """Mean of softplus(-l_ii), l the logits of drawn pictures [B, C, H, W] with their own prompts: scalar."""
    found = unpack(towers(drawn, tokens))
    return softplus(-(matches(found) + found.logit_bias)).mean()

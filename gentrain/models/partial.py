"""A network of which only the parameters that a regular expression names learn; the others are those of a frozen one that roles share."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from gentrain.models.adapters import Base, OnBase, inner

_BACKBONE = "backbone."  # begins most names, and is none of diffusers'
_SHOWN = 5  # names in a message


def check_pattern(pattern: str) -> None:
    """Raises ValueError for what is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error


def chosen_parameters(network: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters in which `pattern` is found, with or without the leading "backbone.".

    Raises ValueError, with the names that are nearest, when there is none.
    """
    names = [name for name, p in network.named_parameters() if p.is_floating_point()]
    found = [name for name in names if any(re.search(pattern, each) for each in (name, name.removeprefix(_BACKBONE)))]
    if not found:
        literal = re.sub(r"\W+", ".", pattern)
        near = sorted(names, key=lambda name: -SequenceMatcher(None, literal, name, autojunk=False).find_longest_match().size)
        raise ValueError(f"{pattern!r} is found in no name of its {len(names)} parameters; the nearest are {', '.join(near[:_SHOWN])}")
    return found


class Partial(OnBase):
    """A shared network with some parameters of its own in place of the shared ones, which they are equal to at first.

    Args:
        pattern: see `chosen_parameters`, which raises ValueError.
    """

    def __init__(self, base: Base, pattern: str):
        super().__init__(base)
        self.own = nn.Module()
        self._names = chosen_parameters(base.network, pattern)
        parameters = dict(base.network.named_parameters())
        for name in self._names:
            *parents, last = name.split(".")
            below = parameters[name]
            own = nn.Parameter(below.detach().clone())
            if hasattr(below, "decays"):  # see decay_groups
                own.decays = below.decays  # type: ignore[attr-defined]
            inner(self.own, parents).register_parameter(last, own)

    @property
    def chosen(self) -> dict[str, nn.Parameter]:
        """Name in the network -> the parameter in its place. ZeRO-3 gathers those that are asked for within a forward."""
        return {name: self.own.get_parameter(name) for name in self._names}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = functional_call(self.base.network, {**self.chosen}, (x, *args), kwargs)
        return output

    def merged(self) -> dict[str, Tensor]:
        chosen, below = self.chosen, dict(self.base.network.named_parameters(remove_duplicate=False))
        own = {id(below[name]): p.detach().float() for name, p in chosen.items()}
        return self._below() | {name: own[id(p)].clone() for name, p in below.items() if id(p) in own}  # one may have several names

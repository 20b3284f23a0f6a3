"""A critic that reads the features of a network: small heads on the outputs of some of its layers, which alone learn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from gentrain.config import option
from gentrain.models.adapters import Base, OnBase

_BLOCKS = r"(^|\.)((down_blocks|transformer_blocks|single_transformer_blocks|layers)\.\d+|mid_block)$"


@dataclass
class Heads:
    """What the critic reads: the outputs of some layers of a network, at noised data and samples."""

    of: Literal["teacher", "fake_score"] = option(
        "teacher", "the frozen teacher (LADD, arXiv:2403.12015) or the fake score as it learns (DMD2, arXiv:2405.14867, section 4.3)"
    )
    layers: str = option(_BLOCKS, "regular expression of the layers' names; of layers in one another the outermost are read")
    width: PositiveInt = option(64, "hidden units of each layer's head")

    def __post_init__(self) -> None:
        try:
            re.compile(self.layers)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{self.layers!r} is no regular expression of layers ({error})") from error


def layers_of(network: nn.Module, pattern: str) -> list[str]:
    """Names of the outermost layers in whose names `pattern` is found. Raises ValueError when there are none."""
    found: list[str] = []
    for name, _ in network.named_modules():  # parents come before their children
        if name and re.search(pattern, name) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    if not found:
        names = sorted({name.split(".")[0] for name, _ in network.named_modules() if name})
        raise ValueError(f"{pattern!r} is found in no name of its layers; the outermost are {', '.join(names)}")
    return found


def channels_last(feature: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C]; tokens [B, N, C] and vectors [B, C] as they are."""
    return feature.movedim(1, -1) if feature.ndim == 4 else feature


class FeatureCritic(OnBase):
    """forward: as the network below -> logits [B, positions of all layers read], one of each position of each layer.

    A head is layer normalisation over the channels, a hidden layer and a logit, the same at each position. What is noised and with which
    condition the features tell. Gradients flow through the network below to x.

    Args:
        base: whose features are read.
        shapes: [B, ...] of each layer's output, by its name.
    """

    def __init__(self, base: Base, settings: Heads, shapes: dict[str, torch.Size]):
        super().__init__(base)
        self._layers, like, width = list(shapes), next(base.network.parameters()), settings.width
        with torch.device("meta" if like.is_meta else "cpu"):
            channels = [shape[1] if len(shape) == 4 else shape[-1] for shape in shapes.values()]
            heads = [nn.Sequential(nn.LayerNorm(count), nn.Linear(count, width), nn.SiLU(), nn.Linear(width, 1)) for count in channels]
            self.heads = nn.ModuleList(heads).to(like)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with reading(self.base.network, self._layers) as features:
            self.base.network(x, *args, **kwargs)
        dtype = next(self.parameters()).dtype
        logits = [head(channels_last(features[name]).to(dtype)).flatten(1) for name, head in zip(self._layers, self.heads, strict=True)]
        return torch.cat(logits, 1)


@contextmanager
def reading(network: nn.Module, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    """Within it, what each of the layers has given last; of several tensors the largest."""
    features: dict[str, Tensor] = {}
    inner = network.base.network if isinstance(network, OnBase) else network
    hooks = [inner.get_submodule(name).register_forward_hook(_keeping(features, name)) for name in layers]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def _keeping(features: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        given = [output] if isinstance(output, Tensor) else [each for each in output if isinstance(each, Tensor)]
        features[name] = max(given, key=Tensor.numel)

    return keep


def feature_shapes(network: nn.Module, settings: Heads, shape: tuple[int, ...]) -> dict[str, torch.Size]:
    """Of each layer that is read, for two samples of `shape`. Nothing is computed on the meta device.

    Raises ValueError when no layer has such a name, or one gives no tensor with channels.
    """
    inner = network.base.network if isinstance(network, OnBase) else network
    layers = layers_of(inner, settings.layers)
    device = next(network.parameters()).device
    with torch.no_grad(), reading(network, layers) as features:
        network(torch.zeros(2, *shape, device=device), torch.ones(2, device=device))
    for name in layers:
        if name not in features or features[name].ndim not in (2, 3, 4):
            raise ValueError(f"layer {name!r} gives no features [B, C], [B, N, C] or [B, C, H, W]; name others in critic_heads.layers")
    return {name: features[name].shape for name in layers}

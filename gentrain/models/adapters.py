"""LoRA adapters (arXiv:2106.09685) on a frozen network that several roles share."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from gentrain.config import option

_WORDS = {  # what stands for groups of layers -> their names, as diffusers' networks have them
    "attention": re.compile(r"(^|\.)(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"),
    "feed_forward": re.compile(
        r"(^|\.)ff(_context)?\.(net\.(0\.proj|2)|conv_inverted|conv_point)$"  # the convolutions are Sana's
        r"|(^|\.)single_transformer_blocks\.\d+\.(proj_mlp|proj_out)$"  # FLUX
    ),
}
_KINDS: dict[str, type[nn.Module]] = {"linear": nn.Linear, "convolutions": nn.Conv2d}


@dataclass
class Adapter:
    """What a role learns in place of its whole network: W + alpha / rank * B A in each layer that is named."""

    rank: NonNegativeInt = option(8, "of the change to each layer; 0 = the role learns its whole network", source="arXiv:2106.09685")
    alpha: PositiveFloat | None = option(None, "the change is scaled by alpha / rank; null = rank, a factor of 1")
    targets: tuple[str, ...] = option(
        ("attention",), "layers: attention, feed_forward, linear, convolutions (all of that kind), or ends of their names (to_q)"
    )

    def __post_init__(self) -> None:
        if self.rank and not self.targets:
            raise ValueError("targets is empty; name layers, such as [attention], or set rank to 0 to learn the whole network")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def target_layers(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the linear layers and convolutions that `targets` name. Raises ValueError for a target that names none."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    chosen: set[str] = set()
    for target in targets:
        if target in _KINDS:
            found = {name for name, module in layers.items() if isinstance(module, _KINDS[target]) and getattr(module, "groups", 1) == 1}
        elif target in _WORDS:
            found = {name for name in layers if _WORDS[target].search(name)}
        else:
            found = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not found:
            ends = sorted({name.split(".")[-1] for name in layers} | {*_WORDS, *_KINDS} - {target})
            near = difflib.get_close_matches(target, ends, 1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ends[:20])}"
            raise ValueError(f"no layer is called {target!r}; {remedy}")
        chosen |= found
    grouped = [name for name in chosen if getattr(layers[name], "groups", 1) != 1]
    if grouped:
        raise ValueError(f"{grouped[0]!r} is a grouped convolution, which takes no adapter; leave it out of the targets")
    return sorted(chosen)


class Base:
    """A frozen network that adapters share. Called as itself it is as if there were none.

    Layers that any adapter names get a hook, which adds what the adapter that is worn at the time makes of the layer's input.

    Args:
        live: the network is another role's that learns; it is left as that role's engine has it.
    """

    def __init__(self, network: nn.Module, live: bool = False):
        self.network, self.live = network if live else network.eval().requires_grad_(False), live
        self.digest = ""  # see `digest_of`; before its weights were rounded or shared out
        self._worn: Adapted | None = None
        self._hooked: set[str] = set()

    @contextmanager
    def wearing(self, adapter: Adapted) -> Iterator[None]:
        """Within it the layers give what they would with the adapter."""
        assert self._worn is None
        self._worn = adapter
        try:
            yield
        finally:
            self._worn = None

    def hook(self, name: str) -> None:
        if name not in self._hooked:
            self._hooked.add(name)
            self.network.get_submodule(name).register_forward_hook(self._adding(name))

    def _adding(self, name: str) -> Callable[..., Tensor | None]:
        def add(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            change = self._worn.change(name) if self._worn is not None else None
            return None if change is None else output + change(arguments[0])

        return add


class OnBase(nn.Module):
    """What a role learns on a frozen network that several share. Its parameters and its state are that alone.

    Args:
        base: stays as it is, in evaluation mode; moved along by `to`.
    """

    def __init__(self, base: Base):
        super().__init__()
        self._base = (base,)  # in a tuple: not a part of this module, whose parameters an engine shares out and saves

    @property
    def base(self) -> Base:
        return self._base[0]

    def merged(self) -> dict[str, Tensor]:
        """The weights of a network of its own that does the same, float32."""
        raise NotImplementedError

    def fold(self) -> nn.Module:
        """The base with its weights replaced by `merged`: for a base that nothing else shares."""
        self.base.network.load_state_dict(self.merged())
        return self.base.network

    def _apply(self, fn: Any, recurse: bool = True) -> OnBase:
        placed = self.base.live or any(hasattr(p, "ds_id") for p in self.base.network.parameters())  # ZeRO-3 does what it has shared out
        if not placed:
            self.base.network._apply(fn)
        super()._apply(fn, recurse)
        return self

    def _below(self) -> dict[str, Tensor]:
        """A copy of the base's state, float32."""
        state = self.base.network.state_dict()
        return {name: value.detach().float().clone() if value.is_floating_point() else value for name, value in state.items()}


class Adapted(OnBase):
    """A shared network with one adapter on.

    Args:
        adapter: of rank 1 or more. A is drawn from torch's global generator, B is zero, so that at first nothing changes.

    Raises ValueError when a target names no layer.
    """

    def __init__(self, base: Base, adapter: Adapter):
        super().__init__(base)
        self.settings = adapter
        self.adapter = nn.Module()
        self._changes: dict[str, _Change] = {}
        names = target_layers(base.network, adapter.targets)
        most = max(_rank(base.network.get_submodule(name)) for name in names)
        if adapter.rank > most:
            raise ValueError(f"an adapter of rank {adapter.rank} on layers whose weights have at most {most}; lower its rank")
        for name in names:
            layer: Any = base.network.get_submodule(name)
            base.hook(name)
            self._changes[name] = change = _Change(layer, adapter.rank, adapter.scale).to(layer.weight)
            *parents, last = name.split(".")
            inner(self.adapter, parents).add_module(last, change)

    @property
    def targets(self) -> list[str]:
        """Names of the layers that it changes."""
        return list(self._changes)

    def change(self, name: str) -> Callable[[Tensor], Tensor] | None:
        return self._changes.get(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self.base.wearing(self):
            output: Tensor = self.base.network(x, *args, **kwargs)
        return output

    def merged(self) -> dict[str, Tensor]:
        state = self._below()
        for name, change in self._changes.items():  # W + alpha / rank * B A
            state[f"{name}.weight"] += change.delta()
        return state


def _rank(layer: Any) -> int:
    """The most that the rank of its weight can be."""
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features)
    return min(layer.in_channels * math.prod(layer.kernel_size), layer.out_channels)


class _Change(nn.Module):
    """x -> scale * B(A(x)) for a linear layer or a convolution."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.lora_A: nn.Linear | nn.Conv2d
        self.lora_B: nn.Linear | nn.Conv2d
        with torch.device("meta" if layer.weight.is_meta else "cpu"):
            if isinstance(layer, nn.Linear):
                self.lora_A, self.lora_B = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
            else:
                self.lora_A = nn.Conv2d(
                    layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False,  # type: ignore[arg-type]
                    padding_mode=layer.padding_mode,
                )  # fmt: skip
                self.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lora_B(self.lora_A(x)) * self.scale
        return output

    def delta(self) -> Tensor:
        """What is added to the layer's weight, float32."""
        a, b = self.lora_A.weight.detach().float(), self.lora_B.weight.detach().float()
        product = (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
        return product * self.scale


def inner(root: nn.Module, parts: Sequence[str]) -> nn.Module:
    """The submodule of `root` with a dotted name, in its parts; made where it is not there."""
    for part in parts:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def digest_of(state: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes and float32 values: which weights an adapter was trained on."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().float().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Branches by which a network obeys a control that it did not know: copies of its first half, added through layers that are zero at first.

ControlNet's construction (arXiv:2302.05543) for networks for which diffusers has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from gentrain.models.base import Condition

CONTROL = "control"  # the entry of the condition: [B] int64, or [B, *shape] float


@dataclass(frozen=True)
class Form:
    """What a control is: one of `classes`, or where that is 0 a tensor of `shape`, (k,) or (C, H, W)."""

    shape: tuple[int, ...] = ()
    classes: int = 0


def control_in(branch: nn.Module | None, condition: Condition | None) -> Tensor | None:
    """The control that a branch is to add; None: the network is to be what it was without the branch."""
    return condition.get(CONTROL) if branch is not None and condition is not None else None


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer with all its weights 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


@contextmanager
def adding(modules: Sequence[nn.Module], added: Sequence[Any]) -> Iterator[None]:
    """Within it each module's output has something added: a tensor, or for an output (hidden, skips) a tensor to each of the skips."""

    def hook(more: Any) -> Any:
        def add(module: nn.Module, arguments: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return output + more
            hidden, skips = output
            return hidden, tuple(skip + each for skip, each in zip(skips, more, strict=True))

        return add

    with ExitStack() as stack:
        for module, more in zip(modules, added, strict=True):
            stack.callback(module.register_forward_hook(hook(more)).remove)
        yield


class Hint(nn.Module):
    """A control as a vector [B, width], or, of an image and with a grid, as [B, width, H, W] on that grid.

    Raises ValueError when the sides of the image are no multiples of those of the grid.
    """

    def __init__(self, form: Form, width: int, grid: tuple[int, int] | None = None):
        super().__init__()
        self.block = 1
        if form.classes:
            self.layers: nn.Module = nn.Embedding(form.classes, width)
        elif len(form.shape) == 1:
            self.layers = nn.Linear(form.shape[0], width)
        elif grid is None:
            raise ValueError(f"a control of shape {form.shape} is for networks on images")
        else:
            channels, height, width_ = form.shape
            self.block = height // grid[0]
            if (grid[0] * self.block, grid[1] * self.block) != (height, width_):
                raise ValueError(f"a control of {height}x{width_} does not lie on a grid of {grid[0]}x{grid[1]}")
            first, second = nn.Conv2d(channels * self.block**2, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
            self.layers = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, control: Tensor) -> Tensor:
        if not control.is_floating_point():
            return self.layers(control)
        control = control.to(next(self.parameters()).dtype)
        return self.layers(pixel_unshuffle(control, self.block) if control.ndim == 4 else control)


class MLPControl(nn.Module):
    """Of an `MLPNetwork`: a copy of its layers that sees the control, added after each of them."""

    def __init__(self, network: Any, form: Form):
        super().__init__()
        width = network.input.out_features
        self.hint = Hint(form, width)
        self.input, self.layers = deepcopy(network.input), deepcopy(network.layers)
        self.zeros = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in self.layers)

    def begin(self, network: Any) -> None:
        """Becomes a copy of the network, whose weights have been given to it since."""
        self.input.load_state_dict(network.input.state_dict())
        self.layers.load_state_dict(network.layers.state_dict())

    def forward(self, x: Tensor, embedding: Tensor, control: Tensor) -> list[Tensor]:
        """What is added to the hidden [B, width] after each layer."""
        embedding, hidden, added = embedding + self.hint(control), self.input(x), []
        for layer, zero in zip(self.layers, self.zeros, strict=True):
            hidden = hidden + layer(nn.functional.silu(hidden + embedding))
            added.append(zero(hidden))
        return added


class UNetControl(nn.Module):
    """Of diffusers' UNet2DModel: a copy of its way down and its middle that sees the control, added to the skips and to the middle."""

    def __init__(self, unet: Any, form: Form):
        super().__init__()
        widths = unet.config.block_out_channels
        embedded = unet.time_embedding.linear_2.out_features
        self.hint = Hint(form, widths[0], tuple(unet.config.sample_size)) if len(form.shape) == 3 else Hint(form, embedded)
        self.conv_in, self.down_blocks, self.mid_block = (deepcopy(part) for part in (unet.conv_in, unet.down_blocks, unet.mid_block))
        self.zeros = nn.ModuleList(
            nn.ModuleList(zeroed(nn.Conv2d(width, width, 1)) for _ in range(len(block.resnets) + (block.downsamplers is not None)))
            for width, block in zip(widths, unet.down_blocks, strict=True)
        )
        self.zero = zeroed(nn.Conv2d(widths[-1], widths[-1], 1))

    def begin(self, unet: Any) -> None:
        for name in ("conv_in", "down_blocks", "mid_block"):
            getattr(self, name).load_state_dict(getattr(unet, name).state_dict())

    @contextmanager
    def steering(self, unet: Any, sample: Tensor, t: Tensor, labels: Any, control: Tensor) -> Iterator[None]:
        """Within it the UNet, called on the same, obeys the control."""
        embedding = unet.time_embedding(unet.time_proj(t).to(sample.dtype))
        if unet.class_embedding is not None:
            embedding = embedding + unet.class_embedding(labels)
        hidden, hint = self.conv_in(sample), self.hint(control)
        hidden, embedding = (hidden + hint, embedding) if hint.ndim == 4 else (hidden, embedding + hint)
        added: list[Any] = []
        zeros: Any
        for block, zeros in zip(self.down_blocks, self.zeros, strict=True):
            hidden, skips = block(hidden_states=hidden, temb=embedding)
            added.append([zero(skip) for zero, skip in zip(zeros, skips, strict=True)])
        added.append(self.zero(self.mid_block(hidden, embedding)))
        with adding([*unet.down_blocks, unet.mid_block], added):
            yield


class TransformerControl(nn.Module):
    """Of diffusers' DiTTransformer2DModel and PixArtTransformer2DModel: a copy of the first half of their blocks that sees the control,
    added after each of these.

    As PixArt-delta's ControlNet-Transformer (arXiv:2401.05252, section 4).

    Args:
        grid: rows and columns of tokens, over which an image lies. Raises ValueError where it does not.
    """

    def __init__(self, transformer: Any, form: Form, grid: tuple[int, int]):
        super().__init__()
        width = transformer.inner_dim
        self.hint = Hint(form, width, grid)
        self.blocks = deepcopy(transformer.transformer_blocks[: (len(transformer.transformer_blocks) + 1) // 2])
        self.zeros = nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in self.blocks)

    def begin(self, transformer: Any) -> None:
        self.blocks.load_state_dict(transformer.transformer_blocks[: len(self.blocks)].state_dict())

    @contextmanager
    def steering(self, transformer: Any, sample: Tensor, t: Tensor, labels: Any, control: Tensor) -> Iterator[None]:
        """Within it the transformer obeys the control. What its blocks are called with beside their tokens, the copies are, too."""
        hint, hidden = self.hint(control), None
        hint = hint.flatten(2).transpose(1, 2) if hint.ndim == 4 else hint[:, None]

        def hook(copy: nn.Module, zero: nn.Module) -> Any:
            def add(module: nn.Module, arguments: Any, more: Any, output: Tensor) -> Tensor:
                nonlocal hidden
                hidden = copy(arguments[0] + hint if hidden is None else hidden, *arguments[1:], **more)
                return output + zero(hidden)

            return add

        with ExitStack() as stack:
            for block, copy, zero in zip(transformer.transformer_blocks, self.blocks, self.zeros, strict=False):  # the first half
                stack.callback(block.register_forward_hook(hook(copy, zero), with_kwargs=True).remove)
            yield


def branch_of(backbone: Any, form: Form) -> UNetControl | TransformerControl:
    """The branch for a backbone of diffusers. Raises ValueError when the form does not suit it."""
    if hasattr(backbone, "mid_block"):
        return UNetControl(backbone, form)
    side = backbone.config.sample_size // backbone.config.patch_size
    return TransformerControl(backbone, form, (side, side))

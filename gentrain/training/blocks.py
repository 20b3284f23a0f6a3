"""What may be done to each block of a network: computing it again in the backward instead of keeping what it saw, and compiling it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost lists of modules: levels of a UNet, with the parts of its middle, or layers of a transformer."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if block is not None)  # diffusers leaves places empty
        else:
            yield from blocks_of(child)


def recompute(network: nn.Module) -> None:
    """Has each block keep its inputs only, and run again, with the same dropout, when a backward comes to it (arXiv:1604.06174)."""
    for block in blocks_of(network):
        _recompute_block(block)


def _recompute_block(block: nn.Module) -> None:
    once = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # reentrant checkpointing would show engines each gradient twice
        return checkpoint(once, *args, use_reentrant=False, **kwargs)

    block.forward = forward


def compile_blocks(network: nn.Module) -> None:
    """Compiles each block by itself as it is first called, at fixed shapes: alike blocks share what is compiled."""
    for block in blocks_of(network):
        block.compile(dynamic=False)

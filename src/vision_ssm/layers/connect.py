"""SparX's connections across the blocks of any other network.

The blocks stay as they are: what a ganglion layer aggregates is added to its block's input, times a scale that starts
at zero. So the network initially computes what it did before, and pretrained weights remain useful.

Source: SparX, arXiv 2409.09649 (AAAI 2025), for the connections and the aggregator; the way of adding them is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor, nn

from vision_ssm.layers.sparx import DMCA, Connections, sparx_connections


class Layout:
    """How the inputs and outputs of blocks represent maps."""

    def to_map(self, x: Tensor) -> Tensor:
        """Convert a block's input or output to a map, (B, H, W, C)."""
        raise NotImplementedError

    def from_map(self, x: Tensor) -> Tensor:
        """Convert a map, (B, H, W, C), to the layout of the blocks."""
        raise NotImplementedError


@dataclass(frozen=True)
class NHWC(Layout):
    """Maps (B, H, W, C), as in Swin and in this package."""

    def to_map(self, x: Tensor) -> Tensor:
        """See :meth:`Layout.to_map`."""
        return x

    def from_map(self, x: Tensor) -> Tensor:
        """See :meth:`Layout.from_map`."""
        return x


@dataclass(frozen=True)
class NCHW(Layout):
    """Maps (B, C, H, W), as in ConvNeXt and ResNet."""

    def to_map(self, x: Tensor) -> Tensor:
        """See :meth:`Layout.to_map`."""
        return x.permute(0, 2, 3, 1)

    def from_map(self, x: Tensor) -> Tensor:
        """See :meth:`Layout.from_map`."""
        return x.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Tokens(Layout):
    """Sequences (B, prefix + height * width, C), row by row, as in ViT.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        prefix: Number of tokens before the grid, such as a class token; they are not connected.

    Raises:
        ValueError: If a number is out of range.
    """

    height: int
    width: int
    prefix: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("height", self.height, 1), ("width", self.width, 1), ("prefix", self.prefix, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def to_map(self, x: Tensor) -> Tensor:
        """See :meth:`Layout.to_map`."""
        return x[:, self.prefix :].unflatten(1, (self.height, self.width))

    def from_map(self, x: Tensor) -> Tensor:
        """See :meth:`Layout.from_map`; the tokens before the grid are zero."""
        return F.pad(x.flatten(1, 2), (0, 0, self.prefix, 0))


class Ganglion(nn.Module):
    """A block with an aggregator added to its input: block(x + scale * proj(DMCA(norm(x), shortcut))).

    Args:
        block: The block.
        dim: Channels; divisible by 4.
        sources: Number of earlier maps.
        layout: How the block takes its input.
        reduction: See :class:`vision_ssm.layers.DMCA`.
        device: Device of the new parameters.
        dtype: Dtype of the new parameters.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        sources: int,
        layout: Layout,
        *,
        reduction: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layout = layout
        self.norm = nn.LayerNorm(dim, **dd)
        self.dmca = DMCA(dim, dim, sources, reduction=reduction, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.scale = nn.Parameter(torch.zeros(dim, **dd))
        self.block = block

    def forward(self, x: Tensor, shortcut: list[Tensor] | tuple[Tensor, ...] | None = None) -> Tensor:
        """Transform ``x``, which like the earlier maps in ``shortcut`` has the block's layout.

        Raises:
            RuntimeError: If ``shortcut`` is missing because the network calls its blocks one by one.
        """
        if shortcut is None:
            raise RuntimeError(
                "connected blocks run as a whole, not one by one; for gradient checkpointing call "
                "set_grad_checkpointing() of what connect() returned, not the network's own"
            )
        maps = [self.layout.to_map(y) for y in shortcut]
        y = self.proj(self.dmca(self.norm(self.layout.to_map(x)), maps))
        return self.block(x + self.layout.from_map(self.scale * y))


class Connected(nn.Sequential):
    """Blocks run one after the other, connected by SparX's rule; made by :func:`connect`.

    The blocks keep their numbers, so timm's layer decay still applies.

    Args:
        blocks: The blocks, each a :class:`Ganglion` where it reads any map.
        connections: Which block reads which maps.
    """

    def __init__(self, blocks: Sequence[nn.Module], connections: Connections) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False
        self.connections = connections

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward(self, input: Tensor) -> Tensor:
        """Run the blocks; input and output have the blocks' layout."""
        blocks: list[Callable[..., Tensor]] = list(self)
        if self.grad_checkpointing:
            blocks = [partial(checkpoint, block) for block in blocks]
        return self.connections.run(blocks, input)


def connect(
    blocks: Iterable[nn.Module],
    dim: int,
    layout: Layout,
    *,
    step: int = 1,
    start: int = 0,
    window: int | None = None,
    reduction: int = 1,
) -> Connected:
    """Connect the blocks of any network, such as those of a ConvNeXt stage or a ViT, by SparX's rule.

    A ganglion block gets x + scale * proj(DMCA(norm(x), shortcut)) in place of its input x. The scale is per channel
    and starts at zero, so that the outputs are at first what they were, bit by bit.

    Args:
        blocks: The blocks, in order; each of one argument, and keeping its shape. They are taken over, not copied.
        dim: Channels; divisible by 4.
        layout: Layout of the inputs and outputs of the blocks: :class:`NCHW`, :class:`NHWC` or :class:`Tokens`.
        step: Distance between ganglion blocks, which are counted back from the last block. S in the paper.
        start: First block that may be a ganglion block.
        window: Number of earlier ganglion blocks that one reads; ``None`` for all. M in the paper.
        reduction: Factor by which the aggregator's queries and keys are smaller than the map, in height and in width.

    Returns:
        One module in place of the blocks; its new parameters have the device and dtype of the blocks.

    Raises:
        TypeError: If ``layout`` is not a :class:`Layout`.
        ValueError: If there are no blocks, or a number is out of range.
    """
    blocks = list(blocks)
    if not blocks:
        raise ValueError("blocks must hold at least one block, got none")
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be NCHW(), NHWC(), Tokens(height, width) or another Layout, got {layout!r}")
    connections = sparx_connections(len(blocks), step, start, window)
    parameter = next((p for block in blocks for p in block.parameters()), torch.empty(0))
    options: dict[str, Any] = dict(reduction=reduction, device=parameter.device, dtype=parameter.dtype)
    ganglia = [
        Ganglion(block, dim, len(maps), layout, **options) if maps else block
        for block, maps in zip(blocks, connections.reads, strict=True)
    ]
    return Connected(ganglia, connections)

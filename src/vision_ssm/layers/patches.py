"""Patches of images and maps, padded with zeros at the bottom and the right; for any height and width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import has_static_value


def symbolic(height: int, width: int) -> bool:
    """Return whether a graph for many sizes is being made."""
    # torch.jit.trace has tensors here; the symbols of torch.compile look like int.
    return any(isinstance(length, Tensor) or not has_static_value(length) for length in (height, width))


def pad_map(x: Tensor, height: int, width: int) -> Tensor:
    """Pad a map, (B, H, W, C), with zeros at the bottom and the right, to (B, height, width, C)."""
    if not symbolic(height, width) and x.shape[1:3] == (height, width):
        return x  # padding by zero would copy
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))


def channels_last(x: Tensor) -> Tensor:
    """Return images, (B, C, H, W), that lie in memory as maps do; ``vmap`` has no rule for memory formats."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def channels_first(x: Tensor) -> Tensor:
    """View a map, (B, H, W, C), as (B, C, H, W); one leaf of an FX graph.

    In a graph for many sizes it is a copy: for a view, torch's batch norm would guard on the strides.
    """
    x = x.permute(0, 3, 1, 2)
    return x.contiguous() if symbolic(*x.shape[2:]) else x


def cells(x: Tensor) -> Tensor:
    """Split a map, (B, H, W, C), into cells of 2x2 tokens, each column by column: (B, ceil(H/2), ceil(W/2), 4, C).

    One leaf of an FX graph. A graph for many sizes must not compare those of the map before and after the padding.
    """
    batch, height, width, channels = x.shape
    if symbolic(height, width):
        x = pad_map(x, height + 1, width + 1)
        top, bottom = x[:, :-1:2], x[:, 1::2]
        return torch.stack([top[:, :, :-1:2], bottom[:, :, :-1:2], top[:, :, 1::2], bottom[:, :, 1::2]], dim=3)
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = pad_map(x, 2 * rows, 2 * columns).reshape(batch, rows, 2, columns, 2, channels)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)


def _whole_patches(x: Tensor, size: int) -> Tensor:
    """Pad images, (B, C, H, W), to at least whole patches; one leaf of an FX graph."""
    height, width = x.shape[2:]
    if symbolic(height, width):
        return F.pad(x, (0, size - 1, 0, size - 1))
    if height % size or width % size:
        return F.pad(x, (0, -width % size, 0, -height % size))
    return x


torch.fx.wrap("channels_first")
torch.fx.wrap("cells")
torch.fx.wrap("_whole_patches")


class PatchEmbed(nn.Module):
    """Convolution of stride ``patch_size`` and LayerNorm: (B, in_chans, H, W) to (B, ceil(H/p), ceil(W/p), dim).

    As timm's ``PatchEmbed``, with its names.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the map.
        patch_size: p, side of a patch.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If ``patch_size`` is below 1.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {patch_size}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image."""
        x = channels_last(_whole_patches(x, self.patch_size))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # the convolution ignores an incomplete last patch


class PatchMerging(nn.Module):
    """LayerNorm and linear layer of 2x2 tokens: (B, H, W, in_dim) to (B, ceil(H/2), ceil(W/2), dim).

    As timm's ``PatchMerging``, with its names. Padding counts in the norm.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self, in_dim: int, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * in_dim, **dd)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve a map."""
        return self.reduction(self.norm(cells(x).flatten(3)))

"""Convolutions of channels-last maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_ssm.scan.transforms import unobserved


def conv_act(x: Tensor, conv: nn.Module, act: nn.Module | None = None) -> Tensor:
    """Apply a convolution and an activation to a map.

    Args:
        x: Map, (B, H, W, C).
        conv: The convolution.
        act: The activation; ``None`` for none.

    Returns:
        Map, (B, H', W', C').
    """
    y = conv(x.permute(0, 3, 1, 2))
    return (y if act is None else act(y)).permute(0, 2, 3, 1)


def add_product(total: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return ``total + x factor``, in inference in the memory of ``total``, which nothing else may need.

    ``total`` and ``x`` have one shape.
    """
    if unobserved(total) and total.dtype == torch.result_type(total, x) == torch.result_type(total, factor):
        return total.addcmul_(x, factor)
    return torch.addcmul(total, x, factor)


class ResidualConv(nn.Module):
    """Depthwise 3x3 convolution of a map, (B, H, W, C), added to the map, and an activation.

    Args:
        dim: Channels.
        act: The activation; ``None`` for none.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        act: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.act = nn.Identity() if act is None else act
        self.residual = True  # false where the kernel adds the map

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map."""
        y = conv_act(x, self.conv)
        return self.act(x + y if self.residual else y)

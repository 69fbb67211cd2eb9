"""Norms of channels-last maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm1(nn.GroupNorm):
    """Group normalization with one group, of maps (B, H, W, C): statistics over the whole map of an image.

    Args:
        dim: Channels.
        eps: Added to the variance.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(1, dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a map."""
        x = x.permute(0, 3, 1, 2)
        return F.group_norm(x, 1, self.weight, self.bias, self.eps).permute(0, 2, 3, 1)

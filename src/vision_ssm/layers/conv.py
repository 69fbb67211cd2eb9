"""Convolutions of maps whose channels lie last, in one pass with their activation where a CPU only infers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.layers.mlp import hooked, onednn_serves


def conv_act(x: Tensor, conv: nn.Conv2d, act: nn.Module | None = None) -> Tensor:
    """Apply a convolution and an activation to a map.

    Without gradients on a CPU both are one kernel, and grouped 1x1 convolutions take half of the time that
    ``F.conv2d`` needs for them.

    Args:
        x: Map, (B, H, W, C).
        conv: The convolution.
        act: The activation; ``None`` for none.

    Returns:
        Map, (B, H', W', C').
    """
    x = x.permute(0, 3, 1, 2)
    y = _fused(x, conv, conv.weight, act) if type(conv) is nn.Conv2d and not hooked(conv) else None
    if y is None:
        y = conv(x) if act is None else act(conv(x))
    return y.permute(0, 2, 3, 1)


def group_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each group of channels with a matrix of its own.

    Args:
        x: Map, (B, H, W, groups * in_dim).
        weight: (groups, out_dim, in_dim).

    Returns:
        Map, (B, H, W, groups * out_dim).
    """
    groups, out_dim, in_dim = weight.shape
    if onednn_serves(x, weight):  # as a convolution, in half of the time
        kernel = weight.view(groups * out_dim, in_dim, 1, 1)
        sizes = [0, 0], [1, 1], [1, 1], groups
        x = x.permute(0, 3, 1, 2)
        return torch.ops.mkldnn._convolution_pointwise(x, kernel, None, *sizes, "none", [], "none").permute(0, 2, 3, 1)
    batch, height, width, _ = x.shape
    y = torch.bmm(x.reshape(-1, groups, in_dim).transpose(0, 1), weight.mT)  # (groups, tokens, out_dim)
    return torch.cat(y.unbind(), -1).reshape(batch, height, width, groups * out_dim)


class ResidualConv(nn.Conv2d):
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
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        """Transform a map."""
        x = input.permute(0, 3, 1, 2)
        y = None
        if onednn_serves(x, self.weight):
            # The map itself is a one in the middle of the kernel.
            y = _fused(x, self, self.weight + F.pad(self.weight.new_ones(1, 1), (1, 1, 1, 1)), self.act)
        if y is None:
            y = x + super().forward(x)
            y = y if self.act is None else self.act(y)
        return y.permute(0, 2, 3, 1)


# What oneDNN calls them, by exact type: a subclass may compute something else.
_ONEDNN: dict[type, str] = {type(None): "none", nn.GELU: "gelu", nn.SiLU: "swish"}


def _fused(x: Tensor, conv: nn.Conv2d, weight: Tensor, act: nn.Module | None) -> Tensor | None:
    """Return the activated convolution, (B, C, H, W), by ``weight``; ``None`` where oneDNN does not serve."""
    name = None if act is not None and hooked(act) else _ONEDNN.get(type(act))
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    if name is None or getattr(act, "approximate", "none") != "none" or not plain or not onednn_serves(x, weight):
        return None
    sizes = conv.padding, conv.stride, conv.dilation, conv.groups
    return torch.ops.mkldnn._convolution_pointwise(x, weight, conv.bias, *sizes, name, [], "none")

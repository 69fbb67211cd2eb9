"""Convolutions of channels-last maps, on oneDNN's fused kernels where a CPU only infers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_ssm.layers.mlp import serves_onednn

# What oneDNN calls them.
_FUSED: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.SiLU: "swish"}


def conv_act(x: Tensor, conv: nn.Conv2d, act: nn.Module) -> Tensor:
    """Return ``act(conv(x))`` of a channels-last map, (B, H, W, C), as one."""
    x = x.permute(0, 3, 1, 2)
    # By exact type: a subclass may compute something else.
    fused = _FUSED.get(type(act)) if getattr(act, "approximate", "none") == "none" else None
    # An adapter or a hook in place of either must see its own input and output.
    plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    hooked = any((m._forward_hooks or m._forward_pre_hooks) for m in (conv, act))
    if fused is not None and plain and not hooked and serves_onednn(x, conv.weight):
        sizes = conv.padding, conv.stride, conv.dilation, conv.groups
        y = torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *sizes, fused, [], "none")
    else:
        y = act(conv(x))
    return y.permute(0, 2, 3, 1)

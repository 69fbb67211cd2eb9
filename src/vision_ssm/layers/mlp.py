"""Linear layers and the MLP of the blocks, on oneDNN's fused kernels where a CPU only infers.

``F.linear`` in float32 runs on MKL, which here takes 10 to 20 % longer than oneDNN's product, and knows no fused
activation. torch has the latter for its compiler, without a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.eager import unobserved


def onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN's fused kernels may take this input and weight: only inference, on a CPU that has them."""
    if not unobserved(x) or x.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu") or x.numel() == 0:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def hooked(*modules: nn.Module) -> bool:
    """Return whether a hook of one of them must see its module's own input or output."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def _fused(x: Tensor, layer: nn.Linear, activation: str) -> Tensor | None:
    """Return the layer's output after an activation ("none" or "gelu"), or ``None`` where oneDNN does not serve."""
    if not onednn_serves(x, layer.weight):
        return None
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, activation, [], "none")


def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply batches of rows with a matrix each: (K, rows, in) with (K, out, in) to (K, rows, out)."""
    if onednn_serves(x, weight):  # one matrix after the other, in a third to a half of MKL's time for the batch
        pairs = zip(x, weight, strict=True)
        return torch.stack([torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "none") for a, b in pairs])
    return x @ weight.mT


class Linear(nn.Linear):
    """``nn.Linear``, faster where a CPU only infers."""

    def forward(self, input: Tensor) -> Tensor:
        """See :class:`torch.nn.Linear`."""
        y = _fused(input, self, "none")
        return F.linear(input, self.weight, self.bias) if y is None else y


class Mlp(nn.Module):
    """Linear, GELU, linear, as timm's ``Mlp`` with its names.

    Args:
        dim: Channels of input and output.
        hidden: Channels in between.
        drop: Dropout rate after the activation and at the end.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis."""
        fc1, act = self.fc1, self.act
        # An adapter or a hook in place of either must see its own input and output.
        plain = type(fc1) is Linear and type(act) is nn.GELU and act.approximate == "none"
        y = _fused(x, fc1, "gelu") if plain and not hooked(fc1, act) and not self.training else None
        y = self.drop1(act(fc1(x)) if y is None else y)
        return self.drop2(self.fc2(y))

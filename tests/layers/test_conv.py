"""Convolutions of maps whose channels lie last."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_ssm.layers import ResidualConv, conv_act


def test_convolution_and_activation() -> None:
    conv = nn.Conv2d(12, 7, 3, stride=2, padding=1)
    x = torch.randn(2, 9, 6, 12)
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.equal(conv_act(x, conv), expected)
    assert torch.equal(conv_act(x, conv, nn.SiLU()), F.silu(expected))
    assert conv_act(x, conv).is_contiguous()


@pytest.mark.parametrize("act", [None, nn.GELU()], ids=str)
def test_residual_convolution(act: nn.Module | None) -> None:
    layer = ResidualConv(12, act)
    x = torch.randn(2, 9, 6, 12)
    expected = x + F.conv2d(x.permute(0, 3, 1, 2), layer.conv.weight, layer.conv.bias, padding=1, groups=12).permute(
        0, 2, 3, 1
    )
    torch.testing.assert_close(layer(x), expected if act is None else act(expected))

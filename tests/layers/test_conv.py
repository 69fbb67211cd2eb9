"""The fused convolution and activation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vision_ssm.layers import conv_act


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inference_computes_the_same(act: nn.Module, dtype: torch.dtype) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, dtype=dtype)
    x = torch.randn(2, 5, 7, 8, dtype=dtype)
    expected = act(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    with torch.no_grad():
        found = conv_act(x, conv, act)
    assert found.is_contiguous()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)


def test_hooks_are_called() -> None:
    conv, act = nn.Conv2d(8, 8, 3, padding=1), nn.GELU()
    seen: list[nn.Module] = []
    for module in (conv, act):
        module.register_forward_hook(lambda m, _i, _y: seen.append(m))
    with torch.no_grad():
        conv_act(torch.randn(1, 4, 4, 8), conv, act)
    assert seen == [conv, act]

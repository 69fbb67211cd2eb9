"""Convolutions on oneDNN's kernels in inference agree with PyTorch's, and step aside where they must."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vision_ssm.layers import ResidualConv, conv_act
from vision_ssm.layers import conv as module
from vision_ssm.layers.conv import group_linear

CONVS = {
    "depthwise": lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12),
    "grouped": lambda: nn.Conv2d(12, 21, 1, groups=3),
    "dense": lambda: nn.Conv2d(12, 7, 3, stride=2, padding=1, bias=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("act", [None, nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("kind", CONVS)
def test_convolution_and_activation(kind: str, act: nn.Module | None, dtype: torch.dtype) -> None:
    conv = CONVS[kind]().to(dtype)
    x = torch.randn(2, 9, 6, 12, dtype=dtype)
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = expected if act is None else act(expected)
    torch.testing.assert_close(conv_act(x, conv, act), expected, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        y = conv_act(x, conv, act)
    assert y.is_contiguous()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("act", [None, nn.GELU()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_residual_convolution(dtype: torch.dtype, act: nn.Module | None) -> None:
    conv = ResidualConv(12, act).to(dtype)
    x = torch.randn(2, 9, 6, 12, dtype=dtype)
    wide = copy.deepcopy(conv).double()
    expected = x.double() + nn.functional.conv2d(
        x.double().permute(0, 3, 1, 2), wide.weight, wide.bias, padding=1, groups=12
    ).permute(0, 2, 3, 1)
    expected = expected if act is None else act(expected)
    # twice the spacing of the numbers of a dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(conv(x).double(), expected, rtol=tolerance, atol=tolerance)
    with torch.inference_mode():
        y = conv(x)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_group_linear(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 5, 3, 12, dtype=dtype), torch.randn(3, 7, 4, dtype=dtype)
    expected = torch.cat([part @ w.T for part, w in zip(x.double().chunk(3, -1), weight.double(), strict=True)], -1)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(group_linear(x, weight).double(), expected, rtol=tolerance, atol=tolerance)
    with torch.inference_mode():
        y = group_linear(x[:, :, ::2], weight)
    torch.testing.assert_close(y.double(), expected[:, :, ::2], rtol=tolerance, atol=tolerance)


def test_hooks_see_what_modules_take_and_give() -> None:
    conv, act = CONVS["grouped"](), nn.GELU()
    x = torch.randn(1, 5, 5, 12)
    seen = []
    for part in (conv, act):
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        with torch.inference_mode():
            conv_act(x, conv, act)
        handle.remove()
    assert len(seen) == 2


def test_inference_takes_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_serves", lambda *_: True)
    conv = ResidualConv(12, nn.GELU())
    with torch.no_grad(), torch.profiler.profile() as recorded:
        conv(torch.randn(1, 5, 5, 12))
    names = {event.name for event in recorded.events()}
    assert "mkldnn::_convolution_pointwise" in names
    assert "aten::gelu" not in names

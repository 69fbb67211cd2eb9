"""VMamba's own options and initialization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from vision_ssm.models import VMamba
from vision_ssm.scan import ROWS, Reversed, Snake

TINY: dict[str, Any] = dict(dims=(8, 16), depths=(1, 2), num_classes=3)


@pytest.mark.parametrize(("stem_stride", "side"), [(1, 4), (2, 2), (4, 1)])
def test_stem_stride(stem_stride: int, side: int) -> None:
    model = timm.create_model("vmamba_atto", stem_stride=stem_stride, features_only=True)
    maps = model(torch.randn(1, 3, 32, 32))
    assert [y.shape[2] for y in maps] == [8 * side, 4 * side, 2 * side, side]
    assert model.feature_info.reduction() == [stem_stride * 2**i for i in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stem_stride=3), "stem_stride must be one of 1, 2, 4, got 3"),
        (dict(output_stride=16), "output_stride must be 8, the network's own, got 16"),
        (dict(dims=(8, 16, 32)), "got 3 and 2"),
        (dict(dims=(), depths=()), "got 0 and 0"),
        (dict(dims=(1, 2)), r"dims\[0\] must be at least 2, got 1"),
        (dict(in_chans=0), "in_chans must be at least 1, got 0"),
        (dict(paths=()), "paths must name at least one route, got none"),
        (dict(d_state=0), "d_state must be at least 1, got 0"),
        (dict(ssm_ratio=0.0), "must be at least 1, got 0"),
        (dict(mlp_ratio=-1.0), "mlp_ratio must be at least 0, got -1.0"),
        (dict(drop_path_rate=1.5), "drop_path_rate must be between 0 and 1, got 1.5"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VMamba(**TINY | options)


@pytest.mark.parametrize(
    "paths", [(ROWS,), (Snake(), Reversed(Snake())), (ROWS, Reversed(ROWS), Snake())], ids=["1", "2", "3"]
)
def test_any_set_of_paths(paths: tuple[Any, ...]) -> None:
    model = VMamba(**TINY, paths=paths, d_state=2, ssm_ratio=1.5)
    y = model(torch.randn(2, 3, 33, 20))
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.stages[0].blocks[0].ss2d.A_log.shape == (len(paths), 12, 2)


def test_no_mlp() -> None:
    model = VMamba(**TINY, mlp_ratio=0)
    assert not any("mlp" in key or "norm2" in key for key in model.stages.state_dict())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_feature_norms_are_those_of_the_maps() -> None:
    model = VMamba(**TINY, feature_norm=True).eval()
    x = torch.randn(2, 3, 48, 40)
    for y in model.forward_intermediates(x, intermediates_only=True):
        torch.testing.assert_close(y.mean(1), torch.zeros_like(y[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(y.var(1, correction=0), torch.ones_like(y[:, 0]), rtol=1e-2, atol=0)
    assert model.prune_intermediate_layers([0]) == [0]
    assert len(model.feature_norms) == 1


def test_stochastic_depth_grows_linearly() -> None:
    model = VMamba(dims=(8, 16, 32), depths=(2, 1, 3), drop_path_rate=0.3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 6), atol=1e-6)
    assert [type(block.drop_path2) for block in blocks] == [nn.Identity] + [DropPath] * 5


def test_initialization() -> None:
    model = timm.create_model("vmamba_tiny")
    block = model.stages[2].blocks[3]
    for linear in (block.ss2d.in_proj, block.ss2d.out_proj, block.mlp.fc1, block.mlp.fc2, model.head.fc):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert linear.bias is None or not linear.bias.any()
    ss2d = block.ss2d
    # torch's default, uniform within 1 / sqrt(fan in): x_proj and every convolution
    for weight, fan_in in ((ss2d.x_proj.weight, 384), (ss2d.conv2d.weight, 9), (model.stem.conv2.weight, 48 * 9)):
        assert weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
    assert ss2d.dt_weight.abs().max().item() == pytest.approx(24**-0.5, rel=0.02)
    assert not ss2d.A_log.any()  # one state: A = -1
    assert bool((ss2d.D == 1).all())
    steps = nn.functional.softplus(ss2d.dt_bias)
    assert 1e-3 * 0.99 <= steps.min().item() < 1.2e-3
    assert 0.08 < steps.max().item() <= 0.1 * 1.01
    # log-uniform: half of the steps lie below the geometric mean
    assert (steps < 1e-2).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_seeds_repeat() -> None:
    torch.manual_seed(7)
    first = timm.create_model("vmamba_atto").state_dict()
    torch.manual_seed(7)
    second = timm.create_model("vmamba_atto").state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())

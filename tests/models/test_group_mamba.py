"""GroupMamba's own options, heads, initialization and cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import vision_ssm
from vision_ssm.analysis import complexity
from vision_ssm.layers import SS2D
from vision_ssm.models import GroupMamba
from vision_ssm.models.group_mamba import GroupSS2D, ModulatedGroupMamba

SMALL: dict[str, Any] = dict(dims=(16, 32), depths=(1, 2), mlp_ratios=(2, 2), stem_dim=8, num_classes=3)


def on_meta(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, device="meta", **options).eval()


@pytest.mark.parametrize(
    ("name", "parameters", "one_head", "dense", "macs", "paper_ops"),
    [
        ("group_mamba_tiny", 23_361_917, 22_912_917, 20_462_224, 4.649e9, 4.705e9),
        ("group_mamba_small", 34_781_555, 34_268_555, 31_143_298, 7.207e9, 7.280e9),
        ("group_mamba_base", 57_150_838, 56_637_838, 53_512_581, 14.067e9, 14.186e9),
    ],
)
def test_cost_is_the_published_one(
    name: str, parameters: int, one_head: int, dense: int, macs: float, paper_ops: float
) -> None:
    cost = complexity(on_meta(name))
    assert cost.parameters == parameters
    assert cost.macs == pytest.approx(macs, rel=1e-3)
    assert cost.paper_ops == pytest.approx(paper_ops, rel=5e-3)
    assert sum(p.numel() for p in on_meta(name, distilled=False).parameters()) == one_head
    assert sum(p.numel() for p in on_meta(name, features_only=True, feature_norm=True).parameters()) == dense


def test_published_weight_decay_by_numbers() -> None:
    model = on_meta("group_mamba_tiny")
    spared = model.published_no_weight_decay()
    assert sum(p.numel() for name, p in model.named_parameters() if name in spared) == 119_165


def test_ablations_in_numbers() -> None:
    def parameters(**options: Any) -> int:
        return sum(p.numel() for p in on_meta("group_mamba_tiny", **options).parameters())

    gates = [m for m in on_meta("group_mamba_tiny").modules() if isinstance(m, ModulatedGroupMamba)]
    assert parameters() - parameters(channel_affinity=False) == sum(
        p.numel() for mixer in gates for layer in (mixer.fc1, mixer.fc2) for p in layer.parameters()
    )
    # Three routes more in each of four groups of d channels: projections of R + 2 and of R, rates, biases and D.
    more = sum(4 * 3 * d * (2 * math.ceil(d / 16) + 5) * n for d, n in ((16, 3), (32, 4), (87, 9), (112, 3 + 1)))
    assert parameters(all_directions=True) - parameters() == more
    wide = sum(p.numel() for p in on_meta("group_mamba_tiny_wide").parameters())
    assert wide == pytest.approx(sum(p.numel() for p in on_meta("vmamba_tiny").parameters()), rel=0.002)
    assert isinstance(on_meta("group_mamba_tiny_wide").get_classifier(), nn.Linear)


def test_all_directions_are_four_scans_of_a_quarter_each() -> None:
    groups = GroupSS2D(16, all_directions=True)
    for p in (groups.A_log, groups.D):
        nn.init.normal_(p)
    x = torch.randn(2, 5, 7, 16)
    parts = []
    for group in range(4):
        alone = SS2D(4, gated=True, conv_bias=True)
        here, routes = slice(4 * group, 4 * group + 4), slice(4 * group, 4 * group + 4)
        features = groups.x_proj.weight.shape[0] // 4
        with torch.no_grad():
            alone.in_proj.weight.copy_(
                torch.cat([groups.in_proj.weight[here], groups.gate_proj.weight[here]]).flatten(1)
            )
            alone.out_proj.weight.copy_(groups.out_proj.weight[here].flatten(1))
            alone.x_proj.weight.copy_(groups.x_proj.weight[features * group : features * (group + 1)].flatten(1))
            alone.conv2d.weight.copy_(groups.conv2d.weight[here])
            alone.conv2d.bias.copy_(groups.conv2d.bias[here])
            for name in ("dt_weight", "dt_bias", "A_log", "D"):
                getattr(alone, name).copy_(getattr(groups, name)[routes])
        parts.append(alone(x[..., here]))
    torch.testing.assert_close(groups(x), torch.cat(parts, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [dict(channel_affinity=False), dict(all_directions=True), dict(channel_affinity=False, all_directions=True)],
    ids=lambda value: ",".join(value),
)
def test_ablated_models_learn_and_can_be_optimized(options: dict[str, Any]) -> None:
    model = GroupMamba(**SMALL, gate_reduction=2, **options).train()
    assert any("fc1" in name and "mlp" not in name for name, _ in model.named_parameters()) == (
        "channel_affinity" not in options
    )
    x = torch.randn(2, 3, 33, 47)
    model(x).square().mean().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"head.block.mixer.ss2d.A_log"}
    with torch.no_grad():
        torch.testing.assert_close(vision_ssm.optimize(model)(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_atto_is_small() -> None:
    assert sum(p.numel() for p in on_meta("group_mamba_atto").parameters()) < 1_000_000


@pytest.mark.parametrize(("stem_stride", "side"), [(1, 4), (2, 2), (4, 1)])
def test_stem_stride(stem_stride: int, side: int) -> None:
    model = timm.create_model("group_mamba_atto", stem_stride=stem_stride, features_only=True).eval()
    assert [y.shape[2] for y in model(torch.randn(1, 3, 32, 32))] == [8 * side, 4 * side, 2 * side, side]
    assert model.feature_info.reduction() == [stem_stride * 2**i for i in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stem_stride=3), "stem_stride must be one of 1, 2, 4, got 3"),
        (dict(stem_dim=0), "stem_dim must be at least 1, got 0"),
        (dict(dims=(16, 62)), r"dims must be multiples of 4 and at least 16, got \(16, 62\)"),
        (dict(dims=(12, 16)), r"dims must be multiples of 4 and at least 16, got \(12, 16\)"),
        (dict(mlp_ratios=(8,)), r"mlp_ratios must hold one positive number per stage, got \(8,\)"),
        (dict(mlp_ratios=(8, 0)), r"mlp_ratios must hold one positive number per stage, got \(8, 0\)"),
        (dict(gate_reduction=17), "gate_reduction must be between 1 and 16, the least of dims, got 17"),
        (dict(global_pool="catavgmax"), "global_pool must keep the channels, got 'catavgmax'"),
        (dict(depths=(1,)), "got 2 and 1"),
        (dict(drop_path_rate=1.5), "drop_path_rate must be between 0 and 1, got 1.5"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupMamba(**SMALL | options)


def test_two_heads() -> None:
    model = GroupMamba(**SMALL).eval()
    x = torch.randn(2, 3, 32, 48)
    fc, fc_dist = model.get_classifier()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), (fc(pooled) + fc_dist(pooled)) / 2)
    assert isinstance(model.train()(x), Tensor)
    model.set_distilled_training(True)
    y, y_dist = model(x)
    assert y.shape == y_dist.shape == (2, 3)
    assert not torch.equal(y, y_dist)
    assert isinstance(model.eval()(x), Tensor)
    model.set_distilled_training(False)
    assert isinstance(model.train()(x), Tensor)
    model.reset_classifier(5)
    assert [layer.out_features for layer in model.get_classifier()] == [5, 5]
    model.reset_classifier(0)
    assert torch.equal(model.eval()(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_one_head() -> None:
    model = GroupMamba(**SMALL, distilled=False).train()
    model.set_distilled_training(True)
    assert not any("fc_dist" in key for key in model.state_dict())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    model.reset_classifier(7)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_without_pooling_the_head_returns_the_map() -> None:
    model = GroupMamba(**SMALL | dict(num_classes=0), global_pool="").eval()
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(model(x), model.forward_features(x))


def test_what_is_normalized() -> None:
    model = GroupMamba(**SMALL).eval()
    x = torch.randn(1, 3, 64, 48)
    first, last = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(first.mean(-1), torch.zeros_like(first[..., 0]), rtol=0, atol=1e-5)
    assert torch.equal(last, model.forward_features(x))
    dense = GroupMamba(**SMALL, feature_norm=True).eval()
    dense.load_state_dict(model.state_dict())
    _, normed = dense.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(normed, model.head.norm(last))
    assert torch.equal(dense(x), model(x))
    # pruning keeps that norm as long as its stage is there
    dense.prune_intermediate_layers([1])
    assert torch.equal(dense.forward_intermediates(x, [1], intermediates_only=True)[0], normed.permute(0, 3, 1, 2))
    dense.prune_intermediate_layers([0])
    assert torch.equal(dense.forward_intermediates(x, [0], intermediates_only=True)[0], first.permute(0, 3, 1, 2))
    assert not list(dense.head.parameters())


def test_a_pooled_token_needs_no_state_and_no_neighbours() -> None:
    model = GroupMamba(**SMALL).train()
    for name, p in model.named_parameters():
        if name.endswith("mixer.fc1.bias"):
            nn.init.ones_(p)  # else all of a gate's few hidden units may be zero
    model(torch.randn(2, 3, 48, 64)).square().mean().backward()
    taps = model.head.block.mixer.ss2d.conv2d.weight.grad
    assert taps[:, :, 1, 1].any()
    taps[:, :, 1, 1] = 0
    assert not taps.any()
    still = {name for name, p in model.named_parameters() if not p.grad.any()}
    assert still == {"head.block.mixer.ss2d.A_log", "head.block.mixer.ss2d.conv2d.weight"}


def test_stochastic_depth_grows_linearly() -> None:
    model = GroupMamba(dims=(16, 32, 48), depths=(2, 1, 3), mlp_ratios=(2, 2, 2), drop_path_rate=0.3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 6), atol=1e-6)
    assert [type(block.drop_path2) for block in blocks] == [nn.Identity] + [DropPath] * 5


def test_initialization() -> None:
    model = GroupMamba(dims=(64, 348), depths=(1, 1), mlp_ratios=(8, 4))
    block = model.stages[1].blocks[0]
    ss2d = block.mixer.ss2d
    linears = (block.mixer.proj, block.mixer.fc1, block.mlp.fc1, block.mlp.fc2, model.head.fc, model.head.fc_dist)
    for linear in (*linears, ss2d.in_proj, ss2d.out_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(linear.bias.any() for linear in linears)
    assert ss2d.x_proj.weight.abs().max().item() == pytest.approx(87**-0.5, rel=0.02)
    # normal, with the variance 2 / fan out
    for conv, fan_out in ((block.mlp.dwconv, 9), (ss2d.conv2d, 9), (model.stem.conv2, 9 * 32)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert conv.bias is None or not conv.bias.any()
    assert ss2d.dt_weight.abs().max().item() == pytest.approx(6**-0.5, rel=0.02)
    assert not ss2d.A_log.any()
    assert bool((ss2d.D == 1).all())
    assert block.mixer.skip_scale.item() == 1
    steps = nn.functional.softplus(ss2d.dt_bias)
    assert 1e-3 * 0.99 <= steps.min().item() < steps.max().item() <= 0.1 * 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_inference_agrees(dtype: torch.dtype) -> None:
    model = GroupMamba(**SMALL, dtype=dtype).eval()
    x = torch.randn(2, 3, 33, 47, dtype=dtype)
    with torch.inference_mode():
        fused = model(x)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fused, model(x).detach(), rtol=tolerance, atol=tolerance)

"""EfficientVMamba's own options, layers and initialization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

import vision_ssm
from vision_ssm.analysis import complexity
from vision_ssm.layers.patches import PatchMerging
from vision_ssm.models import EfficientVMamba
from vision_ssm.models.efficient_vmamba import ES2D, EVSSBlock, GridLinear, InvertedResidual
from vision_ssm.scan import CROSS_SCAN

MINI: dict[str, Any] = dict(dims=(8, 16, 16), depths=(1, 1, 2), num_classes=3)


@pytest.mark.parametrize(
    ("name", "giga_ops"),
    [("efficient_vmamba_tiny", 0.806), ("efficient_vmamba_small", 1.343), ("efficient_vmamba_base", 3.997)],
)
def test_operations_as_published(name: str, giga_ops: float) -> None:
    # the papers' convention, as the published code counts
    cost = complexity(timm.create_model(name, device="meta"))
    assert cost.paper_ops / 1e9 == pytest.approx(giga_ops, rel=0.005)


# Tables 5, 6 and 8 of the paper: parameters in millions and operations in billions, as far as it prints them. The
# author names the widths of the first row in an issue.
PLAIN: dict[str, Any] = dict(conv_branch=False, gate=False, scanning=(True,) * 4)
ABLATIONS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "baseline": ("tiny", dict(PLAIN, atrous=False, dims=(32, 64, 128, 256)), "2.4", "0.9"),
    "atrous": ("tiny", PLAIN, "5", "0.8"),
    "all-scanning": ("tiny", dict(scanning=(True,) * 4), "5", "0.8"),
    "late-scanning": ("tiny", dict(scanning=(False, False, True, True)), "5", "0.7"),
    "none-scanning": ("tiny", dict(scanning=(False,) * 4), "6", "0.7"),
    "published": ("tiny", {}, "6", "0.8"),
    "base-none-scanning": ("base", dict(scanning=(False,) * 4), "34", "3.8"),
}


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablations_have_the_published_cost(case: str) -> None:
    size, options, parameters, operations = ABLATIONS[case]
    cost = complexity(timm.create_model(f"efficient_vmamba_{size}", device="meta", **options))
    assert f"{cost.parameters / 1e6:.{len(parameters.partition('.')[2])}f}" == parameters
    assert f"{cost.paper_ops / 1e9:.1f}" == operations


@pytest.mark.parametrize(
    "options",
    [
        dict(atrous=False),
        dict(conv_branch=False),
        dict(gate=False),
        dict(conv_branch=False, gate=False, mlp_ratio=2.0),
        dict(scanning=(False, True, True)),
    ],
    ids=lambda value: ",".join(value),
)
def test_ablated_models_learn_and_can_be_optimized(options: dict[str, Any]) -> None:
    model = EfficientVMamba(**MINI | options).train()
    x = torch.randn(2, 3, 33, 47)
    model(x).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        torch.testing.assert_close(vision_ssm.optimize(model)(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_without_skipping_the_scan_is_the_gated_one_of_all_tokens() -> None:
    model = EfficientVMamba(**MINI, atrous=False, gate=False)
    block = model.stages[0].blocks[0]
    assert block.ss2d.paths == CROSS_SCAN
    assert block.ss2d.gated
    u = torch.randn(1, 5, 6, 8)
    y = block.norm1(u)
    torch.testing.assert_close(block(u), u + block.ss2d(y) + block.conv_branch(y))


def test_small_variant_is_small() -> None:
    model = timm.create_model("efficient_vmamba_atto", device="meta")
    assert sum(p.numel() for p in model.parameters()) < 1e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stem_stride=0), "stem_stride must be at least 1, got 0"),
        (dict(output_stride=8), "output_stride must be 16, the network's own, got 8"),
        (dict(dims=(8, 16)), "got 2 and 3"),
        (dict(dims=(7, 16, 16)), r"dims of stages that scan must be at least 8, got \(7, 16, 16\)"),
        (dict(scanning=(True, False)), r"True or False for each of the 3 stages, got \(True, False\)"),
        (dict(scanning=(True, 2, False)), r"True or False for each of the 3 stages, got \(True, 2, False\)"),
        (dict(scanning=True), "True or False for each of the 3 stages, got True"),
        (dict(depths=(1, 0, 1)), "must be at least 1"),
        (dict(in_chans=0), "in_chans must be at least 1, got 0"),
        (dict(d_state=0), "d_state must be at least 1, got 0"),
        (dict(ssm_ratio=0.0), "must be at least 1, got 0"),
        (dict(mlp_ratio=-1.0), "mlp_ratio must be at least 0, got -1.0"),
        (dict(drop_path_rate=1.5), "drop_path_rate must be between 0 and 1, got 1.5"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientVMamba(**MINI | options)


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_stem_leaves_out_what_fills_no_patch(stem_stride: int) -> None:
    model = EfficientVMamba(**MINI, stem_stride=stem_stride).eval()
    assert model.feature_info[0]["reduction"] == stem_stride
    image = torch.randn(1, 3, 24 + stem_stride - 1, 32)
    whole = image[:, :, :24]
    with torch.inference_mode():
        assert torch.equal(model(image), model(whole))


def test_stages() -> None:
    model = EfficientVMamba(dims=(8, 16, 16, 24, 24), depths=(1, 2, 1, 1, 2), d_state=4, ssm_ratio=1.5, mlp_ratio=2.0)
    kinds = [{type(block) for block in stage.blocks} for stage in model.stages]
    assert kinds == [{EVSSBlock}] * 2 + [{InvertedResidual}] * 3
    block = model.stages[1].blocks[0]
    assert block.ss2d.A_log.shape == (4, 24, 4)
    assert block.mlp.fc1.out_features == 32
    y = model(torch.randn(2, 3, 70, 64))
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_mlp_as_published() -> None:
    assert not any("mlp" in key or "norm2" in key for key in EfficientVMamba(**MINI).stages.state_dict())


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 5), (5, 7), (1, 1)], ids=str)
def test_every_token_is_projected_by_its_sub_grid(size: tuple[int, int]) -> None:
    x, grids = torch.randn(2, *size, 6, requires_grad=True), GridLinear(6, 5)
    weight = grids.proj.weight.view(4, 5, 6)
    expected = torch.zeros(2, *size, 5)
    for grid in range(4):
        row, column = grid % 2, grid // 2
        expected[:, row::2, column::2] = x[:, row::2, column::2] @ weight[grid].mT
    found = grids(x)
    torch.testing.assert_close(found, expected)
    seed, of = torch.randn_like(expected), (x, grids.proj.weight)
    for mine, wanted in zip(torch.autograd.grad(found, of, seed), torch.autograd.grad(expected, of, seed), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_sub_grids_meet_nowhere_in_the_scan() -> None:
    mixer = ES2D(8, d_state=2, ssm_ratio=1.0).eval()
    mixer.conv2d = nn.Identity()  # the convolution mixes neighbours
    x = torch.randn(1, 6, 6, 8, requires_grad=True)
    mixer(x)[0, 5, 4].sum().backward()  # the last token of the second sub-grid
    seen = x.grad[0].abs().sum(-1) > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[1::2, 0::2] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (5, 7)], ids=str)
def test_patch_merging_pads_before_the_norm(size: tuple[int, int]) -> None:
    merging = PatchMerging(3, 5)
    nn.init.normal_(merging.norm.weight)
    nn.init.normal_(merging.norm.bias)
    x = torch.randn(2, *size, 3)
    padded = F.pad(x, (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    corners = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    torch.testing.assert_close(merging(x), merging.reduction(merging.norm(torch.cat(corners, -1))))


def test_stochastic_depth_grows_linearly() -> None:
    model = timm.create_model("efficient_vmamba_tiny", drop_path_rate=0.1)
    blocks = [block for stage in model.stages for block in stage.blocks]
    paths = [block.drop_path1 if isinstance(block, EVSSBlock) else block.drop_path for block in blocks]
    assert [type(path) for path in paths] == [nn.Identity] + [DropPath] * 9
    np.testing.assert_allclose([path.drop_prob for path in paths[1:]], np.linspace(0, 0.1, 10)[1:], atol=1e-6)


def test_both_branches_are_dropped_together() -> None:
    block = EVSSBlock(8, d_state=2, ssm_ratio=1.0, mlp_ratio=0, drop_path=0.5).eval()
    x = torch.randn(16, 4, 4, 8)
    with torch.no_grad():
        whole = block(x) - x
        block.drop_path1.train()
        left = block(x) - x
    dropped = left.flatten(1).abs().amax(1) == 0
    assert 0 < dropped.sum() < 16
    torch.testing.assert_close(left[~dropped], 2 * whole[~dropped], rtol=1e-4, atol=1e-5)


def test_weight_decay_as_published() -> None:
    model = timm.create_model("efficient_vmamba_tiny", device="meta")
    parameters = dict(model.named_parameters())
    spared = model.published_no_weight_decay()
    assert len(spared) == 116
    assert len(parameters) - len(spared) == 79
    assert sum(parameters[name].numel() for name in spared) == 45_820
    leaves = {name.rsplit(".", 1)[-1] for name in parameters.keys() - spared}
    assert {"A_log", "dt_bias"} <= leaves
    assert {name.rsplit(".", 1)[-1] for name in model.no_weight_decay()} == {"A_log", "dt_bias", "D"}


def assert_uniform(weight: Tensor, fan_in: int) -> None:
    assert weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


def test_initialization() -> None:
    model = timm.create_model("efficient_vmamba_tiny")
    scanning, inverted = model.stages[1].blocks[1], model.stages[2].blocks[0]
    ss2d, gate, branch = scanning.ss2d, scanning.gate, scanning.conv_branch
    reduction = model.stages[1].downsample.reduction
    for linear in (ss2d.in_proj, ss2d.out_proj, gate.reduce, gate.expand, reduction, model.head.fc):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert linear.bias is None or not linear.bias.any()
    # torch's default, uniform within 1 / sqrt(fan in): all that is a convolution in the published model
    for weight, fan_in in (
        (ss2d.x_proj.proj.weight, 192),
        (ss2d.conv2d.weight, 9),
        (model.stem.conv.weight, 48),
        (branch.conv_dw.weight, 9),
        (branch.conv_pw.weight, 96),
        (branch.conv_pw.bias, 96),
        (inverted.conv_pw.weight, 192),
        (inverted.conv_pwl.weight, 768),
        (inverted.se.reduce.weight, 768),
        (inverted.se.expand.bias, 96),
    ):
        assert_uniform(weight, fan_in)
    assert_uniform(ss2d.dt_weight, 6)
    torch.testing.assert_close(ss2d.A_log, torch.arange(1.0, 17).log().expand(4, 192, 16))
    assert bool((ss2d.D == 1).all())
    steps = F.softplus(ss2d.dt_bias)
    assert steps.min().item() == pytest.approx(1e-3, rel=0.1)
    assert steps.max().item() == pytest.approx(0.1, rel=0.1)

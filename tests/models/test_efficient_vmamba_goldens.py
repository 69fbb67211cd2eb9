"""EfficientVMamba against what the published code computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import goldens
import vision_ssm  # noqa: F401  (registers the models)
from vision_ssm.checkpoints import load_strict
from vision_ssm.checkpoints.efficient_vmamba import convert_efficient_vmamba
from vision_ssm.layers import scan_map
from vision_ssm.models import EfficientVMamba
from vision_ssm.models.efficient_vmamba import GridLinear
from vision_ssm.scan import ATROUS_SCAN, build_routes

# Absolute; logits and maps are of the order of 1.
LOGITS, MAPS = 5e-6, 1e-5
OURS = {f"efficientvmamba_{size}": f"efficient_vmamba_{size}" for size in ("tiny", "small", "base")}


def build(name: str, **options: Any) -> tuple[goldens.Golden, nn.Module]:
    golden = goldens.load(name)
    if name == "efficientvmamba_mini":
        builder = golden.facts["builder"]
        model: nn.Module = EfficientVMamba(**{key: builder[key] for key in ("num_classes", "dims", "depths")})
    else:
        model = timm.create_model(OURS[name], **options)
    more = ["backbone_only_keys"] if options.get("feature_norm") else []
    load_strict(model, convert_efficient_vmamba(golden.state_dict(*more)))
    return golden, model.eval()


def assert_map(golden: goldens.Golden, key: str, x: Tensor) -> None:
    """Compare a map, (B, H, W, C)."""
    wide = x.double()
    stat = torch.stack([wide.mean(), wide.std(), wide.abs().mean()]).numpy()
    np.testing.assert_allclose(x[:, :4, :4, :8], golden.arrays[f"{key}.slice"], rtol=0, atol=MAPS, err_msg=key)
    np.testing.assert_allclose(stat, golden.arrays[f"{key}.stat"], rtol=0, atol=MAPS, err_msg=key)


def test_every_file_is_used() -> None:
    assert goldens.names("efficientvmamba_*") == sorted([*OURS, "efficientvmamba_mini", "efficientvmamba_scan"])


@pytest.mark.parametrize("name", OURS)
def test_agrees_with_published(name: str) -> None:
    golden, model = build(name)
    assert sum(p.numel() for p in model.parameters()) == golden.facts["num_params"]
    # the tiny one also at sizes that leave odd maps and rows that fill no patch
    assert len(golden.runs) == (5 if name.endswith("tiny") else 1)
    for run in golden.runs:
        image = golden.image(run)
        with torch.inference_mode():
            features, maps = model.forward_intermediates(image, output_fmt="NHWC")
            logits = model.forward_head(features)
            assert_map(golden, f"{run}.patch_embed", model.stem(image))
        for stage, x in enumerate(maps):
            assert tuple(x.shape) == tuple(golden.facts["runs"][run]["feature_shapes_nhwc"][f"stage{stage}"])
            assert_map(golden, f"{run}.stage{stage}", x)
        np.testing.assert_allclose(logits, golden.arrays[f"{run}.logits"], rtol=0, atol=LOGITS, err_msg=run)


def test_parts_of_blocks_agree() -> None:
    golden, model = build("efficientvmamba_tiny")
    run = "b248x216"
    maps: dict[str, Tensor] = {}

    def keep(*keys: str) -> Callable[..., None]:
        # a module that is called several times has one key per call
        left = list(keys)
        return lambda _module, _input, y: maps.__setitem__(left.pop(0), y.clone())

    def keep_input(key: str) -> Callable[..., None]:
        return lambda _module, x: maps.__setitem__(key, x[0].clone())

    with ExitStack() as hooks:
        for stage in (0, 1):
            block, at = model.stages[stage].blocks[0], f"block{stage}."
            for part, keys in (
                (block.norm1, ["norm"]),
                (block.ss2d.out_norm, ["op_scan_outnorm"]),
                (block.ss2d, ["op"]),
                (block.conv_branch, ["conv"]),
                (block.gate, ["se_op", "se_conv"]),
                (block, ["out"]),
            ):
                hooks.enter_context(part.register_forward_hook(keep(*(at + key for key in keys))))
            hooks.enter_context(block.register_forward_pre_hook(keep_input(at + "in")))
            hooks.enter_context(block.ss2d.x_proj.register_forward_pre_hook(keep_input(at + "op_conv_act")))
        block, at = model.stages[2].blocks[0], "inres0."
        for part, keys in (
            (block.act1, ["conv_pw"]),
            (block.act2, ["conv_dw"]),
            (block.se, ["se"]),
            (block.bn3, ["conv_pw2"]),
            (block, ["out"]),
        ):
            hooks.enter_context(part.register_forward_hook(keep(*(at + key for key in keys))))
        hooks.enter_context(block.register_forward_pre_hook(keep_input(at + "in")))
        with torch.inference_mode():
            model(golden.image(run))
    recorded = {key.split(".", 1)[1].rsplit(".", 1)[0] for key in golden.arrays if ".block" in key or ".inres" in key}
    assert maps.keys() == recorded
    for key, x in maps.items():
        nchw = key in ("inres0.conv_pw", "inres0.conv_dw", "inres0.conv_pw2")
        assert_map(golden, f"{run}.{key}", x.permute(0, 2, 3, 1) if nchw else x)


@pytest.mark.parametrize("name", OURS)
def test_dense_prediction_backbone_agrees(name: str) -> None:
    golden, model = build(name, feature_norm=True)
    features = timm.create_model(OURS[name], features_only=True, feature_norm=True).eval()
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(("norm.", "head."))}
    load_strict(features.model, weights)
    with torch.inference_mode():
        maps = features(golden.image("backbone224"))
    assert [list(x.shape) for x in maps] == golden.facts["runs"]["backbone224"]["shapes_nchw"]
    for i, x in enumerate(maps):
        key = f"backbone224.out{i}"
        wide = x.double()
        stat = torch.stack([wide.mean(), wide.std(), wide.abs().mean()]).numpy()
        np.testing.assert_allclose(x[:, :8, :4, :4], golden.arrays[f"{key}.slice_nchw"], rtol=0, atol=MAPS, err_msg=key)
        np.testing.assert_allclose(stat, golden.arrays[f"{key}.stat"], rtol=0, atol=MAPS, err_msg=key)
        assert x.is_contiguous()


@pytest.mark.parametrize("run", ["eval64", "eval60x52", "train60x52"])
def test_gradients_agree(run: str) -> None:
    golden, model = build("efficientvmamba_mini")
    model.train(run.startswith("train"))
    image = golden.image(run).requires_grad_()
    logits = model(image)
    np.testing.assert_allclose(logits.detach(), golden.arrays[f"{run}.logits"], rtol=0, atol=LOGITS)
    loss = logits.square().mean()
    loss.backward()
    np.testing.assert_allclose(loss.item(), golden.arrays[f"{run}.loss"], rtol=1e-5)
    assert image.grad is not None
    wide = image.grad.double()
    stat = torch.stack([wide.mean(), wide.std(), wide.abs().mean()]).numpy()
    kept = golden.arrays[f"{run}.grad_input.slice"]
    np.testing.assert_allclose(image.grad[:, :, :12, :12], kept, rtol=0, atol=1e-5 * np.abs(kept).max())
    np.testing.assert_allclose(stat, golden.arrays[f"{run}.grad_input.stat"], rtol=1e-5, atol=1e-8)

    expected = golden.facts["runs"][run]["grad_norms"]
    published = goldens.published_names(convert_efficient_vmamba, golden)
    norms = {published[name]: p.grad.double().norm().item() for name, p in model.named_parameters()}
    assert norms.keys() == expected.keys()
    assert len(norms) == 131
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=1e-5, abs=1e-6), name

    buffers = {published[name]: value for name, value in model.named_buffers()}
    statistics = [key for key in golden.arrays if key.startswith(f"{run}.after.")]
    assert len(statistics) == (8 if run.startswith("train") else 0)
    for key in statistics:
        found = buffers[key.removeprefix(f"{run}.after.")][:8]
        np.testing.assert_allclose(found, golden.arrays[key], rtol=0, atol=MAPS, err_msg=key)


SCAN = goldens.load("efficientvmamba_scan").arrays


@pytest.mark.parametrize("size", ["4x6", "5x6", "4x5", "5x7"])
def test_routes_agree(size: str) -> None:
    height, width = map(int, size.split("x"))
    routes = build_routes(ATROUS_SCAN, height, width)
    np.testing.assert_array_equal(routes.read + 1, SCAN[f"index.{size}.scan"])  # pixels from 1, 0 is padding


def test_scan_and_its_gradients_agree() -> None:
    given = {key.removeprefix("core.in."): torch.from_numpy(a) for key, a in SCAN.items() if key.startswith("core.in.")}
    for value in given.values():
        value.requires_grad_()
    x = given["x"].permute(0, 2, 3, 1)
    grids = GridLinear(8, given["x_proj_weight"].shape[1])
    weights = {"proj.weight": given["x_proj_weight"].flatten(0, 1)[:, :, None, None]}
    y = scan_map(
        x,
        torch.func.functional_call(grids, weights, x),
        -given["A_logs"].exp().view(4, 8, 16),
        given["Ds"].view(4, 8),
        given["dt_projs_weight"].mT,
        given["dt_projs_bias"],
        ATROUS_SCAN,
    )
    normalized = F.layer_norm(y, (8,))
    np.testing.assert_allclose(y.detach(), SCAN["core.y_nonorm"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(normalized.detach(), SCAN["core.y"], rtol=0, atol=MAPS)
    (normalized * torch.from_numpy(SCAN["core.loss_weight"])).sum().backward()
    for key, value in given.items():
        expected = SCAN[f"core.grad.{key}"]
        assert value.grad is not None
        np.testing.assert_allclose(value.grad, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=key)

"""VMamba against what the published code computed."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import timm
import torch
from torch import nn

import goldens
import vision_ssm  # noqa: F401  (registers the models)
from vision_ssm.checkpoints import load_strict
from vision_ssm.checkpoints.vmamba import convert_vmamba
from vision_ssm.models import VMamba

# Absolute on logits, which are of the order of 1; relative to the largest number of a map.
TOLERANCE = 2e-5
# Published builders and the names under which we register their networks.
OURS = {
    "vmamba_tiny_s1l8": "vmamba_tiny",
    "vmamba_small_s2l15": "vmamba_small",
    "vmamba_base_s2l15": "vmamba_base",
    "vmamba_tiny_s2l5": "vmamba_tiny_s2l5",
    "vmamba_small_s1l20": "vmamba_small_s1l20",
    "vmamba_base_s1l20": "vmamba_base_s1l20",
}


def mini(golden: goldens.Golden) -> VMamba:
    builder = golden.facts["builder"]
    options = {name: builder[name] for name in ("num_classes", "dims", "depths", "ssm_ratio", "mlp_ratio")}
    return VMamba(**options, d_state=builder["ssm_d_state"])


def build(name: str, **options: object) -> tuple[goldens.Golden, nn.Module]:
    golden = goldens.load(name)
    model = mini(golden) if name == "vmamba_mini" else timm.create_model(OURS[name], **options)
    more = ["backbone_extra_keys"] if options.get("feature_norm") else []
    load_strict(model, convert_vmamba(golden.state_dict(*more)))
    return golden, model.eval()


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> tuple[goldens.Golden, nn.Module]:
    return build(request.param)


def test_every_file_is_used() -> None:
    assert goldens.names("vmamba_*") == sorted([*OURS, "vmamba_mini"])


@pytest.mark.parametrize("built", goldens.names("vmamba_*"), indirect=True)
def test_agrees_with_published(built: tuple[goldens.Golden, nn.Module]) -> None:
    golden, model = built
    assert sum(p.numel() for p in model.parameters()) == golden.facts["num_params"]
    assert len(golden.runs) >= 2
    for run in golden.runs:
        with torch.inference_mode():
            features, maps = model.forward_intermediates(golden.image(run))
            logits = model.forward_head(features)
        for stage, x in enumerate(maps):
            golden.assert_map(f"{run}.stage{stage}", x, TOLERANCE)
        np.testing.assert_allclose(logits, golden.arrays[f"{run}.logits"], rtol=0, atol=TOLERANCE, err_msg=run)


@pytest.mark.parametrize("built", [name for name in OURS if "base" not in name], indirect=True)
def test_parts_of_a_block_agree(built: tuple[goldens.Golden, nn.Module]) -> None:
    golden, model = built
    run = "224x224"
    (block,) = {key.split(".")[1] for key in golden.arrays if ".block" in key}
    stage, index = (int(n) for n in block.removeprefix("block").split("_"))
    module = model.stages[stage].blocks[index]
    parts = {
        "norm": module.norm1,
        "op.in_proj": module.ss2d.in_proj,
        "op.conv2d": module.ss2d.conv2d,
        "op.out_norm": module.ss2d.out_norm,
        "op.out_proj": module.ss2d.out_proj,
        "norm2": module.norm2,
        "mlp": module.mlp,
        "out": module,
    }
    seen = {"patch_embed": model.stem} | {f"{block}.{key}": part for key, part in parts.items()}
    maps: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for key, part in seen.items():
            hooks.enter_context(part.register_forward_hook(lambda _m, _i, y, key=key: maps.__setitem__(key, y)))
        scan = f"{block}.op.merged_scan"
        hooks.enter_context(module.ss2d.out_norm.register_forward_pre_hook(lambda _m, x: maps.__setitem__(scan, x[0])))
        with torch.inference_mode():
            model(golden.image(run))
    assert len(maps) == len(parts) + 2
    for key, x in maps.items():
        x = x if key.endswith("conv2d") else x.permute(0, 3, 1, 2)
        golden.assert_map(f"{run}.{key}", x, TOLERANCE)


def test_dense_prediction_backbone_agrees() -> None:
    golden, model = build("vmamba_tiny_s1l8", feature_norm=True)
    image = golden.image("backbone136x104")
    features = timm.create_model("vmamba_tiny", features_only=True, feature_norm=True).eval()
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(("norm.", "head."))}
    load_strict(features.model, weights)
    with torch.inference_mode():
        maps = features(image)
    assert len(maps) == 4
    for i, x in enumerate(maps):
        assert x.is_contiguous()
        golden.assert_map(f"backbone136x104.out{i}", x, TOLERANCE)


@pytest.mark.parametrize("run", ["eval64", "eval72x56"])
def test_gradients_agree(run: str) -> None:
    golden, model = build("vmamba_mini")
    image = golden.image(run).requires_grad_()
    loss = model(image).square().mean()
    loss.backward()
    np.testing.assert_allclose(loss.item(), golden.arrays[f"{run}.loss"], rtol=1e-5)
    assert image.grad is not None
    wide = image.grad.double()
    stat = torch.stack([wide.mean(), wide.std(), wide.abs().mean()]).numpy()
    kept = golden.arrays[f"{run}.grad_input.slice"]
    np.testing.assert_allclose(image.grad[:, :, :12, :12], kept, rtol=1e-4, atol=1e-4 * np.abs(kept).max())
    np.testing.assert_allclose(stat, golden.arrays[f"{run}.grad_input.stat"], rtol=1e-4, atol=1e-8)
    expected = golden.facts["grad_norms"][run]
    published = goldens.published_names(convert_vmamba, golden)
    norms = {published[name]: p.grad.double().norm().item() for name, p in model.named_parameters()}
    assert norms.keys() == expected.keys()
    # Below 1e-5 a norm is rounding noise.
    compared = {name: norm for name, norm in expected.items() if norm > 1e-5}
    assert len(compared) > 0.9 * len(expected)
    for name, norm in compared.items():
        assert norms[name] == pytest.approx(norm, rel=1e-4, abs=0), name

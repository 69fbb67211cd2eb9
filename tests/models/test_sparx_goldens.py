"""SparX-Mamba against what the published code computed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import goldens
import vision_ssm  # noqa: F401  (registers the models)
from vision_ssm.checkpoints import load_strict
from vision_ssm.checkpoints.sparx import convert_sparx
from vision_ssm.models import SparXMamba

# Absolute on logits, which are of the order of 1; relative to the largest number of a map.
TOLERANCE = 2e-5
# Published builders and the names under which we register their networks.
OURS = {
    "sparx_mamba_t": "sparx_mamba_tiny",
    "sparx_mamba_s": "sparx_mamba_small",
    "sparx_mamba_b": "sparx_mamba_base",
}
MINIS = ["sparx_mamba_mini", "sparx_mamba_mini2"]
# Published backbones without a classifier, and the options that make them.
BACKBONES: dict[str, dict[str, Any]] = {
    "sparx_mamba_t_detection": dict(feature_norm=True, learnable_scale=True),
    "sparx_mamba_t_segmentation": dict(feature_norm=True),
}


def mini(golden: goldens.Golden) -> SparXMamba:
    builder = golden.facts["builder"]
    rule = builder["dense_config"]
    return SparXMamba(
        num_classes=builder["num_classes"],
        dims=builder["dims"],
        depths=builder["depths"],
        stem_convs={"v1": 2, "v2": 3}[builder.get("stem_type", "v1")],
        steps=rule["dense_step"],
        starts=[None if start == 100 else start for start in rule["dense_start"]],
        windows=[None if window == 100 else window for window in rule["max_dense_depth"]],
        cross_stage=rule["cross_stage"],
        reductions=builder["sr_ratio"],
        d_state=builder.get("ssm_d_state", 1),
        ssm_ratio=builder.get("ssm_ratio", 2.0),
        mlp_ratio=builder.get("mlp_ratio", 4.0),
        layer_scale=builder.get("ls_init_value", (None, None, 1.0, 1.0)),
    )


def build(name: str) -> tuple[goldens.Golden, nn.Module]:
    golden = goldens.load(name)
    model = mini(golden) if name in MINIS else timm.create_model(OURS[name])
    load_strict(model, convert_sparx(golden.state_dict()))
    return golden, model.eval()


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> tuple[goldens.Golden, nn.Module]:
    return build(request.param)


def parts_of(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a ganglion block by the published names of their outputs."""
    dmca, ss2d = block.dmca, block.ss2d
    return {
        "after_pos_embed": block.pos_embed,
        "norm": block.norm1,
        "op.d_norm": dmca.norm,
        "op.q": dmca.q,
        "op.k": dmca.k,
        "op.v": dmca.v,
        "op.in_proj": dmca.join_proj,
        "op.conv2d_in": dmca,
        "op.conv2d": ss2d.conv2d,
        "op.out_norm": ss2d.out_norm,
        "op.out_proj": ss2d.out_proj,
        "mlp": block.mlp,
        "out": block,
    }


def inputs_of(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a ganglion block by the published names of their inputs."""
    dmca = block.dmca
    return {
        "op.shortcut": dmca.norm,
        "op.shuffled_cat": dmca.join_conv,
        "op.merged_scan": block.ss2d.out_norm,
    }


def test_every_file_is_used() -> None:
    assert goldens.names("sparx_mamba_*") == sorted([*OURS, *MINIS, *BACKBONES])


@pytest.mark.parametrize("built", [*OURS, *MINIS], indirect=True)
def test_agrees_with_published(built: tuple[goldens.Golden, nn.Module]) -> None:
    golden, model = built
    assert sum(p.numel() for p in model.parameters()) == golden.facts["num_params"]
    assert [list(stage.connections.ganglia) for stage in model.stages] == golden.facts["dense_idx"]
    runs = [run for run in golden.runs if not run.startswith("train")]
    assert len(runs) >= 2
    for run in runs:
        with torch.inference_mode():
            features, maps = model.forward_intermediates(golden.image(run))
            logits = model.forward_head(features)
        for stage, x in enumerate(maps):
            golden.assert_map(f"{run}.stage{stage}", x, TOLERANCE)
        np.testing.assert_allclose(logits, golden.arrays[f"{run}.logits"], rtol=0, atol=TOLERANCE, err_msg=run)

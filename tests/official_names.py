"""VMamba under the names of its authors, and detectors on it under those of mmdet."""

from __future__ import annotations

import re

from torch import Tensor


def official(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write our weights under the published names; the inverse of ``convert_vmamba``."""
    theirs = {}
    rules = (
        (r"^stem\.conv1", "patch_embed.0"),
        (r"^stem\.norm1", "patch_embed.2"),
        (r"^stem\.conv2", "patch_embed.5"),
        (r"^stem\.norm2", "patch_embed.7"),
        (r"^stages\.(\d)\.downsample\.conv", lambda m: f"layers.{int(m[1]) - 1}.downsample.1"),
        (r"^stages\.(\d)\.downsample\.norm", lambda m: f"layers.{int(m[1]) - 1}.downsample.3"),
        (r"^stages", "layers"),
        (r"\.norm1", ".norm"),
        (r"\.ss2d", ".op"),
        (r"\.A_log", ".A_logs"),
        (r"\.D$", ".Ds"),
        (r"\.x_proj\.weight", ".x_proj_weight"),
        (r"\.dt_weight", ".dt_projs_weight"),
        (r"\.dt_bias", ".dt_projs_bias"),
        (r"^feature_norms\.", "outnorm"),
        (r"^norm", "classifier.norm"),
        (r"^head\.fc", "classifier.head"),
    )
    for key, value in ours.items():
        if key.endswith("x_proj.weight"):
            value = value.unflatten(0, (4, -1))
        elif key.endswith("dt_weight"):
            value = value.transpose(1, 2)
        elif key.endswith((".A_log", ".D")):
            value = value.flatten(0, 1)
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        theirs[key] = value
    return {key: value.contiguous() for key, value in theirs.items()}


def official_detector(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a detector or segmenter on VMamba under the published names; the inverse of ``convert_detector``."""
    prefix = "backbone.model."
    backbone = official({key.removeprefix(prefix): value for key, value in ours.items() if key.startswith(prefix)})
    theirs = {f"backbone.{key}": value for key, value in backbone.items()}
    rules = (
        (r"^fpn\.inner_blocks\.(\d)\.0", r"neck.lateral_convs.\1.conv"),
        (r"^fpn\.layer_blocks\.(\d)\.0", r"neck.fpn_convs.\1.conv"),
        (r"^fpn\.extra_blocks\.p(\d)", lambda m: f"neck.fpn_convs.{int(m[1]) - 3}.conv"),
        (r"^rpn_head\.conv\.0\.0", "rpn_head.rpn_conv"),
        (r"^rpn_head\.cls_logits", "rpn_head.rpn_cls"),
        (r"^rpn_head\.bbox_pred", "rpn_head.rpn_reg"),
        (r"^box_head\.fc([67])", lambda m: f"roi_head.bbox_head.shared_fcs.{int(m[1]) - 6}"),
        (r"^cls_score", "roi_head.bbox_head.fc_cls"),
        (r"^bbox_pred", "roi_head.bbox_head.fc_reg"),
        (r"^mask_head\.(\d)\.0", r"roi_head.mask_head.convs.\1.conv"),
        (r"^mask_predictor\.conv5_mask", "roi_head.mask_head.upsample"),
        (r"^mask_predictor\.mask_fcn_logits", "roi_head.mask_head.conv_logits"),
        (r"^head\.classification_head\.conv\.(\d)\.0", r"bbox_head.cls_convs.\1.conv"),
        (r"^head\.regression_head\.conv\.(\d)\.0", r"bbox_head.reg_convs.\1.conv"),
        (r"^head\.classification_head\.cls_logits", "bbox_head.retina_cls"),
        (r"^head\.regression_head\.bbox_reg", "bbox_head.retina_reg"),
        (r"\.batch_norm\.", ".bn."),
        (r"_head\.classifier\.", "_head.conv_seg."),
    )
    for key, value in ours.items():
        if not key.startswith(prefix):
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            theirs[key] = value
    return theirs

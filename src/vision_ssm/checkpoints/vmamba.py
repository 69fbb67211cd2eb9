"""Official VMamba checkpoints: their keys, and ours.

Covers the classification code (``x_proj_weight`` (4, R + 2N, di)), the single-file ``vmamba.py`` (``x_proj.weight``
(4 (R + 2N), di)), detection backbones (``outnorm0``..), and older names the official code still renames.
"""

from __future__ import annotations

import re

from torch import Tensor

_STEM = {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2"}
_DOWNSAMPLE = {"1": "conv", "3": "norm"}
# Older names, which the official code renames on loading.
_OLD_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"(^|\.)ln_1\.", r"\1norm."),
    (r"(^|\.)self_attention\.", r"\1op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
)


def convert_vmamba(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the state dict of an official VMamba to the names and shapes of :class:`vision_ssm.models.VMamba`.

    Keys it does not know pass through unchanged, so that strict loading lists them. A state dict that already has
    our keys is returned as it is.
    """
    if not any(key.startswith(("patch_embed.", "layers.")) for key in state):
        return dict(state)
    for pattern, replacement in _OLD_NAMES:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    ours: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := re.match(r"patch_embed\.(0|2|5|7)\.(.+)", key):
            # the stem is a Sequential there; 1, 3, 4 and 6 hold no weights
            ours[f"stem.{_STEM[match[1]]}.{match[2]}"] = value
        elif match := re.match(r"layers\.(\d+)\.downsample\.(1|3)\.(.+)", key):
            # downsampling ends a stage there and begins the next one here
            ours[f"stages.{int(match[1]) + 1}.downsample.{_DOWNSAMPLE[match[2]]}.{match[3]}"] = value
        elif match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            blocks.setdefault(f"stages.{match[1]}.blocks.{match[2]}.", {})[match[3]] = value
        elif match := re.match(r"outnorm(\d+)\.(.+)", key):
            ours[f"feature_norms.{match[1]}.{match[2]}"] = value
        elif match := re.match(r"classifier\.norm\.(.+)", key):
            ours[f"norm.{match[1]}"] = value
        elif match := re.match(r"classifier\.head\.(.+)", key):
            ours[f"head.fc.{match[1]}"] = value
        else:
            ours[key] = value
    for prefix, block in blocks.items():
        ours |= {prefix + name: value for name, value in convert_vss_block(block).items()}
    return ours


def convert_vss_block(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map one official block (``norm.*``, ``op.*``, ``norm2.*``, ``mlp.*``) to :class:`vision_ssm.layers.VSSBlock`."""
    ours: dict[str, Tensor] = {}
    scan: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("op."):
            scan[key[3:]] = value
        else:
            ours[re.sub(r"^norm\.", "norm1.", key)] = _pointwise(key, value)
    return ours | {f"ss2d.{name}": value for name, value in convert_ss2d(scan).items()}


def convert_ss2d(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the official ``op.*`` keys (without ``op.``) to :class:`vision_ssm.layers.SS2D`."""
    inner = next((value.shape[0] for key, value in state.items() if key == "out_norm.weight"), None)
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        try:
            name, converted = _scan_weight(key, value, inner)
        except RuntimeError:  # not of this layer's width: strict loading will name it
            name, converted = key, value
        ours[name] = converted
    return ours


def _scan_weight(key: str, value: Tensor, inner: int | None) -> tuple[str, Tensor]:
    if inner is None:
        return key, value
    if key in ("x_proj_weight", "x_proj.weight"):
        # (K, R + 2N, di), or folded (K (R + 2N), di) or (K (R + 2N), di, 1)
        return "x_proj.weight", value.reshape(-1, inner)
    if key in ("dt_projs_weight", "dt_projs.weight"):
        # (K, di, R), or folded (K di, R): the operator multiplies from the left
        return "dt_weight", value.reshape(-1, inner, value.shape[-1]).transpose(1, 2).contiguous()
    if key in ("dt_projs_bias", "dt_projs.bias"):
        return "dt_bias", value.reshape(-1, inner)
    if key == "A_logs":
        return "A_log", value.reshape(-1, inner, value.shape[-1])
    if key == "Ds":
        return "D", value.reshape(-1, inner)
    return key, _pointwise(key, value)


def _pointwise(key: str, value: Tensor) -> Tensor:
    # 1x1 convolutions and Linear layers hold the same numbers
    if re.search(r"(in_proj|out_proj|fc1|fc2)\.weight$", key) and value.dim() == 4:
        return value.flatten(1)
    return value

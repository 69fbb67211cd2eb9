"""Official EfficientVMamba checkpoints: their keys, and ours; also those of the detection backbone (``outnorm0``..)."""

from __future__ import annotations

import re

from torch import Tensor

from vision_ssm.checkpoints.vmamba import convert_ss2d

_STEM = {"0": "conv", "2": "norm"}
# The parts of an EVSS block; norm2 and mlp, where there are any, have our names.
_EVSS = {
    "norm.": "norm1.",
    "conv_branch.0.": "conv_branch.conv_dw.",
    "conv_branch.1.": "conv_branch.bn.",
    "conv_branch.3.": "conv_branch.conv_pw.",
    "se.norm.": "gate.norm.",
    "se.global_reduce.": "gate.reduce.",
    "se.channel_select.": "gate.expand.",
}
# The parts of an inverted residual.
_INVERTED = {
    "conv_pw.0.": "conv_pw.",
    "conv_pw.1.": "bn1.",
    "conv_dw.0.": "conv_dw.",
    "conv_dw.1.": "bn2.",
    "se.conv_reduce.": "se.reduce.",
    "se.conv_expand.": "se.expand.",
    "conv_pw2.0.": "conv_pwl.",
    "conv_pw2.1.": "bn3.",
}


def convert_efficient_vmamba(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the state dict of an official EfficientVMamba to :class:`vision_ssm.models.EfficientVMamba`.

    Keys it does not know pass through unchanged, so that strict loading lists them. A state dict that already has
    our keys is returned as it is.
    """
    if not any(key.startswith(("patch_embed.", "layers.")) for key in state):
        return dict(state)
    ours: dict[str, Tensor] = {}
    scans: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := re.match(r"patch_embed\.(0|2)\.(.+)", key):
            # the stem is a Sequential there; 1 holds no weights
            ours[f"stem.{_STEM[match[1]]}.{match[2]}"] = value
        elif match := re.match(r"layers\.(\d+)\.(?:downsample|\d+)\.((?:reduction|norm)\..+)", key):
            # merging ends a stage there, as its last child in stages without "blocks"; it begins the next one here
            ours[f"stages.{int(match[1]) + 1}.downsample.{match[2]}"] = value
        elif match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.op\.(.+)", key):
            scans.setdefault(f"stages.{match[1]}.blocks.{match[2]}.ss2d.", {})[match[3]] = value
        elif match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            ours[f"stages.{match[1]}.blocks.{match[2]}.{_rename(match[3], _EVSS)}"] = _pointwise(key, value)
        elif match := re.match(r"layers\.(\d+)\.([1-9]\d*)\.(.+)", key):
            # child 0 of these stages is a permutation
            block = f"stages.{match[1]}.blocks.{int(match[2]) - 1}."
            ours[block + _rename(match[3], _INVERTED)] = _pointwise(key, value)
        elif match := re.match(r"outnorm(\d+)\.(.+)", key):
            ours[f"feature_norms.{match[1]}.{match[2]}"] = value
        elif match := re.match(r"classifier\.norm\.(.+)", key):
            ours[f"norm.{match[1]}"] = value
        elif match := re.match(r"classifier\.head\.(.+)", key):
            ours[f"head.fc.{match[1]}"] = value
        else:
            ours[key] = value
    for prefix, scan in scans.items():
        weight = scan.pop("x_proj_weight", None)
        ours |= {prefix + name: value for name, value in convert_ss2d(scan).items()}
        if weight is not None:  # (4, R + 2N, E), one matrix per sub-grid; a grouped 1x1 convolution here
            ours[f"{prefix}x_proj.proj.weight"] = weight.reshape(-1, weight.shape[-1], 1, 1)
    return ours


def _rename(key: str, names: dict[str, str]) -> str:
    for theirs, name in names.items():
        if key.startswith(theirs):
            return name + key.removeprefix(theirs)
    return key


def _pointwise(key: str, value: Tensor) -> Tensor:
    # 1x1 convolutions there, Linear layers here
    pointwise = r"(conv_branch\.3|conv_pw2?\.0|se\.conv_(reduce|expand))\.weight$"
    if re.search(pointwise, key) and value.dim() == 4:
        return value.flatten(1)
    return value

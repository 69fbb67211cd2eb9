"""VMamba under the names of its authors."""

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

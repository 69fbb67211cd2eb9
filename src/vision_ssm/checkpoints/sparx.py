"""Official SparX-Mamba checkpoints: their keys, and ours.

Covers classification, and the detection and segmentation backbones (``norm.0``.., ``op.scale``).
"""

from __future__ import annotations

import re

from torch import Tensor

from vision_ssm.checkpoints.vmamba import convert_ss2d

# The stem is a Sequential there, of two convolutions or of three; activations hold no weights.
_STEMS = {
    2: {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"},
    3: {"0": "conv1", "1": "norm1", "3": "middle.0", "4": "middle.1", "6": "conv2", "7": "norm2"},
}
_DOWNSAMPLE = {"0": "conv", "1": "norm"}
_HEAD = {"0": "norm", "3": "head.fc"}
# A block's parts outside the mixer.
_BLOCK = (
    (r"^norm\.", "norm1."),
    (r"^layerscale_([12])\.", r"layer_scale\1."),
    (r"^mlp\.dwconv\.", "mlp.conv.conv."),
    (r"^pos_embed\.", "pos_embed.conv."),
)
# The mixer's parts that are the aggregator here.
_DMCA = (
    (r"^d_norm\.", "norm."),
    (r"^d_proj\.0\.", "conv."),
    (r"^d_proj\.1\.", "conv_norm."),
    (r"^d_proj\.3\.", "kv."),
    (r"^([qk])\.0\.([01])\.", r"\1.reduce.\2."),
    (r"^([qk])\.1\.", r"\1.proj."),
    (r"^([qk])\.2\.", r"\1.norm."),
    (r"^v\.0\.", "v.proj."),
    (r"^v\.1\.", "v.norm."),
    (r"^scale$", "attention.scale"),
    (r"^in_proj\.0\.", "join_conv."),
    (r"^in_proj\.2\.", "join_proj."),
)


def convert_sparx(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the state dict of an official SparX-Mamba to the names and shapes of :class:`vision_ssm.models.SparXMamba`.

    Keys it does not know pass through unchanged, so that strict loading lists them. A state dict that already has
    our keys is returned as it is.
    """
    if not any(key.startswith(("patch_embed.", "layers.")) for key in state):
        return dict(state)
    stem = _STEMS[3 if any(key.startswith("patch_embed.6.") for key in state) else 2]
    ours: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if (match := re.match(r"patch_embed\.(\d)\.(.+)", key)) and match[1] in stem:
            ours[f"stem.{stem[match[1]]}.{match[2]}"] = value
        elif match := re.match(r"layers\.(\d+)\.downsample\.([01])\.(.+)", key):
            # downsampling ends a stage there and begins the next one here
            ours[f"stages.{int(match[1]) + 1}.downsample.{_DOWNSAMPLE[match[2]]}.{match[3]}"] = value
        elif match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            blocks.setdefault(f"stages.{match[1]}.blocks.{match[2]}.", {})[match[3]] = value
        elif match := re.match(r"norm\.(\d)\.(.+)", key):
            # norms of the maps that detection and segmentation read
            ours[f"feature_norms.{match[1]}.{match[2]}"] = value
        elif match := re.match(r"classifier\.([03])\.(.+)", key):
            ours[f"{_HEAD[match[1]]}.{match[2]}"] = value
        else:
            ours[key] = value
    for prefix, block in blocks.items():
        ours |= {prefix + name: value for name, value in _convert_block(block).items()}
    return ours


def _convert_block(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    scan: dict[str, Tensor] = {}
    for key, value in state.items():
        part, name = key.removeprefix("op."), _rename(key, _BLOCK)
        if not key.startswith("op."):
            ours[name] = _flat(name, value)
        elif (name := _rename(part, _DMCA)) != part:
            ours[f"dmca.{name}"] = _flat(name, value)
        else:
            scan[part] = value
    return ours | {f"ss2d.{name}": value for name, value in convert_ss2d(scan).items()}


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key, found = re.subn(pattern, replacement, key)
        if found:
            break
    return key


def _flat(name: str, value: Tensor) -> Tensor:
    # 1x1 convolutions are linear layers here
    if re.search(r"^(mlp\.fc[12]|kv|[qkv]\.proj)\.weight$", name) and value.dim() == 4:
        return value.flatten(1)
    # layer scales, depthwise 1x1 convolutions there, have one axis
    return value.flatten() if re.search(r"^layer_scale[12]\.weight$", name) else value

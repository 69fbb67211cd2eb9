"""Official SparX-Mamba checkpoints: their keys, and ours.

Covers classification, and the detection and segmentation backbones (``norm.0``.., ``op.scale``).
"""

from collections.abc import Iterable

from torch import Tensor

from vision_ssm.checkpoints.rules import Rules, State, To, convert, pointwise, within
from vision_ssm.checkpoints.vmamba import SS2D

_QUERY: Rules = {"0.#.": "reduce.#.", "1.": To("proj.", by=pointwise), "2.": "norm."}
# The parts of the published mixer that are the aggregator here.
_DMCA: Rules = {
    "d_norm.": "norm.",
    **within("d_proj.", "", {"0.": "conv.", "1.": "conv_norm.", "3.": To("kv.", by=pointwise)}),
    **within("q.", "q.", _QUERY),
    **within("k.", "k.", _QUERY),
    **within("v.", "v.", {"0.": To("proj.", by=pointwise), "1.": "norm."}),
    **within("in_proj.", "join_", {"0.": "conv.", "2.": "proj."}),
    "scale": "attention.scale",
}
_BLOCK: Rules = {
    **within("op.", "dmca.", _DMCA),
    **within("op.", "ss2d.", SS2D),
    "norm.": "norm1.",
    "layerscale_#.": To("layer_scale#.", by=Tensor.flatten),  # depthwise 1x1 convolutions there
    "mlp.dwconv.": "mlp.conv.conv.",
    "mlp.fc#.": To("mlp.fc#.", by=pointwise),
    "pos_embed.": "pos_embed.conv.",
    "": "",
}
_SPARX: Rules = {
    # Downsampling ends a stage there and begins the next one here.
    **within("layers.#.downsample.", "stages.#+1.downsample.", {"0.": "conv.", "1.": "norm."}),
    **within("layers.#.blocks.#.", "stages.#.blocks.#.", _BLOCK),
    "norm.#.": "feature_norms.#.",
    "classifier.0.": "norm.",
    "classifier.3.": "head.fc.",
}
_STEM: Rules = {"0.": "conv1.", "1.": "norm1.", "3.": "conv2.", "4.": "norm2."}
_STEM_OF_THREE: Rules = {**_STEM, "3.": "middle.0.", "4.": "middle.1.", "6.": "conv2.", "7.": "norm2."}


def sparx_rules(names: Iterable[str]) -> Rules:
    """Return the rules for a SparX-Mamba with these names, whose stem has two convolutions or three."""
    stem = _STEM_OF_THREE if any(name.startswith(("patch_embed.6.", "stem.middle.")) for name in names) else _STEM
    return {**within("patch_embed.", "stem.", stem), **_SPARX}


def convert_sparx(state: State) -> State:
    """Map the state dict of an official SparX-Mamba to :class:`vision_ssm.models.SparXMamba`."""
    return convert(sparx_rules(state), state)

"""Official EfficientVMamba checkpoints: their keys, and ours; also those of the detection backbone (``outnorm0``..)."""

from torch import Tensor

from vision_ssm.checkpoints.rules import Rules, State, To, convert, pointwise, within
from vision_ssm.checkpoints.vmamba import SS2D


def _x_proj(value: Tensor) -> Tensor:
    """Turn the matrices of the four sub-grids, (4, R + 2N, E), into a grouped 1x1 convolution."""
    return value.reshape(-1, value.shape[-1], 1, 1)


_CONV_BRANCH: Rules = {"0.": "conv_dw.", "1.": "bn.", "3.": To("conv_pw.", by=pointwise)}
_EVSS_BLOCK: Rules = {
    **within("op.", "ss2d.", {**SS2D, "x_proj_weight": To("x_proj.proj.weight", by=_x_proj)}),
    **within("conv_branch.", "conv_branch.", _CONV_BRANCH),
    **within("se.", "gate.", {"norm.": "norm.", "global_reduce.": "reduce.", "channel_select.": "expand."}),
    "norm.": "norm1.",
    "": "",
}
_INVERTED_RESIDUAL: Rules = {
    "conv_pw.0.": To("conv_pw.", by=pointwise),
    "conv_pw.1.": "bn1.",
    "conv_dw.0.": "conv_dw.",
    "conv_dw.1.": "bn2.",
    "se.conv_reduce.": To("se.reduce.", by=pointwise),
    "se.conv_expand.": To("se.expand.", by=pointwise),
    "conv_pw2.0.": To("conv_pwl.", by=pointwise),
    "conv_pw2.1.": "bn3.",
    "": "",
}
_MERGING: Rules = {"reduction.": "reduction.", "norm.": "norm."}
EFFICIENT_VMAMBA: Rules = {
    **within("patch_embed.", "stem.", {"0.": "conv.", "2.": "norm."}),
    # Merging ends a stage there, as its last child in stages without "blocks"; it begins the next one here.
    **within("layers.#.downsample.", "stages.#+1.downsample.", _MERGING),
    **within("layers.#.#.", "stages.#+1.downsample.", _MERGING),
    **within("layers.#.blocks.#.", "stages.#.blocks.#.", _EVSS_BLOCK),
    "layers.#.0.": "layers.#.0.",  # a permutation, which has no weights
    **within("layers.#.#.", "stages.#.blocks.#-1.", _INVERTED_RESIDUAL),
    "outnorm#.": "feature_norms.#.",
    "classifier.norm.": "norm.",
    "classifier.head.": "head.fc.",
}


def convert_efficient_vmamba(state: State) -> State:
    """Map the state dict of an official EfficientVMamba to :class:`vision_ssm.models.EfficientVMamba`."""
    return convert(EFFICIENT_VMAMBA, state)

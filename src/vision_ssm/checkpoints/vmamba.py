"""Official VMamba checkpoints: their keys, and ours.

Covers the classification code (``x_proj_weight`` (4, R + 2N, di)), the single-file ``vmamba.py`` (``x_proj.weight``
(4 (R + 2N), di)), detection backbones (``outnorm0``..), and older names the official code still renames.
"""

from torch import Tensor

from vision_ssm.checkpoints.rules import Rules, State, To, convert, pointwise, within


def _by_route(value: Tensor) -> Tensor:
    """Return (4, rows, columns) from a weight whose routes may be folded, (4 rows, columns)."""
    return value.reshape(4, -1, value.shape[-1])


def _x_proj(value: Tensor) -> Tensor:
    """Fold the routes: (4, R + 2N, di), (4 (R + 2N), di) or (4 (R + 2N), di, 1) to (4 (R + 2N), di)."""
    return _by_route(value[..., 0] if value.dim() == 3 and value.shape[-1] == 1 else value).flatten(0, 1)


_X_PROJ = To("x_proj.weight", by=_x_proj)
_DT_WEIGHT = To("dt_weight", by=lambda value: _by_route(value).mT.contiguous())  # multiplied from the left
_DT_BIAS = To("dt_bias", by=lambda value: value.reshape(4, -1))

SS2D: Rules = {
    "x_proj_weight": _X_PROJ,
    "x_proj.weight": _X_PROJ,
    "dt_projs_weight": _DT_WEIGHT,
    "dt_projs.weight": _DT_WEIGHT,
    "dt_projs_bias": _DT_BIAS,
    "dt_projs.bias": _DT_BIAS,
    "A_logs": To("A_log", by=_by_route),
    "Ds": To("D", by=lambda value: value.reshape(4, -1)),
    "in_proj.": To("in_proj.", by=pointwise),
    "out_proj.": To("out_proj.", by=pointwise),
    "": "",
}
VSS_BLOCK: Rules = {
    **within("op.", "ss2d.", SS2D),
    **within("self_attention.", "ss2d.", SS2D),
    "norm.": "norm1.",
    "ln_1.": "norm1.",
    "mlp.fc#.": To("mlp.fc#.", by=pointwise),
    "": "",
}
_STEM: Rules = {"0.": "conv1.", "2.": "norm1.", "5.": "conv2.", "7.": "norm2.", "proj.": "conv1.", "norm.": "norm1."}
VMAMBA: Rules = {
    **within("patch_embed.", "stem.", _STEM),
    # Downsampling ends a stage there and begins the next one here.
    **within("layers.#.downsample.", "stages.#+1.downsample.", {"1.": "conv.", "3.": "norm."}),
    **within("layers.#.blocks.#.", "stages.#.blocks.#.", VSS_BLOCK),
    "outnorm#.": "feature_norms.#.",
    "classifier.norm.": "norm.",
    "classifier.head.": "head.fc.",
    "head.weight": "head.fc.weight",
    "head.bias": "head.fc.bias",
}


def convert_vmamba(state: State) -> State:
    """Map the state dict of an official VMamba to :class:`vision_ssm.models.VMamba`."""
    return convert(VMAMBA, state)


def convert_vss_block(state: State) -> State:
    """Map one official block (``norm.*``, ``op.*``, ``norm2.*``, ``mlp.*``) to :class:`vision_ssm.layers.VSSBlock`."""
    return convert(VSS_BLOCK, state)


def convert_ss2d(state: State) -> State:
    """Map the official ``op.*`` keys (without ``op.``) to :class:`vision_ssm.layers.SS2D`."""
    return convert(SS2D, state)

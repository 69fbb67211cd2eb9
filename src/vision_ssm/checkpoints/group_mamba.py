"""Official GroupMamba checkpoints: their keys, and ours.

Four modules of one group each there are one module of four groups here; one projection there gives input and gate, in
this order, which are two here.
"""

import torch
from torch import Tensor

from vision_ssm.checkpoints.rules import Rules, State, To, convert, within


def _grouped(groups: list[Tensor]) -> Tensor:
    """Join linear layers, (d', d) or (1, d', d), to a grouped 1x1 convolution, (4 d', d, 1, 1)."""
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in groups])[:, :, None, None]


def _halves(groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    dim = groups[0].shape[1]
    return _grouped([value[:dim] for value in groups]), _grouped([value[dim:] for value in groups])


_SS2D: Rules = {
    "conv2d.": To("conv2d.", by=torch.cat),  # (d, 1, 3, 3) and (d,)
    "x_proj_weight": To("x_proj.weight", by=_grouped),  # (1, R + 2N, d)
    "dt_projs_weight": To("dt_weight", by=lambda groups: torch.cat([value.mT for value in groups])),  # (1, d, R)
    "dt_projs_bias": To("dt_bias", by=torch.cat),  # (1, d)
    "A_logs": To("A_log", by=torch.stack),  # (d, N)
    "Ds": To("D", by=torch.stack),  # (d,)
    "out_norm.": To("out_norm.", by=torch.cat),  # (d,)
    "out_proj.weight": To("out_proj.weight", by=_grouped),  # (d, d)
    "in_proj.weight": To("in_proj.weight", "gate_proj.weight", by=_halves),  # (2d, d)
}
_MIXER: Rules = {
    **within("mamba_g{1,2,3,4}.", "ss2d.", _SS2D),
    "norm.": "norm.",
    "fc#.": "fc#.",
    "proj.": "proj.",
    "skip_scale": "skip_scale",
}
_MIXER_AND_MLP: Rules = {**within("attn.", "mixer.", _MIXER), "mlp.dwconv.dwconv.": "mlp.dwconv.", "mlp.": "mlp."}
_STEM: Rules = {"0.": "conv1.", "1.": "norm1.", "3.": "conv2.", "4.": "norm2.", "6.": "conv3.", "7.": "norm3."}
GROUP_MAMBA: Rules = {
    **within("patch_embed1.conv.", "stem.", _STEM),
    **within("patch_embed1.", "stem.", {"proj.": "conv4.", "norm.": "norm4."}),
    # Stages count from 1 there.
    **within("patch_embed#.", "stages.#-1.downsample.", {"proj.": "conv.", "norm.": "norm."}),
    **within("block#.#.", "stages.#-1.blocks.#.", {**_MIXER_AND_MLP, "norm2.": "norm."}),
    **within("post_network.0.", "head.block.", {**_MIXER_AND_MLP, "norm#.": "norm#."}),
    "norm4.": "head.norm.",  # follows the pooling
    "norm#.": "stages.#-1.norm.",
    "head.weight": "head.fc.weight",
    "head.bias": "head.fc.bias",
    "dist_head.": "head.fc_dist.",
}


def convert_group_mamba(state: State) -> State:
    """Map the state dict of an official GroupMamba to :class:`vision_ssm.models.GroupMamba`."""
    return convert(GROUP_MAMBA, state)

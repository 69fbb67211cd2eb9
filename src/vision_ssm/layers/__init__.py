"""Building blocks that the models share and that work in anybody's network."""

from vision_ssm.layers.conv import conv_act
from vision_ssm.layers.mlp import Linear, Mlp
from vision_ssm.layers.norm import GroupNorm1
from vision_ssm.layers.ss2d import SS2D, VSSBlock, scan_map

__all__ = ["SS2D", "GroupNorm1", "Linear", "Mlp", "VSSBlock", "conv_act", "scan_map"]

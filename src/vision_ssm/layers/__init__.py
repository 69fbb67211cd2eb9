"""Building blocks that the models share and that work in anybody's network."""

from vision_ssm.layers.connect import NCHW, NHWC, Connected, Layout, Tokens, connect
from vision_ssm.layers.conv import ResidualConv, conv_act
from vision_ssm.layers.mlp import Linear, Mlp
from vision_ssm.layers.norm import GroupNorm1
from vision_ssm.layers.sparx import DMCA, ChannelAttention, Connections, sparx_connections
from vision_ssm.layers.ss2d import SS2D, VSSBlock, scan_map

__all__ = [
    "DMCA",
    "NCHW",
    "NHWC",
    "SS2D",
    "ChannelAttention",
    "Connected",
    "Connections",
    "GroupNorm1",
    "Layout",
    "Linear",
    "Mlp",
    "ResidualConv",
    "Tokens",
    "VSSBlock",
    "connect",
    "conv_act",
    "scan_map",
    "sparx_connections",
]

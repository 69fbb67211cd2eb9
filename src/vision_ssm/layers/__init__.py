"""Building blocks that the models share and that work in any network."""

from vision_ssm.layers.connect import NCHW, NHWC, Connected, Layout, Tokens, connect
from vision_ssm.layers.conv import ResidualConv, conv_act
from vision_ssm.layers.mamba_mixer import (
    MultiResolutionConv,
    QSTokenMixer,
    SelectiveChannelMixer,
    SelectiveTokenMixer,
    WeightedAverage,
)
from vision_ssm.layers.norm import GroupNorm1
from vision_ssm.layers.quasi_separable import quasi_separable_scan
from vision_ssm.layers.sparx import DMCA, ChannelAttention, Connections, sparx_connections
from vision_ssm.layers.ss2d import SS2D, VSSBlock, scan_map
from vision_ssm.layers.switch_of_scans import SCAN_POOL, SwitchOfScans

__all__ = [
    "DMCA",
    "NCHW",
    "NHWC",
    "SCAN_POOL",
    "SS2D",
    "ChannelAttention",
    "Connected",
    "Connections",
    "GroupNorm1",
    "Layout",
    "MultiResolutionConv",
    "QSTokenMixer",
    "ResidualConv",
    "SelectiveChannelMixer",
    "SelectiveTokenMixer",
    "SwitchOfScans",
    "Tokens",
    "VSSBlock",
    "WeightedAverage",
    "connect",
    "conv_act",
    "quasi_separable_scan",
    "scan_map",
    "sparx_connections",
]

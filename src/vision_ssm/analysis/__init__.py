"""Cost and speed of models, drawings of scan routes, and what scans attend to."""

from vision_ssm.analysis.attention import attention_row, channel_attention, scan_attention, switch_choices
from vision_ssm.analysis.complexity import Complexity, complexity, feature_shapes
from vision_ssm.analysis.pictures import draw_routes
from vision_ssm.analysis.scan_layers import find_scan_layers
from vision_ssm.analysis.speed import Speed, machine_settings, measure_speed, scan_backend

__all__ = [
    "Complexity",
    "Speed",
    "attention_row",
    "channel_attention",
    "complexity",
    "draw_routes",
    "feature_shapes",
    "find_scan_layers",
    "machine_settings",
    "measure_speed",
    "scan_attention",
    "scan_backend",
    "switch_choices",
]

"""What models cost, how fast they are, and what they do: numbers that draw and save themselves."""

from vision_ssm.analysis.ablation import Ablation, AblationRun, Variant, ablate, grid
from vision_ssm.analysis.attention import attention_row, channel_attention, scan_attention, switch_choices
from vision_ssm.analysis.complexity import Complexity, complexity, feature_shapes
from vision_ssm.analysis.pictures import draw_routes
from vision_ssm.analysis.resolution import Resolution, ResolutionPoint, resolution
from vision_ssm.analysis.scan_layers import find_scan_layers
from vision_ssm.analysis.speed import Bench, BenchEntry, Speed, machine_settings, measure_speed, scan_backend

__all__ = [
    "Ablation",
    "AblationRun",
    "Bench",
    "BenchEntry",
    "Complexity",
    "Resolution",
    "ResolutionPoint",
    "Speed",
    "Variant",
    "ablate",
    "attention_row",
    "channel_attention",
    "complexity",
    "draw_routes",
    "feature_shapes",
    "find_scan_layers",
    "grid",
    "machine_settings",
    "measure_speed",
    "resolution",
    "scan_attention",
    "scan_backend",
    "switch_choices",
]

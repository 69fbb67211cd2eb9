"""What models cost, how fast they are, and what they do: numbers that draw and save themselves."""

from vision_ssm.analysis.ablation import Ablation, AblationRun, Variant, ablate, grid
from vision_ssm.analysis.attention import attention_row, channel_attention, scan_attention, switch_choices
from vision_ssm.analysis.complexity import Complexity, complexity, feature_shapes
from vision_ssm.analysis.fields import ERF, centered_squares, effective_receptive_field
from vision_ssm.analysis.maps import class_activation, principal_components, stage_maps
from vision_ssm.analysis.pictures import draw_routes
from vision_ssm.analysis.resolution import Resolution, ResolutionPoint, measure_resolutions
from vision_ssm.analysis.scan_layers import find_scan_layers
from vision_ssm.analysis.similarity import CKA, cka, linear_cka
from vision_ssm.analysis.speed import Bench, BenchEntry, Speed, machine_settings, measure_speed, scan_backend

__all__ = [
    "Ablation",
    "AblationRun",
    "Bench",
    "BenchEntry",
    "CKA",
    "Complexity",
    "ERF",
    "Resolution",
    "ResolutionPoint",
    "Speed",
    "Variant",
    "ablate",
    "attention_row",
    "centered_squares",
    "channel_attention",
    "cka",
    "class_activation",
    "complexity",
    "draw_routes",
    "effective_receptive_field",
    "feature_shapes",
    "find_scan_layers",
    "grid",
    "linear_cka",
    "machine_settings",
    "measure_resolutions",
    "measure_speed",
    "principal_components",
    "scan_attention",
    "scan_backend",
    "stage_maps",
    "switch_choices",
]

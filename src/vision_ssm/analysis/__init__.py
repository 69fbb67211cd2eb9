"""Cost and speed of models, and drawings of scan routes."""

from vision_ssm.analysis.complexity import Complexity, complexity, feature_shapes
from vision_ssm.analysis.pictures import draw_routes
from vision_ssm.analysis.speed import Speed, machine_settings, measure_speed, scan_backend

__all__ = [
    "Complexity",
    "Speed",
    "complexity",
    "draw_routes",
    "feature_shapes",
    "machine_settings",
    "measure_speed",
    "scan_backend",
]

"""The scan operator: selective scans along routes of token indices."""

from vision_ssm.scan.backends import available_backends, backend_for, last_backend, use_backend
from vision_ssm.scan.operator import route_scan
from vision_ssm.scan.routes import (
    ATROUS_SCAN,
    COLUMNS,
    CROSS_SCAN,
    ROWS,
    AntiDiagonal,
    Diagonal,
    Reversed,
    Routes,
    Rows,
    ScanPath,
    Shifted,
    SkipSampled,
    Snake,
    Transposed,
    Windowed,
    build_routes,
)
from vision_ssm.scan.selective_scan import selective_scan_fn

__all__ = [
    "ATROUS_SCAN",
    "COLUMNS",
    "CROSS_SCAN",
    "ROWS",
    "AntiDiagonal",
    "Diagonal",
    "ScanPath",
    "Reversed",
    "Routes",
    "Rows",
    "Shifted",
    "SkipSampled",
    "Snake",
    "Transposed",
    "Windowed",
    "available_backends",
    "backend_for",
    "build_routes",
    "last_backend",
    "route_scan",
    "selective_scan_fn",
    "use_backend",
]

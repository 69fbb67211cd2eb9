"""Drawings of scan routes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import TYPE_CHECKING

from vision_ssm.scan import ScanPath

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_routes(paths: Sequence[ScanPath], height: int, width: int, columns: int = 4) -> Figure:
    """Draw every route over the map's tokens, colored from its first step (dark, marked) to its last.

    Padding tokens are not on the map; a route that visits them is dotted across the gap.

    Args:
        paths: The routes.
        height: Height of the map in tokens.
        width: Width of the map in tokens.
        columns: Drawings per row.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        TypeError: If an item is not a :class:`ScanPath`.
        ValueError: If there are no paths, or the map is empty.
        ImportError: If matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    if not paths:
        raise ValueError("paths must name at least one route, got none")
    for path in paths:
        if not isinstance(path, ScanPath):
            raise TypeError(f"paths must hold vision_ssm.scan.ScanPath, got {type(path).__name__}")
    for name, value in (("height", height), ("width", width), ("columns", columns)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    columns = min(columns, len(paths))
    rows = math.ceil(len(paths) / columns)
    side = 2.6
    figure = Figure(figsize=(side * columns, (side * height / width + 0.45) * rows), layout="constrained")
    colors = colormaps["viridis"]
    for place, path in enumerate(paths):
        axes = figure.add_subplot(rows, columns, place + 1)
        tokens = path.tokens(height, width).tolist()
        visited = [(step, token % width, token // width) for step, token in enumerate(tokens) if token >= 0]
        every = range(height * width)
        axes.scatter([t % width for t in every], [t // width for t in every], s=9, color="0.82", zorder=1)
        last = max(1, len(tokens) - 1)
        lines, shades, dotted = [], [], []
        for (step, x, y), (next_step, next_x, next_y) in pairwise(visited):
            lines.append([(x, y), (next_x, next_y)])
            shades.append(colors(0.9 * step / last))
            dotted.append(":" if next_step > step + 1 else "-")
        axes.add_collection(LineCollection(lines, colors=shades, linestyles=dotted, linewidths=1.6, zorder=2))
        axes.scatter(
            [x for _, x, _ in visited],
            [y for _, _, y in visited],
            s=14,
            color=[colors(0.9 * step / last) for step, _, _ in visited],
            zorder=3,
        )
        for _, x, y in visited[:1]:
            axes.scatter([x], [y], s=80, facecolor="none", edgecolor="black", linewidth=1.2, zorder=4)
        axes.set(xlim=(-0.7, width - 0.3), ylim=(height - 0.3, -0.7), aspect="equal", xticks=[], yticks=[])
        axes.set_title(path_name(path), fontsize=8)
        axes.spines[:].set_color("0.8")
    return figure


def path_name(path: ScanPath) -> str:
    """The class of a path and its attributes, such as `Reversed(Rows)`."""
    inner = getattr(path, "path", None)
    own = type(path).__name__
    if isinstance(inner, ScanPath):
        return f"{own}({path_name(inner)})"
    values = [str(getattr(path, field.name)) for field in fields(path)]
    return f"{own}({', '.join(values)})" if values else own

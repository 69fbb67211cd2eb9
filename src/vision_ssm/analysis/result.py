"""What an analysis returns: arrays that draw themselves and save themselves, in one style."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colors of series, which color-blind people can tell apart (Okabe and Ito)."""

LINES = ("-", "--", "-.", ":")
"""Styles of lines, for what has the same color or is printed without colors."""

MARKERS = "osD^vP*X"
"""Markers, for more series than there are colors."""

COLOR_MAP = "viridis"
"""Colors of quantities; black to white stays black to white in print."""


class Result:
    """Base of what analyses return: a frozen dataclass of names, numbers and arrays."""

    def plot(self) -> Figure:
        """Draw it with matplotlib."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """The numbers as lines of a table, for CSV and JSON."""
        raise NotImplementedError

    def save(self, path: Path) -> list[Path]:
        """Write ``path.png`` and ``path.csv``, each whole or not at all; returns the files.

        Raises:
            OSError: There is no such folder, or the disk is full.
        """
        from vision_ssm.engine.files import write_csv
        from vision_ssm.engine.plots import save_figure

        picture, table = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.csv")
        save_figure(self.plot(), picture)
        write_csv(table, self.rows())
        return [picture, table]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts do not overlap."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend_below(axes: Axes) -> None:
    """Put the legend of one of the panels below all of them, in as many columns, at most four, as its labels allow."""
    figure: Any = axes.figure
    handles, labels = axes.get_legend_handles_labels()
    longest = 6 + max(map(len, labels), default=0)
    columns = min(4, max(1, int(12 * figure.get_figwidth() / longest)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)

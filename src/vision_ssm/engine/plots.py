import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vision_ssm.engine.files import atomic_write

_TRAIN, _VAL, _BEST = "#8c8c8c", "#1f5fa8", "#c0392b"


def draw_curves(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any], monitor: str, path: Path) -> None:
    """Draw the loss and the monitored metric by epoch, training and validation.

    Args:
        history: One row of metrics per epoch.
        best: The row of the best epoch.
        monitor: The metric that decides which one that is.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) <= 40 else None
    for axes, what in zip(figure.subplots(1, 2), ("loss", monitor), strict=True):
        for kind, label, color in (("train", "training", _TRAIN), ("val", "validation", _VAL)):
            if f"{kind}_{what}" in best:
                values = [row[f"{kind}_{what}"] for row in history]
                axes.plot(epochs, values, label=label, color=color, marker=marker, markersize=3, linewidth=1.6)
        if (value := best.get(f"val_{what}")) is not None:
            axes.plot(best["epoch"], value, "o", color=_BEST, markersize=7, fillstyle="none", label="best")
        axes.set(xlabel="epoch", title=what[0].upper() + what[1:].replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.annotate(
        f"best {best[f'val_{monitor}']:.2%} in epoch {best['epoch']}",
        (1.0, 1.02), xycoords="axes fraction", ha="right", color=_BEST, fontsize=9,
    )  # fmt: skip
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


def elide(name: str, length: int) -> str:
    """A name as matplotlib can show it, shortened in its middle."""
    known = _characters()
    name = "".join(c if ord(c) in known else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
    # The middle goes, because names are often told apart by their ends.
    tail = length // 3
    short = name if len(name) <= length else f"{name[: length - tail - 1]}…{name[-tail:]}"
    return short.replace("$", r"\$")  # dollar signs would start matplotlib's maths


@functools.cache
def _characters() -> frozenset[int]:
    """What matplotlib's default font can show."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())

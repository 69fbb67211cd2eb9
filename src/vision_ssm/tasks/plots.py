from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor

from vision_ssm.data import Images
from vision_ssm.engine.plots import elide, save_figure

Record = tuple[str, int, float, int]
"""Id of an image, its predicted class, the probability and its true class."""

_RIGHT, _WRONG = "#2a7f3f", "#c0392b"


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path, *, what: str = "images") -> None:
    """Draw the confusion matrix: rows are true classes, shaded by the share of the row.

    Cells are numbered up to 20 classes, classes named up to 100.

    Args:
        confusion: (classes, classes) counts.
        classes: Their names.
        path: The PNG file to write.
        what: What is counted; cells show counts of images, or else percentages of the row.
    """
    counts = confusion.numpy()
    n = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(2.6 + 0.42 * n, 4.2, 15))
    names = [elide(name, 24) for name in classes]
    margin = 0.075 * max(map(len, names)) if n <= 100 else 0.5
    figure = Figure(figsize=(side + margin + 0.9, side + margin), layout="constrained")
    axes = figure.subplots()
    # With many classes the errors spread thin; the square root keeps them visible.
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(1.0 if n <= 20 else 0.5, vmin=0, vmax=1))
    size = float(np.clip(0.72 * 72 * 0.42 * min(1, 30 / n), 4.5, 10))
    if n <= 100:
        upright = n > 12 or max(map(len, names)) > 6
        axes.set_xticks(range(n), names, rotation=90 if upright else 0, fontsize=size)
        axes.set_yticks(range(n), names, fontsize=size)
    if n <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.55 else "black"
            text = str(counts[row, column]) if what == "images" else f"{100 * shares[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size - 1)
        axes.set_xticks(np.arange(n - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(n - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="#dddddd", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{counts.trace() / counts.sum():.2%} of {counts.sum():,} {what} correct", fontsize=11)
    bar = figure.colorbar(picture, ax=axes, shrink=0.7 if n <= 20 else 0.4, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    save_figure(figure, path)


def draw_predictions(
    records: Sequence[Record], classes: Sequence[str], images: Images, path: Path, *, most: int = 30
) -> None:
    """Draw a sheet of images with what the classifier took them for; wrong ones in red with the true class.

    Args:
        records: Id, predicted class, its probability and true class of each of `images`, in the same order.
        classes: Names of the classes.
        images: The images.
        path: The PNG file to write.
        most: Number of images; up to half are wrong ones, the rest right ones, chosen at random.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(records), generator=generator)
    predicted, labels = torch.tensor([(guess, label) for _, guess, _, label in records]).T
    hits = (predicted == labels)[order]
    wrong = order[~hits]
    right = order[hits][: most - min(len(wrong), most // 2)]
    chosen = torch.cat([wrong[: most - len(right)], right]).tolist()
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(1.95 * columns, 2.35 * rows + 0.7), layout=layout)
    shown = len(chosen) - len(right)
    part = "" if not shown else ", in red" if shown == len(wrong) else f", {shown} of them here in red"
    figure.suptitle(f"{len(wrong):,} of {len(order):,} images classified wrongly{part}", fontsize=11)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, index, sample in zip(figure.axes, chosen, images.pick(chosen), strict=False):
        _, guess, confidence, target = records[index]
        color = _RIGHT if target == guess else _WRONG
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=2.5)
        axes.imshow(thumbnail(sample["image"]))
        title = f"{elide(classes[guess], 16)} ({confidence:.0%})"
        below = "" if target == guess else f"is {elide(classes[target], 18)}"
        axes.set_title(title, fontsize=9, color=color, pad=4)
        axes.set_xlabel(below, fontsize=9, color=color, labelpad=3)
    save_figure(figure, path)


def thumbnail(image: Image.Image, side: int = 160) -> Image.Image:
    """A square view of `image`; small ones are enlarged without blur so that their pixels can be seen."""
    scale = side / max(image.size)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    small = image.resize([max(1, round(s * scale)) for s in image.size], method)
    square = Image.new("RGB", (side, side), "#f2f2f2")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square

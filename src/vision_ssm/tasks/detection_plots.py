from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from vision_ssm.data import Images
from vision_ssm.data.coco import decode_masks
from vision_ssm.engine.plots import save_figure
from vision_ssm.tasks.coco_metric import CocoScores
from vision_ssm.tasks.plots import elide

_COLORS = [tuple(round(255 * part) for part in color) for color in colormaps["tab10"].colors]  # type: ignore[attr-defined]
_THRESHOLD = 0.3
_SIDE = 640  # pixels of the longest side in a sheet


def draw_objects(
    image: Image.Image, boxes: Sequence[Sequence[float]], names: Sequence[str], numbers: Sequence[int], masks: Any = None
) -> Image.Image:
    """Draw boxes, masks and names on an image.

    Args:
        image: The image.
        boxes: x1, y1, x2, y2 in pixels of each object.
        names: What to write at each of them.
        numbers: Decides on its color.
        masks: (N, H, W) bool, if there are some.
    """
    if not boxes:
        return image
    colors = [_COLORS[number % len(_COLORS)] for number in numbers]
    canvas = pil_to_tensor(image.convert("RGB"))
    if masks is not None:
        canvas = draw_segmentation_masks(canvas, torch.as_tensor(masks), alpha=0.45, colors=colors)
    side = min(image.size)
    dark = [tuple(part // 2 for part in color) for color in colors]
    style: dict[str, Any] = dict(colors=colors, width=max(1, round(side / 250)), labels=[f" {name} " for name in names])
    style |= dict(font=findfont(FontProperties()), font_size=max(9, round(side / 32)), label_colors="white")
    return to_pil_image(draw_bounding_boxes(canvas, torch.tensor(boxes), label_background_colors=dark, **style))


def draw_row(image: Image.Image, row: Mapping[str, Any], classes: Sequence[str]) -> Image.Image:
    """Draw the objects of a prediction's row; colors tell classes apart or, of one class, objects."""
    objects = row["objects"]
    names = [f"{elide(found['class'], 24)} {found['score']:.0%}" for found in objects]
    numbers = [found["label"] if len(classes) > 1 else i for i, found in enumerate(objects)]
    masks = decode_masks([found["mask"] for found in objects]) if objects and "mask" in objects[0] else None
    return draw_objects(image, [found["box"] for found in objects], names, numbers, masks)


def draw_pairs(
    records: Sequence[Mapping[str, Any]], classes: Sequence[str], images: Images, path: Path, *, most: int = 8
) -> None:
    """Draw a sheet of images, each with its annotated objects and, to the right, with the objects found.

    Args:
        records: Rows of the predictions for `images`, in the same order.
        classes: Names of the classes.
        images: The images.
        path: The PNG file to write.
        most: Number of images, chosen at random.
    """
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))[:most].tolist()
    pictures: list[tuple[str, Image.Image, Image.Image]] = []
    for index, sample in zip(order, images.pick(order), strict=True):
        found = [each for each in records[index]["objects"] if each["score"] >= _THRESHOLD]
        truth = _truth(sample, classes)
        pictures.append((sample["id"], truth, draw_row(sample["image"], {"objects": found}, classes)))
    columns = 2 if len(pictures) > 1 else 1
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(8.4 * columns, 3.4 * rows + 0.5), layout="constrained")
    figure.suptitle(f"Annotated (left) and found with a score of at least {_THRESHOLD:.0%} (right)", fontsize=12)
    grid = figure.subplots(rows, 2 * columns, squeeze=False).flat
    for axes in figure.axes:
        axes.axis("off")
    for name, truth, found in pictures:
        for picture, text in ((truth, elide(name, 40)), (found, "")):
            axes = next(grid)
            picture.thumbnail((_SIDE, _SIDE))
            axes.imshow(picture)
            axes.set_title(text, fontsize=9, loc="left")
    save_figure(figure, path)


def _truth(sample: Mapping[str, Any], classes: Sequence[str]) -> Image.Image:
    labels = sample["labels"].tolist()
    names = [elide(classes[label], 24) for label in labels]
    numbers = labels if len(classes) > 1 else range(len(labels))
    masks = decode_masks(sample["masks"]) if labels and "masks" in sample else None
    return draw_objects(sample["image"], sample["boxes"].tolist(), names, numbers, masks)


def draw_precision(scores: CocoScores, classes: Sequence[str], path: Path, *, most: int = 8) -> None:
    """Draw precision by recall at an IoU of 0.5: the mean over all classes, and those with most objects.

    Args:
        scores: The metrics.
        classes: Names of the classes.
        path: The PNG file to write.
        most: Number of classes.
    """
    curves = {"boxes": scores.box_precision, "masks": scores.mask_precision}  # (101, classes)
    curves = {kind: values for kind, values in curves.items() if values is not None}
    figure = Figure(figsize=(5.4 * len(curves), 4.2), layout="constrained")
    chosen = np.argsort(-np.asarray(scores.objects), kind="stable")[:most]
    recall = np.linspace(0, 1, 101)
    for axes, (kind, precision) in zip(figure.subplots(1, len(curves), squeeze=False).flat, curves.items(), strict=True):
        for number in chosen if len(classes) > 1 else ():
            axes.plot(recall, precision[:, number], label=elide(classes[number], 20), linewidth=1, alpha=0.7)
        axes.plot(recall, np.nanmean(precision, 1), color="black", label="mean", linewidth=2)
        axes.set(xlabel="recall", ylabel="precision", title=f"{kind}, IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    save_figure(figure, path)

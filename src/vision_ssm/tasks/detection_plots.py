from collections.abc import Mapping, Sequence
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
from vision_ssm.data.coco import outlines
from vision_ssm.data.rle import decode_masks, to_rle
from vision_ssm.engine.plots import elide, save_figure
from vision_ssm.tasks.coco_metric import RECALLS, CocoFigures

_COLORS = [tuple(round(255 * part) for part in color) for color in colormaps["tab10"].colors]  # type: ignore[attr-defined]
_THRESHOLD = 0.5
_SIDE = 640  # pixels of the longest side in a sheet


def draw_objects(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    numbers: Sequence[int],
    masks: Any = None,
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
    if masks is not None:  # one by one, because torchvision blackens what belongs to several
        for mask, color in [*zip(torch.as_tensor(masks), colors, strict=True)][::-1]:  # the best one last
            canvas = draw_segmentation_masks(canvas, mask, alpha=0.4, colors=[color])
    side = min(image.size)
    dark = [tuple(part // 2 for part in color) for color in colors]
    style: dict[str, Any] = dict(colors=colors, width=max(1, round(side / 250)), labels=[f" {name} " for name in names])
    style |= dict(font=findfont(FontProperties()), font_size=max(9, round(side / 36)), label_colors="white")
    style |= dict(fill_labels=True, label_background_colors=dark)
    reversed_style = {key: value[::-1] if isinstance(value, list) else value for key, value in style.items()}
    return to_pil_image(draw_bounding_boxes(canvas, torch.tensor(boxes).flip(0), **reversed_style))


def draw_row(image: Image.Image, row: Mapping[str, Any], classes: Sequence[str]) -> Image.Image:
    """Draw the objects of a prediction's row; colors tell classes apart or, of one class, objects."""
    objects = row["objects"]
    names = [f"{elide(found['class'], 24)} {found['score']:.0%}" for found in objects]
    numbers = [found["label"] if len(classes) > 1 else i for i, found in enumerate(objects)]
    size = image.height, image.width
    masks = decode_masks([found["mask"] for found in objects], *size) if objects and "mask" in objects[0] else None
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
    figure.suptitle(f"Ground truth (left), predictions with a score of at least {_THRESHOLD:.0%} (right)", fontsize=12)
    grid = figure.subplots(rows, 2 * columns, squeeze=False).flat
    for axes in figure.axes:
        axes.axis("off")
    for name, truth, picture in pictures:
        for drawn, text in ((truth, elide(name, 40)), (picture, "")):
            axes = next(grid)
            drawn.thumbnail((_SIDE, _SIDE))
            axes.imshow(drawn)
            axes.set_title(text, fontsize=9, loc="left")
    save_figure(figure, path)


def _truth(sample: Mapping[str, Any], classes: Sequence[str]) -> Image.Image:
    image, labels = sample["image"], sample["labels"].tolist()
    names = [elide(classes[label], 24) for label in labels]
    numbers = labels if len(classes) > 1 else range(len(labels))
    size = image.height, image.width
    rles = [to_rle(outline, *size) for outline in outlines(sample["masks"])] if "masks" in sample else None
    masks = None if rles is None else decode_masks(rles, *size)
    return draw_objects(image, sample["boxes"].tolist(), names, numbers, masks)


def draw_precision(
    kinds: Mapping[str, CocoFigures], classes: Sequence[str], objects: np.ndarray, path: Path, *, most: int = 8
) -> None:
    """Draw precision by recall at an IoU of 0.5: the mean over all classes, and those with most objects.

    Args:
        kinds: The figures of boxes, and of masks.
        classes: Names of the classes.
        objects: Number of objects of each.
        path: The PNG file to write.
        most: Number of classes.
    """
    figure = Figure(figsize=(5.4 * len(kinds), 4.2), layout="constrained")
    chosen = np.argsort(-objects, kind="stable")[:most].tolist() if len(classes) > 1 else []
    for axes, (kind, found) in zip(figure.subplots(1, len(kinds), squeeze=False).flat, kinds.items(), strict=True):
        for label in chosen:
            axes.plot(RECALLS, found.precision[label], label=elide(classes[label], 20), linewidth=1, alpha=0.7)
        axes.plot(RECALLS, found.curve, color="black", label="mean over all" if chosen else classes[0], linewidth=2)
        title = f"{kind}es, AP50 {found.AP50:.1%}" if kind == "box" else f"{kind}s, AP50 {found.AP50:.1%}"
        axes.set(xlabel="recall", ylabel="precision", title=title, xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    save_figure(figure, path)

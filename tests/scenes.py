"""Small data sets in COCO's format, and images with masks of labels: colored shapes on noise."""

import json

import numpy as np
from PIL import Image, ImageDraw

from vision_ssm.data.rle import encode_masks

CATEGORIES = ({"id": 3, "name": "disc"}, {"id": 7, "name": "square"}, {"id": 9, "name": "triangle"})
_COLORS = ((200, 40, 40), (40, 180, 60), (50, 70, 210))
_SIZES = ((96, 128), (128, 96), (112, 112))


def write_scenes(root, counts=None, *, seed=0, sizes=_SIZES, crowd=True, masks=True):
    """Write images with one to four shapes each, of one color for each of three classes, and their annotations.

    Squares and triangles are outlined by polygons, discs by compressed run lengths. Ids of images begin at 11.

    Args:
        root: Folder of the data set, as COCO has it: annotations/instances_train2017.json beside train2017/.
        counts: Number of images of each split, {"train2017": 8, "val2017": 4} by default.
        seed: Decides everything.
        sizes: Heights and widths of the images, in turn.
        crowd: Whether the second image of a split has a crowd of discs besides.
        masks: Whether there are outlines.

    Returns:
        The folder.
    """
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((counts or {"train2017": 8, "val2017": 4}).items()):
        (root / split).mkdir()
        rng = np.random.default_rng((seed, number))
        content = {"images": [], "annotations": [], "categories": list(CATEGORIES)}
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            image = Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8))
            name = f"{i:04}.png"
            content["images"].append({"id": 11 + i, "file_name": name, "height": height, "width": width})
            shapes = [_add(image, int(rng.integers(3)), rng) for _ in range(rng.integers(1, 5))]
            shapes += [{**_add(image, 0, rng), "iscrowd": 1}] if crowd and i == 1 else []
            content["annotations"] += [{"image_id": 11 + i, **shape} for shape in shapes]
            image.save(root / split / name)
        for place, annotation in enumerate(content["annotations"], start=1):
            annotation["id"] = place
            if not masks:
                del annotation["segmentation"]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def write_masks(root, counts=None, *, seed=0, sizes=_SIZES, void=True):
    """Write images with shapes, and masks of labels: 0 is ground, then disc, square, triangle, and 255 counts not.

    Args:
        root: Folder of the data set: images/train, masks/train, and classes.txt.
        counts: Number of images of each split, {"train": 8, "val": 4} by default.
        seed: Decides everything.
        sizes: Heights and widths of the images, in turn.
        void: Whether the uppermost rows do not count.

    Returns:
        The folder.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("ground\ndisc\nsquare\ntriangle\n")
    for number, (split, count) in enumerate((counts or {"train": 8, "val": 4}).items()):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir()
        rng = np.random.default_rng((seed, number))
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            image = Image.fromarray(rng.integers(90, 160, (height, width, 3), dtype=np.uint8))
            for _ in range(rng.integers(1, 5)):
                _add(image, int(rng.integers(3)), rng)
            labels = np.zeros((height, width), np.uint8)
            for label, color in enumerate(_COLORS, start=1):
                labels[(np.asarray(image) == color).all(2)] = label
            labels[: 3 * void] = 255
            image.save(root / "images" / split / f"{i:04}.jpg", quality=95)
            Image.fromarray(labels).save(root / "masks" / split / f"{i:04}.png")
    return root


def _add(image, label, rng):
    """Draw a shape; return its annotation."""
    side = round(rng.uniform(0.2, 0.5) * min(image.size), 1)
    x, y = (round(rng.uniform(0, limit - side), 1) for limit in image.size)
    corners = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
    if label == 2:
        corners = [(x + side / 2, y), (x + side, y + side), (x, y + side)]
    drawing = ImageDraw.Draw(image)
    if label:
        drawing.polygon(corners, fill=_COLORS[label])
        segmentation = [[round(value, 2) for corner in corners for value in corner]]
        area = side**2 / label
    else:
        drawing.ellipse((x, y, x + side, y + side), fill=_COLORS[0])
        mask = Image.new("1", image.size)
        ImageDraw.Draw(mask).ellipse((x, y, x + side, y + side), fill=1)
        (segmentation,) = encode_masks(np.asarray(mask)[None])
        area = float(np.asarray(mask).sum())
    box = [x, y, side, side]
    return {"category_id": CATEGORIES[label]["id"], "bbox": box, "area": area, "iscrowd": 0,
            "segmentation": segmentation}  # fmt: skip

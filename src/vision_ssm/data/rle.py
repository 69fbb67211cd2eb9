"""Masks as run-length encodings, as COCO's tools compute them (by faster-coco-eval)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask

Rle = dict[str, Any]
"""A mask as JSON has it: `size`, its height and width, and `counts`, its compressed run lengths."""


def to_rle(segmentation: Any, height: int, width: int) -> Rle:
    """Encode what a COCO file has as `segmentation`: polygons, or run lengths, compressed or not."""
    if isinstance(segmentation, list):
        return _as_text(mask.merge(mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return _as_text(mask.frPyObjects(segmentation, height, width))
    return segmentation


def encode_masks(masks: np.ndarray) -> list[Rle]:
    """Encode (N, H, W) bool masks; of large images only the columns that the objects are in are looked at."""
    return [_encode(mask) for mask in masks]


def _encode(pixels: np.ndarray) -> Rle:
    height, width = pixels.shape
    columns = np.flatnonzero(pixels.any(0))
    first, last = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
    changes = np.flatnonzero(np.diff(pixels[:, first:last].T.ravel(), prepend=False, append=False)) + first * height
    counts = np.diff(changes, prepend=0, append=height * width).tolist()
    return _as_text(mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def decode_masks(rles: Sequence[Rle], height: int, width: int) -> np.ndarray:
    """Return the (N, height, width) bool masks."""
    masks = np.empty((len(rles), height, width), bool)
    for number, rle in enumerate(rles):
        masks[number] = mask.decode(rle)
    return masks


def mask_area(rle: Rle) -> float:
    """Number of pixels of a mask."""
    return float(mask.area(rle))


def _as_text(rle: Rle) -> Rle:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}

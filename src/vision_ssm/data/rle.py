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
    """Encode (N, H, W) bool masks."""
    rles = mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8)) if len(masks) else []
    return [_as_text(rle) for rle in rles]


def decode_masks(rles: Sequence[Rle], height: int, width: int) -> np.ndarray:
    """Return the (N, height, width) bool masks."""
    masks = np.empty((len(rles), height, width), bool)
    for number, rle in enumerate(rles):
        masks[number] = mask.decode(rle)
    return masks


def _as_text(rle: Rle) -> Rle:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}

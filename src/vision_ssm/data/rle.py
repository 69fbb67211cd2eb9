"""Masks as run-length encodings, as COCO's tools compute them (by faster-coco-eval)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Rle = dict[str, Any]
"""A mask as JSON has it: `size`, its height and width, and `counts`, its compressed run lengths."""


def to_rle(segmentation: Any, height: int, width: int) -> Rle:
    """Encode what a COCO file has as `segmentation`: polygons, or run lengths, compressed or not."""
    from faster_coco_eval.core import mask

    if isinstance(segmentation, list):
        return _as_text(mask.merge(mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return _as_text(mask.frPyObjects(segmentation, height, width))
    return segmentation


def encode_masks(masks: np.ndarray) -> list[Rle]:
    """Encode (N, H, W) bool masks."""
    from faster_coco_eval.core import mask

    rles = mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8)) if len(masks) else []
    return [_as_text(rle) for rle in rles]


def decode_masks(rles: Sequence[Rle], height: int, width: int) -> np.ndarray:
    """Return the (N, height, width) bool masks."""
    from faster_coco_eval.core import mask

    masks = np.empty((len(rles), height, width), bool)
    for number, rle in enumerate(rles):
        masks[number] = mask.decode(rle)
    return masks


def _as_text(rle: Rle) -> Rle:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}

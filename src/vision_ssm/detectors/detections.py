"""What a detector returns for an image, and the pasting of its masks as in mmdet 3.3.0 (``fcn_mask_head.py``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, best first.

    Args:
        boxes: float32, (N, 4): x1, y1, x2, y2 in pixels of the original image.
        scores: float32, (N,).
        labels: int64, (N,), from 0.
        size: (height, width) of the original image.
        mask_probs: float32, (N, 28, 28): probability of the object over its box; ``None`` without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    size: tuple[int, int]
    mask_probs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def cpu(self) -> Detections:
        """Return the same in the memory of the CPU."""
        probs = None if self.mask_probs is None else self.mask_probs.cpu()
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu(), self.size, probs)

    def masks(self) -> Tensor:
        """Return the masks in the original image, bool (N, height, width).

        For many objects in a large image, :func:`paste_mask` makes them one at a time.

        Raises:
            ValueError: If the detector has no masks.
        """
        if self.mask_probs is None:
            raise ValueError("these detections have no masks")
        masks = torch.zeros(len(self), *self.size, dtype=torch.bool, device=self.boxes.device)
        for mask, probs, box in zip(masks, self.mask_probs, self.boxes, strict=True):
            _paste(mask, probs, box)
        return masks


def paste_mask(probs: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask in the whole image, bool (height, width).

    Args:
        probs: Probability of the object over its box, (h, w).
        box: x1, y1, x2, y2 in pixels, (4,).
        size: (height, width) of the image.
    """
    mask = torch.zeros(size, dtype=torch.bool, device=box.device)
    _paste(mask, probs, box)
    return mask


def _paste(mask: Tensor, probs: Tensor, box: Tensor) -> None:
    x1, y1, x2, y2 = box.tolist()
    height, width = mask.shape
    # Pixels that are more than one away from the box see nothing of the probabilities.
    left, right = max(math.floor(x1) - 1, 0), min(math.ceil(x2) + 1, width)
    top, bottom = max(math.floor(y1) - 1, 0), min(math.ceil(y2) + 1, height)
    if left < right and top < bottom:
        x = _places(left, right, box[0], box[2]).expand(bottom - top, -1)
        y = _places(top, bottom, box[1], box[3])[:, None].expand(-1, right - left)
        grid = torch.stack([x, y], dim=-1)
        pasted = F.grid_sample(probs[None, None], grid[None], align_corners=False)[0, 0]
        mask[top:bottom, left:right] = pasted >= 0.5


def _places(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """Return where the centers of pixels lie in a box, from -1 to 1."""
    places = (torch.arange(start, stop, device=low.device) + 0.5 - low) / (high - low) * 2 - 1
    return torch.where(places.isinf(), 0.0, places)  # a box without an area

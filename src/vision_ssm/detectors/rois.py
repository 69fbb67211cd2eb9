"""RoI features and mask targets as mmdet 3.3.0 computes them, on torchvision's ``roi_align``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align


def roi_features(maps: Sequence[Tensor], boxes: Sequence[Tensor], strides: Sequence[int], size: int) -> Tensor:
    """Return the features of boxes, each from the pyramid level of its size, in the dtype of the maps.

    Args:
        maps: One map per level, (B, C, H, W).
        boxes: float32, (n, 4) for each image.
        strides: Of the levels.
        size: Height and width of the result.

    Returns:
        (sum of n, C, size, size).
    """
    rois = torch.cat([F.pad(x, (1, 0), value=i) for i, x in enumerate(boxes)])  # (n, 5)
    levels = roi_levels(rois[:, 1:], strides)
    features = rois.new_zeros(len(rois), maps[0].shape[1], size, size)
    for level, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        chosen = (levels == level).nonzero().flatten()
        features[chosen] = _align(x.float(), rois[chosen], size, 1 / stride)
    return features.to(maps[0].dtype)


def roi_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Return the level of each box, (n,): the finest up to 28 strides of it a side, then each up to twice the size."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return (side / (14 * strides[0]) + 1e-6).log2().floor().clamp(0, len(strides) - 1).long()


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, padded: Sequence[int]) -> Tensor:
    """Return what the mask head is to predict: float32 (n, 28, 28), 0 or 1.

    Args:
        masks: bool or uint8, (m, height, width).
        boxes: Boxes inside the image, (n, 4).
        objects: Which object each stands for, (n,).
        padded: (height, width) of the batch, whose padding belongs to no object.
    """
    height, width = masks.shape[1:]
    masks = F.pad(masks[:, None].float(), (0, padded[1] - width, 0, padded[0] - height))
    rois = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
    return (_align(masks, rois, 28, 1.0)[:, 0] >= 0.5).float()


def _align(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    return roi_align(x, rois, size, scale, sampling_ratio=0, aligned=True)

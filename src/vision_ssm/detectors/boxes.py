"""Anchors, box coding, NMS, matching and sampling as the published detectors (mmdet 3.3.0) compute them.

Boxes are float32, (..., 4), as x1, y1, x2, y2 in pixels. torchvision's own parts differ: it rounds anchors, guesses
strides, clamps decoded sizes from above only, and gives objects of low overlap to other anchors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

_RATIOS = (0.5, 1.0, 2.0)  # height / width
_MAX_LOG_SIZE = abs(math.log(16 / 1000))  # of a decoded box against its anchor, both ways
_JOINT_NMS = 10_000  # from this number of boxes on, NMS runs on each group alone


def make_anchors(level: Tensor, stride: int, sizes: Sequence[float]) -> Tensor:
    """Return the anchors of a pyramid level: (H * W * 3 * len(sizes), 4), ordered by row, column, ratio, size.

    Args:
        level: The level's map, (B, C, H, W).
        stride: Pixels of the image per place of the map; the places' multiples of it are the centers.
        sizes: Square roots of the anchors' areas, as multiples of the stride.
    """
    height, width = level.shape[-2:]
    h_ratios = torch.tensor(_RATIOS, device=level.device).sqrt()
    multiples = torch.tensor(sizes, device=level.device)
    w = (stride * (1 / h_ratios)[:, None] * multiples).flatten()
    h = (stride * h_ratios[:, None] * multiples).flatten()
    base = torch.stack([-0.5 * w, -0.5 * h, 0.5 * w, 0.5 * h], dim=1)  # (A, 4)
    y = torch.arange(height, device=level.device) * stride
    x = torch.arange(width, device=level.device) * stride
    centers = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1).repeat(1, 2)
    return (centers[:, None] + base).flatten(0, 1)


def inside_own_padding(level: Tensor, stride: int, size: tuple[int, int], divisor: int) -> Tensor:
    """Return which places of a map an image reaches that is padded on its own, not to the size of its batch.

    Args:
        level: The map, (B, C, H, W).
        stride: Pixels of the image per place of the map.
        size: (height, width) of the image before padding.
        divisor: Number whose multiples images are padded to.

    Returns:
        Bool, (H * W,).
    """
    rows, columns = (math.ceil(math.ceil(side / divisor) * divisor / stride) for side in size)
    inside = torch.zeros(level.shape[-2:], dtype=torch.bool, device=level.device)
    inside[:rows, :columns] = True
    return inside.flatten()


def encode_boxes(anchors: Tensor, boxes: Tensor, stds: Sequence[float]) -> Tensor:
    """Return the deltas, (n, 4), that turn anchors into boxes: center shifts per size, and logarithms of sizes."""
    size = anchors[:, 2:] - anchors[:, :2]
    shift = ((boxes[:, :2] + boxes[:, 2:]) * 0.5 - (anchors[:, :2] + anchors[:, 2:]) * 0.5) / size
    scale = ((boxes[:, 2:] - boxes[:, :2]) / size).log()
    return torch.cat([shift, scale], dim=1) / anchors.new_tensor(stds)


def decode_boxes(anchors: Tensor, deltas: Tensor, stds: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Return the boxes, (..., 4), that deltas make of anchors, clipped to an image of (height, width)."""
    deltas = deltas * deltas.new_tensor(stds)
    center = (anchors[..., :2] + anchors[..., 2:]) * 0.5 + (anchors[..., 2:] - anchors[..., :2]) * deltas[..., :2]
    extent = (anchors[..., 2:] - anchors[..., :2]) * deltas[..., 2:].clamp(-_MAX_LOG_SIZE, _MAX_LOG_SIZE).exp()
    boxes = torch.cat([center - extent * 0.5, center + extent * 0.5], dim=-1)
    height, width = size
    return torch.stack([boxes[..., i].clamp(0, (width, height)[i % 2]) for i in range(4)], dim=-1)


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Return the indices of the boxes that NMS keeps, best first; boxes of different groups do not meet."""
    if not len(boxes):
        return boxes.new_zeros(0, dtype=torch.int64)
    if len(boxes) < _JOINT_NMS:
        offsets = groups.to(boxes.dtype) * (boxes.max() + 1)
        return torchvision.ops.nms(boxes + offsets[:, None], scores, threshold)
    kept = []
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        kept.append(members[torchvision.ops.nms(boxes[members], scores[members], threshold)])
    keep = torch.cat(kept)
    return keep[scores[keep].argsort(descending=True)]


def not_empty(boxes: Tensor) -> Tensor:
    """Return which boxes have an area."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def match_boxes(boxes: Tensor, objects: Tensor, positive: float, negative: float, lowest: float) -> Tensor:
    """Return the object that each box stands for: its index, -1 for background, -2 for neither.

    Args:
        boxes: Anchors or proposals, (n, 4).
        objects: Boxes of the objects, (m, 4).
        positive: Overlap (IoU) from which a box stands for the object it overlaps most.
        negative: Overlap below which it is background.
        lowest: An object whose best overlap is at least this takes all boxes with that overlap, even from an object
            that they overlap more; later objects take from earlier ones.
    """
    matched = torch.full((len(boxes),), -1, device=boxes.device)
    if not len(objects) or not len(boxes):
        return matched
    overlaps = torchvision.ops.box_iou(objects, boxes)  # (m, n)
    best, which = overlaps.max(dim=0)
    matched[best >= negative] = -2
    matched = torch.where(best >= positive, which, matched)
    for i, (row, top) in enumerate(zip(overlaps, overlaps.amax(dim=1), strict=True)):
        matched = torch.where((row == top) & (top >= lowest), i, matched)
    return matched


def sample_boxes(matched: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Choose boxes to train on; return the indices of those that stand for objects, and of background.

    Args:
        matched: What :func:`match_boxes` returned, (n,).
        count: Number of boxes at most.
        positive_fraction: Share of those that stand for objects, at most; background fills up what they leave.
    """
    positive = choose((matched >= 0).nonzero().flatten(), int(count * positive_fraction))
    negative = choose((matched == -1).nonzero().flatten(), count - len(positive))
    return positive, negative


def choose(candidates: Tensor, count: int) -> Tensor:
    """Return ``count`` of the candidates, drawn from torch's global CPU generator, or all if there are no more."""
    if len(candidates) <= count:
        return candidates
    return candidates[torch.randperm(len(candidates))[:count].to(candidates.device)]

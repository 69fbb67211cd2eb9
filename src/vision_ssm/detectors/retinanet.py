"""RetinaNet as mmdet 3.3.0 computes it (``retinanet_pvt-t_fpn_1x_coco.py``).

Paper: "Focal Loss for Dense Object Detection", arXiv 1708.02002. The layers are torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from vision_ssm.detectors.boxes import decode_boxes, encode_boxes, grouped_nms, match_boxes, not_empty
from vision_ssm.detectors.detections import Detections
from vision_ssm.detectors.detector import Detector, pairs, rescaling

_STDS = (1.0, 1.0, 1.0, 1.0)


class _P6P7(LastLevelP6P7):
    """Two levels after the backbone's last map, whatever its width, without an activation between them."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class RetinaNet(Detector):
    """Every anchor of the pyramid classified and refined, with a sigmoid for each class and the focal loss.

    Args:
        backbone: See :class:`Detector`.
        num_classes: Number of classes; there is none for background.
        width: Number of channels of pyramid and head; 256 in the published form.
        divisor: See :class:`Detector`.
    """

    class_layers = ("head.classification_head.cls_logits",)

    def __init__(self, backbone: nn.Module, num_classes: int, *, width: int = 256, divisor: int = 32) -> None:
        info: Any = backbone.feature_info
        extra = _P6P7(info.channels()[-1], width)
        sizes = [4 * 2 ** (octave / 3) for octave in range(3)]
        super().__init__(backbone, extra, extra_levels=2, anchor_sizes=sizes, width=width, divisor=divisor)
        self.num_classes = num_classes
        self.head = RetinaNetHead(width, 9, num_classes)

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[Detections]:
        maps = self.pyramid(images)
        anchors, (logits, deltas) = self.anchors(maps), self.predict(maps)
        return [
            select_boxes(anchors, logit, delta, size, original)
            for logit, delta, size, original in zip(logits, deltas, pairs(sizes), pairs(original_sizes), strict=True)
        ]

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits, float32 (B, N, classes), and deltas, (B, N, 4), of the anchors of all levels."""
        outputs = self.head(maps)
        return outputs["cls_logits"].float(), outputs["bbox_regression"].float()

    def losses(self, images: Tensor, sizes: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        maps = self.pyramid(images)
        anchors = torch.cat(self.anchors(maps))
        cls, box, count = [], [], 0
        for logit, delta, size, target in zip(*self.predict(maps), pairs(sizes), targets, strict=True):
            usable = self.usable_anchors(maps, size)
            matched = match_boxes(anchors[usable], target["boxes"], 0.5, 0.4, 0.0)
            counted, positive = usable[matched > -2], usable[matched >= 0]
            objects = matched[matched >= 0]
            goal = torch.zeros_like(logit)
            goal[positive, target["labels"][objects]] = 1
            cls.append(sigmoid_focal_loss(logit[counted], goal[counted], reduction="sum"))
            box_goal = encode_boxes(anchors[positive], target["boxes"][objects], _STDS)
            box.append((delta[positive] - box_goal).abs().sum())
            count += max(len(positive), 1)
        return {"cls": torch.stack(cls).sum() / count, "box": torch.stack(box).sum() / count}

    def raw_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``logits_i``, (B, N, classes), and ``deltas_i``, (B, N, 4), of the anchors of level i."""
        levels = [self.predict([x]) for x in self.pyramid(images)]
        logits = {f"logits_{i}": logit for i, (logit, _) in enumerate(levels)}
        return logits | {f"deltas_{i}": delta for i, (_, delta) in enumerate(levels)}

    def forward_costs(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.predict(self.pyramid(images))


def select_boxes(
    anchors: Sequence[Tensor], logits: Tensor, deltas: Tensor, size: tuple[int, int], original: tuple[int, int]
) -> Detections:
    """Return the at most 100 objects of an image.

    Args:
        anchors: Those of each level, (N of the level, 4).
        logits: (N, classes).
        deltas: (N, 4).
        size: (height, width) of the image before padding.
        original: The same of the image it was resized from, to which the boxes are brought before NMS.
    """
    counts = [len(anchor) for anchor in anchors]
    kept = []
    for anchor, logit, delta in zip(anchors, logits.split(counts), deltas.split(counts), strict=True):
        scores = logit.sigmoid()
        place, label = (scores > 0.05).nonzero(as_tuple=True)
        scores, best = scores[place, label].sort(descending=True)
        place, label = place[best[:1000]], label[best[:1000]]
        kept.append((anchor[place], delta[place], scores[:1000], label))
    anchor, delta, scores, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    boxes = decode_boxes(anchor, delta, _STDS, size)
    boxes = boxes * (1 / rescaling(size, original, boxes))
    valid = not_empty(boxes)
    boxes, scores, labels = boxes[valid], scores[valid], labels[valid]
    keep = grouped_nms(boxes, scores, labels, 0.5)[:100]
    return Detections(boxes[keep], scores[keep], labels[keep], original)

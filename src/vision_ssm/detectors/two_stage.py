"""Faster R-CNN and Mask R-CNN as mmdet 3.3.0 computes them (``mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py``).

Papers: "Faster R-CNN", arXiv 1506.01497; "Mask R-CNN", arXiv 1703.06870; "Feature Pyramid Networks", arXiv 1612.03144.
The layers are torchvision's. What lies between them is not: anchors, proposals, RoI features and losses differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from vision_ssm.detectors.boxes import decode_boxes, encode_boxes, grouped_nms, match_boxes, not_empty, sample_boxes
from vision_ssm.detectors.detections import Detections
from vision_ssm.detectors.detector import Detector, Sizes, pairs, rescaling
from vision_ssm.detectors.rois import mask_targets, roi_features

_RPN_STDS = (1.0, 1.0, 1.0, 1.0)
_BOX_STDS = (0.1, 0.1, 0.2, 0.2)
_PROPOSALS = 1000
_DETECTIONS = 100


class Sample(NamedTuple):
    """Boxes of an image to train the heads on: first those that stand for objects, then background.

    Args:
        boxes: (n, 4).
        objects: Which object each of the first boxes stands for, (p,).
    """

    boxes: Tensor
    objects: Tensor

    @property
    def positive(self) -> Tensor:
        """The boxes that stand for objects, (p, 4)."""
        return self.boxes[: len(self.objects)]


class FasterRCNN(Detector):
    """Proposals from every level of the pyramid, classified and refined from their RoI features.

    Args:
        backbone: See :class:`Detector`.
        num_classes: Number of classes, without background.
        width: Number of channels of pyramid and heads; 256 in the published form.
        rpn_samples: Anchors of an image that the proposals are trained on; at most half of them on objects.
        box_samples: Proposals of an image that the box head is trained on; at most a quarter of them on objects.
        divisor: See :class:`Detector`.
    """

    class_layers: ClassVar[tuple[str, ...]] = ("cls_score", "bbox_pred")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        width: int = 256,
        rpn_samples: int = 256,
        box_samples: int = 512,
        divisor: int = 32,
    ) -> None:
        super().__init__(
            backbone, LastLevelMaxPool(), extra_levels=1, anchor_sizes=(8.0,), width=width, divisor=divisor
        )
        self.num_classes = num_classes
        self.rpn_samples, self.box_samples = rpn_samples, box_samples
        self.width = width
        self.rpn_head = RPNHead(width, 3)
        self.box_head = TwoMLPHead(width * 7 * 7, 4 * width)
        self.cls_score = nn.Linear(4 * width, num_classes + 1)  # background is last
        self.bbox_pred = nn.Linear(4 * width, 4 * num_classes)
        for layer in (self.box_head.fc6, self.box_head.fc7):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.box_head.fc6, self.box_head.fc7, self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[Detections]:
        maps, own_sizes = self.pyramid(images), pairs(sizes)
        proposals = [boxes for boxes, _ in self.propose(*self.rpn(maps), self.anchors(maps), own_sizes)]
        return self.detect(maps, proposals, own_sizes, pairs(original_sizes))

    def losses(self, images: Tensor, sizes: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        maps, own_sizes = self.pyramid(images), pairs(sizes)
        anchors, (logits, deltas) = self.anchors(maps), self.rpn(maps)
        usable = [self.usable_anchors(maps, size) for size in own_sizes]
        losses = self.rpn_losses(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), usable, targets)
        with torch.no_grad():
            proposals = [boxes for boxes, _ in self.propose(logits, deltas, anchors, own_sizes, per_level=2000)]
        samples = [self.sample(*both) for both in zip(proposals, targets, strict=True)]
        return losses | self.roi_losses(maps, samples, targets, images.shape[-2:])

    def raw_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the map of level i, ``map_i``, (B, width, H / stride, W / stride), and what is said of its anchors.

        These are ``objectness_i``, logits (B, N), and ``deltas_i``, (B, N, 4), which make proposals of the anchors.
        """
        maps = self.pyramid(images)
        logits, deltas = self.rpn(maps)
        outputs = {f"map_{i}": x for i, x in enumerate(maps)}
        outputs |= {f"objectness_{i}": x for i, x in enumerate(logits)}
        return outputs | {f"deltas_{i}": x for i, x in enumerate(deltas)}

    def forward_costs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run every layer on 1,000 proposals per image, with zeros for RoI features.

        As mmdet counts: the box head works on all proposals, the mask head on the first 100.
        """
        maps = self.pyramid(images)
        logits, deltas = self.rpn(maps)
        return *logits, *deltas, *self.predict_boxes(maps[0].new_zeros(_PROPOSALS * len(images), self.width, 7, 7))

    def rpn(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits, (B, N), and deltas, (B, N, 4), of the anchors of each level, float32."""
        logits, deltas = self.rpn_head(maps)
        return (
            [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits],
            [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4).float() for x in deltas],
        )

    def propose(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sizes,
        per_level: int = 1000,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the proposals of each image with their scores, best first: at most 1,000.

        Args:
            logits: What :meth:`rpn` returned.
            deltas: The same.
            anchors: The anchors of each level, (N, 4).
            sizes: (height, width) of each image before padding.
            per_level: Number of anchors of each level that take part.
        """
        proposals = []
        for i, size in enumerate(sizes):
            kept = []
            for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
                scores, best = logit[i].sigmoid().sort(descending=True)
                best = best[:per_level]
                kept.append((scores[:per_level], delta[i, best], anchor[best], torch.full_like(best, level)))
            scores, delta, anchor, levels = (torch.cat(parts) for parts in zip(*kept, strict=True))
            boxes = decode_boxes(anchor, delta, _RPN_STDS, size)
            valid = not_empty(boxes)
            boxes, scores, levels = boxes[valid], scores[valid], levels[valid]
            keep = grouped_nms(boxes, scores, levels, 0.7)[:_PROPOSALS]
            proposals.append((boxes[keep], scores[keep]))
        return proposals

    def rpn_losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        usable: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the losses of the proposals.

        Args:
            logits: (B, N), of the anchors of all levels.
            deltas: (B, N, 4).
            anchors: (N, 4).
            usable: Indices of the anchors that each image may use.
            targets: See :meth:`losses`.
        """
        cls, box, count = [], [], 0
        for logit, delta, inside, target in zip(logits, deltas, usable, targets, strict=True):
            matched = match_boxes(anchors[inside], target["boxes"], 0.7, 0.3, 0.3)
            positive, negative = sample_boxes(matched, self.rpn_samples, 0.5)
            logit, delta, anchor = logit[inside], delta[inside], anchors[inside]
            for chosen, value in ((positive, 1.0), (negative, 0.0)):
                goal = torch.full_like(logit[chosen], value)
                cls.append(F.binary_cross_entropy_with_logits(logit[chosen], goal, reduction="sum"))
            goal = encode_boxes(anchor[positive], target["boxes"][matched[positive]], _RPN_STDS)
            box.append((delta[positive] - goal).abs().sum())
            count += max(len(positive), 1) + max(len(negative), 1)
        return {"rpn_cls": torch.stack(cls).sum() / count, "rpn_box": torch.stack(box).sum() / count}

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes, original_sizes: Sizes
    ) -> list[Detections]:
        """Return the objects in each image, given the maps of the pyramid and the proposals, (n, 4)."""
        # Without masks, mmdet brings boxes to the original image before NMS; with masks, after it.
        scales = [rescaling(*both, maps[0].float()) for both in zip(sizes, original_sizes, strict=True)]
        return [
            Detections(*found, original)
            for found, original in zip(self.find_boxes(maps, proposals, sizes, scales), original_sizes, strict=True)
        ]

    def find_boxes(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes, scales: Sequence[Tensor | None]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return boxes, divided by their scale, scores and labels of the objects in each image."""
        logits, deltas = self.predict_boxes(self.roi_features(maps, proposals, 7))
        counts = [len(boxes) for boxes in proposals]
        parts = zip(proposals, logits.split(counts), deltas.split(counts), sizes, scales, strict=True)
        return [select_boxes(*part) for part in parts]

    def predict_boxes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, float32 (n, classes + 1), and deltas, float32 (n, classes, 4), from (n, width, 7, 7)."""
        x = self.box_head(features)
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (self.num_classes, 4))

    def roi_features(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
        """Return the features of boxes, (n, width, size, size), from the levels that the backbone has."""
        strides = self.backbone_strides
        return roi_features(maps[: len(strides)], boxes, strides, size)

    def sample(self, proposals: Tensor, target: Mapping[str, Tensor]) -> Sample:
        """Choose the boxes of an image to train the heads on, among its objects and its proposals, (n, 4)."""
        boxes = target["boxes"]
        matched = match_boxes(proposals, boxes, 0.5, 0.5, 0.5)
        matched = torch.cat([torch.arange(len(boxes), device=matched.device), matched])
        positive, negative = sample_boxes(matched, self.box_samples, 0.25)
        return Sample(torch.cat([boxes, proposals])[torch.cat([positive, negative])], matched[positive])

    def roi_losses(
        self,
        maps: Sequence[Tensor],
        samples: Sequence[Sample],
        targets: Sequence[Mapping[str, Tensor]],
        padded: Sequence[int],
    ) -> dict[str, Tensor]:
        """Return the losses of the heads, given the maps of the pyramid and the (height, width) of the batch."""
        logits, deltas = self.predict_boxes(self.roi_features(maps, [sample.boxes for sample in samples], 7))
        labels, goals = [], []
        for sample, target in zip(samples, targets, strict=True):
            background = len(sample.boxes) - len(sample.objects)
            labels.append(F.pad(target["labels"][sample.objects], (0, background), value=self.num_classes))
            goals.append(encode_boxes(sample.positive, target["boxes"][sample.objects], _BOX_STDS))
        label = torch.cat(labels)
        positive = (label < self.num_classes).nonzero().flatten()
        count = max(len(label), 1)
        return {
            "cls": F.cross_entropy(logits, label, reduction="sum") / count,
            "box": (deltas[positive, label[positive]] - torch.cat(goals)).abs().sum() / count,
        }


class MaskRCNN(FasterRCNN):
    """Faster R-CNN with a mask, 28 by 28, for every object; see :class:`FasterRCNN`."""

    class_layers = (*FasterRCNN.class_layers, "mask_predictor.mask_fcn_logits")

    def __init__(self, backbone: nn.Module, num_classes: int, **options: int) -> None:
        super().__init__(backbone, num_classes, **options)
        self.mask_head = MaskRCNNHeads(self.width, (self.width,) * 4, 1)
        self.mask_predictor = MaskRCNNPredictor(self.width, self.width, num_classes)
        for layer in (self.mask_predictor.conv5_mask, self.mask_predictor.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes, original_sizes: Sizes
    ) -> list[Detections]:
        found = self.find_boxes(maps, proposals, sizes, [None] * len(sizes))
        labels = torch.cat([label for _, _, label in found])
        logits = self.predict_masks(self.roi_features(maps, [boxes for boxes, _, _ in found], 14))
        probs = logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()
        masks = probs.split([len(boxes) for boxes, _, _ in found])
        return [
            Detections(boxes / rescaling(size, original, boxes), scores, labels, original, mask)
            for (boxes, scores, labels), mask, size, original in zip(found, masks, sizes, original_sizes, strict=True)
        ]

    def predict_masks(self, features: Tensor) -> Tensor:
        """Return mask logits, float32 (n, classes, 28, 28), from (n, width, 14, 14)."""
        return self.mask_predictor(self.mask_head(features)).float()

    def roi_losses(
        self,
        maps: Sequence[Tensor],
        samples: Sequence[Sample],
        targets: Sequence[Mapping[str, Tensor]],
        padded: Sequence[int],
    ) -> dict[str, Tensor]:
        losses = super().roi_losses(maps, samples, targets, padded)
        logits = self.predict_masks(self.roi_features(maps, [sample.positive for sample in samples], 14))
        both = list(zip(samples, targets, strict=True))
        labels = torch.cat([target["labels"][sample.objects] for sample, target in both])
        goals = torch.cat([mask_targets(target["masks"], s.positive, s.objects, padded) for s, target in both])
        logits = logits[torch.arange(len(labels), device=labels.device), labels]
        loss = F.binary_cross_entropy_with_logits(logits, goals, reduction="sum")
        return losses | {"mask": loss / max(goals.numel(), 1)}

    def forward_costs(self, images: Tensor) -> tuple[Tensor, ...]:
        boxes = super().forward_costs(images)
        return *boxes, self.predict_masks(images.new_zeros(_DETECTIONS * len(images), self.width, 14, 14))


def select_boxes(
    proposals: Tensor, logits: Tensor, deltas: Tensor, size: tuple[int, int], scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, scores and labels of the at most 100 objects of an image, best first.

    Args:
        proposals: (n, 4).
        logits: (n, classes + 1); background is last.
        deltas: (n, classes, 4).
        size: (height, width) of the image before padding.
        scale: What the boxes are divided by before NMS, (4,).
    """
    boxes = decode_boxes(proposals[:, None], deltas, _BOX_STDS, size)
    boxes = boxes if scale is None else boxes / scale
    all_scores = logits.softmax(dim=1)[:, :-1]
    row, labels = (all_scores > 0.05).nonzero(as_tuple=True)
    boxes, scores = boxes[row, labels], all_scores[row, labels]
    keep = grouped_nms(boxes, scores, labels, 0.5)[:_DETECTIONS]
    return boxes[keep], scores[keep], labels[keep]

"""Semantic segmenters: a backbone and a decoder that gives every pixel the scores of the classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_ssm.detectors.detector import OnBackbone, to_nchw

IGNORED = -1
"""The class of pixels that do not count."""

_AUXILIARY = 0.4  # weight of the loss of the auxiliary head
_CLASSES = 16  # resized at a time, which keeps memory small where there are many
_DROPOUT = 0.1


class Segmenter(OnBackbone):
    """A backbone and a decoder; a subclass gives the decoder.

    Args:
        backbone: timm's feature extractor: images, (B, 3, H, W), to maps.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of the classes before the softmax, (B, classes, h, w), of images (B, 3, H, W).

        The map is that of the decoder, with fewer pixels than the image; see :func:`resize`.
        """
        raise NotImplementedError

    def losses(self, images: Tensor, labels: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses, whose sum is to be minimized.

        Args:
            images: (B, 3, H, W).
            labels: Indices of the classes, ``IGNORED`` where a pixel does not count, (B, H, W).
            weight: Weights of the classes, (classes,).
        """
        return {"pixels": pixel_loss(self(images), labels, weight)}

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps of the backbone, (B, C, H / stride, W / stride), finest first."""
        return to_nchw(self.backbone, self.backbone(images))


class UperNet(Segmenter):
    """UPerNet in its published form (mmseg 1.2.2: ``UPerHead`` and ``FCNHead``), on transformers' heads.

    Args:
        backbone: timm's feature extractor.
        num_classes: Number of classes.
        width: Channels of the decoder; 512 in the published form. The auxiliary head has half as many.
    """

    class_layers = ("decode_head.classifier.", "auxiliary_head.classifier.")

    def __init__(self, backbone: nn.Module, num_classes: int, width: int = 512) -> None:
        super().__init__(backbone)
        info: Any = backbone.feature_info
        channels = list(info.channels())
        make_config, main, auxiliary = _transformers_heads()
        config = make_config(
            hidden_size=width, num_labels=num_classes, auxiliary_in_channels=channels[-2], auxiliary_channels=width // 2
        )
        self.decode_head = main(config, channels)
        self.auxiliary_head = auxiliary(config, channels, in_index=len(channels) - 2)
        for head in (self.decode_head, self.auxiliary_head):
            head.classifier = _Classifier(head.classifier.in_channels, num_classes, 1)
            nn.init.normal_(head.classifier.weight, std=0.01)  # as in mmseg
            nn.init.zeros_(head.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode_head(self.maps(images))

    def losses(self, images: Tensor, labels: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        maps = self.maps(images)
        return {
            "pixels": pixel_loss(self.decode_head(maps), labels, weight),
            "auxiliary": _AUXILIARY * pixel_loss(self.auxiliary_head(maps), labels, weight),
        }


def _transformers_heads() -> tuple[Any, Any, Any]:
    logger = logging.getLogger("torch.utils._pytree")  # torch warns of torchao, which transformers imports if it can
    disabled, logger.disabled = logger.disabled, True
    try:
        from transformers import UperNetConfig  # seconds
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
    finally:
        logger.disabled = disabled
    return UperNetConfig, UperNetHead, UperNetFCNHead


class SmpSegmenter(Segmenter):
    """A decoder of segmentation_models_pytorch.

    Args:
        backbone: timm's feature extractor.
        decoder: The decoder.
        head: Makes scores of the classes from what it gives.
    """

    class_layers = ("head.",)

    def __init__(self, backbone: nn.Module, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__(backbone)
        self.decoder, self.head = decoder, head
        info: Any = backbone.feature_info
        self.first_stride, self.divisor = info.reduction()[0], info.reduction()[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores; images are padded to multiples of the coarsest stride, as these decoders want it."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.divisor, 0, -height % self.divisor))
        maps = [images]
        if self.first_stride == 4:  # an empty map in place of that of stride 2
            maps.append(images.new_empty(len(images), 0, images.shape[2] // 2, images.shape[3] // 2))
        scores = self.head(self.decoder(maps + self.maps(images)))
        if scores.shape[-2:] != images.shape[-2:]:
            scores = resize(scores, images.shape[-2:])
        return scores[..., :height, :width]


class _Classifier(nn.Conv2d):
    """The last layer of mmseg's heads: whole channels are dropped out before it in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout2d(x, _DROPOUT, self.training))


def pixel_loss(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of scores, (B, classes, h, w), resized to labels, (B, H, W).

    It is the sum over the pixels that count, divided by the number of all pixels (mmseg's ``avg_non_ignore=False``).
    """
    scores = resize(scores, labels.shape[-2:]).float()
    return F.cross_entropy(scores, labels, weight, ignore_index=IGNORED, reduction="sum") / labels.numel()


def resize(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Return scores, (B, classes, h, w), at another height and width."""
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


def slide(segmenter: nn.Module, images: Tensor, crop: int, stride: int) -> Tensor:
    """Return the mean of the scores of overlapping windows, (B, classes, H, W) (mmseg's ``slide_inference``).

    Args:
        segmenter: Gives the scores of images.
        images: (B, 3, H, W).
        crop: Height and width of a window; an image that is smaller is one window.
        stride: Distance from one window to the next.
    """
    height, width = images.shape[-2:]
    total: Any = None
    count = images.new_zeros(1, 1, height, width)
    for top in _starts(height, crop, stride):
        for left in _starts(width, crop, stride):
            window = images[..., top : top + crop, left : left + crop]
            scores = resize(segmenter(window).float(), window.shape[-2:])
            if total is None:
                total = scores.new_zeros(*scores.shape[:2], height, width)
            total[..., top : top + crop, left : left + crop] += scores
            count[..., top : top + crop, left : left + crop] += 1
    return total / count


def _starts(side: int, crop: int, stride: int) -> list[int]:
    last = max(side - crop, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def label_map(scores: Tensor, padded: Sequence[int], size: Sequence[int], original: Sequence[int]) -> Tensor:
    """Return the best class of every pixel of the original image, int64 (H, W).

    The scores are resized twice, as in mmseg: to the network's input, then without its padding to the original.

    Args:
        scores: (classes, h, w).
        padded: Height and width of the network's input.
        size: The same without padding at the right and at the bottom.
        original: Height and width of the original image.
    """
    best = labels = None
    for start in range(0, len(scores), _CLASSES):
        part, index = to_original(scores[start : start + _CLASSES].float(), padded, size, original).max(0)
        if best is None or labels is None:
            best, labels = part, index
        else:
            better = part > best
            best, labels = torch.where(better, part, best), torch.where(better, index + start, labels)
    assert labels is not None
    return labels


def to_original(
    scores: Tensor, padded: Sequence[int], size: Sequence[int], original: Sequence[int], *, flipped: bool = False
) -> Tensor:
    """Return scores, (classes, h, w), at the size of the original image; see :func:`label_map`."""
    at_input = resize(scores[None], padded)
    at_input = at_input.flip(-1) if flipped else at_input  # before the padding, which was at the left then, is cut off
    return resize(at_input[..., : size[0], : size[1]], original)[0]

"""What the detectors share: a backbone, a feature pyramid, and anchors on its levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import Format
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from vision_ssm.checkpoints import detector_no_decay
from vision_ssm.detectors.boxes import inside_own_padding, make_anchors
from vision_ssm.detectors.detections import Detections

Sizes = Sequence[tuple[int, int]]


class OnBackbone(nn.Module):
    """A network on a backbone, which it holds as ``backbone``."""

    backbone: nn.Module
    backbone_name: str = ""
    """timm's name of the backbone."""
    class_layers: ClassVar[tuple[str, ...]]
    """Names of the layers whose weights depend on the classes."""

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters to exclude from weight decay, as timm's optimizers ask for them."""
        named: Any = getattr(getattr(self.backbone, "model", None), "no_weight_decay", set)
        return {f"backbone.model.{name}" for name in named()}

    def published_no_weight_decay(self) -> set[str]:
        """Return the names of all parameters that the published training excludes from weight decay."""
        return detector_no_decay(self, self.backbone_name)


class Detector(OnBackbone, ABC):
    """A backbone, a feature pyramid and heads; a subclass gives the heads.

    Images are normalized and padded with 0 at the right and the bottom. ``sizes`` are (height, width) of the images
    before padding, ``original_sizes`` those of the files they were resized from: int, (B, 2).

    Args:
        backbone: timm's feature extractor: images, (B, 3, H, W), to maps whose widths and strides are in its
            ``feature_info``; each stride is twice the one before.
        extra_blocks: Makes the levels after the backbone's.
        extra_levels: Number of those levels.
        anchor_sizes: Square roots of the areas of the anchors of a place, as multiples of the level's stride.
        width: Number of channels of the pyramid; 256 in the published form.
        divisor: Number whose multiples images are padded to. In training, anchors beyond an image's own padding are
            left out, whatever the size of the batch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        extra_blocks: ExtraFPNBlock,
        extra_levels: int,
        anchor_sizes: Sequence[float],
        width: int,
        divisor: int,
    ) -> None:
        super().__init__()
        self.anchor_sizes = tuple(anchor_sizes)
        self.divisor = divisor
        info: Any = backbone.feature_info
        self.backbone_strides: list[int] = info.reduction()
        self.strides = [
            *self.backbone_strides,
            *(self.backbone_strides[-1] * 2 ** (i + 1) for i in range(extra_levels)),
        ]
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(info.channels(), width, extra_blocks)
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):  # as in mmdet
                nn.init.xavier_uniform_(module.weight)

    @abstractmethod
    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> list[Detections]:
        """Find objects.

        Args:
            images: (B, 3, H, W).
            sizes: (B, 2).
            original_sizes: (B, 2).

        Returns:
            One entry per image.
        """

    @abstractmethod
    def losses(self, images: Tensor, sizes: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses, whose sum is to be minimized; each reaches all parameters of its head.

        Args:
            images: (B, 3, H, W).
            sizes: (B, 2).
            targets: For each image ``boxes``, float32 (n, 4), and ``labels``, int64 (n,) from 0; for masks also
                ``masks``, bool or uint8 (n, height, width). All in pixels of the resized image.
        """

    @abstractmethod
    def raw_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the heads say of every anchor, by name and level, for images of any size without padding."""

    @abstractmethod
    def forward_costs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run every layer on inputs of fixed sizes, to count operations; works on the meta device."""

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all levels, (B, width, H / stride, W / stride), finest first."""
        maps = to_nchw(self.backbone, self.backbone(images))
        return list(self.fpn({str(i): x for i, x in enumerate(maps)}).values())

    def anchors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of each level, float32 (places * anchors per place, 4)."""
        return [make_anchors(x, stride, self.anchor_sizes) for x, stride in zip(maps, self.strides, strict=True)]

    def usable_anchors(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the indices, among the anchors of all levels, of those within an image's own padding."""
        per_place = 3 * len(self.anchor_sizes)
        inside = [
            inside_own_padding(x, stride, size, self.divisor).repeat_interleave(per_place)
            for x, stride in zip(maps, self.strides, strict=True)
        ]
        return torch.cat(inside).nonzero().flatten()


def to_nchw(backbone: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Return the maps of timm's feature extractor as (B, C, H, W)."""
    last = getattr(backbone, "output_fmt", Format.NCHW) == Format.NHWC
    return [x.permute(0, 3, 1, 2) if last else x for x in maps]


def pairs(sizes: Tensor) -> Sizes:
    """Return sizes, (B, 2), as numbers."""
    return [(height, width) for height, width in sizes.tolist()]


def rescaling(size: tuple[int, int], original: tuple[int, int], boxes: Tensor) -> Tensor:
    """Return the factors, (4,), by which boxes of an original image were enlarged."""
    return boxes.new_tensor([size[1] / original[1], size[0] / original[0]]).repeat(2)

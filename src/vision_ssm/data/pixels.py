"""Transforms of images together with masks of labels, as published segmenters are trained and measured."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from vision_ssm.data.dataset import Sample
from vision_ssm.data.joint import Crop, Fit, constants, normalize, padded, pixels
from vision_ssm.data.resize import fit_size, resize
from vision_ssm.data.sampling import Transform
from vision_ssm.detectors.segmenter import IGNORED

_TRIES = 10  # crops that are drawn in search of one without a dominant class


class VariedCrop(Crop):
    """Square crop in which no class has more than a share of the pixels that count, as far as ten draws find one.

    Args:
        side: Height and width in pixels; smaller images keep theirs.
        max_share: That share.
    """

    def __init__(self, side: int, max_share: float) -> None:
        super().__init__(side, side)
        self.max_share = max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(item for item in flat_inputs if isinstance(item, tv_tensors.Mask)).as_subclass(Tensor)
        for _ in range(_TRIES):
            place = super().make_params(flat_inputs)
            counts = torch.bincount(v2.functional.crop(mask, **place).flatten() + 1)[1:]
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return place


def train_transform(
    *,
    mean: Sequence[float],
    std: Sequence[float],
    test_size: tuple[int, int],
    scale: tuple[float, float],
    crop_size: int,
    max_class_share: float,
    photometric: bool,
    hflip: float,
) -> Transform:
    """Make the random change of training samples; it draws from torch's global generator.

    The sample holds `image` (3, side, side) float32, normalized, `id`, and `mask` (side, side) int64, -1 where a pixel
    does not count or was added. Changes of color are those of mmseg's PhotoMetricDistortion, but that brightness is a
    factor (1 ± 32/255), as in torchvision.

    Args:
        mean: Channel means, of values from 0 to 1.
        std: Channel standard deviations.
        test_size: Largest long and short side in pixels, to which the image is resized before `scale`.
        scale: Smallest and largest factor on that size, drawn evenly.
        crop_size: Side of the square crop, padded at the right and at the bottom where the image is smaller.
        max_class_share: See `VariedCrop`.
        photometric: Whether to change colors.
        hflip: Probability of a horizontal flip.
    """
    jitters = (
        dict(brightness=(1 - 32 / 255, 1 + 32 / 255)), dict(contrast=(0.5, 1.5)), dict(saturation=(0.5, 1.5)),
        dict(hue=(-0.1, 0.1)),
    )  # fmt: skip
    colors = [v2.RandomApply([v2.ColorJitter(**jitter)], 0.5) for jitter in jitters] if photometric else []
    steps = [Fit([test_size], scale), VariedCrop(crop_size, max_class_share), v2.RandomHorizontalFlip(hflip), *colors]
    return functools.partial(_for_training, v2.Compose(steps), constants(mean, std), crop_size)


def eval_transform(
    *, mean: Sequence[float], std: Sequence[float], test_size: tuple[int, int], multiple: int = 1,
    ratios: Sequence[float] = (),
) -> Transform:  # fmt: skip
    """Make what samples go through in evaluation and prediction.

    The sample holds `images`, (3, h, w) each, `id`, `original_size` (H, W) and, where it is known, `mask` (H, W) int64.

    Args:
        mean: Channel means, of values from 0 to 1.
        std: Channel standard deviations.
        test_size: Largest long and short side in pixels; the image is resized to fit.
        multiple: The sides are then stretched to multiples of this.
        ratios: Sizes relative to the original image, of which one image each is made instead.
    """
    return functools.partial(_for_evaluation, test_size, multiple, tuple(ratios), constants(mean, std))


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Make a batch.

    Returns:
        In training `image` (B, 3, side, side) and `mask` (B, side, side). In evaluation lists over the ratios, `images`
        (B, 3, h, w), padded with 0 at the right and at the bottom, and `sizes` (B, 2) int64, without the padding; a
        list `mask`; and `original_size` (B, 2) int64. `id` is a list.
    """
    batch: dict[str, Any] = {"id": [sample["id"] for sample in samples]}
    if "image" in samples[0]:
        return batch | {name: torch.stack([sample[name] for sample in samples]) for name in ("image", "mask")}
    ratios = list(zip(*(sample["images"] for sample in samples), strict=True))
    batch["sizes"] = [torch.tensor([image.shape[1:] for image in images]) for images in ratios]
    batch["images"] = [
        torch.stack([padded(image, *sizes.amax(0).tolist()) for image in images])
        for images, sizes in zip(ratios, batch["sizes"], strict=True)
    ]
    batch["original_size"] = torch.tensor([sample["original_size"] for sample in samples])
    return batch | ({"mask": [sample["mask"] for sample in samples]} if "mask" in samples[0] else {})


def _for_training(change: Any, mean_std: tuple[Tensor, Tensor], side: int, sample: Sample) -> Sample:
    changed = change(
        {"image": tv_tensors.Image(pixels(sample["image"])), "mask": tv_tensors.Mask(torch.from_numpy(sample["mask"]))}
    )
    image = padded(normalize(changed["image"].as_subclass(Tensor), mean_std), side, side)
    mask = padded(changed["mask"].as_subclass(Tensor).long(), side, side, IGNORED)
    return {"image": image, "id": sample["id"], "mask": mask}


def _for_evaluation(
    test_size: tuple[int, int], multiple: int, ratios: tuple[float, ...], mean_std: tuple[Tensor, Tensor],
    sample: Sample,
) -> Sample:  # fmt: skip
    image = np.asarray(sample["image"])
    height, width = image.shape[:2]
    limits = [(int(width * ratio + 0.5), int(height * ratio + 0.5)) for ratio in ratios] or [test_size]
    resized = [resize(image, fit_size(height, width, limit)) for limit in limits]
    if multiple > 1 and not ratios:
        rows, columns = (math.ceil(side / multiple) * multiple for side in resized[0].shape[:2])
        resized = [resize(resized[0], (rows, columns))]
    images = [normalize(torch.from_numpy(each).permute(2, 0, 1), mean_std) for each in resized]
    truth = {"mask": torch.from_numpy(sample["mask"]).long()} if "mask" in sample else {}
    return {"images": images, "id": sample["id"], "original_size": (height, width), **truth}

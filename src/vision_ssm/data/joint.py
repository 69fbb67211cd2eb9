"""Transforms of images together with their objects, as published detectors are trained and measured."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from vision_ssm.data.coco import outlines
from vision_ssm.data.dataset import Sample
from vision_ssm.data.resize import fit_size, resize
from vision_ssm.data.rle import decode_masks, to_rle
from vision_ssm.data.sampling import Transform

# Of the published 3x training: short sides before the random crop (any long side that is not absurd), and the smallest
# and largest side of the crop.
_SHORT_BEFORE_CROP, _LONG_BEFORE_CROP = (400, 500, 600), 4200
_CROP = (384, 600)


class Fit(v2.Transform):
    """Resize to the largest size of the same ratio within limits; images as OpenCV does, masks to nearest pixels.

    Args:
        limits: Largest long and short side in pixels, of which one pair is drawn.
        scale: Smallest and largest factor on them, drawn evenly.
    """

    def __init__(self, limits: Sequence[tuple[int, int]], scale: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.limits, self.scale = limits, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        long, short = self.limits[int(torch.randint(len(self.limits), ()))]
        factor = float(torch.empty(()).uniform_(*self.scale))
        limits = max(1, round(factor * long)), max(1, round(factor * short))
        return {"size": fit_size(*_image_size(flat_inputs), limits)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return v2.functional.resize(inpt, list(params["size"]))
        return tv_tensors.Image(
            torch.from_numpy(resize(inpt.permute(1, 2, 0).numpy(), params["size"])).permute(2, 0, 1)
        )


class Crop(v2.Transform):
    """Crop to a rectangle at a random place.

    Args:
        least: Smallest height and width in pixels; smaller images keep theirs.
        most: Largest height and width.
    """

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        whole = _image_size(flat_inputs)
        height, width = (_draw(min(side, self.least), min(side, self.most)) for side in whole)
        return dict(top=_draw(0, whole[0] - height), left=_draw(0, whole[1] - width), height=height, width=width)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.crop(inpt, **params)


def train_transform(
    *,
    mean: Sequence[float],
    std: Sequence[float],
    short_sides: Sequence[int],
    long_side: int,
    crop: bool,
    jitter: tuple[float, float] | None,
    jitter_size: int,
    hflip: float,
    masks: bool,
) -> Transform:
    """Make the random change of training samples; it draws from torch's global generator.

    Boxes are clipped to the image; those below one pixel are removed with their labels and masks, and so are crowds.
    The sample holds `image` (3, h, w) float32, normalized, `id`, `size` (h, w), `original_size` (H, W), `boxes` (n, 4)
    float32 x1 y1 x2 y2 in pixels of the new image, `labels` (n,) int64, and `masks` (n, h, w) bool.

    Args:
        mean: Channel means, of values from 0 to 1.
        std: Channel standard deviations.
        short_sides: Short sides in pixels, of which one is drawn.
        long_side: Largest long side in pixels.
        crop: For every other image, resize to a short side of 400, 500 or 600 first, and crop to sides of 384 to 600
            (the published training of 36 epochs).
        jitter: Smallest and largest scale of large-scale jitter, which takes the place of all these sizes.
        jitter_size: Side in pixels of the square that is scaled and to which the image is cropped.
        hflip: Probability of a horizontal flip.
        masks: Whether to make masks, which the data must have.
    """
    fit = Fit([(long_side, short) for short in short_sides])
    if jitter is not None:
        steps: list[Any] = [Fit([(jitter_size, jitter_size)], jitter), Crop(jitter_size, jitter_size)]
    elif crop:
        before = Fit([(_LONG_BEFORE_CROP, short) for short in _SHORT_BEFORE_CROP])
        steps = [v2.RandomApply([before, Crop(*_CROP)], 0.5), fit]
    else:
        steps = [fit]
    steps += [v2.RandomHorizontalFlip(hflip), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    return functools.partial(_for_training, v2.Compose(steps), constants(mean, std), masks)


def eval_transform(*, mean: Sequence[float], std: Sequence[float], test_size: tuple[int, int]) -> Transform:
    """Make what samples go through in evaluation and prediction.

    The sample holds `image`, `id`, `size` and `original_size` as in training, and, as far as they are known, what
    evaluation needs, at the original size: `boxes`, `labels`, `crowd` and `area` as arrays, `masks` as run lengths.

    Args:
        mean: Channel means, of values from 0 to 1.
        std: Channel standard deviations.
        test_size: Largest long and short side in pixels; the image is resized to fit.
    """
    return functools.partial(_for_evaluation, test_size, constants(mean, std))


def collate(samples: Sequence[Sample], divisor: int = 32) -> dict[str, Any]:
    """Make a batch; images and masks are padded with 0 at the right and at the bottom.

    Args:
        samples: What the transforms give.
        divisor: Of the padded height and width.

    Returns:
        `image` (B, 3, H, W), `id` (a list), `size` and `original_size` (B, 2) int64, and `targets`, a dict of what
        else each sample holds, its masks (n, H, W).
    """
    sizes = torch.tensor([sample["size"] for sample in samples])
    height, width = (math.ceil(side / divisor) * divisor for side in sizes.amax(0).tolist())
    common = ("image", "id", "size", "original_size")
    targets = [{name: value for name, value in sample.items() if name not in common} for sample in samples]
    for target in targets:
        if isinstance(target.get("masks"), Tensor):
            target["masks"] = padded(target["masks"], height, width)
    return {
        "image": torch.stack([padded(sample["image"], height, width) for sample in samples]),
        "id": [sample["id"] for sample in samples],
        "size": sizes,
        "original_size": torch.tensor([sample["original_size"] for sample in samples]),
        "targets": targets,
    }


def padded(maps: Tensor, height: int, width: int, value: float = 0) -> Tensor:
    """Pad maps (..., h, w) at the right and at the bottom."""
    return torch.nn.functional.pad(maps, (0, width - maps.shape[-1], 0, height - maps.shape[-2]), value=value)


def _for_training(change: Any, constants: tuple[Tensor, Tensor], masks: bool, sample: Sample) -> Sample:
    image, kept = sample["image"], ~sample["crowd"]
    size = image.height, image.width
    boxes = torch.from_numpy(sample["boxes"][kept])
    content: dict[str, Any] = {
        "image": tv_tensors.Image(pixels(image)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.from_numpy(sample["labels"][kept]),
    }
    if masks:
        rles = [to_rle(outline, *size) for outline, use in zip(outlines(sample["masks"]), kept, strict=True) if use]
        content["masks"] = tv_tensors.Mask(torch.from_numpy(decode_masks(rles, *size)).to(torch.uint8))
    changed = change(content)
    normalized = normalize(changed["image"].as_subclass(Tensor), constants)
    whole = {"image": normalized, "id": sample["id"], "size": tuple(normalized.shape[1:]), "original_size": size}
    targets = {name: changed[name].as_subclass(Tensor) for name in ("boxes", "labels")}
    if masks:
        targets["masks"] = changed["masks"].as_subclass(Tensor).bool()
    return {**whole, **targets}


def _for_evaluation(test_size: tuple[int, int], constants: tuple[Tensor, Tensor], sample: Sample) -> Sample:
    image = sample["image"]
    original = image.height, image.width
    size = fit_size(*original, test_size)
    pixels = torch.from_numpy(resize(np.asarray(image), size)).permute(2, 0, 1)
    targets: dict[str, Any] = {name: sample[name] for name in ("boxes", "labels", "crowd", "area") if name in sample}
    if "masks" in sample:
        targets["masks"] = [to_rle(outline, *original) for outline in outlines(sample["masks"])]
    whole = {"image": normalize(pixels, constants), "id": sample["id"], "size": size, "original_size": original}
    return {**whole, **targets}


def pixels(image: Image.Image) -> Tensor:
    """The (3, H, W) values of an image, from 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def constants(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Channel means and standard deviations, (3, 1, 1), of values from 0 to 255."""
    first, second = (torch.tensor([255 * value for value in values]).view(3, 1, 1) for values in (mean, std))
    return first, second


def normalize(pixels: Tensor, constants: tuple[Tensor, Tensor]) -> Tensor:
    """Standardized float32 values."""
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return values.sub_(constants[0]).div_(constants[1])


def _image_size(inputs: Sequence[Any]) -> tuple[int, int]:
    height, width = next(item for item in inputs if isinstance(item, tv_tensors.Image)).shape[-2:]
    return height, width


def _draw(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))

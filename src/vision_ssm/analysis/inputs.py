"""Images as models take them, whatever the task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from vision_ssm.data import ImageDataset
    from vision_ssm.engine.task import Task


def single_inputs(task: Task, images: ImageDataset) -> Iterator[Tensor]:
    """Yield one normalized image (3, H, W) after the other, without padding, on the device of the task.

    Raises:
        InputError: An image cannot be read; names it.
    """
    for key in images.in_order():
        sample = images.sample(key)
        # Labels are not needed, and those of another task would not fit the transform.
        changed = task.eval_transform({name: sample[name] for name in ("image", "id")})
        image = changed["image"] if "image" in changed else changed["images"][0]
        yield image.to(task.device)


def input_batches(
    task: Task, images: ImageDataset, batch_size: int, size: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """Yield batches (B, 3, H, W) of normalized images.

    Args:
        task: The task of the model.
        images: The images.
        batch_size: Batch size.
        size: Height and width to resize them to; by default those of the first image, which differ only for detectors
            and segmenters.

    Raises:
        InputError: An image cannot be read; names it.
    """
    batch: list[Tensor] = []
    for x in single_inputs(task, images):
        size = size or x.shape[-2:]
        if x.shape[-2:] != tuple(size):
            x = interpolate(x[None], tuple(size), mode="bicubic", antialias=True, align_corners=False)[0]
        batch.append(x)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)

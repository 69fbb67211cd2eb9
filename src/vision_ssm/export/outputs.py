"""What an exported model computes, and whether a file of it computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vision_ssm.analysis.capture import stage_outputs
from vision_ssm.detectors import Detector

if TYPE_CHECKING:
    from vision_ssm.engine.task import Task

TOLERANCE = 1e-4
"""Largest difference between file and model, as a share of the range of an output's values."""


@dataclass(frozen=True)
class Comparison:
    """How far a file is from the model.

    Args:
        shape: Of the images, (B, 3, H, W).
        difference: The largest one, as a share of the range of the output's values and 0.
    """

    shape: tuple[int, ...]
    difference: float


class Outputs(nn.Module):
    """What a file computes of images, by name.

    Args:
        task: A model.
        features: Give the maps of the stages (of the backbone), ``feature_0`` and so on, instead of the result.
    """

    def __init__(self, task: Task, *, features: bool = False) -> None:
        super().__init__()
        self.model, self.name, self.features = task.model.eval(), task.onnx_output, features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute it of images, (B, 3, H, W)."""
        if self.features:
            return {f"feature_{i}": x for i, x in enumerate(stage_outputs(self.model, images))}
        if isinstance(self.model, Detector):
            return self.model.raw_outputs(images)
        assert self.name is not None
        return {self.name: self.model(images)}


def check_shapes(size: Sequence[int], fixed: bool) -> list[tuple[int, ...]]:
    """Return shapes of images to compare on: two batches, and unless fixed, three sizes from a model's own upwards."""
    height, width = size
    sizes = [(height, width), (height + 32, width + 64), (height + 5 - height % 2, width + 23 - width % 2)]
    return [(batch, 3, *each) for each in (sizes[:1] if fixed else sizes) for batch in (1, 3)]


@torch.no_grad()
def compare(
    run: Callable[[Tensor], Iterable[Tensor]], outputs: Outputs, shapes: Iterable[Sequence[int]]
) -> list[Comparison]:
    """Return how far a file is from the model on random images.

    Args:
        run: Computes the outputs of images from the file, in order.
        outputs: What it is to compute.
        shapes: Of the images, (B, 3, H, W).
    """
    rows, generator = [], torch.Generator().manual_seed(0)
    for shape in shapes:
        images = torch.randn(*shape, generator=generator)
        pairs = zip(run(images), outputs(images).values(), strict=True)
        rows.append(Comparison(tuple(shape), max(_difference(*pair) for pair in pairs)))
    return rows


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    # With 0 in the range, because new weights may give all but constant outputs, whose range is nothing but rounding.
    extent = expected.max().clamp_min(0) - expected.min().clamp_max(0)
    return float((found - expected).abs().max() / extent.clamp_min(1e-12))

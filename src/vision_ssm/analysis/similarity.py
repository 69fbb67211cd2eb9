"""How similar the outputs of blocks are, within a model or between two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vision_ssm.analysis.capture import as_tensor, backbone_of, capture, evaluation_mode, find_blocks
from vision_ssm.analysis.result import COLOR_MAP, Result, new_figure
from vision_ssm.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CKA(Result):
    """Similarity of every block of one model with every block of another, or of the same one.

    Args:
        models: What the two models are called.
        blocks: Names of the blocks of each.
        stages: Their stages, counted from 0.
        values: float64 (blocks of the first, blocks of the second), 1 for the same up to rotation and scale and about
            0 for independent ones; NaN where a block gives the same for all images.
        images: Number of images.
        batch_size: Number of images in the largest batch.
    """

    models: tuple[str, str]
    blocks: tuple[tuple[str, ...], tuple[str, ...]]
    stages: tuple[tuple[int, ...], tuple[int, ...]]
    values: np.ndarray
    images: int
    batch_size: int

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"block": first, "other_block": second, "cka": float(value)}
            for first, line in zip(self.blocks[0], self.values, strict=True)
            for second, value in zip(self.blocks[1], line, strict=True)
        ]

    def nearest(self) -> list[dict[str, Any]]:
        """For every block the one that is most like it, in the other model or elsewhere in the same one."""
        values = np.nan_to_num(self.values, nan=-np.inf)
        if self.models[0] == self.models[1] and len(values) > 1:
            values = np.where(np.eye(len(values), dtype=bool), -np.inf, values)
        best = values.argmax(1)
        pairs = enumerate(zip(self.blocks[0], best, strict=True))
        return [
            {"block": block, "most_similar": self.blocks[1][k], "cka": float(self.values[i, k])}
            for i, (block, k) in pairs
        ]

    def plot(self) -> Figure:
        """Draw a heat map with lines between stages."""
        rows, columns = self.values.shape
        figure = new_figure(float(np.clip(3.4 + 0.2 * columns, 5.4, 16)), float(np.clip(2.4 + 0.2 * rows, 4.6, 16)))
        axes = figure.subplots()
        picture = axes.imshow(self.values, vmin=0, vmax=1, cmap=COLOR_MAP, interpolation="nearest")
        size = float(np.clip(220 / max(rows, columns), 4, 9))
        axes.set_xticks(range(columns), self.blocks[1], rotation=90, fontsize=size)
        axes.set_yticks(range(rows), self.blocks[0], fontsize=size)
        for stages, line in zip(self.stages, (axes.axhline, axes.axvline), strict=True):
            for place, (before, after) in enumerate(pairwise(stages)):
                if before != after:
                    line(place + 0.5, color="white", linewidth=1.5)
        first, second = self.models
        axes.set(xlabel=f"block of {second}", ylabel=f"block of {first}")
        what = f"blocks of {first}" if first == second else f"blocks of {first} and {second}"
        how = f"unbiased linear CKA, {self.images:,} images in batches of {self.batch_size}"
        figure.suptitle(f"Similarity of the {what}\n{how}\nwhite lines: borders of stages", fontsize=10)
        figure.colorbar(picture, ax=axes, label="linear CKA", shrink=0.8)
        return figure


def cka(
    model: nn.Module,
    batches: Iterable[Tensor],
    other: nn.Module | None = None,
    other_batches: Iterable[Tensor] | None = None,
    *,
    names: tuple[str, str] = ("the model", "the other model"),
) -> CKA:
    """Measure the linear CKA between the outputs of blocks, flattened to one vector per image.

    Only one batch's products (images, images) of every block are kept, so that memory does not grow with the number of
    images. Of detectors and segmenters the backbone is measured.

    Args:
        model: The model.
        batches: Normalized images (B, 3, H, W), at least 4 in a batch.
        other: The model to compare it with; by default itself.
        other_batches: The same images as the other model takes them, if it takes them otherwise.
        names: What the models are called.

    Raises:
        InputError: A batch has fewer than 4 images, there are none, or a model has no blocks.

    Source: Kornblith et al. 2019; averaged over batches as in Nguyen, Raghu and Kornblith 2021, equations 2 and 3, with
    the unbiased HSIC_1 of Song et al. 2012.
    """
    networks = [backbone_of(each) for each in (model, other) if each is not None]
    blocks = [find_blocks(network) for network in networks]
    # Sums over the batches of HSIC between the blocks, and of each with itself; the rest cancels out.
    cross: Any = 0
    own: list[Any] = [0, 0]
    images = largest = 0
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(networks[-1]):
        pairs = ((x, x) for x in batches) if other_batches is None else zip(batches, other_batches, strict=True)
        for pair in pairs:
            grams = []
            for network, names_of_blocks, x in zip(networks, blocks, pair, strict=False):
                with capture(network, list(names_of_blocks), _product) as products:
                    network(x)
                grams.append(torch.stack([products[name] for name in names_of_blocks]).flatten(1))
            cross = cross + grams[0] @ grams[-1].T
            own = [total + gram.square().sum(1) for total, gram in zip(own, (grams[0], grams[-1]), strict=True)]
            images, largest = images + len(pair[0]), max(largest, len(pair[0]))
    if not images:
        raise InputError("there are no images to compare the blocks on")
    same = other is None
    return CKA(
        (names[0], names[0] if same else names[1]),
        (tuple(blocks[0]), tuple(blocks[-1])),
        (tuple(blocks[0].values()), tuple(blocks[-1].values())),
        (cross / (own[0][:, None] * own[1]).sqrt()).numpy(),
        images,
        largest,
    )


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of two sets of features of the same images, with the unbiased estimate of HSIC.

    Args:
        x: (images, ...), at least 4 images.
        y: (images, ...).

    Raises:
        InputError: There are fewer than 4 images, or not equally many.
    """
    if len(x) != len(y):
        raise InputError(f"features must be of the same images, got {len(x)} and {len(y)}")
    first, second = _product(x), _product(y)
    return float((first * second).sum() / (first.square().sum() * second.square().sum()).sqrt())


def _product(output: Any) -> Tensor:
    """The products of an output (n, ...) between images, float64 (n, n), centered so that their sums estimate HSIC.

    HSIC_1 is the sum over the product of the elements of two such matrices, divided by n (n - 3) (U-centering, Székely
    and Rizzo 2014).
    """
    x = as_tensor(output).flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    n = len(x)
    if n < 4:
        raise InputError(f"CKA needs at least 4 images in every batch, got {n}")
    x = x - x.mean(0)  # changes nothing but the rounding errors
    gram = (x @ x.T).cpu().double()
    gram.fill_diagonal_(0)
    sums = gram.sum(1)
    gram = gram - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)

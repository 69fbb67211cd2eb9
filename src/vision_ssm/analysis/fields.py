"""Effective receptive fields: which pixels one place of a stage's map depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vision_ssm.analysis.capture import check_stages, evaluation_mode, locate, stage_outputs
from vision_ssm.analysis.result import COLOR_MAP, Result, new_figure
from vision_ssm.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Shares of a field's sum for which areas are given, those of RepLKNet and SLaK."""

CENTER = (0.5, 0.5)

Normalization = Literal["none", "max", "sum"]
_DIVISORS: dict[Normalization, Any] = {"none": lambda values: 1.0, "max": np.max, "sum": np.sum}


@dataclass(frozen=True)
class Field:
    """The field of one output of one stage.

    Args:
        model: What the model is called.
        stage: The stage, counted from 0.
        map_size: Height and width of its map.
        images: Number of images.
        values: float64 (height, width) of the input, mean absolute gradient, normalized.
        position: Row and column of the output, relative to the image.
    """

    model: str
    stage: int
    map_size: tuple[int, int]
    images: int
    values: np.ndarray
    position: tuple[float, float] = CENTER


@dataclass(frozen=True)
class ERF(Result):
    """Effective receptive fields, of several stages of one or more models.

    Args:
        fields: The fields; results of several models are joined by ``ERF(a.fields + b.fields, a.normalization)``.
        normalization: What each field is divided by.
    """

    fields: tuple[Field, ...]
    normalization: Normalization

    def rows(self) -> list[dict[str, Any]]:
        """For each field the smallest squares around its position, in pixels and as shares of the area."""
        rows = []
        for field in self.fields:
            squares = zip(SHARES, centered_squares(field.values, position=field.position), strict=True)
            size = "x".join(map(str, field.values.shape))
            row = {"model": field.model, "stage": field.stage, "input": size, "images": field.images}
            for share, (side, area) in squares:
                row |= {f"side_{share:.0%}".rstrip("%"): side, f"area_{share:.0%}".rstrip("%"): area}
            rows.append(row)
        return rows

    def plot(self) -> Figure:
        """Draw a map per stage, one row per model, with the squares that hold half and nearly all of it.

        Where each model has one map, they stand four in a row.
        """
        from matplotlib.colors import LogNorm
        from matplotlib.patches import Rectangle

        models = [[f for f in self.fields if f.model == name] for name in _unique(f.model for f in self.fields)]
        most = max(map(len, models))
        columns = most if most > 1 else min(4, len(models))
        rows = math.ceil(len(models) * most / columns)
        figure = new_figure(2.7 * columns + 1.5, 2.9 * rows + 0.9)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        peak = max(float(f.values.max()) for f in self.fields)
        norm = LogNorm(peak / 1000, peak, clip=True)
        picture: Any = None
        for place, field in ((n * most + i, f) for n, own in enumerate(models) for i, f in enumerate(own)):
            axes = grid.flat[place]
            axes.set_visible(True)
            picture = axes.imshow(field.values, norm=norm, cmap=COLOR_MAP, interpolation="nearest")
            squares = dict(zip(SHARES, centered_squares(field.values, position=field.position), strict=True))
            for share, style in ((0.5, "-"), (0.99, "--")):
                side = squares[share][0]
                if side >= min(field.values.shape):
                    continue  # all of the picture
                row, column = locate(field.position, field.values.shape)
                corner = (column - side / 2, row - side / 2)
                axes.add_patch(Rectangle(corner, side, side, fill=False, color="white", linestyle=style))
            height, width = field.map_size
            axes.set_title(
                f"stage {field.stage}, map of {height}×{width} from {'×'.join(map(str, field.values.shape))}\n"
                f"50% in {squares[0.5][1]:.1%} of the area",
                fontsize=9,
            )
            axes.tick_params(labelsize=7)
            axes.set_xlabel("pixels", fontsize=8)
            if place % most == 0:
                axes.set_ylabel(f"pixels of {field.model}", fontsize=8)
        images = " and ".join(_unique(f"{f.images:,}" for f in self.fields))
        at = self.fields[0].position
        output = "the central output" if at == CENTER else f"the output at row {at[0]:.0%}, column {at[1]:.0%}"
        figure.suptitle(
            f"Effective receptive field of {output}: "
            f"mean absolute gradient over {images} image{'s' * (images != '1')}\n"
            "squares hold 50% (solid) and 99% (dashed, if smaller than the input) of its sum",
            fontsize=10,
        )
        divided = {"none": "", "max": " ÷ its maximum", "sum": " ÷ its sum"}[self.normalization]
        figure.colorbar(picture, ax=grid, label=f"mean absolute gradient{divided}", extend="min", shrink=0.8)
        return figure

    def save(self, path: Path) -> list[Path]:
        """Also write the maps into ``path.npz``, one array per model and stage."""
        from vision_ssm.engine.files import atomic_write

        files, arrays = super().save(path), path.with_name(f"{path.name}.npz")
        values: dict[str, Any] = {f"{f.model} stage {f.stage}": f.values for f in self.fields}
        with atomic_write(arrays) as file:
            np.savez_compressed(file, **values)
        return [*files, arrays]


def effective_receptive_field(
    model: nn.Module,
    batches: Iterable[Tensor],
    stages: Sequence[int] | None = None,
    *,
    normalization: Normalization = "max",
    name: str = "the model",
    position: tuple[float, float] = CENTER,
) -> ERF:
    """Measure the mean absolute gradient of stages' outputs at one place with respect to the input.

    The output is the sum over the channels of the positive values of the map there: at the center in row ``H // 2`` and
    column ``W // 2``, of an even side the second of the two middle places. So has it RepLKNet; the sum of all values
    would be constant after a LayerNorm. The mean is over images and color channels.

    Args:
        model: The model; of a detector or segmenter the backbone is measured.
        batches: Normalized images (B, 3, H, W), all of one size.
        stages: The stages, counted from 0, or negative from the last; all by default.
        normalization: What a field is divided by: nothing, its maximum or its sum.
        name: What the model is called.
        position: Row and column of the output, relative to the image: 0 is the upper or left border.

    Raises:
        InputError: There is no such stage, there are no images or of several sizes, the model gives no maps, a
            gradient is 0 everywhere or not finite, or the position is not within the image.

    Source: Luo et al. 2016; RepLKNet (Ding et al. 2022), whose code also takes the positive part of the gradients
    instead of their absolute value, and the logarithm of the field before it measures areas.
    """
    sums: dict[int, Any] = {}
    sizes: dict[int, tuple[int, int]] = {}
    images = 0
    with torch.enable_grad(), evaluation_mode(model):
        for batch in batches:
            x = batch.detach().clone().requires_grad_()
            maps = stage_outputs(model, x)
            chosen = check_stages(stages, len(maps))
            for stage in chosen:
                height, width = maps[stage].shape[-2:]
                row, column = locate(position, (height, width))
                output = maps[stage][:, :, row, column].relu().sum()
                (gradient,) = torch.autograd.grad(output, x, retain_graph=stage != chosen[-1])
                total = gradient.abs().sum(0).cpu().double().mean(0)
                if stage in sums and sums[stage].shape != total.shape:
                    raise InputError(
                        f"images must be of one size, got {tuple(sums[stage].shape)} and {tuple(total.shape)}"
                    )
                sums[stage], sizes[stage] = sums.get(stage, 0) + total, (height, width)
            images += len(x)
    if not images:
        raise InputError("there are no images to measure receptive fields on")
    fields = []
    for stage, total in sums.items():
        values = total.numpy() / images
        if not 0 < values.sum() < np.inf:
            raise InputError(f"{name}: the gradient of stage {stage} is 0 everywhere or not finite")
        fields.append(Field(name, stage, sizes[stage], images, values / _DIVISORS[normalization](values), position))
    return ERF(tuple(fields), normalization)


def centered_squares(
    values: np.ndarray, shares: Sequence[float] = SHARES, position: tuple[float, float] = CENTER
) -> list[tuple[int, float]]:
    """The smallest squares around one pixel that hold given shares of a field's sum.

    Squares have odd sides and that pixel in their middle: at the center of row ``H // 2`` and column ``W // 2``.

    Args:
        values: (H, W), not negative.
        shares: Above 0 and at most 1.
        position: Row and column of the pixel, relative to the image.

    Returns:
        For each share the side in pixels, at most what covers the image, and the share of the area that lies in the
        square; what of it is outside of the image does not count.

    Source: the high-contribution area ratio of RepLKNet and SLaK, whose squares begin with a side of 3.
    """
    places = locate(position, values.shape)
    distances = [np.abs(np.arange(side) - place) for side, place in zip(values.shape, places, strict=True)]
    most = max(2 * max(place, side - place) for side, place in zip(values.shape, places, strict=True))
    rings = np.maximum(distances[0][:, None], distances[1]).ravel()
    inside = np.bincount(rings, values.ravel()).cumsum()
    area = np.bincount(rings).cumsum() / values.size
    radii = [int(np.searchsorted(inside, share * inside[-1])) for share in shares]
    return [(min(2 * radius + 1, most), float(area[radius])) for radius in radii]


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))

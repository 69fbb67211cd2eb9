"""Maps of stages as pictures, and which parts of an image speak for a class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vision_ssm.analysis.capture import backbone_of, check_stages, evaluation_mode, stage_outputs
from vision_ssm.analysis.result import COLOR_MAP, Result, new_figure
from vision_ssm.errors import InputError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = (
    "GradCAM",
    "GradCAMPlusPlus",
    "GradCAMElementWise",
    "HiResCAM",
    "LayerCAM",
    "XGradCAM",
    "EigenCAM",
    "EigenGradCAM",
    "ScoreCAM",
)
"""Classes of grad-cam that take any network."""

Show = Callable[[Sequence[Tensor]], list[np.ndarray]]
"""Makes pictures (h, w) or (h, w, 3), of values from 0 to 1, of one stage's maps (C, h, w) of several images."""


def mean_absolute_activation(maps: Sequence[Tensor]) -> list[np.ndarray]:
    """Return the mean absolute value over the channels."""
    return _scaled([x.abs().mean(0).numpy() for x in maps])


def most_varying_channel(maps: Sequence[Tensor]) -> list[np.ndarray]:
    """Return the channel whose values vary most over places and images."""
    channel = int(torch.cat([x.flatten(1) for x in maps], 1).var(1, correction=0).argmax())
    return _scaled([x[channel].numpy() for x in maps])


def principal_components(maps: Sequence[Tensor]) -> list[np.ndarray]:
    """Return the first three principal components over places and images as red, green and blue.

    In all images the same color stands for the same direction.
    """
    from sklearn.decomposition import PCA

    vectors = torch.cat([x.flatten(1).T for x in maps]).numpy()
    values = PCA(min(3, *vectors.shape), svd_solver="full").fit_transform(vectors)
    values = np.pad(values, ((0, 0), (0, 3 - values.shape[1])))
    parts = np.split(values, np.cumsum([x[0].numel() for x in maps])[:-1])
    return _scaled([part.reshape(*x.shape[1:], 3) for part, x in zip(parts, maps, strict=True)])


def _scaled(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Stretch to 0..1 over all images, each color on its own, without the outermost 1% at both ends."""
    colors = 3 if pictures[0].ndim == 3 else 1
    low, high = np.percentile(np.concatenate([x.reshape(-1, colors) for x in pictures]), (1, 99), axis=0)
    low, high = (low, high) if colors == 3 else (low[0], high[0])
    spread = np.maximum(high - low, 1e-3 * np.max(high - low) + 1e-12)  # what hardly varies is not stretched to noise
    return [np.clip((x - low) / spread, 0, 1) for x in pictures]


@dataclass(frozen=True)
class StageMaps(Result):
    """Maps of stages as pictures.

    Args:
        model: What the model is called.
        shown: What of the maps is shown.
        images: Names of the images.
        stages: The stages, counted from 0.
        pictures: The images, (H, W, 3) with values from 0 to 1.
        maps: For each image and stage (h, w) or (h, w, 3) with values from 0 to 1.
        statistics: For each image and stage the channels of the map, mean absolute value and standard deviation.
    """

    model: str
    shown: str
    images: tuple[str, ...]
    stages: tuple[int, ...]
    pictures: tuple[np.ndarray, ...]
    maps: tuple[tuple[np.ndarray, ...], ...]
    statistics: tuple[tuple[tuple[int, float, float], ...], ...]

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for name, maps, line in zip(self.images, self.maps, self.statistics, strict=True):
            for stage, x, (channels, mean, std) in zip(self.stages, maps, line, strict=True):
                size = dict(height=x.shape[0], width=x.shape[1], channels=channels)
                rows.append({"image": name, "stage": stage, **size, "mean_absolute": mean, "std": std})
        return rows

    def plot(self) -> Figure:
        """Draw a row per image: the image, then its maps."""
        from vision_ssm.engine.plots import elide

        figure = new_figure(1.9 * (1 + len(self.stages)), 1.95 * len(self.images) + 0.9)
        grid = figure.subplots(len(self.images), 1 + len(self.stages), squeeze=False)
        for line, picture, maps in zip(grid, self.pictures, self.maps, strict=True):
            for axes, x in zip(line, (picture, *maps), strict=True):
                axes.imshow(x, cmap=COLOR_MAP, vmin=0, vmax=1, interpolation="nearest")
                axes.set_xlabel(f"{x.shape[0]}×{x.shape[1]}", fontsize=8, labelpad=2)
                axes.set(xticks=[], yticks=[])
        for axes, name in zip(grid[:, 0], self.images, strict=True):
            axes.set_ylabel(elide(name, 24), fontsize=8)
        titles = ["image", *(f"stage {stage}" for stage in self.stages)]
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, fontsize=10)
        ends = "as red, green and blue" if self.maps[0][0].ndim == 3 else "from dark (low) to bright (high)"
        figure.suptitle(f"Maps of {self.model}: {self.shown}\n{ends}, on one scale within a stage", fontsize=10)
        return figure


def stage_maps(
    model: nn.Module,
    images: Iterable[Tensor],
    stages: Sequence[int] | None = None,
    *,
    show: Show = mean_absolute_activation,
    pictures: Sequence[np.ndarray] | None = None,
    image_names: Sequence[str] | None = None,
    name: str = "the model",
) -> StageMaps:
    """Make pictures of the maps of stages.

    Args:
        model: The model; of a detector or segmenter the backbone.
        images: Normalized images (3, H, W) of any sizes.
        stages: The stages, counted from 0, or negative from the last; all by default.
        show: ``mean_absolute_activation``, ``principal_components`` or ``most_varying_channel``.
        pictures: The images as people see them, (H, W, 3) with values from 0 to 1; by default `images`, stretched.
        image_names: Names of the images.
        name: What the model is called.

    Raises:
        InputError: There are no images, there is no such stage, or the model gives no maps.
    """
    images = list(images)
    if not images:
        raise InputError("there are no images to show maps of")
    with torch.no_grad(), evaluation_mode(model):
        found = [[x[0].float().cpu() for x in stage_outputs(model, image[None])] for image in images]
    chosen = check_stages(stages, len(found[0]))
    columns = [show([maps[stage] for maps in found]) for stage in chosen]
    return StageMaps(
        name,
        show.__name__.replace("_", " "),
        tuple(image_names or map(str, range(len(images)))),
        tuple(chosen),
        tuple(pictures or map(_stretched, images)),
        tuple(zip(*columns, strict=True)),
        tuple(
            tuple((len(m[k]), float(m[k].abs().mean()), float(m[k].std(correction=0))) for k in chosen) for m in found
        ),
    )


@dataclass(frozen=True)
class Activation:
    """What speaks for a class in an image.

    Args:
        image: Name of the image.
        picture: The image, (H, W, 3) with values from 0 to 1.
        values: (H, W), from 0 to 1.
        label: Index of the class.
        class_name: Its name.
        score: Its probability; from a segmenter its share of the predicted pixels.
        predicted: Whether it is the predicted class; from a segmenter the one of most pixels.
    """

    image: str
    picture: np.ndarray
    values: np.ndarray
    label: int
    class_name: str
    score: float
    predicted: bool


@dataclass(frozen=True)
class ClassActivation(Result):
    """Class activation maps.

    Args:
        model: What the model is called.
        method: The class of grad-cam.
        stage: The stage, counted from 0.
        segmenter: Whether scores are shares of pixels.
        activations: For each image one per class.
    """

    model: str
    method: str
    stage: int
    segmenter: bool
    activations: tuple[tuple[Activation, ...], ...]

    def rows(self) -> list[dict[str, Any]]:
        score = "share_of_pixels" if self.segmenter else "probability"
        how = {"stage": self.stage, "method": self.method}
        return [
            {"image": each.image, "class": each.class_name, "label": each.label, score: each.score, **how}
            for line in self.activations
            for each in line
        ]

    def plot(self) -> Figure:
        """Draw each image, and beside it the maps of its classes over it."""
        from matplotlib.cm import ScalarMappable

        from vision_ssm.engine.plots import elide

        # As many images side by side as six columns hold, in lines of equal lengths.
        width, count = 1 + max(map(len, self.activations)), len(self.activations)
        lines = math.ceil(count / max(1, 6 // width))
        across = math.ceil(count / lines)
        figure = new_figure(2.0 * width * across + 1, 2.15 * lines + 0.6)
        grid = figure.subplots(lines, width * across, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for cells, found in zip(grid.reshape(-1, width), self.activations, strict=False):
            cells[0].imshow(found[0].picture)
            cells[0].set_title(elide(found[0].image, 24), fontsize=8)
            for axes, each in zip(cells[1:], found, strict=False):
                axes.imshow(each.picture)
                axes.imshow(each.values, cmap=COLOR_MAP, vmin=0, vmax=1, alpha=0.6)
                of = " of the pixels" if self.segmenter else ""
                mark = "predicted: " if each.predicted else ""
                axes.set_title(f"{mark}{elide(each.class_name, 20)}\n{each.score:.1%}{of}", fontsize=8)
        figure.suptitle(f"{self.method} of {self.model}, stage {self.stage}", fontsize=10)
        bar = figure.colorbar(ScalarMappable(cmap=COLOR_MAP), ax=grid, shrink=0.8, aspect=30)
        bar.set_label("activation ÷ its maximum")
        bar.outline.set_visible(False)
        return figure


def class_activation(
    model: nn.Module,
    images: Iterable[Tensor],
    classes: Sequence[int] | None = None,
    method: str = "GradCAM",
    *,
    stage: int | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    image_names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "the model",
) -> ClassActivation:
    """Find which parts of images speak for classes, with the library grad-cam, at the output of a stage.

    Of a segmenter the target is the sum of the class's scores over the pixels where it is predicted, or over all pixels
    where it is predicted nowhere. Gradients that parameters hold are lost.

    Args:
        model: A classifier, or a segmenter of this package.
        images: Normalized images (3, H, W) of any sizes.
        classes: Indices of the classes; by default the predicted one of each image.
        method: A name in ``METHODS``.
        stage: The stage, counted from 0; by default the last one.
        pictures: The images as people see them, (H, W, 3) with values from 0 to 1; by default `images`, stretched.
        image_names: Names of the images.
        class_names: Names of the classes.
        name: What the model is called.

    Raises:
        InputError: The method, a class or the stage does not exist, there are no images, the stage's map has only one
            place, or the model is neither a classifier nor a segmenter, or has no stages that can be found.
        ImportError: grad-cam is not installed.

    Source: Selvaraju et al. 2017 (Grad-CAM), https://github.com/jacobgil/pytorch-grad-cam.
    """
    if method not in METHODS:
        raise InputError(f"the method must be one of {', '.join(METHODS)}, got {method}{nearest(method, METHODS)}")
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, SemanticSegmentationTarget

    images = list(images)
    if not images:
        raise InputError("there are no images to explain")
    shown = list(pictures or map(_stretched, images))
    names = list(image_names or map(str, range(len(images))))
    stage, layer, to_map = _stage(model, stage)
    lines, segmenter = [], False
    with torch.enable_grad(), evaluation_mode(model):
        cam = getattr(pytorch_grad_cam, method)(model, [layer], to_map)
        try:
            for image, picture, image_name in zip(images, shown, names, strict=True):
                x = image[None].detach().clone().requires_grad_()  # for models whose weights are frozen
                with torch.no_grad():
                    output = _scores(model, x)
                segmenter = output.ndim == 3
                labels = output.argmax(0).cpu()
                scores = output.softmax(0).cpu()
                if segmenter:
                    scores = labels.flatten().bincount(minlength=len(output)) / labels.numel()
                if wrong := [label for label in classes or () if label not in range(len(scores))]:
                    raise InputError(f"{name} has classes 0 to {len(scores) - 1}, not {', '.join(map(str, wrong))}")
                best, line = int(scores.argmax()), []
                for label in [best] if classes is None else classes:
                    target: Any = ClassifierOutputTarget(label)
                    if segmenter:
                        mask = labels == label if (labels == label).any() else torch.ones_like(labels)
                        target = SemanticSegmentationTarget(label, mask.float().numpy())
                    values = cam(x, [target])[0]
                    if cam.activations_and_grads.activations[0].shape[-2:] == (1, 1):
                        size = "x".join(map(str, image.shape[1:]))
                        raise InputError(
                            f"the map of stage {stage} of an image of {size} has one position; try another stage"
                        )
                    class_name = str(label if class_names is None else class_names[label])
                    score = float(scores[label])
                    line.append(Activation(image_name, picture, values, label, class_name, score, label == best))
                lines.append(tuple(line))
        finally:
            cam.activations_and_grads.release()
            model.zero_grad(set_to_none=True)
    return ClassActivation(name, method, stage, segmenter, tuple(lines))


def _scores(model: nn.Module, x: Tensor) -> Tensor:
    """The scores of the classes (classes,) or of the classes of all places (classes, h, w)."""
    try:
        output = model(x)
    except TypeError:  # detectors take more than images
        output = None
    if not isinstance(output, Tensor) or output.ndim not in (2, 4):
        raise InputError(f"class activation is for classifiers and segmenters, not for {type(model).__name__}")
    return output[0].float()


def _stage(model: nn.Module, stage: int | None) -> tuple[int, nn.Module, Callable[[Tensor], Tensor]]:
    """A stage as timm's ``feature_info`` names it, and what makes its output a map (B, C, H, W)."""
    network: Any = backbone_of(model)
    info = getattr(network, "feature_info", None)
    if not info:
        raise InputError(f"{type(model).__name__} does not define its stages (feature_info)")
    names = info.module_name() if hasattr(info, "module_name") else [entry["module"] for entry in info]
    (stage,) = check_stages([len(names) - 1 if stage is None else stage], len(names))
    name = names[stage]
    network = getattr(network, "model", network)
    parts = dict(network.named_modules())
    found = parts.get(name, parts.get(name.replace(".", "_")))
    if getattr(network, "global_pool", None) == "token":  # after the last block nothing depends on the other tokens
        found = parts.get(f"{name}.norm1", found)
    if found is None:
        raise InputError(f"{type(model).__name__} has no part {name}")
    last = getattr(network, "output_fmt", "NCHW") == "NHWC"
    prefix = getattr(network, "num_prefix_tokens", 0)

    def to_map(x: Tensor) -> Tensor:
        if x.ndim == 3:  # tokens of a square map
            x = x[:, prefix:]
            side = math.isqrt(x.shape[1])
            return x.reshape(len(x), side, side, -1).permute(0, 3, 1, 2)
        return x.permute(0, 3, 1, 2) if last else x

    return stage, found, to_map


def unnormalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The picture (H, W, 3), with values from 0 to 1, of a normalized image (3, H, W)."""
    picture = image.float().cpu().permute(1, 2, 0).numpy() * np.asarray(std) + np.asarray(mean)
    return picture.clip(0, 1)


def _stretched(image: Tensor) -> np.ndarray:
    picture = image.float().cpu().permute(1, 2, 0).numpy()
    return (picture - picture.min()) / max(float(np.ptp(picture)), 1e-12)

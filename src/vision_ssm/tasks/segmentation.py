import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vision_ssm.data import Images, Sample, Splits, Transform, open_image
from vision_ssm.data.pixels import collate, eval_transform, train_transform
from vision_ssm.data.segmentation import MaskFormat, class_colors, load_masks, mask_beside, read_masks
from vision_ssm.detectors import Segmenter, create_segmenter
from vision_ssm.detectors.segmenter import IGNORED, label_map, slide, to_original
from vision_ssm.engine.files import atomic_write
from vision_ssm.engine.task import Batch, Task
from vision_ssm.errors import InputError, shorten
from vision_ssm.recipes import SegmentationConfig
from vision_ssm.recipes.config import limited
from vision_ssm.tasks.dense import DenseSpec, start_model
from vision_ssm.tasks.label_maps import default_colors, pack_labels
from vision_ssm.tasks.results import describe_data
from vision_ssm.tasks.segmentation_results import SegmentationPrediction, SegmentationResults, mean_iou

if TYPE_CHECKING:
    from rich.console import Console

_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the original size, in the published test with several scales


@dataclass(frozen=True, kw_only=True)
class SegmenterSpec(DenseSpec):
    """A segmenter without its weights: all that prediction needs to know, stored in every weights file."""

    decoder: str
    """upernet, or the name of a decoder of segmentation_models_pytorch."""
    width: int = limited(512, least=1, most=4096)
    """Channels of upernet."""
    test_size: tuple[int, int] = limited((2048, 512), least=32, most=16_384)
    """Longest and shortest side of the resized image: the largest that fits into both."""
    size_multiple: int = limited(1, least=1, most=256)
    """The sides are then stretched to multiples of this."""
    mode: Literal["whole", "slide"] = "whole"
    """See the whole image at once, or overlapping windows."""
    crop_size: int = limited(512, least=32, most=16_384)
    """Height and width of a window; the next one is two thirds further."""
    tta: bool = False
    """Average the probabilities over six sizes from 0.5 to 1.75 of the original image, each also flipped."""
    labels: tuple[int, ...]
    """Of each class, its number in masks, or its color as one number."""
    ignored: tuple[int, ...] = ()
    """Numbers or colors of pixels that do not count."""
    colored: bool = False
    """Whether masks are color images."""
    colors: tuple[str, ...] = ()
    """Colors of the classes in pictures, such as #ff8800; by default some that are easy to tell apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("labels", self.labels), ("colors", self.palette)):
            if len(values) != len(self.classes):
                raise InputError(f"{len(self.classes)} classes have {len(values)} {name}")

    @property
    def palette(self) -> tuple[str, ...]:
        """A color for each class."""
        return self.colors or default_colors(len(self.classes))

    @property
    def format(self) -> MaskFormat:
        """What the pixels of masks mean."""
        return MaskFormat(self.labels, self.ignored, self.colored)


class Segmentation(Task):
    """Semantic segmentation.

    Args:
        model: The segmenter (see `vision_ssm.detectors`).
        spec: Its description.
        config: How to train it, where it is trained; only augmentation is used here.
        class_weights: (classes,) weights of the classes in the loss.
    """

    name: ClassVar[str] = "segmentation"
    Spec: ClassVar[type] = SegmenterSpec
    spec: SegmenterSpec
    epoch_metrics: tuple[str, ...] = ("loss", "mIoU", "pixel_accuracy")
    # Norms and gates of the backbones look at the whole map, padding included.
    eval_batch_size: ClassVar[int | None] = 1
    csv_columns: ClassVar[tuple[str, ...]] = ("image", "class", "pixels", "share")
    onnx_output: ClassVar[str | None] = "scores"

    def __init__(
        self,
        model: nn.Module,
        spec: SegmenterSpec,
        config: SegmentationConfig | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(model, spec)
        self.class_weights = class_weights
        self.config = config = config or SegmentationConfig()
        names = ("mIoU", "pixel_accuracy", "mean_accuracy")
        if config.monitor not in (None, *names):
            raise InputError(f"--monitor must be one of {', '.join(names)}, got {config.monitor}")
        self.monitor = config.monitor or "mIoU"

    @classmethod
    def from_config(cls, config: SegmentationConfig, splits: Splits, *, resume: bool = False) -> "Segmentation":
        format = splits.train.targets["mask"].format  # type: ignore[union-attr]
        how: dict[str, Any] = {
            name: getattr(config, name) for name in ("decoder", "size_multiple", "mode", "crop_size")
        }
        how |= dict(labels=format.labels, ignored=format.ignored, colored=format.colored)
        colors = class_colors(config) or ()
        spec = SegmenterSpec(colors=colors, **how, **SegmenterSpec.common(config, splits.train))
        balance, counts = config.class_balance, splits.train.counts() or ()
        weights = balanced_weights(counts, balance) if balance else None
        return cls(start_model(config, spec, _create, cls.name, spec.decoder, resume=resume), spec, config, weights)

    @classmethod
    def create_model(cls, spec: SegmenterSpec) -> nn.Module:
        return _create(spec)

    @property
    def summary(self) -> str:
        size = "×".join(map(str, self.spec.test_size))
        how = f"windows of {self.spec.crop_size}" if self.spec.mode == "slide" else "whole images"
        sizes = "six sizes, also flipped" if self.spec.tta else f"resized to {size} at most"
        return f"{self.spec.decoder}, {self.spec.model}, {sizes}, {how}"

    @classmethod
    def load_data(cls, config: SegmentationConfig) -> Splits:
        return load_masks(config, config.seed)

    def read_images(self, path: Path) -> Images:
        return read_masks(path, self.spec.format, self.spec.classes)

    @property
    def train_transform(self) -> Transform:
        names = ("scale", "crop_size", "max_class_share", "photometric", "hflip")
        augment = {name: getattr(self.config, name) for name in names} | {"test_size": self.spec.test_size}
        return train_transform(mean=self.spec.mean, std=self.spec.std, **augment)

    @property
    def eval_transform(self) -> Transform:
        size: dict[str, Any] = dict(test_size=self.spec.test_size, multiple=self.spec.size_multiple)
        ratios = _RATIOS if self.spec.tta else ()
        return eval_transform(mean=self.spec.mean, std=self.spec.std, **size, ratios=ratios)

    def collate(self, samples: list[Sample]) -> Batch:
        return collate(samples)

    def training_step(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return model.losses(batch["image"], batch["mask"], self.class_weights), {}  # type: ignore[operator]

    def start(self, device: torch.device) -> None:
        self.class_weights = None if self.class_weights is None else self.class_weights.to(device)

    def describe(self, splits: Splits, console: "Console") -> None:
        describe_data(splits, None, console, what="pixels")
        parameters = sum(p.numel() for p in self.model.parameters())
        line = f"Model  {self.spec.decoder} on {self.spec.model}, {parameters / 1e6:.2f} M parameters"
        console.out(f"{line}, best epoch by {self.monitor.replace('_', ' ')}", highlight=False)
        if not self.spec.colored and self.spec.labels != tuple(range(len(self.spec.labels))):
            pairs = zip(self.spec.labels, self.spec.classes, strict=True)
            console.out(f"Note   labels: {shorten([f'{a} {b}' for a, b in pairs], 20)}", highlight=False)

    def forward(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """The (H, W) int64 index of the best class of every pixel of the original images."""
        scores = [self._scores(model, images) for images in batch["images"]]
        maps = []
        for i, original in enumerate(batch["original_size"].tolist()):
            places = [(x.shape[-2:], size[i].tolist()) for x, size in zip(batch["images"], batch["sizes"], strict=True)]
            if self.spec.tta:
                total: Any = 0
                for pair, (padded, size) in zip(scores, places, strict=True):
                    for flipped, each in enumerate(pair):
                        at_original = to_original(each[i], padded, size, original, flipped=bool(flipped))
                        total = total + at_original.softmax(0)
                maps.append(total.argmax(0))
            else:
                maps.append(label_map(scores[0][0][i], *places[0], original))
        return maps

    def _scores(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """The scores of images and, where they are to be averaged, of the flipped images, whose padding stays right."""
        variants = [images, images.flip(-1)] if self.spec.tta else [images]
        if self.spec.mode == "slide":
            crop = self.spec.crop_size
            return [slide(model, each, crop, max(1, crop * 2 // 3)).float() for each in variants]
        return [model(each).float() for each in variants]

    def metrics(self, **options: Any) -> Any:
        from torchmetrics.classification import MulticlassConfusionMatrix

        return MulticlassConfusionMatrix(len(self.spec.classes), ignore_index=IGNORED, **options)

    def evaluation_step(self, model: nn.Module, batch: Batch, metrics: Any) -> Sequence[Any]:
        """Update metrics; return id, mIoU and the label map, as a PNG file, of each image."""
        records = []
        for name, labels, truth in zip(batch["id"], self.forward(model, batch), batch["mask"], strict=True):
            if not (counts := truth != IGNORED).any():
                continue
            metrics.update(labels[None], truth[None])
            confusion = _confusion(labels[counts], truth[counts], len(self.spec.classes))
            records.append((name, mean_iou(confusion), pack_labels(labels.cpu().numpy())))
        return records

    def evaluation(self, values: Any, records: Sequence[Any]) -> SegmentationResults:
        return SegmentationResults(self.spec.classes, self.spec.palette, values.cpu(), tuple(records))

    def decode(self, outputs: Any, batch: Batch) -> list[SegmentationPrediction]:
        """The label maps."""
        how = self.spec.classes, self.spec.palette
        pairs = zip(batch["id"], outputs, strict=True)
        return [SegmentationPrediction(name, *how, labels.cpu()) for name, labels in pairs]

    def write_picture(self, prediction: Any, path: Path, *, max_pixels: int | None = None, **options: Any) -> None:
        """Write the image under the colors of the classes, and into index/ and color/ the label map alone.

        Where the image's mask is known, the true classes stand above the predicted ones.
        """
        truth = None
        if mask := mask_beside(Path(prediction.id)):
            with contextlib.suppress(InputError):  # of other labels
                truth = self.spec.format.read(mask)
        picture = prediction.draw(open_image(prediction.id, max_pixels=max_pixels), truth)
        with atomic_write(path.with_name(f"{path.name}.jpg")) as file:
            picture.save(file, "JPEG", quality=92)
        labels = prediction.label_map.numpy()
        for folder, image in (("index", self.spec.format.write(labels)), ("color", prediction.colored())):
            (path.parent / folder).mkdir(exist_ok=True)
            with atomic_write(path.parent / folder / f"{path.name}.png") as file:
                image.save(file, "PNG")

    def as_csv(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"image": row["image"], **found} for row in rows for found in row["classes"]]

    def as_table(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
        return [
            {
                "image": row["image"],
                "found": ", ".join(f"{found['class']} {found['share']:.0%}" for found in row["classes"][:5]),
            }
            for row in rows
        ]


def balanced_weights(pixels: Sequence[int], balance: float) -> Tensor:
    """The weights of classes by their numbers of pixels; their mean over all pixels is 1, absent classes have none."""
    shares = torch.tensor(pixels, dtype=torch.float64) / sum(pixels)
    weights = torch.where(shares > 0, shares**-balance, 0)
    return (weights / (weights * shares).sum()).float()


def _create(spec: SegmenterSpec, **start: Any) -> Segmenter:
    how: dict[str, Any] = dict(width=spec.width, out_indices=spec.out_indices)
    return create_segmenter(spec.decoder, spec.model, spec.model_args, len(spec.classes), **how, **start)


def _confusion(labels: Tensor, truth: Tensor, classes: int) -> Tensor:
    return torch.bincount(truth * classes + labels, minlength=classes**2).view(classes, classes)

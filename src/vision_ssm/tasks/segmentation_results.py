from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_ssm.data import Images
from vision_ssm.engine.output import make_table
from vision_ssm.engine.task import Mistake
from vision_ssm.errors import shorten
from vision_ssm.tasks.label_maps import color_labels, read_labels
from vision_ssm.tasks.results import percent, print_classes

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SegmentationPrediction:
    """The class of every pixel of an image.

    Args:
        id: The image's path.
        classes: Names of the classes.
        colors: Their colors, such as #ff8800.
        label_map: (H, W) int64 indices into `classes`, in pixels of the original image; also `found["label_map"]`.
    """

    id: str
    classes: tuple[str, ...]
    colors: tuple[str, ...]
    label_map: Tensor

    def __getitem__(self, name: str) -> Tensor:
        if name != "label_map":
            raise KeyError(name)
        return self.label_map

    def row(self) -> dict[str, Any]:
        """The classes that occur, the largest first, as JSON has them."""
        height, width = self.label_map.shape
        counts = torch.bincount(self.label_map.flatten(), minlength=len(self.classes)).tolist()
        order = sorted((label for label, count in enumerate(counts) if count), key=lambda label: -counts[label])
        found = [
            {"class": self.classes[label], "pixels": counts[label], "share": counts[label] / (height * width)}
            for label in order
        ]
        return {"image": self.id, "height": height, "width": width, "classes": found}

    def colored(self) -> Image.Image:
        """The label map in the colors of the classes."""
        return color_labels(self.label_map.numpy(), self.colors)

    def draw(self, image: Image.Image, truth: np.ndarray | None = None) -> Image.Image:
        """The image under the colors of the classes, with a legend below.

        Args:
            image: The image.
            truth: (H, W) indices of the true classes, -1 where a pixel does not count; they are drawn above.
        """
        from vision_ssm.tasks.segmentation_plots import draw_maps  # seconds, for matplotlib

        known = truth is not None and truth.shape == tuple(self.label_map.shape)
        maps = [*([truth] if known else []), self.label_map.numpy()]
        return draw_maps(image, maps, self.classes, self.colors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SegmentationResults:
    """Metrics of a segmenter on labeled images.

    Args:
        classes: Names of the classes.
        colors: Their colors.
        confusion: (classes, classes) pixels: row is the true class, column the predicted one.
        records: Id, mean IoU and label map, as a PNG file, of each image that has pixels that count.
    """

    classes: tuple[str, ...]
    colors: tuple[str, ...]
    confusion: Tensor
    records: tuple[tuple[str, float, bytes], ...] = ()

    @property
    def images(self) -> int:
        """Number of images; 0 where that is not known."""
        return len(self.records)

    def remarks(self) -> list[str]:
        """Which classes have no pixels."""
        absent = [name for name, count in zip(self.classes, self.confusion.sum(1), strict=True) if not count]
        left_out = f"{len(absent)} of {len(self.classes)} classes have no pixels here"
        return (
            [f"{left_out}; the metrics leave them out unless they are predicted: {shorten(absent)}"] if absent else []
        )

    def metrics(self) -> dict[str, float]:
        """Mean IoU (over the classes that occur or are predicted), share of right pixels, mean recall."""
        hits, support = self.confusion.diagonal(), self.confusion.sum(1)
        return {
            "mIoU": mean_iou(self.confusion),
            "pixel_accuracy": float(hits.sum() / self.confusion.sum()),
            "mean_accuracy": float((hits / support)[support > 0].mean()),
        }

    def details(self) -> dict[str, Any]:
        """Counts, IoU and recall of each class (None where nothing is to divide by), mean IoU of each image."""
        per_image = [{"image": name, "mIoU": value} for name, value, _ in self.records]
        pixels = int(self.confusion.sum())
        return {"images": self.images, "pixels": pixels, "per_class": self._per_class(), "per_image": per_image}

    def _per_class(self) -> list[dict[str, Any]]:
        total = max(1, int(self.confusion.sum()))
        rows = []
        for i, name in enumerate(self.classes):
            hit, true, said = (
                int(x) for x in (self.confusion[i, i], self.confusion[i].sum(), self.confusion[:, i].sum())
            )
            union = true + said - hit
            iou, accuracy = hit / union if union else None, hit / true if true else None
            rows.append({"class": name, "share_of_pixels": true / total, "IoU": iou, "accuracy": accuracy})
        return rows

    def report(self, console: "Console", *, title: str | None = None, details: bool = False) -> None:
        """Print the metrics, with `details` a row for each class; of many, those with the lowest IoU."""
        if details:
            print_classes(self._per_class(), ("share_of_pixels", "IoU", "accuracy"), "IoU", console)
        if title:
            console.print(title, style="italic", highlight=False)
        table = make_table("metric", ">", header=False)
        for name, value in self.metrics().items():
            table.add_row(name.replace("_", " "), percent(value))
        console.print(table)
        console.print(f"{self.images:,} images", highlight=False)

    def draw(self, images: Images, folder: Path) -> dict[str, Path]:
        """Draw the best and the worst predictions below the truth, and the confusion matrix; returns their files."""
        from vision_ssm.tasks.plots import draw_confusion  # seconds, for matplotlib
        from vision_ssm.tasks.segmentation_plots import draw_pairs

        predictions, confusion = folder / "predictions.png", folder / "confusion.png"
        draw_confusion(self.confusion, self.classes, confusion, what="pixels")
        if not self.records:
            return {"Confusion": confusion}
        draw_pairs(self.records, self.classes, self.colors, images, predictions)
        return {"Predictions": predictions, "Confusion": confusion}

    def mistakes(self, images: Images, most: int = 12) -> list[Mistake]:
        """The images with the lowest mean IoU, the true classes above the predicted ones."""
        from vision_ssm.tasks.segmentation_plots import draw_maps  # seconds, for matplotlib

        numbers = {images.id(key): key for key in range(len(images))}  # type: ignore[arg-type]
        worst = sorted(self.records, key=lambda record: record[1])[:most]
        found = []
        for (name, value, file), sample in zip(worst, images.pick([numbers[name] for name, *_ in worst]), strict=True):
            maps = [sample["mask"], read_labels(file)]
            picture = draw_maps(sample["image"], maps, self.classes, self.colors)
            picture.thumbnail((480, 960))
            found.append(Mistake(name, f"mean IoU {value:.1%}", picture))
        return found


def mean_iou(confusion: Tensor) -> float:
    """Mean over the classes that occur or are predicted of intersection over union, as in mmseg."""
    hits, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((hits / union)[union > 0].mean())

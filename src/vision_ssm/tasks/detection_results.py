from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_ssm.data import Images
from vision_ssm.data.coco import decode_masks, encode_mask
from vision_ssm.detectors import Detections, paste_mask
from vision_ssm.engine.output import make_table
from vision_ssm.errors import printable, shorten
from vision_ssm.tasks.coco_metric import CocoScores

if TYPE_CHECKING:
    from rich.console import Console

_MANY = 20  # rows of a table


@dataclass(frozen=True)
class DetectionPrediction:
    """The objects that a detector found in an image, best first; also to be read as torchvision's: `found["boxes"]`.

    Args:
        id: The image's path.
        classes: Names of the classes.
        found: The objects.
    """

    id: str
    classes: tuple[str, ...]
    found: Detections

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, name: str) -> Any:
        if name not in ("boxes", "scores", "labels", "masks"):
            raise KeyError(name)
        return getattr(self, name)

    @property
    def boxes(self) -> Tensor:
        """(N, 4) x1, y1, x2, y2 in pixels of the original image."""
        return self.found.boxes

    @property
    def scores(self) -> Tensor:
        """(N,) from 0 to 1."""
        return self.found.scores

    @property
    def labels(self) -> Tensor:
        """(N,) indices into `classes`."""
        return self.found.labels

    @property
    def masks(self) -> Tensor:
        """(N, H, W) bool, in pixels of the original image; made anew each time.

        Raises:
            ValueError: The detector predicts no masks.
        """
        return self.found.masks()

    def row(self, threshold: float = 0.3) -> dict[str, Any]:
        """The objects of at least this score, as JSON has them; masks as COCO's run-length encoding."""
        found, objects = self.found, []
        for i in range(int((found.scores >= threshold).sum())):
            entry: dict[str, Any] = {
                "class": self.classes[int(found.labels[i])],
                "label": int(found.labels[i]),
                "score": float(found.scores[i]),
                "box": found.boxes[i].tolist(),
            }
            if found.mask_probs is not None:
                entry["mask"] = encode_mask(paste_mask(found.mask_probs[i], found.boxes[i], found.size).numpy())
            objects.append(entry)
        height, width = found.size
        return {"image": self.id, "height": height, "width": width, "objects": objects}

    def draw(self, image: Image.Image, threshold: float = 0.3) -> Image.Image:
        """The image with the objects of at least this score: boxes, masks, names and scores."""
        return draw_row(image, self.row(threshold), self.classes)


@dataclass(frozen=True)
class DetectionResults:
    """Metrics of a detector on labeled images.

    Args:
        classes: Names of the classes.
        scores: COCO's figures.
        records: Predictions of each image as JSON has them.
    """

    classes: tuple[str, ...]
    scores: CocoScores
    records: tuple[dict[str, Any], ...] = ()

    @property
    def images(self) -> int:
        """Number of images."""
        return self.scores.images

    def remarks(self) -> list[str]:
        """Which classes have no objects."""
        absent = [name for name, count in zip(self.classes, self.scores.objects, strict=True) if not count]
        left_out = f"{len(absent)} of {len(self.classes)} classes have no objects here; the metrics leave them out"
        return [f"{left_out}: {shorten(absent)}"] if absent else []

    def metrics(self) -> dict[str, float]:
        """COCO's twelve figures for boxes, and for masks where there are some, as shares."""
        kinds = {"box": self.scores.box, "mask": self.scores.mask}
        return {f"{kind}_{name}": value for kind, figures in kinds.items() if figures for name, value in figures.items()}

    def details(self) -> dict[str, Any]:
        """Counts, and the metrics of each class (None where it has no objects)."""
        return {"images": self.images, "objects": sum(self.scores.objects), "per_class": self._per_class()}

    def _per_class(self) -> list[dict[str, Any]]:
        columns = {"class": self.classes, "objects": self.scores.objects, **self.scores.per_class}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def report(self, console: "Console", *, title: str | None = None, details: bool = False) -> None:
        """Print the metrics, with `details` a row for each class; of many, those with the lowest AP."""
        from rich.markup import escape

        if details:
            rows = self._per_class()
            hidden = max(0, len(rows) - _MANY)
            if hidden:
                rows = sorted((row for row in rows if row["objects"]), key=lambda row: row["box_ap"])[:_MANY]
            figures = list(self.scores.per_class)
            table = make_table("class", ">objects", *(f">{_label(name)}" for name in figures))
            for row in rows:
                shown = (_percent(row[name]) for name in figures)
                table.add_row(escape(printable(row["class"])), f"{row['objects']:,}", *shown)
            console.print(table)
            if hidden:
                console.print(f"and {hidden:,} other classes; --json lists all", highlight=False)
        if title:
            console.print(title, style="italic", highlight=False)
        kinds = {"boxes": self.scores.box, "masks": self.scores.mask}
        kinds = {kind: values for kind, values in kinds.items() if values}
        table = make_table("%", *(f">{kind}" for kind in kinds))
        for name, text in FIGURES.items():
            table.add_row(text, *(_percent(values[name]) for values in kinds.values()))
        console.print(table)
        console.print(f"{self.images:,} images with {sum(self.scores.objects):,} objects", highlight=False)

    def draw(self, images: Images, folder: Path) -> dict[str, Path]:
        """Draw predictions beside the truth, and precision by recall, into a folder; returns their files by title."""
        from vision_ssm.tasks.detection_plots import draw_pairs, draw_precision  # seconds, for matplotlib

        pairs, precision = folder / "predictions.png", folder / "precision.png"
        draw_pairs(self.records, self.classes, images, pairs)
        draw_precision(self.scores, self.classes, precision)
        return {"Predictions": pairs, "Precision": precision}


def coco_document(
    rows: Sequence[Mapping[str, Any]], classes: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """Rows of predictions as a data set in COCO format; its annotations have scores too."""
    images, annotations = [], []
    for number, row in enumerate(rows, start=1):
        size = {name: row[name] for name in ("height", "width")}
        images.append({"id": number, "file_name": row["image"], **size})
        for found in row["objects"]:
            x1, y1, x2, y2 = found["box"]
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category_ids[found["label"]]}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "score": found["score"]}
            entry |= {"segmentation": found["mask"]} if "mask" in found else {}
            annotations.append({**entry, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _label(name: str) -> str:
    kind, figure = name.split("_")
    return f"{kind} {FIGURES[figure]}"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"

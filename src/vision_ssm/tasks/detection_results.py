import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from faster_coco_eval.core import mask
from PIL import Image
from torch import Tensor

from vision_ssm.data import Images
from vision_ssm.data.rle import encode_masks, mask_area
from vision_ssm.detectors import Detections, paste_mask
from vision_ssm.engine.output import make_table
from vision_ssm.engine.task import Mistake
from vision_ssm.errors import shorten
from vision_ssm.tasks.results import percent, print_classes

if TYPE_CHECKING:
    from rich.console import Console

    from vision_ssm.tasks.coco_metric import CocoFigures, CocoResults

FIGURES = {
    "AP": "AP, IoU 0.5 to 0.95",
    "AP50": "AP, IoU 0.5",
    "AP75": "AP, IoU 0.75",
    "APs": "AP, small objects, below 32² pixels",
    "APm": "AP, medium objects",
    "APl": "AP, large objects, above 96² pixels",
    "AR1": "AR, 1 object per image",
    "AR10": "AR, 10 objects per image",
    "AR100": "AR, 100 objects per image",
    "ARs": "AR, small objects",
    "ARm": "AR, medium objects",
    "ARl": "AR, large objects",
}
"""COCO's twelve metrics, and what they are."""


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

    def row(self, threshold: float = 0.5) -> dict[str, Any]:
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
                pixels = paste_mask(found.mask_probs[i], found.boxes[i], found.size).numpy()
                (entry["mask"],) = encode_masks(pixels[None])
            objects.append(entry)
        height, width = found.size
        return {"image": self.id, "height": height, "width": width, "objects": objects}

    def draw(self, image: Image.Image, threshold: float = 0.5) -> Image.Image:
        """The image with the objects of at least this score: boxes, masks, names and scores."""
        from vision_ssm.tasks.detection_plots import draw_row  # seconds, for matplotlib

        return draw_row(image, self.row(threshold), self.classes)


@dataclass(frozen=True)
class DetectionResults:
    """Metrics of a detector on labeled images.

    Args:
        classes: Names of the classes.
        coco: COCO's figures.
        records: Predictions of each image as JSON has them.
    """

    classes: tuple[str, ...]
    coco: "CocoResults"
    records: tuple[dict[str, Any], ...] = ()

    @property
    def images(self) -> int:
        """Number of images."""
        return self.coco.images

    @property
    def kinds(self) -> dict[str, "CocoFigures"]:
        """The figures of boxes and, where there are some, of masks."""
        masks = {} if self.coco.masks is None else {"mask": self.coco.masks}
        return {"box": self.coco.boxes, **masks}

    def remarks(self) -> list[str]:
        """Which classes have no objects."""
        absent = [name for name, count in zip(self.classes, self.coco.objects, strict=True) if not count]
        left_out = f"{len(absent)} of {len(self.classes)} classes have no objects here; the metrics leave them out"
        return [f"{left_out}: {shorten(absent)}"] if absent else []

    def metrics(self) -> dict[str, float]:
        """COCO's twelve figures as shares; NaN where there is nothing to measure them on."""
        return {f"{kind}_{name}": getattr(found, name) for kind, found in self.kinds.items() for name in FIGURES}

    def details(self) -> dict[str, Any]:
        """Counts, and the metrics of each class (None where it has no objects)."""
        return {"images": self.images, "objects": int(self.coco.objects.sum()), "per_class": self._per_class()}

    def _per_class(self) -> list[dict[str, Any]]:
        rows = []
        for i, name in enumerate(self.classes):
            count = int(self.coco.objects[i])
            figures = {
                f"{kind}_{figure}": float(getattr(found, f"class_{figure}")[i]) if count else None
                for kind, found in self.kinds.items()
                for figure in ("AP", "AP50")
            }
            rows.append({"class": name, "objects": count, **figures})
        return rows

    def report(self, console: "Console", *, title: str | None = None, details: bool = False) -> None:
        """Print the metrics, with `details` a row for each class; of many, those with the lowest AP."""
        if details:
            rows = self._per_class()
            print_classes(rows, [name for name in rows[0] if name != "class"], "box_AP", console)
        if title:
            console.print(title, style="italic", highlight=False)
        table = make_table("", *(f">{kind}" for kind in self.kinds))
        for name, text in FIGURES.items():
            table.add_row(text, *(percent(getattr(found, name)) for found in self.kinds.values()))
        console.print(table)
        console.print(f"{self.images:,} images with {int(self.coco.objects.sum()):,} objects", highlight=False)

    def draw(self, images: Images, folder: Path) -> dict[str, Path]:
        """Draw predictions beside the truth, and precision by recall, into a folder; returns their files by title."""
        from vision_ssm.tasks.detection_plots import draw_pairs, draw_precision  # seconds, for matplotlib

        pairs, precision = folder / "predictions.png", folder / "precision.png"
        draw_pairs(self.records, self.classes, images, pairs)
        draw_precision(self.kinds, self.classes, self.coco.objects, precision)
        return {"Predictions": pairs, "Precision": precision}

    def mistakes(self, images: Images, most: int = 12) -> list[Mistake]:
        """The objects found with the highest scores where none of their class is annotated (IoU below 0.5)."""
        from vision_ssm.tasks.detection_plots import draw_row  # seconds, for matplotlib

        objects = [(number, each) for number, row in enumerate(self.records) for each in row["objects"]]
        objects.sort(key=lambda pair: -pair[1]["score"])
        wrong = list(itertools.islice((pair for pair in objects if _overlap(images, *pair) < 0.5), most))
        found = []
        for (_, each), sample in zip(wrong, images.pick([number for number, _ in wrong]), strict=True):
            picture = draw_row(sample["image"], {"objects": [each]}, self.classes)
            picture.thumbnail((480, 480))
            found.append(Mistake(sample["id"], f"{each['class']} ({each['score']:.1%}), not annotated", picture))
        return found


def _overlap(images: Any, number: int, found: Mapping[str, Any]) -> float:
    """The largest IoU of an object found in an image with what is annotated of its class; COCO's for crowds."""
    targets = {name: images.targets[name][images.index[number]] for name in ("boxes", "labels", "crowd")}
    same = targets["labels"] == found["label"]
    corners = np.concatenate([targets["boxes"][same], [found["box"]]]).astype(np.float64)
    corners[:, 2:] -= corners[:, :2]
    ious = mask.iou(corners[-1:], corners[:-1], targets["crowd"][same].tolist())
    return float(np.max(ious, initial=0.0))


def as_coco(row: Mapping[str, Any], masks: bool) -> dict[str, Any]:
    """A row as `CocoMetric` takes it."""
    names = {"boxes": "box", "scores": "score", "labels": "label"} | ({"masks": "mask"} if masks else {})
    return {name: [found[key] for found in row["objects"]] for name, key in names.items()}


def coco_document(
    rows: Sequence[Mapping[str, Any]], classes: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """Rows of predictions as a data set in COCO format; its annotations have scores too."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        size = {name: row[name] for name in ("height", "width")}
        images.append({"id": number, "file_name": os.path.abspath(row["image"]), **size})
        for found in row["objects"]:
            x1, y1, x2, y2 = found["box"]
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category_ids[found["label"]]}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "score": found["score"]}
            if "mask" in found:
                entry |= {"segmentation": found["mask"], "area": mask_area(found["mask"])}
            annotations.append({**entry, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}

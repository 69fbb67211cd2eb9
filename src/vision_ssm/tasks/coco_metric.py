"""Average precision and recall as COCO defines them, on faster-coco-eval."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor
from torchmetrics import Metric

RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is taken."""


class CocoFigures(NamedTuple):
    """COCO's twelve figures, and those of each class; NaN where there are no objects to measure them on.

    AP is the mean over IoU thresholds from 0.5 to 0.95, and small objects are below 32², large ones above 96² pixels.

    Attributes:
        precision: (classes, 101) at IoU 0.5, at each of `RECALLS`.
        class_AP: (classes,).
        class_AP50: (classes,).
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    class_AP: np.ndarray
    class_AP50: np.ndarray
    precision: np.ndarray

    @property
    def curve(self) -> np.ndarray:
        """(101,) precision at IoU 0.5 at each of `RECALLS`, the mean over the classes that have objects."""
        known = self.precision[~np.isnan(self.precision[:, 0])]
        return known.mean(0) if len(known) else np.full(len(RECALLS), np.nan)


class CocoResults(NamedTuple):
    """What was measured; a tuple because torchmetrics takes no frozen dataclass.

    Attributes:
        boxes: Figures of boxes.
        masks: Figures of masks, where both predictions and targets have them.
        objects: (classes,) number of objects, without crowds.
        images: Number of images.
    """

    boxes: CocoFigures
    masks: CocoFigures | None
    objects: np.ndarray
    images: int


class CocoMetric(Metric):
    """COCO's figures of detections. What was seen is kept as JSON, so that processes of any number can gather it.

    Args:
        classes: Number of classes.
        options: See `torchmetrics.Metric`.
    """

    full_state_update = False
    seen: list[Tensor] | Tensor

    def __init__(self, classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.classes = classes
        self.add_state("seen", default=[], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            predictions: For each image `boxes` (n, 4) x1 y1 x2 y2 in pixels of the original image, `scores` (n,),
                `labels` (n,), and perhaps `masks`, n run-length encodings (see `vision_ssm.data.rle`).
            targets: For each image `boxes`, `labels`, and perhaps `crowd` (n,), `area` (n,) in pixels (by default
                that of the box), and `masks`.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            content = [
                {name: value.tolist() if hasattr(value, "tolist") else value for name, value in each.items()}
                for each in (prediction, {"crowd": [False] * len(target["labels"]), **target})
            ]
            self.seen.append(_encode(json.dumps(content) + "\n").to(self.device))  # type: ignore[union-attr]

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather from all processes; where one has seen nothing, torchmetrics would send another type for it."""
        if isinstance(self.seen, list):
            self.seen.append(_encode("").to(self.device))
        super().sync(*args, **options)

    def compute(self) -> CocoResults:
        """Return all figures; they do not depend on the order of the images."""
        seen = self.seen if isinstance(self.seen, list) else [self.seen]
        lines = b"".join(part.cpu().numpy().tobytes() for part in seen).splitlines()
        images = [json.loads(line) for line in sorted(lines)]
        labels = [
            label
            for _, target in images
            for label, crowd in zip(target["labels"], target["crowd"], strict=True)
            if not crowd
        ]
        objects = np.bincount(np.array(labels, np.int64), minlength=self.classes)
        masked = bool(images) and all("masks" in each for image in images for each in image)
        boxes, masks = self._figures(images, "bbox"), self._figures(images, "segm") if masked else None
        return CocoResults(boxes, masks, objects, len(images))

    def _figures(self, images: Sequence[Any], kind: Literal["bbox", "segm"]) -> CocoFigures:
        declared: dict[str, Any] = {
            "images": [{"id": number, "height": 1, "width": 1} for number in range(len(images))],
            "categories": [{"id": label, "name": str(label)} for label in range(self.classes)],
        }
        targets, predictions = [], []
        for number, (prediction, target) in enumerate(images):
            targets += [*_annotations(target, number, kind)]
            predictions += [*_annotations(prediction, number, kind)]
        truth = COCO({**declared, "annotations": [{"id": 1 + i, **target} for i, target in enumerate(targets)]})
        evaluator = COCOeval_faster(truth, truth.loadRes(predictions), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        precision, recall = (
            np.where(evaluator.eval[name] < 0, np.nan, evaluator.eval[name]) for name in ("precision", "recall")
        )  # (thresholds, recalls, classes, areas, limits) and without recalls
        most = precision[..., -1]
        return CocoFigures(
            AP=_mean(most[..., 0]),
            AP50=_mean(most[0, ..., 0]),
            AP75=_mean(most[5, ..., 0]),
            **{f"AP{size}": _mean(most[..., area]) for area, size in enumerate("sml", start=1)},
            **{f"AR{limit}": _mean(recall[:, :, 0, place]) for place, limit in enumerate((1, 10, 100))},
            **{f"AR{size}": _mean(recall[:, :, area, -1]) for area, size in enumerate("sml", start=1)},
            class_AP=np.array([_mean(most[:, :, label, 0]) for label in range(self.classes)]),
            class_AP50=np.array([_mean(most[0, :, label, 0]) for label in range(self.classes)]),
            precision=most[0, :, :, 0].T,
        )


def _encode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(text.encode()), np.uint8))


def _annotations(image: Mapping[str, Any], number: int, kind: str) -> Iterator[dict[str, Any]]:
    """The objects of an image as COCO has them."""
    for place, ((x1, y1, x2, y2), label) in enumerate(zip(image["boxes"], image["labels"], strict=True)):
        annotation = {"image_id": number, "category_id": label}
        if "scores" in image:
            annotation["score"] = image["scores"][place]
        else:
            area = image["area"][place] if "area" in image else (x2 - x1) * (y2 - y1)
            annotation |= {"area": area, "iscrowd": int(image["crowd"][place])}
        if kind == "segm":  # the area of a prediction is then that of its mask
            yield annotation | {"segmentation": image["masks"][place]}
        else:
            yield annotation | {"bbox": [x1, y1, x2 - x1, y2 - y1]}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")

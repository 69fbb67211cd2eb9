from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vision_ssm.data import Images, Sample, Splits, Transform, open_image
from vision_ssm.data.coco import load_coco, read_coco
from vision_ssm.data.joint import collate, eval_transform, train_transform
from vision_ssm.detectors import Detector, FasterRCNN, create_detector
from vision_ssm.engine.files import atomic_write
from vision_ssm.engine.task import Batch, Task
from vision_ssm.errors import InputError
from vision_ssm.recipes import DetectionConfig
from vision_ssm.recipes.config import limited
from vision_ssm.tasks.dense import DenseSpec, start_model
from vision_ssm.tasks.detection_results import FIGURES, DetectionPrediction, DetectionResults, as_coco, coco_document
from vision_ssm.tasks.results import describe_data

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class DetectorSpec(DenseSpec):
    """A detector without its weights: all that prediction needs to know, stored in every weights file."""

    detector: str
    """mask-rcnn, faster-rcnn or retinanet."""
    category_ids: tuple[int, ...]
    """Numbers of the classes in COCO files."""
    test_size: tuple[int, int] = limited((1333, 800), least=32, most=16_384)
    """Longest and shortest side of the resized image: the largest that fits into both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.category_ids) != len(self.classes):
            raise InputError(f"{len(self.classes)} classes have {len(self.category_ids)} category numbers")

    @classmethod
    def from_config(cls, config: DetectionConfig, images: Images) -> "DetectorSpec":
        """The detector of a configuration.

        Args:
            config: The configuration.
            images: The training images, which decide on the classes and on whether there are masks.

        Raises:
            InputError: timm does not know the backbone.
        """
        masks = "masks" in images.targets  # type: ignore[union-attr]
        detector = "faster-rcnn" if config.detector == "mask-rcnn" and not masks else config.detector
        return cls(detector=detector, category_ids=images.category_ids, **cls.common(config, images))  # type: ignore[union-attr]


class Detection(Task):
    """Object detection, with masks of the objects where the detector predicts them.

    Args:
        model: The detector (see `vision_ssm.detectors`).
        spec: Its description.
        config: How to train it, where it is trained; only augmentation is used here.
    """

    name: ClassVar[str] = "detection"
    Spec: ClassVar[type] = DetectorSpec
    spec: DetectorSpec
    # Norms and gates of the backbones look at the whole map, padding included.
    eval_batch_size: ClassVar[int | None] = 1
    csv_columns: ClassVar[tuple[str, ...]] = ("image", "class", "score", "x1", "y1", "x2", "y2")

    def __init__(self, model: nn.Module, spec: DetectorSpec, config: DetectionConfig | None = None) -> None:
        super().__init__(model, spec)
        self.config = config = config or DetectionConfig()
        kinds = ("box", "mask") if self.masks else ("box",)
        names = [f"{kind}_{figure}" for kind in kinds for figure in FIGURES]
        if config.monitor not in (None, *names):
            raise InputError(f"--monitor must be one of {', '.join(names)}, got {config.monitor}")
        self.monitor = config.monitor or f"{kinds[-1]}_AP"
        self.epoch_metrics = ("loss", *(f"{kind}_{figure}" for kind in kinds for figure in ("AP", "AP50")))

    @property
    def masks(self) -> bool:
        """Whether the detector predicts masks."""
        return self.spec.detector == "mask-rcnn"

    @classmethod
    def from_config(cls, config: DetectionConfig, splits: Splits, *, resume: bool = False) -> "Detection":
        spec = DetectorSpec.from_config(config, splits.train)
        if "masks" not in splits.val.targets:  # type: ignore[union-attr]
            if "mask" in (config.monitor or ""):
                raise InputError(f"--monitor {config.monitor}: the validation images have no masks")
            config = replace(config, monitor=config.monitor or "box_AP")
        return cls(first_model(config, spec, resume=resume), spec, config)

    @classmethod
    def create_model(cls, spec: DetectorSpec) -> nn.Module:
        return _create(spec)

    @property
    def summary(self) -> str:
        return f"{self.spec.detector}, {self.spec.model}, resized to {'×'.join(map(str, self.spec.test_size))} at most"

    @classmethod
    def load_data(cls, config: DetectionConfig) -> Splits:
        splits = load_coco(config, config.seed, filter_empty=config.filter_empty)
        splits.train.grouped = config.batch_size  # type: ignore[union-attr]
        return splits

    def read_images(self, path: Path) -> Images:
        return read_coco(path, self.spec.classes)

    @property
    def train_transform(self) -> Transform:
        names = ("short_sides", "long_side", "jitter", "jitter_size", "hflip")
        augment = {name: getattr(self.config, name) for name in names} | {"crop": self.config.random_crop}
        return train_transform(mean=self.spec.mean, std=self.spec.std, masks=self.masks, **augment)

    @property
    def eval_transform(self) -> Transform:
        return eval_transform(mean=self.spec.mean, std=self.spec.std, test_size=self.spec.test_size)

    def collate(self, samples: list[Sample]) -> Batch:
        return collate(samples)

    def training_step(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return model.losses(batch["image"], batch["size"], batch["targets"]), {}  # type: ignore[operator]

    def describe(self, splits: Splits, console: "Console") -> None:
        describe_data(splits, None, console, what="objects")
        parameters = sum(p.numel() for p in self.model.parameters())
        line = f"Model  {self.spec.detector} on {self.spec.model}, {parameters / 1e6:.2f} M parameters"
        console.out(f"{line}, best epoch by {self.monitor.replace('_', ' ')}", highlight=False)
        if self.config.detector != self.spec.detector:
            console.out("Note   not all objects have masks, so the detector predicts boxes only", highlight=False)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["image"], batch["size"], batch["original_size"])

    def metrics(self, **options: Any) -> Any:
        from vision_ssm.tasks.coco_metric import CocoMetric  # seconds, for torchmetrics

        return CocoMetric(len(self.spec.classes), **options)

    def evaluation_step(self, model: nn.Module, batch: Batch, metrics: Any) -> Sequence[Any]:
        """Update metrics; return the predictions as JSON has them."""
        predictions = self.decode(self.forward(model, batch), batch)
        rows = [prediction.row(threshold=0.0) for prediction in predictions]
        metrics.update([as_coco(row, self.masks) for row in rows], batch["targets"])
        return rows

    def evaluation(self, values: Any, records: Sequence[Any]) -> DetectionResults:
        return DetectionResults(self.spec.classes, values, tuple(records))

    def decode(self, outputs: Any, batch: Batch) -> list[DetectionPrediction]:
        """Boxes, scores, labels and masks of the objects."""
        pairs = zip(batch["id"], outputs, strict=True)
        return [DetectionPrediction(name, self.spec.classes, found.cpu()) for name, found in pairs]

    def write_picture(self, prediction: Any, path: Path, *, max_pixels: int | None = None, **options: Any) -> None:
        picture = prediction.draw(open_image(prediction.id, max_pixels=max_pixels), **options)
        with atomic_write(path.with_name(f"{path.name}.jpg")) as file:
            picture.save(file, "JPEG", quality=92)

    def as_json(self, rows: Sequence[dict[str, Any]]) -> Any:
        """A data set in COCO format whose annotations have scores."""
        return coco_document(rows, self.spec.classes, self.spec.category_ids)

    def as_csv(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            dict(zip(self.csv_columns, (row["image"], found["class"], found["score"], *found["box"]), strict=True))
            for row in rows
            for found in row["objects"]
        ]

    def as_table(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
        lines = []
        for row in rows:
            counts = Counter(found["class"] for found in row["objects"])
            found = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
            lines += [{"image": row["image"], "found": found}]
        return lines


def _create(spec: DetectorSpec, **start: Any) -> Detector:
    how: dict[str, Any] = dict(width=spec.width, out_indices=spec.out_indices)
    return create_detector(spec.detector, spec.model, spec.model_args, len(spec.classes), **how, **start)


def first_model(config: DetectionConfig, spec: DetectorSpec, *, resume: bool = False) -> nn.Module:
    """The detector that training starts from; see `vision_ssm.tasks.dense.first_model`."""
    model: Any = start_model(config, spec, _create, "detection", spec.detector, resume=resume)
    if isinstance(model, FasterRCNN):
        model.box_samples = config.box_samples
    return model

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vision_ssm.data import Images, ImageStream, Splits
from vision_ssm.data.dataset import how_many
from vision_ssm.engine.output import make_table

if TYPE_CHECKING:
    from rich.console import Console

_MANY = 20  # rows of a table


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of an image.

    Args:
        id: The image's path.
        classes: Names of the classes.
        probabilities: (classes,) float32.
    """

    id: str
    classes: tuple[str, ...]
    probabilities: Tensor

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    @property
    def confidence(self) -> float:
        """Its probability."""
        return float(self.probabilities.max())

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` most probable classes with their probabilities."""
        best = self.probabilities.topk(min(k, len(self.classes)))
        return [(self.classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def row(self, k: int = 5) -> dict[str, Any]:
        """The prediction as JSON has it."""
        return {"image": self.id, "predictions": [{"class": name, "probability": p} for name, p in self.top(k)]}


@dataclass(frozen=True)
class ClassificationResults:
    """Metrics of a classifier on labeled images.

    Args:
        classes: Names of the classes.
        loss: Mean cross-entropy in nats.
        confusion: (classes, classes) counts: row is the true class, column the predicted one.
        top5: Share of images whose class is among the five most probable; None up to five classes.
        records: Predicted class, its probability and true class of each image.
    """

    classes: tuple[str, ...]
    loss: float
    confusion: Tensor
    top5: float | None
    records: tuple[tuple[int, float, int], ...] = ()

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of images whose most probable class is right."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum())

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that occur."""
        support = self.confusion.sum(1)
        occurs = support > 0
        return float((self.confusion.diagonal()[occurs] / support[occurs]).mean())

    def metrics(self) -> dict[str, float]:
        """The metrics by name; top-5 only where there are more than five classes."""
        top5 = {} if self.top5 is None else {"top5_accuracy": self.top5}
        return {"loss": self.loss, "accuracy": self.accuracy, **top5, "balanced_accuracy": self.balanced_accuracy}

    def details(self) -> dict[str, Any]:
        """Number of images; of each class name, images, recall and precision (None where nothing is to divide by)."""
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(self.classes):
            hit, true, said = (
                int(x) for x in (self.confusion[i, i], self.confusion[i].sum(), self.confusion[:, i].sum())
            )
            recall, precision = hit / true if true else None, hit / said if said else None
            rows.append({"class": name, "images": true, "recall": recall, "precision": precision})
        return {"images": self.images, "per_class": rows}

    def report(self, console: "Console", *, title: str | None = None, details: bool = False) -> None:
        """Print the metrics, with `details` a row for each class; of many, those with the lowest recall."""
        from rich.markup import escape

        if details:
            rows = self.details()["per_class"]
            hidden = 0
            if len(rows) > _MANY:
                rows = sorted((row for row in rows if row["images"]), key=lambda row: row["recall"])
                rows, hidden = rows[:_MANY], max(0, len(rows) - _MANY)
            table = make_table("class", ">images", ">recall", ">precision")
            for row in rows:
                shares = ["–" if row[k] is None else f"{row[k]:.1%}" for k in ("recall", "precision")]
                table.add_row(escape(row["class"]), f"{row['images']:,}", *shares)
            console.print(table)
            if hidden:
                console.print(f"and {hidden:,} classes with at least this recall; --json lists all", highlight=False)
        if title:
            console.print(title, style="italic", highlight=False)
        table = make_table("metric", "value", header=False)
        table.add_row("images", f"{self.images:,}")
        for name, value in self.metrics().items():
            label = name.replace("_", " ").replace("top5", "top-5")
            table.add_row(label, f"{value:.4f}" if name == "loss" else f"{value:.2%}")
        console.print(table)

    def draw(self, images: Images, folder: Path) -> dict[str, Path]:
        """Draw the confusion matrix and a sheet of predictions into a folder; returns their files by title."""
        from vision_ssm.tasks.plots import draw_confusion, draw_predictions  # seconds, for matplotlib

        confusion, predictions = folder / "confusion.png", folder / "predictions.png"
        draw_confusion(self.confusion, self.classes, confusion)
        draw_predictions(self.records, self.classes, images, predictions)
        return {"Confusion": confusion, "Predictions": predictions}


def is_uneven(images: Images) -> bool:
    """Whether the largest class has over 1.5 times as many images as the smallest, or may have."""
    counts = images.counts()
    return counts is None or max(counts) > 1.5 * max(min(counts), 1)


def describe_data(splits: Splits, console: "Console") -> None:
    """Print how many images there are, and how many of each class where that is known."""
    from rich.markup import escape

    train, val = splits.train, splits.val
    counted = f"{how_many(train)} training and {how_many(val)} validation images"
    console.print(f"Data   {counted} in {len(train.classes)} classes", highlight=False)
    for images, what in ((train, "training"), (val, "validation")):
        if isinstance(images, ImageStream):
            console.print(f"       {what} images are read as a stream, shards: {len(images.shards):,}", highlight=False)
    counts, val_counts = train.counts(), val.counts()
    if counts is None or val_counts is None:
        return
    if len(train.classes) > _MANY:
        few, many = min(counts), max(counts)
        console.print(f"       {few:,} to {many:,} training images per class", highlight=False)
        return
    table = make_table("class", ">training", ">validation")
    for name, a, b in zip(train.classes, counts, val_counts, strict=True):
        table.add_row(escape(name), f"{a:,}", f"{b:,}")
    console.print(table)

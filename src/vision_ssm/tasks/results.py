import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vision_ssm.data import Images, ImageStream, Splits
from vision_ssm.data.dataset import equal_images, how_many
from vision_ssm.engine.output import make_table
from vision_ssm.engine.task import Mistake
from vision_ssm.errors import InputError, printable, shorten

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

    def answer(self, threshold: float = 0.0) -> str:
        """The most probable class, or "unsure" if its probability is below a threshold."""
        return self.label if self.confidence >= threshold else "unsure"

    def row(self, top: int = 5, threshold: float = 0.0) -> dict[str, Any]:
        """The prediction as JSON has it."""
        predictions = [{"class": name, "probability": p} for name, p in self.top(top)]
        return {"image": self.id, "answer": self.answer(threshold), "predictions": predictions}


@dataclass(frozen=True)
class ClassificationResults:
    """Metrics of a classifier on labeled images.

    Args:
        classes: Names of the classes.
        loss: Mean cross-entropy in nats.
        confusion: (classes, classes) counts: row is the true class, column the predicted one.
        top5: Share of images whose class is among the five most probable; None up to five classes.
        records: Id, predicted class, its probability and true class of each image.
    """

    classes: tuple[str, ...]
    loss: float
    confusion: Tensor
    top5: float | None
    records: tuple[tuple[str, int, float, int], ...] = ()

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

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy (Wilson, 1927)."""
        n, p, z = self.images, self.accuracy, 1.959964
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def remarks(self) -> list[str]:
        """Which classes have no images."""
        present = [name for name, count in zip(self.classes, self.confusion.sum(1), strict=True) if count]
        absent = f"{len(self.classes) - len(present)} of {len(self.classes)} classes have no images here"
        left_out = f"{absent}; the metrics leave them out and are for {shorten(present)}"
        return [left_out] if len(present) < len(self.classes) else []

    def metrics(self) -> dict[str, float]:
        """The metrics by name, over the classes that occur; top-5 only where there are more than five classes."""
        top5 = {} if self.top5 is None else {"top5_accuracy": self.top5}
        hits, support, said = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        occurs = support > 0
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            **top5,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": float((2 * hits / (support + said))[occurs].mean()),
            "worst_recall": float((hits / support)[occurs].min()) if occurs.any() else float("nan"),
        }

    def details(self) -> dict[str, Any]:
        """Counts, interval, metrics of each class (None where nothing is to divide by), most confident mistakes."""
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(self.classes):
            hit, true, said = (
                int(x) for x in (self.confusion[i, i], self.confusion[i].sum(), self.confusion[:, i].sum())
            )
            recall, precision = hit / true if true else None, hit / said if said else None
            f1 = 2 * hit / (true + said) if true + said else None
            rows.append({"class": name, "images": true, "recall": recall, "precision": precision, "f1": f1})
        mistakes = [
            {"image": name, "class": self.classes[label], "predicted": self.classes[guess], "probability": p}
            for name, guess, p, label in (self.records[number] for number in self._wrong(_MANY))
        ]
        share = float(self.confusion.sum(1).max()) / self.images
        values = {"images": self.images, "accuracy_interval": self.interval, "largest_class_share": share}
        return {**values, "most_confident_mistakes": mistakes, "per_class": rows}

    def _wrong(self, most: int) -> list[int]:
        """Numbers of the images classified wrongly, the most confident first."""
        wrong = [number for number, (_, guess, _, label) in enumerate(self.records) if guess != label]
        return sorted(wrong, key=lambda number: -self.records[number][2])[:most]

    def mistakes(self, images: Images, most: int = 12) -> list[Mistake]:
        """The images classified wrongly, the most confident first."""
        from vision_ssm.tasks.plots import thumbnail  # seconds, for matplotlib

        found = []
        for number, sample in zip(wrong := self._wrong(most), images.pick(wrong), strict=True):
            name, guess, probability, label = self.records[number]
            text = f"{self.classes[label]}, taken for {self.classes[guess]} ({probability:.1%})"
            found.append(Mistake(name, text, thumbnail(sample["image"])))
        return found

    def report(self, console: "Console", *, title: str | None = None, details: bool = False) -> None:
        """Print the metrics, with `details` a row for each class; of many, those with the lowest recall."""
        if details:
            print_classes(self.details()["per_class"], ("images", "recall", "precision"), "recall", console)
        if title:
            console.print(title, style="italic", highlight=False)
        table = make_table("metric", "value", header=False)
        largest = float(self.confusion.sum(1).max()) / self.images
        table.add_row("images", f"{self.images:,}, of which {largest:.1%} of one class")
        for name, value in self.metrics().items():
            label = name.replace("_", " ").replace("top5", "top-5").replace("worst recall", "recall of the worst class")
            low, high = self.interval
            interval = f" (95% interval {low:.1%} to {high:.1%})" if name == "accuracy" else ""
            table.add_row(label, f"{value:.4f}" if name == "loss" else f"{value:.2%}{interval}")
        console.print(table)

    def draw(self, images: Images, folder: Path) -> dict[str, Path]:
        """Draw the confusion matrix and a sheet of predictions into a folder; returns their files by title."""
        from vision_ssm.tasks.plots import draw_confusion, draw_predictions  # seconds, for matplotlib

        confusion, predictions = folder / "confusion.png", folder / "predictions.png"
        draw_confusion(self.confusion, self.classes, confusion)
        draw_predictions(self.records, self.classes, images, predictions)
        return {"Confusion": confusion, "Predictions": predictions}


def print_classes(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], by: str, console: "Console") -> None:
    """Print the metrics of classes: whole numbers, and shares in %; of many classes those with the lowest `by`."""
    from rich.markup import escape

    shown = rows
    if len(rows) > _MANY:
        shown = sorted((row for row in rows if row[by] is not None), key=lambda row: row[by])[:_MANY]
    table = make_table("class", *(f">{name.replace('_', ' ')}" for name in columns))
    for row in shown:
        values = (f"{row[name]:,}" if isinstance(row[name], int) else percent(row[name]) for name in columns)
        table.add_row(escape(printable(row["class"])), *values)
    console.print(table)
    if len(shown) < len(rows):
        text = f"and {len(rows) - len(shown):,} classes with at least this {by.replace('_', ' ')} or none"
        console.print(f"{text}; --json lists all", highlight=False)


def percent(value: float | None) -> str:
    """A share in %, as tables show it."""
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def describe_data(splits: Splits, size: int | None, console: "Console", *, what: str = "images") -> None:
    """Print how many images there are, how many of each class where that is known, and what is odd about them.

    Args:
        splits: The images.
        size: Pixels to which images are resized, if that may be too few.
        console: Where to print.
        what: What is counted of each class.
    """
    from rich.markup import escape

    train, val = splits.train, splits.val
    counted = f"{how_many(train)} training and {how_many(val)} validation images"
    classes = "one class" if len(train.classes) == 1 else f"{len(train.classes)} classes"
    console.print(f"Data   {counted} in {classes}", highlight=False)
    for images, name in ((train, "training"), (val, "validation")):
        if isinstance(images, ImageStream):
            console.print(f"       {name} images are read as a stream, shards: {len(images.shards):,}", highlight=False)
    for note in _notes(train, val, size):
        console.out(f"Note   {note}", highlight=False)
    counts, val_counts = train.counts(), val.counts()
    if counts is None or val_counts is None:
        return
    if len(train.classes) > _MANY:
        few, many = min(counts), max(counts)
        console.print(f"       {few:,} to {many:,} training {what} per class", highlight=False)
        return
    table = make_table("class", f">training {what}", f">validation {what}")
    for name, a, b in zip(train.classes, counts, val_counts, strict=True):
        shares = f"{a / sum(counts):.1%}", f"{b / max(1, sum(val_counts)):.1%}"
        table.add_row(escape(printable(name)), *(shares if what == "pixels" else (f"{a:,}", f"{b:,}")))
    console.print(table)


def _notes(train: Images, val: Images, size: int | None) -> list[str]:
    if isinstance(train, ImageStream) or isinstance(val, ImageStream):
        return []
    notes = [*dict.fromkeys([*train.notes, *val.notes])]
    equal = equal_images(train, val)
    if equal is None:
        notes += ["equal training and validation images were not looked for among so many"]
    elif equal:
        first = " and ".join(map(printable, equal[0]))
        notes += [f"{len(equal):,} validation images have the same bytes as training images, such as {first}"]
    if size is None:
        return notes
    sides = []
    for key in range(0, len(train), max(1, len(train) // 8)):
        with contextlib.suppress(InputError):
            sides.append(min(train.sample(key)["image"].size))
    if sides and sorted(sides)[len(sides) // 2] > 3 * size:
        shrunk = f"images of about {sorted(sides)[len(sides) // 2]} pixels are shrunk to {size}"
        notes += [f"{shrunk}; --img-size keeps more, as do the recipes finetune and scratch"]
    return notes

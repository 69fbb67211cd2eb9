from rich.console import Console
from rich.table import Table

from vision_ssm.data import Images, ImageStream, Splits
from vision_ssm.tasks.evaluation import Evaluation

_MANY = 20  # rows of a table


def report_data(splits: Splits, console: Console) -> None:
    """Print how many images there are, and how many of each class where that is known."""
    train, val = splits.train, splits.val
    console.print(
        f"Data   {how_many(train)} training and {how_many(val)} validation images in {len(train.classes)} classes",
        highlight=False,
    )
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
    table = Table("class", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("training", justify="right")
    table.add_column("validation", justify="right")
    for name, a, b in zip(train.classes, counts, val_counts, strict=True):
        table.add_row(name, f"{a:,}", f"{b:,}")
    console.print(table)


def how_many(images: Images) -> str:
    """How many images there are, for people; of some streams nobody knows."""
    return "an unknown number of" if isinstance(images, ImageStream) and images.length is None else f"{len(images):,}"


def is_uneven(images: Images) -> bool:
    """Whether the largest class has over half as many images again as the smallest, or may have."""
    counts = images.counts()
    return counts is None or max(counts) > 1.5 * max(min(counts), 1)


def report_evaluation(
    evaluation: Evaluation, console: Console, *, title: str | None = None, per_class: bool = False
) -> None:
    """Print the figures, on request with a row for each class; of many, those found least."""
    if per_class:
        rows = evaluation.per_class()
        hidden = 0
        if len(rows) > _MANY:
            rows = sorted((row for row in rows if row["images"]), key=lambda row: row["recall"])
            rows, hidden = rows[:_MANY], max(0, len(rows) - _MANY)
        table = Table("class", box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("images", "recall", "precision"):
            table.add_column(name, justify="right")
        for row in rows:
            shares = ["–" if row[k] is None else f"{row[k]:.1%}" for k in ("recall", "precision")]
            table.add_row(row["class"], f"{row['images']:,}", *shares)
        console.print(table)
        if hidden:
            console.print(f"and {hidden:,} classes with a recall at least as high; --json lists all", highlight=False)
    values = evaluation.summary()
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in values.items():
        label = name.replace("_", " ").replace("top5", "top-5")
        shown = f"{value:,}" if name == "images" else f"{value:.4f}" if name == "loss" else f"{value:.2%}"
        table.add_row(label, shown)
    console.print(table)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from vision_ssm.cli import fail
from vision_ssm.cli.options import parse_options
from vision_ssm.cli.output import print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes import Precision
from vision_ssm.tasks.run_folder import RunFolder, weights_file


@dataclass(frozen=True)
class EvalOptions:
    """Measure a trained classifier: accuracy, balanced accuracy, top-5 and a table of the classes."""

    run: Positional[Path]
    """Folder of a run, or a weights file of one."""
    data: Path | None = None
    """Image folder with one sub-folder per class; otherwise the run's own validation images."""
    weights: Literal["best", "last"] = "best"
    """Which weights of the run to use."""
    json: bool = False
    """Print JSON instead of tables."""
    pictures: Path | None = None
    """Also draw confusion matrix and predictions into this folder."""
    batch_size: int = 64
    """Images per step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    precision: Precision = "32-true"
    """Number format of the computation."""
    workers: int | None = None
    """Processes that load images."""


@dataclass(frozen=True)
class PredictOptions:
    """Classify images with a trained classifier."""

    run: Positional[Path]
    """Folder of a run, or a weights file of one."""
    images: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...", help_behavior_hint="(required)")]
    """Image files, or folders of them."""
    weights: Literal["best", "last"] = "best"
    """Which weights of the run to use."""
    top: int = 5
    """How many classes to name per image."""
    json: bool = False
    """Print JSON instead of a table."""
    batch_size: int = 64
    """Images per step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    precision: Precision = "32-true"
    """Number format of the computation."""
    workers: int | None = None
    """Processes that load images."""


def evaluate(words: Sequence[str]) -> int:
    """Measure a classifier; `words` follow `vision-ssm eval`."""
    options = parse_options(EvalOptions, words, "eval")
    path = weights_file(options.run, options.weights)

    from rich.console import Console

    from vision_ssm.data import load_splits, read_folder
    from vision_ssm.tasks.classifier import evaluate as measure
    from vision_ssm.tasks.classifier import load_classifier
    from vision_ssm.tasks.pictures import draw_confusion, draw_predictions
    from vision_ssm.tasks.report import report_evaluation

    classifier = load_classifier(path, options.device, options.precision)
    if options.data is None:
        images = load_splits(RunFolder(path.parent).read_config()).val
    else:
        images = read_folder(options.data, classifier.spec.classes)
    console = Console(stderr=options.json)
    absent = images.counts().count(0)
    if absent:
        count = len(classifier.spec.classes)
        console.print(f"{absent} of {count} classes have no images here; the figures leave them out", highlight=False)
    evaluation = measure(classifier, images, options.batch_size, options.workers, console=console)
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
        draw_confusion(evaluation, options.pictures / "confusion.png")
        draw_predictions(evaluation, images, options.pictures / "predictions.png")
    if options.json:
        print_json({"weights": str(path), **evaluation.summary(), "per_class": evaluation.per_class()})
    else:
        report_evaluation(evaluation, console, per_class=True)
    return 0


def predict(words: Sequence[str]) -> int:
    """Classify images; `words` follow `vision-ssm predict`."""
    options = parse_options(PredictOptions, words, "predict")
    if options.top < 1:
        raise InputError(f"--top must be positive, not {options.top}")
    if not options.images:
        raise InputError("name at least one image, or a folder of images")
    path = weights_file(options.run, options.weights)

    from rich.console import Console
    from rich.table import Table

    from vision_ssm.data import find_images
    from vision_ssm.tasks.classifier import load_classifier

    images = find_images(options.images)
    classifier = load_classifier(path, options.device, options.precision)
    broken: list[str] = []
    try:
        probabilities = classifier.predict(images, options.batch_size, options.workers)
    except InputError:  # name every unreadable image, and classify the others
        images, broken = _readable(images)
        if not images:
            raise InputError("; ".join(broken)) from None
        probabilities = classifier.predict(images, options.batch_size, options.workers)
    best = probabilities.topk(min(options.top, len(classifier.spec.classes)), dim=1)
    rows = [
        [(classifier.spec.classes[i], p) for p, i in zip(values, indices, strict=True)]
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    if options.json:
        named = [[{"class": name, "probability": p} for name, p in row] for row in rows]
        print_json([{"image": str(i), "predictions": row} for i, row in zip(images, named, strict=True)])
        return _report(broken)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("image", overflow="fold")
    for rank in range(len(rows[0])):
        table.add_column(f"{rank + 1}.", overflow="fold")
    for image, row in zip(images, rows, strict=True):
        table.add_row(str(image), *(f"{name} {p:.1%}" for name, p in row))
    Console().print(table)
    return _report(broken)


def _readable(images: Sequence[Path]) -> tuple[list[Path], list[str]]:
    from vision_ssm.data.images import open_image

    good, broken = [], []
    for image in images:
        try:
            open_image(image)
        except InputError as error:
            broken.append(error.line)
        else:
            good.append(image)
    return good, broken


def _report(broken: Sequence[str]) -> int:
    return max((fail(line) for line in broken), default=0)

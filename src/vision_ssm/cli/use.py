import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from vision_ssm.cli import fail
from vision_ssm.cli.options import parse_options
from vision_ssm.cli.output import print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes import Precision
from vision_ssm.tasks.run_folder import RunFolder, weights_file

if TYPE_CHECKING:
    from rich.console import Console

    from vision_ssm.data import Images, LabelledImages
    from vision_ssm.tasks.classifier import Classifier
    from vision_ssm.tasks.evaluation import Evaluation

_PUBLISHED_ON = "the 50,000 validation images of ImageNet-1K"


@dataclass(frozen=True)
class EvalOptions:
    """Measure a trained classifier, or any timm model: accuracy, balanced accuracy, top-5, a table of the classes."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="RUN|MODEL")]
    """Folder of a run, a weights file of one, or the name of a model (with --pretrained or --weights FILE)."""
    data: Path | None = None
    """Image folder with one sub-folder per class, or a tar file of such folders; otherwise the run's own validation
    images."""
    weights: Annotated[Literal["best", "last"] | Path | None, tyro.conf.arg(metavar="best|last|FILE")] = None
    """Which weights of the run to use (best by default), or a checkpoint file of the model."""
    pretrained: bool = False
    """Measure the model with its published weights."""
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
    optimize: bool = True
    """Do without the model's fastest form on a CPU (`vision_ssm.optimize`), which 32-true and bf16-true take."""
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
    optimize: bool = True
    """Do without the model's fastest form on a CPU (`vision_ssm.optimize`), which 32-true and bf16-true take."""
    workers: int | None = None
    """Processes that load images."""


def evaluate(words: Sequence[str]) -> int:
    """Measure a classifier; `words` follow `vision-ssm eval`."""
    options = parse_options(EvalOptions, words, "eval")
    from rich.console import Console

    from vision_ssm.tasks.classifier import evaluate as measure
    from vision_ssm.tasks.report import report_evaluation

    subject = _run_and_images(options) if Path(options.model).exists() else _model_and_images(options)
    classifier, images = subject.classifier, subject.images
    console = Console(stderr=options.json)
    start = time.monotonic()
    evaluation = measure(classifier, images, options.batch_size, options.workers, console=console)
    speed = len(evaluation.targets) / (time.monotonic() - start)
    _name_absent(evaluation, console)
    if options.pictures is not None:
        from vision_ssm.tasks.pictures import draw_confusion, draw_predictions  # seconds, for matplotlib

        options.pictures.mkdir(parents=True, exist_ok=True)
        draw_confusion(evaluation, options.pictures / "confusion.png")
        draw_predictions(evaluation, images, options.pictures / "predictions.png")
    if options.json:
        values = {"model": classifier.spec.model, "weights": subject.weights, **evaluation.summary()}
        values |= {"images_per_second": round(speed, 1)}
        if subject.published_top1 is not None:
            values |= {"published_top1": subject.published_top1, "published_on": _PUBLISHED_ON}
        print_json({**values, "per_class": evaluation.per_class()})
        return 0
    report_evaluation(evaluation, console, per_class=True)
    if subject.published_top1 is not None:
        same = len(evaluation.targets) == 50_000 and evaluation.confusion.sum(1).all()
        note = "" if same else ", which is not what was measured here"
        console.print(
            f"published accuracy {subject.published_top1:.1f}%, on {_PUBLISHED_ON}{note}",
            highlight=False,
            soft_wrap=True,
        )
    spec = classifier.spec
    console.print(
        f"{spec.model}, {spec.image_size}×{spec.image_size} of {spec.crop:g} of the side, {spec.interpolation}; "
        f"{speed:,.1f} images/s with loading",
        highlight=False,
        soft_wrap=True,
    )
    return 0


@dataclass(frozen=True)
class _Subject:
    """What is measured, and on what; a published accuracy only if the weights are the published ones."""

    classifier: "Classifier"
    images: "Images"
    weights: str
    published_top1: float | None = None


def _run_and_images(options: EvalOptions) -> _Subject:
    from vision_ssm.data import load_splits
    from vision_ssm.tasks.classifier import load_classifier

    if options.pretrained or isinstance(options.weights, Path):
        given = "--pretrained" if options.pretrained else f"--weights {options.weights}"
        raise InputError(f"{given} belongs to the name of a model, and {options.model} is a file or folder here")
    path = weights_file(Path(options.model), options.weights or "best")
    classifier = load_classifier(path, options.device, options.precision, options.optimize)
    if options.data is None:
        images = load_splits(RunFolder(path.parent).read_config()).val
    else:
        images = _read_images(options.data, classifier.spec.classes)
    return _Subject(classifier, images, str(path))


def _model_and_images(options: EvalOptions) -> _Subject:
    from vision_ssm.cli.models import published
    from vision_ssm.data import assign_outputs
    from vision_ssm.tasks.classifier import load_model
    from vision_ssm.tasks.spec import default_cfg

    name, file = options.model, options.weights
    try:
        cfg = default_cfg(name)
    except InputError as error:
        raise InputError(f"no such run folder or weights file: {name}; and as a model: {error.line}") from None
    if (file is not None) == options.pretrained or isinstance(file, str):
        raise InputError(f"which weights of {name}? give either --pretrained or --weights FILE")
    if options.data is None:
        raise InputError(f"what is {name} to be measured on? give a folder of class folders with --data DIR")
    images = _read_images(options.data)
    classifier = load_model(name, file, options.device, options.precision, options.optimize)
    images = assign_outputs(images, len(classifier.spec.classes))
    classifier = dataclasses.replace(classifier, spec=dataclasses.replace(classifier.spec, classes=images.classes))
    if file is not None:
        return _Subject(classifier, images, str(file))
    return _Subject(classifier, images, "published", published(name, cfg.to_dict())["published_top1"])


def _read_images(data: Path, classes: tuple[str, ...] | None = None) -> "LabelledImages":
    from vision_ssm.data import read_folder, read_tars

    return read_tars(data, classes) if data.is_file() else read_folder(data, classes)


def _name_absent(evaluation: "Evaluation", console: "Console") -> None:
    from vision_ssm.data import shorten

    classes = evaluation.classes
    present = [name for name, count in zip(classes, evaluation.confusion.sum(1), strict=True) if count]
    if len(present) < len(classes):
        console.print(
            f"{len(classes) - len(present)} of {len(classes)} classes have no images here; the figures leave them out "
            f"and are for {shorten(present)}",
            highlight=False,
            soft_wrap=True,
        )


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
    classifier = load_classifier(path, options.device, options.precision, options.optimize)
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
    from vision_ssm.data import LabelledImages, find_unreadable

    broken = find_unreadable(LabelledImages(images, [0] * len(images), ("",), [str(path) for path in images]))
    return [path for path in images if str(path) not in broken], list(broken.values())


def _report(broken: Sequence[str]) -> int:
    return max((fail(line) for line in broken), default=0)

import itertools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from vision_ssm.cli import fail
from vision_ssm.cli.options import parse_options
from vision_ssm.cli.subjects import output_images, run_images
from vision_ssm.engine.output import make_console, make_table, print_json
from vision_ssm.engine.run_folder import weights_file
from vision_ssm.errors import InputError, printable
from vision_ssm.recipes import Precision
from vision_ssm.recipes.config import Config, limited, option

if TYPE_CHECKING:
    from vision_ssm.data import Images
    from vision_ssm.engine.task import Task

_PUBLISHED_ON = "the 50,000 validation images of ImageNet-1K"


@dataclass(frozen=True, kw_only=True)
class InputOptions(Config):
    """How a model takes images, and where it runs."""

    test_size: tuple[int, int] | None = limited(None, least=32, most=16_384)
    """Another longest and shortest side of the resized image for a detector or segmenter."""
    mode: Literal["whole", "slide"] | None = None
    """Run a segmenter on the whole image at once, or on overlapping windows."""
    tta: bool = False
    """Average a segmenter's predictions over six scales from 0.5 to 1.75, each also flipped."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(InputOptions):
    """How to compute."""

    batch_size: int | None = limited(None, least=1)
    """Batch size: by default 64, and 1 for detectors and segmenters, whose results depend on the padding of a batch."""
    precision: Precision = "32-true"
    """Number format of the computation."""
    optimize: bool = True
    """Use `vision_ssm.optimize` on a CPU with 32-true and bf16-true."""
    num_workers: int | None = limited(None, least=0, most=1024)
    """Processes that load images."""
    max_pixels: int | None = limited(None, least=1)
    """Largest number of pixels of an image, if not Pillow's limit of 179 million."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ComputeOptions):
    """Measure a trained model, or any timm classifier: its metrics and a table of the classes."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="RUN|MODEL")]
    """Folder of a run, a weights file or ONNX file of one, or the name of a model (with --pretrained or --weights
    FILE)."""
    data: Path | None = None
    """Image folder with one sub-folder per class, or a tar file of such folders; for detectors a data set in COCO
    format, or its annotation file; for segmenters a folder of images and masks, or of images with masks beside it. By
    default the run's own validation images."""
    weights: Annotated[Literal["best", "last"] | Path | None, tyro.conf.arg(metavar="best|last|FILE")] = None
    """Which weights of the run to use (best by default), or a checkpoint file of the model."""
    pretrained: bool = False
    """Measure the model with its published weights."""
    plots: Path | None = None
    """Also draw predictions, and what else the task draws, into this folder."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(InputOptions):
    """A trained model, and what to say of its predictions."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or a weights file or ONNX file of one."""
    weights: Literal["best", "last"] | None = None
    """Which weights of the run to use, by default the best."""
    top: int | None = limited(None, least=1)
    """How many classes a classifier names per image (5)."""
    threshold: float | None = limited(None, least=0, most=1)
    """Drop objects with a lower score (0.5; those below 0.05 are always dropped), or answer "unsure" if the best class
    is less probable (0)."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(RunOptions, ComputeOptions):
    """Predict for images with a trained model."""

    images: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...", help_behavior_hint="(required)")]
    """Image files, or folders of them."""
    out: Path | None = None
    """Folder for predictions.csv and predictions.json instead of a table; with drawings of the predictions of
    detectors and segmenters. The JSON of detectors is a data set in COCO format, masks of segmenters are in index/."""
    copy: Path | None = None
    """Copy the images of a classifier into this folder, in a sub-folder for each answer."""


def evaluate(words: Sequence[str]) -> int:
    """Measure a model; `words` follow `vision-ssm eval`."""
    options: EvalOptions = parse_options(EvalOptions, words, "eval")
    from vision_ssm.engine.devices import find_device
    from vision_ssm.engine.evaluate import evaluate as measure

    task, images, source = _run_and_images(options) if Path(options.model).exists() else _model_and_images(options)
    console = make_console(stderr=options.json)
    images.max_pixels = options.max_pixels
    start = time.monotonic()
    task = task.ready(find_device(options.device), options.precision, optimized=options.optimize)
    evaluation: Any = measure(task, images, options.batch_size, options.num_workers, console)
    speed = evaluation.images / (time.monotonic() - start)
    for line in evaluation.remarks():
        console.out(line, highlight=False)
    plots: dict[str, Path] = {}
    if options.plots is not None:
        options.plots.mkdir(parents=True, exist_ok=True)
        plots = evaluation.draw(images, options.plots)
    if options.json:
        values = {**source, **evaluation.metrics(), "images_per_second": round(speed, 1)}
        print_json({**values, **evaluation.details()})
        return 0
    evaluation.report(console, details=True)
    lines = []
    if "published_top1" in source:
        same = evaluation.images == 50_000 and evaluation.confusion.sum(1).all()
        note = "" if same else ", which is not what was measured here"
        lines += [f"published accuracy {source['published_top1']:.1f}%, on {_PUBLISHED_ON}{note}"]
    lines += [f"{task.summary}; {speed:,.1f} images/s with loading"]
    lines += [f"{what:<12} {path}" for what, path in plots.items()]
    console.out("\n".join(lines), highlight=False)
    return 0


def _check_onnx(path: Path, options: ComputeOptions) -> None:
    if path.suffix == ".onnx" and not options.optimize:
        raise InputError(f"--no-optimize is for models of torch; {path} runs in ONNX Runtime")


def _changes(options: InputOptions) -> dict[str, Any]:
    """What the description of a model says otherwise."""
    given: dict[str, Any] = dict(test_size=options.test_size, mode=options.mode, tta=options.tta or None)
    return {name: value for name, value in given.items() if value is not None}


Subject = tuple["Task", "Images", dict[str, Any]]
"""What is measured, on what, and what to say of it; a published accuracy only if the weights are the published ones."""


def _run_and_images(options: EvalOptions) -> Subject:
    from vision_ssm.tasks import load

    if options.pretrained or isinstance(options.weights, Path):
        given = "--pretrained" if options.pretrained else f"--weights {options.weights}"
        raise InputError(f"{given} belongs to the name of a model, and {options.model} is a file or folder here")
    path = weights_file(Path(options.model), options.weights)
    _check_onnx(path, options)
    onnx = path.suffix == ".onnx"
    how: dict[str, Any] = dict(device=options.device, precision=options.precision) if onnx else dict(device="cpu")
    task = load(path, **how, optimized=False, **_changes(options))
    return task, run_images(task, path, options.data), {"model": task.spec.model, "weights": str(path)}


def _model_and_images(options: EvalOptions) -> Subject:
    from vision_ssm.checkpoints import published
    from vision_ssm.data import read_images
    from vision_ssm.engine.weights import stored_metadata
    from vision_ssm.models.create import default_cfg
    from vision_ssm.tasks import load
    from vision_ssm.tasks.classification import Classification

    name, file = options.model, options.weights
    try:
        cfg = default_cfg(name)
    except InputError as error:
        raise InputError(f"no such run folder or weights file: {name}; and as a model: {error.line}") from None
    if (file is not None) == options.pretrained or isinstance(file, str):
        raise InputError(f"which weights of {name}? give either --pretrained or --weights FILE")
    if options.data is None:
        raise InputError(f"which images is {name} to be measured on? give a folder of class folders with --data DIR")
    if file is not None and (known := stored_metadata(file)) is not None:
        if known["model"] != name:
            raise InputError(f"{file} holds weights of {known['model']}, not {name}")
        task = load(file, "cpu", optimized=False)  # with its classes, image size and arguments
        return task, task.read_images(options.data), {"model": name, "weights": str(file)}
    images = read_images(options.data)
    if _changes(options):
        raise InputError(
            f"{option(next(iter(_changes(options))))} is for detectors and segmenters, {name} is a classifier"
        )
    task = Classification.from_timm(name, file)
    images = output_images(task, images)
    source = {"model": name, "weights": "published" if file is None else str(file)}
    top1 = published(name, cfg.to_dict())["published_top1"]
    known = {"published_top1": top1, "published_on": _PUBLISHED_ON} if file is None and top1 is not None else {}
    return task, images, source | known


def predict(words: Sequence[str]) -> int:
    """Predict for images; `words` follow `vision-ssm predict`."""
    options: PredictOptions = parse_options(PredictOptions, words, "predict")
    if not options.images:
        raise InputError("name at least one image, or a folder of images")
    path = weights_file(options.run, options.weights)

    from rich.markup import escape
    from rich.progress import Progress

    from vision_ssm.data import find_images
    from vision_ssm.engine.files import write_csv, write_json

    _check_onnx(path, options)
    images = find_images(options.images)
    copies = options.copy and options.copy.resolve()
    if copies and any(path.is_dir() and {copies, *copies.parents} & {path.resolve()} for path in options.images):
        raise InputError(f"--copy {options.copy} lies in a folder whose images are read; give another one")
    how: dict[str, Any] = dict(precision=options.precision, optimized=options.optimize)
    task, asked = load_run(path, options, copy=options.copy, **how)
    asked.pop("copy", None)
    unreadable: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    errors = make_console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("predicting", total=len(images))
        how = dict(unreadable=unreadable, max_pixels=options.max_pixels)
        for prediction in task.predict_each(images, options.batch_size, options.num_workers, **how):
            rows.append(prediction.row(**asked))
            if options.out is not None:
                stem = options.out / _free_name(Path(prediction.id).stem, taken)
                task.write_picture(prediction, stem, max_pixels=options.max_pixels, **asked)
            progress.update(bar, completed=len(rows) + len(unreadable))
    if options.out is not None:
        write_json(options.out / "predictions.json", task.as_json(rows))
        write_csv(options.out / "predictions.csv", task.as_csv(rows), task.csv_columns)
        make_console().out(f"{len(rows):,} predictions in {options.out}", highlight=False)
    if options.copy is not None:
        _copy_images(rows, options.copy)
    if options.json:
        print_json(task.as_json(rows))
    elif options.out is None and rows:
        lines = task.as_table(rows)
        table = make_table(*lines[0])
        for line in lines:
            table.add_row(*(escape(printable(text)) for text in line.values()))
        make_console().print(table)
    return max(map(fail, unreadable.values()), default=0)


def load_run(path: Path, options: RunOptions, *, copy: Path | None = None, **how: Any) -> tuple["Task", dict[str, Any]]:
    """The model of a weights file, and which options of its predictions were given.

    Raises:
        InputError: It cannot be loaded, or its task has no such option.
    """
    from vision_ssm.tasks import load

    task = load(path, options.device, **how, **_changes(options))
    asked: dict[str, Any] = {"top": options.top, "threshold": options.threshold, "copy": copy}
    asked = {name: value for name, value in asked.items() if value is not None}
    fits = {"classification": ("top", "threshold", "copy"), "detection": ("threshold",)}.get(task.name, ())
    if wrong := [option(name) for name in asked if name not in fits]:
        raise InputError(f"{path} is of {task.name}, which has no {' and '.join(wrong)}")
    return task, asked


def _free_name(name: str, taken: set[str]) -> str:
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = next(name for name in names if name not in taken)
    taken.add(free)
    return free


def _copy_images(rows: Sequence[dict[str, Any]], out: Path) -> None:
    for row in rows:
        source, folder = Path(row["image"]), out / (printable(row["answer"]).replace("/", "_").strip(". ")[:100] or "_")
        folder.mkdir(parents=True, exist_ok=True)
        names = (f"{source.stem}-{number}{source.suffix}" for number in itertools.count(2))
        target = next(path for name in itertools.chain([source.name], names) if not (path := folder / name).exists())
        shutil.copy2(source, target)

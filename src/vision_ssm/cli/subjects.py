"""What the commands that analyze take as MODEL or RUN, and the images they look at."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vision_ssm.engine.output import make_console, make_table, print_json
from vision_ssm.engine.run_folder import RunFolder, weights_file
from vision_ssm.errors import InputError, printable
from vision_ssm.recipes.config import Config, limited

if TYPE_CHECKING:
    from torch import nn

    from vision_ssm.analysis.result import Result
    from vision_ssm.data import ImageDataset, Images
    from vision_ssm.engine.task import Task


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(Config):
    """Images, and where results go."""

    data: Path | None = None
    """An image file or a folder of images; by default the validation images of the (first) run."""
    images: int = limited(64, least=1)
    """How many images to look at, spread evenly over those there are."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("analysis")
    """Folder for the picture and the numbers."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Subject:
    """A model to look at.

    Args:
        name: How to call it.
        task: The model, in evaluation mode, and how it takes images.
        run: The folder that it is from.
        file: The weights file that describes it; none if timm does.
    """

    name: str
    task: "Task"
    run: Path | None = None
    file: Path | None = None

    @property
    def model(self) -> "nn.Module":
        """The network."""
        return self.task.model


def load_subject(word: str, device: str = "auto") -> Subject:
    """A model by what stands for it on the command line.

    Args:
        word: The folder of a run, or a weights file of one; or a timm name, with its published weights, or as
            NAME=FILE with those of a file. With =random at its end, either has new weights (always the same).
        device: auto, cpu, cuda, cuda:1 or mps.

    Raises:
        InputError: There is no such model, file or device.
    """
    import torch

    from vision_ssm.engine.devices import find_device
    from vision_ssm.tasks import load
    from vision_ssm.tasks.classification import Classification

    @contextmanager
    def same_weights() -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield

    trained = Path(word if Path(word).exists() else word.removesuffix("=random"))
    if trained.exists():
        path = weights_file(trained)
        if path.suffix == ".onnx":
            raise InputError(f"{path} is an ONNX file, which predict and eval take; name the run or the model here")
        task = load(path, device, optimized=False)
        if trained != Path(word):
            with same_weights():
                task = type(task)(task.create_model(task.spec), task.spec).ready(find_device(device), optimized=False)
        run = path.parent if (path.parent / "config.json").is_file() else None
        return Subject(Path(word).name or word, task, run, path)
    name, equals, source = word.partition("=")
    file = Path(source) if equals and source != "random" else None
    try:
        with same_weights():
            task = Classification.from_timm(name, file, pretrained=not equals)
    except InputError as error:
        also = "" if equals else f"; {name}=FILE takes the weights of a file, {name}=random new ones"
        raise InputError(f"{error.line}{also}") from None
    return Subject(word, task.ready(find_device(device), optimized=False))


def load_subjects(words: Sequence[str], device: str = "auto") -> list[Subject]:
    """Several models; see `load_subject`.

    Raises:
        InputError: There are none, or one cannot be loaded.
    """
    if not words:
        raise InputError("name at least one model or run, such as vmamba_tiny or runs/x")
    return [load_subject(word, device) for word in words]


def choose_images(options: AnalysisOptions, subjects: Sequence[Subject]) -> "ImageDataset":
    """The images of `--data`, or of the first run; as many as `--images`, spread evenly.

    Raises:
        InputError: There are none.
    """
    from vision_ssm.data import ImageStream, find_images
    from vision_ssm.engine.task import as_dataset

    if options.data is not None:
        return as_dataset(find_images([options.data])).spread(options.images)
    subject = next((subject for subject in subjects if subject.run is not None), None)
    if subject is None or subject.run is None:
        raise InputError("which images? give a folder of them with --data DIR")
    images = subject.task.load_data(RunFolder(subject.run).read_config()).val
    if isinstance(images, ImageStream):
        raise InputError(f"the images of {subject.run} are a stream; give a folder of some with --data DIR")
    return images.spread(options.images)


def run_images(task: "Task", file: Path, data: Path | None) -> "Images":
    """Labeled images to measure a trained model on: those of `data`, or the validation images of its run.

    Args:
        task: The model.
        file: Its weights file.
        data: Where the images are.

    Raises:
        InputError: There are none, or they have other classes.
    """
    if data is not None:
        return task.read_images(data)
    if not (file.parent / "config.json").is_file():
        raise InputError(f"which images is {file} to be measured on? it lies in no run; give --data DIR")
    return task.own_images(RunFolder(file.parent))


def output_images(task: "Task", images: "ImageDataset") -> "ImageDataset":
    """Images of class folders with the outputs of a timm classifier as their classes, which the task then has too.

    Raises:
        InputError: The folders' names do not say which outputs they are.
    """
    from vision_ssm.data.outputs import assign_outputs

    images = assign_outputs(images, len(task.spec.classes))
    task.spec = replace(task.spec, classes=images.classes)
    return images


def labeled_images(subject: Subject, data: Path | None, count: int | None = None) -> "Images":
    """Labeled images to measure a model on, all or some of them, spread evenly.

    Raises:
        InputError: There are none, their classes do not fit, or some of a stream are asked for.
    """
    from vision_ssm.data import ImageStream, read_images

    if subject.file is not None:
        images: Images = run_images(subject.task, subject.file, data)
    elif data is None:
        raise InputError(f"which images is {subject.name} to be measured on? give class folders with --data DIR")
    else:
        try:
            images = output_images(subject.task, read_images(data))
        except InputError as error:
            raise InputError(f"{subject.name}: {error.line}") from None
    if count is None:
        return images
    if isinstance(images, ImageStream):
        raise InputError(f"the images of {subject.name} are a stream, of which all are taken; leave out --images")
    return images.spread(count)


def image_names(images: "ImageDataset") -> list[str]:
    """How to call images: their paths below the folder that they have in common."""
    ids = [images.id(i) for i in range(len(images))]
    folders = {str(Path(name).parent) for name in ids}
    common = os.path.commonpath(folders) if all(map(os.path.isabs, folders)) or len(folders) == 1 else ""
    return [os.path.relpath(name, common) if common else name for name in ids]


def write_result(result: "Result", options: AnalysisOptions, name: str, rows: Sequence[dict[str, Any]] = ()) -> int:
    """Write what an analysis found into `--out`, and print it.

    Args:
        result: What it found.
        options: Where to, and whether to print JSON.
        name: Name of the files, without extension.
        rows: What to print in place of the result's rows, where those are too many to read.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    files = result.save(options.out / name)
    if options.json:
        print_json({"rows": result.rows(), "files": [*map(str, files)]})
        return 0
    rows = rows or result.rows()
    table = make_table(*(f">{key}" if isinstance(value, (int, float)) else key for key, value in rows[0].items()))
    for row in rows:
        table.add_row(
            *(f"{value:.4g}" if isinstance(value, float) else printable(str(value)) for value in row.values())
        )
    console = make_console()
    console.print(table, markup=False)
    console.out("\n".join(map(str, files)), highlight=False)
    return 0

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, default_collate

from vision_ssm.data import ImageDataset, Images, ImageStream, Sample, Splits, Transform
from vision_ssm.data.sampling import Samples, collate_readable, loader_workers
from vision_ssm.engine.devices import find_device
from vision_ssm.engine.onnx_model import OnnxModel
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.engine.weights import load_weights, read_metadata, read_weights
from vision_ssm.errors import InputError
from vision_ssm.optimize import optimize
from vision_ssm.recipes import Precision, from_dict

if TYPE_CHECKING:
    from rich.console import Console

Batch = dict[str, Any]
Picture = str | Path | Image.Image | np.ndarray


class Prediction(Protocol):
    """What a model says of an image."""

    id: str

    def row(self) -> dict[str, Any]:
        """The prediction as JSON has it, with the image's id as `image`."""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What a model gets wrong in an image.

    Args:
        image: The image's id.
        text: What is wrong, in a few words.
        picture: The image, small, with what shows it.
    """

    image: str
    text: str
    picture: Image.Image


class Evaluation(Protocol):
    """Metrics of a model on labeled images."""

    @property
    def images(self) -> int:
        """Number of images."""

    def remarks(self) -> list[str]:
        """What limits the metrics, in sentences, such as classes without images."""

    def metrics(self) -> dict[str, float]:
        """The metrics by name, shares but for what is named loss."""

    def details(self) -> dict[str, Any]:
        """What is known besides, such as the metrics of each class, as JSON has it."""

    def report(self, console: "Console", *, title: str | None = None, details: bool = False) -> None:
        """Print it."""

    def draw(self, images: Images, folder: Path) -> dict[str, Path]:
        """Write plots into a folder; return their files by title."""

    def mistakes(self, images: Images, most: int = 12) -> list[Mistake]:
        """The worst mistakes on these images, the worst one first."""


class Task(ABC):
    """A model and what the engine has to know of it to train, evaluate and use it.

    A subclass sets `name`, `Spec` (a dataclass that describes a model without its weights and is stored in every
    weights file) and what is abstract here.

    Args:
        model: The network.
        spec: Its description.
    """

    name: ClassVar[str]
    Spec: ClassVar[type]
    monitor: str
    """The metric that decides which epoch is the best one, by its largest value; of equal ones the lowest loss."""
    epoch_metrics: tuple[str, ...]
    """What the line of an epoch shows, as far as it is known: losses as numbers, other metrics as percentages."""
    csv_columns: ClassVar[tuple[str, ...]]
    """Columns of the CSV file of predictions."""
    eval_batch_size: ClassVar[int | None] = None
    """Batch size of evaluation and prediction, where it matters."""
    onnx_output: ClassVar[str | None] = None
    """The output of an ONNX file that evaluation and prediction work on, where they can."""

    def __init__(self, model: nn.Module, spec: Any) -> None:
        self.model, self.spec = model, spec
        self.autocast: torch.dtype | None = None
        self.device, self.dtype = torch.device("cpu"), torch.float32

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, splits: Splits, *, resume: bool = False) -> "Task":
        """The task of a configuration with its first weights; those of a resumed run come from its checkpoint.

        Raises:
            InputError: The configuration or the images cannot be used.
        """

    @classmethod
    @abstractmethod
    def create_model(cls, spec: Any) -> nn.Module:
        """The network that `spec` describes, with random weights."""

    @classmethod
    def load(
        cls,
        path: Path,
        device: str = "auto",
        precision: Precision = "32-true",
        *,
        optimized: bool = True,
        **changes: Any,
    ) -> "Task":
        """The task of a weights file; see `vision_ssm.load`.

        Raises:
            InputError: The file is damaged or of another task, there is no such device, or the description has no
                such entry or does not take its value.
        """
        spec = cls._read_spec(read_metadata(path), path, changes)
        model = cls.create_model(spec)
        load_weights(model, read_weights(path), path)
        return cls(model, spec).ready(find_device(device), precision, optimized=optimized)

    @classmethod
    def from_onnx(cls, model: OnnxModel, **changes: Any) -> "Task":
        """The task of an ONNX file, without the network it came from.

        Raises:
            InputError: The file has other outputs, or its description has no such entry or does not take its value.
        """
        if model.outputs != [cls.onnx_output]:
            given = f"{', '.join(model.outputs[:3])}{', ...' if len(model.outputs) > 3 else ''}"
            raise InputError(
                f"{model.path} gives {given}, for your own programs; only files with the logits of a "
                "classifier or the scores of a segmenter can be used here"
            )
        return cls(model, cls._read_spec(dict(model.description), model.path, changes))

    @classmethod
    def _read_spec(cls, values: dict[str, Any], path: Path, changes: Mapping[str, Any]) -> Any:
        """The description in a file, with other values for some of its entries."""
        try:
            if values.pop("task") != cls.name:
                raise TypeError("it is of another task")
            from_dict(cls.Spec, values)
        except (InputError, TypeError, KeyError) as error:
            raise InputError(f"{path} does not describe a model for {cls.name}: {error}") from error
        names = [item.name for item in dataclasses.fields(cls.Spec)]
        if unknown := changes.keys() - set(names):
            has = f"which has no {' and '.join(sorted(unknown))}"
            raise InputError(f"{path} is of {cls.name}, {has}, but {', '.join(names)}")
        try:
            return from_dict(cls.Spec, {**values, **changes})
        except TypeError as error:
            raise InputError(str(error)) from error

    def ready(self, device: torch.device, precision: Precision = "32-true", *, optimized: bool = True) -> "Task":
        """Prepare for evaluation: in its fastest form if `optimized`, on a CPU and without autocast.

        An ONNX file is used as it is, on the CPU.
        """
        if precision not in get_args(Precision):
            raise InputError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision}")
        if isinstance(self.model, OnnxModel):
            return self
        self.device, self.model = device, self.model.to(device).eval()
        if optimized and device.type == "cpu" and precision in ("32-true", "bf16-true"):
            self.model = optimize(self.model, dtype=torch.float32 if precision == "32-true" else torch.bfloat16)
        elif precision == "bf16-true":
            self.model, self.dtype = self.model.to(torch.bfloat16), torch.bfloat16
        else:
            self.autocast = {"b": torch.bfloat16, "1": torch.float16}.get(precision[0])
        return self

    @property
    @abstractmethod
    def summary(self) -> str:
        """The model and its input, in a line."""

    # Data

    @classmethod
    @abstractmethod
    def load_data(cls, config: Any) -> Splits:
        """The images of a configuration.

        Raises:
            InputError: They are missing or cannot be used.
        """

    @abstractmethod
    def read_images(self, path: Path) -> Images:
        """Labeled images of the model's classes, to measure it on.

        Raises:
            InputError: They are missing, cannot be used, or have other classes.
        """

    def own_images(self, folder: RunFolder) -> Images:
        """The validation images of the run that the model is from.

        Raises:
            InputError: They are missing, cannot be used, or have other classes now.
        """
        images = self.load_data(folder.read_config()).val
        if images.classes != self.spec.classes:
            raise InputError(f"the images that {folder.path} was trained on have different classes now; use --data")
        return images

    @property
    @abstractmethod
    def train_transform(self) -> Transform:
        """Random change of a training sample; draws from the global generators."""

    @property
    @abstractmethod
    def eval_transform(self) -> Transform:
        """What samples go through in evaluation."""

    def collate(self, samples: list[Sample]) -> Batch:
        """Make a batch of samples."""
        return default_collate(samples)

    # Training

    @abstractmethod
    def training_step(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of a batch, which are summed, and further metrics of it; all scalars, and recorded by name."""

    def start(self, device: torch.device) -> None:  # noqa: B027
        """Called once before training with the device of the model."""

    def constants(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed, such as a digest of a teacher, by name."""
        return {}

    def describe(self, splits: Splits, console: "Console") -> None:  # noqa: B027
        """Print what is trained on what."""

    # Evaluation

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What a model makes of a batch in evaluation mode."""
        return model(batch["image"])

    @abstractmethod
    def metrics(self, **options: Any) -> Any:
        """New metrics, one of torchmetrics' or a collection of them; `options` go to each of them."""

    @abstractmethod
    def evaluation_step(self, model: nn.Module, batch: Batch, metrics: Any) -> Sequence[Any]:
        """Update metrics with a batch; return what plots need to know of each image."""

    @abstractmethod
    def evaluation(self, values: Any, records: Sequence[Any]) -> Evaluation:
        """The result of an evaluation.

        Args:
            values: What the metrics computed.
            records: What `evaluation_step` returned, in the order of the images; may be empty.
        """

    @torch.inference_mode()
    def evaluate(
        self,
        images: Images,
        batch_size: int | None = None,
        workers: int | None = None,
        on_batch: Callable[[int], None] = lambda images: None,
    ) -> Evaluation:
        """Measure the model on labeled images.

        Args:
            images: The images.
            batch_size: Batch size; by default what the task says, or 64.
            workers: Number of loading processes; by default chosen from the number of cores.
            on_batch: Called with the number of images of each batch that is done.

        Raises:
            InputError: An image cannot be read.
        """
        # In several processes each of them measures all images.
        metrics = self.metrics(sync_on_compute=False).to(self.device)
        records: list[Any] = []
        for batch in self.batches(images, batch_size, workers):
            with self._autocast():
                records += self.evaluation_step(self.model, batch, metrics)
            on_batch(len(batch["id"]))
        return self.evaluation(metrics.compute(), records)

    # Prediction

    @abstractmethod
    def decode(self, outputs: Any, batch: Batch) -> list[Any]:
        """A prediction for each image from what the model returns."""

    def predict(
        self,
        images: Picture | Sequence[Picture],
        batch_size: int | None = None,
        workers: int | None = None,
        *,
        unreadable: dict[str, str] | None = None,
        max_pixels: int | None = None,
    ) -> list[Any]:
        """Predict for images.

        Args:
            images: Paths, PIL images or (H, W, 3) uint8 arrays, or one of them.
            batch_size: Batch size; by default what the task says, or 64.
            workers: Number of loading processes; by default none for a few images.
            unreadable: Gets the names of images that cannot be read, and why; they are left out. Otherwise they are
                errors.
            max_pixels: The largest number of pixels of an image, if not Pillow's limit.

        Returns:
            A prediction for each image; see the task.

        Raises:
            InputError: An image cannot be read; names it.
        """
        how: dict[str, Any] = dict(unreadable=unreadable, max_pixels=max_pixels)
        return list(self.predict_each(images, batch_size, workers, **how))

    @torch.inference_mode()
    def predict_each(
        self,
        images: Picture | Sequence[Picture],
        batch_size: int | None = None,
        workers: int | None = None,
        *,
        unreadable: dict[str, str] | None = None,
        max_pixels: int | None = None,
    ) -> Iterator[Any]:
        """Yield what `predict` returns, one after the other."""
        data = as_dataset(images, max_pixels)
        for batch in self.batches(data, batch_size, workers, tolerant=unreadable is not None):
            if unreadable is not None:
                unreadable |= batch["unreadable"]
            if batch["id"]:
                with self._autocast():
                    outputs = self.forward(self.model, batch)
                yield from self.decode(outputs, batch)

    def write_picture(  # noqa: B027
        self, prediction: Any, path: Path, *, max_pixels: int | None = None, **options: Any
    ) -> None:
        """Write a PNG or JPEG file of an image and what was predicted, where a task has such pictures.

        Args:
            prediction: The prediction for an image file.
            path: The file to write, without its extension.
            max_pixels: The largest number of pixels of an image, if not Pillow's limit.
            options: Those of the prediction's `row`.
        """

    def as_json(self, rows: Sequence[dict[str, Any]]) -> Any:
        """What is written as JSON of the rows of many predictions."""
        return rows

    @abstractmethod
    def as_csv(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines of a CSV file of the rows of many predictions."""

    @abstractmethod
    def as_table(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
        """The rows of many predictions as people read them."""

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def batches(
        self, images: Images, batch_size: int | None = None, workers: int | None = None, *, tolerant: bool = False
    ) -> Iterable[Batch]:
        """Batches of images as the model takes them, in order, on its device and in its dtype.

        Args:
            images: The images; see `as_dataset` for files and arrays.
            batch_size: Batch size; by default what the task says, or 64.
            workers: Number of loading processes; by default chosen from the number of cores.
            tolerant: Leave out images that cannot be read; each batch says which and why, under `unreadable`.

        Raises:
            InputError: An image cannot be read; names it.
        """
        batch_size = batch_size or self.eval_batch_size or 64
        # Starting processes takes longer than loading a few images.
        few = not isinstance(images, ImageStream) and len(images) <= 4 * batch_size
        count = 0 if few and workers is None else loader_workers(workers)
        keys: Any = images.in_order()
        data = Samples(images, self.eval_transform, tolerant=tolerant)
        collate = functools.partial(collate_readable, self.collate)
        for batch in DataLoader(data, batch_size, sampler=keys, num_workers=count, collate_fn=collate):
            yield tree_map_only(Tensor, self._move, batch)

    def _move(self, value: Tensor) -> Tensor:
        dtype = self.dtype if value.is_floating_point() else value.dtype
        return value.to(self.device, dtype, non_blocking=True)


def as_dataset(images: Picture | Sequence[Picture], max_pixels: int | None = None) -> ImageDataset:
    """Images without labels, from paths, PIL images or (H, W, 3) uint8 arrays, or one of them."""
    images = [images] if isinstance(images, Picture) else images
    ids = [str(item) if isinstance(item, (str, Path)) else f"number {i}" for i, item in enumerate(images)]
    data = ImageDataset(functools.partial(_given, images), ids, {}, ())
    data.max_pixels = max_pixels
    return data


def _given(images: Sequence[Picture], number: int) -> Path | Image.Image:
    item = images[number]
    if isinstance(item, np.ndarray):
        return Image.fromarray(item).convert("RGB")
    return item.convert("RGB") if isinstance(item, Image.Image) else Path(item)

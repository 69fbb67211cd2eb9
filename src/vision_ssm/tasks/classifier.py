import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vision_ssm.data import Images, ImageStream, LabelledImages, Samples, find_unreadable
from vision_ssm.errors import InputError
from vision_ssm.optimize import optimize
from vision_ssm.recipes import Precision
from vision_ssm.tasks.evaluation import Evaluation, predict
from vision_ssm.tasks.report import how_many
from vision_ssm.tasks.spec import ModelSpec, create_for_evaluation, load_weights, read_spec, spec_of


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, ready to be used.

    Args:
        model: Its network, in evaluation mode.
        spec: What its inputs and outputs mean.
        device: Where it computes.
        precision: In which number format.
    """

    model: nn.Module
    spec: ModelSpec
    device: torch.device
    precision: Precision = "32-true"

    def predict(
        self, images: Sequence[Path] | LabelledImages, batch_size: int = 64, workers: int | None = None
    ) -> Tensor:
        """(images, classes) probabilities, float32 on the CPU.

        Raises:
            InputError: An image cannot be read.
        """
        if not isinstance(images, LabelledImages):
            images = LabelledImages(images, [0] * len(images), self.spec.classes, [str(p) for p in images])
        return self.predict_labelled(images, batch_size, workers)[0]

    def predict_labelled(
        self, images: Images, batch_size: int = 64, workers: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(images, classes) probabilities and (images,) targets, on the CPU.

        Raises:
            InputError: An image cannot be read.
        """
        if batch_size < 1:
            raise InputError(f"--batch-size must be positive, not {batch_size}")
        # Starting processes takes longer than loading a few images.
        few = not isinstance(images, ImageStream) and len(images) <= 4 * batch_size
        count = 0 if few and workers is None else loader_workers(workers)
        samples, keys = Samples(images, self.spec.eval_transform()), images.in_order()
        batches = DataLoader(samples, batch_size, sampler=keys, num_workers=count)
        dtype = {"b": torch.bfloat16, "1": torch.float16}.get(self.precision[0])
        return predict(self.model, batches, self.device, dtype=dtype)


def load_classifier(
    weights: Path, device: str = "auto", precision: Precision = "32-true", optimized: bool = False
) -> Classifier:
    """The trained classifier in a weights file of a run, on a CPU in its fastest form if `optimized`.

    Raises:
        InputError: The file is missing, damaged or does not fit its model, or there is no such device.
    """
    spec = read_spec(weights)
    model = spec.create()
    load_weights(model, weights)
    return _ready(model, spec, find_device(device), precision, optimized)


def _ready(
    model: nn.Module, spec: ModelSpec, device: torch.device, precision: Precision, optimized: bool
) -> Classifier:
    model = model.to(device).eval()
    if not optimized or device.type != "cpu" or precision not in ("32-true", "bf16-true"):  # autocast changes no copy
        return Classifier(model, spec, device, precision)
    model = optimize(model, dtype=torch.float32 if precision == "32-true" else torch.bfloat16)
    return Classifier(model, spec, device)


def load_model(
    name: str, weights: Path | None, device: str = "auto", precision: Precision = "32-true", optimized: bool = False
) -> Classifier:
    """A timm model with its own test settings; its classes are the numbers of the outputs.

    Args:
        name: timm's name.
        weights: A checkpoint file of it; otherwise the published weights.
        device: Where to compute.
        precision: In which number format.
        optimized: Whether to take its fastest form on a CPU.

    Raises:
        InputError: The model is unknown, the file is damaged or does not fit, or there is no such device.
    """
    where = find_device(device)
    model = create_for_evaluation(name, weights)
    return _ready(model, spec_of(name, model), where, precision, optimized)


def evaluate(
    classifier: Classifier,
    images: Images,
    batch_size: int = 64,
    workers: int | None = None,
    *,
    console: Console | None = None,
) -> Evaluation:
    """Measure a classifier on labelled images.

    Raises:
        InputError: The images have other classes than the classifier, or some cannot be read.
    """
    if images.classes != classifier.spec.classes:
        raise InputError("the images' classes are not those of the classifier")
    with (console or Console(quiet=True)).status(f"evaluating on {how_many(images)} images"):
        try:
            probabilities, targets = classifier.predict_labelled(images, batch_size, workers)
        except InputError:
            check_readable(images, workers)  # names all of them at once
            raise
    return Evaluation(images.classes, probabilities, targets)


def check_readable(images: Images, workers: int | None = None) -> None:
    """Refuse images to measure on that cannot be read: without them, accuracy would mean something else.

    Raises:
        InputError: Naming them.
    """
    lines = list(find_unreadable(images, loader_workers(workers)).values())
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise InputError(f"{'; '.join(lines[:3])}{more}; mend or remove what accuracy is to be measured on")


def loader_workers(workers: int | None) -> int:
    """Number of loading processes: as asked, or all cores but one, at most eight."""
    return min(8, max(1, (os.cpu_count() or 2) - 1)) if workers is None else workers


def find_device(name: str) -> torch.device:
    """The device called `name`; auto takes an accelerator if there is one.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {name} here; there is {_devices()}") from error
    return device


def _devices() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else f"cpu and {accelerator.type}"

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
"""Names of Lightning's precision settings."""

Tracker = Literal["tensorboard", "wandb"]
"""Where else than in the folder of the run the figures of every epoch are shown."""

Interpolation = Literal["bilinear", "bicubic", "random"]
"""How crops are resized; random takes bilinear or bicubic for each image."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to training images (see `timm.data.create_transform` and `timm.data.Mixup`)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area to crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the crop."""
    interpolation: Interpolation | None = None
    """How crops are resized; otherwise as in evaluation."""
    hflip: float = 0.5
    """Probability of mirroring left to right."""
    vflip: float = 0.0
    """Probability of mirroring top to bottom."""
    color_jitter: float = 0.4
    """Strength of random brightness, contrast and saturation; unused with an automatic policy."""
    auto_augment: str | None = None
    """timm's name of an automatic policy, such as rand-m9-mstd0.5-inc1."""
    erase: float = 0.0
    """Probability of erasing a rectangle."""
    mixup: float = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 turns it off."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch: float = 0.5
    """Probability that it is mixed by CutMix, where both are on."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Optimiser, schedule, loss and averaging (timm's)."""

    optimizer: str = "adamw"
    """timm's name of the optimiser."""
    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end."""
    warmup_lr: float | None = None
    """Learning rate at the beginning; otherwise a hundredth of lr."""
    lr_batch: int | None = None
    """Images per step for which the three rates are given; they grow in proportion. Otherwise they hold as they are."""
    betas: tuple[float, float] | None = None
    """Decays of the optimiser's moving averages; otherwise its own."""
    eps: float | None = None
    """Term in the optimiser's denominator; otherwise its own."""
    weight_decay: float = 0.05
    """Weight decay; biases, norms and what the model exempts get none."""
    published_decay: bool = False
    """Exempt what the published training of the model exempts, no more: it decays A and the bias of the step size."""
    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one below it."""
    schedule: str = "cosine"
    """timm's name of the learning-rate schedule."""
    warmup_epochs: int = 5
    """Epochs over which the learning rate rises; at most all but one."""
    warmup_first: bool = False
    """The schedule's curve begins after these epochs, not below them."""
    warmup_by_epoch: bool = False
    """The rate rises once per epoch, not at every step."""
    decay_by_epoch: bool = False
    """The rate falls once per epoch, not at every step."""
    cooldown_epochs: int = 0
    """Epochs at min_lr, at the end; as many as there is room for."""
    clip_grad: float | None = 5.0
    """Largest norm of the gradient."""
    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes."""
    binary_loss: bool = False
    """One yes-or-no question per class instead of softmax cross-entropy."""
    ema: float | None = None
    """Decay of a moving average of the weights; it is what gets evaluated and saved as weights."""
    ema_warmup: bool = True
    """Average over fewer steps in the beginning."""

    def for_batch(self, images: int) -> "Optimisation":
        """The same with the rates of steps of that many images, as plain rates."""
        factor = images / (self.lr_batch or images)
        warmup_lr = self.lr / 100 if self.warmup_lr is None else self.warmup_lr
        return dataclasses.replace(
            self, lr=factor * self.lr, min_lr=factor * self.min_lr, warmup_lr=factor * warmup_lr, lr_batch=None
        )


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Learning from a teacher: the loss is (1 - alpha) of the targets' and alpha of the teacher's."""

    teacher: str | None = None
    """timm's name of a model with published weights, the folder of a run, or a weights file of one."""
    soft: bool = False
    """Learn the teacher's probabilities; otherwise its most probable class."""
    alpha: float = 0.5
    """Weight of the teacher."""
    tau: float = 1.0
    """Temperature of the probabilities; the higher, the more even."""


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """What all sources of images have in common."""

    max_unreadable: float = 0.01
    """Largest share of the training images that may be unreadable (always at least one); others take their places."""
    strict: bool = False
    """Stop at the first training image that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class FolderData(ImageSource):
    """Image folders with one sub-folder per class."""

    root: Path
    """Training images, or a folder that holds train and val (or test)."""
    val: Path | None = None
    """Validation images."""
    val_fraction: float | None = None
    """Share of the training images held out for validation (0.1 if there is no validation folder)."""


@dataclass(frozen=True, kw_only=True)
class TimmData(ImageSource):
    """Tar files, webdataset shards or Hugging Face datasets, named as timm names them."""

    dataset: str = ""
    """hfds/NAME for a Hugging Face dataset, hfids/NAME for one as a stream, wds/ for webdataset shards; empty for tar
    files."""
    root: Path | None = None
    """The tar file, the folder of tar files or shards; for hfds/ and hfids/ the folder that keeps downloads."""
    train_split: str = "train"
    """Name of the training split; of shards also a pattern, such as train-{0000..0146}.tar or https://HOST/train-{0..9}.tar
    (a stream)."""
    val_split: str = "validation"
    """Name of the validation split."""
    val_fraction: float | None = None
    """Share of the training split held out for validation instead of a split."""
    classes: int | Path | None = None
    """Number of classes, or a text file that names one a line; needed where the data does not name them."""
    input_key: str | None = None
    """Column of the images (image), or extensions of images in shards (jpg;jpeg;png;webp)."""
    target_key: str | None = None
    """Column of the classes (label), or field of the json in shards (by default the file .cls)."""
    samples: int | None = None
    """Number of training images in a stream; needed where the stream does not say."""
    shuffle: int = 1000
    """Images of a stream's shard that wait in training, among which the next one is drawn; 1 keeps their order."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the outcome of a classification run, and where it is computed."""

    model: str = "vmamba_atto"
    """Name of a timm model."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model, such as stem_stride=2 drop_rate=0.1."""
    pretrained: bool | Path = False
    """Start from the published weights, from a checkpoint file, or from the best weights in the folder of a run."""
    drop_path: float = 0.0
    """Stochastic depth rate (drop_path_rate of the model)."""
    image_size: int | None = None
    """Side of the square input in pixels; otherwise what the model expects."""
    crop: float | None = None
    """Share of the resized image's side that evaluation keeps; otherwise the model's, or all below 128 pixels."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 64
    """Images that pass through the model together, on each device."""
    accumulate: int = 1
    """Such batches per step of the optimiser, over which gradients are averaged."""
    seed: int = 0
    """Decides the first weights, the order of the images and every random change."""
    augment: Augmentation = field(default_factory=Augmentation)
    optim: Optimisation = field(default_factory=Optimisation)
    distill: Distillation = field(default_factory=Distillation)
    precision: Precision = "32-true"
    """Number format of the computation."""
    max_skipped: int = 10
    """Steps in a row without a finite loss and gradient, each of which is skipped, after which training stops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    devices: int = 1
    """Devices of each machine; one process for each, or that many processes on the CPU."""
    nodes: int = 1
    """Machines."""
    fsdp: bool = False
    """Each device keeps a share of weights, average and optimiser state (FSDP2), not all of them."""
    sync_batchnorm: bool = False
    """Batch norms take the statistics of the images on all devices; not on the CPU."""
    tracker: Tracker | None = None
    """Show the figures of every epoch in TensorBoard or Weights & Biases too."""
    workers: int | None = None
    """Processes that load images; otherwise chosen from the number of cores. Results do not depend on it."""

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.devices * self.nodes

    @property
    def images_per_step(self) -> int:
        """Images that each step of the optimiser sees."""
        return self.batch_size * self.accumulate * self.processes


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(TrainConfig):
    """Train on scikit-learn's handwritten digits."""


@dataclass(frozen=True, kw_only=True)
class FolderConfig(TrainConfig):
    """Train on folders of images."""

    data: FolderData


@dataclass(frozen=True, kw_only=True)
class TimmConfig(TrainConfig):
    """Train on what timm's readers name."""

    data: TimmData


def to_dict(config: Any) -> Any:
    """A configuration as plain dictionaries, lists, strings and numbers."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(kind: Any, values: Any) -> Any:
    """The inverse of `to_dict`.

    Args:
        kind: The dataclass (or the type of a field) to build.
        values: What `to_dict` returned.

    Raises:
        KeyError: A field without a default is missing.
        TypeError: There is a field that `kind` does not have.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        if unknown := set(values) - set(hints):
            raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
        return kind(**{name: from_dict(hints[name], value) for name, value in values.items()})
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        return Path(values) if Path in options and isinstance(values, str) else values
    if typing.get_origin(kind) is tuple:
        return tuple(values)
    return Path(values) if kind is Path else values

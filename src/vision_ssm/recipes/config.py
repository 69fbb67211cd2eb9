"""Configurations of training as flat, frozen dataclasses whose values are checked on creation.

The fields are the options of `vision-ssm train`; a task's configuration inherits the groups of options it has.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from vision_ssm.errors import InputError

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
"""Names of Lightning's precision settings."""

DataFormat = Literal["auto", "digits", "folder", "tar", "wds", "hfds", "hfids"]
"""Where images come from; see `DataConfig.data`."""

FREE_ON_RESUME = ("device", "num_workers", "max_skipped", "logger", "max_unreadable", "cache_dir", "data", "val_data")
"""Fields that change neither weights nor metrics."""


def limited(default: Any, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf,
            below: float = math.inf) -> Any:  # fmt: skip
    """A field that holds None or finite numbers within limits."""
    return field(default=default, metadata=dict(least=least, above=above, most=most, below=below))


def option(name: str) -> str:
    """The command-line option of a field."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks the types and limits of its fields on creation.

    Raises:
        InputError: A value is outside its limits; names the option, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value, hint = getattr(self, item.name), hints[item.name]
            if not fits(value, hint):
                raise InputError(f"{option(item.name)} must be {_shown(hint)}, got {value!r}")
            if item.metadata:
                _check_limits(item.name, value, **item.metadata)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; whole numbers are floats too."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in options
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is tuple:
        each = options[:1] * len(value) if isinstance(value, tuple) and options[-1] is Ellipsis else options
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


def _shown(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint).replace("typing.", "")


def _check_limits(name: str, value: Any, least: float, above: float, most: float, below: float) -> None:
    words = {"at least": least, "above": above, "at most": most, "below": below}
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if number is not None and not (least <= number <= most and above < number < below and math.isfinite(number)):
            allowed = [f"{word} {limit:g}" for word, limit in words.items() if math.isfinite(limit)]
            allowed += [] if math.isfinite(number) else ["finite"]
            shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            raise InputError(f"{option(name)} must be {' and '.join(allowed)}, got {shown}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Model."""

    model: str = "vmamba_atto"
    """Name of a timm model; a backbone for tasks other than classification."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model, such as stem_stride=2 drop_rate=0.1."""
    drop_path_rate: float = limited(0.0, least=0, below=1)
    """Stochastic depth rate."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ModelConfig):
    """Model and its input."""

    pretrained: bool | Path = False
    """Start from the published weights, from a checkpoint file, or from the best weights in the folder of a run."""
    img_size: int | None = limited(None, least=1)
    """Height and width of the square input in pixels; by default what the model expects."""
    crop_pct: float | None = limited(None, above=0, most=1)
    """Share of the resized image's side that evaluation keeps; by default the model's, or all below 128 pixels."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Training and validation images."""

    data: str = ""
    """Where the images are."""
    val_data: str | None = None
    """Validation images, if they are not in --data."""
    val_fraction: float | None = limited(None, above=0, below=1)
    """Share of the training images held out for validation (0.1 if there are no validation images)."""
    train_split: str | None = None
    """Name of the training split, if it is not train."""
    val_split: str | None = None
    """Name of the validation split, if it is not val, validation or test."""
    max_unreadable: float = limited(0.01, least=0, most=1)
    """Largest share of the training images that may be unreadable (at least one image, unless it is 0); others take
    their places."""
    max_pixels: int | None = limited(None, least=1)
    """Largest number of pixels of an image, if not Pillow's limit of 179 million."""
    num_workers: int | None = limited(None, least=0, most=1024)
    """Processes that load images; by default chosen from the number of cores. Results do not depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_data is not None and self.val_fraction is not None:
            raise InputError("--val-data and --val-fraction exclude each other")


@dataclass(frozen=True, kw_only=True)
class ClassDataConfig(DataConfig):
    """Training and validation images, each of one class."""

    data: str = ""
    """Folder with one sub-folder per class, or one that holds train and val; tar file or folder of tar files; folder,
    pattern or URLs of webdataset shards, such as https://HOST/train-{0000..0146}.tar; hfds/NAME or hfids/NAME for a
    Hugging Face dataset or a stream of one; or digits."""
    data_format: DataFormat = "auto"
    """How to read --data: class folders, tar files, webdataset shards, Hugging Face dataset or stream; by default
    detected."""
    class_map: Path | None = None
    """Text file that names one class per line, where the data does not name its classes."""
    num_classes: int | None = limited(None, least=2)
    """Number of classes, where the data does not name them and there is no class map."""
    input_key: str | None = None
    """Column of the images (image), or extensions of images in shards (jpg;jpeg;png;webp)."""
    target_key: str | None = None
    """Column of the classes (label), or field of the json in shards (by default the file .cls)."""
    train_num_samples: int | None = limited(None, least=1)
    """Number of training images in a stream, if it does not declare it."""
    shuffle_buffer: int = limited(1000, least=1)
    """Images of a stream's shard from which the next one is drawn; 1 keeps their order."""
    cache_dir: Path | None = None
    """Folder for downloads of Hugging Face datasets."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """Random changes to training images (see `timm.data.create_transform` and `timm.data.Mixup`)."""

    scale: tuple[float, float] = limited((0.08, 1.0), above=0, most=1)
    """Smallest and largest share of the image's area to crop."""
    ratio: tuple[float, float] = limited((3 / 4, 4 / 3), above=0)
    """Smallest and largest aspect ratio of the crop."""
    train_interpolation: Literal["bilinear", "bicubic", "random"] | None = None
    """How crops are resized, random for either of the two; by default as in evaluation."""
    hflip: float = limited(0.5, least=0, most=1)
    """Probability of a horizontal flip."""
    vflip: float = limited(0.0, least=0, most=1)
    """Probability of a vertical flip."""
    color_jitter: float = limited(0.4, least=0)
    """Strength of random brightness, contrast and saturation; unused with --auto-augment."""
    auto_augment: str | None = None
    """timm's name of an augmentation policy, such as rand-m9-mstd0.5-inc1."""
    random_erase: float = limited(0.0, least=0, most=1)
    """Probability of erasing a rectangle."""
    mixup: float = limited(0.0, least=0)
    """Alpha of mixup; 0 turns it off."""
    cutmix: float = limited(0.0, least=0)
    """Alpha of CutMix; 0 turns it off."""
    mixup_prob: float = limited(1.0, least=0, most=1)
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = limited(0.5, least=0, most=1)
    """Probability of CutMix instead of mixup, if both are on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise InputError(f"{option(name)} takes the smaller value first, got {low} {high}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """Optimizer, schedule and moving average (timm's)."""

    epochs: int = limited(100, least=1, most=1_000_000)
    """Passes over the training images."""
    steps: int | None = limited(None, least=1, most=1_000_000_000)
    """Optimizer steps, instead of --epochs: as many epochs as that takes; the schedule ends at this step."""
    batch_size: int = limited(64, least=1)
    """Batch size on each device."""
    grad_accum: int = limited(1, least=1)
    """Batches over which gradients are averaged for each optimizer step."""
    optimizer: str = "adamw"
    """timm's name of the optimizer."""
    lr: float = limited(1e-3, above=0)
    """Highest learning rate."""
    min_lr: float = limited(1e-5, least=0)
    """Final learning rate."""
    warmup_lr: float | None = limited(None, least=0)
    """Initial learning rate; by default a hundredth of --lr."""
    lr_base_size: int | None = limited(None, least=1)
    """Images per step for which the three learning rates are given, which then scale linearly; by default they are
    used as given."""
    betas: tuple[float, float] | None = limited(None, least=0, below=1)
    """Betas of the optimizer; by default its own."""
    eps: float | None = limited(None, above=0)
    """Epsilon of the optimizer; by default its own."""
    weight_decay: float = limited(0.05, least=0)
    """Weight decay; biases, norms and what the model exempts get none."""
    published_decay: bool = False
    """Exempt from weight decay what the published training of the model exempts (which decays A and the bias of the
    step size)."""
    layer_decay: float | None = limited(None, above=0, most=1)
    """Factor on the learning rate from each layer to the one below it."""
    schedule: Literal["cosine", "tanh", "multistep", "poly"] = "cosine"
    """timm's name of the learning rate schedule; poly is linear here."""
    milestones: tuple[int, ...] | None = limited(None, least=1)
    """Epochs after which the schedule multistep multiplies the learning rate by --decay-rate."""
    decay_rate: float = limited(0.1, above=0, most=1)
    """Factor of the schedule multistep."""
    warmup_epochs: int = limited(5, least=0)
    """Epochs of warmup; at most all but one."""
    warmup_steps: int | None = limited(None, least=0)
    """Steps of warmup, instead of --warmup-epochs; at most half of all."""
    warmup_prefix: bool = False
    """The schedule starts after the warmup, not below it."""
    warmup_by_epoch: bool = False
    """The warmup changes the learning rate once per epoch, not at every step."""
    decay_by_epoch: bool = False
    """The schedule changes the learning rate once per epoch, not at every step."""
    cooldown_epochs: int = limited(0, least=0)
    """Epochs at --min-lr at the end, as far as --epochs allows."""
    clip_grad: float | None = limited(5.0, above=0)
    """Largest norm of the gradient."""
    ema_decay: float | None = limited(None, least=0, below=1)
    """Decay of a moving average of the weights, which is then evaluated and saved."""
    ema_warmup: bool = True
    """Average over fewer steps at the beginning."""
    monitor: str | None = None
    """Metric that decides which epoch is the best: by default accuracy, or balanced_accuracy where the largest class
    has over 1.5 times as many training images as the smallest; of detectors mask_AP, or box_AP without masks; of
    segmenters mIoU."""
    max_skipped: int = limited(10, least=1)
    """Stop after this many steps in a row without a finite loss and gradient, each of which is skipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_lr", "warmup_lr"):
            if (rate := getattr(self, name)) is not None and rate > self.lr:
                raise InputError(f"{option(name)} must be at most --lr {self.lr:g}, got {rate:g}")
        if self.published_decay and self.layer_decay is not None:
            raise InputError("--published-decay and --layer-decay exclude each other")
        if bool(self.milestones) != (self.schedule == "multistep"):
            raise InputError("--milestones belongs to --schedule multistep, which needs it")

    def scaled(self, images: int) -> Any:
        """The same configuration with the learning rates for steps of this many images."""
        factor = images / (self.lr_base_size or images)
        warmup_lr = self.lr / 100 if self.warmup_lr is None else self.warmup_lr
        return dataclasses.replace(
            self, lr=factor * self.lr, min_lr=factor * self.min_lr, warmup_lr=factor * warmup_lr, lr_base_size=None
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Where and how to compute."""

    seed: int = limited(0, least=0, below=2**64)
    """Seed of the initial weights, of the order of the images and of all random changes."""
    precision: Precision = "32-true"
    """Number format of the computation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    devices: int = limited(1, least=1)
    """Devices of each machine, one process each; on the CPU, processes."""
    num_nodes: int = limited(1, least=1)
    """Machines."""
    sync_batchnorm: bool = False
    """Batch norms use the statistics of the images on all devices (GPUs only)."""
    logger: Literal["tensorboard", "wandb"] | None = None
    """Log the metrics of every epoch to TensorBoard or Weights & Biases too."""

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, OptimConfig, DataConfig, ModelConfig):
    """What the training of every task has in common."""

    task: ClassVar[str]
    groups: ClassVar[tuple[type[Config], ...]]
    """The groups of options, as `--help` shows them."""

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step."""
        return self.batch_size * self.grad_accum * self.processes


@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Loss and distillation: (1 - alpha) times the loss of the labels plus alpha times that of the teacher."""

    label_smoothing: float = limited(0.1, least=0, most=1)
    """Share of the target spread evenly over all classes."""
    class_weights: bool = False
    """Weight the loss of each class by the inverse of its number of training images."""
    teacher: str | None = None
    """timm's name of a model with published weights, the folder of a run, or a weights file of one."""
    distill_type: Literal["hard", "soft"] = "hard"
    """Learn the teacher's most probable class, or its probabilities."""
    distill_alpha: float = limited(0.5, least=0, most=1)
    """Weight of the teacher's loss."""
    distill_tau: float = limited(1.0, above=0)
    """Temperature of the probabilities in soft distillation."""


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(LossConfig, AugmentConfig, ClassDataConfig, ClassifierConfig, TrainConfig):
    """Training of an image classifier."""

    task: ClassVar[str] = "classification"
    groups: ClassVar[tuple[type[Config], ...]] = (
        ClassifierConfig, ClassDataConfig, AugmentConfig, LossConfig, OptimConfig, RunConfig,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise InputError(f"mixup and CutMix need an even --batch-size, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class DenseConfig(ModelConfig):
    """Backbone and input of a detector or segmenter."""

    out_indices: tuple[int, ...] | None = limited(None, least=0)
    """Which maps of the backbone to use, the first one being 0; by default the last four, for retinanet three."""
    width: int = limited(256, least=1, most=4096)
    """Channels of pyramid and heads; 256 in the published form of detectors, 512 of upernet."""
    backbone_weights: bool | Path = False
    """Start the backbone from its published weights, from a file of a classifier's weights, or from the best weights
    in the folder of a classifier's run."""
    pretrained: Path | None = None
    """Start from a whole detector or segmenter: the folder of a run, or a weights file, such as vision-ssm convert
    writes. Layers that depend on the classes are initialized anew if these differ."""
    test_size: tuple[int, int] = limited((1333, 800), least=32, most=16_384)
    """Longest and shortest side of the resized image in evaluation and use: the largest that fits into both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone_weights is not False and self.pretrained is not None:
            raise InputError("--backbone-weights and --pretrained exclude each other; the latter includes the backbone")
        check_longer_first(self.test_size)


def check_longer_first(test_size: tuple[int, int]) -> None:
    """Raise an `InputError` where a size does not name its longer side first."""
    if test_size[0] < test_size[1]:
        raise InputError(f"--test-size takes the longer side first, got {' '.join(map(str, test_size))}")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(DenseConfig):
    """Detector, its backbone and its input."""

    detector: Literal["mask-rcnn", "faster-rcnn", "retinanet"] = "mask-rcnn"
    """Type of the detector; if the data has no masks, mask-rcnn becomes faster-rcnn."""
    box_samples: int = limited(512, least=4)
    """Proposals per image that the heads are trained on, a quarter of them on objects; 512 in the published form."""


@dataclass(frozen=True, kw_only=True)
class CocoDataConfig(DataConfig):
    """Training and validation images with boxes, and masks where there are some."""

    data: str = ""
    """Folder of a data set in COCO format (annotations/instances_train*.json and images, or _annotations.coco.json in
    train and valid), or its annotation file."""
    filter_empty: bool = False
    """Leave out training images without objects, and those with a side below 32 pixels."""


@dataclass(frozen=True, kw_only=True)
class BoxAugmentConfig(Config):
    """Random changes to training images, with their boxes and masks."""

    short_sides: tuple[int, ...] = limited((800,), least=32, most=16_384)
    """Shortest side of the resized image, one of these at random."""
    long_side: int = limited(1333, least=32, most=16_384)
    """Largest length of the longest side."""
    random_crop: bool = False
    """Half of the images are first resized to a shortest side of 400, 500 or 600, and cropped to sides from 384 to
    600."""
    jitter: tuple[float, float] | None = limited(None, above=0)
    """Large-scale jitter instead: smallest and largest scale relative to a square of --jitter-size, to which the image
    is cropped, such as 0.1 2.0."""
    jitter_size: int = limited(1024, least=32, most=16_384)
    """Side of that square."""
    hflip: float = limited(0.5, least=0, most=1)
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.short_sides:
            raise InputError("--short-sides needs at least one length")
        if self.jitter is not None and self.jitter[0] > self.jitter[1]:
            raise InputError(f"--jitter takes the smaller value first, got {self.jitter[0]} {self.jitter[1]}")
        if self.jitter is not None and self.random_crop:
            raise InputError("--jitter and --random-crop exclude each other")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(BoxAugmentConfig, CocoDataConfig, DetectorConfig, TrainConfig):
    """Training of an object detector, with masks where the data has them."""

    task: ClassVar[str] = "detection"
    groups: ClassVar[tuple[type[Config], ...]] = (
        DetectorConfig, CocoDataConfig, BoxAugmentConfig, OptimConfig, RunConfig,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(DenseConfig):
    """Segmenter, its backbone and its input."""

    decoder: str = "upernet"
    """upernet, or a decoder of segmentation_models_pytorch: unet, unetplusplus, fpn, linknet, manet or segformer."""
    width: int = limited(512, least=8, most=4096)
    """Channels of the decoder upernet; 512 in the published form."""
    test_size: tuple[int, int] = limited((2048, 512), least=32, most=16_384)
    """Longest and shortest side of the resized image in evaluation and use, and before the random scale of training:
    the largest that fits into both."""
    size_multiple: int = limited(1, least=1, most=256)
    """In evaluation and use, stretch the sides of the resized image to multiples of this."""
    mode: Literal["whole", "slide"] = "whole"
    """In evaluation and use, see the whole image at once, or windows of --crop-size that overlap by a third."""


@dataclass(frozen=True, kw_only=True)
class MaskDataConfig(DataConfig):
    """Training and validation images with masks of labels."""

    data: str = ""
    """Folder with images and, under the same names, masks: images/train and masks/train, train/images and train/masks,
    or images and masks (or annotations, labels)."""
    class_map: Path | None = None
    """Text file with one class per line, in the order of their labels; for color masks, and for the colors of pictures,
    R G B NAME, where a color without a name does not count. By default classes.txt in --data, or else numbers."""
    ignore_labels: tuple[int, ...] = limited((255,), least=0)
    """Labels to ignore, in addition to 255; the other labels are the classes. Without a number none is ignored."""


@dataclass(frozen=True, kw_only=True)
class PixelAugmentConfig(Config):
    """Random changes to training images, with their masks."""

    scale: tuple[float, float] = limited((0.5, 2.0), above=0, most=10)
    """Smallest and largest factor on the image resized to --test-size."""
    crop_size: int = limited(512, least=32, most=16_384)
    """Side of the square crop, padded where the image is smaller."""
    max_class_share: float = limited(0.75, above=0, most=1)
    """Largest share of one class in a crop, as far as ten draws find one."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue, each for half of the images."""
    hflip: float = limited(0.5, least=0, most=1)
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise InputError(f"--scale takes the smaller value first, got {self.scale[0]} {self.scale[1]}")


@dataclass(frozen=True, kw_only=True)
class PixelLossConfig(Config):
    """Loss."""

    class_balance: float = limited(0.0, least=0, most=1)
    """Weight the pixels of each class by its share of the training pixels to the power of minus this: 0 weights all
    alike, 1 all classes alike."""


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(PixelLossConfig, PixelAugmentConfig, MaskDataConfig, SegmenterConfig, TrainConfig):
    """Training of a semantic segmenter."""

    task: ClassVar[str] = "segmentation"
    groups: ClassVar[tuple[type[Config], ...]] = (
        SegmenterConfig, MaskDataConfig, PixelAugmentConfig, PixelLossConfig, OptimConfig, RunConfig,
    )  # fmt: skip


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as values that JSON has."""
    plain = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def from_dict(kind: Any, values: Mapping[str, Any]) -> Any:
    """The inverse of `to_dict`.

    Raises:
        TypeError: A field is missing, of another type, or unknown to the dataclass `kind`.
    """
    hints = typing.get_type_hints(kind)
    if unknown := values.keys() - {item.name for item in dataclasses.fields(kind)}:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    restored = {name: _restored(hints[name], value) for name, value in values.items()}
    if wrong := [name for name, value in restored.items() if not fits(value, hints[name])]:
        raise TypeError(f"{wrong[0]} must be {_shown(hints[wrong[0]])}, got {restored[wrong[0]]!r}")
    return kind(**restored)


def _restored(hint: Any, value: Any) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if Path in options and isinstance(value, str) else value

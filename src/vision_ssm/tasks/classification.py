import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform, resolve_data_config
from torch import Tensor, nn

from vision_ssm.checkpoints import classifier_names
from vision_ssm.data import Images, Sample, Splits, Transform, load_splits, read_images, seeded
from vision_ssm.engine.run_folder import weights_file
from vision_ssm.engine.task import Batch, Task
from vision_ssm.engine.weights import load_weights, read_metadata, read_weights, stored_metadata
from vision_ssm.errors import InputError, shorten
from vision_ssm.models.create import check_takes, create_model, default_cfg
from vision_ssm.recipes import ClassificationConfig
from vision_ssm.recipes.config import AugmentConfig, Config, limited
from vision_ssm.tasks.distillation import Teacher, distillation_loss
from vision_ssm.tasks.results import ClassificationResults, Prediction, describe_data

if TYPE_CHECKING:
    from rich.console import Console

_logger = logging.getLogger(__name__)

_WEIGHTS = 3  # keeps the draws of the first weights apart from those of data and steps


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec(Config):
    """A classifier without its weights: all that prediction needs to know, stored in every weights file."""

    model: str
    """timm's name of the model."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the outputs."""
    img_size: int = limited(224, least=1, most=8192)
    """Height and width of the input in pixels."""
    mean: tuple[float, float, float] = limited((0.5, 0.5, 0.5))
    """Channel means, of values from 0 to 1."""
    std: tuple[float, float, float] = limited((0.5, 0.5, 0.5), above=0)
    """Channel standard deviations."""
    interpolation: str
    """How images are resized."""
    crop_pct: float = limited(1.0, above=0, most=1)
    """Share of the resized image's side that is kept."""
    crop_mode: str = "center"
    """timm's name of how the resized image is cropped to a square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise InputError(f"class {shorten(twice)} is named twice")

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.img_size, self.img_size

    def at_size(self, size: int) -> "ClassifierSpec":
        """The same with another height and width of the input.

        Raises:
            InputError: It is out of the limits.
        """
        return replace(self, img_size=size)

    @classmethod
    def from_config(cls, config: ClassificationConfig, classes: tuple[str, ...]) -> "ClassifierSpec":
        """The classifier of a configuration, with the model's own input settings where it leaves them open.

        Raises:
            InputError: timm does not know the model.
        """
        known = default_cfg(config.model)
        size = config.img_size or known.input_size[-1]
        args = dict(config.model_args)
        if config.drop_path_rate:
            args.setdefault("drop_path_rate", config.drop_path_rate)
        if known.fixed_input_size and size != known.input_size[-1]:
            args.setdefault("img_size", size)
        crop_pct = config.crop_pct or (1.0 if size < 128 else known.crop_pct)
        how: dict[str, Any] = dict(mean=tuple(known.mean), std=tuple(known.std), interpolation=known.interpolation)
        return cls(model=config.model, model_args=args, classes=classes, img_size=size, crop_pct=crop_pct, **how)

    @classmethod
    def from_timm(cls, name: str, model: Any) -> "ClassifierSpec":
        """The settings in which a model's authors measure it; the classes are numbers.

        Raises:
            InputError: It does not take square images of three channels.
        """
        fixed = bool(model.pretrained_cfg.get("fixed_input_size"))
        settings = resolve_data_config({}, model=model, use_test_size=not fixed)
        channels, height, width = settings["input_size"]
        if channels != 3 or height != width:
            raise InputError(f"{name} takes images of {channels}x{height}x{width}; only square RGB images can be used")
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        classes = tuple(map(str, range(model.num_classes)))
        return cls(model=name, classes=classes, img_size=height, **{name: settings[name] for name in names})

    def eval_transform(self) -> Callable[[Any], Tensor]:
        """From an image to a normalized (3, img_size, img_size) tensor."""
        crop = dict(interpolation=self.interpolation, crop_pct=self.crop_pct, crop_mode=self.crop_mode)
        return create_transform(self.img_size, is_training=False, mean=self.mean, std=self.std, **crop)

    def train_transform(self, augment: AugmentConfig) -> Callable[[Any], Tensor]:
        """As `eval_transform`, after random changes drawn from the global generators.

        Raises:
            InputError: timm does not know the augmentation policy.
        """
        same = ("scale", "ratio", "hflip", "vflip", "auto_augment")
        options = {name: getattr(augment, name) for name in same} | dict(
            interpolation=augment.train_interpolation or self.interpolation,
            color_jitter=augment.color_jitter or None,
            re_prob=augment.random_erase,
            re_mode="pixel",
        )
        try:
            return create_transform(self.img_size, is_training=True, mean=self.mean, std=self.std, **options)
        except (AssertionError, ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"cannot make the augmentation: {error}; policies of --auto-augment are original, originalr, v0, v0r, "
                "3a, and such as rand-m9-mstd0.5-inc1 or augmix-m3-w3"
            ) from error


@dataclass(frozen=True)
class OnImage:
    """Changes the image of a sample alone."""

    transform: Callable[[Any], Tensor]

    def __call__(self, sample: Sample) -> Sample:
        return {**sample, "image": self.transform(sample["image"])}


class Classification(Task):
    """Image classification.

    If the model has a scalar `aux_loss` after a training forward, it is added to the loss. `train_accuracy` counts the
    larger share of a mixed target as right.

    Args:
        model: Maps (batch, 3, H, W) images to (batch, classes) logits.
        spec: Its description.
        config: How to train it, where it is trained; only loss, augmentation and distillation are used here.
        teacher: The teacher to learn from. A model with two classifiers (one that has timm's
            `set_distilled_training`) learns from it with the second, any other with the only one.
        counts: Number of training images of each class; where they are uneven, balanced accuracy is shown too.
    """

    name: ClassVar[str] = "classification"
    Spec: ClassVar[type] = ClassifierSpec
    spec: ClassifierSpec
    csv_columns: ClassVar[tuple[str, ...]] = ("image", "answer", "class", "probability")
    onnx_output: ClassVar[str | None] = "logits"
    epoch_metrics: tuple[str, ...] = ("loss", "accuracy")

    def __init__(
        self,
        model: nn.Module,
        spec: ClassifierSpec,
        config: ClassificationConfig | None = None,
        teacher: Teacher | None = None,
        *,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, spec)
        self.config = config = config or ClassificationConfig()
        self.teacher = teacher
        return_both: Callable[[bool], None] | None = getattr(model, "set_distilled_training", None)
        if teacher is not None and return_both is not None:
            return_both(True)
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            chances = dict(prob=config.mixup_prob, switch_prob=config.mixup_switch_prob)
            self.mixup = Mixup(
                config.mixup, config.cutmix, **chances, label_smoothing=0.0, num_classes=len(spec.classes)
            )
        weights = None
        if config.class_weights and counts is not None:
            inverse = 1 / torch.tensor(counts).clamp_min(1)
            weights = inverse * len(counts) / inverse.sum()
        self.loss = nn.CrossEntropyLoss(weights, label_smoothing=config.label_smoothing)
        uneven = counts is not None and max(counts) > 1.5 * max(min(counts), 1)
        names = [
            "accuracy",
            "balanced_accuracy",
            "macro_f1",
            "worst_recall",
            *(["top5_accuracy"] * (len(spec.classes) > 5)),
        ]
        if config.monitor not in (None, *names):
            raise InputError(f"--monitor must be one of {', '.join(names)}, got {config.monitor}")
        self.monitor = config.monitor or ("balanced_accuracy" if uneven else "accuracy")
        if uneven:
            self.epoch_metrics = (*self.epoch_metrics, "balanced_accuracy")

    @classmethod
    def from_config(cls, config: ClassificationConfig, splits: Splits, *, resume: bool = False) -> "Classification":
        spec = ClassifierSpec.from_config(config, splits.train.classes)
        spec.train_transform(config)
        splits.train.least_pixels = round(spec.img_size**2 / config.scale[0])  # the smallest crop is not enlarged
        model = first_model(config, spec, resume=resume)
        check_takes(model, spec.model, spec.img_size)
        teacher = load_teacher(config.teacher, spec) if config.teacher else None
        return cls(model, spec, config, teacher, counts=splits.train.counts())

    @classmethod
    def from_timm(cls, name: str, weights: Path | None = None, *, pretrained: bool = True) -> "Classification":
        """Any timm model in its authors' settings, with as many outputs as its weights have.

        Args:
            name: timm's name.
            weights: A checkpoint file of it; by default the published weights.
            pretrained: Without a file, whether to take the published weights or random ones.

        Raises:
            InputError: The model is unknown, has no published weights, or the file cannot be read or does not fit.
        """
        known = default_cfg(name)
        if weights is None:
            model = create_model(name, {}, known.num_classes, pretrained=pretrained)
        else:
            state = read_weights(weights, name)
            names = [f"{head}.weight" for head in classifier_names(known.classifier)]
            head = next((state[name] for name in names if name in state), None)
            model = create_model(name, {}, known.num_classes if head is None else len(head))
            load_weights(model, state, weights)
        return cls(model, ClassifierSpec.from_timm(name, model))

    @classmethod
    def create_model(cls, spec: ClassifierSpec) -> nn.Module:
        return create_model(spec.model, spec.model_args, len(spec.classes))

    @property
    def summary(self) -> str:
        size, crop = self.spec.img_size, self.spec.crop_pct
        return f"{self.spec.model}, {size}×{size}, crop {crop:.1%}, {self.spec.interpolation}"

    @classmethod
    def load_data(cls, config: ClassificationConfig) -> Splits:
        return load_splits(config, config.seed)

    def read_images(self, path: Path) -> Images:
        return read_images(path, self.spec.classes)

    @property
    def train_transform(self) -> Transform:
        return OnImage(self.spec.train_transform(self.config))

    @property
    def eval_transform(self) -> Transform:
        return OnImage(self.spec.eval_transform())

    def training_step(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        images, targets = batch["image"], batch["label"]
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        output = model(images)
        logits, logits_dist = output if isinstance(output, tuple) else (output, output)
        losses = {"labels": self.loss(logits, targets)}
        if self.teacher is not None:
            alpha = self.config.distill_alpha
            losses["labels"] = (1 - alpha) * losses["labels"]
            losses["teacher"] = alpha * distillation_loss(logits_dist, self.teacher(images), self.config)
        if (aux_loss := getattr(model, "aux_loss", None)) is not None:
            losses["aux"] = aux_loss
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        return losses, {"accuracy": (logits.argmax(1) == labels).float().mean()}

    def start(self, device: torch.device) -> None:
        self.loss.to(device)
        if self.teacher is not None:
            self.teacher.to(device)

    def constants(self) -> dict[str, Any]:
        return {} if self.teacher is None else {"the teacher": self.teacher.fingerprint}

    def describe(self, splits: Splits, console: "Console") -> None:
        describe_data(splits, self.spec.img_size, console)
        parameters = sum(p.numel() for p in self.model.parameters())
        teacher = "" if self.teacher is None else f", learns from {self.config.teacher}"
        size = f"{parameters / 1e6:.2f} M parameters, {self.spec.img_size}×{self.spec.img_size} input"
        best = "" if self.monitor == "accuracy" else f", best epoch by {self.monitor.replace('_', ' ')}"
        console.out(f"Model  {self.spec.model}, {size}{teacher}{best}", highlight=False)

    def metrics(self, **options: Any) -> Any:
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        count = len(self.spec.classes)
        metrics: dict[str, Any] = {
            # NaN stays NaN ("disable" says that too, but forgets the weights in torchmetrics 1.9).
            "loss": MeanMetric(nan_strategy=float("nan"), **options),
            "confusion": MulticlassConfusionMatrix(count, **options),
        }
        if count > 5:
            metrics["top5"] = MulticlassAccuracy(count, top_k=5, average="micro", **options)
        return MetricCollection(metrics, compute_groups=False)

    def evaluation_step(self, model: nn.Module, batch: Batch, metrics: Any) -> Sequence[Any]:
        """Update metrics; return id, predicted class, its probability and true class of each image."""
        logits, labels = model(batch["image"]).float(), batch["label"]
        metrics.update(preds=logits, target=labels, value=F.cross_entropy(logits, labels), weight=len(labels))
        best = logits.softmax(1).max(1)
        return list(zip(batch["id"], best.indices.tolist(), best.values.tolist(), labels.tolist(), strict=True))

    def evaluation(self, values: Any, records: Sequence[Any]) -> ClassificationResults:
        top5 = float(values["top5"]) if "top5" in values else None
        return ClassificationResults(
            self.spec.classes, float(values["loss"]), values["confusion"].cpu(), top5, tuple(records)
        )

    def decode(self, outputs: Any, batch: Batch) -> list[Prediction]:
        """Probabilities of the classes."""
        probabilities = outputs.float().softmax(1).cpu()
        pairs = zip(batch["id"], probabilities, strict=True)
        return [Prediction(name, self.spec.classes, values) for name, values in pairs]

    def as_csv(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"image": row["image"], "answer": row["answer"], **row["predictions"][0]} for row in rows]

    def as_table(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
        lines = []
        for row in rows:
            best = [f"{each['class']} {each['probability']:.1%}" for each in row["predictions"]]
            named = {f"{place}.": text for place, text in enumerate(best, start=1)}
            lines += [{"image": row["image"], "answer": row["answer"], **named}]
        return lines


def first_model(config: ClassificationConfig, spec: ClassifierSpec, *, resume: bool = False) -> nn.Module:
    """The model that training starts from; where its weights are of other classes, with a new classifier.

    Raises:
        InputError: The model cannot be made, or its weights cannot be read or do not fit.
    """
    count, start = len(spec.classes), False if resume else config.pretrained
    with seeded(config.seed, _WEIGHTS):
        model = create_model(spec.model, spec.model_args, count, pretrained=start is True)
    if isinstance(start, Path):
        path, known = start, None
        if start.is_dir():
            path = weights_file(start)
            if (other := read_metadata(path)["model"]) != spec.model:
                raise InputError(f"{start} is a run of {other}, not {spec.model}; use --model {other}")
        state, wanted = read_weights(path, spec.model), model.state_dict()
        if (stored := stored_metadata(path)) is not None:
            known = tuple(stored.get("classes", ()))
        heads = classifier_names(getattr(model, "pretrained_cfg", {}).get("classifier"))
        head = [key for key in wanted if key.startswith(tuple(f"{name}." for name in heads))]
        others = known not in (None, spec.classes)
        if others or any(key in state and state[key].shape != wanted[key].shape for key in head):
            state |= {key: wanted[key] for key in head}
            _logger.warning("%s: its classifier, for other classes, was not loaded", path)
        load_weights(model, state, path)
    return model


def load_teacher(name: str, student: ClassifierSpec) -> Teacher:
    """The teacher of that name for a student.

    Args:
        name: timm's name of a model with published weights, the folder of a run, or a weights file of one.
        student: The student's inputs and classes.

    Raises:
        InputError: There is none, its weights cannot be had, or it has other classes or takes other images.
    """
    try:
        if Path(name).exists():
            path = weights_file(Path(name))
            task: Any = Classification.load(path, "cpu", optimized=False)
            if task.spec.classes != student.classes:
                raise InputError(f"{path} has {_few(task.spec.classes)}, but the images have {_few(student.classes)}")
        else:
            if (count := default_cfg(name).num_classes) != len(student.classes):
                problem = f"{name} has {count} classes, but the images have {len(student.classes)}"
                raise InputError(f"{problem}; train a teacher on them and name its folder, or use --teacher None")
            task = Classification.from_timm(name)
        check_takes(task.model, task.spec.model, student.img_size)
    except InputError as error:
        raise InputError(f"--teacher: {error.line}") from error
    mean_std = (task.spec.mean, task.spec.std), (student.mean, student.std)
    return Teacher(task.model, task.spec.model, *mean_std)


def _few(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"

import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import vision_ssm.models  # noqa: F401  (registers them)
from vision_ssm.checkpoints import CheckpointError, can_convert, convert_official, load_checkpoint_file, load_strict
from vision_ssm.data import Transform
from vision_ssm.errors import InputError
from vision_ssm.recipes import Augmentation, TrainConfig
from vision_ssm.tasks.files import atomic_write

_METADATA_KEY = "vision_ssm"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A classifier without its weights: all that prediction needs to know, written into every weights file."""

    model: str
    """timm's name of the model."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments it was made with."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the outputs."""
    image_size: int
    """Side of the square input in pixels."""
    mean: tuple[float, float, float]
    """Channel means, of values from 0 to 1."""
    std: tuple[float, float, float]
    """Channel standard deviations."""
    interpolation: str
    """How images are resized."""
    crop: float
    """Share of the resized image's side that is kept."""
    crop_mode: str = "center"
    """timm's name of how the resized image is cropped to a square."""

    def create(self) -> nn.Module:
        """The model with random weights.

        Raises:
            InputError: timm does not know the model or it does not take these arguments.
        """
        return create_model(self.model, self.model_args, len(self.classes))

    def eval_transform(self) -> Transform:
        """From an image to a normalised (3, image_size, image_size) tensor."""
        return create_transform(
            self.image_size,
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop,
            crop_mode=self.crop_mode,
        )

    def train_transform(self, augment: Augmentation) -> Transform:
        """As `eval_transform`, after random changes drawn from the global generators."""
        return create_transform(
            self.image_size,
            is_training=True,
            mean=self.mean,
            std=self.std,
            interpolation=augment.interpolation or self.interpolation,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment,
            re_prob=augment.erase,
            re_mode="pixel",
        )


def spec_for(config: TrainConfig, classes: tuple[str, ...]) -> ModelSpec:
    """The classifier that `config` asks for, with the model's own input settings where it leaves them open.

    Raises:
        InputError: timm does not know the model.
    """
    known = default_cfg(config.model)
    size = config.image_size or known.input_size[-1]
    args = dict(config.model_args)
    if config.drop_path:
        args.setdefault("drop_path_rate", config.drop_path)
    if known.fixed_input_size and size != known.input_size[-1]:
        args.setdefault("img_size", size)
    return ModelSpec(
        model=config.model,
        model_args=args,
        classes=classes,
        image_size=size,
        mean=tuple(known.mean),
        std=tuple(known.std),
        interpolation=known.interpolation,
        crop=config.crop or (1.0 if size < 128 else known.crop_pct),
    )


def spec_of(name: str, model: Any) -> ModelSpec:
    """The settings in which a model's authors measure it; the classes are numbers.

    Raises:
        InputError: It does not take square images of three channels.
    """
    fixed = bool(model.pretrained_cfg.get("fixed_input_size"))
    settings = resolve_data_config({}, model=model, use_test_size=not fixed)
    channels, height, width = settings["input_size"]
    if channels != 3 or height != width:
        raise InputError(f"{name} takes images of {channels}x{height}x{width}; only square RGB images can be measured")
    return ModelSpec(
        model=name,
        classes=tuple(map(str, range(model.num_classes))),
        image_size=height,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        crop=settings["crop_pct"],
        crop_mode=settings["crop_mode"],
    )


def create_model(name: str, args: Mapping[str, Any], num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """Timm's `create_model`, with errors that say what to do.

    Raises:
        InputError: The model is unknown, does not take `args`, or has no published weights.
    """
    known = default_cfg(name)
    if pretrained and not (known.url or known.hf_hub_id or known.file):
        raise InputError(f"{name} has no published weights; give a file of your own instead")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **args)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        given = " ".join(f"{k}={v}" for k, v in args.items() if k != "device") or "no arguments"
        raise InputError(f"cannot make {name} with {given}: {_explain(name, args, error)}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise InputError(f"cannot fetch the published weights of {name}: {error}") from error


def _explain(name: str, args: Mapping[str, Any], error: Exception) -> str:
    """Say which arguments a model does not know, or which are no sequences where it takes some."""
    if not isinstance(error, TypeError):
        return str(error)
    with torch.device("meta"):
        kind = type(timm.create_model(name))
    known = inspect.signature(kind).parameters
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        near = difflib.get_close_matches(unknown[1], known, n=4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"{kind.__name__} has no argument {unknown[1]}{hint}"
    for key, value in args.items():
        default = known[key].default if key in known else None
        if isinstance(default, tuple | list) and not isinstance(value, tuple | list):
            return f"{key} takes several values, such as {key}={str(default).replace(' ', '')}"
    return f"a value is of the wrong type ({error})"


def default_cfg(name: str) -> Any:
    """Timm's description of a model and its published weights.

    Raises:
        InputError: timm does not know the model.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"unknown model {name}{hint or '; vision-ssm models lists ours, timm.list_models() all'}")
    known = timm.get_pretrained_cfg(name)
    if known is None:
        raise InputError(f"{architecture} has no pretrained tag {name.partition('.')[2]}")
    return known


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint of the model; every key has to match. No code in the file is ever run.

    Raises:
        InputError: The file cannot be read, or belongs to another model; names a few of the differing keys.
    """
    _load(model, _read(path), path)


def create_from_file(
    name: str, args: Mapping[str, Any], num_classes: int, path: Path, classes: tuple[str, ...] | None = None
) -> nn.Module:
    """A model that starts from a checkpoint file, ours or a published one, with a new classifier for other classes.

    Args:
        name: timm's name of the model.
        args: Its keyword arguments.
        num_classes: Number of its classes.
        path: The file.
        classes: Their names. As many classes of other names in the file of a run are other classes.

    Raises:
        InputError: The file cannot be read or does not fit.
    """
    model, state = create_model(name, args, num_classes), _read_for(name, path)
    wanted = model.state_dict()
    head = [key for key in wanted if key.startswith(_head_prefixes(model))]
    others = classes is not None and _classes_in(path) not in (None, classes)
    if others or any(key in state and state[key].shape != wanted[key].shape for key in head):
        state |= {key: wanted[key] for key in head}
    _load(model, state, path)
    return model


def create_for_evaluation(name: str, path: Path | None) -> nn.Module:
    """A model with as many outputs as its weights have: those in a checkpoint file, or the published ones.

    Raises:
        InputError: The model is unknown, has no published weights, or the file cannot be read or does not fit.
    """
    known = default_cfg(name)
    if path is None:
        return create_model(name, {}, known.num_classes, pretrained=True)
    state = _read_for(name, path)
    heads = [known.classifier] if isinstance(known.classifier, str) else list(known.classifier or ())
    weight = next((state[f"{head}.weight"] for head in heads if f"{head}.weight" in state), None)
    model = create_model(name, {}, known.num_classes if weight is None else len(weight))
    _load(model, state, path)
    return model


def _read_for(name: str, path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file, under our names."""
    state = _read(path)
    # Where there is no conversion, the names can only be the model's own.
    return convert_official(name, state) if can_convert(name) else state


def _classes_in(path: Path) -> tuple[str, ...] | None:
    try:
        return read_spec(path).classes
    except InputError:  # the file of somebody else
        return None


@torch.no_grad()
def check_takes(model: nn.Module, name: str, size: int) -> None:
    """Refuse an image size that a model cannot work with; leaves the model in training mode.

    Raises:
        InputError: The model fails on an image of that size.
    """
    try:
        model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{name} cannot take images of {size}x{size}; try another --image-size ({reason})") from error
    model.train()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"no such checkpoint file: {path}")
    return load_checkpoint_file(path)


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        load_strict(model, state)
    except CheckpointError as error:
        raise InputError(f"{path}: {error}") from None


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))


def save_classifier(path: Path, weights: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Write weights (the model's state) and `spec` into one safetensors file, whole or not at all.

    Raises:
        OSError: The disk is full, say.
    """
    # Cloned, because safetensors refuses tensors that share memory.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    metadata = {_METADATA_KEY: json.dumps(dataclasses.asdict(spec))}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def read_spec(path: Path) -> ModelSpec:
    """The `ModelSpec` inside a weights file that `save_classifier` wrote.

    Raises:
        InputError: The file is missing, damaged or was written by something else.
    """
    if not path.is_file():
        raise InputError(f"no such weights file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})[_METADATA_KEY])
        for name in ("classes", "mean", "std"):
            values[name] = tuple(values[name])
        return ModelSpec(**values)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} was not written by a vision-ssm run, or is damaged") from error

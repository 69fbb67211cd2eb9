"""What detection and segmentation have in common: a backbone with something on it."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from vision_ssm.checkpoints import CheckpointError
from vision_ssm.data import Images, seeded
from vision_ssm.engine.run_folder import weights_file
from vision_ssm.engine.weights import load_weights, read_metadata, read_weights, stored_metadata
from vision_ssm.errors import InputError, shorten
from vision_ssm.models.create import default_cfg
from vision_ssm.recipes.config import Config, DenseConfig, check_longer_first, limited

_logger = logging.getLogger(__name__)

_WEIGHTS = 3  # keeps the draws of the first weights apart from those of data and steps


@dataclass(frozen=True, kw_only=True)
class DenseSpec(Config):
    """Backbone, classes and input of a model."""

    model: str
    """timm's name of the backbone."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""
    out_indices: tuple[int, ...] | None = limited(None, least=0)
    """Which of its maps are used; by default the last ones."""
    width: int = limited(256, least=1, most=4096)
    """Channels of what is on it."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the outputs."""
    test_size: tuple[int, int]
    """Longest and shortest side of the resized image: the largest that fits into both."""
    mean: tuple[float, float, float] = limited((0.485, 0.456, 0.406))
    """Channel means, of values from 0 to 1."""
    std: tuple[float, float, float] = limited((0.229, 0.224, 0.225), above=0)
    """Channel standard deviations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise InputError(f"class {shorten(twice)} is named twice")
        check_longer_first(self.test_size)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of a wide image that fits exactly."""
        return self.test_size[1], self.test_size[0]

    def at_size(self, size: int) -> "DenseSpec":
        """The same with another shortest side of the resized image, and a longest one in proportion.

        Raises:
            InputError: It is out of the limits.
        """
        longest, shortest = self.test_size
        return replace(self, test_size=(round(longest * size / shortest), size))

    @staticmethod
    def common(config: DenseConfig, images: Images) -> dict[str, Any]:
        """The values of these fields for a configuration and its training images.

        Raises:
            InputError: timm does not know the backbone.
        """
        known = default_cfg(config.model)
        args = dict(config.model_args)
        if config.drop_path_rate:
            args.setdefault("drop_path_rate", config.drop_path_rate)
        names = ("model", "out_indices", "width", "test_size")
        values = {name: getattr(config, name) for name in names} | {"model_args": args, "classes": images.classes}
        return values | {"mean": tuple(known.mean), "std": tuple(known.std)}


def start_model(
    config: DenseConfig, spec: DenseSpec, create: Callable[..., nn.Module], task: str, kind: str, *, resume: bool
) -> nn.Module:
    """The model that training starts from.

    Args:
        config: Says which weights it starts from.
        spec: Its description.
        create: Makes it of its description, and of the options of `create_detector` for a backbone's first weights.
        task: Name of the task.
        kind: Name of what is on the backbone.
        resume: Whether its weights come from a checkpoint of the run.

    Raises:
        InputError: It cannot be made, or its weights cannot be read or do not fit.
    """
    start: dict[str, Any] = {}
    if isinstance(path := config.backbone_weights, Path) and not resume:
        path = weights_file(path) if path.is_dir() else path
        if (known := stored_metadata(path)) is not None and known["task"] != "classification":
            raise InputError(f"--backbone-weights {path} is of {known['task']}; --pretrained takes the whole")
        if known is not None and known["model"] != config.model:
            raise InputError(f"--backbone-weights {path} is of {known['model']}, not of {config.model}")
        start["backbone_state"] = read_weights(path, config.model)
    elif path is True and not resume:
        start["backbone_pretrained"] = True
    try:
        with seeded(config.seed, _WEIGHTS):  # type: ignore[attr-defined]
            model: Any = create(spec, **start)
    except CheckpointError as error:
        raise InputError(f"--backbone-weights {config.backbone_weights}: {error}") from None
    if config.pretrained is not None and not resume:
        path = weights_file(config.pretrained)
        stored, state, wanted = read_metadata(path), read_weights(path), model.state_dict()
        theirs = stored.get("detector", stored.get("decoder", stored["task"]))
        if (stored["task"], theirs, stored["model"]) != (task, kind, spec.model):
            of = f"{theirs} on {stored['model']}"
            raise InputError(f"--pretrained {path} is of {of}, not of {kind} on {spec.model}")
        others: list[str] = []
        if tuple(stored["classes"]) != spec.classes:
            others = [key for key in wanted if key.startswith(model.class_layers)]
            _logger.warning("%s: the layers that depend on its classes, which differ, were not loaded", path)
        load_weights(model, state | {key: wanted[key] for key in others}, path)
    return model

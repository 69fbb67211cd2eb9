import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vision_ssm.data import Images, Sample, Splits, Transform, seeded
from vision_ssm.data.coco import load_coco, read_coco
from vision_ssm.data.joint import collate, eval_transform, train_transform
from vision_ssm.detectors import create_detector
from vision_ssm.engine.run_folder import weights_file
from vision_ssm.engine.task import Batch, Task
from vision_ssm.engine.weights import load_weights, read_metadata, read_weights
from vision_ssm.errors import InputError, shorten
from vision_ssm.models.create import default_cfg
from vision_ssm.recipes import DetectionConfig
from vision_ssm.recipes.config import Config, limited

if TYPE_CHECKING:
    from rich.console import Console

_logger = logging.getLogger(__name__)

_WEIGHTS = 3  # keeps the draws of the first weights apart from those of data and steps


@dataclass(frozen=True, kw_only=True)
class DetectorSpec(Config):
    """A detector without its weights: all that prediction needs to know, stored in every weights file."""

    detector: str
    """mask-rcnn, faster-rcnn or retinanet."""
    model: str
    """timm's name of the backbone."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the outputs."""
    category_ids: tuple[int, ...]
    """Their numbers in COCO files."""
    test_size: tuple[int, int] = limited((1333, 800), least=32, most=16_384)
    """Longest and shortest side of the resized image: the largest that fits into both."""
    mean: tuple[float, float, float] = limited((0.485, 0.456, 0.406))
    """Channel means, of values from 0 to 1."""
    std: tuple[float, float, float] = limited((0.229, 0.224, 0.225), above=0)
    """Channel standard deviations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise InputError(f"class {shorten(twice)} is named twice")
        if len(self.category_ids) != len(self.classes):
            raise InputError(f"{len(self.classes)} classes have {len(self.category_ids)} category numbers")
        if self.test_size[0] < self.test_size[1]:
            raise InputError(f"--test-size takes the longer side first, got {' '.join(map(str, self.test_size))}")

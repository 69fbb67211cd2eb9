"""Named, typed configurations: what to train and how.

A recipe, called with changes, returns a configuration: `recipes.small(data="photos", epochs=5)`. This package imports
nothing heavy, so that the command line can describe the recipes quickly.
"""

from vision_ssm.errors import InputError, nearest
from vision_ssm.recipes.config import (
    ClassificationConfig,
    DetectionConfig,
    Precision,
    SegmentationConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from vision_ssm.recipes.detection import DETECTION
from vision_ssm.recipes.own import detect, digits, finetune, scratch, segment, small
from vision_ssm.recipes.published import PUBLISHED
from vision_ssm.recipes.recipe import Recipe
from vision_ssm.recipes.segmentation import SEGMENTATION

__all__ = [
    "CONFIGS",
    "RECIPES",
    "ClassificationConfig",
    "DetectionConfig",
    "Precision",
    "Recipe",
    "SegmentationConfig",
    "TrainConfig",
    "detect",
    "digits",
    "find",
    "finetune",
    "from_dict",
    "scratch",
    "segment",
    "small",
    "to_dict",
]

CONFIGS: dict[str, type[TrainConfig]] = {
    config.task: config for config in (ClassificationConfig, DetectionConfig, SegmentationConfig)
}
"""The configuration of each task."""

_OWN = (digits, small, scratch, finetune, detect, segment)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_OWN, *PUBLISHED, *DETECTION, *SEGMENTATION)}
"""All recipes, by name."""


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: There is none.
    """
    if name not in RECIPES:
        raise InputError(f"no recipe {name}{nearest(name, RECIPES, '; vision-ssm recipes lists them')}")
    return RECIPES[name]

"""Named, typed configurations: what to train and how.

A recipe, called with changes, returns a configuration: `recipes.small(data="photos", epochs=5)`. This package imports
nothing heavy, so that the command line can describe the recipes quickly.
"""

from vision_ssm.errors import InputError, nearest
from vision_ssm.recipes.config import ClassificationConfig, Precision, TrainConfig, from_dict, to_dict
from vision_ssm.recipes.own import digits, finetune, scratch, small
from vision_ssm.recipes.published import PUBLISHED
from vision_ssm.recipes.recipe import Recipe

__all__ = [
    "CONFIGS",
    "RECIPES",
    "ClassificationConfig",
    "Precision",
    "Recipe",
    "TrainConfig",
    "digits",
    "find",
    "finetune",
    "from_dict",
    "scratch",
    "small",
    "to_dict",
]

CONFIGS: dict[str, type[TrainConfig]] = {"classification": ClassificationConfig}
"""The configuration of each task."""

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (digits, small, scratch, finetune, *PUBLISHED)}
"""All recipes, by name."""


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: There is none.
    """
    if name not in RECIPES:
        raise InputError(f"no recipe {name}{nearest(name, RECIPES, '; vision-ssm recipes lists them')}")
    return RECIPES[name]

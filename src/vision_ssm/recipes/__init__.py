"""Named, typed configurations: what to train and how.

A recipe, called with changes, returns a configuration: `recipes.small(data="photos", epochs=5)`. This package imports
nothing heavy, so that the command line can describe the recipes quickly.
"""

import difflib

from vision_ssm.errors import InputError
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
        near = difflib.get_close_matches(name, RECIPES, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; vision-ssm recipes lists them"
        raise InputError(f"no recipe {name}{hint}")
    return RECIPES[name]

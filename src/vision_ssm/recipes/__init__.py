"""Named, typed configurations: what to train and how.

A recipe makes a configuration; change it with `dataclasses.replace`. This package imports nothing heavy, so that the
command line can describe the recipes quickly.
"""

import difflib

from vision_ssm.errors import InputError
from vision_ssm.recipes.config import (
    Augmentation,
    DigitsConfig,
    Distillation,
    FolderConfig,
    FolderData,
    Interpolation,
    Optimisation,
    Precision,
    TimmConfig,
    TimmData,
    Tracker,
    TrainConfig,
    from_dict,
    to_dict,
)
from vision_ssm.recipes.own import OWN, digits, finetune, scratch, small
from vision_ssm.recipes.published import PUBLISHED
from vision_ssm.recipes.recipe import Recipe

__all__ = [
    "RECIPES",
    "Augmentation",
    "DigitsConfig",
    "Distillation",
    "FolderConfig",
    "FolderData",
    "Interpolation",
    "Optimisation",
    "Precision",
    "Recipe",
    "TimmConfig",
    "TimmData",
    "Tracker",
    "TrainConfig",
    "digits",
    "find",
    "finetune",
    "from_dict",
    "scratch",
    "small",
    "to_dict",
]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*OWN, *PUBLISHED)}
"""All recipes for folders of images, by name."""


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

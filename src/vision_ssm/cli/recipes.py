import dataclasses
import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from vision_ssm import recipes as library
from vision_ssm.cli.options import parse_options
from vision_ssm.engine.output import make_table, print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import DataConfig, RunConfig, option
from vision_ssm.recipes.recipe import OURS


@dataclass(frozen=True)
class RecipesOptions:
    """List the recipes for training, or show all values of one and where they come from."""

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")] = "*"
    """A recipe to show in full; with wildcards, such as 'vmamba-*', those to list."""
    json: bool = False
    """Print JSON instead of a table."""


def recipes(words: Sequence[str]) -> int:
    """List recipes or show one; `words` follow `vision-ssm recipes`."""
    options = parse_options(RecipesOptions, words, "recipes")
    if not any(mark in options.name for mark in "*?["):
        return _show(library.find(options.name), json=options.json)
    chosen = [recipe for name, recipe in library.RECIPES.items() if fnmatch.fnmatch(name, options.name)]
    if not chosen:
        raise InputError(f"no recipe matches {options.name}; vision-ssm recipes lists all")
    rows = [_row(recipe) for recipe in chosen]
    if options.json:
        print_json(rows)
        return 0
    from rich.console import Console

    console = Console()
    for text, group in itertools.groupby(rows, key=lambda row: row["text"]):
        console.print(f"[bold]{text}[/]", highlight=False)
        shown = [(row["name"], row["model"], _length(row), str(row["batch"]), f"{row['lr']:g}") for row in group]
        if fits := max(len(f"{name}{model}{length}") for name, model, length, *_ in shown) < console.width - 24:
            table = make_table("recipe", "model", ">epochs", ">batch", ">lr")
            table.columns[1].min_width = 22
        else:  # the names of these begin with that of the model
            table = make_table("recipe", ">epochs", ">batch", ">lr")
        table.columns[0].min_width = 26
        for name, model, *numbers in shown:
            table.add_row(name, *([model] if fits else []), *numbers)
        console.print(table)
        console.print()
    console.print(
        "batch: images per step; lr: highest learning rate at that batch.\n"
        "vision-ssm recipes NAME shows all values; vision-ssm train TASK --recipe NAME uses them.",
        style="dim",
        highlight=False,
    )
    return 0


def _length(row: Mapping[str, Any]) -> str:
    return str(row["epochs"]) if row["steps"] is None else f"{row['steps']:,} steps"


def _row(recipe: library.Recipe) -> dict[str, Any]:
    config = recipe()
    batch = config.images_per_step
    lr = config.scaled(batch).lr
    length = dict(epochs=config.epochs if config.steps is None else None, steps=config.steps)
    return dict(name=recipe.name, model=config.model, **length, batch=batch, lr=lr, text=recipe.text)


def _show(recipe: library.Recipe, *, json: bool) -> int:
    groups = [kind for kind in recipe.config.groups if issubclass(kind, (DataConfig, RunConfig))]
    where = {item.name for kind in groups for item in dataclasses.fields(kind)}
    left_out = where - {"data", "seed", "precision", "filter_empty", "ignore_labels"} | {"max_skipped"}
    row = _row(recipe)
    values = {
        name: {"value": value, "source": recipe.sources.get(name)}
        for name, value in library.to_dict(recipe()).items()
        if name not in left_out and (name != "data" or value) and (name != "epochs" or row["epochs"])
    }
    if json:
        print_json({**row, "notes": recipe.notes, "values": values})
        return 0
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.print(f"{recipe.name}: {recipe.text}", style="bold")
    console.print(f"{row['batch']} images per step, highest learning rate {row['lr']:g} at that batch")
    for note in recipe.notes:
        console.print(note)
    for source in dict.fromkeys(entry["source"] for entry in values.values()):
        console.print(f"\n{source or OURS}", style="bold")
        for name, entry in values.items():
            if entry["source"] == source:
                console.print(_words(name, entry["value"]))
    return 0


def _words(name: str, value: Any) -> str:
    """An option and its value, as one would type them."""
    if isinstance(value, bool) and name not in ("pretrained", "backbone_weights"):
        return option(name if value else f"no_{name}")
    if isinstance(value, dict):
        value = [f"{k}={v}" for k, v in value.items()] or "none"
    if isinstance(value, bool):
        value = "" if value else "off"
    values = value if isinstance(value, (list, tuple)) else [value]
    shown = " ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)
    return f"{option(name):<26} {shown}".rstrip()

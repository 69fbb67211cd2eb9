import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from vision_ssm import recipes
from vision_ssm.cli import INTERRUPTED
from vision_ssm.cli.options import parse_options
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import Config

Options = TypeVar("Options")

COMMANDS = {"classify": "small", "digits": "digits", "detect": "detect", "segment": "segment"}
"""The commands of `vision-ssm train`, and the recipes that they use by default."""

_USAGE = """usage: vision-ssm train classify --data PATH [OPTIONS]    an image classifier, on your images
       vision-ssm train detect --data PATH [OPTIONS]      a detector of objects, with masks where the data has them
       vision-ssm train segment --data PATH [OPTIONS]     a segmenter that gives every pixel a class
       vision-ssm train digits [OPTIONS]                  a classifier of embedded digits, in a minute or two
       vision-ssm train --resume RUN                      continue a stopped run at the batch where it stopped

`vision-ssm train classify --help`, or of another task, lists all options.
"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Recipe and folder of the run."""

    recipe: str = "small"
    """Which set of defaults; `vision-ssm recipes` lists them."""
    out: Path | None = None
    """Folder of the run; by default a new one under runs/."""
    overwrite: bool = False
    """Replace the run that is in that folder."""
    resume: Annotated[bool | Path, tyro.conf.arg(help_behavior_hint="(default: off)")] = False
    """Continue the run in this folder (or in --out), with its configuration."""


def train(words: Sequence[str]) -> int:
    """Train a model; `words` follow `vision-ssm train`."""
    command, rest = (words[0], words[1:]) if words and words[0] in COMMANDS else (None, words)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--resume", nargs="?", const=True, default=False)
    peek.add_argument("--out", default=None)
    peek.add_argument("--recipe", default=COMMANDS[command or "classify"])
    peeked, _ = peek.parse_known_args(rest)
    if command is None and not peeked.resume:
        wants_help = not words or words[0] in ("-h", "--help")
        if words and not wants_help and not words[0].startswith("-"):
            raise InputError(f"train what? {', '.join(COMMANDS)}, not {words[0]}")
        (sys.stdout if wants_help else sys.stderr).write(_USAGE)
        return 0 if words and wants_help else 2
    if peeked.resume:
        place = peeked.out if peeked.resume is True else peeked.resume
        if place is None:
            raise InputError("--resume needs the folder of a run")
        default, text = RunFolder(Path(place)).read_config(), f"Continue {place}."
    else:
        recipe = recipes.find(peeked.recipe)
        if recipe.config.task != (task := recipes.find(COMMANDS[command or ""]).config.task):
            raise InputError(f"the recipe {recipe.name} is for {recipe.config.task}, not {task}")
        default = recipe(data="digits") if command == "digits" else recipe()
        text = f"Defaults of the recipe {recipe.name}: {recipe.text}."
    config, run = parse_config(rest, f"train {command or ''}".strip(), default, RunOptions(recipe=peeked.recipe), text)
    return _run(config, run)


def parse_config(
    words: Sequence[str], command: str, default: recipes.TrainConfig, own: Options, text: str
) -> tuple[recipes.TrainConfig, Options]:
    """Parse a configuration whose fields `--help` shows in the groups that they come from.

    Args:
        words: What follows the command.
        command: Its name, such as `train classify`.
        default: Values of what is not given.
        own: Values of the command's own options, which come first.
        text: What the command does.
    """
    fields: list[Any] = [("command", type(own), field(default=own))]
    for kind in default.groups:
        part = kind(**{item.name: getattr(default, item.name) for item in dataclasses.fields(kind)})
        group = next(base for base in kind.__mro__ if Config in base.__bases__).__name__
        fields += [(group.removesuffix("Config").lower(), kind, field(default=part))]
    parsed = parse_options(make_dataclass("Options", fields), words, command, pairs=True, description=text)
    groups = [part for name, part in vars(parsed).items() if name != "command"]
    values = {name: value for part in groups for name, value in vars(part).items()}
    return type(default)(**values), parsed.command


def _run(config: recipes.TrainConfig, run: RunOptions) -> int:
    # Not before the options are known to be right: these imports take seconds.
    from vision_ssm.engine.output import make_console
    from vision_ssm.engine.processes import common_name, process_rank
    from vision_ssm.engine.recorder import Stopped
    from vision_ssm.tasks import train as train_task

    config = absolute(config)
    path = run.resume if isinstance(run.resume, Path) else run.out
    about = {"recipe": run.recipe, "command": shlex.join(["vision-ssm", *sys.argv[1:]])}
    folder = RunFolder(path or Path("runs") / f"{config.model}-{common_name(config)}")
    try:
        train_task(
            config, folder, resume=bool(run.resume), overwrite=run.overwrite, console=make_console(), about=about
        )
    except (Stopped, KeyboardInterrupt) as stop:
        if process_rank(config):
            return 0
        if isinstance(stop, KeyboardInterrupt) and not folder.state.is_file():
            raise
        sys.stderr.write(f"\nStopped. Continue with: vision-ssm train --resume {shlex.quote(str(folder.path))}\n")
        return INTERRUPTED
    return 0


def absolute(config: recipes.TrainConfig) -> recipes.TrainConfig:
    """Make the paths of what exists absolute, so that a run can be resumed and evaluated from another directory."""
    changes: dict[str, Any] = {}
    for name in ("pretrained", "backbone_weights", "data", "val_data", "class_map", "cache_dir", "teacher"):
        value = getattr(config, name, None)
        prefix, _, rest = str(value).partition("/")
        if prefix in ("hfds", "hfids") and Path(rest).exists():
            changes[name] = f"{prefix}/{Path(rest).absolute()}"
        elif isinstance(value, Path):
            changes[name] = value.absolute()
        elif isinstance(value, str) and value and "://" not in value and (Path(value).exists() or ".tar" in value):
            changes[name] = str(Path(value).absolute())
    return dataclasses.replace(config, **changes)

import argparse
import dataclasses
import shlex
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vision_ssm import recipes
from vision_ssm.cli import INTERRUPTED
from vision_ssm.cli.options import parse_options
from vision_ssm.errors import InputError
from vision_ssm.tasks.run_folder import KINDS, RunFolder

_USAGE = """usage: vision-ssm train digits [OPTIONS]
       vision-ssm train folder --data.root DIR [OPTIONS]
       vision-ssm train timm --data.root DIR [--data.dataset hfds/NAME|hfids/NAME|wds/] [OPTIONS]
       vision-ssm train --resume RUN

  digits    scikit-learn's handwritten digits, about a minute on two cores
  folder    your images, one sub-folder per class
  timm      tar files, webdataset shards or Hugging Face datasets, named as timm names them
  --resume  continue a stopped run at the batch where it stopped

`vision-ssm train digits --help`, and so on, lists all options.
"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run is kept."""

    out: Path | None = None
    """Folder of the run; otherwise a new one under runs/."""
    overwrite: bool = False
    """Replace the run that is in that folder."""
    resume: Annotated[bool | Path, tyro.conf.arg(help_behavior_hint="(default: off)")] = False
    """Continue the run in this folder (or in --out), with its configuration."""


@dataclass(frozen=True, kw_only=True)
class FolderOptions(RunOptions):
    """Where the run is kept, and what to start from."""

    recipe: str = "small"
    """Which set of defaults; `vision-ssm recipes` lists them."""


@dataclass(frozen=True)
class _Digits:
    config: Annotated[recipes.DigitsConfig, tyro.conf.arg(name="")]
    run: Annotated[RunOptions, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class _Folder:
    config: Annotated[recipes.FolderConfig, tyro.conf.arg(name="")]
    run: Annotated[FolderOptions, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class _Timm:
    config: Annotated[recipes.TimmConfig, tyro.conf.arg(name="")]
    run: Annotated[FolderOptions, tyro.conf.arg(name="")]


def train(words: Sequence[str]) -> int:
    """Train a classifier; `words` follow `vision-ssm train`."""
    kind, rest = (words[0], words[1:]) if words and words[0] in KINDS else (None, words)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--resume", nargs="?", const=True, default=False)
    peek.add_argument("--out", default=None)
    peek.add_argument("--recipe", default="small")
    peeked, _ = peek.parse_known_args(rest)
    if kind is None and not peeked.resume:
        wants_help = not words or words[0] in ("-h", "--help")
        if words and not wants_help and not words[0].startswith("-"):
            raise InputError(f"train on what? {', '.join(KINDS)}, not {words[0]}")
        (sys.stdout if wants_help else sys.stderr).write(_USAGE)
        return 0 if words and wants_help else 2
    saved: recipes.TrainConfig | None = None
    if peeked.resume:
        place = peeked.out if peeked.resume is True else peeked.resume
        if place is None:
            raise InputError("--resume needs the folder of a run")
        saved = RunFolder(Path(place)).read_config()
        kind = kind or next(name for name, each in KINDS.items() if isinstance(saved, each))
    parsed = _parse(kind or "digits", rest, saved, peeked.recipe)
    return _run(parsed.config, parsed.run)


def _parse(
    kind: str, words: Sequence[str], saved: recipes.TrainConfig | None, recipe: str
) -> _Digits | _Folder | _Timm:
    registry = ConstructorRegistry()
    registry.primitive_rule(_flag_or_path)
    command = f"train {kind}"
    options: dict[str, Any] = {"registry": registry, "pairs": True}
    if kind == "digits":
        digits = saved if isinstance(saved, recipes.DigitsConfig) else recipes.digits()
        default = _Digits(digits, RunOptions())
        return parse_options(_Digits, words, command, default=default, description=recipes.digits.__doc__, **options)
    chosen = recipes.find(recipe)
    text = f"Defaults of the recipe {recipe}: {chosen.text}."
    if kind == "timm":
        same = {f.name: getattr(chosen.make(Path()), f.name) for f in dataclasses.fields(recipes.TrainConfig)}
        config = saved if isinstance(saved, recipes.TimmConfig) else recipes.TimmConfig(data=recipes.TimmData(), **same)
        text = f"Train on tar files, webdataset shards or Hugging Face datasets.\n\n{text}"
        default_timm = _Timm(config, FolderOptions())
        return parse_options(_Timm, words, command, default=default_timm, description=text, **options)
    folder = saved if isinstance(saved, recipes.FolderConfig) else chosen.make(tyro.MISSING)
    text = f"Train on image folders, one sub-folder per class.\n\n{text}"
    default_folder = _Folder(folder, FolderOptions())
    return parse_options(_Folder, words, command, default=default_folder, description=text, **options)


def _run(config: recipes.TrainConfig, run: RunOptions) -> int:
    # Not before the options are known to be right: these imports take seconds.
    from rich.console import Console

    from vision_ssm.tasks.processes import common_name, process_rank
    from vision_ssm.tasks.recorder import Stopped
    from vision_ssm.tasks.train import train as train_classifier

    config = _absolute(config)
    path = run.resume if isinstance(run.resume, Path) else run.out
    if path is None:
        name = common_name(config)
        if name is None:
            raise InputError("on several machines, say --out DIR: all processes have to know the folder of the run")
        path = Path("runs") / f"{config.model}-{name}"
    folder = RunFolder(path)
    try:
        train_classifier(config, folder, resume=bool(run.resume), overwrite=run.overwrite, console=Console())
    except (Stopped, KeyboardInterrupt) as stop:
        if process_rank(config):
            return 0
        if isinstance(stop, KeyboardInterrupt) and not folder.state.is_file():
            raise
        sys.stderr.write(f"\nStopped. Continue with: vision-ssm train --resume {shlex.quote(str(path))}\n")
        return INTERRUPTED
    return 0


def _absolute(config: recipes.TrainConfig) -> recipes.TrainConfig:
    """Make paths absolute, so that a run can be resumed and evaluated from another directory."""
    if isinstance(config.pretrained, Path):
        config = dataclasses.replace(config, pretrained=config.pretrained.absolute())
    if config.distill.teacher and Path(config.distill.teacher).exists():
        teacher = str(Path(config.distill.teacher).absolute())
        config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, teacher=teacher))
    if isinstance(config, recipes.FolderConfig):
        val = config.data.val.absolute() if config.data.val else None
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, root=config.data.root.absolute(), val=val)
        )
    if isinstance(config, recipes.TimmConfig):
        root, classes = config.data.root, config.data.classes
        prefix, _, name = config.data.dataset.partition("/")
        local = prefix in ("hfds", "hfids") and Path(name).exists()
        data = dataclasses.replace(
            config.data,
            dataset=f"{prefix}/{Path(name).absolute()}" if local else config.data.dataset,
            root=root.absolute() if root else None,
            classes=classes.absolute() if isinstance(classes, Path) else classes,
        )
        config = dataclasses.replace(config, data=data)
    return config


def _flag_or_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | Path] | None:
    """A flag that may be followed by a path, or by `off`."""
    if set(typing.get_args(info.type)) != {bool, Path}:
        return None

    def parse(words: list[str]) -> bool | Path:
        if len(words) > 1:
            raise ValueError(f"expected one path, not {' '.join(words)}")
        if words == ["off"]:
            return False
        return Path(words[0]) if words else True

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[PATH|off]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, (bool, Path)),
        str_from_instance=lambda value: [str(value) if isinstance(value, Path) else "off"],
    )

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.cli.subjects import load_subject
from vision_ssm.engine.output import make_console
from vision_ssm.engine.run_folder import RunFolder
from vision_ssm.errors import InputError, printable
from vision_ssm.recipes.config import Config


@dataclass(frozen=True, kw_only=True)
class HubOptions(Config):
    """Write a classifier as timm's push_to_hub does: config.json, model.safetensors and a model card of its run."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="RUN|MODEL")]
    """A run, or a weights file of one; or a model."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The folder to write; its name becomes that of the model."""


def hub(words: Sequence[str]) -> int:
    """Write a folder for the Hugging Face Hub; `words` follow `vision-ssm export hub`."""
    options: HubOptions = parse_options(HubOptions, words, "export hub")
    out = options.out
    if not out.absolute().parent.is_dir():
        raise InputError(f"no such folder: {out.parent}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; name a new folder")
    if options.model.endswith("=random"):
        raise InputError(f"{options.model} has new weights, which are nothing to share; give a run or NAME=FILE")
    from vision_ssm.export.hub import write_hub_folder
    from vision_ssm.tasks.classification import Classification

    subject = load_subject(options.model, "cpu")
    if not isinstance(subject.task, Classification):
        raise InputError(
            f"{options.model} is of {subject.task.name}, and timm's format is for classifiers; upload its weights "
            f"file, {subject.file}, itself: vision_ssm.load reads it"
        )
    run = RunFolder(subject.run) if subject.run is not None and RunFolder(subject.run).is_run() else None
    best = run is not None and subject.file == run.best
    write_hub_folder(out, subject.task, run, best=best, published=subject.file is None and "=" not in options.model)
    name = shlex.quote(printable(str(out)))
    size = (out / "model.safetensors").stat().st_size / 1e6
    make_console().out(f"{name}, {size:.1f} MB; upload it with: hf upload OWNER/NAME {name}", highlight=False)
    return 0

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import run_named
from vision_ssm.cli.subjects import load_subject
from vision_ssm.engine.output import make_console, make_table, print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import Config

if TYPE_CHECKING:
    from rich.status import Status

    from vision_ssm.engine.task import Task
    from vision_ssm.export.outputs import Comparison

FORMATS = {
    "onnx": ("onnx:onnx", "an ONNX file for images and batches of any size; --int8, --features"),
    "program": (
        "program:program",
        "a torch.export program; --compiled by AOTInductor for torch alone; --features",
    ),
    "hub": ("hub:hub", "a folder as timm's push_to_hub writes it, with a model card of the run"),
}
"""Name of each format: where its function is in this package, and what it writes."""


def export(words: Sequence[str]) -> int:
    """Write a model in one format; `words` follow `vision-ssm export`."""
    models = (
        "RUN is the folder or a weights file of a run; MODEL is a timm name with its published weights,\n"
        "NAME=FILE with those of a file, or NAME=random."
    )
    return run_named("export", "FORMAT MODEL|RUN OUT", FORMATS, words, models)


@dataclass(frozen=True, kw_only=True)
class FileOptions(Config):
    """A model, and the file to write of it."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL|RUN")]
    """A model or run."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The file to write; an existing one is replaced."""
    features: bool = False
    """Give the maps of the stages, those of the backbone of a detector or segmenter, instead of the result."""
    json: bool = False
    """Print JSON instead of a table."""

    def check_out(self, suffix: str) -> None:
        """Refuse a file of another kind or in no folder.

        Raises:
            InputError: It is one.
        """
        if self.out.suffix != suffix:
            raise InputError(f"the file to write must end in {suffix}, got {self.out}")
        if not self.out.absolute().parent.is_dir():
            raise InputError(f"no such folder: {self.out.parent}")


def load_model(word: str) -> tuple["Task", tuple[int, int], bool]:
    """The model to write, height and width of an image that it takes, and whether it takes no other.

    Raises:
        InputError: There is no such model.
    """
    task = load_subject(word, "cpu").task
    cfg: Any = getattr(task.model, "pretrained_cfg", None) or {}
    size = task.spec.input_size if task.name == "classification" else (128, 160)
    return task, size, bool(cfg.get("fixed_input_size"))


def progress(options: FileOptions) -> "Status":
    """A line that moves while the file is made; entering it shows it."""
    return make_console(stderr=True).status(f"writing {options.out.name}, and comparing it with the model")


def check_same(rows: Sequence["Comparison"]) -> None:
    """Refuse a file that computes something else than the model.

    Raises:
        InputError: It does.
    """
    from vision_ssm.export.outputs import TOLERANCE

    worst = max(rows, key=lambda row: row.difference)
    if not worst.difference <= TOLERANCE:
        raise InputError(
            f"not written: on images {'x'.join(map(str, worst.shape))} the file differs from the model by "
            f"{worst.difference:.1e} of its outputs' range, more than {TOLERANCE:.0e}"
        )


def report(options: FileOptions, images: str, rows: Sequence["Comparison"]) -> int:
    """Print what was written.

    Args:
        options: Name the file.
        images: Which ones it takes.
        rows: How far it is from the model.
    """
    facts = {"file": str(options.out), "MB": round(options.out.stat().st_size / 1e6, 2), "images": images}
    checks = [{"images": "×".join(map(str, row.shape)), "difference": row.difference} for row in rows]
    if options.json:
        print_json({**facts, "checks": checks})
        return 0
    table = make_table("images", ">difference from the model, of the range of its outputs")
    for check in checks:
        table.add_row(check["images"], f"{check['difference']:.1e}")
    console = make_console()
    console.print(table, markup=False)
    for name, value in facts.items():
        console.out(f"{name:<12} {value}", highlight=False)
    return 0

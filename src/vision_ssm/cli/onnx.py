from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.cli.subjects import load_subject
from vision_ssm.engine.output import make_console, make_table, print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import Config


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(Config):
    """Write a model as an ONNX file in standard operators, and compare it with the model in ONNX Runtime."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL|RUN")]
    """A model or run."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT.onnx")]
    """The file to write."""
    features: bool = False
    """Give the maps of the stages, those of the backbone of a detector or segmenter, instead of the result."""
    int8: bool = False
    """Compute linear layers and convolutions of a classifier or segmenter in int8; `vision-ssm eval OUT.onnx` tells its
    accuracy and speed."""
    json: bool = False
    """Print JSON instead of a table."""


def onnx(words: Sequence[str]) -> int:
    """Write an ONNX file; `words` follow `vision-ssm export onnx`."""
    options: OnnxOptions = parse_options(OnnxOptions, words, "export onnx")
    if options.out.suffix != ".onnx":
        raise InputError(f"the file to write must end in .onnx, got {options.out}")
    if not options.out.absolute().parent.is_dir():
        raise InputError(f"no such folder: {options.out.parent}")
    if options.features and options.int8:
        raise InputError("--int8 is for classifiers and segmenters, and excludes --features")
    from vision_ssm.engine.files import atomic_write
    from vision_ssm.engine.weights import to_metadata
    from vision_ssm.export.onnx import TOLERANCE, Outputs, check_shapes, compare, quantize, to_onnx

    task = load_subject(options.model, "cpu").task
    if options.int8 and task.onnx_output is None:
        raise InputError(f"--int8 is for classifiers and segmenters, and {options.model} is of {task.name}")
    outputs = Outputs(task, features=options.features)
    cfg: Any = getattr(task.model, "pretrained_cfg", None) or {}
    fixed = bool(cfg.get("fixed_input_size"))
    size = task.spec.input_size if task.name == "classification" else (128, 160)
    content = to_onnx(outputs, size, to_metadata(task.name, task.spec), fixed=fixed)
    rows = compare(content, outputs, check_shapes(size, fixed))
    worst = max(rows, key=lambda row: row.difference)
    if not worst.difference <= TOLERANCE:
        raise InputError(
            f"not written: on images {'x'.join(map(str, worst.shape))} the file differs from the model by "
            f"{worst.difference:.1e} of its outputs' range, more than {TOLERANCE:.0e}"
        )
    if options.int8:
        content = quantize(content)
        rows = compare(content, outputs, check_shapes(size, fixed))
    with atomic_write(options.out) as file:
        file.write(content)
    sizes = "one size" if fixed else "any height and width"
    facts = {"file": str(options.out), "MB": round(len(content) / 1e6, 2), "images": f"any batch, {sizes}"}
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

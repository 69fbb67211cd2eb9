import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.cli.subjects import AnalysisOptions, Subject, choose_images, load_subject
from vision_ssm.engine.output import make_console, make_table, print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import Config, limited

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 16  # images measured at a time for int8


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
    """Compute linear layers and convolutions of a classifier or segmenter in int8."""
    data: Path | None = None
    """For --int8: images, or a folder of them, to measure the range of activations on; by default the validation images
    of the run."""
    images: int = limited(128, least=1)
    """For --int8: how many of them, spread evenly over those there are."""
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
    if options.data is not None and not options.int8:
        raise InputError(f"--data {options.data} belongs to --int8")
    from vision_ssm.engine.files import atomic_write
    from vision_ssm.engine.weights import to_metadata
    from vision_ssm.export.onnx import TOLERANCE, Outputs, check_shapes, compare, to_onnx

    subject = load_subject(options.model, "cpu")
    task = subject.task
    if options.int8 and task.onnx_output is None:
        raise InputError(f"--int8 is for classifiers and segmenters, and {options.model} is of {task.name}")
    batches = _batches(options, subject) if options.int8 else []
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
    quantized: dict[str, Any] = {}
    if options.int8:
        content, quantized = _quantize(content, batches)
    with atomic_write(options.out) as file:
        file.write(content)
    sizes = "one size" if fixed else "any height and width"
    facts = {"file": str(options.out), "MB": round(len(content) / 1e6, 2), "images": f"any batch, {sizes}", **quantized}
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


def _batches(options: OnnxOptions, subject: Subject) -> list["Tensor"]:
    from vision_ssm.analysis.inputs import input_batches

    images = choose_images(AnalysisOptions(data=options.data, images=options.images), [subject])
    return list(input_batches(subject.task, images, _BATCH))


def _quantize(content: bytes, batches: Sequence["Tensor"]) -> tuple[bytes, dict[str, Any]]:
    """The content of an int8 file, and how it compares with that of the file in float32 on the same images."""
    import numpy as np

    from vision_ssm.engine.onnx_model import open_session
    from vision_ssm.export.onnx import INPUT, quantize

    files = content, quantize(content, batches)
    answers, seconds = [], []
    for each in files:
        session, start = open_session(each), time.perf_counter()
        answers.append([session.run(None, {INPUT: batch.numpy()})[0].argmax(1) for batch in batches])
        seconds.append(time.perf_counter() - start)
    same = np.mean(np.concatenate([(a == b).ravel() for a, b in zip(*answers, strict=True)]))
    return files[1], {"same answers": f"{same:.1%}", "time of int8": f"{seconds[1] / seconds[0]:.2f} of float32's"}

from collections.abc import Sequence
from dataclasses import dataclass

from vision_ssm.cli.export import FileOptions, check_same, load_model, progress, report
from vision_ssm.cli.options import parse_options
from vision_ssm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(FileOptions):
    """Write a model as an ONNX file in standard operators, and compare it with the model in ONNX Runtime."""

    int8: bool = False
    """Compute linear layers and convolutions of a classifier or segmenter in int8; `vision-ssm eval OUT.onnx` measures
    the accuracy."""


def onnx(words: Sequence[str]) -> int:
    """Write an ONNX file; `words` follow `vision-ssm export onnx`."""
    options: OnnxOptions = parse_options(OnnxOptions, words, "export onnx")
    options.check_out(".onnx")
    if options.features and options.int8:
        raise InputError("--int8 is for classifiers and segmenters, and excludes --features")
    from vision_ssm.engine.files import atomic_write
    from vision_ssm.engine.weights import to_metadata
    from vision_ssm.export.onnx import quantize, run_onnx, to_onnx
    from vision_ssm.export.outputs import Outputs, check_shapes, compare

    task, size, fixed = load_model(options.model)
    if options.int8 and task.onnx_output is None:
        raise InputError(f"--int8 is for classifiers and segmenters, and {options.model} is of {task.name}")
    outputs, shapes = Outputs(task, features=options.features), check_shapes(size, fixed)
    with progress(options):
        content = to_onnx(outputs, size, to_metadata(task.name, task.spec), fixed=fixed)
        rows = compare(run_onnx(content), outputs, shapes)
        check_same(rows)
        if options.int8:
            content = quantize(content)
            rows = compare(run_onnx(content), outputs, shapes)
    with atomic_write(options.out) as file:
        file.write(content)
    return report(options, f"any batch, {'one size' if fixed else 'any height and width'}", rows)

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vision_ssm.cli.export import FileOptions, check_same, load_model, progress, report
from vision_ssm.cli.options import Size, height_and_width, parse_options
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import limited


@dataclass(frozen=True, kw_only=True)
class ProgramOptions(FileOptions):
    """Write a model as a program of torch.export, which runs after `import vision_ssm.scan`, and compare it."""

    compiled: bool = False
    """Compile with AOTInductor instead, for images of one shape: a package that needs torch's library alone. Takes
    minutes and a C++ compiler."""
    size: Size = ()
    """With --compiled: height and width of the images."""
    batch_size: int = limited(1, least=1)
    """With --compiled: how many images at a time."""


def program(words: Sequence[str]) -> int:
    """Write a program; `words` follow `vision-ssm export program`."""
    options: ProgramOptions = parse_options(ProgramOptions, words, "export program")
    options.check_out(".pt2")
    if not options.compiled and (options.size or options.batch_size != 1):
        raise InputError("--size and --batch-size belong to --compiled; a program takes images of any size and batch")
    from vision_ssm.engine.files import temporary
    from vision_ssm.engine.weights import to_metadata
    from vision_ssm.export.outputs import Outputs, check_shapes, compare
    from vision_ssm.export.program import compile_package, run_package, run_program, save_program

    task, size, fixed = load_model(options.model)
    outputs, metadata = Outputs(task, features=options.features), to_metadata(task.name, task.spec)
    part, waiting = temporary(options.out).with_suffix(".pt2"), progress(options)  # torch insists on the suffix
    try:
        waiting.start()
        if options.compiled:
            height, width = height_and_width(options.size, size)
            if min(height, width) < 32:
                raise InputError(f"--size must be at least 32, got {height} {width}")
            shape = (options.batch_size, 3, height, width)
            compile_package(outputs, shape, part, metadata)
            images, rows = "×".join(map(str, shape)), compare(run_package(part), outputs, [shape])
        else:
            save_program(outputs, size, part, metadata, fixed=fixed)
            images = f"any batch, {'one size' if fixed else 'any height and width'}"
            rows = compare(run_program(part), outputs, check_shapes(size, fixed))
        check_same(rows)
        os.replace(part, options.out)
    finally:
        waiting.stop()
        part.unlink(missing_ok=True)
    return report(options, images, rows)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import Size, height_and_width, parse_options
from vision_ssm.cli.subjects import AnalysisOptions, choose_images, load_subjects, write_result
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import limited


@dataclass(frozen=True, kw_only=True)
class ERFOptions(AnalysisOptions):
    """Effective receptive fields: which pixels the centers of the stages' maps depend on, and how much."""

    models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL|RUN...")]
    """Models or runs."""
    stages: Annotated[tuple[int, ...], tyro.conf.arg(metavar="STAGE...")] = ()
    """Stages, counted from 0, or negative from the last; all by default."""
    size: Size = limited((), least=1)  # noqa: RUF009
    """Resize the input to this; by default it is what evaluation takes, and of detectors and segmenters the size of the
    first image."""
    normalization: Literal["none", "max", "sum"] = "max"
    """What a field is divided by."""
    batch_size: int = limited(8, least=1)
    """Images per step."""


def erf(words: Sequence[str]) -> int:
    """Measure receptive fields; `words` follow `vision-ssm analyze erf`."""
    options: ERFOptions = parse_options(ERFOptions, words, "analyze erf")
    from vision_ssm.analysis.fields import ERF, Field, effective_receptive_field
    from vision_ssm.analysis.inputs import input_batches

    size = height_and_width(options.size, ()) if options.size else None
    subjects = load_subjects(options.models, options.device)
    images = choose_images(options, subjects)
    fields: list[Field] = []
    for subject in subjects:
        batches = input_batches(subject.task, images, options.batch_size, size)
        how: dict[str, Any] = dict(normalization=options.normalization, name=subject.name)
        try:
            fields += effective_receptive_field(subject.model, batches, options.stages or None, **how).fields
        except (RuntimeError, AssertionError) as error:
            if size is None:
                raise
            raise InputError(f"{subject.name} fails on images of {size[0]}x{size[1]}: {error}") from error
    return write_result(ERF(tuple(fields), options.normalization), options, "erf")

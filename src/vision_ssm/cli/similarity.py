from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.cli.subjects import AnalysisOptions, choose_images, load_subjects, write_result
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import limited


@dataclass(frozen=True, kw_only=True)
class CKAOptions(AnalysisOptions):
    """How similar the outputs of blocks are, within a model or between two: centered kernel alignment."""

    models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL|RUN [MODEL|RUN]")]
    """One model or run, or two."""
    batch_size: int = limited(32, least=4)
    """Images that are compared with one another; memory grows with this alone."""


def cka(words: Sequence[str]) -> int:
    """Compare blocks; `words` follow `vision-ssm analyze cka`."""
    options: CKAOptions = parse_options(CKAOptions, words, "analyze cka")
    if len(options.models) not in (1, 2):
        raise InputError(f"analyze cka takes one or two models or runs, got {len(options.models)}")
    from vision_ssm.analysis.inputs import input_batches
    from vision_ssm.analysis.similarity import cka as measure

    subjects = load_subjects(options.models, options.device)
    images = choose_images(options, subjects)
    if len(images) < 4:
        raise InputError(f"CKA needs at least 4 images, got {len(images)}")
    if (rest := len(images) % options.batch_size) < 4:
        images = images.subset(range(len(images) - rest))  # too few for a batch
    first, last = subjects[0], subjects[-1]
    batches = input_batches(first.task, images, options.batch_size)
    if first is last:
        result = measure(first.model, batches, names=(first.name, first.name))
    else:
        others = input_batches(last.task, images, options.batch_size)
        result = measure(first.model, batches, last.model, others, names=(first.name, last.name))
    return write_result(result, options, "cka", result.nearest())

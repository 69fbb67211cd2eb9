from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from vision_ssm.cli import warn
from vision_ssm.cli.options import Integers, parse_options
from vision_ssm.cli.subjects import AnalysisOptions, labeled_images, load_subjects
from vision_ssm.engine.output import make_console, make_table, print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import limited

if TYPE_CHECKING:
    from vision_ssm.analysis.resolution import ResolutionPoint


@dataclass(frozen=True, kw_only=True)
class ResolutionOptions(AnalysisOptions):
    """Measure accuracy (or AP, or mIoU), time and memory at resolutions other than that of training."""

    models: Annotated[
        Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL|RUN...", help_behavior_hint="(required)")
    ]
    """Folders of runs, weights files of them, or timm names: NAME or NAME=FILE; with =random at the end, with random
    weights."""
    data: Path | None = None
    """Labeled images, as `vision-ssm eval` takes them: class folders, or for detectors and segmenters a data set; by
    default the validation images of each run."""
    images: int | None = limited(None, least=1)  # type: ignore[assignment]
    """How many labeled images to measure on, spread evenly over those there are; by default all."""
    sizes: Integers = limited((128, 160, 192, 224, 256, 320, 384, 512, 640, 768), least=1)  # noqa: RUF009
    """Sides of the images in pixels; the shortest sides for detectors and segmenters."""
    batch: int = limited(1, least=1)
    """Images per step when time and memory are measured."""
    seconds: float = limited(1.0, above=0)
    """Time every step for at least this long."""
    batch_size: int | None = limited(None, least=1)
    """Batch size of the evaluation: by default 64, and 1 for detectors and segmenters."""
    num_workers: int | None = limited(None, least=0, most=1024)
    """Processes that load images."""


def resolution(words: Sequence[str]) -> int:
    """Measure models at several sizes; `words` follow `vision-ssm analyze resolution`."""
    options: ResolutionOptions = parse_options(ResolutionOptions, words, "analyze resolution")
    if not options.sizes:
        raise InputError("--sizes takes at least one size, such as 224")
    from vision_ssm.analysis.resolution import measure_resolutions

    subjects = load_subjects(options.models, options.device)
    models = {each.name: (each.task, labeled_images(each, options.data, options.images)) for each in subjects}
    if len(models) < len(subjects):
        raise InputError(f"models of one name cannot be told apart: {', '.join(each.name for each in subjects)}")
    console = make_console(stderr=options.json)

    def report(point: "ResolutionPoint") -> None:
        if point.error:
            warn(f"{point.model} fails at {point.size}: {point.error}")

    how = dict(batch=options.batch, seconds=options.seconds, batch_size=options.batch_size, workers=options.num_workers)
    with console.status("measuring"):
        result = measure_resolutions(models, sorted(set(options.sizes)), on_point=report, **how)  # type: ignore[arg-type]
    options.out.mkdir(parents=True, exist_ok=True)
    files = result.save(options.out / "resolution")
    rows = result.rows()
    if options.json:
        print_json({"rows": rows, "files": [*map(str, files)]})
        return 0
    table = make_table("model", ">size", f">{result.metric.replace('_', ' ')}", ">ms per image", ">peak MiB")
    for row in rows:
        size = f"{row['size']}{'*' if row['size'] == row['own_size'] else ''}"
        cells = "failed", "-", "-"
        if not row["error"]:
            memory = row["peak_memory_mib"]
            memory = "-" if memory is None else f"{memory:,.2f}"
            cells = f"{row[result.metric]:.1%}", f"{row['milliseconds_per_image']:,.1f}", memory
        table.add_row(row["model"], size, *cells)
    console.print(table)
    console.out("* the model's own size; memory is beyond weights and images", highlight=False)
    console.out("\n".join(map(str, files)), highlight=False)
    return 0

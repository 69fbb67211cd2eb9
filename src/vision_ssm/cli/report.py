from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.engine.output import make_console
from vision_ssm.engine.run_folder import RunFolder, weights_file
from vision_ssm.errors import InputError, printable
from vision_ssm.recipes.config import Config, limited


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Config):
    """Write a report of one or more runs: one HTML file that needs neither a network nor other files."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="(required)")]
    """Folders of runs; several are compared first."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("report.html")
    """The file to write."""
    data: Path | None = None
    """Images to measure all runs on, as for vision-ssm eval; by default each run's own validation images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    num_workers: int | None = limited(None, least=0, most=1024)
    """Processes that load images."""


def report(words: Sequence[str]) -> int:
    """Write a report of runs; `words` follow `vision-ssm report`."""
    options: ReportOptions = parse_options(ReportOptions, words, "report")
    if not options.runs:
        raise InputError("name at least one folder of a run, such as runs/x")
    if not options.out.parent.is_dir():
        raise InputError(f"no such folder: {options.out.parent}")
    if options.out.is_dir():
        raise InputError(f"{options.out} is a folder; --out names the file to write")
    if len({run.resolve() for run in options.runs}) < len(options.runs):
        raise InputError(f"each run can be named once, got {' '.join(map(str, options.runs))}")
    for run in options.runs:
        RunFolder(run).read_config()
        RunFolder(run).read_metrics()
        weights_file(run)
    from vision_ssm.analysis.report import collect, write_report
    from vision_ssm.tasks import load

    console = make_console()
    paths = [run.resolve() for run in options.runs]
    names = [path.name for path in paths] if len({path.name for path in paths}) == len(paths) else options.runs
    reports = []
    for run, name in zip(options.runs, names, strict=True):
        task = load(run, options.device, optimized=False)
        found = collect(RunFolder(run), str(name), task, options.data, options.num_workers, console)
        reports.append(found)
        if found.missing:
            console.out(printable(f"{run}: not measured again, because {found.missing}"), highlight=False)
    write_report(reports, options.out)
    console.out(f"{printable(str(options.out))}, {options.out.stat().st_size / 2**20:.1f} MiB", highlight=False)
    return 0

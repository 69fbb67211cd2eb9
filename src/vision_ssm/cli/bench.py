import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import Size, height_and_width, parse_options
from vision_ssm.engine.output import make_table, print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes import Precision
from vision_ssm.recipes.config import Config, limited


@dataclass(frozen=True)
class BenchOptions(Config):
    """Time models, and print every setting that matters."""

    models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL...", help_behavior_hint="(required)")]
    """timm names, ours included; several are measured in one run."""
    size: Size = limited((), least=1)  # noqa: RUF009
    """Height and width of the input in pixels, or one number for both."""
    batch: tuple[int, ...] = limited((1, 8), least=1)
    """Images per step; one row each."""
    train: bool = False
    """Time forward and backward instead of forward alone."""
    precision: Precision = "32-true"
    """Number format of the computation."""
    compile: bool = False
    """Run through torch.compile."""
    optimize: bool = True
    """Use `vision_ssm.optimize` on a CPU with 32-true and bf16-true, unless --train or --compile is given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = limited(None, least=1)
    """Threads on a CPU; torch's own choice otherwise."""
    seconds: float = limited(2.0, above=0)
    """Measure every row for at least this long."""
    csv: Path | None = None
    """Also write the rows to this file."""
    json: bool = False
    """Print JSON instead of a table."""


def bench(words: Sequence[str]) -> int:
    """Time models; `words` follow `vision-ssm bench`."""
    options = parse_options(BenchOptions, words, "bench")
    if not options.models:
        raise InputError("name at least one model, such as vmamba_tiny")
    if not options.batch:
        raise InputError("--batch takes at least one batch size")
    if options.csv is not None and not options.csv.parent.is_dir():
        raise InputError(f"no such folder: {options.csv.parent}")
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from vision_ssm.analysis import machine_settings, measure_speed
    from vision_ssm.engine.devices import find_device
    from vision_ssm.engine.files import write_csv
    from vision_ssm.models.create import create_model
    from vision_ssm.optimize import optimize

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(options.precision)
    optimized = options.optimize and device.type == "cpu" and not (options.train or options.compile or autocast)
    rows: list[dict[str, Any]] = []
    built = [(name, create_model(name, {}, 1000)) for name in options.models]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(built) * len(options.batch))
        for name, model in built:
            height, width = height_and_width(options.size, model.pretrained_cfg["input_size"])  # type: ignore[index, arg-type]
            model = model.to(device, dtype)
            if optimized:
                model = optimize(model, dtype=torch.float32 if options.precision == "32-true" else torch.bfloat16)
            runner = torch.compile(model) if options.compile else model
            for batch in options.batch:
                progress.update(task, description=f"{name}, batch {batch}")
                try:
                    how: dict[str, Any] = dict(training=options.train, autocast=autocast, seconds=options.seconds)
                    speed = measure_speed(runner, batch, height, width, **how)  # type: ignore[arg-type]
                except (RuntimeError, AssertionError) as error:
                    reason = str(error).splitlines()[0]
                    raise InputError(f"{name} fails on {batch} images of {height}x{width}: {reason}") from None
                rows.append({"model": name, "height": height, "width": width, **dataclasses.asdict(speed)})
                progress.advance(task)
    settings = {
        **machine_settings(device),
        "pass": "forward and backward" if options.train else "forward",
        "precision": options.precision,
        "dtype of the weights": str(dtype).removeprefix("torch."),
        "torch.compile": "on" if options.compile else "off",
        "vision_ssm.optimize": "on" if optimized else "off",
        "layout of images": "channels first, contiguous",
        "spread": "interquartile range of the times over their median",
        "scan backend": ", ".join(sorted({row["backend"] for row in rows if row["backend"]})) or "none",
    }
    if options.csv is not None:
        write_csv(options.csv, [{**row, **settings} for row in rows])
    if options.json:
        print_json({"settings": settings, "rows": rows})
        return 0
    console = Console()
    shown = {
        "model": lambda row: row["model"],
        ">input": lambda row: f"{row['height']}x{row['width']}",
        ">batch": lambda row: str(row["batch"]),
        ">ms": lambda row: f"{row['milliseconds']:,.1f}",
        ">spread": lambda row: f"{row['spread']:.0%}",
        ">images/s": lambda row: f"{row['images_per_second']:,.1f}",
    }
    if rows[0]["peak_memory_mib"] is not None:  # on an accelerator
        shown[">peak MiB"] = lambda row: f"{row['peak_memory_mib']:,.0f}"
    table = make_table(*shown)
    for row in rows:
        table.add_row(*(show(row) for show in shown.values()))
    console.print(table)
    console.print("\n".join(f"{name}: {value}" for name, value in settings.items()), style="dim", highlight=False)
    return 0

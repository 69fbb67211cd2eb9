import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from vision_ssm.cli import warn
from vision_ssm.cli.options import Integers, Size, height_and_width, parse_options
from vision_ssm.engine.output import make_table, print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import Config, limited


@dataclass(frozen=True)
class BenchOptions(Config):
    """Time models, and print every setting that matters."""

    models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL...", help_behavior_hint="(required)")]
    """timm names, ours included; several are measured in one run."""
    size: Size = limited((), least=1)  # noqa: RUF009
    """Height and width of the input in pixels, or one number for both."""
    sizes: Integers = limited((), least=1)  # noqa: RUF009
    """Several sizes of square images instead, such as 224,512,1024."""
    batch: Integers = limited((1, 8), least=1)  # noqa: RUF009
    """Images per step, such as 1,8; one row each."""
    train: bool = False
    """Time forward and backward instead of forward alone."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and images."""
    amp: bool = False
    """Keep weights and images in float32, and run the forward pass under autocast to --dtype."""
    compile: bool = False
    """Run through torch.compile."""
    optimize: bool = True
    """Use `vision_ssm.optimize` on a CPU with float32 and bfloat16, unless --train, --compile or --amp is given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = limited(None, least=1)
    """Threads on a CPU; torch's own choice otherwise."""
    seconds: float = limited(2.0, above=0)
    """Measure every row for at least this long."""
    csv: Path | None = None
    """Also write the rows to this file, in the columns of timm's benchmark.py and some more."""
    plot: Path | None = None
    """Also draw time and memory against resolution into this PNG file."""
    json: bool = False
    """Print JSON instead of a table."""


def bench(words: Sequence[str]) -> int:
    """Time models; `words` follow `vision-ssm bench`."""
    options = parse_options(BenchOptions, words, "bench")
    if not options.models:
        raise InputError("name at least one model, such as vmamba_tiny")
    if not options.batch:
        raise InputError("--batch takes at least one batch size")
    if not options.sizes and "--sizes" in words:
        raise InputError("--sizes takes at least one size, such as 224")
    if options.size and options.sizes:
        raise InputError("--size and --sizes exclude each other")
    if options.amp and options.dtype == "float32":
        raise InputError("--amp needs --dtype bfloat16 or float16")
    if options.plot is not None and options.plot.suffix != ".png":
        raise InputError(f"--plot takes the name of a PNG file, such as speed.png, got {options.plot}")
    for path in (options.csv, options.plot):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"no such folder: {path.parent}")
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from vision_ssm.analysis import Bench, BenchEntry, complexity, machine_settings, measure_speed
    from vision_ssm.analysis.speed import FAILURES, reason
    from vision_ssm.engine.devices import find_device
    from vision_ssm.engine.files import write_csv
    from vision_ssm.models.create import create_model, default_cfg
    from vision_ssm.optimize import optimize

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    dtype: torch.dtype = getattr(torch, options.dtype)
    autocast, weights = (dtype, torch.float32) if options.amp else (None, dtype)
    plain = options.train or options.compile or options.amp or options.dtype == "float16"
    optimized = options.optimize and device.type == "cpu" and not plain
    how: dict[str, Any] = dict(training=options.train, autocast=autocast, seconds=options.seconds)
    entries: list[BenchEntry] = []
    built = {name: create_model(name, {}, 1000) for name in options.models}
    asked = [(size,) for size in options.sizes] or [options.size]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(built) * len(asked) * len(options.batch))
        for name, given in itertools.product(built, asked):
            cfg = default_cfg(name)
            height, width = height_and_width(given, cfg.input_size)
            entry = BenchEntry(name, height, width, 1, sum(p.numel() for p in built[name].parameters()))
            runner: Any = None
            for batch in options.batch:
                entry = dataclasses.replace(entry, batch=batch, speed=None, error="")
                progress.update(task, description=f"{name}, batch {batch}, {height}x{width}")
                try:
                    if runner is None:
                        other = cfg.fixed_input_size and (height, width) != tuple(cfg.input_size[1:])
                        args = {"img_size": (height, width)} if other else {}
                        model = create_model(name, args, 1000) if args else built[name]
                        cost = complexity(model, (cfg.input_size[0], height, width))
                        entry = dataclasses.replace(entry, macs=cost.macs)
                        model = model.to(device, weights)
                        model = optimize(model, dtype=weights) if optimized else model
                        runner = torch.compile(model) if options.compile else model
                    entry = dataclasses.replace(entry, speed=measure_speed(runner, batch, height, width, **how))
                except (InputError, *FAILURES) as error:
                    entry = dataclasses.replace(entry, error=reason(error))
                    warn(f"{name} fails on {batch} images of {height}x{width}: {entry.error}")
                entries.append(entry)
                progress.advance(task)
    if all(entry.error for entry in entries):
        raise InputError(f"no model could be measured; {entries[0].model} fails: {entries[0].error}")
    result = Bench(tuple(entries), training=options.train)
    settings = {
        **machine_settings(device),
        "pass": "forward and backward" if options.train else "forward",
        "dtype": f"float32 under autocast to {options.dtype}" if options.amp else options.dtype,
        "torch.compile": "on" if options.compile else "off",
        "vision_ssm.optimize": "on" if optimized else "off",
        "layout of images": "channels first, contiguous",
        "spread of times": "interquartile range over median",
        "peak MiB": "most memory that torch held during a step, beyond weights and images",
        "scan backend": ", ".join(sorted({e.speed.backend for e in entries if e.speed and e.speed.backend})) or "none",
    }
    if options.csv is not None:
        write_csv(options.csv, [{**row, **settings} for row in result.rows()])
    if options.plot is not None:
        from vision_ssm.engine.plots import save_figure

        save_figure(result.plot(), options.plot)
    if options.json:
        print_json({"settings": settings, "rows": result.rows()})
        return 0
    console = Console()
    table = make_table("model", ">input", ">batch", ">ms", ">spread", ">images/s", ">peak MiB")
    for entry in entries:
        cells = ["failed", "-", "-", "-"]
        if (speed := entry.speed) is not None:
            memory = "-" if speed.peak_memory_mib is None else f"{speed.peak_memory_mib:,.2f}"
            cells = [f"{speed.milliseconds:,.1f}", f"{speed.spread:.0%}", f"{speed.images_per_second:,.1f}", memory]
        table.add_row(entry.model, f"{entry.height}x{entry.width}", str(entry.batch), *cells)
    console.print(table)
    console.print("\n".join(f"{name}: {value}" for name, value in settings.items()), style="dim", highlight=False)
    return 0

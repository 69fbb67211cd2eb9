import csv
import dataclasses
import fnmatch
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.errors import InputError
from vision_ssm.recipes import Precision

_Size = Annotated[
    tuple[int, ...], tyro.conf.arg(metavar="HEIGHT [WIDTH]", help_behavior_hint="(default: the model's own)")
]


@dataclass(frozen=True)
class ModelsOptions:
    """List the models of this package."""

    pattern: Positional[str] = "*"
    """Only names that match, such as 'vmamba_*'."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class InfoOptions:
    """Show what a model costs and the maps it gives."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Any timm name, ours included."""
    size: _Size = ()
    """Height and width of the input in pixels, or one number for both."""
    num_classes: int | None = None
    """Outputs of the classifier."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class BenchOptions:
    """Time models, and print every setting that matters."""

    models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL...", help_behavior_hint="(required)")]
    """timm names, ours included; several are measured in one run."""
    size: _Size = ()
    """Height and width of the input in pixels, or one number for both."""
    batch: tuple[int, ...] = (1, 8)
    """Images per step; one row each."""
    train: bool = False
    """Time forward and backward instead of forward alone."""
    precision: Precision = "32-true"
    """Number format of the computation."""
    compile: bool = False
    """Run through torch.compile."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """Threads on a CPU; torch's own choice otherwise."""
    seconds: float = 2.0
    """Measure every row for at least this long."""
    csv: Path | None = None
    """Also write the rows to this file."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class ConvertOptions:
    """Turn an official checkpoint into safetensors with this package's names; all keys must fit."""

    source: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The official file, .pth or .safetensors; nothing in it is executed."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT.safetensors")]
    """The .safetensors file to write."""
    model: str
    """The model it belongs to, such as vmamba_tiny."""
    ema: bool = False
    """Take the averaged weights where the file has both."""
    overwrite: bool = False
    """Replace the output file if it is there."""


def models(words: Sequence[str]) -> int:
    """List the package's models; `words` follow `vision-ssm models`."""
    options = parse_options(ModelsOptions, words, "models")
    from vision_ssm.analysis import complexity
    from vision_ssm.tasks.spec import create_model

    rows: list[dict[str, Any]] = []
    for name in fnmatch.filter(_own_models(), options.pattern):
        model = create_model(name, {"device": "meta"}, 1000)
        cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        cost = complexity(model, cfg["input_size"])
        rows.append(
            {
                "model": name,
                "parameters": cost.parameters,
                "macs": cost.macs,
                "paper_ops": cost.paper_ops,
                "input_size": list(cfg["input_size"]),
                "published": cfg.get("description"),
                "weights_license": cfg.get("license") if cfg.get("url") else None,
                "weights": cfg.get("url") or None,
            }
        )
    if not rows:
        raise InputError(f"no model matches {options.pattern}; there are {', '.join(_own_models())}")
    if options.json:
        _print_json(rows)
        return 0
    from rich.console import Console

    table = _table("model", ">parameters", ">MACs", ">papers' ops", "at", "published top-1 *")
    for row in rows:
        size = "x".join(map(str, row["input_size"][1:]))
        table.add_row(
            str(row["model"]),
            _millions(row["parameters"]),
            _giga(row["macs"]),
            _giga(row["paper_ops"]),
            size,
            str(row["published"] or "-"),
        )
    console = Console()
    console.print(table)
    console.print(
        "MACs: multiply-accumulates. Papers' ops: these, and 5 per element of a norm, 9 L D N + L D per scan.\n"
        "* of the weights that the authors published, not of this package's training.",
        style="dim",
    )
    return 0


def info(words: Sequence[str]) -> int:
    """Show one model; `words` follow `vision-ssm info`."""
    options = parse_options(InfoOptions, words, "info")
    import torch
    from rich.console import Console

    from vision_ssm.analysis import complexity, feature_shapes
    from vision_ssm.tasks.spec import create_model

    model = create_model(options.model, {}, 1000 if options.num_classes is None else options.num_classes)
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    size = (cfg["input_size"][0], *_size(options.size, cfg))
    try:
        cost = complexity(model, size)
        shapes = feature_shapes(model, size) if hasattr(model, "forward_intermediates") else []
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"{options.model} cannot take images of {size[1]}x{size[2]}: {error}") from None
    described = getattr(model, "feature_info", [])
    stages: list[dict[str, Any]] = [
        {
            "stage": i,
            "blocks": _blocks(model, i),
            "channels": c,
            "height": h,
            "width": w,
            "stride": described[i]["reduction"] if len(described) == len(shapes) else None,
        }
        for i, (c, h, w) in enumerate(shapes)
    ]
    values = {
        "model": options.model,
        "input_size": list(size),
        **dataclasses.asdict(cost),
        "stages": stages,
        "weights": cfg.get("url") or cfg.get("hf_hub_id") or None,
        "torch": torch.__version__,
    }
    if options.json:
        _print_json(values)
        return 0
    console = Console()
    table = _table("", "", "", header=False)
    table.add_row("model", options.model)
    table.add_row("input", f"{size[0]} x {size[1]} x {size[2]}")
    table.add_row("parameters", f"{cost.parameters:,}")
    table.add_row("MACs", f"{cost.macs:,}", "convolutions, linear layers, matrix products")
    table.add_row("papers' ops", f"{cost.paper_ops:,}", "MACs, norms, pooling, 9 L D N + L D per scan")
    table.add_row("FLOPs", f"{cost.flops:,}", "torch's FlopCounterMode, 2 per MAC")
    console.print(table)
    console.print(f"published weights: {values['weights'] or 'none'}", highlight=False, soft_wrap=True)
    if stages:
        console.print()
        table = _table(">stage", ">blocks", ">channels", ">height", ">width", ">stride")
        for stage in stages:
            table.add_row(*("-" if value is None else str(value) for value in stage.values()))
        console.print(table)
    return 0


def bench(words: Sequence[str]) -> int:
    """Time models; `words` follow `vision-ssm bench`."""
    options = parse_options(BenchOptions, words, "bench")
    if not options.models:
        raise InputError("name at least one model, such as vmamba_tiny")
    for name, values in (
        ("--batch", options.batch),
        ("--threads", (1 if options.threads is None else options.threads,)),
    ):
        if not values or min(values) < 1:
            raise InputError(f"{name} must be at least 1, got {' '.join(map(str, values)) or 'nothing'}")
    if options.csv is not None and not options.csv.parent.is_dir():
        raise InputError(f"no such folder: {options.csv.parent}")
    if not options.seconds > 0:
        raise InputError(f"--seconds must be positive, got {options.seconds}")
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from vision_ssm.analysis import machine_settings, measure_speed
    from vision_ssm.tasks.classifier import find_device
    from vision_ssm.tasks.spec import create_model

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(options.precision)
    rows: list[dict[str, Any]] = []
    built = [(name, create_model(name, {}, 1000)) for name in options.models]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(built) * len(options.batch))
        for name, model in built:
            height, width = _size(options.size, model.pretrained_cfg)  # type: ignore[arg-type]
            model = model.to(device, dtype)
            runner = torch.compile(model) if options.compile else model
            for batch in options.batch:
                progress.update(task, description=f"{name}, batch {batch}")
                try:
                    speed = measure_speed(
                        runner,  # type: ignore[arg-type]
                        batch,
                        height,
                        width,
                        training=options.train,
                        autocast=autocast,
                        seconds=options.seconds,
                    )
                except (RuntimeError, AssertionError) as error:
                    reason = str(error).splitlines()[0]
                    raise InputError(f"{name} fails on {batch} images of {height}x{width}: {reason}") from None
                rows.append({"model": name, "height": height, "width": width, **dataclasses.asdict(speed)})
                progress.advance(task)
    settings = {
        **machine_settings(device),
        "pass": "forward and backward" if options.train else "forward",
        "precision": options.precision,
        "torch.compile": "on" if options.compile else "off",
        "layout of images": "channels first, contiguous",
        "spread": "interquartile range of the times over their median",
        "scan backend": ", ".join(sorted({row["backend"] for row in rows if row["backend"]})) or "none",
    }
    if options.csv is not None:
        _write_csv(options.csv, [{**row, **settings} for row in rows])
    if options.json:
        _print_json({"settings": settings, "rows": rows})
        return 0
    console = Console()
    on_accelerator = rows[0]["peak_memory_mib"] is not None
    table = _table(
        "model", ">input", ">batch", ">ms", ">spread", ">images/s", *([">peak MiB"] if on_accelerator else [])
    )
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['height']}x{row['width']}",
            str(row["batch"]),
            f"{row['milliseconds']:,.1f}",
            f"{row['spread']:.0%}",
            f"{row['images_per_second']:,.1f}",
            *([f"{row['peak_memory_mib']:,.0f}"] if on_accelerator else []),
        )
    console.print(table)
    console.print("\n".join(f"{name}: {value}" for name, value in settings.items()), style="dim", highlight=False)
    return 0


def convert(words: Sequence[str]) -> int:
    """Convert an official checkpoint; `words` follow `vision-ssm convert`."""
    options = parse_options(ConvertOptions, words, "convert")
    if options.out.suffix != ".safetensors":
        raise InputError(f"the output must end in .safetensors, got {options.out.name}")
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out} exists; --overwrite replaces it")
    if not options.out.parent.is_dir():
        raise InputError(f"no such folder: {options.out.parent}")
    import safetensors.torch
    from rich.console import Console

    from vision_ssm.checkpoints import CheckpointError, check_fit, convert_official, read_checkpoint
    from vision_ssm.tasks.files import atomic_write
    from vision_ssm.tasks.spec import create_model

    if not options.source.is_file():
        raise InputError(f"no such checkpoint file: {options.source}")
    checkpoint = read_checkpoint(options.source, ema=options.ema)
    ours = convert_official(options.model, checkpoint.state)
    model = create_model(options.model, {"device": "meta"}, _classes(ours))
    console = Console()
    try:
        check_fit(model, ours)
    except CheckpointError as error:
        for what, keys in error.keys.items():
            console.print(f"{what}:", *(f"  {key}" for key in keys), sep="\n", highlight=False, soft_wrap=True)
        raise
    tensors = {name: tensor.contiguous() for name, tensor in ours.items()}
    metadata = {"model": options.model, "source": options.source.name, "format": "pt"}
    with atomic_write(options.out) as file:
        file.write(safetensors.torch.save(tensors, metadata))

    where = f" under {checkpoint.source!r}" if checkpoint.source else ""
    console.print(f"{len(checkpoint.state)} tensors in {options.source}{where}", highlight=False, soft_wrap=True)
    table = _table("goes to", ">tensors", ">numbers")
    groups: dict[str, list[int]] = {}
    for name, tensor in ours.items():
        parts = name.split(".")
        groups.setdefault(".".join(parts[:2]) if parts[0] == "stages" else parts[0], []).append(tensor.numel())
    # as images pass through: the stem, the stages, what follows them
    for group in sorted(groups, key=lambda name: (name != "stem", not name.startswith("stages."), name)):
        table.add_row(group, str(len(groups[group])), f"{sum(groups[group]):,}")
    console.print(table)
    if checkpoint.placeholders:
        console.print(
            f"the file also names code, none of which was run or loaded: {', '.join(checkpoint.placeholders)}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"wrote {options.out}; every key of {options.model} is there", highlight=False, soft_wrap=True)
    return 0


def _own_models() -> list[str]:
    import timm

    from vision_ssm import models as package

    modules = {value.__module__.rsplit(".", 1)[-1] for name in package.__all__ for value in [getattr(package, name)]}
    return sorted(name for module in modules for name in timm.list_models(module=module))


def _size(given: tuple[int, ...], cfg: Mapping[str, Any]) -> tuple[int, int]:
    if len(given) > 2 or any(n < 1 for n in given):
        raise InputError(f"--size takes one or two positive numbers, got {' '.join(map(str, given))}")
    if not given:
        return cfg["input_size"][1], cfg["input_size"][2]
    return given[0], given[-1]


def _blocks(model: Any, stage: int) -> int | None:
    try:
        return len(model.stages[stage].blocks)
    except (AttributeError, IndexError, TypeError):
        return None


def _classes(state: Mapping[str, Any]) -> int:
    weight = state.get("head.fc.weight")
    return 0 if weight is None else weight.shape[0]


def _table(*columns: str, header: bool = True) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=header, header_style="dim")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
            no_wrap=column.startswith(">") or column == "model",
        )
    return table


def _millions(count: Any) -> str:
    return f"{count / 1e6:.2f} M"


def _giga(count: Any) -> str:
    return f"{count / 1e9:.2f} G"


def _print_json(values: Any) -> None:
    sys.stdout.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    from vision_ssm.tasks.files import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import Size, height_and_width, parse_options
from vision_ssm.engine.output import make_table, print_json
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import Config, limited


@dataclass(frozen=True)
class ModelsOptions:
    """List the models of this package."""

    pattern: Positional[str] = "*"
    """Only names that match, such as 'vmamba_*'."""
    task: Literal["classify", "detect", "segment"] = "classify"
    """What the models are for: their classifiers, or the published detectors or segmenters on them."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class InfoOptions(Config):
    """Show what a model costs and the maps it gives."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Any timm name, ours included."""
    task: Literal["classify", "detect", "segment"] = "classify"
    """The model as a classifier, or a detector or segmenter on it."""
    detector: Literal["mask-rcnn", "faster-rcnn", "retinanet"] = "mask-rcnn"
    """Type of the detector."""
    decoder: str = "upernet"
    """Decoder of the segmenter: upernet, or one of segmentation_models_pytorch."""
    size: Size = limited((), least=1)  # noqa: RUF009
    """Height and width of the input in pixels, or one number for both; by default 800 1280 for detectors,
    512 2048 for segmenters."""
    num_classes: int | None = limited(None, least=0)
    """Number of classes; by default 1000, for detectors 80, for segmenters 150."""
    json: bool = False
    """Print JSON instead of tables."""


def models(words: Sequence[str]) -> int:
    """List the package's models; `words` follow `vision-ssm models`."""
    options = parse_options(ModelsOptions, words, "models")
    if options.task != "classify":
        from vision_ssm.cli.detectors import list_published

        return list_published(options.task, options.pattern, json=options.json)
    import timm
    from rich.console import Console
    from rich.progress import Progress

    from vision_ssm.analysis import complexity
    from vision_ssm.checkpoints import published
    from vision_ssm.models.registry import registered_models

    names = fnmatch.filter(registered_models(), options.pattern)
    if not names:
        raise InputError(f"no model matches {options.pattern}; there are {', '.join(registered_models())}")
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name in progress.track(names, description="counting"):
            model = timm.create_model(name, device="meta")
            cost = complexity(model, model.pretrained_cfg["input_size"])
            counts = dict(parameters=cost.parameters, macs=cost.macs, paper_ops=cost.paper_ops)
            rows.append({"model": name, **counts, **published(name, model.pretrained_cfg)})
    if options.json:
        print_json(rows)
        return 0
    _show_models(rows, Console())
    return 0


def _show_models(rows: Sequence[Mapping[str, Any]], console: Any) -> None:
    """Print a table per paper and license; models without published weights stand in the first one of their paper."""
    papers: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: row["weights_by"] is None):
        paper = ", ".join(filter(None, (row["paper"], row["paper_id"]))) or "no paper"
        licenses = papers.setdefault(paper, {})
        own = (row["weights_license"] or "not stated") if row["weights_by"] else next(iter(licenses), "")
        licenses.setdefault(own, []).append(row)
    width = max(len(row["model"]) for row in rows)
    for paper in sorted(papers):
        for license, group in papers[paper].items():
            authors = ", ".join(sorted({row["weights_by"] for row in group if row["weights_by"]}))
            console.print(f"[bold]{paper}[/]", highlight=False)
            console.print(f"weights: {authors}; license: {license}" if authors else "no weights", highlight=False)
            table = make_table("model", ">params", ">MACs", ">paper ops", ">at", ">top-1", "weights")
            for column, least in zip(table.columns, (width, 8, 7, 9, 3, 5), strict=False):
                column.min_width = least  # the tables' columns stand below one another
            for row in sorted(group, key=lambda row: row["model"]):
                way = "pretrained" if row["pretrained"] else "convert" if row["convertible"] else "-"
                file = f" {row['weights_file'] or ''}" if console.width >= 118 else ""
                mark = "*" if row["weights_inferred"] else ""
                counts = (
                    f"{row['parameters'] / 1e6:.2f} M",
                    f"{row['macs'] / 1e9:.2f} G",
                    f"{row['paper_ops'] / 1e9:.2f} G",
                )
                size = "x".join(map(str, dict.fromkeys(row["input_size"][1:])))
                top1 = f"{row['published_top1']:.1f}" if row["published_top1"] else "-"
                table.add_row(row["model"], *counts, size, top1, way + mark + file)
            console.print(table)
            console.print()
    legend = [
        "MACs: multiply-accumulates; paper ops: these but attention's, 5 per element normed, 9 L D N + L D per scan.",
        "top-1: on ImageNet-1K in %, of the published weights named above, not of this package's training.",
        "weights: pretrained=True fetches them, or vision-ssm convert takes a file that you have.",
        "*: the address of the weights is inferred from those of other files, and was not seen.",
    ]
    console.print("\n".join(legend), style="dim", highlight=False)


def info(words: Sequence[str]) -> int:
    """Show one model; `words` follow `vision-ssm info`."""
    options = parse_options(InfoOptions, words, "info")
    if options.task != "classify":
        from vision_ssm.cli.detectors import CLASSES, COST_SIZES, show_costs

        kind = options.detector if options.task == "detect" else options.decoder
        classes = CLASSES[options.task] if options.num_classes is None else options.num_classes
        pixels = height_and_width(options.size, COST_SIZES[options.task])
        return show_costs(options.task, options.model, kind, pixels, classes, json=options.json)
    import torch
    from rich.console import Console

    from vision_ssm.analysis import complexity, feature_shapes
    from vision_ssm.checkpoints import address_note
    from vision_ssm.models.create import create_model

    model = create_model(options.model, {}, 1000 if options.num_classes is None else options.num_classes)
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    size = (cfg["input_size"][0], *height_and_width(options.size, cfg["input_size"]))
    try:
        cost = complexity(model, size)
        shapes = feature_shapes(model, size) if hasattr(model, "forward_intermediates") else []
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"{options.model} cannot take images of {size[1]}x{size[2]}: {error}") from None
    described = getattr(model, "feature_info", [])
    strides = [entry["reduction"] for entry in described] if len(described) == len(shapes) else [None] * len(shapes)
    stages: list[dict[str, Any]] = [
        {"stage": i, "blocks": _blocks(model, i), "channels": c, "height": h, "width": w, "stride": stride}
        for i, ((c, h, w), stride) in enumerate(zip(shapes, strides, strict=True))
    ]
    values = {"model": options.model, "input_size": list(size), **dataclasses.asdict(cost), "stages": stages}
    values |= {"weights": cfg.get("url") or cfg.get("hf_hub_id") or None, "torch": torch.__version__}
    if options.json:
        print_json(values)
        return 0
    console = Console()
    table = make_table("", "", "", header=False)
    table.add_row("model", options.model)
    table.add_row("input", f"{size[0]} x {size[1]} x {size[2]}")
    table.add_row("parameters", f"{cost.parameters:,}")
    table.add_row("MACs", f"{cost.macs:,}", "convolutions, linear layers, matrix products")
    table.add_row(
        "papers' ops",
        f"{cost.paper_ops:,}",
        "MACs without attention's, plus norms, pooling, scans",
    )
    table.add_row("FLOPs", f"{cost.flops:,}", "torch's FlopCounterMode, 2 per MAC")
    console.print(table)
    console.out(f"published weights: {values['weights'] or 'none'}{address_note(values['weights'])}", highlight=False)
    if stages:
        console.print()
        table = make_table(">stage", ">blocks", ">channels", ">height", ">width", ">stride")
        for stage in stages:
            table.add_row(*("-" if value is None else str(value) for value in stage.values()))
        console.print(table)
    return 0


def _blocks(model: Any, stage: int) -> int | None:
    try:
        return len(model.stages[stage].blocks)
    except (AttributeError, IndexError, TypeError):
        return None

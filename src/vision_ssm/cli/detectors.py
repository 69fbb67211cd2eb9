"""What `vision-ssm models` and `vision-ssm info` show with `--task detect` and `--task segment`."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from vision_ssm.engine.output import make_table, print_json
from vision_ssm.errors import InputError

COST_SIZES = {"detect": (800, 1280), "segment": (512, 2048)}
"""Height and width of the images for which the papers count operations."""

CLASSES = {"detect": 80, "segment": 150}
"""Number of classes of the published networks: those of COCO and ADE20K."""

_NAMES = {"mask-rcnn": "Mask R-CNN", "faster-rcnn": "Faster R-CNN", "retinanet": "RetinaNet", "upernet": "UPerNet"}
_DATA = {"detect": "COCO val2017", "segment": "the validation images of ADE20K"}
_SCORES = {"detect": "box/mask AP", "segment": "mIoU/multi-scale"}
_LEGENDS = {
    "detect": (
        "AP: in %, of the weights of the papers' authors, not of this package's training.\n"
        "schedule: 1x is 12 epochs, 3x is 36 at several scales; params: counted here.\n"
        "published: parameters and multiply-accumulates at 1280x800, by the papers."
    ),
    "segment": (
        "mIoU: in %, of the weights of the papers' authors, not of this package's training;\n"
        "multi-scale: six sizes and flips; schedule: iterations; params: counted here.\n"
        "published: parameters and multiply-accumulates at 2048x512, by the papers."
    ),
}


def list_published(task: str, pattern: str, *, json: bool) -> int:
    """List the published detectors or segmenters whose backbone matches, with their results."""
    from rich.console import Console
    from rich.progress import Progress

    results = [result for result in _published(task) if fnmatch.fnmatch(result.model, pattern)]
    if not results:
        known = dict.fromkeys(result.model for result in _published(task))
        what = {"detect": "detector", "segment": "segmenter"}[task]
        raise InputError(f"no backbone of a published {what} matches {pattern}; there are {', '.join(known)}")
    kinds = dict.fromkeys((result.model, result.detector) for result in results)
    counts: dict[tuple[str, str], int] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for model, kind in progress.track(kinds, description="counting"):
            counts[model, kind] = sum(p.numel() for p in _on_meta(task, kind, model, CLASSES[task]).parameters())
    rows = [_row(result, counts[result.model, result.detector]) for result in results]
    if json:
        print_json(rows)
    else:
        _show(task, rows, Console())
    return 0


def _published(task: str) -> Sequence[Any]:
    from vision_ssm.checkpoints import published_detectors as known

    return {"detect": known.PUBLISHED_DETECTORS, "segment": known.PUBLISHED_SEGMENTERS}[task]


def _on_meta(task: str, kind: str, model: str, classes: int) -> Any:
    import torch

    from vision_ssm.detectors import create_detector, create_segmenter

    create: Any = {"detect": create_detector, "segment": create_segmenter}[task]
    with torch.device("meta"), torch.no_grad():
        return create(kind, model, {}, classes)


def _row(result: Any, parameters: int) -> dict[str, Any]:
    from vision_ssm.checkpoints import address_note

    row = dataclasses.asdict(result)
    published = {f"published_{name}": row.pop(name) for name in ("parameters", "flops")}
    file = result.weights.rsplit("/", 1)[-1] if result.weights else None
    return {
        **row,
        **published,
        "parameters": parameters,
        "weights_file": file,
        "weights_inferred": bool(address_note(result.weights)),
    }


def _show(task: str, rows: Sequence[Mapping[str, Any]], console: Any) -> None:
    for detector in dict.fromkeys(row["detector"] for row in rows):
        group = [row for row in rows if row["detector"] == detector]
        console.print(f"[bold]{_NAMES[detector]}[/] on {_DATA[task]}", highlight=False)
        scores = _SCORES[task] if any(row.get("mask_ap") or row.get("miou") for row in group) else "box AP"
        table = make_table("backbone", "schedule", f">{scores}", ">params", ">published", "weights")
        for row in group:
            file = f" {row['weights_file'] or ''}" if console.width >= 140 else ""
            mark = "*" if row["weights_inferred"] else ""
            table.add_row(
                row["model"],
                row["schedule"],
                _scores(row),
                f"{row['parameters'] / 1e6:.2f} M",
                _cost(row["published_parameters"], row["published_flops"]),
                ("convert" if row["weights"] else "-") + mark + file,
            )
        console.print(table)
        for model, schedule, note in dict.fromkeys((row["model"], row["schedule"], row["note"]) for row in group):
            if note:
                console.print(f"{model} {schedule}: {note}", style="dim", highlight=False)
        console.print()
    takes = f"weights: vision-ssm convert --task {task} takes a file that you have; --json shows addresses."
    marked = "*: the address is inferred from those of other files, and was not seen."
    console.print(f"{_LEGENDS[task]}\n{takes}\n{marked}", style="dim", highlight=False)


def _scores(row: Mapping[str, Any]) -> str:
    values = (row[name] for name in ("box_ap", "mask_ap", "miou", "miou_ms") if row.get(name) is not None)
    return " / ".join(f"{value:.1f}" for value in values)


def _cost(parameters: float | None, flops: float | None) -> str:
    given = ((parameters, "M"), (flops, "G"))
    return ", ".join(f"{value:.0f} {unit}" for value, unit in given if value is not None) or "-"


def show_costs(task: str, model: str, kind: str, size: tuple[int, int], classes: int, *, json: bool) -> int:
    """Show what a detector or segmenter costs, beside what was published."""
    import torch
    from rich.console import Console

    from vision_ssm.analysis import complexity
    from vision_ssm.checkpoints import address_note

    made = _on_meta(task, kind, model, classes)
    try:
        cost = complexity(made, (3, *size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"{kind} on {model} cannot take images of {size[0]}x{size[1]}: {error}") from None
    of = (model.split(".")[0], kind, classes)
    results = [result for result in _published(task) if (result.model, result.detector, CLASSES[task]) == of]
    parameters, flops = (results[0].parameters, results[0].flops) if results else (None, None)
    flops = flops if size == COST_SIZES[task] else None
    differences = {
        "parameters_difference": _percent(cost.parameters / 1e6, parameters),
        "flops_difference": _percent(cost.paper_ops / 1e9, flops),
    }
    values = {
        "model": model,
        {"detect": "detector", "segment": "decoder"}[task]: kind,
        "num_classes": classes,
        "input_size": [3, *size],
    }
    values |= {**dataclasses.asdict(cost), **differences, "torch": torch.__version__}
    values |= {"published": [_row(result, cost.parameters) for result in results]}
    if json:
        print_json(values)
        return 0
    console = Console()
    table = make_table("", "", "", header=False)
    table.add_row("detector" if task == "detect" else "segmenter", _NAMES.get(kind, kind), f"{classes} classes")
    table.add_row("backbone", model)
    table.add_row("input", f"3 x {size[0]} x {size[1]}")
    beside = _beside(parameters, "M", differences["parameters_difference"])
    table.add_row("parameters", f"{cost.parameters:,}", beside)
    proposals = {"mask-rcnn": "1,000 proposals, 100 masks", "faster-rcnn": "1,000 proposals"}.get(kind, "")
    table.add_row("MACs", f"{cost.macs:,}", proposals)
    table.add_row("papers' ops", f"{cost.paper_ops:,}", _beside(flops, "G", differences["flops_difference"]))
    table.add_row("FLOPs", f"{cost.flops:,}", "as torch counts, 2 per MAC of its products")
    console.print(table)
    for result in results:
        row = dataclasses.asdict(result)
        what = "box AP" if row.get("mask_ap", 0) is None else _SCORES[task]
        note = f" ({result.note})" if result.note else ""
        line = f"published {result.schedule}: {_scores(row)} {what}{note}"
        console.out(f"{line}, weights: {result.weights or 'none'}{address_note(result.weights)}", highlight=False)
    return 0


def _percent(counted: float, published: float | None) -> float | None:
    return None if published is None else 100 * (counted / published - 1)


def _beside(published: float | None, unit: str, difference: float | None) -> str:
    return "" if difference is None else f"{difference:+.1f} % from the published {published:.0f} {unit}"

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from vision_ssm.cli.options import parse_options
from vision_ssm.cli.subjects import AnalysisOptions, choose_images, image_names, load_subject
from vision_ssm.engine.output import make_console, make_table, print_json
from vision_ssm.recipes.config import limited


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(AnalysisOptions):
    """Draw which tokens a scan attends to from one position, or the channel attention of a ganglion layer."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL|RUN")]
    """A run, or a timm name: NAME or NAME=FILE; with =random at the end, with random weights."""
    layer: str | None = None
    """Name of the layer; by default the last scan of the third stage. --list shows those there are."""
    position: tuple[float, float] = limited((0.5, 0.5), least=0, most=1)
    """Row and column of the position, relative to the image as the model sees it: 0 is the upper or left border, 1 the
    lower or right one."""
    radius: float = limited(2.0, least=0)
    """Radius in tokens: the table shows the share of the attention within it."""
    images: int = limited(4, least=1, most=32)
    """How many images to look at, spread evenly over those there are."""
    list: bool = False
    """Print the layers instead."""


def attention(words: Sequence[str]) -> int:
    """Draw what a scan attends to; `words` follow `vision-ssm analyze attention`."""
    options: AttentionOptions = parse_options(AttentionOptions, words, "analyze attention")
    from vision_ssm.analysis.attention import channel_attention, scan_attention, short_name, switch_choices
    from vision_ssm.analysis.inputs import single_inputs
    from vision_ssm.analysis.scan_layers import ATTENTION, choose_layer, find_scan_layers
    from vision_ssm.detectors.detector import OnBackbone

    subject = load_subject(options.model, options.device)
    model, spec = subject.model, subject.task.spec
    chosen = choose_images(options, [subject])
    names, images = image_names(chosen), list(single_inputs(subject.task, chosen))
    run = model.backbone if isinstance(model, OnBackbone) else None
    layers = find_scan_layers(model, images[0], run)
    if options.list:
        return _list(layers.values(), options.json)
    layer = choose_layer(layers, options.layer)
    how: dict[str, Any] = dict(name=subject.name, names=names, run=run)
    options.out.mkdir(parents=True, exist_ok=True)
    files, columns = [], []
    if layer.kind == ATTENTION:
        maps = channel_attention(model, images, layer.name, **how)
        files, rows = maps.save(options.out / "attention"), []
    else:
        seen = scan_attention(model, images, layer.name, options.position, mean=spec.mean, std=spec.std, **how)
        files = seen.save(options.out / "attention")
        rows = [line for item in seen.images for line in item.summary(options.radius)]
        columns = [">route weight", ">sum", f">within {options.radius:g} tokens", ">mean distance", ">in pixels"]
    if (choices := switch_choices(model, images, **how)) is not None:
        files += choices.save(options.out / "attention-routes")
    if options.json:
        position = None if layer.kind == ATTENTION else options.position
        facts = dict(model=subject.name, layer=layer.name, kind=layer.kind, grid=layer.grid, position=position)
        print_json({**facts, "radius": options.radius, "rows": rows, "files": [str(path) for path in files]})
        return 0
    console = make_console()
    at = "" if layer.kind == ATTENTION else f", from row {options.position[0]:g}, column {options.position[1]:g}"
    grid = "×".join(map(str, layer.grid))
    console.out(f"{layer.kind} {layer.name} of {subject.name}, {grid} tokens{at}", highlight=False)
    if rows:
        table = make_table("image", "route", *columns)
        for row in rows:
            weight = "" if row["route_weight"] is None else f"{row['route_weight']:.2f}"
            numbers = (f"{row['near']:.1%}", f"{row['distance_tokens']:.1f}", f"{row['distance_pixels']:.0f}")
            shown = numbers if row["sum"] > 0 else ("",) * 3  # the route does not write the token
            table.add_row(short_name(row["image"], 40), row["route"], weight, f"{row['sum']:.3g}", *shown)
        console.print(table)
    console.out("\n".join(map(str, files)), highlight=False)
    return 0


def _list(layers: Any, json: bool) -> int:
    if json:
        print_json({"layers": [vars(layer) for layer in layers]})
        return 0
    table = make_table("layer", "kind", ">tokens", ">channels", ">states", "routes")
    for layer in layers:
        grid, routes = "×".join(map(str, layer.grid)), ", ".join(layer.routes)
        states = f"{layer.states} heads" if not layer.routes else str(layer.states)
        table.add_row(layer.name, layer.kind, grid, str(layer.channels), states, routes)
    make_console().print(table)
    return 0

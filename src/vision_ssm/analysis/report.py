"""All about one or more runs in one HTML file; what is known is collected here, and computed elsewhere."""

from __future__ import annotations

import base64
import copy
import io
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from rich.console import Console

from vision_ssm import __version__, recipes
from vision_ssm.analysis.complexity import Complexity, complexity
from vision_ssm.analysis.fields import effective_receptive_field
from vision_ssm.analysis.inputs import input_batches
from vision_ssm.analysis.resolution import measure_task
from vision_ssm.analysis.result import COLORS, LINES, new_figure
from vision_ssm.analysis.speed import machine_settings
from vision_ssm.data import Images, ImageStream
from vision_ssm.engine.evaluate import evaluate
from vision_ssm.engine.files import read_json, write_text
from vision_ssm.engine.plots import draw_curves
from vision_ssm.engine.run_folder import RunFolder, rank
from vision_ssm.engine.task import Evaluation, Task, as_dataset
from vision_ssm.errors import InputError, printable
from vision_ssm.recipes import TrainConfig
from vision_ssm.recipes.config import option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDEST = 1600  # pixels of an embedded picture
_LARGEST = 200_000  # bytes of a PNG; larger pictures become JPEGs
_PATIENCE = 5.0  # seconds that a step may take, if its speed is to be measured
_CALLED = {"AP": "AP", "IoU": "IoU", "f1": "F1", "top5": "top-5"}


@dataclass(frozen=True)
class Table:
    """A table of texts; columns whose names begin with `>` are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture as part of a page.

    Args:
        uri: Its file, as a data URI.
        width: How wide to show it, in CSS pixels.
        height: How high.
        alt: What it shows, for those who do not see it.
        caption: What to write below it.
    """

    uri: Markup
    width: int
    height: int
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        title: Its heading.
        notes: Sentences below it.
        tables: Tables.
        pictures: Pictures, one below the other.
        small: Small pictures, beside each other.
        folded: What is only shown on demand, by its title.
    """

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    small: Sequence[Picture] = ()
    folded: Mapping[str, Table] | None = None


@dataclass(frozen=True)
class RunReport:
    """What a report says of a run.

    Args:
        name: How to call it.
        summary: Its line in a comparison.
        options: All options of its training.
        monitor: The metric that decided on the best epoch.
        curve: Epoch and that metric, of each epoch.
        best: The best epoch.
        sections: The rest.
        missing: Why it could not be measured on its images.
    """

    name: str
    summary: Mapping[str, str]
    options: Mapping[str, str]
    monitor: str
    curve: Sequence[tuple[int, float]]
    best: int
    sections: Sequence[Section]
    missing: str = ""


def collect(
    folder: RunFolder,
    name: str,
    task: Task,
    data: Path | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> RunReport:
    """Measure the best weights of a run, and collect what else is known of it.

    Without `data`, and where the run's own images are gone, cannot be read or have other classes, what training wrote
    of them is shown instead.

    Args:
        folder: The run.
        name: How to call it.
        task: Its best weights, not optimized.
        data: Images to measure it on; by default its own validation images.
        workers: Number of loading processes.
        console: Where to show progress.

    Raises:
        InputError: A file of the run, or the images of `data`, cannot be read.
    """
    config, history = folder.read_config(), folder.read_metrics()
    saved = read_json(folder.results) if folder.results.is_file() else {}  # not there before training is over
    monitor = config.monitor or task.monitor
    best = max(history, key=lambda row: rank(row, monitor))
    shape = (3, *task.spec.input_size)
    cost = complexity(task.model, shape)
    fast = type(task)(copy.deepcopy(task.model), task.spec).ready(task.device)  # which has no gradients on a CPU
    images, evaluation, missing, field = None, None, "", None
    try:
        images = task.own_images(folder) if data is None else task.read_images(data)
        field = _receptive_field(task, images)
        evaluation = evaluate(fast, images, None, workers, console)
    except InputError as error:
        if data is not None:
            raise
        missing = error.line
    on = str(data or config.val_data or config.data)
    speed, first = _speed(fast, shape)
    summary = {
        "run": name,
        "metric": called(monitor),
        ">best": share(best[f"val_{monitor}"]),
        "model": task.spec.model,
        ">parameters": f"{cost.parameters:,}",
        ">MACs": _short(cost.macs),
        ">epoch": f"{best['epoch']} of {history[-1]['epoch']}",
        ">training": str(timedelta(seconds=round(_seconds(history, config)))),
        ">ms per image": first,
    }
    with tempfile.TemporaryDirectory() as place:
        curves = Path(place) / "curves.png"
        draw_curves(history, best, monitor, curves)
        plots = {"Curves": curves}
        if evaluation is not None and images is not None:
            plots |= evaluation.draw(images, Path(place))
        else:
            known = [folder.path / f"{stem}.png" for stem in ("confusion", "precision", "predictions")]
            plots |= {path.stem.capitalize(): path for path in known if path.is_file()}
        pictures = {title: embed(Image.open(path), f"{title} of {name}") for title, path in plots.items()}
    sections = [
        _overview(summary, task, cost, shape),
        _configuration(folder, config),
        Section("Curves", pictures=[pictures.pop("Curves")]),
        *_results(saved, best, evaluation, images, on, missing, pictures),
    ]
    if field is not None:
        sections += [Section("Effective receptive field", pictures=[embed(field, f"Receptive field of {name}")])]
    points = [(row["epoch"], row[f"val_{monitor}"]) for row in history]
    options = {option(key): _plain(value) for key, value in _values(config).items()}
    return RunReport(name, summary, options, monitor, points, best["epoch"], [*sections, speed], missing)


def write_report(runs: Sequence[RunReport], path: Path) -> None:
    """Write one HTML file about runs, whole or not at all; several are compared first.

    Args:
        runs: What `collect` returned.
        path: The file.

    Raises:
        OSError: There is no such folder, or the disk is full.
    """
    comparison = None
    if len(runs) > 1:
        tables = [Table([*runs[0].summary], [[*run.summary.values()] for run in runs])]
        texts = {
            key: [run.options.get(key, "–") for run in runs]
            for key in dict.fromkeys(k for r in runs for k in r.options)
        }
        differ = [[key, *values] for key, values in texts.items() if len(set(values)) > 1]
        if differ:
            tables += [Table(["options that differ", *(run.name for run in runs)], differ)]
        of = f"{', '.join(run.name for run in runs)} by epoch"
        curves = embed(draw_comparison(runs), f"Monitored metric of {of}")
        comparison = Section("Comparison", tables=tables, pictures=[curves])
    # Names of files and classes may hold control characters and bytes that are not UTF-8.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    template = environment.from_string((files("vision_ssm.analysis") / "report.html").read_text(encoding="utf-8"))
    made = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    write_text(path, template.render(runs=runs, comparison=comparison, version=__version__, made=made))


def draw_comparison(runs: Sequence[RunReport]) -> Figure:
    """Draw the monitored metric of runs by epoch; different metrics beside each other. Circles mark the best epochs."""
    metrics = list(dict.fromkeys(run.monitor for run in runs))
    figure = new_figure(5.8 * len(metrics), 3.6)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
        for number, run in enumerate(runs):
            if run.monitor == metric:
                how: dict[str, Any] = dict(color=COLORS[number % len(COLORS)])
                label = printable(run.name).replace("$", r"\$")  # dollar signs would start matplotlib's maths
                line = LINES[number % len(LINES)]  # equal curves stay visible
                axes.plot(*zip(*run.curve, strict=True), linestyle=line, label=label, linewidth=1.8, **how)
                axes.plot(run.best, dict(run.curve)[run.best], "o", markersize=7, fillstyle="none", **how)
        axes.set(xlabel="epoch", ylabel=called(metric), title=f"{called(metric)} on validation images, best circled")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def embed(picture: Image.Image | Figure, alt: str, caption: str = "", scale: float = 96 / 130) -> Picture:
    """A picture as part of a page: a PNG, or a JPEG where that would be large.

    Args:
        picture: An image, or a matplotlib figure.
        alt: What it shows, for those who do not see it.
        caption: What to write below it.
        scale: CSS pixels per pixel; by default those of figures, which have 130 dots per inch.
    """
    file = io.BytesIO()
    if not isinstance(picture, Image.Image):
        picture.savefig(file, format="png", dpi=130)
        picture = Image.open(file)
    width, height = (round(side * scale) for side in picture.size)
    image = picture.convert("RGB")
    image.thumbnail((_WIDEST, 2 * _WIDEST))
    kind, file = "png", io.BytesIO()
    image.save(file, "PNG", optimize=True)
    if file.tell() > _LARGEST:
        kind, file = "jpeg", io.BytesIO()
        image.save(file, "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return Picture(Markup(f"data:image/{kind};base64,{content}"), width, height, alt, caption)


def called(metric: str) -> str:
    """A metric's name, for people."""
    return " ".join(_CALLED.get(word, word) for word in metric.split("_"))


def share(value: float | None) -> str:
    """A share in %."""
    return "–" if value is None or np.isnan(value) else f"{value:.1%}"


def _value(name: str, value: Any) -> str:
    if isinstance(value, float) and name == "loss" and not np.isnan(value):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value) if isinstance(value, str) else share(value)


def _short(count: float) -> str:
    unit, name = next((pair for pair in ((1e9, "G"), (1e6, "M")) if count >= pair[0]), (1e3, "k"))
    return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"


def _seconds(history: Sequence[Mapping[str, Any]], config: TrainConfig) -> float:
    """Time of all training steps, without validation, from the throughput of each epoch."""
    steps = np.diff([0, *(row["step"] for row in history)])
    speeds = np.array([row["images_per_second"] for row in history])
    return float(np.sum(steps * config.images_per_step / np.maximum(speeds, 1e-9)))


def _receptive_field(task: Task, images: Images) -> Figure | None:
    """The effective receptive fields of the model, which is not optimized yet, on some of the images."""
    if isinstance(images, ImageStream):
        return None
    batches = input_batches(task, images.spread(16), 4)
    try:
        return effective_receptive_field(task.model, batches, name=task.spec.model).plot()
    except (InputError, RuntimeError):  # it has no stages, say
        return None


def _overview(summary: Mapping[str, str], task: Task, cost: Complexity, shape: Sequence[int]) -> Section:
    rows = [["task", task.name]]
    rows += [[name.removeprefix(">"), text] for name, text in summary.items() if name != "run"]
    rows += [["papers' operations", _short(cost.paper_ops)], ["input", "×".join(map(str, shape))]]
    time = "Training is the time of the steps alone, without validation; ms per image is that of single images."
    return Section("Overview", notes=[f"{task.summary}.", time], tables=[Table(["", ""], rows)])


def _configuration(folder: RunFolder, config: TrainConfig) -> Section:
    """What differs from the recipe first."""
    record = read_json(folder.config)
    recipe = recipes.RECIPES.get(record.get("recipe", ""))
    known = recipe() if recipe is not None and recipe.config is type(config) else type(config)()
    values, default = _values(config), _values(known)
    changed = [
        [option(name), _plain(value), _plain(default[name])]
        for name, value in values.items()
        if value != default[name] and (name, default[name]) != ("monitor", None)  # which training fills in
    ]
    of = f"the recipe {recipe.name}" if recipe else "the defaults"
    notes = [f"What differs from {of}:" if changed else f"Nothing differs from {of}."]
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    about = [["command", record["command"]]] if "command" in record else []
    about += [["trained with", versions]] if versions else []
    table = [Table(["option", "value", "by default"], changed)] if changed else []
    everything = [[option(name), _plain(value)] for name, value in values.items()]
    folded = {"All options": Table(["option", "value"], everything)}
    return Section("Configuration", notes, [*table, *([Table(["", ""], about)] if about else [])], folded=folded)


def _values(config: TrainConfig) -> dict[str, Any]:
    """Options and their values, as JSON has them."""
    return json.loads(json.dumps(recipes.to_dict(config)))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name}={str(each).replace(' ', '')}" for name, each in value.items()]
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value) or "none"


def _results(
    saved: dict[str, Any],
    best: Mapping[str, Any],
    evaluation: Evaluation | None,
    images: Images | None,
    on: str,
    missing: str,
    pictures: dict[str, Picture],
) -> Iterable[Section]:
    """Metrics, classes, mistakes and samples, as far as they are known."""
    found: list[Any] = []
    if evaluation is not None and images is not None:
        metrics, details = evaluation.metrics(), evaluation.details()
        notes = [f"The best weights on {evaluation.images:,} images of {on}.", *evaluation.remarks()]
        found = evaluation.mistakes(images)
    else:
        metrics = {name.removeprefix("val_"): best[name] for name in best if name.startswith("val_")}
        details = saved
        wrote = "what training wrote of the best epoch"
        notes = [f"Not measured again, because {missing}. The numbers and pictures here are {wrote}."]
    rows = [[called(name), _value(name, value)] for name, value in metrics.items()]
    if interval := details.get("accuracy_interval"):
        rows += [["accuracy, 95% interval", " to ".join(map(share, interval))]]
    yield Section("Metrics", notes, [Table(["", ">"], rows)])
    if classes := details.get("per_class"):
        first, *others = classes[0]
        lines = [[row[first], *(_value(name, row[name]) for name in others)] for row in classes]
        yield Section("Classes", tables=[Table([first, *(f">{called(name)}" for name in others)], lines)])
    predictions = pictures.pop("Predictions", None)
    yield from (Section(title, pictures=[picture]) for title, picture in pictures.items())
    if found:
        small = [embed(each.picture, f"{each.image}: {each.text}", f"{each.image}: {each.text}", 1) for each in found]
        yield Section("Worst mistakes", small=small)
    elif known := details.get("most_confident_mistakes"):
        lines = [[_value(name, value) for name, value in row.items()] for row in known]
        yield Section("Worst mistakes", tables=[Table([*known[0]], lines)])
    elif evaluation is not None:
        yield Section("Worst mistakes", notes=["There are none."])
    if predictions is not None:
        yield Section("Samples", pictures=[predictions])


def _speed(task: Task, shape: Sequence[int]) -> tuple[Section, str]:
    """The speed of one and of eight images, and that of one in short."""
    rows: list[list[str]] = []
    notes = [f"Forward passes on noise of {'×'.join(map(str, shape))}; spread: interquartile range over the median."]
    milliseconds, noise = 0.0, Image.effect_noise((shape[2], shape[1]), 64).convert("RGB")
    for count in (1, 8):
        if milliseconds * count > 1e3 * _PATIENCE:
            notes += [f"{count} images were not timed: one takes {milliseconds / 1e3:.1f} s."]
            continue
        speed = measure_task(task, as_dataset([noise] * count), count, seconds=0.3)
        memory = "–" if speed.peak_memory_mib is None else f"{speed.peak_memory_mib:,.0f}"
        numbers = f"{speed.milliseconds:,.1f}", f"{speed.spread:.0%}", f"{speed.images_per_second:,.1f}", memory
        rows.append([str(count), *numbers, speed.backend or "none"])
        milliseconds = milliseconds or speed.milliseconds
    settings = {**machine_settings(task.device), "vision_ssm.optimize": "on" if task.device.type == "cpu" else "off"}
    columns = [">images", ">ms", ">spread", ">images/s", ">peak MiB", "scan backend"]
    table = Table(["setting", "value"], [*map(list, settings.items())])
    return Section("Speed", notes, [Table(columns, rows)], folded={"The machine": table}), rows[0][1]

"""Accuracy, time and memory of trained models at other resolutions than that of their training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vision_ssm.analysis.result import COLORS, LINES, MARKERS, Result, legend_below, new_figure
from vision_ssm.analysis.speed import FAILURES, Speed, mark_sizes, measure_step, reason
from vision_ssm.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vision_ssm.data import Images
    from vision_ssm.engine.task import Task


@dataclass(frozen=True)
class ResolutionPoint:
    """A model at one size.

    Args:
        model: What it is called.
        size: Side of a classifier's images in pixels, the shortest side of a detector's or segmenter's.
        own_size: The size that its settings give, that of its training or published evaluation.
        value: The metric; ``None`` if the model fails.
        speed: Time and memory of a step; ``None`` if it fails.
        error: Why it fails.
    """

    model: str
    size: int
    own_size: int
    value: float | None = None
    speed: Speed | None = None
    error: str = ""


@dataclass(frozen=True)
class Resolution(Result):
    """Models at several sizes.

    Args:
        metric: Name of the metric.
        points: The measurements.
    """

    metric: str
    points: tuple[ResolutionPoint, ...]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "model": point.model,
                "size": point.size,
                "own_size": point.own_size,
                self.metric: point.value,
                "milliseconds_per_image": point.speed and point.speed.milliseconds / point.speed.batch,
                "peak_memory_mib": point.speed and point.speed.peak_memory_mib,
                "batch": point.speed and point.speed.batch,
                "spread": point.speed and point.speed.spread,
                "backend": point.speed and point.speed.backend,
                "error": point.error,
            }
            for point in self.points
        ]

    def plot(self) -> Figure:
        """Draw metric, time and memory against the size; a ring is around each model's own size."""
        figure = new_figure(12, 4.3)
        panels = figure.subplots(1, 3)
        rows = [row for row in self.rows() if not row["error"]]
        batch = ", ".join(str(count) for count in sorted({row["batch"] for row in rows}))
        metric = self.metric.replace("_", " ")
        shown = {
            self.metric: (metric, f"{metric} (%)", 100),
            "milliseconds_per_image": (f"time, batch size {batch}", "ms per image", 1),
            "peak_memory_mib": (f"memory, batch size {batch}", "MiB beyond weights and images", 1),
        }
        for axes, (key, (title, unit, factor)) in zip(panels, shown.items(), strict=True):
            for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
                own = [row for row in rows if row["model"] == name and row[key] is not None]
                style = dict(color=COLORS[number % len(COLORS)], linestyle=LINES[number % len(LINES)])
                marker = MARKERS[number // len(COLORS) % len(MARKERS)]
                ring = [place for place, row in enumerate(own) if row["size"] == row["own_size"]]
                values = [factor * row[key] for row in own]
                axes.plot([row["size"] for row in own], values, marker=marker, markersize=4, label=name, **style)
                axes.plot(
                    [own[place]["size"] for place in ring],
                    [values[place] for place in ring],
                    "o",
                    markersize=11,
                    fillstyle="none",
                    color=style["color"],
                )
            axes.set(title=title[0].upper() + title[1:], ylabel=unit, yscale="linear" if factor > 1 else "log")
            mark_sizes(axes, sorted({row["size"] for row in rows}))
        panels[0].plot([], [], "o", markersize=11, fillstyle="none", color="0.3", label="the model's own size")
        legend_below(panels[0])
        return figure


def measure_resolutions(
    models: Mapping[str, tuple[Task, Images]],
    sizes: Sequence[int],
    *,
    batch: int = 1,
    seconds: float = 1.0,
    batch_size: int | None = None,
    workers: int | None = None,
    on_point: Callable[[ResolutionPoint], None] = lambda point: None,
) -> Resolution:
    """Measure models at several sizes, without training them for these.

    What else belongs to a model's input, such as the share of a resized image that is kept, stays. A model that
    cannot take a size, or runs out of memory, gives a point that says so.

    Args:
        models: What each is called, the model, and labeled images.
        sizes: Sides of the images in pixels; the shortest ones for detectors and segmenters.
        batch: Images per step when time and memory are measured.
        seconds: How long a step is timed at least.
        batch_size: Batch size of the evaluation; by default what the task says, or 64.
        workers: Number of loading processes; by default chosen from the number of cores.
        on_point: Called with each point as soon as it is measured.

    Raises:
        InputError: The models are of different tasks, a size is out of the limits, an image cannot be read, or a
            model can take none of the sizes.

    Source: figure 4 of "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection"
    (Behrouz et al., 2024).
    """
    names = {task.name for task, _ in models.values()}
    if len(names) != 1:
        raise InputError(f"models of one task can be compared, not of {' and '.join(sorted(names)) or 'none'}")
    first, _ = next(iter(models.values()))
    metric = "accuracy" if first.name == "classification" else first.monitor
    if any(metric != "accuracy" and task.monitor != metric for task, _ in models.values()):
        raise InputError(f"the models are measured by {' and '.join(sorted({t.monitor for t, _ in models.values()}))}")
    points = []
    for name, (task, images) in models.items():
        specs = [task.spec.at_size(size) for size in sizes]
        for size, spec in zip(sizes, specs, strict=True):
            resized = copy.copy(task)
            resized.spec = spec
            point = ResolutionPoint(name, size, min(task.spec.input_size))
            try:
                speed = measure_task(resized, images, batch, seconds)
                evaluation = resized.evaluate(images, batch_size, workers)
                point = ResolutionPoint(name, size, point.own_size, evaluation.metrics()[metric], speed)
            except FAILURES as error:
                point = ResolutionPoint(name, size, point.own_size, error=reason(error))
            points.append(point)
            on_point(point)
    if all(point.error for point in points):
        raise InputError(f"no size can be measured; {points[0].model} fails at {points[0].size}: {points[0].error}")
    return Resolution(metric, tuple(points))


def measure_task(task: Task, images: Images, batch: int = 1, seconds: float = 1.0) -> Speed:
    """Time a task's model on the first of some images.

    Args:
        task: The model, ready for evaluation.
        images: The images.
        batch: Batch size.
        seconds: How long a step is timed at least.
    """
    with torch.inference_mode():
        inputs = next(iter(task.batches(images, batch, workers=0)))
        with torch.autocast(task.device.type, task.autocast, enabled=task.autocast is not None):
            return measure_step(lambda: task.forward(task.model, inputs), len(inputs["id"]), task.device, seconds)

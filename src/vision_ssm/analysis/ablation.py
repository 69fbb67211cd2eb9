"""Variants of a model or its training, each trained with several seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vision_ssm.analysis.result import COLORS, MARKERS, Result, legend_below, new_figure
from vision_ssm.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid(over: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """All combinations of values, by name, such as "steps=2 windows=none"; the last of the options changes fastest.

    Raises:
        InputError: An option has no value, or one value twice.
    """
    texts = {name: [*map(_text, values)] for name, values in over.items()}
    for name, shown in texts.items():
        if not shown or len(set(shown)) < len(shown):
            raise InputError(f"{name} takes one or more values, each once, got {','.join(shown) or 'none'}")
    labels = (" ".join(map("=".join, zip(over, each, strict=True))) for each in itertools.product(*texts.values()))
    values = (dict(zip(over, each, strict=True)) for each in itertools.product(*over.values()))
    return dict(zip(labels, values, strict=True))


@dataclass(frozen=True)
class Variant:
    """One of the variants.

    Args:
        name: What it is called.
        values: What is special about it, by option.
        parameters: Number of parameters.
        macs: Multiply-accumulates of a forward pass of one image.
        milliseconds: Time of a forward pass of one image.
    """

    name: str
    values: Mapping[str, Any]
    parameters: int
    macs: int
    milliseconds: float


@dataclass(frozen=True)
class AblationRun:
    """A variant trained with one seed.

    Args:
        variant: Its name.
        seed: The seed.
        value: The metric; ``None`` if the training failed.
        images_per_second: Images that training took per second; ``None`` if not known.
        error: Why it failed.
    """

    variant: str
    seed: int
    value: float | None
    images_per_second: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Ablation(Result):
    """Variants beside each other.

    Args:
        metric: Name of the metric, a share.
        variants: The variants; the others are compared with the first one.
        runs: Those that are done.
    """

    metric: str
    variants: tuple[Variant, ...]
    runs: tuple[AblationRun, ...] = ()

    def values(self, variant: Variant) -> dict[int, float]:
        """The metric of a variant by seed."""
        return {run.seed: run.value for run in self.runs if run.variant == variant.name and run.value is not None}

    def rows(self) -> list[dict[str, Any]]:
        """One line per run; per variant, if there are no runs."""
        runs = self.runs or [AblationRun(variant.name, 0, None) for variant in self.variants]
        known, lines = {variant.name: variant for variant in self.variants}, []
        names = {name: "" for variant in self.variants for name in variant.values}
        for run in runs:
            variant = known[run.variant]
            result = {"seed": run.seed, self.metric: run.value} if self.runs else {}
            result |= {name: getattr(run, name) for name in ("images_per_second", "error")} if self.runs else {}
            values = names | {name: _text(value) for name, value in variant.values.items()}
            lines.append({"variant": run.variant, **values, **_costs(variant), **result})
        return lines

    def summary(self) -> list[dict[str, Any]]:
        """One line per variant: costs, mean and standard error over the seeds, and of the difference to the first one.

        Differences are paired: each is between two runs of one seed, and only seeds that both have count. A standard
        error needs two seeds. Images per second are the median of the runs.
        """
        first, lines = self.values(self.variants[0]), []
        for variant in self.variants:
            own = self.values(variant)
            mean, error = mean_and_error(list(own.values()))
            differences = [value - first[seed] for seed, value in own.items() if seed in first]
            difference = mean_and_error(differences if variant is not self.variants[0] else [])
            line = {"variant": variant.name, **_costs(variant), "seeds": len(own), self.metric: mean}
            line |= {"standard_error": error, "difference": difference[0], "difference_error": difference[1]}
            speeds = [run.images_per_second for run in self.runs if run.variant == variant.name]
            line["images_per_second"] = statistics.median(filter(None, speeds)) if any(speeds) else None
            lines.append(line)
        return lines

    def plot(self) -> Figure:
        """Draw the metric with its standard errors against parameters, multiply-accumulates and time of training.

        The time is that of a forward pass unless all variants have images per second of training.
        """
        lines = self.summary()
        trained = any(line[self.metric] is not None for line in lines)
        height = 3.6 + 0.22 * math.ceil(len(lines) / 4)
        figure = new_figure(11, height)
        panels = figure.subplots(1, 3, sharey=True)
        shown = {"parameters": ("Parameters", "millions", 1e6), "macs": ("Multiply-accumulates", "millions", 1e6)}
        if all(line["images_per_second"] for line in lines):
            lines = [line | {"milliseconds": 1e3 / line["images_per_second"]} for line in lines]
            shown |= {"milliseconds": ("Time of training", "ms per image", 1.0)}
        else:
            shown |= {"milliseconds": ("Time", "ms per image", 1.0)}
        for axes, (key, (title, unit, scale)) in zip(panels, shown.items(), strict=True):
            for number, line in enumerate(lines):
                mean, error = line[self.metric], line["standard_error"]
                place = -number if not trained else math.nan if mean is None else 100 * mean
                axes.errorbar(
                    line[key] / scale,
                    place,
                    None if error is None else 100 * error,
                    fmt=MARKERS[number // len(COLORS) % len(MARKERS)],
                    color=COLORS[number % len(COLORS)],
                    capsize=3,
                    label=line["variant"],
                )
            axes.set(title=title, xlabel=unit)
            axes.locator_params(axis="x", nbins=4)
            axes.ticklabel_format(axis="x", useOffset=False)
            axes.margins(x=0.15, y=0.15)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        if trained:
            counts = [line["seeds"] for line in lines if line["seeds"]]
            fewest, most = min(counts), max(counts)
            count = f"{most}" if fewest == most else f"{fewest} to {most}"
            bars = f", mean and standard error of {count} seeds" if most > 1 else ""
            what = self.metric.replace("_", " ")
            panels[0].set_ylabel(f"{what} (%)")
            figure.suptitle(f"{what[0].upper()}{what[1:]}{bars}")
        else:
            panels[0].set_yticks([])
        legend_below(panels[0])
        return figure


def _text(value: Any) -> str:
    return "none" if value is None else str(value).replace(" ", "")


def _costs(variant: Variant) -> dict[str, Any]:
    return {name: getattr(variant, name) for name in ("parameters", "macs", "milliseconds")}


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard error of values; ``None`` where there are too few."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def ablate(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    train: Callable[[Variant, int], tuple[float, float | None]],
    *,
    metric: str = "accuracy",
    on_run: Callable[[Ablation], None] = lambda so_far: None,
) -> Ablation:
    """Train every variant with every seed; the first seed of all variants comes first.

    Args:
        variants: The variants; the others are compared with the first one.
        seeds: The seeds.
        train: Trains a variant with a seed; returns the metric, and the images per second or ``None``.
        metric: Its name.
        on_run: Called after every run with what there is so far.

    Returns:
        All of it. A run that cannot be trained is recorded with its error.
    """
    result = Ablation(metric, tuple(variants))
    for seed, variant in itertools.product(seeds, variants):
        try:
            run = AblationRun(variant.name, seed, *train(variant, seed))
        except (InputError, RuntimeError, ValueError, OSError) as error:
            text = error.line if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            run = AblationRun(variant.name, seed, None, error=" ".join(text.split()))
        result = Ablation(metric, result.variants, (*result.runs, run))
        on_run(result)
    return result

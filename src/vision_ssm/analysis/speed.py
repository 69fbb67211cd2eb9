"""Measure the time and memory of a model, and record the settings that they depend on."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from vision_ssm import __version__
from vision_ssm.analysis.result import COLORS, LINES, Result, legend_below, new_figure
from vision_ssm.scan import last_backend
from vision_ssm.scan.cpu.library import load_library

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAILURES = (RuntimeError, AssertionError, ValueError, TypeError, MemoryError)
"""What models raise on images that they cannot take, and torch where memory does not suffice."""


def reason(error: BaseException) -> str:
    """Return the first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Speed:
    """One measurement.

    Args:
        batch: Batch size.
        milliseconds: Median time of a step.
        spread: Interquartile range of the times over their median.
        images_per_second: Throughput at the median.
        peak_memory_mib: Most memory that torch held at a time during a step, beyond what it held before: weights and
            images; ``None`` where it does not tell, on devices other than CPU and CUDA.
        backend: The scan's backend that ran; ``None`` where the model has no scan.
    """

    batch: int
    milliseconds: float
    spread: float
    images_per_second: float
    peak_memory_mib: float | None
    backend: str | None


def measure_speed(
    model: nn.Module,
    batch: int,
    height: int,
    width: int,
    *,
    training: bool = False,
    autocast: torch.dtype | None = None,
    seconds: float = 2.0,
) -> Speed:
    """Time forward passes, or forward and backward ones.

    Args:
        model: The model, on the device and in the dtype to measure.
        batch: Batch size.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        training: Time forward and backward in training mode; else forward in evaluation mode without gradients.
        autocast: Run the forward pass under autocast to this dtype.
        seconds: Measure for at least this long, after a fifth of it for warming up.
    """
    parameter = next(model.parameters())
    device = parameter.device
    images = torch.randn(batch, getattr(model, "in_chans", 3), height, width, device=device, dtype=parameter.dtype)
    model.train(training)

    def step() -> None:
        with torch.set_grad_enabled(training):
            with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
                y = model(images)
            if training:
                y.float().square().mean().backward()
                model.zero_grad(set_to_none=True)

    return measure_step(step, batch, device, seconds)


def measure_step(step: Callable[[], Any], batch: int, device: torch.device, seconds: float = 2.0) -> Speed:
    """Time anything that computes on a batch.

    Args:
        step: What to time; it leaves the memory in use as it found it.
        batch: Batch size.
        device: Where it computes.
        seconds: Measure for at least this long, after a fifth of it for warming up.
    """

    def time_steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - start) / count

    backend, first, times = scan_backend(step), [time_steps(1)], list[float]()
    while sum(first) < seconds / 5:
        first.append(time_steps(1))
    # About 50 samples, of several steps if these are short.
    count = max(1, int(seconds / 50 / statistics.median(first)))
    while len(times) < 3 or count * sum(times) < seconds:
        times.append(time_steps(count))
    quarter, median, other = statistics.quantiles(times, n=4, method="inclusive")
    return Speed(
        batch=batch,
        milliseconds=median * 1e3,
        spread=(other - quarter) / median,
        images_per_second=batch / median,
        peak_memory_mib=peak_memory(step, device),
        backend=backend,
    )


def peak_memory(step: Callable[[], Any], device: torch.device) -> float | None:
    """Return the MiB that torch holds in ``step`` at its peak, beyond what it holds before.

    On a CPU, its allocations are recorded; what libraries allocate on their own, such as the working memory of the
    compiled scan, is not among them. ``None`` on devices other than CPU and CUDA.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events: Any = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((count for _, count in changes), initial=0)) / 2**20


@dataclass(frozen=True)
class BenchEntry:
    """One model at one size and batch size.

    Args:
        model: Its name.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        batch: Batch size.
        parameters: Number of parameters.
        macs: Multiply-accumulates of a forward pass of one image, as :func:`complexity` counts them.
        speed: What was measured; ``None`` if it failed.
        error: Why it failed.
    """

    model: str
    height: int
    width: int
    batch: int
    parameters: int
    macs: int | None = None
    speed: Speed | None = None
    error: str = ""


@dataclass(frozen=True)
class Bench(Result):
    """Time and memory of models at several sizes.

    Args:
        entries: The measurements.
        training: Whether they are of forward and backward passes.
    """

    entries: tuple[BenchEntry, ...]
    training: bool = False

    def rows(self) -> list[dict[str, Any]]:
        """The columns of timm's benchmark.py, as far as they are known, and those that it lacks."""
        kind, lines = "train" if self.training else "infer", []
        for entry in self.entries:
            speed = entry.speed
            macs = {} if self.training else {"infer_gmacs": entry.macs and round(entry.macs / 1e9, 3)}
            lines.append(
                {
                    "model": entry.model,
                    f"{kind}_samples_per_sec": speed and round(speed.images_per_second, 2),
                    f"{kind}_step_time": speed and round(speed.milliseconds, 3),
                    f"{kind}_batch_size": entry.batch,
                    f"{kind}_img_size": entry.width,
                    **macs,
                    "param_count": round(entry.parameters / 1e6, 3),
                    "height": entry.height,
                    "peak_memory_mib": speed and speed.peak_memory_mib,
                    "spread": speed and round(speed.spread, 4),
                    "backend": speed and speed.backend,
                    "error": entry.error,
                }
            )
        return lines

    def plot(self) -> Figure:
        """Draw time and memory of a step against the side of the images, a line for each model and batch size."""
        figure = new_figure(9.5, 4.6)
        names, batches = (list(dict.fromkeys(getattr(e, key) for e in self.entries)) for key in ("model", "batch"))
        panels = figure.subplots(1, 2)
        for name, batch in itertools.product(names, batches):
            own = sorted((e for e in self.entries if (e.model, e.batch) == (name, batch) and e.speed), key=_side)
            speeds = [entry.speed for entry in own if entry.speed]
            style = dict(color=COLORS[names.index(name) % len(COLORS)], label=f"{name}, batch {batch}")
            style |= dict(linestyle=LINES[batches.index(batch) % len(LINES)], marker="o")
            panels[0].plot([*map(_side, own)], [speed.milliseconds for speed in speeds], **style)
            panels[1].plot([*map(_side, own)], [speed.peak_memory_mib or math.nan for speed in speeds], **style)
        what = "forward and backward" if self.training else "forward"
        units = ("ms per step", "MiB beyond weights and images")
        for axes, title, unit in zip(panels, ("Time", "Memory"), units, strict=True):
            axes.set(title=f"{title} ({what})", ylabel=unit, yscale="log")
            mark_sizes(axes, sorted({_side(entry) for entry in self.entries if entry.speed}))
        legend_below(panels[0])
        return figure


def _side(entry: BenchEntry) -> float:
    return (entry.height * entry.width) ** 0.5


def mark_sizes(axes: Axes, sizes: Sequence[float]) -> None:
    """Give axes a logarithmic scale of image sides with as many of these sizes at it as there is space for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    shown: list[float] = []
    for size in sizes:
        if not shown or size >= shown[-1] * max(1.08, (sizes[-1] / sizes[0]) ** (1 / 8)):
            shown.append(size)
    axes.set(xscale="log", xlabel="side of the images (pixels)")
    axes.set_xticks(shown, [f"{size:.0f}" for size in shown])
    axes.set_xticks([], minor=True)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def scan_backend(step: Callable[[], Any]) -> str | None:
    """Run ``step`` and return the scan's backend, the C++ one with its instruction set; ``None`` if nothing scanned."""
    last_backend(forget=True)
    step()
    name = last_backend()
    library = load_library() if name == "cpu" else None
    return f"cpu-{library.levels[-1]}" if library else name


def machine_settings(device: torch.device) -> dict[str, str]:
    """Return what a measurement on ``device`` depends on: hardware, threads, versions, precision switches."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    settings = {
        "device": f"{device.type} ({hardware})",
        "threads": str(torch.get_num_threads()),
        "vision_ssm": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "float32 matrix products": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        settings["TF32 in cuDNN"] = str(torch.backends.cudnn.allow_tf32)
    return settings


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""Measure the speed of a model, and record the settings that it depends on."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from vision_ssm import __version__
from vision_ssm.scan import last_backend
from vision_ssm.scan.cpu.library import load_library


@dataclass(frozen=True)
class Speed:
    """One measurement.

    Args:
        batch: Batch size.
        milliseconds: Median time of a step.
        spread: Interquartile range of the times over their median.
        images_per_second: Throughput at the median.
        peak_memory_mib: Largest memory the accelerator's allocator held; ``None`` on a CPU.
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
    from torch.utils.benchmark import Timer  # warns about CUDA toolkits when imported

    parameter = next(model.parameters())
    device = parameter.device
    images = torch.randn(batch, getattr(model, "in_chans", 3), height, width, device=device, dtype=parameter.dtype)
    model.train(training)

    def step() -> None:
        with torch.set_grad_enabled(training):
            with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
                y = model(images)
            if training:
                model.zero_grad(set_to_none=True)
                y.float().square().mean().backward()

    start = time.perf_counter()
    backend = scan_backend(step)
    while time.perf_counter() - start < seconds / 5:
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=seconds)
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return Speed(
        batch=batch,
        milliseconds=times.median * 1e3,
        spread=times.iqr / times.median,
        images_per_second=batch / times.median,
        peak_memory_mib=memory,
        backend=backend,
    )


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

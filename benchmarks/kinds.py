"""Where a pass through a model spends its time, by kind of operator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports every start, and that there is no GPU

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SCAN, REST, BETWEEN = "scan", "rest", "between operators"
# An operator is of the first kind of which a part occurs in its name.
KINDS = {
    SCAN: ("route_scan",),
    "convolution": ("conv",),
    "normalization": ("norm",),
    "activation": ("gelu", "silu", "relu", "sigmoid"),
    "linear": ("mm", "linear", "matmul", "einsum"),
    "copies": ("copy", "clone", "contiguous", "aten::to", "aten::cat", "aten::stack", "aten::flip", "index_select"),
}


def time_by_kind(step: Callable[[], Any], passes: int = 8, seconds: float = 5.0, gpu: bool = False) -> dict[str, float]:
    """Return where the fastest of several passes spends its ms: operators' self times by kind, and between them.

    Slow passes are fewer: none begins after ``seconds``. With ``gpu``, the times are those of kernels on the GPU, and
    what is between them is the time in which it has nothing to do.
    """
    wait = torch.cuda.synchronize if gpu else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    step()
    wait()
    found: list[tuple[float, dict[str, float]]] = []
    begin = time.perf_counter()
    while not found or (len(found) < passes and time.perf_counter() - begin < seconds):
        with profile(activities=activities) as recorded:
            start = time.perf_counter()
            step()
            wait()
            whole = (time.perf_counter() - start) * 1e3
        spent = dict.fromkeys((*KINDS, REST), 0.0)
        for event in recorded.events():
            if event.device_type == DeviceType.CPU:  # each knows the time of the kernels it has launched
                spent[kind_of(event)] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3
        found.append((whole, {**spent, BETWEEN: max(0.0, whole - sum(spent.values()))}))
    return min(found, key=lambda each: each[0])[1]


def kind_of(event: Any) -> str:
    """Return an operator's kind: its own, or that of its nearest caller that has one; all inside the scan is scan."""
    kinds = []
    while event is not None:
        kinds += [kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)][:1]
        event = event.cpu_parent
    return SCAN if SCAN in kinds else kinds[0] if kinds else REST

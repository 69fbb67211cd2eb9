"""What the benchmarks share: options, timing, what the machine can do, tables and files."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import importlib.util
import io
import multiprocessing
import os
import statistics
import string
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

import vision_ssm
from vision_ssm.analysis import machine_settings
from vision_ssm.engine.files import atomic_write, write_text

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """argparse with the options of every benchmark, and errors of one line.

    Args:
        description: What the benchmark does.
        seconds: Time per measurement; ``None`` where no time is given, but something else.
    """

    def __init__(self, description: str, seconds: float | None) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.add_argument("--threads", type=count, default=2, metavar="N", help="threads of torch")
        if seconds is not None:
            self.add_argument("--seconds", type=duration, default=seconds, metavar="S", help="time per measurement")
        self.add_argument("--csv", type=output_file, metavar="PATH", help="also write the rows to this file")
        self.add_argument("--quick", action="store_true", help="tiny sizes and times: does it run at all?")
        self.add_argument(
            "--return-memory", action="store_true", help="let the C library return freed memory, as it does by default"
        )

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the words, and keep freed memory in this process unless asked to return it."""
        options = super().parse_args(*args, **kwargs)
        if not options.return_memory:
            vision_ssm.keep_freed_memory()
        return options

    def need(self, package: str) -> None:
        """Leave with one line if a package is not installed."""
        if importlib.util.find_spec(package) is None:
            self.error(f"this needs {package}, which is not installed")

    def error(self, message: str) -> NoReturn:
        """Leave with one line and exit code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def count(text: str) -> int:
    """Parse a positive integer."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def duration(text: str) -> float:
    """Parse a positive number of seconds."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")


def output_file(text: str) -> Path:
    """Parse the path of a file that can be written, before anything is measured."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder or lies in none that exists")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write into {str(path.parent)!r}: {error.strerror}") from error
    return path


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the best of several, and their interquartile range over the median."""

    median: float
    best: float
    calls: int
    spread: float


def interleaved(functions: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Timing]:
    """Time functions in turns, so that the machine's noise hits all alike.

    Args:
        functions: What to time, by name; each is called once beforehand.
        seconds: Time for each function, in ten turns. A slow one still gets seven calls (two below 0.1 seconds).
    """
    for function in functions.values():
        function()
    fewest = 7 if seconds >= 0.1 else 2
    times: dict[str, list[float]] = {name: [] for name in functions}
    waiting = list(functions)
    while waiting:
        for name in waiting:
            spent = 0.0
            while spent < seconds / 10:
                begin = time.perf_counter()
                functions[name]()
                times[name].append(time.perf_counter() - begin)
                spent += times[name][-1]
        waiting = [name for name in waiting if sum(times[name]) < seconds or len(times[name]) < fewest]
    return {name: _timing(each) for name, each in times.items()}


def _timing(times: Sequence[float]) -> Timing:
    quarter, median, other = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, min(times), len(times), (other - quarter) / median)


def products(dtype: torch.dtype, sizes: Sequence[int] = (1024, 1536, 2048)) -> dict[str, Callable[[], Any]]:
    """Return square matrix products to be timed; :func:`product_rate` turns their times into a rate."""
    return {f"mm {n}": _product(torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)) for n in sizes}


def product_rate(timings: Mapping[str, Timing]) -> float:
    """Return the best rate of the matrix products among ``timings``, in floating-point operations per second."""
    sizes = {name: int(name[3:]) for name in timings if name.startswith("mm ")}
    return max(2 * n**3 / timings[name].best for name, n in sizes.items())


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], Any]:
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def copy_rate(seconds: float) -> float:
    """Return the bytes per second that a large copy reads and writes together."""
    source = torch.ones(2**25)  # 128 MiB: in no cache
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, seconds)["copy"].best


def peak_memory(step: Callable[[], Any]) -> float | None:
    """Return the MiB that ``step`` needs at its peak beyond what is held before; ``None`` where Linux does not tell.

    The kernel's mark for this address space can be reset. ``getrusage`` cannot, and a child starts with its parent's.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free already must not count as held
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = step()
    after = _status("VmHWM")
    del kept
    return None if before is None or after is None else max(0.0, (after - before) / 1024)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, for its memory.

    There malloc maps every large block by itself and gives it back when it is free. Else it keeps some, and the
    peaks of two calls differ by up to a fifth.
    """
    exact = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_MMAP_MAX_="1000000")
    with unittest.mock.patch.dict(os.environ, exact), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _status(field: str) -> int | None:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(f"{field}:")), None)
    return None


def console() -> Console:
    """Return a console that does not cut tables where the output is no terminal."""
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(width=160, highlight=False)


def show(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]], notes: Sequence[str] = ()
) -> None:
    """Print a table.

    Args:
        title: Stands above it.
        rows: Values by name.
        columns: Heading, aligned to the right where it starts with ``>``, and format of the cells, such as
            ``"{milliseconds:.1f}"``; what is missing becomes a dash.
        notes: Lines below it.
    """
    table = Table()
    for heading, _ in columns:
        table.add_column(heading.lstrip(">"), justify="right" if heading.startswith(">") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_Cell().format(cell, **row) for _, cell in columns))
    console().print(f"[bold]{title}[/bold]", table, *notes, "", sep="\n")


class _Cell(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or value == "":
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return str(super().format_field(value, format_spec))


def machine(device: torch.device = CPU) -> dict[str, str]:
    """Return what measurements on a device of this machine depend on."""
    settings = machine_settings(device)
    if device.type != "cpu":
        return settings
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ("device", "threads", "vision_ssm", "torch", "timm", "python")
    return {"cores": str(cores), **{name: settings[name] for name in names}}


def machine_line(device: torch.device = CPU) -> str:
    """Return :func:`machine` on one line, and how busy it has been: threads wait for those whose core is taken."""
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return ", ".join(f"{name} {value}" for name, value in machine(device).items()) + load


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, str] | None = None) -> None:
    """Write rows, each with what it was measured on (:func:`machine`); columns are those of all rows together."""
    settings = machine() if settings is None else settings
    whole = [{**row, **settings} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in whole for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(whole)
    write_text(path, text.getvalue())


def save_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)

"""Speed of the scan operator on a CPU: each shape, other ways to compute the same, growth with the map.

python benchmarks/scan.py --csv scan.csv
python benchmarks/scan.py --growth --picture growth.png
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from peers import mamba_py, published
from torch import Tensor

from vision_ssm.layers import quasi_separable_scan
from vision_ssm.scan import CROSS_SCAN, ROWS, ScanPath, available_backends, build_routes, route_scan, use_backend

ROUTES = len(CROSS_SCAN)
PSCAN = "mamba.py's parallel scan"
ESTIMATE = """\
estimate: the time of the multiply-adds alone, at {multiply_adds_per_ns:.1f} per ns (as in float32 matrix products; \
{threads} threads).
  They are R + 17 + 9 N: R for the step size; 17 for its softplus (an exponential: a product and 5 multiply-adds;
  a logarithm: 9 and 1) and what else is done once; 9 per state (an exponential: 1 + 5; 3 for recurrence and output).
A copy moves {copy_gb_per_s:.1f} GB/s, read and written."""


@dataclass(frozen=True)
class Shape:
    """A call with the four routes of the cross scan; targets in ns per token x channel x route."""

    height: int
    width: int
    channels: int
    states: int = 1
    rank: int = 6
    forward_target: float | None = None
    backward_target: float | None = None

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.channels}"

    @property
    def elements(self) -> int:
        """Tokens x channels x routes of one image."""
        return self.height * self.width * self.channels * ROUTES

    @property
    def multiply_adds(self) -> int:
        """Vector operations per token x channel x route; see ``ESTIMATE``."""
        return self.rank + 17 + 9 * self.states

    def tensors(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Draw the arguments of a call, with parameters as Mamba's initialisation has them."""
        torch.manual_seed(0)
        tokens, K, C, N, R = self.height * self.width, ROUTES, self.channels, self.states, self.rank
        return dict(
            x=torch.randn(batch, tokens, C).to(dtype),
            dbc=torch.randn(batch, tokens, K, R + 2 * N).to(dtype),
            A=-torch.arange(1.0, N + 1).repeat(K, C, 1),
            dt_weight=(2 * torch.rand(K, R, C) - 1) * R**-0.5,
            dt_bias=torch.empty(K, C).uniform_(1e-3, 1e-1).expm1().log(),  # softplus gives 0.001..0.1
            D=torch.ones(K, C),
        )

    def call(self, tensors: dict[str, Tensor], backend: str) -> Tensor:
        """Run the operator."""
        with use_backend(backend):
            return route_scan(**tensors, routes=build_routes(CROSS_SCAN, self.height, self.width))


SHAPES = (
    Shape(56, 56, 192, forward_target=0.45, backward_target=1.6),
    Shape(56, 56, 192, rank=12, forward_target=0.45),
    Shape(256, 256, 96, forward_target=0.45, backward_target=1.6),
    Shape(14, 14, 768, rank=24, forward_target=0.55),
    Shape(7, 7, 768, rank=48, forward_target=0.8),
    Shape(28, 28, 192, states=16, rank=12, forward_target=1.9),
)
QUICK_SHAPES = (Shape(7, 7, 32), Shape(5, 9, 16, states=4, rank=3))


def measure_operator(shape: Shape, batch: int, dtype: str, seconds: float) -> dict[str, Any]:
    """Time forward and backward passes of one shape; ns per token x channel x route."""
    tensors = shape.tensors(batch, common.DTYPES[dtype])
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    y = shape.call(leaves, "cpu")
    grad = torch.randn(y.shape).to(y.dtype)
    with torch.no_grad():
        # One after the other: portable's buffers would leave nothing in the caches for the others.
        steps = {
            "forward": partial(shape.call, tensors, "cpu"),
            "portable": partial(shape.call, tensors, "portable"),
            "backward": lambda: torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True),
        }
        timings = {name: common.interleaved({name: step}, seconds)[name] for name, step in steps.items()}
    row: dict[str, Any] = dict(
        table="operator", shape=str(shape), states=shape.states, rank=shape.rank, dtype=dtype, batch=batch
    )
    for name, timing in timings.items():
        row[f"{name}_ns"] = timing.median * 1e9 / (shape.elements * batch)
        row[f"{name}_best_ns"] = timing.best * 1e9 / (shape.elements * batch)
    for name, target in (("forward", shape.forward_target), ("backward", shape.backward_target)):
        row[f"{name}_target_ns"] = target
        row[f"{name}_reached"] = None if target is None else row[f"{name}_ns"] <= target
    return row | dict(multiply_adds=shape.multiply_adds)


def measure_peers(shape: Shape, seconds: float) -> list[dict[str, Any]]:
    """Time every way on one float32 image, and compare their outputs with float64 ones."""
    tensors = shape.tensors()
    routes = build_routes(CROSS_SCAN, shape.height, shape.width)
    image = tensors["x"].unflatten(1, (shape.height, shape.width))  # (1, H, W, C)
    along = torch.stack([tensors["dbc"][:, routes.read[k].long(), k] for k in range(ROUTES)], 1)  # (1, K, T, F)
    first, across = image.permute(0, 3, 1, 2).contiguous(), along.transpose(2, 3).contiguous()
    parameters = tuple(tensors[name] for name in ("A", "dt_weight", "dt_bias", "D"))
    ways = {
        "published, loop over routes and time": partial(published, first, across, *parameters, together=False),
        "published, loop over time": partial(published, first, across, *parameters, together=True),
        PSCAN: partial(mamba_py, image, along, *parameters),
        "portable": partial(shape.call, tensors, "portable"),
        "cpu": partial(shape.call, tensors, "cpu"),
    }
    if importlib.util.find_spec("mambapy") is None:
        del ways[PSCAN]
    with torch.no_grad():
        exact = shape.call({name: tensor.double() for name, tensor in tensors.items()}, "portable")
        errors = {}
        for name, way in ways.items():
            errors[name] = float((way() - exact).abs().max() / exact.abs().max())
        timings = common.interleaved(ways, seconds)
    return [
        dict(
            table="peers",
            shape=str(shape),
            way=name,
            milliseconds=timing.median * 1e3,
            best_milliseconds=timing.best * 1e3,
            ratio_to_cpu=timing.median / timings["cpu"].median,
            error=errors[name],
        )
        for name, timing in timings.items()
    ]


def measure_both_ways(side: int, channels: int, batch: int, seconds: float) -> dict[str, Any]:
    """Time QSMixer's quasi-separable scan, ViM2's, and two scans, one in each direction, with heads or as in Mamba."""
    torch.manual_seed(0)
    states, heads, rank = 16, channels // 32, math.ceil(channels / 32)
    x, path = torch.randn(batch, side, side, channels), (ROWS,)
    shared = dict(dbc=torch.randn(batch, side, side, 2 * states), delta=torch.randn(batch, side, side, heads))
    shared |= dict(A=-torch.ones(1, channels, 1), dt_bias=torch.full((2, 1, heads), -4.0), D=torch.ones(channels))
    alike = shared | {name: torch.randn(batch, side, side, 2, shared[name].shape[3]) for name in ("dbc", "delta")}
    own = dict(dbc=torch.randn(batch, side, side, 2, rank + 2 * states), D=torch.ones(channels))
    own |= dict(A=-torch.arange(1.0, states + 1).repeat(2, channels, 1), dt_bias=torch.full((2, 1, channels), -4.0))
    own["dt_weight"] = torch.randn(2, rank, channels) / rank
    vim2 = {name: own[name][..., 0, :] if name == "dbc" else own[name][:1] for name in ("dbc", "A", "dt_weight")}
    row: dict[str, Any] = dict(table="both ways", shape=f"{side}x{side}x{channels}", states=states, batch=batch)
    for step in ("forward", "training"):
        steps = {}
        for name, given in (("qsmixer", shared), ("vim2", own | vim2), ("two_heads", alike), ("two_mamba", own)):
            leaves = {
                key: value.clone().requires_grad_(step == "training") for key, value in dict(x=x, **given).items()
            }
            steps[name] = partial(scan_both_ways, leaves, path)
        timings = common.interleaved(steps, seconds)
        for name, timing in timings.items():
            row[f"{name}_{step}_ms"] = timing.median * 1e3
        for name in ("vim2", "two_heads", "two_mamba"):
            row[f"{step}_ratio_{name}"] = timings["qsmixer"].median / timings[name].median
    return row


def scan_both_ways(tensors: dict[str, Tensor], paths: Sequence[ScanPath]) -> None:
    """Scan, and where tensors need them, compute the gradients."""
    y = quasi_separable_scan(**tensors, paths=paths)
    if y.requires_grad:
        torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))


def show_both_ways(rows: list[dict[str, Any]]) -> None:
    """Print the table of quasi-separable scans."""
    columns = [("shape", "{shape}"), (">batch", "{batch}")]
    for step in ("forward", "training"):
        columns += [(f">{step}", f"{{qsmixer_{step}_ms:.2f}}")]
        for name, heading in (("vim2", "ViM2"), ("two_heads", "two, heads"), ("two_mamba", "two, Mamba")):
            columns += [(f">{heading}", f"{{{name}_{step}_ms:.2f}}"), (">ratio", f"{{{step}_ratio_{name}:.2f}}")]
    common.show(
        f"QSMixer's scan beside ViM2's and two scans, one in each direction, N = {rows[0]['states']}: ms (medians)",
        rows,
        columns,
        [
            "QSMixer's: a step size and a decay rate per head of 32 channels, B and C for both directions. ViM2's: a "
            "step size and N rates per channel, B and C for both directions. Two, heads: as QSMixer's, each with B, C "
            "and step sizes of its own. Two, Mamba: as ViM2's, each with B, C and step sizes of its own."
        ],
    )


def measure_growth(sides: list[int], channels: int, seconds: float) -> list[dict[str, Any]]:
    """Time square maps of growing sides, and measure the memory of a call."""
    shapes = {str(side): Shape(side, side, channels) for side in sides}
    steps = {name: partial(shape.call, shape.tensors(), "cpu") for name, shape in shapes.items()}
    with torch.no_grad():
        timings = common.interleaved(steps, seconds)
        memory = {name: common.in_new_process(_memory_of_call, shape) for name, shape in shapes.items()}
    return [
        dict(
            table="growth",
            side=shape.height,
            tokens=shape.height**2,
            channels=channels,
            milliseconds=timings[name].median * 1e3,
            ns_per_token=timings[name].median * 1e9 / shape.height**2,
            ns_per_element=timings[name].median * 1e9 / shape.elements,
            peak_mib=memory[name],
        )
        for name, shape in shapes.items()
    ]


def _memory_of_call(shape: Shape) -> float | None:
    step = partial(shape.call, shape.tensors(), "cpu")
    with torch.no_grad():
        step()
        return common.peak_memory(step)


def draw_growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against tokens, both axes logarithmic, beside a straight line of slope 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column, label in zip(panels, ("milliseconds", "peak_mib"), ("ms per call", "peak MiB"), strict=True):
        found = [(row["tokens"], row[column]) for row in rows if row[column]]
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        if not found:
            continue
        tokens, values = zip(*found, strict=True)
        middle = len(found) // 2
        axes.plot(tokens, [values[middle] * n / tokens[middle] for n in tokens], "k--", lw=1, label="slope 1")
        axes.plot(tokens, values, "o-", label=f"four routes, {rows[0]['channels']} channels, float32")
        axes.legend()
        axes.grid(alpha=0.3)
    common.save_figure(path, figure)


def show_operator(rows: list[dict[str, Any]]) -> None:
    """Print the table of shapes."""
    described = [(">N", "{states}"), (">R", "{rank}"), ("dtype", "{dtype}"), (">batch", "{batch}")]
    forward = [
        (">forward", "{forward_ns:.2f}"),
        (">target", "{forward_target_ns:.2f}"),
        ("reached", "{forward_reached}"),
    ]
    backward = [(">backward", "{backward_ns:.2f}"), (">target", "{backward_target_ns:.2f}")]
    common.show(
        "Cross scan on the backend cpu: ns per token x channel x route (medians)",
        rows,
        [
            ("shape", "{shape}"),
            *described,
            *forward,
            (">estimate", "{estimate_ns:.2f}"),
            (">portable", "{portable_ns:.2f}"),
            *backward,
            ("reached", "{backward_reached}"),
        ],
        [ESTIMATE.format(**rows[0], threads=torch.get_num_threads())],
    )


def show_peers(rows: list[dict[str, Any]], shape: Shape) -> None:
    """Print the table of other ways."""
    notes = ["Medians. The error is the largest difference from float64, over the largest output."]
    if PSCAN not in {row["way"] for row in rows}:
        notes.append(f"{PSCAN} was left out: pip install mambapy")
    common.show(
        f"Ways to compute it: {shape}, N = {shape.states}, R = {shape.rank}, batch 1, float32",
        rows,
        [
            ("way", "{way}"),
            (">ms", "{milliseconds:.2f}"),
            (">times cpu", "{ratio_to_cpu:.1f}"),
            (">max relative error", "{error:.1e}"),
        ],
        notes,
    )


def show_growth(rows: list[dict[str, Any]]) -> None:
    """Print the table of sides."""
    common.show(
        "Growth with the map",
        rows,
        [
            ("map", "{side}x{side}"),
            (">tokens", "{tokens:,}"),
            (">ms", "{milliseconds:,.2f}"),
            (">ns per token", "{ns_per_token:.0f}"),
            (">ns per token x channel x route", "{ns_per_element:.2f}"),
            (">peak MiB", "{peak_mib:,.1f}"),
        ],
        [
            f"{rows[0]['channels']} channels, N = 1, R = 6, batch 1, float32, backend cpu; medians. "
            "Peak memory of a call: its output and working memory, without the arguments."
        ],
    )


def main() -> int:
    """Run the command line."""
    parser = common.Parser("Speed of the scan operator on a CPU.", seconds=1.0)
    parser.add_argument("--growth", action="store_true", help="measure growth with the map instead of the tables")
    parser.add_argument(
        "--picture", type=common.output_file, metavar="PATH", help="with --growth: draw it into this PNG"
    )
    options = parser.parse_args()
    if options.picture and not options.growth:
        parser.error("--picture needs --growth")
    if options.picture:
        parser.need("matplotlib")
    if "cpu" not in available_backends():
        parser.error(f"the compiled scan was not built here; there are {', '.join(available_backends())}")
    seconds = 0.02 if options.quick else options.seconds
    torch.set_num_threads(options.threads)
    common.console().print(common.machine_line())
    if options.growth:
        rows = measure_growth([7, 14, 28] if options.quick else [14, 28, 56, 112, 224, 448, 1024], 96, seconds)
        show_growth(rows)
        if options.picture:
            draw_growth(rows, options.picture)
    else:
        sizes = (256,) if options.quick else (1024, 1536, 2048)
        found = [common.product_rate(common.interleaved(common.products(torch.float32, sizes), seconds))]
        copy = common.copy_rate(seconds)
        shapes, batches = (QUICK_SHAPES, (1, 2)) if options.quick else (SHAPES, (1, 8))
        rows = [measure_operator(s, b, dtype, seconds) for s in shapes for dtype in common.DTYPES for b in batches]
        # Again at the end: the best of both is nearest to what the machine can do.
        found.append(common.product_rate(common.interleaved(common.products(torch.float32, sizes), seconds)))
        rate = max(found) / 2e9
        for row in rows:
            row |= dict(estimate_ns=row["multiply_adds"] / rate, multiply_adds_per_ns=rate, copy_gb_per_s=copy / 1e9)
        show_operator(rows)
        peers = measure_peers(shapes[0], seconds)
        show_peers(peers, shapes[0])
        rows += peers
        sides = [(7, 64)] if options.quick else [(56, 192), (28, 384), (14, 768), (7, 1536)]  # of ViQS-T
        both_ways = [measure_both_ways(side, channels, batch, seconds) for side, channels in sides for batch in batches]
        show_both_ways(both_ways)
        rows += both_ways
    if options.csv:
        common.write_csv(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

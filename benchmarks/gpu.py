"""Speed and memory on a GPU: the scan operator beside its floor, the models beside their peers, growth with the image.

python benchmarks/gpu.py --csv gpu.csv
python benchmarks/gpu.py --only operator
python benchmarks/gpu.py --tune            # asks the GPU which tiles are fastest before it times a call
python benchmarks/gpu.py --only tiles      # times many tiles: which should be the defaults?
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import common
import timm
import torch
from kinds import BETWEEN, KINDS, REST, time_by_kind
from peers import cross_merge, cross_scan
from rich.progress import track
from torch import Tensor

from models import SETS, SWIN, build, make_step, names_of
from scan import Shape
from vision_ssm.analysis import machine_settings, measure_speed
from vision_ssm.scan import CROSS_SCAN, Routes, available_backends, build_routes, portable, route_scan, use_backend
from vision_ssm.scan import triton as backend
from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.triton.tiles import tuning

# The four stages of VMamba-T and VMamba-B, then 16 states; height = width, channels, N, R.
STAGES = [(56, 96, 1, 6), (28, 192, 1, 12), (14, 384, 1, 24), (7, 768, 1, 48)]
STAGES += [(56, 128, 1, 8), (28, 256, 1, 16), (14, 512, 1, 32), (7, 1024, 1, 64)]
STAGES += [(56, 96, 16, 6), (14, 384, 16, 24)]
PEERS = [SWIN, "convnext_tiny", "vit_small_patch16_224"]
BATCHES = {224: 128, 512: 32, 1024: 8}
GROWTH = dict.fromkeys((224, 448, 896, 1344, 2048), 1)
TABLES = ("operator", "models", "kinds", "growth", "tiles")
FLOOR = """\
floor: the longest of three times, each at a rate measured before.
  x, dbc and y moved once, {copy_gb_per_s:.3g} GB/s in a copy;
  1 + N exponentials per token x channel x route, {exponentials_per_ns:.3g} per ns;
  R + 15 + 4 N multiply-adds, {multiply_adds_per_ns:.3g} per ns."""
OTHERS = """\
portable: torch.compile of the portable backend, whose recurrence writes into slices, which torch.compile leaves alone.
in a graph: the forward pass replayed as a CUDA graph, without the time in which Python launches it.
published: mamba-ssm's kernel between an explicit cross scan and merge."""


Measured = TypeVar("Measured")
Call = tuple[Callable[..., Tensor], list[Tensor]]  # and its arguments


def milliseconds(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the median time of a step."""
    if device.type != "cuda":
        return common.interleaved({"step": step}, seconds)["step"].median * 1e3
    from triton.testing import do_bench  # empties the L2 cache before every call

    return float(do_bench(step, warmup=int(seconds * 250), rep=int(seconds * 1000), return_mode="median"))


def measure_rates(device: torch.device, quick: bool, seconds: float) -> dict[str, float]:
    """Measure what bounds a scan: a copy, exponentials, multiply-adds."""
    from gpu_rates import exponentials_kernel, multiply_adds_kernel

    size = 2**16 if quick else 2**28
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    found = {"copy_gb_per_s": 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device, seconds) / 1e6}
    programs, rounds = (1, 1) if quick else (16 * backend.processors(device), 256)
    for name, kernel in (("exponentials_per_ns", exponentials_kernel), ("multiply_adds_per_ns", multiply_adds_kernel)):
        step = partial(kernel[(programs,)], target, rounds, num_warps=4, enable_fp_fusion=True)
        time = milliseconds(step, device, seconds)
        found[name] = programs * rounds * 16 * 1024 / time / 1e6
    return found


def measure_operator(
    shape: Shape, batch: int, device: torch.device, rates: dict[str, float], quick: bool, seconds: float
) -> dict[str, Any]:
    """Time one shape in bfloat16, forward and with its gradient, beside its floor and other ways."""
    tensors = {name: tensor.to(device) for name, tensor in shape.tensors(batch, torch.bfloat16).items()}
    routes = build_routes(CROSS_SCAN, shape.height, shape.width, device)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    grad = torch.randn_like(tensors["x"])

    def forward() -> Tensor:
        return route_scan(**tensors, routes=routes)

    def both() -> None:
        torch.autograd.grad(route_scan(**leaves, routes=routes), list(leaves.values()), grad)

    with use_backend("triton"):
        row: dict[str, Any] = dict(
            table="operator", shape=str(shape), states=shape.states, rank=shape.rank, batch=batch,
            forward_ms=_or_none(partial(milliseconds, forward, device, seconds)),
            graph_ms=_or_none(partial(_time_graph, forward, seconds)) if device.type == "cuda" else None,
            both_ms=_or_none(partial(milliseconds, both, device, seconds)),
        )  # fmt: skip
    elements = batch * shape.elements
    moved = 2 * tensors["x"].nbytes + tensors["dbc"].nbytes
    floors = dict(
        bytes_ms=moved / rates["copy_gb_per_s"] / 1e6,
        exponentials_ms=elements * (1 + shape.states) / rates["exponentials_per_ns"] / 1e6,
        multiply_adds_ms=elements * (shape.rank + 15 + 4 * shape.states) / rates["multiply_adds_per_ns"] / 1e6,
    )
    row |= rates | floors | dict(floor_ms=max(floors.values()))
    row["ratio_to_floor"] = _ratio(row["forward_ms"], row["floor_ms"])
    row["ratio_to_forward"] = _ratio(row["both_ms"], row["forward_ms"])
    others: dict[str, Callable[[], Call]] = {}
    if not quick:
        others["portable"] = partial(portable_call, routes, tensors)
    if importlib.util.find_spec("mamba_ssm") and device.type == "cuda":
        others["published"] = partial(published_call, shape, routes, tensors)
    for name in ("portable", "published"):
        forward_ms = both_ms = None
        if name in others:
            forward_ms = _or_none(partial(_time_other, others[name], False, device, seconds))
            both_ms = _or_none(partial(_time_other, others[name], True, device, seconds))
        row |= {f"{name}_ms": forward_ms, f"{name}_ratio": _ratio(forward_ms, row["forward_ms"])}
        row |= {f"{name}_both_ms": both_ms, f"{name}_both_ratio": _ratio(both_ms, row["both_ms"])}
    return row


def _ratio(time: float | None, base: float | None) -> float | None:
    return time / base if time and base else None


def arguments_of(tensors: dict[str, Tensor], routes: Routes) -> ScanArguments:
    """Return a call as the backends take it."""
    return ScanArguments(read=routes.read, write=routes.write, complete=routes.complete, **tensors)


def _time_graph(step: Callable[[], Any], seconds: float) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(step, rep=int(seconds * 1000), return_mode="median"))


def portable_call(routes: Routes, tensors: dict[str, Tensor]) -> Call:
    """Return a call of the portable backend under ``torch.compile``, and its arguments."""
    torch.compiler.reset()  # or it would give up after a few shapes
    scan = torch.compile(portable.scan)  # not through the operator, into which torch.compile does not look

    def step(*values: Tensor) -> Tensor:
        args = arguments_of(dict(zip(tensors, values, strict=True)), routes)
        return scan(args, args.x.dtype)[0]

    return step, list(tensors.values())


def published_call(shape: Shape, routes: Routes, tensors: dict[str, Tensor]) -> Call:
    """Return a call of mamba-ssm's kernel between a cross scan and a merge that copy the map, and its arguments."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    image = tensors["x"].unflatten(1, (shape.height, shape.width)).permute(0, 3, 1, 2)  # (B, C, H, W)
    along = torch.stack([tensors["dbc"][:, routes.read[k].long(), k] for k in range(len(routes))], 1)
    low_rank, B, C = along.transpose(2, 3).split([shape.rank, shape.states, shape.states], 2)  # (B, K, ., T)
    weight = tensors["dt_weight"].to(torch.bfloat16)
    flat = [tensors[name].flatten(0, 1) for name in ("A", "D", "dt_bias")]

    def step(image: Tensor, low_rank: Tensor, B: Tensor, C: Tensor, weight: Tensor, *flat: Tensor) -> Tensor:
        A, D, bias = flat
        u = cross_scan(image, 2).flatten(1, 2)  # (B, K C, T)
        delta = torch.einsum("bkrt,krc->bkct", low_rank, weight).flatten(1, 2)
        y = selective_scan_fn(u, delta, A, B, C, D, None, bias, True)
        return cross_merge(y.unflatten(1, (len(routes), -1)), 2, shape.height, shape.width)

    return step, [tensor.contiguous() for tensor in (image, low_rank, B, C, weight, *flat)]


def _time_other(make: Callable[[], Call], gradient: bool, device: torch.device, seconds: float) -> float:
    """Time another way, forward or with its gradient."""
    step, values = make()
    if not gradient:
        with torch.no_grad():
            return milliseconds(partial(step, *values), device, seconds)
    leaves = [value.clone().requires_grad_() for value in values]
    grad = torch.randn_like(step(*leaves))
    return milliseconds(lambda: torch.autograd.grad(step(*leaves), leaves, grad), device, seconds)


def _or_none(measure: Callable[[], Measured]) -> Measured | None:
    """Return a measurement, or nothing where memory does not suffice or the other way does not run."""
    try:
        return measure()
    except Exception as error:  # whatever it is, no other row may be lost for it
        common.console().print(f"left out: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}")
        return None
    finally:
        torch.cuda.empty_cache()


def measure_tiles(shape: Shape, batch: int, device: torch.device, quick: bool, seconds: float) -> list[dict[str, Any]]:
    """Time the candidates for a shape's tiles."""
    tensors = {name: tensor.to(device) for name, tensor in shape.tensors(batch, torch.bfloat16).items()}
    routes = build_routes(CROSS_SCAN, shape.height, shape.width, device)
    args = arguments_of(tensors, routes)
    grad = torch.randn_like(args.x)
    rows = []
    candidates = itertools.product((1, 2, 4), (4, 8, 16, 32), (16, 32), (1, 2))
    for tile in [backend.Tile(*c) for c in candidates if c[0] * c[1] in (16, 32)][: 1 if quick else None]:
        row: dict[str, Any] = dict(table="tiles", shape=str(shape), states=shape.states, rank=shape.rank, batch=batch)
        row |= dict(Q=tile.Q, S=tile.S, C=tile.C, warps=tile.warps)
        for name, step in (
            ("forward", partial(backend.forward, args, torch.bfloat16, tile)),
            ("backward", partial(backend.backward, args, grad, None, tile)),
        ):
            row[f"{name}_ms"] = _or_none(partial(milliseconds, step, device, seconds))
        rows.append(row)
    return rows


def measure_model(
    name: str, size: int, batch: int, training: bool, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Measure images per second and peak memory under bfloat16 autocast; nothing where memory does not suffice."""
    row: dict[str, Any] = dict(model=name, size=size, batch=batch, training=training)
    row |= dict(milliseconds=None, images_per_second=None, peak_mib=None, backend=None)

    def measure() -> dict[str, Any]:
        model = build(name, size, "float32").to(device)
        speed = measure_speed(model, batch, size, size, training=training, autocast=torch.bfloat16, seconds=seconds)
        found = dict(milliseconds=speed.milliseconds, images_per_second=speed.images_per_second)
        return found | dict(peak_mib=speed.peak_memory_mib, backend=speed.backend)

    return row | (_or_none(measure) or {})


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Compare every model's row with Swin-T's of the same setting."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["size"], row["batch"], row["training"]

    first = {key(row): row for row in rows if row["model"] == SWIN}
    for row in rows:
        base = first.get(key(row), {})
        for name, ratio in (("images_per_second", "speed_ratio"), ("peak_mib", "memory_ratio")):
            row[ratio] = row[name] / base[name] if row[name] and base.get(name) else None


def measure_kinds(
    name: str, size: int, batch: int, training: bool, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Measure where the time of a step under bfloat16 autocast goes."""
    row: dict[str, Any] = dict(model=name, size=size, batch=batch, training=training)
    row |= dict.fromkeys(("milliseconds", *KINDS, REST, BETWEEN))

    def measure() -> dict[str, float]:
        model = build(name, size, "float32").to(device)
        step = make_step(model, torch.randn(batch, 3, size, size, device=device), training)
        with torch.autocast(device.type, torch.bfloat16):
            return time_by_kind(step, seconds=seconds, gpu=device.type == "cuda")

    spent = _or_none(measure) or {}
    whole = sum(spent.values())
    return row | ({"milliseconds": whole} if spent else {}) | {kind: ms / whole for kind, ms in spent.items()}


def show_operator(rows: list[dict[str, Any]]) -> None:
    """Print the table of the operator."""
    call = [("shape", "{shape}"), (">N", "{states}"), (">R", "{rank}"), (">batch", "{batch}")]
    floor = [(">forward ms", "{forward_ms:.3f}"), (">bytes", "{bytes_ms:.3f}")]
    floor += [(">exponentials", "{exponentials_ms:.3f}"), (">multiply-adds", "{multiply_adds_ms:.3f}")]
    floor += [(">floor", "{floor_ms:.3f}"), (">times floor", "{ratio_to_floor:.2f}")]
    title = "Cross scan on the backend triton, bfloat16"
    common.show(f"{title}: forward beside its floor", rows, call + floor, [FLOOR.format(**rows[0])])
    others = [
        (">forward ms", "{forward_ms:.3f}"),
        (">in a graph", "{graph_ms:.3f}"),
        (">with backward", "{both_ms:.3f}"),
    ]
    others += [(">x", "{ratio_to_forward:.2f}")]
    for name in ("portable", "published"):
        others += [(f">{name} forward", f"{{{name}_ms:.3f}}"), (">x", f"{{{name}_ratio:.2f}}")]
        others += [(">with backward", f"{{{name}_both_ms:.3f}}"), (">x", f"{{{name}_both_ratio:.2f}}")]
    notes = [OTHERS]
    if importlib.util.find_spec("mamba_ssm") is None:
        notes.append("published was not measured: mamba-ssm is not installed.")
    common.show(
        f"{title}: with its gradient, and other ways (x: times ours; of ours, times forward)",
        rows,
        call + others,
        notes,
    )


def show_models(rows: list[dict[str, Any]], title: str) -> None:
    """Print a table of models."""
    columns = [("model", "{model}"), (">size", "{size}"), (">batch", "{batch}"), ("training", "{training}")]
    columns += [(">ms", "{milliseconds:.1f}"), (">images/s", "{images_per_second:.0f}")]
    columns += [(">ratio", "{speed_ratio:.2f}")]
    columns += [(">peak MiB", "{peak_mib:.0f}"), (">ratio", "{memory_ratio:.2f}"), ("scan", "{backend}")]
    common.show(title, rows, columns, [f"bfloat16 autocast. Ratios: to {SWIN} in the same setting."])


def show_kinds(rows: list[dict[str, Any]]) -> None:
    """Print where the time goes."""
    columns = [("model", "{model}"), (">size", "{size}"), (">batch", "{batch}"), ("training", "{training}")]
    columns += [(">ms", "{milliseconds:.1f}"), *((f">{kind}", f"{{{kind}:.0%}}") for kind in (*KINDS, REST, BETWEEN))]
    notes = [
        "Shares of the time, bfloat16 autocast, from torch's profiler, which costs time itself; between operators,"
    ]
    common.show("Where the time goes", rows, columns, [*notes, "the GPU has nothing to do."])


def show_tiles(rows: list[dict[str, Any]]) -> None:
    """Print the fastest tiles of each shape."""
    best: list[dict[str, Any]] = []
    for name in ("forward", "backward"):
        settings = dict.fromkeys((row["shape"], row["states"], row["batch"]) for row in rows)
        for setting in settings:
            of_setting = [row for row in rows if (row["shape"], row["states"], row["batch"]) == setting]
            timed = sorted((r for r in of_setting if r[f"{name}_ms"]), key=lambda r: float(r[f"{name}_ms"]))
            best += [{**row, "pass": name, "ms": row[f"{name}_ms"]} for row in timed[:3]]
    columns = [("pass", "{pass}"), ("shape", "{shape}"), (">N", "{states}"), (">batch", "{batch}"), (">Q", "{Q}")]
    columns += [(">S", "{S}"), (">C", "{C}"), (">warps", "{warps}"), (">ms", "{ms:.3f}")]
    common.show("The three fastest tiles: S segments of Q steps, C channels", best, columns)


def aims_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is aimed at and what was found, of the operator in its worst stage of VMamba-T and VMamba-B."""
    stages = [row for row in rows if row["table"] == "operator" and row["states"] == 1 and row["batch"] == 128]

    def worst(name: str, pick: Callable[[list[float]], float]) -> float | None:
        found = [row[name] for row in stages if row[name] is not None]
        return pick(found) if found else None

    def vmamba(size: int, training: bool, name: str) -> float | None:
        setting = dict(table="models", model="vmamba_tiny", size=size, training=training)
        return next((row[name] for row in rows if setting.items() <= row.items()), None)

    aims = [
        ("operator, forward, batch 128, worst stage: times its floor", 1.5, True, worst("ratio_to_floor", max)),
        ("operator, forward and backward, the same: times forward", 3.0, True, worst("ratio_to_forward", max)),
        ("operator, forward, the same: times as fast as published", 1.5, False, worst("published_ratio", min)),
    ]
    for size, training, aim in ((224, False, 1.0), (1024, False, 1.2), (224, True, 0.8), (1024, True, 1.0)):
        what = f"VMamba-T, {'training' if training else 'inference'} at {size}: images/s, ratio to Swin-T"
        aims.append((what, aim, False, vmamba(size, training, "speed_ratio")))
    what = "VMamba-T, training at 224, batch 128: peak memory, ratio to Swin-T"
    aims.append((what, 1.0, True, vmamba(224, True, "memory_ratio")))
    return [
        dict(
            table="aims", what=what, aim=f"{'<=' if most else '>='} {aim}", found=found,
            reached=None if found is None else found <= aim if most else found >= aim,
        )
        for what, aim, most, found in aims
    ]  # fmt: skip


def settings_of(device: torch.device) -> dict[str, str]:
    """Return what the measurements depend on; clocks as they are under load."""
    settings = machine_settings(device) | {"triton": version("triton")}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit", "--format=csv,noheader"]
        query += ["-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
        matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        for _ in range(500):  # half a second or more; the program goes on meanwhile
            matrix @ matrix
        try:
            settings["clocks (SM, memory, largest SM), power limit"] = subprocess.check_output(query, text=True).strip()
        except (OSError, subprocess.CalledProcessError):
            settings["clocks"] = "unknown"
        torch.cuda.synchronize(device)
    return settings


def measure_tables(only: Sequence[str], names: list[str], device: torch.device, options: argparse.Namespace) -> None:
    """Measure, print and write one table after the other."""
    quick, seconds = options.quick, 0.01 if options.quick else options.seconds
    settings = settings_of(device)
    common.console().print(", ".join(f"{name} {value}" for name, value in settings.items()))
    screen = common.console()
    bar = partial(track, console=screen, transient=True, disable=not screen.is_terminal)
    shapes = [Shape(side, side, *rest) for side, *rest in ([(4, 16, 1, 3)] if quick else STAGES)]
    calls = list(itertools.product(shapes, (1, 2) if quick else (1, 128)))
    rows: list[dict[str, Any]] = []

    def keep(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        if options.csv:  # after every table, so that a later one loses nothing
            common.write_csv(options.csv, rows, settings)

    if "operator" in only:
        rates = measure_rates(device, quick, seconds)
        keep([measure_operator(s, b, device, rates, quick, seconds) for s, b in bar(calls, "operator")])
        show_operator(rows)
    for table, sizes in {"models": BATCHES, "kinds": {224: 128}, "growth": GROWTH}.items():
        if table not in only:
            continue
        of_table = names if table != "growth" or options.models or quick else ["vmamba_tiny", *PEERS]
        work = list(itertools.product(({32: 2} if quick else sizes).items(), (False, True), of_table))
        measure = measure_kinds if table == "kinds" else measure_model
        found = [
            measure(name, size, batch, training, device, seconds) for (size, batch), training, name in bar(work, table)
        ]
        if table == "kinds":
            show_kinds(found)
        else:
            add_ratios(found)
            show_models(found, "Models" if table == "models" else "Growth with the image")
        keep([{**row, "table": table} for row in found])
    if "tiles" in only:
        few = calls if quick else [(shape, 128) for shape in (shapes[0], shapes[2], *shapes[-2:])]
        tiles = [row for s, b in bar(few, "tiles") for row in measure_tiles(s, b, device, quick, seconds / 5)]
        show_tiles(tiles)
        keep(tiles)
    aims = aims_of(rows)
    columns = [("", "{what}"), ("aim", "{aim}"), (">found", "{found:.2f}"), ("reached", "{reached}")]
    common.show("Aims", aims, columns)
    keep(aims)


def main() -> int:
    """Run the command line."""
    parser = common.Parser("Speed and memory on a GPU.", seconds=0.5)
    parser.add_argument("--only", nargs="+", choices=TABLES, help="these tables (default: all but tiles)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="ask the GPU which tiles are fastest before a call is timed; Triton's cache keeps the answers",
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="timm names (default: every T model and its peers)")
    options = parser.parse_args()
    quick, only = options.quick, options.only or TABLES[:4]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (quick and backend.interpreted()):
        parser.error(
            "there is no CUDA device, so nothing was measured (TRITON_INTERPRET=1 and --quick try the script without)"
        )
    if "triton" not in available_backends():
        parser.error("Triton is not installed")
    names = options.models or (
        ["vmamba_atto"] if quick else [*names_of("tiny", False)[: -len(SETS["tiny"][1])], *PEERS]
    )
    unknown = [name for name in names if not timm.is_model(name)]
    if unknown:
        parser.error(f"timm knows no model named {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    if options.tune:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("vision_ssm").setLevel(logging.INFO)
    with tuning() if options.tune else contextlib.nullcontext():
        measure_tables(only, names, device, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

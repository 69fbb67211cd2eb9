"""Compile every Triton kernel for several GPUs, without one, and table its registers, spills and shared memory.

python benchmarks/triton_resources.py --csv benchmarks/triton_resources.csv
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import common
import torch
from rich.progress import track

from scan import Shape
from vision_ssm.scan import CROSS_SCAN, build_routes
from vision_ssm.scan import triton as backend
from vision_ssm.scan.arguments import ScanArguments

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
KERNELS = ("forward_kernel", "summary_kernel", "chain_kernel", "backward_kernel")
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LAST_STATE, WIDE = "gradient of the last state", "rows in 64 bits"
# What changes the kernels beside sizes, made of an ordinary call.
VARIANTS: dict[str, Callable[[ScanArguments], ScanArguments]] = {
    "": lambda args: args,
    "float32": lambda args: replace(args, x=args.x.float(), dbc=args.dbc.float()),
    "float16": lambda args: replace(args, x=args.x.half(), dbc=args.dbc.half()),
    "step sizes given": lambda args: replace(
        args,
        delta=args.dbc[..., :1].expand(-1, -1, -1, args.x.shape[2]),
        dt_weight=None,
        dbc=args.dbc[..., args.rank :],
    ),
    "exclusive": lambda args: replace(args, inclusive=False),
    "neither softplus, bias nor D": lambda args: replace(args, softplus=False, dt_bias=None, D=None),
    "one projection for all routes": lambda args: replace(
        args, dbc=args.dbc[:, :, :1], **{name: getattr(args, name)[:1] for name in ScanArguments.SHARED}
    ),
    "side by side": lambda args: replace(args, x=args.x.repeat(1, 1, args.routes)),
    "some tokens": lambda args: replace(args, complete=False),
    "written elsewhere": lambda args: replace(args, write=args.read.clone()),
    "routes chosen and weighted": lambda args: replace(
        args,
        route_index=torch.zeros(len(args.x), 2, dtype=torch.int64),
        route_weight=torch.ones(len(args.x), 2),
    ),
    LAST_STATE: lambda args: args,
    WIDE: lambda args: args,
}


@dataclass(frozen=True)
class Call:
    """A forward and a backward pass with the four routes of the cross scan."""

    side: int  # height = width
    channels: int
    states: int
    rank: int
    batch: int
    variant: str = ""


# A stage of VMamba-T, several states in chunks, maps so small that images share a sequence: these three are the quick
# ones. Other stages, many states; then everything else once.
CALLS = [Call(56, 96, 1, 6, 128), Call(14, 384, 16, 24, 1), Call(2, 64, 1, 4, 16)]
CALLS += [Call(28, 192, 1, 12, 128), Call(7, 768, 1, 48, 128), Call(28, 192, 16, 12, 128), Call(7, 768, 16, 48, 128)]
CALLS += [Call(28, 192, 1, 12, 128, variant) for variant in VARIANTS if variant]

Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, arguments, options of Triton


class Recorder:
    """Stands in for a kernel: keeps what it is launched with instead of launching it."""

    def __init__(self, kernel: Any, calls: list[Launch]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """Return what takes the arguments."""
        return self.record

    def record(self, *values: Any, **more: Any) -> None:
        """Keep the arguments by name, and what else Triton is told."""
        names = self.kernel.arg_names
        options = {name: value for name, value in more.items() if name not in names}
        constants = {name: value for name, value in more.items() if name in names}
        self.calls.append((self.kernel, dict(zip(names, values, strict=False)) | constants, options))


def launches(call: Call) -> list[Launch]:
    """Return what one forward and backward pass launches."""
    tensors = Shape(call.side, call.side, call.channels, call.states, call.rank).tensors(1, torch.bfloat16)
    tensors = {name: t.expand(call.batch, *t.shape[1:]) if name in ("x", "dbc") else t for name, t in tensors.items()}
    routes = build_routes(CROSS_SCAN, call.side, call.side)
    args = ScanArguments(read=routes.read, write=routes.write, complete=routes.complete, **tensors)
    args = VARIANTS[call.variant](args)
    calls: list[Launch] = []
    kernels = backend.load_kernels()
    originals = {name: getattr(kernels, name) for name in KERNELS}
    processors = backend.processors
    try:
        backend.processors = lambda device: 132  # an H100's: how calls are split depends on it
        for name, kernel in originals.items():
            setattr(kernels, name, Recorder(kernel, calls))
        _, state = backend.forward(args, args.x.dtype)
        backend.backward(args, torch.zeros_like(args.x), state if call.variant == LAST_STATE else None)
    finally:
        backend.processors = processors
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)
    if call.variant == WIDE:  # as a map of 2**31 numbers would be
        calls = [(kernel, {**values, "WIDE": True}, options) for kernel, values, options in calls]
    return calls


def compile_kernel(kernel: Any, values: dict[str, Any], options: dict[str, Any], capability: int) -> Any:
    """Compile a kernel ahead of time, specialised as a launch would."""
    import triton
    from triton.backends.compiler import GPUTarget

    types: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[parameter.name] = POINTERS[value.dtype]
        elif value == 1 and not parameter.do_not_specialize:
            types[parameter.name], constants[(i,)] = "constexpr", 1
            continue
        else:
            types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, capability: int) -> dict[str, int]:
    """Ask the assembler that Triton uses for registers and spilled bytes of a thread."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert target is not None
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        assembler = get_ptxas(capability) if signature(get_ptxas).parameters else get_ptxas()  # older: one for all
        command = [assembler.path, "-v", f"--gpu-name={target[1]}", source, "-o", source.with_suffix(".cubin")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = dict(registers=r"Used (\d+) registers", spilled_bytes=r"(\d+) bytes spill")
    found = {name: sum(int(n) for n in re.findall(pattern, told)) for name, pattern in patterns.items()}
    return dict(**found, shared=compiled.metadata.shared)


def main() -> int:
    """Run the command line; the exit code tells whether nothing is spilled at N <= 16."""
    parser = common.Parser("Registers, spills and shared memory of the Triton kernels.", seconds=None)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures")
    options = parser.parse_args()
    if backend.load_kernels() is None:
        parser.error("Triton is not installed")
    if backend.interpreted():
        parser.error("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # or the times would be those of reading Triton's cache
    calls = CALLS[:3] if options.quick else CALLS
    work = [
        (call, target, launch)
        for call, target in itertools.product(calls, options.targets)
        for launch in launches(call)
    ]
    rows: list[dict[str, Any]] = []
    seen = set()
    screen = common.console()
    for call, target, (kernel, values, more) in track(
        work, "compiling", console=screen, transient=True, disable=not screen.is_terminal
    ):
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        name = kernel.__name__.removesuffix("_kernel") + (" (reverse)" if constants.get("REVERSE") else "")
        if name == "summary" and values["grad_y"] is None:
            name = "summary (forward)"  # of chunks; the backward pass has one of its own
        if (name, target, call) in seen or (name.startswith("chain") and call.variant):
            continue
        seen.add((name, target, call))
        row: dict[str, Any] = dict(
            kernel=name, target=target, map=f"{call.side}x{call.side}x{call.channels}", batch=call.batch,
            states=call.states, rank=call.rank, variant=call.variant,
        )  # fmt: skip
        tile = "x".join(str(constants[n]) for n in ("Q", "S", "C") if n in constants)
        begin = time.perf_counter()
        compiled = compile_kernel(kernel, values, more, TARGETS[target])
        seconds = time.perf_counter() - begin
        row |= dict(tile=tile, warps=more["num_warps"], triton=version("triton"))
        rows.append(row | resources(compiled, TARGETS[target]) | dict(seconds=round(seconds, 2)))
    columns = [("kernel", "{kernel}"), ("target", "{target}"), ("map", "{map}"), (">batch", "{batch}")]
    columns += [(">N", "{states}"), (">R", "{rank}"), ("with", "{variant}"), ("tile Q x S x C", "{tile}")]
    columns += [(">warps", "{warps}"), (">registers", "{registers}"), (">spilled bytes", "{spilled_bytes}")]
    columns += [(">shared bytes", "{shared}"), (">seconds", "{seconds:.1f}")]
    of_calls: dict[Any, float] = defaultdict(float)
    for row in rows:
        of_calls[tuple(row[name] for name in ("target", "map", "states", "variant"))] += row["seconds"]
    notes = [
        "Registers and spilled bytes: per thread. Seconds: to compile, on this machine's CPU;",
        f"{max(of_calls.values()):.1f} for all kernels of the forward and backward pass that takes longest.",
    ]
    common.show(f"Kernels compiled by Triton {version('triton')}, bfloat16, a cross scan", rows, columns, notes)
    if options.csv:
        common.write_csv(options.csv, rows)
    return 1 if any(row["spilled_bytes"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile every Triton kernel for several GPUs, without one, and table its registers, spills and shared memory.

python benchmarks/triton_resources.py --csv benchmarks/triton_resources.csv
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
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
# Height = width, channels, N, R, images: stages of VMamba-T, many states, maps so small that images share a sequence.
CALLS = [(56, 96, 1, 6, 128), (28, 192, 1, 12, 128), (7, 768, 1, 48, 128), (14, 384, 4, 24, 1), (28, 192, 16, 12, 128)]
CALLS += [(2, 64, 1, 4, 16)]
KERNELS = ("forward_kernel", "summary_kernel", "chain_kernel", "backward_kernel")
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


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


def launches(side: int, channels: int, states: int, rank: int, batch: int) -> list[Launch]:
    """Return what one forward and backward pass launches."""
    tensors = Shape(side, side, channels, states, rank).tensors(1, torch.bfloat16)
    tensors = {name: t.expand(batch, *t.shape[1:]) if name in ("x", "dbc") else t for name, t in tensors.items()}
    routes = build_routes(CROSS_SCAN, side, side)
    args = ScanArguments(read=routes.read, write=routes.write, complete=routes.complete, **tensors)
    calls: list[Launch] = []
    kernels = backend.load_kernels()
    originals = {name: getattr(kernels, name) for name in KERNELS}
    processors = backend.processors
    try:
        backend.processors = lambda device: 132  # an H100's: how calls are split depends on it
        for name, kernel in originals.items():
            setattr(kernels, name, Recorder(kernel, calls))
        backend.forward(args, torch.bfloat16)
        backend.backward(args, torch.zeros_like(args.x), None)
    finally:
        backend.processors = processors
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)
    return calls


def compile_kernel(kernel: Any, values: dict[str, Any], options: dict[str, Any], capability: int) -> Any:
    """Compile a kernel ahead of time, specialised as a launch would."""
    import triton
    from triton.backends.compiler import GPUTarget

    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(i,)] = "constexpr", 1
            continue
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, capability: int) -> dict[str, int]:
    """Ask the assembler that Triton uses for registers and spilled bytes of a thread."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert target is not None
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target[1]}",
            source,
            "-o",
            source.with_suffix(".cubin"),
        ]
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
    calls = CALLS[:1] if options.quick else CALLS
    work = [
        (call, target, launch)
        for call, target in itertools.product(calls, options.targets)
        for launch in launches(*call)
    ]
    rows: list[dict[str, Any]] = []
    seen = set()
    screen = common.console()
    for (side, channels, states, rank, batch), target, (kernel, values, more) in track(
        work, "compiling", console=screen, transient=True, disable=not screen.is_terminal
    ):
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        name = kernel.__name__.removesuffix("_kernel") + (" (reverse)" if constants.get("REVERSE") else "")
        row: dict[str, Any] = dict(kernel=name, target=target, map=f"{side}x{side}x{channels}", batch=batch)
        key = (name, target, side, channels, states, values.get("grad_y") is None)
        if key in seen:
            continue
        seen.add(key)
        tile = "x".join(str(constants[n]) for n in ("Q", "S", "C") if n in constants)
        row |= dict(states=states, rank=rank, tile=tile, warps=more["num_warps"], triton=version("triton"))
        rows.append(row | resources(compile_kernel(kernel, values, more, TARGETS[target]), TARGETS[target]))
    columns = [("kernel", "{kernel}"), ("target", "{target}"), ("map", "{map}"), (">batch", "{batch}")]
    columns += [(">N", "{states}"), (">R", "{rank}"), ("tile Q x S x C", "{tile}"), (">warps", "{warps}")]
    columns += [(">registers", "{registers}"), (">spilled bytes", "{spilled_bytes}")]
    columns += [(">shared bytes", "{shared}")]
    common.show(
        f"Kernels compiled by Triton {version('triton')}, bfloat16, a cross scan",
        rows,
        columns,
        ["Registers and spilled bytes: per thread."],
    )
    if options.csv:
        common.write_csv(options.csv, rows)
    return 1 if any(row["spilled_bytes"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

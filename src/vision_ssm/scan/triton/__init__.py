"""The operator in Triton for GPUs: float32 inside, float32, bfloat16 or float16 outside."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.portable import of_channels, of_heads
from vision_ssm.scan.triton.tiles import BACKWARD, BACKWARD_LARGE, FORWARD, Tile, choose


@dataclass(frozen=True)
class Plan:
    """How a call is split into programs: a row (a route of a group of images), a chunk and a block of channels each."""

    tile: Tile
    images: int  # of a group; they follow each other in one sequence
    groups: int
    parts: int  # into which the routes of a group are split
    chunks: int  # of a sequence
    tiles: int  # of a chunk
    blocks: int  # of channels

    @property
    def programs(self) -> int:
        """Number of programs of the main kernels."""
        return self.groups * self.parts * self.chunks * self.blocks


# Newer versions of Triton fuse multiply-adds only on request. NVIDIA's assembler sometimes spills registers to use
# fewer, unless their maximum is set.
_OPTIONS: dict[str, Any] = dict(enable_fp_fusion=True) | ({} if torch.version.hip else dict(maxnreg=255))


@lru_cache(maxsize=1)
def load_kernels() -> ModuleType | None:
    """Return the kernels, ``None`` where Triton is not installed."""
    try:
        from vision_ssm.scan.triton import kernels
    except ImportError:
        return None
    return kernels


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU (``TRITON_INTERPRET=1`` when they were loaded)."""
    kernels = load_kernels()
    return kernels is not None and type(kernels.forward_kernel).__name__ == "InterpretedFunction"


def available() -> bool:
    """Return whether the kernels run on this machine: on a GPU, or interpreted."""
    return load_kernels() is not None and (torch.cuda.is_available() or interpreted())


def takes(device: str) -> bool:
    """Return whether the kernels run on a type of device."""
    return device == "cuda" or (device == "cpu" and interpreted())


@lru_cache(maxsize=1)
def warn_of_fallback() -> None:
    """Warn once that scans on a GPU do not use these kernels, and why."""
    warnings.warn(
        "vision_ssm runs its scans on the slower 'portable' backend: Triton is not installed. PyTorch's wheels for "
        "CUDA on Linux include it; elsewhere `pip install triton` (Linux) or triton-windows (Windows).",
        RuntimeWarning,
        stacklevel=2,
    )


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward(args: ScanArguments, dtype: torch.dtype, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Return the outputs in ``dtype``, (B, L, C), and the state after the last step, (B, K', Dk, N)."""
    args = _prepared(args)
    if tile is None:
        tile = choose("forward", args, FORWARD, lambda other: forward(args, dtype, other))
    plan = make_plan(args, tile)
    once = args.side_by_side or args.routes_per_image == 1
    y, y_sums, adding = _added(args, plan, dtype, once)
    state = _floats(args, args.x.shape[0], args.routes_per_image, args.channels_per_route, args.state_size)
    starts = None
    if plan.chunks > 1:
        through, starts, _ = _summaries(args, plan, plan.chunks, plan.tiles)
        _chain(through, starts, reverse=False)
    _launch(
        "forward_kernel", plan.programs, plan.tile, args,
        starts, y, y_sums, state, *_sizes(args, plan, plan.tiles, plan.chunks), plan.parts,
        0 if y.shape[0] == 1 else y.stride(0), *_strides(args, "dbc delta A dt_weight dt_bias D"),
        **_constants(args, plan), INCLUSIVE=args.inclusive, **adding,
        given="x dbc delta A dt_weight dt_bias D route_weight route_index read write",
    )  # fmt: skip
    return _sum(y, dtype), state


def backward(
    args: ScanArguments, grad_y: Tensor, grad_state: Tensor | None, tile: Tile | None = None
) -> dict[str, Tensor]:
    """Return the gradients of all differentiable arguments, from those of outputs and last state."""
    wanted = args
    args = _prepared(args)
    if tile is None:
        default = BACKWARD_LARGE if args.state_size > 1 and args.rank > 16 else BACKWARD
        tile = choose("backward", args, default, lambda other: backward(args, grad_y, grad_state, other))
    plan = make_plan(args, tile)
    grad_y = grad_y.contiguous()
    grad_state = None if grad_state is None else grad_state.float().contiguous()
    all_tiles = plan.tiles * plan.chunks
    through, starts, reverse_starts = _summaries(args, plan, all_tiles, 1, grad_y, grad_state)
    _chain(through, starts, reverse=False)
    _chain(through, reverse_starts, reverse=True)

    taken, width, states, rank = args.routes_per_image, args.channels_per_route, args.state_size, args.rank
    # Where several routes of an image add to one place, each part has its own sums.
    x_once = args.side_by_side or taken == 1
    dbc_once, delta_once = (
        taken == 1 or (tensor is not None and tensor.shape[2] > 1 and args.route_index is None)
        for tensor in (args.dbc, args.delta)
    )
    grad_x, x_sums, adding = _added(args, plan, args.x.dtype, x_once)
    dbc_parts, delta_parts = (1 if once else plan.parts for once in (dbc_once, delta_once))
    grad_dbc = _floats(args, plan.blocks, dbc_parts, *args.dbc.shape)
    if not (_complete(args) and dbc_once and args.dbc.shape[2] == taken):
        grad_dbc.zero_()
    grad_delta = None if args.delta is None else _floats(args, delta_parts, *args.delta.shape).zero_()
    of_parameters = _floats(args, plan.groups, taken, plan.chunks, rank + states + 2, width)
    of_weight = None
    if args.route_weight is not None:
        of_weight = _floats(args, plan.blocks, *args.route_weight.shape, args.read.shape[1])
    loop = plan.parts < taken
    _launch(
        "backward_kernel", plan.programs, plan.tile, args,
        starts, reverse_starts, grad_y, grad_state, grad_x, x_sums, grad_dbc, grad_delta, of_parameters, of_weight,
        *_sizes(args, plan, plan.tiles, plan.chunks), plan.parts,
        *(0 if parts == 1 else tensor.stride(axis) for parts, tensor, axis in (
            (grad_x.shape[0], grad_x, 0), (plan.blocks, grad_dbc, 0), (dbc_parts, grad_dbc, 1),
        )),
        0 if grad_delta is None or delta_parts == 1 else grad_delta.stride(0),
        *_strides(args, "dbc delta A dt_weight dt_bias D"),
        **_constants(args, plan), INCLUSIVE=args.inclusive,
        **adding, ADD_DBC=loop and not dbc_once, ADD_DELTA=loop and not delta_once,
        given="x dbc delta A dt_weight dt_bias D route_weight route_index read write",
    )  # fmt: skip

    found = {"x": _sum(grad_x, args.x.dtype), "dbc": grad_dbc.sum((0, 1))}
    if grad_delta is not None:
        found["delta"] = grad_delta.sum(0)
    if of_weight is not None:
        found["route_weight"] = of_weight.sum((0, 3))
    if args.route_index is None:
        per_route = of_parameters.sum((0, 2))
    else:
        per_image = of_parameters.sum(2)
        chosen = [(args.route_index == k)[:, :, None, None] for k in range(args.routes)]
        per_route = torch.stack([torch.where(mask, per_image, 0.0).sum((0, 1)) for mask in chosen])
    weight, A, bias, D = per_route.split([rank, states, 1, 1], dim=1)
    for name, grad in dict(dt_weight=weight, A=A.transpose(1, 2), dt_bias=bias[:, 0], D=D[:, 0]).items():
        parameter = getattr(args, name)
        if parameter is not None:
            found[name] = grad.sum(0, keepdim=True) if parameter.shape[0] < args.routes else grad
    found["A"] = of_heads(found["A"], wanted.A.shape[2])
    for name in found.keys() & {"delta", "dt_bias"}:
        found[name] = of_heads(found[name], wanted.heads)
    return {name: grad.to(getattr(wanted, name).dtype) for name, grad in found.items()}


def make_plan(args: ScanArguments, tile: Tile) -> Plan:
    """Choose how a call is split; the choice depends on shapes and the device alone."""
    steps, batch, taken = args.read.shape[1], args.x.shape[0], args.routes_per_image
    alone = args.route_index is not None or args.route_weight is not None
    images = 1 if alone else max(1, min(batch, tile.steps // steps))
    # A short sequence needs no full tile.
    segments = min(tile.S, max(16 // tile.Q, _power_of_two(math.ceil(images * steps / tile.Q))))
    tile = replace(tile, S=segments, C=min(tile.C, max(16, _power_of_two(args.channels_per_route))))
    groups, blocks = math.ceil(batch / images), math.ceil(args.channels_per_route / tile.C)
    tiles = math.ceil(images * steps / tile.steps)
    # So many programs keep a GPU busy. The fewer parts, the less is written: each has its own sums.
    enough = 8 * processors(args.x.device)
    parts, chunks = taken, 1
    if not args.side_by_side:
        parts = next((n for n in range(1, taken) if taken % n == 0 and groups * n * blocks >= enough), taken)
    if parts == taken:
        chunks = min(tiles, math.ceil(enough / (groups * parts * blocks)))
    per_chunk = math.ceil(tiles / chunks)
    return Plan(tile, images, groups, parts, math.ceil(tiles / per_chunk), per_chunk, blocks)


def _complete(args: ScanArguments) -> bool:
    """Return whether every route of every image is known to write all tokens."""
    return args.complete and args.route_index is None  # whose values may be out of range


def _added(args: ScanArguments, plan: Plan, dtype: torch.dtype, once: bool) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """Return where routes add up: the result, (parts, B, L, C), the sums on the way to it, and the kernel's switches.

    Args:
        args: The call.
        plan: Its plan.
        dtype: Of the result; sums of several routes are float32.
        once: Whether every entry is written by one route alone.
    """
    complete = _complete(args)
    make = args.x.new_empty if complete else args.x.new_zeros
    parts = 1 if once else plan.parts
    out = sums = make((parts, *args.x.shape), dtype=dtype if once else torch.float32)
    add = not once and plan.parts < args.routes_per_image
    if add and complete and parts == 1:
        out = sums if dtype == torch.float32 else torch.empty_like(sums, dtype=dtype)
    return out, sums, dict(ADD=add, COMPLETE=complete)


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the first axis."""
    if len(parts) == 2:  # read and rounded in one pass
        return torch.add(parts[0], parts[1], out=parts.new_empty(parts.shape[1:], dtype=dtype))
    return (parts.sum(0) if len(parts) > 1 else parts[0]).to(dtype)


def _summaries(
    args: ScanArguments,
    plan: Plan,
    chunks: int,
    tiles: int,
    grad_y: Tensor | None = None,
    grad_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the maps of the states through all chunks: decays, ends, and given ``grad_y`` ends in reverse."""
    rows = plan.groups * args.routes_per_image
    shape = rows, chunks, args.state_size, args.channels_per_route
    through, ends = _floats(args, *shape), _floats(args, *shape)
    reverse_ends = None if grad_y is None else _floats(args, *shape)
    _launch(
        "summary_kernel", rows * chunks * plan.blocks, plan.tile, args,
        grad_y, grad_state, through, ends, reverse_ends, *_sizes(args, plan, tiles, chunks),
        *_strides(args, "dbc delta A dt_weight dt_bias"), **_constants(args, plan),
        given="x dbc delta A dt_weight dt_bias route_weight route_index read write",
    )  # fmt: skip
    return through, ends, reverse_ends


def _chain(through: Tensor, ends: Tensor | None, reverse: bool) -> None:
    """Turn the ends of all chunks into the states in front of them (behind them, in reverse), in place."""
    assert ends is not None
    rows, chunks, states, width = ends.shape
    elements, block = states * width, 32
    kernels = load_kernels()
    assert kernels is not None
    with _on(ends.device):
        kernels.chain_kernel[(rows * math.ceil(elements / block),)](
            through, ends, elements, chunks,
            REVERSE=reverse, CHUNKS=min(64, max(2, _power_of_two(chunks))), E=block, num_warps=4, **_OPTIONS,
        )  # fmt: skip


def _launch(
    name: str, programs: int, tile: Tile, args: ScanArguments, *values: Any, given: str, **options: Any
) -> None:
    kernels = load_kernels()
    assert kernels is not None  # `available` was checked when the backend was chosen
    with _on(args.x.device):
        getattr(kernels, name)[(programs,)](*_given(args, given), *values, **options, num_warps=tile.warps, **_OPTIONS)


def _prepared(args: ScanArguments) -> ScanArguments:
    """Return the call with contiguous tensors, float32 parameters and a step size for every channel."""
    changes: dict[str, Any] = {}
    for name in ("x", "dbc", "delta", *ScanArguments.SHARED, "route_weight", "read", "write", "route_index"):
        tensor = getattr(args, name)
        if tensor is not None:
            exact = name in ScanArguments.SHARED or name == "route_weight" or tensor.dtype == torch.float64
            tensor = tensor.float() if exact else tensor
            tensor = of_channels(tensor, args.channels_per_route) if name in ("delta", "dt_bias") else tensor
            tensor = tensor.expand(-1, -1, args.state_size) if name == "A" else tensor
            changes[name] = tensor.resolve_neg().contiguous()
    return replace(args, **changes)


def _given(args: ScanArguments, names: str) -> list[Tensor | None]:
    """Return arguments by name; no ``write`` where it is ``read``: the kernels then look rows up once."""
    same = args.write.data_ptr() == args.read.data_ptr()
    return [None if name == "write" and same else getattr(args, name) for name in names.split()]


def _sizes(args: ScanArguments, plan: Plan, tiles: int, chunks: int) -> tuple[int, ...]:
    batch, tokens, channels = args.x.shape
    steps, width = args.read.shape[1], args.channels_per_route
    return batch, tokens, channels, steps, width, args.routes, args.routes_per_image, plan.images, tiles, chunks


def _strides(args: ScanArguments, names: str) -> list[int]:
    """Return the number of groups of dbc and delta, and how far apart the routes' parameters lie (0: shared)."""
    strides = []
    for name in names.split():
        tensor = getattr(args, name)
        if name in ScanArguments.PER_IMAGE:
            strides.append(1 if tensor is None else tensor.shape[2])
        else:
            strides.append(0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0))
    return strides


def _constants(args: ScanArguments, plan: Plan) -> dict[str, Any]:
    return dict(
        N=args.state_size,
        NP=_power_of_two(args.state_size),
        R=args.rank,
        RP=max(16, _power_of_two(args.rank)),
        Q=plan.tile.Q,
        S=plan.tile.S,
        C=plan.tile.C,
        SOFTPLUS=args.softplus,
        SIDE_BY_SIDE=args.side_by_side,
        PACKED=plan.images > 1,
        WHOLE=args.channels_per_route % plan.tile.C == 0,
        WIDE=max(t[0].numel() for t in (args.x, args.dbc, args.delta) if t is not None) * plan.images >= 2**31,
    )


def _floats(args: ScanArguments, *shape: int) -> Tensor:
    return args.x.new_empty(shape, dtype=torch.float32)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

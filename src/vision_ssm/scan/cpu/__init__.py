"""The operator in C++ for CPUs: float32 inside, float32, bfloat16 or float16 outside."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.cpu.library import Library, Problem, load_library
from vision_ssm.scan.portable import of_channels, of_heads

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The arguments and the dtypes in which the library takes them.
_TENSORS = (
    *((name, tuple(_TYPES)) for name in ("x", "dbc", "delta")),
    *((name, (torch.float32,)) for name in ("A", "dt_weight", "dt_bias", "D", "route_weight")),
    *((name, (torch.int32,)) for name in ("read", "write")),
    ("route_index", (torch.int64,)),
)
_VECTOR = 16  # channels; blocks are multiples of it
_FORWARD_BLOCK, _BACKWARD_BLOCK = 8, 4  # vectors in a block at most
_COPIED = 2**20  # numbers
_GROUPS = 32  # of images with parameter gradients of their own; fixed, so that sums do not depend on threads


def available(level: str | None = None) -> bool:
    """Return whether the library was built and this machine runs an instruction set."""
    found = load_library()
    return found is not None and (level is None or level in found.levels)


def forward(args: ScanArguments, dtype: torch.dtype, level: str | None = None) -> tuple[Tensor, Tensor]:
    """Return the outputs in ``dtype``, (B, L, C), and the state after the last step, (B, K', Dk, N)."""
    args, batch = _with_heads(args), args.x.shape[0]
    y = args.x.new_empty(args.x.shape, dtype=dtype)
    state = _floats(args, batch, args.routes_per_image, args.channels_per_route, args.state_size)
    size = _images_at_once(args)
    if size >= batch:
        _forward(args, y, state, level)
    else:
        for first in range(0, batch, size):
            group = slice(first, min(batch, first + size))
            _forward(args.images(group), y[group], state[group], level)
    return y, state


def _with_heads(args: ScanArguments) -> ScanArguments:
    """Return the call with heads of whole vectors, else with a step size for every channel."""
    if args.heads in (1, args.channels_per_route) or args.channels_per_route // args.heads % _VECTOR == 0:
        return args
    given = {name: getattr(args, name) for name in ("delta", "dt_bias")}
    wide: dict[str, Any] = {
        name: of_channels(value, args.channels_per_route) for name, value in given.items() if value is not None
    }
    return replace(args, **wide)


def _images_at_once(args: ScanArguments) -> int:
    """Return how many images to copy where arguments are not dense: few, as fresh memory costs more than the copy."""
    batch, tokens, channels = args.x.shape
    if args.x.is_contiguous() and (args.delta is None or args.delta.is_contiguous()):
        return batch
    enough = math.ceil(torch.get_num_threads() * _VECTOR * _FORWARD_BLOCK / channels)  # for all threads
    return max(enough, _COPIED // (tokens * channels), 1)


def _forward(args: ScanArguments, y: Tensor, state: Tensor, level: str | None) -> None:
    problem, keep = _problem(args)
    batch, tokens, channels = args.x.shape
    images, routes = (batch * args.routes, 1) if args.side_by_side else (batch, args.routes_per_image)
    plan = _forward_plan(args.channels_per_route, images, routes, torch.get_num_threads())
    problem.blocks, problem.block_size, problem.parts = plan
    if problem.parts > 1:
        keep.append(_floats(args, problem.parts, batch, tokens, channels))
        problem.partial = keep[-1].data_ptr()
    problem.y, problem.y_type, problem.state = y.data_ptr(), _TYPES[y.dtype], state.data_ptr()
    _loaded().run("forward", problem, level)


def backward(
    args: ScanArguments, grad_y: Tensor, grad_state: Tensor | None, level: str | None = None
) -> dict[str, Tensor]:
    """Return the gradients of all differentiable arguments, from those of outputs and last state."""
    shared_delta = args.delta if args.side_by_side else None
    if shared_delta is not None and shared_delta.shape[2] < args.routes:
        # Side by side, every route is a unit of work of its own: each needs its own gradient to write to.
        found = backward(
            replace(args, delta=shared_delta.float().expand(-1, -1, args.routes, -1)), grad_y, grad_state, level
        )
        return found | {"delta": _sum_in_order(found["delta"].movedim(2, 0)).unsqueeze(2).to(shared_delta.dtype)}
    wanted, args = args, _with_heads(args)
    problem, keep = _problem(args)
    batch, tokens, channels = args.x.shape
    width, rates, rank = args.channels_per_route, args.A.shape[2], args.rank
    problem.blocks, problem.block_size = _blocks(width, math.ceil(width / (_VECTOR * _BACKWARD_BLOCK)))
    all_blocks = problem.blocks * (args.routes if args.side_by_side else 1)
    problem.groups = min(batch, _GROUPS)
    problem.parts = all_blocks if problem.groups < _GROUPS else 1

    grad_y = grad_y.resolve_neg()
    grad_y = _dense(grad_y if grad_y.dtype in _TYPES else grad_y.float())
    problem.grad_y, problem.grad_y_type = grad_y.data_ptr(), _TYPES[grad_y.dtype]
    if grad_state is not None:
        grad_state = grad_state.float().contiguous()
        problem.grad_state = grad_state.data_ptr()
    grad_x = args.x.new_empty(batch, tokens, channels)
    grad_dbc = _floats(args, problem.parts, *args.dbc.shape).zero_()
    grad_parameters = _floats(args, problem.groups, args.routes, rank + rates + 2, width).zero_()
    problem.grad_x, problem.grad_dbc = grad_x.data_ptr(), grad_dbc.data_ptr()
    problem.grad_parameters = grad_parameters.data_ptr()
    found = {"x": grad_x}
    if args.delta is not None:
        # Blocks of channels may share a head.
        parts = 1 if args.heads == width else problem.parts
        grad_delta = _floats(args, parts, *args.delta.shape).zero_()
        problem.grad_delta = grad_delta.data_ptr()
    if args.route_weight is not None:
        keep.append(_floats(args, all_blocks, *args.route_weight.shape))
        problem.grad_route_weight = keep[-1].data_ptr()
    _loaded().run("backward", problem, level)

    if args.route_weight is not None:
        found["route_weight"] = _sum_in_order(keep[-1])
    found["dbc"] = _sum_in_order(grad_dbc)
    if args.delta is not None:
        found["delta"] = of_heads(_sum_in_order(grad_delta), wanted.heads)
    of_weight, of_A, of_bias, of_D = _sum_in_order(grad_parameters).split([rank, rates, 1, 1], dim=1)
    of_bias = of_heads(of_bias[:, 0], wanted.heads)
    parameters = dict(dt_weight=of_weight, A=of_A.transpose(1, 2), dt_bias=of_bias, D=of_D[:, 0])
    for name, grad in parameters.items():
        parameter = getattr(args, name)
        if parameter is not None:
            found[name] = _sum_in_order(grad).unsqueeze(0) if parameter.shape[0] < args.routes else grad
    return {name: grad.to(getattr(wanted, name).dtype) for name, grad in found.items()}


def _loaded() -> Library:
    found = load_library()
    assert found is not None  # `available` was checked when the backend was chosen
    return found


def _problem(args: ScanArguments) -> tuple[Problem, list[Tensor]]:
    """Return the call as the library takes it, and tensors that must live as long."""
    problem = Problem.from_buffer_copy(_sizes(args))
    keep = []
    for name, dtypes in _TENSORS:
        tensor = getattr(args, name)
        if tensor is None:
            continue
        if tensor.is_neg():
            tensor = tensor.resolve_neg()
        if tensor.dtype not in dtypes:
            tensor = tensor.to(dtypes[0])
        if not tensor.is_contiguous():
            tensor = _dense(tensor)
        setattr(problem, name, tensor.data_ptr())
        keep.append(tensor)
    return problem, keep


def _dense(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor; from (B, C, L) in memory, up to four times faster than torch's copy."""
    channels = math.prod(tensor.shape[2:])
    if tensor.is_contiguous() or channels < _VECTOR or not tensor.movedim(1, -1).is_contiguous():
        return tensor.contiguous()
    batch, tokens = tensor.shape[:2]
    problem = Problem(batch=batch, tokens=tokens, channels=channels, x_type=_TYPES[tensor.dtype])
    dense = tensor.new_empty(tensor.shape)
    problem.x, problem.y = tensor.data_ptr(), dense.data_ptr()
    _loaded().run("transpose", problem, None)
    return dense


_templates: dict[tuple[Any, ...], Problem] = {}


def _sizes(args: ScanArguments) -> Problem:
    """Return a call without its pointers; the same for all calls of one signature."""
    signature = args.signature
    if (problem := _templates.get(signature)) is not None:
        return problem
    problem = Problem()
    problem.batch, problem.tokens, problem.channels = args.x.shape
    problem.routes, problem.steps = args.read.shape
    problem.taken = args.routes_per_image
    problem.width, problem.states, problem.rank = args.channels_per_route, args.state_size, args.rank
    problem.rates = args.A.shape[2]
    problem.head = args.channels_per_route // args.heads
    problem.softplus, problem.inclusive = args.softplus, args.inclusive
    for name in ("x", "dbc", "delta"):
        if getattr(args, name) is not None:
            setattr(problem, f"{name}_type", _TYPES.get(getattr(args, name).dtype, 0))
    for name, axis in (("dbc", 2), ("delta", 2), ("A", 0), ("dt_weight", 0), ("dt_bias", 0), ("D", 0)):
        tensor = getattr(args, name)
        if tensor is not None and tensor.shape[axis] > 1:
            setattr(problem, f"{name}_route", math.prod(tensor.shape[axis + 1 :]))
    if len(_templates) >= 4096:
        _templates.clear()
    _templates[signature] = problem
    return problem


def _floats(args: ScanArguments, *shape: int) -> Tensor:
    return args.x.new_empty(shape, dtype=torch.float32)


def _blocks(width: int, wanted: int) -> tuple[int, int]:
    """Cut channels into about ``wanted`` equal blocks of whole vectors; return their number and size."""
    size = math.ceil(math.ceil(width / _VECTOR) / wanted) * _VECTOR
    return math.ceil(width / size), size


@lru_cache(maxsize=1024)
def _forward_plan(width: int, images: int, routes: int, threads: int) -> tuple[int, int, int]:
    """Return number and size of blocks, and the parts an image's routes are split into.

    ``images`` have channels of their own, ``routes`` of one image share them. The plan depends on the number of threads
    and does not show in the outputs: every channel is computed alone and routes are added in their order.
    """
    most = math.ceil(width / _VECTOR)
    wanted = math.ceil(most / _FORWARD_BLOCK)
    if images * wanted < 4 * threads:  # few units: divide them evenly among the threads
        wanted = next((n for n in range(wanted, most) if images * n % threads == 0), most)
    blocks, size = _blocks(width, wanted)
    return blocks, size, routes if images * blocks < threads else 1


def _sum_in_order(tensor: Tensor) -> Tensor:
    """Sum over the first axis, one after the other: the same bits for any number of threads."""
    total = tensor[0]
    for part in tensor[1:]:
        total = total + part
    return total

"""The operator in plain PyTorch: any device, any number of derivatives.

The T steps are cut into about sqrt(T) chunks. All chunks advance side by side, first from a
zero state to find where each would end, then from their true initial states, which a short
loop over the chunks gives. Nothing is divided and no exponential grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.transforms import transformed, unobserved


@dataclass(frozen=True)
class Steps:
    """A call unrolled into steps: (K', c, S, B, ...), where step ``s * c + i`` is ``[:, i, s]``."""

    route: Tensor  # (K', B or 1): which route of the pool
    x: Tensor  # (..., Dk)
    low_rank: Tensor  # (..., R)
    B: Tensor  # (..., N)
    C: Tensor  # (..., N)
    raw: Tensor  # (..., heads), the step size before the softplus
    delta: Tensor  # (..., Dk)
    A: Tensor  # (K', B or 1, Dk, N)


def scan(args: ScanArguments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run the scan; differentiable any number of times.

    Returns:
        The outputs summed over routes, rounded once to ``dtype``, (B, L, C), and the state after the
        last step, (B, K', Dk, N).
    """
    steps = unroll(args, *_chunks(args.read.shape[1]))
    decay, drive = _decay(steps), _drive(steps)
    h = _differentiable_scan(decay, drive)
    seen = h if args.inclusive else decay * _previous(h)
    y = write_outputs(args, steps, over_states(seen * steps.C.unsqueeze(-2)))
    return y.to(dtype), h[:, -1, -1].transpose(0, 1)


def linear_scan(decay: Tensor, drive: Tensor) -> Tensor:
    """Return h_t = decay_t h_(t-1) + drive_t from h = 0, over the first axis of (T, ...); differentiable."""
    steps = decay.shape[0]
    length, chunks = _chunks(steps)
    in_front = chunks * length - steps

    def cut(tensor: Tensor) -> Tensor:
        padded = torch.cat([tensor.new_zeros(in_front, *tensor.shape[1:]), tensor])
        return padded.unflatten(0, (chunks, length)).transpose(0, 1).unsqueeze(0)

    h = _differentiable_scan(cut(decay), cut(drive))
    return h[0].transpose(0, 1).flatten(0, 1)[in_front:]


def backward(args: ScanArguments, grad_y: Tensor, grad_state: Tensor | None) -> dict[str, Tensor]:
    """Return the gradients of all differentiable arguments, from the gradients of outputs and last state."""
    steps = unroll(args, *_chunks(args.read.shape[1]))
    decay, drive = _decay(steps), _drive(steps)
    route, x, B, C, dtype = steps.route, steps.x, steps.B.unsqueeze(-2), steps.C.unsqueeze(-2), args.dtype
    chosen = args.route_index is not None
    h = _linear_scan(decay, drive, backwards=False)
    previous = _previous(h)
    seen = h if args.inclusive else decay * previous
    row = _rows(args, args.write, route, *x.shape[1:3])
    g = _gather(grad_y.unflatten(2, (-1, x.shape[-1])).to(dtype), row, _per_step(route))
    found = {}
    if args.route_weight is not None:
        outputs = _with_skip(args, steps, over_states(seen * C))
        found["route_weight"] = (g * outputs).sum((1, 2, 4)).t()
        g = g * _per_step(args.route_weight.t().to(dtype)).unsqueeze(-1)
    # mu_t is the gradient of exp(delta_t A) h_(t-1): mu_t = C_t g_t + exp(delta_(t+1) A) mu_(t+1).
    local = g.unsqueeze(-1) * C
    into = local
    if grad_state is not None:
        into = local.clone()
        into[:, -1, -1] += grad_state.transpose(0, 1)
    mu = _linear_scan(_previous(decay, backwards=True), into, backwards=True)
    of_drive = mu if args.inclusive else mu - local
    exponent = mu * previous * decay  # gradient of delta_t A
    of_input = over_states(of_drive * B)
    A = _per_step(_of_route(args.A, route, dtype))
    grad_x = of_input * steps.delta
    grad_delta = torch.addcmul(over_states(exponent * A), of_input, x)
    of_A = (exponent * steps.delta.unsqueeze(-1)).sum((1, 2))
    found["A"] = _to_parameter(of_heads(of_A, args.A.shape[2]), args.A, route, chosen)
    if args.D is not None:
        grad_x = torch.addcmul(grad_x, _per_step(_of_route(args.D, route, dtype)), g)
        found["D"] = _to_parameter((g * x).sum((1, 2)), args.D, route, chosen)
    grad_delta = of_heads(grad_delta, args.heads)
    if args.softplus:
        grad_delta = grad_delta * torch.sigmoid(steps.raw)
    if args.dt_bias is not None:
        found["dt_bias"] = _to_parameter(grad_delta.sum((1, 2)), args.dt_bias, route, chosen)
    grad_dbc = [
        (of_drive * (steps.delta * x).unsqueeze(-1)).sum(-2),
        (seen * g.unsqueeze(-1)).sum(-2),
    ]
    if args.dt_weight is not None:
        weight = _of_route(args.dt_weight, route, dtype)
        grad_dbc.insert(0, _project(grad_delta, weight.transpose(-1, -2)))
        outer = torch.einsum("kcsbr,kcsbd->kbrd", steps.low_rank.to(dtype), grad_delta)
        found["dt_weight"] = _to_parameter(outer, args.dt_weight, route, chosen)
    if args.delta is not None:
        found["delta"] = _to_tokens(grad_delta, args, args.read, route, args.delta.shape[2])
    found["dbc"] = _to_tokens(torch.cat(grad_dbc, -1), args, args.read, route, args.dbc.shape[2])
    found["x"] = _to_tokens(grad_x, args, args.read, route, args.x.shape[2] // x.shape[-1]).flatten(2)
    return {name: grad.to(getattr(args, name).dtype) for name, grad in found.items()}


def _check_indices(args: ScanArguments) -> None:
    """Refuse indices out of range, with the messages of the C++ backend; on a GPU that would synchronize."""
    with torch.no_grad():
        if args.read.device.type != "cpu" or not unobserved(args.read):
            return
    names = ("read and write", "read and write", "route_index")
    bounds = ((-1, args.x.shape[1]), (-1, args.x.shape[1]), (0, args.routes))
    for name, index, (first, end) in zip(names, (args.read, args.write, args.route_index), bounds, strict=True):
        if index is None or index.numel() == 0:
            continue
        low, high = index.aminmax()
        if low < first or high >= end:
            raise ValueError(f"{name} must lie in {first}..{end - 1}; an index is out of range")


def unroll(args: ScanArguments, length: int, chunks: int) -> Steps:
    """Return what every step reads, in chunks of `length` steps."""
    _check_indices(args)
    width, states, rank, dtype = args.channels_per_route, args.state_size, args.rank, args.dtype
    route = torch.arange(args.routes, device=args.x.device).view(-1, 1)
    if args.route_index is not None:
        route = args.route_index.t().long()
    row, group = _rows(args, args.read, route, length, chunks), _per_step(route)
    x = _gather(args.x.unflatten(2, (-1, width)), row, group).to(dtype)
    low_rank, B, C = _gather(args.dbc, row, group).to(dtype).split([rank, states, states], dim=-1)
    if args.dt_weight is not None:
        raw = _project(low_rank, _of_route(args.dt_weight, route, dtype))
    else:
        raw = _gather(args.delta, row, group).to(dtype)  # type: ignore[arg-type]
    if args.dt_bias is not None:
        raw = raw + _per_step(_of_route(args.dt_bias, route, dtype))
    delta = F.softplus(raw) if args.softplus else raw
    # Finite, because the step size of padding may be 0, and 0 times infinity is NaN.
    A = _of_route(args.A.clamp(min=-3e38), route, dtype)
    A = A.expand(*A.shape[:-1], states)
    return Steps(route, x, low_rank, B, C, raw, of_channels(delta, width), A)


def of_channels(values: Tensor, width: int) -> Tensor:
    """Repeat the last axis, one value per head, for the channels of a head."""
    heads = values.shape[-1]
    if heads == 1:
        return values.expand(*values.shape[:-1], width)
    return values if heads == width else values.repeat_interleave(width // heads, dim=-1)


def of_heads(grad: Tensor, heads: int) -> Tensor:
    """Sum the last axis, one value per channel, over the channels of a head."""
    return grad if grad.shape[-1] == heads else grad.unflatten(-1, (heads, -1)).sum(-1)


def write_outputs(args: ScanArguments, steps: Steps, y: Tensor) -> Tensor:
    """Add D x_t to C_t h_t, (K', c, S, B, Dk), and write it to the tokens: (B, L, C)."""
    y = _with_skip(args, steps, y)
    if args.route_weight is not None:
        y = y * _per_step(args.route_weight.t().to(args.dtype)).unsqueeze(-1)
    return _to_tokens(y, args, args.write, steps.route, args.x.shape[2] // y.shape[-1]).flatten(2)


def _decay(steps: Steps) -> Tensor:
    return torch.exp(steps.delta.unsqueeze(-1) * _per_step(steps.A))


def _drive(steps: Steps) -> Tensor:
    return (steps.delta * steps.x).unsqueeze(-1) * steps.B.unsqueeze(-2)


def _with_skip(args: ScanArguments, steps: Steps, y: Tensor) -> Tensor:
    if args.D is None:
        return y
    return torch.addcmul(y, _per_step(_of_route(args.D, steps.route, args.dtype)), steps.x)


def over_states(tensor: Tensor) -> Tensor:
    """Sum over the last axis, without a pass over memory where it has one entry."""
    return tensor.squeeze(-1) if tensor.shape[-1] == 1 else tensor.sum(-1)


def _chunks(steps: int) -> tuple[int, int]:
    length = math.ceil(math.sqrt(steps))
    return length, math.ceil(steps / length)


def _per_step(tensor: Tensor) -> Tensor:
    """Turn (K', B or 1, ...) into (K', 1, 1, B or 1, ...)."""
    return tensor[:, None, None]


def _rows(args: ScanArguments, index: Tensor, route: Tensor, length: int, chunks: int) -> Tensor:
    """Return the row of the flattened (B * L) tokens that each step names, (K', c, S, B); B * L for none."""
    batch, tokens = args.x.shape[:2]
    # Padding in front: a padding token leaves the zero state as it is.
    index = F.pad(index.long(), (chunks * length - index.shape[1], 0), value=-1)
    index = index[route].unflatten(-1, (chunks, length)).permute(0, 3, 2, 1)
    image = torch.arange(batch, device=index.device)
    return torch.where(index < 0, batch * tokens, image * tokens + index)


def _gather(tensor: Tensor, row: Tensor, group: Tensor) -> Tensor:
    """Take rows of a (B, L, G, F) tensor, of its only group or the route's; the row after the last is zero."""
    rows, groups = tensor.shape[0] * tensor.shape[1], tensor.shape[2]
    index = torch.where(row == rows, rows * groups, row * groups + group) if groups > 1 else row
    padded = F.pad(tensor.reshape(rows * groups, tensor.shape[3]), (0, 0, 0, 1))
    return padded.index_select(0, in_order(index).view(-1)).unflatten(0, index.shape)


def in_order(tensor: Tensor) -> Tensor:
    """Return the tensor in contiguous memory; a trace copies it, as a check would fix whether there is one image."""
    return tensor.contiguous() if unobserved(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _of_route(parameter: Tensor, route: Tensor, dtype: torch.dtype) -> Tensor:
    """Expand a (K or 1, ...) parameter to (K', B or 1, ...)."""
    parameter = parameter.to(dtype)
    if parameter.shape[0] > 1:
        return parameter.index_select(0, in_order(route).view(-1)).unflatten(0, route.shape)
    return parameter.expand(route.shape[0], *parameter.shape[1:]).unsqueeze(1)


def _to_parameter(grad: Tensor, parameter: Tensor, route: Tensor, chosen: bool) -> Tensor:
    """Sum (K', B, ...) over images and, where they share it, routes: the shape of the parameter."""
    if parameter.shape[0] == 1:
        return grad.sum((0, 1)).unsqueeze(0)
    if not chosen:
        return grad.sum(1)
    return torch.zeros_like(parameter, dtype=grad.dtype).index_add(0, route.reshape(-1), grad.flatten(0, 1))


def _project(values: Tensor, weight: Tensor) -> Tensor:
    """Multiply (K', c, S, B, P) by (K', B or 1, P, Q)."""
    if weight.shape[1] == 1:
        return torch.bmm(in_order(values).flatten(1, 3), weight[:, 0]).unflatten(1, values.shape[1:4])
    by_image = in_order(values.permute(0, 3, 1, 2, 4))  # (K', B, c, S, P)
    product = torch.bmm(by_image.flatten(0, 1).flatten(1, 2), weight.flatten(0, 1))
    return product.unflatten(1, by_image.shape[2:4]).unflatten(0, by_image.shape[:2]).permute(0, 2, 3, 1, 4)


def _to_tokens(values: Tensor, args: ScanArguments, index: Tensor, route: Tensor, groups: int) -> Tensor:
    """Add every step's values to the token that ``index`` names, (B, L, G, F).

    G groups are one sum over routes or one slot per route. Gathered by the inverse index, so deterministic.
    """
    routes, length, chunks, batch, width = values.shape
    tokens, steps, never = args.x.shape[1], index.shape[1], chunks * length
    step = torch.arange(never - steps, never, device=values.device).expand_as(index)
    inverse = torch.full((index.shape[0], tokens + 1), never, device=values.device)
    target = index.long()
    inverse = inverse.scatter(1, torch.where(target < 0, tokens, target), step)[:, :tokens]
    inverse = inverse[route]  # (K', B or 1, L): the step that names each token
    position = torch.arange(routes, device=values.device)[:, None, None] * length + inverse % length
    image = torch.arange(batch, device=values.device)[:, None]
    row = (position * chunks + inverse // length) * batch + image  # (K', B, L)
    row = torch.where(inverse == never, routes * length * chunks * batch, row)
    padded = F.pad(in_order(values).view(-1, width), (0, 0, 0, 1))
    per_route = (padded.index_select(0, in_order(one).view(-1)).view(batch, tokens, width) for one in row)
    if groups == 1:
        total = next(per_route)
        for part in per_route:
            total = total + part
        return total.unsqueeze(2)
    if args.route_index is None:
        return torch.stack(list(per_route), 2)
    total = values.new_zeros(batch, groups, tokens, width)
    for chosen, part in zip(route, per_route, strict=True):
        total = total.index_put((torch.arange(batch, device=values.device), chosen), part, accumulate=True)
    return total.transpose(1, 2)


def _previous(h: Tensor, backwards: bool = False) -> Tensor:
    """Shift by one step along time, filling with zeros."""
    if backwards:
        edge = torch.cat([h[:, :1, 1:], torch.zeros_like(h[:, :1, :1])], dim=2)
        return torch.cat([h[:, 1:], edge], dim=1)
    edge = torch.cat([torch.zeros_like(h[:, :1, :1]), h[:, -1:, :-1]], dim=2)
    return torch.cat([edge, h[:, :-1]], dim=1)


def _product(decay: Tensor) -> Tensor:
    """Return the product over the steps of a chunk.

    In floating point, factors just below 1 are multiples of 2^-24 below it, their product's distance from 1 is the sum
    of theirs, and what (1 - a)(1 - b) has beyond that is always rounded away; a sum of logarithms has no such bias.
    """
    total = decay.log().sum(1)
    # 0 only if a factor is: an infinite state stays infinite.
    return torch.where(total == -math.inf, 0, total.clamp(min=-87).exp())


def _linear_scan(decay: Tensor, drive: Tensor, backwards: bool) -> Tensor:
    """Return h_t = decay_t h_(t-1) + drive_t, or from the end backwards; both (K', c, S, ...)."""
    length, chunks = decay.shape[1:3]
    order = range(length - 1, -1, -1) if backwards else range(length)
    decays, drives = decay.unbind(1), drive.unbind(1)
    end = torch.zeros_like(drives[0])
    for i in order:
        torch.addcmul(drives[i], decays[i], end, out=end)
    through = _product(decay)
    state = torch.empty_like(end)
    carry = torch.zeros_like(end[:, 0])
    for s in range(chunks - 1, -1, -1) if backwards else range(chunks):
        state[:, s] = carry
        # A product may overflow where no factor did; 0 stays 0 through it.
        carry = torch.where(carry == 0, end[:, s], torch.addcmul(end[:, s], through[:, s], carry))
    h = torch.empty_like(drive)
    for i in order:
        state = torch.addcmul(drives[i], decays[i], state, out=h[:, i])
    return h


# An operator, so that torch's older vmap, which is behind `is_grads_batched`, maps over it as a whole.
_library = torch.library.Library("vision_ssm", "FRAGMENT")
_library.define("linear_scan(Tensor decay, Tensor drive, bool backwards) -> Tensor")
torch.library.impl("vision_ssm::linear_scan", "CompositeExplicitAutograd", _linear_scan, lib=_library)


class _LinearScan(torch.autograd.Function):
    """:func:`_linear_scan` with a gradient that is itself a linear scan."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, backwards: bool) -> Tensor:
        h = torch.ops.vision_ssm.linear_scan(decay, drive, backwards)
        ctx.save_for_backward(decay, h)
        ctx.backwards = backwards
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, h = ctx.saved_tensors
        gradient = _differentiable_scan(_previous(decay, not ctx.backwards), grad, not ctx.backwards)
        return gradient * _previous(h, ctx.backwards), gradient, None


def _differentiable_scan(decay: Tensor, drive: Tensor, backwards: bool = False) -> Tensor:
    """:func:`_linear_scan`, differentiable; under transforms in plain operators, as torch (2.14) nests no others."""
    if not transformed():
        return _LinearScan.apply(decay, drive, backwards)
    chunks = list(range(decay.shape[2]))
    steps = list(zip(decay.unbind(1), drive.unbind(1), strict=True))
    if backwards:
        chunks, steps = chunks[::-1], steps[::-1]
    through, end = steps[0]
    for a, b in steps[1:]:
        through, end = through * a, torch.addcmul(b, a, end)
    carry, starts, h = torch.zeros_like(end[:, 0]), [], []
    for s in chunks:
        starts.append(carry)
        carry = torch.addcmul(end[:, s], through[:, s], carry)
    state = torch.stack(starts[::-1] if backwards else starts, 1)
    for a, b in steps:
        state = torch.addcmul(b, a, state)
        h.append(state)
    return torch.stack(h[::-1] if backwards else h, 1)

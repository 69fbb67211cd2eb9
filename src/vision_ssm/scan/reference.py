"""The operator's definition, written as the loops it stands for. The ground truth of every test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssm.scan.arguments import ScanArguments


def scan(args: ScanArguments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token and route by route; differentiable.

    Returns:
        The outputs summed over routes, rounded once to ``dtype``, (B, L, C), and the state after the
        last step, (B, K', Dk, N).
    """
    if args.route_index is not None and torch._C._functorch.is_batchedtensor(args.route_index):
        raise NotImplementedError("the reference backend reads route_index and cannot run where vmap maps over it")
    per_image = [_scan_image(args.images(slice(b, b + 1))) for b in range(args.x.shape[0])]
    return torch.cat([y for y, _ in per_image]).to(dtype), torch.cat([state for _, state in per_image])


def _scan_image(args: ScanArguments) -> tuple[Tensor, Tensor]:
    tokens, channels = args.x.shape[1:]
    width, dtype = args.channels_per_route, args.dtype
    routes = range(args.routes) if args.route_index is None else args.route_index[0].tolist()
    outputs: list[list[Tensor]] = [[] for _ in range(tokens)]
    states = []
    for position, k in enumerate(routes):
        offset = k * width if args.side_by_side else 0
        weight = 1.0 if args.route_weight is None else args.route_weight[0, position].to(dtype)
        h = args.x.new_zeros(width, args.state_size, dtype=dtype)
        for read, write in zip(args.read[k].tolist(), args.write[k].tolist(), strict=True):
            h, y = _step(args, k, offset, read, h)
            if write >= 0:
                outputs[write].append(F.pad(weight * y, (offset, channels - offset - width)))
        states.append(h)
    nothing = args.x.new_zeros(channels, dtype=dtype)
    return torch.stack([sum(parts, nothing) for parts in outputs]).unsqueeze(0), torch.stack(states).unsqueeze(0)


def _step(args: ScanArguments, k: int, offset: int, read: int, h: Tensor) -> tuple[Tensor, Tensor]:
    dtype, width, rank, states = args.dtype, args.channels_per_route, args.rank, args.state_size

    def of_route(parameter: Tensor) -> Tensor:
        return parameter[k if parameter.shape[0] > 1 else 0].to(dtype)

    def of_token(tensor: Tensor) -> Tensor:
        values = tensor[0, read, k if tensor.shape[2] > 1 else 0].to(dtype)
        return values if read >= 0 else torch.zeros_like(values)

    x = args.x[0, read, offset : offset + width].to(dtype)
    x = x if read >= 0 else torch.zeros_like(x)
    low_rank, B, C = of_token(args.dbc).split([rank, states, states])
    # Sums instead of matrix products: autocast would round those in the backward pass.
    if args.dt_weight is not None:
        delta = (low_rank[:, None] * of_route(args.dt_weight)).sum(0)
    else:
        delta = of_token(args.delta)  # type: ignore[arg-type]
    if args.dt_bias is not None:
        delta = delta + of_route(args.dt_bias)
    if args.softplus:
        delta = F.softplus(delta)
    delta = delta.repeat_interleave(width // args.heads)  # (Dk,)
    decayed = torch.exp(delta[:, None] * of_route(args.A)) * h  # (Dk, N)
    h = decayed + (delta * x)[:, None] * B
    y = ((h if args.inclusive else decayed) * C).sum(-1)
    if args.D is not None:
        y = y + of_route(args.D) * x
    return h, y

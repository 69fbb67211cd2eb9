"""The operator in standard operators and one ``scan``: the form that export formats understand.

It becomes a single ONNX ``Scan`` whose number of steps stays dynamic; the portable form's loop
over about sqrt(T) steps would be unrolled for one size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssm.scan.arguments import ScanArguments


def scan(args: ScanArguments) -> tuple[Tensor, Tensor]:
    """Run the scan as gathers, projections and one sequential loop over steps.

    Returns:
        The outputs summed over routes in the state's dtype, (B, L, C), and the state after the
        last step, (B, K', Dk, N).
    """
    from torch._higher_order_ops.scan import scan_op

    if torch.onnx.is_in_onnx_export():  # torch would trace the scan's gradient, and fail for an example of one image
        given = {name: getattr(args, name) for name in (*args.PER_IMAGE, *args.SHARED)}
        args = replace(args, **{name: value.detach() for name, value in given.items() if value is not None})
    batch, tokens = args.x.shape[:2]
    width, states, rank, dtype = args.channels_per_route, args.state_size, args.rank, args.dtype
    read, write = args.read.long().expand(batch, -1, -1), args.write.long().expand(batch, -1, -1)
    parameters = {
        name: None if (value := getattr(args, name)) is None else value.to(dtype).expand(args.routes, *value.shape[1:])
        for name in ScanArguments.SHARED
    }
    if args.route_index is not None:
        index = args.route_index.long()
        image = torch.arange(batch, device=index.device)[:, None]
        read, write = args.read.long()[index], args.write.long()[index]
        parameters = {name: None if value is None else value[index] for name, value in parameters.items()}
    else:
        parameters = {name: None if value is None else value.unsqueeze(0) for name, value in parameters.items()}

    def pick(tensor: Tensor) -> Tensor:  # (B, L, G, F) to (B, K', T, F)
        tensor = tensor.expand(-1, -1, args.routes, -1) if tensor.shape[2] == 1 else tensor
        tensor = tensor.transpose(1, 2)
        if args.route_index is not None:
            tensor = tensor[image, index]
        # -1 must not reach a gather: ONNX takes it as the last element.
        picked = tensor.gather(2, read.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1]))
        return torch.where(read.unsqueeze(-1) >= 0, picked.to(dtype), 0.0)

    def per_step(tensor: Tensor) -> Tensor:  # (B, K', T, F) to (T, B, K', F)
        return tensor.permute(2, 0, 1, 3)

    x = per_step(pick(args.x.unflatten(2, (-1, width))))
    low_rank, B, C = pick(args.dbc).split([rank, states, states], dim=-1)
    B, C = per_step(B), per_step(C)
    weight, bias, A, D = (parameters[name] for name in ScanArguments.SHARED)
    if args.delta is not None:
        delta = per_step(pick(args.delta))
    else:
        assert weight is not None
        # Repeated, not broadcast: broadcasting would specialize the graph to one image, or to several.
        weight = weight if args.route_index is not None else weight.repeat(batch, 1, 1, 1)
        delta = per_step(low_rank @ weight)
    if bias is not None:
        delta = delta + bias
    if args.softplus:
        delta = F.softplus(delta)

    def step(h: Tensor, delta_t: Tensor, x_t: Tensor, B_t: Tensor, C_t: Tensor, rates: Tensor) -> list[Tensor]:
        decayed = torch.exp(delta_t.unsqueeze(-1) * rates) * h
        h = decayed + (delta_t * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)
        y_t = ((h if args.inclusive else decayed) * C_t.unsqueeze(-2)).sum(-1)
        return [h, y_t]

    initial = x.new_zeros(batch, x.shape[2], width, states)
    # The operator itself: its public wrapper compiles the step, which fails inside a trace with symbolic sizes.
    last, y = scan_op(step, [initial], [delta, x, B, C], (A,))  # y: (T, B, K', Dk)
    if D is not None:
        y = y + D * x
    y = y.permute(1, 2, 0, 3)  # (B, K', T, Dk)
    if args.route_weight is not None:
        y = y * args.route_weight.to(dtype)[:, :, None, None]
    # Outputs written nowhere land in an extra token that is cut off.
    target = torch.where(write >= 0, write, tokens).unsqueeze(-1).expand(-1, -1, -1, width)
    merged = y.new_zeros(batch, y.shape[1], tokens + 1, width).scatter(2, target, y)[:, :, :tokens]
    if args.side_by_side:
        return merged.transpose(1, 2).flatten(2), last
    return merged.sum(1), last

"""The operator in standard operators and short loops: the form that export formats understand.

The steps are cut into chunks. All chunks advance side by side from a zero state, one step of each at a time; a scan
over the chunks gives the state in front of each; and a second pass adds what that state, as it decays, contributes.
These become three ONNX ``Scan``, and the number of chunks stays dynamic. No decay exceeds 1, so nothing overflows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.portable import in_order, of_channels, over_states, unroll, write_outputs

_LENGTH = 32  # steps of a chunk: a constant, as graphs take no square root of a size


def scan(args: ScanArguments) -> tuple[Tensor, Tensor]:
    """Run the scan as gathers, projections and three loops.

    Returns:
        The outputs summed over routes in the state's dtype, (B, L, C), and the state after the
        last step, (B, K', Dk, N).
    """
    # torch's operator itself: its public wrapper compiles the step, which fails inside a trace with symbolic sizes.
    from torch._higher_order_ops.scan import scan_op

    if torch.onnx.is_in_onnx_export():  # torch would trace the scan's gradient, and fail for an example of one image
        given = {name: getattr(args, name) for name in (*args.PER_IMAGE, *args.SHARED)}
        args = replace(args, **{name: value.detach() for name, value in given.items() if value is not None})
    # One chunk more than needed, because torch makes a graph for one of what can be one.
    steps = unroll(args, _LENGTH, (args.read.shape[1] + _LENGTH - 1) // _LENGTH + 1)
    A = steps.A.unsqueeze(1)  # (K', 1, B or 1, Dk, N)
    delta = of_channels(_softplus(steps.raw) if args.softplus else steps.raw, steps.x.shape[-1])
    x, delta, B, C = (value.movedim(1, 0) for value in (steps.x, delta, steps.B, steps.C))  # (c, K', S, B, ...)

    def local(h: Tensor, delta_t: Tensor, x_t: Tensor, B_t: Tensor, C_t: Tensor, rates: Tensor) -> list[Tensor]:
        decayed = torch.exp(delta_t.unsqueeze(-1) * rates) * h
        h = decayed + (delta_t * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)
        return [h, over_states((h if args.inclusive else decayed) * C_t.unsqueeze(-2))]

    def carry(h: Tensor, through: Tensor, end: Tensor) -> list[Tensor]:
        return [through * h + end, h.clone()]

    def correct(h: Tensor, y_t: Tensor, delta_t: Tensor, C_t: Tensor, rates: Tensor) -> list[Tensor]:
        h = torch.exp(delta_t.unsqueeze(-1) * rates) * h
        return [h, y_t + over_states(h * C_t.unsqueeze(-2))]

    zero = x.new_zeros(*x.shape[1:], A.shape[-1])  # (K', S, B, Dk, N)
    end, y = scan_op(local, [zero], [delta, x, B, C], (A,))
    through = torch.exp(delta.sum(0).unsqueeze(-1) * A)
    last, before = scan_op(carry, [zero[:, 0]], [through.movedim(1, 0), end.movedim(1, 0)], ())
    _, y = scan_op(correct, [in_order(before.movedim(0, 1))], [y, delta, C], (A,))
    return write_outputs(args, steps, y.movedim(0, 1)), last.transpose(0, 1)


def _softplus(x: Tensor) -> Tensor:
    """Softplus of operators that runtimes vectorize, in place of ONNX's own and the comparisons that torch adds."""
    return x.clamp(min=0) + torch.log(1 + torch.exp(-x.abs()))

"""A drop-in for mamba-ssm's ``selective_scan_fn``: same signature, layouts and meaning, no compiled extension."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ssm.scan.operator import route_scan
from vision_ssm.scan.portable import linear_scan
from vision_ssm.scan.routes import ROWS, build_routes


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba's selective scan over a sequence.

    Sizes: B batch, D channels, L steps, N states, G groups of D / G neighboring channels.

    Args:
        u: Input, (B, D, L).
        delta: Step sizes, (B, D, L).
        A: Decay rates, (D, N), real.
        B: (B, N, L), (B, G, N, L) with G dividing D, or constant over time (D, N).
        C: Like ``B``; its number of groups may differ.
        D: Skip connection, (D,).
        z: Gate, (B, D, L): the output is multiplied by ``SiLU(z)``.
        delta_bias: Added to the step sizes, (D,).
        delta_softplus: Whether the step sizes pass through a softplus.
        return_last_state: Also return the state after the last step.

    Returns:
        Output, (B, D, L) in ``u.dtype``; with ``return_last_state`` also (B, D, N) in float32.
        A constant ``B`` or ``C`` always runs on the portable backend.

    Raises:
        TypeError: If an argument is not a real floating-point tensor.
        ValueError: If shapes or devices do not fit.
    """
    given = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    for name, tensor in given.items():
        if tensor is None and name in ("D", "z", "delta_bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_complex():
            raise TypeError(f"{name} is complex ({tensor.dtype}); only real tensors are supported")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device} and u on {u.device}; all must be on one device")
    if u.dim() != 3:
        raise ValueError(f"u must have shape (batch, channels, steps), got {tuple(u.shape)}")
    batch, channels, steps = u.shape
    if steps < 1:
        raise ValueError(f"u must have at least one step, got shape {tuple(u.shape)}")
    if delta.shape != u.shape:
        raise ValueError(f"delta must have the shape of u, {tuple(u.shape)}, got {tuple(delta.shape)}")
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must have shape ({channels}, states), got {tuple(A.shape)}")
    states = A.shape[1]
    for name, matrix in (("B", B), ("C", C)):
        _check_matrix(name, matrix, batch, channels, states, steps)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(vector.shape)}")
    if z is not None and z.shape != u.shape:
        raise ValueError(f"z must have the shape of u, {tuple(u.shape)}, got {tuple(z.shape)}")

    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    state: Tensor | None
    if B.dim() == 2 or C.dim() == 2:
        y, state = _scan_constant(u, delta, A, B, C, D, delta_bias, delta_softplus, dtype)
    else:
        per_group = [matrix if matrix.dim() == 4 else matrix.unsqueeze(1) for matrix in (B, C)]
        groups = math.lcm(*(matrix.shape[1] for matrix in per_group))
        dbc = torch.cat([m.repeat_interleave(groups // m.shape[1], dim=1) for m in per_group], dim=2)  # (B, G, 2N, L)
        result = route_scan(
            u.transpose(1, 2),
            dbc.permute(0, 3, 1, 2),
            A.to(dtype).unflatten(0, (groups, -1)),
            build_routes((ROWS,) * groups, 1, steps, u.device),
            delta=delta.transpose(1, 2).unflatten(2, (groups, -1)),
            dt_bias=None if delta_bias is None else delta_bias.to(dtype).unflatten(0, (groups, -1)),
            D=None if D is None else D.to(dtype).unflatten(0, (groups, -1)),
            softplus=delta_softplus,
            float_output=True,
            return_last_state=return_last_state,
        )
        y, state = result if isinstance(result, tuple) else (result, None)
        y, state = y.transpose(1, 2), None if state is None else state.flatten(1, 2)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    if not return_last_state:
        return y
    assert state is not None
    return y, state


def _check_matrix(name: str, matrix: Tensor, batch: int, channels: int, states: int, steps: int) -> None:
    groups = matrix.shape[1] if matrix.dim() == 4 else 1
    fits = tuple(matrix.shape) in (
        (channels, states),
        (batch, states, steps),
        (batch, groups, states, steps),
    )
    if not fits or channels % groups:
        raise ValueError(
            f"{name} must have shape ({batch}, {states}, {steps}), ({batch}, groups, {states}, {steps}) with groups "
            f"dividing {channels}, or ({channels}, {states}), got {tuple(matrix.shape)}"
        )


def _scan_constant(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run the scan with B or C constant over time, which the operator does not carry."""
    with torch.autocast(u.device.type, enabled=False):
        u, delta = u.permute(2, 0, 1).to(dtype), delta.permute(2, 0, 1).to(dtype)  # (L, B, D)
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)
        if delta_softplus:
            delta = F.softplus(delta)
        B, C = (_spread(matrix.to(dtype), u.shape[2]) for matrix in (B, C))
        h = linear_scan(torch.exp(delta.unsqueeze(-1) * A.to(dtype)), (delta * u).unsqueeze(-1) * B)
        y = (h * C).sum(-1)
        if D is not None:
            y = y + D.to(dtype) * u
    return y.permute(1, 2, 0), h[-1]


def _spread(matrix: Tensor, channels: int) -> Tensor:
    """Bring B or C to (L or 1, B or 1, D or 1, N)."""
    if matrix.dim() == 2:
        return matrix[None, None]
    if matrix.dim() == 3:
        return matrix.permute(2, 0, 1).unsqueeze(2)
    return matrix.permute(3, 0, 1, 2).repeat_interleave(channels // matrix.shape[1], dim=2)

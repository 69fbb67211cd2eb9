"""Other ways to compute a cross scan: what the published models do without their CUDA extension, and mamba.py's.

Both copy the map along the four routes, scan, and add the routes up. Step sizes, B and C are handed over in the order
of each route, because published code projects them after the permutation.
K routes, C channels, T steps, rank R, N states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published(
    image: Tensor, dbc: Tensor, A: Tensor, dt_weight: Tensor, dt_bias: Tensor, D: Tensor, *, together: bool
) -> Tensor:
    """Loop over time in Python, (B, C, H, W) to (B, T, C).

    Args:
        image: Map, (B, C, H, W).
        dbc: Step size in low rank, B and C, (B, K, R + 2N, T).
        A: (K, C, N).
        dt_weight: (K, R, C).
        dt_bias: (K, C).
        D: (K, C).
        together: All routes at once; else one after the other.
    """
    u = cross_scan(image, 2)  # (B, K, C, T)
    parameters = A, dt_weight, dt_bias, D
    if together:
        y = loop_over_time(u, dbc, *parameters)
    else:
        each = [slice(k, k + 1) for k in range(u.shape[1])]
        y = torch.cat([loop_over_time(u[:, k], dbc[:, k], *(p[k] for p in parameters)) for k in each], dim=1)
    return cross_merge(y, 2, *image.shape[2:]).transpose(1, 2)


def loop_over_time(u: Tensor, dbc: Tensor, A: Tensor, dt_weight: Tensor, dt_bias: Tensor, D: Tensor) -> Tensor:
    """Scan (B, K, C, T) step by step."""
    rank, states = dt_weight.shape[1], A.shape[2]
    low_rank, B, C = dbc.split([rank, states, states], dim=2)  # (B, K, ., T)
    delta = F.softplus(torch.einsum("bkrt,krc->bkct", low_rank, dt_weight) + dt_bias[..., None])
    decay = torch.exp(torch.einsum("bkct,kcn->bkctn", delta, A))
    drive = torch.einsum("bkct,bknt->bkctn", delta * u, B)
    h = torch.zeros_like(drive[:, :, :, 0])
    outputs = []
    for t in range(u.shape[3]):
        h = decay[:, :, :, t] * h + drive[:, :, :, t]  # (B, K, C, N)
        outputs.append(torch.einsum("bkcn,bkn->bkc", h, C[..., t]))
    return torch.stack(outputs, dim=3) + u * D[..., None]


def mamba_py(image: Tensor, dbc: Tensor, A: Tensor, dt_weight: Tensor, dt_bias: Tensor, D: Tensor) -> Tensor:
    """Scan by mambapy's parallel scan, (B, H, W, C) to (B, T, C); arguments as above, but dbc (B, K, T, R + 2N)."""
    from mambapy.pscan import pscan

    u = cross_scan(image, 1)  # (B, K, T, C)
    low_rank, B, C = dbc.split([dt_weight.shape[1], A.shape[2], A.shape[2]], dim=3)  # (B, K, T, .)
    delta = F.softplus(low_rank @ dt_weight + dt_bias[:, None])
    decay = torch.exp(delta[..., None] * A[:, None])  # (B, K, T, C, N)
    drive = (delta * u)[..., None] * B.unsqueeze(3)
    h = pscan(decay.flatten(0, 1), drive.flatten(0, 1)).unflatten(0, u.shape[:2])
    y = (h @ C.unsqueeze(-1)).squeeze(-1) + u * D[:, None]
    return cross_merge(y, 1, *image.shape[1:3])


def cross_scan(image: Tensor, axis: int) -> Tensor:
    """Copy a map, whose height and width are ``axis`` and the next, along the four routes; routes become axis 1."""
    rows, columns = image.flatten(axis, axis + 1), image.transpose(axis, axis + 1).flatten(axis, axis + 1)
    forward = torch.stack([rows, columns], 1)
    return torch.cat([forward, forward.flip(axis + 1)], 1)


def cross_merge(y: Tensor, axis: int, height: int, width: int) -> Tensor:
    """Add up what :func:`cross_scan` has separated; tokens on ``axis``, in row order."""
    forward = y[:, :2] + y[:, 2:].flip(axis + 1)
    columns = forward[:, 1].unflatten(axis, (width, height)).transpose(axis, axis + 1)
    return forward[:, 0] + columns.flatten(axis, axis + 1)

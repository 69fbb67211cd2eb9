"""Quasi-separable scans: sequence mixing whose matrix is free on the diagonal and of rank N on both sides of it.

Source: Hydra, arXiv 2407.09941, for the shift form. MambaMixer's second version (arXiv 2403.19888v2) names
quasi-separable kernels; its definition was not available.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_ssm.layers.conv import add_product
from vision_ssm.layers.ss2d import check_map
from vision_ssm.scan import Reversed, ScanPath, Shifted, build_routes, route_scan
from vision_ssm.scan.routes import as_paths


def quasi_separable_scan(
    x: Tensor,
    dbc: Tensor,
    A: Tensor,
    D: Tensor,
    paths: Sequence[ScanPath],
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    delta: Tensor | None = None,
    path_index: Tensor | None = None,
    path_weight: Tensor | None = None,
    aligned: bool = False,
    bidirectional: bool = True,
) -> Tensor:
    """Scan a map along both directions of every path and add the diagonal.

    Along one path, with step sizes s that differ between the directions, the output at step i is the sum over j of
    ``M_ij x_j``, where for one channel::

        M_ij = C_(i-1) exp(A (s_(j+1) + ... + s_(i-1))) s_j B_j      j < i      (forward)
        M_ij = C_(i+1) exp(A (s_(i+1) + ... + s_(j-1))) s_j B_j      j > i      (backward)
        M_ii = D

    This is the shift form. In the aligned form C has index i, and the exponents run over j+1..i and i..j-1. Outputs of
    several paths are added, weighted by ``path_weight``; the diagonal is added once. Without the backward direction,
    ``M_ij`` is 0 for j > i, and what is said below of both directions is of one.

    Sizes: B images, H x W tokens, C channels, P paths, N states, R the rank of the step size. Directions are the two
    senses in which a path is walked, forward first. A size of 1 in place of P means shared by all paths.

    Args:
        x: Map, (B, H, W, C).
        dbc: Low-rank step size, B and C per token, (B, H, W, R + 2N), for all paths and directions, or
            (B, H, W, 2 * P, R + 2N), those of the forward directions first. With a ready-made ``delta``, B and C
            alone.
        A: Decay rates, negative, (P or 1, C or 1, N), or (2 * P, C or 1, N), those of the forward directions first;
            with a last axis of 1 all states decay alike.
        D: The diagonal, (C,) or anything that broadcasts to the shape of ``x``.
        paths: The P paths.
        dt_weight: Projection of the step sizes, (P or 1, R, C), shared by the directions.
        dt_bias: Bias of the step sizes, (2, P, C or heads), one per direction and path.
        delta: Ready-made step sizes instead of ``dt_weight``, before bias and softplus, (B, H, W, C or heads), or
            (B, H, W, 2 * P, C or heads), those of the forward directions first. A head is some neighboring channels.
        path_index: Which P' of the paths each image takes, (B, P') integers.
        path_weight: Weight of each of these paths, (B, P').
        aligned: The aligned form instead of the shift form.
        bidirectional: Both directions, or the forward one alone.

    Returns:
        The mixed map, (B, H, W, C), in the dtype of ``x``; under autocast in that of ``D``, float32 or that of ``x``.

    Raises:
        TypeError: If ``paths`` is not a sequence of paths.
        ValueError: If shapes do not fit.
    """
    paths = as_paths(paths)
    batch, height, width, channels = check_map(x).shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # torch raises an error for "meta"
    directed: Sequence[ScanPath] = [*paths, *(Reversed(path) for path in paths)] if bidirectional else paths
    directed = directed if aligned else [Shifted(path) for path in directed]
    if path_index is not None and bidirectional:
        path_index = torch.cat([path_index, path_index + len(paths)], dim=1)
    if path_weight is not None:
        path_weight = (torch.cat([path_weight, path_weight], dim=1) if bidirectional else path_weight).to(dtype)
    y = route_scan(
        x.reshape(batch, height * width, channels),
        _per_direction(dbc),
        _per_route(A.to(dtype), len(directed)).expand(-1, channels, -1),
        build_routes(directed, height, width, x.device),
        dt_weight=None if dt_weight is None else _per_route(dt_weight.to(dtype), len(directed)),
        dt_bias=None if dt_bias is None else dt_bias.to(dtype).flatten(0, 1),
        delta=None if delta is None else _per_direction(delta),
        inclusive=not aligned,
        route_index=path_index,
        route_weight=path_weight,
        float_output=autocast and D.dtype == dtype,
    )
    assert isinstance(y, Tensor)
    return add_product(y.reshape(batch, height, width, channels), x, D.to(x.dtype))


def _per_route(parameter: Tensor, routes: int) -> Tensor:
    return parameter if parameter.shape[0] in (1, routes) else torch.cat([parameter, parameter])


def _per_direction(per_token: Tensor) -> Tensor:
    return (per_token if per_token.dim() == 5 else per_token.unsqueeze(3)).flatten(1, 2)

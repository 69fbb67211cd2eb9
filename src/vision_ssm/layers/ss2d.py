"""The 2-D selective scan as a layer (SS2D), and the block around it (VSSBlock).

Source: VMamba, arXiv 2401.10166, section 4 and figure 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from vision_ssm.layers.conv import conv_act
from vision_ssm.scan import CROSS_SCAN, ScanPath, build_routes, route_scan
from vision_ssm.scan.routes import as_paths


@torch.no_grad()
def init_step_bias(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
    """Fill the bias of the step size so that the step, its softplus, is log-uniform in dt_min..dt_max."""
    low, high = math.log(dt_min), math.log(dt_max)
    step = torch.exp(torch.rand_like(bias) * (high - low) + low).clamp(min=dt_floor)
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def decay_rates(A_log: Tensor) -> Tensor:
    """Return A from the logarithms of the negated rates, at least in float32; one leaf of an FX graph."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


def check_map(x: Tensor, channels: int | None = None) -> Tensor:
    """Return ``x`` if it is a map, (B, H, W, C), with that many channels; one leaf of an FX graph.

    Raises:
        TypeError: If ``x`` is not a tensor.
        ValueError: If its shape does not fit.
    """
    wanted = f"(batch, height, width, {channels or 'channels'})"
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of shape {wanted}, got {type(x).__name__}")
    if x.dim() != 4 or channels not in (None, x.shape[3]):
        hint = "; x.permute(0, 2, 3, 1) puts channels last" if x.dim() == 4 and x.shape[1] == channels else ""
        raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}{hint}")
    return x


def scan_map(
    x: Tensor,
    dbc: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor,
    paths: Sequence[ScanPath],
) -> Tensor:
    """Run the scan on a map along ``paths``; one leaf of an FX graph.

    Args:
        x: Map, (B, H, W, C).
        dbc: Low-rank step size, B and C per token, (B, H, W, K * (R + 2N)), or (B, H, W, R + 2N) for all routes.
        A: Decay rates, negative, (K, C, N).
        D: Skip connection, (K, C).
        dt_weight: Projection of the step sizes, (K, R, C).
        dt_bias: Bias of the step sizes, (K, C).
        paths: The K routes.

    Returns:
        The sum over routes, (B, H, W, C), in the dtype of ``x``. Under autocast in float32, which the
        published kernels pass to the norm that follows, unless the parameters, and so the norm's, are of another dtype.
    """
    batch, height, width, channels = check_map(x).shape
    features = dt_weight.shape[1] + 2 * A.shape[2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # torch raises an error for "meta"
    y = route_scan(
        x.reshape(batch, height * width, channels),
        dbc.reshape(batch, height * width, dbc.shape[-1] // features, features),
        A.to(dtype),
        build_routes(paths, height, width, x.device),
        dt_weight=dt_weight.to(dtype),
        dt_bias=dt_bias.to(dtype),
        D=None if D is None else D.to(dtype),
        float_output=autocast and (dt_weight if D is None else D).dtype == dtype,
    )
    assert isinstance(y, Tensor)
    return y.reshape(batch, height, width, channels)


torch.fx.wrap("decay_rates")
torch.fx.wrap("scan_map")
torch.fx.wrap("check_map")


class SS2D(nn.Module):
    """2-D selective scan: projection, depthwise convolution, scan along several routes, projection.

    Maps are channels-last, (B, H, W, C), of any height and width.

    Args:
        dim: Channels of input and output.
        d_state: N, states per channel.
        ssm_ratio: Inner channels per channel, ``int(dim * ssm_ratio)``.
        dt_rank: R, rank of the step size; ``None`` for ``ceil(dim / 16)``.
        d_conv: Side of the depthwise convolution, odd.
        conv_bias: Whether that convolution has a bias.
        bias: Whether the two projections have one.
        gated: Multiply by ``SiLU(z)``, with z from a second half of the input projection. The VMamba-v0 form is
            ``gated=True, d_state=16, ssm_ratio=2.0, conv_bias=True``.
        project_in: Whether there is an input projection; else the input has the inner channels already.
        norm_layer: Makes the norm of the scan's output from its channels.
        paths: The routes, each over all inner channels; their outputs are added.
        drop: Dropout rate after the output projection.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: If ``paths`` is not a sequence of paths.
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        bias: bool = False,
        gated: bool = False,
        project_in: bool = True,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        paths: Sequence[ScanPath] = CROSS_SCAN,
        drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(dim * ssm_ratio)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        for name, value in (("dim", dim), ("d_state", d_state), ("dt_rank", rank), ("dim * ssm_ratio", inner)):
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd and at least 1, got {d_conv}")
        if gated and not project_in:
            raise ValueError("gated must be False without an input projection, which makes the gate")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.paths = as_paths(paths)
        self.in_channels = dim if project_in else inner
        self.gated = gated
        routes = len(self.paths)
        self.in_proj = nn.Linear(dim, inner * (2 if gated else 1), bias=bias, **dd) if project_in else nn.Identity()
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(inner, routes * (rank + 2 * d_state), bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(routes, rank, inner, **dd))
        self.dt_bias = nn.Parameter(torch.empty(routes, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(routes, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(routes, inner, **dd))
        self.out_norm = norm_layer(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.drop = nn.Dropout(drop)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Set the scan's parameters as Mamba does: A = -(1..N), D = 1, step sizes log-uniform in dt_min..dt_max."""
        bound = self.dt_weight.shape[1] ** -0.5
        nn.init.uniform_(self.dt_weight, -bound, bound)
        init_step_bias(self.dt_bias, dt_min, dt_max, dt_floor)
        states = torch.arange(1, self.A_log.shape[2] + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def scan_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A, D, the projection and the bias of the step sizes, as :func:`scan_map` takes them."""
        return decay_rates(self.A_log), self.D, self.dt_weight, self.dt_bias

    def project(self, x: Tensor) -> Tensor:
        """Return step sizes in low rank, B and C, (B, H, W, K * (R + 2N)), of a map, (B, H, W, inner)."""
        return self.x_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, (B, H, W, C), into one of the same shape."""
        x = self.in_proj(check_map(x, self.in_channels))
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        x = conv_act(x, self.conv2d, self.act)  # (B, H, W, inner)
        y = self.out_norm(scan_map(x, self.project(x), *self.scan_parameters(), self.paths))
        if z is not None:
            y = y * F.silu(z)
        return self.drop(self.out_proj(y))


class VSSBlock(nn.Module):
    """Pre-norm residual block of SS2D and an MLP: ``x + SS2D(LN(x))``, then ``x + MLP(LN(x))``.

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels of the MLP per channel; 0 leaves the MLP out.
        drop_path: Stochastic depth rate of both branches.
        drop: Dropout rate in the MLP.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **ss2d: Options of :class:`SS2D`.

    Raises:
        ValueError: If a size or rate is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **ss2d: Any,
    ) -> None:
        super().__init__()
        if mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must be at least 0, got {mlp_ratio}")
        if not 0 <= drop_path <= 1:
            raise ValueError(f"drop_path must be between 0 and 1, got {drop_path}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.ss2d = SS2D(dim, **ss2d, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = nn.LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, C), into one of the same shape."""
        x = check_map(x, self.norm1.normalized_shape[0])
        x = x + self.drop_path1(self.ss2d(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

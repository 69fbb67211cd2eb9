"""The blocks of MambaMixer and QSMixer: selective mixing of tokens, then of channels.

Source: MambaMixer, arXiv 2403.19888, sections 3.2 and 4, table 8 and figures 1 and 8 of the first version; the abstract
of the second for quasi-separable kernels, Switch of Scans, the multi-resolution gate and QSMixer. The second version's
definitions were not available: what they leave open follows our design.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from vision_ssm.layers.conv import add_product, conv_act
from vision_ssm.layers.patches import symbolic
from vision_ssm.layers.quasi_separable import quasi_separable_scan
from vision_ssm.layers.ss2d import decay_rates, init_step_bias
from vision_ssm.layers.switch_of_scans import SCAN_POOL, FixedScans, SwitchOfScans
from vision_ssm.scan import ROWS, ScanPath
from vision_ssm.scan.routes import as_paths

_HEAD = 32  # channels that share a decay rate and step size in QSMixer
_DESCRIPTOR = 7  # side of the pooled map that describes a channel


torch.fx.wrap("add_product")  # leaves of an FX graph
torch.fx.wrap("decay_rates")
torch.fx.wrap("quasi_separable_scan")


def _per_channel(x: Tensor) -> Tensor:
    """Repeat values per head for the channels of the head."""
    return torch.repeat_interleave(x, _HEAD, dim=-1)


def _drop_path(rate: float) -> nn.Module:
    if not 0 <= rate <= 1:
        raise ValueError(f"drop_path must be between 0 and 1, got {rate}")
    return DropPath(rate) if rate > 0 else nn.Identity()


class WeightedAverage(nn.Module):
    """A learned weighted sum of all earlier maps of a stage, by scalars; at first it is the newest map alone.

    The oldest map, the stage's input, has two scalars: it counts as output of a token mixer and of a channel mixer.

    Source: MambaMixer, section 3.2. The paper names no initialization; this is DenseFormer's.

    Args:
        maps: Number of maps.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If ``maps`` is below 1.
    """

    def __init__(self, maps: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if maps < 1:
            raise ValueError(f"maps must be at least 1, got {maps}")
        self.scalars = nn.Parameter(torch.zeros(maps + 1, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Take the newest map alone."""
        self.scalars.zero_()
        self.scalars[-1:].fill_(1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Sum maps of one shape, the oldest first.

        Raises:
            ValueError: If the number of maps is not the layer's.
        """
        return _weighted_sum(self.scalars, list(maps))


def _weighted_sum(scalars: Tensor, maps: list[Tensor]) -> Tensor:
    if len(maps) != len(scalars) - 1:
        raise ValueError(f"there must be {len(scalars) - 1} maps, got {len(maps)}")
    as_token_mixer, as_channel_mixer, *others = scalars.unbind()
    total = maps[0] * (as_token_mixer + as_channel_mixer)
    for x, scalar in zip(maps[1:], others, strict=True):
        total = add_product(total, x, scalar)
    return total


torch.fx.wrap("_weighted_sum")


def _dilated(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Depthwise 3x3 convolution of (B, C, H, W); one leaf of an FX graph."""
    options: dict[str, Any] = dict(padding=dilation, dilation=dilation, groups=weight.shape[0])
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.conv2d(x, weight, bias, **options)
    # In bfloat16, oneDNN's gradient of a dilated weight is wrong on large maps, and sometimes NaN.
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), **options).to(x.dtype)


torch.fx.wrap("_dilated")


class DilatedConv(nn.Conv2d):
    """Depthwise 3x3 convolution with dilation, of (B, C, H, W)."""

    def __init__(self, dim: int, dilation: int, **dd: Any) -> None:
        super().__init__(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim, **dd)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve a map."""
        return _dilated(input, self.weight, self.bias, self.dilation[0])


class MultiResolutionConv(nn.Module):
    """A stack of depthwise 3x3 convolutions with dilations 1, 2, 4, ..., summed with a weight per level and channel.

    The sum includes the input. Receptive fields are 1, 3, 7, 15, ... Source: MultiresConv (Shi, Wang, Fox 2023), in two
    dimensions.

    Args:
        dim: Channels.
        levels: Convolutions.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self, dim: int, levels: int = 3, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or levels < 1:
            raise ValueError(f"dim and levels must be at least 1, got {dim} and {levels}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convs = nn.ModuleList(DilatedConv(dim, 2**j, **dd) for j in range(levels))
        self.level_weight = nn.Parameter(torch.full((levels + 1, dim), 1 / (levels + 1), **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, dim)."""
        y = x * self.level_weight[0]
        x = x.permute(0, 3, 1, 2)
        for j, conv in enumerate(self.convs):
            x = conv(x)
            y = add_product(y, x.permute(0, 2, 3, 1), self.level_weight[j + 1])
        return y


class _TokenMixer(nn.Module):
    """Base of both token mixers: norm, gate, convolution, choice of paths, output; a subclass adds the scan."""

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        expand: float = 2.0,
        paths: Sequence[ScanPath] = SCAN_POOL,
        scans: int = 2,
        switch: bool = True,
        bidirectional: bool = True,
        aligned: bool = False,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(dim * expand)
        for name, value in (("dim", dim), ("d_state", d_state)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if inner < 1:
            raise ValueError(f"expand must give {dim} channels at least one inner channel, got {expand}")
        if not 1 <= scans <= len(as_paths(paths)):
            raise ValueError(f"scans must be between 1 and {len(paths)}, the number of paths, got {scans}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_state, self.inner, self.aligned, self.bidirectional = d_state, inner, aligned, bidirectional
        self.norm = nn.LayerNorm(dim, **dd)
        self.gate = MultiResolutionConv(dim, **dd)
        self.gate_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.gate_act = nn.SiLU()
        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **dd)
        self.act = nn.SiLU()
        self.switch = SwitchOfScans(dim, paths, scans, **dd) if switch else FixedScans(paths, scans)
        self.out_norm = nn.LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.drop_path = _drop_path(drop_path)

    def scan(self, u: Tensor, v: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Mix ``v``, (B, H, W, inner), along the chosen paths; ``u`` is the normalized input."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of a map, (B, H, W, dim).

        Returns:
            The input plus the mixed map, (B, H, W, dim), and in training the balance term of the paths' choice (see
            :class:`SwitchOfScans`), else ``None``.
        """
        u = self.norm(x)
        index, weight, balance = self.switch(u)
        # The gate last, and no name for the scan's input: in inference neither is in memory beside the other.
        y = self.out_norm(self.scan(u, conv_act(self.in_proj(u), self.conv2d, self.act), index, weight))
        y = self.out_proj(y * self.gate_act(self.gate_proj(self.gate(u))))
        return x + self.drop_path(y), balance


class SelectiveTokenMixer(_TokenMixer):
    """MambaMixer's token mixer: a gated S6 scan along paths chosen per image, in both directions; with its residual.

    B, C and the step sizes are computed once per token, for all paths and directions; a path has its own decay rates,
    and each of its directions its own bias of the step size. Rates are per channel and state, as in Mamba.

    Args:
        dim: Channels of input and output.
        d_state: N, states per channel.
        expand: Inner channels per channel.
        dt_rank: R, rank of the step size; ``None`` for ``ceil(dim / 16)``.
        paths: The pool of paths.
        scans: How many of them an image takes.
        switch: Choose them for every image; else all images take the first ones.
        bidirectional: Walk them in both directions, or forwards alone.
        aligned: The aligned form of the quasi-separable scan instead of the shift form.
        drop_path: Stochastic depth rate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size or rate is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        dt_rank: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, **options, **dd)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        if rank < 1:
            raise ValueError(f"dt_rank must be at least 1, got {rank}")
        directions, paths = 2 if self.bidirectional else 1, len(self.switch.paths)
        self.x_proj = nn.Linear(self.inner, rank + 2 * self.d_state, bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(1, rank, self.inner, **dd))
        self.dt_bias = nn.Parameter(torch.empty(directions, paths, self.inner, **dd))
        self.A_log = nn.Parameter(torch.empty(paths, self.inner, self.d_state, **dd))
        self.D = nn.Parameter(torch.empty(self.inner, **dd))
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Set the scan's parameters as Mamba does: A = -(1..N), D = 1, step sizes log-uniform in 0.001..0.1."""
        bound = self.dt_weight.shape[1] ** -0.5
        nn.init.uniform_(self.dt_weight, -bound, bound)
        init_step_bias(self.dt_bias)
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def scan_parameters(self) -> dict[str, Tensor]:
        """Return the parameters of :func:`quasi_separable_scan`."""
        return dict(A=decay_rates(self.A_log), D=self.D, dt_weight=self.dt_weight, dt_bias=self.dt_bias)

    def scan(self, u: Tensor, v: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """See :class:`_TokenMixer`."""
        return quasi_separable_scan(
            v,
            self.x_proj(v),
            paths=self.switch.paths,
            **self.scan_parameters(),
            path_index=index,
            path_weight=weight,
            aligned=self.aligned,
            bidirectional=self.bidirectional,
        )


class QSTokenMixer(_TokenMixer):
    """QSMixer's token mixer: as :class:`SelectiveTokenMixer`, with one decay rate and step size per head.

    A head is 32 channels. B, C and the step sizes come from the block's input, beside the main projection, and B and C
    pass a convolution of their own (as in Mamba-2).

    Args:
        dim: Channels of input and output.
        d_state: N, states per channel.
        expand: Inner channels per channel; ``dim * expand`` must be a multiple of 32.
        paths: The pool of paths.
        scans: How many of them an image takes.
        switch: Choose them for every image; else all images take the first ones.
        bidirectional: Walk them in both directions, or forwards alone.
        aligned: The aligned form of the quasi-separable scan instead of the shift form.
        drop_path: Stochastic depth rate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size or rate is out of range.
    """

    def __init__(
        self, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, **options, **dd)
        if self.inner % _HEAD:
            raise ValueError(f"dim * expand must be a multiple of {_HEAD}, the channels of a head, got {self.inner}")
        directions, paths = 2 if self.bidirectional else 1, len(self.switch.paths)
        heads, features = self.inner // _HEAD, 2 * self.d_state
        self.bcdt_proj = nn.Linear(dim, features + heads, bias=False, **dd)
        self.bc_conv2d = nn.Conv2d(features, features, 3, padding=1, groups=features, **dd)
        self.bc_act = nn.SiLU()
        self.dt_bias = nn.Parameter(torch.empty(directions, paths, heads, **dd))
        self.A_log = nn.Parameter(torch.empty(paths, heads, **dd))
        self.D = nn.Parameter(torch.empty(heads, **dd))
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Set A = -1, D = 1 and step sizes log-uniform in 0.001..0.1."""
        init_step_bias(self.dt_bias)
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def scan_parameters(self) -> dict[str, Tensor]:
        """Return the parameters of :func:`quasi_separable_scan`; the step sizes' bias is per head."""
        return dict(A=_per_channel(decay_rates(self.A_log)).unsqueeze(-1), D=_per_channel(self.D), dt_bias=self.dt_bias)

    def scan(self, u: Tensor, v: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """See :class:`_TokenMixer`."""
        features = 2 * self.d_state
        bcdt = self.bcdt_proj(u)
        bc = conv_act(bcdt[..., :features], self.bc_conv2d, self.bc_act)
        return quasi_separable_scan(
            v,
            bc,
            paths=self.switch.paths,
            **self.scan_parameters(),
            delta=bcdt[..., features:],
            path_index=index,
            path_weight=weight,
            aligned=self.aligned,
            bidirectional=self.bidirectional,
        )


class ChannelConv1d(nn.Conv1d):
    """One 3-tap kernel along the channel axis of a map: (B, H, W, C) to (B, C, H, W), channels first in memory."""

    def __init__(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(1, 1, 3, padding=1, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve a map."""
        # torch's convolutions take several times as long for a single channel.
        x = F.pad(input.permute(0, 3, 1, 2).contiguous(), (0, 0, 0, 0, 1, 1))
        first, middle, last = torch.split(self.weight.view(3, 1, 1), 1)
        assert self.bias is not None
        y = torch.addcmul(self.bias, x[:, 1:-1], middle)
        return add_product(add_product(y, x[:, :-2], first), x[:, 2:], last)


def _scan_channels(
    a: Tensor, raw: Tensor, bc_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, aligned: bool
) -> Tensor:
    """Scan across the channels of a map, (B, C, H, W) to (B, H, W, C); one leaf of an FX graph.

    ``raw`` holds step size, B and C of every channel before their biases, (B, C, 1 + 2N).
    """
    batch, channels, height, width = a.shape
    tokens = height * width
    directions = dt_bias.shape[0]
    y = quasi_separable_scan(
        a.reshape(batch, 1, channels, tokens),  # a sequence of channels, whose features are the tokens
        (raw[..., 1:] + bc_bias).unsqueeze(1),
        A.view(1, 1, 1),
        D.unsqueeze(-1),
        (ROWS,),
        delta=(raw[..., :1] + dt_bias.t())[:, None, :, :, None],
        aligned=aligned,
        bidirectional=directions == 2,
    )
    return y.reshape(batch, channels, height, width).permute(0, 2, 3, 1)


torch.fx.wrap("_scan_channels")


def _describe(a: Tensor) -> Tensor:
    """Pool every channel of (B, C, H, W) to 7x7 values, (B, C, 49); one leaf of an FX graph."""
    height, width = a.shape[2:]
    if not symbolic(height, width):
        return F.adaptive_avg_pool2d(a, _DESCRIPTOR).flatten(2)
    # ONNX gets the pooling's gathers for the traced size alone.
    return (_averages(height, a) @ a @ _averages(width, a).t()).flatten(2)


def _averages(length: int, like: Tensor) -> Tensor:
    """Return the matrix that pools an axis as torch's adaptive pooling does, (7, length)."""
    place = torch.arange(length, device=like.device)
    bin_ = torch.arange(_DESCRIPTOR, device=like.device)[:, None]
    first, end = bin_ * length // _DESCRIPTOR, ((bin_ + 1) * length + _DESCRIPTOR - 1) // _DESCRIPTOR
    return ((place >= first) & (place < end)).to(like.dtype) / (end - first).to(like.dtype)


torch.fx.wrap("_describe")


class SelectiveChannelMixer(nn.Module):
    """Channel mixer of MambaMixer, and without its gate of QSMixer: a scan across the channels; with its residual.

    The sequence is that of the inner channels, and a channel's features are its values at all tokens. B, C and the step
    size of a channel are linear in its 7x7 pooled map, plus a bias of its own. So an image mixes its channels by one
    quasi-separable matrix, which is applied by a scan in both directions and never built.

    Args:
        dim: Channels of input and output.
        expand: Inner channels per channel.
        d_state: N, states; the rank of the matrix off its diagonal.
        gated: Multiply by ``SiLU(z)``, with z a projection of the input.
        bidirectional: Scan in both directions, or forwards alone.
        aligned: The aligned form of the quasi-separable scan instead of the shift form.
        drop_path: Stochastic depth rate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size or rate is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 1.0,
        d_state: int = 16,
        gated: bool = True,
        bidirectional: bool = True,
        aligned: bool = False,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = int(dim * expand)
        for name, value in (("dim", dim), ("d_state", d_state)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if width < 1:
            raise ValueError(f"expand must give {dim} channels at least one inner channel, got {expand}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_state, self.aligned = d_state, aligned
        self.norm = nn.LayerNorm(dim, **dd)
        self.in_proj = nn.Linear(dim, width, bias=False, **dd)
        self.gate_proj = nn.Linear(dim, width, bias=False, **dd) if gated else None
        if gated:
            self.gate_act = nn.SiLU()
        self.conv1d = ChannelConv1d(**dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(_DESCRIPTOR**2, 1 + 2 * d_state, bias=False, **dd)
        self.bc_bias = nn.Parameter(torch.empty(width, 2 * d_state, **dd))
        self.dt_bias = nn.Parameter(torch.empty(2 if bidirectional else 1, width, **dd))
        self.A_log = nn.Parameter(torch.empty(1, **dd))
        self.D = nn.Parameter(torch.empty(width, **dd))
        self.out_norm = nn.LayerNorm(width, **dd)
        self.out_proj = nn.Linear(width, dim, bias=False, **dd)
        self.drop_path = _drop_path(drop_path)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Set A = -1, D = 1, step sizes log-uniform in 0.001..0.1, and random biases, so that channels differ."""
        init_step_bias(self.dt_bias)
        nn.init.normal_(self.bc_bias, std=self.d_state**-0.5)
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def scan_parameters(self) -> tuple[Tensor, Tensor]:
        """Return A, (1,), and D, (width,)."""
        return decay_rates(self.A_log), self.D

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of a map, (B, H, W, dim), and add the input."""
        u = self.norm(x)
        a = self.act(self.conv1d(self.in_proj(u)))  # (B, width, H, W)
        g = _describe(a)
        y = _scan_channels(a, self.x_proj(g), self.bc_bias, self.dt_bias, *self.scan_parameters(), self.aligned)
        y = self.out_norm(y)
        if self.gate_proj is not None:
            y = y * self.gate_act(self.gate_proj(u))
        return x + self.drop_path(self.out_proj(y))


class MlpChannelMixer(nn.Module):
    """An MLP on every token in place of :class:`SelectiveChannelMixer`, for ablations; with norm and residual.

    Args:
        dim: Channels of input and output.
        hidden: Hidden channels.
        drop_path: Stochastic depth rate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, hidden: int, *, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, hidden, **dd)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, dim), and add the input."""
        return x + self.drop_path(self.mlp(self.norm(x)))

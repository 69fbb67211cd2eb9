"""EfficientVMamba: skip-sampled scans beside convolutions in the early stages, inverted residuals in the late ones.

Paper: "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", arXiv 2403.09977 (AAAI 2025).
Variants follow the published weights. Their S is narrower than the paper's table 1 has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn

from vision_ssm.checkpoints import build_from_official
from vision_ssm.checkpoints.efficient_vmamba import convert_efficient_vmamba
from vision_ssm.layers import SS2D, conv_act
from vision_ssm.layers.patches import PatchMerging, cells, channels_first, channels_last, symbolic
from vision_ssm.models.backbone import ATTO, Backbone, Stage, check_options, init_weights, make_cfg
from vision_ssm.scan import ATROUS_SCAN

__all__ = ["EfficientVMamba"]


def from_cells(y: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`vision_ssm.layers.patches.cells`; one leaf of an FX graph.

    Args:
        y: Cells of 2x2 tokens, each column by column, (B, ceil(H/2), ceil(W/2), 4 * C).
        height: H.
        width: W.

    Returns:
        The map, (B, H, W, C).
    """
    y = y.unflatten(3, (2, 2, -1))  # (B, H/2, W/2, 2 columns, 2 rows, C)
    if symbolic(height, width):  # cutting off a padding that may be none would tie the graph to one of the cases
        row, column = torch.arange(height, device=y.device)[:, None], torch.arange(width, device=y.device)
        up, left = row // 2, column // 2
        return y[:, up, left, column - 2 * left, row - 2 * up]
    y = y.permute(0, 1, 4, 2, 3, 5)  # (B, H/2, 2, W/2, 2, C)
    return y.flatten(3, 4).flatten(1, 2)[:, :height, :width]


torch.fx.wrap("cells")
torch.fx.wrap("channels_first")
torch.fx.wrap("from_cells")


class GridLinear(nn.Module):
    """Linear layer without bias, another one for each of the four sub-grids, in the order of ``ATROUS_SCAN``."""

    def __init__(self, in_features: int, features: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4 * in_features, 4 * features, 1, groups=4, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Project a map, (B, H, W, in_features) to (B, H, W, features)."""
        return from_cells(conv_act(cells(x).flatten(3), self.proj), x.shape[1], x.shape[2])


class ES2D(SS2D):
    """SS2D whose four routes visit a quarter of the tokens each; section 4.1 of the paper.

    All four go forwards, two of them column by column, where the paper speaks of four directions. A token belongs to
    one route, so nothing is added up, and it needs one projection only.
    """

    def __init__(self, dim: int, d_state: int, ssm_ratio: float, **dd: Any) -> None:
        super().__init__(dim, d_state=d_state, ssm_ratio=ssm_ratio, conv_bias=True, gated=True, paths=ATROUS_SCAN, **dd)
        _, rank, inner = self.dt_weight.shape
        self.x_proj = GridLinear(inner, rank + 2 * d_state, **dd)  # type: ignore[assignment]


class ConvBranch(nn.Module):
    """Depthwise 3x3 convolution, BatchNorm, GELU, linear layer; (B, H, W, C)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()
        self.conv_pw = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        x = self.bn(self.conv_dw(channels_first(x))).permute(0, 2, 3, 1)
        return self.conv_pw(self.act(x))


class ChannelGate(nn.Module):
    """Scale the channels of a map, (B, H, W, C), by two linear layers on the mean of its normalized tokens.

    With a LayerNorm it is the gate of EVSS, where the paper has squeeze-and-excitation; without a norm it is that.
    """

    def __init__(self, dim: int, hidden: int, norm: nn.Module, act: nn.Module, **dd: Any) -> None:
        super().__init__()
        self.norm = norm
        self.reduce = nn.Linear(dim, hidden, **dd)
        self.act = act
        self.expand = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Scale a map."""
        scale = self.norm(x).mean((1, 2), keepdim=True)
        return x * self.expand(self.act(self.reduce(scale))).sigmoid()


class EVSSBlock(nn.Module):
    """A scan and a convolution of the same normalized map, gated and added; then an MLP where there is one.

    Source: section 4.2 and figure 3 of the paper. The published model has one gate for both branches, applied to each,
    and one decision of stochastic depth for their sum. ``atrous``, ``conv_branch`` and ``gate`` are for ablations.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        ssm_ratio: float,
        mlp_ratio: float,
        drop_path: float = 0.0,
        *,
        atrous: bool = True,
        conv_branch: bool = True,
        gate: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        scan = ES2D if atrous else partial(SS2D, conv_bias=True, gated=True)
        self.ss2d = scan(dim, d_state=d_state, ssm_ratio=ssm_ratio, **dd)
        self.conv_branch = ConvBranch(dim, **dd) if conv_branch else None
        self.gate = ChannelGate(dim, dim // 8, nn.LayerNorm(dim, **dd), nn.GELU(), **dd) if gate else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = nn.LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, dim), into one of the same shape."""
        u = self.norm1(x)
        y = self.gate(self.ss2d(u))
        if self.conv_branch is not None:
            y = y + self.gate(self.conv_branch(u))
        x = x + self.drop_path1(y)
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class InvertedResidual(nn.Module):
    """1x1 convolution to four times the width, depthwise 3x3, squeeze-and-excitation, 1x1 convolution back.

    Source: section 4.3 of the paper.
    The activation is a plain ReLU, and the squeeze is to an eighth of the inner width, as in the published model.
    The 1x1 convolutions are linear layers on the last axis: a CPU computes those two to three times as fast.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv_pw = nn.Linear(dim, hidden, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(hidden, **dd)
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(hidden, **dd)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.se = ChannelGate(hidden, max(1, hidden // 8), nn.Identity(), nn.ReLU(), **dd)
        self.conv_pwl = nn.Linear(hidden, dim, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, dim), into one of the same shape."""
        y = channels_first(self.conv_pw(x))
        y = self.act1(self.bn1(y))
        y = self.act2(self.bn2(self.conv_dw(y))).permute(0, 2, 3, 1)  # (B, H, W, hidden)
        y = self.conv_pwl(self.se(y))
        y = self.bn3(channels_first(y)).permute(0, 2, 3, 1)
        return x + self.drop_path(y)


class Stem(nn.Module):
    """Patches and LayerNorm: (B, in_chans, H, W) to (B, floor(H/stride), floor(W/stride), dim).

    Rows and columns that do not fill a patch are left out, as in the published model.
    """

    def __init__(self, in_chans: int, dim: int, stride: int, **dd: Any) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"stem_stride must be at least 1, got {stride}")
        self.conv = nn.Conv2d(in_chans, dim, stride, stride=stride, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image."""
        return self.norm(self.conv(channels_last(x)).permute(0, 2, 3, 1))


class EfficientVMamba(Backbone):
    """EfficientVMamba backbone and classifier, with timm's interface. Images of any height and width.

    Options that all families have are documented on :class:`vision_ssm.models.backbone.Backbone`.

    Args:
        stem_stride: Side and stride of the stem's patches: 4 as published, 2 for small images.
        d_state: States per channel.
        ssm_ratio: Inner channels of the scan per channel.
        mlp_ratio: Hidden channels per channel of an MLP in every EVSS block; 0 for none, as published.
        scanning: For each stage, whether it is of EVSS blocks, else of inverted residuals; ``None`` for EVSS blocks in
            the first two, as published. Tables 6 and 8 of the paper vary it.
        atrous: Skip-sampled scans; else EVSS blocks scan all tokens along four routes, as the baseline of table 5 does.
        conv_branch: Whether EVSS blocks have the convolution beside the scan; table 5 has rows without it and the gate.
        gate: Whether EVSS blocks weigh the channels of their branches.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 4, 2),
        stem_stride: int = 4,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 0.0,
        scanning: Sequence[bool] | None = None,
        atrous: bool = True,
        conv_branch: bool = True,
        gate: bool = True,
        feature_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        flags = dict(atrous=atrous, conv_branch=conv_branch, gate=gate, feature_norm=feature_norm)
        check_options(dims, depths, in_chans, drop_path_rate, **flags)
        scanning = [i < 2 for i in range(len(dims))] if scanning is None else scanning
        if not isinstance(scanning, Sequence) or len(scanning) != len(dims) or not {*scanning} <= {True, False}:
            raise ValueError(f"scanning must hold True or False for each of the {len(dims)} stages, got {scanning}")
        if any(scans and dim < 8 for scans, dim in zip(scanning, dims, strict=True)):
            raise ValueError(f"dims of stages that scan must be at least 8, got {tuple(dims)}")
        if mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must be at least 0, got {mlp_ratio}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        evss: dict[str, Any] = dict(d_state=d_state, ssm_ratio=ssm_ratio, mlp_ratio=mlp_ratio)
        evss |= dict(atrous=atrous, conv_branch=conv_branch, gate=gate)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                [
                    EVSSBlock(dim, drop_path=rate, **evss, **dd) if scanning[i] else InvertedResidual(dim, rate, **dd)
                    for rate in rates[i]
                ],
                PatchMerging(dims[i - 1], dim, **dd) if i else None,
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            Stem(in_chans, dims[0], stem_stride, **dd),
            stages,
            dims,
            stem_stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            norm=nn.LayerNorm(dims[-1], **dd),
            feature_norms=[nn.LayerNorm(dim, **dd) for dim in dims] if feature_norm else None,
            drop_rate=drop_rate,
            output_stride=output_stride,
            **dd,
        )
        named_apply(_init_weights, self)


def _init_weights(module: nn.Module, name: str) -> None:
    # In the published model these are convolutions, which keep torch's default.
    if not name.endswith(("conv_pw", "conv_pwl", "se.reduce", "se.expand")):
        init_weights(module, name)


_cfg = partial(
    make_cfg,
    license="apache-2.0",
    paper_ids="arXiv:2403.09977",
    paper_name="EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
    origin_url="https://github.com/TerryPei/EfficientVMamba",
    first_conv="stem.conv",
)

_RELEASE = "https://huggingface.co/TerryPei/EfficientVMamba-{}/resolve/main/efficient_vmamba_{}.ckpt"

default_cfgs = generate_default_cfgs(
    {
        "efficient_vmamba_tiny.in1k": _cfg(_RELEASE.format("Tiny", "tiny"), "76.5"),
        "efficient_vmamba_small.in1k": _cfg(_RELEASE.format("Small", "small"), "78.7"),
        "efficient_vmamba_base.in1k": _cfg(_RELEASE.format("Base", "base"), "81.8"),
        "efficient_vmamba_atto.untrained": _cfg(**ATTO),
    }
)


def _create_efficient_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    return build_from_official(EfficientVMamba, variant, pretrained, convert_efficient_vmamba, **kwargs)


@register_model
def efficient_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T: 6.5 M parameters."""
    args = dict(depths=(2, 2, 4, 2), dims=(48, 96, 192, 384))
    return _create_efficient_vmamba("efficient_vmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def efficient_vmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S: 11.3 M parameters. The paper prints the widths of B, the weights have these."""
    args = dict(depths=(2, 2, 4, 2), dims=(64, 128, 256, 512))
    return _create_efficient_vmamba("efficient_vmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def efficient_vmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B: 33.7 M parameters."""
    args = dict(depths=(2, 2, 9, 2), dims=(96, 192, 384, 768))
    return _create_efficient_vmamba("efficient_vmamba_base", pretrained, **dict(args, **kwargs))


@register_model
def efficient_vmamba_atto(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """Ours, for images of about 32x32 pixels (stem of stride 2): less than 1 M parameters."""
    args = dict(depths=(1, 2, 2, 1), dims=(32, 64, 96, 128), stem_stride=2)
    return _create_efficient_vmamba("efficient_vmamba_atto", pretrained, **dict(args, **kwargs))

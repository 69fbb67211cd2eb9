"""VMamba: visual state-space model with four-way cross scans.

Paper: "VMamba: Visual State Space Model", arXiv 2401.10166 (NeurIPS 2024).
Variants follow the published final models (no gate, one state per channel).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn

from vision_ssm.checkpoints import build_from_official
from vision_ssm.checkpoints.vmamba import convert_vmamba
from vision_ssm.layers import VSSBlock
from vision_ssm.layers.patches import channels_last
from vision_ssm.models.backbone import (
    ATTO,
    Backbone,
    Stage,
    check_options,
    conv2d,
    init_weights,
    make_cfg,
    stem_strides,
)
from vision_ssm.scan import CROSS_SCAN, ScanPath

__all__ = ["VMamba"]


class Stem(nn.Module):
    """Two 3x3 convolutions, each followed by LayerNorm: (B, in_chans, H, W) to (B, H', W', dim)."""

    def __init__(self, in_chans: int, dim: int, stride: int, **dd: Any) -> None:
        super().__init__()
        first, second = stem_strides(stride)
        if dim < 2:
            raise ValueError(f"dims[0] must be at least 2, got {dim}")
        self.conv1 = conv2d(in_chans, dim // 2, stride=first, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = conv2d(dim // 2, dim, stride=second, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image."""
        x = self.conv1(channels_last(x)).permute(0, 2, 3, 1)
        x = self.act(self.norm1(x)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and LayerNorm: (B, H, W, in_dim) to (B, ceil(H/2), ceil(W/2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = conv2d(in_dim, dim, stride=2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve a map."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class VMamba(Backbone):
    """VMamba backbone and classifier, with timm's interface. Images of any height and width.

    Options that all families have are documented on :class:`vision_ssm.models.backbone.Backbone`.

    Args:
        stem_stride: Stride of the stem: 4 as published, 2 or 1 for small images.
        d_state: States per channel.
        ssm_ratio: Inner channels of SS2D per channel.
        mlp_ratio: Hidden channels of the MLP per channel.
        paths: Routes of every scan.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 8, 2),
        stem_stride: int = 4,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        paths: Sequence[ScanPath] = CROSS_SCAN,
        feature_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(dims, depths, in_chans, drop_path_rate, feature_norm=feature_norm)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        block: dict[str, Any] = dict(d_state=d_state, ssm_ratio=ssm_ratio, mlp_ratio=mlp_ratio, paths=paths, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                [VSSBlock(dim, drop_path=rate, **block) for rate in rates[i]],
                Downsample(dims[i - 1], dim, **dd) if i else None,
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
        named_apply(init_weights, self)


_cfg = partial(
    make_cfg,
    license="mit",
    paper_ids="arXiv:2401.10166",
    paper_name="VMamba: Visual State Space Model",
    origin_url="https://github.com/MzeroMiko/VMamba",
)

_RELEASE = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/"

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny.in1k": _cfg(_RELEASE + "vssm1_tiny_0230s_ckpt_epoch_264.pth", "82.6"),
        "vmamba_small.in1k": _cfg(_RELEASE + "vssm_small_0229_ckpt_epoch_222.pth", "83.6"),
        "vmamba_base.in1k": _cfg(_RELEASE + "vssm_base_0229_ckpt_epoch_237.pth", "83.9"),
        "vmamba_tiny_s2l5.in1k": _cfg(_RELEASE + "vssm_tiny_0230_ckpt_epoch_262.pth", "82.5"),
        "vmamba_small_s1l20.in1k": _cfg(_RELEASE + "vssm1_small_0229s_ckpt_epoch_240.pth", "83.3"),
        "vmamba_base_s1l20.in1k": _cfg(_RELEASE + "vssm1_base_0229s_ckpt_epoch_225.pth", "83.8"),
        "vmamba_atto.untrained": _cfg(**ATTO),
    }
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_from_official(VMamba, variant, pretrained, convert_vmamba, **kwargs)


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T (s1l8): 30.2 M parameters."""
    args = dict(depths=(2, 2, 8, 2), dims=(96, 192, 384, 768), ssm_ratio=1.0)
    return _create_vmamba("vmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S (s2l15): 50.1 M parameters."""
    args = dict(depths=(2, 2, 15, 2), dims=(96, 192, 384, 768), ssm_ratio=2.0)
    return _create_vmamba("vmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B (s2l15): 88.6 M parameters."""
    args = dict(depths=(2, 2, 15, 2), dims=(128, 256, 512, 1024), ssm_ratio=2.0)
    return _create_vmamba("vmamba_base", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The earlier VMamba-T (s2l5), with which SparX compares: 30.7 M parameters."""
    args = dict(depths=(2, 2, 5, 2), dims=(96, 192, 384, 768), ssm_ratio=2.0)
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, narrower and deeper (s1l20): 49.0 M parameters."""
    args = dict(depths=(2, 2, 20, 2), dims=(96, 192, 384, 768), ssm_ratio=1.0)
    return _create_vmamba("vmamba_small_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, narrower and deeper (s1l20): 86.6 M parameters."""
    args = dict(depths=(2, 2, 20, 2), dims=(128, 256, 512, 1024), ssm_ratio=1.0)
    return _create_vmamba("vmamba_base_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_atto(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Ours, for images of about 32x32 pixels (stem of stride 2): less than 1 M parameters."""
    args = dict(depths=(1, 2, 3, 1), dims=(32, 64, 96, 128), stem_stride=2)
    return _create_vmamba("vmamba_atto", pretrained, **dict(args, **kwargs))

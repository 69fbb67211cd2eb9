"""GroupMamba: four channel groups, each scanned along one route, and a channel gate over all of them.

Paper: "GroupMamba: Efficient Group-Based Visual State Space Model", arXiv 2407.13772 (CVPR 2025).
Where the paper and the published code differ, this is what the published code and weights compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn

from vision_ssm.checkpoints import build_from_official
from vision_ssm.checkpoints.group_mamba import convert_group_mamba
from vision_ssm.layers import SS2D, conv_act, scan_map
from vision_ssm.layers.patches import channels_last
from vision_ssm.models.backbone import ATTO, Backbone, Stage, check_options, conv2d, make_cfg, stem_strides
from vision_ssm.models.vmamba import Downsample
from vision_ssm.scan import CROSS_SCAN

__all__ = ["GroupMamba"]

# One group per route. The published code scans rows, columns, reversed rows, reversed columns; the paper names rows,
# reversed rows, columns, reversed columns.
_PATHS = CROSS_SCAN
_GROUPS = len(_PATHS)
# The published model has two: blocks, stages and the class block normalize with this one, all else with torch's 1e-5.
_EPS = 1e-6

torch.fx.wrap("scan_map")  # FX needs this in every module that calls it


class Stem(nn.Module):
    """Four convolutions, the first three with batch norm and ReLU: (B, in_chans, H, W) to (B, H', W', dim)."""

    def __init__(self, in_chans: int, hidden: int, dim: int, stride: int, **dd: Any) -> None:
        super().__init__()
        first, last = stem_strides(stride)
        if hidden < 1:
            raise ValueError(f"stem_dim must be at least 1, got {hidden}")
        self.conv1 = conv2d(in_chans, hidden, 7, stride=first, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(hidden, **dd)
        self.conv2 = conv2d(hidden, hidden, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(hidden, **dd)
        self.conv3 = conv2d(hidden, hidden, bias=False, **dd)
        self.norm3 = nn.BatchNorm2d(hidden, **dd)
        self.act1, self.act2, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.conv4 = conv2d(hidden, dim, stride=last, **dd)
        self.norm4 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image."""
        x = channels_last(x)
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(self.norm2(self.conv2(x)))
        x = self.act3(self.norm3(self.conv3(x)))
        return self.norm4(self.conv4(x).permute(0, 2, 3, 1))


def group_linear(dim: int, out_dim: int, **dd: Any) -> nn.Conv2d:
    """Return a linear layer without bias for each group of channels: (B, C, H, W) to (B, groups * out_dim, H, W)."""
    return nn.Conv2d(dim, _GROUPS * out_dim, 1, groups=_GROUPS, bias=False, **dd)


class GroupLayerNorm(nn.Module):
    """LayerNorm over each group of channels, (B, H, W, C)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a map."""
        # Groups of channels of single tokens: GroupNorm computes the same, but slower.
        width = self.weight.shape[0] // _GROUPS
        y = F.layer_norm(x.unflatten(-1, (_GROUPS, width)), (width,)).flatten(-2)
        return torch.addcmul(self.bias, y, self.weight)


class GroupSS2D(SS2D):
    """Four gated SS2D side by side, each on a quarter of the channels and along one route: section 3.2 of the paper.

    The groups share nothing. The scan's parameters are those of four SS2D of a quarter of the width; everything else
    acts on all channels at once. With ``all_directions`` every group is scanned along all four routes, whose outputs
    are added: four times the scan, on four copies of the map.
    """

    def __init__(self, dim: int, all_directions: bool = False, **dd: Any) -> None:
        width, routes = dim // _GROUPS, len(_PATHS) if all_directions else 1
        super().__init__(width, paths=_PATHS * routes, gated=True, conv_bias=True, **dd)
        self.routes = routes  # of each group
        features = routes * (self.dt_weight.shape[1] + 2 * self.A_log.shape[2])
        self.in_proj = group_linear(dim, width, **dd)  # type: ignore[assignment]
        self.gate_proj = group_linear(dim, width, **dd)
        self.gate_act = nn.SiLU()
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.x_proj = group_linear(dim, features, **dd)  # type: ignore[assignment]
        self.out_norm = GroupLayerNorm(dim, **dd)
        self.out_proj = group_linear(dim, width, **dd)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, (B, H, W, C), into one of the same shape."""
        z = conv_act(x, self.gate_proj, self.gate_act)
        x = conv_act(conv_act(x, self.in_proj), self.conv2d, self.act)
        dbc = conv_act(x, self.x_proj)
        if self.routes > 1:
            x = x.unflatten(-1, (_GROUPS, 1, -1)).expand(-1, -1, -1, -1, self.routes, -1).flatten(-3)
        y = scan_map(x, dbc, *self.scan_parameters(), self.paths)
        if self.routes > 1:
            y = y.unflatten(-1, (_GROUPS, self.routes, -1)).sum(-2).flatten(-2)
        return self.drop(conv_act(self.out_norm(y) * z, self.out_proj))


class ModulatedGroupMamba(nn.Module):
    """The modulated group Mamba layer: norm, four scanned groups, channel gate, norm, projection; (B, H, W, C).

    Source: figure 2 and section 3.3 of the paper, where the gate is called channel affinity modulation.
    """

    def __init__(self, dim: int, gate_reduction: int | None, all_directions: bool, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.ss2d = GroupSS2D(dim, all_directions, **dd)
        self.gated = gate_reduction is not None
        if gate_reduction is not None:
            self.fc1 = nn.Linear(dim, dim // gate_reduction, **dd)
            self.act = nn.ReLU()
            self.fc2 = nn.Linear(dim // gate_reduction, dim, **dd)
        self.skip_scale = nn.Parameter(torch.ones(1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map."""
        x = self.norm(x)
        scale: Tensor = self.skip_scale
        if self.gated:
            scale = scale * torch.sigmoid(self.fc2(self.act(self.fc1(x.mean((1, 2), keepdim=True)))))  # (B, 1, 1, C)
        # As published: the groups' output is multiplied by their input, not added to it, and the norm, the same as
        # above, leaves of skip_scale no more than its sign and its weight against the norm's eps.
        y = self.ss2d(x) * x * scale
        return self.proj(self.norm(y))


class ConvMlp(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, linear, as in PVTv2; (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map."""
        return self.fc2(conv_act(self.fc1(x), self.dwconv, self.act))


class GroupMambaBlock(nn.Module):
    """``x + mixer(x)``, then ``x + mlp(norm(x))``; (B, H, W, C). The mixer begins with a norm of its own."""

    def __init__(
        self, dim: int, hidden: int, gate_reduction: int | None, all_directions: bool, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.mixer = ModulatedGroupMamba(dim, gate_reduction, all_directions, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.mlp = ConvMlp(dim, hidden, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map."""
        x = x + self.drop_path1(self.mixer(x))
        return x + self.drop_path2(self.mlp(self.norm(x)))


class ClassBlock(nn.Module):
    """A mixer and an MLP on the pooled token, (B, C), as on a map of one token.

    Not in the paper. On one token the scan has no state before it and the convolution only its center, so that
    ``A_log`` and the other taps of ``mixer.ss2d`` have no effect and a gradient of zero.
    """

    def __init__(self, dim: int, hidden: int, gate_reduction: int | None, all_directions: bool, **dd: Any) -> None:
        super().__init__()
        self.mixer = ModulatedGroupMamba(dim, gate_reduction, all_directions, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.mlp = Mlp(dim, hidden, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a pooled token."""
        # As published: the first norm follows its branch, the second precedes it.
        x = x + self.norm1(self.mixer(x[:, None, None])).flatten(1)
        return x + self.mlp(self.norm2(x))


class GroupMambaHead(ClassifierHead):
    """Pooling, class block, norm, and two classifiers, of which the second learns from a teacher."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        gate_reduction: int | None,
        all_directions: bool,
        num_classes: int,
        *,
        pool_type: str,
        drop_rate: float,
        distilled: bool,
        **dd: Any,
    ) -> None:
        super().__init__(dim, num_classes, pool_type=pool_type, drop_rate=drop_rate, input_fmt="NHWC", **dd)
        self._check_pooling()
        self.distilled_training = False
        self.block: nn.Module = ClassBlock(dim, hidden, gate_reduction, all_directions, **dd)
        self.norm: nn.Module = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.fc_dist = self._classifier(num_classes, **dd) if distilled else None

    def _check_pooling(self) -> None:
        if self.global_pool.feat_mult() != 1:
            raise ValueError(f"global_pool must keep the channels, got {self.global_pool.pool_type!r}")

    def _classifier(self, num_classes: int, **dd: Any) -> nn.Module:
        return nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def reset(self, num_classes: int, pool_type: str | None = None, **options: Any) -> None:
        """Replace the classifiers, and the pooling if ``pool_type`` is given."""
        super().reset(num_classes, pool_type, **options)
        self._check_pooling()
        if self.fc_dist is not None:
            self.fc_dist = self._classifier(num_classes).train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Classify a map, (B, H, W, C); without pooling, which goes without classifiers, return it."""
        x = self.global_pool(x)
        if self.global_pool.is_identity():
            return x
        x = self.drop(self.norm(self.block(x)))
        if pre_logits:
            return x
        y = self.fc(x)
        if self.fc_dist is None:
            return y
        y_dist = self.fc_dist(x)
        if self.distilled_training and self.training:
            return y, y_dist
        return (y + y_dist) / 2


class GroupMamba(Backbone):
    """GroupMamba backbone and classifier, with timm's interface. Images of any height and width.

    The maps of all stages but the last come out normalized, as the next stage reads them. The last norm belongs to the
    head, where it follows the pooling.

    Options that all families have are documented on :class:`vision_ssm.models.backbone.Backbone`.

    Args:
        dims: Channels of each stage, multiples of 4 from 16.
        global_pool: A pooling type that keeps the number of channels; ``""`` for none.
        mlp_ratios: Hidden channels of each stage's MLPs per channel; the class block takes the last.
        gate_reduction: Channels per hidden unit of the channel gates: 16 as published. Narrow models need less: a gate
            of two or three ReLU units often starts with all of them at zero, and then never learns.
        stem_dim: Channels inside the stem.
        stem_stride: Stride of the stem: 4 as published, 2 or 1 for small images.
        channel_affinity: Whether the mixers have the channel gate; without it, a row of the paper's table 4.
        all_directions: Scan every group along all four routes, not one: four times the scan. The paper's table 4 begins
            with all four directions on all channels; whether in groups, we do not know.
        distilled: Whether there is a second classifier, for distillation; see :meth:`set_distilled_training`.
        feature_norm: Normalize the last stage's map too in ``forward_intermediates`` and ``features_only``, with the
            head's norm, as published detection and segmentation networks on this backbone do.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 348, 448),
        depths: Sequence[int] = (3, 4, 9, 3),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        gate_reduction: int = 16,
        stem_dim: int = 32,
        stem_stride: int = 4,
        channel_affinity: bool = True,
        all_directions: bool = False,
        distilled: bool = True,
        feature_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        flags = dict(
            channel_affinity=channel_affinity,
            all_directions=all_directions,
            distilled=distilled,
            feature_norm=feature_norm,
        )
        check_options(dims, depths, in_chans, drop_path_rate, **flags)
        if any(dim % _GROUPS or dim < 16 for dim in dims):
            raise ValueError(f"dims must be multiples of {_GROUPS} and at least 16, got {tuple(dims)}")
        if len(mlp_ratios) != len(dims) or any(int(dim * r) < 1 for dim, r in zip(dims, mlp_ratios, strict=True)):
            raise ValueError(f"mlp_ratios must hold one positive number per stage, got {tuple(mlp_ratios)}")
        hiddens = [int(dim * ratio) for dim, ratio in zip(dims, mlp_ratios, strict=True)]
        if not 1 <= gate_reduction <= min(dims):
            raise ValueError(
                f"gate_reduction must be between 1 and {min(dims)}, the least of dims, got {gate_reduction}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        mixer = gate_reduction if channel_affinity else None, all_directions
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        last = len(dims) - 1
        stages = [
            Stage(
                [GroupMambaBlock(dim, hiddens[i], *mixer, rate, **dd) for rate in rates[i]],
                Downsample(dims[i - 1], dim, **dd) if i else None,
                nn.LayerNorm(dim, eps=_EPS, **dd) if i < last else None,
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            Stem(in_chans, stem_dim, dims[0], stem_stride, **dd),
            stages,
            dims,
            stem_stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            norm=nn.Identity(),
            output_stride=output_stride,
            **dd,
        )
        self.feature_norm = feature_norm
        self.head = GroupMambaHead(
            dims[-1],
            hiddens[-1],
            *mixer,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            distilled=distilled,
            **dd,
        )
        named_apply(init_weights, self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns for layer-wise learning rates; class block and norm come before the classifiers."""
        matcher = super().group_matcher(coarse)
        if not coarse:
            matcher["blocks"].append((r"^head\.(?:block|norm)", (99999,)))
        return matcher

    def set_distilled_training(self, enable: bool = True) -> None:
        """Choose what training returns: both classifiers' logits as a tuple, or as in evaluation their mean."""
        self.head.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the final linear layers: a tuple of two, or one without the second classifier."""
        return self.head.fc if self.head.fc_dist is None else (self.head.fc, self.head.fc_dist)

    def normalize_map(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """See :class:`Backbone`."""
        return self.head.norm(x) if self.feature_norm and stage == len(self.feature_info) - 1 else x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """See :class:`Backbone`."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        shortened = len(self.stages) < len(self.feature_info)
        if prune_head or shortened:
            self.head.block = nn.Identity()
            if shortened or not self.feature_norm:
                self.head.norm = nn.Identity()
        return take


def init_weights(module: nn.Module, name: str) -> None:
    """Initialize as in the published code."""
    if isinstance(module, nn.Linear) or name.endswith(("in_proj", "gate_proj", "out_proj")):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d) and not name.endswith("x_proj"):  # which keeps torch's default
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, SS2D):
        module.reset_scan_parameters()
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


_cfg = partial(
    make_cfg,
    classifier=("head.fc", "head.fc_dist"),
    license="unclear: MIT in the metadata, non-commercial in the model cards",
    paper_ids="arXiv:2407.13772",
    paper_name="GroupMamba: Efficient Group-Based Visual State Space Model",
    origin_url="https://github.com/Amshaker/GroupMamba",
)

_HUB = "https://huggingface.co/Abdelrahman-shaker/GroupMamba-"

default_cfgs = generate_default_cfgs(
    {
        "group_mamba_tiny.dist_in1k": _cfg(_HUB + "Tiny/resolve/main/groupmamba_tiny_ema.pth", "83.3"),
        "group_mamba_small.dist_in1k": _cfg(_HUB + "Small/resolve/main/groupmamba_small_ema.pth", "83.9"),
        "group_mamba_base.dist_in1k": _cfg(_HUB + "Base/resolve/main/groupmamba_base_ema.pth", "84.5"),
        "group_mamba_tiny_wide.untrained": _cfg(classifier="head.fc", license="apache-2.0"),
        "group_mamba_atto.untrained": _cfg(**ATTO),
    }
)


def _create_group_mamba(variant: str, pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    return build_from_official(GroupMamba, variant, pretrained, convert_group_mamba, **kwargs)


@register_model
def group_mamba_tiny(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-T: 23.4 M parameters, of which 0.4 M are the second classifier."""
    args = dict(depths=(3, 4, 9, 3), dims=(64, 128, 348, 448), stem_dim=32)
    return _create_group_mamba("group_mamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def group_mamba_small(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-S: 34.8 M parameters, of which 0.5 M are the second classifier."""
    args = dict(depths=(3, 4, 16, 3), dims=(64, 128, 348, 512), stem_dim=64)
    return _create_group_mamba("group_mamba_small", pretrained, **dict(args, **kwargs))


@register_model
def group_mamba_base(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-B: 57.2 M parameters, of which 0.5 M are the second classifier."""
    args = dict(depths=(3, 6, 21, 3), dims=(96, 192, 424, 512), stem_dim=64)
    return _create_group_mamba("group_mamba_base", pretrained, **dict(args, **kwargs))


@register_model
def group_mamba_tiny_wide(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-T*, undistilled and as large as VMamba-T (the paper's table 4); widths ours: 30.2 M parameters."""
    args = dict(depths=(3, 4, 9, 3), dims=(72, 144, 404, 512), stem_dim=32, distilled=False)
    return _create_group_mamba("group_mamba_tiny_wide", pretrained, **dict(args, **kwargs))


@register_model
def group_mamba_atto(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """Ours, for images of about 32x32 pixels (stem of stride 2): less than 1 M parameters."""
    args = dict(
        depths=(1, 2, 3, 1),
        dims=(32, 48, 80, 112),
        mlp_ratios=(4.0, 4.0, 4.0, 4.0),
        gate_reduction=4,
        stem_dim=16,
        stem_stride=2,
    )
    return _create_group_mamba("group_mamba_atto", pretrained, **dict(args, **kwargs))

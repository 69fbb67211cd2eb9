"""SparX-Mamba: sparse connections across the layers of every stage, over VMamba's four-way scan.

Paper: "SparX: A Sparse Cross-Layer Connection Mechanism for Hierarchical Vision Mamba and Transformer Networks",
arXiv 2409.09649 (AAAI 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn

from vision_ssm.checkpoints import build_from_official
from vision_ssm.checkpoints.sparx import convert_sparx
from vision_ssm.layers import DMCA, SS2D, Connections, GroupNorm1, ResidualConv, sparx_connections
from vision_ssm.layers.patches import channels_last
from vision_ssm.models.backbone import ATTO, Backbone, Stage, check_options, conv2d, make_cfg, stem_strides
from vision_ssm.scan import CROSS_SCAN, ScanPath

__all__ = ["SparXMamba"]

# First value of a learnable attention scale: 1 / sqrt(positions) of an 800x1333 image at stride 32.
_ATTENTION_SCALE = (800 * 1333 / 32**2) ** -0.5


class Stem(nn.Module):
    """Two 3x3 convolutions, or three, with batch norm and GELU in between: (B, in_chans, H, W) to (B, H', W', dim)."""

    def __init__(self, in_chans: int, dim: int, stride: int, convs: int, **dd: Any) -> None:
        super().__init__()
        first, last = stem_strides(stride)
        if convs not in (2, 3):
            raise ValueError(f"stem_convs must be 2 or 3, got {convs}")
        if dim < 2:
            raise ValueError(f"dims[0] must be at least 2, got {dim}")
        self.conv1 = conv2d(in_chans, dim // 2, stride=first, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.middle = nn.Sequential()
        if convs == 3:
            self.middle = nn.Sequential(
                conv2d(dim // 2, dim // 2, bias=False, **dd), nn.BatchNorm2d(dim // 2, **dd), nn.GELU()
            )
        self.conv2 = conv2d(dim // 2, dim, stride=last, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image."""
        x = self.conv1(channels_last(x))
        x = self.middle(self.act(self.norm1(x)))
        return self.norm2(self.conv2(x)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and batch norm: (B, H, W, in_dim) to (B, ceil(H/2), ceil(W/2), dim)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = conv2d(in_dim, dim, stride=2, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Halve a map."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class ConvMlp(nn.Module):
    """Linear, residual depthwise convolution, GELU, linear."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = ResidualConv(hidden, nn.GELU(), **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, dim)."""
        return self.fc2(self.conv(self.fc1(x)))


class LayerScale(nn.Module):
    """Scale and shift per channel."""

    def __init__(self, dim: int, value: float, **dd: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), float(value), **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis."""
        return torch.addcmul(self.bias, x, self.weight)


class SparXBlock(nn.Module):
    """Position convolution, scan and MLP, each residual; in a ganglion layer an aggregator goes before the scan.

    Args:
        dim: Channels; in a ganglion layer divisible by 4.
        sources: Number of earlier maps that the layer reads; 0 for a normal layer.
        reduction: See :class:`vision_ssm.layers.DMCA`.
        attention_scale: See :class:`vision_ssm.layers.DMCA`.
        d_state: States per channel.
        ssm_ratio: Inner channels of the scan per channel.
        mlp_ratio: Hidden channels of the MLP per channel.
        layer_scale: First value of the scales on the identity paths; ``None`` for no scales.
        drop_path: Stochastic depth rate of the scan and of the MLP.
        paths: Routes of the scan.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        sources: int = 0,
        reduction: int = 1,
        attention_scale: float | None = None,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        paths: Sequence[ScanPath] = CROSS_SCAN,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must give {dim} channels at least one hidden channel, got {mlp_ratio}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def identity_path() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

        def branch_path() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.pos_embed = ResidualConv(dim, **dd)
        self.norm1 = GroupNorm1(dim, **dd)
        self.dmca = None
        if sources:
            inner = int(dim * ssm_ratio)
            self.dmca = DMCA(dim, inner, sources, reduction=reduction, scale=attention_scale, **dd)
        self.ss2d = SS2D(
            dim,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            d_conv=5,
            conv_bias=True,
            bias=True,
            project_in=not sources,
            norm_layer=GroupNorm1,
            paths=paths,
            **dd,
        )
        self.layer_scale1 = identity_path()
        self.drop_path1 = branch_path()
        self.norm2 = GroupNorm1(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.layer_scale2 = identity_path()
        self.drop_path2 = branch_path()

    def forward(self, x: Tensor, shortcut: list[Tensor] | tuple[Tensor, ...] = ()) -> Tensor:
        """Transform a map, (B, H, W, C); ``shortcut`` holds the earlier maps that a ganglion layer reads."""
        x = self.pos_embed(x)
        y = self.norm1(x)
        if self.dmca is not None:
            y = self.dmca(y, shortcut)
        # The published model scales and shifts the identity, not the branch.
        x = self.layer_scale1(x) + self.drop_path1(self.ss2d(y))
        return self.layer_scale2(x) + self.drop_path2(self.mlp(self.norm2(x)))


class ConnectedStage(Stage):
    """Downsampling, and blocks that read earlier maps of the stage; maps are (B, H, W, C).

    Args:
        blocks: The blocks; a ganglion layer takes a list of maps as its second argument.
        connections: Which block reads which maps.
        downsample: First module of the stage; ``None`` in the first stage.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], connections: Connections, downsample: nn.Module | None = None
    ) -> None:
        super().__init__(blocks, downsample)
        self.connections = connections

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map, (B, H, W, in_dim)."""
        blocks: list[Callable[..., Tensor]] = list(self.blocks)
        if self.grad_checkpointing:
            blocks = [partial(checkpoint, block) for block in blocks]
        return self.norm(self.connections.run(blocks, self.downsample(x)))


class SparXMamba(Backbone):
    """SparX-Mamba backbone and classifier, with timm's interface. Images of any height and width.

    An option that takes one value or a sequence can have one value per stage.

    Options that all families have are documented on :class:`vision_ssm.models.backbone.Backbone`.

    Args:
        dims: Channels of each stage; divisible by 4 where there are ganglion layers.
        stem_stride: Stride of the stem: 4 as published, 2 or 1 for small images.
        stem_convs: Convolutions of the stem, 2 or 3.
        steps: Distance of the ganglion layers in each stage, S in the paper.
        starts: First block of each stage that may be a ganglion layer; ``None`` for none in that stage.
        windows: Number of earlier ganglion layers that one reads, M in the paper; ``None`` for all, as in the paper's
            ablation DGC. It binds where a stage has more than M + 1 ganglion layers.
        cross_stage: Let later ganglion layers read the stage's input too, as in the paper's ablation DSN. No published
            model does.
        dense: Let ganglion layers read all earlier normal layers of their stage, as in ``dgc_mamba_tiny``.
        reductions: Factor by which the aggregator's queries and keys are smaller than the map.
        learnable_scale: Give every aggregator a learnable attention scale, as the published detection backbone has.
        d_state: States per channel.
        ssm_ratio: Inner channels of the scan per channel.
        mlp_ratio: Hidden channels of the MLP per channel.
        layer_scale: First value of the scales on the identity paths; ``None`` for no scales.
        paths: Routes of every scan.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 320, 512),
        depths: Sequence[int] = (2, 2, 7, 2),
        stem_stride: int = 4,
        stem_convs: int = 2,
        steps: int | Sequence[int] = (1, 1, 2, 1),
        starts: int | Sequence[int | None] | None = (None, 1, 0, 0),
        windows: int | Sequence[int | None] | None = (None, None, 3, None),
        cross_stage: bool | Sequence[bool] = False,
        dense: bool = False,
        reductions: int | Sequence[int] = (8, 4, 2, 1),
        learnable_scale: bool = False,
        d_state: int = 1,
        ssm_ratio: float | Sequence[float] = 2.0,
        mlp_ratio: float | Sequence[float] = 4.0,
        layer_scale: float | Sequence[float | None] | None = (None, None, 1.0, 1.0),
        paths: Sequence[ScanPath] = CROSS_SCAN,
        feature_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        flags = dict(dense=dense, learnable_scale=learnable_scale, feature_norm=feature_norm)
        check_options(dims, depths, in_chans, drop_path_rate, **flags)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        reductions, across = (
            per_stage(depths, "reductions", reductions, 1),
            per_stage(depths, "cross_stage", cross_stage),
        )
        if wrong := [value for value in across if not isinstance(value, bool)]:
            raise ValueError(f"cross_stage must be True or False in each stage, got {wrong[0]!r}")
        ratios, scales = per_stage(depths, "mlp_ratio", mlp_ratio), per_stage(depths, "layer_scale", layer_scale)
        inner = per_stage(depths, "ssm_ratio", ssm_ratio)
        connected = stage_connections(depths, steps, starts, windows, across, dense)
        scale = _ATTENTION_SCALE if learnable_scale else None
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                SparXBlock(
                    dim,
                    sources=len(maps),
                    reduction=reductions[i],
                    attention_scale=scale,
                    d_state=d_state,
                    ssm_ratio=inner[i],
                    mlp_ratio=ratios[i],
                    layer_scale=scales[i],
                    drop_path=rate,
                    paths=paths,
                    **dd,
                )
                for maps, rate in zip(connected[i].reads, rates[i], strict=True)
            ]
            stages.append(ConnectedStage(blocks, connected[i], Downsample(dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            Stem(in_chans, dims[0], stem_stride, stem_convs, **dd),
            stages,
            dims,
            stem_stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            norm=GroupNorm1(dims[-1], **dd),
            feature_norms=[nn.LayerNorm(dim, eps=1e-6, **dd) for dim in dims] if feature_norm else None,
            drop_rate=drop_rate,
            output_stride=output_stride,
            **dd,
        )
        named_apply(_init_weights, self)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters to exclude from weight decay."""
        scales = {name for name, _ in self.named_parameters() if name.endswith("attention.scale")}
        return super().no_weight_decay() | scales

    def published_no_weight_decay(self) -> set[str]:
        """Return the names of all parameters that the published training excludes from weight decay.

        That is what has one dimension in the published layout, or a name that ends in ``.bias``. The published layer
        scales have four dimensions.
        """
        scales = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, LayerScale)}
        return super().published_no_weight_decay() - scales


def per_stage(
    depths: Sequence[int], name: str, value: Any, least: int | None = None, optional: bool = False
) -> list[Any]:
    """Return an option's value in every stage; a single value applies to all.

    Args:
        depths: Blocks of each stage.
        name: The option, for messages.
        value: Its value.
        least: For an option of whole numbers, the least.
        optional: Whether a stage may have ``None`` too.

    Raises:
        ValueError: If there is not one value per stage, or one is out of range.
    """
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * len(depths)
    if len(values) != len(depths):
        raise ValueError(f"{name} must have one entry for each of the {len(depths)} stages, got {tuple(values)}")
    for stage, each in enumerate(values):
        if least is None or (optional and each is None):
            continue
        if not isinstance(each, Integral) or each < least:
            none = " or None" if optional else ""
            raise ValueError(f"{name} must be whole numbers from {least}{none}, got {each!r} in stage {stage}")
    return values


def stage_connections(
    depths: Sequence[int],
    steps: Any,
    starts: Any,
    windows: Any,
    cross_stage: Sequence[bool],
    dense: bool = False,
) -> list[Connections]:
    """Return the connections of every stage; see :class:`SparXMamba` for the options.

    Raises:
        ValueError: If an option is out of range.
    """
    steps = per_stage(depths, "steps", steps, 1)
    starts = per_stage(depths, "starts", starts, 0, optional=True)
    windows = per_stage(depths, "windows", windows, 1, optional=True)
    if starts[0] is not None and starts[0] < depths[0]:
        raise ValueError(f"starts must be None for stage 0, which has no earlier map, got {starts[0]}")
    rules = zip(depths, steps, starts, windows, cross_stage, strict=True)
    return [
        sparx_connections(*rule, cross_stage=across, dense=dense, stage_input=i > 0)
        for i, (*rule, across) in enumerate(rules)
    ]


def _init_weights(module: nn.Module, name: str) -> None:
    """Initialize as in the published code: linear layers and convolutions truncated normal 0.02, the scan as Mamba."""
    # x_proj keeps torch's default: in the published model it is not a Linear, so their initialization skips it.
    if isinstance(module, nn.Linear | nn.Conv2d) and not name.endswith("x_proj"):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SS2D):
        module.reset_scan_parameters()


_cfg = partial(
    make_cfg,
    license="unknown",
    paper_ids="arXiv:2409.09649",
    paper_name="SparX: A Sparse Cross-Layer Connection Mechanism for Hierarchical Vision Mamba and "
    "Transformer Networks",
    origin_url="https://github.com/LMMMEng/SparX",
)

_RELEASE = "https://github.com/LMMMEng/SparX/releases/download/v1/"

default_cfgs = generate_default_cfgs(
    {
        "sparx_mamba_tiny.in1k": _cfg(_RELEASE + "sparx_mamba_tiny_in1k.pth", "83.5", crop_pct=0.9),
        "sparx_mamba_small.in1k": _cfg(_RELEASE + "sparx_mamba_small_in1k.pth", "84.2", crop_pct=0.95),
        "sparx_mamba_base.in1k": _cfg(_RELEASE + "sparx_mamba_base_in1k.pth", "84.5", crop_pct=0.95),
        "dgc_mamba_tiny.untrained": _cfg(crop_pct=0.9, license="apache-2.0"),
        "dsn_mamba_tiny.untrained": _cfg(crop_pct=0.9, license="apache-2.0"),
        "sparx_mamba_atto.untrained": _cfg(**ATTO),
    }
)


def _create_sparx(variant: str, pretrained: bool = False, **kwargs: Any) -> SparXMamba:
    return build_from_official(SparXMamba, variant, pretrained, convert_sparx, **kwargs)


@register_model
def sparx_mamba_tiny(pretrained: bool = False, **kwargs: Any) -> SparXMamba:
    """SparX-Mamba-T: 27.1 M parameters."""
    return _create_sparx("sparx_mamba_tiny", pretrained, **kwargs)


@register_model
def sparx_mamba_small(pretrained: bool = False, **kwargs: Any) -> SparXMamba:
    """SparX-Mamba-S: 47.4 M parameters."""
    args = dict(depths=(2, 2, 17, 2), dims=(96, 192, 328, 544), stem_convs=3, steps=(1, 1, 3, 1))
    return _create_sparx("sparx_mamba_small", pretrained, **dict(args, **kwargs))


@register_model
def sparx_mamba_base(pretrained: bool = False, **kwargs: Any) -> SparXMamba:
    """SparX-Mamba-B: 83.5 M parameters."""
    args = dict(
        depths=(2, 2, 21, 3), dims=(120, 240, 396, 636), stem_convs=3, steps=(1, 1, 3, 2), starts=(None, 1, 0, 2)
    )
    return _create_sparx("sparx_mamba_base", pretrained, **dict(args, **kwargs))


@register_model
def dgc_mamba_tiny(pretrained: bool = False, **kwargs: Any) -> SparXMamba:
    """DGC-Mamba-T, an ablation (dense ganglion connections): 27.7 M parameters.

    The authors' DGC is SparX without the window between ganglion layers. In the published SparX-Mamba-T it never
    binds: the model reads the same maps without it. So this is a reading with denser inner connections: the ganglion
    layers of SparX-Mamba-T, each of which reads all earlier layers of its stage, the normal ones too.
    """
    args = dict(windows=None, dense=True)
    return _create_sparx("dgc_mamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def dsn_mamba_tiny(pretrained: bool = False, **kwargs: Any) -> SparXMamba:
    """DSN-Mamba-T, an ablation ("exactly DenseNet's strategy"): 32.5 M parameters.

    From the second stage on, every layer reads all earlier outputs of its stage, and the stage's input.
    """
    args = dict(steps=1, starts=(None, 0, 0, 0), windows=None, cross_stage=True)
    return _create_sparx("dsn_mamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def sparx_mamba_atto(pretrained: bool = False, **kwargs: Any) -> SparXMamba:
    """Ours, for images of about 32x32 pixels (stem of stride 2): less than 1 M parameters."""
    args = dict(depths=(1, 2, 4, 1), dims=(24, 48, 80, 96), stem_stride=2)
    return _create_sparx("sparx_mamba_atto", pretrained, **dict(args, **kwargs))

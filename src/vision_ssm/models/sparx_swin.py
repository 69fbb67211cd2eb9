"""SparX-Swin: sparse connections across the layers of every stage, over Swin's shifted-window attention.

Papers: "SparX: A Sparse Cross-Layer Connection Mechanism for Hierarchical Vision Mamba and Transformer Networks",
arXiv 2409.09649 (AAAI 2025); "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
arXiv 2103.14030 (ICCV 2021). The SparX paper reports a SparX-Swin, but its code and sizes are not public: widths,
ganglion layers and windows of the variants here are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, named_apply, register_model
from torch import Tensor, nn

from vision_ssm.checkpoints import build_from_official
from vision_ssm.layers import DMCA
from vision_ssm.layers.patches import PatchEmbed, PatchMerging, pad_map, symbolic
from vision_ssm.models.backbone import ATTO, Backbone, check_options, make_cfg
from vision_ssm.models.sparx import ConnectedStage, per_stage, stage_connections

__all__ = ["SparXSwin"]

# Added where a window holds tokens from opposite borders of the map; Swin's value.
_APART = -100.0


def _divide(length: int, size: int, shifted: bool) -> tuple[int, int, int]:
    """Return side, number and shift of the windows along an axis.

    A window is no longer than the map, and is not shifted where it covers it.
    """
    side = min(length, size)
    return side, (length + side - 1) // side, size // 2 if shifted and length > side else 0


def _pad_and_roll(x: Tensor, size: int, shifted: bool) -> Tensor:
    """Pad a map, (B, H, W, C), to whole windows, (B, H', W', C), and roll it by their shift; a leaf of an FX graph."""
    _, height, width, _ = x.shape
    if symbolic(height, width):
        return pad_map(x, height + 1, width + 1)  # see _attend_by_index
    h, rows, down = _divide(height, size, shifted)
    w, columns, right = _divide(width, size, shifted)
    x = pad_map(x, rows * h, columns * w)
    return x.roll((-down, -right), (1, 2)) if down or right else x


torch.fx.wrap("_pad_and_roll")


def _position_bias(table: Tensor, size: int, h: int, w: int) -> Tensor:
    """Return the bias between the tokens of an h x w window, (heads, h * w, h * w)."""
    y, x = torch.arange(h, device=table.device), torch.arange(w, device=table.device)
    # A smaller window takes the middle of the table, where the small distances are.
    y, x = y[:, None] - y + size - 1, x[:, None] - x + size - 1
    index = y[:, None, :, None] * (2 * size - 1) + x[:, None, :]  # (h, w, h, w)
    return table[index.flatten()].view(h * w, h * w, -1).permute(2, 0, 1)


def _regions(place: Tensor, length: int, side: int, shift: int | torch.SymInt) -> Tensor:
    """Return which places along a rolled axis were neighbors before: 0 and 1 were, 2 came from the other border."""
    return (place >= length - side).int() + (place >= length - shift).int()


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias).softmax(-1) @ v


def _attend(qkv: Tensor, table: Tensor, height: int, width: int, size: int, shifted: bool) -> Tensor:
    """Attend within windows, and undo roll and padding; one leaf of an FX graph.

    Args:
        qkv: Queries, keys and values of a padded and rolled map, (B, H', W', 3 * heads * D).
        table: Bias of every distance and head, ((2 * size - 1) ** 2, heads).
        height: H, before the padding.
        width: W, before the padding.
        size: Side of a window.
        shifted: Whether windows are shifted.

    Returns:
        A map, (B, H, W, heads * D).
    """
    if symbolic(height, width):
        return _attend_by_index(qkv, table, height, width, size, shifted)
    h, rows, down = _divide(height, size, shifted)
    w, columns, right = _divide(width, size, shifted)
    batch, padded_height, padded_width, _ = qkv.shape
    windows, heads, depth = rows * columns, table.shape[1], qkv.shape[3] // (3 * table.shape[1])
    bias = _position_bias(table, size, h, w).to(qkv.dtype)
    groups = (batch * windows, heads)
    if down or right:
        y = _regions(torch.arange(padded_height, device=qkv.device), padded_height, h, down)
        x = _regions(torch.arange(padded_width, device=qkv.device), padded_width, w, right)
        region = (3 * y[:, None] + x).view(rows, h, columns, w).transpose(1, 2).reshape(windows, 1, h * w)
        # The bias is another one in every window; so windows and heads make one axis, and images the other.
        bias = torch.where(region[..., None] == region[..., None, :], bias, bias + _APART).flatten(0, 1)
        groups = (batch, windows * heads)
    parts = qkv.view(batch, rows, h, columns, w, 3, heads, depth).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = parts.reshape(3, *groups, h * w, depth).unbind()
    y = _attention(q, k, v, bias).view(batch, rows, columns, heads, h, w, depth)
    y = y.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, padded_height, padded_width, heads * depth)
    if down or right:
        y = y.roll((down, right), (1, 2))
    return y[:, :height, :width]


def _wrap(place: Tensor, length: int) -> Tensor:
    """Return places modulo the length of their axis, which ONNX's exporter has for no symbolic length."""
    place = torch.where(place < 0, place + length, place)
    return torch.where(place >= length, place - length, place)


def _attend_by_index(qkv: Tensor, table: Tensor, height: int, width: int, size: int, shifted: bool) -> Tensor:
    """As :func:`_attend`, for symbolic sizes; ``qkv`` is (B, H + 1, W + 1, 3 * heads * D), padded by one token.

    Axes of windows would tie the graph to one window along an axis, or to several; so the tokens of the windows are
    picked one by one. A window longer than the map stays whole, and none of its tokens outside the map is read.
    """
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    heads, area = table.shape[1], size * size
    # shifted along an axis only if it has several windows
    down, right = size // 2 * (1 - 1 // rows), size // 2 * (1 - 1 // columns)
    if not shifted:
        down = right = 0
    group = torch.arange(rows * columns * heads, device=qkv.device)[:, None]
    token = torch.arange(area, device=qkv.device)
    window, head = group // heads, group % heads
    row = window // columns
    y, x = row * size + token // size, (window - row * columns) * size + token % size  # (groups, area)
    bias = _position_bias(table, size, size, size).to(qkv.dtype)[head[:, 0]]  # (groups, area, area)
    if shifted:
        region = 3 * _regions(y, rows * size, size, down) + _regions(x, columns * size, size, right)
        bias = torch.where(region[:, :, None] == region[:, None], bias, bias + _APART)
        y, x = _wrap(y + down, rows * size), _wrap(x + right, columns * size)
    outside = (y >= height + (rows - 1) * size) | (x >= width + (columns - 1) * size)
    bias = bias.masked_fill(outside[:, None], -torch.inf)
    y, x = y.clamp(max=height), x.clamp(max=width)
    parts = qkv.unflatten(-1, (3, heads, -1))
    q, k, v = (parts[:, y, x, i, head] for i in range(3))  # (B, groups, area, D)
    out = _attention(q, k, v, bias)
    y = _wrap(torch.arange(height, device=qkv.device)[:, None, None] - down, rows * size)
    x = _wrap(torch.arange(width, device=qkv.device)[:, None] - right, columns * size)
    group = (y // size * columns + x // size) * heads + torch.arange(heads, device=qkv.device)  # (H, W, heads)
    return out[:, group, y % size * size + x % size].flatten(3)


torch.fx.wrap("_attend")


class WindowAttention(nn.Module):
    """Multi-head attention within windows of a map, as in Swin; the names are those of timm's ``WindowAttention``.

    timm's module fixes the size of the map when it is built. Here padding, shift and bias follow each map: it is padded
    with zeros to whole windows, a window is no longer than the map, and not shifted where it covers it.

    Args:
        dim: Channels.
        num_heads: Heads; they divide ``dim``.
        window_size: Side of a window in tokens.
        shifted: Whether to shift the windows by half a window.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        shifted: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the {dim} channels, got {num_heads}")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.window_size = window_size
        self.shifted = shifted
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, (B, H, W, C)."""
        height, width = x.shape[1], x.shape[2]
        qkv = self.qkv(_pad_and_roll(x, self.window_size, self.shifted))
        table = self.relative_position_bias_table
        return self.proj(_attend(qkv, table, height, width, self.window_size, self.shifted))


class SparXSwinBlock(nn.Module):
    """Swin's block: attention and MLP, each residual; in a ganglion layer an aggregator goes before the attention.

    Args:
        dim: Channels; in a ganglion layer divisible by 4.
        num_heads: Heads of the attention.
        window_size: Side of a window in tokens.
        shifted: Whether to shift the windows.
        sources: Number of earlier maps that the layer reads; 0 for a normal layer.
        reduction: See :class:`vision_ssm.layers.DMCA`.
        mlp_ratio: Hidden channels of the MLP per channel.
        drop_path: Stochastic depth rate of the attention and of the MLP.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        shifted: bool = False,
        sources: int = 0,
        reduction: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must give {dim} channels at least one hidden channel, got {mlp_ratio}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.dmca = DMCA(dim, dim, sources, reduction=reduction, **dd) if sources else None
        self.attn = WindowAttention(dim, num_heads, window_size, shifted, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, shortcut: list[Tensor] | tuple[Tensor, ...] = ()) -> Tensor:
        """Transform a map, (B, H, W, C); ``shortcut`` holds the earlier maps that a ganglion layer reads."""
        y = self.norm1(x)
        if self.dmca is not None:
            y = self.dmca(y, shortcut)
        x = x + self.drop_path1(self.attn(y))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SparXSwin(Backbone):
    """SparX-Swin backbone and classifier, with timm's interface. Images of any height and width.

    Without ganglion layers (``starts=None``) and with Swin's widths it is Swin. An option that takes one value or a
    sequence can have one value per stage.

    Options that all families have are documented on :class:`vision_ssm.models.backbone.Backbone`.

    Args:
        dims: Channels of each stage; divisible by 4 where there are ganglion layers.
        depths: Blocks of each stage; every other one shifts its windows.
        num_heads: Heads of each stage.
        patch_size: Side of a patch, which is the stride of the stem.
        window_size: Side of a window in tokens; a smaller map is one window.
        steps: Distance of the ganglion layers in each stage, S in the paper.
        starts: First block of each stage that may be a ganglion layer; ``None`` for none in that stage.
        windows: Number of earlier ganglion layers that one reads, M in the paper; ``None`` for all.
        reductions: Factor by which the aggregator's queries and keys are smaller than the map.
        mlp_ratio: Hidden channels of the MLP per channel.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 320, 640),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: int | Sequence[int] = (3, 6, 10, 20),
        patch_size: int = 4,
        window_size: int | Sequence[int] = 7,
        steps: int | Sequence[int] = (1, 1, 2, 1),
        starts: int | Sequence[int | None] | None = (None, 1, 0, 0),
        windows: int | Sequence[int | None] | None = (None, None, 3, None),
        reductions: int | Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float | Sequence[float] = 4.0,
        feature_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(dims, depths, in_chans, drop_path_rate, feature_norm=feature_norm)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        heads, sizes = per_stage(depths, "num_heads", num_heads), per_stage(depths, "window_size", window_size, 1)
        ratios, reductions = per_stage(depths, "mlp_ratio", mlp_ratio), per_stage(depths, "reductions", reductions, 1)
        connected = stage_connections(depths, steps, starts, windows, [False] * len(dims))
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                SparXSwinBlock(
                    dim,
                    heads[i],
                    window_size=sizes[i],
                    shifted=j % 2 == 1,
                    sources=len(maps),
                    reduction=reductions[i],
                    mlp_ratio=ratios[i],
                    drop_path=rates[i][j],
                    **dd,
                )
                for j, maps in enumerate(connected[i].reads)
            ]
            stages.append(ConnectedStage(blocks, connected[i], PatchMerging(dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            PatchEmbed(in_chans, dims[0], patch_size, **dd),
            stages,
            dims,
            patch_size,
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

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters to exclude from weight decay: the position biases, as in Swin."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def published_no_weight_decay(self) -> set[str]:
        """Return the names of all parameters that the published training of Swin excludes from weight decay."""
        return super().published_no_weight_decay() | self.no_weight_decay()


def _init_weights(module: nn.Module, name: str) -> None:
    """Initialize as published: Swin's linear layers, and all of SparX's aggregator, truncated normal 0.02."""
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and ".dmca." in name):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_cfg = partial(
    make_cfg,
    license="apache-2.0",
    paper_ids="arXiv:2409.09649",
    paper_name="SparX: A Sparse Cross-Layer Connection Mechanism for Hierarchical Vision Mamba and "
    "Transformer Networks",
    origin_url="https://github.com/LMMMEng/SparX",
    crop_pct=0.9,
    first_conv="stem.proj",
)

# No weights were published; ours have the license of this package.
default_cfgs = generate_default_cfgs(
    {
        "sparx_swin_tiny.untrained": _cfg(),
        "sparx_swin_small.untrained": _cfg(crop_pct=0.95),
        "sparx_swin_base.untrained": _cfg(crop_pct=0.95),
        "sparx_swin_atto.untrained": _cfg(**ATTO),
    }
)


def _create_sparx_swin(variant: str, pretrained: bool = False, **kwargs: Any) -> SparXSwin:
    # There are no official weights whose names could differ from ours.
    return build_from_official(SparXSwin, variant, pretrained, dict, **kwargs)


@register_model
def sparx_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SparXSwin:
    """SparX-Swin-T, sizes ours: 28.2 M parameters, where Swin-T has 28.3 M."""
    return _create_sparx_swin("sparx_swin_tiny", pretrained, **kwargs)


@register_model
def sparx_swin_small(pretrained: bool = False, **kwargs: Any) -> SparXSwin:
    """SparX-Swin-S, sizes ours: 48.1 M parameters, where Swin-S has 49.6 M."""
    args = dict(depths=(2, 2, 18, 2), steps=(1, 1, 3, 1))
    return _create_sparx_swin("sparx_swin_small", pretrained, **dict(args, **kwargs))


@register_model
def sparx_swin_base(pretrained: bool = False, **kwargs: Any) -> SparXSwin:
    """SparX-Swin-B, sizes ours: 85.3 M parameters, where Swin-B has 87.8 M."""
    args = dict(depths=(2, 2, 18, 2), dims=(128, 256, 448, 768), num_heads=(4, 8, 14, 24), steps=(1, 1, 3, 1))
    return _create_sparx_swin("sparx_swin_base", pretrained, **dict(args, **kwargs))


@register_model
def sparx_swin_atto(pretrained: bool = False, **kwargs: Any) -> SparXSwin:
    """Ours, for images of about 32x32 pixels (patches of 2x2, windows of 4x4): less than 1 M parameters."""
    args = dict(depths=(2, 2, 4, 1), dims=(32, 64, 80, 96), num_heads=(2, 4, 5, 6), patch_size=2, window_size=4)
    return _create_sparx_swin("sparx_swin_atto", pretrained, **dict(args, **kwargs))

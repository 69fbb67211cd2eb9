"""SparX: sparse connections across the layers of a stage, and the aggregator that reads them (DMCA).

A stage has normal layers and a few ganglion layers. A ganglion layer reads the maps of the normal layers since the
last ganglion layer and of the last few ganglion layers, next to its own input.

Source: SparX, arXiv 2409.09649 (AAAI 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_ssm.layers.conv import conv_act
from vision_ssm.layers.norm import GroupNorm1
from vision_ssm.layers.patches import symbolic


@dataclass(frozen=True)
class Connections:
    """Which earlier maps each layer of a stage reads.

    Map 0 is the stage's input, map i + 1 the output of layer i. A layer that reads any is a ganglion layer.

    Args:
        reads: For every layer the maps it reads next to its own input, in order; none for a normal layer.

    Raises:
        ValueError: If there are no layers, or a layer reads a later map, or one map twice.
    """

    reads: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.reads:
            raise ValueError("reads must have an entry for every layer, got none")
        for layer, maps in enumerate(self.reads):
            if any(not 0 <= i <= layer for i in maps):
                raise ValueError(f"layer {layer} can read the maps 0..{layer}, got {maps}")
            if len(set(maps)) < len(maps):
                raise ValueError(f"layer {layer} must read every map once, got {maps}")

    @property
    def ganglia(self) -> tuple[int, ...]:
        """The ganglion layers."""
        return tuple(layer for layer, maps in enumerate(self.reads) if maps)

    def run(self, blocks: Iterable[Callable[..., Tensor]], x: Tensor) -> Tensor:
        """Run a stage; a map is kept no longer than until the last layer that reads it.

        Args:
            blocks: The layers: a normal one is called with its input, a ganglion layer also with a list of maps.
            x: The stage's input.

        Returns:
            The output of the last layer.
        """
        last = {i: layer for layer, maps in enumerate(self.reads) for i in maps}
        kept: dict[int, Tensor] = {}
        for layer, (block, maps) in enumerate(zip(blocks, self.reads, strict=True)):
            if layer in last:
                kept[layer] = x
            x = block(x, [kept[i] for i in maps]) if maps else block(x)
            kept = {i: y for i, y in kept.items() if last[i] > layer}
        return x


def sparx_connections(
    depth: int,
    step: int = 1,
    start: int | None = 0,
    window: int | None = None,
    *,
    stage_input: bool = True,
    cross_stage: bool = False,
    dense: bool = False,
) -> Connections:
    """Return the connections of a stage by SparX's rule.

    Ganglion layers are the last layer and every ``step``-th before it, from ``start`` on. One reads, in this order,
    the stage's input if it is the stage's first ganglion layer, the normal layers since the last ganglion layer, and
    the last ``window`` ganglion layers, oldest first.

    Args:
        depth: Layers of the stage.
        step: Distance between ganglion layers, S in the paper.
        start: First layer that may be a ganglion layer; ``None`` for no ganglion layer at all.
        window: Number of earlier ganglion layers that one reads, M in the paper; ``None`` for all.
        stage_input: Whether there is a stage input to read; published models have none in their first stage.
        cross_stage: Treat the stage's input as a ganglion layer's map, so that later ganglion layers read it too,
            within the window. No published model does.
        dense: Read all earlier normal layers, not only those since the last ganglion layer.

    Raises:
        ValueError: If a number is out of range, or there are ganglion layers without a stage input.
    """
    for name, value, least in (("depth", depth, 1), ("step", step, 1), ("start", start, 0), ("window", window, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    ganglia = set(() if start is None else range(depth - 1, start - 1, -step))
    if ganglia and not stage_input:
        raise ValueError(f"start must be None, or at least {depth}, in a stage without a stage input, got {start}")
    normal, earlier = ([], [0]) if cross_stage else ([0], [])
    reads: list[tuple[int, ...]] = []
    for layer in range(depth):
        if layer in ganglia:
            reads.append((*normal, *earlier))
            earlier.append(layer + 1)
            normal = [i for i in normal if dense and i > 0]
        else:
            reads.append(())
            normal.append(layer + 1)
        earlier = earlier if window is None else earlier[-window:]
    return Connections(tuple(reads))


def _batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _Projection(nn.Module):
    """Depthwise reduction by ``reduction``, linear layer, batch norm: (B, H, W, C) to (B, H', W', C)."""

    def __init__(self, dim: int, reduction: int, **dd: Any) -> None:
        super().__init__()
        self.reduce: nn.Module = nn.Identity()
        if reduction > 1:
            side = reduction + 1
            conv = nn.Conv2d(dim, dim, side, stride=reduction, padding=side // 2, groups=dim, bias=False, **dd)
            self.reduce = nn.Sequential(conv, nn.BatchNorm2d(dim, **dd), nn.GELU())
        self.proj = nn.Linear(dim, dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Project a map."""
        x = self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return _batch_norm(self.norm, self.proj(x))


class ChannelAttention(nn.Module):
    """Attention of channels to channels, in groups of adjacent channels; products run over positions.

    Args:
        heads: Number of groups.
        scale: First value of a learnable scale of the products; ``None`` for 1 / sqrt(positions).
        device: Device of the parameter.
        dtype: Dtype of the parameter.

    Raises:
        ValueError: If there are no groups.
    """

    def __init__(
        self,
        heads: int,
        scale: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        self.heads = heads
        self.scale = None if scale is None else nn.Parameter(torch.full((1,), float(scale), device=device, dtype=dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the channels of ``v``, (B, H, W, C), by the products of ``q`` and ``k``, both (B, H', W', C)."""
        shape = v.shape
        weights = self.weights(q, k)
        return (self._in_groups(v) @ weights.transpose(-1, -2)).transpose(1, 2).reshape(shape)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Return how much each channel takes of each channel of its group, (B, heads, C / heads, C / heads)."""
        q, k = self._in_groups(q), self._in_groups(k)
        scale = q.shape[2] ** -0.5 if self.scale is None else self.scale
        return ((q * scale).transpose(-1, -2) @ k).softmax(-1)

    def _in_groups(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, H * W, C / heads)


def _reduced_or_whole(reduced: Tensor, whole: Tensor) -> Tensor:
    height, width = whole.shape[1:3]
    if symbolic(height, width):  # only a map of one token is not smaller when reduced
        one_token = torch.arange(height * width, device=whole.device)[-1] == 0
        return torch.where(one_token, reduced[:, :1, :1], whole)
    return reduced if reduced.shape[1:3] == whole.shape[1:3] else whole


torch.fx.wrap("_reduced_or_whole")


class DMCA(nn.Module):
    """Dynamic Multi-layer Channel Aggregator: a map and the maps of earlier layers, to one map.

    Channels of the earlier maps are mixed by attention between channels, whose queries come from the layer's own
    map. Maps are channels-last, (B, H, W, C), of any height and width.

    Args:
        dim: Channels of the layer's own map and of every earlier map; divisible by 4.
        out_dim: Channels of the output; at least 3.
        sources: Number of earlier maps.
        reduction: Factor by which queries and keys are smaller than the map, in height and in width.
        scale: First value of a learnable scale of the attention, which the published detection backbone has;
            ``None`` for 1 / sqrt(positions).
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        sources: int,
        *,
        reduction: int = 1,
        scale: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be divisible by 4, got {dim}")
        if out_dim < 3:
            raise ValueError(f"out_dim must be at least 3, got {out_dim}")
        for name, value in (("sources", sources), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = sources * dim
        self.missing = out_dim % 3
        self.reduced = reduction > 1
        self.norm = GroupNorm1(wide, **dd)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False, **dd)
        self.conv_norm = nn.BatchNorm2d(wide, **dd)
        self.act = nn.GELU()
        self.kv = nn.Linear(wide, 2 * dim, **dd)
        self.kv_act = nn.GELU()
        self.q = _Projection(dim, reduction, **dd)
        self.k = _Projection(dim, reduction, **dd)
        self.v = _Projection(dim, 1, **dd)
        self.attention = ChannelAttention(4, scale, **dd)
        self.join_conv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, **dd)
        self.join_act = nn.GELU()
        self.join_proj = nn.Conv2d(3 * dim, out_dim - self.missing, 1, groups=3, **dd)

    def forward(self, x: Tensor, shortcut: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        """Aggregate a layer's normalized map, (B, H, W, dim), and the earlier maps, to (B, H, W, out_dim)."""
        s = self.norm(torch.cat(shortcut, -1))
        s = self.act(self.conv_norm(self.conv(s.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        k, v = self.kv_act(self.kv(s)).chunk(2, dim=-1)  # GELU also after the projection
        q, k, v = self.q(x), self.k(k), self.v(v)
        # The published code joins the query where it is of the map's size: always without reduction, and on maps of
        # one token.
        first = _reduced_or_whole(q, x) if self.reduced else q
        x = torch.cat([first, self.attention(q, k, v), v], -1)
        x = (
            x.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)
        )  # channel shuffle: all channels i, i + 3, ... together
        x = conv_act(conv_act(x, self.join_conv, self.join_act), self.join_proj)
        if self.missing:
            # Three groups make a multiple of 3; the last one or two channels are means over all channels, or over
            # their first and second half.
            part = -(-x.shape[-1] // self.missing)
            means = [x[..., :part], x[..., -part:]][: self.missing]
            x = torch.cat([x, *(y.mean(-1, keepdim=True) for y in means)], -1)
        return x

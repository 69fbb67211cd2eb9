"""The cost of a model: parameters, and operations in three conventions that must not be mixed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm.layers import ChannelAttention
from vision_ssm.scan.operator import scan_flops, scan_sizes


@dataclass(frozen=True)
class Complexity:
    """Cost of one forward pass.

    Args:
        parameters: Number of parameters.
        macs: Multiply-accumulates of convolutions, linear layers and matrix products (the scan's step-size
            projection is one); nothing else.
        paper_ops: The convention of the papers: those multiply-accumulates, 5 per element of LayerNorm and
            GroupNorm, 2 of BatchNorm, 1 per element pooled, and 9 L D N + L D per scan. The attention of SparX's
            aggregators is not counted: the papers' counter ignores ``scaled_dot_product_attention``.
        flops: ``torch.utils.flop_counter``: 2 per multiply-accumulate, and the scan's own count.
    """

    parameters: int
    macs: int
    paper_ops: int
    flops: int


def complexity(model: nn.Module, input_size: Sequence[int] = (3, 224, 224), batch: int = 1) -> Complexity:
    """Count a forward pass of ``model`` without running it.

    Args:
        model: Any model whose ``forward`` takes images. Of a detector, ``forward_costs`` is counted: all layers, with
            the heads on 1,000 proposals and 100 objects, as mmdet's counter has it.
        input_size: Channels, height and width of an image.
        batch: Number of images.

    Source: the papers' convention is that of VMamba's ``flops()``, which SparX and others report.
    """
    # On the meta device nothing is computed.
    ghost = copy.deepcopy(model).to("meta", torch.float32).eval()
    ghost.forward = getattr(ghost, "forward_costs", ghost.forward)
    images = torch.empty(batch, *input_size, device="meta")
    with torch.no_grad(), ExitStack() as stack:
        # One pass for all three: a counter passes every operator on to the next.
        macs, paper_ops, flops = (
            stack.enter_context(FlopCounterMode(display=False, custom_mapping=formulas))
            for formulas in ({_SCAN: _projection_flops}, _PAPER_FORMULAS, {})
        )
        ghost(images)
    return Complexity(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=macs.get_total_flops() // 2,
        paper_ops=(paper_ops.get_total_flops() - _inside(paper_ops, ghost, ChannelAttention)) // 2,
        flops=flops.get_total_flops(),
    )


def feature_shapes(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> list[tuple[int, ...]]:
    """Return the shape (C, H, W) of every stage's map, for a model with timm's ``forward_intermediates``."""
    ghost = copy.deepcopy(model).to("meta").eval()
    forward: Any = ghost.forward_intermediates
    with torch.no_grad():
        maps = forward(torch.empty(1, *input_size, device="meta"), intermediates_only=True)
    return [tuple(feature.shape[1:]) for feature in maps]


def _inside(counter: FlopCounterMode, model: nn.Module, kind: type[nn.Module]) -> int:
    """Return the operations counted inside modules of a type."""
    counts = counter.get_flop_counts()
    names = [f"{type(model).__name__}.{name}" for name, module in model.named_modules() if isinstance(module, kind)]
    return sum(sum(counts[name].values()) for name in names if name in counts)


def _elements(per_element: int) -> Callable[..., int]:
    # Doubled like the multiply-accumulates, because the total is halved.
    def count(shape: Any, *_: Any, **__: Any) -> int:
        return 2 * per_element * prod(shape)

    return count


def _projection_flops(*shapes: Any, **_: Any) -> int:
    return scan_flops(**scan_sizes(*shapes) | dict(states=0, skip=False))


def _paper_scan(*shapes: Any, **_: Any) -> int:
    return _projection_flops(*shapes) + 2 * scan_flops(**scan_sizes(*shapes) | dict(rank=0))


_SCAN = torch.ops.vision_ssm.route_scan
_PAPER_FORMULAS: dict[Any, Callable[..., int]] = {
    _SCAN: _paper_scan,
    torch.ops.aten.native_layer_norm: _elements(5),
    torch.ops.aten.native_group_norm: _elements(5),
    torch.ops.aten.native_batch_norm: _elements(2),
    torch.ops.aten._native_batch_norm_legit: _elements(2),
    torch.ops.aten._native_batch_norm_legit_no_training: _elements(2),
    torch.ops.aten.mean: _elements(1),
    torch.ops.aten._adaptive_avg_pool2d: _elements(1),
    torch.ops.aten.avg_pool2d: _elements(1),
}

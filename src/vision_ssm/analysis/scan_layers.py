"""The layers of a model that scan or attend, and the arguments of their scans, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vision_ssm.analysis.pictures import path_name
from vision_ssm.errors import InputError, nearest
from vision_ssm.layers import ChannelAttention, SelectiveChannelMixer
from vision_ssm.scan import backend_for, use_backend
from vision_ssm.scan.arguments import ScanArguments

SCAN, ACROSS, ATTENTION = "scan", "scan across channels", "channel attention"

Call = tuple[nn.Module, Any, ScanArguments | None]
"""A layer, the inputs of its forward pass, and the arguments of its scan, if it has one."""


@dataclass(frozen=True)
class ScanLayer:
    """A layer that scans the tokens or the channels of a map, or whose channels attend to channels.

    Args:
        name: Its name in the model.
        kind: `scan`, `scan across channels` or `channel attention`.
        grid: Height and width of its map in tokens.
        routes: The routes that there are; none of channel attention.
        channels: Its channels; with channel attention those of a head, which attend to each other.
        states: States per channel; with channel attention the number of heads.
    """

    name: str
    kind: str
    grid: tuple[int, int]
    routes: tuple[str, ...]
    channels: int
    states: int


def find_scan_layers(
    model: nn.Module, image: Tensor, run: Callable[[Tensor], Any] | None = None
) -> dict[str, ScanLayer]:
    """The layers of a model by name, in the order in which they run.

    Args:
        model: The model, in evaluation mode.
        image: An image, (3, H, W), normalized as the model takes it.
        run: What to call with (1, 3, H, W) instead of the model; a part of it, such as its backbone.

    Raises:
        InputError: The model has no such layers.
    """
    found: dict[str, ScanLayer] = {}

    def note(name: str, call: Call) -> None:
        module, inputs, args = call
        if args is None:
            heads: Any = module.heads
            height, width, channels = inputs[2].shape[1:]  # queries and keys may be smaller
            found[name] = ScanLayer(name, ATTENTION, (height, width), (), channels // heads, heads)
            return
        grid = inputs[0].shape[1:3]
        tokens = args.x.shape[1]
        grids = [grid, inputs[0].shape[2:4]]  # a map is (B, H, W, C) in this package, and may be (B, C, H, W) elsewhere
        grid = next((tuple(grid) for grid in grids if len(grid) == 2 and prod(grid) == tokens), (1, tokens))
        across = isinstance(module, SelectiveChannelMixer)
        grid = tuple(inputs[0].shape[1:3]) if across else grid
        channels = tokens if across else args.x.shape[2]
        names = _route_names(module, args.routes)
        found[name] = ScanLayer(name, ACROSS if across else SCAN, grid, names, channels, args.state_size)

    trace(model, image, run, note)
    if not found:
        raise InputError(f"{type(model).__name__} has no layer that scans (with vision_ssm.scan.route_scan)")
    return found


def choose_layer(layers: dict[str, ScanLayer], name: str | None) -> ScanLayer:
    """The layer of a name; without one, the last scan over the third largest of the grids that are scanned.

    Raises:
        InputError: There is no such layer.
    """
    if name is not None:
        if name not in layers:
            hint = nearest(name, layers, f"; there are {', '.join(list(layers)[:3])} and others")
            raise InputError(f"no layer {name} scans or attends to channels{hint}")
        return layers[name]
    scans = [layer for layer in layers.values() if layer.kind == SCAN]
    if not scans:
        raise InputError(f"no layer scans over the image; there are {', '.join(list(layers)[:3])}")
    grids = sorted({layer.grid for layer in scans}, key=prod, reverse=True)
    return [layer for layer in scans if layer.grid == grids[min(2, len(grids) - 1)]][-1]


def trace(
    model: nn.Module, image: Tensor, run: Callable[[Tensor], Any] | None, note: Callable[[str, Call], None]
) -> None:
    """Run a model on an image, (3, H, W), and report each scan and each channel attention, with the layer's name."""
    running: list[tuple[str, nn.Module, Any]] = []

    def scanned(args: ScanArguments) -> None:
        if running:
            name, module, inputs = running[-1]
            note(name, (module, inputs, args))

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for name, module in model.named_modules():

            def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
                running.append((name, module, inputs))
                if isinstance(module, ChannelAttention):
                    note(name, (module, inputs, None))

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True).remove)
        if backend_for(image.device, image.dtype) == "reference":  # which is no operator that could be seen
            stack.enter_context(use_backend("portable"))
        stack.enter_context(_Watch(scanned))
        (run or model)(image[None])


class _Watch(TorchDispatchMode):
    """Reports the arguments of the scans that run inside it."""

    def __init__(self, report: Callable[[ScanArguments], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.vision_ssm.route_scan.default:
            # The operator's arguments are those fields, in order, and two switches of its outputs.
            self.report(ScanArguments(*args[: len(fields(ScanArguments))]))
        return func(*args, **(kwargs or {}))


def _route_names(module: nn.Module, count: int) -> tuple[str, ...]:
    holder: Any = getattr(module, "switch", module)
    paths: Sequence[Any] = getattr(holder, "paths", ())
    names = [path_name(path) for path in paths]
    if 2 * len(names) == count:  # a path in both directions
        names += [f"Reversed({name})" for name in names]
    if len(names) != count:
        names = [f"route {number}" for number in range(count)]
    return tuple(name.replace("Transposed(Rows)", "Columns") for name in names)

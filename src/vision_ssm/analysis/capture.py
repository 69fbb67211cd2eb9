"""The outputs of a model's blocks, without changing the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from vision_ssm.errors import InputError, nearest

# Blocks of this package's models, of most of timm's (ConvNeXt, Swin, ViT, ...) and of ResNets.
_BLOCK = re.compile(r"(?:^|\.)(?:(?:stages|layers)[._](\d+)\.)?blocks\.(\d+)$|(?:^|\.)layer(\d)\.(\d+)$")


def find_blocks(model: nn.Module) -> dict[str, int]:
    """Names of the blocks of a model, in order, and the stage of each, counted from 0.

    Raises:
        InputError: None of its modules has a name that blocks have in this package or timm.
    """
    found: dict[str, int] = {}
    for name, _ in model.named_modules():
        if match := _BLOCK.search(name):
            stage = match[1] or (int(match[3]) - 1 if match[3] else 0)
            found[name] = int(stage)
    if not found:
        kinds = ", ".join(name for name, _ in model.named_children())
        raise InputError(f"{type(model).__name__} has no blocks with known names; its parts are {kinds}")
    return found


@contextmanager
def capture(
    model: nn.Module, names: Sequence[str], change: Callable[[Any], Any] = lambda output: output
) -> Iterator[dict[str, Any]]:
    """Keep the latest outputs of some modules: a mapping that a forward pass fills.

    Args:
        model: The model.
        names: Names of modules.
        change: What to keep of an output, where the whole is too large.

    Raises:
        InputError: There is no module of that name.
    """
    modules = dict(model.named_modules())
    outputs: dict[str, Any] = {}
    with ExitStack() as stack:
        for name in names:
            if name not in modules:
                raise InputError(f"{type(model).__name__} has no part {name}{nearest(name, modules)}")

            def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                outputs[name] = change(output)

            stack.callback(modules[name].register_forward_hook(keep).remove)
        yield outputs


def as_tensor(output: Any) -> Tensor:
    """The map among what a block returns, such as a mixer's map and balance term."""
    return output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))


def backbone_of(model: nn.Module) -> nn.Module:
    """What gives the maps: the backbone of a detector or segmenter, or the model itself."""
    return getattr(model, "backbone", model)


def stage_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps (B, C, H, W) of a model's stages, finest first.

    They are those of timm's ``forward_intermediates``, of a detector's or segmenter's backbone, or else the outputs of
    the last blocks of the stages.

    Args:
        model: The model.
        images: (B, 3, H, W), normalized.

    Raises:
        InputError: The model has no such maps.
    """
    network: Any = backbone_of(model)
    last = getattr(network, "output_fmt", "NCHW") == "NHWC"
    if network is not model:
        return [x.permute(0, 3, 1, 2) if last else x for x in network(images)]
    forward: Any = getattr(network, "forward_intermediates", None)
    if forward is not None:
        return forward(images, intermediates_only=True)
    names = {stage: name for name, stage in find_blocks(network).items()}
    with capture(network, list(names.values()), as_tensor) as outputs:
        network(images)
    maps = [outputs[name] for name in names.values()]
    if any(x.ndim != 4 for x in maps):
        raise InputError(f"{type(model).__name__} gives no maps: an output of a block has {maps[0].ndim} dimensions")
    return [x.permute(0, 3, 1, 2) if last else x for x in maps]


def check_stages(stages: Sequence[int] | None, count: int) -> list[int]:
    """The stages to look at, all by default; negative ones count from the last.

    Raises:
        InputError: There is no such stage.
    """
    if wrong := [stage for stage in stages or () if stage not in range(-count, count)]:
        raise InputError(f"there are stages 0 to {count - 1}, not {', '.join(map(str, wrong))}")
    return list(range(count) if stages is None else dict.fromkeys(stage % count for stage in stages))


def locate(position: Sequence[float], size: Sequence[int]) -> list[int]:
    """Row and column of a position, which is relative to the image, in a map of a size.

    Raises:
        InputError: It is not within the image.
    """
    if not all(0 <= place <= 1 for place in position):
        shown = " ".join(f"{place:g}" for place in position)
        raise InputError(f"position must lie between 0 and 1, from border to border of the image, got {shown}")
    return [min(int(place * side), side - 1) for place, side in zip(position, size, strict=True)]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

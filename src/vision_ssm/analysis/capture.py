"""The outputs of a model's blocks, without changing the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
        raise InputError(f"{type(model).__name__} has no blocks that are known by their names; its parts are {kinds}")
    return found


@contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Keep the latest outputs of some modules: a mapping that a forward pass fills.

    Args:
        model: The model.
        names: Names of modules.

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
                outputs[name] = output

            stack.callback(modules[name].register_forward_hook(keep).remove)
        yield outputs


def as_tensor(output: Any) -> Tensor:
    """The map among what a block returns, such as a mixer's map and balance term."""
    return output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))

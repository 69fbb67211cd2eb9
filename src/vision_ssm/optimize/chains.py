"""Which norm and which activation follow a layer, found by tracing what every module does with its children."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from vision_ssm.layers.patches import channels_first
from vision_ssm.optimize.packed import activation_of, can_be_packed

_logger = logging.getLogger(__name__)
_TO_CHANNELS_FIRST, _TO_CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


@dataclass(frozen=True)
class Chain:
    """A layer, and the names of the batch norm and of the activation that take its output, and nothing else does."""

    layer: nn.Module
    norm: str | None
    act: str | None


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_chains(model: nn.Module) -> list[Chain]:
    """Return all chains of a model in evaluation mode.

    A module counts only if it has one name, is called once in all, and has no hooks.
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    graphs = [(name, graph) for name, module in model.named_modules() if (graph := _outline(module)) is not None]
    calls: Counter[str] = Counter()
    for prefix, graph in graphs:
        for node in graph.nodes:
            if node.op == "call_module":
                calls[_join(prefix, node.target)] += 1
            elif node.op == "get_attr":  # a parent that reads a weight by itself
                calls[_join(prefix, node.target.rpartition(".")[0])] += 2

    def alone(name: str) -> bool:
        module: Any = model.get_submodule(name)
        hooks = module._forward_hooks or module._forward_pre_hooks
        return calls[name] == 1 and names[id(module)] == 1 and not hooks

    found = []
    for prefix, graph in graphs:
        for node in graph.nodes:
            if node.op == "call_module" and alone(name := _join(prefix, node.target)):
                layer = model.get_submodule(name)
                if can_be_packed(layer):
                    found.append(_follow(model, prefix, node, layer, alone))
    return found


def _outline(module: nn.Module) -> fx.Graph | None:
    """Return what a module does with its children; ``None`` where that depends on more than their outputs."""
    if not any(True for _ in module.children()):
        return None
    try:
        return _ChildrenAreLeaves().trace(module)
    except Exception as error:  # tracing runs anybody's code, with values that it may not expect
        _logger.debug("not traced: %s: %s", type(module).__name__, error)
        return None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _follow(model: nn.Module, prefix: str, node: fx.Node, layer: nn.Module, alone: Any) -> Chain:
    norm, last = None, False
    last = isinstance(layer, nn.Linear)  # whether the layer's output channels are the last axis of the value
    for user in _only_users(node):
        if (order := _order(user)) is not None:
            if order != (_TO_CHANNELS_FIRST if last else _TO_CHANNELS_LAST):
                break
            last = not last
            continue
        if user.op != "call_module" or not alone(name := _join(prefix, str(user.target))):
            break
        module = model.get_submodule(name)
        if type(module) in (nn.Identity, nn.Dropout):
            continue
        if norm is None and not last and _can_be_folded(module):
            norm = name
        else:
            return Chain(layer, norm, name if activation_of(module) else None)
    return Chain(layer, norm, None)


def _order(node: fx.Node) -> tuple[Any, ...] | None:
    """Return how a node permutes the axes of a map; ``None`` if it does something else."""
    if node.op == "call_function" and node.target is channels_first:
        return _TO_CHANNELS_FIRST
    if node.op != "call_method" or node.target != "permute":
        return None
    return tuple(node.args[1:]) if len(node.args) > 2 else tuple(node.args[1])  # type: ignore[arg-type]


def _only_users(node: fx.Node) -> Iterator[fx.Node]:
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node


def _can_be_folded(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None

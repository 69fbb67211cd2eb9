"""Find the batch norm and the activation that follow each layer, by tracing modules with their children as leaves."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules import module as hooks_of_all_modules

from vision_ssm.layers.patches import channels_first
from vision_ssm.optimize.packed import activation_of, can_be_packed, own_forward

_logger = logging.getLogger(__name__)
_TO_CHANNELS_FIRST, _TO_CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
# Libraries whose modules do in their forward passes what a trace shows.
_KNOWN = ("torch", "timm", "torchvision", "vision_ssm")
_METHODS = ("forward", "forward_features", "forward_intermediates")


@dataclass(frozen=True)
class Chain:
    """Names of a layer, and of the batch norm and the activation that are the only users of its output."""

    layer: str
    norm: str | None
    act: str | None


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_chains(model: nn.Module) -> list[Chain]:
    """Return all chains of a model in evaluation mode.

    A module counts only if it has one name, is called once in all, and has no hooks. A chain counts only in modules
    of known libraries, including ``nn.Sequential``, whose parents are also of these libraries or can be traced:
    other code may call them in unknown ways.
    """
    if hooks_of_all_modules._global_forward_hooks or hooks_of_all_modules._global_forward_pre_hooks:
        return []
    # Tracing runs arbitrary code with proxies that it may keep: use a temporary copy that shares the weights.
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    graphs: list[tuple[str, fx.Graph]] = []
    further: list[tuple[str, fx.Graph]] = []
    closed: list[str] = []  # nothing below these modules is used
    apart: set[str] = set()  # in these, another method than the forward pass could not be traced
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            continue
        found = {method: _outline(module, method) for method in _METHODS if hasattr(type(module), method)}
        if found["forward"] is not None:
            graphs.append((name, found.pop("forward")))  # type: ignore[arg-type]
        elif not _known(module):
            closed.append(name)
        apart |= {name} if any(graph is None for graph in found.values()) else set()
        further += [(name, graph) for graph in found.values() if graph is not None]
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
        return calls[name] == 1 and names[id(module)] == 1 and not hooks and own_forward(module)

    chains = {
        chain.layer: chain
        for prefix, graph in graphs
        if _known(model.get_submodule(prefix)) and prefix not in apart and not _below(prefix, closed)
        for chain in _chains_in(model, prefix, graph, alone)
    }
    for prefix, graph in further:
        others = {chain.layer: chain for chain in _chains_in(model, prefix, graph, alone)}
        chains = {name: chain for name, chain in chains.items() if others.get(name, chain) == chain}
    return list(chains.values())


def _chains_in(model: nn.Module, prefix: str, graph: fx.Graph, alone: Any) -> Iterator[Chain]:
    for node in graph.nodes:
        if node.op != "call_module" or not alone(name := _join(prefix, node.target)):
            continue
        if can_be_packed(model.get_submodule(name)):
            yield _follow(model, prefix, node, name, alone)


def _known(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _KNOWN and own_forward(module)


def _below(name: str, closed: list[str]) -> bool:
    return any(not parent or name == parent or name.startswith(f"{parent}.") for parent in closed)


def _outline(module: nn.Module, method: str) -> fx.Graph | None:
    """Return the graph of a module over its children; ``None`` if it cannot be traced."""
    if not own_forward(module):
        return None
    tracer = _ChildrenAreLeaves()
    tracer.traced_func_name = method
    try:
        parameters = inspect.signature(getattr(module, method)).parameters.values()
        given = {p.name: p.default for p in parameters if p.default is not p.empty}
        return tracer.trace(module, concrete_args=given)
    except Exception as error:  # the module's code may fail in any way on proxies
        _logger.debug("not traced: %s.%s: %s", type(module).__name__, method, error)
        return None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _follow(model: nn.Module, prefix: str, node: fx.Node, name: str, alone: Any) -> Chain:
    norm, last = None, isinstance(model.get_submodule(name), nn.Linear)  # whether the channels are the last axis
    for user in _only_users(node):
        if (order := _order(user)) is not None:
            if order != (_TO_CHANNELS_FIRST if last else _TO_CHANNELS_LAST):
                break
            last = not last
            continue
        if user.op != "call_module" or not alone(next_name := _join(prefix, str(user.target))):
            break
        module = model.get_submodule(next_name)
        if type(module) in (nn.Identity, nn.Dropout):
            continue
        if norm is None and not last and type(module) is nn.BatchNorm2d and module.running_mean is not None:
            norm = next_name
        else:
            return Chain(name, norm, next_name if activation_of(module) else None)
    return Chain(name, norm, None)


def _order(node: fx.Node) -> tuple[Any, ...] | None:
    """Return how a node permutes the axes of a map; ``None`` if it does something else."""
    if node.op == "call_function" and node.target is channels_first:
        return _TO_CHANNELS_FIRST
    if node.op != "call_method" or node.target != "permute" or node.kwargs:
        return None
    order = node.args[1:] if len(node.args) > 2 else node.args[1]
    return tuple(order) if isinstance(order, tuple | list) else None


def _only_users(node: fx.Node) -> Iterator[fx.Node]:
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node

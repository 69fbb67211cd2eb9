"""Fuse and pack a model's layers for inference on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from vision_ssm.layers import SS2D, QSTokenMixer, ResidualConv, SelectiveChannelMixer, SelectiveTokenMixer
from vision_ssm.optimize.chains import Chain, find_chains
from vision_ssm.optimize.packed import DTYPES, Frozen, activation_of, can_be_packed, frozen, pack


def optimize(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a model for inference on a CPU: its layers fused, packed for oneDNN, and frozen.

    Linear layers and convolutions run on oneDNN's products with packed weights, together with the activation that
    follows; batch norms are folded into the layer before them, and what the scans derive from parameters alone is
    computed once. Layers are packed wherever they are torch's own; what follows them is fused in ``nn.Sequential`` and
    in modules of timm, torchvision and this package, which are traced for that. While it traces, no other thread may
    run a model: ``torch.fx`` replaces every module's call meanwhile. What is not recognized stays as it is. Images may
    have any size and any floating-point dtype, and autocast changes nothing.

    The copy keeps the model's class and attributes, so that ``forward_features`` or a ``features_only`` wrapper work on
    it. It cannot be trained, loaded into or moved. It needs at most twice the memory of the weights: the packed ones
    are kept beside the others, from which they are packed again after ``copy.deepcopy`` or unpickling. Under
    ``torch.compile``, ``torch.export`` and FLOP counters its layers are torch's operators.

    Args:
        model: The model; it stays as it is.
        dtype: ``torch.float32`` or ``torch.bfloat16``; ``None`` keeps the model's own. Scans keep float32 inside.

    Returns:
        The copy, in evaluation mode, without gradients.

    Raises:
        TypeError: If ``model`` is not a module, or ``dtype`` is not one of these.
        ValueError: If a parameter or buffer is not on a CPU, or the model is already an optimized copy.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be a plain torch.nn.Module, got a TorchScript module")
    if dtype not in (None, *DTYPES):
        raise TypeError(f"dtype must be {' or '.join(map(str, DTYPES))} or None, got {dtype}")
    if any(isinstance(module, Frozen) for module in model.modules()):
        raise ValueError("the model is already an optimized copy; optimize the original model instead")
    elsewhere = {str(t.device) for t in (*model.parameters(), *model.buffers()) if t.device.type != "cpu"}
    if elsewhere:
        raise ValueError(f"the model must be on a CPU, got parameters or buffers on {', '.join(sorted(elsewhere))}")
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    _fix_scan_parameters(copied, dtype)
    for module in list(copied.modules()):
        if isinstance(module, ResidualConv):
            _absorb_residual(module)
    chains = find_chains(copied)
    for chain in chains:
        _fold_norm(copied, chain)
    if dtype is not None:
        copied = copied.to(dtype)
    activations = {chain.layer: chain.act for chain in chains}
    for at, layer in [(at, module) for at, module in copied.named_modules() if can_be_packed(module)]:
        name = activations.get(at)
        act = copied.get_submodule(name) if name else None
        pack(layer, activation_of(act) or ("none", "none"))
        if name:
            _replace(copied, name)
    if not isinstance(copied, Frozen | torch.fx.GraphModule):  # every GraphModule has its own class
        kind: Any = type(copied)
        copied.__class__ = frozen(kind)
    return copied


class _Known:
    """Replaces a method without arguments by its result."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def _fix_scan_parameters(model: nn.Module, dtype: torch.dtype | None) -> None:
    scanning = (SS2D, SelectiveTokenMixer, QSTokenMixer, SelectiveChannelMixer)
    modules: list[Any] = [module for module in model.modules() if isinstance(module, scanning)]
    for module in modules:
        found = module.scan_parameters()
        of_model = dtype or module.D.dtype  # D keeps it: under autocast it decides the dtype of the norms
        if isinstance(found, dict):
            fixed = {name: _fixed(value) for name, value in found.items()}
            module.scan_parameters = _Known(fixed | {"D": fixed["D"].to(of_model)})
        else:
            A, D, *others = (_fixed(value) for value in found)
            module.scan_parameters = _Known((A, D.to(of_model), *others))


def _fixed(value: Tensor) -> Tensor:
    value = value.detach()
    return (value if value.dtype == torch.float64 else value.float()).contiguous()


@torch.no_grad()
def _absorb_residual(module: ResidualConv) -> None:
    """Put the map itself into the kernel, as a one in its middle."""
    if can_be_packed(module.conv) and not module.conv._forward_hooks:
        module.conv.weight[:, :, 1, 1] += 1
        module.residual = False


def _fold_norm(model: nn.Module, chain: Chain) -> None:
    if chain.norm is None:
        return
    norm: Any = model.get_submodule(chain.norm)
    layer: Any = model.get_submodule(chain.layer)
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    fuse: Any = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
    layer.requires_grad_(False)
    _replace(model, chain.norm)


def _replace(model: nn.Module, name: str) -> None:
    model.set_submodule(name, nn.Identity().eval())

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Undoes what a step that is skipped did to the batch norms' running statistics.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Remember them."""
        self._kept = [buffer.clone() for buffer in self._buffers()]

    def put_back(self) -> None:
        """Return to what was remembered."""
        for buffer, kept in zip(self._buffers(), self._kept, strict=True):
            buffer.copy_(kept)

    def _buffers(self) -> list[Tensor]:
        buffers = (buffer for norm in self._norms for buffer in (norm.running_mean, norm.running_var))
        return [buffer for buffer in buffers if buffer is not None]


def first_in_forward(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Where the first NaN or infinity of a forward pass is.

    Args:
        model: The network.
        forward: Runs it.

    Returns:
        A layer's input or output, by name, or None if all of them are finite.
    """
    found: list[str] = []

    def hook(what: str) -> Callable[..., None]:
        def check(module: nn.Module, *values: Any) -> None:
            if not found and not _is_finite(values[-1]):
                found.append(what)

        return check

    handles = []
    for name, module in model.named_modules():
        layer = f"{name} ({type(module).__name__})" if name else "the model"
        handles.append(module.register_forward_pre_hook(hook(f"the input of {layer}")))
        handles.append(module.register_forward_hook(hook(f"the output of {layer}")))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_in_gradients(model: nn.Module) -> str | None:
    """Which parameter is the last one, in the order of the model, whose gradient has a NaN or an infinity.

    Gradients are computed from the end of a model to its beginning.
    """
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return f"the gradient of {name}"
    return None


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return True

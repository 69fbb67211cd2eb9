"""Detect what observes a call: function transforms, forward-mode levels, gradients, tracing, dispatch modes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def forward_mode() -> bool:
    """Return whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Return whether a call runs inside a transform of ``torch.func`` or a level of forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_mode()


def has_tangent(tensor: Tensor) -> bool:
    """Return whether a tensor carries a forward-mode tangent of the open level; also below torch's autograd."""
    return torch._VF._unpack_dual(tensor, level=forward_ad._current_level)[1] is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the values that the transforms of ``torch.func`` wrap, those of all mapped calls together."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def unobserved(x: Tensor) -> bool:
    """Return whether nothing in torch has to see what is computed from ``x``.

    That is: no gradients, no tracing or compilation, no dispatch mode (such as a FLOP counter), no function
    transform or forward-mode level, and no tensor subclass.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not transformed()
        and not torch.jit.is_tracing()
    )

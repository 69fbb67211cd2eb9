"""When a call may take a short cut past torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def unobserved(x: Tensor) -> bool:
    """Return whether nothing in torch has to see what is computed from ``x``.

    That is: no gradients, no tracing or compilation, no dispatch mode (such as a FLOP counter), no function
    transform and no tensor subclass.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )

"""How a backend is compared with the definition."""

from __future__ import annotations

import torch

from vision_ssm.scan import last_backend, triton, use_backend

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def error(found: torch.Tensor, expected: torch.Tensor, least: float = 1e-6) -> float:
    """Error in the 2-norm, relative to the expected norm or ``least``; NaN never passes."""
    if expected.numel() == 0:
        return 0.0
    difference = (found.double().cpu() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=least))


def assert_equal_to_reference(call, backend, dtype):
    # The reference works in float64 on the values that the backend sees.
    call = call.to(dtype)
    with use_backend("reference"):
        y, state, grads = call.to(torch.float64).gradients()
    with use_backend(backend):
        found_y, found_state, found_grads = call.on(device(backend)).gradients()
    assert last_backend() == backend
    assert found_y.dtype == dtype
    assert found_state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(found_y, y) <= TOLERANCE[dtype]
    assert error(found_state, state) <= TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    for name, grad in grads.items():
        assert found_grads[name].dtype == call.tensors[name].dtype, name
        # Terms of the order of 1 may cancel: a gradient that was one number, 0.0067, was off by 7e-7 of float32.
        assert error(found_grads[name], grad, least=0.1) <= TOLERANCE[dtype], name


def exact(backend):
    """The most precise dtype that a backend computes itself."""
    return torch.float64 if backend == "portable" else torch.float32


def interpreted(backend):
    """Whether Triton's interpreter runs it, where maps must be small."""
    return backend == "triton" and triton.interpreted()


def device(backend):
    """Where a backend runs."""
    return "cuda" if backend == "triton" and not triton.interpreted() else "cpu"

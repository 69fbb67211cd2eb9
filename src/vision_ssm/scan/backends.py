"""The implementations of the operator; the device chooses one, unless it is overridden."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vision_ssm.scan import cpu, portable, reference, triton
from vision_ssm.scan.arguments import ScanArguments
from vision_ssm.scan.cpu.library import LEVELS
from vision_ssm.scan.transforms import transformed

ENVIRONMENT_VARIABLE = "VISION_SSM_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator.

    ``forward`` returns the outputs in the dtype asked for, (B, L, C), and the last state, (B, K', Dk, N).
    ``backward`` takes the gradients of both (the state's may be ``None``) and returns those of all
    differentiable arguments by name. ``image_group`` returns how many images to process at once, ``available``
    whether this machine can run it. ``compiled`` returns whether it runs on a type of device, with float32, bfloat16
    and float16; a backend without it consists of torch's operators, which take any device and dtype.
    """

    name: str
    forward: Callable[[ScanArguments, torch.dtype], tuple[Tensor, Tensor]]
    backward: Callable[[ScanArguments, Tensor, Tensor | None], dict[str, Tensor]]
    image_group: Callable[[ScanArguments], int]
    available: Callable[[], bool] = lambda: True
    compiled: Callable[[str], bool] | None = None

    def takes(self, device: str, dtype: torch.dtype) -> bool:
        """Return whether it runs on a type of device, on tokens of a dtype."""
        return self.compiled is None or (dtype != torch.float64 and self.compiled(device))

    def run_forward(self, args: ScanArguments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Run :attr:`forward`, some images at a time."""
        if self.image_group(args) >= args.x.shape[0]:
            return self.forward(args, dtype)
        parts = [self.forward(args.images(group), dtype) for group in self._groups(args)]
        return torch.cat([y for y, _ in parts]), torch.cat([state for _, state in parts])

    def run_backward(self, args: ScanArguments, grad_y: Tensor, grad_state: Tensor | None) -> dict[str, Tensor]:
        """Run :attr:`backward`, some images at a time."""
        if self.image_group(args) >= args.x.shape[0]:
            return self.backward(args, grad_y, grad_state)
        parts = [
            self.backward(args.images(group), grad_y[group], None if grad_state is None else grad_state[group])
            for group in self._groups(args)
        ]
        return {
            name: torch.cat([part[name] for part in parts])
            if name in ScanArguments.PER_IMAGE
            else torch.stack([part[name] for part in parts]).sum(0)
            for name in parts[0]
        }

    def _groups(self, args: ScanArguments) -> list[slice]:
        batch, size = args.x.shape[0], self.image_group(args)
        return [slice(first, min(batch, first + size)) for first in range(0, batch, size)]


def _portable_group(args: ScanArguments) -> int:
    # Bounds the memory of the unrolled states; on a CPU it also keeps them near the cache.
    elements = args.routes_per_image * args.read.shape[1] * args.channels_per_route * args.state_size
    return max(1, (2**20 if args.x.device.type == "cpu" else 2**28) // max(1, elements))


def _all_images(args: ScanArguments) -> int:
    return args.x.shape[0]


def _cpu(name: str, level: str | None) -> Backend:
    run = partial(cpu.forward, level=level), partial(cpu.backward, level=level)
    return Backend(name, *run, _all_images, partial(cpu.available, level), lambda device: device == "cpu")


BACKENDS: dict[str, Backend] = {
    # The definition has no gradient of its own: route_scan differentiates it with autograd.
    "reference": Backend("reference", reference.scan, portable.backward, _portable_group),
    "portable": Backend("portable", portable.scan, portable.backward, _portable_group),
    # The best instruction set of the machine, and each of them by name.
    "cpu": _cpu("cpu", None),
    **{f"cpu-{level}": _cpu(f"cpu-{level}", level) for level in LEVELS},
    "triton": Backend("triton", triton.forward, triton.backward, _all_images, triton.available, triton.takes),
}

_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}

_override: ContextVar[str | None] = ContextVar("vision_ssm_backend", default=None)
_last = threading.local()


def available_backends() -> tuple[str, ...]:
    """Return the names that :func:`use_backend` and the environment variable take on this machine."""
    return tuple(name for name, backend in BACKENDS.items() if backend.available())


def backend_for(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Return the name of the backend that a call on ``device`` with tokens of ``dtype`` would use now.

    A backend that does not take the device or dtype is replaced by ``"portable"``, and so is a compiled one inside a
    function transform or a level of forward-mode differentiation.

    Raises:
        ValueError: If the environment variable ``VISION_SSM_BACKEND`` is not a backend available here.
    """
    chosen = _override.get()
    if chosen is None and (chosen := os.environ.get(ENVIRONMENT_VARIABLE) or None):
        _check(chosen, f"environment variable {ENVIRONMENT_VARIABLE}")
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if chosen is None:
        chosen = _BY_DEVICE.get(kind, "portable")
        if not BACKENDS[chosen].available():
            chosen = "portable"
            if kind == "cuda" and triton.load_kernels() is None:
                triton.warn_of_fallback()
    if BACKENDS[chosen].compiled is not None and transformed():
        return "portable"
    return chosen if BACKENDS[chosen].takes(kind, dtype) else "portable"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every scan of this thread (or asynchronous task) with one backend.

    Raises:
        ValueError: If ``name`` is not a backend available here.
    """
    _check(name, "name")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def last_backend(*, forget: bool = False) -> str | None:
    """Return the name of the backend that ran this thread's latest scan, ``None`` before the first.

    Args:
        forget: Return ``None`` afterwards, until the next scan.
    """
    name = getattr(_last, "name", None)
    if forget:
        _last.name = None
    return name


def select(x: Tensor) -> Backend:
    """Return the backend for a call with tokens ``x`` and note that it runs."""
    backend = BACKENDS[backend_for(x.device, x.dtype)]
    _last.name = backend.name
    return backend


def _check(name: str, source: str) -> None:
    if name not in BACKENDS or not BACKENDS[name].available():
        raise ValueError(f"{source} is {name!r}; allowed are {', '.join(map(repr, available_backends()))}")

"""Compile the kernels of a model, and build its routes, ahead of its first use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from vision_ssm.scan.triton.tiles import tuning


def warmup(
    model: nn.Module,
    sizes: int | Sequence[int | tuple[int, int]],
    *,
    batch: int = 1,
    training: bool = False,
    tune: bool = False,
) -> None:
    """Run a model on blank images, so that its kernels are compiled (or found in Triton's cache) and its routes built.

    Kernels are compiled per dtype, number of channels, states and rank, and again for a batch so small that a scan is
    split differently, so pass the batch size that will be used, inside the autocast context that will be used. The
    weights, gradients, running statistics and training mode of the model do not change.

    Args:
        model: The model, on its device and in its dtype.
        sizes: Image sizes in pixels: a number for square images, or several sizes, each a number or a pair of height
            and width (``[(32, 64)]``).
        batch: Batch size.
        training: Also compile the backward pass.
        tune: Also time the candidate tile sizes for each kind of scan on this GPU, which takes seconds per kind, and
            use the fastest from now on, in later processes too: Triton's cache keeps the choice. Results may differ
            in rounding from untuned ones. The times are logged at level ``INFO``. No effect on other devices.

    Raises:
        ValueError: If a size or the batch size is not a positive integer, or there are no sizes or no parameters.
    """
    given = list(sizes) if isinstance(sizes, Iterable) else [sizes]
    pairs = [_pair(size) for size in given]
    if not pairs or None in pairs:
        raise ValueError(f"sizes must be positive numbers of pixels or pairs of them, at least one, got {sizes!r}")
    if not _is_count(batch):
        raise ValueError(f"batch must be an integer of at least 1, got {batch!r}")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("the model has no parameters; it needs at least one, whose device and dtype the images get")
    leaves = [p for p in model.parameters() if p.requires_grad]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with tuning() if tune else contextlib.nullcontext():
            for pair in filter(None, pairs):
                images = parameter.new_zeros(batch, getattr(model, "in_chans", 3), *pair)
                _run(model, images, leaves if training else [])
    finally:
        for module, mode in modes.items():
            module.training = mode
    if parameter.device.type == "cuda":
        torch.cuda.synchronize(parameter.device)


def _run(model: nn.Module, images: torch.Tensor, leaves: list[nn.Parameter]) -> None:
    with torch.set_grad_enabled(bool(leaves)):
        found = model(images)
        if leaves:
            outputs = [found] if isinstance(found, torch.Tensor) else list(found)
            torch.autograd.grad(torch.stack([y.float().sum() for y in outputs]).sum(), leaves, allow_unused=True)


def _is_count(n: Any) -> bool:
    return isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0


def _pair(size: Any) -> tuple[int, int] | None:
    """Return height and width; ``None`` if the size is neither a positive number nor a pair of them."""
    both = (size, size) if _is_count(size) else size
    if isinstance(both, tuple | list) and len(both) == 2 and all(map(_is_count, both)):
        return int(both[0]), int(both[1])
    return None

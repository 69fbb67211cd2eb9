"""Compile what a model will need before it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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

    A kernel is compiled for dtypes, channels, states and ranks, and anew for a batch so small that a scan is split
    differently; so give the batch that will be used. Run it inside the autocast context that will be used. Weights,
    gradients, statistics of normalisations and the mode of the model stay as they are.

    Args:
        model: The model, on its device and in its dtype.
        sizes: Height and width of the images in pixels, or one number for both; one or several.
        batch: Images at once.
        training: Also compile the backward pass.
        tune: Also time the few ways to run each scan on this GPU, about ten seconds for each, and use the fastest from
            now on, in later processes too: Triton's cache keeps the choice. Results then differ from those of another
            GPU in their rounding. The times are logged, at level ``INFO``. Other devices have nothing to tune.

    Raises:
        ValueError: If a size or the batch is smaller than 1, or there is no size.
    """
    given = [sizes] if isinstance(sizes, int) else list(sizes)
    pairs = [(size, size) if isinstance(size, int) else size for size in given]
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(f"sizes must be positive numbers of pixels or pairs of them, at least one, got {sizes!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    parameter = next(model.parameters())
    leaves = [p for p in model.parameters() if p.requires_grad]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with tuning() if tune else contextlib.nullcontext():
            for height, width in pairs:
                images = parameter.new_zeros(batch, getattr(model, "in_chans", 3), height, width)
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


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair)

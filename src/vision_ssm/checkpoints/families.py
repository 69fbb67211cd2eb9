"""Which conversion belongs to which model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vision_ssm.checkpoints.efficient_vmamba import convert_efficient_vmamba
from vision_ssm.checkpoints.group_mamba import convert_group_mamba
from vision_ssm.checkpoints.reader import CheckpointError
from vision_ssm.checkpoints.sparx import convert_sparx
from vision_ssm.checkpoints.vmamba import convert_vmamba

_CONVERSIONS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "efficient_vmamba_": convert_efficient_vmamba,
    "sparx_mamba_": convert_sparx,
    "group_mamba_": convert_group_mamba,
    "vmamba_": convert_vmamba,
}
# Tensors that a model has with an option only.
_OPTIONS = {
    # output norms, of detection and segmentation backbones
    r"feature_norms\.": "feature_norm",
    # SparX's detection backbone
    r".*\.attention\.scale$": "learnable_scale",
}


def options_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options that a model needs to have these weights, which have our names."""
    return {option: True for pattern, option in _OPTIONS.items() if any(re.match(pattern, key) for key in state)}


def can_convert(model: str) -> bool:
    """Tell whether there is a conversion for a model, by the name it has in timm's registry."""
    return _find(model) is not None


def same_family(model: str, other: str) -> bool:
    """Tell whether the official checkpoints of two models are converted alike."""
    return can_convert(model) and _find(model) is _find(other)


def convert_official(model: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the official state dict of a model, by the name it has in timm's registry, to this package's names.

    Raises:
        CheckpointError: If there is no conversion for that model.
    """
    if (convert := _find(model)) is not None:
        return convert(state)
    families = ", ".join(f"{prefix}*" for prefix in _CONVERSIONS)
    raise CheckpointError(f"no conversion of official checkpoints for {model}; there is one for {families}")


def trace_official(model: str, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of the published tensors of which each of ours is made."""
    names = dict(enumerate(state, start=1))
    # Every tensor holds its own number instead of its values, and keeps that number through the conversion.
    numbered = {key: torch.tensor(float(i)).expand(state[key].shape) for i, key in names.items()}
    return {
        key: [names[int(i)] for i in _distinct(value) if i in names]
        for key, value in convert_official(model, numbered).items()
    }


def _distinct(value: Tensor) -> list[float]:
    if not value.numel():
        return []
    low, high = value.aminmax()  # for most tensors enough, and far faster than sorting them
    return [low.item()] if low == high else value.unique().tolist()


def _find(model: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    return next((convert for prefix, convert in _CONVERSIONS.items() if model.startswith(prefix)), None)

"""Which conversion belongs to which model."""

from __future__ import annotations

from collections.abc import Callable

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


def convert_official(model: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the official state dict of a model, by the name it has in timm's registry, to this package's names.

    Raises:
        CheckpointError: If there is no conversion for that model.
    """
    for prefix, convert in _CONVERSIONS.items():
        if model.startswith(prefix):
            return convert(state)
    families = ", ".join(f"{prefix}*" for prefix in _CONVERSIONS)
    raise CheckpointError(f"no conversion of official checkpoints for {model}; there is one for {families}")

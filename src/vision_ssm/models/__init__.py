"""The backbones, one file per family. Importing this package registers them with timm."""

from vision_ssm.models.mamba_mixer import MambaMixer
from vision_ssm.models.vmamba import VMamba

__all__ = ["MambaMixer", "VMamba"]

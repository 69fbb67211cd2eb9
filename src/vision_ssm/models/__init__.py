"""The backbones, one file per family. Importing this package registers them with timm."""

from vision_ssm.models.efficient_vmamba import EfficientVMamba
from vision_ssm.models.group_mamba import GroupMamba
from vision_ssm.models.mamba_mixer import MambaMixer
from vision_ssm.models.sparx import SparXMamba
from vision_ssm.models.sparx_swin import SparXSwin
from vision_ssm.models.vmamba import VMamba

__all__ = ["EfficientVMamba", "GroupMamba", "MambaMixer", "SparXMamba", "SparXSwin", "VMamba"]

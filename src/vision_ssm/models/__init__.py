"""The backbones, one file per family. Importing this package registers them with timm."""

from vision_ssm.models.efficient_vmamba import EfficientVMamba
from vision_ssm.models.vmamba import VMamba

__all__ = ["EfficientVMamba", "VMamba"]

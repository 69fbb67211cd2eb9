"""The backbones, one file per family. Importing this package registers them with timm."""

from vision_ssm.models.sparx import SparXMamba
from vision_ssm.models.sparx_swin import SparXSwin
from vision_ssm.models.vmamba import VMamba

__all__ = ["SparXMamba", "SparXSwin", "VMamba"]

"""Vision state-space (Mamba-style) models without a compile step.

Importing the package registers its models with timm, so that
``timm.create_model("vmamba_tiny")`` finds them.
"""

from vision_ssm import models
from vision_ssm.scan.warmup import warmup

__version__ = "0.1.0.dev0"

__all__ = ["__version__", "models", "warmup"]

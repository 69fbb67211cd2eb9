"""Vision state-space (Mamba-style) models without a compile step.

Importing the package registers its models with timm, so that
``timm.create_model("vmamba_tiny")`` finds them.
"""

import sys
from typing import Any

from vision_ssm.memory import keep_freed_memory

# Registering imports torch and timm, which takes seconds. The program `vision-ssm` leaves it to what needs a model
# (`vision_ssm.models.create`, `vision_ssm.models.registry`), so that help, recipes and mistyped options take none.
if "vision_ssm_program" not in sys.modules:
    from vision_ssm import models
    from vision_ssm.optimize import optimize
    from vision_ssm.scan.warmup import warmup

__version__ = "0.1.0"

__all__ = ["__version__", "keep_freed_memory", "load", "models", "optimize", "warmup"]


def __getattr__(name: str) -> Any:
    if name == "load":  # needs torchvision, which the models alone do not
        from vision_ssm.tasks import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The program `vision-ssm`.

It stands beside the package because importing the package imports torch and timm, to register the models: seconds that
help, the recipes and mistyped options need not take. The package leaves that to the commands if this module is loaded.
"""

from vision_ssm.cli import main

__all__ = ["main"]

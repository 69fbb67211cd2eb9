"""The fastest form of a model for inference on a CPU: ``optimize(model)``."""

from vision_ssm.optimize.fuse import optimize

__all__ = ["optimize"]

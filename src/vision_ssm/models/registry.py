"""The names under which this package's models are registered with timm."""

from __future__ import annotations

import timm
from timm.models import model_entrypoint

import vision_ssm.models  # noqa: F401  (registers them)


def registered_models() -> list[str]:
    """Return the names of this package's models, sorted."""
    return [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith("vision_ssm.models.")]

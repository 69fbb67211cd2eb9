"""Moved to :mod:`vision_ssm.scan.transforms`."""

from vision_ssm.scan.transforms import unobserved as unobserved

"""Models in the formats of other programs, and on a web page."""

from vision_ssm.export.web_demo import demo

__all__ = ["demo"]

import importlib
import sys
from collections.abc import Sequence

from vision_ssm.errors import InputError

ANALYSES = {
    "cka": ("similarity:cka", "how similar the maps of blocks are, within a model or between two"),
    "erf": ("fields:erf", "effective receptive fields: which pixels the center of a map depends on"),
    "attention": ("attention:attention", "which tokens a scan attends to from one position"),
    "features": ("maps:features", "the maps of stages"),
    "cam": ("maps:cam", "which parts of an image speak for a class"),
    "resolution": ("resolution:resolution", "accuracy, time and memory at other resolutions than that of training"),
}
"""Name of each analysis: where its function is in this package, and what it shows."""


def analyze(words: Sequence[str]) -> int:
    """Run one analysis; `words` follow `vision-ssm analyze`."""
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, ANALYSES))
        lines = "".join(f"  {name:<{width}}  {text}\n" for name, (_, text) in ANALYSES.items())
        (sys.stdout if words else sys.stderr).write(
            f"usage: vision-ssm analyze ANALYSIS MODEL|RUN... [OPTIONS]\n\nanalyses:\n{lines}\n"
            "MODEL is a timm name with its published weights, NAME=FILE with those of a file, or NAME=random.\n"
            "`vision-ssm analyze ANALYSIS --help` lists the options.\n"
        )
        return 0 if words else 2
    if words[0] not in ANALYSES:
        raise InputError(f"analyze what? {', '.join(ANALYSES)}, not {words[0]}")
    module, function = ANALYSES[words[0]][0].split(":")
    return getattr(importlib.import_module(f"vision_ssm.cli.{module}"), function)(words[1:])

from collections.abc import Sequence

from vision_ssm.cli.options import run_named

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
    models = (
        "MODEL is a timm name with its published weights, NAME=FILE with those of a file, or NAME=random.\n"
        "RUN=random is the model of a run with random weights."
    )
    return run_named("analyze", "ANALYSIS MODEL|RUN...", ANALYSES, words, models)
